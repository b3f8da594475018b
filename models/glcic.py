"""GLCIC: a completion network with dilated convolutions, judged globally and locally.

Iizuka, Simo-Serra, Ishikawa, Globally and Locally Consistent Image Completion, SIGGRAPH 2017. Table 1 of the paper
(layers 1 to 17 below), batch norm behind each convolution but the last; 6,072,131 parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

import torch
import torch.nn.functional as F
from inpaint_kernels.models._batch_norm import Convolutional, fold, normalised
from inpaint_kernels.models._boxes import Box
from inpaint_kernels.models._interface import InpaintingModel, InpaintResult, complete, named
from inpaint_kernels.models._regions import Chain, Part, Plan, Span, Window, pasted
from torch import Tensor, nn

from inpaint_kernels import dilated_conv2d


class Row(NamedTuple):
    """One layer of the paper's table: name, channels, kernel, stride (0.5: enlarges), dilation."""

    name: str
    channels: int
    kernel: int = 3
    stride: float = 1
    dilation: int = 1


TABLE: Final = (
    Row("conv1", 64, kernel=5),
    Row("conv2", 128, stride=2),
    Row("conv3", 128),
    Row("conv4", 256, stride=2),
    Row("conv5", 256),
    Row("conv6", 256),
    Row("conv7", 256, dilation=2),
    Row("conv8", 256, dilation=4),
    Row("conv9", 256, dilation=8),
    Row("conv10", 256, dilation=16),
    Row("conv11", 256),
    Row("conv12", 256),
    Row("deconv13", 128, kernel=4, stride=0.5),
    Row("conv14", 128),
    Row("deconv15", 64, kernel=4, stride=0.5),
    Row("conv16", 32),
    Row("conv17", 3),
)

PLACES2_MEAN: Final = (0.4560, 0.4472, 0.4155)
"""Mean of Places2 in RGB, stored in the published checkpoint."""


@dataclass(frozen=True)
class Dialect:
    """What the public implementations decide differently.

    Attributes:
        relu_first: ReLU in front of the batch norm, not behind it.
        bias: whether the convolutions in front of a batch norm have one.
        mean: what becomes of ``mean_color``: "subtracted" from the image in [0, 1], painted "in the hole", or "unused".
        signed: the image is in [-1, 1], and so is what is painted.
        squash: what ends the network: "sigmoid" or "clip".
    """

    relu_first: bool = False
    bias: bool = True
    mean: str = "unused"
    signed: bool = False
    squash: str = "sigmoid"


DIALECTS: Final[Mapping[str, Dialect]] = {
    "iizuka": Dialect(mean="subtracted"),
    "otenim": Dialect(relu_first=True, mean="in the hole"),
    "mmagic": Dialect(bias=False, signed=True, squash="clip"),
}
"""satoshiiizuka/siggraph2017_inpainting (Torch7, and its conversions to PyTorch), otenim/GLCIC-PyTorch,
open-mmlab/mmagic."""


