"""Writes checkpoints as TensorFlow's BundleWriter does, and ones that it never would.

The format, as LevelDB's ``doc/table_format.md`` and TensorFlow's ``tensor_bundle.proto`` describe it::

    index  = block* statistics list footer
    block  = entry* int32(offset of a restart)* int32(restarts) byte(compression) int32(masked CRC-32C)
    entry  = varint(bytes shared with the key before) varint(bytes of its own) varint(bytes of the value) key value
    list   = a block: last key of a block -> varint(its offset) varint(its size)
    footer = place of statistics, place of list, zeros to 40 bytes, int64(0xDB4775248B80FB57)

The values are protocol buffers: under the key "" the header, under each name where its bytes lie.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# numpy's name of a dtype -> DataType in types.proto.
NUMBERS = {
    "float32": 1,
    "float64": 2,
    "int32": 3,
    "uint8": 4,
    "int16": 5,
    "int8": 6,
    "int64": 9,
    "bool": 10,
    "float16": 19,
}
RESTART_INTERVAL = 16


def crc32c(content: bytes) -> int:
    """CRC-32C bit by bit."""
    register = 0xFFFFFFFF
    for byte in content:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % (1 << 32)


def varint(value: int) -> bytes:
    value %= 1 << 64  # negative numbers are written as 64-bit two's complement
    head = bytearray()
    while value >= 0x80:
        head.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(head) + bytes([value])


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """A protocol buffer of (number, value); int -> varint, bytes -> length and bytes."""
    return b"".join(
        varint(number << 3) + varint(value)
        if isinstance(value, int)
        else varint(number << 3 | 2) + varint(len(value)) + value
        for number, value in fields
    )


def header(shards: int = 1, endianness: int = 0, least_reader: int = 0) -> bytes:
    return message((1, shards), (2, endianness), (3, message((1, 1), (2, least_reader))))


def entry(
    dtype: int, shape: tuple[int, ...], crc: int, *, shard: int = 0, offset: int = 0, size: int = 0, extra: bytes = b""
) -> bytes:
    sizes = message(*((2, message((1, length))) for length in shape))
    fixed = varint(6 << 3 | 5) + struct.pack("<I", crc)
    return message((1, dtype), (2, sizes), (3, shard), (4, offset), (5, size)) + fixed + extra


def snappy(content: bytes) -> bytes:
    """Literals of every size of length, and copies of all three kinds, wherever the last 8 bytes recur."""
    out = bytearray(varint(len(content)))
    literal = bytearray()
    place = kind = 0

    def flush() -> None:
        if not literal:
            return
        if len(literal) <= 60:
            out.append(len(literal) - 1 << 2)
        else:
            width = 1 if len(literal) <= 256 else 2
            out.append(59 + width << 2)
            out.extend((len(literal) - 1).to_bytes(width, "little"))
        out.extend(literal)
        literal.clear()

    while place < len(content):
        # The match may reach into what it writes itself, as in a run of one byte.
        start = content.rfind(content[place : place + 8], 0, place + 7) if place + 8 <= len(content) else -1
        back = place - start
        if start < 0 or back >= 1 << 16:
            literal.append(content[place])
            place += 1
            continue
        count = 8
        while count < 64 and place + count < len(content) and content[start + count] == content[place + count]:
            count += 1
        flush()
        kind = kind % 3 + 1
        if kind == 1 and back < 2048:
            count = min(count, 11)
            out.extend(((back >> 8) << 5 | count - 4 << 2 | 1, back & 0xFF))
        elif kind == 3:
            out.append(count - 1 << 2 | 3)
            out.extend(struct.pack("<I", back))
        else:
            out.append(count - 1 << 2 | 2)
            out.extend(struct.pack("<H", back))
        place += count
    flush()
    return bytes(out)


@dataclass
class TableWriter:
    """Writes a sorted table.

    Args:
        compression: the byte of the blocks: 0 none, 1 Snappy, others as if uncompressed.
        entries_per_block: where a block ends.
    """

    compression: int = 0
    entries_per_block: int = 1000
    _content: bytearray = field(default_factory=bytearray)

    def table(self, entries: list[tuple[bytes, bytes]]) -> bytes:
        places = []
        for start in range(0, len(entries), self.entries_per_block):
            part = entries[start : start + self.entries_per_block]
            places.append((part[-1][0], self.block(plain_block(part))))
        statistics = self.block(plain_block([]))
        return self.finish(statistics, self.block(plain_block(places)))

    def block(self, plain: bytes) -> bytes:
        """Append a block; its place, as the list holds it."""
        return self.stored(snappy(plain) if self.compression == 1 else plain)

    def stored(self, content: bytes) -> bytes:
        """Append a block that is compressed already; its place."""
        place = varint(len(self._content)) + varint(len(content))
        content += bytes([self.compression])
        self._content += content + struct.pack("<I", masked(crc32c(content)))
        return place

    def finish(self, statistics: bytes, listing: bytes) -> bytes:
        return bytes(self._content) + (statistics + listing).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def plain_block(entries: list[tuple[bytes, bytes]]) -> bytes:
    content, restarts, previous = bytearray(), [], b""
    for number, (key, value) in enumerate(entries):
        shared = 0
        if number % RESTART_INTERVAL:
            while key[: shared + 1] == previous[: shared + 1] and shared < len(previous):
                shared += 1
        else:
            restarts.append(len(content))
        content += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        previous = key
    restarts = restarts or [0]
    return bytes(content) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def write_bundle(prefix: Path, arrays: Mapping[str, NDArray[np.generic]], writer: TableWriter | None = None) -> Path:
    """A checkpoint of one data file."""
    data = bytearray()
    entries = [(b"", header())]
    for name, array in sorted(arrays.items(), key=lambda item: item[0].encode()):
        content = array.tobytes()
        crc = masked(crc32c(content))
        value = entry(NUMBERS[array.dtype.name], array.shape, crc, offset=len(data), size=len(content))
        entries.append((name.encode(), value))
        data += content
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)
    index = prefix.with_name(f"{prefix.name}.index")
    index.write_bytes((writer or TableWriter()).table(entries))
    return index
