"""How much memory filling an image takes, found out without filling it."""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inpaint_kernels import _workspaces
from inpaint_kernels._checks import check_range
from inpaint_kernels.models import Box, InpaintingModel
from inpaint_kernels.models._layers import Convolution
from inpaint_kernels.models._regions import working_memory
from inpaint_kernels.nn import DilatedConv2d

_BYTES_OF_KERNELS = 52 << 20
"""What kernels, threads and the gaps of the heap take for an image of any size; with it estimates for 512 x 512 pixels
are 0.86 (CSA) to 1.19 (DeepFill v1) of what a process grows by."""

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def estimate_memory(
    model: InpaintingModel,
    height: int,
    width: int,
    dtype: torch.dtype | None = None,
    hole: Box | Sequence[Box] | None = None,
    *,
    working_bytes: int | None = None,
    **guidance: Any,
) -> int:
    """Bytes that ``model(image, mask)`` takes at its peak, beside the model, the image and the mask.

    The model runs on tensors without memory, in milliseconds to seconds for any size, and what they would take is
    counted from operation to operation; so are the workspaces of the attention kernels and the copies of weights that
    kernels make. On a CPU within 25 % of what the process grows by (measured with float32 from 512 x 512 on). On a GPU
    cuDNN's workspaces are not counted.

    Args:
        model: in evaluation mode, as it runs without gradients.
        height: of the image, a size that the model takes, as the next one.
        width: the same.
        dtype: None or the parameters' own; torch.bfloat16 or torch.float16: the model in autocast.
        hole: the box that alone is painted, or several (:meth:`~.models.InpaintingModel.hole_boxes`); None: the whole
            image.
        working_bytes: as for :func:`inpaint_kernels.models.working_memory`; None: maps are computed whole.
        **guidance: what else the model takes, see ``paint`` of its class. Only the sizes of maps count.

    Raises:
        ValueError, TypeError: an argument is wrong, or the model takes no such size.

    Example:
        >>> from inpaint_kernels.models import GLCIC
        >>> estimate_memory(GLCIC().eval(), 512, 512) // 2**20 < 300
        True
    """
    if not isinstance(model, InpaintingModel):
        raise TypeError(f"model: expected a model of inpaint_kernels.models, got {type(model).__name__}")
    for name, side in (("height", height), ("width", width)):
        check_range(name, side, minimum=1, integer=True)
        if side % model.size_multiple or side < model.least_size:
            raise ValueError(
                f"{name}: expected a multiple of {model.size_multiple}, at least {model.least_size}, got {side}"
            )
    boxes = [hole] if isinstance(hole, Box) else hole
    parameter = next(model.parameters())
    autocast = nullcontext() if dtype in (None, parameter.dtype) else torch.autocast(parameter.device.type, dtype)
    memory = LiveMemory()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), autocast, working_memory(working_bytes):
        image = torch.empty(1, 3, height, width, dtype=parameter.dtype, device=parameter.device)
        mask = torch.empty(1, 1, height, width, dtype=torch.bool, device=parameter.device)
        try:
            with memory, _workspaces.listening(memory.hold):
                model(image, mask, region="full" if boxes is None else boxes, **guidance)
        finally:
            torch.clear_autocast_cache()  # or a caller's own autocast would go on with weights without memory
    return memory.peak + _bytes_of_kept_weights(model) + _BYTES_OF_KERNELS


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, as long as these live.

    Attributes:
        peak: most of them at a time, with the workspace of the operation that ran then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._workspace = 0
        self._sizes: dict[int, int] = {}

    def hold(self, size: int) -> None:
        """The next operation holds so many bytes beside its results."""
        self._workspace = size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        if func.namespace == "inpaint_kernels":
            workspace, self._workspace = self._workspace, 0
        else:
            workspace = 0
        self.peak = max(self.peak, self._live + workspace)
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._sizes:
            self._sizes[id(storage)] = storage.nbytes()
            self._live += storage.nbytes()
            weakref.finalize(storage, self._forget, id(storage))

    def _forget(self, storage: int) -> None:
        self._live -= self._sizes.pop(storage)


def _bytes_of_kept_weights(model: nn.Module) -> int:
    """Of copies that the first call makes and later ones use: weights as our kernels read them, folded batch norms.

    Of a folded weight there are three: what it was made of, itself, and as the kernel reads it. Torch's convolutions
    keep none.
    """
    folded = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    kept = 0
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and folded:
            kept += (3 if isinstance(module, nn.Conv2d) else 2) * _bytes_of(module.weight)
        elif isinstance(module, Convolution):
            kept += _bytes_of(module.conv.weight)
        elif isinstance(module, DilatedConv2d):
            kept += _bytes_of(module.weight)
    return kept


def _bytes_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


def parse_memory(memory: int | str) -> int:
    """Bytes, of a number or of a text such as "4GiB", "1.5 GB" or "800 MiB".

    Raises:
        TypeError, ValueError: anything else.
    """
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", memory)
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(f'memory: expected a number of bytes or a text such as "4GiB" or "800 MB", got {memory!r}')
        memory = round(float(match[1]) * _UNITS[match[2].lower()])
    check_range("memory", memory, minimum=1, integer=True)
    return memory
