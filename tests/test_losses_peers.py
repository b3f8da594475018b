"""Losses and masks against the public trainers, whose unmodified code runs on the networks and images given here.

Optional: needs a folder with checkouts (``INPAINT_PEERS=DIR``), see benches/peers.py. Values, and gradients of all that
either side can train, in float64.
"""

from __future__ import annotations

import math
import os
import random
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inpaint_kernels.models import edge_connect, losses, perceptual
from inpaint_kernels.models._interface import Box
from inpaint_kernels.models.deepfill_v1 import Discriminator
from inpaint_kernels.models.perceptual import VGGFeatures, perceptual_loss, style_loss
from inpaint_kernels.models.random_masks import box_masks, crop_boxes
from torch import Tensor, nn

from benches import mmcv_stand_in
from benches.peer_models import relative_error
from benches.peers import (
    CSA_REPOSITORY,
    as_written_for,
    csa_as_written_for,
    find_checkout,
    import_file,
    import_module,
)

TOLERANCE = 1e-6
DTYPE = torch.float64


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    given = request.config.getoption("--peers", None) or os.environ.get("INPAINT_PEERS")
    if not given:
        pytest.skip("no checkouts of public trainers (INPAINT_PEERS=DIR)")
    return Path(given)


def checkout(repository: str, folder: Path) -> Path:
    found = find_checkout(repository, folder)
    if found is None:
        pytest.skip(f"no checkout of {repository} in {folder}")
    return found


@pytest.fixture(autouse=True)
def _published_constants() -> Any:
    """Constants that the public code creates are of float64."""
    torch.manual_seed(0)
    with as_written_for(torch.zeros((), dtype=DTYPE)):
        yield


def image(*shape: int, seed: int = 0) -> Tensor:
    """Trainable, in [0, 1]."""
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)
    return values.requires_grad_()


def assert_equal(name: str, ours: Tensor, theirs: Tensor, trained: Sequence[Tensor]) -> None:
    """Values, and gradients of ``trained`` that are not all zero."""
    errors = {"value": relative_error(ours.detach(), theirs.detach())}
    gradient, published = (_gradient(loss, trained) for loss in (ours, theirs))
    assert published.any(), "the public code's gradient is zero"
    errors["gradient"] = relative_error(gradient, published)
    print(f"{name:40} value {errors['value']:.1e}, gradient {errors['gradient']:.1e}")
    assert max(errors.values()) <= TOLERANCE, (name, errors)


def _gradient(loss: Tensor, trained: Sequence[Tensor]) -> Tensor:
    """Of all in one vector."""
    parts = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


# DeepFill v1 ----------------------------------------------------------------------------------------------------------


