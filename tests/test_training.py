"""One step of every system: what it trains, what it leaves alone, that it goes on as before after a break."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from inpaint_kernels.models import (
    CSA,
    GLCIC,
    Box,
    DeepFillV1,
    DeepFillV2,
    EdgeConnect,
    GuidedFace,
    PartialConvUNet,
    training,
)
from inpaint_kernels.models import deepfill_v1 as v1
from inpaint_kernels.models import deepfill_v2 as v2
from inpaint_kernels.models.perceptual import (
    CSA_ADVERSARIAL,
    CSA_CONSISTENCY,
    EDGE_CONNECT_CONTENT,
    EDGE_CONNECT_STYLE,
    GUIDED_FACE,
    PARTIAL_CONV,
)
from inpaint_kernels.models.training import Batch, TrainingSystem
from torch import Tensor, nn

BOX = Box(8, 12, 40, 44)
HOLE = Box(12, 15, 30, 31)


@pytest.fixture(autouse=True)
def _one_thread(_reproducible: None) -> None:
    """Maps are too small for two."""
    torch.set_num_threads(1)


class SlimFeatures(nn.Module):
    """In place of VGG: frozen convolutions that halve the size, one for each layer asked for."""

    def __init__(self, layers: tuple[str, ...], channels: int = 4) -> None:
        super().__init__()
        self.layers = layers
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels if i else 3, channels, 3, 2, 1) for i in range(len(layers))
        )
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = {}
        for layer, convolution in zip(self.layers, self.convolutions, strict=True):
            image = convolution(image).tanh()
            features[layer] = image
        return features


class SlimCSAFeatures(nn.Module):
    """As VGG's layers that CSA takes: both at an eighth of the size, the second as wide as a CSA of 4 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 32, 1)
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = self.first(image).tanh()
        return {CSA_ADVERSARIAL: features, CSA_CONSISTENCY: self.second(features)}


def deepfill_v1(**settings: Any) -> training.DeepFillV1Training:
    generator = DeepFillV1(replace(v1.DIALECTS["daa233"], width=4))
    return training.DeepFillV1Training(
        generator, training.DeepFillV1Settings(**settings), image_size=64, box_size=32, seed=1
    )


def deepfill_v2(guided: bool = False, **settings: Any) -> training.DeepFillV2Training:
    generator = DeepFillV2(replace(v2.DIALECTS["nipponjo"], width=4), guided)
    return training.DeepFillV2Training(generator, training.DeepFillV2Settings(**settings))


def glcic() -> training.GLCICTraining:
    return training.GLCICTraining(GLCIC("otenim"), image_size=64, box_size=32)


def edge_connect(**settings: Any) -> training.EdgeConnectTraining:
    layers = tuple(dict.fromkeys((*EDGE_CONNECT_CONTENT, *EDGE_CONNECT_STYLE)))
    return training.EdgeConnectTraining(EdgeConnect(1), SlimFeatures(layers), training.EdgeConnectSettings(**settings))


def guided_face(gh_input: str = "masked", **settings: Any) -> training.GuidedFaceTraining:
    features = SlimFeatures(GUIDED_FACE)
    return training.GuidedFaceTraining(GuidedFace(gh_input, 1), features, training.GuidedFaceSettings(**settings))


def csa(**settings: Any) -> training.CSATraining:
    return training.CSATraining(CSA(4, 6), SlimCSAFeatures(), training.CSASettings(**settings), feature_channels=8)


def partial_conv(**settings: Any) -> training.PartialConvTraining:
    return training.PartialConvTraining(
        PartialConvUNet(), SlimFeatures(PARTIAL_CONV), training.PartialConvSettings(**settings)
    )


@dataclass(frozen=True)
class Case:
    """A system in a phase.

    Attributes:
        build: the system.
        phase: None: its first.
        trained: networks whose parameters a step moves.
        size: of images.
        guidance: of the batch.
    """

    name: str
    build: Callable[[], TrainingSystem]
    phase: str | None
    trained: tuple[str, ...]
    size: int = 64
    guidance: tuple[str, ...] = ()


