"""Every model, slim, with weights that depend on nothing but their names, and how it is called; images with holes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, TypeVar
from unittest import mock

import torch
from inpaint_kernels.models import glcic, partial_conv_unet
from inpaint_kernels.models._deepfill import Dialect as DeepFillDialect
from inpaint_kernels.models._interface import InpaintingModel
from inpaint_kernels.models.csa import CSA
from inpaint_kernels.models.deepfill_v1 import DeepFillV1
from inpaint_kernels.models.deepfill_v2 import DeepFillV2
from inpaint_kernels.models.edge_connect import EdgeConnect
from inpaint_kernels.models.glcic import GLCIC
from inpaint_kernels.models.guided_face import GuidedFace
from inpaint_kernels.models.partial_conv_unet import PartialConvUNet
from torch import Tensor, nn

from tests.model_contract import Case
from tests.model_pairs import CSA_CHANNELS, CSA_DEPTH, edges

M = TypeVar("M", bound=nn.Module)

CONSTANTS = ("fuse", "mask_conv", "weight_mask_updater")
"""In the names of tensors that published networks never train: the diagonal of the fuse, the ones of mask sums."""


def seeded(model: M, gain: float = 1.5) -> M:
    """The network in evaluation mode, every tensor of its state but constants drawn by its name.

    With a gain (of variance) of 1.5 deviations stay near 1 through plain layers, with 5 through gates.
    """
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or any(constant in name for constant in CONSTANTS):
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if tensor.dim() > 1:
                taps = tensor.numel() / tensor.shape[0]
                values *= math.sqrt(gain / taps)
            elif name.endswith("running_var") or _is_scale(name):
                values = 1 + 0.1 * values.abs()
            else:
                values *= 0.1
            tensor.copy_(values)
    return model.eval()


def _is_scale(name: str) -> bool:
    """Whether it is the weight of a batch norm, ``bn7.weight`` or ``enc_2.bn.weight``."""
    *_, module, entry = name.split(".")
    return entry == "weight" and module.startswith("bn")


def photo(height: int, width: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, 3, H, W] in [0, 1]: waves of other colours and directions in every sample."""
    rows, columns = torch.arange(height, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)
    samples = []
    for sample in range(batch):
        phase = 1.7 * sample
        waves = [
            torch.sin(rows * (0.05 + 0.011 * c + 0.007 * sample) + columns * (0.04 - 0.009 * c) + phase + c)
            + 0.4 * torch.sin(rows * 0.31 - columns * (0.27 + 0.05 * c) + phase)
            for c in range(3)
        ]
        samples.append(torch.stack(waves) / 2.9 + 0.5)
    return torch.stack(samples).to(dtype)


def holes(height: int, width: int, *boxes: tuple[int, int, int, int]) -> Tensor:
    """bool [1, 1, H, W], True in boxes (top, left, bottom, right)."""
    mask = torch.zeros(1, 1, height, width, dtype=torch.bool)
    for top, left, bottom, right in boxes:
        mask[..., top:bottom, left:right] = True
    return mask


