"""An engine in a process of its own: python -m tests.llm.run_vllm CASE.json RESULT.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def held(model: Any) -> dict[str, int]:
    """Bytes of a rank: of the decoder's matrices, of all weights, and of a token's keys and values."""
    matrices = weights = kept = 0
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() in seen:
            continue
        seen.add(parameter.data_ptr())
        weights += parameter.nbytes
        matrices += parameter.nbytes if "_proj.weight" in name else 0
    for layer in model.model.layers:
        attention = layer.self_attn.attn
        kept += 2 * attention.num_kv_heads * attention.head_size * 4
    return {"matrices": matrices, "weights": weights, "kept_per_token": kept}


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text())
    from vllm import SamplingParams

    from omni_sp.llm import LLM

    llm = LLM(**case["options"])
    sampling = SamplingParams(temperature=0.0, max_tokens=case["count"], ignore_eos=True, detokenize=False)
    said = []
    for batch in case["batches"]:
        answers = llm.generate([{"prompt_token_ids": prompt} for prompt in batch], sampling, use_tqdm=False)
        said.append([list(answer.outputs[0].token_ids) for answer in answers])
    result = {"said": said, "steps": llm.steps, "held": llm.apply_model(held)}
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
