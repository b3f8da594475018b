"""Work shared out between the processes of ``torchrun``, by torch.distributed; alone without it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

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


@contextmanager
def group() -> Iterator[Group]:
    """The processes that torchrun started, which tell each other what became of their share over gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Group()
        return
    dist.init_process_group("gloo")
    try:
        yield Group(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
