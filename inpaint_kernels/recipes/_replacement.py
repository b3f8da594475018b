"""What a recipe is, and what it offers for a module."""

from __future__ import annotations

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn


class Form(NamedTuple):
    """A tensor without its values."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    channels_last: bool

    def filled(self, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this form, of random numbers, or of zeros where it holds integers; floats in another dtype."""
        if not self.dtype.is_floating_point:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        values = torch.randn(self.shape, generator=torch.Generator().manual_seed(0))
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return values.to(self.device, dtype or self.dtype).contiguous(memory_format=layout)


def form_of(x: Any) -> Any:
    """The form of a tensor; anything else as it is."""
    if not isinstance(x, Tensor):
        return x
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return Form(x.shape, x.dtype, x.device, last)


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        args: positional arguments.
        kwargs: arguments by name.
        differentiable: which of ``args`` the gradient is taken of.
        gradient: whether one is taken at all: where a few calls' gradients have told enough.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    differentiable: tuple[int, ...] = (0,)
    gradient: bool = True

    def filled(self, dtype: torch.dtype | None = None) -> Call:
        """The call with tensors in place of forms."""
        args = tuple(x.filled(dtype) if isinstance(x, Form) else x for x in self.args)
        kwargs = {name: x.filled(dtype) if isinstance(x, Form) else x for name, x in self.kwargs.items()}
        return dataclasses.replace(self, args=args, kwargs=kwargs)


WARM_UP = "the first call, which the module needs"
"""Why the original forward runs where that is no surprise: it is neither counted nor warned of."""


class Replacement(ABC):
    """Another way to compute what a module computes.

    It holds no tensor and no module, only where they are in the module that it gets: it serves the module's copies too.
    """

    recipe: ClassVar[str]
    """Name of the recipe that offers it."""

    state: frozenset[str] = frozenset()
    """Attributes of the module that its forward changes; the replacement changes them likewise."""

    discrete_outputs: tuple[int, ...] = ()
    """Results made of an argmax, which ties may decide otherwise: a share of their pixels may differ."""

    warms_up: ClassVar[bool] = False
    """Whether the module's own forward must have run once; :meth:`kinds` says ``WARM_UP`` then."""

    covers_all: ClassVar[bool] = False
    """Whether no module inside is called any more, whatever :meth:`covered` says."""

    @abstractmethod
    def semantics(self) -> str:
        """What it takes the module for, in words for the report."""

    @abstractmethod
    def kinds(self, module: nn.Module, *args: Any, **kwargs: Any) -> frozenset[str] | str:
        """Which kinds of call this is: each is probed, and refused later unless it agreed. Or why it cannot run."""

    @abstractmethod
    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the module's forward returns, and does to the module."""

    def covered(self) -> tuple[str, ...]:
        """Paths of the modules inside, "" for the module itself, whose own calls no longer happen."""
        return ("",)

    def device(self, module: nn.Module) -> str:
        """Type of the device that the module computes on."""
        return device_of(module).type


class Recipe(ABC):
    """How to recognise one family of modules."""

    name: ClassVar[str]

    uses_example: ClassVar[bool] = False
    """Whether :meth:`calls` are other ones with an example."""

    @property
    def family(self) -> str:
        """Recipes of one family make the same calls of the same module."""
        return type(self).__name__

    @abstractmethod
    def mismatch(self, module: nn.Module) -> str:
        """Why the module's structure does not belong to the family; empty if it may."""

    @abstractmethod
    def calls(self, module: nn.Module, dtype: torch.dtype, example: Call | None) -> Sequence[Call]:
        """Calls that tell the family's members apart; the first must be an ordinary one.

        Args:
            module: any module without :meth:`mismatch`.
            dtype: of the floating arguments.
            example: a real call of the module, forms in place of its tensors.
        """

    @abstractmethod
    def candidates(self, module: nn.Module, call: Call, output: Any) -> Iterable[Replacement]:
        """What may compute the same, the likeliest first; ``output`` is the module's own for the ordinary call."""


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter or buffer is; the CPU without any."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def arguments_of(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The call's arguments by name; None if it has others."""
    if len(args) > len(names) or any(name not in names for name in kwargs):
        return None
    return {**dict(zip(names, args, strict=False)), **kwargs}


def is_map(x: Any) -> TypeGuard[Tensor]:
    """Whether ``x`` is an ordinary tensor [B, C, H, W] with something in it."""
    return isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point() and x.numel() > 0 and not x.is_sparse


def probe_map(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int, scale: float = 1) -> Tensor:
    """A random map that has positive and negative parts; the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(device, dtype)


def probe_holes(shape: Sequence[int], dtype: torch.dtype, device: torch.device, kind: str) -> Tensor:
    """A mask [B, 1, H, W], 1 = hole: "none", "all", or "some": a box that differs from sample to sample."""
    mask = torch.zeros(*shape, dtype=dtype) if kind != "all" else torch.ones(*shape, dtype=dtype)
    if kind == "some":
        height, width = shape[-2:]
        for sample in range(shape[0]):
            top, left = height * (1 + 2 * sample) // 8, width * (3 - sample) // 8
            mask[sample, :, top : top + height // 4, left : left + width // 3] = 1
    return mask.to(device)
