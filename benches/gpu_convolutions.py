"""Every distinct convolution of the networks at the sizes of a GPU: ours, published code, and the same compiled.

The generator of DeepFill v2 and the dilated layers of GLCIC on an image of 2000x2000, the partial U-Net on 2048x2048,
in bfloat16, tf32 and float32. torch.compile takes part in channels_last, the layout that it would choose; cuDNN may
choose the quickest of its algorithms for everybody.

Where Triton has two ways, the epilogue inside its own product or behind cuDNN's, both are timed beside the one that the
op goes: of these figures its rule is made. Dilated layers also race with deterministic algorithms asked for, for which
torch once left cuDNN (pytorch#28777); 2.11 does not.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from benches.convolution_case import (
    CHANNELS_LAST,
    COMPILED,
    DEEPFILL_V2,
    EAGER,
    GLCIC,
    NETWORKS,
    OURS,
    PCONV_UNET,
    ConvolutionCase,
    Inputs,
    delivered_channels,
)
from benches.harness import BFLOAT16, FLOAT32, TF32, Outputs, Provider, products_in
from inpaint_kernels.triton_kernels import _launch_config as launch

SIZES: Final = {DEEPFILL_V2: 2000, GLCIC: 2000, PCONV_UNET: 2048}
CAPABILITY: Final = (9, 0)

IN_GEMM, BEHIND_CUDNN = "ours in GEMM", "ours behind cuDNN"
DETERMINISTIC: Final = " deterministic"
FIELD: Final = (EAGER, EAGER + CHANNELS_LAST, COMPILED + CHANNELS_LAST, OURS, OURS + CHANNELS_LAST)
WAYS: Final = (IN_GEMM + CHANNELS_LAST, BEHIND_CUDNN + CHANNELS_LAST)
DETERMINISTIC_FIELD: Final = (
    EAGER + DETERMINISTIC,
    EAGER + DETERMINISTIC + CHANNELS_LAST,
    OURS + DETERMINISTIC,
    OURS + DETERMINISTIC + CHANNELS_LAST,
)


@dataclass(frozen=True)
class GpuConvolutionCase(ConvolutionCase):
    """One race: a layer of a network that is given a square image, forward, without gradients."""

    device: str = "cuda"

    @property
    def baseline(self) -> str | None:
        return None

    @property
    def is_dilated(self) -> bool:
        return self.layer.dilation > 1

    @property
    def provider_names(self) -> Sequence[str]:
        return [*FIELD, *WAYS, *(DETERMINISTIC_FIELD if self.is_dilated else ())]

    def provider(self, name: str) -> Provider:
        plain = super().provider(name)
        settings = functools.partial(torch_settings, self.precision, DETERMINISTIC in name)
        run = functools.partial(_run_with, settings, plain.run)
        return replace(plain, run=run, warm_up=run)

    def forward(self, name: str) -> Callable[[Inputs], Outputs]:
        name = name.removesuffix(DETERMINISTIC)
        if name not in (IN_GEMM, BEHIND_CUDNN):
            return super().forward(name)
        return functools.partial(_run_one_way, self.layer.op, name == IN_GEMM, super().forward(OURS))

    def facts(self) -> Mapping[str, Any]:
        """``our_flops`` and ``our_bytes`` are what ours plans to do; ``batch`` is 1."""
        our_flops, our_bytes = planned_work(self)
        return {**super().facts(), "batch": 1, "our_flops": our_flops, "our_bytes": our_bytes}


def cases() -> list[GpuConvolutionCase]:
    """What ``make gpu`` runs, the most wanted first: time may run out."""
    wanted = [
        (GLCIC, TF32),
        (DEEPFILL_V2, BFLOAT16),
        (GLCIC, BFLOAT16),
        (GLCIC, FLOAT32),
        (DEEPFILL_V2, TF32),
        (PCONV_UNET, BFLOAT16),
        (DEEPFILL_V2, FLOAT32),
        (PCONV_UNET, TF32),
        (PCONV_UNET, FLOAT32),
    ]
    return [
        GpuConvolutionCase(network, layer, SIZES[network], precision)
        for network, precision in wanted
        for layer in NETWORKS[network]
    ]


# Settings ------------------------------------------------------------------------------------------------------------


@contextmanager
def torch_settings(precision: str, deterministic: bool) -> Iterator[None]:
    """What torch may do: use tf32, try algorithms out, and whether two runs must give the same bits."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = deterministic, not deterministic
    try:
        with products_in(precision):
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def _run_with(settings: Callable[[], Any], run: Callable[[], Outputs]) -> Outputs:
    with settings():
        return run()


def _run_one_way(op: str, inside: bool, forward: Callable[[Inputs], Outputs], inputs: Inputs) -> Outputs:
    """The op, whatever the rule of its Triton backend says of the layer."""
    module = vars(importlib.import_module(f"inpaint_kernels.triton_kernels.{op}"))
    rule = module["in_gemm"]
    module["in_gemm"] = lambda layer, capability: (inside, "asked for")
    try:
        return forward(inputs)
    finally:
        module["in_gemm"] = rule


# What is planned -----------------------------------------------------------------------------------------------------


def planned_work(case: GpuConvolutionCase) -> tuple[int, int]:
    """Operations of our product, in whole tiles, and bytes that its kernels move, in channels_last.

    Inside the product every program along the columns reads the input, each pixel of it once. Behind cuDNN, whose
    product is taken to do no more than the least, the whole output of the convolution, and a masked input, is written
    and read again.
    """
    layer, element, least = case.layer, case.dtype.itemsize, ConvolutionCase.facts(case)
    product = launch.Layer(
        outputs=case.output_side**2,
        channels_in=layer.inputs,
        taps=layer.kernel**2,
        columns=layer.outputs,
        precision=_product_precision(case.precision),
        masked=layer.op == "partial_conv2d",
        dilation=layer.dilation,
    )
    if not launch.in_gemm(product, CAPABILITY)[0]:
        again = layer.outputs * product.outputs + (layer.inputs * case.input_side**2 if product.masked else 0)
        return least["flops"], least["bytes"] + 2 * element * again
    padded = product.padded
    config = launch.launch_config(padded, CAPABILITY)
    columns = math.ceil(padded.columns / config.width)
    rows = math.ceil(padded.outputs / config.block_m) * config.block_m
    depth = math.ceil(padded.depth / config.block_k) * config.block_k
    input_map = element * padded.channels_in * case.input_side**2
    output_map = element * delivered_channels(layer) * padded.outputs
    copied = 2 * input_map if padded.channels_in != layer.inputs else 0
    weights = element * padded.depth * layer.outputs
    return 2 * rows * columns * config.width * depth, columns * input_map + copied + output_map + weights


def _product_precision(precision: str) -> launch.Precision:
    return {BFLOAT16: "bfloat16", TF32: "tf32", FLOAT32: "float32"}[precision]  # type: ignore[return-value]
