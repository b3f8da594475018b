"""The op ``dilated_conv2d``: a convolution of any rate with bias, activation and residual in the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inpaint_kernels._checks import check_same_device, check_same_dtype, check_shape
from inpaint_kernels.ops._autograd import register_autograd
from inpaint_kernels.ops._common import only_computes, wants_gradient
from inpaint_kernels.ops._convolution import (
    GEOMETRY_SCHEMA,
    Border,
    ConvolutionBackends,
    Pair,
    autocast,
    check_activation,
    check_convolution,
    cpu_convolution,
    cpu_convolution_backward,
    fake_gradients,
    geometry_arguments,
    geometry_of,
    gradients,
    like,
    make_geometry,
    outside_autocast,
    second_gradients,
)
from inpaint_kernels.portable import dilated_conv2d as portable
from inpaint_kernels.portable._convolution import (
    Activation,
    Geometry,
    activation_backward,
    convolution_backward,
    empty_maps,
)
from inpaint_kernels.reference import dilated_conv2d as reference

# 1. The public function -----------------------------------------------------------------------------------------------


def dilated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Border = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    activation: str = "relu",
    negative_slope: float = 0.2,
    residual: Tensor | None = None,
    padding_mode: str = "zeros",
    upsample: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Convolve with taps ``dilation`` pixels apart, activate, add.

    In one pass::

        y = activation(conv2d(x, weight) + bias) + residual

    Bias, activation and residual cost no pass over memory of their own.

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
        x: [B, Cin, H, W] float16, bfloat16, float32 or float64, NCHW or channels_last.
        weight: [C, Cin / groups, kh, kw], same dtype.
        bias: [C]; None: 0.
        stride: of the convolution, one number or (rows, columns), as dilation.
        padding: border on each side: one number, (rows, columns), or (top, bottom, left, right).
        dilation: distance of the kernel's taps; any, of the order 1 to 16.
        groups: groups of channels that see only each other.
        activation: "relu", "elu", "leaky_relu" or "none".
        negative_slope: of leaky_relu, at least 0.
        residual: [B, C, Ho, Wo], same dtype, added after the activation; None: nothing is. A call that autograd
            records adds it in an operation of its own.
        padding_mode: "zeros"; "reflect", the border mirrored, ``padding`` smaller than the image; or "same_tf",
            TensorFlow's SAME, where ``padding`` must be 0: zeros for ceil(size / stride) outputs, half of them in front
            and the odd one behind.
        upsample: 2: every pixel of x is four equal ones first, sides 2H and 2W; no map of that size exists.
        backend: "cpu", "triton", "portable" or "reference"; None: the first that can run, see
            :func:`inpaint_kernels.explain`.

    Returns:
        [B, C, Ho, Wo] in the dtype of x; in channels_last if x is contiguous in that layout alone, else in NCHW.
        Differentiable twice with respect to x, weight, bias and residual. Inside ``torch.autocast`` all of them are
        cast as for conv2d.

    Raises:
        ValueError, TypeError: an argument has the wrong rank, size, dtype, device or value; the message names it.
        RuntimeError: an explicitly requested backend cannot run; the message says why.

    References:
        Yu and Koltun, Multi-Scale Context Aggregation by Dilated Convolutions, ICLR 2016.
        Iizuka et al., Globally and Locally Consistent Image Completion, SIGGRAPH 2017.
    """
    problem = _prepare(
        x,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
        padding_mode=padding_mode,
        upsample=upsample,
    )
    backend = BACKENDS.choose(problem, backend)
    x, weight, bias, geometry, act, residual = problem
    settings = (*geometry_arguments(geometry), geometry.upsample, geometry.reflect, *act)
    call: Callable[..., Tensor] = torch.ops.inpaint_kernels.dilated_conv2d
    if wants_gradient(x, weight, bias, residual):
        # The activation's gradient is taken from its result, which a residual would hide.
        y = call(x, weight, bias, *settings, None, backend)
        return y if residual is None else y + residual
    if only_computes(x, weight, bias, residual):
        call = _dilated_conv2d
    return call(x, weight, bias, *settings, residual, backend)


# 2. Checks ------------------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """One checked call."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry
    activation: Activation
    residual: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.x.device


def _prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Border = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    activation: str = "relu",
    negative_slope: float = 0.2,
    residual: Tensor | None = None,
    padding_mode: str = "zeros",
    upsample: int = 1,
) -> _Problem:
    x, weight, bias, residual = autocast(x, weight, bias, residual)
    check_convolution(x, weight, bias, groups)
    geometry = make_geometry(x, weight, stride, padding, dilation, groups, padding_mode, upsample)
    if residual is not None:
        height, width = geometry.output_of(x, weight)
        sizes = {"B": x.shape[0], "C": weight.shape[0], "Ho": height, "Wo": width}
        check_shape("residual", residual, "B C Ho Wo", **sizes)
        check_same_dtype(x=x, residual=residual)
        check_same_device(x=x, residual=residual)
    return _Problem(x, weight, bias, geometry, check_activation(activation, negative_slope), residual)


