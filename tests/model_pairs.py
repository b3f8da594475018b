"""Networks of ours beside the published ones whose weights they load: what is compared, and with which inputs.

Another system's networks are added as :class:`Pair` to :data:`PAIRS`; tests/test_models_peers.py compares all of them
where there are checkouts, tests/golden_models.py keeps a few numbers of the published ones for where there are none.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from inpaint_kernels.models.csa import CoarseGenerator, FeaturePatchDiscriminator, PatchDiscriminator
from inpaint_kernels.models.csa import RefinementGenerator as CSARefinementGenerator
from inpaint_kernels.models.edge_connect import Discriminator, EdgeGenerator, InpaintGenerator
from torch import Tensor, nn

from benches.peer_models import csa_coarse, csa_refinement
from benches.peers import CSA_REPOSITORY, as_written_for, csa_as_written_for, import_file, import_module
from inpaint_kernels import nn as kernels

Size = tuple[int, int]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Pair:
    """One network of ours and the published one.

    Attributes:
        name: short name.
        repository: ``owner/name`` on GitHub.
        ours: () -> our network.
        published: (checkout, size) -> the published one.
        inputs: (size, batch) -> arguments of ours, float64.
        sizes: heights and widths of images to compare at.
        golden_size: that of the committed values.
        batch: of the comparison.
        published_inputs: arguments of ours -> those of the published network.
        transfer: state dict of the published network -> ours.
        running: inside this context the published network runs, see :class:`benches.peer_models.PeerModel`.
        slow: takes more than about 15 seconds.
    """

    name: str
    repository: str
    ours: Callable[[], nn.Module]
    published: Callable[[Path, Size], nn.Module]
    inputs: Callable[[Size, int], tuple[Any, ...]]
    sizes: tuple[Size, ...]
    golden_size: Size | None = None
    batch: int = 2
    published_inputs: Callable[[tuple[Any, ...]], tuple[Any, ...]] = lambda inputs: inputs
    transfer: Callable[[State], State] = lambda state: state
    running: Callable[[Tensor], AbstractContextManager[None]] = as_written_for
    slow: bool = False


# Weights and inputs without a random generator ------------------------------------------------------------------------


def hashed(name: str, *shape: int) -> Tensor:
    """Numbers in [-1, 1), float64, the same on every machine: integers mixed from the name and the position."""
    count = int(torch.Size(shape).numel())
    bits = torch.arange(count, dtype=torch.int64) + zlib.crc32(name.encode())
    for multiplier in (2654435761, 2246822519, 3266489917):
        bits = (bits * multiplier) & 0xFFFFFFFF
        bits = bits ^ (bits >> 15)
    return (bits.double() / 2**31 - 1).view(shape)


def hashed_state(state: State) -> State:
    """Values by the names of a state dict, such that features keep their scale; norms are near the identity."""
    return {name: _hashed_entry(name, state).to(value.dtype) for name, value in state.items()}


def _hashed_entry(name: str, state: State) -> Tensor:
    value, noise = state[name], hashed(name, *state[name].shape)
    if not value.is_floating_point():
        return value
    if name.endswith("weight_u"):
        return noise / noise.norm()
    if name.endswith("weight_v"):  # with u the singular vectors of one power iteration, so that the norm is large
        weight, u = (_hashed_entry(name.removesuffix("v") + other, state) for other in ("orig", "u"))
        matrix = weight if weight.shape[0] == u.numel() else weight.transpose(0, 1)
        v = matrix.flatten(1).t() @ u
        return v / v.norm()
    if value.dim() > 1:
        return noise * (3 / value[0].numel()) ** 0.5
    return (1 if name.endswith(("weight", "running_var")) else 0) + 0.2 * noise


def hashed_image(size: Size, batch: int, channels: int = 3) -> Tensor:
    """Images [batch, channels, height, width] in [0, 1], float64: waves with some noise."""
    height, width = size
    y, x = torch.arange(height).double()[:, None] / height, torch.arange(width).double() / width
    phases = torch.arange(batch * channels).double().view(batch, channels, 1, 1)
    waves = torch.sin(9 * x + 5 * y + phases) * torch.cos(7 * y - 4 * x * y + 2 * phases)
    return 0.5 + 0.35 * waves + 0.1 * hashed("image", batch, channels, height, width)


def holes(size: Size, batch: int) -> Tensor:
    """Masks [batch, 1, height, width], float64, 1 in a rectangle that differs from image to image."""
    height, width = size
    mask = torch.zeros(batch, 1, height, width, dtype=torch.float64)
    for i, one in enumerate(mask):
        one[:, height // 4 + 2 * i : 3 * height // 4, width // 4 : 3 * width // 4 - 3 * i] = 1
    return mask


def edges(size: Size, batch: int) -> Tensor:
    """Edge maps [batch, 1, height, width], 0 or 1."""
    return (hashed("edges", batch, 1, *size) > 0.8).double()


# EdgeConnect ----------------------------------------------------------------------------------------------------------

EDGE_CONNECT = "knazeri/edge-connect"


def _knazeri(build: Callable[[Any], nn.Module]) -> Callable[[Path, Size], nn.Module]:
    return lambda checkout, size: build(import_file(checkout, "src/networks.py"))


def _edge_inputs(size: Size, batch: int) -> tuple[Tensor]:
    gray, mask = hashed_image(size, batch, 1), holes(size, batch)
    return (torch.cat([gray * (1 - mask) + mask, edges(size, batch) * (1 - mask), mask], 1),)


def _inpaint_inputs(size: Size, batch: int) -> tuple[Tensor]:
    image, mask = hashed_image(size, batch), holes(size, batch)
    return (torch.cat([image * (1 - mask) + mask, edges(size, batch)], 1),)


# CSA ------------------------------------------------------------------------------------------------------------------

# The published depth and width take sides of 256; at these sizes the networks are shallower and slimmer.
CSA_CHANNELS, CSA_DEPTH = 8, 6


def csa_networks(checkout: Path) -> Any:
    """The published module ``networks``."""
    return import_module(checkout, "models.networks")


def csa_mask(size: Size) -> Tensor:
    """The published networks' mask: one for all images."""
    return holes(size, 1)


