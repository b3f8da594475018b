"""Builds inpaint-kernels: a Python package and, where a compiler is found, one native library beside it.

The native library needs a C++ compiler, ninja and the headers of torch >= 2.10; with nvcc it holds CUDA kernels too.
Nothing here is required: without them the installation succeeds, says in one sentence what is missing, and the
package runs on its portable and Triton backends. An error in our own sources, on a compiler that works, does fail.

Environment: INPAINT_NATIVE=0 (the pure-Python package), INPAINT_CUDA=auto|0|1 (1 makes a missing nvcc an error),
INPAINT_CUDA_ARCH="80;90a;100+PTX", INPAINT_CUDA_HOME (the toolkit to use, 12.4 or newer), INPAINT_DEBUG=1 (-O0 -g),
MAX_JOBS, CXX, CUDA_HOME.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
BUILD_DIR = Path("build/native")  # relative to ROOT, kept between builds
PACKAGE = Path("inpaint_kernels")
LIBRARY = "libinpaint_native.so"
RECORD = "_build.json"

# One library for every torch from this version on: LibTorch's stable ABI.
TORCH_MINIMUM = (2, 10)
TORCH_TARGET_VERSION = "0x020a000000000000"
CUDA_MINIMUM = (12, 4)
CUDA_ARCHITECTURES = ("75", "80", "90+PTX")
DEFAULT_NVCC = "/usr/local/cuda/bin/nvcc"

# No -march and no other -m flag: kernels that need AVX2 or AVX-512 carry function target attributes.
OPTIMISE = ["-O0", "-g"] if os.environ.get("INPAINT_DEBUG") == "1" else ["-O3"]
CXX_FLAGS = ["-std=c++17", *OPTIMISE, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
# More flags for one source. hog: a fused multiply-add would break ties between bins, and square roots are vectorised
# only where errno need not be set.
FILE_FLAGS = {"csrc/cpu/hog.cpp": ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]}
# nvcc's messages are kept beside the object, and shown without ptxas's report, which benches/evidence.py reads there.
KEEP_RESOURCE_REPORT = (
    "--resource-usage > $out.log 2>&1 || { cat $out.log; exit 1; }; "
    "grep -vE '^ptxas info|bytes stack frame' $out.log || true"
)
NVCC_FLAGS = ["-std=c++17", *OPTIMISE, "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden"]


class MissingToolError(Exception):
    """Something the native library needs is absent; the message says what, in words for the user."""


@dataclasses.dataclass(frozen=True)
class Cuda:
    """A working nvcc."""

    nvcc: Path
    library_dir: Path
    version: str
    architectures: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """Everything that compiling the native library takes."""

    cxx: str
    cxx_version: str
    torch: Path
    torch_version: str
    cuda: Cuda | None
    cuda_reason: str | None


def output_of(*command: str | Path) -> str:
    """Standard output of a command, or MissingToolError when it cannot run or fails."""
    try:
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingToolError(f"'{command[0]}' does not work ({error})") from None
    return result.stdout


def find_cxx() -> tuple[str, str]:
    """The C++ compiler and its version line, after it has compiled an empty C++17 translation unit."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    cxx = next((name for name in candidates if shutil.which(name)), None)
    if cxx is None:
        raise MissingToolError(f"no C++ compiler found (looked for {', '.join(candidates)})")
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch, "probe.cpp")
        probe.write_text("#include <optional>\nint main() { return std::optional<int>(0).value(); }\n")
        output_of(cxx, "-std=c++17", "-o", Path(scratch, "probe"), probe)
    return cxx, output_of(cxx, "--version").splitlines()[0]


def find_torch() -> tuple[Path, str]:
    """Directory and version of the torch package whose headers are used. Never imports it: reading is faster.

    pip's build isolation hides installed packages from `import`, but not the place where they lie; and any
    torch >= 2.10 gives the same library. This is why torch is no build requirement: it would be downloaded again,
    with gigabytes of CUDA libraries, to read a few headers.
    """
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    places += [Path(sysconfig.get_path("platlib"), "torch"), Path(sysconfig.get_path("purelib"), "torch")]
    for place in places:
        version = re.search(r"__version__ = '([^']+)'", read_text(place / "version.py"))
        if version and (place / "include/torch/csrc/stable/library.h").is_file():
            major, minor = (int(part) for part in version[1].split(".")[:2])
            if (major, minor) >= TORCH_MINIMUM:
                return place, version[1]
            raise MissingToolError(f"torch {version[1]} is too old (2.10 or newer is needed)")
    raise MissingToolError("no installed torch with headers found (install torch first, then use --no-build-isolation)")


