"""The op ``patch_vote``: every position becomes the weighted mean of what the matched patches over it propose."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from inpaint_kernels import _native
from inpaint_kernels._backends import OpBackends
from inpaint_kernels._checks import check_dtype, check_range, check_same_device, check_same_dtype, check_shape
from inpaint_kernels.ops._common import always
from inpaint_kernels.portable import patch_vote as portable
from inpaint_kernels.reference import patch_vote as reference

# Largest patch whose proposals the CPU kernel can hold.
_MAX_PATCH = 31

# 1. The public function -----------------------------------------------------------------------------------------------


def patch_vote(
    key: Tensor,
    index: Tensor,
    score: Tensor,
    *,
    patch: int = 7,
    confidence: Tensor | None = None,
    targets: Tensor | None = None,
    bandwidth: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Blend overlapping patches that were matched by :func:`patchmatch` or :func:`match_patches`.

    Each patch over a position p, centred at p - delta, proposes the key pixel that lies at the same place of its match.
    With d the distances (minus the scores) of the patches that propose anything for p::

        out(p) = sum over delta of w(delta) key[index(p - delta) + delta]
        w      = softmax over delta of (confidence(p - delta) - d(p - delta) / (2 * bandwidth * mean of d))

    Args:
        key: [B, C, hk, wk] float32 or float64.
        index: [B, hq, wq] int64, flat key position v * wk + u of each patch's match; -1: there is no patch.
        score: [B, hq, wq], dtype of ``key``, finite where there is a patch: minus its squared distance.
        patch: side of the patches, odd.
        confidence: [hq, wq], dtype of ``key``: logarithm of a weight of each patch. None: 0.
        targets: [hq, wq] bool, the positions that are wanted. None: all.
        bandwidth: positive; small values follow the nearest patch, large ones average all.
        backend: "cpu", "portable" or "reference"; None: the first that can run (:func:`inpaint_kernels.explain`).

    Returns:
        [B, C, hq, wq], dtype of ``key``; 0 where nothing was wanted or nothing is proposed. There is no gradient.

    Raises:
        ValueError, TypeError: an argument has the wrong rank, size, dtype, device or value; the message names it.
        RuntimeError: an explicitly requested backend cannot run; the message says why.

    References:
        Wexler, Shechtman and Irani, Space-Time Completion of Video, IEEE PAMI 2007.
        Newson et al., Non-Local Patch-Based Image Inpainting, IPOL 2017 (weights relative to the distances at hand).
    """
    problem = _prepare(key, index, score, patch=patch, confidence=confidence, targets=targets, bandwidth=bandwidth)
    return torch.ops.inpaint_kernels.patch_vote(*problem, BACKENDS.choose(problem, backend))


# 2. Checks ------------------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """One checked call, in the order of the schema."""

    key: Tensor
    matches: Tensor
    score: Tensor
    confidence: Tensor | None
    targets: Tensor | None
    patch: int
    bandwidth: float

    @property
    def device(self) -> torch.device:
        return self.key.device


def _prepare(
    key: Tensor,
    index: Tensor,
    score: Tensor,
    *,
    patch: int = 7,
    confidence: Tensor | None = None,
    targets: Tensor | None = None,
    bandwidth: float = 1.0,
) -> _Problem:
    sizes = check_shape("key", key, "B C hk wk")
    check_dtype("key", key, (torch.float32, torch.float64))
    positions = check_shape("index", index, "B hq wq", B=sizes["B"])
    check_dtype("index", index, (torch.int64,))
    check_shape("score", score, "B hq wq", **positions)
    for name, x in (("confidence", confidence), ("targets", targets)):
        if x is not None:
            check_shape(name, x, "hq wq", hq=positions["hq"], wq=positions["wq"])
    check_same_dtype(key=key, score=score, confidence=confidence)
    if targets is not None:
        check_dtype("targets", targets, (torch.bool,))
    check_same_device(key=key, index=index, score=score, confidence=confidence, targets=targets)
    check_range("patch", patch, minimum=1, integer=True)
    if patch % 2 == 0:
        raise ValueError(f"patch: expected an odd number, got {patch}")
    check_range("bandwidth", bandwidth, minimum=1e-6)
    detached = None if confidence is None else confidence.detach()
    return _Problem(key.detach(), index, score.detach(), detached, targets, patch, float(bandwidth))


# 3. Schema ------------------------------------------------------------------------------------------------------------

_library = torch.library.Library("inpaint_kernels", "FRAGMENT")
_library.define(
    "patch_vote(Tensor key, Tensor index, Tensor score, Tensor? confidence, Tensor? targets, int patch, "
    "float bandwidth, str backend) -> Tensor"
)


# 4. Fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("inpaint_kernels::patch_vote", lib=_library)
def _fake(key: Tensor, index: Tensor, *_: Any) -> Tensor:
    return key.new_empty(key.shape[0], key.shape[1], index.shape[1], index.shape[2])


# 5. Backends ----------------------------------------------------------------------------------------------------------


def _cpu_reasons(problem: _Problem) -> list[str]:
    reasons = []
    if problem.key.device.type != "cpu":
        reasons.append(f"the tensors are on {problem.key.device}, not on the CPU")
    if problem.key.dtype != torch.float32:
        reasons.append(f"the kernel computes in float32, the tensors are {problem.key.dtype}")
    if problem.patch > _MAX_PATCH:
        reasons.append(f"patch is {problem.patch}, more than {_MAX_PATCH}")
    if not _native.available("patch_vote", "CPU"):
        reasons.append(_native.why_not("patch_vote", "CPU") or "the native library has no CPU kernel")
    return reasons


BACKENDS = OpBackends("patch_vote", _prepare, {"cpu": _cpu_reasons, "portable": always, "reference": always})


def _cpu(*args: Any) -> Tensor:
    return torch.ops.inpaint_native.patch_vote(*args)


_KERNELS = {"cpu": _cpu, "portable": portable.patch_vote, "reference": reference.patch_vote}


@torch.library.impl(_library, "patch_vote", "CompositeExplicitAutograd")
def _patch_vote(
    key: Tensor,
    index: Tensor,
    score: Tensor,
    confidence: Tensor | None,
    targets: Tensor | None,
    patch: int,
    bandwidth: float,
    backend: str,
) -> Tensor:
    if confidence is None:
        confidence = key.new_zeros(index.shape[1:])
    if targets is None:
        targets = torch.ones(index.shape[1:], dtype=torch.bool, device=key.device)
    tensors = [x.contiguous() for x in (key, index, score, confidence, targets)]
    return _KERNELS[backend](*tensors, patch, bandwidth)
