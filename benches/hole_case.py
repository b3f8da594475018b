"""What the races of the exemplar filler's ops have in common: a square hole in a square photo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

CHANNELS: Final = 5
OURS, PORTABLE, NAIVE = "ours", "portable", "naive"
BACKENDS: Final = {NAIVE: "reference", OURS: "cpu", PORTABLE: "portable"}


@dataclass(frozen=True)
class HoleCase:
    """Sides of the photo, whose pixels are the keys, and of the hole, whose pixels are the queries."""

    op: ClassVar[str]
    photo: int
    hole: int

    def __str__(self) -> str:
        return f"{self.photo}x{self.photo}-hole{self.hole}"

    @property
    def baseline(self) -> str | None:
        raise NotImplementedError

    @property
    def slow(self) -> bool:
        return False

    @property
    def provider_names(self) -> list[str]:
        return [name for name in BACKENDS if name != NAIVE or self.baseline]

    def facts(self) -> Mapping[str, Any]:
        return {
            "op": self.op,
            "case": str(self),
            "size": self.photo,
            "keys": self.photo**2,
            "queries": self.hole**2,
            "direction": "forward",
            "channels": CHANNELS,
        }
