"""``torch.nn.Module`` faces of the ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inpaint_kernels.ops.contextual_attention import (
    Box,
    ContextualAttentionResult,
    contextual_attention,
    resolve_preset,
)


class ContextualAttention(torch.nn.Module):
    """:func:`inpaint_kernels.contextual_attention` with its preset fixed; it has no parameters.

    Args:
        preset: name of a published implementation.
        return_offsets: whether :meth:`forward` also returns the offsets and maxima.
        backend: as in the function.
        **overrides: fields of the preset to change.

    Example:
        >>> attention = ContextualAttention("nipponjo")
        >>> f = torch.rand(1, 8, 32, 32)
        >>> mask = torch.zeros(1, 1, 128, 128)  # of the image, 4 x the features; or 32 x 32
        >>> attention(f, f, mask).shape
        torch.Size([1, 8, 32, 32])
    """

    def __init__(
        self, preset: str = "nipponjo", *, return_offsets: bool = False, backend: str | None = None, **overrides: Any
    ) -> None:
        super().__init__()
        self.semantics = resolve_preset(preset, overrides)
        self.preset, self.overrides = preset, overrides
        self.return_offsets = return_offsets
        self.backend = backend

    def forward(
        self,
        f: Tensor,
        b: Tensor,
        mask: Tensor | None = None,
        *,
        value: Tensor | None = None,
        queries: Box | Tensor | None = None,
    ) -> Tensor | ContextualAttentionResult:
        """Shapes and result as in the function; the mask at feature resolution or a whole multiple of it."""
        return contextual_attention(
            f,
            b,
            mask,
            value=value,
            preset=self.semantics,
            queries=queries,
            return_offsets=self.return_offsets,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The preset and what was changed in it, for ``repr``."""
        options = "".join(f", {name}={value!r}" for name, value in self.overrides.items())
        return f"{self.preset!r}{options}"
