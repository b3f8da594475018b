"""The tolerance policy of all tests.

A float64 reference is the judge. The relative error of a result may reach a small floor per dtype, or k times the
error that plain PyTorch makes in the same dtype (k = 2 forward, 3 for gradients), but never more than a cap per dtype,
so that a bad plain result excuses nothing. Discrete results may differ only where the reference is nearly undecided.
"""

from __future__ import annotations

from typing import Literal

import torch

Kind = Literal["forward", "gradient"]

FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CAP = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
EAGER_FACTOR = {"forward": 2.0, "gradient": 3.0}


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out - reference‖ / ‖reference‖ in float64; ‖out‖ where the reference is 0 everywhere."""
    expected = reference.detach().double().cpu()
    norm = expected.norm().item()
    return (out.detach().double().cpu() - expected).norm().item() / (norm if norm > 0 else 1.0)


def assert_close_to_reference(
    out: torch.Tensor,
    reference: torch.Tensor,
    eager: torch.Tensor | None = None,
    kind: Kind = "forward",
) -> None:
    """Asserts that a result is as close to the float64 reference as its dtype allows.

    Args:
        out: The result under test, of any floating dtype.
        reference: The same in float64. Where it is infinite or NaN, `out` must be equal.
        eager: What plain PyTorch computes in the dtype of `out`; without it the cap alone is the limit.
        kind: "forward" or "gradient", which decides how many times the eager error is allowed.
    """
    assert reference.dtype == torch.float64, f"the reference must be float64, it is {reference.dtype}"
    assert out.shape == reference.shape, f"shape {list(out.shape)}, expected {list(reference.shape)}"
    got, expected = out.detach().double().cpu(), reference.detach().cpu()
    finite = expected.isfinite()
    special = ~finite & ~((got == expected) | (got.isnan() & expected.isnan()))
    assert not special.any(), f"{int(special.sum())} entries differ where the reference is infinite or NaN"
    got, expected = got.where(finite, 0), expected.where(finite, 0)

    error = relative_error(got, expected)
    limit = CAP[out.dtype]
    allowance = f"cap {limit:.1e}"
    if eager is not None:
        eager_error = relative_error(eager.double().cpu().where(finite, 0), expected)
        limit = min(limit, max(FLOOR[out.dtype], EAGER_FACTOR[kind] * eager_error))
        allowance = f"floor {FLOOR[out.dtype]:.1e}, {EAGER_FACTOR[kind]:g} x eager error {eager_error:.2e}, {allowance}"
    # Written so that a NaN in the result fails.
    if not error <= limit:
        worst = int((got - expected).abs().nan_to_num(nan=torch.inf).argmax()) if got.numel() else 0
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape))
        raise AssertionError(
            f"{kind} relative error {error:.2e} exceeds {limit:.2e} ({allowance}); worst at {place}: "
            f"{got.flatten()[worst].item():.8g}, expected {expected.flatten()[worst].item():.8g}"
        )


def assert_same_indices(
    index: torch.Tensor, scores: torch.Tensor, *, band: float = 1e-5, max_undecided: float = 0.02
) -> None:
    """Asserts that indices are those of the largest scores, up to ties within rounding.

    Args:
        index: [...] int64, -1 where there is no candidate.
        scores: [..., K] float64 reference scores, -inf where a candidate is not eligible.
        band: A candidate may win if its score is within `band` times the largest finite |score| of the best.
        max_undecided: Largest share of entries that may differ from the reference's argmax at all.
    """
    index, scores = index.cpu(), scores.cpu()
    assert index.dtype == torch.int64, f"indices must be int64, they are {index.dtype}"
    assert index.shape == scores.shape[:-1], f"shape {list(index.shape)}, expected {list(scores.shape[:-1])}"
    best, expected = scores.max(dim=-1)
    expected = expected.where(best > -torch.inf, -1)
    absent = (index == -1) != (expected == -1)
    assert not absent.any(), f"{int(absent.sum())} entries differ in whether there is a candidate at all"

    scale = scores[scores.isfinite()].abs().max().item() if scores.isfinite().any() else 0.0
    present = expected != -1
    chosen = scores.gather(-1, index.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    wrong = present & ~(best - chosen <= band * scale)
    if wrong.any():
        place = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {index.numel()} indices are wrong; first at {place}: index {int(index[place])} "
            f"with score {chosen[place].item():.8g}, expected {int(expected[place])} with {best[place].item():.8g}"
        )
    undecided = (present & (index != expected)).double().mean().item() if index.numel() else 0.0
    assert undecided <= max_undecided, (
        f"{undecided:.1%} of the indices are near-ties, at most {max_undecided:.1%} may be"
    )
