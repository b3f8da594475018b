"""Any photo with any model: every kind and size in and out, known pixels untouched, holes for themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inpaint_kernels.models import CSA, GLCIC, EdgeConnect, GuidedFace
from inpaint_kernels.models._boxes import Box, connected_boxes, merged
from inpaint_kernels.models._interface import InpaintingModel, InpaintResult, complete
from inpaint_kernels.models.deepfill_v1 import DeepFillV1
from inpaint_kernels.models.deepfill_v2 import DeepFillV2
from PIL import Image
from torch import Tensor

import inpaint_kernels
from inpaint_kernels import images, inpaint
from tests.gpu_launches import TorchLaunches
from tests.model_cases import holes, narrow, narrow_glcic, narrow_unet, photo, seeded

MODELS: dict[str, Callable[[], InpaintingModel]] = {
    "deepfill_v1": lambda: seeded(DeepFillV1(narrow())),
    "deepfill_v1-reflect": lambda: seeded(DeepFillV1(narrow("reflect", "mmagic"))),
    "deepfill_v2": lambda: seeded(DeepFillV2(narrow("same_tf", "nipponjo_tf", "tanh")), 5.0),
    "glcic": lambda: seeded(narrow_glcic("iizuka")),
    "partial_conv_unet": lambda: seeded(narrow_unet()),
    "csa": lambda: CSA(channels=4, depth=5).eval(),
    "edge_connect": lambda: EdgeConnect(residual_blocks=1).eval(),
    "guided_face": lambda: GuidedFace(residual_blocks=1).eval(),
}
SIZES = ((1, 1), (1, 130), (2, 3), (5, 7), (8, 8), (12, 9), (17, 64), (71, 66), (130, 1))


class Painter(InpaintingModel):  # type: ignore[misc]
    """Paints a given image, wherever it is asked to; it remembers what it was asked.

    Attributes:
        boxes: of the last call.
    """

    def __init__(self, painting: Tensor, size_multiple: int = 1) -> None:
        super().__init__()
        self.painting, self.multiple = painting, size_multiple
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.boxes: Any = None

    def needed_regions(self, hole: Box, height: int, width: int) -> dict[str, Box]:
        return {"painting": hole}

    def multiply_adds(self, boxes: Any, height: int, width: int) -> int:
        return height * width if boxes is None else sum(box.area for box in boxes)

    def paint(self, image: Tensor, hole: Tensor, *, boxes: Any = None) -> InpaintResult:
        self.boxes = boxes
        output = image.clone()
        for box in [Box(0, 0, *image.shape[2:])] if boxes is None else boxes:
            box.of(output).copy_(box.of(self.painting.to(image.dtype)))
        return InpaintResult(output, complete(image, output, hole))


def guidance_of(model: InpaintingModel, size: tuple[int, int]) -> dict[str, Any]:
    return {"canny_edges": torch.zeros(1, 1, *size)} if isinstance(model, EdgeConnect) else {}


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_size_is_filled_and_known_pixels_stay(name):
    model = MODELS[name]()
    # The wide networks, of which only some have slim forms, go through fewer sizes.
    for height, width in SIZES[::3] if name in ("csa", "edge_connect", "guided_face") else SIZES:
        image = photo(height, width)[0]
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[height // 3 : height // 3 + 20, width // 2 : width // 2 + 30] = True
        if name == "csa" and mask.float().mean() > 0.3:  # its attention needs known positions
            mask[:] = False
            mask[height // 2, width // 2] = height * width > 3
        result = inpaint(model, image, mask, **guidance_of(model, (height, width)))
        for field in (result.output, result.completed, result.coarse):
            assert field is None or field.shape == (3, height, width)
        assert result.completed[:, mask].isfinite().all()
        assert not mask.any() or not torch.equal(result.completed[:, mask], image[:, mask])
        assert torch.equal(result.completed[:, ~mask], image[:, ~mask])


@pytest.mark.parametrize("name", ["deepfill_v1", "glcic", "csa"])
def test_what_the_hole_holds_is_not_looked_at_in_its_mirror_either(name):
    model = MODELS[name]()
    image, mask = photo(45, 61)[0], torch.zeros(45, 61, dtype=torch.bool)
    mask[30:, 50:] = True  # at both borders that are padded
    spoilt = image.masked_fill(mask, torch.nan)
    for fit, max_side in (("pad", None), ("resize", 40), ("crop", None)):
        result, again = (inpaint(model, x, mask, fit=fit, max_side=max_side) for x in (image, spoilt))
        assert torch.equal(result.completed, again.completed)


def test_padding_mirrors_as_numpy_does():
    model = MODELS["glcic"]()
    image, mask = photo(37, 50), holes(37, 50, (5, 6, 20, 30))
    padded = [torch.from_numpy(np.pad(x, ((0, 0), (0, 0), (0, 3), (0, 2)), mode="reflect")) for x in (image, mask)]
    with torch.no_grad():
        expected = model(*padded).completed[..., :37, :50]
    torch.testing.assert_close(inpaint(model, image, mask, region="full").completed, expected, rtol=0, atol=0)


# Kinds ----------------------------------------------------------------------------------------------------------------

HOLE = np.zeros((40, 48), bool)
HOLE[10:25, 12:30] = True
PIXELS = (photo(40, 48)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
ALPHA = np.tile(np.arange(48, dtype=np.uint8) + 100, (40, 1))[:, :, None]

ARRAYS: dict[str, Any] = {
    "rgb": PIXELS,
    "rgb16": PIXELS.astype(np.uint16) * 257,
    "rgb float": PIXELS.astype(np.float32) / 255,
    "rgb half": (PIXELS / 255).astype(np.float16),
    "rgb big-endian": (PIXELS / 255).astype(">f8"),
    "gray": PIXELS[:, :, 0],
    "gray16": PIXELS[:, :, 0].astype(np.uint16) * 257,
    "one channel": PIXELS[:, :, :1],
    "gray and alpha": np.concatenate([PIXELS[:, :, :1], ALPHA], 2),
    "rgba": np.concatenate([PIXELS, ALPHA], 2),
}


@pytest.fixture(scope="module")
def glcic() -> InpaintingModel:
    return MODELS["glcic"]()


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_come_back_as_they_are(kind, glcic):
    array = ARRAYS[kind]
    before = array.copy()
    result = inpaint(glcic, array, HOLE)
    for field in (result.output, result.completed):
        assert (field.shape, field.dtype) == (array.shape, array.dtype)
    assert np.array_equal(result.completed[~HOLE], array[~HOLE])
    assert np.array_equal(array, before)
    assert result.coarse is result.attention is None
    painted = inpaint(glcic, PIXELS, HOLE).completed
    scale = 1 if array.dtype.kind == "f" else np.iinfo(array.dtype).max
    colours = result.completed.reshape(40, 48, -1)
    if array.ndim == 3 and array.shape[2] in (2, 4):
        assert np.array_equal(colours[:, :, -1:], ALPHA)
        colours = colours[:, :, :-1]
    if colours.shape[2] == 3:
        assert np.abs(colours[HOLE] / scale - painted[HOLE] / 255).max() < 0.003


def test_a_gray_photo_is_repeated_and_made_gray_again(glcic):
    gray = torch.from_numpy(ARRAYS["gray"] / np.float32(255))
    red, green, blue = inpaint(glcic, gray.expand(3, -1, -1), HOLE).completed
    expected = 0.299 * red + 0.587 * green + 0.114 * blue
    completed = inpaint(glcic, gray.numpy(), HOLE).completed
    torch.testing.assert_close(torch.from_numpy(completed)[HOLE], expected[HOLE], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "F", "I;16"])
def test_pictures_come_back_as_they_are(mode, glcic, tmp_path):
    if mode == "F":
        picture = Image.fromarray(ARRAYS["rgb float"][:, :, 0])
    elif mode == "I;16":
        picture = Image.fromarray(ARRAYS["gray16"])
    else:
        picture = Image.fromarray(ARRAYS["rgba"]).convert(mode)
    pictures: list[Any] = [picture]
    if mode != "F":
        picture.save(tmp_path / "photo.png")
        pictures += [tmp_path / "photo.png", str(tmp_path / "photo.png")]
    for given in pictures:
        completed = inpaint(glcic, given, Image.fromarray(HOLE)).completed
        assert isinstance(completed, Image.Image)
        assert completed.mode == mode
        assert np.array_equal(np.asarray(completed)[~HOLE], np.asarray(picture)[~HOLE])
        assert not np.array_equal(np.asarray(completed), np.asarray(picture))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_come_back_as_they_are(dtype, glcic):
    pixels = torch.from_numpy(PIXELS).permute(2, 0, 1)
    image = pixels if dtype == torch.uint8 else (pixels / 255).to(dtype)
    mask = torch.from_numpy(HOLE)
    for given in (image, image[None], image[:1], torch.stack([image, image.flip(1)])):
        completed = inpaint(glcic, given, mask).completed
        assert (completed.shape, completed.dtype) == (given.shape, dtype)
        assert torch.equal(completed[..., ~mask], given[..., ~mask])
        assert not completed.requires_grad
        assert not completed.is_inference()  # autograd may use it


def test_masks_of_every_kind_are_one_hole(glcic, tmp_path):
    expected = inpaint(glcic, PIXELS, HOLE).completed
    bytes_, tensor = HOLE.astype(np.uint8), torch.from_numpy(HOLE)
    Image.fromarray(255 * bytes_).save(tmp_path / "mask.png")
    red = np.zeros((40, 48, 3), np.uint8)
    red[HOLE, 0] = 255
    masks: list[Any] = [
        *(255 * bytes_, bytes_, HOLE.astype(np.float64), 65535 * HOLE.astype(np.uint16), HOLE[:, :, None], red),
        *(tensor, tensor[None], tensor[None, None], tensor.float(), 0.51 * tensor, tensor.byte(), 255 * tensor.byte()),
        *(Image.fromarray(HOLE), Image.fromarray(red), Image.fromarray(red).convert("P"), tmp_path / "mask.png"),
    ]
    for mask in masks:
        assert np.array_equal(inpaint(glcic, PIXELS, mask).completed, expected)


def test_the_threshold_is_a_share_of_full_scale(glcic):
    soft = np.where(HOLE, np.uint8(100), np.uint8(60))
    expected = inpaint(glcic, PIXELS, HOLE).completed
    assert np.array_equal(inpaint(glcic, PIXELS, soft, threshold=0.3).completed, expected)
    assert np.array_equal(inpaint(glcic, PIXELS, soft).completed, PIXELS)
    assert np.array_equal(inpaint(glcic, PIXELS, np.where(HOLE, 77, 76) / 255, threshold=76 / 255).completed, expected)


def test_edges_and_hog_are_gray_pictures():
    model = MODELS["guided_face"]()
    result = inpaint(model, Image.fromarray(PIXELS), HOLE)
    assert result.hog.mode == "L"
    assert result.hog.size == (48, 40)
    edges = np.zeros((1, 1, 40, 48), np.float32)
    result = inpaint(MODELS["edge_connect"](), PIXELS, HOLE, canny_edges=torch.from_numpy(edges))
    assert result.edges.shape == (40, 48)
    assert result.edges.dtype == np.uint8


# Regions --------------------------------------------------------------------------------------------------------------

FAR_APART = ((4, 8, 40, 50), (205, 330, 250, 380))


@pytest.mark.parametrize("name", ["deepfill_v1", "deepfill_v1-reflect", "deepfill_v2", "glcic"])
def test_holes_for_themselves_equal_the_full_run(name):
    model = MODELS[name]().double()
    image, mask = photo(256, 384, dtype=torch.float64), holes(256, 384, *FAR_APART)
    assert model.hole_boxes(mask[0, 0]) == [Box(*box) for box in FAR_APART]
    with torch.no_grad():
        full, part = model(image, mask), model(image, mask, region="hole")
    torch.testing.assert_close(part.completed, full.completed, rtol=0, atol=1e-12)
    outside = ~holes(256, 384, *FAR_APART).expand(-1, 3, -1, -1)
    assert torch.equal(part.output[outside], image[outside])
    completed = inpaint(model, image, mask).completed
    torch.testing.assert_close(completed, full.completed, rtol=0, atol=1e-12)


def test_near_holes_are_painted_together():
    model = MODELS["glcic"]()
    near = holes(256, 384, (100, 100, 140, 140), (100, 180, 140, 220))
    assert model.hole_boxes(near[0, 0]) == [Box(100, 100, 140, 220)]
    assert model.hole_boxes(near[0, 0], around=2) == [Box(98, 98, 142, 222)]
    assert model.hole_boxes(torch.zeros(64, 64, dtype=torch.bool)) == []


def test_boxes_that_are_asked_for_are_checked():
    model, image, mask = MODELS["glcic"](), photo(64, 64), holes(64, 64, (8, 8, 16, 16))
    with torch.no_grad():
        part, expected = model(image, mask, region=[(8, 8, 16, 16)]), model(image, mask, region="hole")
    assert torch.equal(part.completed, expected.completed)
    for box in ((0, 0, 65, 8), (8, 8, 8, 16), (-1, 0, 8, 8)):
        with pytest.raises(ValueError, match=r"region: expected boxes \(top, left, bottom, right\) in 64 x 64, got"):
            model(image, mask, region=[box])


@pytest.mark.parametrize(("side", "expected"), [(80, True), (90, False)])
def test_the_full_run_is_taken_where_the_boxes_cost_more_than_70_percent(side, expected):
    model = Painter(torch.rand(1, 3, 100, 100))
    mask = holes(100, 100, (0, 0, side, side))
    inpaint(model, photo(100, 100), mask)
    assert (model.boxes is not None) == expected
    inpaint(model, photo(100, 100), mask, region="full")
    assert model.boxes is None


def test_the_cost_of_boxes_is_that_of_the_full_run_where_they_cover_it():
    for name in ("deepfill_v1", "deepfill_v2", "glcic"):
        model = MODELS[name]()
        full = model.multiply_adds(None, 128, 192)
        assert model.multiply_adds([Box(0, 0, 128, 192)], 128, 192) == full
        assert model.multiply_adds([Box(40, 40, 48, 48)], 128, 192) < 0.8 * full
    with torch.device("meta"):
        published = GLCIC().eval()
    assert published.multiply_adds(None, 256, 256) / 32.55e9 == pytest.approx(1, abs=0.01)


def test_connected_holes_share_a_box():
    ndimage = pytest.importorskip("scipy.ndimage")
    generator = torch.Generator().manual_seed(3)
    for height, width, share in ((200, 311, 0.0004), (64, 64, 0.5), (300, 20, 0.002)):
        hole = torch.rand(height, width, generator=generator) < share
        hole = torch.nn.functional.max_pool2d(hole[None].float(), 5, 1, 2)[0] > 0
        boxes = connected_boxes(hole, most=10_000)
        labels, count = ndimage.label(hole.numpy(), np.ones((3, 3)))
        assert len(boxes) <= count
        for label in range(1, count + 1):
            rows, columns = np.nonzero(labels == label)
            holding = [b for b in boxes if b.top <= rows.min() and rows.max() < b.bottom]
            assert any(b.left <= columns.min() and columns.max() < b.right for b in holding)
        assert len(connected_boxes(hole, most=2)) <= 2


def test_a_hole_is_looked_at_as_a_whole():
    """Not cell after cell: every operation would be a launch of its own on a GPU."""
    launches = []
    for side in (16, 320):
        hole = holes(320, 320, (0, 0, side, side))[0, 0]
        with TorchLaunches() as counted:
            connected_boxes(hole)
        launches.append(len(counted.names))
    assert launches[0] == launches[1] < 40


def test_boxes_are_joined_until_none_meet():
    boxes = [Box(0, 0, 10, 10), Box(5, 5, 15, 15), Box(14, 0, 20, 6), Box(50, 50, 60, 60)]
    assert merged(boxes, lambda box: box.area) == [Box(0, 0, 20, 15), Box(50, 50, 60, 60)]
    assert merged(boxes, lambda box: 1) == [Box(0, 0, 60, 60)]


def test_a_batch_is_its_photos(glcic):
    image = photo(100, 90, 2)
    mask = torch.cat([holes(100, 90, (20, 30, 40, 50)), holes(100, 90, (60, 10, 90, 20))])
    cases: list[dict[str, Any]] = [{}, {"fit": "crop"}, {"blend": "poisson"}, {"fit": "resize", "max_side": 64}]
    for options in cases:
        together = inpaint(glcic, image, mask, **options)
        for i in range(2):
            alone = inpaint(glcic, image[i], mask[i], **options)
            torch.testing.assert_close(together.completed[i], alone.completed, rtol=0, atol=1e-5)
            torch.testing.assert_close(together.output[i], alone.output, rtol=0, atol=1e-5)


# Fits -----------------------------------------------------------------------------------------------------------------


def test_a_crop_is_painted_alone(glcic):
    image, mask = photo(300, 400), holes(300, 400, (100, 120, 130, 160))
    result = inpaint(glcic, image, mask, fit="crop", margin=20)
    rows, columns = slice(80, 152), slice(100, 180)  # 70 rows, and two more to a multiple of 4
    with torch.no_grad():
        expected = glcic(image[..., rows, columns], mask[..., rows, columns]).output
    inside = mask.expand(-1, 3, -1, -1)
    torch.testing.assert_close(result.output[inside], expected[inside[..., rows, columns]], rtol=0, atol=1e-6)
    assert torch.equal(result.output[..., :80, :], image[..., :80, :])


def test_crops_that_overlap_are_one():
    painting = torch.rand(1, 3, 300, 400)
    shapes = []

    class Recording(Painter):
        def paint(self, image: Tensor, hole: Tensor, *, boxes: Any = None) -> InpaintResult:
            shapes.append(tuple(image.shape[2:]))
            return InpaintResult(image, image)

    model = Recording(painting)
    mask = holes(300, 400, (10, 10, 20, 20), (10, 60, 20, 70), (250, 350, 260, 360))
    inpaint(model, photo(300, 400), mask, fit="crop", margin=5)
    assert sorted(shapes) == [(20, 20), (20, 20), (20, 20)]
    shapes.clear()
    inpaint(model, photo(300, 400), mask, fit="crop", margin=30)
    assert sorted(shapes) == [(50, 100), (70, 70)]
    shapes.clear()
    inpaint(model, photo(300, 400), mask, fit="crop", margin=30, max_side=40)
    assert sorted(shapes) == [(20, 40), (40, 40)]


def test_a_resized_photo_gives_its_hole_only(glcic):
    image, mask = photo(200, 300)[0], torch.zeros(200, 300, dtype=torch.bool)
    mask[50:120, 80:160] = True
    result = inpaint(glcic, image, mask, fit="resize", max_side=100, region="full")
    assert torch.equal(result.completed[:, ~mask], image[:, ~mask])
    small = torch.nn.functional.interpolate(image[None], (67, 100), mode="area")
    small_mask = torch.nn.functional.adaptive_max_pool2d(mask[None, None].float(), (67, 100))
    painted = inpaint(glcic, small.masked_fill(small_mask > 0, 0), small_mask, region="full").output
    back = torch.nn.functional.interpolate(painted, (200, 300), mode="bicubic").clamp(0, 1)[0]
    torch.testing.assert_close(result.completed[:, mask], back[:, mask], rtol=0, atol=1e-5)
    unchanged = inpaint(glcic, image, mask, fit="resize", max_side=300).completed
    assert torch.equal(unchanged, inpaint(glcic, image, mask).completed)


# Blends ---------------------------------------------------------------------------------------------------------------


def painted_too_bright(blend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The difference of what is completed to the photo that was painted, 0.2 too bright; mask and photo."""
    image = 0.7 * photo(90, 80)
    mask = holes(90, 80, (20, 20, 60, 50), (5, 70, 10, 80))
    completed = inpaint(Painter(image + 0.2), image, mask, blend=blend).completed
    assert torch.equal(completed[~mask.expand_as(image)], image[~mask.expand_as(image)])
    return completed - image, mask, image


