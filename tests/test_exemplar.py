"""The training-free filler: contract, determinism, quality on real photos, and its solvers against dense algebra."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from inpaint_kernels.models.blending import blend
from inpaint_kernels.models.diffusion import diffuse, is_thin
from inpaint_kernels.models.exemplar import Exemplar, fill
from inpaint_kernels.models.patch_synthesis import Tunables, city_block_distance, synthesise
from torch import Tensor

Box = tuple[int, int, int, int]
QUICK = {"coarsest": 64, "coarsest_rounds": 2, "rounds": 1, "finest_rounds": 1}


def photo(name: str) -> Tensor:
    """A photo that scikit-image ships, [C, H, W] float32 in [0, 1], at most 512 x 512."""
    data = pytest.importorskip("skimage.data", reason="scikit-image, which ships the test photos, is not installed")
    pixels = np.atleast_3d(getattr(data, name)())[:512, :512]
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1).contiguous()


def rectangle(size: tuple[int, int], box: Box) -> Tensor:
    """A hole of (top, left, height, width)."""
    top, left, height, width = box
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def strokes(size: tuple[int, int], width: int, count: int = 5) -> Tensor:
    """Straight brush strokes across the photo."""
    row, column = torch.arange(size[0])[:, None].float(), torch.arange(size[1])[None].float()
    mask = torch.zeros(size, dtype=torch.bool)
    for stroke in range(count):
        angle, offset = 0.4 + 1.1 * stroke, size[0] * (0.15 + 0.16 * stroke)
        across = (row - offset) * math.cos(angle) - (column - size[1] / 2) * math.sin(angle)
        along = (row - offset) * math.sin(angle) + (column - size[1] / 2) * math.cos(angle)
        mask |= (across.abs() < width / 2) & (along.abs() < size[1] / 5)
    return mask


def gradient_energy(image: Tensor, mask: Tensor) -> float:
    """Sum of absolute differences of neighbours within the hole."""
    gray = image.mean(0)
    right, below = (gray[:, 1:] - gray[:, :-1]).abs(), (gray[1:] - gray[:-1]).abs()
    return float(right[mask[:, 1:] & mask[:, :-1]].sum() + below[mask[1:] & mask[:-1]].sum())


def seam_energy(image: Tensor, mask: Tensor) -> float:
    """Sum of absolute differences of neighbours across the hole's border."""
    gray = image.mean(0)
    right, below = (gray[:, 1:] - gray[:, :-1]).abs(), (gray[1:] - gray[:-1]).abs()
    return float(right[mask[:, 1:] ^ mask[:, :-1]].sum() + below[mask[1:] ^ mask[:-1]].sum())


def psnr(image: Tensor, truth: Tensor, mask: Tensor) -> float:
    return -10 * math.log10(float((image - truth)[:, mask].square().mean()))


def telea(image: Tensor, mask: Tensor) -> Tensor:
    cv2 = pytest.importorskip("cv2", reason="OpenCV, to which the result is compared, is not installed")
    pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    filled = np.atleast_3d(cv2.inpaint(pixels.squeeze(), mask.numpy().astype(np.uint8), 5, cv2.INPAINT_TELEA))
    return torch.from_numpy(filled.astype(np.float32) / 255).permute(2, 0, 1)


# Quality --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "box"),
    [("brick", (190, 180, 120, 120)), ("grass", (190, 190, 120, 120)), ("gravel", (200, 160, 120, 120))],
)
def test_textures_keep_their_sharpness_and_show_no_seam(name, box):
    truth = photo(name)
    mask = rectangle((512, 512), box)
    result = fill(truth, mask)
    assert result.method == "exemplar"
    assert result.advice is None
    assert 0.7 < gradient_energy(result.output, mask) / gradient_energy(truth, mask) < 1.3
    assert seam_energy(result.output, mask) / seam_energy(truth, mask) < 1.4
    assert gradient_energy(telea(truth, mask), mask) / gradient_energy(truth, mask) < 0.35


@pytest.mark.parametrize("width", [pytest.param(12, marks=pytest.mark.slow), 28])
@pytest.mark.parametrize(
    "name",
    [
        "astronaut",
        "brick",
        "coffee",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("camera", "chelsea", "gravel", "rocket")),
    ],
)
def test_brush_strokes_over_any_photo_keep_its_sharpness(name, width):
    truth = photo(name)
    mask = strokes((truth.shape[1], truth.shape[2]), width)
    output = fill(truth, mask).output
    assert 0.7 < gradient_energy(output, mask) / gradient_energy(truth, mask) < 1.3


