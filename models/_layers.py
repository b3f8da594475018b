"""Layers that several networks are made of: published weights' names, our ops, whole maps or parts of them."""

from __future__ import annotations

from inpaint_kernels.models._boxes import Box
from inpaint_kernels.models._regions import Part, Window
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
        convolve = gated_conv2d if self.gated else dilated_conv2d
        y = convolve(
            x,
            self.conv.weight,
            self.conv.bias,
            self.conv.stride[0],
            self._padding(x) if part is None else part.padding,
            self.conv.dilation[0],
            activation=self.activation,
            padding_mode="reflect" if self.border == "reflect" else "zeros",
            upsample=self.upsample,
        )
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
