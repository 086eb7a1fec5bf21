"""Answer a long prompt with plain transformers over several ranks, and print the time to the first token.

python examples/long_prompt.py --model Qwen/Qwen3-0.6B --tokens 8192 --ulysses-degree 2 --ring-degree 2
torchrun --nproc-per-node 8 examples/long_prompt.py --model Qwen/Qwen3-8B --prompt-file book.txt --ulysses-degree 8
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from omni_sp import DiffusionParallelConfig, ParallelMesh
from omni_sp.llm import parallelize


class Clock:
    """A streamer that records the times of prompt and tokens, and the size of the cache."""

    def __init__(self, cache_bytes: Any = None) -> None:
        self._times: list[float] = []
        self._cache_bytes = cache_bytes
        self.bytes = 0

    def put(self, _tokens: torch.Tensor) -> None:
        self._times.append(time.perf_counter())
        if self._cache_bytes is not None:
            self.bytes = self._cache_bytes()

    def end(self) -> None:
        pass

    @property
    def seconds(self) -> float:
        """Time to first token."""
        return self._times[1] - self._times[0]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A long prompt over several ranks, with plain transformers.")
    parser.add_argument("--model", required=True, help="a folder or hub id: Llama, Mistral, Qwen2 or Qwen3")
    parser.add_argument("--ulysses-degree", type=int, default=1)
    parser.add_argument("--ring-degree", type=int, default=1)
    parser.add_argument("--prompt-file", type=Path, help="text to go on from; without it, --tokens random tokens")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--prefill-chunk", type=int, help="tokens of the prompt that pass through the model at a time")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there are GPUs for all ranks")
    parser.add_argument("--no-compare", action="store_true", help="do not run one rank alone first")
    return parser.parse_args()


def prompt(options: argparse.Namespace, vocabulary: int) -> tuple[torch.Tensor, Any]:
    """The prompt, (1, tokens), the same on all ranks; and the tokenizer where a text was given."""
    if options.prompt_file is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (1, options.tokens), generator=generator), None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    return tokenizer(options.prompt_file.read_text(), return_tensors="pt").input_ids, tokenizer


def answer(options: argparse.Namespace, mesh: ParallelMesh, device: torch.device) -> None:
    """Answer on this rank; rank 0 first does so alone, and prints."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(device).eval()
    ids, tokenizer = prompt(options, model.config.vocab_size)
    ids = ids.to(device)
    lines = [
        f"model   {type(model).__name__}, {str(model.dtype).removeprefix('torch.')} on {device.type}",
        f"layout  {mesh.describe()}",
        f"prompt  {ids.shape[1]} tokens",
    ]
    # CPU ranks share the cores; the one that runs alone has them all.
    cores = torch.get_num_threads()
    alone = None
    if mesh.rank == 0 and not options.no_compare:
        clock = Clock()
        mask = torch.ones_like(ids)
        # Greedy, whatever the model's generation config says.
        plain = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": options.max_new_tokens}
        model.generate(ids[:, :8], attention_mask=mask[:, :8], **plain)
        alone = model.generate(ids, attention_mask=mask, streamer=clock, **plain)
        lines.append(f"1 rank  first token after {clock.seconds:.2f} s")
    if mesh.world_size > 1:
        dist.barrier()
    torch.set_num_threads(max(1, cores // mesh.world_size) if device.type == "cpu" else cores)

    handle = parallelize(model, mesh)
    handle.generate(ids[:, :8], max_new_tokens=2)
    clock = Clock(handle.cache_bytes)
    tokens = handle.generate(
        ids, max_new_tokens=options.max_new_tokens, prefill_chunk=options.prefill_chunk, streamer=clock
    )
    handle.remove()

    ranks = f"{mesh.world_size} rank" + "s" * (mesh.world_size > 1)
    lines.append(
        f"{ranks:7} first token after {clock.seconds:.2f} s; keys and values {clock.bytes / 1e6:.1f} MB a rank"
    )
    new = tokens[0, ids.shape[1] :]
    text = " ".join(map(str, new.tolist())) if tokenizer is None else tokenizer.decode(new, skip_special_tokens=True)
    lines.append(f"answer  {text}")
    if alone is not None:
        # In 16 bit, sums in another order may round to other tokens; in float32 they do not here.
        lines.append(f"equal   {torch.equal(alone, tokens)}")
    if mesh.rank == 0:
        print("\n".join(lines), flush=True)


def rank_main(local_rank: int, options: argparse.Namespace, init_method: str | None) -> None:
    """Run one rank: started by torchrun, or here, where ``init_method`` names the ranks' file."""
    config = DiffusionParallelConfig(ulysses_degree=options.ulysses_degree, ring_degree=options.ring_degree)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", config.world_size))
    gpus = options.device == "cuda" or (options.device is None and torch.cuda.device_count() >= local_ranks)
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    if init_method is not None or "RANK" in os.environ:
        arguments: dict[str, Any] = {}
        if init_method is not None:
            arguments = {"init_method": init_method, "rank": local_rank, "world_size": config.world_size}
        # cpu:gloo beside NCCL, for the small messages; an hour, because one rank may answer alone first.
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1), **arguments)
    try:
        answer(options, ParallelMesh(config), device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main() -> None:
    options = parse_arguments()
    ranks = options.ulysses_degree * options.ring_degree
    if "RANK" in os.environ or ranks == 1:
        rank_main(int(os.environ.get("LOCAL_RANK", "0")), options, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(rank_main, (options, f"file://{folder}/rendezvous"), nprocs=ranks)


if __name__ == "__main__":
    main()
