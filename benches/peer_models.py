"""Whole inpainting networks of public repositories, built from checkouts that the user made.

For checkouts and how they are found see peers.py; here too none of their code is part of this project, and an adapter
does only what building and running the unmodified network on a CPU requires.

A network starts from the initial weights of its repository. Where no norm keeps the features' scale and those weights
let the features vanish with depth (``PeerModel.rescaled``), every convolution is scaled once so that what it gives
has unit deviation: of vanished features neither the outputs nor the gradients would show a wrong layer.

    python -m benches.peer_models DIR         per network: parameters, seconds, rounding noise, replaced modules
    python -m benches.peer_models DIR NAME    of one network, with the report of ``accelerate``
"""

from __future__ import annotations

import argparse
import io
import runpy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inpaint_kernels
from benches import mmcv_stand_in
from benches.peers import CSA_REPOSITORY, as_written_for, csa_as_written_for, find_checkout, import_file, import_module

Inputs = tuple[Any, ...]
"""Positional arguments of a network's forward: tensors, or tuples of tensors."""


@dataclass(frozen=True)
class PeerModel:
    """One public network.

    Attributes:
        name: short name.
        repository: ``owner/name`` on GitHub.
        build: (checkout, size) -> the network; few depend on the size of the images.
        inputs: (size, batch, seed) -> what its own scripts pass to it; the first tensor holds the image.
        size: the least side of square images at which it is meaningful.
        batch: 1 where it takes no more.
        running: inside this context it runs on the device of the tensor given; it is built inside of it too.
        rescaled: see this module's docstring.
    """

    name: str
    repository: str
    build: Callable[[Path, int], nn.Module]
    inputs: Callable[[int, int, int], Inputs]
    size: int = 64
    batch: int = 2
    running: Callable[[Tensor], AbstractContextManager[None]] = as_written_for
    rescaled: bool = False

    def load(self, folder: Path, size: int | None = None, seed: int = 0) -> nn.Module:
        """The network from its checkout in ``folder``, in training mode; equal arguments give equal weights."""
        checkout = find_checkout(self.repository, folder)
        if checkout is None:
            raise FileNotFoundError(f"{self.repository}: no checkout in {folder}")
        size = size or self.size
        quiet = redirect_stdout(io.StringIO())  # some tell how they initialise
        with torch.random.fork_rng(devices=()), self.running(torch.zeros(())), quiet:
            torch.manual_seed(seed)
            model = self.build(checkout, size)
            model.train()
            if self.rescaled:
                with torch.no_grad(), unit_deviation(model):
                    model(*self.inputs(size, self.batch, seed))
        return model


@contextmanager
def unit_deviation(model: nn.Module) -> Iterator[None]:
    """Convolutions are scaled, each when it first runs in this context, to give unit deviation."""
    handles = []

    def scale(layer: Any, _: object, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        deviation = first.std()
        layer.weight.div_(deviation)
        if layer.bias is not None:
            layer.bias.div_(deviation)
        first = first / deviation
        return (first, *output[1:]) if isinstance(output, tuple) else first

    def scale_once(layer: nn.Module) -> None:
        def hook(*call: Any) -> Any:
            handle.remove()
            return scale(*call)

        handle = layer.register_forward_hook(hook)
        handles.append(handle)

    for layer in model.modules():
        # Weights that a spectral norm computes are no parameters, and those that count masks are not trained.
        weight = layer._parameters.get("weight") if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) else None
        if weight is not None and weight.requires_grad:
            scale_once(layer)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Images and masks ----------------------------------------------------------------------------------------------------


