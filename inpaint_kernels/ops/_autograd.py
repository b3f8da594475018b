"""Gradients of ops, registered as by ``torch.library.register_autograd`` but for what a call of it costs.

That function reads the op's schema anew for every argument of every recorded call: 0.15 ms for the 13 arguments of
``dilated_conv2d``, half of the call, for which a GPU waits. It does so to fill in arguments that the dispatcher drops
because they equal their defaults; the schemas of this package have none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Recording(threading.local):
    """Whether this thread computes an op whose gradient will be asked for."""

    on = False


_recording = _Recording()

SetUp = Callable[[Any, tuple[Any, ...], Any], None]
Backward = Callable[..., tuple[Any, ...]]


def is_trained(parameter: Tensor) -> bool:
    """Whether the op that is computed right now will be asked for this argument's gradient: it soon changes."""
    return _recording.on and parameter.requires_grad


def register_autograd(
    library: torch.library.Library, name: str, backward: Backward, setup_context: SetUp | None = None
) -> None:
    """Make an op differentiable.

    Args:
        library: of the op.
        name: of the op, without namespace; its schema is defined and has no default values.
        backward: (context, gradients of the outputs) -> gradients of all arguments, None for those without.
        setup_context: (context, arguments, output): keeps what ``backward`` needs.
    """
    op = getattr(torch.ops.inpaint_kernels, name).default
    if any(argument.has_default_value() for argument in op._schema.arguments):
        raise ValueError(f"name: expected an op without default values, {name} has some")

    def compute(keyset: Any, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments_and_keyset: Any) -> Any:
            *arguments, keyset = arguments_and_keyset
            before, _recording.on = _recording.on, True
            try:
                output = compute(keyset, tuple(arguments))
            finally:
                _recording.on = before
            if setup_context is not None:
                setup_context(ctx, tuple(arguments), output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            return (*backward(ctx, *gradients), None)

    Gradient.__name__ = Gradient.__qualname__ = f"{name}_gradient"  # profilers show it

    def differentiable(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return Gradient.apply(*arguments, keyset)
        return compute(keyset, arguments)

    library.impl(name, differentiable, "Autograd", with_keyset=True)
