"""Training of the U-Net of partial convolutions: L1, perceptual, style and total variation; no discriminator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from inpaint_kernels.models import losses as terms
from inpaint_kernels.models.partial_conv_unet import PartialConvUNet
from inpaint_kernels.models.perceptual import PARTIAL_CONV, perceptual_loss, style_loss
from inpaint_kernels.models.training._system import AdamSettings, Batch, TrainingSystem, adam
from torch import Tensor, nn


@dataclass(frozen=True)
class PartialConvSettings(AdamSettings):
    """Published values are the defaults.

    Attributes:
        learning_rate: in the first phase.
        finetune_learning_rate: in the second.
        known_weight: of the L1 loss of what is known ("valid").
        hole_weight: of the L1 loss of the hole.
        perceptual_weight: of the perceptual losses of the output and of the completed image.
        style_weight: of their style losses.
        variation_weight: of the completed image's total variation.
        variation_at_hole: whether that counts in the hole and one pixel around it alone, as in the paper; in naoto's
            code it counts everywhere.
    """

    learning_rate: float = 2e-4
    finetune_learning_rate: float = 5e-5
    known_weight: float = 1.0
    hole_weight: float = 6.0
    perceptual_weight: float = 0.05
    style_weight: float = 120.0
    variation_weight: float = 0.1
    variation_at_hole: bool = False


class PartialConvTraining(TrainingSystem):
    """The U-Net and its losses.

    Phases: "training", and "finetuning" with a lower rate, in which the encoder's batch norms keep their statistics,
    that holes have spoilt; their weights are trained on.

    Args:
        generator: to be trained.
        features: image [B, 3, H, W] in [0, 1] -> features by layer, frozen: ``VGGFeatures("vgg16", PARTIAL_CONV,
            weights=FILE, normalise=True)`` of :mod:`..perceptual`, on the generator's device.
        settings: see :class:`PartialConvSettings`.
        seed: see :class:`._system.TrainingSystem`.

    Images are compared as the generator's dialect normalises them.

    References:
        Liu et al., Image Inpainting for Irregular Holes Using Partial Convolutions, ECCV 2018, section 3.3. Published
        code: naoto0804/pytorch-inpainting-with-partial-conv, train.py and ``InpaintingLoss``. Its weights lack the
        factor kh * kw * Cin, so that a step of Adam moves the same network less there.
    """

    phases: ClassVar[tuple[str, ...]] = ("training", "finetuning")

    def __init__(
        self,
        generator: PartialConvUNet,
        features: Callable[[Tensor], Mapping[str, Tensor]],
        settings: PartialConvSettings | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.settings = settings or PartialConvSettings()
        self.generator, self.features = generator, features
        super().__init__(generator, {"generator": generator}, {"generator": adam([generator], self.settings)}, seed)

    def _enter_phase(self) -> None:
        finetuning = self.phase == "finetuning"
        self._rates["generator"] = self.settings.finetune_learning_rate if finetuning else self.settings.learning_rate
        self._set_rates()

    def _step(self, batch: Batch, hole: Tensor) -> dict[str, Tensor]:
        if self.phase == "finetuning":
            self._keep_statistics()
        settings, image = self.settings, batch.image
        output = self.generator(image, hole).output
        completed = torch.where(hole, output, image)
        with torch.no_grad():
            target = self.features(image)
        pair = [self.features(x) for x in (output, completed)]
        truth, painted, whole = (self._normalise(x) for x in (image, output, completed))
        losses = {
            "known": terms.masked_l1_loss(painted, truth, ~hole),
            "hole": terms.masked_l1_loss(painted, truth, hole),
            "perceptual": torch.stack([perceptual_loss(x, target, PARTIAL_CONV) for x in pair]).sum(),
            "style": torch.stack([style_loss(x, target, PARTIAL_CONV) for x in pair]).sum(),
            "variation": terms.total_variation_loss(whole, hole if settings.variation_at_hole else None),
        }
        losses["generator"] = (
            settings.known_weight * losses["known"]
            + settings.hole_weight * losses["hole"]
            + settings.perceptual_weight * losses["perceptual"]
            + settings.style_weight * losses["style"]
            + settings.variation_weight * losses["variation"]
        )
        self._update(generator=losses["generator"])
        return losses

    def _keep_statistics(self) -> None:
        for name, layer in self.generator.named_modules():
            if name.startswith("enc_") and isinstance(layer, nn.BatchNorm2d):
                layer.eval()

    def _normalise(self, image: Tensor) -> Tensor:
        dialect = self.generator.dialect
        mean, deviation = (image.new_tensor(v).view(3, 1, 1) for v in (dialect.mean, dialect.deviation))
        return (image - mean) / deviation
