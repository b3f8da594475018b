"""The house: every op is complete, imports keep their direction, the native library is what it must be."""

from __future__ import annotations

import ast
import io
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch._subclasses import FakeTensorMode

from benches import model_report, race_results, report
from benches.elf import Elf
from inpaint_kernels import PRESETS, _native
from inpaint_kernels.ops._autograd import register_autograd
from tests.compare import assert_close_to_reference

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "inpaint_kernels"
OPS = sorted(path.stem for path in (PACKAGE / "ops").glob("*.py") if not path.stem.startswith("_"))

needs_native = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))


# ---- Structure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "place",
    ["inpaint_kernels/reference/{}.py", "inpaint_kernels/portable/{}.py", "tests/test_{}.py", "benches/bench_{}.py"],
)
def test_every_op_has_all_its_files(op, place):
    assert (ROOT / place.format(op)).is_file(), f"{op} lacks {place.format(op)}"


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_public_and_has_a_backend_table(op):
    import inpaint_kernels
    from inpaint_kernels import _backends

    assert callable(getattr(inpaint_kernels, op)), f"inpaint_kernels.{op} is not the op"
    assert op in inpaint_kernels.__all__
    assert op in _backends.registered_ops()
    assert hasattr(torch.ops.inpaint_kernels, op), f"there is no torch op inpaint_kernels::{op}"


@pytest.mark.parametrize("op", OPS)
def test_info_explains_every_op(op):
    from inpaint_kernels import info

    assert op in info._EXAMPLES


# ---- The README ------------------------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_examples_run():
    """Its Python blocks, one after the other in one namespace; some of them hold assertions."""
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 4
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)


def test_readme_table_is_that_of_the_committed_results():
    races = race_results.load(sorted(report.RESULTS.glob("*.json")))
    table = report.summary(races) if races else ""
    between = README.split(report.BEGIN)[1].split(report.END)[0].strip()
    assert between == table, "write it with: python benches/report.py --update README.md"


@pytest.mark.parametrize(
    ("make", "begin", "end"),
    [
        (report.hog_summary, report.HOG_BEGIN, report.HOG_END),
        (model_report.acceleration_summary, model_report.ACCELERATE_BEGIN, model_report.ACCELERATE_END),
        (model_report.model_summary, model_report.MODELS_BEGIN, model_report.MODELS_END),
        (model_report.photo_summary, model_report.PHOTOS_BEGIN, model_report.PHOTOS_END),
        (model_report.training_summary, model_report.TRAINING_BEGIN, model_report.TRAINING_END),
    ],
    ids=["hog", "acceleration", "models", "photos", "training"],
)
def test_readme_tables_are_those_of_the_committed_results(make, begin, end):
    table = make(race_results.load(sorted(report.RESULTS.glob("*.json"))))
    between = README.split(begin)[1].split(end)[0].strip()
    assert between == table, "write it with: python benches/report.py --update README.md"


def test_readme_says_what_was_learnt():
    between = README.split(model_report.LEARNING_BEGIN)[1].split(model_report.LEARNING_END)[0].strip()
    assert between == model_report.learning_summary(report.RESULTS), "python benches/report.py --update README.md"


def test_readme_gpu_tables_are_those_of_the_evidence():
    between = README.split(report.GPU_BEGIN)[1].split(report.GPU_END)[0].strip()
    assert between == report.gpu_summary(), "write them with: python benches/report.py --update README.md"


def test_readme_starts_with_picture_commands_table_and_platforms():
    first_screens = "\n".join(README.splitlines()[:52])
    for part in ("![", "```bash", report.BEGIN, report.END, "| platform |"):
        assert part in first_screens, part
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).is_file(), link
    assert (ROOT / "benches/results/demo.jpg").stat().st_size < 400_000


