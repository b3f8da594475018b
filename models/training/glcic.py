"""Training of GLCIC in its three phases: the completion network, the discriminators, both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from inpaint_kernels.models import losses as terms
from inpaint_kernels.models._interface import Box
from inpaint_kernels.models.glcic import GLCIC, ContextDiscriminator
from inpaint_kernels.models.random_masks import crop_boxes
from inpaint_kernels.models.training._system import Batch, Settings, TrainingSystem, check_size, like
from torch import Tensor, nn

from inpaint_kernels._checks import check_range

PUBLISHED_STEPS = {"completion": 90_000, "discriminator": 10_000, "joint": 400_000}
"""Steps of each phase in the paper and in otenim's code."""


@dataclass(frozen=True)
class GLCICSettings(Settings):
    """Published values are the defaults; the optimiser is Adadelta.

    Attributes:
        learning_rate: factor on Adadelta's steps.
        rho: of Adadelta's running means.
        adversarial_weight: alpha, of the discriminators beside the mean square error of the hole.
    """

    learning_rate: float = 1.0
    rho: float = 0.9
    adversarial_weight: float = 4e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("rho", self.rho, maximum=1)


class GLCICTraining(TrainingSystem):
    """GLCIC with its local and global discriminators, in otenim's order of steps.

    Phases: "completion": the completion network alone, by the mean square error of the hole. "discriminator": the
    discriminators alone. "joint": the discriminators, then the completion network through them; both losses are halved
    there, and the discriminators' has the factor alpha too, as in the published code.

    Args:
        generator: the completion network.
        settings: see :class:`GLCICSettings`.
        image_size: side of the square images: 256 in the paper, 160 for otenim's "celeba".
        box_size: side of the batch's ``boxes``, which the local discriminator sees: 128, and 96.
        global_layers: of the global discriminator: 6, and 5.
        seed: see :class:`._system.TrainingSystem`.

    References:
        Iizuka et al., Globally and Locally Consistent Image Completion, SIGGRAPH 2017, section 3.4. Published code:
        otenim/GLCIC-PyTorch, train.py.

    Example:
        >>> system = GLCICTraining(GLCIC("otenim"), image_size=64, box_size=32)
        >>> system.phase = "joint"
        >>> mask = torch.zeros(1, 1, 64, 64)
        >>> mask[..., 18:46, 18:46] = 1
        >>> sorted(system.step(Batch(torch.rand(2, 3, 64, 64), mask, boxes=[Box(16, 16, 48, 48)])))
        ['adversarial', 'discriminator', 'generator', 'mse']
    """

    phases: ClassVar[tuple[str, ...]] = tuple(PUBLISHED_STEPS)

    def __init__(
        self,
        generator: GLCIC,
        settings: GLCICSettings | None = None,
        *,
        image_size: int = 256,
        box_size: int = 128,
        global_layers: int = 6,
        seed: int = 0,
    ) -> None:
        check_range("global_layers", global_layers, minimum=5, maximum=6, integer=True)
        check_range("image_size", image_size, minimum=2**global_layers, integer=True)
        check_range("box_size", box_size, minimum=32, maximum=image_size, integer=True)
        self.settings = settings or GLCICSettings()
        self.image_size, self.box_size = image_size, box_size
        self.generator = generator
        discriminator = ContextDiscriminator(box_size, image_size, global_layers, generator.dialect.relu_first)
        self.discriminator = like(discriminator, generator)
        super().__init__(
            generator,
            {"generator": generator, "discriminator": self.discriminator},
            {"generator": self._adadelta(generator), "discriminator": self._adadelta(self.discriminator)},
            seed,
        )

    def _adadelta(self, network: nn.Module) -> torch.optim.Adadelta:
        return torch.optim.Adadelta(network.parameters(), lr=self.settings.learning_rate, rho=self.settings.rho)

    def _step(self, batch: Batch, hole: Tensor) -> dict[str, Tensor]:
        check_size(batch.image, self.image_size)
        if self.phase == "completion":
            loss = terms.masked_mse_loss(self._output(batch, hole), batch.image, hole)
            self._update(generator=loss)
            return {"mse": loss, "generator": loss}
        boxes, real_boxes = batch.windows(self.box_size), batch.real_windows(self.box_size)
        if self.phase == "discriminator":
            with torch.no_grad():
                output = self._output(batch, hole)
            loss = self._discriminator_loss(output, batch.image, boxes, real_boxes)
            self._update(discriminator=loss)
            return {"discriminator": loss}
        output = self._output(batch, hole)
        alpha = self.settings.adversarial_weight
        losses = {"discriminator": alpha * self._discriminator_loss(output.detach(), batch.image, boxes, real_boxes)}
        self._update(discriminator=losses["discriminator"])
        losses["mse"] = terms.masked_mse_loss(output, batch.image, hole)
        losses["adversarial"] = terms.bce_generator_loss(self._judge(output, boxes))
        losses["generator"] = (losses["mse"] + alpha * losses["adversarial"]) / 2
        self._update(generator=losses["generator"])
        return losses

    def _output(self, batch: Batch, hole: Tensor) -> Tensor:
        output: Tensor = self.generator(batch.image, hole).output
        return output

    def _judge(self, image: Tensor, boxes: Sequence[Box]) -> Tensor:
        scores: Tensor = self.discriminator(crop_boxes(image, boxes), image)
        return scores

    def _discriminator_loss(
        self, fake: Tensor, real: Tensor, boxes: Sequence[Box], real_boxes: Sequence[Box]
    ) -> Tensor:
        of_fake = self._judge(fake, boxes)  # first, as published: the batch norms' statistics depend on the order
        return terms.bce_discriminator_loss(self._judge(real, real_boxes), of_fake)
