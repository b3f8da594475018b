"""Compiles the Triton kernels to machine code without a GPU, and reads what they take of one.

Run as ``python -m tests.triton_compilation quick|all|planted|hog-quick|hog|hog-planted``, in a process without
TRITON_INTERPRET; prints JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from inpaint_kernels.portable._convolution import Activation, Geometry
from inpaint_kernels.portable.hog import Settings, feature_dtype
from inpaint_kernels.triton_kernels import _epilogues as epilogues
from inpaint_kernels.triton_kernels import _hog_kernels as hog
from inpaint_kernels.triton_kernels import _implicit_gemm as gemm
from inpaint_kernels.triton_kernels._hog_launch import arithmetic_of
from inpaint_kernels.triton_kernels._launch import Launch, Layout
from inpaint_kernels.triton_kernels._launch_config import Capability, LaunchConfig, Layer, Precision, launch_config
from inpaint_kernels.triton_kernels._packed_weights import pack

CAPABILITIES: list[Capability] = [(8, 0), (9, 0)]
DTYPES: dict[Precision, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Shape(NamedTuple):
    """A layer of a network, its input of ``size`` squared."""

    name: str
    channels_in: int
    columns: int
    size: int
    kernel: int = 3
    stride: int = 1
    upsample: int = 1
    gated: bool = True


# Every distinct layer of the DeepFill v2 generator at 2000 x 2000: columns are features and gates.
DEEPFILL_V2 = [
    Shape("conv1", 5, 48, 2000, kernel=5),
    Shape("conv2_downsample", 24, 96, 2000, stride=2),
    Shape("conv3", 48, 96, 1000),
    Shape("conv4_downsample", 48, 192, 1000, stride=2),
    Shape("conv5", 96, 192, 500),
    Shape("conv13_upsample", 96, 96, 500, upsample=2),
    Shape("conv14", 48, 96, 1000),
    Shape("conv15_upsample", 48, 48, 1000, upsample=2),
    Shape("conv16", 24, 24, 2000),
    Shape("conv17", 12, 3, 2000, gated=False),
    Shape("xconv1", 3, 48, 2000, kernel=5),
    Shape("xconv2_downsample", 24, 48, 2000, stride=2),
    Shape("allconv11", 192, 192, 500),
]
OTHER_SIZES = (128, 256)  # of the image: few output pixels take other tiles


@dataclass(frozen=True)
class Case:
    """A launch to compile."""

    name: str
    launch: Launch
    capability: Capability
    precision: str


def planted_cases() -> Iterator[Case]:
    """Tiles that are too large for a GPU."""
    config = LaunchConfig(block_m=128, block_n=128, tiles=3, block_k=64, warps=4, stages=3)
    yield gated(DEEPFILL_V2[4], "bfloat16", (8, 0), config=config)


def quick_cases() -> Iterator[Case]:
    """One of every kernel, epilogue and kind of tile."""
    shapes = {shape.name: shape for shape in DEEPFILL_V2}
    yield gated(shapes["conv5"], "bfloat16", (9, 0), keep=True)
    yield gated(shapes["conv1"], "tf32", (9, 0))
    yield gated(shapes["conv15_upsample"], "float16", (8, 0), layout=Layout.NCHW, reflect=True)
    yield gated(shapes["conv3"], "float32", (8, 0))
    yield plain(shapes["conv5"], "float16", (9, 0), residual=True)
    yield plain(shapes["conv17"], "bfloat16", (8, 0))
    yield partial(shapes["conv3"], "bfloat16", (8, 0), mask_channels=2)
    yield partial(shapes["conv13_upsample"]._replace(upsample=1), "tf32", (9, 0))
    yield from epilogue_cases(shapes["conv5"], "bfloat16", (9, 0), Layout.CHANNELS_LAST)


def all_cases() -> Iterator[Case]:
    """Every layer in every precision on every architecture, the gate being the largest epilogue; the others on some."""
    for capability in CAPABILITIES:
        for precision in DTYPES:
            for shape in [*DEEPFILL_V2, *smaller(DEEPFILL_V2, precision, capability)]:
                yield (
                    gated(shape, precision, capability, keep=True)
                    if shape.gated
                    else plain(shape, precision, capability)
                )
            for shape in DEEPFILL_V2[:9:4]:
                yield gated(shape, precision, capability, layout=Layout.NCHW, reflect=True)
                yield plain(shape, precision, capability, residual=True)
                yield partial(shape, precision, capability)
            for layout in Layout:
                yield from epilogue_cases(DEEPFILL_V2[4], precision, capability, layout)
        yield partial(DEEPFILL_V2[4], "bfloat16", capability, mask_channels=2)
        yield gated(DEEPFILL_V2[8]._replace(size=16_000), "bfloat16", capability, keep=True)  # needs 64-bit offsets


def smaller(shapes: list[Shape], precision: Precision, capability: Capability) -> Iterator[Shape]:
    """The same layers of smaller images, those with other tiles."""
    for shape in shapes:
        seen = {tiles_of(shape, precision, capability)}
        for size in OTHER_SIZES:
            small = shape._replace(name=f"{shape.name}@{size}", size=shape.size * size // 2000)
            tiles = tiles_of(small, precision, capability)
            if tiles not in seen:
                seen.add(tiles)
                yield small


def tiles_of(shape: Shape, precision: Precision, capability: Capability) -> LaunchConfig:
    outputs = (shape.size * shape.upsample // shape.stride) ** 2
    return launch_config(
        Layer(outputs, shape.channels_in, shape.kernel**2, shape.columns, precision).padded, capability
    )


def gated(
    shape: Shape,
    precision: Precision,
    capability: Capability,
    *,
    keep: bool = False,
    layout: Layout = Layout.CHANNELS_LAST,
    reflect: bool = False,
    config: LaunchConfig | None = None,
) -> Case:
    x, y, vector, geometry = tensors(shape, precision, layout, shape.columns // 2, reflect=reflect)
    gates = layout.empty(x, y.shape[1], (y.shape[2], y.shape[3])) if keep else None
    epilogue = gemm.Epilogue("gated", vector, Activation("elu"), gates=gates)
    return convolution_case(shape, precision, capability, x, y, geometry, epilogue, layout, config=config)


def plain(shape: Shape, precision: Precision, capability: Capability, *, residual: bool = False) -> Case:
    x, y, vector, geometry = tensors(shape, precision, Layout.CHANNELS_LAST, shape.columns)
    epilogue = gemm.Epilogue("plain", vector, Activation("relu"), residual=y.clone() if residual else None)
    return convolution_case(shape, precision, capability, x, y, geometry, epilogue, Layout.CHANNELS_LAST)


def partial(shape: Shape, precision: Precision, capability: Capability, *, mask_channels: int = 1) -> Case:
    x, y, vector, geometry = tensors(shape, precision, Layout.CHANNELS_LAST, shape.columns)
    maps = torch.empty(1, 1, *y.shape[2:], device="meta")
    epilogue = gemm.Epilogue("partial", vector, scale=maps, shift=maps)
    segments = torch.empty(shape.channels_in, dtype=torch.int32, device="meta") if mask_channels > 1 else None
    mask = gemm.InputMask(x.new_empty(1, mask_channels, *x.shape[2:]), segments)
    return convolution_case(shape, precision, capability, x, y, geometry, epilogue, Layout.CHANNELS_LAST, mask)


def convolution_case(
    shape: Shape,
    precision: Precision,
    capability: Capability,
    x: Tensor,
    y: Tensor,
    geometry: Geometry,
    epilogue: gemm.Epilogue,
    layout: Layout,
    mask: gemm.InputMask | None = None,
    config: LaunchConfig | None = None,
) -> Case:
    outputs = y.shape[0] * y.shape[2] * y.shape[3]
    layer = Layer(outputs, shape.channels_in, shape.kernel**2, shape.columns, precision, mask is not None).padded
    config = config or launch_config(layer, capability)
    weight = x.new_empty(shape.columns, shape.channels_in, shape.kernel, shape.kernel)
    packed = pack(weight, gemm.packing_for(layer, config, epilogue))
    kernel = (shape.kernel, shape.kernel)
    launch = gemm.convolution(
        gemm.as_read(x, layer.channels_in), kernel, packed, geometry, layer, config, epilogue, y, layout, mask
    )
    return Case(f"{shape.name} {epilogue.kind} {precision} {config}", launch, capability, precision)


def epilogue_cases(shape: Shape, precision: Precision, capability: Capability, layout: Layout) -> Iterator[Case]:
    """The fused kernels behind cuDNN."""
    _, y, vector, _ = tensors(shape, precision, layout, shape.columns // 2)
    size = (y.shape[2], y.shape[3])
    raw, maps = layout.empty(y, shape.columns, size), torch.empty(1, 1, *size, device="meta")
    elu, relu = Activation("elu"), Activation("relu")
    for launch in (
        epilogues.gate(raw, vector, elu, False, y, y, layout),
        epilogues.gate_backward(y, y, y, elu, False, raw, layout),
        epilogues.activation_in_place(raw, vector, relu, raw, layout),
        epilogues.renormalise_in_place(raw, vector, maps, maps, layout),
    ):
        yield Case(f"{launch.kernel.fn.__name__} {precision} {layout.name}", launch, capability, precision)


def tensors(
    shape: Shape, precision: Precision, layout: Layout, channels: int, *, reflect: bool = False
) -> tuple[Tensor, Tensor, Tensor, Geometry]:
    """x, y, a vector of all columns and the geometry, without memory behind them."""
    side = (shape.kernel - 1) // 2
    geometry = Geometry((shape.stride,) * 2, (side,) * 4, (1, 1), upsample=shape.upsample, reflect=reflect)
    size = geometry.output_size((shape.size, shape.size), (shape.kernel, shape.kernel))
    like = torch.empty(1, 0, 1, 1, dtype=DTYPES[precision], device="meta")
    x = Layout.CHANNELS_LAST.empty(like, shape.channels_in, (shape.size, shape.size))
    return x, layout.empty(x, channels, size), x.new_empty(shape.columns), geometry


def hog_cases() -> Iterator[Case]:
    """The kernels of hog for every dtype, and what changes their shape: channels, bins, cells, blocks, norms."""
    for capability in CAPABILITIES:
        for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32):
            yield from hog_launches(capability, dtype, 3)
        for dtype in (torch.uint8, torch.float32):
            yield from hog_launches(capability, dtype, 1, size=16_000, norm="L1-sqrt")
        yield from hog_launches(capability, torch.uint8, 3, root=True, norm="L1")
        yield from hog_launches(capability, torch.float32, 7, orientations=32, cell=(200, 150), block=(1, 1))
        yield from hog_launches(capability, torch.float32, 3, orientations=12, cell=(6, 7), block=(16, 16), norm="L2")
        yield from hog_launches(capability, torch.float32, 3, orientations=2, cell=(3, 1), batch=1200)  # 64-bit offsets


def hog_quick_cases() -> Iterator[Case]:
    """One of every kernel and arithmetic."""
    yield from hog_launches((9, 0), torch.float32, 3)
    yield next(hog_launches((8, 0), torch.uint8, 3))
    yield from itertools.islice(hog_launches((8, 0), torch.float64, 3), 2)


def hog_planted_cases() -> Iterator[Case]:
    """Fused multiply-adds where none may be."""
    case = next(hog_launches((9, 0), torch.float32, 3))
    yield replace(case, launch=case.launch._replace(options={**case.launch.options, "enable_fp_fusion": True}))


def hog_launches(
    capability: Capability,
    dtype: torch.dtype,
    channels: int,
    *,
    batch: int = 1,
    size: int = 2000,
    orientations: int = 9,
    cell: tuple[int, int] = (8, 8),
    block: tuple[int, int] = (3, 3),
    norm: str = "L2-Hys",
    root: bool = False,
) -> Iterator[Case]:
    """The three launches of a call with ``visualize``, without memory behind them."""
    settings = Settings(orientations, cell, block, norm, root, False)
    images = torch.empty(batch, channels, size, size, dtype=dtype, device="meta")
    cells = images.new_empty(batch, *settings.cells_of(images), orientations, dtype=feature_dtype(images))
    blocks = cells.new_empty(settings.features_of(images))
    lines = torch.empty(1, 1, orientations, *cell, dtype=torch.bool, device="meta")
    picture = cells.new_empty(batch, size, size)
    for launch in (
        hog.fill_cells(images, cells, settings, arithmetic_of(images, root)),
        hog.fill_blocks(cells, blocks, settings),
        hog.draw(cells, lines, picture, settings),
    ):
        name = f"{launch.kernel.fn.__name__} {list(images.shape)} {dtype} {settings}"
        yield Case(name, launch, capability, str(dtype).removeprefix("torch."))


# Compilation ----------------------------------------------------------------------------------------------------------


class Gpu:
    """Stands in for Triton's driver: the device number is the architecture. Kernels are compiled, never launched."""

    def __init__(self, capability: Capability) -> None:
        self.architecture = 10 * capability[0] + capability[1]

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def compiled(case: Case) -> Any:
    """The kernel as Triton compiles it for the very call that the launch makes."""
    triton.runtime.driver.set_active(Gpu(case.capability))
    return case.launch.kernel.run(grid=case.launch.grid, warmup=True, **case.launch.keywords)


