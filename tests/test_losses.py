"""Losses: their formulas by hand, their gradients, and what each of them must not depend on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from inpaint_kernels.models import losses, perceptual
from inpaint_kernels.models.csa import CSA
from inpaint_kernels.models.deepfill_v1 import Discriminator
from inpaint_kernels.models.perceptual import VGGFeatures, gram_matrix, perceptual_loss, style_loss
from torch import Tensor

from inpaint_kernels.checkpoint_files import CheckpointError
from inpaint_kernels.nn import DilatedConv2d


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def probabilities(seed: int) -> Tensor:
    return random(3, 1, 4, 4, seed=seed).sigmoid()


def mask(*size: int) -> Tensor:
    """About half of the pixels, in every sample others."""
    return random(2, 1, *size, seed=9) > 0


# Pixels ---------------------------------------------------------------------------------------------------------------


def test_masked_losses_are_means_over_all_pixels():
    output, target = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    hole = mask(4, 5)
    differences = [
        abs(float(output[b, c, y, x] - target[b, c, y, x]))
        for b in range(2)
        for c in range(3)
        for y in range(4)
        for x in range(5)
        if hole[b, 0, y, x]
    ]
    share = len(differences) / output.numel()
    l1, mse = sum(differences) / output.numel(), sum(d * d for d in differences) / output.numel()
    assert float(losses.masked_l1_loss(output, target, hole)) == pytest.approx(l1, rel=1e-14)
    assert float(losses.masked_mse_loss(output, target, hole)) == pytest.approx(mse, rel=1e-14)
    assert float(losses.masked_l1_loss(output, target, hole, normalise=True)) == pytest.approx(l1 / share, rel=1e-14)
    assert float(losses.masked_mse_loss(output, target, hole, normalise=True)) == pytest.approx(mse / share, rel=1e-14)
    whole = float((output - target).abs().mean())
    assert float(losses.hole_relative_l1_loss(output, target, hole)) == pytest.approx(whole / share, rel=1e-14)


@pytest.mark.parametrize("loss", [losses.masked_l1_loss, losses.masked_mse_loss])
def test_masked_losses_do_not_look_outside_of_the_mask(loss):
    output, target, hole = random(2, 3, 4, 5).requires_grad_(), random(2, 3, 4, 5, seed=1), mask(4, 5)
    loss(output, target, hole).backward()
    assert output.grad is not None
    assert torch.equal(output.grad != 0, hole.expand_as(output))
    one_for_all = loss(output, target, hole[:1])
    assert torch.equal(one_for_all, loss(output, target, hole[:1].expand(2, -1, -1, -1).double()))


@pytest.mark.parametrize("loss", [losses.masked_l1_loss, losses.masked_mse_loss])
def test_an_empty_mask_gives_zero(loss):
    output = random(1, 3, 4, 5).requires_grad_()
    value = loss(output, torch.zeros_like(output), torch.zeros(1, 1, 4, 5), normalise=True)
    value.backward()
    assert value.item() == 0
    assert output.grad is not None
    assert not output.grad.any()


def test_spatial_discount_falls_with_the_distance_to_the_border():
    discount = losses.spatial_discount(6, 8, 0.5, dtype=torch.float64)[0, 0]
    expected = [[0.5 ** min(y, 6 - y, x, 8 - x) for x in range(8)] for y in range(6)]
    assert torch.equal(discount, torch.tensor(expected, dtype=torch.float64))


def test_discounted_l1_loss_is_the_mean_of_discounted_differences():
    output, target = random(2, 3, 6, 8), random(2, 3, 6, 8, seed=1)
    weights = losses.spatial_discount(6, 8, 0.9, dtype=torch.float64)
    expected = float((weights * (output - target).abs()).sum()) / output.numel()
    assert float(losses.discounted_l1_loss(output, target)) == pytest.approx(expected, rel=1e-14)
    assert torch.equal(losses.discounted_l1_loss(output, target, 1), F.l1_loss(output, target))


def test_total_variation_of_a_ramp_and_a_step():
    ramp = torch.arange(5, dtype=torch.float64).mul(3).expand(1, 2, 4, 5)
    assert float(losses.total_variation_loss(ramp)) == 3
    assert float(losses.total_variation_loss(ramp.mT)) == 3
    assert float(losses.total_variation_loss(torch.ones(1, 1, 3, 3))) == 0


def test_total_variation_counts_pairs_in_and_right_around_a_hole():
    image, hole = random(1, 1, 7, 9), torch.zeros(1, 1, 7, 9, dtype=torch.bool)
    hole[..., 2:4, 3:5] = True
    near = [(y, x) for y in range(1, 5) for x in range(2, 6)]
    down = sum(abs(float(image[0, 0, y + 1, x] - image[0, 0, y, x])) for y, x in near if (y + 1, x) in near)
    across = sum(abs(float(image[0, 0, y, x + 1] - image[0, 0, y, x])) for y, x in near if (y, x + 1) in near)
    expected = down / (6 * 9) + across / (7 * 8)
    assert float(losses.total_variation_loss(image, hole)) == pytest.approx(expected, rel=1e-14)


# What a discriminator says --------------------------------------------------------------------------------------------

REAL, FAKE = scores(0.2, 3.0), scores(-2.0, 0.6)
REAL_SHARE, FAKE_SHARE = scores(0.9, 0.3), scores(0.2, 0.4)

BY_HAND = {
    "wasserstein": (
        losses.wasserstein_discriminator_loss(REAL, FAKE),
        -0.7 - 1.6,
        losses.wasserstein_generator_loss(FAKE),
        0.7,
    ),
    "hinge": (
        losses.hinge_discriminator_loss(REAL, FAKE),
        ((0.8 + 0) / 2 + (0 + 1.6) / 2) / 2,
        losses.hinge_generator_loss(FAKE),
        0.7,
    ),
    "bce": (
        losses.bce_discriminator_loss(REAL_SHARE, FAKE_SHARE),
        -(math.log(0.9) + math.log(0.3) + math.log(0.8) + math.log(0.6)) / 4,
        losses.bce_generator_loss(FAKE_SHARE),
        -(math.log(0.2) + math.log(0.4)) / 2,
    ),
    "least_squares": (
        losses.least_squares_discriminator_loss(REAL, FAKE),
        ((0.8**2 + 2**2) / 2 + (2**2 + 0.6**2) / 2) / 2,
        losses.least_squares_generator_loss(FAKE),
        (3**2 + 0.4**2) / 2,
    ),
    "relativistic": (
        losses.relativistic_discriminator_loss(REAL, FAKE),
        (((0.2 + 0.7 - 1) ** 2 + (3 + 0.7 - 1) ** 2) / 2 + ((-2 - 1.6 + 1) ** 2 + (0.6 - 1.6 + 1) ** 2) / 2) / 2,
        losses.relativistic_generator_loss(REAL, FAKE),
        (((0.2 + 0.7 + 1) ** 2 + (3 + 0.7 + 1) ** 2) / 2 + ((-2 - 1.6 - 1) ** 2 + (0.6 - 1.6 - 1) ** 2) / 2) / 2,
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_adversarial_losses_by_hand(name):
    discriminator, by_discriminator, generator, by_generator = BY_HAND[name]
    assert float(discriminator) == pytest.approx(by_discriminator, rel=1e-12)
    assert float(generator) == pytest.approx(by_generator, rel=1e-12)


def test_cross_entropy_of_logits_is_that_of_probabilities():
    real, fake = random(2, 1), random(2, 1, seed=1)
    of_logits = losses.bce_discriminator_loss(real, fake, from_logits=True)
    torch.testing.assert_close(of_logits, losses.bce_discriminator_loss(real.sigmoid(), fake.sigmoid()))
    extreme = losses.bce_generator_loss(torch.tensor([-1000.0]), from_logits=True)
    assert float(extreme) == 1000


def test_the_relativistic_generator_is_a_discriminator_with_the_roles_exchanged():
    real, fake = random(2, 1, 3, 3), random(2, 1, 3, 3, seed=1)
    exchanged = losses.relativistic_discriminator_loss(fake, real)
    torch.testing.assert_close(losses.relativistic_generator_loss(real, fake), exchanged)


# The gradient penalty -------------------------------------------------------------------------------------------------


def test_gradient_penalty_of_a_linear_critic():
    weights, real, fake = random(3, 4, 4), random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    hole = mask(4, 4)

    def critic(x: Tensor) -> Tensor:
        return (weights * x).sum((1, 2, 3))[:, None]

    penalty = losses.gradient_penalty(critic, real, fake)
    assert penalty.item() == pytest.approx((float(weights.norm()) - 1) ** 2, rel=1e-12)
    masked = [(float((weights * h).norm()) - 1) ** 2 for h in hole]
    assert losses.gradient_penalty(critic, real, fake, hole).item() == pytest.approx(sum(masked) / 2, rel=1e-12)


def test_gradient_penalty_is_taken_between_real_and_fake():
    real, fake, share = random(2, 1, 3, 3), random(2, 1, 3, 3, seed=1), torch.tensor([0.25, 1.0]).double()
    position = share.view(2, 1, 1, 1)
    penalty = losses.gradient_penalty(lambda x: x.square().sum((1, 2, 3)) / 2, real, fake, position=position)
    between = position * real + (1 - position) * fake
    assert penalty.item() == pytest.approx(float((between.flatten(1).norm(dim=1) - 1).square().mean()), rel=1e-12)


def test_gradient_penalty_draws_a_position_for_each_sample_from_its_generator():
    real, fake = torch.ones(64, 1, 1, 1), torch.zeros(64, 1, 1, 1)
    seen = []

    def critic(x: Tensor) -> Tensor:
        seen.append(x.detach().flatten())
        return x.flatten(1)

    for seed in (0, 0, 1):
        losses.gradient_penalty(critic, real, fake, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert len(set(seen[0].tolist())) > 60
    assert 0 <= seen[0].min() < 0.2 < 0.8 < seen[0].max() <= 1


def test_gradient_penalty_where_the_gradient_is_zero():
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    penalty = losses.gradient_penalty(
        lambda x: scale * x.sum((1, 2, 3)), random(2, 1, 3, 3), random(2, 1, 3, 3, seed=1)
    )
    penalty.backward()
    assert penalty.item() == 1
    assert scale.grad is not None
    assert scale.grad.isfinite()


def test_gradient_penalty_without_gradients_has_the_value():
    real, fake = random(1, 3, 16, 16).float(), random(1, 3, 16, 16, seed=1).float()
    critic, position = Discriminator(16), torch.full((1, 1, 1, 1), 0.5)
    with torch.no_grad():
        value = losses.gradient_penalty(critic, real, fake, position=position)
    assert not value.requires_grad
    torch.testing.assert_close(value, losses.gradient_penalty(critic, real, fake, position=position).detach())


def test_gradient_penalty_is_differentiable_in_the_weights_of_our_convolutions():
    real, fake, hole = random(1, 2, 5, 5), random(1, 2, 5, 5, seed=1), mask(5, 5)[:1]
    position = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64)
    layer = DilatedConv2d(2, 2, 3, stride=2, padding=1, activation="leaky_relu", dtype=torch.float64)
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def penalty(weight: Tensor, bias: Tensor) -> Tensor:
        def critic(x: Tensor) -> Tensor:
            state = {"weight": weight, "bias": bias}
            return torch.func.functional_call(layer, state, (x,)).square().sum((1, 2, 3))

        return losses.gradient_penalty(critic, real, fake, hole, position=position)

    assert torch.autograd.gradcheck(penalty, parameters)


def test_gradient_penalty_of_our_critic_is_that_of_plain_convolutions():
    torch.manual_seed(0)
    critic = Discriminator(16).double()
    real, fake = random(2, 3, 16, 16), random(2, 3, 16, 16, seed=1)
    position = torch.tensor([0.2, 0.7], dtype=torch.float64).view(2, 1, 1, 1)

    def plain(x: Tensor) -> Tensor:
        for layer in critic.dis_conv_module:
            x = F.leaky_relu(F.conv2d(x, layer.conv.weight, layer.conv.bias, 2, 2), 0.2)
        return critic.linear(x.flatten(1))

    parameters = list(critic.parameters())
    ours, theirs = (losses.gradient_penalty(c, real, fake, position=position) for c in (critic, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(p, parameters, allow_unused=True, materialize_grads=True) for p in (ours, theirs)]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-12)
    assert sum(bool(gradient.any()) for gradient in gradients[0]) >= 5  # each weight but none of the biases


# Gradients of all -----------------------------------------------------------------------------------------------------


def images() -> tuple[Tensor, Tensor]:
    return random(2, 3, 5, 6), random(2, 3, 5, 6, seed=1)


DIFFERENTIABLE: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "masked_l1": (lambda x, y: losses.masked_l1_loss(x, y, mask(5, 6), normalise=True), images()),
    "masked_mse": (lambda x, y: losses.masked_mse_loss(x, y, mask(5, 6), normalise=True), images()),
    "hole_relative_l1": (lambda x, y: losses.hole_relative_l1_loss(x, y, mask(5, 6)), images()),
    "discounted_l1": (losses.discounted_l1_loss, images()),
    "total_variation": (losses.total_variation_loss, images()[:1]),
    "total_variation_hole": (lambda x: losses.total_variation_loss(x, mask(5, 6)), images()[:1]),
    "wasserstein": (losses.wasserstein_discriminator_loss, images()),
    "hinge": (losses.hinge_discriminator_loss, images()),
    "hinge_generator": (losses.hinge_generator_loss, images()[:1]),
    "bce": (losses.bce_discriminator_loss, (probabilities(0), probabilities(1))),
    "bce_generator": (losses.bce_generator_loss, (probabilities(0),)),
    "least_squares": (losses.least_squares_discriminator_loss, images()),
    "least_squares_generator": (losses.least_squares_generator_loss, images()[:1]),
    "relativistic": (losses.relativistic_discriminator_loss, images()),
    "relativistic_generator": (losses.relativistic_generator_loss, images()),
    "feature_matching": (lambda *fake: losses.feature_matching_loss(fake, images()[::-1]), images()),
    "consistency": (lambda x: losses.consistency_loss(x, images()[1], mask(5, 6)[:, 0]), images()[:1]),
    "perceptual": (lambda x: perceptual_loss({"a": x}, {"a": images()[1]}), images()[:1]),
    "style": (lambda x: style_loss({"a": x}, {"a": images()[1]}), images()[:1]),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients(name):
    loss, arguments = DIFFERENTIABLE[name]
    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in arguments])


# Features -------------------------------------------------------------------------------------------------------------


def test_feature_matching_adds_layers_and_trains_no_discriminator():
    fake = [random(1, 2, 4, 4).requires_grad_(), random(1, 3, 2, 2).requires_grad_()]
    real = [random(1, 2, 4, 4, seed=1).requires_grad_(), random(1, 3, 2, 2, seed=1).requires_grad_()]
    loss = losses.feature_matching_loss(fake, real)
    expected = sum((f - r).abs().mean().item() for f, r in zip(fake, real, strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-14)
    loss.backward()
    assert all(f.grad is not None for f in fake)
    assert all(r.grad is None for r in real)


def test_consistency_loss_has_the_gradient_that_the_published_one_cuts():
    features, target, flags = random(2, 3, 4, 5).requires_grad_(), random(2, 3, 4, 5, seed=1), mask(4, 5)[:, 0]
    exact = losses.consistency_loss(features, target, flags)
    published = losses.consistency_loss(features, target, flags, gradient="published")
    weights = flags[:, None].double()
    assert exact.item() == published.item() == pytest.approx(((weights * features - target) ** 2).mean().item())
    exact.backward()
    torch.testing.assert_close(features.grad, (2 * weights * (features - target) / features.numel()).detach())
    assert not published.requires_grad


def test_consistency_loss_reaches_csa_from_both_of_its_features():
    torch.manual_seed(0)
    model = CSA(channels=4, depth=5)
    image, hole = random(1, 3, 32, 32).sigmoid().float(), torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    hole[..., 8:24, 8:24] = True
    flags = model.refinement_generator.levels()[2].model["5"].set_mask(hole)
    stages = model.stages(image, hole, return_features=True)
    for features in (stages.attention, stages.decoder):
        model.zero_grad()
        losses.consistency_loss(features, torch.ones_like(features), flags).backward(retain_graph=True)
        reached = [p.grad is not None and bool(p.grad.any()) for p in model.coarse_generator.parameters()]
        assert all(reached[:2])


# VGG ------------------------------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
    "vgg19": (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34),
}
"""torchvision's numbers."""
LAYERS = {
    "vgg16": {"relu1_1": 1, "conv3_3": 14, "relu3_3": 15, "pool3": 16, "relu4_3": 22, "pool5": 30},
    "vgg19": {"relu2_2": 8, "relu3_4": 17, "relu4_4": 26, "relu5_1": 29, "relu5_2": 31, "pool5": 36},
}


