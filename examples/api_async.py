"""AsyncOmni: several requests at once from an asyncio program, with their events.

python examples/api_async.py
"""

import asyncio

from omni_sp import AsyncOmni, DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.events import RequestDone, RequestFailed, RequestProgress


async def draw(omni: AsyncOmni, prompt: str, path: str) -> None:
    params = OmniDiffusionSamplingParams(seed=11)
    async for event in omni.generate(prompt, params):
        if isinstance(event, RequestProgress) and event.done in (1, event.total):
            print(f"{path}: step {event.done} of {event.total}")
        elif isinstance(event, RequestDone):
            event.output.images[0].save(path)
            print(f"{path}: done")
        elif isinstance(event, RequestFailed):
            print(f"{path}: {event.error}")


async def main() -> None:
    async with AsyncOmni("omni-sp/shapes", DiffusionParallelConfig(ulysses_degree=2), device="cpu") as omni:
        await asyncio.gather(
            draw(omni, "a red circle on a blue background", "api_async-1.png"),
            draw(omni, "a yellow star on a blue background", "api_async-2.png"),
        )


asyncio.run(main())
