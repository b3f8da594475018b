"""Our models beside the public networks whose weights they load: the same weights, the same image, the same picture.

See peer_models.py for the networks, and peers.py for how their checkouts are found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from inpaint_kernels.models import key_maps
from inpaint_kernels.models._interface import InpaintingModel
from inpaint_kernels.models.csa import CSA, coarse_input, refinement_input
from inpaint_kernels.models.deepfill_v1 import DeepFillV1
from inpaint_kernels.models.deepfill_v2 import DeepFillV2
from inpaint_kernels.models.edge_connect import EdgeConnect, canny, fold_spectral_norm, to_gray
from inpaint_kernels.models.glcic import GLCIC, PLACES2_MEAN
from inpaint_kernels.models.partial_conv_unet import PartialConvUNet
from torch import Tensor, nn

from benches.peer_models import (
    PEER_MODELS,
    Inputs,
    PeerModel,
    csa_coarse,
    csa_refinement,
    one_hole_mask,
    tensors_in,
    unit_image,
)
from benches.peers import CSA_REPOSITORY, csa_as_written_for, find_checkout, import_module, make_constants_on

Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class PublishedModel:
    """One of our models in one dialect, and the public network that it equals.

    Attributes:
        name: system and dialect.
        peer_name: of the network in :data:`benches.peer_models.PEER_MODELS`.
        build: our model.
        convert: the network's state -> ours.
        arguments: (RGB image in [0, 1], black in the hole; mask, 1 in the hole) -> the network's arguments.
        picture: one of its outputs -> RGB in [0, 1].
        coarse: whether its first output is what a first stage paints.
        adapt: what the checkpoint's own settings change in the network as it is built.
        guidance: (image, mask) -> what else our model is given, and the network before its arguments are made.
        second_name: of the network of a second stage, where the two are published apart.
    """

    name: str
    peer_name: str
    build: Callable[[], InpaintingModel]
    convert: Convert
    arguments: Callable[[Tensor, Tensor], Inputs]
    picture: Callable[[Tensor], Tensor]
    coarse: bool
    adapt: Callable[[nn.Module], None] = lambda network: None
    guidance: Callable[[Tensor, Tensor], dict[str, Tensor]] = lambda image, mask: {}
    second_name: str | None = None

    @property
    def peer(self) -> PeerModel:
        return _peer(self.peer_name)

    def load_published(self, folder: Path, device: str = "cpu") -> nn.Module:
        """The public network in evaluation mode."""
        network = self.peer.load(folder)
        if self.second_name is not None:
            network = _Guided(network, _peer(self.second_name).load(folder))
        self.adapt(network)
        network.eval()  # naoto0804's returns nothing
        make_constants_on(device, network)
        return network.to(device)

    def load_ours(self, network: nn.Module) -> InpaintingModel:
        """Our model with the weights of the public one, in its dtype; spectral norms folded."""
        state = network.state_dict()
        model = self.build().to(next(v.dtype for v in state.values() if v.is_floating_point()))
        model.load_state_dict(self.convert(state))
        fold_spectral_norm(model)
        return model.eval()

    def run_published(self, network: nn.Module, image: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """What it paints, without gradients: the coarse picture, where there is one, and the final one."""
        with torch.no_grad(), self.peer.running(torch.zeros(())):
            outputs = tensors_in(network(*self.arguments(image, mask)))
        return tuple(self.picture(output) for output in outputs[: 1 + self.coarse])


def _peer(name: str) -> PeerModel:
    return next(peer for peer in (*PEER_MODELS, _CSA_STAGES) if peer.name == name)


class _Guided(nn.Module):
    """EdgeConnect's two generators, called as its models' forwards do in its test."""

    def __init__(self, edge_generator: nn.Module, inpaint_generator: nn.Module) -> None:
        super().__init__()
        self.edge_generator, self.inpaint_generator = edge_generator, inpaint_generator

    def forward(self, image: Tensor, edges: Tensor, mask: Tensor) -> Tensor:
        gray = to_gray(image)
        predicted = self.edge_generator(torch.cat([gray * (1 - mask) + mask, edges * (1 - mask), mask], 1))
        painted: Tensor = self.inpaint_generator(torch.cat([image * (1 - mask) + mask, predicted], 1))
        return painted


class _CSAStages(nn.Module):
    """CSA's two generators, called as its test does; the mask is that of each call, not the first one's for ever."""

    def __init__(self, checkout: Path, size: int) -> None:
        super().__init__()
        self.coarse_generator = csa_coarse(checkout)
        self.refinement_generator = csa_refinement(checkout, torch.zeros(1, 1, size, size))
        import_module(checkout, "models.networks").init_weights(self, "normal", 0.02)

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        layer: Any
        for layer in self.modules():
            if type(layer).__name__ == "CSA_model":
                layer.set_mask(mask[:1].byte(), 3, layer.threshold)
                layer.cal_fixed_flag, layer.sp_x, layer.sp_y = True, None, None
        hole = mask > 0
        painted = self.coarse_generator(coarse_input(image, hole))
        return painted, self.refinement_generator(refinement_input(image, hole, painted))


_CSA_STAGES = PeerModel(
    "csa_stages",
    CSA_REPOSITORY,
    _CSAStages,
    lambda size, batch, seed: (unit_image(size, batch, seed), one_hole_mask(size, batch, seed)),
    size=256,
    batch=1,
    running=csa_as_written_for,
)


def _canny_edges(image: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"canny_edges": canny(image, mask > 0)}


def _signed(image: Tensor, mask: Tensor) -> Tensor:
    return (image * 2 - 1) * (1 - mask)


def _unsigned(output: Tensor) -> Tensor:
    return (output + 1) / 2


def _image_and_mask(image: Tensor, mask: Tensor) -> Inputs:
    return _signed(image, mask), mask


def _with_indicators(image: Tensor, mask: Tensor) -> Tensor:
    return torch.cat([_signed(image, mask), torch.ones_like(mask), mask], 1)


def _image_mask_and_small_mask(image: Tensor, mask: Tensor) -> Inputs:
    return _signed(image, mask), mask[:1], mask[:1, :, ::8, ::8]


def _mean_in_hole(image: Tensor, mask: Tensor) -> Inputs:
    mean = image.new_tensor(PLACES2_MEAN).view(3, 1, 1)
    return (torch.cat([image * (1 - mask) + mean * mask, mask], 1),)


def _known(normalise: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Inputs]:
    def arguments(image: Tensor, mask: Tensor) -> Inputs:
        known = (1 - mask).repeat(1, 3, 1, 1)
        return normalise(image) * known, known

    return arguments


def _imagenet(values: tuple[float, float, float], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(3, 1, 1)


def _normalised(image: Tensor) -> Tensor:
    return (image - _imagenet((0.485, 0.456, 0.406), image)) / _imagenet((0.229, 0.224, 0.225), image)


def _restored(output: Tensor) -> Tensor:
    return output * _imagenet((0.229, 0.224, 0.225), output) + _imagenet((0.485, 0.456, 0.406), output)


def _elu(network: nn.Module) -> None:
    """Csqiangwen's script for its checkpoint asks for ELU, its default is another."""
    for module in network.modules():
        if isinstance(getattr(module, "activation", None), nn.LeakyReLU):
            module.activation = nn.ELU()


