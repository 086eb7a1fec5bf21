"""vLLM's decoders, able to share tokens. Where nobody asks for that, they do what vLLM's own do."""

from __future__ import annotations

from typing import Any

from omni_sp.llm.vllm import internals
from omni_sp.llm.vllm.shift_parallel import ShiftParallelModel


def sequence_parallel_class(architecture: str) -> Any:
    """A class for vLLM's registry."""
    stock = internals.stock_class(architecture)

    class SequenceParallelModel(stock):  # type: ignore[valid-type, misc]  # known when it runs
        """A stock decoder whose steps are cut over ranks where that was asked for; see omni_sp.llm.vllm.shift_parallel.

        vLLM derives classes of its own from it (for embeddings, for classification), so it stays one to derive from.
        """

        def __init__(self, *, vllm_config: Any, prefix: str = "", **more: Any) -> None:
            settings = internals.settings_of(vllm_config)
            if settings is not None:
                internals.require_known()
                internals.refuse_what_is_not_handled(vllm_config, settings)
            super().__init__(vllm_config=vllm_config, prefix=prefix, **more)
            self._shift_parallel = (
                None if settings is None else ShiftParallelModel(self, settings, internals.max_step_tokens(vllm_config))
            )

        def forward(
            self,
            input_ids: Any,
            positions: Any,
            intermediate_tensors: Any = None,
            inputs_embeds: Any = None,
            **more: Any,
        ) -> Any:
            """All tokens of the step in, their last hidden states out, on every rank."""
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