@pytest.mark.parametrize(("name", "gain"), [("brick", 0.5), ("coffee", 0.5)])
def test_brush_strokes(name, gain):
    truth = photo(name)
    mask = strokes((truth.shape[1], truth.shape[2]), width=20)
    output = fill(truth, mask).output
    assert 0.7 < gradient_energy(output, mask) / gradient_energy(truth, mask) < 1.3
    assert psnr(output, truth, mask) > psnr(telea(truth, mask), truth, mask) + gain


@pytest.mark.parametrize(
    "box",
    [(375, 310, 70, 80), *(pytest.param(b, marks=pytest.mark.slow) for b in ((365, 300, 60, 60), (390, 310, 60, 70)))],
)
def test_a_cut_structure_is_connected_again(box):
    truth = photo("camera")
    mask = rectangle((512, 512), box)  # a leg of the tripod, on grass
    output = fill(truth, mask).output
    leg = mask & (truth[0] > 0.85)
    assert int(leg.sum()) > 100
    assert float(output[0][leg].mean()) > 0.85
    assert float(telea(truth, mask)[0][leg].mean()) < 0.7


@pytest.mark.parametrize("name", ["brick", "astronaut", "coffee"])
def test_scratches_are_diffused_better_than_by_telea(name):
    truth = photo(name)
    mask = strokes((truth.shape[1], truth.shape[2]), width=5)
    result = fill(truth, mask)
    assert result.method == "diffusion"
    assert psnr(result.output, truth, mask) > psnr(telea(truth, mask), truth, mask) + 0.3


def test_advice():
    assert "inpaint-kernels fill" in (
        fill(photo("astronaut"), rectangle((512, 512), (360, 250, 110, 110))).advice or ""
    )
    large = fill(photo("gravel")[:, :128, :128], rectangle((128, 128), (20, 20, 88, 88)), **QUICK)
    assert large.advice is not None
    assert large.advice.startswith("the hole is large")


# Contract -------------------------------------------------------------------------------------------------------------


def smooth_noise(channels: int, height: int, width: int) -> Tensor:
    return torch.nn.functional.avg_pool2d(torch.rand(channels, height + 4, width + 4), 5, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "boxes",
    [
        [(30, 40, 20, 25)],
        [(0, 0, 15, 20)],
        [(60, 70, 37, 31)],
        [(0, 40, 97, 12)],
        [(10, 10, 14, 14), (70, 80, 12, 16)],
    ],
    ids=["inside", "corner", "last corner", "from edge to edge", "two holes"],
)
def test_known_pixels_are_kept_and_sources_are_known(channels, boxes):
    image = smooth_noise(channels, 97, 101)
    mask = torch.zeros(97, 101, dtype=torch.bool)
    for box in boxes:
        mask |= rectangle((97, 101), box)
    result = fill(image, mask, **QUICK)
    assert torch.equal(result.output[:, ~mask], image[:, ~mask])
    assert result.output.isfinite().all()
    assert float(result.output.min()) >= 0
    assert float(result.output.max()) <= 1
    assert result.offsets is not None
    assert result.offsets.shape == (2, 97, 101)
    assert (result.offsets[:, ~mask] == 0).all()
    row, column = torch.meshgrid(torch.arange(97), torch.arange(101), indexing="ij")
    source_row, source_column = row + result.offsets[0], column + result.offsets[1]
    assert not mask[source_row, source_column].any()


def test_what_the_image_holds_in_the_hole_is_not_looked_at():
    image, mask = smooth_noise(3, 80, 90), rectangle((80, 90), (20, 30, 25, 25))
    other = image.clone()
    other[:, mask] = math.nan
    for method in ("exemplar", "diffusion"):
        first, second = (fill(x, mask, method=method, **QUICK).output for x in (image, other))
        assert torch.equal(first, second)


def test_same_seed_same_bits_for_any_number_of_threads():
    image, mask = photo("gravel")[:, :200, :210], rectangle((200, 210), (70, 60, 50, 60))
    outputs = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        outputs.append(fill(image, mask, seed=5).output)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], fill(image, mask, seed=6).output)


