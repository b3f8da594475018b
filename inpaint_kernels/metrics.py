"""How near a picture is to the truth: PSNR, SSIM and L1, overall and in the hole; through scikit-image."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

_LEAST_SIDE = 7  # of scikit-image's window


class Metrics(NamedTuple):
    """Of one region.

    Attributes:
        psnr: in dB, from the mean square over pixels and channels; infinite for equal pictures.
        ssim: scikit-image's, with its defaults (Wang et al., 2004, in windows of 7 x 7); of a hole the mean of its map
            there; NaN for pictures that are smaller than a window.
        l1: mean absolute difference as a share of full scale.
    """

    psnr: float
    ssim: float
    l1: float


def compare(picture: NDArray[Any], truth: NDArray[Any], mask: NDArray[np.bool_] | None = None) -> dict[str, Metrics]:
    """Compare a picture with the truth.

    Args:
        picture: ``[H, W]`` or ``[H, W, C]``, uint8, uint16 or floating in [0, 1]; an alpha channel is compared as well.
        truth: of the same shape and dtype.
        mask: bool ``[H, W]``, True in the hole; None: no hole.

    Returns:
        :class:`Metrics` by region: "overall", and "hole" where there is one.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    if picture.shape != truth.shape:
        raise ValueError(f"picture: expected the truth's shape {list(truth.shape)}, got {list(picture.shape)}")
    if picture.dtype != truth.dtype:
        raise TypeError(f"picture: expected the truth's dtype {truth.dtype}, got {picture.dtype}")
    if mask is not None and mask.shape != truth.shape[:2]:
        raise ValueError(f"mask: expected the truth's size {list(truth.shape[:2])}, got {list(mask.shape)}")
    scale = 1.0 if truth.dtype.kind == "f" else float(np.iinfo(truth.dtype).max)
    a, b = (x.reshape(*x.shape[:2], -1).astype(np.float64) / scale for x in (picture, truth))
    similarity, similarities = _similarity(a, b)
    found = {"overall": _metrics(a, b, similarity)}
    if mask is not None and mask.any():
        found["hole"] = _metrics(a[mask], b[mask], float(similarities[mask].mean()))
    return found


def _similarity(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """The SSIM, and its map."""
    if min(a.shape[:2]) < _LEAST_SIDE:
        return float("nan"), np.full(a.shape, np.nan)
    similarity, similarities = structural_similarity(a, b, channel_axis=2, data_range=1.0, full=True)
    return float(similarity), np.asarray(similarities)


def _metrics(a: NDArray[np.float64], b: NDArray[np.float64], similarity: float) -> Metrics:
    square = float(((a - b) ** 2).mean())
    psnr = float("inf") if square == 0 else -10 * float(np.log10(square))
    return Metrics(psnr, similarity, float(np.abs(a - b).mean()))


def as_text(metrics: Metrics) -> tuple[str, str, str]:
    """PSNR, SSIM and L1 as they are printed."""
    return f"{metrics.psnr:.2f}", f"{metrics.ssim:.4f}", f"{metrics.l1:.4f}"
