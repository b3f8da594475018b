"""Contextual attention in plain torch operations: exact, any device, memory bounded by one tile of queries.

One tile after the other: pixel correlations of the tile's queries with all keys (one product), patch scores and fuse
as diagonal sums of shifted blocks, softmax, and the paste as a diagonal sum of probabilities and one product with the
r x r cells of the value map. The backward recomputes every tile and applies the adjoint of each step in reverse order.
All large matrices come from a small pool that is reused from tile to tile.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inpaint_kernels.portable._contextual_attention_tiles import Pass, Selection, Semantics, Tile

WORKSPACE_BYTES = 256 << 20
"""Aim for all matrices of a tile together; a tile has at least one query, whatever that costs."""

LARGEST_TILE = 1024
"""Queries of a tile: beyond this its halo is cheap, and smaller matrices stay closer to the cache."""

FORWARD_MATRICES = 2
BACKWARD_MATRICES = 4
"""Matrices of a tile in use at once; one more if a cell falls into several phases, or with a floor in the backward."""


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    key_scale: Tensor | None,
    key_bias: Tensor | None,
    selected: Tensor | None,
    *semantics_and_return_offsets: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's forward; arguments and results as in :func:`inpaint_kernels.reference.contextual_attention.forward`."""
    *scalars, return_offsets = semantics_and_return_offsets
    semantics = Semantics(*scalars)
    (batch, _, height, width), rate = query.shape, semantics.rate
    selection = Selection((height, width), _size(key), semantics, selected, return_offsets)
    pool = _Pool(selection, query, FORWARD_MATRICES)
    canvas = _Canvas(selection, value)
    output = value.new_zeros(batch, value.shape[1], rate * height, rate * width)
    index = query.new_full((batch, height * width), -1, dtype=torch.int64)
    maximum = query.new_zeros(index.shape)
    for sample in range(batch):
        keys = _Keys(sample, query, key, valid, key_scale, key_bias, semantics)
        value_cells = _value_cells(value[sample], selection)
        pasted = canvas.blank()
        for tile in pool.tiles:
            probabilities, _ = _attend(keys, tile, pool)
            if semantics.floor is not None:
                probabilities.clamp_(min=semantics.floor)
            if return_offsets:
                _store_maximum(probabilities, tile, selection.selected, index[sample], maximum[sample])
            for number, (phases, passes) in enumerate(zip(selection.paste_phases, tile.pastes, strict=True), start=1):
                rows = pool.sum(passes[0], probabilities, keep=number < len(tile.pastes))
                weights = pool.sum(passes[1], rows)
                _add_rows(phases.of(pasted), tile.cells, weights @ value_cells[number - 1].t())
                pool.give(weights)
        canvas.write(pasted, output[sample])
    if not return_offsets:
        return output, index.new_empty(0), maximum.new_empty(0)
    return output, index.view(batch, height, width), maximum.view(batch, height, width)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's backward: gradients of query, key and value, recomputing the forward tile by tile."""
    semantics = Semantics(*scalars)
    selection = Selection(_size(query), _size(key), semantics, selected, offsets=False)
    pool = _Pool(selection, query, BACKWARD_MATRICES)
    canvas = _Canvas(selection, value)
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    for sample in range(query.shape[0]):
        keys = _Keys(sample, query, key, valid, key_scale, key_bias, semantics)
        value_cells = _value_cells(value[sample], selection)
        value_grads = [torch.zeros_like(columns) for columns in value_cells]
        score_grads = _ScoreGradients(keys)
        cell_grads = canvas.read(grad[sample])
        for tile in pool.tiles:
            probabilities, scores = _attend(keys, tile, pool, keep_scores=True)
            prob_grad = _paste_adjoint(probabilities, cell_grads, value_cells, value_grads, tile, selection, pool)
            logit_grad = _softmax_adjoint(probabilities, prob_grad, pool)
            score_grads.add(logit_grad, scores, tile, pool)
        gradients[0][sample] = score_grads.query().view(query.shape[1:])
        gradients[1][sample] = score_grads.key().view(key.shape[1:])
        gradients[2][sample] = _value_from_cells(value_grads, selection, value[sample])
    return gradients[0], gradients[1], gradients[2]


