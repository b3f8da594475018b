"""The op ``partial_conv2d``: a convolution of the known pixels, renormalised by how many a window has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inpaint_kernels._checks import check_choice, check_range, check_same_device, check_shape
from inpaint_kernels.ops._autograd import register_autograd
from inpaint_kernels.ops._common import only_computes, wants_gradient
from inpaint_kernels.ops._convolution import (
    GEOMETRY_SCHEMA,
    Border,
    ConvolutionBackends,
    Pair,
    autocast,
    check_convolution,
    cpu_convolution_backward,
    cpu_map,
    cpu_weight,
    dense,
    fake_gradients,
    geometry_arguments,
    geometry_of,
    gradients,
    like,
    make_geometry,
    outside_autocast,
    second_gradients,
)
from inpaint_kernels.portable import partial_conv2d as portable
from inpaint_kernels.portable._convolution import (
    Geometry,
    convolution_backward,
    convolution_dtype,
    empty_maps,
    sum_dtype,
)
from inpaint_kernels.reference import partial_conv2d as reference

RULES = ("nvidia", "naoto", "paper")


class PartialConv2dResult(NamedTuple):
    """What ``partial_conv2d`` returns.

    Attributes:
        output: [B, C, Ho, Wo], 0 where a window knows nothing.
        mask: [B or 1, 1, Ho, Wo], where the output is known, in the dtype of the mask that was given; no gradient.
    """

    output: Tensor
    mask: Tensor


# 1. The public function -----------------------------------------------------------------------------------------------


def partial_conv2d(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Border = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    rule: str = "nvidia",
    eps: float = 1e-8,
    mask_channels: Sequence[int] | None = None,
    backend: str | None = None,
) -> PartialConv2dResult:
    """Convolve what is known of x, and scale each sum up by how much of its window was.

    With raw = conv2d(x * mask, weight), s = the mask's sum over an output's window and win = that of a window of ones
    (the whole kernel, also at the border, where outputs are scaled up even without holes)::

        nvidia:  u = clamp(s, 0, 1), r = win / (s + eps) * u
                 y = (raw * r + bias) * u, or raw * r without a bias            new mask u
        naoto:   y = raw / s + bias where s > 0, else 0                         new mask s > 0
        paper:   y = raw * win / s + bias where s > 0, else 0                   new mask s > 0

    s runs over all Cin channels; only "nvidia" counts a mask of one channel once, as published, which matters for eps
    and for masks between 0 and 1. A network trained by "naoto" runs by "nvidia" with its weights divided by
    kh * kw * Cin.

    The mask's sums are one-channel box sums in float32 (float64 for float64), so eps = 1e-8 holds in float16 too; masks
    are never convolved.
    Sums and what follows them are float32 (float64 for float64), rounded once. Exceptions: on CUDA products of float32
    are TF32 where torch lets cuDNN's convolutions use it, and where the convolution is cuDNN's or, with ``portable``
    on another device than a CPU, torch's, a short dtype is also rounded before what follows.

    The ``cpu`` kernel computes 3 x 3 kernels of stride 1 with many channels by Winograd's minimal filtering, F(2 x 2)
    in float32 and float64, F(4 x 4) in float32 for short dtypes. It rounds like the direct sum, but an infinity or NaN
    in x reaches outputs up to 2 (short dtypes: 4) times the dilation away instead of 1.

    Two runs of a call give the same bits; where cuDNN takes part, if ``torch.backends.cudnn.deterministic`` is set. The
    output of the ``cpu`` kernel does not depend on the number of threads. The convolution's gradient is torch's own,
    and may.

    Args:
        x: [B, Cin, H, W] float16, bfloat16, float32 or float64, NCHW or channels_last. What is in the hole is
            multiplied by 0, as published: a NaN there stays one.
        mask: [B or 1, M, H, W] bool or floating, 1 = known, 0 = hole, not negative. M is 1, the same for all channels;
            or Cin; or the length of ``mask_channels``. It is a constant: no gradient.
        weight: [C, Cin / groups, kh, kw], same dtype as x.
        bias: [C]; None: none.
        stride: of the convolution, one number or (rows, columns), as dilation.
        padding: zeros on each side, of x and of the mask: one number, (rows, columns), or (top, bottom, left, right).
        dilation: distance of the kernel's taps.
        groups: groups of channels that see only each other; masks are counted over all of them. 1 for "naoto".
        rule: "nvidia" (NVIDIA/partialconv, mmagic), "naoto" (naoto0804/pytorch-inpainting-with-partial-conv) or
            "paper".
        eps: of the rule "nvidia", at least 0.
        mask_channels: how many channels of x each channel of the mask covers, in order: (64, 3) for 64 upsampled
            channels with one mask and 3 of a skip connection with another.
        backend: "cpu", "triton", "portable" or "reference"; None: the first that can run, see
            :func:`inpaint_kernels.explain`.

    Returns:
        :class:`PartialConv2dResult`: the output in the dtype of x, in channels_last if x is contiguous in that layout
        alone, else in NCHW, differentiable once with respect to x, weight and bias; and the new mask, which published
        modules repeat over the C channels. Inside ``torch.autocast`` x, weight and bias are cast as for conv2d.

    Raises:
        ValueError, TypeError: an argument has the wrong rank, size, dtype, device or value; the message names it.
        RuntimeError: an explicitly requested backend cannot run; the message says why.

    References:
        Liu et al., Image Inpainting for Irregular Holes Using Partial Convolutions, ECCV 2018, section 3.1.
        Liu et al., Partial Convolution based Padding, 2018.
    """
    problem = _prepare(
        x, mask, weight, bias, stride, padding, dilation, groups, rule=rule, eps=eps, mask_channels=mask_channels
    )
    backend = BACKENDS.choose(problem, backend)
    x, mask, spread, weight, bias, geometry, rule, eps = problem
    call: Callable[..., tuple[Tensor, Tensor]] = torch.ops.inpaint_kernels.partial_conv2d
    if not wants_gradient(x, weight, bias) and only_computes(x, mask, weight, bias):
        call = _partial_conv2d
    return PartialConv2dResult(*call(x, mask, spread, weight, bias, *geometry_arguments(geometry), rule, eps, backend))


# 2. Checks ------------------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """One checked call."""

    x: Tensor
    mask: Tensor
    mask_channels: tuple[int, ...]
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry
    rule: str
    eps: float

    @property
    def device(self) -> torch.device:
        return self.x.device


def _prepare(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Border = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    rule: str = "nvidia",
    eps: float = 1e-8,
    mask_channels: Sequence[int] | None = None,
) -> _Problem:
    x, weight, bias = autocast(x, weight, bias)
    check_convolution(x, weight, bias, groups)
    geometry = make_geometry(x, weight, stride, padding, dilation, groups)
    check_rule(rule, eps)
    if rule == "naoto" and groups != 1:
        raise ValueError(f"groups: expected 1 with rule='naoto', got {groups}")
    spread = _check_mask(x, mask, mask_channels)
    return _Problem(x, mask, spread, weight, bias, geometry, rule, float(eps))


def check_rule(rule: str, eps: float) -> None:
    """Raises unless it is one of :data:`RULES`, and eps a number that is not negative."""
    check_choice("rule", rule, RULES)
    check_range("eps", eps, minimum=0)


def _check_mask(x: Tensor, mask: Tensor, mask_channels: Sequence[int] | None) -> tuple[int, ...]:
    """Checks the mask; how many channels of x each of its channels covers."""
    channels = x.shape[1]
    sizes = check_shape("mask", mask, "B|1 M H W", B=x.shape[0], H=x.shape[2], W=x.shape[3])
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask: expected torch.bool or a floating-point dtype, got {mask.dtype}")
    check_same_device(x=x, mask=mask)
    if mask.requires_grad:
        raise ValueError("mask: expected a tensor that requires no gradient (there is none; detach it)")
    if mask_channels is None:
        if sizes["M"] not in (1, channels):
            raise ValueError(
                f"mask: expected 1 or {channels} channels, one for all of x or one for each, or mask_channels that say "
                f"what each covers; got {sizes['M']} channels"
            )
        return (channels,) if sizes["M"] == 1 else (1,) * channels
    for count in mask_channels:
        check_range("mask_channels", count, minimum=1, integer=True)
    if len(mask_channels) != sizes["M"] or sum(mask_channels) != channels:
        raise ValueError(
            f"mask_channels: expected {sizes['M']} numbers, one for each channel of mask, with the sum {channels}, the "
            f"channels of x; got {tuple(mask_channels)}"
        )
    return tuple(mask_channels)


# 3. Schema ------------------------------------------------------------------------------------------------------------

_INPUTS_SCHEMA = "Tensor x, Tensor mask, int[] mask_channels, Tensor weight, Tensor? bias"
_SETTINGS_SCHEMA = f"{GEOMETRY_SCHEMA}, str rule, float eps"

_library = torch.library.Library("inpaint_kernels", "FRAGMENT")
_library.define(
    f"partial_conv2d({_INPUTS_SCHEMA}, {_SETTINGS_SCHEMA}, str backend) -> (Tensor output, Tensor new_mask)"
)
_library.define(
    f"partial_conv2d_backward(Tensor grad, {_INPUTS_SCHEMA}, {_SETTINGS_SCHEMA}, bool[3] wanted, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)


# 4. Fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("inpaint_kernels::partial_conv2d", lib=_library)
def _fake_forward(
    x: Tensor, mask: Tensor, mask_channels: Any, weight: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    size = geometry_of(*settings[:4]).output_of(x, weight)
    return empty_maps(x, weight.shape[0], size), mask.new_empty((mask.shape[0], 1, *size))


@torch.library.register_fake("inpaint_kernels::partial_conv2d_backward", lib=_library)
def _fake_backward(
    grad: Tensor, x: Tensor, mask: Tensor, mask_channels: Any, weight: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(x, weight, settings[6])


# 5. Backends ----------------------------------------------------------------------------------------------------------


BACKENDS = ConvolutionBackends("partial_conv2d", _prepare)


def _cpu(
    x: Tensor,
    mask: Tensor,
    mask_channels: tuple[int, ...],
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    scale: Tensor,
    shift: Tensor,
) -> Tensor:
    x = dense(x)
    y = cpu_map(x, weight.shape[0], geometry.output_of(x, weight))
    packed, few_outputs = cpu_weight(x, weight, geometry)
    torch.ops.inpaint_native.partial_conv2d(
        x,
        mask.to(x.dtype).contiguous(),
        torch.tensor(mask_channels, dtype=torch.int64, device="cpu"),
        weight,
        packed,
        bias,
        *geometry.stride,
        geometry.pad[0],
        geometry.pad[2],
        *geometry.dilation,
        few_outputs,
        scale.contiguous(),
        shift.contiguous(),
        y,
    )
    return y


def _triton(*args: Any) -> Tensor:
    from inpaint_kernels.triton_kernels import partial_conv2d as triton_kernels

    return triton_kernels.partial_conv2d(*args)


_FORWARD: dict[str, Callable[..., Tensor]] = {
    "cpu": _cpu,
    "triton": _triton,
    "portable": portable.partial_conv2d,
}


@torch.library.impl(_library, "partial_conv2d", "CompositeExplicitAutograd")
@outside_autocast
def _partial_conv2d(
    x: Tensor,
    mask: Tensor,
    mask_channels: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    pad: list[int],
    dilation: list[int],
    groups: int,
    rule: str,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    geometry = geometry_of(stride, pad, dilation, groups)
    spread = tuple(mask_channels)
    if backend == "reference":
        y, new_mask = reference.partial_conv2d(x, mask, spread, weight, bias, *geometry[:4], rule, eps)
        return like(y, x), new_mask.contiguous()
    scale, shift, new_mask = _scales(x, mask, spread, weight, bias, geometry, rule, eps)
    return _FORWARD[backend](x, mask, spread, weight, bias, geometry, scale, shift), new_mask


@torch.library.impl(_library, "partial_conv2d_backward", "CompositeExplicitAutograd")
@outside_autocast
def _partial_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    mask_channels: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    pad: list[int],
    dilation: list[int],
    groups: int,
    rule: str,
    eps: float,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = geometry_of(stride, pad, dilation, groups)
    spread = tuple(mask_channels)
    if backend == "reference":
        settings = (*geometry[:4], rule, eps)
        grads = reference.partial_conv2d_backward(grad, x, mask, spread, weight, bias, *settings)
        return gradients(grads, x, weight, wanted)
    # The box sums are computed once more, which is cheaper than to keep them.
    scale, shift, _ = _scales(x, mask, spread, weight, bias, geometry, rule, eps)
    dtype = convolution_dtype(x)
    known = portable.masked(x.to(dtype), mask, spread)
    of_sums = [wanted[0], wanted[1], False]
    backward = cpu_convolution_backward if backend == "cpu" else convolution_backward
    grad_x, grad_weight, _ = backward(grad * scale, known, weight.to(dtype), geometry, of_sums)
    if grad_x is not None:
        grad_x = portable.masked(grad_x, mask, spread).to(x.dtype)
    if grad_weight is not None:
        grad_weight = grad_weight.to(x.dtype)
    grad_bias = (grad * shift).sum((0, 2, 3)).to(x.dtype) if wanted[2] else None
    return gradients((grad_x, grad_weight, grad_bias), x, weight, wanted)


def _scales(
    x: Tensor,
    mask: Tensor,
    spread: tuple[int, ...],
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    rule: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = (weight.shape[2], weight.shape[3])
    return portable.mask_scales(mask, spread, geometry, kernel, rule, eps, bias is not None, sum_dtype(x))


# 6. Autograd ----------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, mask, mask_channels, weight, bias, *settings, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, mask, weight, bias)
    ctx.mask_channels, ctx.settings, ctx.backend = mask_channels, settings, backend


def _autograd_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    unwanted = (None,) * (len(ctx.settings) + 1)
    if grad is None:
        return (None,) * 5 + unwanted
    x, mask, weight, bias = ctx.saved_tensors
    wanted = tuple(ctx.needs_input_grad[i] for i in (0, 3, 4))
    grads = torch.ops.inpaint_kernels.partial_conv2d_backward(
        grad, x, mask, ctx.mask_channels, weight, bias, *ctx.settings, wanted, ctx.backend
    )
    grad_x, grad_weight, grad_bias = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return (grad_x, None, None, grad_weight, grad_bias, *unwanted)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, x, mask, mask_channels, weight, bias, *settings, wanted, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, x, mask, weight, bias)
    ctx.mask_channels, ctx.settings, ctx.wanted = mask_channels, settings, wanted


def _second_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    grad, x, mask, weight, bias = ctx.saved_tensors

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.partial_conv2d(x, mask, tuple(ctx.mask_channels), weight, bias, *ctx.settings)[0]

    of_grad, of_x, *others = second_gradients(forward, grad, x, weight, bias, ctx.wanted, cotangents)
    return (of_grad, of_x, None, None, *others, *(None,) * (len(ctx.settings) + 2))


register_autograd(_library, "partial_conv2d", _autograd_backward, _setup_context)
register_autograd(_library, "partial_conv2d_backward", _second_backward, _setup_second)