def read_text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def find_nvcc() -> tuple[str, str]:
    """Path and version of nvcc: the one in INPAINT_CUDA_HOME and no other, or else the first that is found."""
    own = os.environ.get("INPAINT_CUDA_HOME")
    homes = [os.environ["CUDA_HOME"]] if os.environ.get("CUDA_HOME") else []
    candidates = [f"{own}/bin/nvcc"] if own else [*(f"{home}/bin/nvcc" for home in homes), "nvcc", DEFAULT_NVCC]
    nvcc = next((path for path in map(shutil.which, candidates) if path), None)
    if nvcc is None:
        raise MissingToolError("INPAINT_CUDA_HOME has no bin/nvcc" if own else "nvcc was not found")
    version = re.search(r"V((\d+)\.(\d+)\.\d+)", output_of(nvcc, "--version"))
    if version is None:
        raise MissingToolError(f"{nvcc} does not tell its version")
    if (int(version[2]), int(version[3])) < CUDA_MINIMUM:
        raise MissingToolError(f"nvcc {version[1]} is too old ({CUDA_MINIMUM[0]}.{CUDA_MINIMUM[1]} or newer is needed)")
    return nvcc, version[1]


def find_cuda(cxx: str) -> Cuda:
    """nvcc, after it has accepted the host compiler, with the architectures to compile for."""
    nvcc, version = find_nvcc()
    host_compiler = f"-ccbin={cxx}"
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch, "probe.cu")
        probe.write_text("")
        # A preprocessor run is enough for nvcc to check the host compiler's version; its log names the library folder.
        output_of(nvcc, host_compiler, "-E", "-o", Path(scratch, "probe.ii"), probe)
        plan = subprocess.run([nvcc, "--dryrun", probe], capture_output=True, text=True).stderr
    library_dirs = [Path(match).resolve() for match in re.findall(r'-L"?([^" ]+)', plan)]
    library_dir = next((path for path in library_dirs if (path / "libcudart_static.a").is_file()), None)
    if library_dir is None:
        raise MissingToolError(f"{nvcc} has no libcudart_static.a")
    return Cuda(Path(nvcc), library_dir, version, choose_architectures(nvcc))


