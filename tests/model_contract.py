"""What every inpainting model promises, see :class:`inpaint_kernels.models._interface.InpaintingModel`.

A model's test module runs all of :data:`CONTRACT` on a :class:`Case`.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from inpaint_kernels.models._interface import InpaintingModel, InpaintResult
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.compare import relative_error
from tests.model_pairs import Size, hashed_image, holes


@dataclass(frozen=True)
class Case:
    """One model, and how it is called.

    Attributes:
        model: for evaluation, float32.
        size: of the images.
        guidance: other arguments, for a batch of two.
        needs_known: whether it fails where nothing is known.
        bounded: whether what it paints is in [0, 1].
        has_least_size: whether images of one multiple of its sizes are too small.
        tolerance: between two ways to round.
        short_error: of bfloat16, relative; that of float16 is an eighth, as are its rounding errors.
        device: where model, guidance and inputs are.
    """

    model: InpaintingModel
    size: Size
    guidance: dict[str, Any] = field(default_factory=dict)
    needs_known: bool = False
    bounded: bool = True
    has_least_size: bool = True
    tolerance: float = 1e-5
    short_error: float = 0.02
    device: str = "cpu"

    def inputs(self, batch: int = 2) -> tuple[Tensor, Tensor]:
        """Images and masks, each its own."""
        image, mask = hashed_image(self.size, batch), holes(self.size, batch)
        return image.float().to(self.device), mask.float().to(self.device)

    def on(self, device: str) -> Case:
        """The same there, the model a copy."""
        guidance = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.guidance.items()}
        return dataclasses.replace(self, model=copy.deepcopy(self.model).to(device), guidance=guidance, device=device)

    def with_model(self, model: InpaintingModel) -> Case:
        """Another model, called in the same way."""
        return dataclasses.replace(self, model=model)

    def run(self, image: Tensor, mask: Tensor, **options: Any) -> InpaintResult:
        """Without gradient."""
        with torch.no_grad():
            result: InpaintResult = self.model(image, mask, **{**self.guidance, **options})
        return result


def maps_of(result: InpaintResult) -> dict[str, Tensor]:
    """The fields that are there."""
    return {name: value for name, value in result._asdict().items() if value is not None}


def assert_same(actual: InpaintResult, expected: InpaintResult, tolerance: float) -> None:
    assert maps_of(actual).keys() == maps_of(expected).keys()
    for name, value in maps_of(expected).items():
        assert float((maps_of(actual)[name] - value).abs().max()) <= tolerance, name


def record_inputs(monkeypatch: pytest.MonkeyPatch, *networks: nn.Module) -> list[tuple[Tensor, ...]]:
    """A list that will hold the positional arguments of each call of the networks."""
    calls: list[tuple[Tensor, ...]] = []

    def recording(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Tensor, **options: Any) -> Any:
            calls.append(arguments)
            return forward(*arguments, **options)

        return call

    for network in networks:
        monkeypatch.setattr(network, "forward", recording(network.forward))
    return calls


# The promises ---------------------------------------------------------------------------------------------------------


def images_are_in_range_and_known_pixels_stay(case: Case) -> None:
    image, mask = case.inputs()
    result = case.run(image, mask)
    for name, value in maps_of(result).items():
        assert value.shape == (2, 1 if name in ("edges", "hog") else 3, *case.size), name
        assert value.dtype == image.dtype
        if case.bounded or name == "completed":
            assert 0 <= value.min() <= value.max() <= 1, name
    assert torch.equal(result.completed, torch.where(mask > 0.5, result.output.clamp(0, 1), image))
    assert not torch.equal(result.completed, image)


def a_batch_equals_single_runs(case: Case) -> None:
    image, mask = case.inputs()
    whole = case.run(image, mask)
    for i in range(2):
        one = slice(i, i + 1)
        guidance = {k: v[one] if isinstance(v, Tensor) and len(v) == 2 else v for k, v in case.guidance.items()}
        expected = InpaintResult(*(None if v is None else v[one] for v in whole))
        assert_same(case.run(image[one], mask[one], **guidance), expected, case.tolerance)


def one_mask_serves_all_images(case: Case) -> None:
    image, mask = case.inputs()
    assert_same(case.run(image, mask[:1]), case.run(image, mask[:1].expand(2, -1, -1, -1)), 0)
    assert_same(case.run(image, mask[:1] > 0.5), case.run(image, 0.51 * mask[:1]), 0)


def the_hole_is_not_looked_at(case: Case) -> None:
    image, mask = case.inputs()
    assert_same(case.run(image.masked_fill(mask > 0.5, torch.nan), mask), case.run(image, mask), 0)


def without_a_hole_nothing_changes(case: Case) -> None:
    image, mask = case.inputs()
    result = case.run(image, torch.zeros_like(mask))
    assert torch.equal(result.completed, image)
    assert result.output.isfinite().all()


def all_hole_is_filled_or_refused(case: Case) -> None:
    image, mask = case.inputs()
    if case.needs_known:
        with pytest.raises(ValueError, match="mask: expected known pixels"):
            case.run(image, torch.ones_like(mask))
    else:
        assert case.run(image, torch.ones_like(mask)).completed.isfinite().all()


def the_layout_does_not_matter(case: Case) -> None:
    image, mask = case.inputs()
    expected = case.run(image, mask)
    assert_same(case.run(image.contiguous(memory_format=torch.channels_last), mask), expected, 0)
    model = copy.deepcopy(case.model).to(memory_format=torch.channels_last)
    assert_same(case.with_model(model).run(image, mask), expected, case.tolerance)


def the_holes_region_is_that_of_the_image(case: Case) -> None:
    image, mask = case.inputs()
    whole, hole = case.run(image, mask), case.run(image, mask, region="hole")
    assert (hole.completed - whole.completed).abs().max() <= case.tolerance


def recording_gradients_changes_nothing(case: Case) -> None:
    image, mask = case.inputs()
    result: InpaintResult = case.model(image, mask, **case.guidance)
    assert result.output.requires_grad
    assert_same(result, case.run(image, mask), case.tolerance)


def training_reaches_every_parameter(case: Case) -> None:
    model = copy.deepcopy(case.model).train()
    image, mask = case.inputs()
    leaf = image.clone().requires_grad_()
    result: InpaintResult = model(leaf, mask, **case.guidance)
    maps = [value for value in maps_of(result).values() if value.requires_grad]
    torch.stack([(value - 0.3).square().mean() for value in maps]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def copies_give_the_same(case: Case) -> None:
    """Also of a model in the middle of training, and of one that keeps what it has computed."""
    image, mask = case.inputs()
    model = copy.deepcopy(case.model)
    model(image, mask, **case.guidance)  # records gradients
    expected = case.run(image, mask)
    case.with_model(model).run(image, mask)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    unpickled = pickle.loads(pickle.dumps(model))
    for other in (copy.deepcopy(model), unpickled, torch.load(file, weights_only=False)):
        assert_same(case.with_model(other).run(image, mask), expected, 0)
    with torch.no_grad():
        for value in [*unpickled.parameters(), *unpickled.buffers()]:
            value.fill_(0.5)
    unpickled.load_state_dict(model.state_dict())
    assert_same(case.with_model(unpickled).run(image, mask), expected, 0)


def training_mode_changes_the_norms_alone(case: Case) -> None:
    """Batch norms follow the batch, spectral norms take a step; nothing else knows, and eval() brings all back."""
    image, mask = case.inputs()
    expected = case.run(image, mask)
    training = case.with_model(copy.deepcopy(case.model).train())
    result = training.run(image, mask)
    state, before = training.model.state_dict(), case.model.state_dict()
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(state[name], before[name])}
    assert changed <= {"running_mean", "running_var", "num_batches_tracked", "weight_u", "weight_v"}
    if not changed:
        assert_same(result, expected, case.tolerance)
    training.model.load_state_dict(before)
    training.model.eval()
    assert_same(training.run(image, mask), expected, 0)


def short_dtypes_are_close(case: Case) -> None:
    image, mask = case.inputs()
    expected = case.run(image, mask).completed
    for dtype, error in ((torch.bfloat16, case.short_error), (torch.float16, case.short_error / 8)):
        result = case.with_model(copy.deepcopy(case.model).to(dtype)).run(image.to(dtype), mask)
        assert {value.dtype for value in maps_of(result).values()} == {dtype}
        assert relative_error(result.completed.float(), expected) <= error, dtype


def autocast_is_close_and_attends_in_float32(case: Case) -> None:
    image, mask = case.inputs()
    with recording_dtypes() as dtypes, torch.autocast(case.device, torch.bfloat16):
        result = case.run(image, mask)
    assert {value.dtype for value in maps_of(result).values()} == {torch.float32}
    assert relative_error(result.completed, case.run(image, mask).completed) <= case.short_error
    attention, convolutions = (
        {dtype for op, dtype in dtypes if op.startswith("inpaint_kernels") and ("conv" in op) == is_convolution}
        for is_convolution in (False, True)
    )
    assert attention <= {torch.float32}
    assert convolutions == {torch.bfloat16}


class _RecordingDtypes(TorchDispatchMode):
    """Behind autograd and autocast: what kernels are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor):
            self.seen.add((str(func), args[0].dtype))
        return func(*args, **(kwargs or {}))


