"""The op ``coherent_semantic_attention``: CSA's search and generate, without a score matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from inpaint_kernels._backends import OpBackends
from inpaint_kernels._checks import check_choice, check_floating, check_range, check_shape, check_tensor
from inpaint_kernels.cuda_kernels import coherent_semantic_attention as cuda_kernels
from inpaint_kernels.ops._autograd import register_autograd
from inpaint_kernels.ops._common import (
    accumulation_dtype,
    always,
    cpu_reasons,
    cuda_reasons,
    only_computes,
    wants_gradient,
)
from inpaint_kernels.portable import coherent_semantic_attention as portable
from inpaint_kernels.reference import coherent_semantic_attention as reference

VARIANTS = ("official", "paper")
GRADIENTS = ("official", "straight", "exact")


class CoherentSemanticAttentionResult(NamedTuple):
    """What ``coherent_semantic_attention(..., return_attention=True)`` returns.

    The attention rows [M, H * W] of a sample are never stored; :meth:`rows` expands those that are asked for.

    Attributes:
        output: [B, C, H, W].
        index: [B, H, W] int64, raster index y * W + x of the best known position; -1 at known positions.
        alpha: [B, H, W], the weight of the vector generated before; 0 at known positions and where a row (re)starts.
        beta: [B, H, W], the weight of the best known vector; 0 at known positions, 1 where a row (re)starts.
    """

    output: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    alpha: Tensor
    beta: Tensor

    def rows(self, sample: int, positions: Tensor) -> Tensor:
        """How much each position of the map weighs in some output vectors.

        Args:
            sample: which of the batch.
            positions: [n] int64, raster indices of output positions, known or masked.

        Returns:
            [n, H * W] in the dtype of ``alpha``: output[sample, :, p] is the sum over q of rows[p, q] * x[sample, :,
            q]. A known position's row is 1 on itself. No gradient. A row costs as much as masked positions precede it.
        """
        check_shape("positions", positions, "n")
        check_range("sample", sample, 0, self.index.shape[0] - 1, integer=True)
        index, alpha, beta = (x[sample].flatten() for x in (self.index, self.alpha, self.beta))
        masked = (index >= 0).nonzero()[:, 0]
        rows = alpha.new_zeros(positions.numel(), index.numel())
        for row, position in zip(rows, positions.tolist(), strict=True):
            if not 0 <= position < index.numel():
                raise ValueError(f"positions: expected raster indices below {index.numel()}, got {position}")
            if index[position] < 0:
                row[position] = 1
                continue
            before = masked[masked <= position].flip(0)  # the position itself first
            # What is left of an older vector: the product of all alphas since. A restart's 0 ends it, whatever follows.
            decay = torch.cat((alpha.new_ones(1), alpha[before[:-1]])).cumprod(0)
            weights = torch.where(decay == 0, 0, decay * beta[before])
            row.index_put_((index[before],), weights, accumulate=True)
        return rows


# 1. The public function -----------------------------------------------------------------------------------------------


@overload
def coherent_semantic_attention(
    x: Tensor,
    mask_flags: Tensor,
    *,
    variant: str = ...,
    gradient: str = ...,
    triple_weight: float = ...,
    return_attention: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def coherent_semantic_attention(
    x: Tensor,
    mask_flags: Tensor,
    *,
    variant: str = ...,
    gradient: str = ...,
    triple_weight: float = ...,
    return_attention: Literal[True],
    backend: str | None = ...,
) -> CoherentSemanticAttentionResult: ...
@overload
def coherent_semantic_attention(
    x: Tensor,
    mask_flags: Tensor,
    *,
    variant: str = ...,
    gradient: str = ...,
    triple_weight: float = ...,
    return_attention: bool,
    backend: str | None = ...,
) -> Tensor | CoherentSemanticAttentionResult: ...


def coherent_semantic_attention(
    x: Tensor,
    mask_flags: Tensor,
    *,
    variant: str = "official",
    gradient: str = "official",
    triple_weight: float = 1.0,
    return_attention: bool = False,
    backend: str | None = None,
) -> Tensor | CoherentSemanticAttentionResult:
    """Replace every masked feature vector by a blend of the known one that it resembles most and its predecessor.

    With q_0, q_1, ... the masked vectors of a sample in raster order, x_j the known ones, and n(z) = |z| + 1e-8::

        j_i = argmax over j of <q_i, x_j / n(x_j)>     k_i = x_{j_i}     v_i = <q_i, k_i / n(k_i)>
        a_i = <q_i / n(q_i), y_{i-1}>
        y_0 = k_0,   y_i = a_i / (a_i + v_i) * y_{i-1} + v_i / (a_i + v_i) * k_i

    y_i takes the place of q_i; known vectors stay. In the variant "paper" a_i and v_i are cosines; published code
    divides a_i by the norm of q_i only and v_i by that of k_i only. The M x K score matrix is never stored. Sums
    accumulate in float32 (float64 for float64 inputs). With the native kernels a score is one chain of fused
    multiply-adds over the channels and its value does not depend on tiles or threads, so results are bit-identical
    from run to run and for any number of threads.

    Args:
        x: [B, C, H, W] float16, bfloat16, float32 or float64, in any layout; the result has the same.
        mask_flags: [H, W], [B or 1, H, W] or [B or 1, 1, H, W], any dtype, non-zero = masked. Its values decide how
            much there is to do, so they are needed on the CPU: flags there cost nothing, flags on a GPU are read back
            in every call. :meth:`inpaint_kernels.nn.CSA.set_mask` makes them of an image's mask.
        variant: "official", as published code computes, or "paper".
        gradient: of x, with g that of the output, A the attention rows (one-hot on themselves for known positions),
            and w = ``triple_weight``. "official": g + w trunc(A)^T g, what published code trains with, where A is
            stored in integers: 2 g at known positions, g at masked ones, and nearly nothing through the attention.
            "straight": the same without truncation. "exact": the derivative of the formula above (unbounded where
            a + v is near 0).
        triple_weight: w; not read by "exact".
        return_attention: also return what the attention rows are made of.
        backend: "cpu", "cuda", "portable" or "reference"; None: the first that can run
            (:func:`inpaint_kernels.explain`).

    Returns:
        [B, C, H, W], differentiable once with respect to x, or a :class:`CoherentSemanticAttentionResult`. Without a
        masked position x itself. Equal scores choose the lowest raster index; a NaN score counts as the largest.

    Raises:
        ValueError, TypeError: an argument has the wrong rank, size, dtype, device or value, or a sample has no known
            position; the message names it.
        RuntimeError: an explicitly requested backend cannot run; the message says why.

    Deviations from the published code: known positions are the identity (there: the known vector that resembles them
    most, which is themselves up to parallel and zero vectors); samples without a hole are the identity in the gradient
    too (there: 2 g); where a_i + v_i is 0 or no finite number the blend starts again with y_i = k_i (there: NaN from
    then on); the gradient is right on maps that are not square; batches may have one mask per sample.

    References:
        Liu et al., Coherent Semantic Attention for Image Inpainting, ICCV 2019, section 3.2.
    """
    problem = _prepare(x, mask_flags, variant=variant, gradient=gradient, triple_weight=triple_weight)
    backend = BACKENDS.choose(problem, backend)
    if not return_attention and only_computes(problem.flags) and not problem.flags.any():
        return x
    call = _forward if _is_plain(x) else torch.ops.inpaint_kernels.coherent_semantic_attention
    output, index, alpha, beta, _ = call(*problem, backend)
    return CoherentSemanticAttentionResult(output, index, alpha, beta) if return_attention else output


def _is_plain(x: Tensor) -> bool:
    """Whether nobody but the kernel looks at this call, neither autograd nor autocast."""
    device = "cpu" if x.is_cpu else x.device.type
    return only_computes(x) and not wants_gradient(x) and not torch.is_autocast_enabled(device)


# 2. Checks ------------------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """One checked call, in the order of the schema."""

    x: Tensor
    flags: Tensor
    variant: str
    gradient: str
    triple_weight: float

    @property
    def device(self) -> torch.device:
        return self.x.device


def _prepare(
    x: Tensor,
    mask_flags: Tensor,
    *,
    variant: str = "official",
    gradient: str = "official",
    triple_weight: float = 1.0,
    return_attention: bool = False,
) -> _Problem:
    check_floating("x", x)
    if x.dim() != 4:  # what check_shape looks for, and 2 us of every call
        check_shape("x", x, "B C H W")
    check_options(variant, gradient, triple_weight)
    return _Problem(x, _flags_on_cpu(mask_flags, x), variant, gradient, float(triple_weight))


def check_options(variant: str, gradient: str, triple_weight: float) -> None:
    """Raises ValueError or TypeError unless they are what the op takes."""
    check_choice("variant", variant, VARIANTS)
    check_choice("gradient", gradient, GRADIENTS)
    check_range("triple_weight", triple_weight)


def _flags_on_cpu(mask_flags: Tensor, x: Tensor) -> Tensor:
    """[B or 1, H, W] bool on the CPU; the tensor itself where it is that already."""
    check_tensor("mask_flags", mask_flags)
    batch, height, width = x.shape[0], x.shape[2], x.shape[3]
    if mask_flags.dim() == 2:
        check_shape("mask_flags", mask_flags, "H W", H=height, W=width)
        mask_flags = mask_flags[None]
    elif mask_flags.dim() == 3:
        check_shape("mask_flags", mask_flags, "B|1 H W", B=batch, H=height, W=width)
    else:
        check_shape("mask_flags", mask_flags, "B|1 1 H W", B=batch, H=height, W=width)
        mask_flags = mask_flags[:, 0]
    if mask_flags.device.type != "cpu" and mask_flags.device != x.device:
        raise ValueError(f"mask_flags: expected the CPU or the device of x, {x.device}, got {mask_flags.device}")
    if mask_flags.dtype != torch.bool:
        mask_flags = mask_flags != 0
    return mask_flags.cpu()


def _check_known(flags: Tensor) -> None:
    """Raises ValueError if a sample is masked everywhere; where values may be read: in the op's own kernel."""
    everywhere = flags.flatten(1).all(1)
    if flags[0].numel() > 0 and everywhere.any():
        sample = int(everywhere.nonzero()[0, 0])
        raise ValueError(f"mask_flags: expected a known position in every sample, got none in sample {sample}")