# The pool of matrices, and diagonal sums ------------------------------------------------------------------------------


class _Pool:
    """The tiles of a call and the matrices they share: as many as are in use at once, each fit for any tile."""

    def __init__(self, selection: Selection, like: Tensor, matrices: int) -> None:
        """Cut the selection so that ``matrices`` of a tile stay within the budget; nothing else decides."""
        columns = math.prod(selection.value_grid)
        rows = WORKSPACE_BYTES // (matrices * columns * like.element_size())
        side = max(1, math.isqrt(rows) - selection.halo)
        self.tiles = selection.tiles(min(LARGEST_TILE, side * side))
        self._capacity = max((tile.rows for tile in self.tiles), default=0) * columns
        self._like = like
        self._all: dict[int, Tensor] = {}
        self._free: list[Tensor] = []

    def take(self, rows: int, columns: int) -> Tensor:
        """An uninitialised matrix."""
        if not self._free:
            fresh = self._like.new_empty(self._capacity)
            self._all[fresh.untyped_storage().data_ptr()] = fresh
            self._free.append(fresh)
        return self._free.pop()[: rows * columns].view(rows, columns)

    def give(self, matrix: Tensor) -> None:
        """Take a matrix back."""
        self._free.append(self._all[matrix.untyped_storage().data_ptr()])

    def sum(self, one: Pass, source: Tensor, weight: Tensor | None = None, keep: bool = False) -> Tensor:
        """The diagonal sum of ``source``, times ``weight`` per key; ``source`` is given back unless ``keep``."""
        stage = one.stage
        out = self.take(one.out_rows, math.prod(stage.out_keys))
        target, read = out.view(-1, *stage.out_keys), source.view(-1, *stage.source_keys)
        factor = None if weight is None else weight.view(stage.out_keys)
        if not stage.covering:
            target.zero_()
        for number, (step, runs) in enumerate(zip(stage.steps, one.runs, strict=True)):
            for out_rows, source_rows in runs:
                for out_box, source_box in step.boxes:
                    _accumulate(
                        target[(out_rows, *out_box)],
                        read[(source_rows, *source_box)],
                        None if factor is None else factor[out_box],
                        first=stage.covering and number == 0,
                    )
        if not keep:
            self.give(source)
        return out

    def adjoint(self, one: Pass, grad: Tensor, into: Tensor | None = None) -> Tensor:
        """Gradient of the source of an unweighted diagonal sum, added to ``into`` if given; ``grad`` is given back."""
        stage = one.stage
        if into is None:
            into = self.take(one.source_rows, math.prod(stage.source_keys)).zero_()
        target, read = into.view(-1, *stage.source_keys), grad.view(-1, *stage.out_keys)
        for step, runs in zip(stage.steps, one.runs, strict=True):
            for out_rows, source_rows in runs:
                for out_box, source_box in step.boxes:
                    target[(source_rows, *source_box)].add_(read[(out_rows, *out_box)])
        self.give(grad)
        return into


def _accumulate(target: Tensor, term: Tensor, factor: Tensor | None, first: bool) -> None:
    if factor is None:
        if first:
            target.copy_(term)
        else:
            target.add_(term)
    elif first:
        torch.mul(term, factor, out=target)
    else:
        target.addcmul_(term, factor)


# Attention of one tile ------------------------------------------------------------------------------------------------


