"""daa233's trainer of DeepFill v1, for images of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from benches.peers import import_module

REPOSITORY: Final = "daa233/generative-inpainting-pytorch"


class PublishedTrainer:
    """The published trainer, and the step of its train.py.

    Args:
        checkout: of :data:`REPOSITORY`.
        size: side of the images.
        box: side of what the local critic sees.
        l1_weight: of its L1 losses: the first stage's, those of the windows and of what is known.

    Attributes:
        trainer: the public module.
        networks: generator and critics, by our names.
    """

    def __init__(self, checkout: Path, size: int, box: int, l1_weight: float = 1.2) -> None:
        module = import_module(checkout, "trainer", stand_ins=("torchvision", "yaml"))
        self._l1_weight = l1_weight
        self.trainer = module.Trainer(
            {
                "cuda": False,
                "gpu_ids": [],
                "lr": 1e-4,
                "beta1": 0.5,
                "beta2": 0.9,
                "netG": {"input_dim": 3, "ngf": 32},
                "netD": {"input_dim": 3, "ndf": 64},
                "global_wgan_loss_alpha": 1.0,
                "coarse_l1_alpha": l1_weight,
                "spatial_discounting_gamma": 0.9,
                "discounted_mask": True,
                "mask_shape": [box, box],
            }
        )
        # Their last layers are as large as images of 256 need.
        self.trainer.globalD.linear = nn.Linear(256 * (size // 16) ** 2, 1)
        self.trainer.localD.linear = nn.Linear(256 * (box // 16) ** 2, 1)
        self._critics = [*self.trainer.localD.parameters(), *self.trainer.globalD.parameters()]
        self.trainer.optimizer_d = torch.optim.Adam(self._critics, lr=1e-4, betas=(0.5, 0.9))
        self.networks: dict[str, nn.Module] = {
            "generator": self.trainer.netG,
            "local_critic": self.trainer.localD,
            "global_critic": self.trainer.globalD,
        }

    def losses(
        self, known: Tensor, boxes: Tensor, masks: Tensor, truth: Tensor, generator_too: bool = True
    ) -> dict[str, Tensor]:
        """Its losses, with the sums "d" and, where the generator steps too, "g" that its optimisers go down."""
        losses: dict[str, Tensor]
        losses, _, _ = self.trainer(known, boxes, masks, truth, generator_too)
        losses["d"] = losses["wgan_d"] + losses["wgan_gp"] * 10
        if generator_too:
            l1 = losses["l1"] * self._l1_weight + losses["ae"] * self._l1_weight
            losses["g"] = l1 + losses["wgan_g"] * 0.001
        return losses

    def step(self, losses: dict[str, Tensor]) -> None:
        """Go down these losses. Both gradients are taken before an optimiser steps, as torch demands; there in turn."""
        steps = [("d", self.trainer.optimizer_d, self._critics)]
        if "g" in losses:
            steps.append(("g", self.trainer.optimizer_g, list(self.trainer.netG.parameters())))
        for name, optimizer, parameters in steps:
            optimizer.zero_grad()
            losses[name].backward(inputs=parameters)
        for _, optimizer, _ in steps:
            optimizer.step()
