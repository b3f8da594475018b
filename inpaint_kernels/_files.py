"""Files that appear whole, or do not appear."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

AnyPath = str | os.PathLike[str]


class OutputError(ValueError):
    """A file that cannot be written; the message names it and says why."""


def check_output(path: AnyPath, *, force: bool, inputs: Iterable[AnyPath] = ()) -> None:
    """Find out now, before any work, whether ``path`` can be written in the end.

    Raises:
        OutputError: no such folder, not writable, one of ``inputs``, or an existing file that only ``force`` may
            replace.
    """
    target = Path(path)
    for source in inputs:
        if target.exists() and os.path.exists(source) and os.path.samefile(target, source):
            raise OutputError(f"{path}: is an input; the output must be another file")
    if target.is_dir():
        raise OutputError(f"{path}: is a folder")
    if target.exists() and not force:
        raise OutputError(f"{path}: exists; force (--force) replaces it")
    probe = _temporary_beside(target)
    try:
        probe.open("xb").close()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    probe.unlink()


def write_atomically(path: AnyPath, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it there in one step; on failure leave nothing.

    Raises:
        OutputError: the file cannot be written.
    """
    target = Path(os.path.realpath(path))  # a link keeps pointing; its target is replaced
    temporary = _temporary_beside(target)
    try:
        with temporary.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise


def _temporary_beside(target: Path) -> Path:
    # Same folder, so that the final move stays inside one file system. A short own name: the target's may already be
    # as long as the file system allows.
    return target.with_name(f".{secrets.token_hex(8)}.tmp")
