"""What kernels hold beside the tensors that torch knows of, told to whoever plans memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_listener: ContextVar[Callable[[int], None] | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Callable[[int], None]) -> Iterator[None]:
    """Inside, ``listener`` is told the bytes of every kernel's workspace before the kernel runs."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def announce(size: Callable[[], int]) -> None:
    """Tells the listener, if there is one, how many bytes a kernel is about to hold."""
    listener = _listener.get()
    if listener is not None:
        listener(size())
