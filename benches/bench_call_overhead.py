"""What the Python side of a call costs: the public function beside its kernel, on inputs that are nothing to compute.

Both slice the matching grid out of the map and run the native kernel; the difference between the two, at most 15 us, is
what checks, presets and the choice of a backend add. A round is `CALLS` calls, its figure the seconds of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from torch import Tensor

from benches.conftest import CLOCK, Race
from benches.harness import Outputs, Provider
from inpaint_kernels import contextual_attention

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark(timer=CLOCK)

CALLS: Final = 1000
CHANNELS: Final = 2
RATE: Final = 2
KERNEL, PUBLIC = "kernel", "public call"
NIPPONJO: Final = (3, "max", 1e-4, 3, 10.0, "multiply", -1000.0, None, RATE, 4, 1, 1, 4.0)


@dataclass(frozen=True)
class OverheadCase:
    """Square features of ``size`` with two channels."""

    size: int

    def __str__(self) -> str:
        return f"{self.size}x{self.size}"

    @property
    def baseline(self) -> str:
        return KERNEL

    @property
    def tolerances(self) -> tuple[float, ...]:
        return (1e-5,)

    def provider(self, name: str) -> Provider:
        call = functools.partial(_kernel if name == KERNEL else contextual_attention, *_maps(self))
        return Provider(
            name,
            run=functools.partial(_repeat, call),
            expected=functools.partial(_expected, self),
            warm_up=call,
            scale=1 / CALLS,
        )

    def facts(self) -> Mapping[str, Any]:
        positions = (self.size // RATE) ** 2
        return {
            "op": "call overhead",
            "case": str(self),
            "size": self.size,
            "keys": positions,
            "queries": positions,
            "direction": "forward",
            "channels": CHANNELS,
        }


def _maps(case: OverheadCase) -> tuple[Tensor, Tensor]:
    features = torch.randn(1, CHANNELS, case.size, case.size, generator=torch.Generator().manual_seed(0))
    return features, features


def _kernel(f: Tensor, b: Tensor) -> Tensor:
    grid = f[:, :, ::RATE, ::RATE]
    output: Tensor = torch.ops.inpaint_native.contextual_attention_forward(
        grid, grid, b, None, None, None, None, *NIPPONJO, False
    )[0]
    return output


def _repeat(call: Callable[[], Tensor]) -> Outputs:
    for _ in range(CALLS - 1):
        call()
    return (call(),)


def _expected(case: OverheadCase) -> Outputs:
    f, b = (x.double() for x in _maps(case))
    return (contextual_attention(f, b, backend="reference"),)


@pytest.mark.parametrize("provider", [KERNEL, PUBLIC])
@pytest.mark.parametrize("case", [OverheadCase(4)], ids=str)
def test_seconds(case: OverheadCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_seconds(provider, benchmark)
