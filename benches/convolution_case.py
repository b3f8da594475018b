"""What the races of gated_conv2d, dilated_conv2d and partial_conv2d have in common: layers of networks, and who runs.

Every distinct layer of a network is a case of its own, with how often the network has it, so that a report can sum
over the network. Weights and maps are random; which makes no difference to the time.

The field: the code of a module as it is published ("eager"), the same compiled, and ours, each in both memory layouts
(maps and weights are then channels_last). The compiled code is made for one shape, before anything is measured. Ports
of partial convolutions convolve the mask too: with one channel where all channels have the same holes, which is the
quickest published way, and with all channels where a decoder concatenates maps with different holes.

Up to LARGEST_FULLY_GATED_SIZE the gate compares everything with the float64 reference, above it a few rows at the top,
in the middle and at the bottom.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benches.harness import BFLOAT16, FLOAT32, TF32, Outputs, Provider
from inpaint_kernels import dilated_conv2d, gated_conv2d, partial_conv2d

EAGER, COMPILED, OURS, PORTABLE = "eager", "torch.compile", "ours", "portable"
CHANNELS_LAST: Final = " channels_last"
PROVIDERS: Final = tuple(name + layout for name in (EAGER, COMPILED, OURS) for layout in ("", CHANNELS_LAST))

# Largest differences that are no mistake, over the largest magnitude. Published code rounds a bfloat16 map, and the
# counts of known pixels, after every operation.
TOLERANCES: Final = {FLOAT32: 1e-5, TF32: 5e-3, BFLOAT16: 2e-2}
LARGEST_FULLY_GATED_SIZE: Final = 256
GATED_ROWS: Final = 8
NVIDIA_EPS: Final = 1e-8


# Layers --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A convolution of a network.

    Attributes:
        op: the op that computes it.
        inputs, outputs: channels of the convolution; a gated layer delivers half of ``outputs``.
        reduction: the layer's input has a side of the image's over this.
        kernel, stride, dilation, upsample: of the convolution, padded so that the size stays but for the stride.
        activation: what follows it.
        bias: whether it has one.
        count: how often the network has it.
        mask_channels: how many input channels share a mask channel, of a partial convolution.
        title: a name in its network; without one the layer is named by its numbers.
    """

    op: str
    inputs: int
    outputs: int
    reduction: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    upsample: int = 1
    activation: str = "none"
    bias: bool = True
    count: int = 1
    mask_channels: tuple[int, ...] = ()
    title: str = ""

    @property
    def name(self) -> str:
        parts = [self.title] if self.title else []
        parts.append(f"{self.inputs}to{self.outputs}")
        parts += [f"k{self.kernel}"] if self.kernel != 3 else []
        parts += [f"s{self.stride}"] if self.stride != 1 else []
        parts += [f"d{self.dilation}"] if self.dilation != 1 else []
        parts += ["up"] if self.upsample != 1 else []
        parts += ["relu"] if self.op == "gated_conv2d" and self.activation == "relu" else []
        return "-".join(parts)

    @property
    def padding(self) -> int:
        return self.dilation * (self.kernel - 1) // 2


def _gated(inputs: int, outputs: int, reduction: int, **settings: Any) -> Layer:
    return Layer("gated_conv2d", inputs, outputs, reduction, **{"activation": "elu", **settings})


# The 42 convolutions of the generator of DeepFill v2 (nipponjo/deepfillv2-pytorch, cnum 48), both stages.
_DEEPFILL_V2: Final = (
    _gated(5, 48, 1, kernel=5),
    _gated(3, 48, 1, kernel=5, count=2),
    _gated(24, 96, 1, stride=2),
    _gated(24, 48, 1, stride=2, count=2),
    _gated(48, 96, 2, count=3),
    _gated(24, 96, 2, count=2),
    _gated(48, 192, 2, stride=2, count=2),
    _gated(48, 96, 2, stride=2),
    _gated(48, 192, 4),
    _gated(96, 192, 4, count=9),
    _gated(96, 192, 4, activation="relu"),
    *(_gated(96, 192, 4, dilation=rate, count=2) for rate in (2, 4, 8, 16)),
    _gated(192, 192, 4),
    _gated(96, 96, 4, upsample=2, count=2),
    _gated(48, 48, 2, upsample=2, count=2),
    _gated(24, 24, 1, count=2),
    Layer("dilated_conv2d", 12, 3, 1, count=2),
)

