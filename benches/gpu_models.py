"""Whole networks on a GPU: photos of 2000x2000 and holes in them, and training steps.

Photos as bench_photo.py has them, of the whole field those that fit: whole maps, strips, the hole alone, and the public
network where a folder of checkouts is given (``INPAINT_PEERS``) and it needs little memory. Training steps as
bench_training.py has them, of 16 images of 256x256, with the public network; and DeepFill v1's whole trainer.

No floor is named: what a network needs at least is the sum of its ops', which have cases of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from benches.harness import BFLOAT16, FLOAT32, TF32
from benches.peers import folder_in_environment
from benches.photo_case import MODELS, PhotoCase
from benches.published_models import available_pairs
from benches.published_race import PUBLISHED
from benches.trainer_case import TrainerCase
from benches.training_case import TrainingCase

SIDE: Final = 2000
HOLE: Final = 400
SMALL_PUBLISHED: Final = ("glcic", "partial_conv_unet", "edge_connect")
SYSTEMS: Final = ("deepfill_v1-daa233", "deepfill_v2-nipponjo", "glcic-otenim")


@dataclass(frozen=True)
class GpuPhotoCase(PhotoCase):
    """One race: a model and a photo with a hole, in one precision."""

    def __str__(self) -> str:
        return f"{super().__str__()}-{self.precision}"

    @property
    def provider_names(self) -> tuple[str, ...]:
        """Public networks take part in float32, those that need little memory."""
        races = self.published is not None and self.name in SMALL_PUBLISHED and self.precision == FLOAT32
        return (*((PUBLISHED,) if races else ()), *self.own_ways)

    def facts(self) -> Mapping[str, Any]:
        return {**self.description, "batch": 1, "precision": self.precision}


@dataclass(frozen=True)
class GpuTrainingCase(TrainingCase):
    """One race: a training step of a generator, in one precision."""

    def __str__(self) -> str:
        return f"{super().__str__()}-{self.precision}"

    def facts(self) -> Mapping[str, Any]:
        return {**super().facts(), "precision": self.precision}


def cases() -> list[GpuPhotoCase | GpuTrainingCase | TrainerCase]:
    """What ``make gpu`` runs, the most wanted first: time may run out."""
    peers = folder_in_environment()
    photos = [
        GpuPhotoCase(name, SIDE, HOLE, peers, "cuda", precision) for name in MODELS for precision in (FLOAT32, BFLOAT16)
    ]
    pairs, precisions = available_pairs(peers), (TF32, FLOAT32)
    steps = [
        GpuTrainingCase(name, 256, 16, peers, "cuda", precision)
        for name in SYSTEMS
        if peers is not None and name in pairs
        for precision in precisions
    ]
    trainers = [
        TrainerCase(256, 16, peers, "cuda", precision)
        for precision in precisions
        if peers is not None and SYSTEMS[0] in pairs
    ]
    return [*trainers[:1], *steps[:1], *photos, *steps[1:], *trainers[1:]]
