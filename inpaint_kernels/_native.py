"""Loads the native library, and knows of every kernel whether it can be used and, if not, why.

The library is `libinpaint_native.so` beside this file (a `_native.so` would shadow this module). It holds private
torch ops `inpaint_native::<kernel>`, whose schemas are in `csrc/library.cpp`. A package without the library is
complete: its ops run on the portable and Triton backends.
"""

from __future__ import annotations

import ctypes
import functools
import json
import warnings
from pathlib import Path
from typing import Any, Literal

import torch

from inpaint_kernels._compile import constant_for_compile

NAMESPACE = "inpaint_native"
DispatchKey = Literal["CPU", "CUDA"]

# Which kernels the library must register, and for which devices. Registration through the stable ABI can fail without
# an error (torch 2.11 ignores the return code), so loading checks each pair.
KERNELS: dict[str, tuple[DispatchKey, ...]] = {
    "contextual_attention_key_norm": ("CPU", "CUDA"),
    "contextual_attention_forward": ("CPU",),
    "contextual_attention_backward": ("CPU",),
    "contextual_attention_rows": ("CUDA",),
    "contextual_attention_scores": ("CUDA",),
    "contextual_attention_statistics": ("CUDA",),
    "contextual_attention_paste_weights": ("CUDA",),
    "contextual_attention_paste": ("CUDA",),
    "contextual_attention_matches": ("CUDA",),
    "contextual_attention_softmax_backward": ("CUDA",),
    "contextual_attention_fuse_backward": ("CUDA",),
    "contextual_attention_patch_backward": ("CUDA",),
    "coherent_semantic_attention_forward": ("CPU",),
    "coherent_semantic_attention_backward": ("CPU",),
    "coherent_semantic_attention_pack": ("CUDA",),
    "coherent_semantic_attention_search": ("CUDA",),
    "coherent_semantic_attention_operands": ("CUDA",),
    "coherent_semantic_attention_filter": ("CUDA",),
    "coherent_semantic_attention_generate": ("CUDA",),
    "coherent_semantic_attention_coefficients": ("CUDA",),
    "coherent_semantic_attention_backward_scan": ("CUDA",),
    "coherent_semantic_attention_gradient": ("CUDA",),
    "match_patches": ("CPU",),
    "patchmatch": ("CPU",),
    "patch_vote": ("CPU",),
    "convolution_pack_weight": ("CPU",),
    "convolution_weight_digest": ("CPU",),
    "convolution_weight_gradient": ("CPU",),
    "gated_conv2d": ("CPU",),
    "gated_conv2d_gate_backward": ("CPU",),
    "dilated_conv2d": ("CPU",),
    "partial_conv2d": ("CPU",),
    "hog": ("CPU",),
}

_KEYS: tuple[DispatchKey, ...] = ("CPU", "CUDA")
_LIBRARY = Path(__file__).with_name("libinpaint_native.so")
_RECORD = Path(__file__).with_name("_build.json")

# load() fills both: why the library, and why each (kernel, dispatch key), cannot be used; None if it can.
_library_reason: str | None = None
_kernel_reasons: dict[tuple[str, str], str | None] = {}


def load() -> None:
    """Loads the library and checks its registrations; called once, when the package is imported.

    Never raises: `reason()` and `why_not()` tell what is absent and why. A library that is there but cannot be used is
    a broken installation and warns.
    """
    global _library_reason
    _library_reason = _load_library()
    cuda_reason = None if _library_reason else _cuda_reason()
    for kernel, keys in KERNELS.items():
        for key in _KEYS:
            reason = _library_reason
            if reason is None and key not in keys:
                reason = f"{kernel} has no {key} kernel"
            if reason is None and key == "CUDA":
                reason = cuda_reason
            _kernel_reasons[kernel, key] = reason
    if _library_reason is None:
        _check_registrations()


def available(kernel: str, key: DispatchKey) -> bool:
    """Whether `inpaint_native::<kernel>` can be called with tensors of this device type."""
    return why_not(kernel, key) is None


def why_not(kernel: str, key: DispatchKey) -> str | None:
    """The sentence that says why `available(kernel, key)` is False; None when it is True."""
    try:
        return _kernel_reasons[kernel, key]
    except KeyError:
        return f"there is no kernel {NAMESPACE}::{kernel}"


def reason() -> str | None:
    """Why there is no usable native library; None when it is loaded."""
    return _library_reason


def registered(kernel: str, key: DispatchKey) -> bool:
    """Whether torch's dispatcher knows a kernel for this key, usable on this machine or not."""
    # The name is looked up first: asking the dispatcher about an unknown operator is an internal error of torch.
    return hasattr(getattr(torch.ops, NAMESPACE), kernel) and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"{NAMESPACE}::{kernel}", key
    )