UNTRAINABLE = {
    ("local_critic", "linear.bias"),
    ("global_critic", "linear.bias"),
    ("image_discriminator", "model.11.bias"),
    ("feature_discriminator", "model.5.bias"),
}
"""Wasserstein and relativistic losses take differences of scores."""
GUIDED = ("guide_generator", "guide_discriminator")
PAINTED = ("inpaint_generator", "image_discriminator")
CSA_NETWORKS = ("generator", "image_discriminator", "feature_discriminator")
CASES = (
    Case(
        "deepfill_v1",
        lambda: deepfill_v1(generator_every=1),
        None,
        ("generator", "local_critic", "global_critic"),
    ),
    Case("deepfill_v1_critics", deepfill_v1, None, ("local_critic", "global_critic")),
    Case(
        "deepfill_v1_official",
        lambda: deepfill_v1(generator_every=1, masked_penalty=True, normalise_known=True, local_width=512),
        None,
        ("generator", "local_critic", "global_critic"),
    ),
    Case("deepfill_v2", deepfill_v2, None, ("generator", "discriminator")),
    Case(
        "deepfill_v2_guided",
        lambda: deepfill_v2(True, adversarial="least_squares"),
        None,
        ("generator", "discriminator"),
        guidance=("sketch",),
    ),
    Case("glcic_completion", glcic, "completion", ("generator",)),
    Case("glcic_discriminator", glcic, "discriminator", ("discriminator",)),
    Case("glcic_joint", glcic, "joint", ("generator", "discriminator")),
    Case("edge_connect_guide", edge_connect, "guide", GUIDED, guidance=("edges",), size=32),
    Case("edge_connect_inpaint", edge_connect, "inpaint", PAINTED, guidance=("edges",), size=32),
    Case("edge_connect_predicted", lambda: edge_connect(adversarial="hinge"), "inpaint_predicted", PAINTED, size=32),
    Case("edge_connect_joint", edge_connect, "joint", GUIDED + PAINTED, guidance=("edges",), size=32),
    Case("guided_face_guide", guided_face, "guide", GUIDED, size=32),
    Case("guided_face_inpaint", lambda: guided_face(conditional=True), "inpaint", PAINTED, size=32),
    Case("guided_face_predicted", lambda: guided_face("literal"), "inpaint_predicted", PAINTED, size=32),
    Case("guided_face_joint", guided_face, "joint", GUIDED + PAINTED, size=32),
    Case("csa", csa, None, CSA_NETWORKS),
    Case("csa_published", lambda: csa(published=True), None, CSA_NETWORKS),
    Case("partial_conv", partial_conv, "training", ("generator",), size=128),
    Case("partial_conv_finetuning", partial_conv, "finetuning", ("generator",), size=128),
)


def built(case: Case) -> TrainingSystem:
    torch.manual_seed(0)
    system = case.build()
    if case.phase is not None:
        system.phase = case.phase
    return system


def batch_of(size: int = 64, *guidance: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, size // 8, size // 8, generator=generator, dtype=dtype)
    image = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    image = (image + 0.1 * torch.rand(image.shape, generator=generator, dtype=dtype)) / 1.1
    mask = torch.zeros(1, 1, size, size, dtype=torch.bool)
    HOLE.of(mask)[:] = True
    lines = (torch.rand(2, 1, size, size, generator=generator, dtype=dtype) > 0.8).to(dtype)
    return Batch(image, mask, [BOX], [Box(0, 0, *BOX.size)], **dict.fromkeys(guidance, lines))


def parameters_of(system: TrainingSystem) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: p.detach().clone() for key, p in network.named_parameters()}
        for name, network in system.networks.items()
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_moves_what_it_trains_and_nothing_else(case):
    system, batch = built(case), batch_of(case.size, *case.guidance)
    before = parameters_of(system)
    losses = system.step(batch)
    assert losses
    assert all(loss.dim() == 0 and not loss.requires_grad and loss.isfinite() for loss in losses.values()), losses
    assert system.steps == 1
    for name, network in system.networks.items():
        for key, parameter in network.named_parameters():
            moved = not torch.equal(parameter, before[name][key])
            assert moved == (name in case.trained) or (name, key) in UNTRAINABLE, f"{name}.{key}"


def _halves(batch: Batch) -> tuple[Batch, Batch]:
    parts = zip(*(x.chunk(2) if isinstance(x, Tensor) and len(x) == 2 else (x, x) for x in _values(batch)), strict=True)
    return Batch(*next(parts)), Batch(*next(parts))


def _values(batch: Batch) -> list[Any]:
    return [getattr(batch, field.name) for field in fields(batch)]


