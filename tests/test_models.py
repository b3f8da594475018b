"""DeepFill v1 and v2, GLCIC and the partial convolution U-Net: published sizes, names and values; only the hole."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from inpaint_kernels.models import deepfill_v1, deepfill_v2, glcic, key_maps, partial_conv_unet
from inpaint_kernels.models._batch_norm import normalised
from inpaint_kernels.models._boxes import Box, bounding_box
from inpaint_kernels.models._interface import InpaintingModel
from inpaint_kernels.models._regions import Window
from inpaint_kernels.models.deepfill_v1 import DeepFillV1
from inpaint_kernels.models.deepfill_v2 import DeepFillV2, SNPatchGAN
from inpaint_kernels.models.glcic import GLCIC, ContextDiscriminator
from inpaint_kernels.models.partial_conv_unet import PartialConvUNet
from torch import nn

from tests.compare import relative_error
from tests.model_cases import (
    CASES,
    holes,
    narrow,
    narrow_glcic,
    photo,
    run_golden,
    seeded,
)
from tests.model_contract import Case, contract

GOLDEN = json.loads((Path(__file__).parent / "golden_pictures.json").read_text())

# name -> (network, gain of its weights)
NETWORKS: dict[str, tuple[Callable[[], InpaintingModel], float]] = {
    **{f"deepfill_v1-{d}": (lambda d=d: DeepFillV1(d), 1.5) for d in deepfill_v1.DIALECTS},  # type: ignore[misc]
    **{f"deepfill_v2-{d}": (lambda d=d: DeepFillV2(d), 5.0) for d in deepfill_v2.DIALECTS},  # type: ignore[misc]
    **{f"glcic-{d}": (lambda d=d: GLCIC(d), 1.5) for d in glcic.DIALECTS},  # type: ignore[misc]
    **{
        f"partial_conv_unet-{d}": (lambda d=d: PartialConvUNet(d), 1.5)  # type: ignore[misc]
        for d in partial_conv_unet.DIALECTS
    },
}
EVERY = pytest.mark.parametrize("name", NETWORKS)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# As published ---------------------------------------------------------------------------------------------------------


@EVERY
def test_golden_values(name):
    build, gain = NETWORKS[name]
    values = run_golden(seeded(build(), gain))
    assert values.keys() == GOLDEN[name].keys()
    for kind, expected in GOLDEN[name].items():
        torch.testing.assert_close(torch.tensor(values[kind]), torch.tensor(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("network", "count", "tensors"),
    [
        (DeepFillV1, 3_601_542, 84),
        (DeepFillV2, 4_052_478, 84),
        (lambda: DeepFillV2("mmagic"), 4_414_908, 84),
        (GLCIC, 6_072_131, 114),
        (lambda: GLCIC("mmagic"), 6_069_155, 98),
        (PartialConvUNet, 25_779_796, 75),
        (lambda: deepfill_v1.Discriminator(128), 2_684_289, 10),
        (lambda: deepfill_v1.Discriminator(256), 2_733_441, 10),
        (lambda: deepfill_v1.Discriminator(128, last_width=512), 4_339_329, 10),
        (SNPatchGAN, 5_946_816, 24),
        (ContextDiscriminator, 45_063_681, 83),
        (lambda: ContextDiscriminator(96, 160, 5, relu_first=True), 39_557_121, 76),
    ],
)
def test_parameters_and_tensors(network, count, tensors):
    with torch.device("meta"):
        module = network()
    assert (parameters(module), len(module.state_dict())) == (count, tensors)


def digest(names: object) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (DeepFillV1, "3fe944bd2fd50770"),
        (DeepFillV2, "ac1901230f027713"),
        (GLCIC, "416a41b54cc9d691"),
        (PartialConvUNet, "5366b6d52e041ea3"),
        (lambda: ContextDiscriminator(96, 160, 5), "a5ec67b04a0f1e48"),
        (ContextDiscriminator, "f52a42c341bab3fb"),
    ],
)
def test_names_are_the_published_ones(network, expected):
    with torch.device("meta"):
        assert digest(network().state_dict()) == expected


class _AnyEntry(dict):  # type: ignore[type-arg]
    """A checkpoint that has whatever it is asked for, and remembers that."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> torch.Tensor:
        self.asked.add(name)
        return torch.ones(2, 2, 1, 1) if name.endswith("weight") else torch.ones(2)