class GLCIC(InpaintingModel):
    """The completion network, under otenim's names: ``conv1.*``, ``bn1.*``, ..., ``deconv13.*``, ..., ``conv17.*``.

    Args:
        dialect: a name in :data:`DIALECTS`, or an own one.
        mean_color: RGB in [0, 1], the mean of the training's images: in dialect "iizuka" ``mean`` of the checkpoint, in
            "otenim" ``mpv`` of its ``config.json``.

    In evaluation mode the batch norms are folded into the convolutions where they follow them, and else overwrite their
    maps.

    Example:
        >>> model = GLCIC().eval()
        >>> mask = torch.zeros(1, 1, 64, 96)
        >>> mask[..., 24:40, 30:60] = 1
        >>> model(torch.rand(1, 3, 64, 96), mask, region="hole").completed.shape
        torch.Size([1, 3, 64, 96])
    """

    size_multiple: ClassVar[int] = 4

    def __init__(
        self, dialect: str | Dialect = "iizuka", mean_color: tuple[float, float, float] = PLACES2_MEAN
    ) -> None:
        super().__init__()
        self.dialect, self.mean_color = named(dialect, DIALECTS), mean_color
        channels = 4
        for row in TABLE:
            bias = self.dialect.bias or row is TABLE[-1]
            if row.stride == 0.5:
                self.add_module(row.name, nn.ConvTranspose2d(channels, row.channels, row.kernel, 2, 1, bias=bias))
            else:
                padding = row.dilation * (row.kernel - 1) // 2
                layer = nn.Conv2d(channels, row.channels, row.kernel, int(row.stride), padding, row.dilation, bias=bias)
                self.add_module(row.name, layer)
            if row is not TABLE[-1]:
                self.add_module(norm_name(row.name), nn.BatchNorm2d(row.channels))
            channels = row.channels

    def needed_regions(self, hole: Box, height: int, width: int) -> dict[str, Box] | None:
        """Boxes by the table's names. In training the batch norms need every pixel."""
        return None if self.training else self._chain().plan(hole, (height, width)).boxes

    def multiply_adds(self, boxes: Sequence[Box] | None, height: int, width: int) -> int:
        """See :meth:`._interface.InpaintingModel.multiply_adds`."""
        chain, size = self._chain(), (height, width)
        if boxes is None:
            return chain.multiply_adds(size)
        return sum(chain.plan(box, size).multiply_adds for box in boxes)

    def paint(self, image: Tensor, hole: Tensor, *, boxes: Sequence[Box] | None = None) -> InpaintResult:
        """Fill the holes of checked images, see :meth:`._interface.InpaintingModel.paint`; nothing guides it."""
        x = torch.cat([self._scale(image, hole), hole.to(image.dtype)], 1)
        size = (image.shape[2], image.shape[3])
        plans = [None] if boxes is None else [self._chain().plan(box, size) for box in boxes]
        output = pasted((self._paint(x, plan) for plan in plans), image, boxes)
        return InpaintResult(output, complete(image, output, hole, boxes))

    def _paint(self, x: Tensor, plan: Plan | None) -> Tensor:
        x = self._chain().run(x, plan)
        x = x.sigmoid() if self.dialect.squash == "sigmoid" else x.clamp(-1, 1)
        return (x + 1) / 2 if self.dialect.signed else x

    def _scale(self, image: Tensor, hole: Tensor) -> Tensor:
        mean = image.new_tensor(self.mean_color).view(3, 1, 1)
        if self.dialect.mean == "in the hole":
            return torch.where(hole, mean, image)
        if self.dialect.signed:
            image = image * 2 - 1
        elif self.dialect.mean == "subtracted":
            image = image - mean
        return image.masked_fill(hole, 0)

    def _chain(self) -> Chain:
        layers: dict[str, _Convolution | _Enlargement] = {}
        for row in TABLE:
            convolution = self.get_submodule(row.name)
            norm = self._modules.get(norm_name(row.name))
            kind = _Enlargement if row.stride == 0.5 else _Convolution
            layers[row.name] = kind(convolution, norm, self.dialect.relu_first)
        return Chain(layers)


def norm_name(layer: str) -> str:
    """The name of the batch norm behind a layer: bn13 for deconv13."""
    return f"bn{layer.removeprefix('de').removeprefix('conv')}"


class _Block:
    """A convolution of the network with its batch norm and its ReLU, both missing behind the last one."""

    def __init__(self, convolution: Convolutional, norm: nn.BatchNorm2d | None, relu_first: bool) -> None:
        self.convolution, self.norm, self.relu_first = convolution, norm, relu_first

    def __call__(self, x: Tensor, part: Part | None = None) -> Tensor:
        """The block's output, or a part of it."""
        weight, bias, norm = self.convolution.weight, self.convolution.bias, self.norm
        if norm is not None and not norm.training and not self.relu_first:
            (weight, bias), norm = fold(self.convolution, norm), None
        relu = self.norm is not None and (norm is None or self.relu_first)
        y = self.convolve(x, weight, bias, "relu" if relu else "none", part)
        if part is not None:
            y = part.crop(y)
        if norm is None:
            return y
        y = normalised(norm, y)
        return y if self.relu_first else F.relu(y, inplace=True)

    @property
    def channels(self) -> int:
        """Of the output."""
        return self.convolution.out_channels

    @property
    def products(self) -> int:
        """Multiply-adds for one pixel of the output; enlarging by 2, each of them sees a quarter of the taps."""
        enlarged = self.convolution.stride[0] ** 2 if isinstance(self.convolution, nn.ConvTranspose2d) else 1
        return self.convolution.weight.numel() // enlarged

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, part: Part | None) -> Tensor:
        """Convolution and activation of the whole map, or of what a part reads."""
        raise NotImplementedError


