"""Every model as one graph: under torch.compile, in torch.export, and as an ONNX file that ONNX Runtime computes."""

from __future__ import annotations

import copy
import functools
import importlib.util
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inpaint_kernels.models import csa, deepfill_v1, deepfill_v2, edge_connect, glcic
from inpaint_kernels.models._interface import InpaintResult
from torch import Tensor, nn

from inpaint_kernels import (
    PRESETS,
    ContextualAttentionResult,
    coherent_semantic_attention,
    contextual_attention,
    dilated_conv2d,
    gated_conv2d,
    hog,
    onnx,
    partial_conv2d,
)
from tests.model_cases import CASES, DIALECTS, seeded
from tests.model_contract import Case, assert_same, maps_of

# In the default run each way is gone by the models that need its parts; by all others in the slow one.
QUICK_DYNAMIC = ("glcic", "guided_face")
QUICK_TRAINING = ("glcic",)
QUICK_MODELS = ("deepfill_v1", "deepfill_v2", "glcic", "edge_connect", "csa", "guided_face", "partial_conv_unet")
QUICK_ONNX = ("csa", "glcic")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """All models share forward's code, of which torch.compile keeps a limited number of graphs."""
    torch._dynamo.reset()


@functools.cache
def case_of(name: str) -> Case:
    return (CASES | DIALECTS)[name]()


def every(*quick: str) -> pytest.MarkDecorator:
    """All models and dialects, slow unless named."""
    names = [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in CASES | DIALECTS]
    return pytest.mark.parametrize("name", names)


def other_inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Other images and other holes of the same size."""
    image, mask = case.inputs()
    return 1 - image.flip(3), mask.flip(2, 3)


def graphs_counted() -> tuple[Callable[..., Any], list[Any]]:
    """A backend that runs a graph as it is, and the graphs that it was given."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend, graphs


# torch.compile --------------------------------------------------------------------------------------------------------


@every("deepfill_v2", "glcic", "edge_connect", "guided_face", "partial_conv_unet")
def test_compiles_to_one_graph_for_all_masks(name):
    case = case_of(name)
    backend, graphs = graphs_counted()
    compiled = torch.compile(case.model, fullgraph=True, dynamic=False, backend=backend)
    with torch.no_grad():
        for image, mask in (case.inputs(), other_inputs(case)):
            assert_same(compiled(image, mask, **case.guidance), case.run(image, mask), case.tolerance)
    assert len(graphs) == 1


