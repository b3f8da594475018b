"""The op ``gated_conv2d``: a convolution, and one half of its channels opening and closing the other, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inpaint_kernels._checks import check_choice, check_same_device, check_same_dtype, check_shape
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
from inpaint_kernels.portable import gated_conv2d as portable
from inpaint_kernels.portable._convolution import Activation, Geometry, convolution_backward, empty_maps
from inpaint_kernels.reference import gated_conv2d as reference

GATE_ORDERS = ("feature_first", "gate_first")

# 1. The public function -----------------------------------------------------------------------------------------------


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Border = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    activation: str = "elu",
    negative_slope: float = 0.2,
    padding_mode: str = "zeros",
    upsample: int = 1,
    gate_order: str = "feature_first",
    backend: str | None = None,
) -> Tensor:
    """Convolve to twice the channels, and let one half decide how much of the other passes (DeepFill v2).

    In one pass::

        features, gate = split(conv2d(x, weight) + bias, 2, dim=1)
        y              = activation(features) * sigmoid(gate)

    Bias, split, activation, sigmoid and product cost no pass over memory of their own: what leaves the convolution is
    y (and, for the gradient, the gates before the sigmoid: from y and them the gradient of the other half follows).

    Sums and what follows them are float32 (float64 for float64), rounded once. Exceptions: on CUDA products of float32
    are TF32 where torch lets cuDNN's convolutions use it, and where the convolution is cuDNN's or, with ``portable``
    on another device than a CPU, torch's, a short dtype is also rounded before what follows.

    The ``cpu`` kernel computes 3 x 3 kernels of stride 1 with many channels by Winograd's minimal filtering, F(2 x 2)
    in float32 and float64, F(4 x 4) in float32 for short dtypes. It rounds like the direct sum, but an infinity or NaN
    in x reaches outputs up to 2 (short dtypes: 4) times the dilation away instead of 1.

    Two runs of a call give the same bits; where cuDNN takes part, if ``torch.backends.cudnn.deterministic`` is set. The
    output of the ``cpu`` kernel does not depend on the number of threads. Nor do the gradients of weight and bias in
    float32 and float64; the other gradients of the convolution may be torch's own, and may.

    Args:
        x: [B, Cin, H, W] float16, bfloat16, float32 or float64, NCHW or channels_last.
        weight: [2C, Cin / groups, kh, kw]; or, with ``gate_weight``, [C, Cin, kh, kw].
        bias: [2C], or with ``gate_weight`` [C]; None: 0.
        stride: of the convolution, one number or (rows, columns), as dilation.
        padding: border on each side, in pixels of the upsampled x: one number, (rows, columns), or (top, bottom, left,
            right).
        dilation: distance of the kernel's taps.
        groups: groups of channels that see only each other; the split follows the convolution.
        gate_weight: [C, Cin, kh, kw], the gate's own weight where a port has two convolutions; groups must be 1. The
            two are concatenated in every call.
        gate_bias: [C], the gate's own bias; None: 0.
        activation: "elu", "relu", "leaky_relu" or "none".
        negative_slope: of leaky_relu, at least 0.
        padding_mode: "zeros"; "reflect", the border mirrored, ``padding`` smaller than the image; or "same_tf",
            TensorFlow's SAME, where ``padding`` must be 0: zeros for ceil(size / stride) outputs, half of them in front
            and the odd one behind.
        upsample: 2: every pixel of x is a square of 2 x 2 first (nearest), which is never stored. 1: no.
        gate_order: "feature_first" or "gate_first", which half of the 2C channels is what.
        backend: "cpu", "triton", "portable" or "reference"; None: the first that can run, see
            :func:`inpaint_kernels.explain`.

    Returns:
        [B, C, Ho, Wo] in the dtype of x; in channels_last if x is contiguous in that layout alone, else in NCHW.
        Differentiable twice with respect to x, weights and biases. Inside ``torch.autocast`` all of them are cast as
        for conv2d.

    Raises:
        ValueError, TypeError: an argument has the wrong rank, size, dtype, device or value; the message names it.
        RuntimeError: an explicitly requested backend cannot run; the message says why.

    References:
        Yu et al., Free-Form Image Inpainting with Gated Convolution, ICCV 2019, section 3.1.
    """
    problem = _prepare(
        x,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        gate_weight=gate_weight,
        gate_bias=gate_bias,
        activation=activation,
        negative_slope=negative_slope,
        padding_mode=padding_mode,
        upsample=upsample,
        gate_order=gate_order,
    )
    backend = BACKENDS.choose(problem, backend)
    x, weight, bias, geometry, act, gate_first = problem
    keep = wants_gradient(x, weight, bias)
    call: Callable[..., tuple[Tensor, Tensor]] = torch.ops.inpaint_kernels.gated_conv2d
    if not keep and only_computes(x, weight, bias):
        call = _gated_conv2d
    return call(
        x,
        weight,
        bias,
        *geometry_arguments(geometry),
        geometry.upsample,
        geometry.reflect,
        act.name,
        act.slope,
        gate_first,
        keep,
        backend,
    )[0]


# 2. Checks ------------------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """One checked call."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry
    activation: Activation
    gate_first: bool

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
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    activation: str = "elu",
    negative_slope: float = 0.2,
    padding_mode: str = "zeros",
    upsample: int = 1,
    gate_order: str = "feature_first",
) -> _Problem:
    x, weight, bias, gate_weight, gate_bias = autocast(x, weight, bias, gate_weight, gate_bias)
    check_convolution(x, weight, bias, groups)
    check_gate_order(gate_order)
    if gate_weight is not None:
        _check_gate(weight, gate_weight, gate_bias, groups, gate_order)
        bias = _one_bias(weight, bias, gate_bias)
        weight = torch.cat((weight, gate_weight))
    elif gate_bias is not None:
        raise ValueError("gate_bias: expected none without gate_weight; bias holds both halves")
    elif weight.shape[0] % 2:
        raise ValueError(f"weight: expected 2C output channels, features and gates, got {weight.shape[0]}")
    geometry = make_geometry(x, weight, stride, padding, dilation, groups, padding_mode, upsample)
    act = check_activation(activation, negative_slope)
    return _Problem(x, weight, bias, geometry, act, gate_order == "gate_first")


