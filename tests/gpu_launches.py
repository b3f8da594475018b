"""Counts what a call would launch on a GPU while it runs on the CPU: emulated kernels, and torch's own operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that make tensors of memory that is there; and those that launch twice.
FREE = {"empty", "empty_like", "new_empty", "lift_fresh", "detach", "scalar_tensor", "_unsafe_view"}
TWO_LAUNCHES = {"constant_pad_nd"}  # fills, then copies


class TorchLaunches(TorchDispatchMode):
    """Within it, ``names`` collects the operations of torch that launch a kernel on a GPU, once per launch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        aliases = [returned.alias_info for returned in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        is_empty = isinstance(result, Tensor) and result.numel() == 0
        if not is_view and not is_empty and name.rstrip("_") not in FREE:
            self.names += [name] * (2 if name in TWO_LAUNCHES else 1)
        return result
