"""Omni: two ranks draw two pictures together. It starts the rank processes and ends them.

python examples/api_omni.py
"""

from omni_sp import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams

with Omni(
    "omni-sp/shapes",  # or a hub id such as "Qwen/Qwen-Image", or a folder
    DiffusionParallelConfig(ulysses_degree=2),
    device="cpu",  # leave it out where there is a GPU for each rank
) as omni:
    print(omni.info.layout)
    outputs = omni.generate(
        ["a red circle on a blue background", "a large green star on a black background"],
        OmniDiffusionSamplingParams(seed=11),
    )

for number, output in enumerate(outputs, start=1):
    output.images[0].save(f"api_omni-{number}.png")
    print(f"api_omni-{number}.png: {output.prompt}, {output.metrics['num_steps']} steps")
