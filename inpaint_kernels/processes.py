"""Work shared out between the processes of ``torchrun``, by torch.distributed; alone without it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The processes that share the work.

    Attributes:
        rank: of this one.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """What of the items is this process's: every ``size``-th."""
        return items[self.rank :: self.size]

    def gathered(self, value: T) -> list[T] | None:
        """The values of all processes, in the first one; None in the others. All must call it."""
        if self.size == 1:
            return [value]
        values: list[T] | None = [value] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0)
        return values

    def any(self, value: bool) -> bool:
        """Whether it is true in one of the processes. All must call it."""
        if self.size == 1:
            return value
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return True in values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the means over all processes in the place of tensors of one dtype. All must call it."""
        if self.size > 1 and tensors:
            together = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(together)
            _spread(together / self.size, tensors)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Put the first process's tensors, of one dtype, in the place of all others'. All must call it."""
        if self.size > 1 and tensors:
            together = torch.cat([tensor.flatten() for tensor in tensors])
            dist.broadcast(together, src=0)
            _spread(together, tensors)


def _spread(together: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, part in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def rank() -> int:
    """Of this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def group(backend: str = "gloo") -> Iterator[Group]:
    """The processes that torchrun started.

    Args:
        backend: of torch.distributed; a device's own, as "cpu:gloo,cuda:nccl", where tensors there are exchanged.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Group()
        return
    dist.init_process_group(backend)
    try:
        yield Group(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
