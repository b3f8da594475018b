"""One training step against the public trainers: equal weights, images and random numbers, equal weights afterwards.

Optional: needs a folder with checkouts (``INPAINT_PEERS=DIR``), see benches/peers.py. In float64. Errors are those of
all parameters as one vector, relative to how far the public step moved them.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from inpaint_kernels.models import CSA, GLCIC, Box, DeepFillV1, EdgeConnect
from inpaint_kernels.models import training as ours
from inpaint_kernels.models.edge_connect import to_gray
from inpaint_kernels.models.perceptual import (
    CSA_ADVERSARIAL,
    CSA_CONSISTENCY,
    EDGE_CONNECT_CONTENT,
    EDGE_CONNECT_STYLE,
    VGGFeatures,
)
from inpaint_kernels.models.random_masks import box_masks
from inpaint_kernels.models.training import Batch, TrainingSystem
from torch import Tensor, nn

from benches import trainer_case
from benches.harness import relative_errors
from benches.peer_models import csa_depth, csa_options, edges_of, smooth_image, unit_image
from benches.peers import (
    CSA_REPOSITORY,
    as_written_for,
    csa_as_written_for,
    find_checkout,
    import_file,
    import_module,
)
from benches.published_trainer import REPOSITORY, PublishedTrainer

TOLERANCE = 1e-5
DTYPE = torch.float64
SIZE = 64
WINDOWS, HOLES = [Box(8, 12, 40, 44)], [Box(11, 14, 37, 42)]
REAL_WINDOWS = [Box(20, 3, 52, 35)]

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    given = request.config.getoption("--peers", None) or os.environ.get("INPAINT_PEERS")
    if not given:
        pytest.skip("no checkouts of public trainers (INPAINT_PEERS=DIR)")
    return Path(given)


@pytest.fixture(autouse=True)
def _published_constants() -> Iterator[None]:
    """Networks and constants that the public code creates are of float64."""
    torch.manual_seed(0)
    with as_written_for(torch.zeros((), dtype=DTYPE)):
        yield


def checkout(repository: str, folder: Path) -> Path:
    found = find_checkout(repository, folder)
    if found is None:
        pytest.skip(f"no checkout of {repository} in {folder}")
    return found


def batch_of(size: int = SIZE, count: int = 2, **guidance: Tensor) -> Batch:
    image = unit_image(size, count, 3).to(DTYPE)
    return Batch(image, box_masks(HOLES, size), WINDOWS, REAL_WINDOWS, **guidance)


def states(networks: Mapping[str, nn.Module]) -> dict[str, State]:
    return {
        name: {key: value.detach().clone() for key, value in network.state_dict().items()}
        for name, network in networks.items()
    }


class Comparison:
    """A public trainer's networks beside ours, which take over their weights.

    Args:
        name: for what is printed.
        system: ours.
        published: the public networks, by our names.
        renamed: (our name of the network, key of the public network) -> key of ours.
    """

    def __init__(
        self,
        name: str,
        system: TrainingSystem,
        published: Mapping[str, nn.Module],
        renamed: Callable[[str, str], str] = lambda _, key: key,
    ) -> None:
        self.name, self.system, self.published, self.renamed = name, system, published, renamed
        for network, state in self._published_states().items():
            own = system.networks[network].state_dict()
            kept = {key: value for key, value in state.items() if key in own}
            system.networks[network].load_state_dict(kept)
        self.before = states(system.networks)

    def _published_states(self) -> dict[str, State]:
        return {
            name: {self.renamed(name, key): value for key, value in state.items()}
            for name, state in states(self.published).items()
        }

    def check(self, *moved: str) -> None:
        """After one step of each side, or several: the networks named moved, alike; the others stayed."""
        theirs = self._published_states()
        for name, network in self.system.networks.items():
            if name not in self.published:
                continue
            errors = self._errors(name, network, theirs[name])
            print(f"{self.name:34} {name:22} {errors}")
            assert (errors.moved > 0) == (name in moved), (name, errors)
            assert errors.parameters <= TOLERANCE, (name, errors)
            assert errors.buffers <= TOLERANCE, (name, errors)

    def _errors(self, name: str, network: nn.Module, theirs: State) -> Errors:
        trained = {key for key, _ in network.named_parameters()}
        difference, displacement, buffers = [], [], [0.0]
        for key, value in network.state_dict().items():
            if key not in theirs or not value.is_floating_point():
                continue
            gap = (value - theirs[key]).flatten()
            if key in trained:
                difference.append(gap)
                displacement.append((theirs[key] - self.before[name][key]).flatten())
            else:
                buffers.append(float(gap.norm() / theirs[key].norm()))
        moved = float(torch.cat(displacement).norm())
        return Errors(float(torch.cat(difference).norm()) / (moved or 1.0), max(buffers), moved)


class Errors(SimpleNamespace):
    """Of one network: parameters in units of their displacement, buffers in units of their size."""

    def __init__(self, parameters: float, buffers: float, moved: float) -> None:
        super().__init__(parameters=parameters, buffers=buffers, moved=moved)

    def __str__(self) -> str:
        return f"moved {self.moved:.2e}, error {self.parameters:.1e} of that, of buffers {self.buffers:.1e}"


# DeepFill v1 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.2, 2.0])
def test_deepfill_v1_is_daa233s(folder, weight):
    """Its train.py's step, but that both losses' gradients are taken before the optimisers step, as torch demands."""
    box = WINDOWS[0].size[0]
    trainer = PublishedTrainer(checkout(REPOSITORY, folder), SIZE, box, weight)
    settings = ours.DeepFillV1Settings(
        coarse_l1_weight=weight, l1_weight=weight, known_l1_weight=weight, generator_every=1
    )
    system = ours.DeepFillV1Training(DeepFillV1("daa233"), settings, image_size=SIZE, box_size=box)
    comparison = Comparison(f"daa233, L1 weights {weight}", system, trainer.networks)

    for _ in range(2):
        batch = batch_of()
        random = torch.Generator()
        random.set_state(system.random.get_state())
        losses = system.step(batch)
        truth, masks = 2 * batch.image - 1, batch.mask.to(DTYPE).expand(2, -1, -1, -1)
        corners = torch.tensor([(b.top, b.left, *b.size) for b in WINDOWS] * 2)
        positions = [torch.rand(2, 1, 1, 1, generator=random, dtype=DTYPE) for _ in range(2)]
        with mock.patch.object(torch, "rand", lambda *_, positions=positions: positions.pop(0)):
            published = trainer.losses(truth * (1 - masks), corners, masks, truth)
        trainer.step(published)
        assert losses["generator"] == pytest.approx(published["g"].item(), rel=1e-7)  # its discount is of float32
        assert losses["discriminator"] == pytest.approx(published["d"].item(), rel=1e-7)
        comparison.check(*trainer.networks)


def test_the_race_of_trainers_is_between_equals(folder):
    """What benches/trainer_case.py times on a GPU: losses of the first cycle, in float32."""
    checkout(REPOSITORY, folder)
    torch.set_default_dtype(torch.float32)
    case = trainer_case.TrainerCase(64, 2, folder, device="cpu")
    published, ours = (case.provider(name).run() for name in case.provider_names)
    assert relative_errors(ours, published)[0] < 1e-4


# GLCIC ----------------------------------------------------------------------------------------------------------------


def test_glcic_is_otenims_in_its_three_phases(folder):
    """The bodies of the three loops of its train.py, which is one function that needs a GPU and a folder of photos."""
    root = checkout("otenim/GLCIC-PyTorch", folder)
    models, losses = import_file(root, "models.py"), import_file(root, "losses.py")
    crop = import_file(root, "utils.py", stand_ins=("torchvision", "cv2")).crop
    box = WINDOWS[0].size[0]
    completion = models.CompletionNetwork()
    critic = models.ContextDiscriminator((3, box, box), (3, SIZE, SIZE), arc="celeba")
    mean = torch.tensor([0.4, 0.5, 0.3]).view(1, 3, 1, 1)
    alpha, bce = 4e-4, nn.BCELoss()
    of_completion, of_critic = (torch.optim.Adadelta(network.parameters()) for network in (completion, critic))
    generator = GLCIC("otenim", mean_color=(0.4, 0.5, 0.3))
    system = ours.GLCICTraining(generator, image_size=SIZE, box_size=box, global_layers=5)
    networks = {"generator": completion, "discriminator": critic}

    batch = batch_of()
    x, mask = batch.image, batch.mask.to(DTYPE).expand(2, -1, -1, -1)
    areas = [((b.left, b.top), (b.size[1], b.size[0])) for b in (*WINDOWS, *REAL_WINDOWS)]
    zeros, ones = torch.zeros(2, 1), torch.ones(2, 1)

    def complete() -> Tensor:
        return completion(torch.cat((x - x * mask + mean * mask, mask), 1))

    def judge(image: Tensor, area: Any) -> Tensor:
        return critic((crop(image, area), image))

    def train(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    comparison = Comparison("otenim, completion", system, networks)
    train(of_completion, losses.completion_network_loss(x, complete(), mask))
    system.step(batch)
    comparison.check("generator")

    comparison = Comparison("otenim, discriminator", system, networks)
    system.phase = "discriminator"
    fake = bce(judge(complete().detach(), areas[0]), zeros)
    train(of_critic, (fake + bce(judge(x, areas[1]), ones)) / 2)
    system.step(batch)
    comparison.check("discriminator")

    comparison = Comparison("otenim, joint", system, networks)
    system.phase = "joint"
    output = complete()
    fake = bce(judge(output.detach(), areas[0]), zeros)
    train(of_critic, (fake + bce(judge(x, areas[1]), ones)) * alpha / 2)
    loss = losses.completion_network_loss(x, output, mask) + alpha * bce(judge(output, areas[0]), ones)
    train(of_completion, loss / 2)
    system.step(batch)
    comparison.check("generator", "discriminator")


# VGG in place of torchvision's ----------------------------------------------------------------------------------------


@contextmanager
def torchvision_of(vgg: VGGFeatures, layers: int) -> Iterator[dict[str, types.ModuleType]]:
    """A package whose VGG is ours, with as many more layers behind as the public code walks over."""
    network = nn.Module()
    network.features = nn.Sequential(*vgg.features, *(nn.Identity() for _ in range(layers - len(vgg.features))))
    package, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    setattr(models, vgg.architecture, lambda pretrained: network)
    vars(package).update(models=models, transforms=types.ModuleType("torchvision.transforms"))
    yield {"torchvision": package, "torchvision.models": models}


def vgg_of(architecture: str, layers: tuple[str, ...]) -> VGGFeatures:
    """With random weights that keep the features' scale."""
    vgg = VGGFeatures(architecture, layers).to(DTYPE)
    for layer in vgg.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return vgg


