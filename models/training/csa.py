"""Training of coherent semantic attention: two relativistic discriminators, and features that are to be VGG's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from inpaint_kernels.models import losses as terms
from inpaint_kernels.models.csa import (
    CSA,
    CSAStages,
    FeaturePatchDiscriminator,
    PatchDiscriminator,
    coarse_input,
    masked_positions,
    refinement_input,
)
from inpaint_kernels.models.perceptual import CSA_ADVERSARIAL, CSA_CONSISTENCY
from inpaint_kernels.models.training._system import AdamSettings, Batch, TrainingSystem, adam, like
from torch import Tensor


@dataclass(frozen=True)
class CSASettings(AdamSettings):
    """Published values are the defaults.

    Attributes:
        l1_weight: of the L1 losses of both stages.
        adversarial_weight: of the losses of both discriminators for the generators.
        consistency_weight: of both consistency losses.
        published: whether the published code's mistakes are made, see :class:`CSATraining`.
    """

    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    l1_weight: float = 100.0
    adversarial_weight: float = 0.2
    consistency_weight: float = 1.0
    published: bool = False


class CSATraining(TrainingSystem):
    """Both generators of CSA, with a discriminator of images and one of VGG's features; these step first.

    With ``published`` it does what the published code does, and its paper does not say:

    * the consistency losses have no gradient;
    * nor has the loss of the feature discriminator, for the generators;
    * the first generator learns from its own L1 loss alone, and its first convolution as if its input had been 0 in
      the hole;
    * the CSA layer keeps the masked positions of the first batch.

    What else is published so, both do: the target of the consistency loss is not masked, the CSA layer's gradient is
    what the model's argument ``gradient`` says.

    Args:
        model: its two generators are trained.
        features: image [B, 3, H, W] in [-1, 1] -> features by layer, frozen: ``VGGFeatures("vgg16", (CSA_ADVERSARIAL,
            CSA_CONSISTENCY), weights=FILE)`` of :mod:`..perceptual`, on the model's device. The consistency loss takes
            a model of 64 channels.
        settings: see :class:`CSASettings`.
        feature_channels: of the layer ``CSA_ADVERSARIAL``.
        seed: see :class:`._system.TrainingSystem`.

    Published rates fall from the 20th of 119 epochs on, to 0; that schedule is the caller's.

    References:
        Liu et al., Coherent Semantic Attention for Image Inpainting, ICCV 2019, section 3.4. Published code:
        KumapowerLIU/CSA-inpainting, ``CSA.optimize_parameters``.
    """

    model: CSA

    def __init__(
        self,
        model: CSA,
        features: Callable[[Tensor], Mapping[str, Tensor]],
        settings: CSASettings | None = None,
        *,
        feature_channels: int = 256,
        seed: int = 0,
    ) -> None:
        self.settings = settings or CSASettings()
        self.features = features
        self.image_discriminator = like(PatchDiscriminator(), model)
        self.feature_discriminator = like(FeaturePatchDiscriminator(feature_channels), model)
        discriminators = {
            "image_discriminator": self.image_discriminator,
            "feature_discriminator": self.feature_discriminator,
        }
        super().__init__(
            model,
            {"generator": model, **discriminators},
            {
                "generator": adam([model], self.settings),
                "discriminator": adam(list(discriminators.values()), self.settings),
            },
            seed,
        )
        self._first_flags: Tensor | None = None

    def _step(self, batch: Batch, hole: Tensor) -> dict[str, Tensor]:
        settings, flags = self.settings, masked_positions(hole)
        truth = 2 * batch.image - 1
        stages = (self._published_stages if settings.published else self._stages)(batch.image, hole, flags)
        assert stages.attention is not None
        assert stages.decoder is not None
        with torch.no_grad():
            of_truth = self.features(truth)
        of_output = self.features(stages.output.detach() if settings.published else stages.output)
        pairs = (
            (self.image_discriminator, truth, stages.output),
            (self.feature_discriminator, of_truth[CSA_ADVERSARIAL], of_output[CSA_ADVERSARIAL]),
        )

        judged = [terms.relativistic_discriminator_loss(d(real), d(fake.detach())) for d, real, fake in pairs]
        losses = {"discriminator": (judged[0] + judged[1]) / 2}
        self._update(discriminator=losses["discriminator"])

        losses["coarse_l1"] = F.l1_loss(stages.coarse, truth)
        losses["l1"] = F.l1_loss(stages.output, truth)
        judged = [terms.relativistic_generator_loss(d(real), d(fake)) for d, real, fake in pairs]
        losses["adversarial"], losses["feature_adversarial"] = judged
        gradient = "published" if settings.published else "exact"
        for name, given in (("consistency", stages.attention), ("decoder_consistency", stages.decoder)):
            losses[name] = terms.consistency_loss(given, of_truth[CSA_CONSISTENCY], flags, gradient=gradient)
        losses["generator"] = (
            settings.l1_weight * (losses["coarse_l1"] + losses["l1"])
            + settings.adversarial_weight * (losses["adversarial"] + losses["feature_adversarial"])
            + settings.consistency_weight * (losses["consistency"] + losses["decoder_consistency"])
        )
        self._update(generator=losses["generator"])
        return losses

    def _stages(self, image: Tensor, hole: Tensor, flags: Tensor) -> CSAStages:
        coarse = self.model.coarse_generator(coarse_input(image, hole))
        return self._refine(coarse, refinement_input(image, hole, coarse), flags)

    def _published_stages(self, image: Tensor, hole: Tensor, flags: Tensor) -> CSAStages:
        if self._first_flags is None:
            self._first_flags = flags
        x = coarse_input(image, hole)
        coarse = self.model.coarse_generator(x)
        x.data.masked_fill_(hole, 0)  # what autograd has kept of the first convolution's input is changed
        return self._refine(coarse, refinement_input(image, hole, coarse.detach()), self._first_flags)

    def _refine(self, coarse: Tensor, x: Tensor, flags: Tensor) -> CSAStages:
        return CSAStages(coarse, *self.model.refinement_generator(x, flags, return_features=True))

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`._system.TrainingSystem.state_dict`; with the first batch's masked positions."""
        return {**super().state_dict(), "first_flags": self._first_flags}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`._system.TrainingSystem.load_state_dict`."""
        super().load_state_dict(state)
        self._first_flags = state["first_flags"]
