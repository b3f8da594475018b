"""The races of coherent_semantic_attention: a square hole in a square map of 512 channels; see the bench."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from benches.harness import Outputs, Provider
from benches.peers import PublishedCSA, csa_checkout
from inpaint_kernels import coherent_semantic_attention
from inpaint_kernels.reference import coherent_semantic_attention as reference

CHANNELS: Final = 512
TOLERANCE: Final = 3e-6
WARM_UP_SIZE: Final = 8
LARGEST_FULLY_GATED_SIZE: Final = 128
CHECKED_QUERIES: Final = 256
UNDECIDED: Final = 4e-6  # two scores so near to each other, relative to the larger, may change places by rounding
REMEMBERED_ROWS: Final = 25  # so many rows later 0.55^rows of a difference are left
PIXELS_PER_POSITION: Final = 8

OURS, PORTABLE, NAIVE, PUBLISHED = "ours", "portable", "naive", "published layer"
BACKENDS: Final = {OURS: "cpu", PORTABLE: "portable"}


# Inputs and the naive loop -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def make_features(size: int) -> Tensor:
    """Smoothed noise and a constant per channel, [1, CHANNELS, size, size]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, CHANNELS, size + 4, size + 4, generator=generator)
    return F.avg_pool2d(noise, 5, stride=1).mul_(5).add_(2 * torch.randn(1, CHANNELS, 1, 1, generator=generator))


def make_flags(size: int) -> Tensor:
    """A quarter of the map, bool [size, size]."""
    flags = torch.zeros(size, size, dtype=torch.bool)
    flags[size // 4 : size // 4 + size // 2, size // 4 : size // 4 + size // 2] = True
    return flags


def naive_attention(x: Tensor, flags: Tensor) -> Tensor:
    """The definition, as somebody would write it in plain PyTorch without the published layer's detours."""
    vectors, masked = x[0].flatten(1).t(), flags.flatten()
    known = vectors[~masked]
    score, found = (vectors[masked] @ (known / (known.norm(dim=1, keepdim=True) + 1e-8)).t()).max(1)
    rows: list[Tensor] = []
    for q, v, k in zip(vectors[masked], score, known[found], strict=True):
        if rows:
            a = q @ rows[-1] / (q.norm() + 1e-8)
            k = (a * rows[-1] + v * k) / (a + v)
        rows.append(k)
    output = vectors.clone()
    output[masked] = torch.stack(rows)
    return output.t().view(x.shape)


# Cases ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CoherentCase:
    """One race: a square map of ``size``, forward alone or with the published gradient.

    Attributes:
        size: side of the map.
        direction: "forward" or "forward+backward".
        peers: folder with checkouts of public code; None: it does not take part.
    """

    size: int
    direction: str
    peers: Path | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.size}x{self.size}-{self.direction}"

    @property
    def gate_is_sampled(self) -> bool:
        return self.size > LARGEST_FULLY_GATED_SIZE

    @property
    def slow(self) -> bool:
        return self.size > 64

    @property
    def race_seconds(self) -> float:
        return 20.0

    @property
    def baseline(self) -> str | None:
        return NAIVE if self.direction == "forward" and not self.gate_is_sampled else None

    @property
    def tolerances(self) -> tuple[float, ...]:
        return (TOLERANCE,) if self.direction == "forward" else (TOLERANCE, TOLERANCE)

    @property
    def provider_names(self) -> list[str]:
        published = [PUBLISHED] if csa_checkout(self.peers) is not None and not self.gate_is_sampled else []
        return [*([NAIVE] if self.baseline else []), OURS, PORTABLE, *published]

    def provider(self, name: str) -> Provider:
        return Provider(
            name,
            run=_runner(self, name),
            expected=functools.partial(_expected, self),
            select=functools.partial(_gated_part, self),
            warm_up=_runner(replace(self, size=WARM_UP_SIZE), name),
        )

    def facts(self) -> Mapping[str, Any]:
        masked = int(make_flags(self.size).sum())
        return {
            "op": "coherent_semantic_attention",
            "case": str(self),
            "size": self.size,
            "pixels_per_position": PIXELS_PER_POSITION,
            "keys": self.size**2 - masked,
            "queries": masked,
            "direction": self.direction,
            "channels": CHANNELS,
            "gigaflops": 2e-9 * CHANNELS * masked * (self.size**2 - masked),
        }


