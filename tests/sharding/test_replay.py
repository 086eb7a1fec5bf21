"""Blocks are followed once and then replayed: bit for bit what following gives, whatever changes between two calls."""

from __future__ import annotations

import copy
import random
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor, nn

from omni_sp import ParallelMesh, parallelize
from omni_sp.sharding import BlockCounts, Plan, Split, foreign_code
from omni_sp.sharding.replay.recorder import Recorder
from omni_sp.sharding.tracked import attention as tracked_attention
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import randomise, relative_error
from tests.library_versions import OFFLOADS_GROUPS_ON_CPU
from tests.one_rank import by_one_rank
from tests.sharding.operations import COMPUTE, MOVE, WRITE
from tests.sharding.test_changed import add_lora
from tests.sharding.zoo.all import ENTRIES
from tests.sharding.zoo.check import LAYOUTS, build, first_tensor
from tests.thorough import THOROUGH, in_turns

QWEN, SD3 = "QwenImageTransformer2DModel", "SD3Transformer2DModel"
# What decides by other objects than tensors and plain values, or by tokens' numbers (experts), is followed.
FOLLOWED = (
    "cache", "reference, first step", "reference, later step", "window", "WanAnimate2", "AnyFlowFAR", "HiDream",
    "Nucleus", "RFD4",
)  # fmt: skip
FIRST = {entry.name: entry_id for entry_id, entry in reversed(ENTRIES.items())}
# tests/sharding/test_zoo.py replays every class, and compares with one process.
RUNS = in_turns([x for x in ENTRIES if ENTRIES[x].runs_here and (THOROUGH or x in [*FIRST.values()][::3])], LAYOUTS)


def varied(name: str, value: Any, number: int) -> Any:
    """Other numbers of the same shape; of a text's mask, other numbers too, but no row without a key."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
        return value * (1 + 0.1 * number)
    is_whole = isinstance(value, Tensor) and value.dtype in (torch.bool, torch.int64)
    if is_whole and "mask" in name and name.startswith("encoder"):
        changed: Tensor = value.clone()
        changed[:, 1 + number % 3] = number % 2 == 0
        return changed
    return value


def kernels_of(call: Callable[[], Any]) -> list[str]:
    """The matrix products that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        call()
    return [event.name for event in seen.events() if event.name in ("aten::mm", "aten::bmm", "aten::addmm")]


@pytest.mark.parametrize("is_inference", [False, True])
def test_a_recording_takes_the_kernels_of_a_replay(is_inference: bool) -> None:
    """For a batch that is not contiguous, linear chooses by whether its weight requires gradients."""
    layer, x = nn.Linear(24, 24), torch.randn(2, 24, 9).mT
    with torch.no_grad(), torch.inference_mode(is_inference):
        recorder = Recorder([x], [False], [*layer.parameters()])
        recorded = kernels_of(lambda: recorder.record(lambda: layer(x)))
        assert recorded == kernels_of(lambda: layer(x)) != []


def inputs_of(entry_id: str, number: int) -> dict[str, Any]:
    inputs: dict[str, Any] = ENTRIES[entry_id].inputs()
    return {name: varied(name, value, number) for name, value in inputs.items()}


def replay_and_follow(mesh: ParallelMesh, entry_id: str) -> tuple[list[bool], bool, BlockCounts, bool]:
    """Whether forwards with other numbers and masks equal those of following; whether they send as much; how blocks
    ran; whether all is undone."""
    warnings.simplefilter("ignore")
    model = build(entry_id)
    outputs: list[list[Tensor]] = []
    sent: list[list[Any]] = []
    with torch.no_grad():
        for replay in (False, True):
            handle = parallelize(model, mesh, replay=replay)
            outputs.append([])
            sent.append([])
            for number in (0, 1, 2, 1):
                axes = (mesh.ulysses, mesh.ring, mesh.sequence)
                for axis in axes:
                    axis.traffic.reset()
                outputs[-1].append(first_tensor(model(**inputs_of(entry_id, number))))
                sent[-1].append([(dict(axis.traffic.calls), dict(axis.traffic.bytes)) for axis in axes])
            counts = handle.blocks
            handle.remove()
    undone = not any("_compiled_call_impl" in vars(module) for module in model.modules())
    equal = [torch.equal(one, other) for one, other in zip(*outputs, strict=True)]
    return equal, sent[0] == sent[1], counts, undone