def usage(case: Case) -> dict[str, Any]:
    """Registers, instructions that access local memory (spills) and bytes of shared memory, from the machine code."""
    result = compiled(case)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        report = output_of("cuobjdump", "-res-usage", file.name)
        code = output_of("nvdisasm", "-c", file.name)
    (registers,) = re.findall(r"\bREG:(\d+)", report)
    assert re.search(r"\bEXIT\b", code), code[:1000]
    major, minor = case.capability
    return {
        "case": case.name,
        "kernel": case.launch.kernel.fn.__name__,
        "precision": case.precision,
        "architecture": f"sm_{major}{minor}",
        "registers": int(registers),
        # Not the size of the stack: ptxas sometimes reserves 8 bytes that no instruction touches.
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "shared": result.metadata.shared,
        "constants": sorted(set(re.findall(r"\b0d([0-9A-F]{16})\b", result.asm["ptx"]))),
        "fused": len(re.findall(r"\b[FD]FMA\b", code)),
        "products": sorted(set(re.findall(r"\b(wgmma\.mma_async|mma\.sync)\b", result.asm["ptx"]))),
    }


def output_of(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    cases = {
        "quick": quick_cases,
        "all": all_cases,
        "planted": planted_cases,
        "hog-quick": hog_quick_cases,
        "hog": hog_cases,
        "hog-planted": hog_planted_cases,
    }
    parser = argparse.ArgumentParser()
    parser.add_argument("which", choices=cases)
    print(json.dumps([usage(case) for case in cases[parser.parse_args().which]()], indent=0))


if __name__ == "__main__":
    main()