def test_paste_is_the_painting():
    difference, mask, _ = painted_too_bright("paste")
    torch.testing.assert_close(difference, 0.2 * mask.expand_as(difference), rtol=0, atol=1e-6)


def test_feathering_fades_the_step_at_the_border():
    difference, _, _ = painted_too_bright("feather")
    from_border = difference[0, :, 20:40, 35]
    expected = 0.2 * (torch.arange(1, 21) / 9).clamp(max=1)
    torch.testing.assert_close(from_border, expected.expand(3, -1), rtol=0, atol=1e-5)


def test_poisson_keeps_differences_and_meets_the_border():
    difference, _, _ = painted_too_bright("poisson")
    assert difference.abs().max() < 1e-3


def test_blends_of_a_photo_without_known_pixels_are_the_painting():
    image = photo(30, 40)
    for blend in ("feather", "poisson"):
        completed = inpaint(Painter(image), torch.zeros_like(image), torch.ones(30, 40), blend=blend).completed
        torch.testing.assert_close(completed, image, rtol=0, atol=1e-6)


# The call -------------------------------------------------------------------------------------------------------------


def test_the_model_runs_in_evaluation_mode_and_is_put_back():
    model = MODELS["glcic"]().train()
    norm = model.get_submodule("bn3").eval()
    before = norm.running_mean.clone()
    first = inpaint(model, PIXELS, HOLE).completed
    assert np.array_equal(first, inpaint(MODELS["glcic"](), PIXELS, HOLE).completed)
    assert model.training
    assert model.get_submodule("bn5").training
    assert not norm.training
    assert torch.equal(norm.running_mean, before)