def flags_of_mask(mask: Tensor, layers: int, threshold: float | Fraction) -> Tensor:
    """See :meth:`inpaint_kernels.nn.CSA.set_mask`."""
    check_tensor("mask", mask)
    check_range("layers", layers, 1, 6, integer=True)
    if mask.dim() not in (2, 4) or (mask.dim() == 4 and mask.shape[1] != 1):
        raise ValueError(f"mask: expected shape [H, W] or [B|1, 1, H, W], got {list(mask.shape)}")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold: expected a number >= 0 and < 1, got {threshold}")
    if min(mask.shape[-2:]) < 2**layers:
        raise ValueError(f"mask: expected H and W of at least 2^layers = {2**layers}, got {list(mask.shape)}")
    share = (mask != 0).float().view(-1, 1, *mask.shape[-2:])
    for _ in range(layers):  # a multiple of 16^-6 = 2^-24 at most: exact in float32
        share = F.avg_pool2d(share, 4, stride=2, padding=1)
    return (share > math.floor(threshold * 16**layers) / 16**layers)[:, 0].cpu()


# 3. Schema ------------------------------------------------------------------------------------------------------------

_library = torch.library.Library("inpaint_kernels", "FRAGMENT")
_library.define(
    "coherent_semantic_attention(Tensor x, Tensor flags, str variant, str gradient, float triple_weight, str backend)"
    " -> (Tensor output, Tensor index, Tensor alpha, Tensor beta, Tensor total)"
)
_library.define(
    "coherent_semantic_attention_backward(Tensor grad, Tensor x, Tensor flags, Tensor output, Tensor index, "
    "Tensor alpha, Tensor beta, Tensor total, str variant, str gradient, float triple_weight, str backend) -> Tensor"
)


