"""What races against public networks share: who takes part, and that the public network's own pictures are the gate."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F

from benches.harness import Outputs, Provider

PUBLISHED, PUBLISHED_LAST, OURS = "published", "published channels_last", "ours"

# With random weights many attention scores are equal to rounding, and which key wins changes a patch: of DeepFill v2 at
# 512 x 512 the published network in its two layouts differs by 0.7 % of the norm, by 37 % in the worst pixel. So means
# of POOL x POOL pixels are the gate; tests/test_acceleration_peers.py compares all pixels and gradients in float64.
POOL, TOLERANCE = 16, 5e-2


class PublishedRace:
    """A case of :mod:`.harness`; hashable, as its cases are."""

    device: str = "cpu"

    def runner(self, name: str) -> Callable[[], Outputs]:
        """What the provider of that name does; it returns the final pictures."""
        raise NotImplementedError

    @property
    def race_seconds(self) -> float:
        return 45.0

    @property
    def baseline(self) -> str | None:
        return PUBLISHED

    @property
    def tolerances(self) -> tuple[float, ...]:
        return (TOLERANCE,)

    @property
    def provider_names(self) -> tuple[str, ...]:
        return (PUBLISHED, PUBLISHED_LAST, OURS)

    def provider(self, name: str) -> Provider:
        return Provider(
            name, run=self.runner(name), expected=functools.partial(_expected, self), select=means, device=self.device
        )


@functools.lru_cache(maxsize=1)
def _expected(case: PublishedRace) -> Outputs:
    """The published network's own result; its own race passes with an error of 0."""
    return means(case.runner(PUBLISHED)())


def means(outputs: Outputs) -> Outputs:
    """What is compared of pictures."""
    return tuple(F.avg_pool2d(output, POOL) for output in outputs)
