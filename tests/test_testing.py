"""Tests of the tests: the one comparison, the oracle, the inputs."""

import pytest
import torch

from gdr_teach.testing import KEYS, assert_rows_close, delta_inputs, delta_oracle, gradients


def wanted() -> torch.Tensor:
    return torch.randn(2, 6, 3, 4, dtype=torch.float64)


def test_equal_values_pass():
    want = wanted()
    assert_rows_close(want.clone(), want, rtol=1e-15)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: torch.zeros_like(x),
        lambda x: -x,
        lambda x: x.roll(1, dims=1),
        lambda x: x.index_fill(1, torch.tensor([3]), 0.0),
        lambda x: x.masked_fill(torch.arange(x.numel()).view_as(x) == 17, float("nan")),
        lambda x: x.masked_fill(torch.arange(x.numel()).view_as(x) == 17, float("inf")),
        lambda x: x * 1.001,
        lambda x: x.transpose(2, 3).reshape(x.shape),
    ],
    ids="zeros sign shift one-row-zero nan inf scale transposed".split(),
)
@pytest.mark.parametrize("norm", ["row", "tensor"])
def test_wrong_values_fail(spoil, norm):
    want = wanted()
    with pytest.raises(AssertionError, match="errs"):
        assert_rows_close(spoil(want), want, rtol=1e-4, norm=norm)


def test_two_zero_rows_among_a_thousand_fail():
    want = torch.randn(1000, 4, dtype=torch.float64)
    got = want.clone()
    got[[3, 500]] = 0
    with pytest.raises(AssertionError, match=r"row \[(3|500)\]"):
        assert_rows_close(got, want, rtol=1e-2)


def test_a_tensor_compared_with_itself_is_an_error():
    want = wanted()
    for same in (want, want[:], want.view(-1).view_as(want)):
        with pytest.raises(AssertionError, match="share storage"):
            assert_rows_close(same, want, rtol=1e-3)


@pytest.mark.parametrize("norm", ["row", "tensor"])
def test_a_tolerance_that_accepts_anything_is_an_error(norm):
    want = wanted()
    with pytest.raises(AssertionError, match="would accept"):
        assert_rows_close(want.clone(), want, rtol=3.0, norm=norm)


def test_one_wrong_row_must_be_visible_in_the_norm_of_the_tensor():
    want = torch.randn(10_000, 4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="would accept one wrong row"):
        assert_rows_close(want.clone(), want, rtol=0.5, norm="tensor")


def test_zero_and_empty_are_compared_exactly():
    zero = torch.zeros(3, 4)
    assert_rows_close(torch.zeros(3, 4), zero, rtol=1e-2)
    assert_rows_close(torch.zeros(0, 4), torch.zeros(0, 4), rtol=1e-2)
    with pytest.raises(AssertionError, match="exact zeros"):
        assert_rows_close(torch.full((3, 4), 1e-30), zero, rtol=1e-2)
    with pytest.raises(AssertionError, match="shape"):
        assert_rows_close(torch.zeros(0, 4), torch.zeros(0, 5), rtol=1e-2)


def test_wanted_values_must_be_finite():
    want = wanted()
    want[0, 0, 0, 0] = float("nan")
    with pytest.raises(AssertionError, match="not finite"):
        assert_rows_close(want.clone(), want, rtol=1e-2)


def test_rounded_allows_twice_its_error_and_no_more():
    want = wanted()
    rounded = want * (1 + 1e-3)
    assert_rows_close(want * (1 + 1.9e-3), want, rtol=1e-9, rounded=rounded)
    with pytest.raises(AssertionError, match="errs"):
        assert_rows_close(want * (1 + 2.2e-3), want, rtol=1e-9, rounded=rounded)


def test_unknown_norm():
    with pytest.raises(ValueError, match="norm must be"):
        assert_rows_close(wanted(), wanted(), rtol=1.0, norm="max")


def test_oracle_against_numbers_worked_out_by_hand():
    # one head, K = 2, V = 1: write 3 under e1, then 5 half-way under the same key, read with (1, 2)
    k = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double().view(1, 2, 1, 2)
    v = torch.tensor([3.0, 5.0]).double().view(1, 2, 1, 1)
    beta = torch.tensor([1.0, 0.5]).double().view(1, 2, 1)
    q = torch.tensor([[1.0, 2.0], [1.0, 2.0]]).double().view(1, 2, 1, 2)
    S0 = torch.tensor([7.0, 10.0]).double().view(1, 1, 2, 1)
    out = delta_oracle(q, k, v, beta, scale=1.0, initial_state=S0)
    # S: (7, 10) -> (3, 10) -> (4, 10)
    torch.testing.assert_close(out.o.flatten(), torch.tensor([23.0, 24.0]).double())
    torch.testing.assert_close(out.state.flatten(), torch.tensor([4.0, 10.0]).double())


def test_inputs_are_what_they_say():
    for keys in KEYS:
        x = delta_inputs(2, 5, 3, 8, 4, keys=keys)
        length = x.k.norm(dim=-1)
        cosine = torch.einsum("bthk,bshk->bhts", x.k, x.k)[..., ~torch.eye(5, dtype=torch.bool)]
        assert torch.allclose(length, torch.full_like(length, 0.0 if keys == "zero" else 1.0))
        expected = {"identical": 1.0, "orthonormal": 0.0, "zero": 0.0}
        if keys in expected:
            assert torch.allclose(cosine, torch.full_like(cosine, expected[keys]), atol=1e-12)
        if keys == "cos0.9":
            assert (cosine - 0.9).abs().max() < 0.1
        assert 0 < x.beta.min() < x.beta.max() < 2
    assert delta_inputs(1, 3, 1, 2, 2, beta=2.0).beta.unique().tolist() == [2.0]
    with pytest.raises(ValueError, match="keys must be one of"):
        delta_inputs(1, 1, 1, 1, 1, keys="cos")
    with pytest.raises(ValueError, match="T <= K"):
        delta_inputs(1, 3, 1, 2, 1, keys="orthonormal")


def test_gradients_agree_with_finite_differences():
    x = delta_inputs(1, 3, 1, 2, 2)
    do, dstate = torch.randn(1, 3, 1, 2).double(), torch.randn(1, 1, 2, 2).double()

    def loss(inputs):
        out = delta_oracle(*inputs[:4], initial_state=inputs[4])
        return ((out.o * do).sum() + (out.state * dstate).sum()).item()

    for got, place in zip(gradients(delta_oracle, x, do, dstate), range(5), strict=True):
        moved = [y.clone() for y in x]
        for i in range(moved[place].numel()):
            values = []
            for step in (1e-6, -1e-6):
                moved[place] = x[place].clone()
                moved[place].view(-1)[i] += step
                values.append(loss(moved))
            assert abs((values[0] - values[1]) / 2e-6 - got.reshape(-1)[i].item()) < 1e-8
