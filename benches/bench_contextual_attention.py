"""Contextual attention: ours, portable, naive dense PyTorch, the same compiled, public ports, and the bare GEMMs.

C = 128, rate 2, fuse on, float32, f = b, one square hole, two threads. Two families of inputs, because a kernel may
skip probabilities that are exactly zero: in ``peaked`` ones (smoothed ReLU features, as networks produce) the softmax
saturates and most are zero; in ``soft`` ones (the same times 0.05) none is.

Up to 9,216 keys everything runs in one race, public ports in both memory layouts. At 62,500 keys (a 2000x2000 image)
no other implementation fits into memory: ours races the same matrix products alone, through ``aten::mm`` and through
oneDNN, blocked over query rows; of those blocks every fifth runs and the seconds are scaled. 262,144 keys (a 4096x4096
image) are restricted to the queries of a 400x400-pixel hole; its extra memory includes the 512 MiB output.

Above 4,096 keys the gate compares a few output cells with the float64 reference, exactly: a cell depends only on the
queries within three positions of it (and on all keys).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benches.conftest import CLOCK, Race, parametrize_races, peers_folder
from benches.harness import Outputs, Provider
from benches.peers import available_ports, load_port
from inpaint_kernels import contextual_attention
from inpaint_kernels.reference import contextual_attention as reference

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark(timer=CLOCK)

CHANNELS: Final = 128
RATE: Final = 2
FORWARD_TOLERANCE: Final = 3e-5
GRADIENT_TOLERANCE: Final = 1e-4
AMPLITUDE: Final = {"peaked": 1.0, "soft": 0.05}
WARM_UP_SIZE: Final = 16
LARGEST_DENSE_SIZE: Final = 192
LARGEST_FULLY_GATED_SIZE: Final = 128
CHECKED_CELLS: Final = 4
CHECKED_CHANNEL_STEP: Final = 8
CROP_MARGIN: Final = 3
GEMM_ROWS: Final = 500
GEMM_KEYS: Final = 2500
SAMPLE_EVERY: Final = 5

OURS, PORTABLE, NAIVE, COMPILED = "ours", "portable", "naive", "naive compiled"
BACKENDS: Final = {OURS: "cpu", PORTABLE: "portable"}
MEASURED_PORTS: Final = ("daa233", "nipponjo", "mmagic")
CHANNELS_LAST: Final = " channels_last"
MM, ONEDNN = "GEMMs alone (aten::mm)", "GEMMs alone (oneDNN)"

Box = tuple[int, int, int, int]
Gemm = Callable[[Tensor, Tensor, Tensor], None]


# Inputs and the naive op ---------------------------------------------------------------------------------------------


def make_features(size: int, family: str) -> Tensor:
    """Smoothed ReLU features [1, CHANNELS, size, size]."""
    noise = torch.randn(1, CHANNELS, size + 4, size + 4, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(noise, 5, stride=1).mul_(5 * AMPLITUDE[family]).relu_()


def make_mask(size: int) -> Tensor:
    """A hole over the second quarter of each side, [1, 1, size, size]."""
    mask = torch.zeros(1, 1, size, size)
    mask[..., size // 4 : size // 2, size // 4 : size // 2] = 1
    return mask


def naive_attention(features: Tensor, mask: Tensor) -> Tensor:
    """The dense reference behind a minimal front end, as somebody would write the op in plain PyTorch."""
    reduced = features[:, :, ::RATE, ::RATE]
    valid = F.max_pool2d(mask[:, :, ::RATE, ::RATE], 3, stride=1, padding=1)[:, 0] == 0
    return reference.contextual_attention(reduced, reduced, features, valid)[0]


@functools.cache
def compiled_naive_attention() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(naive_attention, dynamic=False)


# Cases ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionCase:
    """One race: square features of ``size``, forward alone or with the gradient of f = b, all queries or a box.

    Attributes:
        size: side of the feature maps.
        direction: "forward" or "forward+backward".
        family: "peaked" or "soft", see the module's docstring.
        queries: box of matching positions (y0, x0, y1, x1); None: all.
        peers: folder with checkouts of public ports; None: they do not take part.
    """

    size: int
    direction: str
    family: str
    queries: Box | None = None
    peers: Path | None = field(default=None, repr=False)

    def __str__(self) -> str:
        restricted = "" if self.queries is None else "-queries"
        return f"{self.size}x{self.size}{restricted}-{self.direction}-{self.family}"

    @property
    def keys(self) -> int:
        return (self.size // RATE) ** 2

    @property
    def stores_scores(self) -> bool:
        """Whether implementations that store every score can run it."""
        return self.size <= LARGEST_DENSE_SIZE and self.queries is None

    @property
    def gate_is_sampled(self) -> bool:
        return self.size > LARGEST_FULLY_GATED_SIZE

    @property
    def slow(self) -> bool:
        return self.size > 128 or (self.size == 128 and self.direction != "forward")

    @property
    def baseline(self) -> str | None:
        return NAIVE if self.stores_scores else None

    @property
    def tolerances(self) -> tuple[float, ...]:
        return (FORWARD_TOLERANCE,) if self.direction == "forward" else (FORWARD_TOLERANCE, GRADIENT_TOLERANCE)

    @property
    def provider_names(self) -> list[str]:
        if self.queries is not None:
            return [OURS, PORTABLE]
        if not self.stores_scores:
            return [OURS, MM, ONEDNN]
        # torch.compile's backward of the naive op corrupts memory (torch 2.13, CPU), so it takes part forward only.
        compiled = [COMPILED] if self.direction == "forward" else []
        ports = [name for name in MEASURED_PORTS if name in available_ports(self.peers)]
        return [NAIVE, *compiled, OURS, PORTABLE, *(port + layout for port in ports for layout in ("", CHANNELS_LAST))]

    def provider(self, name: str) -> Provider:
        if name in (MM, ONEDNN):
            run, scale = bare_gemms(self.keys, GEMMS[name])
            return Provider(name, run, expected=None, scale=scale)
        small = replace(self, size=WARM_UP_SIZE, queries=None)
        return Provider(
            name,
            run=_runner(self, name),
            expected=functools.partial(_expected, self, preset_of(name)),
            select=functools.partial(_gated_part, self),
            warm_up=_runner(self if name == COMPILED else small, name),
        )

    def facts(self) -> Mapping[str, Any]:
        queries = self.queries
        return {
            "op": "contextual_attention",
            "case": str(self),
            "size": self.size,
            "keys": self.keys,
            "queries": self.keys if queries is None else (queries[2] - queries[0]) * (queries[3] - queries[1]),
            "direction": self.direction,
            "family": self.family,
            "channels": CHANNELS,
        }


def preset_of(provider: str) -> str:
    """The variant that a provider computes: a port its own, everything else nipponjo's."""
    name = provider.removesuffix(CHANNELS_LAST)
    return name if name in MEASURED_PORTS else "nipponjo"