def test_deepfill_v1(folder):
    root = checkout("daa233/generative-inpainting-pytorch", folder)
    module = import_file(root, "trainer.py", stand_ins=("torchvision", "yaml", "PIL"))
    side, box = 48, 32
    config = {
        "cuda": False,
        "mask_shape": (box, box),
        "discounted_mask": True,
        "spatial_discounting_gamma": 0.9,
        "coarse_l1_alpha": 1.2,
        "global_wgan_loss_alpha": 1.0,
    }
    coarse, fine, truth = image(2, 3, side, side), image(2, 3, side, side, seed=1), image(2, 3, side, side, seed=2)
    truth = truth.detach()
    boxes = [Box(3, 5, 3 + box, 5 + box), Box(16, 0, 16 + box, box)]
    inner = [Box(b.top + 2, b.left + 4, b.bottom - 2, b.right - 4) for b in boxes]
    masks = box_masks(inner, side).to(DTYPE)
    local_critic, global_critic = Discriminator(box).to(DTYPE), Discriminator(side).to(DTYPE)
    trainer = SimpleNamespace(
        config=config,
        use_cuda=False,
        train=lambda: None,
        netG=lambda x, m: (coarse, fine, None),
        localD=local_critic,
        globalD=global_critic,
    )
    for name in ("dis_forward", "calc_gradient_penalty"):
        setattr(trainer, name, types.MethodType(getattr(module.Trainer, name), trainer))
    corners = torch.tensor([(b.top, b.left, *b.size) for b in boxes])
    known = truth * (1 - masks)
    torch.manual_seed(1)
    published, completed, _ = module.Trainer.forward(trainer, known, corners, masks, truth, compute_loss_g=True)
    torch.manual_seed(1)
    positions = [torch.rand(2, 1, 1, 1, dtype=DTYPE) for _ in range(2)]

    pasted = [x * masks + known for x in (coarse, fine)]
    crops = [crop_boxes(x, boxes) for x in (*pasted, truth)]
    l1 = 1.2 * losses.discounted_l1_loss(crops[0], crops[2]) + losses.discounted_l1_loss(crops[1], crops[2])
    ae = 1.2 * losses.masked_l1_loss(coarse, truth, 1 - masks) + losses.masked_l1_loss(fine, truth, 1 - masks)
    critics = ((local_critic, crops[2], crops[1]), (global_critic, truth, pasted[1]))
    wasserstein = sum(losses.wasserstein_discriminator_loss(d(r), d(f.detach())) for d, r, f in critics)
    penalty = sum(losses.gradient_penalty(d, r, f, position=p) for (d, r, f), p in zip(critics, positions, strict=True))
    generator = sum(losses.wasserstein_generator_loss(d(f)) for d, _, f in critics)
    assert torch.equal(completed, pasted[1])
    weights = [*local_critic.parameters(), *global_critic.parameters()]
    assert_equal("daa233 l1, discounted", l1, published["l1"], [coarse, fine])
    assert_equal("daa233 ae", ae, published["ae"], [coarse, fine])
    assert_equal("daa233 wgan_d", torch.as_tensor(wasserstein), published["wgan_d"], weights)
    assert_equal("daa233 wgan_gp", torch.as_tensor(penalty), published["wgan_gp"], weights)
    assert_equal("daa233 wgan_g", torch.as_tensor(generator), published["wgan_g"], [fine, *weights])


def test_the_masked_penalty(folder):
    """Against the only masked one that runs here, for whole images and not divided by the mask's mean."""
    root = checkout("open-mmlab/mmagic", folder)
    _, provided = mmcv_stand_in.stand_ins(root)
    provided["mmagic.models.losses"] = types.ModuleType("mmagic.models.losses")
    provided["mmagic.models.losses"].__path__ = [str(root / "mmagic/models/losses")]
    provided["mmengine.dist"] = types.ModuleType("mmengine.dist")
    vars(provided["mmengine.dist"]).update(is_distributed=lambda: False)
    module = import_module(root, "mmagic.models.losses.gan_loss", provided=provided)
    critic = Discriminator(16).to(DTYPE)
    real, fake = image(2, 3, 16, 16).detach(), image(2, 3, 16, 16, seed=1).detach()
    mask = box_masks([Box(2, 3, 10, 12), Box(0, 0, 8, 16)], 16).to(DTYPE)
    torch.manual_seed(1)
    published = module.gradient_penalty_loss(critic, real, fake, mask, norm_mode="HWC") * mask.mean()
    torch.manual_seed(1)
    position = torch.rand(2, 1, 1, 1, dtype=DTYPE)
    ours = losses.gradient_penalty(critic, real, fake, mask, position=position)
    assert_equal("mmagic gradient_penalty_loss, masked", ours, published, list(critic.parameters()))


# DeepFill v2, GLCIC ---------------------------------------------------------------------------------------------------