class _Keys:
    """What all tiles of one sample share on the query and key side."""

    def __init__(
        self,
        sample: int,
        query: Tensor,
        key: Tensor,
        valid: Tensor | None,
        key_scale: Tensor | None,
        key_bias: Tensor | None,
        semantics: Semantics,
    ) -> None:
        self.semantics = semantics
        self.query_rows = query[sample].flatten(1).t().contiguous()  # [Lq, C]
        self.map = key[sample]
        self.key = self.map.flatten(1)  # [C, Lk]
        self.energy = self.map.square().sum(0)
        self.norm_squared = _box_sum(self.energy, semantics.patch).flatten()
        self.inverse_norm = 1 / _norm(self.norm_squared, self.key.shape[0], semantics)
        self.valid = _of_sample(valid, sample)
        # Factor of the fused scores: 0 for an invalid key, whose logit the masking replaces or multiplies by 0.
        self.weight = torch.full_like(self.inverse_norm, semantics.scale)
        for factor in (_of_sample(key_scale, sample), self.valid):
            if factor is not None:
                self.weight *= factor
        self.bias = _of_sample(key_bias, sample)
        if self.bias is not None:
            self.bias = self.bias.to(self.weight.dtype)
            if self.valid is not None:
                self.bias = self.bias * self.valid
        self.invalid = None if self.valid is None else (~self.valid).nonzero()[:, 0]
        self.nothing_valid = self.invalid is not None and self.invalid.numel() == self.key.shape[1]

    def mask(self, logits: Tensor) -> Tensor:
        """Replace the logits of invalid keys, in place (masking "multiply": the weight 0 has done it)."""
        if self.invalid is not None and self.semantics.masking != "multiply":
            fill = -math.inf if self.semantics.masking == "inf" else self.semantics.scale * self.semantics.fill
            logits.index_fill_(1, self.invalid, fill)
        return logits

    def mask_probabilities(self, probabilities: Tensor) -> Tensor:
        """What the masking does after the softmax, in place."""
        if self.valid is not None and self.semantics.masking == "multiply":
            probabilities.mul_(self.valid)
        elif self.nothing_valid and self.semantics.masking == "inf":
            probabilities.zero_()
        return probabilities


def _attend(keys: _Keys, tile: Tile, pool: _Pool, keep_scores: bool = False) -> tuple[Tensor, Tensor]:
    """Probabilities [queries, Lk] of a tile, and its normalised patch scores, overwritten unless ``keep_scores``."""
    vertical, horizontal, *fuse = tile.scores
    pixels = _take_rows(keys.query_rows, tile.pixels)
    correlations = torch.mm(pixels, keys.key, out=pool.take(pixels.shape[0], keys.key.shape[1]))
    scores = pool.sum(horizontal, pool.sum(vertical, correlations), weight=keys.inverse_norm)
    if fuse:
        logits = pool.sum(fuse[1], pool.sum(fuse[0], scores, keep=keep_scores), weight=keys.weight)
    else:
        logits = torch.mul(scores, keys.weight, out=pool.take(*scores.shape) if keep_scores else scores)
    if keys.bias is not None:
        logits.add_(keys.bias)
    probabilities = torch.softmax(keys.mask(logits), 1, out=pool.take(*logits.shape))
    pool.give(logits)
    return keys.mask_probabilities(probabilities), scores


def _store_maximum(probabilities: Tensor, tile: Tile, selected: Tensor, index: Tensor, maximum: Tensor) -> None:
    """Write the largest probability of every wanted query of a tile, and its key, into [Lq] tensors."""
    wanted = selected.flatten()[tile.queries]
    rows, queries = wanted.nonzero()[:, 0].to(index.device), tile.queries[wanted].to(index.device)
    best, key = probabilities.max(1)
    maximum[queries], index[queries] = best[rows], key[rows]


# Adjoints of the steps, in reverse order ------------------------------------------------------------------------------


def _paste_adjoint(
    probabilities: Tensor,
    cell_grads: Tensor,
    value_cells: list[Tensor],
    value_grads: list[Tensor],
    tile: Tile,
    selection: Selection,
    pool: _Pool,
) -> Tensor:
    """Add a tile's share to the gradients of the value cells; returns the gradient of its probabilities."""
    floor = selection.semantics.floor
    pasted = probabilities
    if floor is not None:
        pasted = torch.clamp(probabilities, min=floor, out=pool.take(*probabilities.shape))
    grads = _take_rows(cell_grads, tile.cells)
    prob_grad = None
    for number, (phases, passes) in enumerate(zip(selection.paste_phases, tile.pastes, strict=True)):
        weights = pool.sum(passes[1], pool.sum(passes[0], pasted, keep=True))
        phase_grads = phases.of(grads).flatten(1)
        value_grads[number].addmm_(phase_grads.t(), weights)
        weight_grads = torch.mm(phase_grads, value_cells[number], out=weights)
        prob_grad = pool.adjoint(passes[0], pool.adjoint(passes[1], weight_grads), into=prob_grad)
    assert prob_grad is not None  # rate >= 1: there is at least one phase
    if floor is not None:
        pool.give(pasted)
        prob_grad.masked_fill_(probabilities < floor, 0)
    return prob_grad


