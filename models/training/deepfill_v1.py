"""Training of DeepFill v1: discounted L1, and two critics with a gradient penalty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from inpaint_kernels.models import losses as terms
from inpaint_kernels.models.deepfill_v1 import DeepFillV1, Discriminator
from inpaint_kernels.models.random_masks import crop_boxes
from inpaint_kernels.models.training._system import AdamSettings, Batch, TrainingSystem, adam, check_size, like
from torch import Tensor

from inpaint_kernels._checks import check_range


@dataclass(frozen=True)
class DeepFillV1Settings(AdamSettings):
    """Published values are the defaults.

    Attributes:
        coarse_l1_weight: of the first stage, in both L1 losses. Where results stay blurry, this and the next two are
            raised from 1.2 to 2.0, see :meth:`against_blur`.
        l1_weight: of the L1 loss of the windows, discounted by the distance to what is known.
        known_l1_weight: of the L1 loss of what is known ("ae").
        adversarial_weight: of the critics' loss for the generator.
        global_weight: of the global critic, beside the local one.
        penalty_weight: of the gradient penalty.
        discount: per pixel of distance.
        masked_penalty: whether the critics are free in what is known: True in the TensorFlow original, False in daa233.
        normalise_known: whether the L1 loss of what is known is divided by its share: True in the original.
        local_width: channels of the local critic's last convolution: 512 in the original, 256 in daa233.
        generator_every: steps of the critics for one of the generator.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)
    coarse_l1_weight: float = 1.2
    l1_weight: float = 1.2
    known_l1_weight: float = 1.2
    adversarial_weight: float = 0.001
    global_weight: float = 1.0
    penalty_weight: float = 10.0
    discount: float = 0.9
    masked_penalty: bool = False
    normalise_known: bool = False
    local_width: int = 256
    generator_every: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("generator_every", self.generator_every, minimum=1, integer=True)

    @classmethod
    def against_blur(cls) -> DeepFillV1Settings:
        """The three L1 weights raised to 2.0, which sharpened a training on 1,100 photos of facades."""
        return cls(coarse_l1_weight=2.0, l1_weight=2.0, known_l1_weight=2.0)

    @classmethod
    def official(cls) -> DeepFillV1Settings:
        """The TensorFlow original's, where daa233's port differs."""
        return cls(masked_penalty=True, normalise_known=True, local_width=512)


class DeepFillV1Training(TrainingSystem):
    """DeepFill v1 with its local and its global critic.

    Args:
        generator: to be trained.
        settings: see :class:`DeepFillV1Settings`.
        image_size: side of the square images.
        box_size: side of the batch's ``boxes``, which the local critic sees.
        seed: see :class:`._system.TrainingSystem`.

    Every step trains the critics, every fifth one the generator too, through the critics as they were before the step.

    References:
        Yu et al., Generative Image Inpainting with Contextual Attention, CVPR 2018. Published code:
        daa233/generative-inpainting-pytorch, ``Trainer.forward`` and train.py, where the critics step between the
        generator's loss and its gradient, which torch refuses since 1.5; JiahuiYu/generative_inpainting v1.0.0.

    Example:
        >>> system = DeepFillV1Training(DeepFillV1(), image_size=64, box_size=32)
        >>> mask = torch.zeros(1, 1, 64, 64)
        >>> mask[..., 18:46, 18:46] = 1
        >>> sorted(system.step(Batch(torch.rand(2, 3, 64, 64), mask, boxes=[Box(16, 16, 48, 48)])))
        ['discriminator', 'penalty', 'wasserstein']
    """

    def __init__(
        self,
        generator: DeepFillV1,
        settings: DeepFillV1Settings | None = None,
        *,
        image_size: int = 256,
        box_size: int = 128,
        seed: int = 0,
    ) -> None:
        check_range("image_size", image_size, minimum=16, integer=True)
        check_range("box_size", box_size, minimum=16, maximum=image_size, integer=True)
        self.settings = settings or DeepFillV1Settings()
        self.image_size, self.box_size = image_size, box_size
        border = "same_tf" if generator.dialect.border == "same_tf" else "zeros"
        self.generator = generator
        self.local_critic = like(Discriminator(box_size, self.settings.local_width, border), generator)
        self.global_critic = like(Discriminator(image_size, border=border), generator)
        super().__init__(
            generator,
            {"generator": generator, "local_critic": self.local_critic, "global_critic": self.global_critic},
            {
                "generator": adam([generator], self.settings),
                "discriminator": adam([self.local_critic, self.global_critic], self.settings),
            },
            seed,
        )

    def _step(self, batch: Batch, hole: Tensor) -> dict[str, Tensor]:
        settings = self.settings
        check_size(batch.image, self.image_size)
        boxes = batch.windows(self.box_size)
        trains_generator = (self.steps + 1) % settings.generator_every == 0
        with torch.set_grad_enabled(trains_generator):
            result = self.generator(batch.image, hole)
        assert result.coarse is not None
        truth, coarse, fine = (2 * x - 1 for x in (batch.image, result.coarse, result.output))
        pasted = [torch.where(hole, x, truth) for x in (coarse, fine)]
        near_truth, near_coarse, near_fine = (crop_boxes(x, boxes) for x in (truth, *pasted))

        judged: list[tuple[Callable[..., Tensor], float, Tensor, Tensor, Tensor]] = [
            (self.local_critic, 1.0, near_truth, near_fine, crop_boxes(hole, boxes)),
            (self.global_critic, settings.global_weight, truth, pasted[1], hole),
        ]
        losses = {"wasserstein": truth.new_zeros(()), "penalty": truth.new_zeros(())}
        for critic, weight, real, fake, mask in judged:
            scores = critic(torch.cat([real, fake.detach()])).chunk(2)
            losses["wasserstein"] = losses["wasserstein"] + weight * terms.wasserstein_discriminator_loss(*scores)
            losses["penalty"] = losses["penalty"] + self._penalty(critic, real, fake, mask)
        losses["discriminator"] = losses["wasserstein"] + settings.penalty_weight * losses["penalty"]
        if not trains_generator:
            self._update(discriminator=losses["discriminator"])
            return losses

        losses["l1"] = self._two_stages(
            *(terms.discounted_l1_loss(x, near_truth, settings.discount) for x in (near_coarse, near_fine))
        )
        losses["known_l1"] = self._two_stages(
            *(terms.masked_l1_loss(x, truth, ~hole, normalise=settings.normalise_known) for x in (coarse, fine))
        )
        judgements = [weight * terms.wasserstein_generator_loss(critic(fake)) for critic, weight, _, fake, _ in judged]
        losses["adversarial"] = torch.stack(judgements).sum()
        losses["generator"] = (
            settings.l1_weight * losses["l1"]
            + settings.known_l1_weight * losses["known_l1"]
            + settings.adversarial_weight * losses["adversarial"]
        )
        self._update(discriminator=losses["discriminator"], generator=losses["generator"])
        return losses

    def _two_stages(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return self.settings.coarse_l1_weight * coarse + fine

    def _penalty(self, critic: Callable[..., Tensor], real: Tensor, fake: Tensor, mask: Tensor) -> Tensor:
        position = torch.rand(len(real), 1, 1, 1, generator=self.random, dtype=torch.float64).to(real)
        weights = mask if self.settings.masked_penalty else None
        with torch.autocast(real.device.type, enabled=False):  # squares of small gradients are 0 in half precision
            return terms.gradient_penalty(critic, real, fake.detach(), weights, position=position)