def test_deepfill_v2(folder):
    published = import_file(checkout("nipponjo/deepfillv2-pytorch", folder), "model/losses.py")
    real, fake = image(2, 5, 3), image(2, 5, 3, seed=1)
    real, fake = 4 * real - 2, 4 * fake - 2
    pairs: list[tuple[str, Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = [
        ("hinge_loss_d", losses.hinge_discriminator_loss, published.hinge_loss_d, (real, fake)),
        ("hinge_loss_g", losses.hinge_generator_loss, published.hinge_loss_g, (fake,)),
        ("ls_loss_d", losses.least_squares_discriminator_loss, published.ls_loss_d, (real, fake)),
        ("ls_loss_g", losses.least_squares_generator_loss, published.ls_loss_g, (fake,)),
    ]
    for name, ours, theirs, scores in pairs:
        assert_equal(f"nipponjo {name}", ours(*scores), theirs(*scores), scores)


def test_csqiangwens_perceptual_loss(folder, torchvision):
    root = checkout("csqiangwen/DeepFillv2_Pytorch", folder)
    published = import_module(root, "network", stand_ins=("cv2",), provided=torchvision).PerceptualNet()
    vgg = VGGFeatures("vgg16", ["conv3_3"], normalise=True).to(DTYPE)
    take_weights(vgg, torchvision)
    output, truth = image(1, 3, 40, 40), image(1, 3, 40, 40, seed=1).detach()
    features, target = (
        vgg(F.interpolate(x, mode="bilinear", size=(224, 224), align_corners=False)) for x in (output, truth)
    )
    theirs = F.l1_loss(published(output), published(truth))
    assert_equal("csqiangwen PerceptualNet", perceptual_loss(features, target), theirs, [output])


def test_glcic(folder):
    published = import_file(checkout("otenim/GLCIC-PyTorch", folder), "losses.py")
    output, truth = image(2, 3, 8, 9), image(2, 3, 8, 9, seed=1).detach()
    mask = box_masks([Box(1, 2, 6, 8), Box(0, 0, 3, 4)], (8, 9)).to(DTYPE)
    ours = losses.masked_mse_loss(output, truth, mask)
    assert_equal(
        "otenim completion_network_loss", ours, published.completion_network_loss(truth, output, mask), [output]
    )


# VGG in place of torchvision's ----------------------------------------------------------------------------------------

WIDTHS = {
    "vgg16": "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
    "vgg19": "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M",
}


def _torchvisions(architecture: str) -> nn.Module:
    layers, channels = nn.Sequential(), 3
    for width in WIDTHS[architecture].split():
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers.append(nn.Conv2d(channels, int(width), 3, padding=1))
            layers.append(nn.ReLU(inplace=True))
            channels = int(width)
    with torch.no_grad():
        for name, tensor in layers.named_parameters():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            scale = math.sqrt(2 / tensor[0].numel()) if tensor.dim() > 1 else 0.1
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator, dtype=DTYPE))
    network = nn.Module()
    network.features = layers
    return network


@pytest.fixture
def torchvision() -> dict[str, types.ModuleType]:
    """A package with ``models.vgg16`` and ``models.vgg19`` in torchvision's layout and with random weights."""
    package, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    networks = {architecture: _torchvisions(architecture) for architecture in WIDTHS}
    for architecture, network in networks.items():
        setattr(models, architecture, lambda pretrained, network=network: network)
    vars(package).update(models=models, transforms=types.ModuleType("torchvision.transforms"))
    return {"torchvision": package, "torchvision.models": models}


def take_weights(vgg: VGGFeatures, torchvision: dict[str, types.ModuleType]) -> None:
    network = getattr(torchvision["torchvision.models"], vgg.architecture)(pretrained=True)
    vgg.load_state_dict({name: network.state_dict()[name] for name in vgg.state_dict()})


# EdgeConnect ----------------------------------------------------------------------------------------------------------


class _Published(SimpleNamespace):
    """In place of a model of EdgeConnect: a generator that gives what it is given, optimisers that do nothing."""

    def __call__(self, *_: object) -> Tensor:
        outputs: Tensor = self.outputs
        return outputs


def _edge_connect(**parts: Any) -> _Published:
    idle = SimpleNamespace(zero_grad=lambda: None)
    return _Published(iteration=0, gen_optimizer=idle, dis_optimizer=idle, l1_loss=nn.L1Loss(), **parts)


@pytest.mark.parametrize("kind", ["nsgan", "lsgan", "hinge"])
def test_edge_model(folder, torchvision, kind):
    root = checkout("knazeri/edge-connect", folder)
    module = import_module(root, "src.models", provided=torchvision)
    discriminator = edge_connect.Discriminator(2, use_sigmoid=kind != "hinge", use_spectral_norm=False).to(DTYPE)
    gray, edges, outputs = (
        image(2, 1, 32, 32).detach(),
        image(2, 1, 32, 32, seed=1).detach(),
        image(2, 1, 32, 32, seed=2),
    )
    model = _edge_connect(
        outputs=outputs,
        discriminator=discriminator,
        adversarial_loss=module.AdversarialLoss(type=kind),
        config=SimpleNamespace(FM_LOSS_WEIGHT=10),
    )
    _, generator, of_discriminator, _ = module.EdgeModel.process(model, gray, edges, torch.zeros_like(gray))

    adversarial = {
        "nsgan": (losses.bce_discriminator_loss, losses.bce_generator_loss),
        "lsgan": (losses.least_squares_discriminator_loss, losses.least_squares_generator_loss),
        "hinge": (losses.hinge_discriminator_loss, losses.hinge_generator_loss),
    }
    discriminator_loss, generator_loss = adversarial[kind]
    real, real_features = discriminator(torch.cat([gray, edges], 1))
    fake, fake_features = discriminator(torch.cat([gray, outputs], 1))
    weights = list(discriminator.parameters())
    ours = generator_loss(fake) + 10 * losses.feature_matching_loss(fake_features, real_features)
    assert_equal(f"knazeri edge model, generator, {kind}", ours, generator, [outputs, *weights])
    fake, _ = discriminator(torch.cat([gray, outputs.detach()], 1))
    ours = discriminator_loss(real, fake)
    assert_equal(f"knazeri edge model, discriminator, {kind}", ours, of_discriminator, weights)