def _softmax_adjoint(probabilities: Tensor, prob_grad: Tensor, pool: _Pool) -> Tensor:
    """Gradient of the logits; both arguments are given back. Invalid keys get 0: their probability or weight is."""
    logit_grad = torch.mul(probabilities, prob_grad, out=pool.take(*probabilities.shape))
    mean = logit_grad.sum(1, keepdim=True)
    logit_grad.addcmul_(probabilities, mean, value=-1)
    pool.give(probabilities)
    pool.give(prob_grad)
    return logit_grad


class _ScoreGradients:
    """Gradients of one sample's query and key maps, collected tile by tile."""

    def __init__(self, keys: _Keys) -> None:
        self.keys = keys
        self._query_rows = torch.zeros_like(keys.query_rows)
        self._key = torch.zeros_like(keys.key)
        self._norm = torch.zeros_like(keys.inverse_norm)

    def add(self, logit_grad: Tensor, scores: Tensor, tile: Tile, pool: _Pool) -> None:
        """Add the share of a tile; both matrices are given back."""
        vertical, horizontal, *fuse = tile.scores
        grad = logit_grad.mul_(self.keys.weight)
        for one in reversed(fuse):
            grad = pool.adjoint(one, grad)
        self._norm -= scores.mul_(grad).sum(0) * self.keys.inverse_norm
        pool.give(scores)
        grad.mul_(self.keys.inverse_norm)
        grad = pool.adjoint(vertical, pool.adjoint(horizontal, grad))
        _add_rows(self._query_rows, tile.pixels, grad @ self.keys.key.t())
        self._key.addmm_(_take_rows(self.keys.query_rows, tile.pixels).t(), grad)
        pool.give(grad)

    def query(self) -> Tensor:
        """Gradient of the query map, [C, Lq]."""
        return self._query_rows.t()

    def key(self) -> Tensor:
        """Gradient of the key map through the correlations and through the norms, [C, Lk]."""
        keys = self.keys
        squared_grad = self._norm * _norm_slope(keys.norm_squared, keys.inverse_norm, keys.semantics)
        energy_grad = _box_sum(squared_grad.view_as(keys.energy), keys.semantics.patch, adjoint=True)
        return self._key + 2 * keys.key * energy_grad.flatten()


def _take_rows(x: Tensor, rows: list[slice]) -> Tensor:
    return torch.cat([x[part] for part in rows]) if rows else x[:0]


def _add_rows(x: Tensor, rows: list[slice], terms: Tensor) -> None:
    """Add the rows of ``terms``, reshaped as those of ``x``, to the named rows of ``x``."""
    terms = terms.view(terms.shape[0], *x.shape[1:])
    for part, term in zip(rows, terms.split([part.stop - part.start for part in rows]), strict=True):
        x[part] += term


# Norms ----------------------------------------------------------------------------------------------------------------


def _box_sum(x: Tensor, size: int, adjoint: bool = False) -> Tensor:
    """Sum over the ``size`` x ``size`` window around every position of [H, W], zero outside."""
    before = (size - 1) // 2
    after = size - 1 - before
    if adjoint:
        before, after = after, before
    framed = F.pad(x[None], (before, after, before, after))
    return F.avg_pool2d(framed, size, stride=1, divisor_override=1)[0]


def _norm(squared: Tensor, channels: int, semantics: Semantics) -> Tensor:
    """Divisor of every key patch from its sum of squares; the rules are those of the reference's ``patch_norm``."""
    eps = semantics.eps
    if semantics.norm == "none":
        return torch.ones_like(squared)
    if semantics.norm == "sum":
        return (squared + eps * channels * semantics.patch**2).sqrt()
    return squared.sqrt().clamp(min=eps) if semantics.norm == "max" else squared.sqrt() + eps


