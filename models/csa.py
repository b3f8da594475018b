"""Coherent semantic attention (Liu et al., 2019): a U-Net paints coarsely, a second one with the CSA layer refines."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from inpaint_kernels.models._boxes import Box
from inpaint_kernels.models._interface import InpaintingModel, InpaintResult, check_least_size, complete
from inpaint_kernels.models._networks import fastest_layout, init_normal
from inpaint_kernels.models._norms import InstanceNorm
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from inpaint_kernels import nn as kernels
from inpaint_kernels._checks import check_range
from inpaint_kernels.nn import DilatedConv2d

_ATTENTION_LEVEL = 2  # counted from the second of the levels, at an eighth of the size
_FILL = (123.0, 104.0, 117.0)  # of R, G, B; ImageNet's means with green and blue swapped, as published

# U-Nets ---------------------------------------------------------------------------------------------------------------


class _Level(nn.Module):
    """One depth of a U-Net, with the deeper ones inside: keys are the numbers of the published Sequential.

    The leaky ReLU that an encoder's layers begin with stands behind the layer before, and the ReLU that a decoder's
    begin with behind the joint of both branches: a ReLU of a leaky ReLU is the ReLU.
    """

    encoder: ClassVar[tuple[str, ...]]
    decoder: ClassVar[tuple[str, ...]]
    deeper: ClassVar[str | None] = None

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.model = nn.ModuleDict(layers)

    def encoding(self) -> list[nn.Module]:
        """[B, C, H, W] -> [B, C', H / 2, W / 2], both after their leaky ReLU.

        Layers, not a function of x: a function's caller would keep x alive, half of what a call on a large image needs.
        """
        return [self.model[name] for name in self.encoder]

    def decoding(self) -> list[nn.Module]:
        """[B, 2 C', h, w] after its ReLU -> [B, C, 2 h, 2 w] before; the first of them through :func:`_joint`."""
        return [self.model[name] for name in self.decoder]


def _joint(layer: Any, up: Tensor, skip: Tensor) -> Tensor:
    """A transposed convolution of ``relu([up | skip])``, which are not to be used afterwards.

    The joint is never made: the convolution of two maps joined is the sum of the convolutions of both.
    """
    up, skip = (F.relu(x, inplace=not torch.is_grad_enabled()) for x in (up, skip))
    settings = {"stride": layer.stride, "padding": layer.padding}
    of_up, of_skip = layer.weight.split([up.shape[1], skip.shape[1]])
    y = F.conv_transpose2d(up, of_up, layer.bias, **settings)
    return y.add_(F.conv_transpose2d(skip, of_skip, **settings))


class _CoarseLevel(_Level):
    encoder, decoder, deeper = ("1", "2"), ("5", "6"), "3"

    def __init__(self, outer: int, inner: int, inside: _Level) -> None:
        super().__init__(
            {
                "1": _halving(outer, inner),
                "2": InstanceNorm(inner, "leaky_relu"),
                "3": inside,
                "5": _doubling(2 * inner, outer),
                "6": InstanceNorm(outer),
            }
        )


class _RefinementLevel(_Level):
    encoder, decoder, deeper = ("1", "2", "4", "5"), ("8", "9", "11", "12"), "6"

    def __init__(self, outer: int, inner: int, inside: _Level) -> None:
        super().__init__(
            {
                "1": _dilated_halving(outer),
                "2": InstanceNorm(outer, "leaky_relu"),
                "4": DilatedConv2d(outer, inner, 3, padding=1, activation="none"),
                "5": InstanceNorm(inner, "leaky_relu"),
                "6": inside,
                "8": nn.ConvTranspose2d(2 * inner, outer, 3, padding=1),
                "9": InstanceNorm(outer, "relu"),
                "11": _doubling(outer, outer),
                "12": InstanceNorm(outer),
            }
        )


class _AttentionLevel(_Level):
    """A refinement level whose features the CSA layer completes before their norm."""

    encoder, decoder, deeper = ("1", "2", "4"), ("11", "12", "14", "15"), "8"

    def __init__(self, outer: int, inner: int, inside: _Level, attention: kernels.CSA) -> None:
        super().__init__(
            {
                "1": _dilated_halving(outer),
                "2": InstanceNorm(outer, "leaky_relu"),
                "4": DilatedConv2d(outer, inner, 3, padding=1, activation="none"),
                "5": attention,
                "7": InstanceNorm(inner, "leaky_relu"),
                "8": inside,
                "11": nn.ConvTranspose2d(2 * inner, outer, 3, padding=1),
                "12": InstanceNorm(outer, "relu"),
                "14": _doubling(outer, outer),
                "15": InstanceNorm(outer),
            }
        )

    def attend(self, x: Tensor, flags: Tensor) -> Tensor:
        """What :meth:`encode` gives, with masked positions made of known ones."""
        return self.model["5"](x, flags)

    def normalise(self, x: Tensor) -> Tensor:
        """What the deeper levels see."""
        return self.model["7"](x)


class _Innermost(_Level):
    encoder, decoder = ("1",), ("3", "4")

    def __init__(self, channels: int, padding: int = 1, dilation: int = 1) -> None:
        down = DilatedConv2d(channels, channels, 4, 2, padding, dilation, activation="relu")
        super().__init__({"1": down, "3": _doubling(channels, channels), "4": InstanceNorm(channels)})


class _Outermost(_Level):
    encoder, decoder, deeper = ("0",), ("3",), "1"

    def __init__(self, first: nn.Module, inside: _Level, last: nn.Module) -> None:
        super().__init__({"0": first, "1": inside, "3": last})


class _UNet(nn.Module):
    """Levels from the image to the innermost one."""

    def __init__(self, outermost: _Outermost) -> None:
        super().__init__()
        self.model = outermost
        self.apply(init_normal)

    def levels(self) -> list[Any]:
        """From the second to the innermost."""
        level: Any = self.model
        found = []
        while level.deeper is not None:
            level = level.model[level.deeper]
            found.append(level)
        return found


def _widths(channels: int, depth: int) -> list[int]:
    """Channels of all depths: doubled three times, then the same."""
    check_range("channels", channels, minimum=1, integer=True)
    check_range("depth", depth, minimum=5, integer=True)
    return [channels * min(2**i, 8) for i in range(depth)]


def _halving(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1)


def _dilated_halving(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 4, stride=2, padding=3, dilation=2)


def _doubling(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)


def _of_size(x: Tensor, other: Tensor) -> Tensor:
    """Resizes x bilinearly where its size is not that of the other: sides that are no powers of 2."""
    size = other.shape[2:]
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


class CoarseGenerator(_UNet):
    """The first network, netP ("unet_256"): 3 -> 3 channels, 54,419,459 parameters.

    ``depth`` convolutions of 4 x 4 with stride 2 and as many transposed ones, 64 to 512 channels, skips between them;
    all but the outermost and innermost with an instance norm; leaky ReLU of slope 0.2 going down, ReLU going up.

    Args:
        channels: of the outermost level.
        depth: number of halvings, at least 5.

    References:
        Liu et al., Coherent Semantic Attention for Image Inpainting, ICCV 2019. Published code:
        KumapowerLIU/CSA-inpainting, ``UnetGenerator``.
    """

    def __init__(self, channels: int = 64, depth: int = 8) -> None:
        widths = _widths(channels, depth)
        level: _Level = _Innermost(widths[-1])
        for i in reversed(range(depth - 2)):
            level = _CoarseLevel(widths[i], widths[i + 1], level)
        first = DilatedConv2d(3, channels, 4, stride=2, padding=1, activation="leaky_relu")
        super().__init__(_Outermost(first, level, _doubling(2 * channels, 3)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1], the hole filled with grey -> the same; sides even and of at least 2^depth."""
        x = fastest_layout(x)
        levels, skips = self.levels(), []
        for level in [self.model, *levels]:
            for layer in level.encoding():
                x = layer(x)
            skips.append(x)
        skips.pop()
        for layer in levels[-1].decoding():
            x = layer(x)
        for level in [*levels[-2::-1], self.model]:
            first, *layers = level.decoding()
            x = _of_size(x, skips[-1])
            x = _joint(first, x, skips.pop())
            for layer in layers:
                x = layer(x)
        return x.tanh().contiguous()


class RefinedFeatures(NamedTuple):
    """What :class:`RefinementGenerator` returns with ``return_features``; the last two feed the consistency loss.

    Attributes:
        output: [B, 3, H, W], as without.
        attention: [B, 512, H / 8, W / 8], what the CSA layer gave.
        decoder: [B, 512, H / 8, W / 8], what the decoder gave to the layer of the same depth, before its ReLU.
    """

    output: Tensor
    attention: Tensor
    decoder: Tensor


class RefinementGenerator(_UNet):
    """The second network, netG ("unet_csa"): 6 -> 3 channels, 77,692,291 parameters.

    As :class:`CoarseGenerator`, with a convolution of 3 x 3 at every depth beside the one that halves (rate 2), and the
    CSA layer at an eighth of the size.

    Args:
        channels: of the outermost level.
        depth: number of halvings, at least 5.
        variant: of :func:`inpaint_kernels.coherent_semantic_attention`, as the next one.
        gradient: the same.

    References:
        As of :class:`CoarseGenerator`. Published code: ``UnetGeneratorCSA``.
    """

    def __init__(
        self, channels: int = 64, depth: int = 8, *, variant: str = "official", gradient: str = "official"
    ) -> None:
        widths = _widths(channels, depth)
        level: _Level = _Innermost(widths[-1], padding=3, dilation=2)
        for i in reversed(range(depth - 1)):
            if i == _ATTENTION_LEVEL:
                attention = kernels.CSA(variant=variant, gradient=gradient)
                level = _AttentionLevel(widths[i], widths[i + 1], level, attention)
            else:
                level = _RefinementLevel(widths[i], widths[i + 1], level)
        first = DilatedConv2d(6, channels, 3, padding=1, activation="leaky_relu")
        super().__init__(_Outermost(first, level, nn.ConvTranspose2d(2 * channels, 3, 3, padding=1)))

    def forward(self, x: Tensor, flags: Tensor, *, return_features: bool = False) -> Tensor | RefinedFeatures:
        """Refine.

        Args:
            x: [B, 6, H, W] in [-1, 1], multiples of 8, the larger above 2^(depth - 1): the image with the hole from the
                first network, and with the hole 0.
            flags: bool [B or 1, H / 8, W / 8], masked positions, as :meth:`inpaint_kernels.nn.CSA.set_mask` makes them.
            return_features: whether to return :class:`RefinedFeatures`.

        Returns:
            [B, 3, H, W], around [-1, 1] and not bounded.
        """
        x = fastest_layout(x)
        levels, skips = self.levels(), []
        for i, level in enumerate([self.model, *levels], -1):
            for layer in level.encoding():
                x = layer(x)
            if i == _ATTENTION_LEVEL:
                attention = level.attend(x, flags)
                x = level.normalise(attention.clone() if return_features else attention)
            skips.append(x)
        skips.pop()
        for layer in levels[-1].decoding():
            x = layer(x)
        for i, level in reversed(list(enumerate([self.model, *levels[:-1]], -1))):
            first, *layers = level.decoding()
            x = _of_size(x, skips[-1])
            if i == _ATTENTION_LEVEL and return_features:
                decoder = x.clone()
            x = _joint(first, x, skips.pop())
            for layer in layers:
                x = layer(x)
        output = x.contiguous()
        return RefinedFeatures(output, attention, decoder) if return_features else output


# Discriminators -------------------------------------------------------------------------------------------------------


class PatchDiscriminator(nn.Module):
    """netD, of images: 2,766,529 parameters.

    Convolutions of 4 x 4 with stride 2, 2, 2, 1, 1, to 64, 128, 256, 512 and 1 channels; leaky ReLU of slope 0.2
    between them, instance norms before all of these but the first.

    Args:
        in_channels: of the images.
        channels: of the first layer.

    References:
        As of :class:`CoarseGenerator`. Published code: ``NLayerDiscriminator``.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64) -> None:
        super().__init__()
        self.model = nn.Sequential(
            OrderedDict(
                {
                    "0": DilatedConv2d(in_channels, channels, 4, 2, 1, activation="leaky_relu"),
                    "2": _halving(channels, 2 * channels),
                    "3": InstanceNorm(2 * channels, "leaky_relu"),
                    "5": _halving(2 * channels, 4 * channels),
                    "6": InstanceNorm(4 * channels, "leaky_relu"),
                    "8": nn.Conv2d(4 * channels, 8 * channels, 4, padding=1),
                    "9": InstanceNorm(8 * channels, "leaky_relu"),
                    "11": nn.Conv2d(8 * channels, 1, 4, padding=1),
                }
            )
        )
        self.apply(init_normal)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] in [-1, 1] -> scores [B, 1, H / 8 - 2, W / 8 - 2], not bounded."""
        return self.model(fastest_layout(x))


class FeaturePatchDiscriminator(nn.Module):
    """netF, of VGG-16's features behind its third pooling: 10,487,296 parameters, its norm without weights.

    Args:
        in_channels: of the features.
        channels: of all layers.

    References:
        As of :class:`CoarseGenerator`. Published code: ``PFDiscriminator``.
    """

    def __init__(self, in_channels: int = 256, channels: int = 512) -> None:
        super().__init__()
        self.model = nn.Sequential(
            OrderedDict(
                {
                    "0": DilatedConv2d(in_channels, channels, 4, 2, 1, activation="leaky_relu"),
                    "2": _halving(channels, channels),
                    "3": InstanceNorm(channels, "leaky_relu", affine=False),
                    "5": _halving(channels, channels),
                }
            )
        )
        self.apply(init_normal)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, h, w] -> scores [B, channels, h / 8, w / 8], not bounded."""
        return self.model(fastest_layout(x))


# The system -----------------------------------------------------------------------------------------------------------


class CSAStages(NamedTuple):
    """What :meth:`CSA.stages` returns, images around [-1, 1].

    Attributes:
        coarse: [B, 3, H, W] in [-1, 1], what the first network paints.
        output: [B, 3, H, W], what the second one does, not bounded.
        attention: as of :class:`RefinedFeatures`; None unless asked for.
        decoder: the same.
    """

    coarse: Tensor
    output: Tensor
    attention: Tensor | None
    decoder: Tensor | None


class CSA(InpaintingModel):
    """Coherent semantic attention. ``model(image, mask)``, see :meth:`paint`; :meth:`stages` for training.

    The two generators load the published training's files ``<epoch>_net_P.pth`` and ``<epoch>_net_G.pth`` unchanged.

    Args:
        channels: of both networks' outermost level; 64 as published.
        depth: halvings of both networks; 8 as published, for sides from 256 on.
        variant: of :func:`inpaint_kernels.coherent_semantic_attention`, as the next one.
        gradient: the same.

    Attributes:
        coarse_generator: :class:`CoarseGenerator`, netP.
        refinement_generator: :class:`RefinementGenerator`, netG.

    On a CPU, ``model.to(memory_format=torch.channels_last)`` saves the copies of 132 million weights that every call
    without gradient makes otherwise, an eighth of its time at 256 x 256.

    Deviations from the published code: the masked positions follow the mask of every call, each image's own (there:
    the first one's for ever). In training, gradients of the second network reach the first one (there: cut). Thin holes
    mask no position, see :meth:`inpaint_kernels.nn.CSA.set_mask`; the CSA layer then changes nothing.

    References:
        Liu et al., Coherent Semantic Attention for Image Inpainting, ICCV 2019. Published code:
        KumapowerLIU/CSA-inpainting.

    Example:
        >>> model = CSA(channels=8, depth=6).eval()
        >>> image, mask = torch.rand(1, 3, 64, 96), torch.zeros(1, 1, 64, 96)
        >>> mask[..., 16:48, 16:48] = 1
        >>> with torch.no_grad():
        ...     model(image, mask).completed.shape
        torch.Size([1, 3, 64, 96])
    """

    size_multiple: ClassVar[int] = 8

    def __init__(
        self, channels: int = 64, depth: int = 8, *, variant: str = "official", gradient: str = "official"
    ) -> None:
        super().__init__()
        self.depth = depth
        self.least_size = 2**depth
        self.coarse_generator = CoarseGenerator(channels, depth)
        self.refinement_generator = RefinementGenerator(channels, depth, variant=variant, gradient=gradient)

    def paint(self, image: Tensor, hole: Tensor, *, boxes: Sequence[Box] | None = None) -> InpaintResult:
        """Fill the holes of checked images, H and W multiples of 8 from 2^depth (256) on.

        Args:
            image: [B, 3, H, W] RGB in [0, 1], 0 in the hole.
            hole: bool [B, 1, H, W]; some position of an eighth of the size must stay unmasked.
            boxes: must be None: the instance norms see the whole image.

        Returns:
            ``output``, ``completed`` and ``coarse``, in [0, 1].

        Raises:
            ValueError, TypeError: an argument has the wrong shape, dtype or value; the message names it.
        """
        stages = self.stages(image, hole)
        output = _to_unit(stages.output).clamp(0, 1)
        return InpaintResult(output, complete(image, output, hole), coarse=_to_unit(stages.coarse))

    def stages(self, image: Tensor, hole: Tensor, *, return_features: bool = False) -> CSAStages:
        """What both networks paint, in their own range, for training.

        Args:
            image: [B, 3, H, W] RGB in [0, 1]; what it holds in the hole must be finite, and is not looked at.
            hole: bool [B or 1, 1, H, W].
            return_features: whether to return what the consistency loss compares.
        """
        check_least_size(image, self.least_size)
        coarse = self.coarse_generator(coarse_input(image, hole))
        flags = masked_positions(hole)
        x = refinement_input(image, hole, coarse)
        refined = self.refinement_generator(x, flags, return_features=return_features)
        return CSAStages(coarse, *refined) if return_features else CSAStages(coarse, refined, None, None)


def coarse_input(image: Tensor, hole: Tensor) -> Tensor:
    """What the first network sees: [B, 3, H, W] in [-1, 1], grey in the hole; arguments as of :meth:`CSA.stages`."""
    fill = (2 / 255 * image.new_tensor(_FILL) - 1).view(1, 3, 1, 1)
    return torch.where(hole, fill, 2 * image - 1)


def refinement_input(image: Tensor, hole: Tensor, coarse: Tensor) -> Tensor:
    """What the second one sees: [B, 6, H, W] in [-1, 1], the hole as the first one painted it, and the hole 0."""
    image = 2 * image - 1
    return torch.cat([torch.where(hole, coarse, image), image.masked_fill(hole, 0)], 1)


def masked_positions(hole: Tensor) -> Tensor:
    """The CSA layer's masked positions, bool [B, H / 8, W / 8] on the CPU.

    Raises:
        ValueError: an image has no known position.
    """
    flags = kernels.CSA().set_mask(hole)
    traced = torch.compiler.is_compiling() or isinstance(flags, FakeTensor)
    if not traced and flags.flatten(1).all(1).any():
        raise ValueError("mask: expected known pixels in every image, of which the CSA layer makes the hole")
    return flags


def _to_unit(image: Tensor) -> Tensor:
    return (image + 1) / 2
