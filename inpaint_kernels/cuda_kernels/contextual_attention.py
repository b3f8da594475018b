"""Contextual attention on CUDA: tiles of queries with all keys, torch's matrix products, fused kernels between them.

For every tile: correlations of its pixels with all keys (a product); logits with the statistics of their softmax (one
kernel: patch sums, norm, fuse, masking); the diagonal sums of the probabilities (one kernel); their product with the
value cells; output pixels. Tiles are squares, whose halo is small, and as large as the workspace allows. Nothing here
waits for the GPU, and what depends on shapes alone is planned once, so a call can be captured into a CUDA graph.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from inpaint_kernels.cuda_kernels._contextual_attention_plan import Grid, Phases, Tile, make_plan
from inpaint_kernels.portable._contextual_attention_tiles import Semantics

WALK, SCORE_THREADS, WARP = 16, 128, 32
"""Geometry of the kernel that computes scores, which decides how many partial statistics a query has."""

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
    def contextual_attention_paste_backward(self, *args: Any, **kwargs: Any) -> None: ...  # noqa: D102
    def contextual_attention_softmax_backward(self, *args: Any, **kwargs: Any) -> None: ...  # noqa: D102
    def contextual_attention_fuse_backward(self, *args: Any, **kwargs: Any) -> None: ...  # noqa: D102
    def contextual_attention_patch_backward(self, *args: Any, **kwargs: Any) -> None: ...  # noqa: D102


class KeyWeights(NamedTuple):
    """What the kernels know of the keys of one sample, each [keys] or None."""

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
    call = _Call(query, key, Semantics(*fields), selected, "offsets" if return_offsets else "output", kernels)
    (height, width), rate, plan = call.queries, call.semantics.rate, call.plan
    output = value.new_zeros(query.shape[0], value.shape[1], rate * height, rate * width)
    matches = (query.shape[0], height, width) if return_offsets else (0,)
    index = query.new_full(matches, -1, dtype=torch.int64)
    maximum = query.new_zeros(matches, dtype=call.dtype)
    for sample in range(query.shape[0]):
        keys = call.key_weights(sample, key, valid, key_scale, key_bias)
        query_rows, key_columns = query[sample].flatten(1).t().contiguous(), key[sample].flatten(1)
        value_cells = [call.value_cells(value[sample], phases) for phases in plan.phases]
        for tile in plan.tiles:
            logits, statistics, _ = call.attend(tile, query_rows, key_columns, keys)
            if return_offsets:
                call.kernels.contextual_attention_matches(
                    call.geometry(tile, plan.phases[0]),
                    *keys.masking,
                    logits,
                    statistics,
                    call.selected,
                    index[sample],
                    maximum[sample],
                )
            for phases, cells in zip(plan.phases, value_cells, strict=True):
                geometry = call.geometry(tile, phases)
                weights = call.work.weights(tile, cells.dtype, in_correlations=True)
                call.kernels.contextual_attention_paste_weights(geometry, *keys.masking, logits, statistics, weights)
                call.kernels.contextual_attention_paste(
                    geometry,
                    phases.fields(rate, call.semantics.pad_put),
                    _product(weights, cells),
                    *call.pixel_weights,
                    call.selected,
                    output[sample],
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
    """The op's backward: gradients of query, key and value; maps and gradients float32 or float64, contiguous."""
    call = _Call(query, key, Semantics(*scalars), selected, "gradients", kernels)
    gradients = [torch.empty_like(x) for x in (query, key, value)]
    for sample in range(query.shape[0]):
        keys = call.key_weights(sample, key, valid, key_scale, key_bias)
        sums = _GradientSums(call, query[sample], key[sample], value[sample], grad[sample], keys)
        for tile in call.plan.tiles:
            sums.add(tile)
        for gradient, of_sample in zip(gradients, sums.gradients(value.shape[2:]), strict=True):
            gradient[sample] = of_sample
    return gradients[0], gradients[1], gradients[2]


