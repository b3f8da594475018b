"""Reading TensorFlow's checkpoints (the V2 bundle of ``tf.train.Saver`` and ``tf.train.Checkpoint``) without it.

A bundle is ``name.index``, a sorted table of protocol buffers (``tensor_bundle.proto``) that says where each variable
lies, and the values in ``name.data-00000-of-00001`` or more of those.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import torch
from torch import Tensor

from inpaint_kernels.checkpoint_files._bounded_file import BoundedFile
from inpaint_kernels.checkpoint_files._crc32c import masked_crc32c
from inpaint_kernels.checkpoint_files._errors import CheckpointError
from inpaint_kernels.checkpoint_files._sorted_table import read_sorted_table
from inpaint_kernels.checkpoint_files._wire import BYTES, FIXED32, VARINT, Wire

# Numbers of types.proto.
_DTYPES: Final = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    4: torch.uint8,
    5: torch.int16,
    6: torch.int8,
    9: torch.int64,
    10: torch.bool,
    14: torch.bfloat16,
    19: torch.float16,
}
_BUNDLE_VERSION: Final = 1
_MAX_SHARDS: Final = 99_999  # five digits in a file's name
_MAX_DIMENSIONS: Final = 64  # torch's own limit for operations on tensors
_MAX_STATE_BYTES: Final = 1 << 16  # the path is on the first line of the file "checkpoint"


def read_tensorflow(path: str | os.PathLike[str], *, wanted: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """Read the variables of a TensorFlow V2 checkpoint.

    Read are float16, bfloat16, float32, float64, uint8, int8, int16, int32, int64 and bool, each into the same dtype;
    variables of other dtypes (strings) are left out, unless ``wanted`` asks for one. The checksums of the index and of
    every tensor that is read are checked.

    Args:
        path: the file ``name.index``, ``name.meta`` or ``name.data-...``, the prefix ``name``, the text file
            ``checkpoint``, or the folder that holds it. Of the path in ``checkpoint`` only the last part is used: the
            checkpoint must lie beside it.
        wanted: whether to read the variable of this name; default: all.

    Returns:
        Name -> contiguous CPU tensor in TensorFlow's layout (convolution kernels ``[kH, kW, in, out]``), in the order
        of the index, which is that of the names' bytes.

    Raises:
        CheckpointError: no such file; truncated, damaged, or no such checkpoint; from a big-endian machine; a variable
            that is partitioned, or one that ``wanted`` asks for and that has another dtype.
    """
    prefix = prefix_of(os.fsdecode(path))
    with BoundedFile(f"{prefix}.index") as index:
        shards, entries = _read_index(index, wanted)
    tensors: dict[str, Tensor] = {}
    for shard, lying in groupby(sorted(entries, key=lambda entry: entry.place), key=lambda entry: entry.shard):
        with BoundedFile(f"{prefix}.data-{shard:05d}-of-{shards:05d}") as data:
            tensors |= _read_shard(data, lying)
    return {entry.name: tensors[entry.name] for entry in entries}


# Which files ----------------------------------------------------------------------------------------------------------


def prefix_of(path: str) -> str:
    """What the names of a checkpoint's files begin with; ``path`` as for :func:`read_tensorflow`."""
    if os.path.isdir(path):
        return _latest(os.path.join(path, "checkpoint"))
    if os.path.basename(path) == "checkpoint" and os.path.isfile(path):
        return _latest(path)
    return re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", path)


def _latest(state_path: str) -> str:
    """The prefix that TensorFlow's text file of the state of its checkpoints names."""
    with BoundedFile(state_path) as file:
        content = file.read(min(file.size, _MAX_STATE_BYTES), "the state of the checkpoints")
        found = re.search(rb'^[ \t]*model_checkpoint_path:[ \t]*"((?:[^"\\\n]|\\.)*)"', content, re.MULTILINE)
        if found is None:
            raise file.error('expected a line model_checkpoint_path: "...", got none', offset=0)
        name = re.split(r"[/\\]", _unescaped(found[1]))[-1]
        if name in ("", ".", "..") or "\0" in name:
            raise file.error(f"expected model_checkpoint_path to end in a file's name, got {name!r}", offset=0)
    return os.path.join(os.path.dirname(state_path), name)


def _unescaped(text: bytes) -> str:
    """A string of protocol buffers' text format, where bytes beyond ASCII are octal."""

    def plain(escape: re.Match[bytes]) -> bytes:
        octal, literal = escape.groups()
        return literal if octal is None else bytes([int(octal, 8) & 0xFF])

    return re.sub(rb"\\(?:([0-7]{1,3})|(.))", plain, text).decode("utf-8", "surrogateescape")


# The index ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """What the index says of one variable (BundleEntryProto); the defaults are those of protocol buffers."""

    name: str
    dtype: int = 0
    shape: tuple[int, ...] = ()
    shard: int = 0
    offset: int = 0
    size: int = 0
    crc32c: int = 0
    partitioned: bool = False

    @property
    def place(self) -> tuple[int, int, int]:
        """Where its bytes begin and end."""
        return self.shard, self.offset, self.offset + self.size


def _read_index(index: BoundedFile, wanted: Callable[[str], bool] | None) -> tuple[int, list[_Entry]]:
    """The number of data files and the entries to read, in the order of the index."""
    table = read_sorted_table(index)
    key, header = next(table, (None, b""))
    if key != b"":
        raise index.error(f"expected the index to begin with the bundle's header, got the key {key!r:.80}")
    shards = _count_shards(Wire(header, _error_of(index, "header")))
    return shards, list(_selected(index, table, wanted, shards))


