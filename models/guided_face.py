"""Guided face inpainting: one network draws the face's gradient histograms (HOG), a second one paints along them.

The paper, "A Novel Face Inpainting Approach Based on Guided Deep Learning", came without code. What it leaves open is
taken from EdgeConnect, whose two generators it is drawn with, so that EdgeConnect's weights are a warm start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from inpaint_kernels.models._boxes import Box
from inpaint_kernels.models._interface import InpaintingModel, InpaintResult, check_guidance, complete
from inpaint_kernels.models.edge_connect import (
    Discriminator,
    EdgeGenerator,
    InpaintGenerator,
    paint_guided,
    predict_guide,
    to_gray,
    white_hole,
)
from torch import Tensor

from inpaint_kernels import HogResult, hog
from inpaint_kernels._checks import check_choice

CELL = 8
"""Side of a HOG cell in pixels; 9 orientations."""

GH_INPUTS = ("masked", "literal")
_BRIGHTNESS = 25.5  # 255 / 10: the drawing of a gray of 0 ... 255 reaches white at 10, as in scikit-image's tutorial


class GuidedFace(InpaintingModel):
    """HOG-guided face inpainting. ``model(image, mask)``, see :meth:`paint`.

    Args:
        gh_input: what the HOG generator sees. "masked": the gray, its HOG and the hole, in EdgeConnect's layout.
            "literal": ``[image | image with a white hole]``, 6 channels, as the paper's text has it. That input holds
            the answer in training and lacks it in use; it is there to reproduce the paper's experiment only.
        residual_blocks: of both generators.

    Attributes:
        hog_generator: an :class:`~inpaint_kernels.models.edge_connect.EdgeGenerator`.
        inpaint_generator: :class:`~inpaint_kernels.models.edge_connect.InpaintGenerator`.

    Choices where the paper says nothing: 9 orientations in cells of 8 x 8, drawn as scikit-image does; the drawing as
    the HOG generator's target (:func:`hog_target`); known cells keep their drawing between the two stages; spectral
    norm in the HOG generator.

    References:
        "A Novel Face Inpainting Approach Based on Guided Deep Learning"; networks of Nazeri et al., EdgeConnect, 2019.

    Example:
        >>> model = GuidedFace().eval()
        >>> image, mask = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
        >>> mask[..., 16:48, 16:48] = 1
        >>> with torch.no_grad():
        ...     result = model(image, mask)
        >>> result.completed.shape, result.hog.shape
        (torch.Size([1, 3, 64, 64]), torch.Size([1, 1, 64, 64]))
    """

    size_multiple: ClassVar[int] = CELL
    least_size: int = 2 * CELL

    def __init__(self, gh_input: str = "masked", residual_blocks: int = 8) -> None:
        super().__init__()
        check_choice("gh_input", gh_input, GH_INPUTS)
        self.gh_input = gh_input
        self.hog_generator = EdgeGenerator(residual_blocks, in_channels=3 if gh_input == "masked" else 6)
        self.inpaint_generator = InpaintGenerator(residual_blocks)

    def paint(
        self, image: Tensor, hole: Tensor, *, boxes: Sequence[Box] | None = None, ground_truth: Tensor | None = None
    ) -> InpaintResult:
        """Fill the holes of checked images, H and W from 16 on.

        Args:
            image: [B, 3, H, W] RGB in [0, 1], 0 in the hole.
            hole: bool [B, 1, H, W].
            boxes: must be None: the instance norms see the whole image.
            ground_truth: [B or 1, 3, H, W], the image without a hole, for ``gh_input="literal"`` alone; None: the
                image with a white hole stands in its place.

        Returns:
            ``output``, ``completed``, and ``hog``: the drawing that guided the second stage.

        Raises:
            ValueError, TypeError: an argument has the wrong shape, dtype or value; the message names it.
        """
        touched = touched_cells(hole)
        known = hog_target(to_gray(image)).masked_fill(touched, 0)
        if self.gh_input == "literal":
            predicted = self._predict_literally(image, hole, ground_truth)
        elif ground_truth is not None:
            raise ValueError('ground_truth: expected None unless gh_input is "literal"')
        else:
            predicted = predict_guide(self.hog_generator, image, known, hole)
        guide = torch.where(touched, predicted, known)
        output = paint_guided(self.inpaint_generator, image, guide, hole)
        return InpaintResult(output, complete(image, output, hole), hog=guide)

    def _predict_literally(self, image: Tensor, hole: Tensor, ground_truth: Tensor | None) -> Tensor:
        masked = white_hole(image, hole)
        truth = masked if ground_truth is None else check_guidance("ground_truth", ground_truth, image, channels=3)
        predicted: Tensor = self.hog_generator(torch.cat([truth, masked], 1))
        return predicted

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"gh_input={self.gh_input!r}"


def hog_target(gray: Tensor) -> Tensor:
    """The drawing of a gray image's HOG, what the HOG generator is to learn.

    Args:
        gray: [B, 1, H, W] in [0, 1], H and W multiples of 8.

    Returns:
        [B, 1, H, W] in [0, 1] in the dtype of gray, without gradient: the cell histograms before block normalisation,
        drawn as scikit-image does.
    """
    result = hog(gray.detach(), 9, CELL, 1, visualize=True)
    assert isinstance(result, HogResult)
    return (_BRIGHTNESS * result.image[:, None]).clamp(0, 1).to(gray.dtype)


def touched_cells(hole: Tensor) -> Tensor:
    """Where the HOG is not known: bool [B, 1, H, W], True in cells that the hole touches.

    It touches a cell where it holds one of its pixels, or a pixel beside one, which that one's gradient reads.
    """
    beside = F.max_pool2d(hole.float(), 3, 1, 1)
    return F.max_pool2d(beside, CELL).repeat_interleave(CELL, 2).repeat_interleave(CELL, 3) > 0


def discriminators(*, conditional: bool = False) -> tuple[Discriminator, Discriminator]:
    """Discriminators of training, of ``[gray | HOG]`` and of images.

    Args:
        conditional: whether that of images sees pairs ``[ground truth | image]``, 6 channels, as the paper writes.
    """
    return Discriminator(2), Discriminator(6 if conditional else 3)