def test_readme_lists_every_preset_as_it_is():
    section = README.split("### Presets")[1].split("\n#")[0]
    rows = {row.split("`")[1]: row for row in section.splitlines() if row.startswith("| `")}
    assert list(rows) == list(PRESETS)
    for name, preset in PRESETS.items():
        divisor = f"{preset.divisor:g}" if preset.divisor else "overlap"
        cells = (preset.norm, str(preset.fuse), preset.masking, preset.grid, f"{preset.paste_size} / {divisor}")
        assert rows[name].endswith(f"| {' | '.join(cells)} |"), name


def test_readme_lists_every_environment_variable():
    listed = {name for row in README.splitlines() if row.startswith("| `") for name in re.findall(r"`([A-Z_]+)`", row)}
    sources = [ROOT / "setup.py", *(path for _, path in source_files()), *(ROOT / "benches").rglob("*.py")]
    used = {
        name for path in sources for name in re.findall(r"environ\b[^\n]{0,5}[\"'](\w+)[\"']", path.read_text("utf-8"))
    }
    assert used <= listed, used - listed
    assert {name for name in listed if name.startswith("INPAINT_")} <= used


# ---- Imports ---------------------------------------------------------------------------------------------------------

PUBLIC = "public names"
FOUNDATION = {"_backends", "_checks", "_compile", "_map_memory", "_native", "_packed_weights", "_workspaces"}

# Module or folder -> what it may import of the package.
MAY_IMPORT = {
    "__init__": {*FOUNDATION, "flow_color", "ops"},
    "__main__": {"cli"},
    "_backends": {"_compile", "_native"},
    "_checks": {"_compile"},
    "_compile": set(),
    "_files": set(),
    "_map_memory": set(),
    "_native": {"_compile"},
    "_onnx_composites": {"portable", "reference"},
    "_packed_weights": set(),
    "_workspaces": set(),
    "acceleration": {"recipes"},
    "catalogue": {"models"},
    "checkpoint_files": {"checkpoint_files"},
    "cli": {
        "catalogue",
        "comparison",
        "fill_command",
        "fillers",
        "filling",
        "images",
        "info",
        "mask_options",
        "masks",
        "metrics",
        "panels",
        "photo",
        "pretrained",
        "processes",
        "terminal",
        "trainer",
        PUBLIC,
    },
    "comparison": {PUBLIC},
    "detail": {"ops"},
    "drop_in": {"_checks", "flow_color", "ops"},
    "fillers": {"images", "models", "photo", "pretrained", PUBLIC},
    "fill_command": {
        "fillers",
        "filling",
        "images",
        "masks",
        "metrics",
        "models",
        "panels",
        "photo",
        "pretrained",
        "processes",
        "terminal",
        PUBLIC,
    },
    "filling": {"fillers", "images", "masks", "photo", "terminal", PUBLIC},
    "flow_color": {"_checks"},
    "images": {"_files"},
    "info": {"_backends", "_native"},
    "mask_options": {"images", "masks", "models", PUBLIC},
    "masks": set(),
    "memory_plan": {"_checks", "_workspaces", "models", "nn"},
    "metrics": set(),
    "models": {"_checks", "checkpoint_files", "models", "nn", PUBLIC},
    "nn": {"ops"},
    "onnx": {"_files", "_onnx_composites", "models"},
    "cuda_kernels": {"cuda_kernels", "portable"},
    "ops": {*FOUNDATION, "cuda_kernels", "ops", "portable", "reference", "triton_kernels"},
    "panels": {"images", PUBLIC},
    "photo": {"images", "masks", "models", "photo_tensors", "pipeline"},
    "photo_tensors": {"_checks", "images"},
    "pipeline": {"_checks", "detail", "memory_plan", "models", "photo_tensors"},
    "plugins": {"pipeline", "pretrained"},
    "portable": {"portable"},
    "processes": set(),
    "pretrained": {"_files", "checkpoint_files", "models"},
    "recipes": {"flow_color", "ops", "recipes"},
    "reference": {"reference"},
    "terminal": set(),
    "trainer": {
        "_files",
        "checkpoint_files",
        "fillers",
        "images",
        "masks",
        "metrics",
        "models",
        "panels",
        "pretrained",
        "processes",
        "trainer",
        PUBLIC,
    },
    "triton_kernels": {"_packed_weights", "portable", "triton_kernels"},
}