@contextmanager
def recording_dtypes() -> Iterator[set[tuple[str, torch.dtype]]]:
    """The names of the ops that are called, with the dtype of their first argument."""
    with _RecordingDtypes() as mode:
        yield mode.seen


def errors_name_the_argument(case: Case) -> None:
    image, mask = case.inputs()
    multiple = case.model.size_multiple
    multiples = f"image: expected a height and width that are multiples of {multiple}"
    wrong: list[tuple[Any, type[Exception], str]] = [
        ((image[0], mask), ValueError, r"image: expected shape \[B, 3, H, W\]"),
        ((image[:, :1], mask), ValueError, r"image: expected shape \[B, 3, H, W\]"),
        (((255 * image).byte(), mask), TypeError, "image: expected a floating-point tensor"),
        ((image, mask[..., 1:]), ValueError, r"mask: expected shape \[B\|1, 1, H, W\]"),
        ((image, mask.long()), TypeError, "mask: expected torch.bool"),
    ]
    if multiple > 1:
        wrong.append(((image[..., 1:], mask[..., 1:]), ValueError, multiples))
    if case.has_least_size:
        small = image[..., :multiple, :], mask[..., :multiple, :]
        wrong.append((small, ValueError, r"image: expected a height and width of at least \d+, got"))
    guidance = {k: v for k, v in case.guidance.items() if not isinstance(v, Tensor)}
    for arguments, error, message in wrong:
        with pytest.raises(error, match=message):
            case.run(*arguments, **guidance)
    with pytest.raises(ValueError, match="region: expected one of 'full', 'hole'"):
        case.run(image, mask, region="all")
    with pytest.raises(TypeError, match="no_such_guidance"):
        case.run(image, mask, no_such_guidance=1)


CONTRACT: tuple[Callable[[Case], None], ...] = (
    images_are_in_range_and_known_pixels_stay,
    a_batch_equals_single_runs,
    one_mask_serves_all_images,
    the_hole_is_not_looked_at,
    without_a_hole_nothing_changes,
    all_hole_is_filled_or_refused,
    the_layout_does_not_matter,
    the_holes_region_is_that_of_the_image,
    recording_gradients_changes_nothing,
    training_reaches_every_parameter,
    copies_give_the_same,
    training_mode_changes_the_norms_alone,
    short_dtypes_are_close,
    autocast_is_close_and_attends_in_float32,
    errors_name_the_argument,
)

contract = pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
