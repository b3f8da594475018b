"""The op ``match_patches``: for every query patch the key patch with the largest weighted correlation, exhaustively."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from inpaint_kernels._backends import OpBackends
from inpaint_kernels._checks import (
    check_dtype,
    check_floating,
    check_range,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from inpaint_kernels.ops._common import accumulation_dtype, always, cpu_reasons
from inpaint_kernels.ops.contextual_attention import Box, query_mask
from inpaint_kernels.portable import match_patches as portable
from inpaint_kernels.reference import match_patches as reference


class PatchMatches(NamedTuple):
    """What :func:`match_patches` returns.

    Attributes:
        index: [B, hq, wq] int64, flat index v * wk + u of the best key; -1 where not computed or no key can be chosen.
        score: [B, hq, wq] float32 (float64 for float64 inputs), the score of that key; -inf there.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    score: Tensor


# 1. The public function -----------------------------------------------------------------------------------------------


def match_patches(
    query: Tensor,
    key: Tensor,
    *,
    patch: int = 7,
    key_scale: Tensor | None = None,
    key_bias: Tensor | None = None,
    queries: Box | Tensor | None = None,
    valid: Tensor | None = None,
    backend: str | None = None,
) -> PatchMatches:
    """Find for every query position the key position whose patch correlates best with its own, over all keys.

    With delta over the ``patch`` x ``patch`` window (from -((patch - 1) // 2)), and zero outside the maps::

        score(p, q) = key_scale[q] * sum over delta of <query[p + delta], key[q + delta]> + key_bias[q]
        index(p)    = the q with the largest score(p, q)

    Scores are never stored together: memory is bounded by one tile of queries and keys. Only the ``queries`` asked
    for are computed. Scores accumulate in float32 (float64 for float64 inputs). There is no gradient: inputs are
    detached.

    A sum of squared differences with a weight w per query pixel is the same search: with query channels [2 w x, -w] and
    key channels [k, |k|^2], the score is the sum over the window of w * (2 <x, k> - |k|^2), largest where
    sum of w |x - k|^2 is smallest.

    Args:
        query: [B, C, hq, wq] float16, bfloat16, float32 or float64.
        key: [B, C, hk, wk], same dtype and device.
        patch: side of the patches, at least 1.
        key_scale: [B or 1, hk, wk] floating, factor of each key's correlation; None: 1.
        key_bias: [B or 1, hk, wk] floating, offset of each key's score; None: 0.
        queries: positions that are wanted: a box (y0, x0, y1, x1), end exclusive, or a bool mask [hq, wq]. Cost is
            proportional to their number. None: all.
        valid: [B or 1, hk, wk] bool, the keys that may be chosen; None: all.
        backend: "cpu", "portable" or "reference"; None: the first that can run (:func:`inpaint_kernels.explain`).

    Returns:
        :class:`PatchMatches`. Equal scores: the lowest index. A NaN score is never chosen.

    Raises:
        ValueError, TypeError: an argument has the wrong rank, size, dtype, device or value; the message names it.
        RuntimeError: an explicitly requested backend cannot run; the message says why.

    References:
        Criminisi et al., Region Filling and Object Removal by Exemplar-Based Image Inpainting, IEEE TIP 2004.
    """
    problem = _prepare(query, key, patch=patch, key_scale=key_scale, key_bias=key_bias, queries=queries, valid=valid)
    return PatchMatches(*torch.ops.inpaint_kernels.match_patches(*problem, BACKENDS.choose(problem, backend)))


# 2. Checks ------------------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """One checked call, in the order of the schema."""

    query: Tensor
    key: Tensor
    valid: Tensor | None
    key_scale: Tensor | None
    key_bias: Tensor | None
    queries: Tensor | None
    patch: int

    @property
    def device(self) -> torch.device:
        return self.query.device


def _prepare(
    query: Tensor,
    key: Tensor,
    *,
    patch: int = 7,
    key_scale: Tensor | None = None,
    key_bias: Tensor | None = None,
    queries: Box | Tensor | None = None,
    valid: Tensor | None = None,
) -> _Problem:
    sizes = check_shape("query", query, "B C hq wq")
    check_floating("query", query)
    key_sizes = check_shape("key", key, "B C hk wk", B=sizes["B"], C=sizes["C"])
    check_same_dtype(query=query, key=key)
    check_same_device(query=query, key=key, valid=valid, key_scale=key_scale, key_bias=key_bias)
    if not (key_sizes["hk"] and key_sizes["wk"]):
        raise ValueError(f"key: expected at least one key, got shape {list(key.shape)}")
    check_range("patch", patch, minimum=1, integer=True)
    for name, x in (("key_scale", key_scale), ("key_bias", key_bias), ("valid", valid)):
        if x is not None:
            check_shape(name, x, "B|1 hk wk", B=sizes["B"], hk=key_sizes["hk"], wk=key_sizes["wk"])
    for name, x in (("key_scale", key_scale), ("key_bias", key_bias)):
        if x is not None:
            check_floating(name, x)
    if valid is not None:
        check_dtype("valid", valid, (torch.bool,))
    wanted = None if queries is None else query_mask(queries, (sizes["hq"], sizes["wq"])).to(query.device)
    return _Problem(query.detach(), key.detach(), valid, _detached(key_scale), _detached(key_bias), wanted, patch)


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


# 3. Schema ------------------------------------------------------------------------------------------------------------

_library = torch.library.Library("inpaint_kernels", "FRAGMENT")
_library.define(
    "match_patches(Tensor query, Tensor key, Tensor? valid, Tensor? key_scale, Tensor? key_bias, Tensor? queries, "
    "int patch, str backend) -> (Tensor index, Tensor score)"
)


# 4. Fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("inpaint_kernels::match_patches", lib=_library)
def _fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], query.shape[2], query.shape[3])
    return query.new_empty(shape, dtype=torch.int64), query.new_empty(shape, dtype=accumulation_dtype(query))


# 5. Backends ----------------------------------------------------------------------------------------------------------


def _cpu_reasons(problem: _Problem) -> list[str]:
    return cpu_reasons("match_patches", problem.query)


BACKENDS = OpBackends("match_patches", _prepare, {"cpu": _cpu_reasons, "portable": always, "reference": always})


def _cpu(*args: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.inpaint_native.match_patches(*args)


_KERNELS = {"cpu": _cpu, "portable": portable.match_patches, "reference": reference.match_patches}


@torch.library.impl(_library, "match_patches", "CompositeExplicitAutograd")
def _match_patches(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None,
    key_scale: Tensor | None,
    key_bias: Tensor | None,
    queries: Tensor | None,
    patch: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    def dense(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(accumulation_dtype(query)).contiguous()

    return _KERNELS[backend](dense(query), dense(key), valid, dense(key_scale), dense(key_bias), queries, patch)
