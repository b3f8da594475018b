"""Runs emulated kernels in a process of its own (tests/emulation_build.py): run_calls.py MODULE BEFORE AFTER."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from pathlib import Path


def main(module_path: str, before: str, after: str) -> None:
    spec = importlib.util.spec_from_file_location("inpaint_emulation", module_path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    descending, calls = pickle.loads(Path(before).read_bytes())
    module.set_descending(descending)
    for name, *arguments in calls:
        getattr(module, name)(*arguments)
    Path(after).write_bytes(pickle.dumps([arguments for _, *arguments in calls]))


if __name__ == "__main__":
    main(*sys.argv[1:])
