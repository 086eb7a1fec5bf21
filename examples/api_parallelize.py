"""parallelize: your own pipeline in your own loop, over the ranks that torchrun started.

torchrun --nproc-per-node 2 examples/api_parallelize.py
"""

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline

from omni_sp import DiffusionParallelConfig, ParallelMesh, parallelize
from omni_sp.pipelines.shapes import SHAPES_CALL, shapes_folder


def main() -> None:
    mesh = ParallelMesh(DiffusionParallelConfig(ulysses_degree=2))
    pipe = DiffusionPipeline.from_pretrained(shapes_folder())  # any diffusers pipeline
    pipe.set_progress_bar_config(disable=True)

    handle = parallelize(pipe, mesh)
    # Every rank makes the same call with the same seed, and gets the same picture.
    image = pipe("a red circle on a blue background", generator=torch.manual_seed(11), **SHAPES_CALL).images[0]
    handle.remove()  # the pipeline is as it was

    if mesh.rank == 0:
        image.save("api_parallelize.png")
        print(f"api_parallelize.png: {mesh.describe()}; {handle.tokens}")


dist.init_process_group("gloo")
main()  # its end lets go of the mesh, and with it of the process groups
dist.destroy_process_group()
