"""``make gpu`` as far as it goes without a GPU: its parts on the CPU, their limits, and the pages that it writes."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benches import gpu, harness, race_results, report
from benches import gpu_contextual_attention as attention
from benches.bench_contextual_attention import COMPILED, OURS, PORTABLE
from benches.gpu_contextual_attention import GEMMS, GpuAttentionCase
from benches.harness import BFLOAT16, FLOAT32, TF32
from inpaint_kernels._backends import registered_ops

ROOT = Path(__file__).resolve().parents[1]

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


# ---- Without a GPU ---------------------------------------------------------------------------------------------------


@no_gpu
def test_without_a_gpu_one_sentence_says_so(capsys):
    assert gpu.main([]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("make gpu needs a GPU: torch ")
    assert line.endswith(("is a build without CUDA, so nothing was run", "sees no CUDA device, so nothing was run"))


@no_gpu
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_gpu_fails_without_a_gpu_and_makes_nothing(tmp_path):
    command = ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout.splitlines()[0].startswith("make gpu needs a GPU")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_gpu_names_an_interpreter_without_torch():
    done = subprocess.run(
        ["make", "--no-print-directory", "gpu", "PYTHON=no-such-python"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "make gpu needs torch and pytest in no-such-python" in done.stdout


# ---- Parts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _scratch(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "SCRATCH", tmp_path / "scratch")


def test_a_part_ends_with_its_last_words():
    passed = gpu.run_part("good", [sys.executable, "-c", "print('a'); print('done')"], 30)
    assert (passed.part, passed.result, passed.detail) == ("good", "passed", "done")
    failed = gpu.run_part("bad", [sys.executable, "-c", "import os; os.environ['ABSENT']"], 30)
    assert (failed.result, failed.detail) == ("failed", "KeyError: 'ABSENT'")
    given = gpu.run_part("given", [sys.executable, "-c", "import os; print(os.environ['GIVEN'])"], 30, {"GIVEN": "x"})
    assert (given.result, given.detail) == ("passed", "x")


def test_a_part_that_hangs_is_ended_with_its_children(tmp_path):
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    code = f"import subprocess, sys; print('started'); subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    outcome = gpu.run_part("hangs", [sys.executable, "-c", code], 1.5)
    assert (outcome.result, outcome.detail) == ("out of time", "started")
    assert time.monotonic() - started < 4
    time.sleep(max(0.0, started + 5 - time.monotonic()))
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("result", ["passed", "failed", "out of time"])
def test_every_part_runs_whatever_becomes_of_the_others(result, tmp_path, capsys, monkeypatch):
    limits: dict[str, float] = {}

    def runner(part, command, seconds, environment):
        assert all(isinstance(argument, str) for argument in command)
        limits[part] = seconds
        return gpu.Outcome(part, result, 1.0, "")

    monkeypatch.setattr(shutil, "which", lambda name: name)
    outcomes = gpu.run_everything(tmp_path, time.monotonic() + 510, runner)
    benches = [f"bench_{op}" for op in gpu.bench_modules()]
    assert [outcome.part for outcome in outcomes] == [*gpu.MOST_SECONDS, *benches]
    assert all(limits[part] <= most for part, most in gpu.MOST_SECONDS.items())
    assert max(limits[bench] for bench in benches) <= 511
    assert limits[benches[0]] <= 511 / len(benches)  # the first leaves the others their share
    assert capsys.readouterr().out.count(f"{result} after 1 s") == len(outcomes)


def test_parts_without_time_or_tool_are_left_out(tmp_path, monkeypatch):
    def runner(part, command, seconds, environment):
        raise AssertionError(part)

    monkeypatch.setattr(shutil, "which", lambda name: None)
    outcomes = gpu.run_everything(tmp_path, time.monotonic(), runner)
    said = {outcome.part: (outcome.result, outcome.detail) for outcome in outcomes}
    assert said.pop("memcheck") == said.pop("racecheck") == ("left out", "compute-sanitizer was not found")
    assert set(said.values()) == {("out of time", "no time was left")}


def test_published_words_name_no_folder():
    assert gpu.without_folders("File /usr/some/where/x.py, tests/test_y.py: ~/z") == "File x.py, tests/test_y.py: ~/z"
    assert gpu.folder_name("NVIDIA H200") == "nvidia_h200"
    assert gpu.folder_name("NVIDIA A100-SXM4-80GB") == "nvidia_a100_sxm4_80gb"


TESTS = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "wrong"
@pytest.mark.skip(reason="not today")
def test_skipped(): pass
@pytest.fixture
def broken(): raise OSError("no device")
def test_of_broken(broken): pass
"""


