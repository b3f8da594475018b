"""Everything that a machine with a GPU can prove, in one call: ``make gpu``, or ``python -m benches.gpu``.

Builds the native library in place, runs the tests marked ``gpu``, lets compute-sanitizer watch the smallest call of
every op, measures the GPU's two ceilings (copying and matrix products), and runs every ``gpu_<op>.py`` beside this
file. Writes ``results/<gpu>/*.json`` and, beside them, a page that sums them up; prints that page. Takes at most nine
minutes, uses the interpreter's own torch and Triton, installs and downloads nothing, and does not need the package
installed.

Every part is a process of its own with a time limit, so that none can spoil another; what it printed is kept in
``build/gpu``. A part whose tool is absent is left out and says so.

A module ``gpu_<op>.py`` has a function ``cases()``: the op's GPU sizes as :class:`GpuCase`, the most wanted first.
Providers run on "cuda", facts name ``flops``, ``bytes`` and ``precision`` ("float32", "tf32", "bfloat16"), of which the
floor is made: the longer of the two times that the ceilings allow.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from benches import harness, report
from benches.evidence import demangle, short_name, sources_digest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benches/results"
SCRATCH = ROOT / "build/gpu"
OURS = "ours"
UNBUFFERED = {"PYTHONUNBUFFERED": "1"}  # a part that is stopped has said what it was at
TEST_PROCESSES = 12  # on one GPU: most of their time Triton compiles
WRONG = 9  # what compute-sanitizer is told to return when it found an error

MINUTES = 9.0
SPARE_SECONDS = 30.0  # for imports and the summary
BENCH_SECONDS = 150.0  # that the parts before them leave to the benches
SHARES = {"convolutions": 2.5, "models": 1.5, "hog": 0.5}  # of that time, where it is not 1; by cases and compilations
SIDE_BY_SIDE = dict.fromkeys(("tests", "memcheck", "racecheck"), 180.0)
MOST_SECONDS = {"build": 200.0, "library": 60.0, "ceilings": 60.0, **SIDE_BY_SIDE}


class GpuCase(harness.Case, Protocol):
    """A case that knows who takes part."""

    @property
    def provider_names(self) -> Sequence[str]:
        """The field, ours among them."""
        ...


# Parts ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a part ended: "passed", "failed", "out of time" or "left out"; ``detail`` is its last words."""

    part: str
    result: str
    seconds: float
    detail: str