def smooth_image(size: int, batch: int, seed: int, channels: int = 3) -> Tensor:
    """Images [batch, channels, size, size] in [-1, 1]: large shapes with fainter detail."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(batch, channels, size, size)
    for cells, amplitude in ((4, 1.0), (16, 0.3), (size // 2, 0.05)):
        noise = torch.randn(batch, channels, cells, cells, generator=generator)
        image += amplitude * F.interpolate(noise, (size, size), mode="bicubic", align_corners=False)
    return image.tanh()


def unit_image(size: int, batch: int, seed: int, channels: int = 3) -> Tensor:
    """As :func:`smooth_image`, in [0, 1]."""
    return (smooth_image(size, batch, seed, channels) + 1) / 2


def hole_mask(size: int, batch: int, seed: int) -> Tensor:
    """Masks [batch, 1, size, size], 1 in holes: one rectangle of about a quarter of the image, and two strokes."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(batch, 1, size, size)
    for one in mask:
        top, left = torch.randint(size // 8, size // 2, (2,), generator=generator).tolist()
        one[:, top : top + 7 * size // 16, left : left + 7 * size // 16] = 1
        row, column = torch.randint(0, size - size // 16, (2,), generator=generator).tolist()
        one[:, row : row + size // 16, : 3 * size // 4] = 1
        one[:, size // 4 :, column : column + size // 16] = 1
    return mask


def one_hole_mask(size: int, batch: int, seed: int) -> Tensor:
    """As :func:`hole_mask`, the same mask for every image."""
    return hole_mask(size, 1, seed).repeat(batch, 1, 1, 1)


def edges_of(image: Tensor) -> Tensor:
    """Edges [batch, 1, H, W] of images, 0 or 1: where their brightness has a steep slope."""
    grey = image.mean(1, keepdim=True)
    slope = F.pad(grey.diff(dim=2).abs(), (0, 0, 0, 1)) + F.pad(grey.diff(dim=3).abs(), (0, 1))
    return (slope > slope.flatten(1).quantile(0.9, dim=1).view(-1, 1, 1, 1)).float()


def _image_with_hole_and_mask(size: int, batch: int, seed: int) -> Inputs:
    mask = one_hole_mask(size, batch, seed)
    return smooth_image(size, batch, seed) * (1 - mask), mask


def _image_ones_mask_and_mask(size: int, batch: int, seed: int) -> Inputs:
    image, mask = _image_with_hole_and_mask(size, batch, seed)
    return torch.cat([image, torch.ones_like(mask), mask], 1), mask


def _image_ones_mask(size: int, batch: int, seed: int) -> Inputs:
    mask = hole_mask(size, batch, seed)
    return (torch.cat([smooth_image(size, batch, seed) * (1 - mask), torch.ones_like(mask), mask], 1),)


def _whole_image_and_mask(size: int, batch: int, seed: int) -> Inputs:
    return smooth_image(size, batch, seed), hole_mask(size, batch, seed)


def _known_image_and_known_mask(size: int, batch: int, seed: int) -> Inputs:
    """As all partial convolutions take it: the mask is 1 where the image is known, for each channel."""
    known = 1 - hole_mask(size, batch, seed).repeat(1, 3, 1, 1)
    return smooth_image(size, batch, seed) * known, known


def _known_unit_image_and_known_mask(size: int, batch: int, seed: int) -> Inputs:
    known = 1 - hole_mask(size, batch, seed).repeat(1, 3, 1, 1)
    return unit_image(size, batch, seed) * known, known


# The networks --------------------------------------------------------------------------------------------------------


def _daa233(checkout: Path, size: int) -> nn.Module:
    module = import_file(checkout, "model/networks.py", stand_ins=("torchvision", "yaml"))
    model: nn.Module = module.Generator({"input_dim": 3, "ngf": 32}, False, [])
    return model


def _nipponjo(checkout: Path, size: int) -> nn.Module:
    model: nn.Module = import_file(checkout, "model/networks.py").Generator(cnum_in=5, cnum_out=3, cnum=48)
    return model


def _nipponjo_tf(checkout: Path, size: int) -> nn.Module:
    model: nn.Module = import_file(checkout, "model/networks_tf.py").Generator(cnum_in=5, cnum=48)
    return model


def _csqiangwen(checkout: Path, size: int) -> nn.Module:
    module = import_file(checkout, "network.py", stand_ins=("torchvision", "cv2"))
    options = SimpleNamespace(
        in_channels=4, out_channels=3, latent_channels=48, pad_type="zero", activation="lrelu", norm="in"
    )
    model: nn.Module = module.GatedGenerator(options)
    # As its create_generator does, but for the published gain of 0.02, which leaves nothing after few layers.
    module.weights_init(model, init_type="xavier", init_gain=1.0)
    model.context_attention.use_cuda = False  # type: ignore[union-attr]
    return model


def _csqiangwen_inputs(size: int, batch: int, seed: int) -> Inputs:
    return unit_image(size, batch, seed), one_hole_mask(size, batch, seed)


def _knazeri_inpaint(checkout: Path, size: int) -> nn.Module:
    model: nn.Module = import_file(checkout, "src/networks.py").InpaintGenerator()
    return model


def _knazeri_inpaint_inputs(size: int, batch: int, seed: int) -> Inputs:
    image, mask = unit_image(size, batch, seed), hole_mask(size, batch, seed)
    return (torch.cat([image * (1 - mask) + mask, edges_of(image)], 1),)


def _knazeri_edge(checkout: Path, size: int) -> nn.Module:
    model: nn.Module = import_file(checkout, "src/networks.py").EdgeGenerator(use_spectral_norm=True)
    return model


def _knazeri_edge_inputs(size: int, batch: int, seed: int) -> Inputs:
    image, mask = unit_image(size, batch, seed), hole_mask(size, batch, seed)
    grey, edges = image.mean(1, keepdim=True), edges_of(image)
    return (torch.cat([grey * (1 - mask) + mask, edges * (1 - mask), mask], 1),)


def _otenim(checkout: Path, size: int) -> nn.Module:
    model: nn.Module = import_file(checkout, "models.py").CompletionNetwork()
    return model


def _otenim_inputs(size: int, batch: int, seed: int) -> Inputs:
    image, mask = unit_image(size, batch, seed), hole_mask(size, batch, seed)
    mean = image.mean((0, 2, 3), keepdim=True)
    return (torch.cat([image - image * mask + mean * mask, mask], 1),)


def csa_options(size: int) -> SimpleNamespace:
    """What the notebook of :data:`CSA_REPOSITORY` sets for training, on a CPU."""
    return SimpleNamespace(
        batchSize=1,
        fineSize=size,
        input_nc=3,
        input_nc_g=6,
        output_nc=3,
        ngf=64,
        ndf=64,
        which_model_netD="basic",
        which_model_netF="feature",
        which_model_netG="unet_csa",
        which_model_netP="unet_256",
        triple_weight=1,
        name="CSA_inpainting",
        n_layers_D="3",
        gpu_ids=[],
        model="csa_net",
        checkpoints_dir="checkpoints",
        norm="instance",
        fixed_mask=1,
        use_dropout=False,
        init_type="normal",
        mask_type="center",
        lambda_A=100,
        threshold=5 / 16.0,
        stride=1,
        shift_sz=1,
        mask_thred=1,
        bottleneck=512,
        gp_lambda=10.0,
        ncritic=5,
        constrain="MSE",
        strength=1,
        init_gain=0.02,
        cosis=1,
        gan_type="lsgan",
        gan_weight=0.2,
        overlap=4,
        skip=0,
        continue_train=False,
        epoch_count=1,
        which_epoch="",
        niter=20,
        niter_decay=100,
        beta1=0.5,
        lr=0.0002,
        lr_policy="lambda",
        lr_decay_iters=50,
        isTrain=True,
    )


def csa_coarse(checkout: Path, channels: int = 64, depth: int = 8) -> nn.Module:
    """CSA's netP."""
    networks = import_module(checkout, "models.networks")
    model: nn.Module = networks.UnetGenerator(3, 3, depth, channels, networks.get_norm_layer("instance"))
    return model


def csa_refinement(checkout: Path, mask: Tensor, channels: int = 64, depth: int = 8) -> nn.Module:
    """CSA's netG for a mask [1, 1, H, W], without the parts that only compute a loss: these know 512 channels alone."""
    networks = import_module(checkout, "models.networks")
    options = csa_options(max(mask.shape))
    options.skip = 1
    norm = networks.get_norm_layer("instance")
    model: nn.Module = networks.UnetGeneratorCSA(6, 3, depth, options, mask.byte(), [], [], [], channels, norm)
    return model


def csa_depth(size: int) -> int:
    """Halvings of its networks, that end in one pixel: the published 8 are for images of 256."""
    return min(8, size.bit_length() - 1)


def _csa(checkout: Path, size: int) -> nn.Module:
    networks = import_module(checkout, "models.networks")
    mask = _csa_mask(size)
    cosines: list[Any] = []
    model: nn.Module = networks.UnetGeneratorCSA(
        6, 3, csa_depth(size), csa_options(size), mask, [], cosines, cosines, 64, networks.get_norm_layer("instance")
    )
    networks.init_weights(model, "normal", 0.02)
    for layer in cosines:
        layer.set_target(torch.zeros(1))  # of a loss that the published trainer adds without a gradient
    return model


def _csa_mask(size: int) -> Tensor:
    overlap, mask = 4, torch.zeros(1, 1, size, size, dtype=torch.uint8)
    mask[:, :, size // 4 + overlap : 3 * size // 4 - overlap, size // 4 + overlap : 3 * size // 4 - overlap] = 1
    return mask


def _csa_inputs(size: int, batch: int, seed: int) -> Inputs:
    """The result of the first network in the hole, and the image with the hole in the published grey."""
    hole = _csa_mask(size).float()
    image, first = smooth_image(size, batch, seed), smooth_image(size, batch, seed + 1)
    grey = 2 * torch.tensor([123.0, 104.0, 117.0]).view(1, 3, 1, 1) / 255 - 1
    return (torch.cat([first * hole + image * (1 - hole), image * (1 - hole) + grey * hole], 1),)


def _mmagic(editors: tuple[str, ...], config: str) -> Callable[[Path, int], nn.Module]:
    def build(checkout: Path, size: int) -> nn.Module:
        registry, provided = mmcv_stand_in.stand_ins(checkout)
        first, *others = (f"mmagic.models.editors.{name}" for name in editors)
        import_module(checkout, first, provided=provided, also=others)
        model: nn.Module = registry.build(runpy.run_path(str(checkout / config))["model"]["encdec"])
        return model

    return build


_MMAGIC_DEEPFILL = (
    "deepfillv1.deepfill_encoder",
    "deepfillv1.deepfill_decoder",
    "deepfillv1.contextual_attention_neck",
    "deepfillv1.deepfill_refiner",
    "deepfillv2.two_stage_encoder_decoder",
    "global_local.gl_encoder_decoder",
    "global_local.gl_dilation",
)
_MMAGIC_GL = tuple(f"global_local.gl_{part}" for part in ("encoder", "decoder", "dilation", "encoder_decoder"))
_MMAGIC_PCONV = tuple(
    f"pconv.{part}" for part in ("partial_conv", "pconv_encoder", "pconv_decoder", "pconv_encoder_decoder")
)


def _mmagic_gl_inputs(size: int, batch: int, seed: int) -> Inputs:
    mask = hole_mask(size, batch, seed)
    return (torch.cat([smooth_image(size, batch, seed) * (1 - mask), mask], 1),)


def _naoto(checkout: Path, size: int) -> nn.Module:
    module = import_file(checkout, "net.py", stand_ins=("torchvision",))
    model: nn.Module = module.PConvUNet()
    for layer in model.modules():
        if isinstance(layer, module.PartialConv):
            # It divides by the mask's sum without the factor of the window's size, which training makes up for.
            layer.input_conv.weight.data *= layer.input_conv.weight[0].numel()
    return model


def _nvidia(checkout: Path, size: int) -> nn.Module:
    """A classifier of images of 224 that pads with partial convolutions: its average pooling takes 7 x 7 features."""
    model: nn.Module = import_module(checkout, "models.pd_resnet").pdresnet18(num_classes=10)
    return model


def _nvidia_inputs(size: int, batch: int, seed: int) -> Inputs:
    return (smooth_image(size, batch, seed),)


def _avalonstrel(checkout: Path, size: int) -> nn.Module:
    model: nn.Module = import_module(checkout, "models.sa_gan").InpaintSANet()
    model.refine_attn.gamma.data.fill_(0.5)  # type: ignore[union-attr, operator] # 0 would hide the attention
    return model


def _fgvc(checkout: Path, size: int) -> nn.Module:
    model: nn.Module = import_module(checkout, "models.DeepFill_Models.DeepFill").Generator()
    return model


def _fgvc_inputs(size: int, batch: int, seed: int) -> Inputs:
    image, mask = smooth_image(size, batch, seed), hole_mask(size, 1, seed)
    return image, mask, mask[..., ::8, ::8]


def _selflein(checkout: Path, size: int) -> nn.Module:
    model: nn.Module = import_module(checkout, "iminpaint.model_parts.generator").Generator()
    return model


def _selflein_inputs(size: int, batch: int, seed: int) -> Inputs:
    """The mask is 1 where the image is known; edges drawn into the hole."""
    image, known = unit_image(size, batch, seed), 1 - hole_mask(size, batch, seed)
    return image * known, known, edges_of(image) * (1 - known)


def _pennet(checkout: Path, size: int) -> nn.Module:
    model: nn.Module = import_file(checkout, "model/pennet.py", stand_ins=("torchvision",)).InpaintGenerator()
    return model


def _pennet_inputs(size: int, batch: int, seed: int) -> Inputs:
    image, mask = smooth_image(size, batch, seed), hole_mask(size, batch, seed)
    return torch.cat([image * (1 - mask) + mask, mask], 1), mask


def _lbam(checkout: Path, size: int) -> nn.Module:
    model: nn.Module = import_module(checkout, "models.LBAMModel", stand_ins=("torchvision",)).LBAMModel(4, 3)
    return model


def _lbam_inputs(size: int, batch: int, seed: int) -> Inputs:
    image, known = _known_unit_image_and_known_mask(size, batch, seed)
    return torch.cat([image, known[:, :1]], 1), known


def _rfr(checkout: Path, size: int) -> nn.Module:
    model: nn.Module = import_module(checkout, "modules.RFRNet", stand_ins=("torchvision",)).RFRNet()
    return model


def _aot(checkout: Path, size: int) -> nn.Module:
    options = SimpleNamespace(rates=[1, 2, 4, 8], block_num=8)
    model: nn.Module = import_module(checkout, "model.aotgan", import_root="src").InpaintGenerator(options)
    return model


def _aot_inputs(size: int, batch: int, seed: int) -> Inputs:
    image, mask = smooth_image(size, batch, seed), hole_mask(size, batch, seed)
    return image * (1 - mask) + mask, mask


def _tanimutomo(checkout: Path, size: int) -> nn.Module:
    model: nn.Module = import_file(checkout, "src/model.py").PConvUNet(finetune=False, layer_size=7)
    return model


def _ryanwongsa(checkout: Path, size: int) -> nn.Module:
    module = import_module(checkout, "models.pconv_unet", import_root="src", stand_ins=("torchvision",))
    model: nn.Module = module.PConvUNet()
    return model


def _ryanwongsa_inputs(size: int, batch: int, seed: int) -> Inputs:
    return (_known_unit_image_and_known_mask(size, batch, seed),)


def _ctsdg(checkout: Path, size: int) -> nn.Module:
    module = import_module(checkout, "models.generator.generator", stand_ins=("torchvision",))
    model: Any = module.Generator(image_in_channels=3, edge_in_channels=2, out_channels=3)
    for gamma in (model.bigff.structure_gamma, model.bigff.texture_gamma):
        gamma.data.fill_(0.5)  # 0 would hide the gates
    network: nn.Module = model
    return network


def _ctsdg_inputs(size: int, batch: int, seed: int) -> Inputs:
    image, known = smooth_image(size, batch, seed), 1 - hole_mask(size, batch, seed)
    grey = image.mean(1, keepdim=True)
    return image * known, torch.cat([edges_of(image) * known, grey * known], 1), known


def _madf(checkout: Path, size: int) -> nn.Module:
    module = import_file(checkout, "net.py", stand_ins=("torchvision",))
    model: nn.Module = module.MADFNet(SimpleNamespace(n_refinement_D=2), layer_size=7)
    return model


PEER_MODELS = (
    PeerModel("daa233", "daa233/generative-inpainting-pytorch", _daa233, _image_with_hole_and_mask, rescaled=True),
    PeerModel("nipponjo", "nipponjo/deepfillv2-pytorch", _nipponjo, _image_ones_mask_and_mask, rescaled=True),
    PeerModel("nipponjo_tf", "nipponjo/deepfillv2-pytorch", _nipponjo_tf, _image_ones_mask_and_mask, rescaled=True),
    PeerModel("csqiangwen", "csqiangwen/DeepFillv2_Pytorch", _csqiangwen, _csqiangwen_inputs, rescaled=True),
    PeerModel("knazeri_inpaint", "knazeri/edge-connect", _knazeri_inpaint, _knazeri_inpaint_inputs),
    PeerModel("knazeri_edge", "knazeri/edge-connect", _knazeri_edge, _knazeri_edge_inputs),
    PeerModel("otenim", "otenim/GLCIC-PyTorch", _otenim, _otenim_inputs),
    PeerModel("csa", CSA_REPOSITORY, _csa, _csa_inputs, batch=1, running=csa_as_written_for),
    PeerModel(
        "mmagic_deepfillv1",
        "open-mmlab/mmagic",
        _mmagic(_MMAGIC_DEEPFILL, "configs/_base_/models/base_deepfillv1.py"),
        _image_ones_mask,
        size=128,  # 16 pixels of reflection need features of more than 16
        rescaled=True,
    ),
    PeerModel(
        "mmagic_deepfillv2",
        "open-mmlab/mmagic",
        _mmagic(_MMAGIC_DEEPFILL, "configs/_base_/models/base_deepfillv2.py"),
        _image_ones_mask,
        size=128,
        rescaled=True,
    ),
    PeerModel(
        "mmagic_gl", "open-mmlab/mmagic", _mmagic(_MMAGIC_GL, "configs/_base_/models/base_gl.py"), _mmagic_gl_inputs
    ),
    PeerModel(
        "mmagic_pconv",
        "open-mmlab/mmagic",
        _mmagic(_MMAGIC_PCONV, "configs/partial_conv/pconv_stage1_8xb12_places-256x256.py"),
        _known_image_and_known_mask,
        size=256,
    ),
    PeerModel(
        "naoto0804",
        "naoto0804/pytorch-inpainting-with-partial-conv",
        _naoto,
        _known_image_and_known_mask,
        size=256,
    ),
    PeerModel("nvidia_resnet", "NVIDIA/partialconv", _nvidia, _nvidia_inputs, size=224),
    PeerModel("avalonstrel", "avalonstrel/GatedConvolution_pytorch", _avalonstrel, _whole_image_and_mask),
    PeerModel("fgvc", "vt-vl-lab/FGVC", _fgvc, _fgvc_inputs, rescaled=True),
    PeerModel("selflein", "selflein/DeepFill-v2", _selflein, _selflein_inputs, rescaled=True),
    PeerModel("pennet", "researchmm/PEN-Net-for-Inpainting", _pennet, _pennet_inputs, size=128, rescaled=True),
    PeerModel("lbam", "Vious/LBAM_Pytorch", _lbam, _lbam_inputs, size=128, rescaled=True),
    PeerModel("rfr", "jingyuanli001/RFR-Inpainting", _rfr, _known_unit_image_and_known_mask),
    PeerModel("aot", "researchmm/AOT-GAN-for-Inpainting", _aot, _aot_inputs, rescaled=True),
    PeerModel(
        "tanimutomo", "tanimutomo/partialconv", _tanimutomo, _known_image_and_known_mask, size=256, rescaled=True
    ),
    PeerModel("ryanwongsa", "ryanwongsa/Image-Inpainting", _ryanwongsa, _ryanwongsa_inputs, size=256),
    PeerModel("ctsdg", "xiefan-guo/ctsdg", _ctsdg, _ctsdg_inputs, size=256),
    PeerModel("madf", "MADF-inpainting/Pytorch-MADF", _madf, _known_image_and_known_mask, size=128),
)


def available_models(folder: Path | None) -> tuple[PeerModel, ...]:
    """The networks whose checkout lies in ``folder``; none without a folder."""
    return tuple(model for model in PEER_MODELS if find_checkout(model.repository, folder) is not None)


# Running them --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What one forward and backward pass gave.

    Attributes:
        outputs: outputs with a gradient.
        others: outputs without one: updated masks, and the flow of an attention, which one rounding can change.
        gradients: of the inputs' first tensor ("input"), and of the parameters that took part.
        state: the state dict afterwards; norms that learn statistics have changed it.
    """

    outputs: list[Tensor]
    others: list[Tensor]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]


def tensors_in(nested: Any) -> list[Tensor]:
    """All tensors of nested tuples and lists, in order."""
    if isinstance(nested, Tensor):
        return [nested]
    return [tensor for part in nested or () for tensor in tensors_in(part)]


def copy_of_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, that later steps do not change."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def run(peer: PeerModel, model: nn.Module, inputs: Inputs, *, backward: bool = True) -> Outcome:
    """One pass of ``model``; the loss weighs the outputs' pixels with fixed random numbers."""
    first, *_ = tensors_in(inputs)
    leaf = first.clone().requires_grad_(backward)

    def with_leaf(nested: Any) -> Any:
        if isinstance(nested, Tensor):
            return leaf if nested is first else nested.clone()
        return tuple(with_leaf(part) for part in nested)

    model.zero_grad(set_to_none=True)
    with peer.running(leaf), torch.set_grad_enabled(backward):
        outputs = tensors_in(model(*with_leaf(inputs)))
        differentiable = [output for output in outputs if output.requires_grad] if backward else outputs
        if backward:
            generator = torch.Generator().manual_seed(0)
            weights = [torch.randn(o.shape, generator=generator, dtype=torch.float32).to(o) for o in differentiable]
            terms = [(output * w).mean() for output, w in zip(differentiable, weights, strict=True)]
            torch.stack(terms).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if leaf.grad is not None:
        gradients["input"] = leaf.grad
    others = [output.detach() for output in outputs if not any(output is one for one in differentiable)]
    return Outcome([output.detach() for output in differentiable], others, gradients, copy_of_state(model))


def relative_error(actual: Tensor, expected: Tensor, unit: float | None = None) -> float:
    """||actual - expected|| in units of ||expected||, or of ``unit``; 0 where both are equal."""
    difference = (actual.double() - expected.double()).norm().item()
    return difference / (expected.double().norm().item() if unit is None else unit) if difference else 0.0


# What accelerate replaces --------------------------------------------------------------------------------------------


def replaced_modules(model: nn.Module) -> tuple[Counter[str], str]:
    """How often ``accelerate`` replaces each class, and the text of its report; the model is as before afterwards."""
    before = [type(module) for module in model.modules()]
    report = inpaint_kernels.accelerate(model)
    after = [type(module) for module in model.modules()]
    text = str(report)
    report.undo()
    return Counter(old.__name__ for old, new in zip(before, after, strict=True) if old is not new), text


def rounding_noise(peer: PeerModel, model: nn.Module, inputs: Inputs) -> tuple[float, float]:
    """Relative change of outputs and of gradients where oneDNN does not compute the network's convolutions."""
    state = copy_of_state(model)
    usual = run(peer, model, inputs)
    model.load_state_dict(state)
    with torch.backends.mkldnn.flags(enabled=False):
        other = run(peer, model, inputs)

    def whole(gradients: dict[str, Tensor]) -> Tensor:
        return torch.cat([gradient.flatten() for gradient in gradients.values()])

    outputs = max(relative_error(*pair) for pair in zip(other.outputs, usual.outputs, strict=True))
    return outputs, relative_error(whole(other.gradients), whole(usual.gradients))


def _forward_seconds(peer: PeerModel, model: nn.Module, size: int) -> float:
    inputs = peer.inputs(size, 1, 0)
    run(peer, model, inputs, backward=False)
    start = time.perf_counter()
    run(peer, model, inputs, backward=False)
    return time.perf_counter() - start


def main() -> None:
    """Print the table, see this module's docstring."""
    parser = argparse.ArgumentParser(description="Public networks and what accelerate() replaces in them.")
    parser.add_argument("folder", type=Path, help="folder with checkouts")
    parser.add_argument("names", nargs="*", help="networks; default: all that are there")
    arguments = parser.parse_args()
    print("network             parameters  size  forward  noise: outputs  gradients  replaced")
    for peer in available_models(arguments.folder):
        if arguments.names and peer.name not in arguments.names:
            continue
        model = peer.load(arguments.folder)
        noise = rounding_noise(peer, model, peer.inputs(peer.size, peer.batch, 1))
        model.eval()
        seconds = _forward_seconds(peer, model, peer.size)
        counts, text = replaced_modules(model)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{peer.name:18}  {parameters:10,}  {peer.size:4}  {seconds:5.2f} s  {noise[0]:14.1e}  {noise[1]:9.1e}  "
            f"{sum(counts.values())} of {sum(1 for _ in model.modules())}"
            + "".join(f", {count} {name}" for name, count in counts.most_common()),
            flush=True,
        )
        if arguments.names:
            print(text)


if __name__ == "__main__":
    main()