def test_inpainting_model(folder, torchvision):
    root = checkout("knazeri/edge-connect", folder)
    module = import_module(root, "src.models", provided=torchvision)
    discriminator = edge_connect.Discriminator(3, use_spectral_norm=False).to(DTYPE)
    truth, outputs = image(2, 3, 32, 32).detach(), image(2, 3, 32, 32, seed=1)
    mask = box_masks([Box(4, 6, 20, 30), Box(0, 0, 16, 16)], 32).to(DTYPE)
    config = SimpleNamespace(
        INPAINT_ADV_LOSS_WEIGHT=0.1, L1_LOSS_WEIGHT=1, CONTENT_LOSS_WEIGHT=0.1, STYLE_LOSS_WEIGHT=250
    )
    terms = {"perceptual_loss": module.PerceptualLoss(), "style_loss": module.StyleLoss()}
    model = _edge_connect(
        outputs=outputs, discriminator=discriminator, adversarial_loss=module.AdversarialLoss(), config=config, **terms
    )
    _, generator, _, _ = module.InpaintingModel.process(model, truth, None, mask)

    vgg = VGGFeatures("vgg19", perceptual.EDGE_CONNECT_CONTENT + perceptual.EDGE_CONNECT_STYLE).to(DTYPE)
    take_weights(vgg, torchvision)
    content = perceptual_loss(vgg(outputs), vgg(truth), perceptual.EDGE_CONNECT_CONTENT)
    style = style_loss(vgg(outputs * mask), vgg(truth * mask), perceptual.EDGE_CONNECT_STYLE)
    assert_equal("knazeri PerceptualLoss", content, terms["perceptual_loss"](outputs, truth), [outputs])
    assert_equal("knazeri StyleLoss", style, terms["style_loss"](outputs * mask, truth * mask), [outputs])
    l1 = losses.hole_relative_l1_loss(outputs, truth, mask)
    adversarial = losses.bce_generator_loss(discriminator(outputs)[0])
    ours = l1 + 0.1 * adversarial + 0.1 * content + 250 * style
    assert_equal("knazeri inpainting model, generator", ours, generator, [outputs])


# Partial convolutions -------------------------------------------------------------------------------------------------