def check_gate_order(gate_order: str) -> None:
    """Raises ValueError unless it is one of :data:`GATE_ORDERS`."""
    check_choice("gate_order", gate_order, GATE_ORDERS)


def _check_gate(weight: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, groups: int, gate_order: str) -> None:
    sizes = {"C": weight.shape[0], "Cin": weight.shape[1], "kh": weight.shape[2], "kw": weight.shape[3]}
    check_shape("gate_weight", gate_weight, "C Cin kh kw", **sizes)
    if gate_bias is not None:
        check_shape("gate_bias", gate_bias, "C", C=sizes["C"])
    check_same_dtype(weight=weight, gate_weight=gate_weight, gate_bias=gate_bias)
    check_same_device(weight=weight, gate_weight=gate_weight, gate_bias=gate_bias)
    if groups != 1:
        raise ValueError(f"groups: expected 1 with gate_weight, got {groups}")
    if gate_order != "feature_first":
        raise ValueError(f"gate_order: expected 'feature_first' with gate_weight, got {gate_order!r}")


def _one_bias(weight: Tensor, bias: Tensor | None, gate_bias: Tensor | None) -> Tensor | None:
    if bias is None and gate_bias is None:
        return None
    none = weight.new_zeros(weight.shape[0])
    return torch.cat((none if bias is None else bias, none if gate_bias is None else gate_bias))


# 3. Schema ------------------------------------------------------------------------------------------------------------

_SETTINGS_SCHEMA = (
    f"{GEOMETRY_SCHEMA}, int upsample, bool reflect, str activation, float negative_slope, bool gate_first"
)

_library = torch.library.Library("inpaint_kernels", "FRAGMENT")
_library.define(
    f"gated_conv2d(Tensor x, Tensor weight, Tensor? bias, {_SETTINGS_SCHEMA}, bool keep, str backend)"
    " -> (Tensor output, Tensor gates)"
)
_library.define(
    f"gated_conv2d_backward(Tensor grad, Tensor y, Tensor gates, Tensor x, Tensor weight, Tensor? bias, "
    f"{_SETTINGS_SCHEMA}, bool[3] wanted, str backend) -> (Tensor, Tensor, Tensor)"
)


