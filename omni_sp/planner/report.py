"""A plan as text and as a picture."""

from __future__ import annotations

from html import escape

from omni_sp.planner.search import Plan

_COLOURS = {
    "linear": "#4c72b0",
    "attention": "#55a868",
    "exchange": "#c44e52",
    "host": "#ccb974",
    "transfer": "#8172b2",
    "encoder": "#64b5cd",
    "vae": "#8c8c8c",
}
_BEST = 5


def as_text(plan: Plan) -> str:
    """A table of the best few, and a sentence for each of the others."""
    cost, on = plan.cost, plan.machine
    frames = f", {cost.size.frames} frames" if cost.size.frames > 1 else ""
    forwards = f"{cost.steps} steps x {cost.branches} branches" if cost.branches > 1 else f"{cost.steps} steps"
    how = "estimated from its weights" if cost.is_estimate else "counted"
    lines = [
        f"{cost.name}, {cost.size.width} x {cost.size.height}{frames}, {forwards}, on {plan.gpus} x {on.name} "
        f"({on.tflops:g} TFLOPS, {on.memory_gb:g} GB, {on.link.gb_per_s:g} GB/s between them)",
        f"one forward: {cost.flops / 1e12:.1f} TFLOP ({how}), of it attention {cost.attention_flops / cost.flops:.0%}; "
        f"{cost.tokens} tokens, {cost.heads} heads, {cost.blocks} blocks",
        "",
        f"{'degrees':60}{'s':>9}{'speed-up':>10}{'GB':>7}{'an hour':>9}",
    ]
    for one in plan.choices[:_BEST]:
        speedup = f"{plan.alone.seconds / one.seconds:.2f}" if plan.alone else "-"
        hourly = 3600 / one.seconds * one.degrees.data_parallel_size
        lines.append(f"{one.degrees!s:60}{one.seconds:9.2f}{speedup:>10}{one.memory_gb:7.0f}{hourly:9.1f}")
    taken = ", ".join(f"{name}={value}" for name, value in plan.config_arguments.items() if value is True or value > 1)
    replicas = plan.best.data_parallel_size
    also = f", {replicas} engines side by side" if replicas > 1 else ""
    if plan.reasons:
        lines += ["", "why not the others:"]
        lines += [f"  {degrees}: {reason}" for degrees, reason in plan.reasons]
    lines += [
        "",
        f"take: {taken or 'one rank'}{also}",
        f"Predicted from what was {on.source}."
        if on.source.startswith("measured")
        else "Predicted from published figures of the devices, not measured.",
    ]
    return "\n".join(lines)


def best_in_words(plan: Plan) -> str:
    """Why the best choice is that, for one line."""

    def text_of(seconds: float) -> str:
        return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.3g} s"

    best, cost = plan.choices[0], plan.cost
    frames = f" x {cost.size.frames} frames" if cost.size.frames > 1 else ""
    text = f"{text_of(best.seconds)} are predicted for {cost.size.width} x {cost.size.height}{frames}"
    if plan.alone is not None and best is not plan.alone:
        text += f", {text_of(plan.alone.seconds)} on one rank"
    if len(plan.choices) > 1:
        second = plan.choices[1]
        reason = dict(plan.reasons).get(second.degrees, "it takes longer")
        text += f"; then comes {second.degrees} with {text_of(second.seconds)}: {reason}"
    return text


def as_svg(plan: Plan) -> str:
    """A bar for each choice, of the seconds that each part takes."""
    scale = 480 / max(one.seconds for one in plan.choices)
    height = 24 * len(plan.choices) + 60
    shapes = [f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{height}" font-family="sans-serif">']
    shapes.append('<rect width="100%" height="100%" fill="white"/>')
    x = 10.0
    for part, colour in _COLOURS.items():
        shapes.append(f'<rect x="{x:g}" y="10" width="12" height="12" fill="{colour}"/>')
        shapes.append(f'<text x="{x + 16:g}" y="20" font-size="12">{part}</text>')
        x += 90
    for row, one in enumerate(plan.choices):
        y = 40 + 24 * row
        shapes.append(f'<text x="10" y="{y + 13}" font-size="12">{escape(str(one.degrees))}</text>')
        x = 330.0
        for part, colour in _COLOURS.items():
            width = one.parts[part] * scale
            shapes.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="18" fill="{colour}"/>')
            x += width
        shapes.append(f'<text x="{x + 6:.1f}" y="{y + 13}" font-size="12">{one.seconds:.2f} s</text>')
    return "\n".join([*shapes, "</svg>"]) + "\n"
