"""VGG's features of images, and the losses that compare them: perceptual, and of style."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaint_kernels import checkpoint_files
from inpaint_kernels._checks import check_choice, check_floating, check_shape
from inpaint_kernels.checkpoint_files import CheckpointError

_WIDTHS = (64, 128, 256, 512, 512)
_CONVOLUTIONS: Final[Mapping[str, tuple[int, ...]]] = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
"""Convolutions between two poolings; all of 3 x 3 to the widths above, with a ReLU behind each."""

_FILES: Final[Mapping[str, tuple[str, str]]] = {
    "vgg16": ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    "vgg19": ("https://download.pytorch.org/models/vgg19-dcbb9e9d.pth", "dcbb9e9d"),
}
"""Where torchvision keeps its weights, and how the SHA-256 of each file begins."""

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's R, G and B

EDGE_CONNECT_CONTENT = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
"""Layers of VGG-19; images in [0, 1], not normalised."""
EDGE_CONNECT_STYLE = ("relu2_2", "relu3_4", "relu4_4", "relu5_2")
"""Layers of VGG-19 of images that are 0 outside of the hole; in [0, 1], not normalised."""
PARTIAL_CONV = ("pool1", "pool2", "pool3")
"""Layers of VGG-16, for both losses; images normalised with ImageNet's mean and deviation."""
CSA_ADVERSARIAL = "pool3"
"""Layer of VGG-16 that CSA's feature discriminator sees (called relu3_3 there); images in [-1, 1], not normalised."""
CSA_CONSISTENCY = "relu4_3"
"""Layer of VGG-16 that CSA's consistency loss compares with; images in [-1, 1], not normalised."""
GUIDED_FACE = ("relu1_1", "relu2_1", "relu3_1", "relu4_1")
"""Layers of VGG-16, for both losses; no code is published, our choice is [0, 1], not normalised, as EdgeConnect's."""