@pytest.mark.parametrize(("entry_id", "layout"), RUNS, ids=str)
def test_replayed_is_what_followed_is(ranks: RankPool, entry_id: str, layout: tuple[int, int]) -> None:
    ulysses, ring = layout
    for equal, sends_the_same, counts, undone in ranks.run(replay_and_follow, entry_id, ulysses=ulysses, ring=ring):
        assert all(equal)
        # Else a rank that follows and one that replays could wait for each other.
        assert sends_the_same
        assert undone
        if not any(word in entry_id for word in FOLLOWED):
            assert counts.replayed
            assert not counts.followed


def reads_of_masks(mesh: ParallelMesh, entry_id: str, replay: bool) -> tuple[list[int], list[bool], BlockCounts]:
    """How often each of some forwards looks at its mask's numbers, whether it is exact, and how blocks ran after one.

    Every forward has another mask.
    """
    warnings.simplefilter("ignore")
    model, reads, exact = build(entry_id), [], []
    calls = [inputs_of(entry_id, number) for number in range(10)]
    with torch.no_grad():
        wanted = by_one_rank(mesh, lambda: [first_tensor(model(**inputs)) for inputs in calls])
        handle = parallelize(model, mesh, replay=replay)
        for inputs, expected in zip(calls, wanted, strict=True):
            with patch.object(tracked_attention, "_split_mask", wraps=tracked_attention._split_mask) as split:
                exact.append(relative_error(first_tensor(model(**inputs)), expected) <= 1e-5)
            reads.append(split.call_count)
            if len(reads) == 1:
                handle.reset_counts()
        counts = handle.blocks
        handle.remove()
    return reads, exact, counts


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("entry_id", ["HunyuanVideoTransformer3DModel", QWEN])
def test_masks_are_looked_at_once_a_forward(ranks: RankPool, entry_id: str, replay: bool) -> None:
    """Whether the blocks get it, as those of the first, or make it anew of a mask that they get. None is recorded."""
    for reads, exact, counts in ranks.run(reads_of_masks, entry_id, replay, ulysses=2):
        assert all(exact)
        assert reads == [2 if entry_id == QWEN and not replay else 1] * 10
        assert not counts.recorded
        assert not counts.followed
        assert bool(counts.replayed) == replay


class Halves(nn.Module):
    """A block that returns two views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return y[:, :4], y[:, 4:]


def shared_memory_of_results(mesh: ParallelMesh) -> list[bool]:
    """Whether the results of a block count their writes together, when recorded and when replayed."""
    foreign_code.KNOWN_PACKAGES.add("tests")
    model, found = randomise(Model(Halves())), []
    model.register_forward_hook(lambda _module, _args, output: found.append(output[0].writes is output[1].writes))
    with torch.no_grad():
        parallelize(model, mesh, plan=PLAN)
        for _ in range(2):
            model(torch.ones(1, 7, 8))
    foreign_code.KNOWN_PACKAGES.discard("tests")
    return found


def test_results_that_share_memory_still_do(ranks: RankPool) -> None:
    assert ranks.run(shared_memory_of_results, ulysses=2) == [[True, True]] * 2


def more_lora(model: Any) -> None:
    model.set_adapters("style", 0.4)


def two_loras(model: Any) -> None:
    """Two that differ in their numbers alone; the first is on."""
    from peft import LoraConfig

    for name in ("one", "two"):
        model.add_adapter(LoraConfig(r=3, target_modules="all-linear"), adapter_name=name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    model.set_adapters("one")


def hotswapped(model: Any) -> None:
    """Other numbers in the place of an adapter's."""
    from peft import get_peft_model_state_dict

    state = {name: -1.5 * x for name, x in get_peft_model_state_dict(model, adapter_name="style").items()}
    model.load_lora_adapter(state, adapter_name="style", prefix=None, hotswap=True)


def replaced_weight(model: Any) -> None:
    layer = blocks_of(model)[0].get_submodule("attn.to_q")
    layer.weight = nn.Parameter(layer.weight.flip(0).clone(), requires_grad=False)


