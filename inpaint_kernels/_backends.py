"""Which backend runs an op, why, and how to ask for another one.

Every backend of an op has a function that returns the list of reasons why it cannot run a given problem; an empty list
means that it can. The automatic choice, the error of a request that cannot be met, and `explain()` all read these same
lists. A request never falls back: it runs on the backend that was named, or it raises with the reasons.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch

from inpaint_kernels._compile import constant_for_compile

AUTO = "auto"
BACKENDS = ("cpu", "cuda", "triton", "portable", "reference")

# Where the automatic choice ends when no kernel can run.
_NOT_A_KERNEL = ("portable", "reference")


class Problem(Protocol):
    """What `OpBackends` needs to know of a problem; each op's own problem type has more for its reasons."""

    @property
    def device(self) -> torch.device:
        """Where the op's tensors are."""


P = TypeVar("P", bound=Problem)


class BackendError(RuntimeError):
    """A backend was asked for that cannot run; the message lists the reasons."""


@dataclasses.dataclass(frozen=True)
class _Scope:
    """One open `use_backend` block."""

    backend: str
    op: str | None
    thread: int


# All open blocks of all threads, innermost last. An immutable tuple in a module global is read without a lock, and it
# is a value that torch.compile can guard on; it can guard on neither a ContextVar nor a threading.local.
_scopes: tuple[_Scope, ...] = ()
_scopes_lock = threading.Lock()


# torch.compile cannot trace get_ident. A compiled function is recompiled whenever `_scopes` changes, so the only
# difference to eager code is this: a thread that reuses code compiled inside another thread's open block sees it too.
@constant_for_compile
def _current_thread() -> int:
    return threading.get_ident()


@contextmanager
def use_backend(backend: str, op: str | None = None) -> Iterator[None]:
    """Runs ops on one backend inside a `with` block, in the current thread.

    Args:
        backend: "cpu", "cuda", "triton", "portable", "reference", or "auto" for the automatic choice.
        op: Name of the only op that this is about; None means every op.

    Raises:
        ValueError: `backend` is no backend, or `op` no op.

    An op that cannot run on the backend raises BackendError when it is called. A `backend=` argument of the call goes
    before the innermost block, and that before the environment variable INPAINT_BACKEND.
    """
    global _scopes
    _check_name(backend, "backend")
    if op is not None:
        _find(op)
    scope = _Scope(backend, op, threading.get_ident())
    with _scopes_lock:
        _scopes = (*_scopes, scope)
    try:
        yield
    finally:
        with _scopes_lock:
            _scopes = tuple(other for other in _scopes if other is not scope)


