"""The published checkpoints: how each is recognised, whose it is, and which of our models it becomes.

A layout is recognised by the names of its tensors alone, so that a file may be renamed, and wrapped by whatever
training script saved it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from inpaint_kernels.models import key_maps
from inpaint_kernels.models._interface import InpaintingModel
from inpaint_kernels.models.csa import CSA
from inpaint_kernels.models.deepfill_v1 import DeepFillV1
from inpaint_kernels.models.deepfill_v2 import DIALECTS as V2_DIALECTS
from inpaint_kernels.models.deepfill_v2 import DeepFillV2
from inpaint_kernels.models.edge_connect import EdgeConnect
from inpaint_kernels.models.glcic import GLCIC
from inpaint_kernels.models.guided_face import GuidedFace
from inpaint_kernels.models.key_maps import ColourLayers, Conversion, State
from inpaint_kernels.models.partial_conv_unet import PartialConvUNet
from torch import Tensor

Shape = tuple[int | None, ...]
Arguments = dict[str, Any]

BY_NC = "CC BY-NC 4.0: not for commercial use"
BY_NC_SA = "CC BY-NC-SA 4.0: not for commercial use, share alike"
CONVERTED = "weights converted from JiahuiYu's are CC BY-NC 4.0: not for commercial use"


@dataclass(frozen=True)
class Layout:
    """One way in which one network is stored.

    Attributes:
        model: that it becomes.
        repository: owner/name on GitHub of the code that writes it, and says where its weights are.
        names: tensors that together only this layout has.
        licence: of the published weights, as their repository states it.
        shape: of the first of these names, None for any size; None: any shape.
        convert: the tensors under our names.
        arguments: (our state) -> arguments of the model; what depends on the file alone.
        dialect: of the model; None for one that has none.
        colours: where colours go in and out, of a network trained on BGR; None: it was trained on RGB.
        constants: a pattern of names that are no weights.
        part: the model's submodule that it is, where a model's networks are stored apart.
    """

    model: type[InpaintingModel]
    repository: str
    names: tuple[str, ...]
    licence: str
    shape: Shape | None = None
    convert: Conversion = dict
    arguments: Callable[[State], Arguments] = lambda state: {}
    dialect: str | None = None
    colours: ColourLayers | None = None
    constants: str = r"(?!)"
    part: str = ""

    @property
    def title(self) -> str:
        """What an error calls it."""
        return f"{self.model.__name__}{self.part and '.' + self.part} of {self.repository}"

    def has_names_of(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a state has the names, of whatever shape."""
        return all(name in state for name in self.names)

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a state is of this layout."""
        return self.has_names_of(state) and (self.shape is None or _fits(state[self.names[0]].shape, self.shape))


@dataclass(frozen=True)
class Converted:
    """A network's tensors under our names.

    Attributes:
        layout: that it had.
        state: ours, each name under ``layout.part``; floating tensors in float32.
        origins: our name -> theirs, where a tensor was taken as it is.
        missing: their name of a tensor that is absent; nothing was converted then.
        unused: their names of tensors that are not needed.
    """

    layout: Layout
    state: State
    origins: Mapping[str, str] = field(default_factory=dict)
    missing: str | None = None
    unused: tuple[str, ...] = ()

    def arguments(self) -> Arguments:
        """Those of the model."""
        own = {name.removeprefix(f"{self.layout.part}."): tensor for name, tensor in self.state.items()}
        dialect = {} if self.layout.dialect is None else {"dialect": self.layout.dialect}
        return dialect | self.layout.arguments(own)


# Recognition ----------------------------------------------------------------------------------------------------------

_WRAPPERS = ("module.", "netG.", "generator.")
"""Prefixes of names: torch's DataParallel, a trainer of daa233's users, mmagic's inpaintors."""

_DEEPEST = 3
"""Dictionaries in dictionaries that are looked into."""


def recognise(value: object) -> tuple[Layout, State] | None:
    """The first network of a known layout in what a checkpoint holds, its state without a common prefix; or None."""
    for state in states_in(value):
        for layout in LAYOUTS:
            if layout.fits(state):
                return layout, state
    return None


def nearest(value: object) -> Layout | None:
    """A layout whose names a checkpoint has, but in another shape; or None."""
    return next((layout for state in states_in(value) for layout in LAYOUTS if layout.has_names_of(state)), None)


