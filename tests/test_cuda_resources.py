"""What the compiler says of every CUDA kernel, and the committed evidence that is made of it."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benches import evidence
from benches.elf import Elf
from benches.evidence import NOT_YET, Kernel, Usage

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = {"sm_75", "sm_80", "sm_90"}
PTX, MACHINE_CODE = 1, 2
WRITE = "python -m benches.evidence && python benches/report.py --update README.md"


@pytest.fixture(scope="module")
def nvcc() -> str:
    """The compiler's version, after it has compiled whatever changed."""
    try:
        return evidence.build()
    except evidence.NoCudaCompilerError as missing:
        pytest.skip(f"no CUDA source can be compiled here: {missing}")


@pytest.fixture(scope="module")
def kernels(nvcc: str) -> list[Kernel]:
    return evidence.compiled_kernels()


# ---- The kernels of this checkout ------------------------------------------------------------------------------------


def test_every_kernel_is_compiled_for_every_architecture(kernels):
    assert any(kernel.name.startswith("contextual_attention_") for kernel in kernels)
    assert {kernel.name: set(kernel.usage) for kernel in kernels} == {kernel.name: ARCHITECTURES for kernel in kernels}


def test_no_kernel_spills_or_takes_too_much_shared_memory(kernels):
    found = [violation for kernel in kernels for violation in evidence.violations(kernel)]
    assert not found, "\n".join(found)


def test_objects_hold_ptx_for_gpus_to_come(kernels):
    for source in {kernel.source for kernel in kernels}:
        fat_binary = Elf(evidence.OBJECTS / f"{Path(source).name}.o").content(".nv_fatbin")
        code = code_in(fat_binary)
        assert {arch for kind, arch in code if kind == MACHINE_CODE} == {75, 80, 90}, source
        assert {arch for kind, arch in code if kind == PTX} == {90}, source


def code_in(fat_binary: bytes) -> set[tuple[int, int]]:
    """(kind, architecture) of every entry of a fat binary."""
    found, position = set(), 0
    while position + 16 <= len(fat_binary):
        magic, _, header, size = struct.unpack_from("<IHHQ", fat_binary, position)
        if magic != 0xBA55ED50:  # padding between two files' fat binaries
            position += 8
            continue
        entry, position = position + header, position + header + size
        while entry < position:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", fat_binary, entry)
            (arch,) = struct.unpack_from("<I", fat_binary, entry + 28)
            found.add((kind, arch))
            entry += entry_header + entry_size
    return found


def test_entries_of_dynamic_shared_memory_name_kernels(kernels):
    for built in sorted(evidence.OBJECTS.glob("*.cu.o")):
        if (ROOT / "csrc/cuda" / built.stem).is_file():
            for name in evidence.dynamic_shared_bytes(Elf(built).content("inpaint_resources")):
                assert any(evidence.is_named(kernel.name, name) for kernel in kernels), f"{built.name}: {name}"


def test_kernels_with_dynamic_shared_memory_say_how_much():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "csrc/cuda").iterdir()]
    entries = {name for text in sources for name in re.findall(r"\bINPAINT_DYNAMIC_SHARED\((\w+),", text)}
    users = {name for text in sources for name in users_of_dynamic_shared(text)}
    assert users == entries, "see csrc/kernel_resources.h"


def users_of_dynamic_shared(text: str) -> list[str]:
    """The functions whose text, up to the next function of the device, calls dynamic_shared<T>()."""
    text = re.sub(r"//[^\n]*", "", text)
    users = []
    for function in re.split(r"(?=__global__|__device__)", text)[1:]:
        name = re.search(r"(\w+)\(", re.sub(r"__launch_bounds__\([^)]*\)", "", function))
        if "dynamic_shared<" in function and name is not None:
            users.append(name[1])
    return users


def test_users_of_dynamic_shared_are_found():
    text = """
    __device__ float helper(float x) { return x; }  // dynamic_shared<int>()
    template <int N>
    __global__ void __launch_bounds__(128) first_kernel(int n) { float* tile = dynamic_shared<float>(); }
    __global__ void second_kernel(int n) {}
    """
    assert users_of_dynamic_shared(text) == ["first_kernel"]


