"""Cases of bench_acceleration.py: whole public networks as they are, and after ``accelerate``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benches.harness import Outputs
from benches.peer_models import PEER_MODELS, Inputs, PeerModel, tensors_in
from benches.published_race import OURS, PUBLISHED_LAST, PublishedRace
from inpaint_kernels import accelerate


@dataclass(frozen=True)
class AccelerationCase(PublishedRace):
    """One race: a generator on square images, inference or a training step.

    Attributes:
        name: of the network, see peer_models.py.
        size: side of the images.
        step: "inference", or "training step": forward, backward of an L1 loss, and the gradients.
        folder: where the checkouts are.
    """

    name: str
    size: int
    step: str
    folder: Path = field(repr=False)

    def __str__(self) -> str:
        return f"{self.name}-{self.size}-{self.step.replace(' ', '-')}"

    @property
    def peer(self) -> PeerModel:
        return next(peer for peer in PEER_MODELS if peer.name == self.name)

    @property
    def slow(self) -> bool:
        return self.size > 256

    def runner(self, name: str) -> Callable[[], Outputs]:
        return _runner(self, name)

    def facts(self) -> Mapping[str, Any]:
        return {
            "op": "accelerate",
            "case": str(self),
            "model": self.name,
            "repository": self.peer.repository,
            "size": self.size,
            "direction": self.step,
        }


def _runner(case: AccelerationCase, name: str) -> Callable[[], Outputs]:
    model = case.peer.load(case.folder, case.size if case.name == "csa" else None)
    model.train(case.step != "inference")
    inputs = case.peer.inputs(case.size, 1, 1)
    if name == PUBLISHED_LAST:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = _in_channels_last(inputs)
    if name == OURS:
        # One line; the example is small, as that of somebody in a hurry.
        with case.peer.running(torch.zeros(())):
            accelerate(model, case.peer.inputs(256, 1, 1))
    step = _inference if case.step == "inference" else _training_step
    return functools.partial(step, case.peer, model, inputs)


def _in_channels_last(inputs: Inputs) -> Inputs:
    return tuple(
        part.contiguous(memory_format=torch.channels_last) if isinstance(part, Tensor) else _in_channels_last(part)
        for part in inputs
    )


def _inference(peer: PeerModel, model: nn.Module, inputs: Inputs) -> Outputs:
    with torch.no_grad(), peer.running(torch.zeros(())):
        return (_last_image(model(*inputs)),)


def _training_step(peer: PeerModel, model: nn.Module, inputs: Inputs) -> Outputs:
    """The final image, after the backward pass."""
    model.zero_grad(set_to_none=True)
    with peer.running(torch.zeros(())):
        images = [output for output in tensors_in(model(*inputs)) if output.requires_grad]
        sum(image.abs().mean() for image in images).backward()  # type: ignore[union-attr]
    return (images[-1].detach(),)


def _last_image(outputs: Any) -> Tensor:
    return [output for output in tensors_in(outputs) if output.is_floating_point() and output.shape[1] in (1, 3)][-1]