class _Convolution(_Block):
    convolution: nn.Conv2d

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, part: Part | None) -> Tensor:
        padding = self.convolution.padding[0] if part is None else part.padding
        stride, dilation = self.convolution.stride[0], self.convolution.dilation[0]
        return dilated_conv2d(x, weight, bias, stride, padding, dilation, activation=activation)  # type: ignore[arg-type]

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output."""
        stride = self.convolution.stride[0]
        return -(-size[0] // stride), -(-size[1] // stride)

    def part(self, wanted: Box, size: tuple[int, int]) -> Part:
        """How to compute a box of the output."""
        convolution = self.convolution
        padding = int(convolution.padding[0])
        window = Window(convolution.kernel_size[0], convolution.stride[0], convolution.dilation[0], padding, padding)
        rows = window.span(wanted.top, wanted.bottom, size[0])
        return Part(rows, window.span(wanted.left, wanted.right, size[1]), wanted)


class _Enlargement(_Block):
    """4 x 4 taps, transposed, twice the size: output o sees the inputs (o - 2) / 2 to (o + 1) / 2."""

    convolution: nn.ConvTranspose2d

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, part: Part | None) -> Tensor:
        y = F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
        return F.relu(y, inplace=True) if activation == "relu" else y

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output."""
        return 2 * size[0], 2 * size[1]

    def part(self, wanted: Box, size: tuple[int, int]) -> Part:
        """How to compute a box of the output."""
        rows = _enlarged_span(wanted.top, wanted.bottom, size[0])
        return Part(rows, _enlarged_span(wanted.left, wanted.right, size[1]), wanted)


def _enlarged_span(begin: int, end: int, size: int) -> Span:
    first, last = max((begin - 1) // 2, 0), min(end // 2, size - 1)
    return Span(first, last + 1, 0, 0, begin - 2 * first)


# The discriminators ---------------------------------------------------------------------------------------------------


class ContextDiscriminator(nn.Module):
    """Tables 2 and 3 of the paper: what a local and a global network see together, under otenim's names.

    Args:
        local_size: side of the square patch around the hole.
        global_size: side of the image.
        global_layers: convolutions of the global network: 6 as published and for otenim's "places2", 5 for "celeba".
        relu_first: ReLU in front of the batch norms (otenim), not behind them.

    Shapes: patch [B, 3, local_size, local_size], image [B, 3, global_size, global_size] -> [B, 1] in [0, 1], the
    probability that the image is real.
    """

    def __init__(
        self, local_size: int = 128, global_size: int = 256, global_layers: int = 6, relu_first: bool = False
    ) -> None:
        super().__init__()
        self.model_ld = _Judge(local_size, 5, relu_first)
        self.model_gd = _Judge(global_size, global_layers, relu_first)
        self.linear1 = nn.Linear(2048, 1)

    def forward(self, patch: Tensor, image: Tensor) -> Tensor:
        """The probability that each image is real."""
        both = torch.cat([self.model_ld(patch), self.model_gd(image)], 1)
        return torch.sigmoid(self.linear1(both))


class _Judge(nn.Module):
    """5 x 5 convolutions of stride 2, then one vector of 1,024."""

    def __init__(self, size: int, layers: int, relu_first: bool) -> None:
        super().__init__()
        self.relu_first, self.layers = relu_first, layers
        widths = (3, 64, 128, 256, 512, 512, 512)
        for number in range(1, layers + 1):
            self.add_module(f"conv{number}", nn.Conv2d(widths[number - 1], widths[number], 5, 2, 2))
            self.add_module(f"bn{number}", nn.BatchNorm2d(widths[number]))
        self.add_module(f"linear{layers + 1}", nn.Linear(widths[layers] * (size // 2**layers) ** 2, 1024))

    def forward(self, x: Tensor) -> Tensor:
        for number in range(1, self.layers + 1):
            convolution, norm = self.get_submodule(f"conv{number}"), self.get_submodule(f"bn{number}")
            x = _Convolution(convolution, norm, self.relu_first)(x)  # type: ignore[arg-type]
        return F.relu(self.get_submodule(f"linear{self.layers + 1}")(x.flatten(1)))
