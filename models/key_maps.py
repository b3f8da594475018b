"""Published checkpoints' names and values -> those of our models.

Every function takes the state dict of a public implementation's network, without a container or a common prefix, and
returns the one that our model of that dialect loads with ``strict=True``. Nothing is read but names and values. The
order of colours is left as published; :func:`swap_red_and_blue` is for networks that were trained on BGR.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Final, NamedTuple

import torch
from inpaint_kernels.models import glcic
from inpaint_kernels.models._deepfill import ATTENDED, COARSE, DILATED, LAST, MATCHED, PAINTER, Row
from inpaint_kernels.models.partial_conv_unet import TABLE
from torch import Tensor

State = dict[str, Tensor]
Conversion = Callable[[Mapping[str, Tensor]], State]
Names = dict[str, str]
"""A layer's name in DeepFill's table -> the prefix of its weight and bias in a checkpoint."""


# The order of colours ------------------------------------------------------------------------------------------------


class ColourLayers(NamedTuple):
    """Where a network takes and gives colours; layers by the names of our models.

    Attributes:
        inputs: layer -> the first of the three channels that are colours.
        outputs: layers whose channels are colours; of a gated one its features and its gates.
    """

    inputs: Mapping[str, int]
    outputs: tuple[str, ...]


def swap_red_and_blue(state: Mapping[str, Tensor], layers: ColourLayers) -> State:
    """The network for RGB images that paints what this one does for BGR images: the same values in another order."""
    swapped = dict(state)
    for layer, first in layers.inputs.items():
        weight = swapped[f"{layer}.weight"]
        order = list(range(weight.shape[1]))
        order[first : first + 3] = reversed(order[first : first + 3])
        swapped[f"{layer}.weight"] = weight[:, order]
    for layer in layers.outputs:
        for name in (f"{layer}.weight", f"{layer}.bias"):
            triples = swapped[name].unflatten(0, (-1, 3))
            swapped[name] = triples.flip(1).flatten(0, 1)
    return swapped


# DeepFill: the layers' prefixes ---------------------------------------------------------------------------------------


def _names(rows: Iterable[Row], *last: str) -> list[str]:
    return [*(row.name for row in rows), *last]


def _zip(names: Iterable[str], prefixes: Iterable[str]) -> Names:
    return dict(zip(names, prefixes, strict=True))


def _numbered(prefix: str, numbers: Iterable[int]) -> list[str]:
    return [f"{prefix}{number}" for number in numbers]


def _daa233() -> Names:
    stages = {"coarse_generator": _names(COARSE, LAST[0]), "fine_generator": _second_stage()}
    return {
        name: f"{stage}.{name.removeprefix('x').removesuffix('_upsample')}.conv"
        for stage, names in stages.items()
        for name in names
    }


def _second_stage() -> list[str]:
    return _names(chain(DILATED, MATCHED, ATTENDED, PAINTER), LAST[1])


def _tensorflow_flat() -> Names:
    names = [*_names(COARSE, LAST[0]), *_second_stage()]
    return {name: f"{name}.conv.conv" if name.endswith("_upsample") else f"{name}.conv" for name in names}


def _mmagic(ending: str) -> Names:
    encoder, atrous, painter = range(1, 7), range(4), range(1, 8)
    coarse = [
        *_numbered("stage1.encoder.enc", encoder),
        *_numbered("stage1.dilation_neck.dilation_convs.", atrous),
        *_numbered("stage1.decoder.dec", painter),
    ]
    refined = [
        *_numbered("stage2.encoder_conv.enc", encoder),
        *_numbered("stage2.dilation_neck.dilation_convs.", atrous),
        *_numbered("stage2.encoder_attention.enc", encoder),
        *_numbered("stage2.contextual_attention_neck.conv", (1, 2)),
        *_numbered("stage2.decoder.dec", painter),
    ]
    names = _zip([*_names(COARSE, LAST[0]), *_second_stage()], [*coarse, *refined])
    return {name: prefix + ending for name, prefix in names.items()}


def _nbei() -> Names:
    # A padding stands in front of the strided convolutions, an enlargement before entries 3 and 6.
    down = [f"out.{number}.conv.{int(number in (1, 3))}" for number in range(6)]
    atrous = [f"out.{number}.conv.0" for number in range(4)]
    up = [f"out.{number}.conv.0" for number in (0, 1, 3, 4, 6, 7, 8)]
    coarse = [*_in("stage_1.down", down), *_in("stage_1.atrous", atrous), *_in("stage_1.up", up)]
    refined = [
        *_in("stage_2.down_conv_branch", down),
        *_in("stage_2.atrous", atrous),
        *_in("stage_2.down_attn_branch", down),
        *_in("stage_2.CAttn", atrous[:2]),
        *_in("stage_2.up", up),
    ]
    return _zip([*_names(COARSE, LAST[0]), *_second_stage()], [*coarse, *refined])


def _in(parent: str, children: Iterable[str]) -> list[str]:
    return [f"{parent}.{child}" for child in children]


def _nipponjo() -> Names:
    down = ["down_block1.conv1_downsample", "down_block1.conv2", "down_block2.conv1_downsample", "down_block2.conv2"]
    up = ["up_block1.conv1_upsample.conv", "up_block1.conv2", "up_block2.conv1_upsample.conv", "up_block2.conv2"]
    coarse = ["conv1", *down, *_numbered("conv_bn", range(1, 8)), *up, "conv_to_rgb"]
    refined = [
        "conv_conv1",
        *(f"conv_{name}" for name in down),
        *_numbered("conv_conv_bn", range(1, 6)),
        "ca_conv1",
        *(f"ca_{name}" for name in down),
        *_numbered("ca_conv_bn", (1, 4, 5)),
        *_numbered("conv_bn", (6, 7)),
        *up,
        "conv_to_rgb",
    ]
    names = _zip([*_names(COARSE, LAST[0]), *_second_stage()], [*_in("stage1", coarse), *_in("stage2", refined)])
    return {name: f"{prefix}.conv" for name, prefix in names.items()}


def _csqiangwen() -> Names:
    prefixes = [
        *_numbered("coarse.", range(17)),
        *_numbered("refine_conv.", range(10)),
        *_numbered("refine_atten_1.", range(6)),
        *_numbered("refine_atten_2.", range(2)),
        *_numbered("refine_combine.", range(7)),
    ]
    return _zip([*_names(COARSE, LAST[0]), *_second_stage()], prefixes)


# DeepFill: values -----------------------------------------------------------------------------------------------------


def _renamed(state: Mapping[str, Tensor], theirs: Names, ours: Names) -> State:
    """The same values under our names."""
    return {
        f"{prefix}.{kind}": state[f"{theirs[name]}.{kind}"]
        for name, prefix in ours.items()
        for kind in ("weight", "bias")
    }


def _joined_gates(state: Mapping[str, Tensor], theirs: Names, ours: Names) -> State:
    """Features and gates from one convolution each, those behind an enlargement with spectral norms."""
    joined = {}
    for name, prefix in ours.items():
        inner = f"{theirs[name]}.gated_conv2d" if name.endswith("_upsample") else theirs[name]
        for kind in ("weight", "bias"):
            halves = [_folded(state, f"{inner}.{half}", kind) for half in ("conv2d", "mask_conv2d")]
            joined[f"{prefix}.{kind}"] = torch.cat(halves)
    return joined


def _folded(state: Mapping[str, Tensor], prefix: str, kind: str) -> Tensor:
    if f"{prefix}.{kind}" in state:
        return state[f"{prefix}.{kind}"]
    module = f"{prefix}.module"
    if kind == "bias":
        return state[f"{module}.bias"]
    weight = state[f"{module}.weight_bar"]
    sigma = state[f"{module}.weight_u"] @ weight.flatten(1) @ state[f"{module}.weight_v"]
    return weight / sigma


def _tensorflow(ours: Names) -> Conversion:
    """The variables of the TensorFlow graph: kernels [h, w, in, out]; a layer that enlarges stands one level deeper."""

    def convert(state: Mapping[str, Tensor]) -> State:
        converted = {}
        for name, prefix in ours.items():
            scope = f"inpaint_net/{name}/{name}_conv" if name.endswith("_upsample") else f"inpaint_net/{name}"
            converted[f"{prefix}.weight"] = state[f"{scope}/kernel"].permute(3, 2, 0, 1)
            converted[f"{prefix}.bias"] = state[f"{scope}/bias"]
        return converted

    return convert


def _colour_layers(ours: Names) -> ColourLayers:
    return ColourLayers({ours[name]: 0 for name in ("conv1", "xconv1", "pmconv1")}, tuple(ours[name] for name in LAST))


DEEPFILL_V1: Final[Mapping[str, Conversion]] = {
    "official": _tensorflow(_daa233()),
    "daa233": dict,
    "nbei": lambda state: _renamed(state, _nbei(), _daa233()),
    "mmagic": lambda state: _renamed(state, _mmagic(".conv"), _daa233()),
}
"""Dialect of DeepFill v1 -> conversion of its generator's state."""