# The dilated convolutions of GLCIC; its batch norm is part of weight and bias.
_GLCIC: Final = tuple(Layer("dilated_conv2d", 256, 256, 4, dilation=rate, activation="relu") for rate in (2, 4, 8, 16))


def _encoder(number: int, inputs: int, outputs: int, kernel: int) -> Layer:
    reduction = 2 ** (number - 1)
    settings: dict[str, Any] = {"bias": False, "mask_channels": (inputs,), "title": f"enc{number}"}
    return Layer("partial_conv2d", inputs, outputs, reduction, kernel, stride=2, **settings)


def _decoder(number: int, upsampled: int, skip: int, outputs: int) -> Layer:
    reduction = 2 ** (number - 1)
    settings: dict[str, Any] = {"bias": number == 1, "mask_channels": (upsampled, skip), "title": f"dec{number}"}
    return Layer("partial_conv2d", upsampled + skip, outputs, reduction, **settings)


# The U-Net of Liu et al. (naoto0804, mmagic), seven levels. What its encoder halves must be divisible by 128.
_PCONV_UNET: Final = (
    _encoder(1, 3, 64, 7),
    _encoder(2, 64, 128, 5),
    _encoder(3, 128, 256, 5),
    _encoder(4, 256, 512, 3),
    *(_encoder(number, 512, 512, 3) for number in (5, 6, 7)),
    *(_decoder(number, 512, 512, 512) for number in (7, 6, 5)),
    _decoder(4, 512, 256, 256),
    _decoder(3, 256, 128, 128),
    _decoder(2, 128, 64, 64),
    _decoder(1, 64, 3, 3),
)

DEEPFILL_V2, GLCIC, PCONV_UNET = "DeepFill v2 generator", "GLCIC dilated layers", "PConv U-Net"
NETWORKS: Final = {DEEPFILL_V2: _DEEPFILL_V2, GLCIC: _GLCIC, PCONV_UNET: _PCONV_UNET}


# Cases ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvolutionCase:
    """One race: a layer of a network that is given a square image, forward, without gradients.

    Attributes:
        network: a key of NETWORKS.
        layer: one of its layers.
        size: side of the image.
        precision: "float32" or "bfloat16"; on a GPU also "tf32", float32 whose products are rounded.
        device: where it runs, "cpu" or "cuda".
    """

    network: str
    layer: Layer
    size: int
    precision: str
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.size}-{self.precision}-{self.layer.name}"

    @property
    def race_seconds(self) -> float:
        """Few: a race is one of twenty."""
        return 4.0

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == BFLOAT16 else torch.float32

    @property
    def input_side(self) -> int:
        return self.size // self.layer.reduction

    @property
    def output_side(self) -> int:
        layer = self.layer
        return (self.input_side * layer.upsample - 1) // layer.stride + 1

    @property
    def slow(self) -> bool:
        return self.size > 512

    @property
    def baseline(self) -> str | None:
        return EAGER

    @property
    def tolerances(self) -> tuple[float, ...]:
        of_output = TOLERANCES[self.precision]
        return (of_output, of_output) if self.layer.op == "partial_conv2d" else (of_output,)

    @property
    def provider_names(self) -> Sequence[str]:
        return PROVIDERS

    def provider(self, name: str) -> Provider:
        inputs = make_inputs(self, name.endswith(CHANNELS_LAST))
        run = functools.partial(run_without_gradient, self.forward(name.removesuffix(CHANNELS_LAST)), inputs)
        return Provider(
            name,
            run,
            expected=functools.partial(expected, self),
            select=functools.partial(gated_rows, self),
            warm_up=run,  # compiles, packs weights, lets libraries prepare themselves
            device=self.device,
        )

    def forward(self, name: str) -> Callable[[Inputs], Outputs]:
        """The layer as the provider ``name`` (without its layout) computes it."""
        if name == EAGER:
            return functools.partial(published_code, self.layer)
        if name == COMPILED:
            return compiled_code(self)
        backend = None if name == OURS else name  # ours: what the automatic choice takes
        return functools.partial(our_op, self.layer, backend)

    def facts(self) -> Mapping[str, Any]:
        """``count`` of the ``convolutions`` of the network are this layer; ``flops``, ``bytes``: the least it takes."""
        layer, out_pixels = self.layer, self.output_side**2
        weights = layer.inputs * layer.outputs * layer.kernel**2
        maps = layer.inputs * self.input_side**2 + delivered_channels(layer) * out_pixels
        return {
            "op": layer.op,
            "case": str(self),
            "network": self.network,
            "convolutions": sum(other.count for other in NETWORKS[self.network]),
            "layer": layer.name,
            "count": layer.count,
            "size": self.size,
            "precision": self.precision,
            "direction": "forward",
            "channels": layer.inputs,
            "flops": 2 * weights * out_pixels,
            "bytes": self.dtype.itemsize * (maps + weights),
        }


