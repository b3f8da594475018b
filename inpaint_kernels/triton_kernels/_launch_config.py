"""How the implicit GEMM is launched, and for which layers it is: predictions, where no GPU has measured them.

Nothing is tuned while a program runs. The functions here depend on a layer's shape, its precision and the GPU's
compute capability alone, so a layer always runs the same kernel.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from inpaint_kernels.portable._convolution import Geometry

Precision = Literal["bfloat16", "float16", "tf32", "float32"]
Capability = tuple[int, int]

SHARED_BUDGET = 99 << 10
"""Bytes of shared memory of a program: what any GPU from sm_80 on grants, and on sm_90 two programs fit."""

LARGEST_STAGES = 4
PROGRAMS_WANTED = 264
"""Two for each multiprocessor of a large GPU: with fewer, tiles have half as many pixels."""

SUMS_OF_FOUR_WARPS = {2: 96, 4: 64}
"""Most sums of each thread of four warps, by the bytes of an operand; eight warps share a tile that has more."""

READ_COST = 64
"""Columns that cost as much as reading the input's tile once more, which every program along the columns does."""

MOST_COLUMNS_IN_GEMM = {2: 192, 4: 96}
"""By the bytes of an operand."""

MOST_DILATION_OF_CUDNN = 8
"""With 16 its fast kernels do not run (cuDNN 9, H200): 256 channels at 500 x 500 take 1.53 ms in tf32, with 8 they take
0.83, in the implicit GEMM 0.92; in bfloat16 0.68, 0.44 and 0.47. At 140 x 140 in bfloat16 cuDNN chose a kernel that
took 29 ms."""


class Layer(NamedTuple):
    """A convolution as a product: [outputs, taps * channels_in] times [taps * channels_in, columns].

    Attributes:
        outputs: output pixels of the whole batch.
        channels_in: channels of the input.
        taps: positions of the kernel.
        columns: output channels of the convolution, features and gates together.
        precision: what is multiplied; sums are float32.
        masked: a mask multiplies the input, and takes as much memory on its way.
        dilation: from tap to tap, along the axis where it is the larger.
    """

    outputs: int
    channels_in: int
    taps: int
    columns: int
    precision: Precision
    masked: bool = False
    dilation: int = 1

    @property
    def element_size(self) -> int:
        """Bytes of an element of the operands."""
        return 2 if self.precision in ("bfloat16", "float16") else 4

    @property
    def depth(self) -> int:
        """Products of a sum."""
        return self.taps * self.channels_in

    @property
    def padded(self) -> Layer:
        """The layer that runs: with channels of zeros where a pixel's are not whole 8 bytes in memory.

        Without them every element has an address and a bound of its own, not every 16 bytes: compiled for sm_90 the
        first layer of DeepFill v2 (5 channels) takes 37 % more instructions and reads 2 bytes at a time. A copy of the
        few channels of a network's input costs little.
        """
        if self.channels_in * self.element_size % 8 == 0:
            return self
        granule = 16 // self.element_size
        return self._replace(channels_in=math.ceil(self.channels_in / granule) * granule)


class LaunchConfig(NamedTuple):
    """Tiles of the implicit GEMM.

    Attributes:
        block_m: output pixels of a program.
        block_n: columns of an accumulator, a power of two.
        tiles: accumulators of a program; three of them fit channel counts 3 * 2^k without waste.
        block_k: products per step; steps run over (tap, channel), and lie within a tap if it divides channels_in.
        warps: warps of a program.
        stages: steps that are under way at once.
    """

    block_m: int
    block_n: int
    tiles: int
    block_k: int
    warps: int
    stages: int

    @property
    def width(self) -> int:
        """Columns of a program."""
        return self.block_n * self.tiles

    def shared_bytes(self, layer: Layer) -> int:
        """Shared memory of the tiles of input, mask and weights."""
        rows = self.block_m * (2 if layer.masked else 1)
        return self.stages * (rows + self.width) * self.block_k * layer.element_size


def layer_of(x: Tensor, weight: Tensor, geometry: Geometry, *, masked: bool = False) -> Layer:
    """The product that a convolution is."""
    columns, channels_in, *kernel = weight.shape
    height, width = geometry.output_size((x.shape[2], x.shape[3]), (kernel[0], kernel[1]))
    outputs = x.shape[0] * height * width
    taps, dilation = kernel[0] * kernel[1], max(geometry.dilation)
    return Layer(outputs, channels_in, taps, columns, precision_of(x.dtype), masked, dilation)


def precision_of(dtype: torch.dtype) -> Precision:
    """What a product of this dtype multiplies; float32 becomes tf32 where torch lets cuDNN's convolutions use it."""
    if dtype == torch.float32:
        return "tf32" if convolutions_may_use_tf32() else "float32"
    return "bfloat16" if dtype == torch.bfloat16 else "float16"


