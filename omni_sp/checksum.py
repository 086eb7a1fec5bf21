"""Checksums of values that ranks compare."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from functools import reduce

import torch

_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


def checksum(value: object, before: int = 0) -> int:
    """A checksum of a value, and of what was before it. Tensors, arrays and pictures count by their content."""
    if isinstance(value, torch.Tensor):
        content = value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        return zlib.crc32(content.tobytes(), checksum((tuple(value.shape), str(value.dtype)), before))
    if isinstance(value, (list, tuple)):
        return reduce(lambda sum_, item: checksum(item, sum_), value, checksum(len(value), before))
    if isinstance(value, Mapping):
        return checksum(sorted(((str(key), item) for key, item in value.items()), key=lambda pair: pair[0]), before)
    if hasattr(value, "tobytes"):  # an array or a PIL image
        described = [getattr(value, name, None) for name in ("shape", "dtype", "mode", "size")]
        return zlib.crc32(value.tobytes(), zlib.crc32(repr(described).encode(), before))
    return zlib.crc32(repr(value).encode(), before)


def as_integer(value: object) -> int:
    """An integer of 64 bits that differs where the value does: a number or dtype itself, of others a checksum."""
    if isinstance(value, torch.dtype):
        return _DTYPES.index(value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    if isinstance(value, float):
        return int.from_bytes(struct.pack("<d", value), "little", signed=True)
    return checksum(value)


def describe_integer(integer: int, own: object) -> str:
    """What another rank holds, by its as_integer() and this rank's value, which is of the same kind."""
    if isinstance(own, torch.dtype):
        return str(dict(enumerate(_DTYPES)).get(integer, integer))
    if not isinstance(own, float):
        return str(integer)
    value = struct.unpack("<d", integer.to_bytes(8, "little", signed=True))[0]
    # The checksum of what is no float, such as None, has 32 bits, and is the smallest of numbers here.
    return "no float" if 0 < abs(value) < 1e-300 else str(value)
