"""What the races of hog have in common: images, who runs, and what is right.

9 orientations, cells of 8x8 pixels, blocks of 3x3 cells, L2-Hys. Everybody gets pixels in the layout that it wants.
scikit-image and OpenCV compute one image after the other.

Two yardsticks compute something else and pass no gate. OpenCV's HOGDescriptor has the same cells and blocks, but
interpolates between bins and cells and weights pixels; OpenCV 5 has none, so with it this provider is left out (install
``opencv-python-headless<5``). And a copy moves as many bytes as an image and its features have, each once.

The gate is the reference, which computes in float64.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benches.harness import Outputs, Provider
from inpaint_kernels import hog
from inpaint_kernels.reference import hog as reference

ORIENTATIONS: Final = 9
CELL: Final = 8
BLOCK: Final = 3
TOLERANCE: Final = 1e-5
"""Of features, and of the picture: a gradient in a neighbouring bin shows in the third digit."""

SKIMAGE, OPENCV = "scikit-image", "OpenCV 4"
EAGER, COMPILED, PORTABLE, OURS = "eager", "torch.compile", "portable", "ours"
COPY: Final = "copy of the bytes"
BACKENDS: Final = {OURS: None, PORTABLE: "portable"}  # None: what the automatic choice takes
COPIED_FROM: Final = 2000
"""Side of the images that race with a copy of their bytes; smaller ones are in a cache."""

DTYPES: Final = {"uint8": torch.uint8, "float32": torch.float32}
LARGEST_QUICK_PIXELS: Final = 512 * 512
CALLS: Final = {OURS: 100, OPENCV: 20}
"""Calls per round of providers that take less than some milliseconds for images up to that size: one alone would time
how long threads take to wake up, up to half a millisecond where a machine is virtual."""


# Images --------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def make_images(case: HogCase) -> Tensor:
    """Coloured noise of all scales, [B, C, size, size], in 256 levels; floats are those over 255.

    As soft as a photo: of some long gradients that are equally long in two channels, numpy's hypot rounds one
    differently than the other, which then decides between the channels in scikit-image. With more contrast that
    happens in a few of a million pixels.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(case.batch, case.channels, case.size, case.size)
    for scale in (1, 4, 16, 64):
        side = -(-case.size // scale) + 1
        noise = torch.randn(case.batch, case.channels, side, side, generator=generator)
        images += scale**0.5 * F.interpolate(noise, images.shape[2:], mode="bilinear", align_corners=True)
    images = (128 + 12 * images).round_().clamp_(0, 255).to(torch.uint8)
    return (images if case.dtype == "uint8" else images.float() / 255).to(case.device)


# Cases ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HogCase:
    """One race: square images of ``size``, features and with ``visualize`` the picture of the histograms."""

    size: int
    channels: int
    dtype: str = "uint8"
    visualize: bool = False
    batch: int = 1
    device: str = "cpu"

    def __str__(self) -> str:
        batch = "" if self.batch == 1 else f"{self.batch}x"
        colours = "gray" if self.channels == 1 else "rgb"
        return f"{batch}{self.size}x{self.size}-{colours}-{self.dtype}{'-visualize' if self.visualize else ''}"

    @property
    def pixels(self) -> int:
        return self.batch * self.size**2

    @property
    def slow(self) -> bool:
        return self.pixels > LARGEST_QUICK_PIXELS

    @property
    def race_seconds(self) -> float:
        """Few: half of it are scikit-image's."""
        return 12.0

    @property
    def baseline(self) -> str | None:
        return SKIMAGE

    @property
    def tolerances(self) -> tuple[float, ...]:
        return (TOLERANCE,) * (2 if self.visualize else 1)

    @property
    def provider_names(self) -> list[str]:
        descriptor = [OPENCV] if self.dtype == "uint8" and not self.visualize and opencv_version() else []
        copy = [COPY] if self.size >= COPIED_FROM and not self.visualize else []
        return [SKIMAGE, EAGER, COMPILED, PORTABLE, OURS, *descriptor, *copy]

    def provider(self, name: str) -> Provider:
        if name == COPY:
            return Provider(name, copy_of_bytes(self), expected=None, device=self.device)
        run = runner(self, name)
        gate = None if name == OPENCV else functools.partial(expected, self)
        warm_up = None if name in (SKIMAGE, OPENCV) else run  # compiles, lets libraries prepare themselves
        calls = CALLS.get(name, 1) if self.device == "cpu" and not self.slow else 1
        run = functools.partial(repeated, run, calls)
        return Provider(name, run, gate, warm_up=warm_up, scale=1 / calls, device=self.device)

    def facts(self) -> Mapping[str, Any]:
        """``bytes``: the least that is read and written."""
        return {
            "op": "hog",
            "case": str(self),
            "size": self.size,
            "batch": self.batch,
            "channels": self.channels,
            "precision": self.dtype,
            "visualize": self.visualize,
            "opencv": opencv_version() if OPENCV in self.provider_names else None,
            "bytes": moved_bytes(self),
        }


def moved_bytes(case: HogCase) -> int:
    """Of the images, read once, and the features and the picture, written once."""
    return DTYPES[case.dtype].itemsize * case.channels * case.pixels + 4 * written_values(case)


def written_values(case: HogCase) -> int:
    blocks = (case.size // CELL - BLOCK + 1) ** 2
    return case.batch * blocks * BLOCK**2 * ORIENTATIONS + (case.pixels if case.visualize else 0)


# Providers -----------------------------------------------------------------------------------------------------------


def runner(case: HogCase, name: str) -> Callable[[], Outputs]:
    """Everything that a call needs prepared, so that only the features are timed."""
    images = make_images(case)
    if name in BACKENDS:
        return functools.partial(ours, images, case.visualize, BACKENDS[name])
    if name in (EAGER, COMPILED):
        lines = reference.line_masks(ORIENTATIONS, CELL, CELL)[0, 0].to(case.device) if case.visualize else None
        port = plain_port if name == EAGER else compiled_port(case)
        return functools.partial(port, images.float(), lines, case.dtype == "uint8")
    pixels = [np.ascontiguousarray(image.permute(1, 2, 0).squeeze(2).numpy()) for image in images]
    return functools.partial(by_opencv if name == OPENCV else by_skimage, pixels, case.visualize)


def repeated(run: Callable[[], Outputs], calls: int) -> Outputs:
    """What the last of some calls returns."""
    for _ in range(calls - 1):
        run()
    return run()


def ours(images: Tensor, visualize: bool, backend: str | None) -> Outputs:
    with torch.no_grad():
        result = hog(images, visualize=visualize, feature_vector=False, backend=backend)
    return (result,) if isinstance(result, Tensor) else tuple(result)


def by_skimage(images: list[np.ndarray[Any, Any]], visualize: bool) -> Outputs:
    """Its results as they are, float64 arrays of uint8 images."""
    from skimage import feature

    axis = None if images[0].ndim == 2 else 2
    results = [
        feature.hog(image, ORIENTATIONS, visualize=visualize, feature_vector=False, channel_axis=axis)
        for image in images
    ]
    columns = zip(*results, strict=True) if visualize else [results]
    return tuple(torch.from_numpy(np.stack(list(column))) for column in columns)


@functools.cache
def opencv_version() -> str | None:
    """The version of an OpenCV that has a HOGDescriptor."""
    if importlib.util.find_spec("cv2") is None:
        return None
    import cv2

    return cv2.__version__ if hasattr(cv2, "HOGDescriptor") else None


def by_opencv(images: list[np.ndarray[Any, Any]], visualize: bool) -> Outputs:
    import cv2

    opencv: Any = cv2  # the types of OpenCV 5 have no descriptor either
    opencv.setNumThreads(torch.get_num_threads())
    height, width = (side // CELL * CELL for side in images[0].shape[:2])
    block, cell = (CELL * BLOCK, CELL * BLOCK), (CELL, CELL)
    descriptor = opencv.HOGDescriptor((width, height), block, cell, cell, ORIENTATIONS)
    return tuple(torch.from_numpy(descriptor.compute(image[:height, :width])) for image in images)


def copy_of_bytes(case: HogCase) -> Callable[[], Outputs]:
    """Half of them are read, half written."""
    source = torch.ones(moved_bytes(case) // 2, dtype=torch.uint8, device=case.device)
    target = torch.ones_like(source)
    return lambda: (target.copy_(source),)


# A port to PyTorch, as one would write it -----------------------------------------------------------------------------


def plain_port(images: Tensor, lines: Tensor | None, has_levels: bool) -> Outputs:
    """Scikit-image's steps one by one.

    Args:
        images: [B, C, H, W] float32.
        lines: [n, cell, cell], the line of each bin; None: no picture.
        has_levels: whether pixels are integers up to 255: float32 then decides right, for others float64 is needed.
    """
    down = F.pad(images[:, :, 2:] - images[:, :, :-2], (0, 0, 1, 1))
    right = F.pad(images[:, :, :, 2:] - images[:, :, :, :-2], (1, 1))
    if has_levels:
        lengths = down.square() + right.square()
    else:
        down, right = down.double(), right.double()
        lengths = torch.hypot(down, right).float()  # channels tie where they are equal in float32
    largest = lengths.argmax(1, keepdim=True)
    down, right = down.gather(1, largest), right.gather(1, largest)
    angle = torch.rad2deg(torch.atan2(down, right)) % 180
    bins = (angle * (ORIENTATIONS / 180)).long().clamp_max(ORIENTATIONS - 1)
    votes = down.new_zeros(images.shape[0], ORIENTATIONS, *images.shape[2:])
    votes = votes.scatter(1, bins, torch.hypot(down, right))
    cells = F.avg_pool2d(votes, CELL)
    blocks = cells.unfold(2, BLOCK, 1).unfold(3, BLOCK, 1).permute(0, 2, 3, 4, 5, 1)
    blocks = blocks / (blocks.square().sum((3, 4, 5), keepdim=True) + 1e-10).sqrt()
    blocks = blocks.clamp_max(0.2)
    blocks = blocks / (blocks.square().sum((3, 4, 5), keepdim=True) + 1e-10).sqrt()
    if lines is None:
        return (blocks,)
    drawn = torch.einsum("bnyx,nij->byixj", cells, lines.to(cells)).flatten(3).flatten(1, 2)
    height, width = images.shape[2:]
    return blocks, F.pad(drawn, (0, width - drawn.shape[2], 0, height - drawn.shape[1]))


@functools.lru_cache(maxsize=1)
def compiled_port(case: HogCase) -> Callable[[Tensor, Tensor | None, bool], Outputs]:
    """The port compiled for the case's shape; what was compiled for other cases is dropped."""
    torch.compiler.reset()
    return torch.compile(plain_port, dynamic=False, fullgraph=True)


# The gate ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def expected(case: HogCase) -> Outputs:
    """The reference of every image, in float64 inside."""
    images = make_images(case).cpu()
    results = [ours(image[None], case.visualize, "reference") for image in images]
    return tuple(torch.cat(column).double() for column in zip(*results, strict=True))