def test_committed_evidence_is_that_of_the_compiler(kernels, nvcc):
    before = evidence.read()
    now = evidence.evidence(kernels, nvcc, before)
    if before.get("nvcc") not in (None, nvcc) and names(before) == names(now):
        pytest.skip(f"the committed evidence is of nvcc {before['nvcc']}, this is {nvcc}")
    if comparable(before) != comparable(now):
        evidence.write(now)
        pytest.fail(f"{evidence.EVIDENCE.name} was out of date and has been written anew; {WRITE}, and commit both")


def names(content: dict[str, Any]) -> list[str]:
    return [entry["kernel"] for entry in content.get("kernels", ())]


def comparable(content: dict[str, Any]) -> dict[str, Any]:
    """Without the figures that depend on which tests have run."""
    kernels = [
        {**entry, "emulated_cases": entry["emulated_cases"] != NOT_YET, "worst_error": entry["worst_error"] != NOT_YET}
        for entry in content.get("kernels", ())
    ]
    return {**content, "kernels": kernels}


def test_every_kernel_is_emulated():
    """Nobody needs a GPU to find a mistake in a kernel."""
    lacking = sorted(entry["kernel"] for entry in evidence.read()["kernels"] if entry["emulated_cases"] == NOT_YET)
    assert not lacking, f"no test has recorded an emulated case of {lacking}; if there is one now: {WRITE}"


# ---- Reading the report ----------------------------------------------------------------------------------------------

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7inpaint45_GLOBAL__N__0a_4_x_cu_1b10sum_kernelIfEEvPKT_' for 'sm_75'
ptxas info    : Function properties for _ZN7inpaint45_GLOBAL__N__0a_4_x_cu_1b10sum_kernelIfEEvPKT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 21 registers, used 1 barriers, 4096 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 3.1 ms
csrc/cuda/x.cu(7): warning #177-D: variable "unused" was declared but never referenced
ptxas info    : Compiling entry function '_Z11spilling_kernelPf' for 'sm_90'
ptxas info    : Function properties for _Z6helperf
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Z11spilling_kernelPf
    16 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, 32 bytes cumulative stack size, 400 bytes cmem[0]
