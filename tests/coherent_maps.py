"""Feature maps and flags for the tests of coherent_semantic_attention.

Never plain normal numbers: a then has a random sign, a + v comes near 0, and float32 is chaotic in any implementation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("relu", "smooth")
HOLES = ("centre", "one", "scattered", "all_but_four", "corner")


def features(kind: str, *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """[B, C, H, W], as they leave a ReLU, or smoothed with a constant per channel."""
    noise = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if kind == "relu":
        return noise.relu().to(dtype)
    return (F.avg_pool2d(noise, 5, 1, 2) * 5 + 2 * noise[..., :1, :1].abs()).to(dtype)


def hole(kind: str, height: int, width: int, seed: int = 0) -> Tensor:
    """Flags, bool [H, W]."""
    flags = torch.zeros(height, width, dtype=torch.bool)
    if kind == "centre":
        flags[height // 4 : height - height // 4, width // 3 : width - width // 4] = True
    elif kind == "one":
        flags[height // 2, width // 3] = True
    elif kind == "scattered":
        flags = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < 0.4
    elif kind == "all_but_four":
        flags[:] = True
        for y, x in ((0, 1), (height // 2, width // 2), (height // 2, width - 1), (height - 1, 0)):
            flags[y, x] = False
    elif kind == "corner":
        flags[: height // 2, : width // 2] = True
    return flags
