"""Coherent semantic attention at the sizes of a GPU: ours, portable, and the search's products alone.

C = 512, one square hole of a quarter of the map, at 1/8 of the image: 32x32 is the published network's 256x256 image,
250x250 one of 2000x2000. Features are smoothed and positive, as the network's are: their recurrence forgets, so that
float32 follows it to the end. Of larger maps than that the gate compares the first rows of the hole, with all keys: one
of 1,024 queries may have two keys whose scores are equal to the last bits, and float64 takes the other one.

Launches and the length of dependency chains decide the smallest case, of which floors and predictions know nothing: on
an H200 an estimate of it is 45 us, 19 of them in the 256 steps of the recurrence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from benches.harness import BFLOAT16, FLOAT32, Outputs, Provider
from inpaint_kernels import coherent_semantic_attention
from inpaint_kernels.cuda_kernels import coherent_semantic_attention as cuda_kernels
from inpaint_kernels.reference import coherent_semantic_attention as reference

OURS: Final = "ours"
PORTABLE: Final = "portable"
NAIVE: Final = "naive"
PRODUCTS: Final = "products alone"

CHANNELS: Final = 512
PIXELS_PER_POSITION: Final = 8
LARGEST_NAIVE_SIZE: Final = 64
"""Beyond it the loop of the reference takes no part."""
LARGEST_FULLY_GATED_SIZE: Final = 32
CHECKED_ROWS: Final = 4
# Largest differences of outputs and gradients that are no mistake, over the largest magnitude.
TOLERANCES: Final = {FLOAT32: (1e-4, 1e-3), BFLOAT16: (2e-2, 1e-1)}


@dataclass(frozen=True)
class GpuCoherentCase:
    """One race: features of ``size`` x ``size``, forward alone or with the gradient ``gradient``."""

    size: int
    batch: int
    precision: str
    gradient: str | None = None
    device: str = "cuda"

    def __str__(self) -> str:
        return f"{self.size}x{self.size}x{self.batch}-{self.direction}-{self.precision}"

    @property
    def direction(self) -> str:
        return "forward" if self.gradient is None else f"forward+backward ({self.gradient})"

    @property
    def hole(self) -> tuple[int, int]:
        """First and last + 1 of its rows and columns."""
        side = self.size // 2
        return (self.size - side) // 2, (self.size - side) // 2 + side

    @property
    def queries(self) -> int:
        return (self.hole[1] - self.hole[0]) ** 2

    @property
    def keys(self) -> int:
        return self.size**2 - self.queries

    @property
    def is_small(self) -> bool:
        """Whether the gate compares everything."""
        return self.size <= LARGEST_FULLY_GATED_SIZE

    @property
    def is_filtered(self) -> bool:
        flops = 2 * self.batch * CHANNELS * self.queries * self.keys
        return flops >= cuda_kernels.LEAST_FILTERED_FLOPS

    @property
    def baseline(self) -> str | None:
        return None

    @property
    def tolerances(self) -> tuple[float, ...]:
        return TOLERANCES[self.precision][: 1 if self.gradient is None or not self.is_small else 2]

    @property
    def provider_names(self) -> list[str]:
        if self.size <= LARGEST_NAIVE_SIZE and self.batch == 1:
            return [OURS, PORTABLE, NAIVE]
        return [OURS, PORTABLE, *([PRODUCTS] if self.gradient is None else [])]

    def provider(self, name: str) -> Provider:
        run = bare_products(self) if name == PRODUCTS else functools.partial(_run, self, name)
        return Provider(
            name,
            run,
            expected=None if name == PRODUCTS else functools.partial(_expected, self),
            select=functools.partial(_gated_part, self),
            warm_up=run,
            device=self.device,
        )

    def facts(self) -> Mapping[str, Any]:
        """``flops`` and ``bytes`` are the least that any implementation needs, ``our_*`` what ours plans to do.

        ``products``: in which precision products run, half precision at the rate of bfloat16; results are exact anyway.
        """
        element = 2 if self.precision == BFLOAT16 else 4
        map_bytes = self.batch * element * CHANNELS * self.size**2
        our_flops, our_bytes = planned_work(self)
        return {
            "op": "coherent_semantic_attention",
            "case": str(self),
            "size": self.size,
            "pixels_per_position": PIXELS_PER_POSITION,
            "batch": self.batch,
            "keys": self.keys,
            "queries": self.queries,
            "direction": self.direction,
            "precision": self.precision,
            "products": BFLOAT16 if self.is_filtered else FLOAT32,
            "channels": CHANNELS,
            "flops": 2 * self.batch * CHANNELS * self.queries * self.keys,
            "bytes": map_bytes * (2 if self.gradient is None else 4),
            "our_flops": our_flops,
            "our_bytes": our_bytes,
        }


def planned_work(case: GpuCoherentCase) -> tuple[int, int]:
    """Operations of the search, and bytes that our kernels read and write.

    Every kernel reads and writes its arrays once, and tiles of a product read their operands each. Rows of queries and
    of what they matched are read by two passes of the scan, which settle what resembles itself; gradient "exact" reads
    them again, with the generated vectors and the gradient.
    """
    element = 2 if case.precision == BFLOAT16 else 4
    positions, masked, known = case.size**2, case.queries, case.keys
    rows, queries = element * CHANNELS * positions, element * CHANNELS * masked
    flops, moved = 2 * CHANNELS * masked * known, 3 * rows - queries  # packed, and known ones copied to the output
    if case.is_filtered:
        _, height, width = cuda_kernels.product_tile(1, masked, known)
        moved += rows + 2 * CHANNELS * positions  # operands
        moved += 2 * CHANNELS * (known * -(-masked // height) + masked * -(-known // width)) + 2 * 4 * masked * known
    else:
        moved += rows
    chunks = -(-masked // cuda_kernels.CHUNK)
    moved += 2 * queries + 2 * 4 * chunks * cuda_kernels.CHUNK**2  # products inside chunks
    passes = 1 if chunks <= cuda_kernels.SEQUENTIAL_CHUNKS else 2
    moved += passes * 2 * queries + 2 * queries  # scan, generate
    if case.gradient is not None:
        moved += 2 * queries + 2 * rows  # the gradient of the output packed, and the map's
    if case.gradient == "exact":
        moved += 2 * rows + 2 * queries  # the map and the output packed
        moved += 5 * queries + passes * 4 * queries  # products inside chunks, scan
        moved += 4 * queries + 2 * 2 * 4 * CHANNELS * masked  # terms, written and read
    return case.batch * flops, case.batch * moved


def cases() -> list[GpuCoherentCase]:
    """What ``make gpu`` runs, the most wanted first: time may run out."""
    return [
        GpuCoherentCase(32, 1, FLOAT32),
        GpuCoherentCase(250, 1, FLOAT32),
        GpuCoherentCase(32, 16, FLOAT32),
        GpuCoherentCase(64, 1, FLOAT32),
        *(GpuCoherentCase(32, 16, FLOAT32, gradient) for gradient in ("official", "exact")),
        *(GpuCoherentCase(250, 1, FLOAT32, gradient) for gradient in ("official", "exact")),
        GpuCoherentCase(250, 1, BFLOAT16),
        GpuCoherentCase(32, 16, BFLOAT16),
    ]


# Inputs and providers ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _inputs(case: GpuCoherentCase) -> tuple[Tensor, Tensor]:
    """Smoothed ReLU features of every sample, and a hole, whose flags are on the CPU."""
    generator = torch.Generator(case.device).manual_seed(0)
    side = case.size + 2
    noise = torch.randn(case.batch, CHANNELS, side, side, generator=generator, device=case.device)
    features = F.avg_pool2d(noise, 3, stride=1).mul_(3).relu_().add_(0.1)
    flags = torch.zeros(1, case.size, case.size, dtype=torch.bool)
    flags[:, slice(*case.hole), slice(*case.hole)] = True
    return features.to(torch.bfloat16 if case.precision == BFLOAT16 else torch.float32), flags


def _run(case: GpuCoherentCase, name: str) -> Outputs:
    backend = {OURS: case.device, PORTABLE: "portable", NAIVE: "reference"}[name]
    features, flags = _inputs(case)
    return _call(case, features, flags, backend)


def _call(case: GpuCoherentCase, features: Tensor, flags: Tensor, backend: str) -> Outputs:
    if case.gradient is None:
        with torch.no_grad():
            return (coherent_semantic_attention(features, flags, backend=backend),)
    leaf = features.detach().requires_grad_()
    y = coherent_semantic_attention(leaf, flags, gradient=case.gradient, backend=backend)
    (gradient,) = torch.autograd.grad(y, leaf, _output_gradient(y.shape, case.device).to(y.dtype))
    return y.detach(), gradient


@functools.lru_cache(maxsize=1)
def _output_gradient(shape: torch.Size, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(1), device=device)


def bare_products(case: GpuCoherentCase) -> Callable[[], Outputs]:
    """The products of all queries with all keys, in half precision where ours filters, and nothing else."""
    dtype = torch.float16 if case.is_filtered else torch.float32
    queries = torch.rand(case.batch, case.queries, CHANNELS, device=case.device).to(dtype)
    keys = torch.rand(case.batch, case.keys, CHANNELS, device=case.device).to(dtype)
    samples, height, width = cuda_kernels.product_tile(case.batch, case.queries, case.keys)
    memory = torch.empty(samples * height * width, device=case.device)

    def run() -> Outputs:
        for first in range(0, case.batch, samples):
            for left in queries[first : first + samples].split(height, 1):
                for right in keys[first : first + samples].split(width, 1):
                    out = memory[: left.shape[0] * left.shape[1] * right.shape[1]]
                    out = out.view(left.shape[0], left.shape[1], right.shape[1])
                    if dtype == torch.float16:
                        cuda_kernels._multiply(left, right, out)
                    else:
                        torch.bmm(left, right.mT, out=out)
        return ()

    return run


# The gate ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _expected(case: GpuCoherentCase) -> Outputs:
    """The reference in float64 of the same, already rounded maps; on everything or on the first rows of the hole."""
    features, flags = _inputs(case)
    wide = features.double()
    if case.is_small:
        return _call(case, wide, flags, "reference")
    masked, known = (of.to(wide.device) for of in reference.positions(flags, 0))
    vectors = wide[0].flatten(1).t()
    queries, keys = vectors[masked[: CHECKED_ROWS * (case.hole[1] - case.hole[0])]], vectors[known]
    found = keys[((queries @ keys.t()) / reference.norm(keys)).argmax(1)]
    return (reference.generate(queries, found, "official")[0],)


def _gated_part(case: GpuCoherentCase, outputs: Outputs) -> Outputs:
    if case.is_small:
        return outputs
    first, last = case.hole
    return (outputs[0][0, :, first : first + CHECKED_ROWS, first:last].flatten(1).t(),)