def _norm_slope(squared: Tensor, inverse_norm: Tensor, semantics: Semantics) -> Tensor:
    """Derivative of the norm by the sum of squares; 0 where a patch is all zero or its norm was clamped."""
    if semantics.norm == "none":
        return torch.zeros_like(squared)
    if semantics.norm == "sum":
        return inverse_norm / 2
    root = squared.sqrt()
    moves = root > 0 if semantics.norm == "add" else (root > 0) & (root >= semantics.eps)
    return torch.where(moves, 0.5 / root, 0)


def _of_sample(per_key: Tensor | None, sample: int) -> Tensor | None:
    """[B or 1, hk, wk] -> [Lk]."""
    return None if per_key is None else per_key[sample if per_key.shape[0] > 1 else 0].flatten()


# Maps as cells of rate x rate pixels ----------------------------------------------------------------------------------


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]


def _value_cells(value: Tensor, selection: Selection) -> list[Tensor]:
    """Cells of a value map [Cv, H, W] and its border: a matrix [Cv * phases, cells] per entry of ``paste_phases``."""
    rate, pad = selection.semantics.rate, selection.semantics.pad_cut
    (rows, columns), (height, width) = selection.value_grid, value.shape[1:]
    framed = F.pad(value, (pad, rate * columns - pad - width, pad, rate * rows - pad - height))
    cells = F.pixel_unshuffle(framed, rate).view(-1, rate, rate, rows * columns)
    return [cells[:, phases.y, phases.x].flatten(0, 2) for phases in selection.paste_phases]


def _value_from_cells(grads: list[Tensor], selection: Selection, value: Tensor) -> Tensor:
    """Adjoint of :func:`_value_cells`."""
    rate, pad = selection.semantics.rate, selection.semantics.pad_cut
    (rows, columns), (channels, height, width) = selection.value_grid, value.shape
    cells = value.new_empty(channels, rate, rate, rows * columns)
    for phases, grad in zip(selection.paste_phases, grads, strict=True):
        target = cells[:, phases.y, phases.x]
        target.copy_(grad.view(target.shape))
    framed = F.pixel_shuffle(cells.view(channels * rate**2, rows, columns), rate)
    return F.pad(framed, (-pad, width + pad - rate * columns, -pad, height + pad - rate * rows))


class _Canvas:
    """The part of the output that is wanted, as cells [cells, Cv, rate, rate] of the box ``selection.canvas``."""

    def __init__(self, selection: Selection, value: Tensor) -> None:
        self._value = value
        self._rate = selection.semantics.rate
        self._box = selection.canvas
        # Where the box lies in the output, and which part of the box's own pixels that is.
        rows, self._inner_rows = selection.canvas_pixels(0)
        columns, self._inner_columns = selection.canvas_pixels(1)
        self._region = (slice(None), rows, columns)
        self._divisor = selection.divisor(rows, columns).to(value)
        self._unwanted = ~selection.wanted_pixels(rows, columns).to(value.device)

    def blank(self) -> Tensor:
        """Cells of zeros."""
        y0, x0, y1, x1 = self._box
        return self._value.new_zeros((y1 - y0) * (x1 - x0), self._value.shape[1], self._rate, self._rate)

    def write(self, cells: Tensor, output: Tensor) -> None:
        """Divide and store the pixels of one sample, [Cv, rate * hq, rate * wq]; unwanted ones stay 0."""
        y0, x0, y1, x1 = self._box
        pixels = cells.view(y1 - y0, x1 - x0, *cells.shape[1:]).permute(2, 0, 3, 1, 4)
        pixels = pixels.flatten(3, 4).flatten(1, 2)[:, self._inner_rows, self._inner_columns]
        output[self._region] = (pixels / self._divisor).masked_fill_(self._unwanted, 0)

    def read(self, grad: Tensor) -> Tensor:
        """Adjoint of :meth:`write`."""
        y0, x0, y1, x1 = self._box
        pixels = grad.new_zeros(grad.shape[0], (y1 - y0) * self._rate, (x1 - x0) * self._rate)
        inner = (grad[self._region] / self._divisor).masked_fill_(self._unwanted, 0)
        pixels[:, self._inner_rows, self._inner_columns] = inner
        cells = pixels.view(grad.shape[0], y1 - y0, self._rate, x1 - x0, self._rate).permute(1, 3, 0, 2, 4)
        return cells.flatten(0, 1).contiguous()