def convolutions_may_use_tf32() -> bool:
    """Torch's own setting, True unless the user says otherwise."""
    cudnn: Any = torch.backends.cudnn
    # The older cudnn.allow_tf32 raises where convolutions and recurrent networks differ, which this one does not.
    if hasattr(cudnn, "conv"):
        return bool(cudnn.conv.fp32_precision == "tf32")
    return bool(cudnn.allow_tf32)


def capability_of(x: Tensor) -> Capability:
    """Compute capability of the tensor's GPU; that of the least one for a tensor that Triton's interpreter takes."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)


@functools.lru_cache(maxsize=1024)
def launch_config(layer: Layer, capability: Capability) -> LaunchConfig:
    """The tiles for a :attr:`Layer.padded` layer.

    Measured for bfloat16 on an H200: of sixteen tiles around these none is more than 10 % faster for any layer
    of DeepFill v2 with at most 96 channels.
    """
    if layer.precision == "float32":
        return _config_without_tensor_cores(layer)
    block_n, tiles = _columns(layer.columns, capability)
    block_m = 128
    if math.ceil(layer.outputs / block_m) * math.ceil(layer.columns / (block_n * tiles)) < PROGRAMS_WANTED:
        block_m = 64
    warps = 4 if block_m * block_n * tiles <= 4 * 32 * SUMS_OF_FOUR_WARPS[layer.element_size] else 8
    wide = LaunchConfig(block_m, block_n, tiles, 64, warps, 3)
    if layer.channels_in % 64 == 0 and wide.shared_bytes(layer) <= SHARED_BUDGET:
        return _with_stages(wide, layer)
    narrow = _with_stages(wide._replace(block_k=_depth(layer, 32)), layer)
    if layer.element_size == 2 and narrow.block_k > layer.channels_in > narrow.block_k // 2 and narrow.width >= 32:
        # A step reaches over taps, so every 16 bytes have an address of their own: eight warps compute them in 466
        # instead of 579 us (24 channels, 24 columns, 2000 x 2000, H200); a fourth stage costs a sixth.
        return narrow._replace(warps=8, stages=min(narrow.stages, 3))
    return narrow


def in_gemm(layer: Layer, capability: Capability) -> tuple[bool, str]:
    """Whether the implicit GEMM runs a layer, or cuDNN and one fused kernel for what follows; and why.

    The epilogue inside the product saves one write and one read of its output. Where that memory traffic decides, it
    wins even with a product that is much slower than cuDNN's; where the product decides it must reach 76 to 84 % of
    cuDNN's rate. On an H200 it is the faster one on every layer of DeepFill v2 in bfloat16 that was measured, from
    3 to 96 channels and 3 to 192 columns: 0.18 instead of 0.20 ms, up to 0.75 instead of 2.1. With 256 columns cuDNN
    is, by a tenth, unless the layer is dilated by more than it is fast at.
    """
    if layer.precision == "float32":
        return False, "float32 without tf32: the product decides, and cuDNN's is the faster (predicted, not measured)"
    most = MOST_COLUMNS_IN_GEMM[layer.element_size]
    if layer.columns <= most:
        return True, f"{layer.columns} <= {most} output channels of the convolution: memory traffic decides"
    if layer.dilation > MOST_DILATION_OF_CUDNN:
        return True, f"dilation {layer.dilation} > {MOST_DILATION_OF_CUDNN}: the product decides, cuDNN's is the slower"
    return False, f"{layer.columns} > {most} output channels of the convolution: the product decides"


def _columns(columns: int, capability: Capability) -> tuple[int, int]:
    """Columns of an accumulator and accumulators per program."""
    shapes = [(16, 1), (32, 1), (16, 3), (64, 1), (32, 3), (128, 1), (64, 3)]
    if capability >= (9, 0):
        # A product of a warp group reads its rows of the input from shared memory anew for every accumulator, which
        # 16 columns do not repay: 48 channels run as 64.
        shapes.remove((16, 3))

    def cost(shape: tuple[int, int]) -> tuple[int, int]:
        width = shape[0] * shape[1]
        programs = math.ceil(columns / width)
        return programs * (width + READ_COST), programs * width

    return min(shapes, key=cost)


def _config_without_tensor_cores(layer: Layer) -> LaunchConfig:
    """Small tiles: what threads multiply lies in registers, beside the sums."""
    block_n, tiles = _columns(layer.columns, (8, 0))
    if block_n * tiles > 96:
        block_n, tiles = 64, 1
    return _with_stages(LaunchConfig(64, block_n, tiles, _depth(layer, 16), 4, 3), layer)


def _depth(layer: Layer, most: int) -> int:
    """A power of two from 16 on: no longer than the whole sum needs."""
    return min(most, max(16, 1 << (layer.depth - 1).bit_length()))


def _with_stages(config: LaunchConfig, layer: Layer) -> LaunchConfig:
    """As many stages as shared memory has room for and steps there are."""
    one = config._replace(stages=1).shared_bytes(layer)
    steps = math.ceil(layer.depth / config.block_k)
    return config._replace(stages=max(1, min(LARGEST_STAGES, SHARED_BUDGET // one, steps)))
