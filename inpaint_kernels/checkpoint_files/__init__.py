"""Checkpoints in the file formats that people have them in, read without running anything that is in them.

A file is recognised by its first bytes, not by its name. Every reader allocates no more than the file has, and raises
:class:`CheckpointError` for one that is damaged, cut off, or none of its kind.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from inpaint_kernels.checkpoint_files import tensorflow, torch7, torch_pickles
from inpaint_kernels.checkpoint_files._errors import CheckpointError

__all__ = ["CheckpointError", "Contents", "read"]

_KERAS_MAGIC = b"\x89HDF\r\n\x1a\n"
_TORCH7_STARTS = (b"\x03\x00\x00\x00", b"\x04\x00\x00\x00")
"""A table or an object of torch comes first, as a 4-byte number."""


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
        container: "torch", "safetensors", "torch7" or "tensorflow".
        value: nested dictionaries of tensors and plain values; of a Torch7 file also its objects, see
            :mod:`.torch7`; of a TensorFlow checkpoint its variables by name.
        metadata: strings that safetensors keep beside the tensors.
        files: those that were read.
    """

    container: str
    value: Any
    metadata: dict[str, str]
    files: tuple[Path, ...]


def read(path: Path, *, wanted: Callable[[str], bool] | None = None) -> Contents:
    """Read a checkpoint.

    Args:
        path: a file of ``torch.save``, safetensors or Torch7; a TensorFlow checkpoint's index, its prefix, or the
            folder that holds it.
        wanted: which variables of a TensorFlow checkpoint are read, by name; None: all. Its optimiser's are three times
            as large as its weights.

    Raises:
        CheckpointError: there is no such file, or it cannot be read; the message says why.
    """
    if _is_tensorflow(path):
        variables = tensorflow.read_tensorflow(path, wanted=wanted)
        return Contents("tensorflow", variables, {}, _files_of_bundle(path))
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is a folder without a checkpoint' if path.is_dir() else 'no such file'}")
    with path.open("rb") as stream:
        start = stream.read(16)
    if start.startswith((torch_pickles.ZIP_MAGIC, torch_pickles.PICKLE_MAGIC)):
        return Contents("torch", torch_pickles.read_torch(path), {}, (path,))
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if start.startswith(_TORCH7_STARTS):
        return Contents("torch7", torch7.read_torch7(path), {}, (path,))
    if start.startswith(_KERAS_MAGIC):
        raise CheckpointError(f"{path}: a Keras file (HDF5), which is not read")
    raise CheckpointError(
        f"{path}: expected a checkpoint of torch, safetensors, Torch7 or TensorFlow, got a file that starts with "
        f"{start[:8]!r}"
    )


def _is_tensorflow(path: Path) -> bool:
    if path.is_dir():
        return (path / "checkpoint").is_file()
    if path.is_file():
        return path.name == "checkpoint" or bool(re.search(r"\.(index|data-\d{5}-of-\d{5})$", path.name))
    return Path(f"{path}.index").is_file()


def _files_of_bundle(path: Path) -> tuple[Path, ...]:
    index = Path(f"{tensorflow.prefix_of(str(path))}.index")
    return (index, *sorted(index.parent.glob(f"{glob.escape(index.stem)}.data-*")))


def _read_safetensors(path: Path) -> Contents:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return Contents("safetensors", tensors, dict(file.metadata() or {}), (path,))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no safetensors file, damaged or cut off: {error}") from error
