"""Files of ``torch.save``: tensors, dictionaries and plain values, and nothing that runs.

torch unpickles them with ``weights_only=True``. Before it does, the pickle is read as a list of instructions, without
following any: a file may name only what writers of checkpoints use, and claim no more bytes than it has.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from inpaint_kernels.checkpoint_files._errors import CheckpointError

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"

Instruction = tuple[str, Any]
"""An operation's name and its argument."""

_LOOK_BACK = 3
"""Instructions in front of one that say what it takes from the stack."""

_LEGACY_PICKLES = 4
"""Magic number, protocol, the machine's numbers, and the object; raw storages follow."""

_ALLOWED = {
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch.nn.parameter Parameter",
    # What torch writes for the numbers of numpy.
    "_codecs encode",
    "numpy dtype",
    "numpy.core.multiarray scalar",
    "numpy._core.multiarray scalar",
}
_STORAGE = re.compile(r"torch(\.cuda|\.storage)? \w+Storage")
_DTYPE = re.compile(r"torch (b?float\d+|u?int\d+|bool)")
_MEMO = {"BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"}
_INTEGERS = {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1"}
_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}


def read_torch(path: Path) -> Any:
    """What ``torch.save`` wrote to a file, on the CPU; its tensors take no more memory than the file.

    Raises:
        CheckpointError: the file is damaged, holds anything but tensors and plain values, or claims to be larger than
            it is. Nothing in it has run then.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        zipped = stream.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    for instructions in _zip_pickles(path, size) if zipped else _legacy_pickles(path):
        _check(path, instructions, size)
    try:
        with torch.serialization.safe_globals(_numpy_numbers()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged files torch raises whatever it stumbles over, AssertionError included
        raise CheckpointError(f"{path}: torch cannot read this file: {_first_sentence(error)}") from error


def _zip_pickles(path: Path, size: int) -> Iterator[list[Instruction]]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(f"{path}: {entry.filename} is compressed, which torch.save never does")
            total = sum(entry.file_size for entry in entries)
            if total > size:
                raise CheckpointError(f"{path}: its parts claim {total:,} bytes, the file has {size:,}")
            pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise CheckpointError(f"{path}: expected one data.pkl as torch.save writes, got {len(pickles)}")
            with archive.open(pickles[0]) as stream:
                yield _instructions(path, stream)
    except CheckpointError:
        raise
    except Exception as error:  # as above
        raise CheckpointError(f"{path}: damaged or cut off: {error}") from error


def _legacy_pickles(path: Path) -> Iterator[list[Instruction]]:
    with path.open("rb") as stream:
        for _ in range(_LEGACY_PICKLES):
            yield _instructions(path, stream)


def _instructions(path: Path, stream: IO[bytes]) -> list[Instruction]:
    """The instructions of one pickle, without those that only remember a value."""
    try:
        return [(code.name, argument) for code, argument, _ in pickletools.genops(stream) if code.name not in _MEMO]
    except (ValueError, EOFError, OverflowError, IndexError, MemoryError) as error:
        raise CheckpointError(f"{path}: no checkpoint of torch, damaged or cut off: {error}") from error


def _check(path: Path, instructions: list[Instruction], size: int) -> None:
    for number, (code, argument) in enumerate(instructions):
        before = instructions[max(number - _LOOK_BACK, 0) : number]
        if code in ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            name = argument if code in ("GLOBAL", "INST") else _stacked_name(before)
            if not _may_be_named(name):
                raise CheckpointError(
                    f"{path}: it names {name.replace(' ', '.')}; only tensors and plain values are read, and nothing "
                    "in the file was run. Who trusts it can save its state_dict alone with the code that wrote it"
                )
        elif code == "BINPERSID":
            _check_storage(path, before, size)


def _stacked_name(before: list[Instruction]) -> str:
    """Module and name that a STACK_GLOBAL takes from the stack, where they stand right before it."""
    last = [argument if code in _STRINGS else "?" for code, argument in before[-2:]]
    return " ".join(last) if len(last) == 2 else "?"


def _may_be_named(name: str) -> bool:
    return name in _ALLOWED or bool(_STORAGE.fullmatch(name) or _DTYPE.fullmatch(name))


def _check_storage(path: Path, before: list[Instruction], size: int) -> None:
    """``("storage", type, key, device, elements)``, in old files with a None behind it: the elements must be there."""
    end = [instruction for instruction in before if instruction[0] != "NONE"]
    code, elements = end[-2] if len(end) >= 2 else ("", 0)
    if code not in _INTEGERS:
        raise CheckpointError(f"{path}: a storage does not say its number of elements")
    if not 0 <= elements <= size:
        raise CheckpointError(f"{path}: a storage claims {elements:,} elements, the file has {size:,} bytes")


def _numpy_numbers() -> list[Any]:
    """What torch must be told to take for the numbers of numpy that some training scripts save beside the weights."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    numbers: list[Any] = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype]
    return [*numbers, *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u1", "?")}]


def _first_sentence(error: Exception) -> str:
    lines: Iterable[str] = str(error).strip().splitlines()
    return next(iter(lines), type(error).__name__).partition(". ")[0]
