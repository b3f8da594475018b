"""Builds the emulation of CUDA kernels and runs emulated kernels; tests/emulation/emulation.h says what it is.

    run(("contextual_attention_key_norm_float32", key, energy, norm, *sizes), build="plain")

calls launchers that tests/emulation/module.cpp exposes; arrays that a launcher writes are written in place. `check`
does the same in both orders of threads and asserts that they give the same bits. The build "asan" runs in a subprocess,
which AddressSanitizer ends at the first wrong access.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import os
import pickle
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build/emulation"
MODULE = "inpaint_emulation"
EMULATION = "tests/emulation"

Build = Literal["plain", "asan", "ucontext"]
Order = Literal["ascending", "descending"]
# Name of an exposed function and its arguments.
Call = tuple[Any, ...]

COMMON_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
COMMON_FLAGS += ["-Wno-unknown-pragmas", "-Wno-unused-function", f"-I{EMULATION}"]
SANITIZERS = "address,bounds,alignment,signed-integer-overflow,integer-divide-by-zero,shift"
FLAGS: dict[Build, list[str]] = {
    "plain": ["-O1"],
    "asan": ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"],
    # The context switch of processors for which fiber.h has none of its own.
    "ucontext": ["-O1", "-DINPAINT_EMULATION_UCONTEXT"],
}


def reason() -> str | None:
    """Why kernels cannot be emulated here, or None."""
    if sys.platform != "linux":
        return f"the emulation runs on Linux, not on {sys.platform}"
    return None if shutil.which("g++") else "g++ was not found"


needs_emulation = pytest.mark.skipif(reason() is not None, reason=str(reason()))


class WrongAccessError(AssertionError):
    """A sanitizer stopped a kernel; the message is its report."""


# ---- Building --------------------------------------------------------------------------------------------------------


def sources() -> list[Path]:
    """Every file that the kernels' part of the module is made of."""
    folders = [ROOT / name for name in ("csrc/cuda", "csrc/math", EMULATION)]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".h", ".cuh", ".cu")]
    return sorted([*files, *(ROOT / "csrc").glob("*.h"), ROOT / EMULATION / "module.cpp"])


def compile_command(build: Build) -> list[str]:
    return ["g++", *COMMON_FLAGS, *FLAGS[build], "-DINPAINT_EMULATION", "-c", f"{EMULATION}/module.cpp"]


def bindings_command() -> list[str]:
    import pybind11

    includes = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    return ["g++", *COMMON_FLAGS, *includes, "-c", f"{EMULATION}/bindings.cpp"]


def library(build: Build) -> Path:
    """The compiled module: that of an earlier run if nothing has changed since."""
    kernels = compiled(f"{build}.o", tuple(compile_command(build)), tuple(sources()))
    bindings = [ROOT / EMULATION / name for name in ("bindings.cpp", "launchers.h")]
    parts = (kernels, compiled("bindings.o", tuple(bindings_command()), tuple(bindings)))
    link = ["g++", "-shared", *FLAGS[build], *map(str, parts)]
    return compiled(f"{MODULE}_{build}.so", tuple(link), parts)


@functools.cache
def compiled(name: str, command: tuple[str, ...], inputs: tuple[Path, ...]) -> Path:
    """What a command makes of its inputs, in the cache."""
    target = CACHE / f"{fingerprint(command, inputs)}-{name}"
    if target.is_file():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob(f"????????????????-{name}"):
        old.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        output = Path(scratch, name)
        result = subprocess.run(
            [*command, "-o", str(output)], cwd=ROOT, capture_output=True, text=True, errors="replace"
        )
        assert result.returncode == 0, f"the emulation does not compile:\n{result.stderr}"
        output.replace(target)  # at once: another test session may look for it
    return target


