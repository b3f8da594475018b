"""Contextual attention at the sizes of a GPU: ours, portable, naive, the same compiled, public ports, the bare GEMMs.

C = 128, rate 2, fuse on, f = b, one square hole. Three precisions: float32 throughout, float32 whose products may use
tf32, and bfloat16 maps (whose scores are float32 too). Up to 4,096 keys implementations that store every score take
part, in float32; at 62,500 keys (a 2000x2000 image) ours races portable and the same matrix products alone.

Features are those that bench_contextual_attention.py calls soft: of peaked ones the softmax takes the largest of many
scores that are closer together than tf32 can tell. Above 4,096 keys the gate compares a few output cells.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benches import bench_contextual_attention as bench
from benches.bench_contextual_attention import CHANNELS, COMPILED, MEASURED_PORTS, NAIVE, OURS, PORTABLE, RATE, Box
from benches.harness import BFLOAT16, FLOAT32, PRECISIONS, TF32, Outputs, Provider, products_in
from benches.peers import available_ports, folder_in_environment, load_port
from inpaint_kernels import PRESETS, contextual_attention
from inpaint_kernels.cuda_kernels._contextual_attention_plan import make_plan
from inpaint_kernels.portable._contextual_attention_tiles import Semantics

GEMMS: Final = "GEMMs alone"
GEMM_ROWS: Final = 2500
AMPLITUDE: Final = bench.AMPLITUDE["soft"]
LARGEST_DENSE_SIZE: Final = 128

# Largest differences of outputs and gradients that are no mistake, over the largest magnitude.
TOLERANCES: Final = {FLOAT32: (1e-4, 1e-3), TF32: (5e-2, 1e-1), BFLOAT16: (2e-2, 1e-1)}


@dataclass(frozen=True)
class GpuAttentionCase:
    """One race: square features of ``size``, forward alone or with the gradient of f = b, all queries or a box."""

    size: int
    batch: int
    direction: str
    precision: str
    queries: Box | None = None
    device: str = "cuda"
    peers: Path | None = field(default=None, repr=False)

    def __str__(self) -> str:
        restricted = "" if self.queries is None else "-queries"
        return f"{self.size}x{self.size}x{self.batch}{restricted}-{self.direction}-{self.precision}"

    @property
    def keys(self) -> int:
        return (self.size // RATE) ** 2

    @property
    def query_count(self) -> int:
        queries = self.queries
        return self.keys if queries is None else (queries[2] - queries[0]) * (queries[3] - queries[1])

    @property
    def is_dense(self) -> bool:
        """Whether implementations that store every score can run it; the gate then compares everything."""
        return self.size <= LARGEST_DENSE_SIZE and self.queries is None

    @property
    def baseline(self) -> str | None:
        return None

    @property
    def tolerances(self) -> tuple[float, ...]:
        has_gradient = self.is_dense and self.direction != "forward"
        return TOLERANCES[self.precision][: 2 if has_gradient else 1]

    @property
    def provider_names(self) -> list[str]:
        if not self.is_dense:
            return [OURS, PORTABLE, GEMMS] if self.direction == "forward" and self.queries is None else [OURS, PORTABLE]
        if self.precision != FLOAT32:
            return [OURS, PORTABLE]
        ports = [name for name in MEASURED_PORTS if name in available_ports(self.peers)]
        return [NAIVE, *([COMPILED] if self.direction == "forward" else []), OURS, PORTABLE, *ports]

    def provider(self, name: str) -> Provider:
        run = bare_gemms(self) if name == GEMMS else functools.partial(_run, self, name, *_inputs(self))
        return Provider(
            name,
            run,
            expected=None if name == GEMMS else functools.partial(_expected, self, bench.preset_of(name)),
            select=functools.partial(_gated_part, self),
            warm_up=run,  # so that no kernel is loaded and no product is tuned while it is timed
            device=self.device,
        )

    def facts(self) -> Mapping[str, Any]:
        """``flops`` and ``bytes`` are the least that any implementation needs, ``our_*`` what ours plans to do."""
        passes = 1 if self.direction == "forward" else 3
        element = 2 if self.precision == BFLOAT16 else 4
        pixels = self.batch * CHANNELS * self.size**2
        our_flops, our_bytes = planned_work(self)
        return {
            "op": "contextual_attention",
            "case": str(self),
            "size": self.size,
            "batch": self.batch,
            "keys": self.keys,
            "queries": self.query_count,
            "direction": self.direction,
            "precision": self.precision,
            "family": "soft",
            "channels": CHANNELS,
            "flops": passes * 2 * self.batch * self.query_count * self.keys * CHANNELS * (1 + RATE**2),
            "bytes": 2 * element * pixels * (1 if passes == 1 else 2),
            "our_flops": our_flops,
            "our_bytes": our_bytes,
        }


def planned_work(case: GpuAttentionCase) -> tuple[int, int]:
    """Operations of the matrix products, and bytes of the large matrices, of our kernels' tiles.

    Each pass and each product reads and writes its matrices once; what it reads again is taken to come from the cache.
    Products also read their other operand for every tile, and sums over tiles are read and written by each. Half
    precision maps have weights, gradients of patch scores and gradients of correlations of half precision.
    """
    preset = PRESETS["nipponjo"]
    semantics = Semantics(**{name.name: getattr(preset, name.name) for name in fields(Semantics)})
    side, selected = case.size // RATE, None
    if case.queries is not None:
        y0, x0, y1, x1 = case.queries
        box = np.zeros((side, side), bool)
        box[y0:y1, x0:x1] = True
        selected = box.tobytes()
    score, element = 4, 2 if case.precision == BFLOAT16 else 4

    def work(purpose: str) -> tuple[int, int]:
        plan = make_plan((side, side), (side, side), semantics, selected, purpose, score, element, case.batch)
        keys, outputs = plan.keys, RATE * RATE * CHANNELS
        key_map, value_cells = CHANNELS * keys.columns, outputs * keys.cell_count
        flops = moved = 0
        for tile in plan.tiles:
            pixels, scores = tile.pixels.number * keys.columns, tile.scores.number * keys.columns
            logits, weights = tile.query_count * keys.logit_columns, tile.cell_count * keys.cell_count
            pixel_map, pasted = tile.pixels.number * CHANNELS, tile.cell_count * outputs
            correlate, paste = 2 * tile.pixels.number * key_map, 2 * tile.cell_count * value_cells
            moved += element * (pixel_map + key_map) + 2 * score * (pixels + logits)
            if purpose == "output":
                flops += correlate + paste
                moved += element * (2 * weights + value_cells + pasted) + 2 * score * pasted
            else:
                flops += 3 * correlate + 2 * paste
                moved += score * weights + element * (pasted + value_cells)  # gradients of weights
                moved += score * weights + 2 * element * weights  # weights again, with the sums of A dA
                moved += element * pasted + 2 * score * value_cells  # added to the value's gradient
                moved += score * (weights + 2 * logits)  # softmax
                moved += score * (logits + pixels) + element * scores  # fuse
                moved += element * (scores + pixels)  # patches
                moved += element * (pixels + pixel_map) + 2 * score * key_map  # added to the key's gradient
                moved += element * (pixels + key_map) + 4 * score * pixel_map  # added to the query's gradient
        return case.batch * flops, case.batch * moved

    forward = work("output")
    backward = work("gradients") if case.direction != "forward" else (0, 0)
    return forward[0] + backward[0], forward[1] + backward[1]


def cases() -> list[GpuAttentionCase]:
    """What ``make gpu`` runs, the most wanted first: time may run out."""
    peers = folder_in_environment()
    both = ("forward", "forward+backward")
    return [
        *(GpuAttentionCase(500, 1, "forward", precision) for precision in PRECISIONS),
        *(GpuAttentionCase(64, 16, direction, FLOAT32, peers=peers) for direction in both),
        *(GpuAttentionCase(500, 1, "forward+backward", precision) for precision in PRECISIONS),
        *(GpuAttentionCase(64, 16, "forward", precision) for precision in (BFLOAT16, TF32)),
        *(GpuAttentionCase(128, 1, direction, FLOAT32, peers=peers) for direction in both),
        GpuAttentionCase(1024, 1, "forward", FLOAT32, queries=bench.HOLE_4096),
    ]


# Inputs and providers ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _inputs(case: GpuAttentionCase) -> tuple[Tensor, Tensor]:
    """Smoothed ReLU features of every sample, and a hole."""
    side = case.size + 4
    generator = torch.Generator(case.device).manual_seed(0)
    noise = torch.randn(case.batch, CHANNELS, side, side, generator=generator, device=case.device)
    features = F.avg_pool2d(noise, 5, stride=1).mul_(5 * AMPLITUDE).relu_()
    mask = bench.make_mask(case.size).to(case.device).expand(case.batch, -1, -1, -1)
    return features.to(torch.bfloat16 if case.precision == BFLOAT16 else torch.float32), mask


def _run(case: GpuAttentionCase, name: str, features: Tensor, mask: Tensor) -> Outputs:
    with products_in(case.precision):
        return _call(case, _attention(case, name), features, mask)


def _call(
    case: GpuAttentionCase, attention: Callable[[Tensor, Tensor], Tensor], features: Tensor, mask: Tensor
) -> Outputs:
    if case.direction == "forward":
        with torch.no_grad():
            return (attention(features, mask),)
    leaf = features.detach().requires_grad_()
    y = attention(leaf, mask)
    (gradient,) = torch.autograd.grad(y, leaf, _output_gradient(y.shape, case.device).to(y.dtype))
    return y.detach(), gradient


@functools.lru_cache(maxsize=1)
def _output_gradient(shape: torch.Size, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(1), device=device)


@functools.cache
def _attention(case: GpuAttentionCase, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """(features, mask) -> y of provider ``name``."""
    if name == NAIVE:
        return bench.naive_attention
    if name == COMPILED:
        return bench.compiled_naive_attention()
    if name in (OURS, PORTABLE):
        backend = case.device if name == OURS else "portable"
        return lambda features, mask: contextual_attention(
            features, features, mask, queries=case.queries, backend=backend
        )
    assert case.peers is not None
    port = available_ports(case.peers)[name]
    attention = load_port(port, case.peers)
    return lambda features, mask: attention(features, features, F.interpolate(mask, scale_factor=port.mask_scale))


def bare_gemms(case: GpuAttentionCase) -> Callable[[], Outputs]:
    """The correlations and the paste of all queries, GEMM_ROWS at a time, without anything between them."""
    dtype = torch.bfloat16 if case.precision == BFLOAT16 else torch.float32
    pixels = torch.randn(case.keys, CHANNELS, device=case.device).to(dtype)
    cells = torch.randn(case.keys, RATE**2 * CHANNELS, device=case.device).to(dtype)
    probabilities = torch.rand(GEMM_ROWS, case.keys, device=case.device).to(dtype)
    scores = torch.empty(GEMM_ROWS, case.keys, device=case.device)  # float32 whatever the maps are

    def run() -> Outputs:
        with products_in(case.precision):
            for block in pixels.split(GEMM_ROWS):
                if dtype == torch.float32:
                    torch.mm(block, pixels.t(), out=scores[: len(block)])
                else:
                    torch.mm(block, pixels.t(), out_dtype=torch.float32, out=scores[: len(block)])
                torch.mm(probabilities[: len(block)], cells)
        return ()

    return run


# The gate ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _expected(case: GpuAttentionCase, preset: str) -> Outputs:
    """The reference in float64 of the same, already rounded maps; on everything or on a few cells."""
    features, mask = _inputs(case)
    features = features.double()

    def attention(features: Tensor, mask: Tensor) -> Tensor:
        return contextual_attention(features, features, mask, preset=preset, backend="reference")

    if case.is_dense:
        return _call(case, attention, features, mask)
    return (bench.expected_cells(features, mask, _checked_box(case), preset),)


def _checked_box(case: GpuAttentionCase) -> Box:
    """A few queries in the hole's first corner."""
    first = case.size // (4 * RATE)
    return (first, first, first + bench.CHECKED_CELLS, first + bench.CHECKED_CELLS)


def _gated_part(case: GpuAttentionCase, outputs: Outputs) -> Outputs:
    if case.is_dense:
        return outputs
    y0, x0, y1, x1 = (RATE * edge for edge in _checked_box(case))
    return (outputs[0][:, :: bench.CHECKED_CHANNEL_STEP, y0:y1, x0:x1],)
