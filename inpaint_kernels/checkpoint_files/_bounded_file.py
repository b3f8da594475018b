"""A file that is read no further than it reaches."""

from __future__ import annotations

import os
import stat
from types import TracebackType

import torch
from torch import Tensor

from inpaint_kernels.checkpoint_files._errors import CheckpointError


class BoundedFile:
    """A regular file opened for reading, whose every read is checked against its size before memory is allocated.

    Args:
        path: the file.

    Raises:
        CheckpointError: no such file, not a regular file, not readable; later, a read beyond the file's end.

    Attributes:
        path: the file, as given.
        size: its bytes.
        position: where the next read begins.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            # Asked before opening: opening a pipe waits for its writer.
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise CheckpointError(f"{self.path}: expected a file, got a folder or a device")
            self._stream = open(self.path, "rb")  # noqa: SIM115 - closed by __exit__
        # ValueError: a path with a zero byte.
        except (OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{self.path}: cannot be opened: {reason}") from error
        self.size = os.fstat(self._stream.fileno()).st_size
        self.position = 0

    def __enter__(self) -> BoundedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    @property
    def remaining(self) -> int:
        """Bytes from the position to the end."""
        return self.size - self.position

    def error(self, sentence: str, offset: int | None = None) -> CheckpointError:
        """An error that names the file and ``offset``, by default the position."""
        return CheckpointError(f"{self.path}: at byte {self.position if offset is None else offset}: {sentence}")

    def seek(self, offset: int) -> None:
        """Go to ``offset`` bytes from the start."""
        self._check_reach(offset, 0, "a place in the file")
        self._stream.seek(offset)
        self.position = offset

    def skip(self, count: int, what: str) -> None:
        """Pass over ``count`` bytes."""
        self._check_reach(self.position, count, what)
        self.seek(self.position + count)

    def read(self, count: int, what: str) -> bytes:
        """The next ``count`` bytes; ``what`` they are is said in the error."""
        self._check_reach(self.position, count, what)
        try:
            content = self._stream.read(count)
        except OSError as error:
            raise self.error(f"{what} cannot be read: {error.strerror}") from error
        self._advance(len(content), count, what)
        return content

    def read_tensor(self, count: int, what: str) -> Tensor:
        """The next ``count`` bytes as a uint8 tensor ``[count]``, aligned for every dtype."""
        self._check_reach(self.position, count, what)
        content = torch.empty(count, dtype=torch.uint8)
        try:
            got = self._stream.readinto(content.numpy().data)
        except OSError as error:
            raise self.error(f"{what} cannot be read: {error.strerror}") from error
        self._advance(got, count, what)
        return content

    def _check_reach(self, offset: int, count: int, what: str) -> None:
        if offset < 0 or count < 0 or offset + count > self.size:
            raise self.error(f"expected {what} of {count} bytes in a file of {self.size} bytes", offset)

    def _advance(self, got: int, expected: int, what: str) -> None:
        if got != expected:  # somebody shortened the file since it was opened
            raise self.error(f"expected {what} of {expected} bytes, got {got}")
        self.position += got