class _Call:
    """What all samples and tiles of a call share."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        semantics: Semantics,
        selected: Tensor | None,
        purpose: str,
        kernels: Kernels | None,
    ) -> None:
        self.kernels: Kernels = torch.ops.inpaint_native if kernels is None else kernels
        self.semantics = semantics
        self.queries, self.keys = (query.shape[2], query.shape[3]), (key.shape[2], key.shape[3])
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        wanted = None if selected is None else selected.numpy().tobytes()
        self.plan = make_plan(self.queries, self.keys, semantics, wanted, purpose, self.dtype.itemsize)
        self.selected = None if wanted is None else _selected_on(query.device, wanted, self.queries)
        self.pixel_weights = [_pixel_weights(n, semantics, query.device, self.dtype) for n in self.queries]
        self.work = _Workspace(self, query.device, backward=purpose == "gradients")

    def geometry(self, tile: Tile, phases: Phases) -> Tensor:
        """What the kernels take (struct AttentionTile)."""
        fields = (
            *(*self.queries, *self.keys, self.semantics.patch, self.semantics.half),
            *(*tile.queries, *tile.cells, phases.reach_y, phases.reach_x, *self.plan.key_cells),
        )
        return torch.tensor(fields, device="cpu")

    def key_weights(
        self, sample: int, key: Tensor, valid: Tensor | None, key_scale: Tensor | None, key_bias: Tensor | None
    ) -> KeyWeights:
        """What the kernels know of the keys of one sample."""
        semantics = self.semantics
        norm = self.kernels.contextual_attention_key_norm(
            key[sample : sample + 1].to(self.dtype), semantics.patch, semantics.norm, semantics.eps
        )
        inverse_norm = norm.reciprocal().flatten()
        factor, offset = torch.full_like(inverse_norm, semantics.scale), torch.zeros_like(inverse_norm)
        if key_scale is not None:
            factor *= _of_sample(key_scale, sample)
        if key_bias is not None:
            offset += _of_sample(key_bias, sample)
        keep = None
        if valid is not None:
            eligible = _of_sample(valid, sample)
            fill = {"multiply": 0.0, "inf": -math.inf, "fill": semantics.scale * semantics.fill}[semantics.masking]
            factor.masked_fill_(~eligible, 0)
            offset.masked_fill_(~eligible, fill)
            keep = eligible.to(self.dtype) if semantics.masking == "multiply" else None
        return KeyWeights(inverse_norm, factor, offset, keep, -1.0 if semantics.floor is None else semantics.floor)

    def value_cells(self, value: Tensor, phases: Phases) -> Tensor:
        """A value map [Cv, H, W] as a matrix [key cells, Cv * phases]."""
        return _cells(value, phases, self.plan.key_cells, self.semantics.rate, self.semantics.pad_cut).flatten(0, 1)

    def attend(
        self, tile: Tile, query_rows: Tensor, key_columns: Tensor, keys: KeyWeights
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [queries, keys]; maximum and inverse sum of exponentials of each query, [2, .]; correlations."""
        work = self.work
        pixels = torch.cat([query_rows[run] for run in tile.pixels.slices])
        correlations = _product(pixels, key_columns, out=work.correlations(tile))
        self.kernels.contextual_attention_rows(tile.pixels.runs, tile.pixels.number, work.pixel_row, work.pixel_at)
        logits, partial, statistics = work.logits(tile), work.partial(tile), work.statistics(tile)
        geometry = self.geometry(tile, self.plan.phases[0])
        self.kernels.contextual_attention_scores(geometry, correlations, work.pixel_row, *keys.scoring, logits, partial)
        self.kernels.contextual_attention_statistics(partial, statistics)
        return logits, statistics, correlations