def published_coarse(checkout: Path, channels: int = CSA_CHANNELS, depth: int = CSA_DEPTH) -> nn.Module:
    """netP."""
    return csa_coarse(checkout, channels, depth)


def published_refinement(checkout: Path, size: Size, channels: int = CSA_CHANNELS, depth: int = CSA_DEPTH) -> nn.Module:
    """netG."""
    return csa_refinement(checkout, csa_mask(size), channels, depth)


def _unet_inputs(size: Size, batch: int) -> tuple[Tensor]:
    return (2 * hashed_image(size, batch) - 1,)


def _csa_inputs(size: Size, batch: int) -> tuple[Tensor, Tensor]:
    mask = csa_mask(size)
    images = 2 * hashed_image(size, 2 * batch) - 1
    known = images[:batch] * (1 - mask)
    return torch.cat([known + images[batch:] * mask, known], 1), kernels.CSA().set_mask(mask)


def _netf_inputs(size: Size, batch: int) -> tuple[Tensor]:
    return (hashed_image((size[0] // 8, size[1] // 8), batch, 256),)


PAIRS = (
    Pair(
        "edge_generator",
        EDGE_CONNECT,
        EdgeGenerator,
        _knazeri(lambda networks: networks.EdgeGenerator(use_spectral_norm=True)),
        _edge_inputs,
        sizes=((64, 64), (48, 80)),
    ),
    Pair(
        "edge_generator_plain",
        EDGE_CONNECT,
        lambda: EdgeGenerator(use_spectral_norm=False),
        _knazeri(lambda networks: networks.EdgeGenerator(use_spectral_norm=False)),
        _edge_inputs,
        sizes=((64, 64),),
    ),
    Pair(
        "inpaint_generator",
        EDGE_CONNECT,
        InpaintGenerator,
        _knazeri(lambda networks: networks.InpaintGenerator()),
        _inpaint_inputs,
        sizes=((64, 64), (48, 80)),
    ),
    Pair(
        "edge_generator_short",
        EDGE_CONNECT,
        lambda: EdgeGenerator(residual_blocks=1),
        _knazeri(lambda networks: networks.EdgeGenerator(residual_blocks=1)),
        _edge_inputs,
        sizes=((32, 48),),
        golden_size=(32, 48),
    ),
    Pair(
        "inpaint_generator_short",
        EDGE_CONNECT,
        lambda: InpaintGenerator(residual_blocks=1),
        _knazeri(lambda networks: networks.InpaintGenerator(residual_blocks=1)),
        _inpaint_inputs,
        sizes=((32, 48),),
        golden_size=(32, 48),
    ),
    Pair(
        "edge_discriminator",
        EDGE_CONNECT,
        lambda: Discriminator(2),
        _knazeri(lambda networks: networks.Discriminator(2)),
        lambda size, batch: (torch.cat([hashed_image(size, batch, 1), edges(size, batch)], 1),),
        sizes=((64, 64), (48, 80)),
        golden_size=(32, 48),
    ),
    Pair(
        "image_discriminator_hinge",
        EDGE_CONNECT,
        lambda: Discriminator(3, use_sigmoid=False),
        _knazeri(lambda networks: networks.Discriminator(3, use_sigmoid=False)),
        lambda size, batch: (hashed_image(size, batch),),
        sizes=((64, 64), (48, 80)),
        golden_size=(32, 48),
    ),
    Pair(
        "csa_coarse_slim",
        CSA_REPOSITORY,
        lambda: CoarseGenerator(CSA_CHANNELS, CSA_DEPTH),
        lambda checkout, size: published_coarse(checkout),
        _unet_inputs,
        sizes=((64, 64), (72, 104)),
        golden_size=(72, 104),
        running=csa_as_written_for,
    ),
    Pair(
        "csa_refinement_slim",
        CSA_REPOSITORY,
        lambda: CSARefinementGenerator(CSA_CHANNELS, CSA_DEPTH),
        published_refinement,
        _csa_inputs,
        sizes=((64, 64), (72, 104)),
        golden_size=(72, 104),
        published_inputs=lambda inputs: inputs[:1],
        running=csa_as_written_for,
    ),
    Pair(
        "csa_patch_discriminator",
        CSA_REPOSITORY,
        PatchDiscriminator,
        lambda checkout, size: csa_networks(checkout).NLayerDiscriminator(
            3, 64, 3, csa_networks(checkout).get_norm_layer("instance")
        ),
        _unet_inputs,
        sizes=((64, 64), (48, 80)),
        golden_size=(32, 48),
        running=csa_as_written_for,
    ),
    Pair(
        "csa_feature_discriminator",
        CSA_REPOSITORY,
        FeaturePatchDiscriminator,
        lambda checkout, size: csa_networks(checkout).PFDiscriminator(),
        _netf_inputs,
        sizes=((128, 128), (128, 192)),
        golden_size=(128, 128),
        running=csa_as_written_for,
    ),
    Pair(
        "csa_coarse",
        CSA_REPOSITORY,
        CoarseGenerator,
        lambda checkout, size: published_coarse(checkout, 64, 8),
        _unet_inputs,
        sizes=((256, 264),),
        batch=1,
        running=csa_as_written_for,
        slow=True,
    ),
    Pair(
        "csa_refinement",
        CSA_REPOSITORY,
        CSARefinementGenerator,
        lambda checkout, size: published_refinement(checkout, size, 64, 8),
        _csa_inputs,
        sizes=((256, 256),),
        batch=1,
        published_inputs=lambda inputs: inputs[:1],
        running=csa_as_written_for,
        slow=True,
    ),
)