def test_partial_conv(folder, torchvision):
    root = checkout("naoto0804/pytorch-inpainting-with-partial-conv", folder)
    extractor = import_module(root, "net", provided=torchvision).VGG16FeatureExtractor()
    criterion = import_module(root, "loss").InpaintingLoss(extractor)
    truth, output = image(2, 3, 32, 40).detach(), image(2, 3, 32, 40, seed=1)
    hole = box_masks([Box(4, 6, 20, 30), Box(0, 0, 16, 16)], (32, 40))
    # Images come to that trainer normalised, to ours in [0, 1].
    mean, deviation = (
        torch.tensor(v, dtype=DTYPE).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    normalised = [(x - mean) / deviation for x in (truth, output)]
    known = (~hole).to(DTYPE).expand(-1, 3, -1, -1)
    published = criterion(normalised[0] * known, known, normalised[1], normalised[0])

    vgg = VGGFeatures("vgg16", perceptual.PARTIAL_CONV, normalise=True).to(DTYPE)
    take_weights(vgg, torchvision)
    completed = torch.where(hole, output, truth)
    target = vgg(truth)
    pair = [vgg(x) for x in (output, completed)]
    theirs, ours_normalised = normalised[0], normalised[1]
    ours = {
        "hole": losses.masked_l1_loss(ours_normalised, theirs, hole),
        "valid": losses.masked_l1_loss(ours_normalised, theirs, ~hole),
        "prc": perceptual_loss(pair[0], target) + perceptual_loss(pair[1], target),
        "style": style_loss(pair[0], target) + style_loss(pair[1], target),
        "tv": losses.total_variation_loss((completed - mean) / deviation),
    }
    for name, loss in ours.items():
        assert_equal(f"naoto0804 {name}", loss, published[name], [output])


# CSA ------------------------------------------------------------------------------------------------------------------


def _csa_layers(root: Path, flags: Tensor, target: Tensor) -> list[Any]:
    layers = [import_module(root, f"models.{name}").__dict__[name]() for name in ("InnerCos", "InnerCos2")]
    for layer in layers:
        layer.mask = flags.to(DTYPE)
        layer.set_target(target)
    return layers


def test_csa(folder, torchvision):
    root = checkout(CSA_REPOSITORY, folder)
    real, fake = image(2, 1, 6, 6), image(2, 1, 6, 6, seed=1)
    real, fake = 4 * real - 2, 4 * fake - 2
    with csa_as_written_for(real):
        published = import_module(root, "models.networks").GANLoss("lsgan", tensor=torch.DoubleTensor)
        theirs = [published(fake, real, discriminates) for discriminates in (True, False)]
    assert_equal("KumapowerLIU GANLoss, D", losses.relativistic_discriminator_loss(real, fake), theirs[0], [real, fake])
    assert_equal("KumapowerLIU GANLoss, G", losses.relativistic_generator_loss(real, fake), theirs[1], [real, fake])

    network = import_module(root, "models.vgg16", provided=torchvision).Vgg16()
    vgg = VGGFeatures("vgg16", [perceptual.CSA_ADVERSARIAL, perceptual.CSA_CONSISTENCY]).to(DTYPE)
    take_weights(vgg, torchvision)
    picture = image(1, 3, 32, 32)
    by_theirs, by_ours = network(2 * picture - 1), vgg(2 * picture - 1)
    for layer, name in ((perceptual.CSA_ADVERSARIAL, "relu3_3"), (perceptual.CSA_CONSISTENCY, "relu4_3")):
        ours, theirs = (features.square().mean() for features in (by_ours[layer], getattr(by_theirs, name)))
        assert_equal(f"KumapowerLIU Vgg16 {name}", ours, theirs, [picture])


def test_csas_consistency(folder):
    root = checkout(CSA_REPOSITORY, folder)
    target, flags = image(1, 512, 4, 4).detach(), torch.rand(4, 4, generator=torch.Generator().manual_seed(3)) > 0.5
    features, decoder = image(1, 512, 4, 4, seed=1), image(1, 1024, 4, 4, seed=2)
    layers = _csa_layers(root, flags, target)
    for layer, given in zip(layers, (features, decoder), strict=True):
        layer(given)
        compared = given[:, :512]
        ours = losses.consistency_loss(compared, target, flags[None])
        assert_equal(f"KumapowerLIU {type(layer).__name__}, uncut", ours, layer.loss, [given])
        published = losses.consistency_loss(compared, target, flags[None], gradient="published")
        assert relative_error(published, layer.loss.detach()) <= TOLERANCE


def test_csas_generator_loss_with_its_cut_gradients(folder, torchvision):
    root = checkout(CSA_REPOSITORY, folder)
    with csa_as_written_for(torch.zeros((), dtype=DTYPE)):
        module = import_module(root, "models.CSA", provided=torchvision)
        criterion = import_module(root, "models.networks").GANLoss("lsgan", tensor=torch.DoubleTensor)
    truth = image(1, 3, 16, 16).detach()
    coarse, output = image(1, 3, 16, 16, seed=1), image(1, 3, 16, 16, seed=2)
    features, decoder = image(1, 512, 2, 2, seed=3), image(1, 1024, 2, 2, seed=4)
    target, flags = image(1, 512, 2, 2, seed=5).detach(), torch.tensor([[True, False], [False, True]])
    layers = _csa_layers(root, flags, target)
    layers[0](features)
    layers[1](decoder)
    judge, judge_features = nn.Conv2d(3, 1, 4, 2).to(DTYPE), nn.Conv2d(8, 4, 2).to(DTYPE)
    of_vgg = [image(1, 8, 3, 3, seed=seed).detach() for seed in (6, 7)]
    trainer = SimpleNamespace(
        fake_B=output,
        fake_P=coarse,
        real_B=truth,
        netD=judge,
        netF=judge_features,
        gt_latent_fake=SimpleNamespace(relu3_3=of_vgg[0]),
        gt_latent_real=SimpleNamespace(relu3_3=of_vgg[1]),
        criterionGAN=criterion,
        criterionL1=nn.L1Loss(),
        opt=SimpleNamespace(lambda_A=100, gan_weight=0.2, cosis=1),
        Cosis_list=layers[:1],
        Cosis_list2=layers[1:],
    )
    module.CSA.backward_G(trainer)

    l1 = F.l1_loss(output, truth) + F.l1_loss(coarse, truth)
    adversarial = losses.relativistic_generator_loss(judge(truth), judge(output))
    adversarial = adversarial + losses.relativistic_generator_loss(judge_features(of_vgg[1]), judge_features(of_vgg[0]))
    consistency = [
        losses.consistency_loss(x[:, :512], target, flags[None], gradient="published") for x in (features, decoder)
    ]
    ours = 100 * l1 + 0.2 * adversarial + consistency[0] + consistency[1]
    errors = [relative_error(ours.detach(), trainer.loss_G.detach())]
    for leaf in (output, coarse):
        assert leaf.grad is not None
        errors.append(relative_error(_gradient(ours, [leaf]), leaf.grad.flatten()))
    print(f"{'KumapowerLIU backward_G':40} value {errors[0]:.1e}, gradient {max(errors[1:]):.1e}")
    assert max(errors) <= TOLERANCE
    assert features.grad is None
    assert decoder.grad is None


# Masks ----------------------------------------------------------------------------------------------------------------


def test_crops_and_boxes_are_daa233s(folder):
    root = checkout("daa233/generative-inpainting-pytorch", folder)
    tools = import_file(root, "utils/tools.py", stand_ins=("torchvision", "yaml", "PIL"))
    boxes = [Box(3, 5, 23, 35), Box(10, 0, 30, 30)]
    corners = torch.tensor([(b.top, b.left, *b.size) for b in boxes])
    assert torch.equal(box_masks(boxes, (40, 50)).to(DTYPE), tools.bbox2mask(corners, 40, 50, 0, 0).to(DTYPE))
    x = image(2, 3, 40, 50)
    assert torch.equal(crop_boxes(x, boxes), tools.local_patch(x, corners))


@pytest.mark.slow
def test_strokes_and_walks_cover_as_much_as_the_public_ones(folder):
    from inpaint_kernels.models.random_masks import free_form_masks, random_walk_masks

    np = pytest.importorskip("numpy")
    strokes = import_file(
        checkout("nipponjo/deepfillv2-pytorch", folder), "utils/misc.py", stand_ins=("torchvision", "yaml")
    ).brush_stroke_mask
    walk = import_file(
        checkout("naoto0804/pytorch-inpainting-with-partial-conv", folder), "generate_data.py"
    ).random_walk
    np.random.seed(0)
    random.seed(0)
    generator = torch.Generator().manual_seed(0)
    size = SimpleNamespace(img_shapes=[256, 256, 3])
    published = torch.tensor([float(strokes(size).mean()) for _ in range(1500)])
    ours = free_form_masks(1500, 256, generator=generator).to(DTYPE).mean((1, 2, 3))
    starts = [(random.randrange(96), random.randrange(96)) for _ in range(40)]
    walked = torch.tensor([1 - float(walk(np.ones((96, 96), "i"), *start, 96**2).mean()) for start in starts])
    our_walks = random_walk_masks(400, 96, generator=generator).to(DTYPE).mean((1, 2, 3))
    for name, theirs, of_ours in (("strokes", published, ours), ("walks", walked, our_walks)):
        spread = theirs.std() * math.sqrt(1 / len(theirs) + 1 / len(of_ours))
        difference = abs(float(theirs.mean() - of_ours.mean()))
        print(
            f"{name}: published {theirs.mean():.4f}, ours {of_ours.mean():.4f}, {difference / spread:.1f} sigma apart"
        )
        assert difference < 3.5 * spread
