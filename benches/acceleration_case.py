"""Cases of bench_acceleration.py: whole public networks as they are, and after ``accelerate``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benches.harness import Outputs, Provider
from benches.peer_models import PEER_MODELS, Inputs, PeerModel, tensors_in
from inpaint_kernels import accelerate

PUBLISHED, PUBLISHED_LAST, OURS = "published", "published channels_last", "ours"

# With random weights many attention scores are equal to rounding, and which key wins changes a patch: of DeepFill v2 at
# 512 x 512 the published network in its two layouts differs by 0.7 % of the norm, by 37 % in the worst pixel. So means
# of POOL x POOL pixels are the gate; tests/test_acceleration_peers.py compares all pixels and gradients in float64.
POOL, TOLERANCE = 16, 5e-2


@dataclass(frozen=True)
class AccelerationCase:
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

    @property
    def race_seconds(self) -> float:
        return 45.0

    @property
    def baseline(self) -> str | None:
        return PUBLISHED

    @property
    def tolerances(self) -> tuple[float, ...]:
        return (TOLERANCE,)

    @property
    def provider_names(self) -> tuple[str, ...]:
        return (PUBLISHED, PUBLISHED_LAST, OURS)

    def provider(self, name: str) -> Provider:
        return Provider(name, run=_runner(self, name), expected=functools.partial(_expected, self), select=means)

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


@functools.lru_cache(maxsize=1)
def _expected(case: AccelerationCase) -> Outputs:
    """The published network's own results, as a gate for the others; its own race passes with an error of 0."""
    return means(_runner(case, PUBLISHED)())


def means(outputs: Outputs) -> Outputs:
    """What is compared of pictures."""
    return tuple(F.avg_pool2d(output, POOL) for output in outputs)