@pytest.mark.parametrize("architecture", CONVOLUTIONS)
def test_vgg_has_torchvisions_names_and_layers(architecture):
    torch.manual_seed(0)
    layers = LAYERS[architecture]
    vgg = VGGFeatures(architecture, list(layers))
    assert list(vgg.state_dict()) == [
        f"features.{n}.{k}" for n in CONVOLUTIONS[architecture] for k in ("weight", "bias")
    ]
    assert [vgg.features[n].out_channels for n in CONVOLUTIONS[architecture][:4]] == [64, 64, 128, 128]
    image = random(1, 3, 32, 40).float()
    features = vgg(image)
    assert list(features) == list(layers)
    for name, number in layers.items():
        assert torch.equal(features[name], vgg.features[: number + 1](image)), name
    assert features["pool5"].shape == (1, 512, 1, 1)


def test_vgg_is_no_deeper_than_its_layers_and_trains_nothing_but_the_image():
    vgg = VGGFeatures("vgg16", ("pool1", "relu1_1"))
    assert vgg.layers == ("relu1_1", "pool1")
    assert len(vgg.state_dict()) == 4
    image = random(1, 3, 8, 8).float().requires_grad_()
    perceptual_loss(vgg(image), vgg(torch.zeros_like(image))).backward()
    assert image.grad is not None
    assert image.grad.any()
    assert not any(p.requires_grad for p in vgg.parameters())


