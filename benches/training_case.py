"""Cases of bench_training.py: a generator's training step, ours beside the public network with the same weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # 140 MiB, which every optimiser of torch brings with its first step; no network's own memory
from torch import Tensor, nn

from benches.harness import BFLOAT16, FLOAT32, Outputs, products_in
from benches.peer_models import one_hole_mask, tensors_in, unit_image
from benches.published_models import PublishedModel, published_model
from benches.published_race import OURS, PUBLISHED_LAST, PublishedRace


@dataclass(frozen=True)
class TrainingCase(PublishedRace):
    """One race: forward, L1 of all pictures that the network paints, and the gradients of its parameters.

    Attributes:
        name: of the pair, see published_models.py.
        size: side of the images.
        batch: images, with one hole for all: public attentions take the first one's.
        folder: where the checkouts are.
        device: where the step is made.
        precision: "float32", "tf32" (products of float32 maps), "bfloat16" (autocast).
    """

    name: str
    size: int
    batch: int
    folder: Path = field(repr=False)
    device: str = "cpu"
    precision: str = FLOAT32

    def __str__(self) -> str:
        return f"{self.name}-{self.size}-batch{self.batch}"

    @property
    def pair(self) -> PublishedModel:
        return published_model(self.name)

    @property
    def slow(self) -> bool:
        return self.batch * self.size**2 > 4 * 256**2

    @property
    def race_seconds(self) -> float:
        return 60.0

    def runner(self, name: str) -> Callable[[], Outputs]:
        return _runner(self, name)

    def facts(self) -> Mapping[str, Any]:
        return {
            "op": "training",
            "case": str(self),
            "model": self.name,
            "repository": self.pair.peer.repository,
            "size": self.size,
            "batch": self.batch,
            "direction": "training step of the generator",
        }


def _runner(case: TrainingCase, name: str) -> Callable[[], Outputs]:
    pair = case.pair
    network = pair.load_published(case.folder, case.device)
    image = unit_image(case.size, case.batch, 1).to(case.device)
    mask = one_hole_mask(case.size, case.batch, 2).to(case.device)
    if name == OURS:
        model = pair.build()
        model.load_state_dict(pair.convert(network.state_dict()))
        guidance = pair.guidance(image, mask)
        model.to(case.device).train()
        return functools.partial(_step, case, model, lambda: _paint(model, image, mask, guidance), image)
    if name == PUBLISHED_LAST:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inputs = pair.arguments(image, mask)
    network.train()
    return functools.partial(_step, case, network, lambda: _paint_published(pair, network, inputs, image), image)


def _step(case: TrainingCase, network: nn.Module, paint: Callable[[], Sequence[Tensor]], image: Tensor) -> Outputs:
    """The final picture, after the backward pass."""
    network.zero_grad(set_to_none=True)
    with products_in(case.precision):
        with torch.autocast(case.device, torch.bfloat16, enabled=case.precision == BFLOAT16):
            pictures = paint()
        torch.stack([(picture - image).abs().mean() for picture in pictures]).sum().backward()
    return (pictures[-1].detach(),)


def _paint(model: Any, image: Tensor, mask: Tensor, guidance: dict[str, Tensor]) -> Sequence[Tensor]:
    result = model(image, mask, **guidance)
    return [result.output] if result.coarse is None else [result.coarse, result.output]


def _paint_published(pair: PublishedModel, network: nn.Module, inputs: Any, image: Tensor) -> Sequence[Tensor]:
    with pair.peer.running(image):
        outputs = tensors_in(network(*inputs))
    return [pair.picture(output) for output in outputs[: 1 + pair.coarse]]