def weight_in_place(model: Any) -> None:
    with torch.no_grad():
        blocks_of(model)[1].get_submodule("attn.to_q").get_parameter("weight").mul_(-1)


def new_data(model: Any) -> None:
    """As offloading moves weights."""
    weight = blocks_of(model)[1].get_submodule("attn.to_q").get_parameter("weight")
    weight.data = weight.data.flip(0).clone()


def replaced_processor(model: Any) -> None:
    attention = blocks_of(model)[0].get_submodule("attn")
    kind = type(attention.get_processor())

    class Louder(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            one, *others = super().__call__(*args, **kwargs)
            return (one * 1.5, *others)

    attention.set_processor(Louder())


def changed_attribute(model: Any) -> None:
    norm = next(module for module in blocks_of(model)[0].modules() if isinstance(module, nn.LayerNorm))
    norm.eps = 0.3


def hooked(model: Any) -> None:
    blocks_of(model)[0].register_forward_hook(lambda _module, _args, output: tuple(1.5 * x for x in output))


def inner_hook(model: Any) -> None:
    blocks_of(model)[0].get_submodule("attn.to_v").register_forward_hook(lambda _module, _args, output: 1.5 * output)


def offloaded(model: Any) -> None:
    weight_in_place(model)
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def other_dtype(model: Any) -> None:
    blocks_of(model)[0].to(torch.float64)
    blocks_of(model)[0].to(torch.bfloat16)
    blocks_of(model)[0].to(torch.float32)


def put_around(owner: Any, name: str) -> None:
    """Put a function around another; once for all models."""
    original = vars(owner)[name]
    if not hasattr(original, "patched"):

        def louder(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            return tuple(1.5 * x for x in out) if isinstance(out, tuple) else 1.5 * out

        louder.patched = original  # type: ignore[attr-defined]
        setattr(owner, name, louder)


def patched_library(model: Any) -> None:
    """As people do to have another attention called."""
    put_around(transformer_qwenimage, "dispatch_attention_fn")


def patched_attention(model: Any) -> None:
    """As people do to have another kernel; diffusers' dispatcher finds torch's function in a table."""
    put_around(torch.nn.functional, "scaled_dot_product_attention")


def patched_norm(model: Any) -> None:
    """A function of torch's that is written in Python, and names itself by its name there."""
    put_around(torch.nn.functional, "layer_norm")


def patched_class(model: Any) -> None:
    """As scripts of step caches do, without a word of what the forward takes."""
    put_around(transformer_qwenimage.QwenImageTransformerBlock, "forward")


def fewer_blocks(model: Any) -> None:
    model.transformer_blocks = blocks_of(model)[:1]


def another_block(model: Any) -> None:
    blocks_of(model).append(blocks_of(model)[0])


def unpatch() -> None:
    """Give back what the changes have replaced in libraries."""
    for owner, name in (
        (transformer_qwenimage, "dispatch_attention_fn"),
        (transformer_qwenimage.QwenImageTransformerBlock, "forward"),
        (torch.nn.functional, "scaled_dot_product_attention"),
        (torch.nn.functional, "layer_norm"),
    ):
        setattr(owner, name, getattr(vars(owner)[name], "patched", vars(owner)[name]))


def dropout(model: Any) -> None:
    """A mode that changes nothing here; what it does not change must still be right."""
    model.train()
    weight_in_place(model)


CHANGES: list[tuple[Callable[[Any], None], Callable[[Any], None]]] = [
    (add_lora, more_lora),
    (add_lora, lambda model: model.disable_lora()),
    (add_lora, lambda model: model.unload_lora()),
    (add_lora, hotswapped),
    (lambda model: None, add_lora),
    (two_loras, lambda model: model.set_adapters("two")),
    (two_loras, lambda model: model.set_adapters(["one", "two"])),
    *[
        (lambda model: None, change)
        for change in (
            replaced_weight, weight_in_place, new_data, replaced_processor, changed_attribute, hooked, inner_hook,
            other_dtype, patched_library, patched_attention, patched_norm, patched_class, fewer_blocks, another_block,
            dropout, *([offloaded] if OFFLOADS_GROUPS_ON_CPU else []),
        )
    ],
]  # fmt: skip


def blocks_of(model: Any) -> Any:
    return model.transformer_blocks


def changed_after_recording(mesh: ParallelMesh, number: int, **options: Any) -> tuple[float, float, BlockCounts]:
    """Error after a change, and what it changes, of a model whose blocks were replayed before.

    Args:
        mesh: the ranks.
        number: of the change in `CHANGES`.
        **options: further ones for parallelize().
    """
    warnings.simplefilter("ignore")
    first, change = CHANGES[number]

    def expected() -> Tensor:
        reference = randomise(ENTRIES[QWEN].build())
        first(reference)
        try:
            change(reference)
            return first_tensor(reference(**ENTRIES[QWEN].inputs()))
        finally:
            unpatch()

    with torch.no_grad():
        wanted = by_one_rank(mesh, expected)
        model = randomise(ENTRIES[QWEN].build())
        first(model)
        handle = parallelize(model, mesh, **options)
        for _ in range(2):
            before = first_tensor(model(**ENTRIES[QWEN].inputs()))
        counts = handle.blocks
        try:
            change(model)
            errors = [relative_error(first_tensor(model(**ENTRIES[QWEN].inputs())), wanted) for _ in range(2)]
        finally:
            unpatch()
    return max(errors), relative_error(before, wanted), counts


@pytest.mark.parametrize(("number", "layout"), in_turns(range(len(CHANGES)), [(2, 1), (1, 2), (2, 2)]), ids=str)
def test_a_change_is_seen_at_the_next_call(ranks: RankPool, number: int, layout: tuple[int, int]) -> None:
    ulysses, ring = layout
    for error, effect, counts in ranks.run(changed_after_recording, number, ulysses=ulysses, ring=ring):
        assert counts.replayed
        assert effect > 1e-4
        assert error <= 1e-5


def scaled_per_call(mesh: ParallelMesh) -> tuple[list[float], float, BlockCounts]:
    """Errors of forwards that each give the scale of a LoRA, what the scale changes, and how blocks ran."""
    model, scales = randomise(ENTRIES[QWEN].build()), (1.0, 1.0, 0.4, 1.0, 0.4)
    add_lora(model)
    calls = [{**ENTRIES[QWEN].inputs(), "attention_kwargs": {"scale": scale}} for scale in scales]
    with torch.no_grad():
        wanted = by_one_rank(mesh, lambda: [first_tensor(model(**call)) for call in calls])
        handle = parallelize(model, mesh)
        found = [first_tensor(model(**call)) for call in calls]
        counts = handle.blocks
        handle.remove()
    errors = [relative_error(one, other) for one, other in zip(found, wanted, strict=True)]
    return errors, relative_error(wanted[1], wanted[2]), counts


def test_the_scale_of_a_lora_is_each_call_s(ranks: RankPool) -> None:
    for errors, effect, counts in ranks.run(scaled_per_call, ulysses=2):
        assert counts.replayed
        assert effect > 1e-3
        assert max(errors) <= 1e-5


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that the tensors of a call take at once, beyond those that were there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    changes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak: int = max(accumulate(changes))
    return peak


def memory_of_first_forwards(mesh: ParallelMesh) -> tuple[int, int]:
    """The most bytes of a forward that follows its blocks, and of one that records them."""
    peaks = []
    with torch.no_grad():
        for replay in (False, True):
            model = randomise(ENTRIES[QWEN].build())
            handle = parallelize(model, mesh, replay=replay)
            peaks.append(peak_bytes(lambda: model(**ENTRIES[QWEN].inputs())))  # noqa: B023
            assert bool(handle.blocks.recorded) == replay
            handle.remove()
    return peaks[0], peaks[1]


def test_recording_keeps_nothing_alive(ranks: RankPool) -> None:
    for followed, recorded in ranks.run(memory_of_first_forwards, ulysses=2):
        assert 0 < recorded <= 1.1 * followed


def under_autocast(mesh: ParallelMesh, entry_id: str) -> tuple[float, float, bool]:
    """Errors to float32 of one process and of several ranks, both in bfloat16 by autocast; whether dtypes agree."""
    warnings.simplefilter("ignore")
    entry = ENTRIES[entry_id]
    reference, model = randomise(entry.build()), randomise(entry.build())
    with torch.no_grad():
        exact = first_tensor(reference(**entry.inputs()))
        handle = parallelize(model, mesh)
        model(**entry.inputs())
        with torch.autocast("cpu", torch.bfloat16):
            alone, found = (first_tensor(one(**entry.inputs())) for one in (reference, model))
        handle.remove()
    errors = [relative_error(one.float(), exact) for one in (alone, found)]
    return errors[0], errors[1], found.dtype == alone.dtype


@pytest.mark.parametrize("entry_id", [QWEN, SD3, FIRST["AnyFlowFARTransformer3DModel"]])
def test_autocast_rounds_as_in_one_process(ranks: RankPool, entry_id: str) -> None:
    for alone, found, has_same_dtype in ranks.run(under_autocast, entry_id, ulysses=2, ring=2):
        assert has_same_dtype
        assert 0 < found <= 1.5 * alone


class Reading(nn.Module):
    """A block that decides by numbers of its arguments, and uses a tensor that somebody gave it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.extra: Any = None
        self.calls = [[0]]
        self.settings = SimpleNamespace(factor=1.0)

    def forward(self, x: Tensor, mask: Tensor, scale: float, reads: str) -> Tensor:
        if reads == "mask" and bool(mask.any()):
            x = x + mask.tolist()[0]
        if reads == "shard" and float(x.abs().amax()) > 2:
            x = x * 0.5
        if reads == "nonzero":
            x = x + mask.nonzero().sum()
        if self.extra is not None:
            x = x * self.extra
        if reads == "counts":
            self.calls[0][0] += 1
            x = x + self.calls[0][0]
        if reads == "object":
            x = x * self.settings.factor
        made = torch.tensor([1.0, 2.0] * 4)
        made += 1
        out: Tensor = self.layer(x) * scale + made
        return out


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])

    def forward(self, *args: Any) -> Any:
        return self.blocks[0](*args)


PLAN = Plan({"blocks.0": {"x": Split(dim=1)}})
NUMBERS = {
    "mask other every third time": [number // 3 for number in range(36)],
    "mask other every time": [*range(24)],
    "mask in a long round": [number % 9 for number in range(63)],
}
"""What the mask holds from call to call."""


def decided(mesh: ParallelMesh, case: str) -> tuple[list[float], BlockCounts]:
    """Errors of calls whose arguments change from one to the next."""
    foreign_code.KNOWN_PACKAGES.add("tests")
    torch.manual_seed(0)
    model = randomise(Model(Reading()))
    reads, calls = case.partition(" ")[0], []
    numbers = NUMBERS.get(case, [number % 2 for number in range(12)])
    for number, in_mask in enumerate(numbers):
        mask = torch.zeros(3)
        mask[0] = in_mask
        scale = 1.0 + (number if case == "plain other every time" else 0)
        calls.append((torch.randn(1, 7, 8), mask, scale, reads))
    blocks = [model.blocks[0]]
    assert isinstance(blocks[0], Reading)
    with torch.no_grad():
        extras = [torch.full((8,), float(number)) if case == "outside" else None for number in range(len(calls))]
        wanted = []
        for number, (call, extra) in enumerate(zip(calls, extras, strict=True)):
            blocks[0].extra, blocks[0].settings.factor = extra, 1.0 + (number % 2 if case == "object" else 0)
            wanted.append(model(*call))
        blocks[0].calls = [[0]]
        handle = parallelize(model, mesh, plan=PLAN)
        errors = []
        for number, (call, extra, expected) in enumerate(zip(calls, extras, wanted, strict=True)):
            blocks[0].extra, blocks[0].settings.factor = extra, 1.0 + (number % 2 if case == "object" else 0)
            errors.append(relative_error(model(*call), expected))
        counts = handle.blocks
        handle.remove()
    foreign_code.KNOWN_PACKAGES.discard("tests")
    return errors, counts


DECIDED: dict[str, Callable[[BlockCounts], bool]] = {
    "nothing": lambda counts: (counts.replayed, counts.recorded) == (11, 1),
    # One tape for each of two contents.
    "mask": lambda counts: (counts.replayed, counts.recorded) == (10, 2),
    "nonzero": lambda counts: (counts.replayed, counts.recorded) == (10, 2),
    # As the prompts that a server gets: the oldest makes room for the newest.
    "mask other every third time": lambda counts: (counts.replayed, counts.recorded) == (24, 12),
    # To record them would be in vain, so that it ends.
    "mask other every time": lambda counts: counts.recorded == 8 and sum(counts.followed.values()) == 16,
    "mask in a long round": lambda counts: counts.replayed >= 2 * (counts.recorded - 8) > 0,
    "plain other every time": lambda counts: counts.recorded == 12,
    "shard": lambda counts: counts.followed == Counter({"decides by the numbers of a sharded tensor": 12}),
    "counts": lambda counts: counts.followed == Counter({"changes its own attributes": 12}),
    # An object's identity is what blocks of one kind share, so a change of it is another kind.
    "object": lambda counts: counts.recorded + counts.replayed == 12,
    "outside": lambda counts: sum(counts.followed.values()) == 12,
}


@pytest.mark.parametrize("case", DECIDED)
def test_what_a_block_decides_by_is_looked_at_every_time(ranks: RankPool, case: str) -> None:
    for errors, counts in ranks.run(decided, case, ulysses=2):
        assert max(errors) <= 1e-6
        assert DECIDED[case](counts), counts


OPERATIONS = COMPUTE | MOVE | WRITE


class Program(nn.Module):
    """A block that does any operations, and leaves out those that cannot be done."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        draw = random.Random(seed)
        self.names = [draw.choice(sorted(OPERATIONS)) for _ in range(25)]
        self.numbers = [tuple(draw.randrange(8) for _ in range(4)) for _ in self.names]

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> list[Tensor]:
        slots = [x + 0, y + 0, x * 2, y - x]
        for name, (a, b, p, q) in zip(self.names, self.numbers, strict=True):
            if q == 7 and bool(mask[p % 3]):
                slots[0] = slots[0] + 1
            try:
                result = OPERATIONS[name](slots[a % 4], slots[b % 4], p, q)
            except Exception:  # shapes that do not go together, or what is refused for shards
                continue
            if isinstance(result, (tuple, list)):
                result = result[q % len(result)] if result else None
            if isinstance(result, Tensor) and result.dtype == x.dtype and 0 < result.numel() <= 600 and result.ndim > 1:
                slots[q % 4] = result.clone()
        return slots


def run_programs(mesh: ParallelMesh, seeds: list[int]) -> tuple[list[int], BlockCounts]:
    """The seeds of the programs whose replay differs from following."""
    warnings.simplefilter("ignore")
    foreign_code.KNOWN_PACKAGES.add("tests")
    wrong, total = [], BlockCounts()
    for seed in seeds:
        model, generator = randomise(Model(Program(seed))), torch.Generator().manual_seed(seed)
        calls = [
            (*(torch.randint(-5, 6, (2, 6, 4), generator=generator).float() for _ in range(2)), torch.tensor(mask))
            for mask in ([True, False, True], [True, False, True], [False, False, True], [True, False, True])
        ]
        outputs = []
        with torch.no_grad():
            for replay in (False, True):
                handle = parallelize(model, mesh, plan=PLAN, replay=replay)
                outputs.append([model(*copy.deepcopy(call)) for call in calls])
                counts = handle.blocks
                handle.remove()
        total.replayed += counts.replayed
        total.recorded += counts.recorded
        total.followed.update(counts.followed)
        pairs = [pair for one, other in zip(*outputs, strict=True) for pair in zip(one, other, strict=True)]
        if not all(torch.equal(one, other) for one, other in pairs):
            wrong.append(seed)
    foreign_code.KNOWN_PACKAGES.discard("tests")
    return wrong, total


PARTED = [55, 256]
"""Programs whose exchanges once differed between following and replaying."""


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_any_program_is_replayed_as_it_is_followed(ranks: RankPool, num_ranks: int) -> None:
    # Each number of ranks has programs of its own.
    first = 12 * (num_ranks - 2)
    seeds = list(range(400)) if THOROUGH else [*range(first, first + 12), *PARTED]
    for wrong, counts in ranks.run(run_programs, seeds, ulysses=num_ranks):
        assert not wrong
        assert counts.replayed > len(seeds) // 2
