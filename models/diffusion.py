"""Diffusion into a hole: the smoothest surface through the pixels around it.

Thin holes get the surface of least bending (biharmonic: the mean square Laplacian is minimal), which continues slopes;
wide ones, into which it would overshoot, the surface of least slope (harmonic).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from inpaint_kernels.models.blending import blend
from torch import Tensor

THIN_RADIUS = 4
"""Largest radius in pixels of a disc that fits into a thin hole."""

_TOLERANCE = 1e-4
_MAX_ITERATIONS = 400


def diffuse(image: Tensor, hole: Tensor) -> Tensor:
    """[C, H, W] in [0, 1] with its hole filled.

    Args:
        image: [C, H, W] float32 in [0, 1], finite; what it holds in the hole is not looked at.
        hole: [H, W] bool, with at least one pixel outside.
    """
    if is_thin(hole):
        return _least_bending(image, hole).clamp(0, 1)
    return blend(hole, image, image.new_zeros(image[:, :, 1:].shape), image.new_zeros(image[:, 1:].shape))


def is_thin(hole: Tensor) -> bool:
    """Whether no disc of more than THIN_RADIUS pixels, centre excluded, fits into the hole; the border ends it."""
    reach = THIN_RADIUS + 1
    framed = F.pad(hole, (reach,) * 4)
    height, width = hole.shape
    inside = hole.clone()
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            if dy * dy + dx * dx <= reach * reach:
                inside &= framed[reach + dy : reach + dy + height, reach + dx : reach + dx + width]
    return not bool(inside.any())


def _least_bending(image: Tensor, hole: Tensor) -> Tensor:
    """Minimises the sum of squared Laplacians by conjugate gradients, on lists of the pixels that matter.

    The Laplacian of a pixel is the sum of its differences to the neighbours inside the image.
    """
    # Lists of flat positions: the hole's pixels, and all pixels whose Laplacian they enter.
    unknown = hole.flatten().nonzero()[:, 0]
    bent = _with_neighbours(hole).flatten().nonzero()[:, 0]
    of_bent, bent_degree = _neighbours(bent, hole)
    of_unknown, unknown_degree = _neighbours(unknown, hole)
    place_of_unknown = _places(unknown, hole)
    place_of_bent = _places(bent, hole)
    unknown_at_bent, unknown_beside_bent = place_of_unknown[bent], place_of_unknown[of_bent]
    bent_at_unknown, bent_beside_unknown = place_of_bent[unknown], place_of_bent[of_unknown]

    def laplacian(u: Tensor) -> Tensor:
        """[N + 1, C] at the hole's pixels (0 elsewhere, the last row) -> [M + 1, C] at the bent ones."""
        return F.pad(bent_degree * u[unknown_at_bent] - u[unknown_beside_bent].sum(0), (0, 0, 0, 1))

    def transposed(v: Tensor) -> Tensor:
        """[M + 1, C] at the bent pixels -> [N + 1, C] at the hole's."""
        return F.pad(unknown_degree * v[bent_at_unknown] - v[bent_beside_unknown].sum(0), (0, 0, 0, 1))

    colours = F.pad(torch.where(hole, 0.0, image).flatten(1).t(), (0, 0, 0, 1))
    known_part = F.pad(bent_degree * colours[bent] - colours[of_bent].sum(0), (0, 0, 0, 1))
    residual = -transposed(known_part)
    u, direction = torch.zeros_like(residual), residual
    product = _dot(residual, residual)
    enough = _TOLERANCE**2 * product
    for _ in range(_MAX_ITERATIONS):
        if (product <= enough).all():
            break
        bending = transposed(laplacian(direction))
        step = product / _dot(direction, bending).clamp_min(1e-30)
        u = u + step * direction
        residual = residual - step * bending
        last, product = product, _dot(residual, residual)
        direction = residual + product / last.clamp_min(1e-30) * direction
    filled = image.flatten(1).clone()
    filled[:, unknown] = u[:-1].t()
    return filled.view_as(image)


def _with_neighbours(mask: Tensor) -> Tensor:
    """A bool mask and the pixels beside it, above it and below it."""
    framed = F.pad(mask, (1, 1, 1, 1))
    return mask | framed[:-2, 1:-1] | framed[2:, 1:-1] | framed[1:-1, :-2] | framed[1:-1, 2:]


def _neighbours(pixels: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """The flat positions of four neighbours, [4, N] (one past the end: outside the image), and how many there are."""
    height, width = image.shape
    row, column = pixels // width, pixels % width
    beside = []
    for dy, dx in ((-1, 0), (0, -1), (0, 1), (1, 0)):
        y, x = row + dy, column + dx
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        beside.append(torch.where(inside, y * width + x, height * width))
    stacked = torch.stack(beside)
    return stacked, (stacked < height * width).sum(0)[:, None]


def _places(pixels: Tensor, image: Tensor) -> Tensor:
    """For each flat position, and one past the end, its place in a list; one past the list's end where it is not in."""
    places = pixels.new_full((image.numel() + 1,), len(pixels))
    places[pixels] = torch.arange(len(pixels), device=pixels.device)
    return places


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each channel, [C], added in an order that does not depend on the number of threads."""
    products = (a * b).t()
    padded = F.pad(products, (0, -products.shape[1] % 256))
    return padded.unflatten(1, (-1, 256)).sum(2).sum(1)
