"""Training of EdgeConnect in its four stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from inpaint_kernels.models import losses as terms
from inpaint_kernels.models._interface import check_guidance
from inpaint_kernels.models.edge_connect import EdgeConnect, canny, predict_guide
from inpaint_kernels.models.perceptual import (
    EDGE_CONNECT_CONTENT,
    EDGE_CONNECT_STYLE,
    perceptual_loss,
    style_loss,
)
from inpaint_kernels.models.training._guided import Features, GuidedSettings, GuidedTraining
from inpaint_kernels.models.training._system import Batch
from torch import Tensor


@dataclass(frozen=True)
class EdgeConnectSettings(GuidedSettings):
    """Values of the published configuration file are the defaults (those in its code are not the paper's).

    Attributes:
        feature_matching_weight: of the edge discriminator's features.
        sigma: deviation in pixels of Canny's Gaussian, where a batch brings no edges; filling takes the same.
    """

    feature_matching_weight: float = 10.0
    sigma: float = 2.0


class EdgeConnectTraining(GuidedTraining):
    """EdgeConnect with its two discriminators; see :class:`._guided.GuidedTraining` for the stages.

    Args:
        model: its two generators are trained.
        features: image [B, 3, H, W] in [0, 1] -> features by layer, frozen: ``VGGFeatures("vgg19",
            EDGE_CONNECT_CONTENT + EDGE_CONNECT_STYLE, weights=FILE)`` of :mod:`..perceptual`, on the model's device.
            None: for the phase "guide" alone.
        settings: see :class:`EdgeConnectSettings`.
        seed: see :class:`._system.TrainingSystem`.

    The hole of a batch must not be empty: the L1 loss is divided by its share.

    Deviation from the published code, which lets the discriminator step between the generator's loss and its gradient
    (refused by torch since 1.5), and whose joint stage runs through one graph twice: here all gradients are taken
    first, and the joint stage's generator losses are added.

    References:
        Nazeri et al., EdgeConnect: Generative Image Inpainting with Adversarial Edge Learning, arXiv 1901.00212, 2019.
        Published code: knazeri/edge-connect, src/models.py and src/edge_connect.py.
    """

    settings: EdgeConnectSettings

    def __init__(
        self,
        model: EdgeConnect,
        features: Features | None,
        settings: EdgeConnectSettings | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.settings = settings or EdgeConnectSettings()
        self.features = features
        super().__init__(model, model.edge_generator, 3, self.settings, seed)

    def _true_guide(self, batch: Batch) -> Tensor:
        if batch.edges is not None:
            return check_guidance("edges", batch.edges, batch.image)
        return canny(batch.image, torch.zeros_like(batch.image[:, :1], dtype=torch.bool), self.settings.sigma)

    def _predict(self, image: Tensor, true_guide: Tensor, hole: Tensor) -> Tensor:
        return predict_guide(self.guide_generator, image, true_guide.masked_fill(hole, 0), hole)

    def _compose(self, predicted: Tensor, true_guide: Tensor, hole: Tensor) -> Tensor:
        return torch.where(hole, predicted, true_guide)

    def _judge_guide(
        self, gray: Tensor, truth: Tensor, predicted: Tensor, losses: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        real, real_maps = self.guide_discriminator(torch.cat([gray, truth], 1))
        fake, _ = self.guide_discriminator(torch.cat([gray, predicted.detach()], 1))
        losses["guide_discriminator"] = self._discriminator_loss(real, fake)
        fake, fake_maps = self.guide_discriminator(torch.cat([gray, predicted], 1))
        losses["guide_adversarial"] = self._generator_loss(fake)
        losses["feature_matching"] = terms.feature_matching_loss(fake_maps, real_maps)
        total = (
            self.settings.guide_adversarial_weight * losses["guide_adversarial"]
            + self.settings.feature_matching_weight * losses["feature_matching"]
        )
        return losses["guide_discriminator"], total

    def _judge_image(
        self, image: Tensor, output: Tensor, hole: Tensor, losses: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if self.features is None:
            raise ValueError(f"features: expected those of VGG-19 for the phase {self.phase!r}, got None")
        real, _ = self.image_discriminator(image)
        fake, _ = self.image_discriminator(output.detach())
        losses["image_discriminator"] = self._discriminator_loss(real, fake)
        losses["adversarial"] = self._generator_loss(self.image_discriminator(output)[0])
        losses["l1"] = terms.hole_relative_l1_loss(output, image, hole)
        losses["perceptual"] = perceptual_loss(self.features(output), self.features(image), EDGE_CONNECT_CONTENT)
        in_hole = (self.features(x * hole) for x in (output, image))
        losses["style"] = style_loss(*in_hole, EDGE_CONNECT_STYLE)
        return losses["image_discriminator"], self._image_total(losses)
