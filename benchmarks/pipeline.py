"""One picture's stages: one process against several CPU ranks, in turns. The VAE, or the branches of guidance.

python -m benchmarks.pipeline --stage vae --sizes 256 512
python -m benchmarks.pipeline --stage guidance --sizes 256 512    # a call for each branch
python -m benchmarks.pipeline --stage rows --sizes 256 512        # both branches in one batch

Other work on the machine makes seconds by the clock useless, so this counts the processor seconds of each rank, which
has one thread. T1 / (P * T2) is the efficiency on P ranks: T1 of one process, T2 of the rank that took the most.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.anatomy import peak_memory
from benchmarks.interleaved import Answer, add_output_options, report, save, summary
from omni_sp.mesh import ParallelMesh
from omni_sp.pipelines.parallelize import parallelize
from omni_sp.pipelines.shapes import shapes_folder
from omni_sp.sharding import shard_vae
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import randomise, relative_error

_STEPS = 10
BASE, OURS = "one process", "ours"


def build_vae() -> Any:
    """The autoencoder of Stable Diffusion and FLUX at real size, with random weights, the same on all ranks."""
    from diffusers import AutoencoderKL

    channels = (128, 256, 512, 512)
    return randomise(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=channels,
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    )


def decode(mesh: ParallelMesh, size: int, rounds: int) -> Answer:
    """On one rank: the processor seconds of a decode, alone and over the ranks."""
    warnings.simplefilter("ignore")
    vae, latents = build_vae(), torch.randn(1, 16, size // 8, size // 8, generator=torch.Generator().manual_seed(1))
    handle = shard_vae(vae, mesh)

    def alone() -> Any:  # on every rank, so that all cores are as busy as when they share the work
        with handle.alone():
            return vae.decode(latents).sample

    return in_turns({BASE: alone, OURS: lambda: vae.decode(latents).sample}, rounds)


def denoise(mesh: ParallelMesh, size: int, rounds: int) -> Answer:
    """On one rank: the processor seconds of the demo model's steps, alone and with branches shared."""
    from diffusers import DiffusionPipeline

    warnings.simplefilter("ignore")
    pipes = [DiffusionPipeline.from_pretrained(shapes_folder()) for _ in range(2)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    parallelize(pipes[1], mesh)
    with torch.no_grad():  # the steps alone are to be timed
        encoded = {"prompt_embeds": "a red circle on a blue background", "negative_prompt_embeds": "green"}
        texts = {name: pipes[0].encode_prompt(text)[0] for name, text in encoded.items()}

    def steps(pipe: Any) -> Any:
        call = {**texts, "true_cfg_scale": 2.0, "num_inference_steps": _STEPS, "height": size, "width": size}
        return pipe(**call, generator=torch.Generator().manual_seed(1), output_type="latent").images

    return in_turns({BASE: lambda: steps(pipes[0]), OURS: lambda: steps(pipes[1])}, rounds)


def build_batched() -> Any:
    """A pipeline of Stable Diffusion 3, whose branches are one batch, with random weights, the same on all ranks."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=64,
        num_layers=6,
        num_attention_heads=8,
        attention_head_dim=32,
        caption_projection_dim=256,
        joint_attention_dim=256,
        pooled_projection_dim=128,
        pos_embed_max_size=64,
    )
    missing = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    parts = {"transformer": randomise(transformer), "scheduler": FlowMatchEulerDiscreteScheduler()}
    pipe = StableDiffusion3Pipeline(**parts, **dict.fromkeys(missing))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoise_batches(mesh: ParallelMesh, size: int, rounds: int) -> Answer:
    """On one rank: the processor seconds of steps with both branches in one batch, alone and with rows shared."""
    warnings.simplefilter("ignore")
    pipes = [build_batched() for _ in range(2)]
    parallelize(pipes[1], mesh)
    generator = torch.Generator().manual_seed(2)
    texts = {
        f"{negative}{pooled}prompt_embeds": torch.randn(1, *((128,) if pooled else (77, 256)), generator=generator)
        for negative in ("", "negative_")
        for pooled in ("", "pooled_")
    }

    def steps(pipe: Any) -> Any:
        call = {**texts, "guidance_scale": 4.0, "num_inference_steps": _STEPS, "height": size, "width": size}
        return pipe(**call, generator=torch.Generator().manual_seed(1), output_type="latent").images

    return in_turns({BASE: lambda: steps(pipes[0]), OURS: lambda: steps(pipes[1])}, rounds)


def in_turns(contenders: dict[str, Callable[[], Any]], rounds: int) -> Answer:
    """Processor seconds of each contender, in turns, and how far apart their results are."""
    answer = Answer(seconds={name: [] for name in contenders})
    with torch.no_grad():
        answer.errors[OURS] = relative_error(contenders[OURS](), contenders[BASE]())
        answer.memory = {name: peak_memory(call) for name, call in contenders.items()}
        for _ in range(rounds):
            for name, call in contenders.items():
                dist.barrier()
                began = time.process_time()
                call()
                answer.seconds[name].append(time.process_time() - began)
    return answer


_STAGES: dict[str, tuple[Callable[..., Answer], str, str]] = {
    "vae": (decode, "ulysses", "VAE decode"),
    "guidance": (denoise, "cfg", f"{_STEPS} steps with guidance"),
    "rows": (denoise_batches, "cfg", f"{_STEPS} steps with guidance in one batch"),
}


def main() -> None:
    """Parse, run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=tuple(_STAGES), default="vae")
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512], help="sides of the picture, in pixels")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    add_output_options(parser)
    options = parser.parse_args()
    measure, axis, what = _STAGES[options.stage]
    for size in options.sizes:
        pool = RankPool(options.ranks)
        try:
            timings = summary(pool.run(measure, size, options.rounds, **{axis: options.ranks}, timeout=3600))
        finally:
            pool.close()
        base, ours = timings[BASE], timings[OURS]
        ratios = [one / (options.ranks * many) for one, many in zip(base.seconds, ours.seconds, strict=True)]
        best = min(base.seconds) / (options.ranks * min(ours.seconds))
        ours.facts |= {"efficiency": statistics.median(ratios), "efficiency_of_minima": best}
        print(
            f"{what}, {size} px, {options.ranks} ranks: T1 {base.median:.2f} s, T2 {ours.median:.2f} s of the "
            f"processor, T1/({options.ranks}*T2) {statistics.median(ratios):.2f} (by minima {best:.2f}), error "
            f"{ours.error:.0e}, memory {(base.memory or 0) / 2**20:.0f} -> {(ours.memory or 0) / 2**20:.0f} MiB",
            flush=True,
        )
        name = f"pipeline-{options.stage}-{size}-{axis}{options.ranks}"
        report(save(options.output, name, vars(options) | {"size": size}, timings))


if __name__ == "__main__":
    main()