def states_in(value: object, depth: int = 0) -> Iterator[State]:
    """Tensors by name: of the dictionary itself, without a wrapper's prefix, and of the dictionaries in it."""
    if not isinstance(value, Mapping) or depth > _DEEPEST:
        return
    named = {name: tensor for name, tensor in value.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    if named:
        yield from _unwrapped(named)
    for inner in value.values():
        yield from states_in(inner, depth + 1)


def _unwrapped(state: State) -> Iterator[State]:
    yield state
    for prefix in _WRAPPERS:
        inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if inner:
            yield from _unwrapped(inner)


def _fits(shape: torch.Size, pattern: Shape) -> bool:
    return len(shape) == len(pattern) and all(b is None or a == b for a, b in zip(shape, pattern, strict=True))


# Conversion -----------------------------------------------------------------------------------------------------------


class _Read(Mapping[str, Tensor]):
    """A state that remembers which of its tensors were asked for."""

    def __init__(self, state: State) -> None:
        self.state, self.asked = state, set[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.asked.add(name)
        return self.state[name]

    def __contains__(self, name: object) -> bool:
        return name in self.state

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def convert(layout: Layout, state: State) -> Converted:
    """A state of that layout as ours.

    Where a tensor is absent nothing is converted: ``missing`` names it, ``state`` is empty.
    """
    weights = _Read({name: tensor for name, tensor in state.items() if not re.search(layout.constants, name)})
    try:
        ours = layout.convert(weights)
        if layout.colours is not None:
            ours = key_maps.swap_red_and_blue(ours, layout.colours)
    except KeyError as error:
        return Converted(layout, {}, missing=str(error.args[0]))
    theirs = {id(tensor): name for name, tensor in weights.state.items()}
    prefix = layout.part and f"{layout.part}."
    return Converted(
        layout,
        {prefix + name: _single(tensor) for name, tensor in ours.items()},
        {prefix + name: theirs[id(tensor)] for name, tensor in ours.items() if id(tensor) in theirs},
        unused=tuple(name for name in weights.state if name not in weights.asked),
    )


def _single(tensor: Tensor) -> Tensor:
    """Contiguous in a storage of its own; floating values in float32, in which those in half precision are run too."""
    tensor = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


# What the sizes of a state say about the network ----------------------------------------------------------------------


def _residual_blocks(state: State) -> Arguments:
    names = (re.search(r"(?:^|\.)middle\.(\d+)\.", name) for name in state)
    return {"residual_blocks": len({found[1] for found in names if found})}


def _guided(dialect: str) -> Callable[[State], Arguments]:
    unguided = 4 + V2_DIALECTS[dialect].ones
    return lambda state: {"guided": state["conv1.conv.weight"].shape[1] == unguided + 1}


def _unet(convolutions_of_a_level: int, first: str) -> Callable[[State], Arguments]:
    def arguments(state: State) -> Arguments:
        convolutions = sum(tensor.dim() == 4 for name, tensor in state.items() if name.startswith(first))
        return {
            "channels": state[f"{first}model.model.0.weight"].shape[0],
            "depth": convolutions // convolutions_of_a_level,
        }

    return arguments


def _literal_face(state: State) -> Arguments:
    channels = {
        tensor.shape[1]
        for name, tensor in state.items()
        if name.startswith("hog_generator.encoder.1.weight") and tensor.dim() == 4
    }
    return {"gh_input": "literal" if 6 in channels else "masked"} | _residual_blocks(state)


# The table ------------------------------------------------------------------------------------------------------------

_OFFICIAL = "JiahuiYu/generative_inpainting"
_MMAGIC = "open-mmlab/mmagic"
OURS = "inpaint-kernels"
_APACHE = "Apache-2.0"
_THEIRS = "that of the weights it was made from"


def _deepfill_v1() -> Iterator[Layout]:
    rows: Iterable[tuple[str, str, str, str, Shape | None]] = (
        ("official", _OFFICIAL, BY_NC, "inpaint_net/conv1/kernel", (5, 5, 5, 32)),
        (
            "daa233",
            "daa233/generative-inpainting-pytorch",
            f"MIT; {CONVERTED}",
            "coarse_generator.conv1.conv.weight",
            None,
        ),
        (
            "nbei",
            "nbei/Deep-Flow-Guided-Video-Inpainting",
            f"MIT; {CONVERTED}",
            "stage_1.down.out.0.conv.0.weight",
            None,
        ),
        ("mmagic", _MMAGIC, _APACHE, "stage1.encoder.enc1.conv.weight", None),
    )
    for dialect, repository, licence, name, shape in rows:
        yield Layout(
            DeepFillV1,
            repository,
            (name,),
            licence,
            shape,
            key_maps.DEEPFILL_V1[dialect],
            dialect=dialect,
            colours=None if dialect == "daa233" else key_maps.DEEPFILL_V1_COLOURS,
            constants=r"fuse_kernel$|^discriminator/|/Adam(_1)?$",
        )


def _deepfill_v2() -> Iterator[Layout]:
    rows: Iterable[tuple[str, str, str, tuple[str, ...], Shape | None]] = (
        ("official", _OFFICIAL, BY_NC, ("inpaint_net/conv1/kernel",), (5, 5, None, 48)),
        ("nipponjo_tf", "nipponjo/deepfillv2-pytorch", CONVERTED, ("conv1.conv.weight", "xconv1.conv.weight"), None),
        ("nipponjo", "nipponjo/deepfillv2-pytorch", "not stated", ("stage1.conv1.conv.weight",), None),
        ("mmagic", _MMAGIC, _APACHE, ("stage1.encoder.enc1.conv.conv.weight",), None),
        ("csqiangwen", "csqiangwen/DeepFillv2_Pytorch", "MIT", ("coarse.0.conv2d.weight",), (48, None, 5, 5)),
    )
    for dialect, repository, licence, names, shape in rows:
        yield Layout(
            DeepFillV2,
            repository,
            names,
            licence,
            shape,
            key_maps.DEEPFILL_V2[dialect],
            _guided(dialect),
            dialect,
            key_maps.DEEPFILL_V2_COLOURS if dialect in ("official", "mmagic") else None,
            constants=r"fuse_(kernel|weight)$|^discriminator/|/Adam(_1)?$",
        )


def _glcic() -> Iterator[Layout]:
    official = "satoshiiizuka/siggraph2017_inpainting"
    rows: Iterable[tuple[str, str, str, str, tuple[str, ...]]] = (
        ("otenim", "otenim", "otenim/GLCIC-PyTorch", "MIT", ("conv1.weight", "bn1.weight", "deconv13.weight")),
        ("iizuka", "iizuka", official, BY_NC_SA, ("0.weight", "1.running_mean", "48.weight")),
        ("iizuka", "yangwangx", official, BY_NC_SA, ("0.0.weight", "0.1.running_mean", "16.weight")),
        ("mmagic", "mmagic", _MMAGIC, _APACHE, ("encoder.enc1.conv.weight", "encoder.enc1.bn.weight")),
    )
    for dialect, source, repository, licence, names in rows:
        colours = key_maps.GLCIC_COLOURS if dialect == "mmagic" else None
        convert = key_maps.GLCIC[source]
        yield Layout(GLCIC, repository, names, licence, (64, 4, 5, 5), convert, dialect=dialect, colours=colours)


LAYOUTS: Final[tuple[Layout, ...]] = (
    *_deepfill_v1(),
    *_deepfill_v2(),
    *_glcic(),
    Layout(
        PartialConvUNet,
        "naoto0804/pytorch-inpainting-with-partial-conv",
        ("enc_1.conv.input_conv.weight", "enc_1.conv.mask_conv.weight"),
        "MIT",
        convert=key_maps.PARTIAL_CONV_UNET["naoto"],
        dialect="naoto",
        constants=r"mask_conv\.weight$",
    ),
    Layout(
        PartialConvUNet,
        _MMAGIC,
        ("encoder.enc1.conv.weight", "encoder.enc7.conv.weight"),
        _APACHE,
        convert=key_maps.PARTIAL_CONV_UNET["mmagic"],
        dialect="mmagic",
        colours=key_maps.PARTIAL_CONV_UNET_COLOURS,
        constants="weight_mask_updater$",
    ),
    Layout(PartialConvUNet, OURS, ("enc_1.conv.input_conv.weight",), _THEIRS, dialect="naoto"),
    Layout(
        EdgeConnect,
        "knazeri/edge-connect",
        ("encoder.1.weight_orig",),
        BY_NC,
        (64, 3, 7, 7),
        arguments=_residual_blocks,
        part="edge_generator",
    ),
    Layout(
        EdgeConnect,
        "knazeri/edge-connect",
        ("encoder.1.weight", "decoder.7.weight"),
        BY_NC,
        (64, 4, 7, 7),
        arguments=_residual_blocks,
        part="inpaint_generator",
    ),
    Layout(EdgeConnect, OURS, ("edge_generator.encoder.1.bias",), _THEIRS, arguments=_residual_blocks),
    Layout(
        CSA,
        "KumapowerLIU/CSA-inpainting",
        ("model.model.0.weight",),
        BY_NC,
        (None, 3, 4, 4),
        arguments=_unet(2, ""),
        part="coarse_generator",
    ),
    Layout(
        CSA,
        "KumapowerLIU/CSA-inpainting",
        ("model.model.0.weight",),
        BY_NC,
        (None, 6, 3, 3),
        arguments=_unet(4, ""),
        part="refinement_generator",
    ),
    Layout(CSA, OURS, ("coarse_generator.model.model.0.weight",), _THEIRS, arguments=_unet(2, "coarse_generator.")),
    Layout(GuidedFace, OURS, ("hog_generator.encoder.1.bias",), _THEIRS, arguments=_literal_face),
)
"""First come those that hold more of the names that they share."""

PARTNERS: Final = (("EdgeModel_gen.pth", "InpaintingModel_gen.pth"), ("_net_P.pth", "_net_G.pth"))
"""Ends of the names of two files that are one model."""

PAPERS: Final[Mapping[type[InpaintingModel], str]] = {
    DeepFillV1: "Yu et al., Generative Image Inpainting with Contextual Attention, CVPR 2018",
    DeepFillV2: "Yu et al., Free-Form Image Inpainting with Gated Convolution, ICCV 2019",
    GLCIC: "Iizuka et al., Globally and Locally Consistent Image Completion, SIGGRAPH 2017",
    PartialConvUNet: "Liu et al., Image Inpainting for Irregular Holes Using Partial Convolutions, ECCV 2018",
    EdgeConnect: "Nazeri et al., EdgeConnect: Generative Image Inpainting with Adversarial Edge Learning, 2019",
    CSA: "Liu et al., Coherent Semantic Attention for Image Inpainting, ICCV 2019",
    GuidedFace: "A Novel Face Inpainting Approach Based on Guided Deep Learning; no weights are published",
}
"""Where each model is from."""