# Module or folder -> the packages other than torch and Python's own that it may import; only the command line's modules
# name more than numpy and safetensors, the core's only requirements beside torch.
THIRD_PARTY = {
    "catalogue": {"rich"},
    "checkpoint_files": {"numpy", "safetensors"},
    "cli": {"numpy", "rich", "typer"},
    "cuda_kernels": {"numpy"},
    "comparison": {"numpy", "rich"},
    "drop_in": {"numpy"},
    "fill_command": {"numpy", "rich", "typer"},
    "fillers": {"numpy"},
    "images": {"PIL", "numpy"},
    "info": {"rich"},
    "mask_options": {"numpy", "typer"},
    "masks": {"PIL", "numpy"},
    "metrics": {"numpy", "skimage"},
    "models": {"skimage"},
    "panels": {"PIL", "numpy"},
    "photo": {"numpy"},
    "photo_tensors": {"PIL", "numpy"},
    "plugins": {"comfy", "folder_paths", "iopaint", "numpy"},
    "pretrained": {"safetensors"},
    "terminal": {"rich", "typer"},
    "trainer": {"PIL", "numpy", "pydantic", "safetensors", "tomlkit"},
    "triton_kernels": {"triton"},
}


def source_files() -> Iterator[tuple[str, Path]]:
    """(layer, file) of every Python file of the package; a layer is a module or a folder of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path
    for path in sorted((ROOT / "models").rglob("*.py")):
        yield "models", path


def imported_names(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports when it runs: `a.b` for `import a.b` and for `from a import b`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and _is_for_type_checkers(node))]
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_for_type_checkers(node: ast.If) -> bool:
    return ast.unparse(node.test) == "TYPE_CHECKING"


def imported_layers(path: Path, *, top_level_only: bool = False) -> set[str]:
    layers = set()
    for name in imported_names(path, top_level_only=top_level_only):
        package, _, rest = name.partition(".")
        if package == "inpaint_kernels":
            layer = rest.partition(".")[0]
            is_module = (PACKAGE / layer).is_dir() or (PACKAGE / f"{layer}.py").is_file() or layer == "models"
            layers.add(layer if layer and is_module else PUBLIC)
    return layers


def test_imports_keep_their_direction():
    wrong = []
    for layer, path in source_files():
        assert layer in MAY_IMPORT, f"{path.name}: say in MAY_IMPORT what this module may import"
        excess = imported_layers(path) - MAY_IMPORT[layer]
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(excess)]
    assert not wrong, wrong


def test_every_layer_needs_only_its_third_party_packages():
    wrong = []
    for layer, path in source_files():
        allowed = {"inpaint_kernels", "torch", *THIRD_PARTY.get(layer, ()), *sys.stdlib_module_names}
        packages = {name.partition(".")[0] for name in imported_names(path)}
        wrong += [f"{path.relative_to(ROOT)} imports {package}" for package in sorted(packages - allowed)]
    assert not wrong, wrong


def test_files_images_and_masks_do_without_torch():
    for layer in ("_files", "images", "masks"):
        assert imported_layers(PACKAGE / f"{layer}.py") <= {"_files"}, layer
        packages = {name.partition(".")[0] for name in imported_names(PACKAGE / f"{layer}.py")}
        assert "torch" not in packages, layer


def test_imports_make_no_cycle():
    graph = {
        name: {"__init__" if target == PUBLIC else target for target in targets - {name}}
        for name, targets in MAY_IMPORT.items()
    }
    while leaves := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    assert not graph, f"these layers import each other: {sorted(graph)}"


def test_nothing_imports_tests_benches_or_the_checkouts_models_folder():
    for _, path in source_files():
        packages = {name.partition(".")[0] for name in imported_names(path)}
        assert not packages & {"tests", "benches", "models"}, path


def test_triton_kernels_are_imported_lazily():
    for layer, path in source_files():
        if layer != "triton_kernels":
            assert "triton_kernels" not in imported_layers(path, top_level_only=True), path


def test_importing_the_package_is_fast_and_brings_no_command_line():
    code = (
        "import sys, time; first = time.perf_counter(); import torch, numpy; second = time.perf_counter(); "
        "before = set(sys.modules); import inpaint_kernels; third = time.perf_counter(); "
        "print((third - second) / (second - first)); "
        "print(sorted({'typer', 'rich', 'PIL', 'triton', 'inpaint_kernels.acceleration', 'inpaint_kernels.models'}"
        " & (set(sys.modules) - before)))"
    )
    best = float("inf")
    for _ in range(3):  # a busy machine gets three chances
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        share, modules = run.stdout.splitlines()
        assert modules == "[]", f"importing inpaint_kernels imports {modules}"
        best = min(best, float(share))
        if best < 0.2:
            return
    pytest.fail(f"importing inpaint_kernels takes {best:.0%} of the time that torch takes")


# ---- The native library ----------------------------------------------------------------------------------------------


def test_kernel_list_is_that_of_the_schemas():
    schemas = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/library.cpp").read_text(encoding="utf-8"))
    assert sorted(schemas) == sorted(_native.KERNELS)


@needs_native
@pytest.mark.parametrize(("kernel", "key"), [(kernel, key) for kernel, keys in _native.KERNELS.items() for key in keys])
def test_kernel_is_registered(kernel, key):
    if key == "CUDA" and not _native.build_info()["cuda"]:
        pytest.skip(f"built without CUDA kernels: {_native.build_info()['cuda_reason']}")
    assert _native.registered(kernel, key)


def test_unknown_kernels_are_not_available():
    assert not _native.registered("no_such_kernel", "CPU")
    assert not _native.available("no_such_kernel", "CPU")
    assert _native.why_not("no_such_kernel", "CPU") == "there is no kernel inpaint_native::no_such_kernel"


@needs_native
def test_cpu_kernels_are_available_and_cuda_kernels_say_why_not():
    assert _native.available("contextual_attention_key_norm", "CPU")
    assert _native.why_not("contextual_attention_key_norm", "CPU") is None
    if torch.version.cuda is None:
        reason = _native.why_not("contextual_attention_key_norm", "CUDA")
        assert reason is not None
        assert "a build without CUDA" in reason or "built without CUDA kernels" in reason


@pytest.mark.parametrize(
    ("record", "torch_cuda", "driver", "reason"),
    [
        ({"cuda": False, "cuda_reason": "INPAINT_CUDA=0"}, "13.0", (13, 0), "without CUDA kernels: INPAINT_CUDA=0"),
        ({}, "13.0", (13, 0), "without CUDA kernels: no build record"),
        ({"cuda": True, "nvcc": "13.0.88"}, None, (13, 0), "is a build without CUDA"),
        ({"cuda": True, "nvcc": "13.0.88"}, "13.0", None, "no NVIDIA driver was found"),
        ({"cuda": True, "nvcc": "13.0.88"}, "12.4", (12, 4), "driver 12.4 < 13.0: the NVIDIA driver runs CUDA up to"),
        ({"cuda": True, "nvcc": "13.0.88"}, "12.8", (12, 8), "with INPAINT_CUDA_HOME set to a CUDA 12 toolkit"),
        ({"cuda": True, "nvcc": "12.9.1"}, "13.0", (13, 0), None),
        ({"cuda": True, "nvcc": "13.1.0"}, "13.0", (13, 0), None),
    ],
)
def test_cuda_kernels_are_offered_only_where_the_driver_runs_them(monkeypatch, record, torch_cuda, driver, reason):
    monkeypatch.setattr(_native, "build_info", lambda: record)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(_native, "_driver_cuda_version", lambda: driver)
    got = _native._cuda_reason()
    assert got is None if reason is None else reason in (got or "")


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (["75", "80", "90+PTX"], (7, 0), False),
        (["75", "80", "90+PTX"], (7, 5), True),
        (["75", "80", "90+PTX"], (8, 9), True),  # machine code of the same major version
        (["75", "80", "90+PTX"], (12, 0), True),  # the PTX
        (["75", "80"], (9, 0), False),
        (["86"], (8, 0), False),
        (["90a+PTX"], (9, 0), True),
        (["90a+PTX"], (10, 0), False),
        (["100f"], (10, 3), True),
        (["100f+PTX"], (12, 0), False),
        (["100"], (10, 0), True),
        ([], (9, 0), False),
    ],
)
def test_a_gpu_needs_code_that_it_runs(monkeypatch, fresh_gpu_reasons, built, capability, runs):
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda": True, "cuda_arch": built})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    reason = _native.gpu_reason(1)
    assert (reason is None) == runs
    if reason is not None:
        assert f"cuda:1 has compute capability {capability[0]}.{capability[1]}, the kernels were built for" in reason
        assert f"INPAINT_CUDA_ARCH={capability[0]}{capability[1]}" in reason


@pytest.fixture
def fresh_gpu_reasons():
    _native._gpu_reason.cache_clear()
    yield
    _native._gpu_reason.cache_clear()


def test_a_gpu_that_is_too_old_is_a_reason_and_is_shown(monkeypatch, fresh_gpu_reasons):
    from inpaint_kernels import info
    from inpaint_kernels.ops import contextual_attention as op

    asked: list[int] = []

    def capability(index: int) -> tuple[int, int]:
        asked.append(index)
        return (7, 0) if index == 0 else (7, 5)

    record = {"cuda": True, "cuda_arch": ["75", "80", "90+PTX"]}
    monkeypatch.setattr(_native, "build_info", lambda: record)
    monkeypatch.setattr(_native, "why_not", lambda kernel, key: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(major=7, minor=0, name="An old GPU", total_memory=16 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)

    def reasons(index: int, dtype: torch.dtype) -> list[str]:
        query = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index), dtype=dtype)
        return op._cuda_reasons(cast(Any, SimpleNamespace(query=query)))

    for _ in range(2):
        (reason,) = reasons(0, torch.float32)
        assert reason.startswith("cuda:0 has compute capability 7.0, the kernels were built for 75, 80, 90+PTX")
    assert asked == [0]  # once
    assert reasons(1, torch.float16) == []
    assert reasons(1, torch.bfloat16) == ["cuda:1 has compute capability 7.5, bfloat16 needs 8.0"]
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(info._devices())
    assert f"An old GPU, 16 GiB, capability 7.0; cannot: {reason}" in console.export_text()


@pytest.fixture
def old_driver(monkeypatch):
    """A CUDA torch on a machine whose driver is older than the CUDA that the kernels were linked with."""
    monkeypatch.setattr(_native, "_kernel_reasons", {})
    monkeypatch.setattr(_native, "build_info", lambda: {"native": True, "cuda": True, "nvcc": "13.0.88"})
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(_native, "_driver_cuda_version", lambda: (12, 4))
    monkeypatch.setattr(_native, "_check_registrations", lambda: None)
    _native.load()


@needs_native
def test_info_and_explain_name_an_old_driver_and_portable_goes_on(old_driver):
    from inpaint_kernels import explain, info

    assert _native.available("contextual_attention_forward", "CPU")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(info._native_library())
    assert "cannot: driver 12.4 < 13.0" in console.export_text()
    with FakeTensorMode():
        f = torch.empty(1, 4, 16, 16, device="cuda")
        explanation = explain("contextual_attention", f, f, preset="pennet")  # samples nothing: no CUDA is touched
    assert explanation.chosen == "portable"
    assert "  cannot: cuda: driver 12.4 < 13.0" in str(explanation)


def test_broken_library_warns_and_leaves_the_package_usable(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "_kernel_reasons", {})
    monkeypatch.setattr(_native, "_library_reason", None)
    monkeypatch.setattr(_native, "_LIBRARY", tmp_path / "broken.so")
    (tmp_path / "broken.so").write_bytes(b"no library")
    with pytest.warns(RuntimeWarning, match="the native library does not load with torch"):
        _native.load()
    assert not _native.available("contextual_attention_key_norm", "CPU")
    assert "does not load" in (_native.reason() or "")


@needs_native
def test_lost_registration_warns_and_is_named(monkeypatch):
    monkeypatch.setattr(_native, "_kernel_reasons", {})
    monkeypatch.setattr(_native, "KERNELS", {**_native.KERNELS, "newer_kernel": ("CPU",)})
    with pytest.warns(RuntimeWarning, match=r"it lacks newer_kernel \(CPU\); install the package again"):
        _native.load()
    assert not _native.available("newer_kernel", "CPU")
    assert _native.available("contextual_attention_key_norm", "CPU")


@needs_native
def test_library_needs_libtorch_by_name():
    """Through libtorch.so the weak CUDA symbols resolve on a CUDA torch; without it they are null, silently."""
    needed = Elf(_native._LIBRARY).needed()
    assert "libtorch.so" in needed
    assert not [name for name in needed if "python" in name or "cuda" in name], needed


# What manylinux_2_28 has, the platform of torch's own wheels: glibc 2.28 and the libraries of GCC 8.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


def symbol_version(version: str) -> tuple[str, tuple[int, ...]]:
    name, _, number = version.rpartition("_")
    return name, tuple(int(part) for part in number.split("."))


@needs_native
@pytest.mark.skipif(platform.machine() != "x86_64", reason="csrc/manylinux.cpp knows the symbol versions of x86-64")
def test_library_needs_no_newer_glibc_than_its_wheel_promises():
    versioned = [symbol for symbol in Elf(_native._LIBRARY).imports() if symbol.version]
    assert any(symbol.name.startswith("_Z") for symbol in versioned)  # libstdc++'s are among them
    newer = []
    for symbol in versioned:
        name, number = symbol_version(symbol.version)
        if number > NEWEST[name]:
            newer.append(f"{symbol.name}@{symbol.version} of {symbol.library}")
    assert not newer, f"csrc/manylinux.cpp says what to do about {newer}"


@needs_native
def test_library_needs_only_what_torch_2_10_has():
    """The C functions of LibTorch's stable ABI, and nothing mangled: C++ names change with every torch."""
    abi = (ROOT / "tests/torch_2_10_abi.txt").read_text(encoding="utf-8").splitlines()
    imports = {symbol.name for symbol in Elf(_native._LIBRARY).imports() if not symbol.version}
    assert {"aoti_torch_library_init_impl", "torch_call_dispatcher"} <= imports
    loader = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    assert sorted(imports - loader - set(abi)) == []


