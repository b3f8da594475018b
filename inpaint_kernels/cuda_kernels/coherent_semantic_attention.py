"""Coherent semantic attention on CUDA: packed rows, an exact search, and scans over chunks of queries.

A call packs the vectors of known and of masked positions into rows, finds for every masked one the known one of the
largest score, and generates. The search multiplies on the ordinary cores in one fixed order or, where there is enough
to do, lets tensor cores say which keys can be the best and scores those in that order: the results are the same bits.
Generated vectors come from a scan over chunks, which for many queries runs all chunks at once until no bit changes.

Nothing here waits for the GPU: how many positions are masked is read from the flags, which are on the CPU. What depends
on flags and shapes alone is planned once and kept, so a call can be captured into a CUDA graph.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

CHUNK = 64
"""Queries of a chunk of the scan."""

SEARCH_BLOCKS = 264
"""Blocks that share the search: two for each of 132 multiprocessors. A GPU with fewer runs them in turn."""

SMALL_TILE, LARGE_TILE = (32, 64), (128, 128)
"""Queries and keys of a block's tile; float64 has the small one only."""

LEAST_FILTERED_FLOPS = 1e9
"""From so many operations on, tensor cores filter the search.

By estimate, not yet measured: on an H200 the fixed-order search takes FLOPs / 35e12, 29 us at this size. The filter
takes FLOPs / 400e12, the products once written and once read at 4.8e12 bytes per second, and eight launches of 3 us:
28 us for 1,024 keys and 950 queries of 512 channels. Above, the first grows ten times as fast.
"""

PRODUCT_BYTES = 64 << 20
"""Of the products in a tile of the filter. Smaller ones stay in the L2 cache, but are more launches: with 32 MiB those
of 62,500 positions take the CPU 6.9 ms, and an H200 4.3."""

KEYS_OF_PRODUCT = 8192

SEQUENTIAL_CHUNKS = 4
"""Up to so many chunks, walking over them takes no longer than running all of them two or three times."""

PASSES = 4
"""Passes of all chunks at once. Where features resemble each other, two or three settle everything, and the chunks of
the others end at once; what remains the last launch does in turn."""

PADDING = 8
"""Columns of an operand, and keys of a product, are padded to a multiple: 16 bytes of half precision."""

INDEX_LIMIT = 2**31


class Kernels(Protocol):
    """The native kernels; the tests put emulated ones in their place."""

    def coherent_semantic_attention_pack(self, *args: Any) -> None: ...  # noqa: D102
    def coherent_semantic_attention_search(self, *args: Any) -> None: ...  # noqa: D102
    def coherent_semantic_attention_operands(self, *args: Any) -> None: ...  # noqa: D102
    def coherent_semantic_attention_filter(self, *args: Any) -> None: ...  # noqa: D102
    def coherent_semantic_attention_generate(self, *args: Any) -> None: ...  # noqa: D102
    def coherent_semantic_attention_coefficients(self, *args: Any) -> None: ...  # noqa: D102
    def coherent_semantic_attention_backward_scan(self, *args: Any) -> None: ...  # noqa: D102
    def coherent_semantic_attention_gradient(self, *args: Any) -> None: ...  # noqa: D102


@dataclass
class Plan:
    """Where the positions of some masks are.

    Attributes:
        positions: [masks, positions] int32, the known ones in raster order, then the masked ones.
        row_of: [masks, positions] int32, its inverse.
        known: [masks] int32, how many positions are known.
        most_known, most_masked: the largest numbers of any mask.
        copied: when the copy to the GPU is done, until somebody has seen that it is.
    """

    positions: Tensor
    row_of: Tensor
    known: Tensor
    most_known: int
    most_masked: int
    copied: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Let the current stream, not the host, wait for the copy, which another stream may have begun."""
        if self.copied is None:
            return
        torch.cuda.current_stream(self.known.device).wait_event(self.copied)
        if not torch.cuda.is_current_stream_capturing() and self.copied.query():
            self.copied = None


def forward(
    x: Tensor, flags: Tensor, variant: str, *, kernels: Kernels | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op's forward, as :func:`inpaint_kernels.reference.coherent_semantic_attention.forward`.

    Args:
        x: [B, C, H, W]; dense ones are read as they lie, in NCHW or channels_last. Sums are float32 (float64 for
            float64), and so are alpha, beta and total.
        flags: [B or 1, H, W] bool, on the CPU; every sample has a known position.
        variant: "official" or "paper".
        kernels: see :class:`Kernels`; None: the native ones.
    """
    call = _Call(x, flags, kernels)
    rows, norm = call.new_rows(masked_only=False), call.new(call.samples, call.positions)
    output = torch.empty_like(call.x)
    maps = (call.samples, *x.shape[2:])
    index = call.new(*maps, dtype=torch.int64)
    alpha, beta, total = (call.new(*maps) for _ in range(3))
    call.kernels.coherent_semantic_attention_pack(
        *(call.layout, call.plan.row_of, call.plan.known, call.x, False),
        *(rows, norm, output, index, alpha, beta, total),
    )
    value, match = call.search(rows, norm, index, variant == "paper")
    is_paper, passes = variant == "paper", call.passes
    products, vectors, changed = call.scan_scratch(passes, 2 if is_paper else 1)
    call.kernels.coherent_semantic_attention_generate(
        *(call.layout, call.plan.positions, call.plan.known, rows, norm, value, match, is_paper, passes),
        *(products, vectors, changed, alpha, beta, total, output),
    )
    return call.in_layout_of(x, output), index, alpha, beta, total