# Providers -----------------------------------------------------------------------------------------------------------


def _runner(case: CoherentCase, name: str) -> Callable[[], Outputs]:
    """Everything that a call needs prepared, so that only the layer itself is timed."""
    x, flags = make_features(case.size), make_flags(case.size)
    if name == PUBLISHED:
        assert case.peers is not None
        layer = PublishedCSA(case.peers)
        layer.set_flags(flags)
        if case.direction == "forward":
            return lambda: (layer.forward(x),)
        return lambda: layer.forward_backward(x, _output_gradient(x.shape))
    attention = naive_attention
    if name in BACKENDS:
        attention = functools.partial(coherent_semantic_attention, backend=BACKENDS[name])
    if case.direction == "forward":
        return functools.partial(_forward, attention, x, flags)
    return functools.partial(_forward_backward, attention, x, flags)


def _forward(attention: Callable[[Tensor, Tensor], Tensor], x: Tensor, flags: Tensor) -> Outputs:
    with torch.no_grad():
        return (attention(x, flags),)


def _forward_backward(attention: Callable[[Tensor, Tensor], Tensor], x: Tensor, flags: Tensor) -> Outputs:
    leaf = x.detach().requires_grad_()
    y = attention(leaf, flags)
    (gradient,) = torch.autograd.grad(y, leaf, _output_gradient(y.shape).to(y))
    return y.detach(), gradient


@functools.lru_cache(maxsize=1)
def _output_gradient(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# The gate ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _expected(case: CoherentCase) -> Outputs:
    """What a provider must return: the reference in float64; of the last map from a search for the checked rows."""
    x, flags = make_features(case.size), make_flags(case.size)
    if case.gate_is_sampled:
        rows = _rows(x, flags)
        q, known = rows[:CHECKED_QUERIES].double(), x[0].flatten(1)[:, ~flags.flatten()].t().double()
        found = ((q @ known.t()) / reference.norm(known)).argmax(1)
        return (reference.generate(q, known[found], "official")[0][_decided(case)],)
    attention = functools.partial(coherent_semantic_attention, backend="reference")
    outputs = (_forward if case.direction == "forward" else _forward_backward)(attention, x.double(), flags)
    return _gated_part(case, outputs)


def _gated_part(case: CoherentCase, outputs: Outputs) -> Outputs:
    rows = _rows(outputs[0], make_flags(case.size))[: CHECKED_QUERIES if case.gate_is_sampled else None]
    return (rows[_decided(case)], *outputs[1:])


def _rows(x: Tensor, flags: Tensor) -> Tensor:
    """The vectors of the masked positions, [M, C]."""
    return x[0].flatten(1)[:, flags.flatten()].t()


@functools.lru_cache(maxsize=4)
def _decided(case: CoherentCase) -> Tensor:
    """The checked rows that no rounding of a score changes: one of 4,096 queries may have two best keys to rounding."""
    x, flags = make_features(case.size), make_flags(case.size)
    known = x[0].flatten(1)[:, ~flags.flatten()].t().double()
    queries = _rows(x, flags)[: CHECKED_QUERIES if case.gate_is_sampled else None].double()
    inverse_norm = 1 / reference.norm(known)
    best = torch.cat([((q @ known.t()) * inverse_norm).topk(2, 1).values for q in queries.split(512)])
    near = (best[:, 0] - best[:, 1]) < UNDECIDED * best[:, 0]
    reach = F.max_pool1d(F.pad(near.float()[None, None], (REMEMBERED_ROWS - 1, 0)), REMEMBERED_ROWS, stride=1)
    return reach[0, 0] == 0
