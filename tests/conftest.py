"""Settings and fixtures of all tests."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter; it reads this when a kernel is defined, so before any
# test module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

THREADS = 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        for item in items:  # of a module that does on a GPU, where there is one, what it else does on the CPU
            if isinstance(item, pytest.Function) and getattr(item.module, "DEVICE", "cpu") == "cuda":
                item.add_marker(pytest.mark.gpu)
        return
    skip = pytest.mark.skip(reason=f"needs a CUDA device, torch {torch.__version__} sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _reproducible():
    """Every test starts from the same random state and the same number of threads."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)


@pytest.fixture
def poisoned_memory():
    """Fills uninitialised memory, native kernels' too, with NaN (integers: the largest), so that a gap is seen."""
    settings: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode(mode)
    settings.fill_uninitialized_memory = fill


@pytest.fixture
def angles_of_the_c_library(monkeypatch):
    """scikit-image takes angles from numpy, which rounds some otherwise than the C library where there is AVX-512."""
    of_numpy, of_the_c_library = np.arctan2, np.frompyfunc(math.atan2, 2, 1)

    def arctan2(down: Any, right: Any) -> Any:
        down, right = np.asarray(down), np.asarray(right)
        if np.result_type(down, right) != np.float64:
            return of_numpy(down, right)
        return np.asarray(of_the_c_library(down, right), np.float64)

    monkeypatch.setattr(np, "arctan2", arctan2)
