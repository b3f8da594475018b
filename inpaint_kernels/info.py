"""What ``inpaint-kernels info`` prints: versions, the native library, devices, and the backends of every op."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from inpaint_kernels import _backends, _native

PACKAGES = ("inpaint-kernels", "torch", "numpy", "pillow", "typer", "rich", "triton")


def _two_maps(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    feature_map = torch.zeros(1, 8, 16, 16, device=device)
    return feature_map, feature_map


def _matched_map(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    key = torch.zeros(1, 8, 16, 16, device=device)
    return key, torch.zeros(1, 16, 16, dtype=torch.int64, device=device), torch.zeros(1, 16, 16, device=device)


def _map_with_flags(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(1, 8, 16, 16, device=device), torch.zeros(16, 16, dtype=torch.bool)


def _image(device: torch.device) -> tuple[torch.Tensor]:
    return (torch.zeros(1, 3, 24, 24, dtype=torch.uint8, device=device),)


def _layer(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(1, 8, 16, 16, device=device), torch.zeros(8, 8, 3, 3, device=device)


def _layer_with_mask(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    feature_map, weight = _layer(device)
    return feature_map, torch.ones(1, 1, 16, 16, dtype=torch.bool, device=device), weight


# The smallest sensible call of each op, to ask its backends about; nothing is run.
_EXAMPLES: Mapping[str, Callable[[torch.device], tuple[Any, ...]]] = {
    "coherent_semantic_attention": _map_with_flags,
    "contextual_attention": _two_maps,
    "dilated_conv2d": _layer,
    "gated_conv2d": _layer,
    "hog": _image,
    "match_patches": _two_maps,
    "partial_conv2d": _layer_with_mask,
    "patch_vote": _matched_map,
    "patchmatch": _two_maps,
}


def tables() -> list[Table]:
    """All tables, in the order in which they are printed."""
    return [_versions(), _native_library(), _devices(), _ops()]


def _versions() -> Table:
    table = _key_value_table("Versions")
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        table.add_row(package, _version(package))
    return table


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _native_library() -> Table:
    table = _key_value_table("Native library")
    table.add_row("state", escape(_native.reason() or "loaded"))
    for name, value in _native.build_info().items():
        if value is None:
            continue
        words = " ".join(str(part) for part in value) if isinstance(value, list) else str(value)
        table.add_row(name, escape(words))
    table.add_row("CUDA kernels", escape(_cuda_kernels()))
    return table


def _cuda_kernels() -> str:
    reasons = {_native.why_not(kernel, "CUDA") for kernel, keys in _native.KERNELS.items() if "CUDA" in keys}
    missing = sorted(reason for reason in reasons if reason is not None)
    return f"cannot: {'; '.join(missing)}" if missing else "usable"


def _devices() -> Table:
    table = _key_value_table("Devices")
    table.add_row(
        "cpu",
        f"{os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
    )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        words = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {capability}"
        missing = _native.gpu_reason(index) if _native.build_info().get("cuda") else None
        table.add_row(f"cuda:{index}", words if missing is None else escape(f"{words}; cannot: {missing}"))
    if not torch.cuda.is_available():
        table.add_row("cuda", "no usable CUDA device" if torch.version.cuda else "this torch is built without CUDA")
    return table


def _ops() -> Table:
    """Ops x backends per kind of device: chosen, usable, or the reason why not."""
    table = Table(title="Ops and backends", title_justify="left", show_lines=True)
    for heading in ("op", "device", "chosen", "also usable", "cannot run"):
        table.add_column(heading, overflow="fold")
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for op in _backends.registered_ops():
        for kind in kinds:
            explanation = _backends.explain(op, *_EXAMPLES[op](torch.device(kind)))
            others = [name for name in explanation.usable if name != explanation.chosen]
            cannot = "\n".join(f"{name}: {'; '.join(why)}" for name, why in explanation.cannot.items())
            table.add_row(op, kind, explanation.chosen or "none", ", ".join(others), escape(cannot))
    return table


def _key_value_table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table