# Providers -----------------------------------------------------------------------------------------------------------


def _attention(case: AttentionCase, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """(features, mask) -> y of provider ``name``."""
    if name == NAIVE:
        return naive_attention
    if name == COMPILED:
        return compiled_naive_attention()
    if name in BACKENDS:
        backend, queries = BACKENDS[name], case.queries
        return lambda features, mask: contextual_attention(features, features, mask, queries=queries, backend=backend)
    assert case.peers is not None
    port = available_ports(case.peers)[name.removesuffix(CHANNELS_LAST)]
    attention = load_port(port, case.peers)
    return lambda features, mask: attention(features, features, mask)


def _runner(case: AttentionCase, name: str) -> Callable[[], Outputs]:
    """Everything that a call needs prepared, so that only the attention itself is timed."""
    attention = _attention(case, name)
    features = make_features(case.size, case.family)
    if name.endswith(CHANNELS_LAST):
        features = features.contiguous(memory_format=torch.channels_last)
    mask = make_mask(case.size)
    if name not in (NAIVE, COMPILED, *BACKENDS):
        scale = available_ports(case.peers)[name.removesuffix(CHANNELS_LAST)].mask_scale
        mask = F.interpolate(mask, scale_factor=scale)
    if case.direction == "forward":
        return functools.partial(_forward, attention, features, mask)
    return functools.partial(_forward_backward, attention, features, mask)


def _forward(attention: Callable[[Tensor, Tensor], Tensor], features: Tensor, mask: Tensor) -> Outputs:
    with torch.no_grad():
        return (attention(features, mask),)


def _forward_backward(attention: Callable[[Tensor, Tensor], Tensor], features: Tensor, mask: Tensor) -> Outputs:
    leaf = features.detach().requires_grad_()
    y = attention(leaf, mask)
    (gradient,) = torch.autograd.grad(y, leaf, _output_gradient(y.shape).to(y))
    return y.detach(), gradient


@functools.lru_cache(maxsize=1)
def _output_gradient(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# The gate ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _expected(case: AttentionCase, preset: str) -> Outputs:
    """What a provider must return: the reference in float64, on everything or on a few cells."""
    features, mask = make_features(case.size, case.family).double(), make_mask(case.size)

    def attention(features: Tensor, mask: Tensor) -> Tensor:
        return contextual_attention(features, features, mask, preset=preset, backend="reference")

    if case.gate_is_sampled:
        return (expected_cells(features, mask, _checked_box(case), preset),)
    return (_forward if case.direction == "forward" else _forward_backward)(attention, features, mask)


def expected_cells(features: Tensor, mask: Tensor, box: Box, preset: str) -> Tensor:
    """Output cells of the queries in ``box``, every CHECKED_CHANNEL_STEP-th channel, from a crop of the query map.

    The patches of the crop's outermost ring see its border, the fuse carries that one ring further and the paste
    another; so ``box`` must keep CROP_MARGIN positions from the border of the map, where the fuse also wraps around.
    """
    y0, x0, y1, x1 = box
    rows = slice(RATE * (y0 - CROP_MARGIN), RATE * (y1 + CROP_MARGIN))
    columns = slice(RATE * (x0 - CROP_MARGIN), RATE * (x1 + CROP_MARGIN))
    values = features[:, ::CHECKED_CHANNEL_STEP]
    crop = features[:, :, rows, columns]
    cells = contextual_attention(crop, features, mask, value=values, preset=preset, backend="reference")
    inner = slice(CROP_MARGIN * RATE, -CROP_MARGIN * RATE)
    return cells[:, :, inner, inner]


def _checked_box(case: AttentionCase) -> Box:
    """A few queries in the hole's first corner."""
    first = case.size // (4 * RATE)
    return (first, first, first + CHECKED_CELLS, first + CHECKED_CELLS)


def _gated_part(case: AttentionCase, outputs: Outputs) -> Outputs:
    if not case.gate_is_sampled:
        return outputs
    y0, x0, y1, x1 = (RATE * edge for edge in _checked_box(case))
    return (outputs[0][:, ::CHECKED_CHANNEL_STEP, y0:y1, x0:x1],)


# Yardstick: the matrix products alone --------------------------------------------------------------------------------


def _aten_mm(x: Tensor, weight: Tensor, out: Tensor) -> None:
    torch.mm(x, weight.t(), out=out)


def _onednn_mm(x: Tensor, weight: Tensor, out: Tensor) -> None:
    torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def bare_gemms(keys: int, gemm: Gemm) -> tuple[Callable[[], Outputs], float]:
    """Correlation (M = N = keys, K = C) and paste (M = K = keys, N = rate^2 C) of a sample of the query rows.

    Scores are computed tile by tile, which is quicker than writing rows of all keys to memory. Returns the sample's run
    and the factor by which all rows cost more.
    """
    pixels, cells = torch.randn(keys, CHANNELS), torch.randn(RATE * RATE * CHANNELS, keys)
    probabilities = torch.rand(GEMM_ROWS, keys)
    scores, pasted = torch.empty(GEMM_ROWS, GEMM_KEYS), torch.empty(GEMM_ROWS, RATE * RATE * CHANNELS)
    blocks, tiles = pixels.split(GEMM_ROWS)[::SAMPLE_EVERY], pixels.split(GEMM_KEYS)

    def run() -> Outputs:
        for block in blocks:
            for tile in tiles:
                gemm(block, tile, scores)
            gemm(probabilities, cells, pasted)
        return ()

    return run, keys / sum(len(block) for block in blocks)


GEMMS: dict[str, Gemm] = {MM: _aten_mm, ONEDNN: _onednn_mm}


# Benchmarks ----------------------------------------------------------------------------------------------------------

HOLE_4096 = (128, 128, 178, 178)
"""400 x 400 pixels of a 4096 x 4096 image: 50 x 50 positions of its 512 x 512 matching grid."""


def _cases(peers: Path | None) -> list[AttentionCase]:
    shapes: list[tuple[int, str, Box | None]] = [
        (16, "forward", None),
        (64, "forward", None),
        (64, "forward+backward", None),
        (128, "forward", None),
        (128, "forward+backward", None),
        (192, "forward", None),
        (500, "forward", None),
        (1024, "forward", HOLE_4096),
    ]
    return [
        AttentionCase(size, direction, family, queries, peers)
        for size, direction, queries in shapes
        for family in AMPLITUDE
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_races(metafunc, _cases(peers_folder(metafunc.config)), test_ratio_to_naive)


def test_seconds(case: AttentionCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_seconds(provider, benchmark)


def test_ratio_to_naive(case: AttentionCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_ratio(provider, benchmark)
