"""What the tests of gated_conv2d, dilated_conv2d and partial_conv2d share."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from inpaint_kernels import explain
from tests.compare import assert_close_to_reference

Op = Callable[..., Any]
Arguments = dict[str, Any]

CHANNELS_LAST = torch.channels_last
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=CHANNELS_LAST),
    "strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "strided_channels_last": lambda x: F.pad(x, (0, 0, 1, 1)).contiguous(memory_format=CHANNELS_LAST)[:, :, 1:-1],
}

# Geometries of the public functions, with the kernel's size; what fits an image of 13 x 18.
ZEROS: list[Arguments] = [
    {"kernel": 1},
    {"kernel": 1, "padding": 3, "stride": 2},  # outputs that see the border alone
    {"kernel": 3, "padding": 1},
    {"kernel": 3, "padding": 1, "stride": 2},
    {"kernel": 4, "padding": 1, "stride": 2},
    {"kernel": 5, "padding": 2},
    {"kernel": 5, "padding": 2, "stride": 2},
    {"kernel": 7, "padding": 3, "stride": 2},
    {"kernel": 3, "padding": 2, "dilation": 2},
    {"kernel": 3, "padding": 4, "dilation": 4},
    {"kernel": 3, "padding": 16, "dilation": 16},
    {"kernel": (3, 5), "padding": (0, 3), "stride": (1, 2), "dilation": (2, 1)},
]
BORDERS: list[Arguments] = [
    *({"kernel": kernel, "padding_mode": "same_tf", "stride": stride} for kernel in (3, 4, 5) for stride in (1, 2)),
    {"kernel": 3, "padding_mode": "same_tf", "stride": (2, 3), "dilation": (3, 2)},
    {"kernel": 3, "padding_mode": "same_tf", "dilation": 8},
    {"kernel": 1, "padding_mode": "same_tf", "stride": 2},
    {"kernel": 3, "padding_mode": "reflect", "padding": 1},
    {"kernel": 3, "padding_mode": "reflect", "padding": 12, "dilation": 12},
    {"kernel": 5, "padding_mode": "reflect", "padding": (2, 4), "stride": 2},
]
UPSAMPLED: list[Arguments] = [
    {"kernel": 3, "padding": 1, "upsample": 2},
    {"kernel": 3, "padding_mode": "same_tf", "upsample": 2},
    {"kernel": 3, "padding_mode": "reflect", "padding": 1, "upsample": 2},
    {"kernel": 4, "padding": (3, 0), "stride": (1, 2), "upsample": 2},
]


def backends(op: str) -> list[str]:
    """Those that can run a small float32 call here, but the reference."""
    x, weight = torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 1, 1)
    arguments = (x, torch.ones(1, 1, 4, 4), weight) if op == "partial_conv2d" else (x, weight)
    return [name for name in explain(op, *arguments).usable if name != "reference"]


def layer(
    geometry: Arguments,
    channels: tuple[int, int] = (3, 4),
    *,
    size: tuple[int, int] = (13, 18),
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
    layout: str = "nchw",
    bias: bool = True,
) -> Arguments:
    """Arguments of a call; ``channels`` of x and of the weight."""
    settings = dict(geometry)
    kernel = settings.pop("kernel")
    rows, columns = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    fan_in = channels[0] // settings.get("groups", 1)
    weight = torch.randn(channels[1], fan_in, rows, columns, dtype=torch.float64) / (fan_in * rows * columns) ** 0.5
    return {
        "x": LAYOUTS[layout](torch.randn(batch, channels[0], *size, dtype=torch.float64).to(dtype)),
        "weight": weight.to(dtype),
        "bias": torch.randn(channels[1], dtype=torch.float64).to(dtype) if bias else None,
        **settings,
    }


def in_dtype(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The same values in another dtype; a mask stays what it is."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and name != "mask" else value
        for name, value in arguments.items()
    }


def tensors_of(arguments: Arguments) -> list[str]:
    """What has a gradient."""
    return [name for name, value in arguments.items() if isinstance(value, Tensor) and name != "mask"]


def output_of(result: Any) -> Tensor:
    """The output of an op, alone or beside a new mask."""
    return result if isinstance(result, Tensor) else result[0]


def assert_layout(y: Tensor, x: Tensor) -> None:
    """Channels_last stays, everything else becomes NCHW."""
    kept = x.is_contiguous(memory_format=CHANNELS_LAST) and not x.is_contiguous()
    assert y.is_contiguous(memory_format=CHANNELS_LAST if kept else torch.contiguous_format), y.stride()


def assert_equals_reference(op: Op, arguments: Arguments, backend: str) -> None:
    """A backend's result is that of the float64 reference, as closely as its dtype allows, in the right layout."""
    got = op(**arguments, backend=backend)
    eager = op(**arguments, backend="reference")
    judge = op(**in_dtype(arguments, torch.float64), backend="reference")
    y = output_of(got)
    assert y.dtype == arguments["x"].dtype
    assert_layout(y, arguments["x"])
    assert_close_to_reference(y, output_of(judge), output_of(eager))
    if not isinstance(got, Tensor):
        assert got.mask.dtype == arguments["mask"].dtype
        assert_close_to_reference(got.mask.double(), judge.mask.double(), eager.mask.double())


