"""Bodies of type multipart/form-data, which must be whole: a part that was cut off would be left out in silence."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import asynccontextmanager

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from omni_sp.server.errors import ApiError, unknown_field

MULTIPART = "multipart/form-data"
_MAX_FIELDS = 100
_MAX_TEXT_BYTES = 2**20


@asynccontextmanager
async def read_form(
    request: Request, *, max_files: int, max_text_bytes: int = _MAX_TEXT_BYTES
) -> AsyncIterator[FormData]:
    """Read a request's form; its files are open until the block ends.

    Args:
        max_files: the most files.
        max_text_bytes: the most bytes of a part that is text.

    Raises:
        ApiError: 400: it is no form, holds too much, or ends too early.
    """
    limits = {"max_files": max_files, "max_fields": _MAX_FIELDS, "max_part_size": max_text_bytes}
    if content_type(request) != MULTIPART:
        async with request.form(**limits) as form:
            yield form
        return
    parser = _Parser(request.headers, request.stream(), **limits)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, f"the form cannot be read: {error.message}", code="invalid_form") from error
    try:
        yield form
    finally:
        await form.close()


def content_type(request: Request) -> str:
    """The type of a request's body, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def require_kind(name: str, value: str | UploadFile, *, files: Collection[str], fields: Collection[str]) -> None:
    """Refuse a text where a file is wanted, and a file where a text is. Of texts, the schema knows the names.

    Args:
        files: names of parts that are files.
        fields: names of parts that are text.

    Raises:
        ApiError: 400, naming the part.
    """
    is_file = isinstance(value, UploadFile)
    if is_file and name not in files:
        if name not in fields:
            raise unknown_field(name, [*fields, *files])
        raise ApiError(400, f"{name} is a file: give text", param=name, code="invalid_value")
    if not is_file and name in files and name not in fields:
        raise ApiError(400, f"{name}: upload it as a file", param=name.removesuffix("[]"), code="invalid_value")


class _Parser(MultiPartParser):
    """Starlette's parser, which asks in the end whether it has seen the last boundary."""

    _is_whole = False

    def on_end(self) -> None:
        self._is_whole = True

    async def parse(self) -> FormData:
        self.stream = self._whole(self.stream)
        return await super().parse()

    async def _whole(self, stream: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        async for chunk in stream:
            yield chunk
        if not self._is_whole:
            raise MultiPartException("it ends before its last boundary; send all of it")
