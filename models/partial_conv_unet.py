"""The U-Net of partial convolutions, for holes of any shape.

Liu, Reda, Shih, Wang, Tao, Catanzaro, Image Inpainting for Irregular Holes Using Partial Convolutions, ECCV 2018,
section 3.2 and the table of its appendix, with one level less, as the public implementations have it; 25.78 million
parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

import torch
import torch.nn.functional as F
from inpaint_kernels.models._batch_norm import fold
from inpaint_kernels.models._boxes import Box
from inpaint_kernels.models._interface import InpaintingModel, InpaintResult, complete, named
from torch import Tensor, nn

from inpaint_kernels import partial_conv2d

LEVELS: Final = 7


class Row(NamedTuple):
    """One level on the way down: channels and kernel; each halves the size."""

    channels: int
    kernel: int


TABLE: Final = (Row(64, 7), Row(128, 5), Row(256, 5), Row(512, 3), Row(512, 3), Row(512, 3), Row(512, 3))


@dataclass(frozen=True)
class Dialect:
    """What the public implementations decide differently.

    Attributes:
        mean: subtracted from the image in [0, 1] (RGB).
        deviation: it is divided by then.
        rule: of :func:`inpaint_kernels.partial_conv2d`: "nvidia" has a small constant in its division, "paper" none.
        first_bias: whether the first convolution has a bias.
    """

    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    rule: str
    first_bias: bool = False


DIALECTS: Final[Mapping[str, Dialect]] = {
    "naoto": Dialect(mean=(0.485, 0.456, 0.406), deviation=(0.229, 0.224, 0.225), rule="paper"),
    "mmagic": Dialect(mean=(0.5, 0.5, 0.5), deviation=(0.5, 0.5, 0.5), rule="nvidia", first_bias=True),
}
"""naoto0804/pytorch-inpainting-with-partial-conv, open-mmlab/mmagic."""


class PartialConvUNet(InpaintingModel):
    """The network, under naoto's names without the constant mask weights: ``enc_1.conv.input_conv.weight``, ...

    A window's sum is scaled up as in the paper, equation 1; naoto's code leaves out the numerator, so its weights are
    divided by kh * kw * Cin when they are loaded. What the network paints is not bounded.

    Args:
        dialect: a name in :data:`DIALECTS`, or an own one.

    In evaluation mode the batch norms are folded into the convolutions. That changes outputs only where a window knows
    nothing; there the next layer's mask is 0.

    Example:
        >>> model = PartialConvUNet().eval()
        >>> mask = torch.zeros(1, 1, 128, 128)
        >>> mask[..., 40:80, 30:60] = 1
        >>> model(torch.rand(1, 3, 128, 128), mask).completed.shape
        torch.Size([1, 3, 128, 128])
    """

    size_multiple: ClassVar[int] = 2**LEVELS
    least_size: int = 2**LEVELS

    def __init__(self, dialect: str | Dialect = "naoto") -> None:
        super().__init__()
        self.dialect = named(dialect, DIALECTS)
        channels = [3, *(row.channels for row in TABLE)]
        rule = self.dialect.rule
        for level, row in enumerate(TABLE, 1):
            first = level == 1
            bias = first and self.dialect.first_bias
            sources = (channels[level - 1],)
            block = _Block(sources, row.channels, row.kernel, 2, rule, bias=bias, norm=not first, slope=0.0)
            self.add_module(f"enc_{level}", block)
        for level in range(LEVELS, 0, -1):
            last = level == 1
            joined = (channels[level], channels[level - 1])
            block = _Block(joined, joined[1], 3, 1, rule, bias=last, norm=not last, slope=None if last else 0.2)
            self.add_module(f"dec_{level}", block)

    def paint(self, image: Tensor, hole: Tensor, *, boxes: Sequence[Box] | None = None) -> InpaintResult:
        """Fill the holes of checked images, see :meth:`._interface.InpaintingModel.paint`; nothing guides it."""
        mean, deviation = (image.new_tensor(v).view(3, 1, 1) for v in (self.dialect.mean, self.dialect.deviation))
        known = (~hole).to(image.dtype)
        x = ((image - mean) / deviation).masked_fill(hole, 0).contiguous(memory_format=torch.channels_last)
        output = (self._unet(x, known) * deviation + mean).contiguous()
        return InpaintResult(output, complete(image, output, hole))

    def _unet(self, x: Tensor, known: Tensor) -> Tensor:
        maps, masks = [x], [known]
        for level in range(1, LEVELS + 1):
            x, known = self.get_submodule(f"enc_{level}")(maps[-1], masks[-1])
            maps.append(x)
            masks.append(known)
        x, known = maps.pop(), masks.pop()
        for level in range(LEVELS, 0, -1):
            x = torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), maps.pop()], 1)
            known = torch.cat([F.interpolate(known, scale_factor=2, mode="nearest"), masks.pop()], 1)
            x = x.contiguous(memory_format=torch.channels_last)
            x, known = self.get_submodule(f"dec_{level}")(x, known)
        return x


class _Block(nn.Module):
    """A partial convolution, its batch norm and its activation.

    Args:
        sources: channels of the maps that are joined in front of it, each with a mask of its own.
        channels: C.
        kernel: taps along each side.
        stride: of the convolution.
        rule: of the partial convolution.
        bias: whether it has one.
        norm: whether a batch norm follows.
        slope: of the activation below zero; None: no activation.
    """

    def __init__(
        self,
        sources: tuple[int, ...],
        channels: int,
        kernel: int,
        stride: int,
        rule: str,
        *,
        bias: bool,
        norm: bool,
        slope: float | None,
    ) -> None:
        super().__init__()
        self.conv = nn.Module()
        self.conv.input_conv = nn.Conv2d(sum(sources), channels, kernel, stride, kernel // 2, bias=bias)
        self.bn = nn.BatchNorm2d(channels) if norm else None
        self.sources, self.rule, self.slope = sources, rule, slope
        # The op counts one mask once, and the public implementations in every channel.
        self.eps = 1e-8 / sources[0] if len(sources) == 1 else 1e-8

    def forward(self, x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """[B, Cin, H, W] and [B, number of sources, H, W] -> the block's output and where it is known, [B, 1, ...]."""
        convolution, norm = self.conv.input_conv, self.bn
        assert isinstance(convolution, nn.Conv2d)
        weight, bias = convolution.weight, convolution.bias
        if norm is not None and not norm.training:
            (weight, bias), norm = fold(convolution, norm), None
        stride, padding = convolution.stride[0], int(convolution.padding[0])
        y, known = partial_conv2d(
            x, known, weight, bias, stride, padding, rule=self.rule, eps=self.eps, mask_channels=self.sources
        )
        if norm is not None:
            y = norm(y)
        return (y if self.slope is None else F.leaky_relu(y, self.slope, inplace=True)), known