def test_gradients_of_several_batches_are_averaged():
    """The critics are Wasserstein's, and the generator meets them as they were: losses are means over images.

    The penalty's random places come in another order, so it is left out.
    """
    batch = batch_of()
    whole, parted = (deepfill_v1(generator_every=1, penalty_weight=0) for _ in range(2))
    parted.load_state_dict(whole.state_dict())
    before = parameters_of(whole)
    losses = whole.step(batch), parted.step(*_halves(batch))
    assert parted.steps == 1
    assert losses[0].keys() == losses[1].keys()
    for name in losses[0].keys() - {"penalty"}:
        torch.testing.assert_close(losses[0][name], losses[1][name], rtol=1e-4, atol=1e-6, msg=name)
    for one, other in zip(*(system.networks.values() for system in (whole, parted)), strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6)
    moved = parameters_of(parted)
    assert any(not torch.equal(moved["generator"][key], p) for key, p in before["generator"].items())


def test_deepfill_v1_records_its_generator_in_its_own_steps_alone():
    system = deepfill_v1(generator_every=3)
    recorded: list[bool] = []
    system.generator.register_forward_hook(lambda *outputs: recorded.append(outputs[2].output.requires_grad))
    for _ in range(6):
        system.step(batch_of())
    assert recorded == [False, False, True, False, False, True]


def test_an_optimiser_steps_once_with_the_last_of_several_batches():
    system = deepfill_v2()
    steps: list[str] = []
    for name, optimizer in system.optimizers.items():
        optimizer.register_step_post_hook(lambda *_, name=name: steps.append(name))
    system.step(batch_of(), batch_of(seed=1), batch_of(seed=2))
    assert steps == ["discriminator", "generator"]
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        system.step()


def test_the_rate_factor_scales_all_rates():
    system = partial_conv()
    assert system.rate_factor == 1
    system.rate_factor = 0.5
    assert rates_of(system) == {"generator": 1e-4}
    system.phase = "finetuning"
    assert rates_of(system) == {"generator": 2.5e-5}
    other = partial_conv()
    other.load_state_dict(system.state_dict())
    assert (other.rate_factor, rates_of(other)) == (0.5, {"generator": 2.5e-5})
    with pytest.raises(ValueError, match="rate_factor"):
        system.rate_factor = -1.0


def rates_of(system: TrainingSystem) -> dict[str, float]:
    return {name: optimizer.param_groups[0]["lr"] for name, optimizer in system.optimizers.items()}


def test_gradients_are_reduced_before_an_optimiser_steps():
    system = deepfill_v2()
    before = parameters_of(system)
    system.reduce_gradients = lambda parameters: [p.grad.zero_() for p in parameters if p.grad is not None]
    system.step(batch_of())
    after = parameters_of(system)
    assert all(torch.equal(after[name][key], p) for name, own in before.items() for key, p in own.items())


RESUMED = ("deepfill_v1", "deepfill_v2", "edge_connect_guide", "csa_published")
RESUMED_SLOWLY = ("glcic_joint", "guided_face_joint", "partial_conv_finetuning")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.name in RESUMED_SLOWLY else [])
        for case in CASES
        if case.name in RESUMED + RESUMED_SLOWLY
    ],
)
def test_a_resumed_system_makes_the_same_steps(case):
    system = built(case)
    system.step(batch_of(case.size, *case.guidance))
    file = io.BytesIO()
    torch.save(system.state_dict(), file)
    file.seek(0)
    other = built(case)  # with the same frozen features
    other.load_state_dict(torch.load(file, weights_only=True))
    assert (other.steps, other.phase) == (1, system.phase)
    batch = batch_of(case.size, *case.guidance, seed=1)
    losses = [one.step(batch) for one in (system, other)]
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
    state, others = ({name: net.state_dict() for name, net in one.networks.items()} for one in (system, other))
    for name, network in state.items():
        assert all(torch.equal(value, others[name][key]) for key, value in network.items()), name


def test_the_seed_decides_the_random_positions():
    penalties = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        system = deepfill_v1()
        system.random.manual_seed(seed)
        penalties.append(system.step(batch_of())["penalty"].item())
    assert penalties[0] == penalties[1] != penalties[2]


def test_deepfill_v1_trains_the_generator_in_every_fifth_step():
    system, batch = deepfill_v1(), batch_of()
    trained = []
    for _ in range(10):
        before = parameters_of(system)["generator"]
        losses = system.step(batch)
        moved = any(not torch.equal(p, before[key]) for key, p in system.generator.named_parameters())
        assert moved == ("generator" in losses)
        trained.append(moved)
    assert trained == 2 * [False, False, False, False, True]