@pytest.mark.parametrize(
    ("convert", "expected", "model"),
    [
        (key_maps.DEEPFILL_V1["nbei"], "cdc2de2aa129c0ce", DeepFillV1),
        (key_maps.DEEPFILL_V1["mmagic"], "eca55552cea89371", DeepFillV1),
        (key_maps.DEEPFILL_V2["nipponjo"], "a88af402a6762aea", DeepFillV2),
        (key_maps.DEEPFILL_V2["mmagic"], "241d0e9f87980249", DeepFillV2),
        (key_maps.GLCIC["iizuka"], "d18f142dbb11bda3", GLCIC),
        (key_maps.GLCIC["yangwangx"], "a17d2063490fd402", GLCIC),
    ],
)
def test_key_maps_read_every_published_entry(convert, expected, model):
    checkpoint = _AnyEntry()
    converted = convert(checkpoint)
    assert digest(checkpoint.asked) == expected
    with torch.device("meta"):
        assert converted.keys() == model().state_dict().keys()


def test_weights_of_naoto_are_divided_by_the_taps_of_a_kernel():
    weight = torch.rand(4, 3, 7, 7)
    converted = key_maps.PARTIAL_CONV_UNET["naoto"](
        {"enc_1.conv.input_conv.weight": weight, "enc_1.conv.mask_conv.weight": torch.ones(4, 3, 7, 7)}
    )
    assert list(converted) == ["enc_1.conv.input_conv.weight"]
    torch.testing.assert_close(converted["enc_1.conv.input_conv.weight"], weight / (3 * 7 * 7))


def test_spectral_norms_of_csqiangwen_are_folded():
    weight, u, v = torch.rand(6, 4, 3, 3), torch.rand(6), torch.rand(36)
    prefix = "coarse.12.gated_conv2d.conv2d.module"
    state = {f"{prefix}.weight_bar": weight, f"{prefix}.weight_u": u, f"{prefix}.weight_v": v}
    folded = key_maps._folded(state, "coarse.12.gated_conv2d.conv2d", "weight")
    torch.testing.assert_close(folded, weight / (u @ weight.flatten(1) @ v))


# The call -------------------------------------------------------------------------------------------------------------

CONTRACTED = ("deepfill_v1", "deepfill_v2", "deepfill_v2_guided", "glcic", "partial_conv_unet")


@functools.cache
def case_of(name: str) -> Case:
    return CASES[name]()


@pytest.mark.parametrize("name", CONTRACTED)
@contract
def test_contract(promise, name):
    promise(case_of(name))


def test_masks_on_another_device_are_told():
    model, mask = DeepFillV1(narrow()), torch.zeros(1, 1, 64, 64, device="meta")
    with pytest.raises(ValueError, match="image, mask: expected one device"):
        model(torch.rand(1, 3, 64, 64), mask)


def test_a_sketch_is_refused_by_a_network_without_guidance():
    model, mask = DeepFillV1(narrow()), torch.zeros(1, 1, 64, 64)
    with pytest.raises(ValueError, match="sketch: expected None for a network without guidance"):
        model(torch.rand(1, 3, 64, 64), mask, sketch=mask)


def test_borders_that_mirror_need_something_to_mirror():
    model, small = DeepFillV1(narrow("reflect", "mmagic")), torch.rand(1, 3, 64, 128)
    with pytest.raises(ValueError, match="image: expected a height and width of at least 72, got 64 x 128"):
        model(small, torch.zeros(1, 1, 64, 128))


def test_unknown_dialects_are_told():
    with pytest.raises(ValueError, match="dialect: expected one of 'official', 'daa233', 'nbei', 'mmagic', got 'v3'"):
        DeepFillV1("v3")


def test_a_guided_network_follows_its_sketch_in_the_hole_only():
    model = seeded(DeepFillV2(narrow(squash="tanh"), guided=True), 5.0)
    image, mask = photo(64, 64), holes(64, 64, (16, 16, 48, 48))
    inside, outside = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)
    inside[..., 30:34, 20:44], outside[..., :8, :] = 1, 1
    with torch.no_grad():
        plain = model(image, mask, sketch=torch.zeros(1, 1, 64, 64)).completed
        assert torch.equal(model(image, mask, sketch=outside).completed, plain)
        assert not torch.equal(model(image, mask, sketch=inside).completed, plain)
    with pytest.raises(ValueError, match="sketch: expected a tensor for a guided network, got None"):
        model(image, mask)