def test_outcomes_of_tests_are_recorded(tmp_path):
    (tmp_path / "test_small.py").write_text(TESTS)
    (tmp_path / "test_unreadable.py").write_text("import no_such_module")
    path = tmp_path / "tests.jsonl"
    arguments = ["--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path)]
    code = f"from pathlib import Path; from benches import gpu; gpu.run_tests(Path({str(path)!r}), {arguments!r})"
    done = run_python(code)
    counts = gpu.count_tests(path)
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 3, 1), done.stdout + done.stderr
    reasons = {test.split("::")[-1]: reason for test, reason in counts["failures"].items()}
    assert reasons["test_bad"] == "AssertionError: wrong"
    assert reasons["test_of_broken"] == "OSError: no device"
    assert reasons["test_unreadable.py"] == "ModuleNotFoundError: No module named 'no_such_module'"
    assert gpu.count_tests(tmp_path / "absent") == {"passed": 0, "failed": 0, "skipped": 0, "failures": {}}


def test_models_of_a_bare_checkout_are_importable():
    done = run_python(
        "import sys; sys.meta_path[:] = [one for one in sys.meta_path if 'editable' not in repr(one).lower()]\n"
        "import importlib.util, inpaint_kernels; assert importlib.util.find_spec('inpaint_kernels.models') is None\n"
        "from benches import gpu; gpu.make_models_importable(); gpu.make_models_importable()\n"
        "import inpaint_kernels.models.exemplar as exemplar; print(exemplar.__file__)"
    )
    assert done.stdout.strip() == str(ROOT / "models/exemplar.py"), done.stderr


def test_benches_of_the_gpu_need_no_pytest_benchmark():
    code = "import sys; sys.modules['pytest_benchmark'] = None; from benches import gpu, gpu_contextual_attention"
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_smallest_calls_call_every_op():
    from inpaint_kernels import _backends

    assert set(_backends.registered_ops()) <= set(gpu.smallest_calls("cpu"))


def test_ceilings_are_rates():
    found = gpu.ceilings("cpu", copy_bytes=1 << 16, side=32)
    assert found["copy_bytes_per_second"] > 0
    assert set(found["flops_per_second"]) == set(harness.PRECISIONS)
    assert min(found["flops_per_second"].values()) > 0


# ---- Benches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", gpu.bench_modules())
def test_gpu_cases_have_what_tables_need(op):
    cases = importlib.import_module(f"benches.gpu_{op}").cases()
    assert len({str(case) for case in cases}) == len(cases)
    for case in cases:
        facts = case.facts()
        assert (facts["op"] in registered_ops()) == ("flops" in facts)
        if "flops" in facts:
            assert OURS in case.provider_names
            assert report.floor(dict(facts), report.H200_DATASHEET) > 0
        else:
            assert case.provider_names
        json.dumps(facts)


def test_the_floor_of_the_largest_case_is_known():
    """62,500 keys: 2 * 62,500^2 * 128 * (1 + 4) operations."""
    facts = GpuAttentionCase(500, 1, "forward", FLOAT32).facts()
    assert facts["flops"] == 5 * 10**12
    assert facts["bytes"] == 2 * 4 * 128 * 500**2


def test_tiles_cost_little_more_than_the_least():
    """The halo of a tile's pixels and cells; the backward's products are those of the forward again, and four more."""
    forward = GpuAttentionCase(500, 1, "forward", FLOAT32).facts()
    both = GpuAttentionCase(500, 1, "forward+backward", FLOAT32).facts()
    assert 1 < forward["our_flops"] / forward["flops"] < 1.25
    assert 1 < both["our_flops"] / both["flops"] < 1.5
    assert forward["our_bytes"] > 6 * 4 * 62500**2  # three matrices of all scores, each written and read


