"""An engine in a process of its own: python -m tests.llm.vllm.run_vllm CASE.json RESULT.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from omni_sp.testing.models import memory_of_rank


def measure_again(model: Any) -> None:
    """Let a rank measure its threshold at the next step."""
    model._shift_parallel._threshold = None


def is_compiled(model: Any) -> bool:
    """Whether a rank's decoder ran as a graph."""
    inner = model.model
    return not inner.do_not_compile and (inner.compiled or getattr(inner, "aot_compiled_fn", None) is not None)


def drafts_of(worker: Any, states: list[list[float]], tokens: list[int]) -> list[list[int]]:
    """What a rank's part of the trained speculator drafts, all ranks at once."""
    heads = worker.model_runner.drafter._heads
    chosen = torch.tensor(states, dtype=next(heads._speculator.parameters()).dtype)
    drafted: list[list[int]] = heads._speculator.draft(chosen, torch.tensor(tokens), heads._count).tolist()
    return drafted


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text())
    import vllm
    from vllm import SamplingParams
    from vllm.model_executor.models.adapters import as_embedding_model

    from omni_sp.llm import LLM
    from omni_sp.llm.vllm import models

    # By the module's own name: vLLM's processes look it up there.
    from tests.llm.vllm.run_vllm import drafts_of, is_compiled, measure_again

    llm = LLM(**case["options"])
    assert issubclass(as_embedding_model(models.LlamaForCausalLM), models.LlamaForCausalLM)
    sampling = greedy = SamplingParams(
        temperature=0.0, max_tokens=case["count"], ignore_eos=True, detokenize=False, logprobs=case.get("logprobs")
    )
    logprobs: list[list[float]] = []  # of the first new token after each prompt, by token id

    def answers(batch: list[list[int]]) -> list[list[int]]:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in batch], sampling, use_tqdm=False)
        for output in outputs if "logprobs" in case else []:
            table = output.outputs[0].logprobs[0]
            logprobs.append([table[token].logprob for token in sorted(table)])
        return [list(output.outputs[0].token_ids) for output in outputs]

    result: dict[str, Any] = {"version": vllm.__version__.partition("+")[0], "tokens": [], "steps_after": []}
    for batch in case["batches"]:
        result["tokens"].append(answers(batch))
        result["steps_after"].append(llm.steps)
        if "states" in case and "verified" not in result:
            metrics = {metric.name: metric for metric in llm.get_metrics()}
            result["accepted_by_place"] = metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values
            result["verified"] = metrics["vllm:spec_decode_num_drafts"].value
        if case["aborts"]:  # a request that ends early, of which nothing may be left
            llm.llm_engine.add_request("aborted", {"prompt_token_ids": batch[0]}, sampling)
            for _ in range(4):
                llm.llm_engine.step()
            llm.llm_engine.abort_request(["aborted"])
    if "states" in case:
        result["drafts"] = llm.collective_rpc(drafts_of, args=(case["states"], case["state_tokens"]))
        # Without a seed: vLLM's build for CPUs fails with one where a prompt is computed in chunks.
        sampling = SamplingParams(temperature=0.8, top_k=9, max_tokens=case["count"], ignore_eos=True, detokenize=False)
        result["drawn"] = answers(case["batches"][0])
        sampling = greedy
    if case["options"].get("enforce_eager") is False:
        result["compiled"] = all(llm.apply_model(is_compiled))
    result |= {"logprobs": list(logprobs), "steps": llm.steps, "memory": llm.apply_model(memory_of_rank)}
    if llm.steps is not None and llm.steps.threshold >= 0:
        llm.apply_model(measure_again)
        result |= {"tokens_again": answers(case["batches"][-1]), "measured": llm.steps.threshold}
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
