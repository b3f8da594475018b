"""What the training of every system shares: a batch, settings, networks with their optimisers, one step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from inpaint_kernels.models._boxes import Box
from inpaint_kernels.models._interface import InpaintingModel
from torch import Tensor, nn

from inpaint_kernels._checks import check_choice, check_range, check_same_device

N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class Batch:
    """Images of one step, with their holes.

    Attributes:
        image: [B, 3, H, W] RGB in [0, 1], whole.
        mask: [B or 1, 1, H, W], bool, uint8 or floating; hole where it is larger than 0.5.
        boxes: windows of one size around the holes, that a local discriminator sees; one for each image or one for all.
            DeepFill v1 and GLCIC alone.
        real_boxes: the same, of the images that GLCIC's discriminators see as real; None: ``boxes``.
        sketch: [B or 1, 1, H, W] in [0, 1], lines that guide DeepFill v2.
        edges: [B or 1, 1, H, W], 1 on edges of the whole image, for EdgeConnect; None: Canny's.
    """

    image: Tensor
    mask: Tensor
    boxes: Sequence[Box] | None = None
    real_boxes: Sequence[Box] | None = None
    sketch: Tensor | None = None
    edges: Tensor | None = None

    def windows(self, size: int) -> list[Box]:
        """``boxes``, which must be there, of that side and inside the image."""
        return self._checked("boxes", self.boxes, size)

    def real_windows(self, size: int) -> list[Box]:
        """``real_boxes``, in their absence ``boxes``."""
        return self.windows(size) if self.real_boxes is None else self._checked("real_boxes", self.real_boxes, size)

    def _checked(self, name: str, boxes: Sequence[Box] | None, size: int) -> list[Box]:
        batch, _, height, width = self.image.shape
        expected = f"{name}: expected 1 or {batch} windows of {size} x {size} inside {height} x {width} pixels, got"
        if boxes is None or len(boxes) not in (1, batch):
            raise ValueError(f"{expected} {'None' if boxes is None else len(boxes)}")
        windows = [Box(*box) for box in boxes]
        for box in windows:
            inside = min(box.top, box.left) >= 0 and box.bottom <= height and box.right <= width
            if box.size != (size, size) or not inside:
                raise ValueError(f"{expected} {tuple(box)}")
        return windows


@dataclass(frozen=True)
class Settings:
    """Of a system's training. Numbers are weights, rates and counts, none below 0.

    Attributes:
        learning_rate: of the generators.
    """

    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                check_range(field.name, value, minimum=0)


@dataclass(frozen=True)
class AdamSettings(Settings):
    """Of a system that Adam trains.

    Attributes:
        betas: decays of Adam's running means.
    """

    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {self.betas}")
        for beta in self.betas:
            check_range("betas", beta, minimum=0, maximum=1)


class TrainingSystem:
    """Networks in training, their optimisers, and one :meth:`step`.

    A subclass says what a step does. Networks keep the device and dtype that they have; images must have the same.

    Args:
        model: with the generators.
        networks: all that are trained, by name.
        optimizers: by name.
        seed: of the random numbers that a step draws, the same on every device.

    Attributes:
        model: as given.
        networks: as given.
        optimizers: as given.
        random: what the steps draw from, on the CPU.
        steps: number of steps made.
        phase: one of :attr:`phases`; may be changed between two steps.
        rate_factor: on the learning rates of all optimisers; may be changed between two steps.
        scaler: of the losses, for training in float16; None: they are taken as they are.
        reduce_gradients: called with the parameters whose gradients are complete, before an optimiser steps: for
            gradients that several processes share. None: nothing is done.
    """

    phases: ClassVar[tuple[str, ...]] = ("training",)
    """Names of what is trained one after another; a new system is in the first."""

    def __init__(
        self,
        model: InpaintingModel,
        networks: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        seed: int,
    ) -> None:
        check_range("seed", seed, minimum=0, integer=True)
        self.model = model
        self.networks, self.optimizers = dict(networks), dict(optimizers)
        self.steps = 0
        self.random = torch.Generator().manual_seed(seed)
        self.scaler: torch.amp.GradScaler | None = None
        self.reduce_gradients: Callable[[Iterable[nn.Parameter]], None] | None = None
        self._phase = self.phases[0]
        self._rate_factor = 1.0
        self._rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}
        self._part, self._parts = 0, 1

    @property
    def phase(self) -> str:
        """See the class."""
        return self._phase

    @phase.setter
    def phase(self, name: str) -> None:
        check_choice("phase", name, self.phases)
        self._phase = name
        self._enter_phase()

    @property
    def rate_factor(self) -> float:
        """See the class."""
        return self._rate_factor

    @rate_factor.setter
    def rate_factor(self, factor: float) -> None:
        check_range("rate_factor", factor, minimum=0)
        self._rate_factor = factor
        self._set_rates()

    def step(self, *batches: Batch) -> dict[str, Tensor]:
        """Train on one batch, or on several whose gradients are averaged before any network changes.

        Args:
            batches: images on the device and in the dtype of the networks. Of several, each is taken through the
                networks by itself, in the memory of one; a generator is then judged by the discriminators as they were
                before the step, also where a single batch would meet them after it.

        Returns:
            Losses by name, scalars without graph, as they were before the step, means over the batches; each without
            its weight, but for the sums "generator" and "discriminator", which are what the optimisers of these names
            went down.

        Raises:
            ValueError, TypeError: something of a batch is missing or does not fit; the message names it. Networks
                and optimisers are then as before.
        """
        if not batches:
            raise ValueError("batches: expected at least one, got none")
        holes = [self._checked_hole(batch) for batch in batches]
        for network in self.networks.values():
            network.train()
        sums: dict[str, Tensor] = {}
        with torch.enable_grad():
            for self._part, (batch, hole) in enumerate(zip(batches, holes, strict=True)):
                self._parts = len(batches)
                for name, loss in self._step(batch, hole).items():
                    sums[name] = sums[name] + loss.detach() if name in sums else loss.detach()
        if self.scaler is not None:
            self.scaler.update()
        self.steps += 1
        return {name: loss / len(batches) for name, loss in sums.items()}

    def _checked_hole(self, batch: Batch) -> Tensor:
        hole = self.model.checked_hole(batch.image, batch.mask)
        parameter = next(self.model.parameters())
        if batch.image.dtype != parameter.dtype:
            raise TypeError(f"image: expected the networks' {parameter.dtype}, got {batch.image.dtype}")
        check_same_device(image=batch.image, networks=parameter)
        return hole

    def _step(self, batch: Batch, hole: Tensor) -> dict[str, Tensor]:
        """One step of all that the phase trains."""
        raise NotImplementedError

    def _enter_phase(self) -> None:
        """What changes with the phase."""

    def _set_rates(self) -> None:
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self._rate_factor * self._rates[name]

    def _update(self, **losses: Tensor) -> None:
        """One step of each optimiser named, down its own loss; all gradients are taken before the first one steps.

        Parameters that a loss does not depend on have no gradient, and stay. Of several batches, the gradients of the
        first ones are added up, and the optimisers step with the last one.
        """
        first, last = self._part == 0, self._part == self._parts - 1
        for name, loss in losses.items():
            if first:
                self.optimizers[name].zero_grad(set_to_none=True)
            share = loss / self._parts
            (share if self.scaler is None else self.scaler.scale(share)).backward(inputs=self._trained_by(name))
        if not last:
            return
        for name in losses:
            if self.reduce_gradients is not None:
                self.reduce_gradients(self._trained_by(name))
            if self.scaler is None:
                self.optimizers[name].step()
            else:
                self.scaler.step(self.optimizers[name])

    def _trained_by(self, optimizer: str) -> list[nn.Parameter]:
        return [parameter for group in self.optimizers[optimizer].param_groups for parameter in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on but the settings and frozen features; tensors, numbers and strings."""
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "random": self.random.get_state(),
            "steps": self.steps,
            "phase": self.phase,
            "rate_factor": self.rate_factor,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; the steps that follow are the same, bit for bit.

        Raises:
            ValueError, RuntimeError: it is the state of another system, or of networks of other sizes.
        """
        own = self.state_dict()
        for path, expected, got in (
            ("state", own, state),
            ("state['networks']", own["networks"], state.get("networks", {})),
            ("state['optimizers']", own["optimizers"], state.get("optimizers", {})),
        ):
            if set(got) != set(expected):
                raise ValueError(
                    f"{path}: expected {', '.join(sorted(expected))}, got {', '.join(sorted(got)) or 'nothing'}"
                )
        self.phase = state["phase"]
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.random.set_state(state["random"])
        self.steps, self._rate_factor = state["steps"], state["rate_factor"]


def adam(networks: Sequence[nn.Module], settings: AdamSettings, factor: float = 1.0) -> torch.optim.Adam:
    """Adam of all parameters of these networks, at ``factor`` times the rate of the settings."""
    parameters = [parameter for network in networks for parameter in network.parameters()]
    return torch.optim.Adam(parameters, lr=factor * settings.learning_rate, betas=settings.betas)


def like(network: N, other: nn.Module) -> N:
    """The network on the device and in the dtype of another one."""
    parameter = next(other.parameters())
    return network.to(device=parameter.device, dtype=parameter.dtype)


def check_size(image: Tensor, size: int) -> None:
    """Raises ValueError unless images have that side, for which a discriminator with a linear layer was made."""
    if tuple(image.shape[2:]) != (size, size):
        got = " x ".join(map(str, image.shape[2:]))
        raise ValueError(f"image: expected {size} x {size}, the image_size of the discriminators, got {got}")
