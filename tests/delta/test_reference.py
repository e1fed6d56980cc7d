"""The delta rule in plain PyTorch against the float64 oracle, and the identities that define it."""

import pytest
import torch

from gdr_teach.delta.reference import delta_chunkwise, delta_recurrence
from gdr_teach.testing import KEYS, assert_rows_close, delta_inputs, delta_oracle, gradients

NAMES = ("dq", "dk", "dv", "dbeta", "dstate0")
SHAPES = [
    (2, 0, 1, 3, 2),
    (1, 1, 2, 5, 3),
    (2, 7, 2, 4, 6),
    (1, 33, 1, 8, 5),
    (0, 4, 1, 2, 3),
    (2, 4, 0, 2, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", [delta_recurrence, delta_chunkwise], ids=["recurrence", "chunk"])
def test_agrees_with_the_oracle(form, shape):
    x = delta_inputs(*shape)
    options = {} if form is delta_recurrence else {"chunk_size": 8}
    got = form(*x[:4], initial_state=x.initial_state, **options)
    want = delta_oracle(*x[:4], initial_state=x.initial_state)
    assert_rows_close(got.o, want.o, rtol=1e-12, name="o")
    assert_rows_close(got.state, want.state, rtol=1e-12, name="state")


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("beta", [None, 0.0, 1.0, 2.0])
def test_chunks_equal_the_recurrence_on_hard_data(keys, beta):
    x = delta_inputs(1, 12, 2, 16, 3, keys=keys, beta=beta)
    want = delta_recurrence(*x[:4], initial_state=x.initial_state)
    for C in (1, 2, 4, 8, 16, 32, 64):
        got = delta_chunkwise(*x[:4], initial_state=x.initial_state, chunk_size=C)
        assert_rows_close(got.o, want.o, rtol=1e-12, name=f"o, C={C}")
        assert_rows_close(got.state, want.state, rtol=1e-12, name=f"state, C={C}")


@pytest.mark.parametrize("keys", ["unit", "identical", "cos0.9"])
def test_float32_chunks_stay_near_the_float64_loop(keys):
    x = delta_inputs(1, 512, 2, 64, 32, keys=keys, beta=1.0)
    want = delta_recurrence(*x[:4], initial_state=x.initial_state)
    for C in (16, 64):
        got = delta_chunkwise(*(y.float() for y in x[:4]), initial_state=x[4].float(), chunk_size=C)
        assert_rows_close(got.o, want.o, rtol=1e-5, norm="tensor", name=f"o, C={C}")
        assert_rows_close(got.state, want.state, rtol=1e-5, norm="tensor", name=f"state, C={C}")


def test_both_forms_are_differentiable_and_agree():
    x = delta_inputs(1, 11, 2, 3, 4)
    do, dstate = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    want = gradients(delta_oracle, x, do, dstate)
    for form, options in ((delta_recurrence, {}), (delta_chunkwise, {"chunk_size": 4})):
        for name, got, ref in zip(
            NAMES, gradients(form, x, do, dstate, **options), want, strict=True
        ):
            assert_rows_close(rows(got), rows(ref), rtol=1e-11, name=name)


def test_the_recurrence_can_be_differentiated_twice():
    x = delta_inputs(1, 3, 1, 2, 2)
    k = x.k.clone().requires_grad_()
    (first,) = torch.autograd.grad(
        delta_recurrence(x.q, k, x.v, x.beta).o.sum(), k, create_graph=True
    )
    (second,) = torch.autograd.grad(first.sum(), k)
    assert second.isfinite().all()
    assert second.any()


def test_beta_zero_leaves_the_state():
    x = delta_inputs(1, 6, 2, 4, 3, beta=0.0)
    for form in (delta_recurrence, delta_chunkwise):
        out = form(*x[:4], initial_state=x.initial_state)
        assert torch.equal(out.state, x.initial_state)
        assert out.state.data_ptr() != x.initial_state.data_ptr()


def test_orthonormal_keys_and_beta_one_recall_exactly():
    x = delta_inputs(1, 6, 2, 8, 3, keys="orthonormal", beta=1.0)
    out = delta_recurrence(*x[:4])
    recalled = torch.einsum("bhkv,bthk->bthv", out.state, x.k)
    assert_rows_close(recalled, x.v, rtol=1e-12, name="recall")


def test_the_last_write_to_a_key_wins():
    x = delta_inputs(1, 5, 1, 4, 3, keys="identical", beta=1.0)
    out = delta_recurrence(*x[:4], initial_state=x.initial_state)
    assert_rows_close(torch.einsum("bhkv,bhk->bhv", out.state, x.k[:, -1]), x.v[:, -1], rtol=1e-12)


def rows(x: torch.Tensor) -> torch.Tensor:
    """[B, T, H] as [B, T, H, 1], so that the last axis is a row."""
    return x[..., None] if x.dim() == 3 else x
