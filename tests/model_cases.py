"""Networks with weights that depend on nothing but their names, and images with holes, for the tests of the models."""

from __future__ import annotations

import math
import zlib
from typing import TypeVar

import torch
from inpaint_kernels.models._interface import InpaintingModel
from torch import Tensor, nn

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
