"""A network in training on parts of real photos, judged on parts that it never saw."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("rich")

from benches import learn


def test_nothing_held_out_is_trained_on():
    """A part of a photo is found in it by its pixels; parts reach the held-out end, and none goes into it."""
    marked = [torch.zeros(3, learn.HEIGHT, 200) for _ in range(2)]
    for picture in marked:
        picture[..., -learn.SIDE :] = 1
        picture[..., -learn.SIDE - 1] = 0.5
    images, holes = learn.held_out(marked)
    assert (images == 1).all()
    assert holes.flatten(1).any(1).all()
    parts = torch.cat([batch.image for batch in learn.batches(marked, 100)])
    assert parts.max() == 0.5


def test_hole_psnr_and_mean_fill():
    truth = torch.zeros(1, 3, 4, 4)
    truth[..., 2:] = 0.5
    hole = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    hole[..., :1, 3:] = True
    filled = learn.mean_fill(truth, hole)
    assert filled[0, 0, 0, 3].item() == pytest.approx(7 * 0.5 / 15)
    assert torch.equal(filled[~hole.expand(-1, 3, -1, -1)], truth[~hole.expand(-1, 3, -1, -1)])
    assert learn.hole_psnr(truth + 0.1, truth, hole) == pytest.approx(20, abs=1e-3)


@pytest.mark.slow
def test_losses_fall_and_held_out_holes_are_filled_better_than_by_their_mean():
    _, _, curve = learn.learn(300)
    assert curve.psnr["300 steps"] > curve.psnr["untrained"] + 5
    assert curve.psnr["300 steps"] > curve.psnr["mean fill"]
    losses = curve.losses["mse"]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