@needs_native
def test_library_and_record_name_no_path_of_the_building_machine():
    for path in (_native._LIBRARY, _native._RECORD):
        content = path.read_bytes()
        for place in (ROOT, Path(torch.__file__).parent, Path.home()):
            assert str(place).encode() not in content, f"{path.name} contains {place}"


def test_sources_name_no_path_of_a_machine():
    machine_path = re.compile(rf"(?<![\w.~$*)}}-])/(?:{'|'.join(['root', 'work', 'home', 'opt', 'Users'])})/\w")
    suffixes = {".py", ".cpp", ".cu", ".cuh", ".h", ".md", ".toml", ".json", ".in", ""}
    folders = ["inpaint_kernels", "models", "benches", "tests", "csrc", ".ci"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.iterdir())
    for path in files:
        if path.is_file() and path.suffix in suffixes:
            found = machine_path.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{path.relative_to(ROOT)}: {found and found[0]}"


def test_build_record_says_how_the_library_was_built():
    record = _native.build_info()
    assert record["version"]
    assert record["native"] == _native._LIBRARY.is_file()
    if record["native"]:
        assert int(record["torch_headers"].split(".")[0]) >= 2
        assert "-O3" in record["flags"]
        assert not [flag for flag in record["flags"] if flag.startswith("-m")]
        assert record["cuda"] or record["cuda_reason"]
    else:
        assert record["reason"]