PUBLISHED_MODELS = (
    PublishedModel(
        "deepfill_v1-daa233",
        "daa233",
        lambda: DeepFillV1("daa233"),
        key_maps.DEEPFILL_V1["daa233"],
        _image_and_mask,
        _unsigned,
        coarse=True,
    ),
    PublishedModel(
        "deepfill_v1-nbei",
        "fgvc",
        lambda: DeepFillV1("nbei"),
        key_maps.DEEPFILL_V1["nbei"],
        _image_mask_and_small_mask,
        _unsigned,
        coarse=True,
    ),
    PublishedModel(
        "deepfill_v1-mmagic",
        "mmagic_deepfillv1",
        lambda: DeepFillV1("mmagic"),
        key_maps.DEEPFILL_V1["mmagic"],
        lambda image, mask: (_with_indicators(image, mask),),
        _unsigned,
        coarse=True,
    ),
    PublishedModel(
        "deepfill_v2-nipponjo",
        "nipponjo",
        lambda: DeepFillV2("nipponjo"),
        key_maps.DEEPFILL_V2["nipponjo"],
        lambda image, mask: (_with_indicators(image, mask), mask),
        _unsigned,
        coarse=True,
    ),
    PublishedModel(
        "deepfill_v2-nipponjo_tf",
        "nipponjo_tf",
        lambda: DeepFillV2("nipponjo_tf"),
        key_maps.DEEPFILL_V2["nipponjo_tf"],
        lambda image, mask: (_with_indicators(image, mask), mask),
        _unsigned,
        coarse=True,
    ),
    PublishedModel(
        "deepfill_v2-mmagic",
        "mmagic_deepfillv2",
        lambda: DeepFillV2("mmagic"),
        key_maps.DEEPFILL_V2["mmagic"],
        lambda image, mask: (_with_indicators(image, mask),),
        _unsigned,
        coarse=True,
    ),
    PublishedModel(
        "deepfill_v2-csqiangwen",
        "csqiangwen",
        lambda: DeepFillV2("csqiangwen"),
        key_maps.DEEPFILL_V2["csqiangwen"],
        lambda image, mask: (image, mask),
        lambda output: output,
        coarse=True,
        adapt=_elu,
    ),
    PublishedModel(
        "glcic-otenim",
        "otenim",
        lambda: GLCIC("otenim"),
        key_maps.GLCIC["otenim"],
        _mean_in_hole,
        lambda output: output,
        coarse=False,
    ),
    PublishedModel(
        "glcic-mmagic",
        "mmagic_gl",
        lambda: GLCIC("mmagic"),
        key_maps.GLCIC["mmagic"],
        lambda image, mask: (torch.cat([_signed(image, mask), mask], 1),),
        _unsigned,
        coarse=False,
    ),
    PublishedModel(
        "partial_conv_unet-naoto",
        "naoto0804",
        PartialConvUNet,
        key_maps.PARTIAL_CONV_UNET["naoto"],
        _known(_normalised),
        _restored,
        coarse=False,
    ),
    PublishedModel(
        "partial_conv_unet-mmagic",
        "mmagic_pconv",
        lambda: PartialConvUNet("mmagic"),
        key_maps.PARTIAL_CONV_UNET["mmagic"],
        _known(lambda image: image * 2 - 1),
        _unsigned,
        coarse=False,
    ),
    PublishedModel(
        "edge_connect-knazeri",
        "knazeri_edge",
        EdgeConnect,
        dict,
        lambda image, mask: (image, _canny_edges(image, mask)["canny_edges"], mask),
        lambda output: output,
        coarse=False,
        guidance=_canny_edges,
        second_name="knazeri_inpaint",
    ),
)


CSA_MODEL = PublishedModel(
    "csa-official", "csa_stages", CSA, dict, lambda image, mask: (image, mask), _unsigned, coarse=True
)
"""Apart from the others: its public network takes one image at a time, with sides from 256 on."""

RACED_MODELS = (*PUBLISHED_MODELS, CSA_MODEL)


def published_model(name: str) -> PublishedModel:
    """The pair of that name."""
    return next(pair for pair in RACED_MODELS if pair.name == name)


@functools.lru_cache
def available_pairs(folder: Path | None) -> frozenset[str]:
    """Names of the pairs whose public network's checkout lies in ``folder``."""
    return frozenset(pair.name for pair in RACED_MODELS if find_checkout(pair.peer.repository, folder) is not None)