def backward(
    grad: Tensor,
    x: Tensor,
    flags: Tensor,
    output: Tensor,
    index: Tensor,
    alpha: Tensor,
    beta: Tensor,
    total: Tensor,
    variant: str,
    gradient: str,
    triple_weight: float,
    *,
    kernels: Kernels | None = None,
) -> Tensor:
    """The op's backward: the gradient of x, in its dtype and layout.

    Arguments as of :func:`inpaint_kernels.reference.coherent_semantic_attention.backward`; sums are float32 (float64
    for float64), of gradients and outputs in the dtype of x.
    """
    call = _Call(x, flags, kernels)
    grad, output = call.as_x(grad), call.as_x(output)
    index, alpha, beta, total = (of_positions.contiguous() for of_positions in (index, alpha, beta, total))
    match = call.new_queries(torch.int32)
    alphas, betas = call.new_queries(), call.new_queries()
    plan = (call.layout, call.plan.positions, call.plan.known)
    call.kernels.coherent_semantic_attention_coefficients(
        *(*plan, call.plan.row_of, index, alpha, beta, match, alphas, betas)
    )
    sorted_keys, order = torch.sort(match, dim=1, stable=True)
    rows = call.new_rows(masked_only=True)
    call.pack(grad, rows, None, masked_only=True)
    key_terms = query_terms = None
    if gradient != "official":
        key_terms, query_terms = call.scan_back(
            rows, output, match, (alpha, beta, total), variant == "paper", gradient == "exact"
        )
    grad_x = torch.empty_like(call.x)
    call.kernels.coherent_semantic_attention_gradient(
        *(*plan, call.plan.row_of, sorted_keys, order, alphas, betas, rows, key_terms, query_terms, gradient),
        *(float(triple_weight), grad, grad_x),
    )
    return call.in_layout_of(x, grad_x)