def test_vgg_normalises_with_imagenets_mean_and_deviation_if_told_to():
    torch.manual_seed(0)
    plain, normalising = VGGFeatures("vgg16", ["relu1_1"]), VGGFeatures("vgg16", ["relu1_1"], normalise=True)
    normalising.load_state_dict(plain.state_dict())
    image = random(2, 3, 8, 8).sigmoid().float()
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    by_hand = (image - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    torch.testing.assert_close(normalising(image)["relu1_1"], plain(by_hand)["relu1_1"])


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What torchvision saves, but for the size of what is not read."""
    torch.manual_seed(0)
    state = {**VGGFeatures("vgg16", ["pool5"]).state_dict(), "classifier.0.weight": torch.zeros(1)}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return path


def test_vgg_takes_its_weights_from_torchvisions_file(vgg16):
    vgg = VGGFeatures("vgg16", ["pool2"], weights=vgg16)
    saved = torch.load(vgg16, weights_only=True)
    assert len(vgg.state_dict()) == 8
    assert all(torch.equal(tensor, saved[name]) for name, tensor in vgg.state_dict().items())
    with pytest.raises(CheckpointError, match=r"vgg16\.pth: expected torchvision's weights of vgg19, got a file that"):
        VGGFeatures("vgg19", ["pool1"], weights=vgg16)


def test_vgg_refuses_files_that_are_not_its_weights(tmp_path, vgg16):
    state = dict.fromkeys(torch.load(vgg16, weights_only=True), torch.zeros(1))
    for name, saved, message in (
        ("shape", state, r"features\.0\.weight: expected the shape \[64, 3, 3, 3\], got \[1\]"),
        ("missing", {k: v for k, v in state.items() if k != "features.5.bias"}, r"lacks features\.5\.bias"),
        ("batch_norm", {**state, "features.1.weight": torch.zeros(1)}, r"has features\.1\.weight"),
        ("list", [1], r"lacks features\.0\.bias"),
    ):
        torch.save(saved, tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            VGGFeatures("vgg16", ["pool1"], weights=tmp_path / name)


def test_download_keeps_the_file_in_torch_hubs_folder_and_checks_its_hash(tmp_path, monkeypatch):
    source = tmp_path / "vgg16-weights.pth"
    source.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()[:8]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(perceptual, "_FILES", {"vgg16": (source.as_uri(), "0" * 8)})
    with pytest.raises(RuntimeError, match="hash"):
        perceptual.download_vgg("vgg16")
    monkeypatch.setattr(perceptual, "_FILES", {"vgg16": (source.as_uri(), digest)})
    path = perceptual.download_vgg("vgg16")
    assert path == tmp_path / "home" / "hub" / "checkpoints" / source.name
    assert path.read_bytes() == b"weights"
    source.unlink()
    assert perceptual.download_vgg("vgg16") == path


def test_gram_matrix_by_hand_and_in_half_precision():
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, -1.0]]]])
    assert torch.equal(gram_matrix(features), torch.tensor([[[5.0, 1.0], [1.0, 10.0]]]) / 4)
    large = torch.full((1, 4, 64, 64), 200.0, dtype=torch.float16)  # its sum of squares is beyond half precision
    torch.testing.assert_close(gram_matrix(large), torch.full((1, 4, 4), 1e4, dtype=torch.float16), rtol=1e-2, atol=0)


def test_perceptual_and_style_losses_add_the_layers_asked_for():
    x = {"a": random(2, 3, 4, 4), "b": random(2, 5, 2, 2)}
    y = {"a": random(2, 3, 4, 4, seed=1), "b": random(2, 5, 2, 2, seed=1)}
    content = {name: float((x[name] - y[name]).abs().mean()) for name in x}
    style = {name: float((gram_matrix(x[name]) - gram_matrix(y[name])).abs().mean()) for name in x}
    for loss, parts in ((perceptual_loss, content), (style_loss, style)):
        assert float(loss(x, y)) == pytest.approx(sum(parts.values()), rel=1e-13)
        assert float(loss(x, y, ["b"])) == pytest.approx(parts["b"], rel=1e-13)
        assert float(loss(x, x)) == 0
    moved = {name: value.flip(3) for name, value in x.items()}
    assert float(style_loss(moved, x)) == pytest.approx(0, abs=1e-15)


def test_published_layers_exist():
    for architecture, layers in (
        ("vgg19", perceptual.EDGE_CONNECT_CONTENT + perceptual.EDGE_CONNECT_STYLE),
        ("vgg16", perceptual.PARTIAL_CONV),
        ("vgg16", (perceptual.CSA_ADVERSARIAL, perceptual.CSA_CONSISTENCY)),
        ("vgg16", perceptual.GUIDED_FACE),
    ):
        assert set(VGGFeatures(architecture, layers).layers) == set(layers)


# Errors ---------------------------------------------------------------------------------------------------------------

IMAGE = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.masked_l1_loss(IMAGE, IMAGE[:1], IMAGE[:, :1]),
            r"target: expected the shape of output, \[2, 3",
        ),
        (lambda: losses.masked_l1_loss(IMAGE, IMAGE, IMAGE), r"mask: expected shape \[B\|1, 1, H, W\]"),
        (lambda: losses.masked_mse_loss(IMAGE[0], IMAGE[0], IMAGE), r"output: expected shape \[B, C, H, W\]"),
        (lambda: losses.masked_l1_loss(IMAGE.long(), IMAGE, IMAGE), "output: expected a floating-point tensor"),
        (lambda: losses.discounted_l1_loss(IMAGE, IMAGE, 1.5), "gamma: expected a number >= 0 and <= 1, got 1.5"),
        (lambda: losses.spatial_discount(0, 4), "height: expected a number >= 1, got 0"),
        (lambda: losses.total_variation_loss(IMAGE[:, :, :1]), "image: expected a height and width of at least 2"),
        (lambda: losses.total_variation_loss(IMAGE, IMAGE[0]), r"hole: expected shape \[B\|1, 1, H, W\]"),
        (lambda: losses.hinge_generator_loss(IMAGE.int()), "fake: expected a floating-point tensor, got torch.int32"),
        (lambda: losses.gradient_penalty(torch.sum, IMAGE, IMAGE[:1]), "real: expected the shape of fake"),
        (lambda: losses.gradient_penalty(torch.sum, IMAGE, IMAGE, position=torch.zeros(2)), "position: expected shape"),
        (
            lambda: losses.feature_matching_loss([IMAGE], []),
            "fake, real: expected maps of the same layers, got 1 and 0",
        ),
        (lambda: losses.feature_matching_loss([IMAGE], [IMAGE[:1]]), r"real\[0\]: expected the shape of fake\[0\]"),
        (lambda: losses.consistency_loss(IMAGE, IMAGE, IMAGE), r"flags: expected shape \[B\|1, h, w\]"),
        (
            lambda: losses.consistency_loss(IMAGE, IMAGE, IMAGE[:, 0], gradient="no"),
            "gradient: expected one of 'exact'",
        ),
        (lambda: gram_matrix(IMAGE[0]), "features: expected shape"),
        (lambda: perceptual_loss({"a": IMAGE}, {"b": IMAGE}), "target: expected the layer 'a', got 'b'"),
        (lambda: style_loss({"a": IMAGE}, {"a": IMAGE[:1]}), "target: expected a of the shape of features"),
        (lambda: perceptual_loss({}, {}), "layers: expected at least one, got none"),
        (lambda: VGGFeatures("vgg11", ["pool1"]), "architecture: expected one of 'vgg16', 'vgg19', got 'vgg11'"),
        (lambda: VGGFeatures("vgg16", ["relu3_4"]), "layers: expected one of 'conv1_1'"),
        (lambda: VGGFeatures("vgg16", "pool1"), "layers: expected a sequence of names, got 'pool1'"),
        (lambda: VGGFeatures("vgg16", ["pool3"])(IMAGE), "image: expected a height and width of at least 8"),
        (lambda: VGGFeatures("vgg16", ["pool1"])(IMAGE[:, :1]), r"image: expected shape \[B, 3, H, W\]"),
        (lambda: perceptual.download_vgg("vgg13"), "architecture: expected one of 'vgg16', 'vgg19', got 'vgg13'"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