class _GradientSums:
    """The gradients of one sample, collected tile by tile."""

    def __init__(self, call: _Call, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, keys: KeyWeights) -> None:
        self._call, self._keys, self._key_map = call, keys, key
        self._query_rows, self._key_columns = query.flatten(1).t().contiguous(), key.flatten(1)
        self._value_cells = [call.value_cells(value, phases) for phases in call.plan.phases]
        self._gradient_cells = [self._output_cells(grad, phases) for phases in call.plan.phases]
        self._query = torch.zeros_like(self._query_rows)
        self._key = torch.zeros_like(self._key_columns)
        self._value = [torch.zeros_like(cells) for cells in self._value_cells]
        self._norm_sums = keys.inverse_norm.new_zeros(NORM_PIECES, keys.inverse_norm.numel())

    def _output_cells(self, grad: Tensor, phases: Phases) -> Tensor:
        """The gradient of the pasted sums [cell rows, cell columns, Cv * phases]."""
        call = self._call
        rows, columns = call.pixel_weights
        weighted = grad * (rows[:, None] * columns)
        if call.selected is not None:
            rate = call.semantics.rate
            wanted = call.selected.repeat_interleave(rate, 0).repeat_interleave(rate, 1)
            weighted = torch.where(wanted, weighted, 0)
        more = call.semantics.reach - 1
        grid = (call.queries[0] + more, call.queries[1] + more)
        return _cells(weighted, phases, grid, call.semantics.rate, call.semantics.pad_put)

    def add(self, tile: Tile) -> None:
        """Add the share of a tile's queries."""
        call, work, kernels = self._call, self._call.work, self._call.kernels
        logits, statistics, correlations = call.attend(tile, self._query_rows, self._key_columns, self._keys)
        gradients = work.gradients(tile)
        top, left, height, width = tile.cells
        for number, phases in enumerate(call.plan.phases):
            geometry = call.geometry(tile, phases)
            weights = work.weights(tile, call.dtype, in_correlations=False)
            kernels.contextual_attention_paste_weights(geometry, *self._keys.masking, logits, statistics, weights)
            pasted = self._gradient_cells[number][top : top + height, left : left + width].flatten(0, 1)
            self._value[number].addmm_(weights.t(), pasted)
            torch.mm(pasted, self._value_cells[number].t(), out=weights)
            kernels.contextual_attention_paste_backward(geometry, weights, number > 0, gradients)
        geometry = call.geometry(tile, call.plan.phases[0])
        kernels.contextual_attention_softmax_backward(
            geometry, self._keys.factor, *self._keys.masking, logits, statistics, gradients
        )
        kernels.contextual_attention_rows(tile.scores.runs, tile.scores.number, work.score_row, work.score_at)
        score_gradients = work.score_gradients(tile)
        kernels.contextual_attention_fuse_backward(
            geometry,
            gradients,
            correlations,
            work.pixel_row,
            self._keys.inverse_norm,
            work.score_at[: tile.scores.number],
            score_gradients,
            self._norm_sums,
        )
        pixels = work.pixel_at[: tile.pixels.number]
        kernels.contextual_attention_patch_backward(geometry, score_gradients, work.score_row, pixels, correlations)
        self._key.addmm_(torch.cat([self._query_rows[run] for run in tile.pixels.slices]).t(), correlations)
        query_gradients = torch.mm(correlations, self._key_columns.t())
        sizes = [run.stop - run.start for run in tile.pixels.slices]
        for run, terms in zip(tile.pixels.slices, query_gradients.split(sizes), strict=True):
            self._query[run] += terms

    def gradients(self, value_size: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the sample's query [C, hq, wq], key [C, hk, wk] and value [Cv, Hv, Wv]."""
        call = self._call
        semantics = call.semantics
        query = self._query.t().unflatten(1, call.queries)
        key = self._key.unflatten(1, call.keys) + self._key_map * self._energy_gradient()
        rate, pad = semantics.rate, semantics.pad_cut
        (rows, columns), (height, width) = call.plan.key_cells, value_size
        channels = self._value[0].shape[1] // math.prod(
            part.stop - part.start for part in (call.plan.phases[0].y, call.plan.phases[0].x)
        )
        framed = query.new_empty(channels, rows, rate, columns, rate)
        for phases, cells in zip(call.plan.phases, self._value, strict=True):
            target = framed[:, :, phases.y, :, phases.x].permute(1, 3, 0, 2, 4)
            target.copy_(cells.view(target.shape))
        value = framed.view(channels, rows * rate, columns * rate)
        value = F.pad(value, (-pad, width + pad - rate * columns, -pad, height + pad - rate * rows))
        return query, key, value

    def _energy_gradient(self) -> Tensor:
        """Twice the gradient of each pixel's squared length [hk, wk], through the norms of the patches it lies in."""
        semantics, inverse_norm = self._call.semantics, self._keys.inverse_norm
        norm = inverse_norm.reciprocal()
        if semantics.norm == "none":
            slope = torch.zeros_like(norm)
        elif semantics.norm == "sum":
            slope = 0.5 * inverse_norm
        else:
            root = norm - semantics.eps if semantics.norm == "add" else norm
            slope = torch.where(norm > semantics.eps, 0.5 / root, 0)
        sums = self._norm_sums.sum(0)
        squared = torch.where(sums == 0, 0, -sums * inverse_norm * slope)
        before = (semantics.patch - 1) // 2
        after = semantics.patch - 1 - before
        framed = F.pad(squared.view(1, *self._call.keys), (after, before, after, before))
        return 2 * F.avg_pool2d(framed, semantics.patch, stride=1, divisor_override=1)