def test_no_hole_returns_the_input():
    image = torch.rand(3, 10, 11)
    result = fill(image, torch.zeros(10, 11, dtype=torch.bool))
    assert torch.equal(result.output, image)
    assert (result.method, result.offsets, result.advice) == ("none", None, None)


def test_a_flat_photo_stays_flat():
    image, mask = torch.full((3, 90, 80), 0.25), rectangle((90, 80), (30, 30, 20, 20))
    assert torch.allclose(fill(image, mask).output, image, atol=1e-4)


def test_without_a_known_patch():
    image, mask = torch.rand(1, 40, 40), torch.ones(40, 40, dtype=torch.bool)
    mask[::6, ::6] = False
    with pytest.raises(ValueError, match="mask: no patch of 5x5 pixels is known entirely"):
        fill(image, mask, method="exemplar")
    assert fill(image, mask).method == "diffusion"
    with pytest.raises(ValueError, match="mask: no patch of 9x9 pixels is known entirely"):
        fill(image, mask, method="exemplar", patch=9)
    mask[:] = True
    mask[0] = False
    result = fill(image, mask)
    assert result.method == "diffusion"
    assert "no patch of 9x9 pixels" in (result.advice or "")


def test_progress_goes_from_0_to_1():
    calls: list[tuple[float, str]] = []
    mask = rectangle((90, 80), (30, 30, 20, 20))
    fill(torch.rand(1, 90, 80), mask, progress=lambda share, stage: calls.append((share, stage)))
    shares = [share for share, _ in calls]
    assert shares == sorted(shares)
    assert shares[0] >= 0
    assert shares[-1] == 1
    assert all(stage for _, stage in calls)


def test_module_fills_batches():
    images, masks = torch.rand(2, 3, 60, 64), torch.zeros(2, 1, 60, 64)
    masks[0, 0, 20:40, 20:40] = 1
    filler = Exemplar(seed=3, **QUICK)
    out = filler(images, masks)
    assert torch.equal(out[1], images[1])
    assert torch.equal(out[0], fill(images[0], masks[0, 0] > 0, seed=3, **QUICK).output)
    assert filler(images[:0], masks[:0]).shape == (0, 3, 60, 64)
    assert "seed=3" in repr(filler)


IMAGE, MASK = torch.rand(3, 40, 50), rectangle((40, 50), (10, 10, 12, 12))
NAN = IMAGE.clone()
NAN[1, 3, 4] = math.nan
INFINITE = IMAGE.clone()
INFINITE[0, 39, 49] = math.inf


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": IMAGE[0]}, ValueError, "image: expected shape [C, H, W], got [40, 50]"),
        ({"image": IMAGE[:2]}, ValueError, "image: expected 1 or 3 channels, got 2"),
        ({"image": IMAGE.double()}, TypeError, "image: expected torch.float32, got torch.float64"),
        ({"image": IMAGE.numpy()}, TypeError, "image: expected a torch.Tensor, got ndarray"),
        ({"mask": MASK[1:]}, ValueError, "mask: expected shape [H, W] with H=40, W=50, got [39, 50]"),
        ({"mask": MASK.float()}, TypeError, "mask: expected torch.bool, got torch.float32"),
        ({"mask": torch.ones_like(MASK)}, ValueError, "mask: every pixel is hole"),
        ({"image": NAN}, ValueError, "image: 1 known pixels are NaN or Inf, the first in row 3, column 4"),
        ({"image": INFINITE}, ValueError, "image: 1 known pixels are NaN or Inf, the first in row 39, column 49"),
        ({"method": "magic"}, ValueError, "method: expected one of 'auto', 'exemplar', 'diffusion', got 'magic'"),
        ({"seed": -1}, ValueError, "seed: expected a number >= 0"),
        ({"smooth": 1}, ValueError, "tunables: expected one of 'coarsest', 'coarsest_hole'"),
        ({"patch": 8}, ValueError, "patch: expected an odd number, got 8"),
        ({"gamma": 0.5}, ValueError, "gamma: expected a number >= 1, got 0.5"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"image": IMAGE, "mask": MASK} | change
    with pytest.raises(error, match=re.escape(message)):
        fill(**arguments)


# Parts ----------------------------------------------------------------------------------------------------------------