def test_attention_says_where_patches_come_from():
    model = seeded(DeepFillV1(narrow()))
    image, mask = photo(128, 128), holes(128, 128, (40, 48, 80, 88))
    with torch.no_grad():
        assert model(image, mask).attention is None
        offsets = model(image, mask, return_attention=True).attention
    assert offsets is not None
    assert offsets.shape == (1, 2, 16, 16)
    rows = torch.arange(16).view(-1, 1) + offsets[0, 0]
    columns = torch.arange(16) + offsets[0, 1]
    assert ((rows >= 0) & (rows < 16) & (columns >= 0) & (columns < 16)).all()
    patches = torch.nn.functional.max_pool2d(mask[..., ::8, ::8].float(), 3, 1, 1)[0, 0]
    assert not patches[rows, columns].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_batch_norms_with_fixed_statistics_overwrite_maps_that_nothing_records(dtype):
    norm = nn.BatchNorm2d(5).to(dtype)
    norm.train()(torch.randn(4, 5, 6, 7, dtype=dtype) * 3 + 1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 6, 7, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        trained = normalised(norm, x)  # updates the statistics
        norm.eval()
        kept, expected = x.clone(), norm(x)
        y = normalised(norm, x)
    assert trained.data_ptr() != x.data_ptr()
    assert (y.data_ptr() == x.data_ptr()) == (dtype != torch.bfloat16)
    torch.testing.assert_close(y, expected)
    recorded = normalised(norm, kept)
    assert recorded.requires_grad
    torch.testing.assert_close(recorded, expected)


def test_batch_norms_fold_as_often_as_they_change():
    model = seeded(narrow_glcic("iizuka")).double()
    image, mask = photo(64, 64, dtype=torch.float64), holes(64, 64, (16, 16, 48, 48))
    norm, convolution = model.get_submodule("bn5"), model.get_submodule("conv5")
    with torch.no_grad():
        first = model(image, mask).completed
        norm.running_var.data *= 2  # an edit that torch does not count
        second = model(image, mask).completed
        convolution.weight.data *= 0.5
        third = model(image, mask).completed
    with torch.enable_grad():
        unfolded = model(image, mask).completed
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    torch.testing.assert_close(unfolded, third, rtol=0, atol=1e-12)


# Only the hole --------------------------------------------------------------------------------------------------------

HOLES = {
    "corner": ((0, 0, 24, 33),),
    "far border": ((130, 278, 150, 288),),
    "several": ((60, 70, 80, 90), (100, 120, 110, 160)),
    "one pixel": ((121, 143, 122, 144),),
    "everything": ((0, 0, 256, 288),),
}
PARTIAL = {
    "deepfill_v1-zeros": lambda: DeepFillV1(narrow()),
    "deepfill_v1-same_tf": lambda: DeepFillV1(narrow("same_tf", "official")),
    "deepfill_v1-reflect": lambda: DeepFillV1(narrow("reflect", "mmagic")),
    "deepfill_v2": lambda: DeepFillV2(narrow("same_tf", "nipponjo_tf", "tanh")),
    "glcic-bn_relu": lambda: narrow_glcic("iizuka"),
    "glcic-relu_bn": lambda: narrow_glcic("otenim"),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_the_hole_alone_equals_the_whole(name):
    model = seeded(PARTIAL[name](), 5.0 if name == "deepfill_v2" else 1.5).double()
    image = photo(256, 288, len(HOLES), torch.float64)
    mask = torch.cat([holes(256, 288, *boxes) for boxes in HOLES.values()])
    with torch.no_grad():
        whole, part = model(image, mask), model(image, mask, region="hole")
    for i, case in enumerate(HOLES):
        assert relative_error(part.completed[i], whole.completed[i]) < 1e-12, case
        box = bounding_box(mask[i, 0])
        assert box is not None
        inside = part.output[i, :, box.top : box.bottom, box.left : box.right]
        expected = whole.output[i, :, box.top : box.bottom, box.left : box.right]
        assert relative_error(inside, expected) < 1e-12, case


@pytest.mark.parametrize("name", PARTIAL)
def test_around_the_boxes_all_images_are_the_photo_bit_for_bit(name):
    model = seeded(PARTIAL[name]())
    image, mask = photo(80, 96), holes(80, 96, (20, 30, 31, 41))
    with torch.no_grad():
        result = model(image, mask, region="hole")
    around = mask == 0
    around[..., 20:31, 30:41] = False
    for painted in (result.output, result.completed, result.coarse):
        assert painted is None or torch.equal(painted * around, image * around)


@pytest.mark.parametrize("name", PARTIAL)
def test_needed_regions_are_what_is_computed(name, monkeypatch):
    model = seeded(PARTIAL[name]()).double()
    image, mask = photo(256, 288, dtype=torch.float64), holes(256, 288, (110, 120, 131, 140))
    box = bounding_box(mask[0, 0])
    regions = model.needed_regions(box, 256, 288)
    computed: list[Box] = []

    def record(part, y):
        cropped = crop(part, y)
        computed.append(part.wanted)
        assert tuple(cropped.shape[2:]) == part.wanted.size
        return cropped

    from inpaint_kernels.models._regions import Part

    crop = Part.crop
    monkeypatch.setattr(Part, "crop", record)
    with torch.no_grad():
        model(image, mask, region="hole")
    whole = {name for name in regions if name.startswith("pmconv") and not name.endswith(("9", "10"))}
    assert sorted(computed) == sorted(b for name, b in regions.items() if name not in {*whole, "contextual_attention"})
    last = "conv17" if "conv17" in regions else "allconv17"
    assert regions[last] == box


def test_a_hole_of_a_large_image_needs_a_small_part():
    hole = Box(900, 800, 1100, 1000)
    for model in (DeepFillV1(narrow()), GLCIC().eval()):
        regions = model.needed_regions(hole, 2000, 2000)
        assert regions is not None
        for name, box in regions.items():
            if name.startswith("pmconv") and name not in ("pmconv9", "pmconv10"):
                continue
            scale = max(1, 2000 // 2 ** round(torch.tensor(2000 / _full_size(name)).log2().item()))
            assert box.size[0] * box.size[1] < 0.12 * scale**2, name


def _full_size(name: str) -> int:
    """Side of the layer's whole output for an image of 2000."""
    if name == "contextual_attention":
        return 250
    stem = name.removeprefix("all").removeprefix("x").removeprefix("pm").removesuffix("_upsample")
    number = int("".join(c for c in stem.split("_")[0] if c.isdigit()))
    return 2000 if number == 1 or number >= 15 else 1000 if number in (2, 3, 13, 14) else 500


def test_in_training_the_batch_norms_need_everything():
    assert GLCIC().train().needed_regions(Box(0, 0, 8, 8), 64, 64) is None


def test_needed_regions_of_the_u_net_are_everything():
    model = seeded(PartialConvUNet())
    image, mask = photo(128, 128), holes(128, 128, (20, 30, 60, 80))
    assert model.needed_regions(Box(20, 30, 60, 80), 128, 128) is None
    with torch.no_grad():
        assert torch.equal(model(image, mask, region="hole").completed, model(image, mask).completed)


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 3])
def test_spans_give_every_interval_of_a_convolution(reflect, upsample, stride, dilation):
    if upsample == stride == 2:
        pytest.skip("no network enlarges in front of a strided convolution")
    size, kernel = 12, 3
    x, weight = torch.rand(1, 1, size, dtype=torch.float64), torch.rand(1, 1, kernel, dtype=torch.float64)
    before, after = (dilation, dilation) if stride == 1 or reflect else (0, 1)
    window = Window(kernel, stride, dilation, before, after, upsample, reflect)
    mode = "reflect" if reflect else "constant"

    def convolve(values, front, back):
        padded = nn.functional.pad(values.repeat_interleave(upsample, 2), (front, back), mode=mode)
        return nn.functional.conv1d(padded, weight, stride=stride, dilation=dilation)

    whole = convolve(x, before, after)
    outputs = whole.shape[2]
    for begin in range(outputs):
        for end in range(begin + 1, outputs + 1):
            span = window.span(begin, end, size)
            assert 0 <= span.begin < span.end <= size
            part = convolve(x[:, :, span.begin : span.end], span.before, span.after)[:, :, span.skip :]
            assert torch.allclose(part[:, :, : end - begin], whole[:, :, begin:end], rtol=0, atol=1e-12)


# Discriminators -------------------------------------------------------------------------------------------------------


def test_discriminators_judge_each_image():
    patch, image = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    assert seeded(deepfill_v1.Discriminator(32))(patch).shape == (2, 1)
    scores = seeded(SNPatchGAN(border="same_tf"))(torch.cat([image, image[:, :1]], 1))
    assert scores.shape == (2, 256)
    probability = seeded(ContextDiscriminator(32, 64))(patch, image)
    assert probability.shape == (2, 1)
    assert ((probability > 0) & (probability < 1)).all()


def test_a_gradient_penalty_flows_through_the_critic():
    critic = seeded(deepfill_v1.Discriminator(32))
    image = torch.rand(2, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(critic(image).sum(), image, create_graph=True)
    ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for name, p in critic.named_parameters() if "weight" in name
    )


def test_spectral_norms_bound_the_weights():
    discriminator = SNPatchGAN().train()
    for layer in discriminator:
        for _ in range(30):  # every look at it in training is one iteration
            weight = layer.conv.weight.detach()
        assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, rel=0.05)