def choose_architectures(nvcc: str) -> tuple[str, ...]:
    """INPAINT_CUDA_ARCH, or those of the default list that this nvcc knows."""
    requested = os.environ.get("INPAINT_CUDA_ARCH", "")
    if requested:
        architectures = tuple(part for part in re.split(r"[;, ]+", requested) if part)
        wrong = [part for part in architectures if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", part)]
        if wrong:
            raise SystemExit(f"INPAINT_CUDA_ARCH: expected for example '80;90a;100+PTX', got {requested!r}")
        return architectures
    known = output_of(nvcc, "--list-gpu-arch").split()
    return tuple(part for part in CUDA_ARCHITECTURES if f"compute_{part.removesuffix('+PTX')}" in known)


def gencode_flags(architectures: tuple[str, ...]) -> list[str]:
    flags = []
    for part in architectures:
        number = part.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if part != number:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


@functools.cache
def find_toolchain() -> Toolchain | str:
    """The toolchain, or the reason why there is none."""
    cuda_wish = os.environ.get("INPAINT_CUDA", "auto")
    if cuda_wish not in ("auto", "0", "1"):
        raise SystemExit(f"INPAINT_CUDA: expected 'auto', '0' or '1', got {cuda_wish!r}")
    try:
        if os.environ.get("INPAINT_NATIVE") == "0":
            raise MissingToolError("pure Python was asked for (INPAINT_NATIVE=0)")
        if sys.platform != "linux":
            raise MissingToolError(f"native kernels are built on Linux only, not on {sys.platform}")
        cxx, cxx_version = find_cxx()
        if importlib.util.find_spec("ninja") is None:
            raise MissingToolError("the Python package 'ninja' is not installed")
        torch, torch_version = find_torch()
    except MissingToolError as missing:
        if cuda_wish == "1":
            raise SystemExit(f"INPAINT_CUDA=1, but {missing}") from None
        return str(missing)
    if cuda_wish == "0":
        return Toolchain(cxx, cxx_version, torch, torch_version, None, "INPAINT_CUDA=0")
    try:
        return Toolchain(cxx, cxx_version, torch, torch_version, find_cuda(cxx), None)
    except MissingToolError as missing:
        if os.environ.get("INPAINT_CUDA_HOME"):
            raise SystemExit(f"INPAINT_CUDA_HOME={os.environ['INPAINT_CUDA_HOME']}, but {missing}") from None
        if cuda_wish == "1":
            raise SystemExit(f"INPAINT_CUDA=1, but {missing}") from None
        return Toolchain(cxx, cxx_version, torch, torch_version, None, str(missing))


def write_ninja_file(tools: Toolchain) -> None:
    """One rule per language, one edge per source, header dependencies from the compilers themselves."""
    from ninja import ninja_syntax

    sources = sorted(ROOT.glob("csrc/*.cpp")) + sorted(ROOT.glob("csrc/cpu/*.cpp"))
    if tools.cuda is not None:
        sources += sorted(ROOT.glob("csrc/cuda/*.cu"))
    with open(ROOT / BUILD_DIR / "build.ninja", "w") as file:
        writer: Any = ninja_syntax.Writer  # its type stub declares a str where it takes a file
        ninja = writer(file, width=120)
        ninja.comment("Written by setup.py.")
        ninja.variable("builddir", str(BUILD_DIR))
        for rule, compiler in compile_commands(tools).items():
            command = f"{shell_line(compiler)} $flags -MD -MF $out.d -c $in -o $out"
            ninja.rule(
                rule,
                command=f"{command} {KEEP_RESOURCE_REPORT}" if rule == "nvcc" else command,
                depfile="$out.d",
                deps="gcc",
                description=f"{rule} $in",
            )
        link = f"{shell_line([tools.cxx])} -shared $in -o $out {shell_line(link_flags(tools))}"
        ninja.rule("link", command=link, description="link $out")
        objects = []
        for path in sources:
            source = path.relative_to(ROOT)
            objects.append(str(BUILD_DIR / source.relative_to("csrc")) + ".o")
            flags = shell_line(FILE_FLAGS.get(str(source), []))
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            ninja.build(objects[-1], rule, str(source), variables={"flags": flags} if flags else None)
        ninja.build(str(BUILD_DIR / LIBRARY), "link", objects)


def shell_line(parts: list[str]) -> str:
    """A command line for a ninja file: quoted for the shell, then escaped for ninja."""
    return shlex.join(parts).replace("$", "$$")


def compile_commands(tools: Toolchain) -> dict[str, list[str]]:
    """Compiler and flags by rule name."""
    include = tools.torch / "include"
    shared = ["-isystem", str(include), f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    # Error messages show sources and headers by relative paths, whoever's machine compiled them.
    prefix_map = f"-fmacro-prefix-map={include}/="
    commands = {"cxx": [tools.cxx, *CXX_FLAGS, prefix_map, *shared]}
    if tools.cuda is not None:
        flags = [*NVCC_FLAGS, f"-Xcompiler={prefix_map}", *gencode_flags(tools.cuda.architectures), *shared]
        commands["nvcc"] = [str(tools.cuda.nvcc), f"-ccbin={tools.cxx}", *flags]
    return commands


def link_flags(tools: Toolchain) -> list[str]:
    # A CUDA torch's libtorch.so is what leads to the CUDA symbols that csrc/common.h declares weak. Nothing in it is
    # referenced by name, so the linker would drop it, and they would silently be null.
    flags = [f"-L{tools.torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", *older_glibc_flags(), "-Wl,--as-needed"]
    flags += ["-ltorch_cpu", "-lc10"]
    if tools.cuda is not None:
        # --exclude-libs keeps this copy of the CUDA runtime invisible to torch's own.
        cudart = ["-lcudart_static", "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]
        flags += [f"-L{tools.cuda.library_dir}", *cudart]
    return flags


def older_glibc_flags() -> list[str]:
    """What csrc/manylinux.cpp asks of the linker, with the libraries that hold its functions before glibc 2.34."""
    if platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc":
        return []
    names = re.findall(r"^INPAINT_OLD_SYMBOL\((\w+), \"", read_text(ROOT / "csrc/manylinux.cpp"), flags=re.MULTILINE)
    libraries = ["-l:libdl.so.2", "-l:libpthread.so.0", "-l:librt.so.1"] if names else []
    return [*libraries, *(f"-Wl,--wrap={name}" for name in names)]


def compile_library(tools: Toolchain) -> Path:
    """Runs ninja; returns the library. A compile error of our sources ends the installation."""
    command = [sys.executable, "-m", "ninja", "-f", str(BUILD_DIR / "build.ninja")]
    if os.environ.get("MAX_JOBS"):
        command += ["-j", os.environ["MAX_JOBS"]]
    with only_build():
        write_ninja_file(tools)
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            raise SystemExit("inpaint-kernels: compiling the native library failed; the compiler's messages are above")
    return ROOT / BUILD_DIR / LIBRARY


@contextlib.contextmanager
def only_build() -> Iterator[None]:
    """Other builds of this folder wait: of two at once, one takes the other's list of what a source includes."""
    import fcntl  # which Windows does not have

    (ROOT / BUILD_DIR).mkdir(parents=True, exist_ok=True)
    with open(ROOT / BUILD_DIR / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def git_commit() -> str | None:
    """Commit of the checkout, with '-dirty' when files differ from it; None outside a checkout."""
    if not (ROOT / ".git").exists():
        return None
    try:
        dirty = output_of("git", "status", "--porcelain", "--untracked-files=no").strip()
        return output_of("git", "rev-parse", "--short=12", "HEAD").strip() + ("-dirty" if dirty else "")
    except MissingToolError:
        return None


def build_record(tools: Toolchain | str, version: str) -> dict[str, Any]:
    """What `inpaint-kernels info` and error messages tell about this build; no paths of the building machine."""
    record: dict[str, Any] = {"version": version, "git": git_commit()}
    if isinstance(tools, str):
        return {**record, "native": False, "reason": tools}
    record |= {"native": True, "torch_headers": tools.torch_version, "compiler": tools.cxx_version}
    record |= {"flags": CXX_FLAGS, "cuda": tools.cuda is not None, "cuda_reason": tools.cuda_reason}
    if tools.cuda is not None:
        record |= {"nvcc": tools.cuda.version, "nvcc_flags": NVCC_FLAGS, "cuda_arch": list(tools.cuda.architectures)}
    return record


def replace_file(target: Path, content: bytes) -> None:
    """Writes by rename, and only a change: a process that has the old library loaded keeps it whole."""
    if target.is_file() and target.read_bytes() == content:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    scratch.write_bytes(content)
    scratch.chmod(0o755 if target.suffix == ".so" else 0o644)
    scratch.replace(target)


class BuildNative(Command):
    """Sub-command of `build`: the native library and its build record (setuptools.command.build.SubCommand)."""

    description = "build the native library, if the tools for it are there"
    user_options: ClassVar[list[tuple[str, str, str]]] = [
        ("inplace", "i", "put the library into the checkout"),
        ("build-lib=", "b", "put it into a package below this folder"),
    ]
    boolean_options: ClassVar[list[str]] = ["inplace"]

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.inplace = False
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        tools = find_toolchain()
        target = self._package_dir()
        if isinstance(tools, str):
            self.warn(
                f"{tools}; installing without native kernels: the portable and Triton backends work, "
                "the C++ and CUDA kernels do not."
            )
            (target / LIBRARY).unlink(missing_ok=True)
        else:
            replace_file(target / LIBRARY, compile_library(tools).read_bytes())
        record = build_record(tools, self.distribution.get_version())
        replace_file(target / RECORD, (json.dumps(record, indent=2) + "\n").encode())

    def _package_dir(self) -> Path:
        if self.editable_mode or self.inplace:
            return ROOT / PACKAGE
        assert self.build_lib is not None
        return Path(self.build_lib) / PACKAGE

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*")) if path.is_file()]

    def get_outputs(self) -> list[str]:
        names = [RECORD] if isinstance(find_toolchain(), str) else [RECORD, LIBRARY]
        return [str(self._package_dir() / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """`build` with the native library, from an empty folder: no file of an earlier build gets into a wheel."""

    sub_commands: ClassVar[list[Any]] = [*build.sub_commands, ("build_native", None)]

    def run(self) -> None:
        if Path(self.build_lib).resolve().is_relative_to(ROOT / "build"):
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class NativeDistribution(Distribution):
    """A wheel with the native library is a platform wheel."""

    def has_ext_modules(self) -> bool:
        return not isinstance(find_toolchain(), str)


class Wheel(bdist_wheel):
    """The stable ABI makes one wheel per platform, for any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def packages() -> list[str]:
    models = [f"inpaint_kernels.models.{name}" for name in find_packages("models")]
    return [*find_packages(include=["inpaint_kernels", "inpaint_kernels.*"]), "inpaint_kernels.models", *models]


if __name__ == "__main__":
    setup(
        packages=packages(),
        package_dir={"inpaint_kernels.models": "models"},
        distclass=NativeDistribution,
        cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel},
    )