# ---- The key norm, the kernel that proves the way from nvcc to torch ------------------------------------------------


def key_norm_reference(key, patch, rule, eps):
    before = (patch - 1) // 2
    after = patch - 1 - before
    energy = F.pad(key.double().square().sum(1, keepdim=True), (before, after, before, after))
    squared = F.conv2d(energy, energy.new_ones(1, 1, patch, patch)).squeeze(1)
    norms = {
        "none": torch.ones_like(squared),
        "add": squared.sqrt() + eps,
        "max": squared.sqrt().clamp_min(eps),
        "sum": (squared + eps * key.shape[1] * patch * patch).sqrt(),
    }
    return norms[rule]


def check_key_norm(device, rule, dtype):
    for patch, shape in [
        (3, (2, 5, 9, 13)),
        (1, (1, 4, 3, 3)),
        (2, (1, 3, 5, 4)),
        (7, (1, 2, 4, 21)),
        (3, (0, 3, 4, 4)),
    ]:
        key = torch.randn(shape, dtype=dtype, device=device)
        norm = torch.ops.inpaint_native.contextual_attention_key_norm(key, patch, rule, 2.0)
        assert norm.dtype == dtype
        assert_close_to_reference(norm, key_norm_reference(key, patch, rule, 2.0))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["none", "add", "max", "sum"])