def run_part(part: str, command: Sequence[str], seconds: float, environment: Mapping[str, str] = {}) -> Outcome:
    """Run a command for at most so many seconds, then end it with everything that it started."""
    log = SCRATCH / f"{part}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with open(log, "w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **UNBUFFERED, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            result = "passed" if process.wait(timeout=max(seconds, 1)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            result = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Outcome(part, result, round(time.monotonic() - started, 1), last_words(log))


def last_words(log: Path) -> str:
    """The last line that a part printed, without the machine's folders."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip(" =\t")]
    return without_folders(lines[-1])[:300] if lines else ""


def without_folders(text: str) -> str:
    """Absolute paths as file names: results are published."""
    return re.sub(r"(?<![\w.~])/(?:[\w.+@-]+/)+", "", text)


def own_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "benches.gpu", *map(str, arguments)]


def watched(tool: str, *arguments: str) -> list[str] | str:
    """The smallest calls under a tool of compute-sanitizer; or why not."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        return "compute-sanitizer was not found"
    # Compilers that Triton starts are not what is watched.
    options = ["--target-processes", "application-only", "--error-exitcode", str(WRONG)]
    return [sanitizer, "--tool", tool, *options, *arguments, *own_command("smallest-calls")]


def bench_modules() -> list[str]:
    """The ops that have GPU sizes."""
    return sorted(path.stem.removeprefix("gpu_") for path in Path(__file__).parent.glob("gpu_*.py"))


Runner = Callable[[str, Sequence[str], float, Mapping[str, str]], Outcome]


def run_everything(folder: Path, deadline: float, runner: Runner = run_part, build: bool = True) -> list[Outcome]:
    """All parts, in turn; what they measured is in ``folder`` or in SCRATCH afterwards.

    Args:
        folder: of the results.
        deadline: when everything has to be over.
        runner: see :func:`run_part`.
        build: whether the native library is built; it is used as it is otherwise.
    """

    def run(
        part: str, command: list[str] | str, reserve: float = BENCH_SECONDS, environment: Mapping[str, str] = {}
    ) -> Outcome:
        left = deadline - time.monotonic() - reserve
        seconds = MOST_SECONDS.get(part, left)
        if isinstance(command, str):
            outcome = Outcome(part, "left out", 0.0, command)
        elif left < 1:
            outcome = Outcome(part, "out of time", 0.0, report.NO_TIME)
        else:
            outcome = runner(part, command, min(seconds, left), environment)
        print(f"{part}: {outcome.result} after {outcome.seconds:.0f} s; {outcome.detail}", flush=True)
        return outcome

    compiler = [sys.executable, "setup.py", "build_native", "--inplace"]
    outcomes = [
        run("build", compiler if build else "the library is used as it is", environment={"INPAINT_CUDA": "1"}),
        run("library", own_command("library")),
        run("ceilings", own_command("ceilings", folder / "ceilings.json")),
    ]
    # torch's allocator hands out parts of large blocks, which hides a step beyond a tensor.
    whole_blocks = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with ThreadPoolExecutor() as side_by_side:  # nothing of them is timed
        checks = [
            side_by_side.submit(run, "tests", own_command("tests", SCRATCH / "tests.jsonl")),
            side_by_side.submit(run, "memcheck", watched("memcheck"), environment=whole_blocks),
            side_by_side.submit(run, "racecheck", watched("racecheck"), environment=whole_blocks),
        ]
    outcomes += [check.result() for check in checks]
    ops = bench_modules()
    for i, op in enumerate(ops):
        left = max(deadline - time.monotonic(), 0)
        others = left * (1 - share_of(op) / sum(map(share_of, ops[i:])))
        command = own_command("bench", op, folder / f"{op}.json", "--seconds", str(0.9 * (left - others)))
        outcomes.append(run(f"bench_{op}", command, reserve=others))
    return outcomes


def share_of(op: str) -> float:
    """Of the time for benches."""
    return SHARES.get(op, 1.0)


# Library and smallest calls ------------------------------------------------------------------------------------------


def check_library() -> str:
    """What the native library is; raises if a CUDA kernel of it cannot be used."""
    from inpaint_kernels import _native

    reasons = {_native.why_not(kernel, "CUDA") for kernel, keys in _native.KERNELS.items() if "CUDA" in keys}
    missing = sorted(reason for reason in reasons if reason is not None)
    if missing:
        raise SystemExit("; ".join(missing))
    record, here = _native.build_info(), str(harness.provenance()["commit"])
    built = f"commit {record['git']}, nvcc {record['nvcc']}, for {' '.join(record['cuda_arch'])}"
    return built if str(record["git"]).startswith(here.rstrip("+")) else f"{built}; the checkout is at {here}"


def smallest_calls(device: str) -> Iterator[str]:
    """The smallest sensible call of every op and of its gradient, and the key norm's kernel; names, as each is done.

    On a GPU those ops are left out that have no kernel there: thousands of torch's launches would be watched.
    """
    from inpaint_kernels import _backends, _native, info

    for op in _backends.registered_ops():
        arguments = [x.normal_() if x.is_floating_point() else x for x in info._EXAMPLES[op](torch.device(device))]
        if device == "cuda" and _backends.explain(op, *arguments).chosen not in ("cuda", "triton"):
            continue
        differentiable = torch._C._dispatch_has_kernel_for_dispatch_key(f"inpaint_kernels::{op}", "Autograd")
        with torch.set_grad_enabled(differentiable):
            if differentiable:
                arguments = [x.detach().requires_grad_(x.is_floating_point()) for x in arguments]
            result = getattr(importlib.import_module("inpaint_kernels"), op)(*arguments)
            output = result if isinstance(result, Tensor) else result[0]
            if output.requires_grad:  # that of an image of integers does not
                output.sum().backward()
        finish(device)
        yield op
    if _native.available("contextual_attention_key_norm", "CUDA" if device == "cuda" else "CPU"):
        key = torch.randn(2, 3, 7, 5, device=device)
        torch.ops.inpaint_native.contextual_attention_key_norm(key, 3, "max", 1e-4)
        finish(device)
        yield "contextual_attention_key_norm"


def finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# Tests ---------------------------------------------------------------------------------------------------------------


class Recorder:
    """A pytest plugin that writes every test's outcome at once, so that a run that is stopped keeps them."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report.nodeid, report.outcome, report.longrepr)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome == "failed":
            self._write(report.nodeid, "failed", report.longrepr)

    def _write(self, test: str, outcome: str, reason: object) -> None:
        if isinstance(reason, tuple):  # (file, line, why) of a skipped test
            words = str(reason[2])
        else:
            lines = str(reason or "").splitlines()
            words = next((line[2:].strip() for line in lines if line.startswith("E ")), lines[-1] if lines else "")
        record = {"test": test, "outcome": outcome, "reason": without_folders(words)[:300]}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def run_tests(path: Path, arguments: Sequence[str]) -> int:
    """The tests, with ``arguments`` for pytest; their outcomes are appended to ``path``."""
    options = ["-q", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-p", "benches.gpu"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        options.append("--timeout=150")  # one of them compiles dozens of kernels
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
    return int(pytest.main([*options, *arguments], plugins=[Recorder(path)]))


def gpu_test_files() -> list[str]:
    """Files with tests for a GPU; others may need packages that are not installed."""
    files = {path: path.read_text("utf-8") for path in sorted(ROOT.glob("tests/test_*.py"))}
    return [str(path) for path, text in files.items() if "mark.gpu" in text or 'DEVICE = "cuda"' in text]


def pytest_configure() -> None:
    """This module is a plugin of its own tests, in every process that runs some of them."""
    make_models_importable()


def make_models_importable() -> None:
    """``inpaint_kernels.models`` is the folder models/: an installation knows that, a bare checkout does not."""
    import inpaint_kernels

    if importlib.util.find_spec("inpaint_kernels.models") is not None:
        return
    folder = ROOT / "models"
    spec = importlib.util.spec_from_file_location(
        "inpaint_kernels.models", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    vars(inpaint_kernels)["models"] = module
    spec.loader.exec_module(module)


def count_tests(path: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and which failed."""
    outcomes: dict[str, tuple[str, str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        record = json.loads(line)
        if outcomes.get(record["test"], ("", ""))[0] != "failed":
            outcomes[record["test"]] = (record["outcome"], record["reason"])
    counts = {
        outcome: sum(1 for other, _ in outcomes.values() if other == outcome)
        for outcome in ("passed", "failed", "skipped")
    }
    failures = {test: reason for test, (outcome, reason) in outcomes.items() if outcome == "failed"}
    return {**counts, "failures": failures}


# Ceilings ------------------------------------------------------------------------------------------------------------


def ceilings(device: str, copy_bytes: int = 4 << 30, side: int = 8192) -> dict[str, Any]:
    """Bytes per second, read and written, of a large copy, and FLOP per second of a large product by precision."""
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copying = median_seconds(functools.partial(copy, source, target), device)
    del source, target
    rates = {}
    for precision in harness.PRECISIONS:
        dtype = torch.bfloat16 if precision == harness.BFLOAT16 else torch.float32
        x, y = torch.randn(2, side, side, device=device).to(dtype)
        out = torch.empty_like(x)
        with harness.products_in(precision):
            rates[precision] = 2 * side**3 / median_seconds(functools.partial(product, x, y, out), device)
    return {"copy_bytes_per_second": 2 * copy_bytes / copying, "flops_per_second": rates}


def copy(source: Tensor, target: Tensor) -> harness.Outputs:
    return (target.copy_(source),)


def product(x: Tensor, y: Tensor, out: Tensor) -> harness.Outputs:
    return (torch.mm(x, y, out=out),)


def median_seconds(run: Callable[[], harness.Outputs], device: str, calls: int = 9) -> float:
    for _ in range(2):
        run()
    return statistics.median(harness.timed(run, device)[1] for _ in range(calls))


# Benches -------------------------------------------------------------------------------------------------------------


def run_bench(cases: Sequence[GpuCase], path: Path, seconds: float) -> None:
    """Race after race, each written at once; figures have the form that report.py reads."""
    deadline = time.monotonic() + seconds
    document: dict[str, Any] = {
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "benchmarks": [],
        "failures": [],
    }
    for i, case in enumerate(cases):
        left = deadline - time.monotonic()
        if left <= 0:
            document["failures"].append({"case": str(case), "provider": "all", "reason": report.NO_TIME})
            continue
        run_case(case, document, seconds=min(10.0, left / (len(cases) - i) / 2))
        write_json(path, document)
        gc.collect()
        torch.cuda.empty_cache()
    write_json(path, document)
    print(f"{len(document['benchmarks'])} figures, {len(document['failures'])} failures")


def run_case(case: GpuCase, document: dict[str, Any], seconds: float) -> None:
    """One race, into ``document``."""
    providers = []
    for name in case.provider_names:
        try:
            providers.append(case.provider(name))
        except Exception as error:  # noqa: PERF203 - whatever it is, it belongs to this provider alone
            document["failures"].append(failure_of(case, name, error))
    measurements, noise = harness.run_race(providers, case.tolerances, seconds=seconds)
    for provider in providers:
        measurement = measurements[provider.name]
        if measurement.failure is not None:
            document["failures"].append(failure_of(case, provider.name, measurement.failure))
            continue
        peak = measurement.peak_extra_bytes
        info = {
            **case.facts(),
            "provider": provider.name,
            "figure": "seconds",
            "cpu_seconds": measurement.cpu,
            "peak_extra_mib": None if peak is None else round(peak / 2**20, 1),
            "largest_relative_error": measurement.error,
            "noise": noise,
            "kernels": kernels_of(provider) if provider.name == OURS else [],
            "provenance": provenance(provider.device),
        }
        document["benchmarks"].append(
            {"name": f"{case}-{provider.name}", "extra_info": info, "stats": {"data": measurement.wall}}
        )


def failure_of(case: GpuCase, provider: str, error: Exception) -> dict[str, str]:
    lines = str(error).splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return {"case": str(case), "provider": provider, "reason": without_folders(reason)[:300]}


def kernels_of(provider: harness.Provider) -> list[str]:
    """Names of our own CUDA kernels that a call launches; none where the profiler does not work."""
    from torch.profiler import ProfilerActivity, profile

    if provider.device != "cuda":
        return []
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            provider.run()
            torch.cuda.synchronize()
        signatures = {demangle(event.key) for event in profiler.key_averages()}
    except RuntimeError as error:
        print(f"the profiler does not work here: {error}")
        return []
    return sorted({short_name(signature) for signature in signatures if "inpaint::" in signature})


def provenance(device: str) -> dict[str, Any]:
    """What a figure depends on."""
    from inpaint_kernels import _native

    facts = harness.provenance()
    if device != "cuda":
        return {**facts, "gpu": facts["cpu"]}
    driver = _native._driver_cuda_version()
    return {
        **facts,
        "gpu": torch.cuda.get_device_name(),
        "sources": sources_digest(),
        "driver_cuda": "unknown" if driver is None else f"{driver[0]}.{driver[1]}",
        "torch_cuda": torch.version.cuda,
        "triton": version_of("triton"),
    }


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Written beside and then renamed: a part that is stopped leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)


# The command ---------------------------------------------------------------------------------------------------------


def folder_name(device_name: str) -> str:
    """Where a GPU has its results: ``nvidia_h200`` for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


def everything(minutes: float, results: Path, build: bool = True) -> int:
    """All parts, the summary; 0 if every part passed that could be run."""
    deadline = time.monotonic() + 60 * minutes - SPARE_SECONDS
    device = torch.cuda.get_device_name()
    folder = results / folder_name(device)
    for old in (SCRATCH, folder):
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"{device}: at most {minutes:g} minutes", flush=True)
    outcomes = run_everything(folder, deadline, build=build)
    run = {
        "provenance": provenance("cuda"),
        "parts": [asdict(outcome) for outcome in outcomes],
        "tests": count_tests(SCRATCH / "tests.jsonl"),
    }
    write_json(folder / "run.json", run)
    page = report.gpu_page(folder)
    (folder / "summary.md").write_text(page, encoding="utf-8")
    print(f"\n{page}")
    return 0 if all(outcome.result in ("passed", "left out") for outcome in outcomes) else 1


def why_no_gpu() -> str | None:
    """The sentence that says why there is nothing to run on."""
    if torch.version.cuda is None:
        return f"make gpu needs a GPU: torch {torch.__version__} is a build without CUDA, so nothing was run"
    if not torch.cuda.is_available():
        return f"make gpu needs a GPU: torch {torch.__version__} sees no CUDA device, so nothing was run"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.gpu", description="Prove everything on a GPU.")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for everything (default: 9)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the folder of this GPU is written")
    parser.add_argument("--no-build", action="store_true", help="use the native library that is there")
    parts = parser.add_subparsers(dest="part", metavar="PART", help="only one part, as the whole runs it")
    parts.add_parser("library")
    parts.add_parser("smallest-calls")
    parts.add_parser("ceilings").add_argument("path", type=Path)
    parts.add_parser("tests").add_argument("path", type=Path)
    bench = parts.add_parser("bench")
    bench.add_argument("op", choices=bench_modules())
    bench.add_argument("path", type=Path)
    bench.add_argument("--seconds", type=float, default=300.0)
    options = parser.parse_args(arguments)
    reason = why_no_gpu()
    if reason is not None:
        print(reason)
        return 2
    if options.part is None:
        return everything(options.minutes, options.results, not options.no_build)
    if options.part == "library":
        print(check_library())
    elif options.part == "smallest-calls":
        for name in smallest_calls("cuda"):
            print(f"ran {name}")
    elif options.part == "ceilings":
        write_json(options.path, ceilings("cuda"))
        print("measured")
    elif options.part == "tests":
        return run_tests(options.path, ["-m", "gpu", *gpu_test_files()])
    else:
        make_models_importable()
        run_bench(importlib.import_module(f"benches.gpu_{options.op}").cases(), options.path, options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
