"""Memory of large maps on the CPU: as much as they are, and nothing is left of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inpaint_kernels._map_memory import empty_map

LAYOUTS = (torch.contiguous_format, torch.channels_last)

# Maps of growing size, each freed before the next, and between them tensors that stay. What malloc frees of the first
# fits no other.
MEASURE = """
import torch
from benches.harness import with_peak_memory
from inpaint_kernels._map_memory import empty_map

torch.ones(31 << 18)  # from now on, malloc has such sizes in its heap
kept = []

def run():
    for channels in range(4, 29, 4):  # of 1 MiB
        empty_map((1, channels, 512, 512), torch.float32, torch.channels_last).fill_(1)
        kept.append(torch.ones(1 << 16))

print(with_peak_memory(run)[1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
def test_maps_that_come_and_go_leave_no_gaps():
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, cwd=root, check=True)
    if run.stdout.strip() == "None":
        pytest.skip("this system does not tell a process's peak memory")
    assert 28 <= int(run.stdout) / 2**20 < 40


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (2, 5, 700, 800), (1, 1, 2000, 1000), (0, 8, 2000, 2000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_map_is_as_torch_makes_it(shape, dtype, layout):
    got, expected = empty_map(shape, dtype, layout), torch.empty(shape, dtype=dtype, memory_format=layout)
    assert (got.shape, got.stride(), got.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert not got._is_view()
    assert torch.equal(got.fill_(1), expected.fill_(1))


def test_a_large_map_can_be_trained_and_belongs_to_its_mode():
    shape, layout = (1, 16, 512, 256), torch.contiguous_format
    leaf = empty_map(shape, torch.float32, layout).fill_(1).requires_grad_()
    (leaf * 2).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.eq(2).all()
    with torch.inference_mode():
        assert empty_map(shape, torch.float32, layout).is_inference()


def test_too_large_a_map_gets_torch_s_own_error():
    with pytest.raises(RuntimeError, match="allocate"):
        empty_map((1, 1, 1 << 24, 1 << 24), torch.float32, torch.contiguous_format)