@every(*QUICK_DYNAMIC)
def test_compiles_to_one_graph_for_all_sizes(name):
    case = larger(case_of(name))
    backend, graphs = graphs_counted()
    compiled = torch.compile(case.model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for one in (case, larger(case)):
            image, mask = one.inputs()
            assert_same(compiled(image, mask, **one.guidance), one.run(image, mask), one.tolerance)
    assert len(graphs) == 1


@every(*QUICK_TRAINING)
def test_a_training_step_compiles(name):
    case = case_of(name)
    image, mask = case.inputs()
    compiled = copy.deepcopy(case.model).train()
    gradients = []
    for model, call in (
        (eager := copy.deepcopy(case.model).train(), eager),
        (compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager")),
    ):
        result: InpaintResult = call(image, mask, **case.guidance)
        maps = [value for value in maps_of(result).values() if value.requires_grad]
        torch.stack([(value - 0.3).square().mean() for value in maps]).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for parameter, expected in gradients[0].items():
        assert (gradients[1][parameter] - expected).norm() <= 1e-3 * expected.norm() + 1e-6, parameter


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_inductor_gives_the_same(name):
    case = case_of(name)
    compiled = torch.compile(case.model, fullgraph=True)
    with torch.no_grad():
        for image, mask in (case.inputs(), other_inputs(case)):
            assert_same(compiled(image, mask, **case.guidance), case.run(image, mask), 10 * case.tolerance)


DISCRIMINATORS: dict[str, Callable[[], tuple[nn.Module, list[Tensor]]]] = {
    "deepfill_v1": lambda: (deepfill_v1.Discriminator(32), [torch.rand(2, 3, 32, 32)]),
    "deepfill_v2": lambda: (deepfill_v2.SNPatchGAN(), [torch.rand(2, 4, 64, 64)]),
    "glcic": lambda: (glcic.ContextDiscriminator(32, 64, 5), [torch.rand(2, 3, 32, 32), torch.rand(2, 3, 64, 64)]),
    "edge_connect": lambda: (edge_connect.Discriminator(3), [torch.rand(2, 3, 32, 48)]),
    "csa": lambda: (csa.PatchDiscriminator(channels=8), [torch.rand(2, 3, 64, 64)]),
    "csa_features": lambda: (csa.FeaturePatchDiscriminator(16, 32), [torch.rand(2, 16, 32, 32)]),
}


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_discriminators_compile_and_pickle(name):
    discriminator, inputs = DISCRIMINATORS[name]()
    seeded(discriminator)
    expected = scores_of(discriminator(*inputs))
    with torch.no_grad():
        compiled = torch.compile(discriminator, fullgraph=True, backend="eager")
        assert (scores_of(compiled(*inputs)) - expected).abs().max() <= 1e-5
        for other in (copy.deepcopy(discriminator), pickle.loads(pickle.dumps(discriminator))):
            assert (scores_of(other(*inputs)) - expected).abs().max() <= 1e-5


def scores_of(judgement: Any) -> Tensor:
    """Of EdgeConnect's, which gives its features too, the scores."""
    return judgement[0] if isinstance(judgement, tuple) else judgement


# torch.export ---------------------------------------------------------------------------------------------------------


@every(*QUICK_MODELS)
def test_exports(name):
    case = case_of(name)
    with torch.no_grad():
        program = torch.export.export(case.model, case.inputs(), case.guidance)
        for image, mask in (case.inputs(), other_inputs(case)):
            result = program.module()(image, mask, **case.guidance)
            assert_same(result, case.run(image, mask), case.tolerance)


class Positional(nn.Module):
    """A model whose guidance torch.export can give free sizes, which it cannot to a call's **arguments."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model, self.names = case.model, tuple(case.guidance)

    def forward(self, image: Tensor, mask: Tensor, *guides: Tensor) -> InpaintResult:
        return self.model(image, mask, **dict(zip(self.names, guides, strict=True)))


@every(*QUICK_DYNAMIC)
def test_exports_with_free_heights_and_widths(name):
    case = larger(case_of(name))
    step = step_of(case)
    free = {2 + i: step * torch.export.Dim(side, min=2, max=64) for i, side in enumerate(("rows", "columns"))}
    shapes: dict[str, Any] = {"image": free, "mask": free}
    if case.guidance:
        shapes["guides"] = tuple(free for _ in case.guidance)
    example = (*case.inputs(), *case.guidance.values())
    with torch.no_grad():
        program = torch.export.export(Positional(case), example, dynamic_shapes=shapes, strict=False)
        for one in (case, larger(case)):
            image, mask = one.inputs()
            result = program.module()(image, mask, *one.guidance.values())
            assert_same(result, one.run(image, mask), one.tolerance)


def step_of(case: Case) -> int:
    """What free sizes are multiples of. Where CSA's levels fit each other only after a resize, it is another graph."""
    return int(2**case.model.depth) if isinstance(case.model, csa.CSA) else case.model.size_multiple


def larger(case: Case) -> Case:
    """The same model for images that are larger by one and two steps."""
    step = step_of(case)
    height, width = (step * (-(-side // step) + more) for side, more in zip(case.size, (1, 2), strict=True))
    guidance = {name: nn.functional.interpolate(guide, (height, width)) for name, guide in case.guidance.items()}
    return Case(case.model, (height, width), guidance, tolerance=case.tolerance)


def test_canny_is_outside_of_an_export():
    case = case_of("edge_connect")
    with pytest.raises(ValueError, match="canny_edges: expected the known edges in an export"):
        torch.export.export(case.model, case.inputs(), strict=False)


# ONNX -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def runtime() -> Any:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"torch's ONNX export needs {package}")
    return pytest.importorskip("onnxruntime", reason="ONNX files are compared with what onnxruntime computes")


@every(*QUICK_ONNX)
def test_onnx_file_equals_the_model(name, tmp_path, runtime):
    case = case_of(name)
    path = tmp_path / "model.onnx"
    outputs = onnx.export(case.model, *case.inputs(), path, **case.guidance)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["image", "mask", *case.guidance]
    assert [value.name for value in session.get_outputs()] == list(outputs)
    for image, mask in (case.inputs(), other_inputs(case)):
        expected = maps_of(case.run(image, mask))
        assert list(outputs) == list(expected)
        feed = {"image": image, "mask": mask, **case.guidance}
        for output, value in zip(outputs, session.run(None, {k: v.numpy() for k, v in feed.items()}), strict=True):
            assert (torch.from_numpy(value) - expected[output]).abs().max() <= 2 * case.tolerance, output


def test_onnx_files_have_standard_operations_alone(tmp_path, runtime):
    import onnx as package

    case = case_of("glcic")
    onnx.export(case.model, *case.inputs(), tmp_path / "model.onnx")
    model = package.load(tmp_path / "model.onnx")
    package.checker.check_model(model)
    assert {entry.domain for entry in model.opset_import} <= {"", "ai.onnx"}


IMAGE, MASK = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda model: nn.Conv2d(3, 3, 1), TypeError, "model: expected one of inpaint_kernels.models, got Conv2d"),
        (lambda model: model.train(), ValueError, "model: expected evaluation mode"),
        (lambda model: model.half(), TypeError, "model: expected parameters in torch.float32, got torch.float16"),
        (lambda model: model.to("meta"), ValueError, "model: expected the CPU, got meta"),
    ],
    ids=["no model", "training", "half", "device"],
)
def test_onnx_export_refuses(change, error, message, tmp_path, runtime):
    model = change(copy.deepcopy(case_of("glcic").model))
    with pytest.raises(error, match=message):
        onnx.export(model, IMAGE, MASK, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_onnx_export_refuses_what_one_file_cannot_hold(tmp_path, runtime, monkeypatch):
    monkeypatch.setattr(onnx, "LARGEST_FILE", 1000)
    with pytest.raises(ValueError, match="model: expected less than 2 GiB of parameters"):
        onnx.export(case_of("glcic").model, IMAGE, MASK, tmp_path / "model.onnx")


def test_onnx_export_names_the_arguments_that_the_model_refuses(tmp_path, runtime):
    with pytest.raises(ValueError, match="image: expected a height and width that are multiples of 4, got 32 x 30"):
        onnx.export(case_of("glcic").model, IMAGE[..., :30], MASK[..., :30], tmp_path / "model.onnx")


def test_onnx_export_names_absent_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"onnx and onnxscript: pip install 'inpaint-kernels\[onnx\]'"):
        onnx.export(case_of("glcic").model, IMAGE, MASK, tmp_path / "model.onnx")


# The ops as ONNX writes them ------------------------------------------------------------------------------------------

torch.manual_seed(26)
MAPS = torch.randn(2, 6, 12, 16)
HOLES = (torch.rand(2, 1, 12, 16) > 0.7).float()


def _gated(x: Tensor, **options: Any) -> Any:
    return gated_conv2d(x, WEIGHT, BIAS, dilation=2, **options)


WEIGHT, BIAS, MANY = torch.randn(8, 6, 3, 3) / 7, torch.randn(8), torch.randn(2, 8, 12, 16)
CALLS: dict[str, Callable[[Tensor], Any]] = {
    **{
        f"contextual_attention-{preset}": functools.partial(
            contextual_attention, b=MAPS.flip(3), mask=HOLES, preset=preset, return_offsets=True
        )
        for preset in PRESETS
        if PRESETS[preset].grid != "none"
    },
    "gated_conv2d-gate_first": lambda x: _gated(x, gate_order="gate_first", padding=2),
    "gated_conv2d-upsample": lambda x: _gated(x, upsample=2, padding=(1, 2, 3, 4), activation="leaky_relu"),
    "gated_conv2d-same_tf": lambda x: gated_conv2d(x, WEIGHT, BIAS, 2, padding_mode="same_tf", activation="relu"),
    "dilated_conv2d-residual": lambda x: torch.ops.inpaint_kernels.dilated_conv2d(
        x.detach(), WEIGHT, BIAS, [1, 1], [1, 1, 1, 1], [1, 1], 1, 1, False, "relu", 0.2, MANY, "portable"
    ),
    "dilated_conv2d-reflect": lambda x: dilated_conv2d(x, WEIGHT, padding=1, padding_mode="reflect", activation="elu"),
    "dilated_conv2d-upsample": lambda x: dilated_conv2d(x, WEIGHT, upsample=2, padding=(1, 2, 3, 4), activation="elu"),
    "dilated_conv2d-groups": lambda x: dilated_conv2d(x, WEIGHT[:, :3], BIAS, 2, groups=2, activation="none"),
    **{
        f"partial_conv2d-{rule}": functools.partial(partial_conv2d, mask=1 - HOLES, weight=WEIGHT, bias=BIAS, rule=rule)
        for rule in ("nvidia", "naoto", "paper")
    },
    "partial_conv2d-two_masks": lambda x: partial_conv2d(
        x, torch.cat([HOLES, 1 - HOLES], 1), WEIGHT, stride=2, padding=1, mask_channels=(2, 4)
    ),
    "hog": lambda x: hog(x, 9, 4, 2, visualize=True),
    "hog-sqrt": lambda x: hog(x.abs(), 8, (5, 3), (1, 2), "L1-sqrt", transform_sqrt=True),
    "hog-cells": lambda x: hog(x, 6, 4, target="cells"),
}


@pytest.mark.parametrize("name", CALLS)
def test_composites_equal_the_ops(name):
    x = MAPS.clone().requires_grad_()  # what wants a gradient is a torch op, and replaced
    expected = CALLS[name](x)
    with onnx._Composites():
        found = CALLS[name](x)
    assert type(found) is type(expected)
    if isinstance(expected, ContextualAttentionResult):  # where the probability underflows, any key is the largest
        seen = (expected.maximum > 1e-30)[:, None]
        expected, found = (y._replace(offsets=y.offsets * seen) for y in (expected, found))
    for one, other in zip(*([y] if isinstance(y, Tensor) else y for y in (found, expected)), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_the_scan_equals_the_generated_vectors(variant):
    flags = torch.zeros(2, 12, 16, dtype=torch.bool)
    flags[0, 2:8, 3:9], flags[1, 0:5] = True, True

    class Layer(nn.Module):
        def forward(self, x: Tensor, flags: Tensor) -> tuple[Tensor, ...]:
            return tuple(coherent_semantic_attention(x, flags, variant=variant, return_attention=True))

    with torch.no_grad():
        with onnx._Composites():
            program = torch.export.export(Layer(), (MAPS.abs(), flags), strict=False)
        for x, masked in ((MAPS.abs(), flags), (MAPS.abs().flip(2), flags.flip(2)), (MAPS.abs(), flags & False)):
            for one, other in zip(program.module()(x, masked), Layer()(x, masked), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
