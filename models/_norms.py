"""Instance normalisation with what follows it: scale and shift, activation, residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5
"""torch's and every published network's here."""


class InstanceNorm(nn.InstanceNorm2d):
    """:func:`instance_norm` with its weight and bias, the keys those of :class:`torch.nn.InstanceNorm2d`.

    Args:
        channels: of x.
        activation: as in the function.
        affine: whether there are a weight and a bias.
    """

    def __init__(self, channels: int, activation: str = "none", *, affine: bool = True) -> None:
        super().__init__(channels, affine=affine)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as in the function, which gives up x."""
        return instance_norm(x, self.weight, self.bias, activation=self.activation)


def instance_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``activation((x - mean) / sqrt(var + 1e-5) * weight + bias) + residual``, mean and var of each map of x.

    torch's own takes a map in channels_last through NCHW and back, into new memory. Where autograd records nothing, a
    CPU's maps in channels_last are normalised in place here, 4 to 11 times as fast (1.5 to 4 times as torch's own in
    NCHW). The variance is that of differences to the mean, summed in short sums, so that large maps and large means
    lose no digits.

    Args:
        x: [B, C, H, W], more than one pixel. Not to be used afterwards.
        weight: [C]; None: 1.
        bias: [C]; None: 0.
        activation: "none", "relu" or "leaky_relu" of slope 0.2.
        residual: as x; None: nothing is added.
    """
    if not _in_place(x, weight, bias, residual):
        return _recorded(x, weight, bias, activation, residual)
    mean, variance = _statistics(x)
    scale = torch.rsqrt(variance + EPS)
    if weight is not None:
        scale = scale * weight.view(1, -1, 1, 1)
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias.view(1, -1, 1, 1)
    torch.addcmul(shift, x, scale, out=x)
    x = _activate_(x, activation)
    return x if residual is None else x.add_(residual)


def _in_place(x: Tensor, *others: Tensor | None) -> bool:
    return (
        x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.dtype in (torch.float32, torch.float64)
        and all(other is None or other.dtype == x.dtype for other in others)
        and x.shape[2] * x.shape[3] > 1  # of one pixel torch raises
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _recorded(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Tensor:
    y = F.instance_norm(x, weight=weight, bias=bias, eps=EPS)
    if activation == "relu":
        y = F.relu(y)
    elif activation == "leaky_relu":
        y = F.leaky_relu(y, 0.2)
    return y if residual is None else y + residual


def _activate_(x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return x.relu_()
    return F.leaky_relu_(x, 0.2) if activation == "leaky_relu" else x


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [B, C, 1, 1].

    torch's batch norm reduces [rows, channels] fast, but adds up one row after the other in the dtype of x. The columns
    of the image count as channels of their own, so that these sums are short, and are merged as Chan et al. do,
    Algorithms for Computing the Sample Variance, 1983.
    """
    batch, channels, height, width = x.shape
    means, variances = x.new_empty(2, batch, width, channels)
    for one, mean, variance in zip(x.permute(0, 2, 3, 1), means, variances, strict=True):
        of_columns = torch.batch_norm_update_stats(one.reshape(height, width * channels), None, None, 0.0)
        mean.view(-1).copy_(of_columns[0])
        variance.view(-1).copy_(of_columns[1])
    mean = means.mean(1, keepdim=True)
    variance = variances.add_(means.sub_(mean).square_()).mean(1)
    return mean.view(batch, channels, 1, 1), variance.view(batch, channels, 1, 1)