def gradients(op: Op, arguments: Arguments, backend: str) -> dict[str, Tensor]:
    """Gradients of a fixed weighted sum of the output."""
    names = tensors_of(arguments)
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    y = output_of(op(**{**arguments, **leaves}, backend=backend))
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return dict(zip(names, torch.autograd.grad(y, list(leaves.values()), weights), strict=True))


def assert_gradients_equal_reference(op: Op, arguments: Arguments, backend: str) -> None:
    """The same for the gradients."""
    eager = gradients(op, arguments, "reference")
    judge = gradients(op, in_dtype(arguments, torch.float64), "reference")
    for name, got in gradients(op, arguments, backend).items():
        assert got.dtype == arguments[name].dtype, name
        if name in ("x", "weight"):
            assert_layout(got, arguments[name])
        assert_close_to_reference(got, judge[name], eager[name], kind="gradient")


def naive_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    upsample: int = 1,
) -> Tensor:
    """Output pixel by output pixel and tap by tap, shares nothing with the library."""
    reads = []
    for axis in (0, 1):
        step, border, rate = (v[axis] if isinstance(v, tuple) else v for v in (stride, padding, dilation))
        size, taps = x.shape[axis + 2] * upsample, weight.shape[axis + 2]
        reads.append(_reads(size, taps, step, border, rate, padding_mode))
    outputs, inputs = weight.shape[0] // groups, x.shape[1] // groups
    y = x.new_zeros(x.shape[0], weight.shape[0], len(reads[0]), len(reads[1]))
    for row, rows in enumerate(reads[0]):
        for column, columns in enumerate(reads[1]):
            for i, source_row in enumerate(rows):
                for j, source_column in enumerate(columns):
                    if source_row is None or source_column is None:
                        continue
                    pixel = x[:, :, source_row // upsample, source_column // upsample]
                    for group in range(groups):
                        out = slice(group * outputs, (group + 1) * outputs)
                        part = pixel[:, group * inputs : (group + 1) * inputs]
                        y[:, out, row, column] += part @ weight[out, :, i, j].T
    return y if bias is None else y + bias[:, None, None]


def _reads(
    size: int, kernel: int, stride: int, padding: int, dilation: int, padding_mode: str
) -> list[list[int | None]]:
    """For each output the pixel that each tap reads; None: a zero."""
    reach = dilation * (kernel - 1) + 1
    if padding_mode == "same_tf":  # tensorflow/core/framework/kernel_shape_util.cc, GetWindowedOutputSize
        outputs = -(-size // stride)
        before = max((outputs - 1) * stride + reach - size, 0) // 2
    else:
        outputs, before = (size + 2 * padding - reach) // stride + 1, padding

    def pixel(position: int) -> int | None:
        if padding_mode == "reflect":
            position = abs(position)
            position = 2 * (size - 1) - position if position >= size else position
        return position if 0 <= position < size else None

    return [[pixel(o * stride - before + tap * dilation) for tap in range(kernel)] for o in range(outputs)]


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that torch operations make inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in _flat(args) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in _flat((result,)):
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address and address not in known and address not in self._seen:
                self._seen.add(address)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, address, storage.nbytes())
        return result

    def _freed(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.live -= size


def _flat(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _flat(value)


def compiled_graphs(call: Callable[..., Any]) -> tuple[Callable[..., Any], list[torch.fx.GraphModule]]:
    """``call`` compiled into one graph for all sizes, and the graphs that were made of it so far."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    return torch.compile(call, fullgraph=True, dynamic=True, backend=count), graphs


def peer_checkout(request: pytest.FixtureRequest, repository: str) -> Path:
    """The checkout of a public repository, or a skipped test; see tests/test_contextual_attention_peers.py."""
    folder = request.config.getoption("--peers", None) or os.environ.get("INPAINT_PEERS")
    if not folder:
        pytest.skip("no checkouts of public ports (INPAINT_PEERS=DIR)")
    candidates = (Path(folder) / repository.replace("/", "+"), Path(folder) / repository.split("/")[1])
    found = next((path for path in candidates if path.is_dir()), None)
    if found is None:
        pytest.skip(f"no checkout of {repository} in {folder}")
    return found
