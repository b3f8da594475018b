"""Contextual attention on CUDA: tiles of queries with all keys, torch's matrix products, fused kernels between them.

For every tile: correlations of its pixels with all keys (a product); logits with the statistics of their softmax (one
kernel: patch sums, norm, fuse, masking); the diagonal sums of the probabilities (one kernel); their product with the
value cells; output pixels. Tiles are squares, whose halo is small, and as large as the workspace allows; where several
samples of a batch fit into it, one launch serves them all. Nothing here waits for the GPU, and what depends on shapes
alone is planned once, so a call can be captured into a CUDA graph.

Operands of products have the maps' dtype, their results are float32 (float64 for float64 maps): correlations, logits,
statistics, and the gradients of weights and fused scores. Half precision maps thus have weights, gradients of patch
scores and gradients of correlations of half precision.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from inpaint_kernels.cuda_kernels._contextual_attention_plan import LINES, Grid, Phases, Tile, make_plan, matrix_bytes
from inpaint_kernels.portable._contextual_attention_tiles import Semantics

WALK, WALK_THREADS, WARP = 36, 128, 32
"""Geometry of the kernel that computes scores, which decides how many partial statistics a query has."""

PASTE_THREADS, QUAD = 256, 4
"""Geometry of the kernel that computes weights, which decides how many partial sums of A dA a query has."""

ALIGNMENT = 16
"""Bytes of the widest access."""

NORM_PIECES = 32
"""Pieces in which the backward sums over positions for the gradient of the norms."""


class Kernels(Protocol):
    """The native kernels; the tests put emulated ones in their place."""

    def contextual_attention_key_norm(self, *args: Any, **kwargs: Any) -> Tensor: ...  # noqa: D102
    def contextual_attention_rows(self, *args: Any, **kwargs: Any) -> None: ...  # noqa: D102
    def contextual_attention_scores(self, *args: Any, **kwargs: Any) -> None: ...  # noqa: D102
    def contextual_attention_statistics(self, *args: Any, **kwargs: Any) -> None: ...  # noqa: D102
    def contextual_attention_paste_weights(self, *args: Any, **kwargs: Any) -> None: ...  # noqa: D102
    def contextual_attention_paste(self, *args: Any, **kwargs: Any) -> None: ...  # noqa: D102
    def contextual_attention_matches(self, *args: Any, **kwargs: Any) -> None: ...  # noqa: D102
    def contextual_attention_softmax_backward(self, *args: Any, **kwargs: Any) -> None: ...  # noqa: D102
    def contextual_attention_fuse_backward(self, *args: Any, **kwargs: Any) -> None: ...  # noqa: D102
    def contextual_attention_patch_backward(self, *args: Any, **kwargs: Any) -> None: ...  # noqa: D102


class KeyWeights(NamedTuple):
    """What the kernels know of the keys of some samples.

    Attributes:
        inverse_norm: [samples, keys].
        factor, offset, keep: [samples, logit columns], keep or None.
        floor: smallest probability, -1 for none.
    """

    inverse_norm: Tensor
    factor: Tensor
    offset: Tensor
    keep: Tensor | None
    floor: float

    @property
    def scoring(self) -> tuple[Tensor, Tensor, Tensor]:
        """From patch scores to logits: logit = fused score * factor + offset."""
        return self.inverse_norm, self.factor, self.offset

    @property
    def masking(self) -> tuple[Tensor | None, float]:
        """What happens to probabilities after the softmax: where they become 0, and the smallest one (-1: none)."""
        return self.keep, self.floor


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    key_scale: Tensor | None,
    key_bias: Tensor | None,
    selected: Tensor | None,
    *scalars: Any,
    kernels: Kernels | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's forward, as :func:`inpaint_kernels.reference.contextual_attention.forward`.

    Maps are contiguous, of one dtype; correlations, logits and statistics are float32 (float64 for float64 maps).
    ``selected`` is on the CPU: how many queries it holds decides the work, which must not wait for the GPU.
    """
    *fields, return_offsets = scalars
    purpose = "offsets" if return_offsets else "output"
    call = _Call(query, key, value, Semantics(*fields), selected, purpose, kernels)
    (height, width), rate, plan = call.queries, call.semantics.rate, call.plan
    output = value.new_zeros(query.shape[0], value.shape[1], rate * height, rate * width)
    matches = (query.shape[0], height, width) if return_offsets else (0,)
    index = query.new_full(matches, -1, dtype=torch.int64)
    maximum = query.new_zeros(matches, dtype=call.dtype)
    for samples in call.groups():
        keys = call.key_weights(samples, key, valid, key_scale, key_bias)
        query_rows, key_columns = call.query_rows(query[samples]), call.key_columns(key[samples])
        value_cells = [call.value_cells(value[samples], phases) for phases in plan.phases]
        work = _Workspace(call, len(key_columns))
        for tile in plan.tiles:
            _, logits, statistics = call.attend(work, tile, query_rows, key_columns, keys)
            if return_offsets:
                geometry = call.geometry(work, tile, plan.phases[0])
                best = index[samples], maximum[samples]
                call.kernels.contextual_attention_matches(
                    geometry, *keys.masking, logits, statistics, call.selected, *best
                )
            for phases, cells in zip(plan.phases, value_cells, strict=True):
                geometry, weights = call.geometry(work, tile, phases), work.weights(tile)
                call.kernels.contextual_attention_paste_weights(
                    geometry, *keys.masking, logits, statistics, None, weights, None
                )
                call.kernels.contextual_attention_paste(
                    geometry,
                    phases.fields(rate, call.semantics.pad_put),
                    _product(weights, cells),
                    *call.pixel_weights,
                    call.selected,
                    output[samples],
                )
    return output, index, maximum


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    key_scale: Tensor | None,
    key_bias: Tensor | None,
    selected: Tensor | None,
    *scalars: Any,
    kernels: Kernels | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's backward: gradients of query, key and value, in float32 or float64.

    Maps are contiguous, of one dtype; ``grad`` is float32, or float64 for float64 maps.
    """
    call = _Call(query, key, value, Semantics(*scalars), selected, "gradients", kernels)
    gradients = [torch.empty_like(x, dtype=call.dtype) for x in (query, key, value)]
    for samples in call.groups():
        keys = call.key_weights(samples, key, valid, key_scale, key_bias)
        sums = _GradientSums(call, query[samples], key[samples], value[samples], grad[samples], keys)
        for tile in call.plan.tiles:
            sums.add(tile)
        for gradient, of_samples in zip(gradients, sums.gradients(value.shape[2:]), strict=True):
            gradient[samples] = of_samples
    return gradients[0], gradients[1], gradients[2]


class _Call:
    """What all samples and tiles of a call share."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        semantics: Semantics,
        selected: Tensor | None,
        purpose: str,
        kernels: Kernels | None,
    ) -> None:
        self.kernels: Kernels = torch.ops.inpaint_native if kernels is None else kernels
        self.semantics, self.purpose = semantics, purpose
        self.device, self.map_dtype, self.batch = query.device, query.dtype, query.shape[0]
        self.queries, self.keys = (query.shape[2], query.shape[3]), (key.shape[2], key.shape[3])
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        wanted = None if selected is None else selected.numpy().tobytes()
        self.plan = make_plan(
            *(self.queries, self.keys, semantics, wanted, purpose),
            *(self.dtype.itemsize, self.map_dtype.itemsize, self.batch),
        )
        self.selected = None if wanted is None else _selected_on(self.device, wanted, self.queries)
        self.pixel_weights = [_pixel_weights(n, semantics, self.device, self.dtype) for n in self.queries]

    def groups(self) -> Iterator[slice]:
        """The samples that tiles take at once."""
        for first in range(0, self.batch, self.plan.samples):
            yield slice(first, min(first + self.plan.samples, self.batch))

    def geometry(self, work: _Workspace, tile: Tile, phases: Phases) -> Tensor:
        """What the kernels take (struct AttentionTile)."""
        keys = self.plan.keys
        fields = (
            *(*self.queries, *self.keys, self.semantics.patch, self.semantics.half),
            *(*tile.queries, *tile.cells, phases.reach_y, phases.reach_x, *keys.cells),
            *(work.samples, tile.pixels.number, tile.scores.number, keys.columns),
        )
        return torch.tensor(fields, device="cpu")

    def key_weights(
        self, samples: slice, key: Tensor, valid: Tensor | None, key_scale: Tensor | None, key_bias: Tensor | None
    ) -> KeyWeights:
        """What the kernels know of the keys of some samples."""
        semantics = self.semantics
        norm = self.kernels.contextual_attention_key_norm(
            key[samples].to(self.dtype), semantics.patch, semantics.norm, semantics.eps
        )
        height, width = self.keys
        lines = (norm.shape[0], height, self.plan.keys.cells[1])
        factor, offset, keep = norm.new_full(lines, semantics.scale), norm.new_zeros(lines), None
        if key_scale is not None:
            factor[..., :width] *= _of_samples(key_scale, samples)
        if key_bias is not None:
            offset[..., :width] += _of_samples(key_bias, samples)
        if valid is not None:
            eligible = _of_samples(valid, samples)
            fill = {"multiply": 0.0, "inf": -math.inf, "fill": semantics.scale * semantics.fill}[semantics.masking]
            excluded = ~eligible
            factor[..., :width].masked_fill_(excluded, 0)
            offset[..., :width].masked_fill_(excluded, fill)
            if semantics.masking == "multiply":
                keep = norm.new_zeros(lines)
                keep[..., :width] = eligible
        floor = -1.0 if semantics.floor is None else semantics.floor
        return KeyWeights(norm.reciprocal().flatten(1), factor, offset, keep, floor)

    def query_rows(self, query: Tensor) -> Tensor:
        """Query maps [samples, C, hq, wq] as matrices [samples, pixels, C]."""
        return query.flatten(2).mT.contiguous()

    def key_columns(self, key: Tensor) -> Tensor:
        """Key maps [samples, C, hk, wk] as matrices [samples, C, key columns], 0 in the padding."""
        padding = self.plan.keys.columns - math.prod(self.keys)
        return F.pad(key.flatten(2), (0, padding)) if padding else key.flatten(2)

    def value_cells(self, value: Tensor, phases: Phases) -> Tensor:
        """Value maps [samples, Cv, H, W] as matrices [samples, key cells, Cv * phases]."""
        semantics = self.semantics
        return _cells(value, phases, self.plan.keys.cells, semantics.rate, semantics.pad_cut).flatten(1, 2)

    def attend(
        self, work: _Workspace, tile: Tile, query_rows: Tensor, key_columns: Tensor, keys: KeyWeights
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The tile's pixels [samples, pixels, C], logits, and maximum and inverse sum of exponentials of each query."""
        kernels, geometry = self.kernels, self.geometry(work, tile, self.plan.phases[0])
        kernels.contextual_attention_rows(tile.pixels.runs, tile.pixels.number, work.pixel_row, work.pixel_at)
        pixels = query_rows
        if tile.pixels.number < query_rows.shape[1]:
            pixels = query_rows.index_select(1, work.pixels(tile))
        correlations = _product(pixels, key_columns, out=work.correlations(tile))
        logits, partial, statistics = work.logits(tile), work.partial(tile), work.statistics(tile)
        kernels.contextual_attention_scores(geometry, correlations, work.pixel_row, *keys.scoring, logits, partial)
        kernels.contextual_attention_statistics(partial, statistics)
        return pixels, logits, statistics


class _GradientSums:
    """The gradients of some samples, collected tile by tile."""

    def __init__(self, call: _Call, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, keys: KeyWeights) -> None:
        self._call, self._keys, self._key_map = call, keys, key
        self._work = _Workspace(call, query.shape[0])
        self._query_rows, self._key_columns = call.query_rows(query), call.key_columns(key)
        self._value_cells = [call.value_cells(value, phases) for phases in call.plan.phases]
        self._scale = self._score_scale = None
        if call.map_dtype == torch.float16:
            self._scale = _power_of_two_to(1, grad.abs().flatten(1).amax(1)).view(-1, 1, 1, 1)
        self._gradient_cells = self._output_cells(grad if self._scale is None else grad * self._scale)
        sums = functools.partial(torch.zeros_like, dtype=call.dtype)
        self._query, self._key = sums(self._query_rows), sums(self._key_columns)
        self._value = [sums(cells) for cells in self._value_cells]
        self._factor = keys.factor
        if self._scale is not None:
            self._score_scale = self._scale_of_scores()
            self._factor = self._factor * self._score_scale[..., 0]
        self._norm_sums = keys.inverse_norm.new_zeros(query.shape[0], NORM_PIECES * 2, keys.inverse_norm.shape[1])

    def _output_cells(self, grad: Tensor) -> list[Tensor]:
        """By phases, the gradient of the pasted sums [samples, cell rows, cell columns, Cv * phases]."""
        call = self._call
        rate, more = call.semantics.rate, call.semantics.reach - 1
        rows, columns = call.pixel_weights
        weighted = grad * (rows[:, None] * columns)
        if call.selected is not None:
            wanted = call.selected.repeat_interleave(rate, 0).repeat_interleave(rate, 1)
            weighted = torch.where(wanted, weighted, 0)
        grid, operand = (call.queries[0] + more, call.queries[1] + more), weighted.to(call.map_dtype)
        return [_cells(operand, phases, grid, rate, call.semantics.pad_put) for phases in call.plan.phases]

    def _scale_of_scores(self) -> Tensor:
        """What gradients of scores are multiplied by for float16 [samples, 1, 1, 1]: then none of them is too large.

        The range of float16 is short: soft probabilities times a small gradient of the output would be 0 in it, which
        is why that gradient is brought to about 1 first. A gradient of weights is at most the length of a gradient cell
        times that of a value cell; those of fused scores, patch scores and correlations add reach^2, fuse^2 and patch^2
        of the one before.
        """
        semantics, keys = self._call.semantics, self._keys
        bound: Tensor | float = 0.0
        for gradients, values in zip(self._gradient_cells, self._value_cells, strict=True):
            lengths = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in (gradients, values)]
            bound = lengths[0].flatten(1).amax(1) * lengths[1].amax(1) + bound
        terms = semantics.reach * (2 * semantics.half + 1) * semantics.patch
        bound = 2 * terms**2 * bound * keys.factor.abs().flatten(1).amax(1) * keys.inverse_norm.amax(1)
        return _power_of_two_to(2**15, bound).view(-1, 1, 1, 1)

    def add(self, tile: Tile) -> None:
        """Add the share of a tile's queries."""
        call, work, keys = self._call, self._work, self._keys
        kernels, phases_of_plan = call.kernels, call.plan.phases
        pixels, logits, statistics = call.attend(work, tile, self._query_rows, self._key_columns, keys)
        top, left, height, width = tile.cells
        weight_gradients, dots, weights = work.weight_gradients(tile), work.dots(tile), work.weights(tile)
        for number, phases in enumerate(phases_of_plan):
            pasted = self._gradient_cells[number][:, top : top + height, left : left + width].flatten(1, 2)
            _product(pasted, self._value_cells[number].mT, out=weight_gradients[number])
            dots_of_phases = dots[number].flatten()[: work.dot_count(tile, phases)]
            kernels.contextual_attention_paste_weights(
                call.geometry(work, tile, phases),
                *(*keys.masking, logits, statistics, weight_gradients[number], weights, dots_of_phases),
            )
            _add_product(self._value[number], weights.mT, pasted)
        geometry = call.geometry(work, tile, phases_of_plan[0])
        kernels.contextual_attention_softmax_backward(
            geometry, weight_gradients, dots, self._factor, *keys.masking, statistics, logits
        )
        kernels.contextual_attention_rows(tile.scores.runs, tile.scores.number, work.score_row, work.score_at)
        score_gradients, correlations = work.score_gradients(tile), work.correlations(tile)
        kernels.contextual_attention_fuse_backward(
            *(geometry, logits, correlations, work.pixel_row, keys.inverse_norm),
            *(work.score_at[: tile.scores.number], score_gradients, self._norm_sums),
        )
        gradients = work.correlation_gradients(tile)
        kernels.contextual_attention_patch_backward(
            geometry, score_gradients, work.score_row, work.pixels(tile), gradients
        )
        _add_product(self._key, pixels.mT, gradients)
        # No pixel occurs twice, so every sum has one addition per tile.
        self._query.index_add_(1, work.pixels(tile), _product(gradients, self._key_columns.mT))

    def gradients(self, value_size: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the samples' query [., C, hq, wq], key [., C, hk, wk] and value [., Cv, Hv, Wv]."""
        call = self._call
        semantics, keys = call.semantics, call.plan.keys
        query = self._query.mT.unflatten(2, call.queries)
        key = self._key[..., : math.prod(call.keys)].unflatten(2, call.keys) + self._key_map * self._energy_gradient()
        rate, pad = semantics.rate, semantics.pad_cut
        (rows, columns), (height, width) = keys.cells, value_size
        channels = self._value[0].shape[2] // math.prod(
            part.stop - part.start for part in (call.plan.phases[0].y, call.plan.phases[0].x)
        )
        framed = query.new_empty(query.shape[0], channels, rows, rate, columns, rate)
        for phases, cells in zip(call.plan.phases, self._value, strict=True):
            target = framed[:, :, :, phases.y, :, phases.x].permute(0, 2, 4, 1, 3, 5)
            target.copy_(cells.view(target.shape))
        value = framed.view(-1, channels, rows * rate, columns * rate)
        value = F.pad(value, (-pad, width + pad - rate * columns, -pad, height + pad - rate * rows))
        if self._scale is not None and self._score_scale is not None:
            query, key = (x / self._score_scale / self._scale for x in (query, key))
            value = value / self._scale
        return query, key, value

    def _energy_gradient(self) -> Tensor:
        """Twice the gradient of each pixel's squared length [samples, 1, hk, wk], through its patches' norms."""
        semantics, inverse_norm = self._call.semantics, self._keys.inverse_norm
        norm = inverse_norm.reciprocal()
        if semantics.norm == "none":
            slope = torch.zeros_like(norm)
        elif semantics.norm == "sum":
            slope = 0.5 * inverse_norm
        else:
            root = norm - semantics.eps if semantics.norm == "add" else norm
            slope = torch.where(norm > semantics.eps, 0.5 / root, 0)
        sums = self._norm_sums.sum(1)
        squared = torch.where(sums == 0, 0, -sums * inverse_norm * slope)
        before = (semantics.patch - 1) // 2
        after = semantics.patch - 1 - before
        framed = F.pad(squared.view(-1, 1, *self._call.keys), (after, before, after, before))
        return 2 * F.avg_pool2d(framed, semantics.patch, stride=1, divisor_override=1)


