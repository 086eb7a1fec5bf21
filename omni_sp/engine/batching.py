"""Several requests in one call of the pipeline, each with its own prompt and seed, where that is proven exact.

In a batch, short prompts are padded to the longest, and some pipelines let the padding be attended to, or draw noise
from one generator for all. So a pipeline's name proves nothing: when the ranks start, two small pictures are drawn
alone and in a batch, and requests share a call only where these agree.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omni_sp.config import OmniDiffusionSamplingParams
from omni_sp.engine.messages import Call, Done
from omni_sp.errors import CallFailedError, InvalidInputError
from omni_sp.pipelines.arguments import Prompt, call_arguments, small_arguments
from omni_sp.pipelines.capabilities import PipelineCapabilities

BATCH, ROUNDING, SMALLEST = "batch", "rounding", "smallest"
"""Names of the errors that a batch's check answers with."""

_PROMPTS = ("prompt", "negative_prompt")
_PER_PROMPT = ("images", "videos", "audios", "dropped_tokens")
_SHORT, _LONG = "a star", "a small red circle on a blue background in the snow, seen from far away by a sleepy cat"
# A batch may round otherwise than one prompt does. What visible padding or a wrong seed changes is far more than this.
_TIMES = 4.0


@dataclass
class Batching:
    """Which requests may share a call of the pipeline.

    Attributes:
        max_size: prompts of one call, at most.
        wait_s: seconds that a request waits for others once the ranks are free.
        proven: the kinds of calls that prove() found exact: True for those with negative prompts.
        refused: keys of calls that the pipeline would not draw together.
    """

    max_size: int = 1
    wait_s: float = 0.0
    proven: set[bool] = field(default_factory=set)
    refused: set[Hashable] = field(default_factory=set)

    def key(self, capabilities: PipelineCapabilities, call: Call) -> Hashable | None:
        """What calls must have in common to share one call of the pipeline; None for a call that is made alone."""
        rest = dict(call.arguments)
        prompts = [rest.pop(name, None) for name in _PROMPTS]
        is_guided = prompts[1] is not None
        texts = prompts if is_guided else prompts[:1]
        if self.max_size == 1 or is_guided not in self.proven or not all(isinstance(text, str) for text in texts):
            return None
        count = rest.get(capabilities.argument_name("num_outputs_per_prompt") or "")
        # Another text, a picture or a list could be one for each prompt, and nobody here knows.
        is_plain = all(
            name == "output_type" or value is None or isinstance(value, (bool, int, float))
            for name, value in rest.items()
        )
        is_alone = count not in (None, 1) or len(call.seeds) != 1 or call.scheduler is not None
        key = (is_guided, call.adapters, *sorted(rest.items())) if is_plain and not is_alone else None
        return None if key in self.refused else key

    def prove(
        self, capabilities: PipelineCapabilities, run: Callable[[Call], Done], report: Callable[[str], None]
    ) -> None:
        """Draw two small pictures alone and together, without negative prompts and with them, and note what agrees.

        ``run`` makes one call on all ranks; ``report`` is called with what will not be drawn in batches, and why.
        """
        if self.max_size == 1:
            return
        for is_guided in (False, True):
            what = "requests with negative prompts" if is_guided else "requests"
            try:
                call = _trial(capabilities, is_guided=is_guided)
                if call is None:
                    continue
                errors = run(call).errors
            except (InvalidInputError, CallFailedError) as error:
                report(f"{what} are drawn one by one: {error}")
                continue
            batch, rounding, smallest = errors[BATCH], errors[ROUNDING], errors[SMALLEST]
            if batch <= min(max(smallest, _TIMES * rounding), _TIMES * smallest):
                self.proven.add(is_guided)
            else:
                report(
                    f"{what} are drawn one by one: {capabilities.name} draws otherwise in a batch (relative error "
                    f"{batch:.0e}, of which {rounding:.0e} is there with equal prompts)"
                )


def merge_calls(name: str, calls: Sequence[Call]) -> Call:
    """One call in place of several that have the same key()."""
    first = calls[0]
    lists = {name: [call.arguments[name] for call in calls] for name in _PROMPTS if name in first.arguments}
    return replace(
        first,
        request_id=name,
        arguments={**first.arguments, **lists},
        seeds=tuple(seed for call in calls for seed in call.seeds),
        previews=any(call.previews for call in calls),
    )


def call_for(call: Call, index: int) -> Call:
    """The call for one prompt of a call that merge_calls() may have made."""
    lists = {name: call.arguments.get(name) for name in _PROMPTS}
    own = {name: texts[index] for name, texts in lists.items() if isinstance(texts, list)}
    return replace(call, arguments={**call.arguments, **own}, seeds=call.seeds[index : index + 1])


def split_result(done: Done, calls: Sequence[Call]) -> list[Done]:
    """The results of a merged call, one for each of the calls that it stands for.

    Raises:
        ValueError: the pipeline gave another number of results than it had prompts.
    """
    assert done.result is not None, "rank 0 answers with a result"
    parts = []
    for index, call in enumerate(calls):
        own: dict[str, Any] = {}
        for kind in _PER_PROMPT:
            rows = getattr(done.result, kind)
            if rows and len(rows) != len(calls):
                raise ValueError(f"{len(rows)} {kind} for {len(calls)} prompts")
            own[kind] = rows[index : index + 1]
        parts.append(replace(done, request_id=call.request_id, result=replace(done.result, **own)))
    return parts


def _trial(capabilities: PipelineCapabilities, *, is_guided: bool) -> Call | None:
    """Two small pictures in a batch; None where there can be none."""
    takes = capabilities.parameters
    needed = {"prompt", "generator"} | ({"negative_prompt"} if is_guided else set())
    if capabilities.needs_image or not needed <= takes.keys():
        return None
    scale = 2.0 if is_guided and "true_cfg_scale" in takes else None
    params = OmniDiffusionSamplingParams(true_cfg_scale=scale)
    calls = []
    for seed, (text, other) in enumerate([(_SHORT, _LONG), (_LONG, _SHORT)]):
        prompt = Prompt(text=text, negative_text=other if is_guided else None)
        arguments = small_arguments(capabilities, call_arguments(capabilities, prompt, params), params)
        calls.append(Call(request_id=f"batch-check-{seed}", arguments=arguments, seeds=(seed,)))
    return replace(merge_calls("batch-check", calls), check="batch")