# EdgeConnect ----------------------------------------------------------------------------------------------------------


def backward(model: Any, generator_loss: Tensor, discriminator_loss: Tensor) -> None:
    """The published method, but that both gradients are taken before the optimisers step, as torch demands."""
    discriminator_loss.backward(inputs=list(model.discriminator.parameters()))
    generator_loss.backward(inputs=list(model.generator.parameters()))
    model.dis_optimizer.step()
    model.gen_optimizer.step()


@pytest.mark.parametrize("phase", ["guide", "inpaint", "inpaint_predicted"])
def test_edge_connect_is_knazeris(folder, phase):
    root = checkout("knazeri/edge-connect", folder)
    vgg = vgg_of("vgg19", EDGE_CONNECT_CONTENT + EDGE_CONNECT_STYLE)
    config = SimpleNamespace(
        PATH=".",
        GPU=[],
        GAN_LOSS="nsgan",
        LR=1e-4,
        D2G_LR=0.1,
        BETA1=0.0,
        BETA2=0.9,
        FM_LOSS_WEIGHT=10,
        L1_LOSS_WEIGHT=1,
        CONTENT_LOSS_WEIGHT=0.1,
        STYLE_LOSS_WEIGHT=250,
        INPAINT_ADV_LOSS_WEIGHT=0.1,
    )
    with torchvision_of(vgg, 37) as provided:
        module = import_module(root, "src.models", provided=provided)
        edge_model, inpaint_model = module.EdgeModel(config), module.InpaintingModel(config)
    system = ours.EdgeConnectTraining(EdgeConnect().to(DTYPE), vgg)
    system.phase = phase
    networks = {
        "guide_generator": edge_model.generator,
        "guide_discriminator": edge_model.discriminator,
        "inpaint_generator": inpaint_model.generator,
        "image_discriminator": inpaint_model.discriminator,
    }
    comparison = Comparison(f"knazeri, {phase}", system, networks)

    image = unit_image(32, 2, 3).to(DTYPE)
    edges, mask = edges_of(image), box_masks([Box(6, 8, 22, 26)], 32)
    losses = system.step(Batch(image, mask, edges=edges))
    gray, masks = to_gray(image), mask.to(DTYPE).expand(2, -1, -1, -1)
    edge_model.train()
    inpaint_model.train()
    if phase == "guide":
        _, generator_loss, discriminator_loss, _ = edge_model.process(gray, edges, masks)
        trained = edge_model
    else:
        guide = edges
        if phase == "inpaint_predicted":
            predicted = edge_model(gray, edges, masks)
            guide = (predicted * masks + edges * (1 - masks)).detach()
        _, generator_loss, discriminator_loss, _ = inpaint_model.process(image, guide, masks)
        trained = inpaint_model
    backward(trained, generator_loss, discriminator_loss)
    assert losses["generator"] == pytest.approx(generator_loss.item(), rel=1e-9)
    assert losses["discriminator"] == pytest.approx(discriminator_loss.item(), rel=1e-9)
    comparison.check(*(list(networks)[:2] if phase == "guide" else list(networks)[2:]))


