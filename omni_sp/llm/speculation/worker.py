"""vLLM's worker, which hands its runner to our proposer: vLLM tells a proposer neither the names of requests, nor
which token is where in a step.
"""

from __future__ import annotations

from typing import Any

from omni_sp.llm.vllm.internals import keep_out_of_compile_key
from omni_sp.llm.vllm.speculation_internals import proposer_of, repair_sampling, stock_worker_class

_STOCK: Any = stock_worker_class()


class Worker(_STOCK):  # type: ignore[misc]  # known when it runs
    """The platform's worker of vLLM."""

    def load_model(self, *arguments: Any, **named: Any) -> Any:
        """Load the model, then attach the proposer."""
        result = super().load_model(*arguments, **named)
        repair_sampling()
        proposer_of(self.model_runner).attach(self.model_runner)
        keep_out_of_compile_key(self.vllm_config)  # vLLM compiles in the first step, which comes after this
        return result