class OpBackends(Generic[P]):
    """The backends of one op, in order of preference."""

    def __init__(self, op: str, prepare: Callable[..., P], reasons: Mapping[str, Callable[[P], list[str]]]) -> None:
        """Registers the op's backends under its name.

        Args:
            op: Name of the op.
            prepare: Makes a problem of the public function's arguments (all but `backend`), without running it.
            reasons: For each backend, best first, why it cannot run a problem; an empty list if it can. Under
                torch.compile these functions are traced: sizes may enter texts through f-strings only.
        """
        unknown = [name for name in reasons if name not in BACKENDS]
        if unknown:
            raise ValueError(f"reasons: expected backends out of {BACKENDS}, got {unknown}")
        if op in _ops:
            raise ValueError(f"op: {op!r} has its backends already")
        self.op = op
        self.prepare = prepare
        self.reasons = dict(reasons)
        self._order = tuple(reasons.items())
        _ops[op] = self

    def choose(self, problem: P, requested: str | None = None) -> str:
        """The backend that is to run a problem.

        Args:
            problem: What `prepare` returned.
            requested: The call's `backend` argument; None leaves the choice to `use_backend`, then INPAINT_BACKEND.

        Raises:
            ValueError: The requested name is no backend.
            BackendError: The requested backend cannot run this problem, or none can.
        """
        if requested is None:
            requested = self._request_in_force()
        if requested != AUTO:
            return self._obey(problem, requested)
        for name, reasons in self._order:
            if not reasons(problem):
                if name in _NOT_A_KERNEL and problem.device.type == "cuda":
                    self._warn(problem, name)
                return name
        raise BackendError(f"{self.op}: no backend can run this:\n{_format_reasons(self._all_reasons(problem))}")

    def explain(self, problem: P, requested: str | None = None) -> Explanation:
        """What `choose` would say, with the reasons of all backends; neither raises nor warns."""
        request = self._request_in_force() if requested is None else requested
        reasons = self._all_reasons(problem)
        if request != AUTO and request not in reasons:
            reasons[request] = self._reasons_of(request, problem)
        usable = tuple(name for name, why in reasons.items() if not why)
        cannot = {name: tuple(why) for name, why in reasons.items() if why}
        candidates = usable if request == AUTO else tuple(name for name in usable if name == request)
        return Explanation(self.op, request, candidates[0] if candidates else None, usable, cannot)

    def _request_in_force(self) -> str:
        if _scopes:
            thread = _current_thread()
            for scope in reversed(_scopes):
                if scope.thread == thread and (scope.op is None or scope.op == self.op):
                    return scope.backend
        return _environment_request

    def _obey(self, problem: P, requested: str) -> str:
        _check_name(requested, "backend")
        why = self._reasons_of(requested, problem)
        if why:
            raise BackendError(
                f"{self.op}: backend {requested!r} was requested and cannot run: {'; '.join(why)}. "
                "Nothing else was tried; backend='auto' chooses one that can."
            )
        return requested

    def _reasons_of(self, name: str, problem: P) -> list[str]:
        if name not in self.reasons:
            return [f"{self.op} has no {name} kernel, only {', '.join(self.reasons)}"]
        return self.reasons[name](problem)

    def _all_reasons(self, problem: P) -> dict[str, list[str]]:
        return {name: reasons(problem) for name, reasons in self._order}

    def _warn(self, problem: P, chosen: str) -> None:
        # Sizes in the reasons are symbols while torch.compile traces; the warning then goes without them.
        tracing = torch.compiler.is_compiling()
        why = {} if tracing else {name: text for name, text in self._all_reasons(problem).items() if text}
        _warn_no_kernel(self.op, chosen, _format_reasons(why))


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which backend would run a call, and why not the others. `print()` it.

    Attributes:
        op: Name of the op.
        requested: The backend that the call, `use_backend` or INPAINT_BACKEND asked for; "auto" if none.
        chosen: The backend that would run; None if the requested one, or every one, cannot.
        usable: The backends that can run the call, best first.
        cannot: For each other backend, why not.
    """

    op: str
    requested: str
    chosen: str | None
    usable: tuple[str, ...]
    cannot: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        return (
            f"{self.op}: chosen {self.chosen or 'none'} (requested: {self.requested})\n"
            f"  usable: {', '.join(self.usable) or 'none'}\n{_format_reasons(self.cannot)}"
        ).rstrip()


def explain(op: str, *args: Any, backend: str | None = None, **kwargs: Any) -> Explanation:
    """Tells which backend would run `op(*args, **kwargs)` and why the others would not, without running it.

    Args:
        op: Name of the op, for example "contextual_attention".
        *args: Arguments of the call.
        backend: The call's `backend` argument.
        **kwargs: Keyword arguments of the call.

    Raises:
        ValueError: There is no such op or backend, or the op rejects the arguments.
    """
    backends = _find(op)
    if backend is not None:
        _check_name(backend, "backend")
    return backends.explain(backends.prepare(*args, **kwargs), backend)


def registered_ops() -> Mapping[str, OpBackends[Any]]:
    """All ops that have a backend table, by name."""
    return dict(_ops)


_ops: dict[str, OpBackends[Any]] = {}
_warned: set[str] = set()


# A constant for torch.compile: the warning is given while it traces, and leaves nothing in the graph.
@constant_for_compile
def _warn_no_kernel(op: str, chosen: str, reasons: str) -> None:
    """Warns, once per op, that a CUDA problem runs without a kernel."""
    if op in _warned:
        return
    _warned.add(op)
    warnings.warn(
        f"{op}: no kernel can run on this GPU, the slower '{chosen}' implementation is used; "
        f"inpaint_kernels.explain({op!r}, ...) tells why.\n{reasons}".rstrip(),
        RuntimeWarning,
        stacklevel=2,
    )


def _find(op: str) -> OpBackends[Any]:
    if op not in _ops:
        raise ValueError(f"op: expected one of {', '.join(map(repr, _ops))}, got {op!r}")
    return _ops[op]


def _check_name(name: str, argument: str) -> None:
    if name != AUTO and name not in BACKENDS:
        names = ", ".join(map(repr, (AUTO, *BACKENDS)))
        raise ValueError(f"{argument}: expected one of {names}, got {name!r}")


def _format_reasons(reasons: Mapping[str, Any]) -> str:
    return "".join(f"  cannot: {name}: {'; '.join(why)}\n" for name, why in reasons.items() if why)


def _read_environment() -> str:
    request = os.environ.get("INPAINT_BACKEND") or AUTO
    _check_name(request, "INPAINT_BACKEND")
    return request


# Read once: reading the environment costs more than choosing a backend.
_environment_request = _read_environment()