# 4. Fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("inpaint_kernels::gated_conv2d", lib=_library)
def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
    keep = settings[9]
    size = geometry_of(*settings[:6]).output_of(x, weight)
    y = empty_maps(x, weight.shape[0] // 2, size)
    return y, torch.empty_like(y) if keep else x.new_empty(0)


@torch.library.register_fake("inpaint_kernels::gated_conv2d_backward", lib=_library)
def _fake_backward(
    grad: Tensor, y: Tensor, gates: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(x, weight, settings[9])


# 5. Backends ----------------------------------------------------------------------------------------------------------


BACKENDS = ConvolutionBackends("gated_conv2d", _prepare)


def _cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: Activation,
    gate_first: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    x = dense(x)
    channels, size = weight.shape[0] // 2, geometry.output_of(x, weight)
    y = cpu_map(x, channels, size)
    gates = cpu_map(x, channels, size) if keep else None
    packed, few_outputs = cpu_weight(x, weight, geometry, gated=True, gate_first=gate_first)
    torch.ops.inpaint_native.gated_conv2d(
        x,
        weight,
        packed,
        bias,
        *geometry.stride,
        geometry.pad[0],
        geometry.pad[2],
        *geometry.dilation,
        few_outputs,
        geometry.upsample,
        geometry.reflect,
        *activation,
        gate_first,
        y,
        gates,
    )
    return y, x.new_empty(0) if gates is None else gates


def _cpu_gate_backward(grad: Tensor, y: Tensor, gates: Tensor, activation: Activation, gate_first: bool) -> Tensor:
    grad_sums = cpu_map(y, 2 * y.shape[1], (y.shape[2], y.shape[3]))
    torch.ops.inpaint_native.gated_conv2d_gate_backward(
        like(grad, y), dense(y), like(gates, y), *activation, gate_first, grad_sums
    )
    return grad_sums


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from inpaint_kernels.triton_kernels import gated_conv2d as triton_kernels

    return triton_kernels.gated_conv2d(*args)


def _triton_gate_backward(*args: Any) -> Tensor:
    from inpaint_kernels.triton_kernels import gated_conv2d as triton_kernels

    return triton_kernels.gated_conv2d_gate_backward(*args)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: Activation,
    gate_first: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    y, gates = reference.gated_conv2d(x, weight, bias, *geometry, *activation, gate_first)
    # A copy: a view of the gates would hold the features too.
    return like(y, x), like(gates, x).clone() if keep else x.new_empty(0)


_FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cpu": _cpu,
    "triton": _triton,
    "portable": portable.gated_conv2d,
    "reference": _reference,
}
_GATE_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "cpu": _cpu_gate_backward,
    "triton": _triton_gate_backward,
    "portable": portable.gated_conv2d_gate_backward,
}


@torch.library.impl(_library, "gated_conv2d", "CompositeExplicitAutograd")
@outside_autocast
def _gated_conv2d(
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
    gate_first: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    geometry = geometry_of(stride, pad, dilation, groups, upsample, reflect)
    return _FORWARD[backend](x, weight, bias, geometry, Activation(activation, negative_slope), gate_first, keep)


@torch.library.impl(_library, "gated_conv2d_backward", "CompositeExplicitAutograd")
@outside_autocast
def _gated_conv2d_backward(
    grad: Tensor,
    y: Tensor,
    gates: Tensor,
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
    gate_first: bool,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = geometry_of(stride, pad, dilation, groups, upsample, reflect)
    act = Activation(activation, negative_slope)
    if backend == "reference":
        settings = (*geometry, *act, gate_first)
        return gradients(reference.gated_conv2d_backward(grad, x, weight, bias, *settings), x, weight, wanted)
    grad_sums = _GATE_BACKWARD[backend](grad, y, gates, act, gate_first)
    of_sums = cpu_convolution_backward if backend == "cpu" else convolution_backward
    return gradients(of_sums(grad_sums, x, weight, geometry, wanted), x, weight, wanted)


# 6. Autograd ----------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, *settings = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, x, weight, bias)
    ctx.settings, ctx.keep, ctx.backend = settings[:-2], settings[-2], settings[-1]


def _autograd_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    unwanted = (None,) * (len(ctx.settings) + 2)
    if grad is None:
        return (None, None, None, *unwanted)
    if not ctx.keep:
        raise RuntimeError("gated_conv2d: the gradient needs what keep=True returns")
    wanted = tuple(ctx.needs_input_grad[:3])
    grads = torch.ops.inpaint_kernels.gated_conv2d_backward(
        grad, *ctx.saved_tensors, *ctx.settings, wanted, ctx.backend
    )
    return (*(g if want else None for g, want in zip(grads, wanted, strict=True)), *unwanted)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, _, _, x, weight, bias, *settings, wanted, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, x, weight, bias)
    ctx.settings, ctx.wanted = settings, wanted


def _second_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.gated_conv2d(x, weight, bias, *ctx.settings)[0]

    grad, x, weight, bias = ctx.saved_tensors
    of_grad, *others = second_gradients(forward, grad, x, weight, bias, ctx.wanted, cotangents)
    return (of_grad, None, None, *others, *(None,) * (len(ctx.settings) + 2))


register_autograd(_library, "gated_conv2d", _autograd_backward, _setup_context)
register_autograd(_library, "gated_conv2d_backward", _second_backward, _setup_second)
