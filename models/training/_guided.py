"""Training of systems of two stages: one network draws a guiding map, a second one paints along it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from inpaint_kernels.models import losses as terms
from inpaint_kernels.models.edge_connect import (
    Discriminator,
    EdgeConnect,
    EdgeGenerator,
    InpaintGenerator,
    paint_guided,
    to_gray,
)
from inpaint_kernels.models.guided_face import GuidedFace
from inpaint_kernels.models.training._system import AdamSettings, Batch, TrainingSystem, adam, like
from torch import Tensor

from inpaint_kernels._checks import check_choice

Features = Callable[[Tensor], Mapping[str, Tensor]]

ADVERSARIAL = {
    "nsgan": (terms.bce_discriminator_loss, terms.bce_generator_loss),
    "lsgan": (terms.least_squares_discriminator_loss, terms.least_squares_generator_loss),
    "hinge": (terms.hinge_discriminator_loss, terms.hinge_generator_loss),
}


@dataclass(frozen=True)
class GuidedSettings(AdamSettings):
    """What both systems share.

    Attributes:
        discriminator_rate: of the discriminators, as a share of the generators'.
        adversarial: "nsgan" (binary cross entropy), "lsgan" or "hinge".
        guide_adversarial_weight: of the first stage's adversarial loss.
        l1_weight: of the second stage's L1 loss.
        adversarial_weight: of its adversarial loss.
        perceptual_weight: of its perceptual loss.
        style_weight: of its style loss.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.9)
    discriminator_rate: float = 0.1
    adversarial: str = "nsgan"
    guide_adversarial_weight: float = 1.0
    l1_weight: float = 1.0
    adversarial_weight: float = 0.1
    perceptual_weight: float = 0.1
    style_weight: float = 250.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("adversarial", self.adversarial, ADVERSARIAL)


class GuidedTraining(TrainingSystem):
    """Two generators, each with a discriminator.

    Phases: "guide": the first stage alone. "inpaint": the second one along the true map. "inpaint_predicted": the
    second one along the first one's, which is not trained on. "joint": both; the second stage's losses reach the first.

    Both losses of a stage are taken before either optimiser steps.

    Args:
        model: its two generators are trained.
        guide_generator: the first stage's.
        image_channels: of what the second stage's discriminator sees.
        settings: see :class:`GuidedSettings`.
        seed: see :class:`._system.TrainingSystem`.
    """

    settings: GuidedSettings
    phases: ClassVar[tuple[str, ...]] = ("guide", "inpaint", "inpaint_predicted", "joint")

    def __init__(
        self,
        model: EdgeConnect | GuidedFace,
        guide_generator: EdgeGenerator,
        image_channels: int,
        settings: GuidedSettings,
        seed: int,
    ) -> None:
        self.guide_generator = guide_generator
        self.inpaint_generator: InpaintGenerator = model.inpaint_generator
        self._discriminator_loss, self._generator_loss = ADVERSARIAL[settings.adversarial]
        use_sigmoid = settings.adversarial != "hinge"
        self.guide_discriminator = like(Discriminator(2, use_sigmoid), model)
        self.image_discriminator = like(Discriminator(image_channels, use_sigmoid), model)
        generators = {"guide_generator": self.guide_generator, "inpaint_generator": self.inpaint_generator}
        discriminators = {
            "guide_discriminator": self.guide_discriminator,
            "image_discriminator": self.image_discriminator,
        }
        super().__init__(
            model,
            {**generators, **discriminators},
            {
                "generator": adam(list(generators.values()), settings),
                "discriminator": adam(list(discriminators.values()), settings, settings.discriminator_rate),
            },
            seed,
        )

    def _step(self, batch: Batch, hole: Tensor) -> dict[str, Tensor]:
        image = batch.image
        true_guide = guide = self._true_guide(batch)
        losses: dict[str, Tensor] = {}
        totals = []
        if self.phase in ("guide", "joint"):
            predicted = self._predict(image, true_guide, hole)
            totals.append(self._judge_guide(to_gray(image), true_guide, predicted, losses))
            guide = self._compose(predicted, true_guide, hole)
        elif self.phase == "inpaint_predicted":
            with torch.no_grad():
                guide = self._compose(self._predict(image, true_guide, hole), true_guide, hole)
        if self.phase != "guide":
            output = paint_guided(self.inpaint_generator, image, guide, hole)
            totals.append(self._judge_image(image, output, hole, losses))
        for name, parts in zip(("discriminator", "generator"), zip(*totals, strict=True), strict=True):
            losses[name] = torch.stack(parts).sum()
        self._update(discriminator=losses["discriminator"], generator=losses["generator"])
        return losses

    def _image_total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The second generator's loss, of its terms."""
        settings = self.settings
        return (
            settings.l1_weight * losses["l1"]
            + settings.adversarial_weight * losses["adversarial"]
            + settings.perceptual_weight * losses["perceptual"]
            + settings.style_weight * losses["style"]
        )

    def _judge_guide(
        self, gray: Tensor, truth: Tensor, predicted: Tensor, losses: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The discriminator's and the generator's loss of the first stage; their terms go into ``losses``."""
        raise NotImplementedError

    def _judge_image(
        self, image: Tensor, output: Tensor, hole: Tensor, losses: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The same of the second stage."""
        raise NotImplementedError

    def _true_guide(self, batch: Batch) -> Tensor:
        """The map of the whole image."""
        raise NotImplementedError

    def _predict(self, image: Tensor, true_guide: Tensor, hole: Tensor) -> Tensor:
        """The first stage's map."""
        raise NotImplementedError

    def _compose(self, predicted: Tensor, true_guide: Tensor, hole: Tensor) -> Tensor:
        """The predicted map in the hole, the true one around it."""
        raise NotImplementedError