@pytest.mark.parametrize(("precision", "most"), [(FLOAT32, 2.7), (TF32, 3.1), (BFLOAT16, 3.0)])
def test_the_backward_is_predicted_to_take_about_three_times_the_forward(precision, most):
    forward, both = (
        report.prediction(dict(GpuAttentionCase(500, 1, direction, precision).facts()), report.H200_DATASHEET)
        for direction in ("forward", "forward+backward")
    )
    assert 1 < (both - forward) / forward < most


def test_half_precision_moves_less():
    both = [GpuAttentionCase(500, 1, "forward+backward", p).facts()["our_bytes"] for p in (FLOAT32, BFLOAT16)]
    assert 1.2 < both[0] / both[1] < 2


@pytest.mark.parametrize(
    ("direction", "precision"),
    [("forward", TF32), ("forward+backward", FLOAT32), ("forward+backward", BFLOAT16)],
)
def test_providers_pass_the_gate(direction, precision):
    case = GpuAttentionCase(16, 2, direction, precision, device="cpu")
    names = [name for name in case.provider_names if name != COMPILED]  # compiling takes too long here
    measurements, _ = harness.run_race([case.provider(name) for name in names], case.tolerances, seconds=0, rounds=1)
    assert {name: measurement.failure for name, measurement in measurements.items()} == dict.fromkeys(names)


def test_a_mistake_does_not_pass_the_gate():
    case = GpuAttentionCase(16, 2, "forward", BFLOAT16, device="cpu")
    right = case.provider(PORTABLE)
    shifted = replace(right, run=lambda: (right.run()[0].roll(1, -1),))
    measurements, _ = harness.run_race([shifted], case.tolerances, seconds=0, rounds=1)
    assert isinstance(measurements[PORTABLE].failure, harness.WrongResultError)


def test_large_cases_are_gated_by_a_few_cells(monkeypatch):
    monkeypatch.setattr(attention, "LARGEST_DENSE_SIZE", 32)
    case = GpuAttentionCase(64, 1, "forward", FLOAT32, device="cpu")
    assert case.provider_names == [OURS, PORTABLE, GEMMS]
    providers = [case.provider(name) for name in (OURS, GEMMS)]
    measurements, _ = harness.run_race(providers, case.tolerances, seconds=0, rounds=1)
    assert measurements[OURS].failure is None
    assert measurements[OURS].error is not None
    assert measurements[GEMMS].wall


def test_precision_of_products_is_restored():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with harness.products_in(TF32):
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
        with harness.products_in(FLOAT32):
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


class BrokenCase(GpuAttentionCase):
    """One provider cannot be made, another returns something else."""

    def provider(self, name: str) -> harness.Provider:
        if name == OURS:
            raise MemoryError("out of memory in /usr/src/file.cu\nand more")
        return replace(super().provider(name), run=lambda: (torch.zeros(2, 128, 16, 16),))


def test_a_bench_keeps_what_it_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "MAX_ROUNDS", 3)
    path = tmp_path / "a_gpu/attention.json"
    small = GpuAttentionCase(16, 2, "forward", TF32, device="cpu")
    broken = BrokenCase(16, 2, "forward", TF32, device="cpu")
    gpu.run_bench([small, broken], path, seconds=60)
    assert capsys.readouterr().out == "2 figures, 2 failures\n"
    races = race_results.load([path])
    assert set(races[f"contextual_attention, {small}"]) == {"ours", "portable"}
    document = json.loads(path.read_text())
    assert document["failures"][0] == {
        "case": str(broken),
        "provider": "ours",
        "reason": "MemoryError: out of memory in file.cu",
    }
    assert document["failures"][1]["reason"].startswith("WrongResultError: portable: not timed")
    assert document["benchmarks"][0]["extra_info"]["provenance"]["gpu"]


def test_cases_without_time_are_named(tmp_path):
    path = tmp_path / "attention.json"
    gpu.run_bench([GpuAttentionCase(16, 2, "forward", TF32, device="cpu")], path, seconds=0)
    assert json.loads(path.read_text())["failures"][0]["reason"] == "no time was left"


# ---- Pages -----------------------------------------------------------------------------------------------------------

