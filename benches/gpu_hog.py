"""Histograms of oriented gradients at the sizes of a GPU: ours, portable, a plain port, the same compiled, and a copy.

Cases like those of bench_hog.py. What the CPU takes to launch our two kernels is a large part of a call: the same
call also takes part as a CUDA graph, which the GPU runs on its own. The copy moves as many bytes as an image and its
features have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from benches.harness import Outputs, Provider
from benches.hog_case import (
    BLOCK,
    CELL,
    COMPILED,
    COPY,
    EAGER,
    ORIENTATIONS,
    OURS,
    PORTABLE,
    HogCase,
    moved_bytes,
    runner,
    written_values,
)

GRAPH: Final = "ours in a CUDA graph"

# Instructions of a thread per pixel and of a warp per block, as Triton 3.9 compiles the kernels for sm_90, by dtype and
# channels: counted in the machine code. Two operations are what the ceiling counts for each.
PIXEL_INSTRUCTIONS: Final = {("float32", 3): 226, ("float32", 1): 154, ("uint8", 3): 168, ("uint8", 1): 122}
BLOCK_INSTRUCTIONS: Final = 99
PICTURE_INSTRUCTIONS: Final = 59
OPERATIONS: Final = 2
WARP: Final = 32


@dataclass(frozen=True)
class GpuHogCase(HogCase):
    """One race: square images of ``size``, features and with ``visualize`` the picture of the histograms."""

    device: str = "cuda"

    @property
    def baseline(self) -> str | None:
        return None

    @property
    def provider_names(self) -> list[str]:
        return [EAGER, COMPILED, PORTABLE, OURS, GRAPH, *([] if self.visualize else [COPY])]

    def provider(self, name: str) -> Provider:
        if name != GRAPH:
            return super().provider(name)
        ours = super().provider(OURS)
        return Provider(name, captured(runner(self, OURS)), ours.expected, device=self.device)

    def facts(self) -> Mapping[str, Any]:
        """``flops`` and ``bytes`` are the least that any implementation needs, ``our_*`` what ours plans to do."""
        our_flops, our_bytes = planned_work(self)
        return {
            **super().facts(),
            "precision": "float32",  # of the operations, whatever the images are
            "flops": least_operations(self),
            "our_flops": our_flops,
            "our_bytes": our_bytes,
        }


def captured(run: Callable[[], Outputs]) -> Callable[[], Outputs]:
    """A call as a CUDA graph; its outputs stay where they are."""
    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


def least_operations(case: HogCase) -> int:
    """Two differences, a magnitude and a comparison for every channel, one per border of bins, four per feature."""
    features = 4 * written_values(case)
    return case.pixels * (6 * case.channels + ORIENTATIONS) + features


def planned_work(case: HogCase) -> tuple[int, int]:
    """Operations of our kernels, and bytes that they move: images once, histograms written and read, features."""
    cells = (case.size // CELL) ** 2
    blocks = (case.size // CELL - BLOCK + 1) ** 2
    instructions = case.pixels * PIXEL_INSTRUCTIONS[case.dtype, case.channels]
    instructions += case.batch * blocks * BLOCK_INSTRUCTIONS * WARP
    instructions += case.pixels * PICTURE_INSTRUCTIONS if case.visualize else 0
    histograms = 4 * case.batch * cells * ORIENTATIONS
    return OPERATIONS * instructions, moved_bytes(case) + (3 if case.visualize else 2) * histograms


def cases() -> list[GpuHogCase]:
    """What ``make gpu`` runs, the most wanted first: time may run out."""
    return [
        GpuHogCase(2000, 3, "float32"),
        GpuHogCase(2000, 3),
        GpuHogCase(2000, 1),
        GpuHogCase(256, 3, batch=64),
        GpuHogCase(2000, 3, visualize=True),
        GpuHogCase(512, 3, "float32"),
        GpuHogCase(256, 3),
    ]