def delivered_channels(layer: Layer) -> int:
    return layer.outputs // 2 if layer.op == "gated_conv2d" else layer.outputs


def cases_of(network: str, sizes: Sequence[int], device: str = "cpu") -> list[ConvolutionCase]:
    """Every layer of a network at every size, in both precisions."""
    return [
        ConvolutionCase(network, layer, size, precision, device)
        for size in sizes
        for precision in (FLOAT32, BFLOAT16)
        for layer in NETWORKS[network]
    ]


# Inputs --------------------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What a layer is given.

    Attributes:
        x: [1, inputs, side, side].
        weight: [outputs, inputs, kernel, kernel].
        bias: [outputs] or None.
        mask: [1, len(mask_channels), side, side], 1 = known; None but for partial convolutions.
        published_mask: the same as published code wants it: of several mask channels one for every channel of x.
        ones: the weight with which published code convolves it.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None = None
    published_mask: Tensor | None = None
    ones: Tensor | None = None


@functools.lru_cache(maxsize=2)
def make_inputs(case: ConvolutionCase, channels_last: bool) -> Inputs:
    """Normally distributed maps and weights, so that the output has a magnitude of about 1."""
    layer, side = case.layer, case.input_side
    generator = torch.Generator(case.device).manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=case.device)

    def stored(x: Tensor) -> Tensor:
        return x.to(case.dtype).contiguous(memory_format=layout)

    x = stored(normal(1, layer.inputs, side, side))
    weight = stored(normal(layer.outputs, layer.inputs, layer.kernel, layer.kernel) / _fan_in(layer) ** 0.5)
    bias = normal(layer.outputs).mul(0.1).to(case.dtype) if layer.bias else None
    if layer.op != "partial_conv2d":
        return Inputs(x, weight, bias)
    masks = [make_mask(side, index).to(case.device) for index in range(len(layer.mask_channels))]
    mask = torch.cat(masks, 1).to(case.dtype)
    if len(masks) == 1:
        ones = torch.ones(1, 1, layer.kernel, layer.kernel, dtype=case.dtype, device=case.device)
        return Inputs(x, weight, bias, mask, mask, ones)
    spread = zip(masks, layer.mask_channels, strict=True)
    wide = torch.cat([single.expand(-1, channels, -1, -1) for single, channels in spread], 1)
    return Inputs(x, weight, bias, mask, stored(wide), torch.ones_like(weight))


def _fan_in(layer: Layer) -> int:
    return layer.inputs * layer.kernel**2


def make_mask(side: int, index: int) -> Tensor:
    """[1, 1, side, side], 1 = known, with a hole in the middle that is smaller in masks of a higher index."""
    mask = torch.ones(1, 1, side, side)
    first, last = side * (2 + index) // 8, side * (6 - index) // 8
    mask[..., first:last, first:last] = 0
    return mask


# Published code ------------------------------------------------------------------------------------------------------