# 3. Schema ------------------------------------------------------------------------------------------------------------

_SETTINGS_SCHEMA = f"{GEOMETRY_SCHEMA}, int upsample, bool reflect, str activation, float negative_slope"

_library = torch.library.Library("inpaint_kernels", "FRAGMENT")
_library.define(
    f"dilated_conv2d(Tensor x, Tensor weight, Tensor? bias, {_SETTINGS_SCHEMA}, Tensor? residual, str backend)"
    " -> Tensor"
)
_library.define(
    f"dilated_conv2d_backward(Tensor grad, Tensor output, Tensor x, Tensor weight, Tensor? bias, {_SETTINGS_SCHEMA}, "
    "bool[3] wanted, str backend) -> (Tensor, Tensor, Tensor)"
)


# 4. Fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("inpaint_kernels::dilated_conv2d", lib=_library)
def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    size = geometry_of(*settings[:6]).output_of(x, weight)
    return empty_maps(x, weight.shape[0], size)


@torch.library.register_fake("inpaint_kernels::dilated_conv2d_backward", lib=_library)
def _fake_backward(
    grad: Tensor, output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(x, weight, settings[8])


# 5. Backends ----------------------------------------------------------------------------------------------------------


BACKENDS = ConvolutionBackends("dilated_conv2d", _prepare)


def _triton(*args: Any) -> Tensor:
    from inpaint_kernels.triton_kernels import dilated_conv2d as triton_kernels

    return triton_kernels.dilated_conv2d(*args)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: Activation,
    residual: Tensor | None,
) -> Tensor:
    return like(reference.dilated_conv2d(x, weight, bias, *geometry, *activation, residual), x)


_FORWARD: dict[str, Callable[..., Tensor]] = {
    "cpu": cpu_convolution,
    "triton": _triton,
    "portable": portable.dilated_conv2d,
    "reference": _reference,
}


@torch.library.impl(_library, "dilated_conv2d", "CompositeExplicitAutograd")
@outside_autocast
def _dilated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    pad: list[int],
    dilation: list[int],
    groups: int,
    upsample: int,
    reflect: bool,
    activation: str,
    negative_slope: float,
    residual: Tensor | None,
    backend: str,
) -> Tensor:
    geometry = geometry_of(stride, pad, dilation, groups, upsample, reflect)
    return _FORWARD[backend](x, weight, bias, geometry, Activation(activation, negative_slope), residual)


@torch.library.impl(_library, "dilated_conv2d_backward", "CompositeExplicitAutograd")
@outside_autocast
def _dilated_conv2d_backward(
    grad: Tensor,
    output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    pad: list[int],
    dilation: list[int],
    groups: int,
    upsample: int,
    reflect: bool,
    activation: str,
    negative_slope: float,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = geometry_of(stride, pad, dilation, groups, upsample, reflect)
    act = Activation(activation, negative_slope)
    if backend == "reference":
        settings = (*geometry, *act, None)
        return gradients(reference.dilated_conv2d_backward(grad, x, weight, bias, *settings), x, weight, wanted)
    grad_sums = activation_backward(grad, output, act, x_is_result=True)
    of_sums = cpu_convolution_backward if backend == "cpu" else convolution_backward
    return gradients(of_sums(grad_sums, x, weight, geometry, wanted), x, weight, wanted)


# 6. Autograd ----------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *settings, residual, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output, x, weight, bias)
    ctx.settings, ctx.has_residual, ctx.backend = settings, residual is not None, backend


def _autograd_backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    unwanted = (None,) * (len(ctx.settings) + 2)
    if grad is None:
        return (None, None, None, *unwanted)
    if ctx.has_residual:
        raise RuntimeError("dilated_conv2d: the torch op has no gradient with a residual; the public function has")
    wanted = tuple(ctx.needs_input_grad[:3])
    grads = torch.ops.inpaint_kernels.dilated_conv2d_backward(
        grad, *ctx.saved_tensors, *ctx.settings, wanted, ctx.backend
    )
    return (*(g if want else None for g, want in zip(grads, wanted, strict=True)), *unwanted)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, _, x, weight, bias, *settings, wanted, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, x, weight, bias)
    ctx.settings, ctx.wanted = settings, wanted


def _second_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        settings: tuple[Any, ...] = (*ctx.settings, None)  # no residual
        return reference.dilated_conv2d(x, weight, bias, *settings)

    grad, x, weight, bias = ctx.saved_tensors
    of_grad, *others = second_gradients(forward, grad, x, weight, bias, ctx.wanted, cotangents)
    return (of_grad, None, *others, *(None,) * (len(ctx.settings) + 2))


register_autograd(_library, "dilated_conv2d", _autograd_backward, _setup_context)
register_autograd(_library, "dilated_conv2d_backward", _second_backward, _setup_second)