def build_info() -> dict[str, Any]:
    """The build record: version, git commit, torch headers, compilers, flags, CUDA architectures.

    Empty when the package runs from a checkout that was never installed.
    """
    if not _RECORD.is_file():
        return {}
    record: dict[str, Any] = json.loads(_RECORD.read_text(encoding="utf-8"))
    return record


def _load_library() -> str | None:
    """Loads the library; the reason if there is none that can be used."""
    if not _LIBRARY.is_file():
        return f"this installation has no native library: {build_info().get('reason') or 'it was not built'}"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        reason = f"the native library does not load with torch {torch.__version__}: {error}"
        warnings.warn(f"inpaint_kernels: {reason}", RuntimeWarning, stacklevel=3)
        return reason
    return None


def _check_registrations() -> None:
    """Marks every pair of KERNELS that the loaded library did not register, and warns about them together."""
    compiled = _KEYS if build_info().get("cuda") else ("CPU",)
    pairs = [(kernel, key) for kernel, keys in KERNELS.items() for key in keys if key in compiled]
    lost = [(kernel, key) for kernel, key in pairs if not registered(kernel, key)]
    if not lost:
        return
    names = ", ".join(f"{kernel} ({key})" for kernel, key in lost)
    reason = f"the native library is older than the Python code, or broken: it lacks {names}; install the package again"
    for pair in lost:
        _kernel_reasons[pair] = reason
    warnings.warn(f"inpaint_kernels: {reason}", RuntimeWarning, stacklevel=3)


def raise_if_interrupted(error: RuntimeError) -> None:
    """Raises KeyboardInterrupt for the error with which a kernel stops when Python has a signal pending."""
    if "inpaint_kernels: interrupted" in str(error):
        raise KeyboardInterrupt from None


def _cuda_reason() -> str | None:
    """Why CUDA kernels cannot run here, by the build, the torch and the driver; None when they can."""
    info = build_info()
    if not info.get("cuda"):
        return f"the native library was built without CUDA kernels: {info.get('cuda_reason') or 'no build record'}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    driver = _driver_cuda_version()
    if driver is None:
        return "no NVIDIA driver was found"
    # A driver runs programs of every CUDA release of its own major version and of older ones.
    linked = [int(part) for part in str(info["nvcc"]).split(".")]
    if driver[0] < linked[0]:
        has, wants = f"{driver[0]}.{driver[1]}", f"{linked[0]}.{linked[1]}"
        return (
            f"driver {has} < {wants}: the NVIDIA driver runs CUDA up to {has}, the kernels were built with {wants}; "
            f"update the driver, or build from source with INPAINT_CUDA_HOME set to a CUDA {driver[0]} toolkit"
        )
    return None


@constant_for_compile
def gpu_reason(index: int, bfloat16: bool = False) -> str | None:
    """Why GPU number `index` runs none of the library's kernels, or no products of bfloat16 maps; None if it does."""
    return _gpu_reason(index, bfloat16)


@functools.cache
def _gpu_reason(index: int, bfloat16: bool) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    has, built = f"{capability[0]}.{capability[1]}", build_info().get("cuda_arch", [])
    if not any(_runs(part, capability) for part in built):
        return (
            f"cuda:{index} has compute capability {has}, the kernels were built for {', '.join(built) or 'none'}; "
            f"build from source with INPAINT_CUDA_ARCH={has.replace('.', '')}"
        )
    if bfloat16 and capability < (8, 0):
        return f"cuda:{index} has compute capability {has}, bfloat16 needs 8.0"
    return None


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs code for an architecture as INPAINT_CUDA_ARCH names it: "80", "90a", "100f", "90+PTX".

    Machine code runs on GPUs of the same major version that are no older; PTX on every GPU that is no older, except
    that "a" is for that very GPU and "f" for its family.
    """
    name, _, ptx = architecture.partition("+")
    kind = name[-1] if name[-1] in "af" else ""
    built = divmod(int(name.removesuffix(kind) if kind else name), 10)
    if kind == "a":
        return capability == built
    return capability >= built and (capability[0] == built[0] or (ptx == "PTX" and not kind))


def _driver_cuda_version() -> tuple[int, int] | None:
    """The newest CUDA release that the driver supports, or None without a driver.

    Asks the driver itself: unlike `torch.cuda.is_available()` this initialises nothing, so a process may still fork.
    """
    version = ctypes.c_int(0)
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return divmod(version.value // 10, 100) if status == 0 else None
