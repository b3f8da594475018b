"""Training of HOG-guided face inpainting: the generator of histograms, then that of faces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from inpaint_kernels.models.edge_connect import predict_guide, to_gray, white_hole
from inpaint_kernels.models.guided_face import GuidedFace, hog_target, touched_cells
from inpaint_kernels.models.perceptual import GUIDED_FACE, perceptual_loss, style_loss
from inpaint_kernels.models.training._guided import Features, GuidedSettings, GuidedTraining
from inpaint_kernels.models.training._system import Batch
from torch import Tensor


@dataclass(frozen=True)
class GuidedFaceSettings(GuidedSettings):
    """The paper's weights are the defaults: 1 : 1 for the histograms, 1 : 0.1 : 0.1 : 250 for the face.

    Attributes:
        guide_l1_weight: of the first stage's L1 loss.
        conditional: whether the second stage's discriminator sees pairs ``[ground truth | image]``, as the paper
            writes its adversarial loss.
    """

    guide_l1_weight: float = 1.0
    conditional: bool = False


class GuidedFaceTraining(GuidedTraining):
    """HOG-guided face inpainting with two discriminators; see :class:`._guided.GuidedTraining` for the phases.

    Args:
        model: its two generators are trained.
        features: image [B, 3, H, W] in [0, 1] -> features by layer, frozen: ``VGGFeatures("vgg16", GUIDED_FACE,
            weights=FILE)`` of :mod:`..perceptual`, on the model's device. None: for the phase "guide" alone.
        settings: see :class:`GuidedFaceSettings`.
        seed: see :class:`._system.TrainingSystem`.

    The paper names losses and weights; optimiser and the order of steps, which it does not, are EdgeConnect's.

    References:
        "A Novel Face Inpainting Approach Based on Guided Deep Learning", equations 4 to 8.
    """

    settings: GuidedFaceSettings

    def __init__(
        self,
        model: GuidedFace,
        features: Features | None,
        settings: GuidedFaceSettings | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.settings = settings or GuidedFaceSettings()
        self.features, self.gh_input = features, model.gh_input
        super().__init__(model, model.hog_generator, 6 if self.settings.conditional else 3, self.settings, seed)

    def _true_guide(self, batch: Batch) -> Tensor:
        return hog_target(to_gray(batch.image))

    def _predict(self, image: Tensor, true_guide: Tensor, hole: Tensor) -> Tensor:
        if self.gh_input == "literal":
            predicted: Tensor = self.guide_generator(torch.cat([image, white_hole(image, hole)], 1))
            return predicted
        known = hog_target(to_gray(image.masked_fill(hole, 0))).masked_fill(touched_cells(hole), 0)
        return predict_guide(self.guide_generator, image, known, hole)

    def _compose(self, predicted: Tensor, true_guide: Tensor, hole: Tensor) -> Tensor:
        return torch.where(touched_cells(hole), predicted, true_guide)

    def _judge_guide(
        self, gray: Tensor, truth: Tensor, predicted: Tensor, losses: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        shown = (torch.cat([gray, x], 1) for x in (truth, predicted.detach(), predicted))
        real, fake, trained = (self.guide_discriminator(x)[0] for x in shown)
        losses["guide_discriminator"] = self._discriminator_loss(real, fake)
        losses["guide_adversarial"] = self._generator_loss(trained)
        losses["guide_l1"] = F.l1_loss(predicted, truth)
        total = (
            self.settings.guide_l1_weight * losses["guide_l1"]
            + self.settings.guide_adversarial_weight * losses["guide_adversarial"]
        )
        return losses["guide_discriminator"], total

    def _judge_image(
        self, image: Tensor, output: Tensor, hole: Tensor, losses: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        settings = self.settings
        if self.features is None:
            raise ValueError(f"features: expected those of VGG-16 for the phase {self.phase!r}, got None")
        shown = (torch.cat([image, x], 1) if settings.conditional else x for x in (image, output.detach(), output))
        real, fake, trained = (self.image_discriminator(x)[0] for x in shown)
        losses["image_discriminator"] = self._discriminator_loss(real, fake)
        losses["adversarial"] = self._generator_loss(trained)
        losses["l1"] = F.l1_loss(output, image)
        features, target = self.features(output), self.features(image)
        losses["perceptual"] = perceptual_loss(features, target, GUIDED_FACE)
        losses["style"] = style_loss(features, target, GUIDED_FACE)
        return losses["image_discriminator"], self._image_total(losses)
