"""Training of DeepFill v2: L1 of both stages, and SN-PatchGAN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from inpaint_kernels.models import losses as terms
from inpaint_kernels.models._interface import check_guidance
from inpaint_kernels.models.deepfill_v2 import DeepFillV2, SNPatchGAN
from inpaint_kernels.models.training._system import AdamSettings, Batch, TrainingSystem, adam, like
from torch import Tensor

from inpaint_kernels._checks import check_choice

ADVERSARIAL = {
    "hinge": (terms.hinge_discriminator_loss, terms.hinge_generator_loss),
    "least_squares": (terms.least_squares_discriminator_loss, terms.least_squares_generator_loss),
}


@dataclass(frozen=True)
class DeepFillV2Settings(AdamSettings):
    """Published values are the defaults.

    Attributes:
        coarse_l1_weight: of the first stage's L1 loss.
        l1_weight: of the second stage's.
        adversarial_weight: of the discriminator's loss for the generator.
        adversarial: "hinge", or "least_squares" (nipponjo's option "ls").
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.999)
    coarse_l1_weight: float = 1.0
    l1_weight: float = 1.0
    adversarial_weight: float = 1.0
    adversarial: str = "hinge"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("adversarial", self.adversarial, ADVERSARIAL)


class DeepFillV2Training(TrainingSystem):
    """DeepFill v2 with its patch discriminator, which steps first.

    Args:
        generator: to be trained. A guided one takes the batch's ``sketch``, and so does the discriminator.
        settings: see :class:`DeepFillV2Settings`.
        seed: see :class:`._system.TrainingSystem`.

    References:
        Yu et al., Free-Form Image Inpainting with Gated Convolution, ICCV 2019. Published code:
        nipponjo/deepfillv2-pytorch, train.py.

    Example:
        >>> system = DeepFillV2Training(DeepFillV2())
        >>> mask = torch.zeros(1, 1, 64, 64)
        >>> mask[..., 18:46, 18:46] = 1
        >>> sorted(system.step(Batch(torch.rand(2, 3, 64, 64), mask)))
        ['adversarial', 'coarse_l1', 'discriminator', 'generator', 'l1']
    """

    def __init__(self, generator: DeepFillV2, settings: DeepFillV2Settings | None = None, *, seed: int = 0) -> None:
        self.settings = settings or DeepFillV2Settings()
        self.generator = generator
        border = "same_tf" if generator.dialect.border == "same_tf" else "zeros"
        self.discriminator = like(SNPatchGAN(generator.guided, border), generator)
        super().__init__(
            generator,
            {"generator": generator, "discriminator": self.discriminator},
            {
                "generator": adam([generator], self.settings),
                "discriminator": adam([self.discriminator], self.settings),
            },
            seed,
        )

    def _step(self, batch: Batch, hole: Tensor) -> dict[str, Tensor]:
        settings = self.settings
        discriminator_loss, generator_loss = ADVERSARIAL[settings.adversarial]
        guidance = {} if batch.sketch is None else {"sketch": batch.sketch}
        result = self.generator(batch.image, hole, **guidance)
        assert result.coarse is not None
        truth, coarse, fine = (2 * x - 1 for x in (batch.image, result.coarse, result.output))
        pasted = torch.where(hole, fine, truth)
        beside = [hole.to(truth.dtype)]
        if batch.sketch is not None:
            lines = check_guidance("sketch", batch.sketch, batch.image) > 0.6
            beside.append((lines & hole).to(truth.dtype))
        shown = [torch.cat([x, *beside], 1) for x in (truth, pasted)]

        real, fake = self.discriminator(torch.cat([shown[0], shown[1].detach()])).chunk(2)
        losses = {"discriminator": discriminator_loss(real, fake)}
        self._update(discriminator=losses["discriminator"])

        losses["coarse_l1"], losses["l1"] = F.l1_loss(coarse, truth), F.l1_loss(fine, truth)
        losses["adversarial"] = generator_loss(self.discriminator(shown[1]))
        losses["generator"] = (
            settings.coarse_l1_weight * losses["coarse_l1"]
            + settings.l1_weight * losses["l1"]
            + settings.adversarial_weight * losses["adversarial"]
        )
        self._update(generator=losses["generator"])
        return losses
