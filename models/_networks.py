"""What the networks of several papers share: initial weights, the layout of maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def init_normal(layer: nn.Module) -> None:
    """For ``apply``: weights of convolutions from N(0, 0.02), those under a spectral norm too; biases 0."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(getattr(layer, "weight_orig", layer.weight), 0.0, 0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def fastest_layout(x: Tensor) -> Tensor:
    """Brings x to channels_last where autograd records nothing and a CPU computes.

    Convolutions take less time in that layout, transposed ones above all, and so does
    :func:`inpaint_kernels.models._norms.instance_norm`; torch's own, in training, does not.
    """
    if x.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return x.contiguous(memory_format=torch.channels_last)
    return x