# 4. Fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("inpaint_kernels::coherent_semantic_attention", lib=_library)
def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_empty_weights(x)


@torch.library.register_fake("inpaint_kernels::coherent_semantic_attention_backward", lib=_library)
def _fake_backward(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _empty_weights(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index, alpha, beta and total, not filled."""
    shape = (x.shape[0], x.shape[2], x.shape[3])
    index = x.new_empty(shape, dtype=torch.int64)
    alpha, beta, total = (x.new_empty(shape, dtype=accumulation_dtype(x)) for _ in range(3))
    return index, alpha, beta, total


# 5. Backends ----------------------------------------------------------------------------------------------------------


def _cpu_reasons(problem: _Problem) -> list[str]:
    return cpu_reasons("coherent_semantic_attention_forward", problem.x)


def _cuda_reasons(problem: _Problem) -> list[str]:
    return cuda_reasons("coherent_semantic_attention_search", problem.x)


BACKENDS = OpBackends(
    "coherent_semantic_attention",
    _prepare,
    {"cpu": _cpu_reasons, "cuda": _cuda_reasons, "portable": always, "reference": always},
)


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous()


def _cpu_forward(x: Tensor, flags: Tensor, variant: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    output, weights = torch.empty_like(x), _empty_weights(x)
    torch.ops.inpaint_native.coherent_semantic_attention_forward(x, flags, variant, output, *weights)
    return output, *weights


def _cpu_backward(grad: Tensor, x: Tensor, flags: Tensor, output: Tensor, *rest: Any) -> Tensor:
    grad_x = torch.empty_like(x)
    torch.ops.inpaint_native.coherent_semantic_attention_backward(grad, x, flags, *rest, grad_x)
    return grad_x


def _dense_forward(kernel: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """For kernels in plain torch, which take contiguous maps in the dtype that sums accumulate in."""

    def forward(x: Tensor, flags: Tensor, variant: str) -> tuple[Tensor, ...]:
        output, *weights = kernel(_dense(x, accumulation_dtype(x)), flags, variant)
        return torch.empty_like(x).copy_(output), *weights

    return forward


def _dense_backward(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def backward(grad: Tensor, x: Tensor, flags: Tensor, output: Tensor, *rest: Any) -> Tensor:
        maps = (_dense(one, accumulation_dtype(x)) for one in (grad, x))
        grad_x = kernel(*maps, flags, _dense(output, accumulation_dtype(x)), *rest)
        return torch.empty_like(x).copy_(grad_x)

    return backward


_FORWARD: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "cpu": _cpu_forward,
    "cuda": cuda_kernels.forward,
    "portable": _dense_forward(portable.forward),
    "reference": _dense_forward(reference.forward),
}
_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "cpu": _cpu_backward,
    "cuda": cuda_kernels.backward,
    "portable": _dense_backward(portable.backward),
    "reference": _dense_backward(reference.backward),
}


@torch.library.impl(_library, "coherent_semantic_attention", "CompositeExplicitAutograd")
def _forward(
    x: Tensor, flags: Tensor, variant: str, gradient: str, triple_weight: float, backend: str
) -> tuple[Tensor, ...]:
    _check_known(flags)
    if x.numel() == 0 or not flags.any():
        index, *weights = _empty_weights(x)
        return torch.empty_like(x).copy_(x), index.fill_(-1), *(weight.zero_() for weight in weights)
    return _FORWARD[backend](x, flags, variant)


@torch.library.impl(_library, "coherent_semantic_attention_backward", "CompositeExplicitAutograd")
def _backward(grad: Tensor, x: Tensor, flags: Tensor, *rest: Any) -> Tensor:
    *arguments, backend = rest
    if x.numel() == 0 or not flags.any():
        return torch.empty_like(x).copy_(grad)
    return _BACKWARD[backend](grad, x, flags, *arguments)


# 6. Autograd and autocast ---------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, flags, ctx.variant, ctx.gradient, ctx.triple_weight, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, flags, *output)


def _autograd_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    grad_x = torch.ops.inpaint_kernels.coherent_semantic_attention_backward(
        grad, *ctx.saved_tensors, ctx.variant, ctx.gradient, ctx.triple_weight, ctx.backend
    )
    return grad_x, *(None,) * 5


def _no_second_backward(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("coherent_semantic_attention: double backward is not implemented (the gradient has no gradient)")


register_autograd(_library, "coherent_semantic_attention", _autograd_backward, _setup_context)
register_autograd(_library, "coherent_semantic_attention_backward", _no_second_backward)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast(
        "inpaint_kernels::coherent_semantic_attention", _device, torch.float32, lib=_library
    )