def published_code(layer: Layer, inputs: Inputs) -> Outputs:
    """The layer as modules for PyTorch compute it."""
    if layer.op == "partial_conv2d":
        return _published_partial(layer, inputs)
    x = inputs.x if layer.upsample == 1 else F.interpolate(inputs.x, scale_factor=layer.upsample, mode="nearest")
    y = F.conv2d(x, inputs.weight, inputs.bias, layer.stride, layer.padding, layer.dilation)
    if layer.op == "dilated_conv2d":
        return (_activated(layer, y),)
    features, gate = torch.split(y, layer.outputs // 2, dim=1)
    return (_activated(layer, features) * torch.sigmoid(gate),)


def _activated(layer: Layer, x: Tensor) -> Tensor:
    if layer.activation == "none":
        return x
    return F.elu(x) if layer.activation == "elu" else F.relu(x)


def _published_partial(layer: Layer, inputs: Inputs) -> Outputs:
    """NVIDIA/partialconv; of its new mask, whose channels are all the same, one is kept."""
    mask, ones, bias = inputs.published_mask, inputs.ones, inputs.bias
    assert mask is not None
    assert ones is not None
    known = F.conv2d(mask, ones, None, layer.stride, layer.padding)
    window = ones.shape[1] * layer.kernel**2
    new_mask = known.clamp(0, 1)
    ratio = window / (known + NVIDIA_EPS) * new_mask
    y = F.conv2d(inputs.x * mask, inputs.weight, bias, layer.stride, layer.padding)
    if bias is None:
        y = y * ratio
    else:
        bias = bias.view(1, -1, 1, 1)
        y = ((y - bias) * ratio + bias) * new_mask
    return y, new_mask[:, :1]


@functools.lru_cache(maxsize=1)
def compiled_code(case: ConvolutionCase) -> Callable[[Inputs], Outputs]:
    """The published code compiled for the case's shape, and for each layout that it meets.

    torch compiles one piece of code only so many times; what was compiled for other cases is therefore dropped.
    """
    torch.compiler.reset()
    return torch.compile(functools.partial(published_code, case.layer), dynamic=False, fullgraph=True)


# Ours, and the gate --------------------------------------------------------------------------------------------------


def our_op(layer: Layer, backend: str | None, inputs: Inputs) -> Outputs:
    x, weight = inputs.x, inputs.weight
    settings: dict[str, Any] = {
        "bias": inputs.bias,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "backend": backend,
    }
    if layer.op == "gated_conv2d":
        return (gated_conv2d(x, weight, activation=layer.activation, upsample=layer.upsample, **settings),)
    if layer.op == "dilated_conv2d":
        return (dilated_conv2d(x, weight, activation=layer.activation, **settings),)
    assert inputs.mask is not None
    return partial_conv2d(x, inputs.mask, weight, eps=NVIDIA_EPS, mask_channels=layer.mask_channels, **settings)


def run_without_gradient(forward: Callable[[Inputs], Outputs], inputs: Inputs) -> Outputs:
    with torch.no_grad():
        return forward(inputs)


@functools.lru_cache(maxsize=1)
def expected(case: ConvolutionCase) -> Outputs:
    """The reference in float64 of the same, already rounded numbers, of the rows that are compared."""
    inputs = in_float64(make_inputs(case, channels_last=False))
    strips = [_reference_rows(case, inputs, rows) for rows in compared_rows(case)]
    return tuple(torch.cat(strip, 2) for strip in zip(*strips, strict=True))


def in_float64(inputs: Inputs) -> Inputs:
    """What the reference needs of the inputs."""
    return Inputs(
        inputs.x.double(),
        inputs.weight.double(),
        None if inputs.bias is None else inputs.bias.double(),
        None if inputs.mask is None else inputs.mask.double(),
    )


def gated_rows(case: ConvolutionCase, outputs: Outputs) -> Outputs:
    """The rows of the outputs that are compared."""
    return tuple(torch.cat([x[:, :, rows] for rows in compared_rows(case)], 2) for x in outputs)


def compared_rows(case: ConvolutionCase) -> list[slice]:
    """Everything, or strips at the top, in the middle and at the bottom, as rows of the output."""
    side = case.output_side
    if case.size <= LARGEST_FULLY_GATED_SIZE or side <= 3 * GATED_ROWS:
        return [slice(0, side)]
    return [slice(first, first + GATED_ROWS) for first in (0, (side - GATED_ROWS) // 2, side - GATED_ROWS)]


def _reference_rows(case: ConvolutionCase, inputs: Inputs, rows: slice) -> Outputs:
    """Rows of the reference's output, from a crop of the input.

    The crop begins and ends in the distance at which its border no longer reaches the rows. It begins at a row of x and
    of the output, hence the even number.
    """
    layer = case.layer
    margin = -(-layer.padding // layer.stride) + 1
    first = max(rows.start - margin, 0) // 2 * 2
    last = min(rows.stop + margin, case.output_side)
    crop = slice(first * layer.stride // layer.upsample, -(-last * layer.stride // layer.upsample))
    cropped = inputs._replace(x=inputs.x[:, :, crop], mask=None if inputs.mask is None else inputs.mask[:, :, crop])
    inner = slice(rows.start - first, rows.stop - first)
    return tuple(x[:, :, inner] for x in our_op(layer, "reference", cropped))