def fingerprint(command: tuple[str, ...], inputs: tuple[Path, ...]) -> str:
    """Changes with whatever the result depends on."""
    digest = hashlib.sha256()
    for part in [*command, compiler_version(), sys.version]:
        digest.update(part.encode() + b"\0")
    for path in inputs:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def compiler_version() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def module() -> ModuleType:
    """The plain build, loaded into this process. There can be one: pybind11 knows modules by their name."""
    spec = importlib.util.spec_from_file_location(MODULE, library("plain"))
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


# ---- Running ---------------------------------------------------------------------------------------------------------


def run(*calls: Call, build: Build, order: Order = "ascending") -> None:
    """Runs launchers one after the other; arrays are written in place.

    Args:
        calls: Per launch the launcher's name and its arguments.
        build: "plain" for this process; all calls share one subprocess of another build.
        order: In which order blocks, warps and lanes run.

    Raises:
        WrongAccessError: A sanitizer has found one.
        RuntimeError: A barrier, shuffle or vote that not all threads reach, or a launch that CUDA would refuse.
    """
    if build != "plain":
        run_in_subprocess(calls, build, order)
        return
    loaded = module()
    loaded.set_descending(order == "descending")
    for name, *arguments in calls:
        getattr(loaded, name)(*arguments)


def check(*calls: Call, build: Build) -> None:
    """Runs launchers like `run`, in both orders of threads, and asserts that every array gets the same bits."""
    again = copy.deepcopy(calls)
    run(*calls, build=build, order="ascending")
    run(*again, build=build, order="descending")
    for (name, *first), (_, *second) in zip(calls, again, strict=True):
        for i, (one, other) in enumerate(zip(first, second, strict=True)):
            if isinstance(one, np.ndarray):
                same = one.tobytes() == other.tobytes()
                assert same, f"{name}: argument {i} depends on the order of threads (a missing barrier?)"


def run_in_subprocess(calls: tuple[Call, ...], build: Build, order: Order) -> None:
    script = ROOT / EMULATION / "run_calls.py"
    with tempfile.TemporaryDirectory() as scratch:
        before, after = Path(scratch, "before"), Path(scratch, "after")
        before.write_bytes(pickle.dumps((order == "descending", calls)))
        result = subprocess.run(
            [sys.executable, str(script), str(library(build)), str(before), str(after)],
            env={**os.environ, **(asan_environment() if build == "asan" else {})},
            capture_output=True,
            text=True,
            errors="replace",
        )
        if result.returncode != 0:
            raise error_of(result.stderr)
        results = pickle.loads(after.read_bytes())
    for (_, *arguments), written in zip(calls, results, strict=True):
        for argument, value in zip(arguments, written, strict=True):
            if isinstance(argument, np.ndarray) and argument.flags.writeable:
                argument[...] = value


def error_of(report: str) -> Exception:
    """The exception that a subprocess's standard error stands for."""
    if "ERROR: AddressSanitizer" in report or "runtime error:" in report:
        return WrongAccessError(report)
    last = report.strip().splitlines()[-1] if report.strip() else "no message"
    kind, _, text = last.partition(": ")
    return RuntimeError(text) if kind == "RuntimeError" else RuntimeError(report)


@functools.cache
def sanitizer_libraries() -> str:
    """What must be loaded before Python: the sanitizer, and the C++ library whose exceptions it intercepts."""
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        command = ["g++", f"-print-file-name={name}"]
        path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        assert path.is_file(), f"g++ has no {name}"
        if path.read_bytes()[:4] != b"\x7fELF":  # a linker script, which names the library
            linked = re.search(r"/\S+", path.read_text().partition("INPUT")[2])
            assert linked, f"{path} names no library"
            path = Path(linked[0])
        paths.append(str(path.resolve()))
    return " ".join(paths)


def asan_environment() -> dict[str, str]:
    """Variables for a process that loads the sanitizer; Python itself leaks by design, and NumPy needs no threads."""
    return {
        "LD_PRELOAD": sanitizer_libraries(),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