DEEPFILL_V1_COLOURS: Final = _colour_layers(_daa233())

DEEPFILL_V2: Final[Mapping[str, Conversion]] = {
    "official": _tensorflow(_tensorflow_flat()),
    "nipponjo_tf": dict,
    "nipponjo": lambda state: _renamed(state, _nipponjo(), _tensorflow_flat()),
    "mmagic": lambda state: _renamed(state, _mmagic(".conv.conv"), _tensorflow_flat()),
    "csqiangwen": lambda state: _joined_gates(state, _csqiangwen(), _tensorflow_flat()),
}
"""Dialect of DeepFill v2 -> conversion of its generator's state."""

DEEPFILL_V2_COLOURS: Final = _colour_layers(_tensorflow_flat())


# GLCIC ----------------------------------------------------------------------------------------------------------------

_NORM_ENTRIES = ("weight", "bias", "running_mean", "running_var")
_COUNT = "num_batches_tracked"  # absent from what older versions of torch saved, and from Torch7


def _glcic(state: Mapping[str, Tensor], places: Iterable[tuple[str, str]]) -> State:
    """From (prefix of a convolution, prefix of its norm) for each layer."""
    ours: State = {}
    for row, (convolution, norm) in zip(glcic.TABLE, places, strict=True):
        entries = ("weight", "bias") if f"{convolution}.bias" in state else ("weight",)
        ours |= {f"{row.name}.{entry}": state[f"{convolution}.{entry}"] for entry in entries}
        if row is not glcic.TABLE[-1]:
            counted = (_COUNT,) if f"{norm}.{_COUNT}" in state else ()
            own = glcic.norm_name(row.name)
            ours |= {f"{own}.{entry}": state[f"{norm}.{entry}"] for entry in (*_NORM_ENTRIES, *counted)}
    return ours