def test_the_three_l1_weights_against_blur():
    batch = batch_of()
    losses = []
    for weights in ({}, dict.fromkeys(("coarse_l1_weight", "l1_weight", "known_l1_weight"), 2.0)):
        torch.manual_seed(0)
        losses.append(deepfill_v1(generator_every=1, adversarial_weight=0, **weights).step(batch))
    published, raised = losses
    assert published["generator"] == pytest.approx(1.2 * (published["l1"] + published["known_l1"]).item())
    assert raised["generator"] == pytest.approx(2 * (raised["l1"] + raised["known_l1"]).item())
    assert raised["l1"] > published["l1"]
    settings = training.DeepFillV1Settings.against_blur()
    assert (settings.coarse_l1_weight, settings.l1_weight, settings.known_l1_weight) == (2.0, 2.0, 2.0)


def test_the_masked_penalty_leaves_the_critics_free_in_what_is_known():
    penalties = {}
    for masked in (False, True):
        torch.manual_seed(0)
        penalties[masked] = deepfill_v1(masked_penalty=masked).step(batch_of())["penalty"]
    assert penalties[True] != penalties[False]


def test_glcics_discriminators_see_other_windows_of_real_images():
    batch = batch_of()
    losses = []
    for windows in (batch, replace(batch, real_boxes=None), replace(batch, real_boxes=[BOX])):
        torch.manual_seed(0)
        system = glcic()
        system.phase = "discriminator"
        losses.append(system.step(windows)["discriminator"])
    assert losses[0] != losses[1]
    assert losses[1] == losses[2]


def test_glcics_joint_loss():
    system = glcic()
    system.phase = "joint"
    losses = system.step(batch_of())
    expected = (losses["mse"] + 4e-4 * losses["adversarial"]) / 2
    assert losses["generator"] == pytest.approx(expected.item())


def test_the_joint_phase_reaches_the_first_stage_through_the_second():
    """Its own losses switched off, the edge generator still learns."""
    system = edge_connect(guide_adversarial_weight=0, feature_matching_weight=0)
    system.phase = "joint"
    before = parameters_of(system)
    system.step(batch_of(32, "edges"))
    moved = {
        name: any(not torch.equal(p, before[name][key]) for key, p in network.named_parameters())
        for name, network in system.networks.items()
    }
    assert moved["guide_generator"]


def test_canny_edges_stand_in_for_missing_ones():
    pytest.importorskip("skimage")
    from inpaint_kernels.models.edge_connect import canny

    batch = batch_of()
    edges = canny(batch.image, torch.zeros(2, 1, 64, 64, dtype=torch.bool), 1.0)
    assert edges.any()
    losses = []
    for given in (batch, replace(batch, edges=edges), replace(batch, edges=1 - edges)):
        torch.manual_seed(0)
        losses.append(edge_connect(sigma=1.0).step(given)["feature_matching"])
    assert losses[0] == losses[1] != losses[2]


def test_finetuning_keeps_the_encoders_statistics_and_lowers_the_rate():
    system = partial_conv()
    batch = batch_of(128)
    statistics = {}
    for phase, rate in (("training", 2e-4), ("finetuning", 5e-5)):
        system.phase = phase
        assert [group["lr"] for group in system.optimizers["generator"].param_groups] == [rate]
        before = {name: value.clone() for name, value in system.generator.named_buffers() if "running_mean" in name}
        system.step(batch)
        statistics[phase] = {
            name for name, value in system.generator.named_buffers() if name in before and (value != before[name]).any()
        }
    assert {name[:3] for name in statistics["training"]} == {"enc", "dec"}
    assert {name[:3] for name in statistics["finetuning"]} == {"dec"}


