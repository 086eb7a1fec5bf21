"""vLLM's ``LLM`` with our degrees as further arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import vllm

from omni_sp.errors import ConfigError
from omni_sp.llm.speculation.settings import SHORT_OPTIONS, WORKER, SpeculationSettings, parse, with_short_options
from omni_sp.llm.vllm import cpu_env, internals
from omni_sp.llm.vllm.config import LlmParallelConfig
from omni_sp.llm.vllm.model_support import require_heads_for, require_supported_model, speculation_method
from omni_sp.llm.vllm.step_metrics import StepCounter, StepCounts, start_step_counter

_FEATURES = (
    "enable_lora", "pipeline_parallel_size", "data_parallel_size", "quantization", "runner",
    "decode_context_parallel_size", "prefill_context_parallel_size", "enable_dbo",
)  # fmt: skip
_MEMORY = {"gpu_memory_utilization", "kv_cache_memory_bytes"}


class LLM(vllm.LLM):  # type: ignore[misc]  # known where vLLM is installed
    """vLLM's ``LLM`` over ranks that share a prompt's tokens. It takes all arguments of ``vllm.LLM``.

    The ranks trade tokens for heads around attention, as DeepSpeed-Ulysses (arXiv 2309.14509) does.

    Args:
        model: a folder or hub id of a Llama, Mistral, Qwen2 or Qwen3.
        tensor_parallel_size: ranks that split the weights; with sequence parallelism, ranks within each of its ranks.
        ulysses_sequence_parallel_size: ranks that share the tokens of a step. None or 1: vLLM runs unchanged.
        enable_shift_parallel: run steps of few tokens by tensor parallelism over all ranks, with the same weights.
        shift_parallel_threshold: the most tokens of such a step. None: measured at the first step, each way in turns.
        speculative_config: vLLM's; the methods "suffix" and "arctic" are ours, see docs/llm.md.
        **options: all other arguments of ``vllm.LLM``.

    Raises:
        ConfigError: the degrees are invalid, or an option does not run beside sequence parallelism.
        UnsupportedModelError: the model is of another architecture.
    """

    def __init__(
        self,
        model: str,
        *,
        tensor_parallel_size: int = 1,
        ulysses_sequence_parallel_size: int | None = None,
        enable_shift_parallel: bool = False,
        shift_parallel_threshold: int | None = None,
        speculative_config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if ulysses_sequence_parallel_size is None and (enable_shift_parallel or shift_parallel_threshold is not None):
            raise ConfigError(
                "enable_shift_parallel and shift_parallel_threshold need ulysses_sequence_parallel_size=N: the ranks "
                "that share a prompt"
            )
        speculation, own_speculation = _take_speculation(speculative_config, options)
        settings = LlmParallelConfig(
            sequence_parallel_size=1 if ulysses_sequence_parallel_size is None else ulysses_sequence_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            enable_shift_parallel=enable_shift_parallel,
            shift_parallel_threshold=shift_parallel_threshold,
            speculation=speculation,
        )
        self._counter: StepCounter | None = None
        if settings.is_sharded:
            require_supported_model(
                model,
                settings,
                speculation=speculation_method(own_speculation),
                **{name: options[name] for name in _FEATURES if name in options},
            )
            if internals.runs_on_cpu():
                cpu_env.set_defaults(settings.world_size, memory_is_set=not _MEMORY.isdisjoint(options))
        if settings.keeps_states:
            require_heads_for(model, settings)
        if settings.prefers_eager and not options.setdefault("enforce_eager", True):
            reason = settings.reason_for_eager(on_cpu=internals.runs_on_cpu())
            if reason is not None:
                raise ConfigError(f"{reason}: leave enforce_eager=False")
        if settings.is_enabled:
            self._counter = start_step_counter()
            settings = replace(settings, step_counts_file=str(self._counter.path))
            options["additional_config"] = settings.additional_config(options.get("additional_config"))
        super().__init__(model=model, tensor_parallel_size=settings.world_size, **options)
        if self._counter is None:  # a SwiftKV model is counted without a flag of ours
            found = internals.settings_of(getattr(self.llm_engine, "vllm_config", None))
            self._counter = None if found is None else StepCounter.open(found.step_counts_file)
        if settings.is_sharded and self._counter is not None and not self._counter.read().models:
            raise ConfigError(
                "vLLM's processes did not load the plugin omni_sp: install omni-sp where they run, and name it in "
                "VLLM_PLUGINS if you set that"
            )

    @property
    def steps(self) -> StepCounts | None:
        """Counts of steps and drafts so far, and the threshold; None where vLLM runs as without us."""
        return None if self._counter is None else self._counter.read()


def _take_speculation(
    speculative_config: Mapping[str, Any] | None, options: dict[str, Any]
) -> tuple[SpeculationSettings | None, dict[str, Any] | None]:
    """Our speculation, and vLLM's own: one of them is None, or both. ``options`` becomes what vLLM is given of it."""
    if isinstance(speculative_config, str):
        raise ConfigError(f"speculative_config={speculative_config!r}: give a dict")
    given = {name: value for name in SHORT_OPTIONS if (value := options.pop(name, None)) is not None}
    entries = with_short_options(speculative_config, given)
    settings = SpeculationSettings.from_config(entries)
    own = None if settings is not None or entries is None else parse(entries)
    if settings is not None and options.setdefault("worker_cls", WORKER) != WORKER:
        raise ConfigError("our speculation brings a worker class of its own: leave worker_cls")
    chosen = own if settings is None else settings.for_vllm()
    if chosen is not None:
        options["speculative_config"] = chosen
    return settings, own