def _selected(
    index: BoundedFile, table: Iterator[tuple[bytes, bytes]], wanted: Callable[[str], bool] | None, shards: int
) -> Iterator[_Entry]:
    for key, value in table:
        if key.startswith(b"\0"):  # a part of a partitioned variable, under an encoded name
            continue
        try:
            name = key.decode("utf-8")
        except UnicodeDecodeError as error:
            raise index.error(f"expected a variable's name in UTF-8, got {key!r:.80}") from error
        if wanted is not None and not wanted(name):
            continue
        wire = Wire(value, _error_of(index, f"variable {name!r}"))
        entry = _entry(wire, name)
        if entry.dtype in _DTYPES or wanted is not None:
            _check(entry, wire, shards)
            yield entry


def _error_of(file: BoundedFile, part: str) -> Callable[[str], CheckpointError]:
    return lambda sentence: CheckpointError(f"{file.path}: {part}: {sentence}")


def _count_shards(header: Wire) -> int:
    shards = endianness = 0
    version = b""
    for number, value in header.fields({1: VARINT, 2: VARINT, 3: BYTES}):
        if number == 1:
            shards = value
        elif number == 2:
            endianness = value
        else:
            version = value
    if endianness != 0:
        raise header.error("expected a checkpoint from a little-endian machine, got one from a big-endian machine")
    for _, least in Wire(version, header.error).fields({2: VARINT}):
        if least > _BUNDLE_VERSION:
            raise header.error(f"expected version {_BUNDLE_VERSION} of the bundle, got one for readers of {least} on")
    if not 1 <= shards <= _MAX_SHARDS:
        raise header.error(f"expected 1 to {_MAX_SHARDS} data files, got {shards}")
    return shards


_ENTRY_FIELDS: Final = {1: "dtype", 3: "shard", 4: "offset", 5: "size", 6: "crc32c"}
_ENTRY_KINDS: Final = {1: VARINT, 2: BYTES, 3: VARINT, 4: VARINT, 5: VARINT, 6: FIXED32, 7: BYTES}


def _entry(wire: Wire, name: str) -> _Entry:
    values: dict[str, Any] = {}
    for number, value in wire.fields(_ENTRY_KINDS):
        if number == 2:
            values["shape"] = _shape(Wire(value, wire.error))
        elif number == 7:
            values["partitioned"] = True
        else:
            values[_ENTRY_FIELDS[number]] = value
    return _Entry(name, **values)


def _shape(wire: Wire) -> tuple[int, ...]:
    """Sizes of a TensorShapeProto."""
    sizes = []
    for number, value in wire.fields({2: BYTES, 3: VARINT}):
        if number == 3:
            if value:
                raise wire.error("expected a shape, got one of unknown rank")
            continue
        size = [size for _, size in Wire(value, wire.error).fields({1: VARINT})]
        sizes.append(size[-1] if size else 0)
    return tuple(sizes)


def _check(entry: _Entry, wire: Wire, shards: int) -> None:
    if entry.partitioned:
        raise wire.error(
            "is partitioned into slices, which cannot be read: restore it in TensorFlow and save it without a "
            "partitioner"
        )
    if entry.dtype not in _DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES.values())
        raise wire.error(f"expected one of {known}, got number {entry.dtype} of TensorFlow's types.proto (7: string)")
    if entry.shard >= shards:
        raise wire.error(f"expected its values in one of {shards} data files, got number {entry.shard}")
    if len(entry.shape) > _MAX_DIMENSIONS:
        raise wire.error(f"expected at most {_MAX_DIMENSIONS} dimensions, got {len(entry.shape)}")
    # Beside a size of 0 the others may be anything, but torch multiplies them.
    fits = math.prod(max(size, 1) for size in entry.shape) < 1 << 63
    if not fits or math.prod(entry.shape) * _DTYPES[entry.dtype].itemsize != entry.size:
        raise wire.error(
            f"expected the bytes of shape {list(entry.shape)} of {_DTYPES[entry.dtype]}, got {entry.size} bytes"
        )


# The values -----------------------------------------------------------------------------------------------------------


def _read_shard(data: BoundedFile, entries: Iterator[_Entry]) -> dict[str, Tensor]:
    """The tensors of one data file; ``entries`` in the order in which they lie there."""
    tensors = {}
    end = 0
    for entry in entries:
        # Without overlap all tensors together take no more memory than the file.
        if entry.size and entry.offset < end:
            raise data.error(f"variable {entry.name!r} overlaps the one in front of it", entry.offset)
        tensors[entry.name] = _read_tensor(data, entry)
        end = max(end, entry.offset + entry.size)
    return tensors


def _read_tensor(data: BoundedFile, entry: _Entry) -> Tensor:
    what = f"variable {entry.name!r}"
    data.seek(entry.offset)
    octets = data.read_tensor(entry.size, what)
    computed = masked_crc32c(octets.numpy())
    if computed != entry.crc32c:
        raise data.error(
            f"expected {what} with the checksum {entry.crc32c:#010x}, got {computed:#010x}: damaged", entry.offset
        )
    dtype = _DTYPES[entry.dtype]
    if dtype == torch.bool and bool((octets > 1).any()):
        raise data.error(f"expected {what} of booleans, 0 or 1, got other bytes", entry.offset)
    return octets.view(dtype).reshape(entry.shape)
