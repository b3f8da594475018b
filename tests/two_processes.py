"""The command line in two processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple


class Said(NamedTuple):
    """What one of the processes left."""

    code: int
    output: str
    errors: str


def run_two(*arguments: str, port: int, timeout: float, **environment: str) -> list[Said]:
    """Run ``inpaint_kernels`` with these arguments; the first process's report comes first."""
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"} | environment
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "inpaint_kernels", *arguments],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    reports = [process.communicate(timeout=timeout) for process in running]
    return [Said(process.returncode, *report) for process, report in zip(running, reports, strict=True)]
