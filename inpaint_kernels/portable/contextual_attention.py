"""Contextual attention in plain torch operations: exact, any device, memory bounded by one tile of queries.

One tile after the other: pixel correlations of the tile's queries with all keys (one product), patch scores and fuse as
diagonal sums of shifted blocks, softmax, and the paste as a diagonal sum of probabilities and one product with the r x r
cells of the value map. The backward recomputes every tile and applies the adjoint of each step in reverse order.
All large matrices come from a small pool that is reused from tile to tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inpaint_kernels.portable._contextual_attention_tiles import Pass, PastePhases, Selection, Semantics, Step, Tile

WORKSPACE_BYTES = 256 << 20
"""Aim for all matrices of a tile together; a tile has at least one query, whatever that costs."""

LARGEST_TILE = 1024
"""Queries of a tile: beyond this its halo is cheap, and smaller matrices stay closer to the cache."""

FORWARD_MATRICES = 2
BACKWARD_MATRICES = 4


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
            probabilities, scores = _attend(keys, tile, pool)
            pool.give(scores)
            if semantics.floor is not None:
                probabilities.clamp_(min=semantics.floor)
            if return_offsets:
                _store_maximum(probabilities, tile, selection.selected, index[sample], maximum[sample])
            cells = tile.cells.to(query.device)
            for phases, passes, columns in zip(selection.paste_phases, tile.pastes, value_cells, strict=True):
                weights = pool.sum(passes[1], pool.sum(passes[0], probabilities, keep=True))
                target = phases.of(pasted)
                target.index_add_(0, cells, (weights @ columns.t()).view(-1, *target.shape[1:]))
                pool.give(weights)
            pool.give(probabilities)
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
        cell_grads = canvas.read(grad[sample])
        for tile in pool.tiles:
            probabilities, scores = _attend(keys, tile, pool)
            prob_grad = _paste_adjoint(
                probabilities, cell_grads, value_cells, value_grads, tile, selection, pool
            )
            logit_grad = _softmax_adjoint(probabilities, prob_grad, semantics.floor, pool)
            keys.scores_adjoint(scores, logit_grad.mul_(keys.weight), tile, pool)
        query_grad, key_grad = keys.gradients()
        gradients[0][sample] = query_grad.view(query.shape[1:])
        gradients[1][sample] = key_grad.view(key.shape[1:])
        gradients[2][sample] = _value_from_cells(value_grads, selection, value[sample])
    return gradients[0], gradients[1], gradients[2]


# The pool of matrices, and diagonal sums --------------------------------------------------------------------------------


class _Pool:
    """The tiles of a call and the matrices they share: as many as are in use at once, each as large as any tile needs."""

    def __init__(self, selection: Selection, like: Tensor, matrices: int) -> None:
        """Cut the selection so that ``matrices`` of a tile stay within the budget (tile sizes depend on nothing else)."""
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
            self._all[fresh.data_ptr()] = fresh
            self._free.append(fresh)
        return self._free.pop()[: rows * columns].view(rows, columns)

    def give(self, matrix: Tensor) -> None:
        """Take a matrix back."""
        self._free.append(self._all[matrix.data_ptr()])

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
        """Gradient of the source of a (not weighted) diagonal sum, added to ``into`` if given; ``grad`` is given back."""
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


# Attention of one tile --------------------------------------------------------------------------------------------------


class _Keys:
    """What all tiles of one sample share on the query and key side, and the gradients they collect."""

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
        self.query_grad = torch.zeros_like(self.query_rows)
        self.key_grad = torch.zeros_like(self.key)
        self.norm_grad = torch.zeros_like(self.inverse_norm)
