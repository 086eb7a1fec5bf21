"""vLLM's decoders, able to share tokens. Where nobody asks for that, they do what vLLM's own do."""

from __future__ import annotations

from typing import Any

from omni_sp.llm import adapter
from omni_sp.llm.weave import Weave


def sharing_tokens(architecture: str) -> Any:
    """A class for vLLM's registry."""
    stock = adapter.stock_class(architecture)

    class SharingTokens(stock):  # type: ignore[valid-type, misc]  # known when it runs
        """A stock decoder whose steps are cut over ranks where that was asked for; see omni_sp.llm.weave.

        vLLM derives classes of its own from it (for embeddings, for classification), so it stays one to derive from.
        """

        def __init__(self, *, vllm_config: Any, prefix: str = "", **more: Any) -> None:
            settings = adapter.settings_of(vllm_config)
            if settings is not None:
                adapter.require_known()
                adapter.refuse_what_is_not_handled(vllm_config, settings)
            super().__init__(vllm_config=vllm_config, prefix=prefix, **more)
            self._weave = None if settings is None else Weave(self, settings, adapter.most_tokens(vllm_config))

        def forward(
            self,
            input_ids: Any,
            positions: Any,
            intermediate_tensors: Any = None,
            inputs_embeds: Any = None,
            **more: Any,
        ) -> Any:
            """All tokens of the step in, their last hidden states out, on every rank."""
            if self._weave is None:
                return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **more)
            assert intermediate_tensors is None, "pipeline parallelism was refused"
            return self._weave.run(self.model, input_ids, positions, inputs_embeds)

    SharingTokens.__name__ = SharingTokens.__qualname__ = architecture
    return SharingTokens


LlamaForCausalLM = sharing_tokens("LlamaForCausalLM")
MistralForCausalLM = sharing_tokens("MistralForCausalLM")
Qwen2ForCausalLM = sharing_tokens("Qwen2ForCausalLM")
Qwen3ForCausalLM = sharing_tokens("Qwen3ForCausalLM")
