"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it there in one step; on failure leave nothing.

    Raises:
        OSError: the file cannot be written.
    """
    target = Path(os.path.realpath(path))  # a link keeps pointing; its target is replaced
    temporary = temporary_beside(target)
    try:
        with temporary.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_beside(target: Path) -> Path:
    """A name for a temporary file that ``target`` is to become."""
    # Same folder, so that the final move stays inside one file system. A short own name: the target's may already be
    # as long as the file system allows.
    return target.with_name(f".{secrets.token_hex(8)}.tmp")
