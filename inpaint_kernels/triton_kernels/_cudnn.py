"""The bare convolution of cuDNN, whose output one fused kernel then finishes."""

from __future__ import annotations

import torch
from torch import Tensor

from inpaint_kernels.portable._convolution import Geometry, convolve
from inpaint_kernels.triton_kernels._launch import Layout


def bare_convolution(x: Tensor, weight: Tensor, geometry: Geometry, layout: Layout) -> Tensor:
    """The convolution without bias, dense in ``layout``."""
    if geometry.dilation != (1, 1) and _must_be_deterministic():
        # In NCHW torch leaves cuDNN for a deterministic dilated convolution that is ten times slower (pytorch#28777).
        x = Layout.CHANNELS_LAST.of(x)
    return layout.of(convolve(x, weight, None, geometry))


def _must_be_deterministic() -> bool:
    return torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
