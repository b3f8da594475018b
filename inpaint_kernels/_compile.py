"""One decorator for functions that torch.compile must call instead of tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def constant_for_compile(function: Callable[P, R]) -> Callable[P, R]:
    """Makes torch.compile call a function while it traces, with constant arguments, and take the result for a constant.

    The same as `torch.compiler.assume_constant_result`, which imports torch._dynamo to set this one attribute: two
    seconds on every import of the package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
