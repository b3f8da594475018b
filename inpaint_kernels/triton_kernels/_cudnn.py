"""The bare convolution of cuDNN, whose output one fused kernel then finishes."""

from __future__ import annotations

from torch import Tensor

from inpaint_kernels.portable._convolution import Geometry, convolve
from inpaint_kernels.triton_kernels._launch import Layout


def bare_convolution(x: Tensor, weight: Tensor, geometry: Geometry, layout: Layout) -> Tensor:
    """The convolution without bias, dense in ``layout``."""
    return layout.of(convolve(x, weight, None, geometry))
