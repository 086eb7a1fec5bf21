"""``vllm serve`` as its embedding API looks from outside; some texts and models make it fail in vLLM's ways.

Models: "broken" does not start, "no-embeddings" gives none. Texts: "refuse" is status 400, "fall ill" lets /health
fail, "die" ends it, "die once PATH" does so where there is no such file, "hang" takes a minute, "nan" gives NaN.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

DIMENSIONS = 8
is_ill = False


def numbers(entry: str | list[int]) -> list[float]:
    """The embedding of a text or of token ids, in float32."""
    source = random.Random(entry if isinstance(entry, str) else " ".join(map(str, entry)))
    found = [source.uniform(-1, 1) if entry != "nan" else float("nan") for _ in range(DIMENSIONS)]
    return list(struct.unpack(f"{DIMENSIONS}f", struct.pack(f"{DIMENSIONS}f", *found)))


def num_tokens(entry: str | list[int]) -> int:
    return len(entry.split()) if isinstance(entry, str) else len(entry)


def error(status: int, message: str) -> tuple[int, dict[str, str], bytes]:
    body = {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}
    return status, {"content-type": "application/json"}, json.dumps(body).encode()


async def embedded(request: dict[str, Any], model: str, delay_s: float) -> tuple[int, dict[str, str], bytes]:
    global is_ill
    given = request.get("input")
    if not isinstance(given, (str, list)) or not given:
        return error(400, f"cannot embed {given!r}")
    inputs = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    if not all(isinstance(entry, (str, list)) for entry in inputs):
        return error(400, "27 validation errors")
    if request.get("model", model) != model:
        return error(404, "The model does not exist.")
    for entry in inputs:
        words = entry.split() if isinstance(entry, str) else []
        if entry == "refuse":
            return error(400, "this text is refused")
        if entry == "fall ill":
            is_ill = True
            return error(500, "EngineCore encountered an issue")
        if entry == "hang":
            await asyncio.sleep(60)
        if entry == "die" or (words[:2] == ["die", "once"] and not Path(words[2]).exists()):
            if entry != "die":
                Path(words[2]).touch()
            os._exit(3)
    await asyncio.sleep(delay_s * len(inputs))
    tokens = sum(map(num_tokens, inputs))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    if request.get("encoding_format", "float") == "float":
        data = [{"index": i, "object": "embedding", "embedding": numbers(entry)} for i, entry in enumerate(inputs)]
        body = {"id": "embd-whole", "data": data, "usage": {**usage, "completion_tokens": 0}}
        return 200, {"content-type": "application/json"}, json.dumps(body).encode()
    order = ">" if request.get("endianness") == "big" else "<"
    kind = "e" if request.get("embed_dtype") == "float16" else "f"
    rows = [struct.pack(f"{order}{DIMENSIONS}{kind}", *numbers(entry)) for entry in inputs]
    headers = {"content-type": "application/octet-stream", "transfer-encoding": "chunked"}
    if request.get("encoding_format") == "bytes":
        size, about = len(rows[0]), {key: request.get(key) for key in ("embed_dtype", "endianness")}
        items = [
            {"index": i, **about, "start": i * size, "end": (i + 1) * size, "shape": [DIMENSIONS]}
            for i in range(len(rows))
        ]
        metadata = {"id": "embd-part", "created": 1, "model": model, "data": items, "usage": usage}
        headers["metadata"] = json.dumps(metadata)
    elif request.get("encoding_format") != "bytes_only":
        return error(400, f"encoding_format {request.get('encoding_format')!r}")
    chunks = [b"%x\r\n%b\r\n" % (len(row), row) for row in rows]
    return 200, headers, b"".join(chunks) + b"0\r\n\r\n"


async def main() -> None:
    model, path = sys.argv[2], sys.argv[sys.argv.index("--uds") + 1]
    if model == "broken":
        sys.exit("(APIServer pid=1) ValueError: this model is broken")
    delays = json.loads(os.environ.get("FAKE_VLLM_DELAYS", "{}"))
    delay_s = float(delays.get(Path(path).stem, 0))
    # As vLLM's engine does, it outlives its parent.
    engine = subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.split("\r\n")
                lengths = [line.split(":")[1] for line in lines if line.lower().startswith("content-length")]
                body = await reader.readexactly(int(lengths[0]) if lengths else 0)
                _, route, _ = first.split()
                if route == "/health":
                    status, headers, answer = (503 if is_ill else 200), {}, b""
                elif route == "/v1/models":
                    listed = {"object": "list", "data": [{"id": model, "object": "model", "max_model_len": 256}]}
                    status, headers, answer = 200, {"content-type": "application/json"}, json.dumps(listed).encode()
                elif model == "no-embeddings":
                    status, headers, answer = error(501, "The model does not support Embeddings API")
                else:
                    try:
                        request = json.loads(body)
                        status, headers, answer = await embedded(request, model, delay_s)
                    except ValueError:
                        status, headers, answer = error(400, "1 validation error: json_invalid")
                if "transfer-encoding" not in headers:
                    headers["content-length"] = str(len(answer))
                written = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                writer.write(f"HTTP/1.1 {status} X\r\n{written}\r\n".encode() + answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    server = await asyncio.start_unix_server(serve, path, limit=2**26)
    print("INFO: listening", sys.argv[1:], flush=True)
    await ending.wait()
    server.close()
    engine.kill()


if __name__ == "__main__":
    asyncio.run(main())