PROVENANCE = {
    "gpu": "A GPU",
    "driver_cuda": "13.0",
    "torch": "2.11",
    "triton": "3.6",
    "commit": "abc",
    "date": "2026-01-02 03:04 UTC",
}
CASE = {
    "op": "contextual_attention",
    "case": "a case",
    "size": 500,
    "batch": 2,
    "keys": 62500,
    "queries": 62500,
    "direction": "forward",
    "precision": "bfloat16",
    "flops": 10**12,
    "bytes": 10**9,
    "our_flops": 2 * 10**12,
    "our_bytes": 4 * 10**9,
}
CEILINGS = {"copy_bytes_per_second": 4e12, "flops_per_second": {"float32": 5e13, "bfloat16": 5e14}}


def figure(provider: str, seconds: float) -> dict[str, Any]:
    info = {
        **CASE,
        "provider": provider,
        "figure": "seconds",
        "cpu_seconds": [seconds],
        "peak_extra_mib": 100.0,
        "largest_relative_error": 1e-3,
        "noise": 0.01,
        "provenance": PROVENANCE,
    }
    return {"extra_info": info, "stats": {"data": [seconds]}}


@pytest.fixture
def results(tmp_path) -> Path:
    """A folder of results with evidence on a kernel and one GPU's run."""
    folder = tmp_path / "results"
    run = folder / "a_gpu"
    run.mkdir(parents=True)
    failures = [{"case": "a case", "provider": "naive", "reason": "OutOfMemoryError: too large"}]
    failures += [{"case": case, "provider": "all", "reason": report.NO_TIME} for case in ("late", "later")]
    figures = [figure("ours", 4e-3), figure("portable", 8e-3)]
    document = {"datetime": "2026-01-02", "benchmarks": figures, "failures": failures}
    parts = [{"part": "build", "result": "passed", "seconds": 60.4, "detail": "linked"}]
    tests = {"passed": 7, "failed": 1, "skipped": 2, "failures": {"tests/test_x.py::test_y": "AssertionError"}}
    contents = {
        "run.json": {"provenance": PROVENANCE, "parts": parts, "tests": tests},
        "ceilings.json": CEILINGS,
        "contextual_attention.json": document,
    }
    for name, content in contents.items():
        (run / name).write_text(json.dumps(content))
    usage = {"registers": 40, "stack_bytes": 0, "spill_bytes": 0, "static_shared_bytes": 1024}
    kernel = {
        "kernel": "sum_kernel<float>",
        "source": "csrc/cuda/sum.cu",
        "architectures": {"sm_80": usage, "sm_90": usage},
        "dynamic_shared_bytes": 512,
        "emulated_cases": 12,
        "worst_error": 2e-7,
        "measured_on": ["A GPU"],
    }
    other = {**kernel, "kernel": "sum_kernel<double>", "emulated_cases": 4, "worst_error": 1e-9}
    other["measured_on"] = "not yet"
    evidence = {"nvcc": "13.0.1", "sources": "abc", "cases": [CASE], "kernels": [kernel, other]}
    (folder / "gpu_evidence.json").write_text(json.dumps(evidence))
    return folder


def test_the_page_of_a_run(results):
    page = report.gpu_page(results / "a_gpu")
    for part in (
        "# A GPU",
        "Measured on A GPU, driver for CUDA 13.0, torch 2.11, Triton 3.6, commit abc, 2026-01-02.",
        "| build | passed | 60 s | linked |",
        "Tests: 7 passed, 1 failed, 2 skipped.\n- `tests/test_x.py::test_y`: AssertionError",
        "Ceilings: 4.00 TB/s copied, 50 TFLOP/s in float32 products, 500 TFLOP/s in bfloat16 products.",
        "| 2000x2000 image, 62,500 keys, forward, batch 2, bfloat16 | ours | 4 ms |  | 2.0x | 100 MiB | 1e-03 | 1% |",
        "| portable | 8 ms | 2.00x | 4.0x |",
        "- not timed: a case, naive: OutOfMemoryError: too large",
        "- not timed: 2 cases: no time was left",
    ):
        assert part in page
    (results / "a_gpu/ceilings.json").unlink()
    (results / "a_gpu/contextual_attention.json").unlink()
    assert "Tests: 7 passed" in report.gpu_page(results / "a_gpu")