def test_synthesis_finds_the_shift_of_a_periodic_photo():
    tile = torch.rand(3, 16, 16)
    image, mask = tile.repeat(1, 8, 8), rectangle((128, 128), (50, 40, 30, 30))
    synthesis = synthesise(torch.where(mask, 0.0, image), mask, Tunables(), 0, lambda share, stage: None)
    assert synthesis is not None
    copied = image.flatten(1)[:, synthesis.source]
    assert torch.equal(copied, image[synthesis.box])
    assert synthesis.difference < 0.02  # texture beside the hole is a mean over fewer pixels


def dense_blend(hole, known, right, below, right_weight, below_weight):
    """The least-squares problem of `blend` with dense matrices in float64."""
    height, width = hole.shape
    place = torch.full((height, width), -1)
    place[hole] = torch.arange(int(hole.sum()))
    pairs = [((y, x), (y, x + 1), right, right_weight) for y in range(height) for x in range(width - 1)]
    pairs += [((y, x), (y + 1, x), below, below_weight) for y in range(height - 1) for x in range(width)]
    rows, wanted = [], []
    for one, two, difference, weight in pairs:
        if not (hole[one] or hole[two]):
            continue
        row, value = torch.zeros(int(hole.sum())).double(), difference[:, one[0], one[1]].double().clone()
        for sign, pixel in ((1, two), (-1, one)):
            if hole[pixel]:
                row[place[pixel]] = sign
            else:
                value -= sign * known[:, pixel[0], pixel[1]].double()
        rows.append(float(weight[one]) ** 0.5 * row)
        wanted.append(float(weight[one]) ** 0.5 * value)
    out = known.double().clone()
    out[:, hole] = torch.linalg.lstsq(torch.stack(rows), torch.stack(wanted)).solution.t()
    return out


@pytest.mark.parametrize("size", [(9, 9), (13, 18), (1, 7)])
def test_blend_solves_the_weighted_least_squares_problem(size):
    height, width = size
    hole = torch.rand(size) > 0.4
    hole[0, 0] = False
    known, right, below = (
        torch.rand(2, height, width),
        torch.randn(2, height, width - 1),
        torch.randn(2, height - 1, width),
    )
    weights = torch.rand(height, width - 1) + 0.05, torch.rand(height - 1, width) + 0.05
    out = blend(hole, known, right, below, *weights)
    assert torch.equal(out[:, ~hole], known[:, ~hole])
    torch.testing.assert_close(out.double(), dense_blend(hole, known, right, below, *weights), rtol=0, atol=2e-3)


def test_blend_of_a_large_hole_has_the_wanted_differences():
    truth = torch.rand(1, 200, 180).cumsum(2) / 90
    hole = rectangle((200, 180), (5, 5, 190, 170))
    right, below = truth[:, :, 1:] - truth[:, :, :-1], truth[:, 1:] - truth[:, :-1]
    torch.testing.assert_close(blend(hole, truth, right, below), truth, rtol=0, atol=2e-3)


def test_thin_holes_continue_slopes():
    row, column = torch.arange(60)[:, None] / 100, torch.arange(70)[None] / 150
    plane = (0.1 + row + 0.5 * column).expand(2, 60, 70)
    hole = strokes((60, 70), width=6, count=3)
    assert is_thin(hole)
    damaged = torch.where(hole, 0.5, plane)
    torch.testing.assert_close(diffuse(damaged, hole), plane, rtol=0, atol=2e-3)


def test_wide_holes_are_harmonic():
    hole = rectangle((50, 50), (10, 10, 30, 30))
    assert not is_thin(hole)
    u = diffuse(torch.rand(1, 50, 50), hole)[0]
    laplacian = u[:-2, 1:-1] + u[2:, 1:-1] + u[1:-1, :-2] + u[1:-1, 2:] - 4 * u[1:-1, 1:-1]
    assert float(laplacian[hole[1:-1, 1:-1]].abs().max()) < 2e-3


def test_thin_means_that_no_disc_of_more_than_4_pixels_radius_fits():
    assert is_thin(rectangle((40, 40), (5, 5, 30, 10)))
    assert not is_thin(rectangle((40, 40), (5, 5, 30, 11)))
    assert is_thin(rectangle((40, 40), (0, 0, 40, 10)))


def test_city_block_distance():
    mask = torch.rand(15, 17) > 0.2
    known = (~mask).nonzero()
    at = torch.stack(torch.meshgrid(torch.arange(15), torch.arange(17), indexing="ij"), -1).reshape(-1, 1, 2)
    expected = (at - known).abs().sum(-1).min(1).values.view(15, 17).float()
    assert torch.equal(city_block_distance(mask), expected)