def test_key_norm_cpu(rule, dtype, poisoned_memory):
    check_key_norm("cpu", rule, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["none", "add", "max", "sum"])
def test_key_norm_cuda(rule, dtype, poisoned_memory):
    assert _native.why_not("contextual_attention_key_norm", "CUDA") is None
    check_key_norm("cuda", rule, dtype)


@pytest.mark.gpu
def test_cuda_kernels_use_the_current_stream_and_can_be_captured():
    key = torch.randn(1, 4, 8, 8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = torch.ops.inpaint_native.contextual_attention_key_norm(key, 3, "max", 1e-4)
    key.normal_()
    graph.replay()
    assert_close_to_reference(norm, key_norm_reference(key, 3, "max", 1e-4))


@needs_native
def test_key_norm_rejects_what_it_cannot_read():
    key_norm = torch.ops.inpaint_native.contextual_attention_key_norm
    key = torch.zeros(1, 2, 4, 4)
    with pytest.raises(RuntimeError, match="rule: expected 'none', 'add', 'max' or 'sum', got 'mean'"):
        key_norm(key, 3, "mean", 1e-4)
    with pytest.raises(RuntimeError, match="patch: expected at least 1, got 0"):
        key_norm(key, 0, "max", 1e-4)
    with pytest.raises(RuntimeError, match="key: expected 4 dimensions, got 3"):
        key_norm(key[0], 3, "max", 1e-4)
    with pytest.raises(RuntimeError, match="key: expected float32 or float64, got Half"):
        key_norm(key.half(), 3, "max", 1e-4)


def test_key_norm_reads_strided_maps():
    key = torch.randn(2, 3, 10, 12)[:, :, ::2, 1::2].transpose(2, 3)
    key_norm = torch.ops.inpaint_native.contextual_attention_key_norm
    assert torch.equal(key_norm(key, 3, "max", 1e-4), key_norm(key.contiguous(), 3, "max", 1e-4))


def test_poisoned_memory_is_nan(poisoned_memory):
    assert torch.empty(3).isnan().all()
    assert torch.zeros(3).new_empty(3).isnan().all()


def test_gradients_are_registered_for_ops_without_default_values_only():
    with torch.library._scoped_library("inpaint_kernels", "FRAGMENT") as library:
        library.define("an_op(Tensor x, int y=1) -> Tensor")
        with pytest.raises(ValueError, match="name: expected an op without default values, an_op has some"):
            register_autograd(library, "an_op", lambda ctx, grad: (grad, None))
