"""Sample rows: what the networks make of a few photos, and how near it is to the truth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from inpaint_kernels import metrics, panels
from inpaint_kernels.fillers import ModelFiller, read_rgb
from inpaint_kernels.models import InpaintingModel
from inpaint_kernels.trainer.config import TrainingConfig
from inpaint_kernels.trainer.holes import HoleMaker
from inpaint_kernels.trainer.photos import middle, photos_in


@dataclass(frozen=True)
class Row:
    """What :meth:`Samples.draw` found.

    Attributes:
        picture: uint8 ``[H, W, 3]``, a row of panels for each photo.
        hole_psnr: mean over the photos of the PSNR in their holes, in dB; NaN if none has a hole.
        hole_l1: the same of the mean absolute difference, as a share of full scale.
    """

    picture: NDArray[np.uint8]
    hole_psnr: float
    hole_l1: float


class Samples:
    """The middles of a folder's first photos with a hole each, the same throughout a run.

    Args:
        config: of the run.

    Raises:
        ValueError: there is no such folder, no photo in it, or one that cannot be read.
    """

    def __init__(self, config: TrainingConfig) -> None:
        folder = config.photos if config.validation is None else config.validation
        assert folder is not None  # the run has seen to it
        paths = photos_in(folder)
        chosen = [paths[i * len(paths) // config.rows] for i in range(min(config.rows, len(paths)))]
        self.truths = [np.ascontiguousarray(middle(read_rgb(path), config.image_size)) for path in chosen]
        make = HoleMaker(config, torch.device("cpu"))
        self.holes = [make(-1 - i).mask[0, 0].numpy() for i in range(len(chosen))]

    def draw(self, model: InpaintingModel) -> Row:
        """Rows of truth, input, output, and of attention, edges or HOG where the model has them."""
        training = model.training
        options = {"region": "full"} | ({"return_attention": True} if model.has_attention else {})
        filler = ModelFiller(model.eval(), options=options, name=type(model).__name__)
        jobs = [
            (np.where(hole[..., None], np.uint8(0), truth), hole)
            for truth, hole in zip(self.truths, self.holes, strict=True)
        ]
        try:
            filled = filler.fill(jobs, False, None)
        finally:
            model.train(training)
        rows, found = [], []
        for truth, (pixels, hole), result in zip(self.truths, jobs, filled, strict=True):
            beside = {"attention": result.offsets, "edges": result.edges, "hog": result.hog}
            names = ("truth", "input", "output", *(name for name, source in beside.items() if source is not None))
            sources = panels.PanelSources(
                pixels, hole, result.pixels, result.method, result.offsets, truth, result.edges, result.hog
            )
            rows.append(panels.draw_row(sources, names))
            found.append(metrics.compare(result.pixels, truth, hole).get("hole"))
        near = [entry for entry in found if entry is not None]
        return Row(np.concatenate(rows), _mean([entry.psnr for entry in near]), _mean([entry.l1 for entry in near]))


def _mean(values: Sequence[float]) -> float:
    """NaN where no photo has a hole, as masks of a folder may be empty."""
    return statistics.fmean(values) if values else math.nan