class VGGFeatures(nn.Module):
    """The convolutions of VGG-16 or VGG-19 up to the deepest layer asked for; their weights are not trained.

    Keys are torchvision's: ``features.0.weight``, ...

    Args:
        architecture: "vgg16" or "vgg19".
        layers: which to return: "conv1_1" (before its ReLU), "relu1_1", ..., "pool5".
        weights: torchvision's file of that architecture, see :func:`download_vgg`; a checkpoint of torch or
            safetensors, read without running anything in it. None: random weights.
        normalise: whether images are in [0, 1] and are normalised here with ImageNet's mean and deviation; else they
            are taken as they are. The constants of this module say what each public trainer does.

    Raises:
        CheckpointError: the file cannot be read, or is not of that architecture.
        ValueError: no such architecture or layer.

    References:
        Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015.

    Example:
        >>> vgg = VGGFeatures("vgg16", ("pool1", "relu2_2"))
        >>> [tuple(x.shape) for x in vgg(torch.rand(1, 3, 32, 48)).values()]
        [(1, 64, 16, 24), (1, 128, 16, 24)]
    """

    def __init__(
        self,
        architecture: str,
        layers: Sequence[str],
        *,
        weights: str | os.PathLike[str] | None = None,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        check_choice("architecture", architecture, _CONVOLUTIONS)
        names = _layer_names(architecture)
        if isinstance(layers, str) or not layers:
            raise ValueError(f"layers: expected a sequence of names, got {layers!r}")
        for layer in layers:
            check_choice("layers", layer, names)
        self.architecture, self.normalise = architecture, normalise
        self.layers = tuple(sorted(set(layers), key=names.index))
        self._names = names[: names.index(self.layers[-1]) + 1]
        self.features = _build(self._names)
        if weights is not None:
            self.load_state_dict(_read(Path(weights), architecture, self.state_dict()))
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Features by layer, from the first to the deepest: [B, C, H / s, W / s], s = 2^(poolings before).

        Args:
            image: [B, 3, H, W] RGB, H and W large enough for the poolings.
        """
        check_shape("image", image, "B 3 H W")
        check_floating("image", image)
        poolings = sum(name.startswith("pool") for name in self._names)
        if min(image.shape[2:]) < 2**poolings:
            raise ValueError(f"image: expected a height and width of at least {2**poolings}, got {list(image.shape)}")
        x = image
        if self.normalise:
            mean, deviation = (image.new_tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _DEVIATION))
            x = (image - mean) / deviation
        found = {}
        for name, layer in zip(self._names, self.features, strict=True):
            x = layer(x)
            if name in self.layers:
                found[name] = x
        return found

    def extra_repr(self) -> str:
        """What it returns, for ``repr``."""
        return f"{self.architecture}, layers={self.layers}, normalise={self.normalise}"


def download_vgg(architecture: str) -> Path:
    """The file of torchvision's ImageNet weights, downloaded once into torch.hub's folder; its hash is checked.

    Args:
        architecture: "vgg16" (528 MiB) or "vgg19" (548 MiB).

    Raises:
        RuntimeError, OSError: it cannot be downloaded, or is not the file it should be.
    """
    check_choice("architecture", architecture, _FILES)
    url, digest = _FILES[architecture]
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest)
    return path


def perceptual_loss(
    features: Mapping[str, Tensor], target: Mapping[str, Tensor], layers: Sequence[str] | None = None
) -> Tensor:
    """Sum over layers of the mean absolute difference of the features of two images.

    Args:
        features: of :class:`VGGFeatures`.
        target: the same, of the true image.
        layers: which to compare; None: all of ``features``.

    References:
        Johnson et al., Perceptual Losses for Real-Time Style Transfer and Super-Resolution, ECCV 2016, with absolute
        differences. knazeri/edge-connect, ``PerceptualLoss``; naoto0804/pytorch-inpainting-with-partial-conv,
        ``InpaintingLoss``, loss "prc", which is this of the output plus this of the completed image.
    """
    return torch.stack([F.l1_loss(x, y) for x, y in _pairs(features, target, layers)]).sum()


def style_loss(
    features: Mapping[str, Tensor], target: Mapping[str, Tensor], layers: Sequence[str] | None = None
) -> Tensor:
    """Sum over layers of the mean absolute difference of the Gram matrices; arguments as of :func:`perceptual_loss`.

    References:
        Gatys et al., Image Style Transfer Using Convolutional Neural Networks, CVPR 2016, with absolute differences.
        knazeri/edge-connect, ``StyleLoss``; naoto0804's ``InpaintingLoss``, loss "style".
    """
    return torch.stack([F.l1_loss(gram_matrix(x), gram_matrix(y)) for x, y in _pairs(features, target, layers)]).sum()


def gram_matrix(features: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, C]: products of channels, summed over the pixels, divided by C H W.

    Each factor takes half of the divisor, in the exponent, so that the products stay within half precision.

    References:
        knazeri/edge-connect, ``StyleLoss.compute_gram``.
    """
    check_shape("features", features, "B C H W")
    check_floating("features", features)
    rows = features.flatten(2) / math.sqrt(features[0].numel())
    return rows @ rows.transpose(1, 2)


def _pairs(
    features: Mapping[str, Tensor], target: Mapping[str, Tensor], layers: Sequence[str] | None
) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for layer in features if layers is None else layers:
        for name, maps in (("features", features), ("target", target)):
            if layer not in maps:
                raise ValueError(f"{name}: expected the layer {layer!r}, got {', '.join(map(repr, maps)) or 'none'}")
        if features[layer].shape != target[layer].shape:
            expected, got = list(features[layer].shape), list(target[layer].shape)
            raise ValueError(f"target: expected {layer} of the shape of features, {expected}, got {got}")
        pairs.append((features[layer], target[layer]))
    if not pairs:
        raise ValueError("layers: expected at least one, got none")
    return pairs


# Layers and weights ---------------------------------------------------------------------------------------------------


def _layer_names(architecture: str) -> list[str]:
    """Names by torchvision's numbers: conv1_1, relu1_1, conv1_2, relu1_2, pool1, ..."""
    names = []
    for block, convolutions in enumerate(_CONVOLUTIONS[architecture], start=1):
        for number in range(1, convolutions + 1):
            names += [f"conv{block}_{number}", f"relu{block}_{number}"]
        names.append(f"pool{block}")
    return names


def _build(names: Sequence[str]) -> nn.Sequential:
    layers = nn.Sequential()
    channels = 3
    for name in names:
        if name.startswith("pool"):
            layers.append(nn.MaxPool2d(2))
        elif name.startswith("relu"):
            layers.append(nn.ReLU())
        else:
            width = _WIDTHS[int(name[4]) - 1]
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            channels = width
    return layers


def _read(path: Path, architecture: str, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are wanted, of a file that holds all convolutions of that architecture and no others."""
    value = checkpoint_files.read(path).value
    found = {str(name) for name in value} if isinstance(value, Mapping) else set()
    found = {name for name in found if name.startswith("features.")}
    numbers = [n for n, name in enumerate(_layer_names(architecture)) if name.startswith("conv")]
    expected = {f"features.{number}.{kind}" for number in numbers for kind in ("weight", "bias")}
    if found != expected:
        differing = min(found ^ expected, key=lambda name: (len(name), name))
        problem = "lacks" if differing in expected else "has"
        raise CheckpointError(
            f"{path}: expected torchvision's weights of {architecture}, got a file that {problem} {differing}"
        )
    for name, tensor in wanted.items():
        got = value[name]
        if not isinstance(got, Tensor) or got.shape != tensor.shape:
            shape = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise CheckpointError(f"{path}: {name}: expected the shape {list(tensor.shape)}, got {shape}")
    return {name: value[name] for name in wanted}
