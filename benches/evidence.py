"""What is known of every CUDA kernel, with and without a GPU: ``results/gpu_evidence.json``.

    python -m benches.evidence                       compile what changed, and write the file
    python benches/report.py --update README.md      the table made of it

For every kernel: what the compiler reports for each architecture (registers, spills, stack, shared memory), how many
emulated cases were checked and their worst error, and the GPUs on which a committed run has timed it; and what each GPU
bench has to compute at least. Nothing is listed by hand: kernels come from the compiler's report, dynamic shared memory
from the object files (csrc/kernel_resources.h), emulated cases from the tests that ran them (:func:`record_emulated`),
GPUs from ``results/<gpu>/*.json``.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benches.elf import Elf

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = ROOT / "build/native/cuda"
EMULATED = ROOT / "build/emulated.jsonl"
RESULTS = ROOT / "benches/results"
EVIDENCE = RESULTS / "gpu_evidence.json"
NOT_YET = "not yet"
MOST_SHARED_BYTES = 99 * 1024


class NoCudaCompilerError(Exception):
    """There is no resource report, because no CUDA source can be compiled here; the message says why."""


@dataclass(frozen=True)
class Usage:
    """What a kernel takes on one architecture."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel; one per instantiation of a template."""

    name: str
    source: str
    dynamic_shared_bytes: int
    usage: Mapping[str, Usage]


# The compiler's report -----------------------------------------------------------------------------------------------


def build() -> str:
    """Compile the CUDA sources that changed, beside the library that is in use; the version of nvcc."""
    environment = {name: value for name, value in os.environ.items() if name != "INPAINT_CUDA_ARCH"}
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "setup.py", "--quiet", "build_native", "--build-lib", scratch]
        environment["INPAINT_CUDA"] = "1"
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode == 0:
            return json.loads(Path(scratch, "inpaint_kernels/_build.json").read_text())["nvcc"]
    missing = re.search(r"^INPAINT_CUDA=1, but (.*)$", done.stdout, flags=re.MULTILINE)
    if missing:
        raise NoCudaCompilerError(missing[1])
    raise RuntimeError(f"compiling the CUDA sources failed:\n{done.stdout}")


def compiled_kernels(objects: Path = OBJECTS) -> list[Kernel]:
    """The kernels of every CUDA source, as :func:`build` left them."""
    kernels = []
    for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
        built = objects / f"{source.name}.o"
        dynamic = dynamic_shared_bytes(Elf(built).content("inpaint_resources"))
        for name, usage in parse_report(built.with_name(f"{built.name}.log").read_text()).items():
            largest = max((size for kernel, size in dynamic.items() if is_named(name, kernel)), default=0)
            kernels.append(Kernel(name, source.relative_to(ROOT).as_posix(), largest, usage))
    return sorted(kernels, key=lambda kernel: kernel.name)


def parse_report(log: str) -> dict[str, dict[str, Usage]]:
    """Usage by kernel and architecture, from what ``ptxas -v`` prints. A device function counts to its kernel."""
    report: dict[str, dict[str, Usage]] = {}
    for block in re.split(r"(?=Compiling entry function)", log)[1:]:
        entry = re.match(r"Compiling entry function '(\S+)' for '(\w+)'", block)
        used = re.search(r"Used (\d+) registers", block)
        if entry is None or used is None:
            raise ValueError(f"the compiler's report is not as expected:\n{block}")
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        shared = re.search(r"(\d+) bytes smem", block)
        report.setdefault(short_name(demangle(entry[1])), {})[entry[2]] = Usage(
            registers=int(used[1]),
            stack_bytes=max(int(stack) for stack, _, _ in frames),
            spill_bytes=sum(int(stored) + int(loaded) for _, stored, loaded in frames),
            static_shared_bytes=int(shared[1]) if shared else 0,
        )
    return report


def dynamic_shared_bytes(section: bytes) -> dict[str, int]:
    """The entries of INPAINT_DYNAMIC_SHARED in an object file (``inpaint::KernelResource``)."""
    return {name.rstrip(b"\0").decode(): size for name, size in struct.iter_unpack("<120sq", section)}


def demangle(symbol: str) -> str:
    """The C++ name of a symbol."""
    runtime = ctypes.CDLL("libstdc++.so.6")  # torch needs it too
    runtime.__cxa_demangle.restype = ctypes.c_void_p
    pointer = runtime.__cxa_demangle(symbol.encode(), None, None, None)
    if not pointer:
        return symbol
    name = ctypes.string_at(pointer).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(pointer))
    return name


def short_name(signature: str) -> str:
    """A function's name with its template arguments, without return type, namespaces and parameters."""
    signature = re.sub(r"\(anonymous namespace\)::|\binpaint::", "", signature)
    depth = 0
    for i, character in enumerate(signature):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            signature = signature[:i]
            break
    name, bracket, arguments = signature.partition("<")
    return name.split(" ")[-1].split("::")[-1] + bracket + arguments


