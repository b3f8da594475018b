"""Layers that several networks are made of: published weights' names, our ops, whole maps or parts of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from inpaint_kernels.models._boxes import Box
from inpaint_kernels.models._regions import Part, Window, keeps_for_gradients
from torch import Tensor, nn

from inpaint_kernels import dilated_conv2d, gated_conv2d
from inpaint_kernels._checks import check_choice

BORDERS = ("zeros", "reflect", "same_tf")


class Convolution(nn.Module):
    """A convolution that keeps the size (divided by the stride), its bias and its activation; perhaps a gate.

    Args:
        in_channels: Cin.
        channels: that leave the layer, behind the gate.
        kernel: taps along each side, odd.
        stride: of the convolution.
        dilation: of its taps.
        activation: "elu", "relu", "leaky_relu" or "none".
        gated: whether it has a gate (DeepFill v2, equation 3): twice the channels, features first.
        border: "zeros" or "reflect", of dilation * (kernel - 1) / 2 on every side; or "same_tf", TensorFlow's SAME.
        upsample: 2: nearest neighbours first.

    Attributes:
        conv: holds weight and bias, and is never called.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int = 3,
        stride: int = 1,
        dilation: int = 1,
        *,
        activation: str = "elu",
        gated: bool = False,
        border: str = "zeros",
        upsample: int = 1,
    ) -> None:
        super().__init__()
        check_choice("border", border, BORDERS)
        self.conv = nn.Conv2d(in_channels, 2 * channels if gated else channels, kernel, stride, dilation=dilation)
        self.channels, self.activation, self.gated = channels, activation, gated
        self.border, self.upsample = border, upsample

    def forward(self, x: Tensor, part: Part | None = None) -> Tensor:
        """[B, Cin, H, W] -> [B, channels, H * upsample / stride, W * upsample / stride], or a part of it."""
        padding = self._padding(x) if part is None else part.padding
        convolve = self._gated if self.gated else self._plain
        y = convolve(x, padding, "reflect" if self.border == "reflect" else "zeros")
        return y if part is None else part.crop(y)

    @property
    def products(self) -> int:
        """Multiply-adds for one pixel of the output."""
        return self.conv.weight.numel()

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output."""
        stride = self.conv.stride[0]
        return -(-size[0] * self.upsample // stride), -(-size[1] * self.upsample // stride)

    def part(self, wanted: Box, size: tuple[int, int]) -> Part:
        """How to compute a box of the output."""
        rows = self._window(size[0]).span(wanted.top, wanted.bottom, size[0])
        columns = self._window(size[1]).span(wanted.left, wanted.right, size[1])
        return Part(rows, columns, wanted)

    def _window(self, size: int) -> Window:
        kernel, stride, dilation = self.conv.kernel_size[0], self.conv.stride[0], self.conv.dilation[0]
        reach = dilation * (kernel - 1)
        # TensorFlow pads what ceil(size / stride) outputs need, the odd pixel behind.
        total = reach - (size * self.upsample - 1) % stride if self.border == "same_tf" else 2 * (reach // 2)
        return Window(kernel, stride, dilation, total // 2, total - total // 2, self.upsample, self.border == "reflect")

    def _padding(self, x: Tensor) -> tuple[int, int, int, int]:
        rows, columns = self._window(x.shape[2]), self._window(x.shape[3])
        return rows.before, rows.after, columns.before, columns.after

    def _plain(self, x: Tensor, padding: tuple[int, int, int, int], mode: str) -> Tensor:
        weight, bias, stride, dilation = self.conv.weight, self.conv.bias, self.conv.stride[0], self.conv.dilation[0]
        options: dict[str, Any] = {"activation": self.activation, "padding_mode": mode}
        if self.upsample == 1:
            return dilated_conv2d(x, weight, bias, stride, padding, dilation, **options)
        enlarged = _enlarged(x, self.upsample)
        with _kept_small(x, enlarged, self.upsample):
            return dilated_conv2d(enlarged, weight, bias, stride, padding, dilation, **options)

    def _gated(self, x: Tensor, padding: tuple[int, int, int, int], mode: str) -> Tensor:
        weight, bias, stride, dilation = self.conv.weight, self.conv.bias, self.conv.stride[0], self.conv.dilation[0]
        return gated_conv2d(
            x,
            weight,
            bias,
            stride,
            padding,
            dilation,
            activation=self.activation,
            padding_mode=mode,
            upsample=self.upsample,
        )


def _enlarged(x: Tensor, factor: int) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="nearest")


@contextmanager
def _kept_small(x: Tensor, enlarged: Tensor, factor: int) -> Iterator[None]:
    """What is kept of ``enlarged`` for the gradient is ``x``, kept anyway: an eighth less for DeepFill v1's steps."""
    if not keeps_for_gradients():
        yield
        return

    # The hooks live as long as the graph; the enlarged map must not.
    small, storage, shape = x.detach(), _storage(enlarged), enlarged.shape

    def pack(kept: Tensor) -> tuple[Tensor, bool]:
        is_enlarged = _storage(kept) == storage and kept.shape == shape
        return (small, True) if is_enlarged else (kept, False)

    def unpack(packed: tuple[Tensor, bool]) -> Tensor:
        kept, is_enlarged = packed
        return _enlarged(kept, factor) if is_enlarged else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
