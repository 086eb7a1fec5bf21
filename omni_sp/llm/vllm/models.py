"""vLLM's decoders, which share tokens among ranks where our flags are given, and are vLLM's own otherwise."""

from __future__ import annotations

from typing import Any

from omni_sp.llm.vllm import internals
from omni_sp.llm.vllm.shift_parallel import ShiftParallelModel


def sequence_parallel_class(architecture: str) -> Any:
    """The class for vLLM's registry, derived from vLLM's own."""
    stock = internals.stock_class(architecture)

    class SequenceParallelModel(stock):  # type: ignore[valid-type, misc]  # known when it runs
        """A stock decoder whose steps run over ranks; see omni_sp.llm.vllm.shift_parallel.

        vLLM derives further classes from it (for embeddings, for classification), so this is a class, not a wrapper.
        """

        def __init__(self, *, vllm_config: Any, prefix: str = "", **more: Any) -> None:
            settings = internals.settings_of(vllm_config)
            keeps_states = settings is not None and settings.keeps_states
            settings = settings if settings is not None and settings.is_sharded else None
            if settings is not None:
                internals.require_known_vllm()
                internals.require_supported_config(vllm_config, settings)
            super().__init__(vllm_config=vllm_config, prefix=prefix, **more)
            self._keeps_states = keeps_states
            self.kept_states: Any = None  # of the current step, for a trained speculator
            self._shift_parallel: ShiftParallelModel | None = None
            if settings is not None:
                compiled, max_tokens = internals.runs_compiled(vllm_config), internals.max_step_tokens(vllm_config)
                self._shift_parallel = ShiftParallelModel(
                    self._layers_over_ranks(), settings, max_tokens, compiled=compiled
                )
                if compiled:
                    internals.keep_out_of_compile_key(vllm_config)

        def _layers_over_ranks(self) -> list[Any]:
            """The layers in which ranks share tokens or heads."""
            return internals.decoder_layers(self)

        def forward(
            self,
            input_ids: Any,
            positions: Any,
            intermediate_tensors: Any = None,
            inputs_embeds: Any = None,
            **more: Any,
        ) -> Any:
            """The last hidden states of all tokens of the step, on every rank."""
            states = self._run_step(input_ids, positions, intermediate_tensors, inputs_embeds, **more)
            if self._keeps_states:
                self.kept_states = states
            return states

        def _run_step(
            self, input_ids: Any, positions: Any, intermediate_tensors: Any, inputs_embeds: Any, **more: Any
        ) -> Any:
            if self._shift_parallel is None:
                return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **more)
            assert intermediate_tensors is None, "pipeline parallelism was refused"
            return self._shift_parallel.run(self.model, input_ids, positions, inputs_embeds)

    SequenceParallelModel.__name__ = SequenceParallelModel.__qualname__ = architecture
    return SequenceParallelModel


LlamaForCausalLM = sequence_parallel_class("LlamaForCausalLM")
MistralForCausalLM = sequence_parallel_class("MistralForCausalLM")
Qwen2ForCausalLM = sequence_parallel_class("Qwen2ForCausalLM")
Qwen3ForCausalLM = sequence_parallel_class("Qwen3ForCausalLM")
