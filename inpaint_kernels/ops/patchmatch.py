"""The op ``patchmatch``: approximate nearest patches, from a start that may be anything to a field that is coherent."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from inpaint_kernels import _native
from inpaint_kernels._backends import OpBackends
from inpaint_kernels._checks import (
    check_dtype,
    check_floating,
    check_range,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from inpaint_kernels.ops._common import always
from inpaint_kernels.ops.contextual_attention import Box, query_mask
from inpaint_kernels.ops.match_patches import PatchMatches
from inpaint_kernels.portable import patchmatch as portable
from inpaint_kernels.reference import patchmatch as reference

# Longest row of a patch, patch * C, that the CPU kernel has registers and masks for.
_MAX_PATCH_ROW = 256

# 1. The public function -----------------------------------------------------------------------------------------------


def patchmatch(
    query: Tensor,
    key: Tensor,
    start: Tensor | None = None,
    *,
    patch: int = 7,
    queries: Box | Tensor | None = None,
    valid: Tensor | None = None,
    iterations: int = 4,
    radius: int | None = None,
    seed: int = 0,
    backend: str | None = None,
) -> PatchMatches:
    """Find for every query position a key position whose patch is near to its own, without comparing with all keys.

    The distance is the sum of squared differences, with delta over the ``patch`` x ``patch`` window around a position::

        distance(p, q) = sum over delta with p + delta inside the query map of |query[p + delta] - key[q + delta]|^2

    One iteration offers each query the matches of its neighbours 8, 4, 2 and 1 pixels away, moved along with it
    (propagation), then random keys in squares around its best match, of half-side ``radius``, ``radius / 2``, ..., 1
    (random search), and keeps what is strictly nearer. Each pass reads the field before it, and random numbers are
    hashes of (seed, sample, iteration, position): the result is the same for any number of threads. There is no
    gradient.

    Deviation from the paper: it scans the image, each position seeing the matches just found (fast on one thread, but
    sequential); here propagation jumps instead (Rong and Tan's jump flooding), which is parallel.

    Args:
        query: [B, C, hq, wq] float32 or float64.
        key: [B, C, hk, wk], same dtype and device.
        start: [B, hq, wq] int64, flat key positions v * wk + u to start from. Where it is no key that may be chosen,
            and everywhere if it is None, the search starts from a random one.
        patch: side of the patches, odd.
        queries: positions that are wanted: a box (y0, x0, y1, x1), end exclusive, or a bool mask [hq, wq]. Only they
            are computed, and only they propagate. None: all.
        valid: [B or 1, hk, wk] bool, the keys that may be chosen; None: all. Keys whose patch leaves the key map are
            never chosen.
        iterations: rounds of propagation and random search; 0 only scores the start.
        radius: half-side of the first random square; 0: no random search. None: the larger side of the key map.
        seed: of the random numbers, in [0, 2^32).
        backend: "cpu", "portable" or "reference"; None: the first that can run (:func:`inpaint_kernels.explain`).

    Returns:
        :class:`PatchMatches`: index [B, hq, wq] int64 and score = -distance [B, hq, wq] in the dtype of the inputs; -1
        and -inf where nothing was wanted or no key may be chosen. A patch with a NaN is nearer to none: score -inf.

    Raises:
        ValueError, TypeError: an argument has the wrong rank, size, dtype, device or value; the message names it.
        RuntimeError: an explicitly requested backend cannot run; the message says why.

    References:
        Barnes et al., PatchMatch: A Randomized Correspondence Algorithm for Structural Image Editing, SIGGRAPH 2009.
        Rong and Tan, Jump Flooding in GPU with Applications to Voronoi Diagram and Distance Transform, I3D 2006.
    """
    problem = _prepare(
        query,
        key,
        start,
        patch=patch,
        queries=queries,
        valid=valid,
        iterations=iterations,
        radius=radius,
        seed=seed,
    )
    return PatchMatches(*torch.ops.inpaint_kernels.patchmatch(*problem, BACKENDS.choose(problem, backend)))


# 2. Checks ------------------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """One checked call, in the order of the schema."""

    query: Tensor
    key: Tensor
    start: Tensor | None
    queries: Tensor | None
    valid: Tensor | None
    patch: int
    iterations: int
    radius: int
    seed: int

    @property
    def device(self) -> torch.device:
        return self.query.device


def _prepare(
    query: Tensor,
    key: Tensor,
    start: Tensor | None = None,
    *,
    patch: int = 7,
    queries: Box | Tensor | None = None,
    valid: Tensor | None = None,
    iterations: int = 4,
    radius: int | None = None,
    seed: int = 0,
) -> _Problem:
    sizes = check_shape("query", query, "B C hq wq")
    check_dtype("query", query, (torch.float32, torch.float64))
    key_sizes = check_shape("key", key, "B C hk wk", B=sizes["B"], C=sizes["C"])
    check_floating("key", key)
    check_same_dtype(query=query, key=key)
    check_same_device(query=query, key=key, start=start, valid=valid)
    if start is not None:
        check_shape("start", start, "B hq wq", B=sizes["B"], hq=sizes["hq"], wq=sizes["wq"])
        check_dtype("start", start, (torch.int64,))
    if valid is not None:
        check_shape("valid", valid, "B|1 hk wk", B=sizes["B"], hk=key_sizes["hk"], wk=key_sizes["wk"])
        check_dtype("valid", valid, (torch.bool,))
    check_range("patch", patch, minimum=1, integer=True)
    if patch % 2 == 0:
        raise ValueError(f"patch: expected an odd number, got {patch}")
    check_range("iterations", iterations, minimum=0, integer=True)
    if radius is None:
        radius = max(key_sizes["hk"], key_sizes["wk"])
    check_range("radius", radius, minimum=0, integer=True)
    check_range("seed", seed, minimum=0, maximum=2**32 - 1, integer=True)
    wanted = None if queries is None else query_mask(queries, (sizes["hq"], sizes["wq"])).to(query.device)
    return _Problem(query.detach(), key.detach(), start, wanted, valid, patch, iterations, radius, seed)


# 3. Schema ------------------------------------------------------------------------------------------------------------

_library = torch.library.Library("inpaint_kernels", "FRAGMENT")
_library.define(
    "patchmatch(Tensor query, Tensor key, Tensor? start, Tensor? queries, Tensor? valid, int patch, int iterations, "
    "int radius, int seed, str backend) -> (Tensor index, Tensor score)"
)


# 4. Fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("inpaint_kernels::patchmatch", lib=_library)
def _fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], query.shape[2], query.shape[3])
    return query.new_empty(shape, dtype=torch.int64), query.new_empty(shape)


# 5. Backends ----------------------------------------------------------------------------------------------------------


def _cpu_reasons(problem: _Problem) -> list[str]:
    reasons = []
    if problem.query.device.type != "cpu":
        reasons.append(f"the tensors are on {problem.query.device}, not on the CPU")
    if problem.query.dtype != torch.float32:
        reasons.append(f"the kernel computes in float32, the tensors are {problem.query.dtype}")
    if problem.patch * problem.query.shape[1] > _MAX_PATCH_ROW:
        row = problem.patch * problem.query.shape[1]
        reasons.append(f"patch * channels is {row}, more than {_MAX_PATCH_ROW}")
    if not _native.available("patchmatch", "CPU"):
        reasons.append(_native.why_not("patchmatch", "CPU") or "the native library has no CPU kernel")
    return reasons


BACKENDS = OpBackends("patchmatch", _prepare, {"cpu": _cpu_reasons, "portable": always, "reference": always})


def _cpu(*args: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.inpaint_native.patchmatch(*args)


_KERNELS = {"cpu": _cpu, "portable": portable.patchmatch, "reference": reference.patchmatch}


@torch.library.impl(_library, "patchmatch", "CompositeExplicitAutograd")
def _patchmatch(
    query: Tensor,
    key: Tensor,
    start: Tensor | None,
    queries: Tensor | None,
    valid: Tensor | None,
    patch: int,
    iterations: int,
    radius: int,
    seed: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if queries is None:
        queries = torch.ones(query.shape[2:], dtype=torch.bool, device=query.device)
    eligible = _eligible(key, valid, patch)
    begin = _usable_start(start, queries, eligible, seed)
    query, key, queries = query.contiguous(), key.contiguous(), queries.contiguous()
    return _KERNELS[backend](query, key, begin, queries, eligible, patch, iterations, radius, seed)


def _eligible(key: Tensor, valid: Tensor | None, patch: int) -> Tensor:
    """[B, hk, wk] bool: valid keys whose whole patch lies inside the map."""
    batch, _, height, width = key.shape
    half = patch // 2
    eligible = torch.zeros(batch, height, width, dtype=torch.bool, device=key.device)
    inner = (slice(None), slice(half, max(height - half, half)), slice(half, max(width - half, half)))
    eligible[inner] = True if valid is None else valid.expand(batch, -1, -1)[inner]
    return eligible


def _usable_start(start: Tensor | None, queries: Tensor, eligible: Tensor, seed: int) -> Tensor:
    """[B, hq, wq]: ``start``, with a random eligible key where it is none; -1 where nothing is wanted or eligible."""
    batch = eligible.shape[0]
    begin = torch.full((batch, *queries.shape), -1, dtype=torch.int64, device=queries.device)
    for sample in range(batch):
        allowed = eligible[sample].flatten()
        if start is not None and allowed.numel():
            inside = (start[sample] >= 0) & (start[sample] < allowed.numel()) & queries
            usable = inside & allowed[torch.where(inside, start[sample], 0)]
            begin[sample] = torch.where(usable, start[sample], -1)
        missing = (queries & (begin[sample] < 0)).flatten().nonzero()[:, 0]
        if len(missing):
            keys = allowed.nonzero()[:, 0]
            if len(keys):
                begin[sample].view(-1)[missing] = keys[_random_below(len(keys), missing, seed + sample)]
    return begin


def _random_below(count: int, positions: Tensor, seed: int) -> Tensor:
    """For each position a number in [0, count) that depends on nothing but the seed and the position."""
    word = 2**32
    bits = reference.mix(reference.mix((positions + 1) % word) ^ (seed % word))
    return bits * count // word