def probes(image: Tensor, count: int = 8) -> list[float]:
    """Values of the first sample of an image at fixed places spread over it."""
    flat = image[0].flatten().double()
    return [float(flat[(2 * i + 1) * flat.numel() // (2 * count)]) for i in range(count)]


def golden_case(model: InpaintingModel) -> tuple[Tensor, Tensor]:
    """A float64 photo with two holes, of a size that the network takes."""
    size = (128, 128) if model.size_multiple == 128 else (80, 104)
    return photo(*size, dtype=torch.float64), holes(*size, (16, 24, 44, 60), (50, 70, 60, 100))


def run_golden(model: InpaintingModel) -> dict[str, list[float]]:
    """What the committed values are compared with: probes of a float64 run."""
    model = model.double()
    with torch.no_grad():
        result = model(*golden_case(model))
    values = {"output": probes(result.output)}
    if result.coarse is not None:
        values["coarse"] = probes(result.coarse)
    return values


# Slim models ----------------------------------------------------------------------------------------------------------


def narrow(border: str = "zeros", attention: str = "daa233", squash: str = "clip", **others: Any) -> DeepFillDialect:
    """DeepFill with few channels."""
    return DeepFillDialect(border=border, attention=attention, width=4, squash=squash, **others)


def narrow_glcic(dialect: str) -> GLCIC:
    """GLCIC with an eighth of the channels."""
    model = GLCIC(dialect)
    channels = 4
    for row in glcic.TABLE:
        width = 3 if row.channels == 3 else row.channels // 8
        layer = model.get_submodule(row.name)
        bias = layer.bias is not None
        kind = nn.ConvTranspose2d if row.stride == 0.5 else nn.Conv2d
        settings = {} if row.stride == 0.5 else {"dilation": row.dilation}
        setattr(model, row.name, kind(channels, width, row.kernel, layer.stride, layer.padding, bias=bias, **settings))
        if width != 3:
            setattr(model, glcic.norm_name(row.name), nn.BatchNorm2d(width))
        channels = width
    return model


def narrow_unet(dialect: str = "naoto") -> PartialConvUNet:
    """The U-Net with an eighth of the channels."""
    rows = [row._replace(channels=row.channels // 8) for row in partial_conv_unet.TABLE]
    with mock.patch.object(partial_conv_unet, "TABLE", rows):
        return PartialConvUNet(dialect)


def _deepfill_v1(border: str, attention: str, **others: Any) -> Case:
    model = DeepFillV1(narrow(border, attention, **others))
    return Case(seeded(model), (80, 88), has_least_size=border == "reflect")


def _deepfill_v2(guided: bool = False, **others: Any) -> Case:
    model = seeded(DeepFillV2(narrow(attention="nipponjo", squash="tanh", **others), guided), 5.0)
    guidance = {"sketch": edges((64, 72), 2).float()} if guided else {}
    return Case(model, (64, 72), guidance, has_least_size=False, bounded=model.dialect.signed)


def _glcic(dialect: str) -> Case:
    return Case(seeded(narrow_glcic(dialect)), (48, 64), has_least_size=False)


def _partial_conv_unet(dialect: str) -> Case:
    return Case(seeded(narrow_unet(dialect)), (128, 256), bounded=False, has_least_size=False, tolerance=5e-5)


def _edge_connect() -> Case:
    torch.manual_seed(0)
    size = (24, 32)
    return Case(EdgeConnect(residual_blocks=1).eval(), size, {"canny_edges": edges(size, 2).float()})


def _guided_face(gh_input: str) -> Case:
    torch.manual_seed(0)
    return Case(GuidedFace(gh_input, residual_blocks=1).eval(), (32, 48), short_error=0.03)


def _csa(variant: str) -> Case:
    torch.manual_seed(0)
    model = CSA(CSA_CHANNELS, CSA_DEPTH, variant=variant).eval()
    for network in (model.coarse_generator, model.refinement_generator):
        for parameter in network.parameters():
            if parameter.dim() > 1:  # the published 0.02 suits 8 times the channels
                nn.init.kaiming_normal_(parameter)
    # Norms of 2 x 2 maps magnify rounding, and a known vector that is second best in a short dtype is another one.
    return Case(model, (64, 72), needs_known=True, tolerance=5e-4, short_error=0.15)


CASES: dict[str, Callable[[], Case]] = {
    "deepfill_v1": lambda: _deepfill_v1("zeros", "daa233"),
    "deepfill_v2": _deepfill_v2,
    "deepfill_v2_guided": lambda: _deepfill_v2(guided=True),
    "glcic": lambda: _glcic("iizuka"),
    "edge_connect": _edge_connect,
    "csa": lambda: _csa("official"),
    "guided_face": lambda: _guided_face("masked"),
    "partial_conv_unet": lambda: _partial_conv_unet("naoto"),
}
"""Every model once."""

DIALECTS: dict[str, Callable[[], Case]] = {
    "deepfill_v1-official": lambda: _deepfill_v1("same_tf", "official"),
    "deepfill_v1-mmagic": lambda: _deepfill_v1("reflect", "mmagic", matched_activation="elu"),
    "deepfill_v2-csqiangwen": lambda: _deepfill_v2(ones=False, gated_last=True, signed=False),
    "glcic-otenim": lambda: _glcic("otenim"),
    "glcic-mmagic": lambda: _glcic("mmagic"),
    "csa-paper": lambda: _csa("paper"),
    "guided_face-literal": lambda: _guided_face("literal"),
    "partial_conv_unet-mmagic": lambda: _partial_conv_unet("mmagic"),
}
"""Dialects that other lines of code compute."""
