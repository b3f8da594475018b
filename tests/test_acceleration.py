"""``accelerate`` on small modules of tests/foreign_modules.py: what it recognises, refuses, leaves alone and undoes."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaint_kernels import accelerate, accelerated, acceleration
from inpaint_kernels.acceleration import AccelerationReport, ModuleReport
from inpaint_kernels.flow_color import flow_to_color
from inpaint_kernels.ops._contextual_attention_presets import _GRID_INDEX
from inpaint_kernels.recipes import contextual_attention as attention_recipe
from inpaint_kernels.recipes._class_swap import is_swapped
from inpaint_kernels.recipes._probe import detached_copy
from inpaint_kernels.recipes.gated_conv2d import GatedConvolution
from tests.compare import relative_error
from tests.foreign_modules import (
    FORMS,
    Bounded,
    Carry,
    Cell,
    Counting,
    Dividing,
    Lookup,
    LookupInParts,
    Nested,
    Refill,
    Sharing,
    Sloped,
    Twin,
    Unit,
    gated_block,
    plain_block,
)

TOLERANCE = 1e-9  # float64, relative
Build = Callable[[], nn.Module]


@pytest.fixture(autouse=True)
def _one_thread():
    """The maps here are too small for two, which would wait for each other on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def small_probes(monkeypatch):
    """Probes attention on small maps: quick, where the sampling grids need not be told apart."""
    monkeypatch.setattr(attention_recipe, "_TELLING_SIDE", 16)


def conv(*sizes: Any, **settings: Any) -> nn.Conv2d:
    """3 x 3 of 3 to 4 channels with a border of one, unless said otherwise."""
    return nn.Conv2d(*(sizes or (3, 4, 3)), **{"padding": 1, **settings})


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*(shape or (2, 3, 10, 12)), dtype=torch.float64).to(dtype)


def holes(*shape: int) -> Tensor:
    mask = torch.zeros(*shape, dtype=torch.float64)
    mask[..., shape[2] // 4 : shape[2] // 2, shape[3] // 3 : shape[3] // 2] = 1
    return mask


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in tensors(part)] if isinstance(value, (tuple, list)) else []


def step(module: nn.Module, *args: Any) -> list[Tensor]:
    """Results of a call, gradients of its tensors and parameters, and everything that the module then holds."""
    given = [x.detach().clone().requires_grad_() if isinstance(x, Tensor) and i == 0 else x for i, x in enumerate(args)]
    torch.manual_seed(1)
    outputs = tensors(module(*given))
    wanted = [given[0], *(p for p in module.parameters() if p.requires_grad)]
    parts = [(x * torch.randn(x.shape, dtype=torch.float64).to(x)).sum() for x in outputs if x.requires_grad]
    total = torch.stack(parts).sum()
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    kept = [x for part in module.modules() for x in vars(part).values() if isinstance(x, Tensor)]
    state = [*module.state_dict().values(), *kept]
    return [x.detach() for x in (*outputs, *(torch.zeros(()) if g is None else g for g in gradients), *state)]


def only(report: AccelerationReport) -> ModuleReport:
    assert len(report.replaced) == 1, str(report)
    return report.replaced[0]


def assert_same_step(actual: nn.Module, expected: nn.Module, *args: Any, tolerance: float = TOLERANCE) -> None:
    for got, wanted in zip(step(actual, *args), step(expected, *args), strict=True):
        assert got.dtype == wanted.dtype
        # The gradient of a bias in front of a norm is zero but for rounding.
        assert (got - wanted).double().norm() <= tolerance * max(wanted.double().norm().item(), 1.0)