def test_edge_connects_published_step_raises_and_ours_runs(folder):
    root = checkout("knazeri/edge-connect", folder)
    config = SimpleNamespace(
        PATH=".", GPU=[], GAN_LOSS="nsgan", LR=1e-4, D2G_LR=0.1, BETA1=0.0, BETA2=0.9, FM_LOSS_WEIGHT=10
    )
    model = import_module(root, "src.models", stand_ins=("torchvision",)).EdgeModel(config)
    image, mask = unit_image(32, 1, 3).to(DTYPE), box_masks([Box(6, 8, 22, 26)], 32).to(DTYPE)
    _, *losses, _ = model.process(to_gray(image), edges_of(image), mask)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model.backward(*losses)
    system = ours.EdgeConnectTraining(EdgeConnect().to(DTYPE), None)
    assert system.step(Batch(image, mask, edges=edges_of(image)))["generator"].isfinite()


# CSA ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_csa_is_kumapowerlius_with_its_mistakes(folder):
    """Two steps, the second with another mask: the published layer keeps the first one's positions."""
    root = checkout(CSA_REPOSITORY, folder)
    vgg = vgg_of("vgg16", (CSA_ADVERSARIAL, CSA_CONSISTENCY))
    fill, as_float = Tensor.masked_fill_, Tensor.float
    with torchvision_of(vgg, 31) as provided:
        module = import_module(root, "models.CSA", provided=provided)
    networks = module.networks

    def of_depth(network: Any) -> Callable[..., None]:
        published = network.__init__

        def build(self: nn.Module, in_channels: int, out_channels: int, _: int, *rest: Any, **options: Any) -> None:
            published(self, in_channels, out_channels, csa_depth(SIZE), *rest, **options)

        return build

    options = csa_options(SIZE)
    options.mask_type = "random"
    with (
        csa_as_written_for(torch.zeros((), dtype=DTYPE)),
        # Newer torch takes no masks of bytes.
        mock.patch.object(Tensor, "masked_fill_", lambda tensor, mask, value: fill(tensor, mask.bool(), value)),
        # Its masks go through convolutions of the default dtype.
        mock.patch.object(Tensor, "float", lambda tensor: as_float(tensor).to(DTYPE)),
        mock.patch.object(nn.Module, "cuda", lambda network: network),
        mock.patch.object(networks.UnetGenerator, "__init__", of_depth(networks.UnetGenerator)),
        mock.patch.object(networks.UnetGeneratorCSA, "__init__", of_depth(networks.UnetGeneratorCSA)),
    ):
        trainer = module.CSA()
        trainer.initialize(options)
        trainer.device = torch.device("cpu")
        model = CSA(depth=csa_depth(SIZE)).to(DTYPE)
        system = ours.CSATraining(model, vgg, ours.CSASettings(published=True))
        pair = nn.ModuleDict({"coarse_generator": trainer.netP, "refinement_generator": trainer.netG})
        published = {
            "generator": pair,
            "image_discriminator": trainer.netD,
            "feature_discriminator": trainer.netF,
        }
        comparison = Comparison("KumapowerLIU", system, published)
        for step, hole in enumerate((Box(12, 16, 44, 48), Box(20, 4, 50, 40))):
            image = smooth_image(SIZE, 1, 5 + step).to(DTYPE)
            mask = box_masks([hole], SIZE)
            losses = system.step(Batch((image + 1) / 2, mask))
            trainer.set_input(image, mask.byte())
            trainer.set_gt_latent()
            trainer.optimize_parameters()
            comparison.check(*published)
            assert losses["generator"] == pytest.approx(trainer.loss_G.item(), rel=1e-6)