"""


def test_report_is_read():
    report = evidence.parse_report(REPORT)
    assert list(report.values()) == [{"sm_75": Usage(21, 0, 0, 4096)}, {"sm_90": Usage(255, 16, 16, 0)}]
    with pytest.raises(ValueError, match="not as expected"):
        evidence.parse_report("ptxas info : Compiling entry function 'f' for 'sm_75'\nsomething else")


def test_planted_faults_are_found():
    kernel = Kernel("f<float>", "f.cu", 0, {"sm_80": Usage(32, 0, 0, 1024)})
    assert evidence.violations(kernel) == []
    assert evidence.violations(replace(kernel, dynamic_shared_bytes=98 * 1024)) == []
    too_much = evidence.violations(replace(kernel, dynamic_shared_bytes=98 * 1024 + 1))
    assert too_much == ["f<float> takes 101377 bytes of shared memory on sm_80, 101376 at most"]
    spills = replace(kernel, usage={"sm_80": Usage(32, 0, 8, 0), "sm_90": Usage(32, 24, 0, 0)})
    found = evidence.violations(spills)
    assert found == ["f<float> spills 8 bytes on sm_80", "f<float> has a stack of 24 bytes on sm_90"]


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        ("void inpaint::(anonymous namespace)::a_kernel<float, (inpaint::Rule)2>(float*)", "a_kernel<float, (Rule)2>"),
        ("inpaint::(anonymous namespace)::rows_kernel(inpaint::Runs, int*)", "rows_kernel"),
        ("plain_kernel", "plain_kernel"),
        ("void at::native::copy_kernel<c10::BFloat16>(long)", "copy_kernel<c10::BFloat16>"),
    ],
)
def test_short_names(signature, name):
    assert evidence.short_name(signature) == name


def test_templates_are_named_without_arguments():
    assert evidence.is_named("sum_kernel<float>", "sum_kernel")
    assert evidence.is_named("sum_kernel<float>", "sum_kernel<float>")
    assert not evidence.is_named("sum_kernel<float>", "sum")
    assert not evidence.is_named("sum_kernel<float>", "sum_kernel<double>")


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++ on the PATH")
def test_dynamic_shared_memory_is_read_from_the_object(tmp_path):
    source = tmp_path / "source.cpp"
    source.write_text(
        f'#include "{ROOT / "csrc/kernel_resources.h"}"\n'
        "namespace inpaint { namespace {\n"
        "constexpr int kBytes = 4 * 256;\n"
        "INPAINT_DYNAMIC_SHARED(first_kernel, kBytes);\n"
        "INPAINT_DYNAMIC_SHARED(second_kernel, 99 * 1024);\n"
        "} }\n"
    )
    built = tmp_path / "source.o"
    subprocess.run(["g++", "-std=c++17", "-O2", "-Wall", "-Werror", "-c", source, "-o", built], check=True)
    section = Elf(built).content("inpaint_resources")
    assert evidence.dynamic_shared_bytes(section) == {"first_kernel": 1024, "second_kernel": 101376}


# ---- The evidence ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_records(monkeypatch, tmp_path) -> Path:
    """Nothing emulated and nothing measured; the folder for results."""
    monkeypatch.setattr(evidence, "EMULATED", tmp_path / "build/emulated.jsonl")
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    return tmp_path


KERNEL = Kernel("sum_kernel<float>", "csrc/cuda/sum.cu", 64, {"sm_80": Usage(32, 0, 0, 16)})


def test_evidence_says_not_yet(no_records):
    (entry,) = evidence.evidence([KERNEL], "13.0.1", {})["kernels"]
    assert (entry["emulated_cases"], entry["worst_error"], entry["measured_on"]) == (NOT_YET,) * 3
    assert entry["architectures"]["sm_80"]["registers"] == 32
    assert entry["dynamic_shared_bytes"] == 64


def test_evidence_counts_emulated_cases(no_records, monkeypatch):
    evidence.record_emulated("sum_kernel", "9x13", 3e-7)
    evidence.record_emulated("sum_kernel", "9x13", 1e-7)  # the same case again
    evidence.record_emulated("sum_kernel<float>", "1x1", 2e-7)
    evidence.record_emulated("sum_kernel<double>", "1x1", 1.0)
    before = evidence.evidence([KERNEL], "13.0.1", {})
    assert (before["kernels"][0]["emulated_cases"], before["kernels"][0]["worst_error"]) == (2, 2e-7)

    evidence.EMULATED.unlink()  # a fresh clone keeps the committed figures
    assert evidence.evidence([KERNEL], "13.0.1", before) == before
    monkeypatch.setattr(evidence, "sources_digest", lambda: "other sources")
    assert evidence.evidence([KERNEL], "13.0.1", before)["kernels"][0]["emulated_cases"] == NOT_YET


def test_records_of_other_sources_do_not_count(no_records, monkeypatch):
    evidence.record_emulated("sum_kernel", "9x13", 3e-7)
    monkeypatch.setattr(evidence, "sources_digest", lambda: "other sources")
    assert evidence.emulated_cases() == []


def test_evidence_names_the_gpus_of_committed_runs(no_records):
    (no_records / "a_gpu").mkdir()
    info = {"kernels": ["sum_kernel<float>"], "provenance": {"gpu": "A GPU"}}
    document = {"benchmarks": [{"extra_info": info}, {"extra_info": {"provenance": {"gpu": "Another"}}}]}
    (no_records / "a_gpu/sum.json").write_text(json.dumps(document))
    (no_records / "a_gpu/ceilings.json").write_text("{}")
    assert evidence.evidence([KERNEL], "13.0.1", {})["kernels"][0]["measured_on"] == ["A GPU"]


def test_comments_do_not_change_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    for folder in ("cuda", "math"):
        (tmp_path / "csrc" / folder).mkdir(parents=True)
    (tmp_path / "csrc/common.h").write_text("int one() { return 1; }\n")
    before = evidence.sources_digest()
    (tmp_path / "csrc/common.h").write_text("// One.\nint one()\n{\n  return 1;\n}\n")
    assert evidence.sources_digest() == before
    (tmp_path / "csrc/common.h").write_text("int one() { return 2; }\n")
    assert evidence.sources_digest() != before