def test_autocast_computes_in_a_short_dtype(glcic):
    image = torch.from_numpy(ARRAYS["rgb float"]).permute(2, 0, 1)
    exact, short = (inpaint(glcic, image, HOLE, dtype=dtype).completed for dtype in (None, torch.bfloat16))
    assert short.dtype == torch.float32
    assert 0 < (short - exact).abs().max() < 0.05


def test_attention_is_that_of_the_photos_positions():
    model = MODELS["deepfill_v1"]()
    attention = inpaint(model, PIXELS, HOLE, return_attention=True, region="full").attention
    assert attention.shape == (1, 2, 5, 6)
    assert inpaint(model, PIXELS[:37], HOLE[:37], return_attention=True).attention.shape == (1, 2, 5, 6)
    assert inpaint(model, PIXELS, HOLE, fit="crop", return_attention=True).attention is None


def test_guiding_maps_are_fitted_as_the_photo_is():
    model = seeded(DeepFillV2(narrow(squash="tanh"), guided=True), 5.0)
    image, mask = photo(61, 75, 2), torch.cat([holes(61, 75, (10, 10, 30, 40)), holes(61, 75, (15, 40, 35, 70))])
    sketch = torch.zeros(2, 1, 61, 75)
    sketch[:, :, 20:23] = 1
    cases: list[dict[str, Any]] = [{}, {"fit": "crop", "margin": 8}, {"fit": "resize", "max_side": 64}]
    for options in cases:
        drawn, empty = (inpaint(model, image, mask, sketch=s, **options).completed for s in (sketch, 0 * sketch))
        assert not torch.equal(drawn[0], empty[0])
        alone = inpaint(model, image[:1], mask[:1], sketch=sketch[:1], **options).completed
        torch.testing.assert_close(drawn[:1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_progress_ends_at_one_and_never_goes_back(fit, glcic):
    seen: list[float] = []
    mask = HOLE.copy()
    mask[38:] = True
    inpaint(glcic, PIXELS, mask, fit=fit, progress=lambda share, stage: seen.append(share))
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert seen[-1] == 1


def test_without_a_hole_the_photo_comes_back(glcic):
    for model in (glcic, MODELS["deepfill_v1"](), MODELS["csa"]()):
        for fit in ("pad", "crop"):
            assert np.array_equal(inpaint(model, PIXELS, np.zeros_like(HOLE), fit=fit).completed, PIXELS)


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": torch.nn.Conv2d(3, 3, 1)}, TypeError, "model: expected a model of inpaint_kernels.models, got Conv2d"),
    ({"image": 3}, TypeError, "image: expected a path, a Pillow image, a NumPy array or a torch.Tensor, got int"),
    ({"image": PIXELS.astype(np.int32)}, TypeError, "image: expected an array of uint8, uint16 or floating .* int32"),
    ({"image": HOLE}, TypeError, "image: expected an array of uint8, uint16 or floating values, got bool"),
    ({"image": np.zeros((40, 48, 5), np.uint8)}, ValueError, r"image: expected an array of shape .*\[40, 48, 5\]"),
    ({"image": np.zeros((0, 48, 3), np.uint8)}, ValueError, r"image: expected an array of shape .*\[0, 48, 3\]"),
    ({"image": torch.zeros(40, 48)}, ValueError, r"image: expected a tensor of shape \[C, H, W\] .*\[40, 48\]"),
    ({"image": torch.zeros(3, 40, 48).long()}, TypeError, "image: expected a tensor of uint8 or floating .*int64"),
    ({"image": Image.new("CMYK", (48, 40))}, ValueError, "image: expected a Pillow image of mode .* got CMYK; convert"),
    ({"image": "/no/such/photo.png"}, ValueError, "/no/such/photo.png: no such file"),
    ({"image": torch.full((3, 40, 48), 255.0)}, ValueError, r"image: expected floating values in \[0, 1\] outside"),
    ({"image": torch.full((3, 40, 48), torch.nan)}, ValueError, "the first with .*nan.* in row 0, column 0"),
    ({"mask": None}, TypeError, "mask: expected a path, a Pillow image, a NumPy array or a torch.Tensor, got NoneType"),
    ({"mask": HOLE[1:]}, ValueError, "mask: expected the image's 40 x 48 pixels, got 39 x 48"),
    ({"mask": HOLE.astype(np.int64)}, TypeError, "mask: expected an array of uint8, uint16 or floating .* int64"),
    ({"mask": torch.zeros(40, 48).long()}, TypeError, "mask: expected bool, uint8 or floating values, got torch.int64"),
    ({"mask": torch.zeros(3, 40, 48)}, ValueError, r"mask: expected shape \[H, W\], .* got \[3, 40, 48\]"),
    ({"mask": torch.zeros(2, 1, 40, 48)}, ValueError, "mask: expected the image's 40 x 48 pixels, got .* batch of 2"),
    ({"threshold": 1}, ValueError, "threshold: expected a number below 1, got 1"),
    ({"threshold": -0.1}, ValueError, "threshold: expected a number >= 0 and <= 1, got -0.1"),
    ({"region": "image"}, ValueError, "region: expected one of 'hole', 'full', got 'image'"),
    ({"fit": "stretch"}, ValueError, "fit: expected one of 'pad', 'crop', 'resize', got 'stretch'"),
    ({"blend": "mix"}, ValueError, "blend: expected one of 'paste', 'feather', 'poisson', got 'mix'"),
    ({"max_side": 64}, ValueError, "max_side: expected None with fit='pad', got 64"),
    ({"fit": "resize"}, ValueError, "max_side: expected a number of pixels with fit='resize', got None"),
    ({"fit": "resize", "max_side": 0}, ValueError, "max_side: expected a number >= 1, got 0"),
    ({"margin": 3}, ValueError, "margin: expected None with fit='pad', got 3"),
    ({"device": "meta"}, ValueError, r"device: expected the model's, cpu, got meta; model.to\('meta'\) moves it"),
    ({"dtype": torch.float64}, ValueError, r"dtype: expected the parameters' torch.float32, .* got torch.float64"),
    ({"no_such_guidance": 1}, TypeError, "no_such_guidance"),
]


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS)
def test_errors_name_the_argument(changes, error, message, glcic):
    arguments = {"model": glcic, "image": PIXELS, "mask": HOLE} | changes
    with pytest.raises(error, match=message):
        inpaint(**arguments)


def test_sixteen_bit_colour_files_are_read_as_arrays(glcic, tmp_path: Path):
    path = tmp_path / "deep.png"
    images.write_photo(path, images.Photo(ARRAYS["rgb16"], "PNG"))
    with pytest.raises(ValueError, match="16 bits per colour, for which Pillow has no pictures"):
        inpaint(glcic, path, HOLE)
    completed = inpaint(glcic, images.read_photo(path).pixels, HOLE).completed
    assert np.array_equal(completed[~HOLE], ARRAYS["rgb16"][~HOLE])


def test_the_public_name_is_the_function():
    assert callable(inpaint_kernels.inpaint)
    assert "inpaint" in inpaint_kernels.__all__
