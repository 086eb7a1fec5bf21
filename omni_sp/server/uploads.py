"""Uploaded pictures: checked when they come, and decoded when their turn comes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from omni_sp.pipelines.images import EncodedImage, declared_pixels
from omni_sp.server.errors import refusal
from omni_sp.server.pictures import Looks, check_mask, decode_picture
from omni_sp.server.settings import ServerSettings


class Uploads:
    """Checks uploaded pictures, which wait as their files: a file of 65 kB may be a picture of 50 MB.

    Each is decoded once, to see that it can be, and let go; all of them in one thread, so that no more than one is
    in memory, however many clients there are, and the event loop goes on meanwhile.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._max_pixels, self._max_input_pixels = settings.max_pixels, settings.max_input_pixels
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="omni-sp-uploads")

    async def check(self, images: Sequence[EncodedImage], *, param: str, mask: EncodedImage | None = None) -> None:
        """Refuse the pictures of a request (ApiError 400) that are too large together, or cannot be read.

        Args:
            param: the field that they came in.
            mask: OpenAI's mask of the first of them, from the field "mask".
        """
        loop = asyncio.get_running_loop()
        named = [(param, image) for image in images]
        named += [("mask", mask)] if mask is not None else []
        pixels = 0
        for _, image in named:
            pixels += await loop.run_in_executor(self._thread, declared_pixels, image.data)
        if pixels > self._max_input_pixels:
            reason = f"{pixels} pixels in all pictures of a request are more than {self._max_input_pixels}"
            raise refusal(param, f"{reason}, which is the most here", code="invalid_image")
        looks = [await loop.run_in_executor(self._thread, self._look, name, image.data) for name, image in named]
        if mask is not None:
            check_mask(looks[-1], looks[0])

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _look(self, param: str, data: bytes) -> Looks:
        picture = decode_picture(data, param=param, max_pixels=self._max_pixels)
        return Looks(picture.size, picture.mode)
