"""sequence_parallel_attention: the attention by itself, for any model, compared with one process.

torchrun --nproc-per-node 2 examples/api_attention.py
"""

import torch
import torch.distributed as dist

from omni_sp import DiffusionParallelConfig, ParallelMesh
from omni_sp.attention import sequence_parallel_attention


def main() -> None:
    mesh = ParallelMesh(DiffusionParallelConfig(ulysses_degree=2))

    torch.manual_seed(0)  # all ranks know the whole sequence here, so that they can compare
    whole = [torch.randn(1, 13, heads, 64) for heads in (6, 2, 2)]  # (batch, tokens, heads, head_dim)
    own = slice(0, 8) if mesh.rank == 0 else slice(8, 13)  # ranks may hold different numbers of tokens
    query, key, value = (tensor[:, own].contiguous() for tensor in whole)
    out = sequence_parallel_attention(query, key, value, mesh=mesh)

    q, k, v = (tensor.transpose(1, 2) for tensor in whole)  # (batch, heads, tokens, head_dim), as torch has it
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
    difference = (out - expected[:, own]).abs().max().item()
    print(f"rank {mesh.rank}: {out.shape[1]} tokens, largest difference {difference:.0e}\n", end="")


dist.init_process_group("gloo")
main()  # its end lets go of the mesh, and with it of the process groups
dist.destroy_process_group()