def violations(kernel: Kernel) -> list[str]:
    """What of a kernel would make it slow, or would not fit onto every GPU from sm_86 on."""
    found = []
    for arch, usage in sorted(kernel.usage.items()):
        shared = usage.static_shared_bytes + kernel.dynamic_shared_bytes
        if usage.spill_bytes:
            found.append(f"{kernel.name} spills {usage.spill_bytes} bytes on {arch}")
        if usage.stack_bytes:
            found.append(f"{kernel.name} has a stack of {usage.stack_bytes} bytes on {arch}")
        if shared > MOST_SHARED_BYTES:
            found.append(f"{kernel.name} takes {shared} bytes of shared memory on {arch}, {MOST_SHARED_BYTES} at most")
    return found


def is_named(kernel: str, name: str) -> bool:
    """Whether ``name`` names this kernel or, without template arguments, its template."""
    return kernel == name or kernel.startswith(f"{name}<")


# Emulated cases ------------------------------------------------------------------------------------------------------


def record_emulated(kernel: str, case: str, error: float) -> None:
    """Note that a test ran a kernel in the emulation and compared it with the reference.

    Args:
        kernel: its name; without template arguments it stands for all instantiations.
        case: what distinguishes the case; a later record of the same case replaces it.
        error: largest difference from the reference, relative to the largest magnitude.
    """
    EMULATED.parent.mkdir(exist_ok=True)
    record = {"sources": sources_digest(), "kernel": kernel, "case": case, "error": error}
    with open(EMULATED, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def sources_digest() -> str:
    """What the CUDA sources are, but for comments and white space; the emulation's figures hold for these only."""
    files = sorted(path for folder in ("cuda", "math") for path in (ROOT / "csrc" / folder).iterdir())
    digest = hashlib.sha256()
    for path in [ROOT / "csrc/common.h", *files]:
        digest.update(path.name.encode() + b"\0" + re.sub(rb"//[^\n]*|\s+", b"", path.read_bytes()) + b"\0")
    return digest.hexdigest()[:16]


def emulated_cases() -> list[dict[str, Any]]:
    """The records of the present sources, one per kernel and case."""
    if not EMULATED.is_file():
        return []
    records = [json.loads(line) for line in EMULATED.read_text(encoding="utf-8").splitlines()]
    present = sources_digest()
    newest = {(record["kernel"], record["case"]): record for record in records if record["sources"] == present}
    return list(newest.values())


# The file ------------------------------------------------------------------------------------------------------------


def timed_kernels() -> dict[str, set[str]]:
    """GPUs by the name of the kernel, from the committed runs of ``make gpu``."""
    devices: dict[str, set[str]] = {}
    for path in sorted(RESULTS.glob("*/*.json")):
        for benchmark in json.loads(path.read_text(encoding="utf-8")).get("benchmarks", ()):
            for kernel in benchmark["extra_info"].get("kernels", ()):
                devices.setdefault(kernel, set()).add(benchmark["extra_info"]["provenance"]["gpu"])
    return devices


def evidence(kernels: Iterable[Kernel], nvcc: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """What the file is to hold.

    Args:
        kernels: see :func:`compiled_kernels`.
        nvcc: the compiler's version.
        before: what the file held; emulated figures of the same sources are kept where no test has run since.
    """
    sources = sources_digest()
    kept = {entry["kernel"]: entry for entry in before.get("kernels", ()) if before["sources"] == sources}
    emulated, timed = emulated_cases(), timed_kernels()
    entries = []
    for kernel in kernels:
        errors = [record["error"] for record in emulated if is_named(kernel.name, record["kernel"])]
        old = kept.get(kernel.name, {"emulated_cases": NOT_YET, "worst_error": NOT_YET})
        entries.append(
            {
                "kernel": kernel.name,
                "source": kernel.source,
                "architectures": {arch: asdict(usage) for arch, usage in sorted(kernel.usage.items())},
                "dynamic_shared_bytes": kernel.dynamic_shared_bytes,
                "emulated_cases": len(errors) or old["emulated_cases"],
                "worst_error": float(f"{max(errors):.0e}") if errors else old["worst_error"],
                "measured_on": sorted(timed.get(kernel.name, ())) or NOT_YET,
            }
        )
    return {"nvcc": nvcc, "sources": sources, "cases": gpu_cases(), "kernels": entries}


def gpu_cases() -> list[dict[str, Any]]:
    """What each GPU case of an op has to compute at least, for its floor; without what a case does not have."""
    names = [
        "op",
        "case",
        "network",
        "convolutions",
        "layer",
        "count",
        "size",
        "pixels_per_position",
        "batch",
        "keys",
        "queries",
        "direction",
        "precision",
        "products",
        "flops",
        "bytes",
        "our_flops",
        "our_bytes",
    ]
    modules = sorted(path.stem for path in Path(__file__).parent.glob("gpu_*.py"))
    facts = [case.facts() for name in modules for case in importlib.import_module(f"benches.{name}").cases()]
    return [{name: of_case[name] for name in names if name in of_case} for of_case in facts if "flops" in of_case]


def read() -> dict[str, Any]:
    """The committed file; empty if there is none."""
    return json.loads(EVIDENCE.read_text(encoding="utf-8")) if EVIDENCE.is_file() else {}


def write(content: Mapping[str, Any]) -> None:
    EVIDENCE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    try:
        nvcc = build()
    except NoCudaCompilerError as missing:
        sys.exit(f"{EVIDENCE.name}: no CUDA source can be compiled here: {missing}")
    write(evidence(compiled_kernels(), nvcc, read()))


if __name__ == "__main__":
    main()
