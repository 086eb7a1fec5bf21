"""vLLM's decoders, able to share tokens. Where nobody asked for that, they *are* vLLM's own."""

from __future__ import annotations

from typing import Any

from omni_sp.llm import adapter
from omni_sp.llm.weave import Weave


def sharing_tokens(architecture: str) -> Any:
    """A class for vLLM's registry."""
    stock = adapter.stock_class(architecture)

    class SharingTokens(stock):  # type: ignore[valid-type, misc]  # known when it runs
        """A stock decoder whose steps are cut over ranks; see omni_sp.llm.weave."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            if adapter.settings_of(kwargs["vllm_config"]) is None:
                return stock(*args, **kwargs)  # no instance of this class, so __init__ below is not called
            return super().__new__(cls)

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            settings = adapter.settings_of(vllm_config)
            assert settings is not None
            adapter.refuse_what_is_not_handled(vllm_config, settings)
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self._weave = Weave(self, settings)

        def forward(
            self, input_ids: Any, positions: Any, intermediate_tensors: Any = None, inputs_embeds: Any = None
        ) -> Any:
            """All tokens of the step in, their last hidden states out, on every rank."""
            assert intermediate_tensors is None, "pipeline parallelism was refused"
            return self._weave.run(self.model, input_ids, positions, inputs_embeds)

    SharingTokens.__name__ = SharingTokens.__qualname__ = architecture
    return SharingTokens


LlamaForCausalLM = sharing_tokens("LlamaForCausalLM")
MistralForCausalLM = sharing_tokens("MistralForCausalLM")
Qwen2ForCausalLM = sharing_tokens("Qwen2ForCausalLM")
Qwen3ForCausalLM = sharing_tokens("Qwen3ForCausalLM")