class _Workspace:
    """The matrices of some samples, each fit for any tile.

    :func:`matrix_bytes` says which share memory; together they are what a plan has sized its tiles by.
    """

    def __init__(self, call: _Call, samples: int) -> None:
        plan, self.samples = call.plan, samples
        self._keys, self._phases, self._dtype, self._map_dtype = plan.keys, plan.phases, call.dtype, call.map_dtype
        score_threads = math.prod(call.keys) + WALK - 1 + (LINES - 1) * call.keys[1]
        self._partials = -(-score_threads // WALK_THREADS) * (WALK_THREADS // WARP)
        self._dot_warps = -(-plan.keys.cell_count // (QUAD * PASTE_THREADS)) * (PASTE_THREADS // WARP)
        score_size, map_size = call.dtype.itemsize, call.map_dtype.itemsize
        most = (plan.most_pixels, plan.most_scores, plan.most_cells, plan.most_queries)
        sizes = matrix_bytes(most, plan.keys, len(plan.phases), call.purpose, score_size, map_size)
        memory = functools.partial(torch.empty, dtype=torch.uint8, device=call.device)
        empty = functools.partial(torch.empty, dtype=call.dtype, device=call.device)
        rows = functools.partial(torch.empty, dtype=torch.int32, device=call.device)
        self._correlations, self._logits, self._gradients, self._weights = (
            memory(samples * -(-size // ALIGNMENT) * ALIGNMENT) for size in sizes
        )
        if call.purpose != "gradients":
            self._weights = self._correlations
        self._partial = empty(samples * 2 * plan.most_queries * self._partials)
        self._statistics = empty(samples * 2 * plan.most_queries)
        self.pixel_row, self.pixel_at = rows(math.prod(call.queries)), rows(plan.most_pixels)
        if call.purpose == "gradients":
            steps = plan.phases[0].reach_y * plan.phases[0].reach_x
            self._dots = empty(len(plan.phases) * samples * plan.most_cells * steps * self._dot_warps)
            self.score_row, self.score_at = rows(math.prod(call.queries)), rows(plan.most_scores)

    def pixels(self, tile: Tile) -> Tensor:
        """Positions of the tile's pixels, once ``contextual_attention_rows`` has written them."""
        return self.pixel_at[: tile.pixels.number]

    def correlations(self, tile: Tile) -> Tensor:
        """[samples, pixels, key columns]."""
        return _part(self._correlations, self._dtype, self.samples, tile.pixels.number, self._keys.columns)

    def correlation_gradients(self, tile: Tile) -> Tensor:
        """[samples, pixels, key columns], in place of the correlations."""
        return _part(self._correlations, self._map_dtype, self.samples, tile.pixels.number, self._keys.columns)

    def logits(self, tile: Tile) -> Tensor:
        """[samples, queries, logit columns]."""
        return _part(self._logits, self._dtype, self.samples, tile.query_count, self._keys.logit_columns)

    def weights(self, tile: Tile) -> Tensor:
        """[samples, cells, key cells]; in the forward in place of the correlations."""
        return _part(self._weights, self._map_dtype, self.samples, tile.cell_count, self._keys.cell_count)

    def weight_gradients(self, tile: Tile) -> Tensor:
        """[phases, samples, cells, key cells]."""
        shape = (len(self._phases), self.samples, tile.cell_count, self._keys.cell_count)
        return _part(self._gradients, self._dtype, *shape)

    def score_gradients(self, tile: Tile) -> Tensor:
        """[samples, positions of scores, key columns], in place of the gradients of weights."""
        return _part(self._gradients, self._map_dtype, self.samples, tile.scores.number, self._keys.columns)

    def partial(self, tile: Tile) -> Tensor:
        """[samples, 2, queries, partials]: maxima and sums of exponentials of every warp."""
        return _part(self._partial, self._dtype, self.samples, 2, tile.query_count, self._partials)

    def statistics(self, tile: Tile) -> Tensor:
        """[samples, 2, queries]."""
        return _part(self._statistics, self._dtype, self.samples, 2, tile.query_count)

    def dots(self, tile: Tile) -> Tensor:
        """[phases, samples, cells, steps of the paste, warps]: sums of A dA; phases of fewer steps fill less."""
        steps = self._phases[0].reach_y * self._phases[0].reach_x
        shape = (len(self._phases), self.samples, tile.cell_count, steps, self._dot_warps)
        return _part(self._dots, self._dtype, *shape)

    def dot_count(self, tile: Tile, phases: Phases) -> int:
        """How many of them phases fill."""
        return self.samples * tile.cell_count * phases.reach_y * phases.reach_x * self._dot_warps


def _power_of_two_to(target: float, largest: Tensor) -> Tensor:
    """The power of two that brings the largest of some numbers to ``target`` or just below; 1 where that is none."""
    exponent = (math.log2(target) - torch.log2(largest)).floor().clamp(-60, 60)
    return torch.exp2(torch.where(largest.isfinite() & (largest > 0), exponent, 0))


def _part(memory: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    return memory.view(dtype)[: math.prod(shape)].view(shape)


def _of_samples(per_key: Tensor, samples: slice) -> Tensor:
    """[B or 1, hk, wk] -> [samples or 1, hk, wk]."""
    return per_key[samples] if per_key.shape[0] > 1 else per_key


def _cells(pixels: Tensor, phases: Phases, grid: Grid, rate: int, pad: int) -> Tensor:
    """The pixels of some phases of maps [., C, H, W] and their border, by cell: [., rows, columns, C * phases]."""
    (rows, columns), (samples, channels, height, width) = grid, pixels.shape
    framed = F.pad(pixels, (pad, rate * columns - pad - width, pad, rate * rows - pad - height))
    chosen = framed.view(samples, channels, rows, rate, columns, rate)[:, :, :, phases.y, :, phases.x]
    return chosen.permute(0, 2, 4, 1, 3, 5).flatten(3)


# These two are kept, as the plan is: a copy to the GPU waits for it, and cannot be captured into a graph.
@functools.lru_cache(maxsize=16)
def _selected_on(device: torch.device, wanted: bytes, grid: Grid) -> Tensor:
    """The selected queries, bool [hq, wq]."""
    return torch.frombuffer(bytearray(wanted), dtype=torch.bool).view(grid).to(device)


@functools.lru_cache(maxsize=32)
def _pixel_weights(positions: int, semantics: Semantics, device: torch.device, dtype: torch.dtype) -> Tensor:
    """1 / (patches that cover a pixel) of one axis, or the root of 1 / divisor, [rate * positions]."""
    rate = semantics.rate
    if semantics.divisor:
        return torch.full((rate * positions,), semantics.divisor**-0.5, dtype=dtype, device=device)
    pixel = torch.arange(rate * positions, device="cpu")[:, None] + semantics.pad_put
    inside = pixel - rate * torch.arange(positions, device="cpu")
    covering = ((inside >= 0) & (inside < semantics.paste_size)).sum(1).clamp_min(1)
    return (1 / covering.double()).to(device, dtype)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Products of matrices [samples, ., .], summed in float32 at least and not rounded to a shorter dtype."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.bmm(a, b, out=out)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32, out=out)
    return torch.bmm(a.float(), b.float(), out=out)  # torch's CPU product has no other dtype of result


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += _product(a, b)``, without a matrix in between."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.baddbmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.baddbmm_(a.to(total.dtype), b.to(total.dtype))
