"""A run on disk: everything that its next step depends on, in safetensors, so that reading it runs nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from inpaint_kernels import checkpoint_files
from inpaint_kernels._files import write_atomically
from inpaint_kernels.checkpoint_files import CheckpointError

STATE, MODEL, EMA = "state.safetensors", "model.safetensors", "ema.safetensors"
"""Files of a checkpoint; the first is written last, and makes it whole."""

_METADATA = "inpaint_kernels_training"


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested dictionaries, lists and tuples of tensors and plain values; the file appears whole or not at all."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_packed(state, "", tensors))
    content = save(tensors, {_METADATA: text})
    write_atomically(path, lambda stream: stream.write(content))


def read_state(path: Path) -> dict[str, Any]:
    """What :func:`write_state` wrote, its tensors on the CPU.

    Raises:
        CheckpointError: no such file, damaged, or another one.
    """
    contents = checkpoint_files.read(path)
    try:
        return _unpacked(json.loads(contents.metadata[_METADATA]), contents.value)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: is not the state of a training run") from error


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """As JSON: what JSON has no word for becomes a list that begins with its kind."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return ["tensor", name]
    if isinstance(value, Mapping):
        return ["dict", [[key, _packed(inner, f"{name}/{key}", tensors)] for key, inner in value.items()]]
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return [kind, [_packed(inner, f"{name}/{i}", tensors) for i, inner in enumerate(value)]]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: expected a tensor or a plain value, got {type(value).__name__}")


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpacked(inner, tensors) for key, inner in content}
    items = [_unpacked(inner, tensors) for inner in content]
    return {"tuple": tuple, "list": list}[kind](items)


# The folder of a run --------------------------------------------------------------------------------------------------


def checkpoint_folder(run: Path, step: int) -> Path:
    """That of the checkpoint after so many steps."""
    return run / "checkpoints" / f"{step:08}"


def newest_checkpoint(run: Path) -> Path | None:
    """The folder of the last whole checkpoint of a run."""
    whole = [path for path in _checkpoints(run) if (path / STATE).is_file()]
    return whole[-1] if whole else None


def drop_old_checkpoints(run: Path, keep: int) -> None:
    """Leave the last ``keep`` ones; 0: all."""
    for path in _checkpoints(run)[:-keep] if keep else []:
        shutil.rmtree(path, ignore_errors=True)


def _checkpoints(run: Path) -> list[Path]:
    folder = run / "checkpoints"
    return sorted(path for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []
