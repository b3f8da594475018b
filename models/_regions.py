"""From the pixels that are wanted back to those that are needed: boxes walked through layers, last layer first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from inpaint_kernels.models._boxes import Box
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Span(NamedTuple):
    """Along one axis: how a layer makes some outputs from a part of its input.

    Attributes:
        begin: first input that is read.
        end: behind the last one.
        before: border in front of that part, where it reaches over the map's edge.
        after: the same behind it.
        skip: outputs of that part in front of the first wanted one.
    """

    begin: int
    end: int
    before: int
    after: int
    skip: int


class Window(NamedTuple):
    """Which inputs an output of a convolution sees along one axis; padding in pixels of the enlarged input.

    Attributes:
        kernel: taps.
        stride: from output to output.
        dilation: from tap to tap.
        before: padding in front of the map.
        after: padding behind it.
        upsample: every input is so many equal ones first.
        reflect: the padding mirrors the map.
    """

    kernel: int
    stride: int
    dilation: int
    before: int
    after: int
    upsample: int = 1
    reflect: bool = False

    def span(self, begin: int, end: int, size: int) -> Span:
        """What outputs ``begin`` to ``end`` (exclusive) need of a map of ``size`` inputs."""
        size *= self.upsample
        first = begin * self.stride - self.before
        last = (end - 1) * self.stride - self.before + (self.kernel - 1) * self.dilation
        before, after = max(-first, 0), max(last + 1 - size, 0)
        low, high = max(first, 0), min(last, size - 1)
        if self.reflect:  # the pixels that the border mirrors are read too
            high = max(high, before)
            low = min(low, size - 1 - after)
        if before == 0:  # the first output of the part is one of the map's, and no pixel is enlarged in part
            while (first - low) % self.stride or low % self.upsample:
                low -= 1
        skip = 0 if before else (first - low) // self.stride
        return Span(low // self.upsample, high // self.upsample + 1, before, after, skip)


class Part(NamedTuple):
    """How a layer computes the box that is wanted of it."""

    rows: Span
    columns: Span
    wanted: Box

    @property
    def source(self) -> Box:
        """What it reads of its input."""
        return Box(self.rows.begin, self.columns.begin, self.rows.end, self.columns.end)

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """(top, bottom, left, right)."""
        return self.rows.before, self.rows.after, self.columns.before, self.columns.after

    def crop(self, y: Tensor) -> Tensor:
        """The wanted box of what the layer made of its source."""
        height, width = self.wanted.size
        return y[:, :, self.rows.skip : self.rows.skip + height, self.columns.skip : self.columns.skip + width]


class Layer(Protocol):
    """A layer whose outputs see a window of its input."""

    @property
    def channels(self) -> int:
        """Of its output."""

    @property
    def products(self) -> int:
        """Multiply-adds for one pixel of its output, all channels together."""

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of its output."""

    def part(self, wanted: Box, size: tuple[int, int]) -> Part:
        """How it computes a box of its output for a map of ``size``."""

    def __call__(self, x: Tensor, part: Part | None = None) -> Tensor:
        """Its output for a whole map; or the part's box of it, for the part's source alone."""


@dataclass(frozen=True)
class Plan:
    """How a chain computes a box of its output.

    Attributes:
        source: what it reads of its input.
        parts: each layer's part, by name, first layer first.
        multiply_adds: that it takes.
    """

    source: Box
    parts: Mapping[str, Part]
    multiply_adds: int

    @property
    def boxes(self) -> dict[str, Box]:
        """What each layer computes, by name."""
        return {name: part.wanted for name, part in self.parts.items()}


_keeps: ContextVar[bool] = ContextVar("keeps", default=True)


def keeps_for_gradients() -> bool:
    """Whether what is computed now is kept for a gradient, and could be less; a compiler decides that itself."""
    return torch.is_grad_enabled() and _keeps.get() and not torch.compiler.is_compiling()


class Chain:
    """Layers that run one after the other, on whole maps or on what a box of the output needs.

    Args:
        layers: by name, first layer first; they belong to the network.
        recomputed: groups of neighbours, whose maps between them are not kept for the gradient, but computed again. For
            large maps of few products, in layers that give the same when run twice.
    """

    def __init__(self, layers: Mapping[str, Layer], recomputed: Sequence[Sequence[str]] = ()) -> None:
        self.layers, self.recomputed = dict(layers), recomputed

    def plan(self, wanted: Box, size: tuple[int, int]) -> Plan:
        """How to compute a box of the output for a map of ``size``."""
        sizes = []
        for layer in self.layers.values():
            sizes.append(size)
            size = layer.output_size(size)
        parts: dict[str, Part] = {}
        work = 0
        for (name, layer), size in zip(reversed(self.layers.items()), reversed(sizes), strict=True):
            parts[name] = layer.part(wanted, size)
            work += wanted.area * layer.products
            wanted = parts[name].source
        return Plan(wanted, dict(reversed(parts.items())), work)

    def multiply_adds(self, size: tuple[int, int]) -> int:
        """What the whole output takes for a map of ``size``."""
        work = 0
        for layer in self.layers.values():
            size = layer.output_size(size)
            work += size[0] * size[1] * layer.products
        return work

    def __call__(self, x: Tensor, plan: Plan | None = None) -> Tensor:
        """The output for a whole map; or the plan's box of it, for the plan's source alone."""
        most_bytes = working_bytes()
        if plan is None and most_bytes is not None:
            return self._in_strips(x, most_bytes)
        return self._at_once(x, plan)

    def run(self, x: Tensor, plan: Plan | None) -> Tensor:
        """The same in channels_last, for a whole map in either case: what the plan does not read is left away."""
        source = x if plan is None else plan.source.of(x)
        return self(source.contiguous(memory_format=torch.channels_last), plan)

    def _at_once(self, x: Tensor, plan: Plan | None) -> Tensor:
        names = list(self.layers)
        while names:
            group = next((group for group in self.recomputed if names[0] == group[0]), names[:1])
            if len(group) > 1 and keeps_for_gradients():
                x = checkpoint(self._run_again, group, x, plan, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self._run(group, x, plan)
            del names[: len(group)]
        return x

    def _run(self, names: Sequence[str], x: Tensor, plan: Plan | None) -> Tensor:
        for name in names:
            x = self.layers[name](x, None if plan is None else plan.parts[name])
        return x

    def _run_again(self, names: Sequence[str], x: Tensor, plan: Plan | None) -> Tensor:
        """As the checkpoint has it run twice: all is kept, of the second time."""
        token = _keeps.set(False)
        try:
            return self._run(names, x, plan)
        finally:
            _keeps.reset(token)

    def _in_strips(self, x: Tensor, most_bytes: int) -> Tensor:
        """The same for a whole map, large maps never whole: stage by stage, each of them strip by strip."""
        for stage, is_large in self._stages((x.shape[2], x.shape[3])):
            strips = stage._strips(x, most_bytes) if is_large else []
            if len(strips) > 1:
                x = stage._strip_by_strip(x, strips)
                continue
            for layer in stage.layers.values():  # not by a method, in which the stage's input would stay alive
                x = layer(x)
        return x

    def _stages(self, size: tuple[int, int]) -> list[tuple[Chain, bool]]:
        """This chain cut where maps get small and where they get large again; with whether a part has large ones.

        Strips of small maps would save nothing: the stage's input and output are as large as any map in it.
        """
        sizes = [size]
        for layer in self.layers.values():
            sizes.append(layer.output_size(sizes[-1]))
        largest = max(height * width for height, width in sizes)
        small = [height * width * _SMALL <= largest for height, width in sizes]
        stages: list[tuple[Chain, bool]] = []
        for i, (name, layer) in enumerate(self.layers.items()):
            is_large = not (small[i] and small[i + 1])
            if not stages or is_large != stages[-1][1] or (is_large and small[i]):
                stages.append((Chain({}), is_large))
            stages[-1][0].layers[name] = layer
        return stages

    def _strip_by_strip(self, x: Tensor, strips: Sequence[Box]) -> Tensor:
        size = (x.shape[2], x.shape[3])
        result: Tensor | None = None
        height, width = strips[-1].bottom, strips[-1].right
        for strip in strips:
            plan = self.plan(strip, size)
            part = self._at_once(plan.source.of(x), plan)
            if result is None:
                shape = (part.shape[0], part.shape[1], height, width)
                result = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)
            strip.of(result).copy_(part)
        assert result is not None
        return result

    def _strips(self, x: Tensor, most_bytes: int) -> list[Box]:
        """Boxes of whole rows of the output, whose layers hold about ``most_bytes`` at most."""
        size, channels, most = (x.shape[2], x.shape[3]), x.shape[1], 0
        for layer in self.layers.values():
            before = channels * size[0] * size[1]
            size, channels = layer.output_size(size), layer.channels
            most = max(most, before + channels * size[0] * size[1])
        count = -(-most * x.shape[0] * x.element_size() // most_bytes)
        rows = max(-(-size[0] // count), _FEWEST_ROWS)
        return Box(0, 0, *size).strips(rows)


# Working memory -------------------------------------------------------------------------------------------------------

_SMALL = 8
"""How many times the pixels of a small map the largest one has, at least."""
_FEWEST_ROWS = 16
"""Of a strip: with fewer, most of what is computed is what its neighbours compute too."""

_most_bytes: ContextVar[int | None] = ContextVar("most_bytes", default=None)


@contextmanager
def working_memory(most_bytes: int | None) -> Iterator[None]:
    """Inside, networks that record no gradients compute large maps in strips.

    Args:
        most_bytes: what the layers of a strip hold at a time, about; None: maps are computed whole.
    """
    token = _most_bytes.set(most_bytes)
    try:
        yield
    finally:
        _most_bytes.reset(token)


def working_bytes() -> int | None:
    """What :func:`working_memory` allows; None where maps are to be computed whole."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    return _most_bytes.get()


def pasted(painted: Iterable[Tensor], whole: Tensor, boxes: Sequence[Box] | None) -> Tensor:
    """A copy of the whole maps with what was painted in each box; without boxes, that is all of them, once."""
    if boxes is None:
        (everything,) = painted
        return everything.contiguous()
    result = whole.clone()
    for part, box in zip(painted, boxes, strict=True):
        box.of(result).copy_(part)
    return result
