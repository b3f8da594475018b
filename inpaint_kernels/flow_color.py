"""The colour wheel with which inpainting code has always drawn attention maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inpaint_kernels._checks import check_shape

_WHEEL_SEGMENTS = ((15, 0, 1, 1), (6, 1, 0, -1), (4, 1, 2, 1), (11, 2, 1, -1), (13, 2, 0, 1), (6, 0, 2, -1))
"""Steps between two primary hues, the channel that stays full, the channel that changes, and in which direction."""


def _colour_wheel() -> Tensor:
    """The 55 hues of the Middlebury code, [55, 3] in 0..255."""
    wheel = torch.zeros(sum(steps for steps, *_ in _WHEEL_SEGMENTS), 3, dtype=torch.float64)
    start = 0
    for steps, full, changing, direction in _WHEEL_SEGMENTS:
        ramp = torch.floor(255 * torch.arange(steps, dtype=torch.float64) / steps)
        wheel[start : start + steps, full] = 255
        wheel[start : start + steps, changing] = ramp if direction > 0 else 255 - ramp
        start += steps
    return wheel


def flow_to_color(offsets: Tensor) -> Tensor:
    """Draw displacements as colours: the direction as hue, the length as saturation (Middlebury flow code).

    As in the DeepFill ports, the row offset takes the horizontal place of the code, and sample i is scaled by the
    longest displacement of samples 0..i.

    Args:
        offsets: [B, 2, H, W] (row, column) displacements of any dtype, e.g. those of
            ``contextual_attention(..., return_offsets=True)``.

    Returns:
        [B, 3, H, W] uint8 RGB on the same device; no displacement is white.

    Raises:
        ValueError, TypeError: ``offsets`` is not a tensor of that shape.

    References:
        Baker et al., A Database and Evaluation Methodology for Optical Flow, ICCV 2007.
    """
    check_shape("offsets", offsets, "B 2 H W")
    flow = offsets.double()
    lengths = flow.square().sum(1).sqrt().flatten(1)
    longest = lengths.amax(1).cummax(0).values if lengths.numel() else lengths.new_zeros(len(lengths))
    rows, columns = (flow / (longest + torch.finfo(torch.float64).eps)[:, None, None, None]).unbind(1)
    wheel = _colour_wheel().to(flow.device)
    # Counted from 1 and divided before it is mixed, as published: a last bit decides what a colour is rounded down to.
    position = (torch.atan2(-columns, -rows) / math.pi + 1) / 2 * (len(wheel) - 1) + 1
    before = position.floor().long()
    fraction = (position - before)[..., None]
    hue = (1 - fraction) * (wheel[before - 1] / 255) + fraction * (wheel[before % len(wheel)] / 255)
    saturation = (rows.square() + columns.square()).sqrt()[..., None]
    colour = torch.where(saturation <= 1, 1 - saturation * (1 - hue), 0.75 * hue)
    return (255 * colour).floor().to(torch.uint8).movedim(-1, 1)
