"""A conversation with a language model over ranks that share each prompt's tokens, inside vLLM.

python examples/offline_inference_ulysses.py --model meta-llama/Llama-3.1-8B-Instruct --tensor-parallel-size 2 \\
    --sequence-parallel-size 2

Needs vLLM: pip install '.[vllm]'.
"""

from __future__ import annotations

import argparse

QUESTIONS = ("What is sequence parallelism?", "And when does it help?")


def main() -> None:
    """Ask the questions one after the other, in one conversation."""
    parser = argparse.ArgumentParser(description="A conversation over ranks that share each prompt's tokens.")
    parser.add_argument("--model", required=True, help="hub id or folder of a Llama, Mistral, Qwen2 or Qwen3")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="ranks that split the weights")
    parser.add_argument("--sequence-parallel-size", type=int, default=2, metavar="N", help="ranks that share tokens")
    parser.add_argument("--enable-shift-parallel", action="store_true", help="few tokens: tensor parallelism")
    parser.add_argument("--shift-parallel-threshold", type=int, metavar="N", help="the most tokens of those (measured)")
    parser.add_argument("--question", action="append", default=[], help="what to ask; repeatable")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="of an answer (%(default)s)")
    parser.add_argument("--max-model-len", type=int, default=None, metavar="N", help="tokens of prompt and answer")
    parser.add_argument("--dtype", default="auto", help="as vLLM takes it (%(default)s)")
    options = parser.parse_args()

    from vllm import SamplingParams

    from omni_sp.llm import LLM

    llm = LLM(
        options.model,
        tensor_parallel_size=options.tensor_parallel_size,
        ulysses_sequence_parallel_size=options.sequence_parallel_size,
        max_model_len=options.max_model_len,
        dtype=options.dtype,
        enable_shift_parallel=options.enable_shift_parallel,
        shift_parallel_threshold=options.shift_parallel_threshold,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=options.max_tokens)
    conversation: list[dict[str, str]] = []
    for question in options.question or QUESTIONS:
        conversation.append({"role": "user", "content": question})
        answer = llm.chat(conversation, sampling, use_tqdm=False)[0].outputs[0].text
        conversation.append({"role": "assistant", "content": answer})
        print(f"> {question}\n{answer}\n", flush=True)
    counts = llm.steps
    if counts is not None:
        print(
            f"steps   {counts.ulysses_steps} by sequence parallelism ({counts.ulysses_tokens} tokens), "
            f"{counts.tensor_steps} by tensor parallelism ({counts.tensor_tokens} tokens)"
        )


if __name__ == "__main__":
    main()
