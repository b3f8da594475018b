"""Building and installing: what is compiled, what is packed, and that a missing tool never fails an installation."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCAFFOLD = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"]
LIBRARY = "inpaint_kernels/libinpaint_native.so"
CAN_COMPILE = sys.platform == "linux" and shutil.which("g++") is not None
needs_compiler = pytest.mark.skipif(not CAN_COMPILE, reason="needs Linux and g++ on the PATH")


def copy_checkout(target: Path, *folders: str) -> Path:
    """A copy of the checkout's sources, without anything that was built."""
    target.mkdir()
    for name in SCAFFOLD:
        shutil.copy(ROOT / name, target)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    for folder in folders:
        shutil.copytree(ROOT / folder, target / folder, ignore=ignore)
    return target


@pytest.fixture
def checkout(tmp_path):
    """The whole project."""
    return copy_checkout(tmp_path / "checkout", "benches", "csrc", "inpaint_kernels", "models", "tests")


@pytest.fixture
def small_checkout(tmp_path):
    """The project with three tiny native sources, which compile in a moment; two of them share a header."""
    root = copy_checkout(tmp_path / "checkout", "inpaint_kernels", "models")
    sources = {
        "library.cpp": 'extern "C" int library() { return 0; }',
        "shared.h": "inline int one() { return 1; }",
        "cpu/first.cpp": '#include "../shared.h"\nint first() { return one(); }',
        "cpu/second.cpp": '#include "../shared.h"\nint second() { return one() + 1; }',
    }
    for name, text in sources.items():
        path = root / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.fixture
def no_tools(tmp_path):
    """An environment whose PATH holds no program at all."""
    empty = tmp_path / "empty"
    empty.mkdir()
    return environment(PATH=str(empty))


def environment(**variables: str) -> dict[str, str]:
    dropped = ("CXX", "CUDA_HOME", "INPAINT_CUDA_HOME", "INPAINT_NATIVE", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "INPAINT_CUDA": "0", **variables}


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the tests' Python with arguments; standard error is part of the output."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=env or environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def build_native(root: Path) -> str:
    result = run("setup.py", "-q", "build_native", "--inplace", cwd=root)
    assert result.returncode == 0, result.stdout
    return result.stdout


def pip_install(source: Path, target: Path, env: dict[str, str] | None = None) -> str:
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--verbose", "--target", str(target)]
    result = run("-m", "pip", "install", *options, source, cwd=target.parent, env=env)
    assert result.returncode == 0, result.stdout
    return result.stdout


def wheel_of(root: Path, env: dict[str, str] | None = None) -> Path:
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(root.parent / "wheels")]
    result = run("-m", "pip", "wheel", *options, root, cwd=root.parent, env=env)
    assert result.returncode == 0, result.stdout
    (wheel,) = (root.parent / "wheels").glob("*.whl")
    return wheel


def run_installed(target: Path, code: str) -> str:
    """Runs code with the installed package, away from the checkout."""
    result = run("-c", code, cwd=target, env=environment(PYTHONPATH=str(target)))
    assert result.returncode == 0, result.stdout
    return result.stdout


# ---- Compiling ------------------------------------------------------------------------------------------------------


@needs_compiler
def test_touching_one_file_rebuilds_what_depends_on_it(small_checkout):
    build_native(small_checkout)
    objects = small_checkout / "build/native"
    names = ["library.cpp.o", "cpu/first.cpp.o", "cpu/second.cpp.o", "libinpaint_native.so"]

    def rebuilt_by(change: str | None) -> list[str]:
        before = {name: (objects / name).stat().st_mtime_ns for name in names}
        if change:
            os.utime(small_checkout / "csrc" / change)
        build_native(small_checkout)
        return [name for name in names if (objects / name).stat().st_mtime_ns != before[name]]

    assert rebuilt_by(None) == []
    assert rebuilt_by("cpu/first.cpp") == ["cpu/first.cpp.o", "libinpaint_native.so"]
    assert rebuilt_by("shared.h") == ["cpu/first.cpp.o", "cpu/second.cpp.o", "libinpaint_native.so"]


@needs_compiler
def test_error_in_our_own_source_fails_loudly(small_checkout):
    (small_checkout / "csrc/cpu/first.cpp").write_text("int first() { return nothing; }\n")
    result = run("setup.py", "-q", "build_native", "--inplace", cwd=small_checkout)
    assert result.returncode != 0
    assert "csrc/cpu/first.cpp:1" in result.stdout
    assert "compiling the native library failed" in result.stdout
    assert not (small_checkout / LIBRARY).exists()


