"""The tolerance policy must reject what it is there to reject."""

import pytest
import torch

from tests.compare import CAP, FLOOR, assert_close_to_reference, assert_same_indices

REFERENCE = torch.linspace(-2.0, 3.0, 100, dtype=torch.float64)


def with_error(relative, dtype=torch.float32):
    """The reference with a given relative error, all of it in one entry."""
    out = REFERENCE.clone()
    out[7] += relative * REFERENCE.norm()
    return out.to(dtype) if dtype == torch.float32 else out


def test_rounded_reference_passes_in_every_dtype():
    for dtype in FLOOR:
        assert_close_to_reference(REFERENCE.to(dtype), REFERENCE, eager=REFERENCE.to(dtype))


def test_error_beyond_the_cap_fails_and_names_the_worst_entry():
    with pytest.raises(AssertionError, match=r"exceeds 1.00e-04 \(cap 1.0e-04\); worst at \(7,\)"):
        assert_close_to_reference(with_error(2e-4), REFERENCE)
    assert_close_to_reference(with_error(0.5e-4), REFERENCE)


def test_error_is_measured_against_the_eager_error():
    eager = with_error(1e-5)
    assert_close_to_reference(with_error(1.9e-5), REFERENCE, eager)
    assert_close_to_reference(with_error(2.9e-5), REFERENCE, eager, kind="gradient")
    with pytest.raises(AssertionError, match=r"2 x eager error 1.00e-05"):
        assert_close_to_reference(with_error(2.2e-5), REFERENCE, eager)
    with pytest.raises(AssertionError, match="gradient relative error"):
        assert_close_to_reference(with_error(3.2e-5), REFERENCE, eager, kind="gradient")


def test_a_bad_eager_result_excuses_nothing():
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close_to_reference(with_error(10 * CAP[torch.float32]), REFERENCE, eager=torch.zeros(100))


def test_nan_and_infinity_must_match():
    reference = REFERENCE.clone()
    reference[3], reference[4] = torch.nan, -torch.inf
    assert_close_to_reference(reference.float(), reference)
    with pytest.raises(AssertionError, match="1 entries differ where the reference is infinite or NaN"):
        assert_close_to_reference(reference.float().nan_to_num(nan=0.0, neginf=-torch.inf), reference)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close_to_reference(reference.float(), REFERENCE)


def test_zero_reference_compares_absolutely():
    zero = torch.zeros(5, dtype=torch.float64)
    assert_close_to_reference(zero.float(), zero)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close_to_reference(torch.full((5,), 1e-3), zero)


def test_shape_and_reference_dtype_are_checked():
    with pytest.raises(AssertionError, match=r"shape \[50\], expected \[100\]"):
        assert_close_to_reference(REFERENCE[:50], REFERENCE)
    with pytest.raises(AssertionError, match="must be float64"):
        assert_close_to_reference(REFERENCE, REFERENCE.float())


def test_indices_may_differ_only_within_the_band():
    scores = torch.tensor([[1.0, 1.0 - 1e-7, 0.5], [0.1, 0.9, 0.3]], dtype=torch.float64)
    assert_same_indices(torch.tensor([0, 1]), scores)
    assert_same_indices(torch.tensor([1, 1]), scores, max_undecided=0.5)
    with pytest.raises(AssertionError, match=r"50.0% of the indices are near-ties"):
        assert_same_indices(torch.tensor([1, 1]), scores)
    with pytest.raises(AssertionError, match=r"1 of 2 indices are wrong; first at \(1,\): index 2 .* expected 1"):
        assert_same_indices(torch.tensor([0, 2]), scores)


def test_rows_without_candidates_are_minus_one():
    scores = torch.tensor([[-torch.inf, -torch.inf], [1.0, -torch.inf]], dtype=torch.float64)
    assert_same_indices(torch.tensor([-1, 0]), scores)
    with pytest.raises(AssertionError, match="whether there is a candidate"):
        assert_same_indices(torch.tensor([0, 0]), scores)
    with pytest.raises(AssertionError, match="indices are wrong"):
        assert_same_indices(torch.tensor([-1, 1]), scores)
