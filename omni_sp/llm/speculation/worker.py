"""vLLM's worker, which hands its runner to our proposer: vLLM tells a proposer no names of requests."""

from __future__ import annotations

from typing import Any

from omni_sp.llm.vllm import internals

_STOCK: Any = internals.stock_worker_class()


class Worker(_STOCK):  # type: ignore[misc]  # known when it runs
    """The platform's worker of vLLM."""

    def load_model(self, *arguments: Any, **named: Any) -> Any:
        """Load the model, then attach the proposer."""
        result = super().load_model(*arguments, **named)
        internals.proposer_of(self.model_runner).attach(self.model_runner)
        return result