class _Call:
    """What the steps of a call share."""

    def __init__(self, x: Tensor, flags: Tensor, kernels: Kernels | None) -> None:
        self.kernels: Kernels = torch.ops.inpaint_native if kernels is None else kernels
        self.memory_format = _memory_format(x)
        self.x = x.contiguous(memory_format=self.memory_format)
        self.samples, self.channels, height, width = x.shape
        self.positions = height * width
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self.positions >= INDEX_LIMIT:
            raise ValueError(f"x: at most 2^31 - 1 positions expected, got {self.positions}")
        masks = self.samples if flags.shape[0] > 1 else 1
        # A tensor of flags that a caller keeps may be written to, so plans are known by what the flags are.
        key = flags.contiguous().view(torch.uint8).numpy().tobytes()
        self.plan = make_plan(key, masks, self.positions, x.device)
        self.plan.wait()
        self.layout = _layout(
            *(self.samples, self.channels, self.positions, self.plan.most_known, self.plan.most_masked, masks > 1),
            self.memory_format == torch.channels_last,
        )

    @property
    def chunks(self) -> int:
        return -(-self.plan.most_masked // CHUNK)

    @property
    def passes(self) -> int:
        """Of all chunks at once, before the launch that walks over those that are still due."""
        return 0 if self.chunks <= SEQUENTIAL_CHUNKS else PASSES

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.x.device)

    def new_queries(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.new(self.samples, self.plan.most_masked, dtype=dtype)

    def new_rows(self, *, masked_only: bool, dtype: torch.dtype | None = None) -> Tensor:
        """[samples, positions or masked ones, C], in the dtype of x unless another is given."""
        rows = self.plan.most_masked if masked_only else self.positions
        return self.new(self.samples, rows, self.channels, dtype=dtype or self.x.dtype)

    def as_x(self, map_: Tensor) -> Tensor:
        """A map in the dtype and the order of memory of x."""
        return map_.to(self.x.dtype).contiguous(memory_format=self.memory_format)

    def in_layout_of(self, x: Tensor, result: Tensor) -> Tensor:
        """A result in the strides of an input that had to be copied."""
        return result if self.x is x else torch.empty_like(x).copy_(result)

    def pack(self, map_: Tensor, rows: Tensor, norm: Tensor | None, *, masked_only: bool) -> None:
        self.kernels.coherent_semantic_attention_pack(
            *(self.layout, self.plan.row_of, self.plan.known, map_, masked_only, rows, norm),
            *(None, None, None, None, None),
        )

    def scan_scratch(self, passes: int, products: int) -> tuple[Tensor, Tensor, Tensor]:
        """``products`` matrices of every chunk, the vectors that enter chunks, and which of these have changed."""
        return (
            self.new(products, self.samples, self.chunks, CHUNK, CHUNK),
            self.new(2, self.samples, self.chunks + 1, self.channels),
            self.new(passes, self.samples, self.chunks + 1, dtype=torch.int32),
        )

    # Search -----------------------------------------------------------------------------------------------------------

    def search(self, rows: Tensor, norm: Tensor, index: Tensor, is_paper: bool) -> tuple[Tensor, Tensor]:
        """The score and the row of the best key of every query [samples, masked]; also fills ``index``."""
        value, match = self.new_queries(), self.new_queries(torch.int32)
        plan = (self.layout, self.plan.positions, self.plan.known, rows, norm)
        found: tuple[Tensor | None, ...] = (None,) * 5
        if self.is_filtered():
            found = self.filter(plan)
        listed, count, found_score, found_key, candidates = found
        blocks = -(-SEARCH_BLOCKS // self.samples)
        is_large = listed is not None or self.fills_large_tiles()
        side = LARGE_TILE[0] if is_large and self.dtype == torch.float32 else SMALL_TILE[0]
        items = max(blocks, -(-self.plan.most_masked // side))
        partial = [self.new(self.samples, items, side, dtype=dtype) for dtype in (self.dtype, torch.int32)]
        self.kernels.coherent_semantic_attention_search(
            *(*plan, listed, count, blocks, is_large, *partial, found_score, found_key, candidates),
            *(is_paper, value, match, index),
        )
        return value, match

    def fills_large_tiles(self) -> bool:
        """Whether there are tiles for all multiprocessors even of the large ones, which need half the shared memory."""
        rows, columns = -(-self.plan.most_masked // LARGE_TILE[0]), -(-self.plan.most_known // LARGE_TILE[1])
        return 2 * rows * columns * self.samples >= SEARCH_BLOCKS

    def is_filtered(self) -> bool:
        flops = 2.0 * self.samples * self.channels * self.plan.most_masked * self.plan.most_known
        # Half precision sums are no products with a known error.
        sums_are_short = getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
        return self.dtype == torch.float32 and flops >= LEAST_FILTERED_FLOPS and not sums_are_short

    def filter(self, plan: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the filter finds: queries that it leaves to the search, their number; scores, keys, candidates."""
        kernels, most_known, most_masked = self.kernels, self.plan.most_known, self.plan.most_masked
        columns, key_rows = (-(-n // PADDING) * PADDING for n in (self.channels, most_known))
        queries = self.new(self.samples, most_masked, columns, dtype=torch.float16)
        keys = self.new(self.samples, key_rows, columns, dtype=torch.float16)
        listed, count = self.new_queries(torch.int32), self.new(self.samples, dtype=torch.int32)
        kernels.coherent_semantic_attention_operands(*plan, queries, keys, count)
        maximum, score = self.new_queries(torch.float32), self.new_queries(torch.float32)
        key, candidates = self.new_queries(torch.int32), self.new_queries(torch.int32)
        samples, height, width = product_tile(self.samples, most_masked, key_rows)
        memory = self.new(samples * height * width, dtype=torch.float32)
        error = product_error(self.channels)
        for sample in range(0, self.samples, samples):
            for query in range(0, most_masked, height):
                for first in range(0, key_rows, width):
                    left = queries[sample : sample + samples, query : query + height]
                    right = keys[sample : sample + samples, first : first + width]
                    shape = (left.shape[0], left.shape[1], right.shape[1])
                    products = _multiply(left, right, memory[: math.prod(shape)].view(shape))
                    kernels.coherent_semantic_attention_filter(
                        *(*plan, products, sample, query, first, first + width >= key_rows, error),
                        *(maximum, score, key, candidates, listed, count),
                    )
        return listed, count, score, key, candidates

    # Backward ---------------------------------------------------------------------------------------------------------

    def scan_back(
        self,
        grad_rows: Tensor,
        output: Tensor,
        match: Tensor,
        coefficients: tuple[Tensor, Tensor, Tensor],
        is_paper: bool,
        is_exact: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """What queries add to the gradients of their keys and, if exact, of themselves: [samples, masked, C]."""
        rows = norm = generated = generated_norm = scalars = query_terms = None
        products, vectors, changed = self.scan_scratch(self.passes, 2 if is_exact else 0)
        if is_exact:
            rows, norm = self.new_rows(masked_only=False), self.new(self.samples, self.positions)
            self.pack(self.x, rows, norm, masked_only=False)
            generated, generated_norm = self.new_rows(masked_only=True), self.new_queries()
            self.pack(output, generated, generated_norm, masked_only=True)
            scalars, query_terms = self.new_queries(), self.new_rows(masked_only=True, dtype=self.dtype)
        key_terms = self.new_rows(masked_only=True, dtype=self.dtype)
        self.kernels.coherent_semantic_attention_backward_scan(
            *(self.layout, self.plan.positions, self.plan.known, rows, norm, generated, generated_norm, grad_rows),
            *(match, *coefficients, is_paper, self.passes, products if is_exact else None, vectors, changed),
            *(scalars, key_terms, query_terms),
        )
        return key_terms, query_terms


def product_tile(samples: int, queries: int, keys: int) -> tuple[int, int, int]:
    """Samples, queries and keys whose products share :data:`PRODUCT_BYTES`; keys are a multiple of :data:`PADDING`."""
    width = min(keys, KEYS_OF_PRODUCT)
    height = min(queries, max(PRODUCT_BYTES // (4 * width), 1))
    return min(samples, max(PRODUCT_BYTES // (4 * width * height), 1)), height, width


def product_error(channels: int) -> float:
    """How far a product of the filter may be from the score of the search, both in units of the query's length.

    Operands are vectors over their lengths, 1 long at most; the keys' factor is the float32 that the search multiplies
    by. In half precision each element is off by 2^-11 of itself, or by 2^-25 where it is tiny, and by 2^-24 from the
    factor, so by Cauchy and Schwarz a product is off by 2^-11 + 2^-24 + 2^-25 sqrt(C) from either operand. Tensor cores
    add C numbers whose magnitudes sum up to 1 at most, and each addition may cut off what is below 2^-22 of that: they
    align the terms of a group and truncate, to at least 24 bits. The search itself rounds C times by 2^-24, and its
    length of a vector is off by C 2^-25 at most, by which operands may be longer than 1.
    """
    operand = 2.0**-11 + 2.0**-25 * math.sqrt(channels) + 2.0**-24
    sums = channels * (2.0**-22 + 2.0**-24) + 2.0**-22
    return (2 * operand + operand**2 + sums) * (1 + channels * 2.0**-23)


def _multiply(queries: Tensor, keys: Tensor, out: Tensor) -> Tensor:
    """Products [samples, queries, keys] of rows of half precision, summed in float32."""
    if queries.is_cuda:
        return torch.bmm(queries, keys.mT, out_dtype=torch.float32, out=out)
    return torch.bmm(queries.float(), keys.mT.float(), out=out)  # torch's CPU product has no other dtype of result


def _memory_format(x: Tensor) -> torch.memory_format:
    """The order in which maps are read and written: that of x where it is dense, else NCHW."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


# Kept: making a plan takes longer than a search on a small map, and its copy cannot be captured into a graph.
@functools.lru_cache(maxsize=16)
def make_plan(flags: bytes, masks: int, positions: int, device: torch.device) -> Plan:
    """The plan of bool flags [masks, positions]."""
    masked = torch.frombuffer(bytearray(flags), dtype=torch.bool).view(masks, positions)
    order = torch.sort(masked.to(torch.uint8), dim=1, stable=True)[1]
    known = positions - masked.sum(1)
    if int(known.min()) == 0:
        raise ValueError("mask_flags: expected a known position in every sample")
    row_of = torch.empty_like(order).scatter_(1, order, torch.arange(positions).expand(masks, -1))
    packed = torch.cat([order.flatten(), row_of.flatten(), known]).to(torch.int32)
    copied = None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "coherent_semantic_attention: these mask_flags are new; call it with them once before the capture"
            )
        with torch.cuda.device(device):
            packed, copied = packed.pin_memory().to(device, non_blocking=True), torch.cuda.Event()
            copied.record()
    places, rows, counts = packed.split([order.numel(), row_of.numel(), masks])
    shape = (masks, positions)
    most_known, most_masked = int(known.max()), positions - int(known.min())
    return Plan(places.view(shape), rows.view(shape), counts, most_known, most_masked, copied)


@functools.lru_cache(maxsize=64)
def _layout(
    samples: int, channels: int, positions: int, most_known: int, most_masked: int, own_masks: bool, channels_last: bool
) -> Tensor:
    """What the kernels take (struct CoherentLayout)."""
    strides = (1, channels) if channels_last else (positions, 1)
    fields = (samples, channels, positions, most_known, most_masked, positions if own_masks else 0, *strides)
    return torch.tensor(fields, device="cpu")
