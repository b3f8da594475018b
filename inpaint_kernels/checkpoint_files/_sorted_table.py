"""The sorted tables of LevelDB, in which TensorFlow keeps a checkpoint's index.

A file of blocks. A block holds entries whose keys leave out what they share with the key before, the places where a key
is whole ("restarts"), a byte for its compression and a checksum. The footer names the block that lists the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from inpaint_kernels.checkpoint_files._bounded_file import BoundedFile
from inpaint_kernels.checkpoint_files._crc32c import masked_crc32c
from inpaint_kernels.checkpoint_files._snappy import decompress
from inpaint_kernels.checkpoint_files._wire import Wire

_MAGIC: Final = 0xDB4775248B80FB57
_FOOTER_BYTES: Final = 48
_HANDLES_BYTES: Final = 40
_TRAILER_BYTES: Final = 5
_MAX_KEY_BYTES: Final = 4096  # keys that share their beginning could take far more memory than the file


def read_sorted_table(file: BoundedFile) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of every entry, in the order of the keys.

    Raises:
        CheckpointError: truncated, damaged, or no such table.
    """
    previous: bytes | None = None
    listing = _block(file, *_listing_handle(file))
    for _, handle in _entries(listing):
        place = Wire(handle, listing.error)
        for key, value in _entries(_block(file, place.varint("a block's offset"), place.varint("a block's size"))):
            if previous is not None and key <= previous:
                raise file.error(f"expected keys in ascending order, got {key!r:.80} behind {previous!r:.80}")
            previous = key
            yield key, value


def _listing_handle(file: BoundedFile) -> tuple[int, int]:
    start = file.size - _FOOTER_BYTES
    if start < 0:
        raise file.error(f"expected a checkpoint's index of at least {_FOOTER_BYTES} bytes, got {file.size}")
    file.seek(start)
    content = file.read(_FOOTER_BYTES, "the footer")
    magic = int.from_bytes(content[_HANDLES_BYTES:], "little")
    if magic != _MAGIC:
        raise file.error(f"expected the number {_MAGIC:#x} that ends a checkpoint's index, got {magic:#x}", start)
    footer = Wire(content[:_HANDLES_BYTES], lambda sentence: file.error(sentence, start))
    for what in ("offset", "size"):
        footer.varint(f"the {what} of the block of statistics")
    return footer.varint("the offset of the list of blocks"), footer.varint("the size of the list of blocks")


def _block(file: BoundedFile, offset: int, size: int) -> Wire:
    """The content of a block, checked and without its restarts."""
    if offset + size + _TRAILER_BYTES > file.size - _FOOTER_BYTES:
        raise file.error(f"expected a block in front of the footer, got one of {size} bytes", offset)
    file.seek(offset)
    content = file.read(size + 1, "a block")
    stored = int.from_bytes(file.read(_TRAILER_BYTES - 1, "a block's checksum"), "little")
    computed = masked_crc32c(content)
    if stored != computed:
        raise file.error(f"expected a block with the checksum {stored:#010x}, got {computed:#010x}: damaged", offset)
    block = Wire(content[:-1], lambda sentence: file.error(f"block of {size} bytes: {sentence}", offset))
    compression = content[-1]
    if compression == 1:
        block = Wire(decompress(content[:-1], block.error), block.error)
    elif compression != 0:
        raise block.error(f"expected compression 0 (none) or 1 (Snappy), got {compression}")
    return _without_restarts(block)


def _without_restarts(block: Wire) -> Wire:
    content = block.take(block.remaining, "a block")
    count = int.from_bytes(content[-4:], "little")
    if len(content) < 4 or 4 * (count + 1) > len(content):
        raise block.error(f"expected its count of restarts to fit, got {count} in {len(content)} bytes")
    return Wire(content[: len(content) - 4 * (count + 1)], block.error)


def _entries(block: Wire) -> Iterator[tuple[bytes, bytes]]:
    key = b""
    while block.remaining:
        shared = block.varint("the shared length of a key")
        own = block.varint("the own length of a key")
        size = block.varint("the length of a value")
        if shared > len(key) or shared + own > _MAX_KEY_BYTES:
            raise block.error(
                f"expected a key of at most {_MAX_KEY_BYTES} bytes that shares at most {len(key)}, got {shared + own} "
                f"bytes that share {shared}"
            )
        key = key[:shared] + block.take(own, "a key")
        yield key, block.take(size, "a value")
