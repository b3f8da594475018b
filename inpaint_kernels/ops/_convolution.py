"""What the three convolution ops share: arguments made a geometry, checks, autocast, and why a backend cannot run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from inpaint_kernels import _native
from inpaint_kernels._backends import Explanation, OpBackends, Problem
from inpaint_kernels._checks import (
    check_choice,
    check_dtype,
    check_pair,
    check_range,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from inpaint_kernels._compile import constant_for_compile
from inpaint_kernels._map_memory import empty_map
from inpaint_kernels._packed_weights import PACKED_WEIGHTS
from inpaint_kernels.ops._autograd import is_trained
from inpaint_kernels.ops._common import always
from inpaint_kernels.portable._convolution import (
    Activation,
    Geometry,
    convolution_backward,
    convolution_padding,
    layout_of,
    prepare_backward,
)

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound="ConvolutionProblem")

Pair = int | tuple[int, int]
Border = Pair | tuple[int, int, int, int]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ACTIVATIONS = ("elu", "relu", "leaky_relu", "none")
PADDING_MODES = ("zeros", "reflect", "same_tf")

GEOMETRY_SCHEMA = "int[2] stride, SymInt[4] pad, int[2] dilation, int groups"

# A weight of so many elements leaves the caches while outputs are computed row by row. Few ones are all computed with
# one part of the weight before the next is read, without Winograd's transforms, which make the weight larger. Measured
# with the layers of the partial convolution U-Net at 512 x 512: with stride 1 at 64 outputs, with stride 2 up to 1,024.
_LARGE_WEIGHT = 1 << 18
_FEW_OUTPUTS, _FEW_WINOGRAD_OUTPUTS = 1024, 64

# Dtypes in which the CPU kernels compute gradients, and channels from which on they are quicker for that of x.
_NATIVE_GRADIENT_DTYPES, _FEWEST_TURNED = (torch.float32, torch.float64), 48

# Devices whose autocast the ops follow.
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


# Checks ---------------------------------------------------------------------------------------------------------------


def check_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    """Raises unless these are the input, weight [O, Cin / groups, kh, kw] and bias [O] of a convolution."""
    sizes = check_shape("x", x, "B Cin H W")
    check_dtype("x", x, DTYPES)
    check_range("groups", groups, minimum=1, integer=True)
    if sizes["Cin"] % groups:
        raise ValueError(f"groups: expected a divisor of the {sizes['Cin']} channels of x, got {groups}")
    shape = check_shape("weight", weight, "O Cin/groups kh kw", **{"Cin/groups": sizes["Cin"] // groups})
    if shape["O"] % groups:
        raise ValueError(f"groups: expected a divisor of the {shape['O']} channels of weight, got {groups}")
    if bias is not None:
        check_shape("bias", bias, "O", O=shape["O"])
    check_same_dtype(x=x, weight=weight, bias=bias)
    check_same_device(x=x, weight=weight, bias=bias)


def check_activation(name: str, slope: float) -> Activation:
    """The activation of these arguments, or an error."""
    check_choice("activation", name, ACTIVATIONS)
    # From a result below zero its argument's side is known only if the slope is not negative.
    check_range("negative_slope", slope, minimum=0)
    return Activation(name, float(slope))


def check_padding_mode(padding_mode: str) -> None:
    """Raises ValueError unless it is one of :data:`PADDING_MODES`."""
    check_choice("padding_mode", padding_mode, PADDING_MODES)


def make_geometry(
    x: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Border,
    dilation: Pair,
    groups: int,
    padding_mode: str = "zeros",
    upsample: int = 1,
) -> Geometry:
    """The geometry of these arguments, or an error."""
    steps = check_pair("stride", stride, 1)
    top, bottom, left, right = pad = _check_border(padding)
    rates = check_pair("dilation", dilation, 1)
    check_padding_mode(padding_mode)
    check_choice("upsample", upsample, (1, 2))
    size = (x.shape[2] * upsample, x.shape[3] * upsample)
    reach = [(weight.shape[axis + 2] - 1) * rates[axis] + 1 for axis in (0, 1)]
    if padding_mode == "same_tf":
        if any(pad):
            raise ValueError(f"padding: expected 0 with padding_mode='same_tf', which makes its own, got {padding}")
        rows, columns = (_same_tf(size[axis], reach[axis], steps[axis]) for axis in (0, 1))
        return Geometry(steps, (*rows, *columns), rates, groups, upsample)
    if padding_mode == "reflect" and (max(top, bottom) >= size[0] or max(left, right) >= size[1]):
        raise ValueError(
            f"padding: expected less than the size {size[0]} x {size[1]} that padding_mode='reflect' mirrors, "
            f"got {padding}"
        )
    padded = size[0] + top + bottom, size[1] + left + right
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise ValueError(
            f"x: expected, with its padding, at least the {reach[0]} x {reach[1]} pixels that the kernel spans, "
            f"got {padded[0]} x {padded[1]}"
        )
    return Geometry(steps, pad, rates, groups, upsample, padding_mode == "reflect")


def _check_border(padding: Border) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of one number, of (rows, columns), or of all four."""
    if isinstance(padding, (tuple, list)) and len(padding) == 4:
        for width in padding:
            check_range("padding", width, minimum=0, integer=True)
        top, bottom, left, right = padding
        return top, bottom, left, right
    rows, columns = check_pair("padding", padding, 0)
    return rows, rows, columns, columns