def test_csas_published_mistakes_cut_gradients():
    """Of the published losses L1 alone reaches the first generator, and no consistency either one."""

    def gradients(**settings: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        system = csa(**settings)
        system.step(batch_of())
        return {key: p.grad for key, p in system.model.named_parameters() if p.grad is not None}

    def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
        """Generators whose gradients differ."""
        return {key.partition(".")[0] for key, value in one.items() if not torch.equal(value, other[key])}

    both = {"coarse_generator", "refinement_generator"}
    exact, published = gradients(), gradients(published=True)
    assert differing(exact, gradients(consistency_weight=0.0)) == both
    assert not differing(published, gradients(published=True, consistency_weight=0.0))
    assert differing(exact, gradients(adversarial_weight=0.0)) == both
    assert differing(published, gradients(published=True, adversarial_weight=0.0)) == {"refinement_generator"}


def test_csas_published_masked_positions_are_those_of_the_first_batch():
    batch = batch_of()
    other = torch.zeros(1, 1, 64, 64)
    other[..., 32:60, 4:60] = 1
    outputs = {}
    for published in (False, True):
        for first in (batch.mask, other):
            torch.manual_seed(0)
            system = csa(published=published, learning_rate=0.0)
            system.step(replace(batch, mask=first))
            outputs[published, first is other] = system.step(replace(batch, mask=other))["l1"]
    assert outputs[False, False] == outputs[False, True]
    assert outputs[True, False] != outputs[True, True]


# Errors ---------------------------------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong_and_change_nothing():
    system, batch = built(CASES[0]), batch_of()
    before = copy.deepcopy(system.state_dict())
    wrong: list[tuple[Batch, type[Exception], str]] = [
        (replace(batch, boxes=None), ValueError, r"boxes: expected 1 or 2 windows of 32 x 32 .* got None"),
        (replace(batch, boxes=3 * [BOX]), ValueError, r"boxes: expected 1 or 2 windows .* got 3"),
        (replace(batch, boxes=[Box(0, 0, 8, 8)]), ValueError, r"boxes: expected .* got \(0, 0, 8, 8\)"),
        (replace(batch, boxes=[Box(40, 0, 72, 32)]), ValueError, r"boxes: expected .* inside 64 x 64 pixels, got"),
        (replace(batch, mask=batch.mask[..., 1:]), ValueError, r"mask: expected shape"),
        (replace(batch, image=batch.image.double()), TypeError, r"image: expected the networks' torch.float32"),
        (batch_of(72), ValueError, r"image: expected 64 x 64, the image_size .* got 72 x 72"),
    ]
    for bad, error, message in wrong:
        with pytest.raises(error, match=message):
            system.step(bad)
    after = system.state_dict()
    assert after["steps"] == 0
    for name, network in before["networks"].items():
        assert all(torch.equal(value, after["networks"][name][key]) for key, value in network.items())


def test_errors_of_other_systems():
    with pytest.raises(ValueError, match=r"phase: expected one of 'completion', 'discriminator', 'joint', got 'third'"):
        glcic().phase = "third"
    system = glcic()
    system.phase = "discriminator"
    with pytest.raises(ValueError, match=r"real_boxes: expected 1 or 2 windows of 32 x 32"):
        system.step(replace(batch_of(), real_boxes=[HOLE]))
    with pytest.raises(ValueError, match="sketch: expected a tensor for a guided network, got None"):
        deepfill_v2(guided=True).step(batch_of())
    with pytest.raises(ValueError, match="edges: expected shape"):
        edge_connect().step(replace(batch_of(), edges=torch.zeros(1, 1, 8, 8)))
    system = training.EdgeConnectTraining(EdgeConnect(1), None)
    system.phase = "inpaint"
    with pytest.raises(ValueError, match="features: expected those of VGG-19 for the phase 'inpaint', got None"):
        system.step(batch_of(32, "edges"))
    mask = torch.ones(1, 1, 64, 64)
    with pytest.raises(ValueError, match="mask: expected known pixels"):
        csa().step(replace(batch_of(), mask=mask))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: training.DeepFillV1Settings(l1_weight=-1.0), "l1_weight: expected a number >= 0, got -1.0"),
        (lambda: training.DeepFillV1Settings(generator_every=0), "generator_every: expected a number >= 1, got 0"),
        (lambda: training.DeepFillV2Settings(adversarial="wgan"), "adversarial: expected one of 'hinge'"),
        (lambda: training.GuidedFaceSettings(betas=(0.5, 1.5)), "betas: expected a number >= 0 and <= 1, got 1.5"),
        (lambda: training.EdgeConnectSettings(adversarial="ls"), "adversarial: expected one of 'nsgan'"),
        (lambda: training.GLCICSettings(rho=2.0), "rho: expected a number <= 1, got 2.0"),
        (lambda: training.GLCICTraining(GLCIC(), global_layers=4), "global_layers: expected a number >= 5"),
        (lambda: training.DeepFillV1Training(DeepFillV1(), image_size=64), "box_size: expected a number >= 16 and"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        settings()


def test_the_state_of_another_system_is_refused():
    with pytest.raises(ValueError, match=r"state\['networks'\]: expected discriminator, generator, got .*local_critic"):
        glcic().load_state_dict(deepfill_v1().state_dict())
    with pytest.raises(
        ValueError, match="state: expected networks, optimizers, phase, random, rate_factor, steps, got"
    ):
        glcic().load_state_dict({})
