"""The whole training step of DeepFill v1, critics and optimisers too: ours beside daa233's trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
from inpaint_kernels.models import Box, DeepFillV1
from inpaint_kernels.models.random_masks import box_masks
from inpaint_kernels.models.training import Batch, DeepFillV1Training
from torch import Tensor

from benches.harness import FLOAT32, Outputs, Provider, products_in
from benches.peer_models import unit_image
from benches.peers import as_written_for, find_checkout, make_constants_on
from benches.published_race import OURS, PUBLISHED, PublishedRace
from benches.published_trainer import REPOSITORY, PublishedTrainer

CYCLE: Final = 5
"""Steps of the critics for one of the generator."""
TOLERANCE: Final = 5e-2
"""Of the first cycle's losses: tf32 rounds them, and Adam's first steps are the signs of gradients."""


@dataclass(frozen=True)
class TrainerCase(PublishedRace):
    """One race: steps of the whole trainer on one batch; times are those of a step in the mean over a cycle.

    Attributes:
        size: side of the images.
        batch: images.
        folder: where the checkouts are.
        device: where the step is made.
        precision: "float32" or "tf32" (products of float32 maps).
    """

    size: int
    batch: int
    folder: Path = field(repr=False)
    device: str = "cuda"
    precision: str = FLOAT32

    def __str__(self) -> str:
        return f"deepfill_v1-daa233-trainer-{self.size}-batch{self.batch}-{self.precision}"

    @property
    def tolerances(self) -> tuple[float, ...]:
        return (TOLERANCE,)

    @property
    def provider_names(self) -> tuple[str, ...]:
        return (PUBLISHED, OURS)  # its critics refuse maps in channels_last

    @property
    def window(self) -> Box:
        """What the local critic sees, of the published share of the image."""
        side = self.size // 2
        return Box(side // 4, side // 2, side // 4 + side, side // 2 + side)

    @property
    def hole(self) -> Box:
        top, left, bottom, right = self.window
        inset = self.size // 16
        return Box(top + inset, left + inset, bottom - inset, right - inset)

    def runner(self, name: str) -> Callable[[], Outputs]:
        """Makes a cycle of steps with every call; returns the losses of the first."""
        return _FirstCycle(self, functools.partial(_our_steps if name == OURS else _published_steps, self))

    def provider(self, name: str) -> Provider:
        expected = functools.partial(_expected, self)
        return Provider(name, self.runner(name), expected, scale=1 / CYCLE, device=self.device)

    def facts(self) -> Mapping[str, Any]:
        return {
            "op": "training",
            "case": str(self),
            "model": "deepfill_v1-daa233",
            "repository": REPOSITORY,
            "size": self.size,
            "batch": self.batch,
            "direction": "step of the whole trainer",
            "precision": self.precision,
        }


Step = Callable[[bool], Sequence[Tensor]]
"""(whether the generator steps too) -> the losses that optimisers went down."""


class _FirstCycle:
    """Makes a cycle of steps with every call, and returns the losses of the first one, which are what can be compared.

    Args:
        case: of the race.
        start: makes the trainer, in its initial state.
    """

    def __init__(self, case: TrainerCase, start: Callable[[], Step]) -> None:
        self._case, self._start = case, start
        self._step: Step | None = None
        self._first: Outputs | None = None

    def __call__(self) -> Outputs:
        if self._step is None:
            self._step = self._start()
        with products_in(self._case.precision):
            losses = [loss for i in range(CYCLE) for loss in self._step(i == CYCLE - 1)]
        if self._first is None:
            self._first = (torch.stack(losses),)
        return self._first


@functools.lru_cache(maxsize=1)
def _expected(case: TrainerCase) -> Outputs:
    """The published trainer's own first cycle."""
    return case.runner(PUBLISHED)()


def _batch(case: TrainerCase) -> Batch:
    image = unit_image(case.size, case.batch, 3).to(case.device)
    return Batch(image, box_masks([case.hole], case.size).to(case.device), [case.window])


def _system(case: TrainerCase) -> DeepFillV1Training:
    torch.manual_seed(0)
    model = DeepFillV1("daa233").to(case.device)
    return DeepFillV1Training(model, image_size=case.size, box_size=case.window.size[0])


def _our_steps(case: TrainerCase) -> Step:
    system, batch = _system(case), _batch(case)

    def step(generator_too: bool) -> list[Tensor]:
        losses = system.step(batch)
        return [losses[loss] for loss in ("discriminator", "generator") if generator_too or loss != "generator"]

    return step


def _published_steps(case: TrainerCase) -> Step:
    root = find_checkout(REPOSITORY, case.folder)
    assert root is not None  # or the case would not be there
    system, batch = _system(case), _batch(case)
    side = case.window.size[0]
    published = PublishedTrainer(root, case.size, side)
    trainer = published.trainer.to(case.device)
    for own, network in published.networks.items():
        state = system.networks[own].state_dict()
        network.load_state_dict({key: state[key] for key in network.state_dict()})
    make_constants_on(case.device, trainer)
    trainer.config["cuda"] = case.device != "cpu"

    truth = 2 * batch.image - 1
    masks = batch.mask.to(truth.dtype).expand(case.batch, -1, -1, -1).contiguous()
    known = truth * (1 - masks)
    corners = torch.tensor([(case.window.top, case.window.left, side, side)] * case.batch)

    def step(generator_too: bool) -> list[Tensor]:
        like_ours = {"generator": system.random, "dtype": torch.float64, "device": "cpu"}
        positions = [torch.rand(case.batch, 1, 1, 1, **like_ours).to(truth) for _ in range(2)]
        drawn = mock.patch.object(torch, "rand", lambda *_, positions=positions: positions.pop(0))
        with as_written_for(truth) if case.device == "cpu" else nullcontext(), drawn:
            losses = published.losses(known, corners, masks, truth, generator_too)
        published.step(losses)
        return [losses[name].detach() for name in ("d", "g") if name in losses]

    return step