@pytest.mark.parametrize(("result", "code"), [("passed", 0), ("failed", 1), ("out of time", 1), ("left out", 0)])
def test_a_run_replaces_the_results_of_the_one_before(result, code, tmp_path, monkeypatch, capsys):
    def run_everything(folder, deadline, build):
        assert build
        assert not list(folder.iterdir())
        assert 500 < deadline - time.monotonic() < 540
        gpu.write_json(folder / "ceilings.json", CEILINGS)
        return [gpu.Outcome("build", "passed", 1.0, ""), gpu.Outcome("tests", result, 2.0, "the end")]

    monkeypatch.setattr(gpu, "run_everything", run_everything)
    monkeypatch.setattr(gpu, "provenance", lambda device: PROVENANCE)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    (tmp_path / "a_gpu").mkdir()
    (tmp_path / "a_gpu/old.json").write_text("{}")
    assert gpu.everything(9.0, tmp_path) == code
    assert {path.name for path in (tmp_path / "a_gpu").iterdir()} == {"ceilings.json", "run.json", "summary.md"}
    page = (tmp_path / "a_gpu/summary.md").read_text()
    assert f"| tests | {result} | 2 s | the end |" in page
    assert page in capsys.readouterr().out


def test_the_readme_shows_figures_of_committed_runs_only(results):
    title = "| 2000x2000 image, 62,500 keys, forward, batch 2, bfloat16 |"
    measured = report.gpu_summary(results)
    assert f"{title} 2 ms | 5 ms | **4 ms** | 2.0x | 100 MiB |" in measured
    assert "| `sum_kernel` | 2 | 40 / 40 | 1.5 KiB | 0 | 4 | 2e-07 | A GPU |" in measured
    assert "registers (sm_80 / sm_90)" in measured
    shutil.rmtree(results / "a_gpu")
    predicted = report.gpu_summary(results)
    assert f"{title} 1.01 ms | 2.86 ms | not yet |  |  |" in predicted
    assert "Not measured on a GPU yet; `make gpu` does." in predicted


def test_update_writes_the_gpu_part_where_it_has_a_place(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "gpu_summary", lambda: "the tables")
    benchmarks = [figure("ours", 1.0), figure("naive", 2.0)]
    for benchmark in benchmarks:
        provenance = {**PROVENANCE, "cpu": "A CPU", "threads": 2}
        benchmark["extra_info"].update(family="peaked", channels=128, provenance=provenance)
    (tmp_path / "results.json").write_text(json.dumps({"datetime": "2026-01-02", "benchmarks": benchmarks}))
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n{report.GPU_BEGIN}\nold\n{report.GPU_END}\nlast\n")
    report.main([str(tmp_path / "results.json"), "--update", str(readme)])
    assert readme.read_text().endswith(f"{report.GPU_BEGIN}\nthe tables\n{report.GPU_END}\nlast\n")


# ---- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_time_and_memory_are_those_of_the_gpu():
    x = torch.randn(4096, 4096, device="cuda")
    x @ x  # allocates cuBLAS's workspace
    _, wall, cpu = harness.timed(lambda: (x @ x,), "cuda")
    assert 2 * 4096**3 / 1e16 < wall < 1
    assert cpu < 1
    _, peak = harness.with_peak_gpu_memory(lambda: ((x * 2).sum(),))
    assert 64 <= peak / 2**20 < 80


@pytest.mark.gpu
def test_our_kernels_are_named():
    key = torch.randn(1, 4, 8, 8, device="cuda")
    norm = torch.ops.inpaint_native.contextual_attention_key_norm
    provider = harness.Provider("ours", lambda: (norm(key, 3, "max", 1e-4),), expected=None, device="cuda")
    kernels = [f"contextual_attention_key_{name}_kernel<float>" for name in ("energy", "norm")]
    assert gpu.kernels_of(provider) == kernels


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("precision", harness.PRECISIONS)
def test_providers_pass_the_gate_on_the_gpu(direction, precision):
    case = GpuAttentionCase(32, 2, direction, precision)
    names = [name for name in case.provider_names if name != COMPILED]
    measurements, _ = harness.run_race([case.provider(name) for name in names], case.tolerances, seconds=0, rounds=1)
    assert {name: measurement.failure for name, measurement in measurements.items()} == dict.fromkeys(names)


@pytest.mark.gpu
def test_the_products_alone_run_in_every_precision():
    for precision in harness.PRECISIONS:
        assert attention.bare_gemms(GpuAttentionCase(160, 1, "forward", precision))() == ()
