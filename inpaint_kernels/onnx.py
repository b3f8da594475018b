"""ONNX files of the models, with every op of this package written in standard operations."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from inpaint_kernels import _onnx_composites
from inpaint_kernels._files import write_atomically

if TYPE_CHECKING:
    from inpaint_kernels.models import InpaintingModel

__all__ = ["export"]

LARGEST_FILE = 2**31 - 1
"""Bytes of one protobuf."""


def export(
    model: InpaintingModel, image: Tensor, mask: Tensor, path: str | os.PathLike[str], **guidance: Any
) -> tuple[str, ...]:
    """Write a model as one ONNX file for images of one size; ONNX Runtime needs neither torch nor this package.

    The file's inputs are ``image``, ``mask`` and the tensors of the guidance by their names, in the shapes and dtypes
    given here; its values are those of every call. Guidance that is no tensor is built in. Its outputs are the fields
    of :class:`~inpaint_kernels.models.InpaintResult` that the model gives, by their names.

    Every operation is a standard one of ONNX's default domain. Contextual and coherent semantic attention store all
    their scores there, [B, N, N] for N positions (1,024 at 256 x 256, 62,500 at 2000 x 2000: 16 GB), and the whole
    image is computed. Coherent semantic attention is one Scan over the positions.

    Args:
        model: any of :mod:`inpaint_kernels.models`, in evaluation mode, float32, on the CPU.
        image: as of the model, as the next one; only shape, dtype and whether the model takes it count.
        mask: the same. A file for masks of batch 1 takes no larger ones.
        path: of the file; it is replaced whole or not at all.
        **guidance: of the model. EdgeConnect needs ``canny_edges``: Canny runs in scikit-image, outside of the graph.

    Returns:
        The names of the outputs, in order.

    Raises:
        ValueError, TypeError: the model is in training, not in float32, not on the CPU, or too large for one file (2
            GiB), or it refuses the arguments; the message names what.
        ModuleNotFoundError: onnx or onnxscript is absent (``pip install 'inpaint-kernels[onnx]'``).
        OutputError: the file cannot be written.

    Deviations: what is refused for its values is not here. Where a mask leaves CSA no known position, or an image holds
    no numbers, the outputs mean nothing. In HOG drawings a gradient within rounding of the border between two bins may
    be drawn in the other one.

    Example:
        >>> from inpaint_kernels.models import GLCIC
        >>> image, mask = torch.rand(1, 3, 64, 96), torch.zeros(1, 1, 64, 96)
        >>> export(GLCIC().eval(), image, mask, "glcic.onnx")  # doctest: +SKIP
        ('output', 'completed')
    """
    _check_packages()
    _check_model(model)
    with torch.no_grad():
        result = model(image, mask, **guidance)
        outputs = tuple(name for name, value in result._asdict().items() if value is not None)
        tensors = {name: value for name, value in guidance.items() if isinstance(value, Tensor)}
        constants = {name: value for name, value in guidance.items() if name not in tensors}
        network = _Positional(model, tuple(tensors), constants, outputs)
        with _Composites():
            program = torch.export.export(network, (image, mask, *tensors.values()), strict=False)
        names = ["image", "mask", *tensors]
        onnx_program = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=names, output_names=list(outputs)
        )
    assert onnx_program is not None
    data = onnx_program.model_proto.SerializeToString()
    write_atomically(path, lambda stream: stream.write(data))
    return outputs


class _Positional(nn.Module):
    """A model that takes and gives tensors alone, as a graph does."""

    def __init__(
        self, model: nn.Module, tensors: tuple[str, ...], constants: Mapping[str, Any], outputs: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.model, self.tensors, self.constants, self.outputs = model, tensors, dict(constants), outputs
        self.eval()

    def forward(self, image: Tensor, mask: Tensor, *guides: Tensor) -> tuple[Tensor, ...]:
        result = self.model(image, mask, **dict(zip(self.tensors, guides, strict=True)), **self.constants)
        return tuple(getattr(result, name) for name in self.outputs)


class _Composites(TorchFunctionMode):
    """While it is entered, the package's torch ops are called as their composites."""

    def __init__(self) -> None:
        super().__init__()
        self._table = _onnx_composites.table()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._table.get(func, func)(*args, **(kwargs or {}))


def _check_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"torch's ONNX export needs {' and '.join(missing)}: pip install 'inpaint-kernels[onnx]'"
        )


def _check_model(model: InpaintingModel) -> None:
    from inpaint_kernels.models import InpaintingModel

    if not isinstance(model, InpaintingModel):
        raise TypeError(f"model: expected one of inpaint_kernels.models, got {type(model).__name__}")
    if any(module.training for module in model.modules()):
        raise ValueError("model: expected evaluation mode, model.eval(), got a model in training")
    tensors = [*model.parameters(), *model.buffers()]
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    if dtypes - {torch.float32}:
        got = ", ".join(sorted(map(str, dtypes)))
        raise TypeError(f"model: expected parameters in torch.float32, got {got}")
    devices = {t.device.type for t in tensors}
    if devices - {"cpu"}:
        raise ValueError(f"model: expected the CPU, got {', '.join(sorted(devices))}")
    size = sum(t.numel() * t.element_size() for t in tensors)
    if size >= LARGEST_FILE:
        raise ValueError(f"model: expected less than 2 GiB of parameters, which one ONNX file holds, got {size} bytes")
