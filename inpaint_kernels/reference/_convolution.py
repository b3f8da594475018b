"""The convolution, padding and activations of the three convolution ops, written to be read."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    pad: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    upsample: int = 1,
    reflect: bool = False,
) -> Tensor:
    """Every pixel of ``x`` a square of ``upsample`` x ``upsample``, then a border, then the convolution.

    ``pad`` is (top, bottom, left, right); the border is 0, or with ``reflect`` the pixels mirrored at the edge.
    """
    if upsample > 1:
        x = x.repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)
    top, bottom, left, right = pad
    x = F.pad(x, (left, right, top, bottom), mode="reflect" if reflect else "constant")
    return F.conv2d(x, weight, bias, stride, 0, dilation, groups)


def activate(x: Tensor, activation: str, slope: float) -> Tensor:
    """elu: x or exp(x) - 1; relu: x or 0; leaky_relu: x or slope * x, for x above or below 0; none: x."""
    if activation == "elu":
        return torch.where(x > 0, x, torch.expm1(x.clamp(max=0)))
    if activation == "relu":
        return x.relu()
    if activation == "leaky_relu":
        return torch.where(x > 0, x, slope * x)
    return x


def gradients(
    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``forward(x, weight, bias)`` for ``grad`` of its result.

    ``torch.func`` differentiates also inside an op's own kernel, where torch records no graph.
    """
    if bias is None:
        grad_x, grad_weight = torch.func.vjp(lambda x, weight: forward(x, weight, None), x, weight)[1](grad)
        return grad_x, grad_weight, None
    grad_x, grad_weight, grad_bias = torch.func.vjp(forward, x, weight, bias)[1](grad)
    return grad_x, grad_weight, grad_bias