class _Workspace:
    """The matrices of a call, each fit for any of its tiles. In the forward, weights share the correlations' memory."""

    def __init__(self, call: _Call, device: torch.device, backward: bool) -> None:
        plan = call.plan
        self._keys, self._key_cells = math.prod(call.keys), math.prod(plan.key_cells)
        self._partials = -(-(self._keys + WALK - 1) // SCORE_THREADS) * (SCORE_THREADS // WARP)
        empty = functools.partial(torch.empty, dtype=call.dtype, device=device)
        rows = functools.partial(torch.empty, dtype=torch.int32, device=device)
        weights = plan.most_cells * self._key_cells
        self._correlations = empty(max(plan.most_pixels * self._keys, 0 if backward else weights))
        self._logits = empty(plan.most_queries * self._keys)
        self._partial = empty(2 * plan.most_queries * self._partials)
        self._statistics = empty(2 * plan.most_queries)
        self.pixel_row, self.pixel_at = rows(math.prod(call.queries)), rows(plan.most_pixels)
        if backward:
            self._weights, self._gradients = empty(weights), empty(plan.most_queries * self._keys)
            self._score_gradients = empty(plan.most_scores * self._keys)
            self.score_row, self.score_at = rows(math.prod(call.queries)), rows(plan.most_scores)

    def correlations(self, tile: Tile) -> Tensor:
        """[pixels, keys]."""
        return _part(self._correlations, tile.pixels.number, self._keys)

    def weights(self, tile: Tile, dtype: torch.dtype, in_correlations: bool) -> Tensor:
        """[cells, key cells]."""
        memory = self._correlations if in_correlations else self._weights
        return _part(memory.view(dtype), tile.cell_count, self._key_cells)

    def logits(self, tile: Tile) -> Tensor:
        """[queries, keys]."""
        return _part(self._logits, tile.query_count, self._keys)

    def gradients(self, tile: Tile) -> Tensor:
        """[queries, keys]."""
        return _part(self._gradients, tile.query_count, self._keys)

    def score_gradients(self, tile: Tile) -> Tensor:
        """[positions of scores, keys]."""
        return _part(self._score_gradients, tile.scores.number, self._keys)

    def partial(self, tile: Tile) -> Tensor:
        """[2, queries, partials]: maxima and sums of exponentials of every warp."""
        return _part(self._partial, 2, tile.query_count, self._partials)

    def statistics(self, tile: Tile) -> Tensor:
        """[2, queries]."""
        return _part(self._statistics, 2, tile.query_count)


def _part(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)


def _of_sample(per_key: Tensor, sample: int) -> Tensor:
    """[B or 1, hk, wk] -> [keys]."""
    return per_key[sample if per_key.shape[0] > 1 else 0].flatten()


def _cells(pixels: Tensor, phases: Phases, grid: Grid, rate: int, pad: int) -> Tensor:
    """The pixels of some phases of a map [C, H, W] and its border, cell by cell: [rows, columns, C * phases]."""
    (rows, columns), (channels, height, width) = grid, pixels.shape
    framed = F.pad(pixels, (pad, rate * columns - pad - width, pad, rate * rows - pad - height))
    chosen = framed.view(channels, rows, rate, columns, rate)[:, :, phases.y, :, phases.x]
    return chosen.permute(1, 3, 0, 2, 4).flatten(2)


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
    """The product of two matrices, summed in float32 at least and not rounded to a shorter dtype."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)  # torch's CPU product has no other dtype of result