def _mmagic_glcic() -> list[tuple[str, str]]:
    prefixes = [
        *_numbered("encoder.enc", range(1, 7)),
        *_numbered("dilation_neck.dilation_convs.", range(4)),
        *_numbered("decoder.dec", range(1, 8)),
    ]
    return [(f"{prefix}.conv", f"{prefix}.bn") for prefix in prefixes]


_LAYERS = range(len(glcic.TABLE))

GLCIC: Final[Mapping[str, Conversion]] = {
    "otenim": dict,
    "iizuka": lambda state: _glcic(state, [(f"{3 * i}", f"{3 * i + 1}") for i in _LAYERS]),
    "yangwangx": lambda state: _glcic(state, [*((f"{i}.0", f"{i}.1") for i in _LAYERS[:-1]), (f"{_LAYERS[-1]}", "")]),
    "mmagic": lambda state: _glcic(state, _mmagic_glcic()),
}
"""Source of a GLCIC checkpoint (iizuka, yangwangx: conversions of the official one) -> conversion of its state."""

GLCIC_COLOURS: Final = ColourLayers({"conv1": 0}, ("conv17",))


# Partial convolutions -------------------------------------------------------------------------------------------------


def _naoto(state: Mapping[str, Tensor]) -> State:
    ours = {name: value for name, value in state.items() if not name.endswith("mask_conv.weight")}
    for name, value in ours.items():
        if name.endswith("input_conv.weight"):
            ours[name] = value / value[0].numel()
    return ours


def _mmagic_partial(state: Mapping[str, Tensor]) -> State:
    ours = {}
    for name, value in state.items():
        if name.endswith("weight_mask_updater"):
            continue
        _, block, kind, entry = name.split(".")
        kind = "conv.input_conv" if kind == "conv" else kind
        ours[f"{block[:3]}_{block[3:]}.{kind}.{entry}"] = value
    return ours


PARTIAL_CONV_UNET: Final[Mapping[str, Conversion]] = {
    "naoto": _naoto,
    "mmagic": _mmagic_partial,
}
"""Dialect of the partial convolution U-Net -> conversion of its state."""

PARTIAL_CONV_UNET_COLOURS: Final = ColourLayers(
    {"enc_1.conv.input_conv": 0, "dec_1.conv.input_conv": TABLE[0].channels}, ("dec_1.conv.input_conv",)
)