@needs_compiler
def test_wheel_with_the_library_is_for_any_python_on_this_platform(small_checkout):
    (small_checkout / "build/lib/inpaint_kernels").mkdir(parents=True)
    (small_checkout / "build/lib/inpaint_kernels/left_from_an_earlier_build.py").write_text("")
    wheel = wheel_of(small_checkout)
    assert wheel.name.startswith("inpaint_kernels-0.")
    assert "-py3-none-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for name in [
        LIBRARY,
        "inpaint_kernels/_build.json",
        "inpaint_kernels/py.typed",
        "inpaint_kernels/models/__init__.py",
    ]:
        assert names.count(name) == 1, name
    packed = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packed == {"inpaint_kernels"}
    assert not [name for name in names if "earlier_build" in name]


@pytest.mark.slow
@needs_compiler
def test_installed_wheel_runs_its_native_kernels_outside_the_checkout(checkout, tmp_path):
    pip_install(wheel_of(checkout), tmp_path / "site")
    shutil.rmtree(checkout)
    code = (
        "import torch, inpaint_kernels, inpaint_kernels.models; from inpaint_kernels import _native; "
        "assert _native.reason() is None, _native.reason(); "
        "norm = torch.ops.inpaint_native.contextual_attention_key_norm(torch.ones(1, 4, 3, 3), 3, 'max', 1e-4); "
        "print(norm[0, 1, 1].item(), inpaint_kernels.__file__)"
    )
    value, place = run_installed(tmp_path / "site", code).split()
    assert float(value) == 6.0
    assert Path(place).is_relative_to(tmp_path / "site")


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the platform of the wheel is that of x86-64")
def test_make_wheel_makes_one_for_linux_and_one_for_everything_else(checkout, tmp_path):
    """The checkout is a copy, so make must not touch the environment: --old-file takes it as it is."""
    environment_folder = Path(sys.executable).parents[1]
    ready = f"--old-file={environment_folder / '.inpaint-kernels-with-dev'}"
    env = environment()
    if shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").is_file():
        env["INPAINT_CUDA"] = "1"
    done = subprocess.run(
        ["make", "wheel", f"VENV={environment_folder}", ready], cwd=checkout, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    native, pure = sorted((checkout / "dist").iterdir(), key=lambda wheel: wheel.name.endswith("-any.whl"))
    assert native.name.endswith("-py3-none-manylinux_2_28_x86_64.whl")
    assert pure.name.endswith("-py3-none-any.whl")
    assert LIBRARY in zipfile.ZipFile(native).namelist()
    assert not [name for name in zipfile.ZipFile(native).namelist() if "libtorch" in name or "libc10" in name]
    assert not [name for name in zipfile.ZipFile(pure).namelist() if name.endswith(".so")]

    shutil.rmtree(checkout / "inpaint_kernels")
    code = (
        "from inpaint_kernels import _native; print(_native.reason()); print(_native.build_info().get('cuda')); "
        "import torch, inpaint_kernels as ik; print(ik.contextual_attention(*[torch.rand(1, 4, 16, 16)] * 2).shape)"
    )
    pip_install(native, tmp_path / "native")
    assert run_installed(tmp_path / "native", code).splitlines()[:2] == ["None", str(env["INPAINT_CUDA"] == "1")]
    pip_install(pure, tmp_path / "pure")
    reason = run_installed(tmp_path / "pure", code).splitlines()[0]
    assert reason == "this installation has no native library: pure Python was asked for (INPAINT_NATIVE=0)"


# ---- Without the tools ----------------------------------------------------------------------------------------------


def test_empty_path_installs_the_pure_python_package_and_says_so(checkout, tmp_path, no_tools):
    output = pip_install(checkout, tmp_path / "site", env=no_tools)
    sentence = "no C++ compiler found (looked for g++, c++, clang++); installing without native kernels"
    assert sentence in " ".join(output.split())
    assert "py3-none-any.whl" in output
    assert not (tmp_path / "site" / LIBRARY).exists()

    code = (
        "import inpaint_kernels, inpaint_kernels.models; from inpaint_kernels import _native; print(_native.reason()); "
        "assert not any(_native.available(kernel, key) for kernel in _native.KERNELS for key in ('CPU', 'CUDA'))"
    )
    reason = run_installed(tmp_path / "site", code)
    assert reason.startswith("this installation has no native library: no C++ compiler found")


@needs_compiler
def test_pure_python_can_be_asked_for(small_checkout):
    wheel = wheel_of(small_checkout, env=environment(INPAINT_NATIVE="0"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert LIBRARY not in zipfile.ZipFile(wheel).namelist()
    assert not (small_checkout / "build/native").exists()


@needs_compiler
def test_pure_build_removes_an_older_library(small_checkout, no_tools):
    build_native(small_checkout)
    assert (small_checkout / LIBRARY).is_file()
    result = run("setup.py", "-q", "build_native", "--inplace", cwd=small_checkout, env=no_tools)
    assert result.returncode == 0, result.stdout
    assert not (small_checkout / LIBRARY).exists()
    record = json.loads((small_checkout / "inpaint_kernels/_build.json").read_text())
    assert record["native"] is False
    assert "no C++ compiler" in record["reason"]


def test_sdist_is_complete(checkout, tmp_path, no_tools):
    (checkout / LIBRARY).write_text("a library that was built in the checkout")
    code = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    result = run("-c", code, tmp_path / "dist", cwd=checkout, env=no_tools)
    assert result.returncode == 0, result.stdout
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(tmp_path / "unpacked", filter="data")
    sources = [path for folder in ("csrc", "inpaint_kernels", "models", "tests") for path in (ROOT / folder).rglob("*")]
    expected = {
        str(path.relative_to(ROOT)) for path in sources if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".typed")
    }
    assert expected | set(SCAFFOLD) <= names
    assert not [name for name in names if name.endswith((".so", "_build.json", ".pyc"))]

    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert wheel_of(unpacked, env=no_tools).name.endswith("-py3-none-any.whl")


# ---- Finding the tools ----------------------------------------------------------------------------------------------


@pytest.fixture
def setup(monkeypatch):
    """setup.py as a module, with no wishes in the environment."""
    wishes = ("INPAINT_CUDA", "INPAINT_CUDA_ARCH", "INPAINT_CUDA_HOME", "INPAINT_DEBUG", "INPAINT_NATIVE")
    for name in ("CXX", "CUDA_HOME", *wishes):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("inpaint_kernels_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def hide(monkeypatch, setup, name):
    """Makes one Python package look uninstalled."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda other: None if other == name else find_spec(other))


@needs_compiler
def test_missing_ninja_is_a_reason(setup, monkeypatch):
    hide(monkeypatch, setup, "ninja")
    assert setup.find_toolchain() == "the Python package 'ninja' is not installed"


@needs_compiler
def test_missing_or_old_torch_is_a_reason(setup, monkeypatch, tmp_path):
    hide(monkeypatch, setup, "torch")
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "no installed torch with headers found" in setup.find_toolchain()
    headers = tmp_path / "torch/include/torch/csrc/stable"
    headers.mkdir(parents=True)
    (headers / "library.h").touch()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.9.1+cpu'\n")
    setup.find_toolchain.cache_clear()
    assert setup.find_toolchain() == "torch 2.9.1+cpu is too old (2.10 or newer is needed)"


@needs_compiler
def test_build_isolation_does_not_hide_the_installed_torch(setup, monkeypatch):
    place, version = setup.find_torch()
    hide(monkeypatch, setup, "torch")
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(place.parent))
    assert setup.find_torch() == (place, version)


@needs_compiler
def test_compiler_that_does_not_work_is_a_reason(setup, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)
    assert "does not work" in setup.find_toolchain()


def test_other_systems_get_the_pure_python_package(setup, monkeypatch):
    monkeypatch.setattr(setup.sys, "platform", "darwin")
    assert setup.find_toolchain() == "native kernels are built on Linux only, not on darwin"


@needs_compiler
def test_cuda_is_optional_unless_it_is_demanded(setup, monkeypatch):
    def no_nvcc(cxx):
        raise setup.MissingToolError("nvcc was not found")

    monkeypatch.setattr(setup, "find_cuda", no_nvcc)
    tools = setup.find_toolchain()
    assert (tools.cuda, tools.cuda_reason) == (None, "nvcc was not found")
    monkeypatch.setenv("INPAINT_CUDA", "1")
    setup.find_toolchain.cache_clear()
    with pytest.raises(SystemExit, match="INPAINT_CUDA=1, but nvcc was not found"):
        setup.find_toolchain()


NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {release}, V{release}.131" ;;
  *--dryrun*) echo '#$ LIBRARIES=  "-L{home}/lib64"' >&2 ;;
  *--list-gpu-arch*) echo compute_80; echo compute_90 ;;
  *--resource-usage*)
    echo "ptxas info    : Used 8 registers" >&2
    echo "warning: be careful" >&2
    g++ -x c++ -fPIC -c csrc/cuda/third.cu -o build/native/cuda/third.cu.o ;;
esac
"""


def install_toolkit(home: Path, release: str) -> Path:
    """A CUDA toolkit whose nvcc answers setup.py's questions."""
    for folder in ("bin", "lib64"):
        (home / folder).mkdir(parents=True)
    (home / "lib64/libcudart_static.a").write_text("!<arch>\n")
    (home / "bin/nvcc").write_text(NVCC.format(release=release, home=home))
    (home / "bin/nvcc").chmod(0o755)
    return home


@needs_compiler
def test_the_users_own_nvcc_goes_before_all_others(setup, monkeypatch, tmp_path):
    own, other = install_toolkit(tmp_path / "own", "12.4"), install_toolkit(tmp_path / "other", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(other))
    assert setup.find_cuda("g++").version == "13.0.131"
    monkeypatch.setenv("INPAINT_CUDA_HOME", str(own))
    cuda = setup.find_cuda("g++")
    assert (cuda.nvcc, cuda.version, cuda.library_dir) == (own / "bin/nvcc", "12.4.131", own / "lib64")
    assert cuda.architectures == ("80", "90+PTX")
    assert setup.find_toolchain().cuda == cuda


@needs_compiler
def test_an_old_nvcc_is_refused_with_a_sentence(setup, monkeypatch, tmp_path):
    old = install_toolkit(tmp_path / "old", "12.3")
    monkeypatch.setenv("CUDA_HOME", str(old))
    assert setup.find_toolchain().cuda_reason == "nvcc 12.3.131 is too old (12.4 or newer is needed)"
    setup.find_toolchain.cache_clear()
    monkeypatch.setenv("INPAINT_CUDA_HOME", str(old))
    sentence = f"INPAINT_CUDA_HOME={old}, but nvcc 12.3.131 is too old (12.4 or newer is needed)"
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        setup.find_toolchain()
    monkeypatch.setenv("INPAINT_CUDA_HOME", str(tmp_path / "absent"))
    with pytest.raises(SystemExit, match="but INPAINT_CUDA_HOME has no bin/nvcc"):
        setup.find_toolchain()


@needs_compiler
def test_the_compilers_report_is_kept_and_not_shown(small_checkout, tmp_path):
    """Of what nvcc prints only the resource report is hidden; of a failure nothing is."""
    source, built = small_checkout / "csrc/cuda/third.cu", small_checkout / "build/native/cuda/third.cu.o"
    source.parent.mkdir()
    source.write_text("int third() { return 3; }\n")
    env = environment(INPAINT_CUDA="1", INPAINT_CUDA_HOME=str(install_toolkit(tmp_path / "toolkit", "13.0")))
    result = run("setup.py", "-q", "build_native", "--inplace", cwd=small_checkout, env=env)
    assert result.returncode == 0, result.stdout
    assert "be careful" in result.stdout
    assert "registers" not in result.stdout
    assert "Used 8 registers" in built.with_name("third.cu.o.log").read_text()
    source.write_text("int third() { return nothing; }\n")
    result = run("setup.py", "-q", "build_native", "--inplace", cwd=small_checkout, env=env)
    assert result.returncode != 0
    assert "Used 8 registers" in result.stdout
    assert "nothing" in result.stdout


def test_wrong_settings_are_errors(setup, monkeypatch):
    monkeypatch.setenv("INPAINT_CUDA_ARCH", "8.0")
    with pytest.raises(SystemExit, match="INPAINT_CUDA_ARCH: expected for example '80;90a;100"):
        setup.choose_architectures("nvcc")
    monkeypatch.setenv("INPAINT_CUDA", "yes")
    with pytest.raises(SystemExit, match="INPAINT_CUDA: expected 'auto', '0' or '1', got 'yes'"):
        setup.find_toolchain()


def test_architectures(setup, monkeypatch):
    monkeypatch.setattr(setup, "output_of", lambda *command: "compute_80\ncompute_90\n")
    assert setup.choose_architectures("nvcc") == ("80", "90+PTX")
    monkeypatch.setenv("INPAINT_CUDA_ARCH", "80;90a;100+PTX")
    assert setup.gencode_flags(setup.choose_architectures("nvcc")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
