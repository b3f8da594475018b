"""Bytes in memory read from front to back: varints, and the fields of protocol buffers' messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from inpaint_kernels.checkpoint_files._errors import CheckpointError

# Kinds of fields.
VARINT: Final = 0
FIXED64: Final = 1
BYTES: Final = 2
FIXED32: Final = 5

_MAX_VARINT_BYTES: Final = 10  # of 64 bits


class Wire:
    """A front-to-back reader of ``content``.

    Args:
        content: what is read.
        error: makes the error of a sentence; it names the file and the place.

    Attributes:
        position: where the next read begins.
    """

    def __init__(self, content: bytes, error: Callable[[str], CheckpointError]) -> None:
        self._content = content
        self.error = error
        self.position = 0

    @property
    def remaining(self) -> int:
        """Bytes from the position to the end."""
        return len(self._content) - self.position

    def take(self, count: int, what: str) -> bytes:
        """The next ``count`` bytes; ``what`` they are is said in the error."""
        if count > self.remaining:
            raise self.error(f"expected {what} of {count} bytes, got the {self.remaining} bytes left")
        self.position += count
        return self._content[self.position - count : self.position]

    def integer(self, count: int, what: str) -> int:
        """An unsigned little-endian integer of ``count`` bytes."""
        return int.from_bytes(self.take(count, what), "little")

    def varint(self, what: str) -> int:
        """An unsigned integer of at most 64 bits, 7 bits a byte, the lowest first."""
        value = 0
        for place in range(_MAX_VARINT_BYTES):
            byte = self.integer(1, what)
            value |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                break
        if byte >= 0x80 or value >= 1 << 64:
            raise self.error(f"expected {what} as an integer of at most 64 bits, got more")
        return value

    def fields(self, known: Mapping[int, int]) -> Iterator[tuple[int, Any]]:
        """(number, value) of a message's fields: int, or bytes for :data:`BYTES`.

        Args:
            known: the number of a field -> its kind. Other fields are passed over.
        """
        while self.remaining:
            tag = self.varint("a field's tag")
            number, kind = tag >> 3, tag & 7
            if number in known and kind != known[number]:
                raise self.error(f"expected field {number} of kind {known[number]}, got kind {kind}")
            value = self._field(kind)
            if number in known:
                yield number, value

    def _field(self, kind: int) -> int | bytes:
        if kind == VARINT:
            return self.varint("a field")
        if kind == BYTES:
            return self.take(self.varint("a field's length"), "a field")
        if kind in (FIXED32, FIXED64):
            return self.integer(4 if kind == FIXED32 else 8, "a field")
        raise self.error(f"expected a field of kind 0, 1, 2 or 5, got kind {kind}")