def _same_tf(size: int, reach: int, stride: int) -> tuple[int, int]:
    """TensorFlow's padding "SAME": as much as ceil(size / stride) outputs need, the odd pixel behind.

    Written with a remainder: torch.export can prove how large the output is then.
    """
    total = reach - 1 - (size - 1) % stride
    if reach < stride:
        total = torch.sym_max(total, 0)
    return total // 2, total - total // 2


# Between a public function and its torch op ---------------------------------------------------------------------------


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype of a convolution: inside ``torch.autocast`` the short one, except for float64."""
    device = x.device.type if isinstance(x, Tensor) else "none"
    if device not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return (x, *others)
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (x, *others)
    )


def geometry_arguments(geometry: Geometry) -> tuple[Any, ...]:
    """The geometry in the order of :data:`GEOMETRY_SCHEMA`."""
    return geometry.stride, geometry.pad, geometry.dilation, geometry.groups


def geometry_of(
    stride: Any, pad: Any, dilation: Any, groups: int, upsample: int = 1, reflect: bool = False
) -> Geometry:
    """The geometry of an op's arguments."""
    return Geometry(tuple(stride), tuple(pad), tuple(dilation), groups, upsample, reflect)


def outside_autocast(kernel: Callable[P, R]) -> Callable[P, R]:
    """Runs an op's implementation with autocast off: the dtypes are those that the public function decided on."""

    @functools.wraps(kernel)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        x = args[0]
        assert isinstance(x, Tensor)
        device = x.device.type
        if device not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
            return kernel(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return kernel(*args, **kwargs)

    return run


def dense(x: Tensor) -> Tensor:
    """``x`` itself if it is contiguous in NCHW or in channels_last, else a copy in NCHW."""
    return x.contiguous(memory_format=layout_of(x))


def like(x: Tensor, layout: Tensor) -> Tensor:
    """``x``, contiguous in the layout of another tensor."""
    return x.contiguous(memory_format=layout_of(layout))


def gradients(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None], x: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """What an op's backward returns: each gradient in the layout of its tensor, an empty tensor where unwanted."""
    grad_x, grad_weight, grad_bias = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return (
        x.new_empty(0) if grad_x is None else like(grad_x, x),
        x.new_empty(0) if grad_weight is None else like(grad_weight, weight),
        x.new_empty(0) if grad_bias is None else grad_bias.contiguous(),
    )


def second_gradients(
    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    wanted: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradient of an op's gradient, as a gradient penalty asks for it: of grad, x, weight and bias.

    Derived by torch from ``forward``, the op in plain operations: what is differentiated twice is trained, and rare.

    Args:
        forward: (x, weight, bias) -> the op's output, in operations that torch differentiates.
        grad: of the output.
        x: of the op, as the next two.
        weight: the same.
        bias: the same.
        wanted: which gradients the op's backward computed.
        cotangents: of those gradients.
    """
    given = (grad, x, weight, bias)
    if all(cotangent is None for cotangent in cotangents):
        return None, None, None, None
    with torch.enable_grad():
        leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in given]
        of, *inputs = leaves
        y = forward(*inputs)
        asked = [(leaf, c) for leaf, want, c in zip(inputs, wanted, cotangents, strict=True) if want and c is not None]
        firsts = torch.autograd.grad(y, [leaf for leaf, _ in asked], of, create_graph=True)
        known = [leaf for leaf in leaves if leaf is not None]
        seconds = iter(torch.autograd.grad(firsts, known, [c for _, c in asked], allow_unused=True))
    first, second, third, fourth = (None if leaf is None else next(seconds) for leaf in leaves)
    return first, second, third, fourth


def fake_gradients(x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """The same without values."""
    return (
        torch.empty_like(x, memory_format=layout_of(x)) if wanted[0] else x.new_empty(0),
        torch.empty_like(weight, memory_format=layout_of(weight)) if wanted[1] else x.new_empty(0),
        x.new_empty(weight.shape[0]) if wanted[2] else x.new_empty(0),
    )


# Backends -------------------------------------------------------------------------------------------------------------


class ConvolutionProblem(Problem, Protocol):
    """What the backends of all three ops need to know of a call."""

    @property
    def x(self) -> Tensor:
        """[B, Cin, H, W]."""

    @property
    def weight(self) -> Tensor:
        """[O, Cin / groups, kh, kw]."""

    @property
    def geometry(self) -> Geometry:
        """Which pixels each tap reads."""


@dataclasses.dataclass(frozen=True)
class ConvolutionExplanation(Explanation):
    """An :class:`Explanation` that also says which of its ways the Triton backend would go, where it can run.

    Attributes:
        triton_way: the way and why; empty if Triton cannot run the call.
    """

    triton_way: str = ""

    def __str__(self) -> str:
        way = f"\n  triton runs it {self.triton_way}" if self.triton_way else ""
        return super().__str__() + way


class ConvolutionBackends(OpBackends[C]):
    """The backends of a convolution op: cpu, triton, portable, reference."""

    def __init__(self, op: str, prepare: Callable[..., C]) -> None:
        """Registers them under the op's name; ``prepare`` as in :class:`OpBackends`."""

        def cpu(problem: C) -> list[str]:
            return _cpu_reasons(op, problem)

        super().__init__(op, prepare, {"cpu": cpu, "triton": _triton_reasons, "portable": always, "reference": always})

    def explain(self, problem: C, requested: str | None = None) -> Explanation:
        """As in :class:`OpBackends`, with Triton's way."""
        plain = super().explain(problem, requested)
        way = _triton_way(problem) if "triton" in plain.usable else ""
        fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        return ConvolutionExplanation(**fields, triton_way=way)


def cpu_map(x: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """An uninitialised map [B, channels, height, width] in the dtype and the layout of ``x``, for a CPU kernel."""
    return empty_map((x.shape[0], channels, *size), x.dtype, layout_of(x))


class _CpuPacking(NamedTuple):
    """What decides how a weight is packed for the CPU kernels (csrc/cpu/convolution.h)."""

    gated: bool
    gate_first: bool
    unit_stride: bool
    few_outputs: bool


def cpu_weight(
    x: Tensor, weight: Tensor, geometry: Geometry, *, gated: bool = False, gate_first: bool = False
) -> tuple[Tensor, bool]:
    """The weight of a call for the CPU kernels, packed now or when the same values were last used: bytes.

    And whether it was packed for few outputs. Of the weight itself the kernels read the shape only.

    No copy is kept of a weight that is trained, which changes before it is used again (measured with less kept
    workspace: a step of daa233's network at 256 x 256 takes 273 instead of 318 MiB).
    """
    height, width = geometry.output_of(x, weight)
    unit_stride = geometry.stride == (1, 1)
    winograd = unit_stride and weight.shape[2:] == (3, 3)
    most = _FEW_WINOGRAD_OUTPUTS if winograd else _FEW_OUTPUTS
    few_outputs = weight.numel() >= _LARGE_WEIGHT and x.shape[0] * height * width <= most
    packing = _CpuPacking(gated, gate_first, unit_stride, few_outputs)
    packed = PACKED_WEIGHTS.get(weight, packing, _pack_cpu_weight, _digest, keep=not is_trained(weight))
    return packed, few_outputs


def _pack_cpu_weight(weight: Tensor, packing: _CpuPacking) -> Tensor:
    return torch.ops.inpaint_native.convolution_pack_weight(weight.detach().contiguous(), *packing)


def _digest(weight: Tensor) -> int:
    return torch.ops.inpaint_native.convolution_weight_digest(dense(weight))


def cpu_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: Activation,
    residual: Tensor | None,
) -> Tensor:
    """activation(convolution + bias) + residual by the CPU kernel of ``dilated_conv2d``."""
    x = dense(x)
    y = cpu_map(x, weight.shape[0], geometry.output_of(x, weight))
    packed, few_outputs = cpu_weight(x, weight, geometry)
    torch.ops.inpaint_native.dilated_conv2d(
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
        None if residual is None else like(residual, x),
        y,
    )
    return y


def cpu_convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`convolution_backward`, in float32 and float64 by the CPU kernels where they are quicker.

    Those of weight and bias always: 1.2 (stride 2, few channels) to 2 times (3 x 3, 96 to 192 channels, 64 x 64: 11.4
    against 22.4 ms on one core) as fast as torch, which wants copies in NCHW besides. The gradient of x is a
    convolution with the turned weight: with stride 1 and from 48 channels on, 1 to 2 times as fast here as torch's own
    (128 channels, 64 x 64: 8.2 against 14.3 ms).
    """
    if x.dtype not in _NATIVE_GRADIENT_DTYPES or geometry.groups != 1:
        return convolution_backward(grad, x, weight, geometry, wanted)
    grad_x, grad_weight, grad_bias = None, None, None
    if wanted[0] and _turned_padding(weight, geometry) is not None:
        grad_x = _gradient_by_turned_weight(grad, x, weight, geometry)
    elif wanted[0]:
        grad_x, *_ = convolution_backward(grad, x, weight, geometry, [True, False, False])
    if wanted[1] or wanted[2]:
        grad_weight, grad_bias = _cpu_weight_gradient(grad, x, weight, geometry)
    return grad_x, grad_weight, grad_bias


def _cpu_weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias; both, since the second is a by-product."""
    if grad.numel() == 0 or x.numel() == 0:
        return x.new_zeros(weight.shape), x.new_zeros(weight.shape[0])
    grad_weight, grad_bias = x.new_empty(weight.shape), x.new_empty(weight.shape[0])
    torch.ops.inpaint_native.convolution_weight_gradient(
        dense(grad),
        dense(x),
        *geometry.stride,
        geometry.pad[0],
        geometry.pad[2],
        *geometry.dilation,
        geometry.upsample,
        geometry.reflect,
        grad_weight,
        grad_bias,
    )
    return grad_weight, grad_bias


def _turned_padding(weight: Tensor, geometry: Geometry) -> tuple[int, int] | None:
    """Padding (rows, columns) of the convolution with the turned weight; None where torch's gradient is as quick."""
    if geometry.stride != (1, 1) or min(weight.shape[:2]) < _FEWEST_TURNED:
        return None
    rows, columns = ((k - 1) * d for k, d in zip(weight.shape[2:], geometry.dilation, strict=True))
    top, left = convolution_padding(geometry) or (0, 0)
    return (rows - top, columns - left) if top <= rows and left <= columns else None


def _gradient_by_turned_weight(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    padding = _turned_padding(weight, geometry)
    assert padding is not None
    turned = weight.transpose(0, 1).flip(2, 3).contiguous()
    of_grad = Geometry((1, 1), (padding[0],) * 2 + (padding[1],) * 2, geometry.dilation)
    return prepare_backward(cpu_convolution(grad, turned, None, of_grad, Activation("none"), None), x, geometry)


def _cpu_reasons(op: str, problem: ConvolutionProblem) -> list[str]:
    if not problem.x.is_cpu:
        return [f"the tensors are on {problem.x.device}, not on the CPU"]
    missing = _native.why_not(op, "CPU")
    return _one_group(problem) if missing is None else [*_one_group(problem), missing]


def _triton_reasons(problem: ConvolutionProblem) -> list[str]:
    if not problem.x.is_cuda:
        return [f"the tensors are on {problem.x.device}, not on a CUDA device"]
    if not torch.cuda.is_available():  # tensors without memory may claim a device that is not there
        return [f"torch {torch.__version__} sees no CUDA device"]
    return [*_triton_lacks(problem.x.device, problem.x.dtype), *_one_group(problem)]


# A constant for torch.compile, which could not trace the question to the driver.
@constant_for_compile
def _triton_lacks(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    return _triton_lacks_once(device, dtype)


@functools.cache
def _triton_lacks_once(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    from inpaint_kernels.triton_kernels import _availability

    return tuple(_availability.reasons(torch.empty(0, dtype=dtype, device=device), 1))


def _one_group(problem: ConvolutionProblem) -> list[str]:
    return [] if problem.geometry.groups == 1 else ["the kernel takes groups=1 only"]


def _triton_way(problem: ConvolutionProblem) -> str:
    from inpaint_kernels.triton_kernels import _launch_config as config

    layer = config.layer_of(problem.x, problem.weight, problem.geometry)
    inside, why = config.in_gemm(layer, config.capability_of(problem.x))
    return f"{'inside an implicit GEMM' if inside else 'behind cuDNN'}: {why}"