def accepted(module: nn.Module, *args: Any) -> ModuleReport:
    """The report's only replacement, after the module and its original did the same for two training steps."""
    module.double()
    original = detached_copy(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    report = accelerate(module)
    entry = only(report)
    assert all(map(torch.equal, module.state_dict().values(), before.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing falls back
        for _ in range(2):
            assert_same_step(module, original, *args)
        assert_same_step(module.eval(), original.eval(), *args)
    assert not report.fallbacks
    return entry


def kept_reason(module: nn.Module) -> str:
    report = accelerate(module)
    assert not report.replaced, str(report)
    return " ".join(entry.reason for entry in report.kept)


# Contextual attention -------------------------------------------------------------------------------------------------


def attention_arguments(mask_step: int) -> tuple[Tensor, Tensor, Tensor]:
    x, scale = image(2, 8, 16, 16), max(mask_step, 2) // 2
    return x, x, holes(2, 1, 16 * scale, 16 * scale)


@pytest.mark.parametrize("mixing", [True, False], ids=["fuse", "no_fuse"])
@pytest.mark.parametrize("form", ["daa233", "nipponjo", "mmagic", "selflein"])
def test_attention_of_every_form_is_recognised(form, mixing, small_probes):
    settings = FORMS[form]
    entry = accepted(Lookup(**settings, mixing=mixing), *attention_arguments(settings.get("mask_step", 2)))
    assert entry.recipe == "contextual_attention"
    assert entry.semantics.startswith(form)
    assert ("first sample's mask" in entry.semantics) == settings.get("first", False)


@pytest.mark.parametrize("form", ["official", "nipponjo_tf", "yangyu12"])
def test_attention_forms_that_differ_in_rounding_of_their_grid_are_told_apart(form):
    settings = FORMS[form]
    entry = accepted(Lookup(**settings, mixing=False), *attention_arguments(settings.get("mask_step", 2)))
    assert entry.semantics.startswith(form)


def test_every_two_sampling_grids_differ_on_the_probed_side():
    side = attention_recipe._TELLING_SIDE
    indices = {name: index(side, side // 2) for name, index in _GRID_INDEX.items()}
    indices["floor"] = 2 * torch.arange(side // 2)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(indices.values(), 2))


def test_attention_that_pastes_a_larger_map_is_recognised():
    entry = accepted(Refill(), image(2, 4, 16, 16), image(2, 4, 8, 8), holes(2, 1, 16, 16))
    assert (entry.recipe, entry.semantics) == ("contextual_attention", "pennet")


class WithBuffer(Lookup):
    """The same layer, float64 only: a constant that it multiplies with is a buffer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.register_buffer("one", torch.ones(1, 1, 3, 3, dtype=torch.float64))

    def forward(self, f: Tensor, b: Tensor, mask: Tensor | None = None) -> Any:
        nn.functional.conv2d(f[:, :1], self.one)  # type: ignore[arg-type]  # raises for another dtype
        return super().forward(f, b, mask)


def test_attention_with_a_buffer_is_probed_in_its_dtype(small_probes):
    entry = accepted(WithBuffer(**FORMS["nipponjo"]), *attention_arguments(8))
    assert entry.recipe == "contextual_attention"


def test_attention_that_returns_none_beside_its_map_is_recognised(small_probes):
    module = Lookup(**FORMS["nipponjo"], returns="none")
    accepted(module, *attention_arguments(8))
    with torch.no_grad():
        result = module(*attention_arguments(8))
    assert isinstance(result, tuple)
    assert result[1] is None


def test_attention_that_draws_its_offsets_is_recognised(small_probes):
    module = Lookup(**FORMS["daa233"], returns="image", draw=flow_to_color)
    entry = accepted(module, *attention_arguments(8))
    assert "draws the offsets" in entry.semantics


def test_nan_of_the_original_is_named(small_probes):
    module = Lookup(**FORMS["mmagic"]).double()
    x, mask = image(1, 8, 16, 16), torch.ones(1, 1, 16, 16, dtype=torch.float64)
    assert module(x, x, mask).isnan().all()
    assert "NaN" in only(accelerate(module)).reason
    assert module(x, x, mask).isfinite().all()


def test_attention_whose_fuse_scrambles_oblong_maps_runs_itself_on_them(small_probes):
    module = Lookup(**FORMS["selflein"]).double()
    original = copy.deepcopy(module)
    report = accelerate(module)
    assert "maps that are not square" in only(report).refused
    x = image(1, 8, 16, 24)
    with pytest.warns(RuntimeWarning, match="not square"):
        assert torch.equal(module(x, x), original(x, x))


def test_attention_with_one_mask_for_a_batch_and_maps_of_two_sizes(small_probes):
    module = Lookup(**FORMS["mmagic"]).double()
    original = copy.deepcopy(module)
    accelerate(module)
    f, b, mask = image(2, 8, 16, 16), image(2, 8, 24, 20), holes(1, 1, 24, 20)
    assert_same_step(module, original, f, b, mask)
    assert_same_step(module, original, f, b)


@pytest.mark.parametrize(
    "change",
    [{"share": 5.0}, {"small": 0.5}, {"heat": 7.0}, {"small": 1e-2}, {"small": 1e-3}],
    ids=str,
)
def test_attention_near_misses_are_kept(change, small_probes):
    assert "no known" in kept_reason(Lookup(**{**FORMS["nipponjo"], "mixing": False, **change}).double())


def test_the_eye_convolutions_of_unknown_attention_are_replaced(small_probes):
    module = Lookup(share=5.0).double()
    x = image(1, 4, 20, 24)
    entry = accepted(module, x, x, holes(1, 1, 20, 24))
    assert entry.recipe == "diagonal_fuse"
    assert "unknown attention" in entry.semantics


def test_the_eye_convolutions_are_replaced_with_example_inputs_too(small_probes):
    x = image(1, 4, 20, 20)
    assert only(accelerate(Lookup(share=5.0).double(), (x, x, holes(1, 1, 20, 20)))).recipe == "diagonal_fuse"


# Coherent attention ---------------------------------------------------------------------------------------------------


def carried(fixed: bool = True) -> Carry:
    mask = torch.zeros(6, 6, dtype=torch.uint8)
    mask[1:3, 2:4] = 1
    mask[4, :3] = 1
    return Carry(mask, fixed)


@pytest.mark.parametrize("fixed", [True, False])
def test_coherent_attention_is_recognised_and_its_first_call_is_its_own(fixed):
    module = carried(fixed)
    original = copy.deepcopy(module)
    report = accelerate(module)
    entry = only(report)
    assert entry.recipe == "coherent_semantic_attention"
    assert "official gradient" in entry.semantics
    x = image(2, 16, 6, 6).abs() + 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the first call is the module's own, and no surprise
        assert_same_step(module, original, x.float(), tolerance=1e-4)
        assert_same_step(module, original, x.float(), tolerance=1e-4)
    assert report.fallbacks == {}


@pytest.mark.parametrize("fixed", [True, False])
def test_coherent_attention_follows_or_ignores_a_new_mask_as_the_original(fixed):
    module = carried(fixed).double()
    original = copy.deepcopy(module)
    accelerate(module)
    x = image(1, 16, 6, 6).abs() + 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in (1, 4):
            for layer in (module, original):
                layer.mask = torch.zeros(6, 6, dtype=torch.uint8)
                layer.mask[row, 1:5] = 1
            assert_same_step(module, original, x.float(), tolerance=1e-4)
    assert torch.equal(module.flag, original.flag)
    assert torch.equal(module.mask_point_idx, original.mask_point_idx)


# Gated convolutions ---------------------------------------------------------------------------------------------------


def twin(**settings: Any) -> nn.Module:
    return Twin(conv(), conv(), settings.pop("act", nn.ELU()), **settings)


def old_spectral_norm(module: nn.Module) -> nn.Module:
    return torch.nn.utils.spectral_norm(module)


GATED: dict[str, tuple[Build, str]] = {
    "one": (lambda: Unit(conv(), F.elu), "features first, elu activation"),
    "one_gate_first": (lambda: Unit(conv(), F.elu, swapped=True), "gate first, elu activation"),
    "relu": (lambda: Unit(conv(), nn.ReLU()), "features first, relu activation"),
    "leaky": (lambda: Unit(conv(), nn.LeakyReLU(0.3)), "features first, leaky_relu activation"),
    "leaky_function": (lambda: Unit(conv(), _leaky), "features first, leaky_relu activation"),
    "none": (lambda: Unit(conv()), "features first, none activation"),
    "tanh": (lambda: Unit(conv(), nn.Tanh()), "features first, own activation"),
    "elu_of_another_alpha": (lambda: Unit(conv(), nn.ELU(0.5)), "features first, own activation"),
    "stride_dilation": (lambda: Unit(conv(3, 4, 3, stride=2, dilation=2, padding=2), F.elu), "features first"),
    "no_bias": (lambda: Unit(conv(bias=False), F.elu), "features first"),
    "doubled": (lambda: Unit(conv(), F.elu, doubled=True), "features first, elu activation, upsampled first"),
    "reflect_pad": (lambda: Unit(conv(padding=0), F.elu, pad=nn.ReflectionPad2d(1)), "features first"),
    "replicate_pad": (lambda: Unit(conv(padding=0), F.elu, pad=nn.ReplicationPad2d(1)), "features first"),
    "zero_pad": (lambda: Unit(conv(padding=0), F.elu, pad=nn.ZeroPad2d((0, 1, 0, 1))), "features first"),
    "reflect_mode": (lambda: Unit(conv(padding_mode="reflect"), F.elu), "features first"),
    "circular_mode": (lambda: Unit(conv(padding_mode="circular"), F.elu), "features first"),
    "same": (lambda: Unit(conv(3, 4, 4, stride=2, padding=0), F.elu, same=True), "TensorFlow's SAME padding"),
    "batch_norm": (lambda: Unit(conv(), F.elu, norm=nn.BatchNorm2d(2)), "norm after the gate"),
    "instance_norm": (
        lambda: Unit(conv(), F.elu, norm=nn.InstanceNorm2d(2), norm_early=True),
        "norm before the activation",
    ),
    "two": (twin, "two convolutions, elu activation"),
    "two_gate_first": (lambda: twin(gate_first=True), "two convolutions, elu activation"),
    "two_batch_norm": (lambda: twin(norm=nn.BatchNorm2d(4), act=nn.LeakyReLU(0.2)), "norm after the gate"),
    "two_instance_norm": (lambda: twin(norm=nn.InstanceNorm2d(4), norm_early=True), "norm before the activation"),
    "two_padded": (
        lambda: Twin(conv(padding=0), conv(padding=0), nn.ReLU(), pad=nn.ReflectionPad2d(1)),
        "two convolutions, relu activation",
    ),
    "spectral_hook": (lambda: Unit(old_spectral_norm(conv()), F.elu), "features first"),
    "spectral_parametrization": (
        lambda: Unit(torch.nn.utils.parametrizations.spectral_norm(conv()), F.elu),
        "features first",
    ),
    "weight_norm": (lambda: Unit(torch.nn.utils.parametrizations.weight_norm(conv()), F.elu), "features first"),
    "spectral_wrapper": (lambda: Unit(Bounded(conv()), F.elu), "features first"),
    "two_spectral_wrappers": (lambda: Twin(Bounded(conv()), Bounded(conv()), nn.ELU()), "two convolutions"),
    "two_spectral_hooks": (
        lambda: Twin(old_spectral_norm(conv()), old_spectral_norm(conv()), nn.ELU()),
        "two convolutions",
    ),
}


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


@pytest.mark.parametrize("variant", GATED)
def test_gated_convolutions_are_recognised(variant):
    build, words = GATED[variant]
    entry = accepted(build(), image(2, 3, 8, 12))
    assert entry.recipe == "gated_conv2d"
    assert words in entry.semantics


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(lambda: Unit(conv(), F.elu, opening=torch.tanh), id="gate_is_tanh"),
        pytest.param(lambda: Unit(conv(), _steep), id="another_slope"),
        pytest.param(lambda: Unit(conv(), F.elu, drop=0.5), id="dropout_function"),
        pytest.param(lambda: Unit(nn.Sequential(conv(), nn.Dropout(0.5)), F.elu), id="dropout_module"),
        pytest.param(lambda: Unit(conv(4, 4, 3, groups=2), F.elu), id="groups"),
        pytest.param(lambda: Unit(conv(), F.hardswish), id="unknown_activation"),
        pytest.param(lambda: Unit(_hooked(conv()), F.elu), id="hook_inside"),
        pytest.param(lambda: Twin(conv(), conv(dilation=2, padding=2), nn.ELU()), id="two_forms"),
    ],
)
def test_gated_near_misses_are_kept(module):
    model = module()
    kept_reason(model)
    assert not any(map(is_swapped, model.modules()))


def _steep(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.3)


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, output: 2 * output)
    return module


# Dilated convolutions -------------------------------------------------------------------------------------------------

CELLS: dict[str, tuple[Build, str]] = {
    "activation": (lambda: Cell(conv(dilation=2, padding=2), act=nn.ReLU(inplace=True)), "relu activation"),
    "function": (lambda: Cell(conv(dilation=4, padding=4), act=F.elu), "elu activation"),
    "norm_activation": (
        lambda: Cell(conv(), "na", nn.ReLU(), nn.BatchNorm2d(4)),
        "norm or activation called after it",
    ),
    "activation_norm": (lambda: Cell(conv(), "an", nn.ReLU(), nn.BatchNorm2d(4)), "relu activation, norm"),
    "norm": (lambda: Cell(conv(), "n", norm=nn.InstanceNorm2d(4)), "norm or activation called after it"),
    "residual": (lambda: Cell(conv(3, 3, 3, dilation=2, padding=2), "ar", nn.ELU()), "elu activation, residual"),
    "norm_residual": (
        lambda: Cell(conv(3, 3, 3, padding=0), "nr", norm=nn.InstanceNorm2d(3), pad=nn.ReflectionPad2d(1)),
        "norm or activation called after it, residual",
    ),
    "spectral": (lambda: Cell(old_spectral_norm(conv()), act=nn.LeakyReLU(0.2)), "leaky_relu activation"),
}


@pytest.mark.parametrize("variant", CELLS)
def test_dilated_convolution_blocks_are_recognised(variant):
    build, words = CELLS[variant]
    entry = accepted(build(), image())
    assert entry.recipe == "dilated_conv2d"
    assert words in entry.semantics


def test_runs_in_a_sequential_are_fused():
    module = nn.Sequential(
        *(nn.ReflectionPad2d(1), conv(padding=0), nn.ReLU()),
        *(nn.MaxPool2d(2), conv(4, 4, 3, dilation=2, padding=2), nn.ELU(), nn.BatchNorm2d(4)),
    )
    entry = accepted(module, image())
    assert entry.semantics.startswith("Sequential, 2 fused")


def test_a_convolution_alone_is_replaced_only_where_it_is_faster(monkeypatch):
    assert "example_inputs" in kept_reason(conv())
    monkeypatch.setattr(acceleration, "_race", lambda *_: 0.5)
    report = accelerate(conv(), image(1, 3, 8, 8, dtype=torch.float32))
    assert "0.50x" in report.kept[0].reason
    monkeypatch.setattr(acceleration, "_race", lambda *_: 1.5)
    module = conv()
    original, x = copy.deepcopy(module), image(1, 3, 8, 8, dtype=torch.float32)
    entry = only(accelerate(module, x))
    assert (entry.semantics, entry.speedup) == ("plain convolution", 1.5)
    assert relative_error(module(x), original(x)) < 1e-5


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(lambda: Cell(conv(), "ar", F.elu), id="residual_of_another_shape"),
        pytest.param(lambda: Cell(conv(3, 3, 3, groups=3), act=F.elu), id="groups"),
        pytest.param(lambda: Cell(conv(), act=_steep), id="another_slope"),
        pytest.param(lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU()), id="no_convolution"),
    ],
)
def test_dilated_near_misses_are_kept(module):
    kept_reason(module())


# Partial convolutions -------------------------------------------------------------------------------------------------

PARTIAL: dict[str, tuple[Build, int, str]] = {
    "counting": (lambda: Counting(3, 4, 3, padding=1), 1, "rule nvidia, eps 1e-08, keeps its last mask"),
    "counting_per_channel": (lambda: Counting(3, 4, 3, multi_channel=True, stride=2), 3, "rule nvidia"),
    "counting_output_only": (lambda: Counting(3, 4, 3, padding=1, return_mask=False), 1, "rule nvidia"),
    "counting_no_bias": (lambda: Counting(3, 4, 5, padding=2, bias=False), 1, "rule nvidia"),
    "dividing": (lambda: Dividing(3, 4, 3, padding=1), 3, "rule naoto"),
    "dividing_no_bias": (lambda: Dividing(3, 4, 3, padding=1, stride=2, bias=False), 3, "rule naoto"),
    "sharing": (lambda: Sharing(3, 4, 3, padding=1), 1, "rule nvidia, eps 1e-08"),
    "sharing_per_channel": (lambda: Sharing(3, 4, 3, padding=1, multi_channel=True), 3, "rule nvidia"),
    "sharing_eps": (lambda: Sharing(3, 4, 3, padding=1, eps=1e-2), 1, "rule nvidia, eps 0.01"),
}


@pytest.mark.parametrize("variant", PARTIAL)
def test_partial_convolutions_are_recognised(variant):
    build, channels, words = PARTIAL[variant]
    known = 1 - holes(2, channels, 10, 12)
    known[:, :, :6, :8] = 0  # whole windows without a known pixel
    entry = accepted(build(), image(), known)
    assert entry.recipe == "partial_conv2d"
    assert words in entry.semantics


@pytest.mark.parametrize("wanted", [True, False])
def test_a_partial_convolution_returns_its_mask_as_asked(wanted):
    module = Sharing(3, 4, 3, padding=1).double()
    original = copy.deepcopy(module)
    only(accelerate(module))
    x, mask = image(), 1 - holes(2, 1, 10, 12)
    got, expected = module(x, mask, return_mask=wanted), original(x, mask, return_mask=wanted)
    assert isinstance(got, tuple) == wanted
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(tensors(got), tensors(expected), strict=True))


def test_a_call_without_a_mask_reads_what_the_last_one_left():
    module = Counting(3, 4, 3, padding=1).double()
    original = copy.deepcopy(module)
    accelerate(module)
    x, mask = image(), 1 - holes(2, 1, 10, 12)
    for layer in (module, original):
        layer(x, mask)
    with pytest.warns(RuntimeWarning, match="no mask"):
        assert_same_step(module, original, x)


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(lambda: Counting(3, 4, 3, padding=1, small=1e-2), id="another_eps"),
        pytest.param(lambda: Dividing(3, 4, 3, padding=1, gain=2.0), id="another_factor"),
        pytest.param(lambda: Sharing(4, 4, 3, padding=1, groups=2), id="groups"),
    ],
)
def test_partial_near_misses_are_kept(module):
    kept_reason(module())


# What is refused ------------------------------------------------------------------------------------------------------


class Counter(nn.Module):
    """Disagrees with itself: every second call is another."""

    calls = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.conv(x)) * (1 + next(self.calls))


def test_a_module_that_disagrees_with_itself_is_kept():
    assert "two calls of it differ" in kept_reason(Counter())


def test_script_modules_are_refused():
    assert "TorchScript" in kept_reason(torch.jit.script(nn.Sequential(conv(), nn.ELU())))
    assert "TorchScript" in kept_reason(nn.Sequential(torch.jit.script(plain_block())))


def test_quantised_modules_are_refused():
    observed = torch.ao.nn.qat.Conv2d(3, 4, 3, qconfig=torch.ao.quantization.default_qat_qconfig)
    assert "quantised" in kept_reason(nn.Sequential(observed, nn.ReLU()))


def test_uninitialised_and_meta_parameters_are_refused():
    assert "no values yet" in kept_reason(nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()))
    assert "meta" in kept_reason(nn.Sequential(conv().to("meta"), nn.ReLU()))


def test_an_instances_own_forward_is_refused():
    module = plain_block()
    vars(module)["forward"] = lambda x: x
    assert "own forward" in kept_reason(module)


def test_unknown_modules_are_kept_in_silence():
    report = accelerate(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2), nn.MultiheadAttention(4, 2)))
    assert not report.replaced
    assert str(report).startswith("0 replaced")


def test_a_module_that_cannot_be_copied_is_kept():
    module = plain_block()
    vars(module)["lock"] = (i for i in range(1))
    assert "cannot be copied" in kept_reason(module)


def test_strict_raises_with_the_report():
    with pytest.raises(RuntimeError, match="0 replaced"):
        accelerate(nn.Linear(2, 2), strict=True)
    assert accelerate(plain_block(), strict=True).replaced


@pytest.mark.parametrize("model", [None, torch.zeros(1), nn.Conv2d, F.relu])
def test_no_module_is_a_type_error(model):
    with pytest.raises(TypeError, match="model: expected"):
        accelerate(model)


# Names and numbers ----------------------------------------------------------------------------------------------------


def test_names_of_classes_do_not_matter():
    one, other = plain_block(), gated_block()
    assert type(one).__name__ == type(other).__name__ == "Block"
    report = accelerate(nn.ModuleList([one, other]))
    assert [entry.recipe for entry in report.replaced] == ["dilated_conv2d", "gated_conv2d"]
    assert [entry.kind for entry in report.replaced] == ["Block", "Block"]


ALIKE: dict[str, tuple[Build, Build]] = {
    "functions": (lambda: Cell(conv(), act=F.relu), lambda: Cell(conv(), act=F.elu)),
    "private_numbers": (lambda: Sloped(0.2), lambda: Sloped(0.1)),
    "values_of_buffers": (lambda: Scaled(1.0), lambda: Scaled(3.0)),
    "lists": (lambda: Listed(["elu"]), lambda: Listed(["relu"])),
}


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.conv = conv()
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.get_buffer("factor") * self.conv(x))


class Listed(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.conv, self.names = conv(), names

    def forward(self, x: Tensor) -> Tensor:
        return getattr(F, self.names[0])(self.conv(x))


@pytest.mark.parametrize("pair", ALIKE)
def test_two_modules_that_differ_in_one_attribute_are_probed_one_by_one(pair):
    modules = [build().double() for build in ALIKE[pair]]
    model = nn.ModuleList(modules)
    original = copy.deepcopy(model)
    accelerate(model)
    for got, expected in zip(model, original, strict=True):
        assert_same_step(got, expected, image())


@pytest.mark.parametrize("value", [([1, 2], [3]), (torch.zeros(2), torch.ones(2)), [torch.zeros(2)], {"a": 1}, {1}])
def test_attributes_of_any_kind_do_no_harm(value):
    module = plain_block().double()
    vars(module)["extra"] = value
    original = copy.deepcopy(module)
    only(accelerate(module))
    assert_same_step(module, original, image())
    assert_same_step(copy.deepcopy(module), original, image())


def test_second_derivatives_are_the_originals():
    module = nn.Sequential(conv(), nn.LeakyReLU(0.2), conv(4, 1, 3), nn.ELU()).double()
    original = copy.deepcopy(module)
    only(accelerate(module))
    penalties = []
    x = image()
    for critic in (module, original):
        given = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(given).sum(), given, create_graph=True)
        ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean().backward()
        penalties.append([p.grad for p in critic.parameters() if p.grad is not None])
    assert len(penalties[0]) == len(penalties[1])
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(*penalties, strict=True))


def test_the_optimiser_made_before_takes_the_same_steps():
    module = Unit(old_spectral_norm(conv()), F.elu, norm=nn.BatchNorm2d(2)).double()
    original = copy.deepcopy(module)
    optimisers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (module, original)]
    only(accelerate(module))
    x = image()
    for _ in range(3):
        for optimiser, model in zip(optimisers, (module, original), strict=True):
            optimiser.zero_grad()
            model(x).square().mean().backward()
            optimiser.step()
    for got, wanted in zip(module.state_dict().values(), original.state_dict().values(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)


# What stays as it is --------------------------------------------------------------------------------------------------


def test_undo_gives_classes_and_bits_back():
    model = nn.Sequential(Unit(conv(3, 8, 3), F.elu), Cell(conv(4, 4, 3), "na", nn.ReLU(), nn.BatchNorm2d(4)))
    x = image(dtype=torch.float32)
    classes, attributes = [type(m) for m in model.modules()], [dict(vars(m)) for m in model.modules()]
    before = step(copy.deepcopy(model), x)
    report = accelerate(model)
    assert len(report.replaced) == 2
    report.undo()
    assert [type(m) for m in model.modules()] == classes
    assert [vars(m).keys() for m in model.modules()] == [a.keys() for a in attributes]
    assert all(vars(m)[k] is v for m, a in zip(model.modules(), attributes, strict=True) for k, v in a.items())
    assert all(map(torch.equal, step(model, x), before))
    assert not report.replaced
    report.undo()
    assert [type(m) for m in model.modules()] == classes


def test_only_this_instance_changes():
    module, other = plain_block(), None
    other = type(module)()
    functions, forward = dict(vars(F)), type(module).forward
    with accelerated(module):
        assert type(other) is not type(module)
        assert isinstance(module, type(other))
        assert type(other).forward is forward
        assert vars(F) == functions
    assert type(other) is type(module)


def test_nothing_global_changes(small_probes):
    model = nn.ModuleList([Unit(conv(), F.elu), Counting(3, 4, 3), Lookup(share=5.0, noise=0.1), Lookup(), carried()])
    state = torch.get_rng_state()
    seed, dtype = torch.initial_seed(), torch.get_default_dtype()
    settings = (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.get_num_threads())
    hooks = len(torch.nn.modules.module._global_forward_hooks)
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.initial_seed(), torch.get_default_dtype()) == (seed, dtype)
    assert settings == (
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )
    assert len(torch.nn.modules.module._global_forward_hooks) == hooks


def test_the_random_state_is_that_before_where_a_module_draws(small_probes):
    module = Lookup(share=5.0, noise=0.1)
    state = torch.get_rng_state()
    accelerate(module)
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_of_modules_inside_stay():
    model = nn.Sequential(old_spectral_norm(conv()).eval(), nn.ReLU(), conv(4, 4, 3), nn.ELU())
    modes = [m.training for m in model.modules()]
    accelerate(model)
    assert [m.training for m in model.modules()] == modes


def test_gradients_and_requires_grad_stay():
    model = nn.Sequential(Cell(conv(), act=F.elu))
    model(image(dtype=torch.float32)).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    next(model.parameters()).requires_grad_(False)
    only(accelerate(model))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert [p.requires_grad for p in model.parameters()] == [False, True]


def test_accelerated_undoes_after_an_exception():
    module = plain_block()
    kind = type(module)
    seen = []

    def fail() -> None:
        with accelerated(module) as report:
            seen.extend([is_swapped(module), len(report.replaced) == 1])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [True, True]
    assert type(module) is kind


def test_an_exception_inside_undoes_what_was_done(monkeypatch):
    model = nn.ModuleList([plain_block(), gated_block()])
    classes = [type(m) for m in model]

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GatedConvolution, "candidates", fail)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model)
    assert [type(m) for m in model] == classes


def test_a_second_call_changes_nothing():
    module = plain_block()
    first = accelerate(module)
    second = accelerate(module)
    assert "already" in second.kept[0].reason
    second.undo()
    assert is_swapped(module)
    first.undo()
    assert not is_swapped(module)


def test_a_shared_module_is_replaced_at_both_places_and_listed_once():
    shared = plain_block()
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
    report = accelerate(model)
    assert only(report).name == "a"
    assert model.get_submodule("a") is model.get_submodule("b.0")


def test_the_report_tells_all():
    model = nn.ModuleDict({"known": plain_block(), "slope": Cell(conv(), act=_steep)})
    text = str(accelerate(model))
    assert "1 replaced" in text
    assert "replaced  known (Block): dilated_conv2d: elu activation; off by" in text
    assert "slope (Cell): it is no known" in text


# Calls that are not replaced ------------------------------------------------------------------------------------------


def fallen_back(module: nn.Module, *args: Any) -> tuple[Any, str]:
    """A call's result and its warning."""
    with pytest.warns(RuntimeWarning, match="the original forward runs") as record:
        result = module(*args)
    return result, str(record[0].message)


def test_a_fallback_warns_once_and_is_counted():
    module = nn.Sequential(plain_block())
    report = accelerate(module)
    x = image()
    module.double()
    fallen_back(module, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x)
    ((name, reasons),) = report.fallbacks.items()
    assert name == "0"
    assert list(reasons.values()) == [2]
    assert "the original forward ran 2 times" in str(report)


def change_activation(module: nn.Module) -> None:
    vars(module)["act"] = F.relu


def change_module(module: nn.Module) -> None:
    module.conv = nn.Sequential(module.get_submodule("conv"), nn.Tanh())


def change_hook(module: nn.Module) -> None:
    module.get_submodule("conv").register_forward_hook(lambda module, args, output: output + 1)


CHANGES: dict[str, tuple[Build, Callable[[Any], object]]] = {
    "setting": (lambda: Unit(conv(), F.elu), lambda m: setattr(m, "swapped", True)),
    "private_setting": (lambda: Sloped(0.2), lambda m: setattr(m, "_slope", 0.1)),
    "function": (lambda: Cell(conv(), act=F.elu), change_activation),
    "alpha": (lambda: Cell(conv(), act=nn.ELU()), lambda m: setattr(m.act, "alpha", 0.5)),
    "slope": (lambda: Cell(conv(), act=nn.LeakyReLU(0.2)), lambda m: setattr(m.act, "negative_slope", 0.1)),
    "child": (lambda: Cell(conv(), act=F.elu), change_module),
    "stride": (lambda: Cell(conv(), act=F.elu), lambda m: setattr(m.conv, "stride", (2, 2))),
    "inner_setting": (Nested, lambda m: setattr(m.inner, "gain", 3.0)),
    "inner_hook": (lambda: Cell(conv(), act=F.elu), change_hook),
    "sequential_child": (
        lambda: nn.Sequential(conv(), nn.ELU()),
        lambda m: m.__setitem__(1, nn.Tanh()),
    ),
    "sequential_longer": (lambda: nn.Sequential(conv(), nn.ELU()), lambda m: m.append(nn.Tanh())),
    "class_of_a_child": (lambda: Cell(conv(), act=F.elu), lambda m: setattr(m.conv, "__class__", Doubled)),
    "forward_of_the_instance": (
        lambda: Cell(conv(), act=F.elu),
        lambda m: setattr(m, "forward", lambda x: 2 * x),
    ),
    "forward_of_a_child": (
        lambda: Cell(conv(), act=F.elu),
        lambda m: setattr(m.conv, "forward", lambda x: 2 * x),
    ),
}


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_after_counts(change):
    build, apply = CHANGES[change]
    module = build().double()
    original = copy.deepcopy(module)
    only(accelerate(module))
    apply(module)
    apply(original)
    x = image()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert relative_error(module(x), original(x)) < TOLERANCE


def test_a_hook_on_a_module_in_an_attention_layer_runs(small_probes):
    module = LookupInParts(**FORMS["nipponjo"], mixing=False).double()
    only(accelerate(module))
    seen: list[nn.Module] = []
    module.spread_out.register_forward_hook(lambda m, args, output: seen.append(m))
    x = image(1, 8, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module(x, x)
    assert seen


def test_hooks_of_the_module_itself_run_with_the_replacement():
    module = plain_block().double()
    seen: list[str] = []
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    only(accelerate(module))
    module.register_forward_hook(lambda m, args, output: seen.append("after"))
    module.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append("backward"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(image().requires_grad_()).sum().backward()
    assert seen == ["before", "after", "backward"]


def test_autocast_is_the_originals():
    module = plain_block()
    original = copy.deepcopy(module)
    accelerate(module)
    x = image(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, why = fallen_back(module, x)
        assert torch.equal(result, original(x))
    assert "autocast" in why


def test_another_dtype_is_the_originals():
    module = plain_block()
    original = copy.deepcopy(module).double()
    accelerate(module)
    x = image()
    result, why = fallen_back(module.double(), x)
    assert torch.equal(result, original(x))
    assert "float64" in why


def test_odd_sizes_that_the_original_refuses_still_raise(small_probes):
    module = Lookup(**FORMS["nipponjo"]).double()
    accelerate(module)
    x = image(1, 8, 17, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original = copy.deepcopy(module)
        accelerate(original).undo()
        assert module(x, x).shape == (1, 8, 16, 16)


def test_wrong_arguments_raise_as_the_original_does():
    module = plain_block()
    accelerate(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TypeError):
            module()
        with pytest.raises((RuntimeError, ValueError)):
            module(torch.zeros(2, 5, 4, 4))
        assert module(torch.zeros(3, 8, 8)).shape == (4, 8, 8)


# Copies, files, wrappers ----------------------------------------------------------------------------------------------


def test_a_copy_is_fast_and_outlives_the_undo():
    module = nn.Sequential(plain_block().double())
    report = accelerate(module)
    clone = copy.deepcopy(module)
    report.undo()
    assert is_swapped(clone[0])
    assert not is_swapped(module[0])
    assert_same_step(clone, module, image())
    assert not set(clone.parameters()) & set(module.parameters())


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_of_the_original(protocol):
    module = nn.Sequential(Unit(conv(), F.elu, norm=nn.BatchNorm2d(2)), Counting(2, 4, 3, return_mask=False))
    accelerate(module)
    assert len(accelerate(module).kept) == 2
    fast = pickle.dumps(module, protocol)
    assert b"inpaint_kernels" not in fast
    assert b"Fast" not in fast
    loaded = pickle.loads(fast)
    assert [type(m) for m in loaded] == [Unit, Counting]


def test_a_saved_model_loads_without_the_library(tmp_path):
    model = nn.Sequential(
        Unit(conv(), F.elu), Cell(conv(2, 2, 3), act=nn.ReLU()), nn.Sequential(conv(2, 2, 3), nn.ELU())
    )
    x = image(1, 3, 8, 8, dtype=torch.float32)
    with torch.no_grad():
        expected = model(x)
    assert len(accelerate(model).replaced) == 3
    torch.save(model, tmp_path / "model.pt")
    torch.save((x, expected), tmp_path / "tensors.pt")
    code = (
        "import sys; sys.modules['inpaint_kernels'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "model = torch.load(sys.argv[1] + '/model.pt', weights_only=False)\n"
        "x, expected = torch.load(sys.argv[1] + '/tensors.pt')\n"
        "assert torch.allclose(model(x), expected, rtol=0, atol=1e-6)\n"
        "print([type(m).__name__ for m in model])\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['Unit', 'Cell', 'Sequential']"


def test_the_state_dict_goes_both_ways():
    module = Unit(old_spectral_norm(conv()), F.elu, norm=nn.BatchNorm2d(2))
    other = copy.deepcopy(module)
    keys = list(module.state_dict())
    accelerate(module)
    assert list(module.state_dict()) == keys
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    module.load_state_dict(other.state_dict())
    x = image(dtype=torch.float32)
    assert relative_error(module(x), other(x)) < 1e-5


def test_data_parallel_is_looked_into():
    model = nn.DataParallel(nn.Sequential(plain_block().double()))
    original = copy.deepcopy(model)
    assert only(accelerate(model)).name == "0"
    assert_same_step(model, original, image())


def test_distributed_data_parallel_is_looked_into(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        inner = nn.Sequential(plain_block().double())
        original = copy.deepcopy(inner)
        model = nn.parallel.DistributedDataParallel(inner)
        assert only(accelerate(model)).name == "0"
        x = image()
        for network in (model, original):
            network(x).square().sum().backward()
        for ours, theirs in zip(inner.parameters(), original.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    finally:
        torch.distributed.destroy_process_group()


def test_data_parallel_inside_a_model_still_spreads():
    model = Cell(nn.DataParallel(plain_block()), act=nn.MaxPool2d(2))
    report = accelerate(Cell(nn.DataParallel(plain_block()), "", None))
    assert only(report).name == only(accelerate(model)).name == "conv.module"


def replica(module: Any) -> Any:
    """What torch.nn.parallel.replicate makes for another device, here on the same one."""
    made = module._replicate_for_data_parallel()
    made._former_parameters = {}
    for name, parameter in module._parameters.items():
        if parameter is None:
            made._parameters[name] = None
        else:
            setattr(made, name, parameter * 1)  # no leaf, no nn.Parameter
            made._former_parameters[name] = getattr(made, name)
    for name, buffer in module._buffers.items():
        setattr(made, name, buffer)
    for name, child in module._modules.items():
        setattr(made, name, None if child is None else replica(child))
    return made


REPLICATED: dict[str, Build] = {
    "cell": lambda: Cell(conv(), "na", nn.ReLU(), nn.BatchNorm2d(4)),
    "sequential": lambda: nn.Sequential(conv(), nn.ELU(), conv(4, 4, 3), nn.ReLU()),
    "gated": lambda: Unit(conv(), F.elu),
    "gated_no_bias": lambda: Unit(conv(bias=False), F.elu),
    "spectral_hook": lambda: Unit(old_spectral_norm(conv()), F.elu),
}


@pytest.mark.parametrize("variant", REPLICATED)
def test_replicas_of_data_parallel_run_the_replacement(variant):
    module = REPLICATED[variant]().double()
    x, original = image(), copy.deepcopy(module)
    only(accelerate(module))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_error(replica(module)(x), replica(original)(x)) < TOLERANCE


def test_a_model_is_compiled_before_or_after():
    x = image(1, 3, 8, 8)
    original = nn.Sequential(plain_block(), conv(4, 2, 3)).double()
    expected = original(x)
    after = copy.deepcopy(original)
    accelerate(after)
    before: Any = torch.compile(copy.deepcopy(original), backend="eager")
    assert relative_error(before(x), expected) < TOLERANCE
    report = accelerate(before)
    assert only(report).name == "0"
    assert relative_error(before(x), expected) < TOLERANCE
    assert relative_error(torch.compile(after, backend="eager")(x), expected) < TOLERANCE
    report.undo()
    assert torch.equal(before(x), expected)


def test_a_compiled_module_inside_a_model_is_looked_into():
    inner = plain_block().double()
    x = image(1, 3, 8, 8)
    compiled: Any = torch.compile(inner, backend="eager")
    model = nn.Sequential(compiled, nn.MaxPool2d(2))
    expected = model(x)
    assert only(accelerate(model)).name == "0._orig_mod"
    assert is_swapped(inner)
    assert relative_error(model(x), expected) < TOLERANCE


def test_weights_normalised_after_and_undone():
    module = Counting(3, 4, 3, padding=1).double()
    original = copy.deepcopy(module)
    report = accelerate(module)
    for layer in (module, original):
        torch.nn.utils.parametrizations.weight_norm(layer)
    assert_same_step(module, original, image(), 1 - holes(2, 1, 10, 12))
    report.undo()
    assert not is_swapped(module)
    assert isinstance(module, Counting)
    assert_same_step(module, original, image(), 1 - holes(2, 1, 10, 12))


# Example inputs and the layout ----------------------------------------------------------------------------------------


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.tail = plain_block(), nn.MaxPool2d(2)

    def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return self.tail(self.body(x + shift))


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(lambda x: x, id="tensor"),
        pytest.param(lambda x: (x, x), id="tuple"),
        pytest.param(lambda x: {"x": x, "shift": 1.0}, id="dict"),
    ],
)
def test_example_inputs_are_checked_on_the_whole_model(example):
    model = Shifted()
    report = accelerate(model, example(image(1, 3, 8, 8, dtype=torch.float32)))
    assert "body" in [entry.name for entry in report.replaced]
    assert report.model_error is not None
    assert report.model_error < 1e-5
    assert "whole model" in str(report)


def test_what_the_model_raises_for_example_inputs_is_raised_and_nothing_changes():
    model = Shifted()
    with pytest.raises(RuntimeError):
        accelerate(model, torch.zeros(1, 7, 4, 4))
    assert not any(map(is_swapped, model.modules()))


def test_channels_last_is_reported_used_without_gradient_and_undone(monkeypatch):
    monkeypatch.setattr(acceleration, "_GAIN", 0.0)
    model, x = Shifted(), image(2, 3, 8, 8, dtype=torch.float32)
    parameters = [(p, p.stride(), p.data_ptr()) for p in model.parameters()]
    expected, values = model(x), copy.deepcopy(model.state_dict())
    report = accelerate(model, x)
    layouts = [entry for entry in report.replaced if entry.recipe == "channels_last"]
    assert len(layouts) == 1
    assert "channels_last" in str(report)
    seen: list[bool] = []
    model.body.register_forward_hook(lambda m, args, y: seen.append(y.is_contiguous()))
    with torch.no_grad():
        assert model(x).is_contiguous()
        assert relative_error(model(x), expected) < 1e-5
    assert model(x).is_contiguous()
    assert seen == [False, False, True]
    report.undo()
    assert type(model) is Shifted
    assert [(p, p.stride(), p.data_ptr()) for p in model.parameters()] == parameters
    assert all(map(torch.equal, model.state_dict().values(), values.values()))
    assert torch.equal(model(x), expected)


def test_undo_keeps_what_training_and_casts_did(monkeypatch):
    monkeypatch.setattr(acceleration, "_GAIN", 0.0)
    model, x = Shifted(), image(1, 3, 8, 8, dtype=torch.float32)
    report = accelerate(model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    values = [p.detach().clone() for p in model.parameters()]
    model.double()
    report.undo()
    assert all(torch.equal(p, value.double()) for p, value in zip(model.parameters(), values, strict=True))
    model(x.double())
