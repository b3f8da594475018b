"""Decompression of Snappy, by its published description of the format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from inpaint_kernels.checkpoint_files._errors import CheckpointError
from inpaint_kernels.checkpoint_files._wire import Wire

_MOST_GROWTH: Final = 22  # a copy of 64 bytes takes 3


def decompress(content: bytes, error: Callable[[str], CheckpointError]) -> bytes:
    """The bytes that ``content`` stands for; ``error`` makes the error of a sentence."""
    wire = Wire(content, error)
    length = wire.varint("the length of Snappy's output")
    if length > _MOST_GROWTH * len(content):
        raise error(f"expected at most {_MOST_GROWTH} bytes per compressed byte of {len(content)}, got {length}")
    output = bytearray()
    while wire.remaining:
        tag = wire.integer(1, "a tag of Snappy")
        if tag & 3 == 0:
            output += _literal(wire, tag >> 2)
        else:
            _copy(wire, tag, output)
        if len(output) > length:
            break
    if len(output) != length:
        raise error(
            f"expected {length} bytes of Snappy's output, got {'more' if len(output) > length else len(output)}"
        )
    return bytes(output)


def _literal(wire: Wire, size: int) -> bytes:
    if size >= 60:  # the size itself follows, in 1 to 4 bytes
        size = wire.integer(size - 59, "a literal's length")
    return wire.take(size + 1, "a literal")


def _copy(wire: Wire, tag: int, output: bytearray) -> None:
    if tag & 3 == 1:
        count = 4 + (tag >> 2 & 7)
        back = (tag >> 5) << 8 | wire.integer(1, "a copy's offset")
    else:
        count = 1 + (tag >> 2)
        back = wire.integer(2 if tag & 3 == 2 else 4, "a copy's offset")
    if not 0 < back <= len(output):
        raise wire.error(f"expected a copy from the {len(output)} bytes so far, got one from {back} bytes back")
    start = len(output) - back
    repeated = output[start : start + count]
    output += (repeated * -(-count // back))[:count]  # a copy longer than its offset repeats what it has just written
