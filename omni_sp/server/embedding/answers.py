"""Answers of several replicas as one, in the format that was asked for, as vLLM writes it."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic_core import to_json
from starlette.responses import Response

from omni_sp.errors import EngineError
from omni_sp.llm.embedding.balance import Part
from omni_sp.llm.embedding.connections import Answer
from omni_sp.server.errors import ApiError

FORMATS = FLOAT, BASE64, BYTES, BYTES_ONLY = "float", "base64", "bytes", "bytes_only"
DTYPES = "float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"
ENDIANNESS = "native", "big", "little"
_ORJSON: Any = importlib.import_module("orjson") if importlib.util.find_spec("orjson") else None
_PASSED_ON = ("metadata", "retry-after")
_BATCH = 64
"""After so many embeddings, other requests have their turn."""

Answered = Sequence[tuple[Part, Answer]]


def replica_format(encoding_format: str) -> str:
    """What the replicas are asked for: plain bytes, with a header that counts the tokens if the answer needs that."""
    return BYTES_ONLY if encoding_format == BYTES_ONLY else BYTES


async def joined(answered: Answered, encoding_format: str, request_id: str, first_usage: Mapping[str, Any]) -> Response:
    """One answer out of those of the parts, in the inputs' order.

    Args:
        answered: the parts in order, each with status 200, in the format of replica_format().
        encoding_format: of the answer.
        request_id: of the answer.
        first_usage: the usage in an answer of vLLM, whose other fields this one has too.

    Raises:
        EngineError: a replica's answer is not what it was asked for.
        ApiError: an embedding has NaN or infinite numbers, which JSON cannot carry.
    """
    if encoding_format == BYTES_ONLY:
        if len({len(answer.body) / (part.end - part.start) for part, answer in answered}) != 1:
            raise EngineError("the replicas sent embeddings of different sizes")
        return _octets(answered, {})
    items, tokens, model = list[dict[str, Any]](), 0, ""
    offset = 0
    for part, answer in answered:
        metadata = _metadata(part, answer)
        for index, item in enumerate(metadata["data"], part.start):
            items.append({**item, "index": index, "start": item["start"] + offset, "end": item["end"] + offset})
        tokens += metadata["usage"]["prompt_tokens"]
        model = metadata["model"]
        offset += len(answer.body)
    about = {"id": request_id, "created": int(time.time()), "model": model}
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    if encoding_format == BYTES:
        return _octets(answered, {"metadata": json.dumps({**about, "data": items, "usage": usage})})
    chunks = [f'{{"id":{json.dumps(request_id)},"object":"list","created":{about["created"]},"model":'.encode()]
    chunks.append(json.dumps(model, ensure_ascii=False).encode() + b',"data":[')
    items_left = iter(items)
    for part, answer in answered:
        view, base = memoryview(answer.body), None
        for _ in range(part.start, part.end):
            item = next(items_left)
            base = item["start"] if base is None else base
            numbers = view[item["start"] - base : item["end"] - base]
            comma = b"," if item["index"] else b""
            chunks.append(b'%b{"index":%d,"object":"embedding","embedding":' % (comma, item["index"]))
            chunks.append(_floats(numbers) if encoding_format == FLOAT else b'"%b"' % base64.b64encode(numbers))
            chunks.append(b"}")
            if item["index"] % _BATCH == _BATCH - 1:
                await asyncio.sleep(0)
    chunks.append(b'],"usage":' + to_json({**first_usage, **usage}) + b"}")
    return Response(b"".join(chunks), media_type="application/json")


def passed_on(answer: Answer) -> Response:
    """A replica's answer as it is."""
    kept = {name: value for name, value in answer.headers.items() if name in _PASSED_ON}
    media_type = answer.headers.get("content-type", "application/json")
    return Response(answer.body, answer.status, headers=kept, media_type=media_type)


def _octets(answered: Answered, headers: Mapping[str, str]) -> Response:
    body = b"".join(answer.body for _, answer in answered)
    return Response(body, headers=dict(headers), media_type="application/octet-stream")


def _metadata(part: Part, answer: Answer) -> dict[str, Any]:
    """What a replica says of its bytes, which is checked against them."""
    try:
        metadata: dict[str, Any] = json.loads(answer.headers["metadata"])
        items, count = metadata["data"], part.end - part.start
        if len(items) != count or items[0]["start"] != 0 or items[-1]["end"] != len(answer.body):
            raise ValueError(f"{len(items)} embeddings of {len(answer.body)} bytes for {count} inputs")
        if any(before["end"] != after["start"] for before, after in itertools.pairwise(items)):
            raise ValueError("gaps between embeddings")
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise EngineError(f"a replica's answer is not what it was asked for: {error!r}") from error
    return metadata


def _floats(numbers: memoryview) -> bytes:
    """Numbers in float32 as JSON, as vLLM writes them: with orjson where that is installed, in half the time.

    orjson writes the digits that tell a number from others in float32, else those of the same number in float64.
    """
    if _ORJSON is None:
        text = to_json(numbers.cast("f").tolist(), inf_nan_mode="null")
    else:
        text = _ORJSON.dumps(np.frombuffer(numbers, np.float32), option=_ORJSON.OPT_SERIALIZE_NUMPY)
    if b"null" in text:
        message = "an embedding has NaN or infinite numbers, which JSON cannot carry: ask for bytes"
        raise ApiError(500, message, code="not_finite")
    return text
