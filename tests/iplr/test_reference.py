"""The IPLR rule in plain PyTorch against transition matrices in float64, and the identities that define it."""

import pytest
import torch

from gdr_teach.delta.reference import delta_recurrence
from gdr_teach.iplr.reference import iplr_chunkwise, iplr_recurrence
from gdr_teach.testing import assert_rows_close, delta_inputs, dplr_oracle, gradients, iplr_inputs

SHAPES = [
    (2, 0, 1, 3, 2),
    (1, 1, 2, 5, 3),
    (2, 7, 2, 4, 6),
    (1, 33, 1, 8, 5),
    (0, 4, 1, 2, 3),
    (2, 4, 0, 2, 3),
]
KEYS = ("unit", "identical", "cos0.9", "zero")
FORMS = [iplr_recurrence, iplr_chunkwise]
every_form = pytest.mark.parametrize("form", FORMS, ids=["recurrence", "chunk"])


def hold(got, want, rtol: float = 1e-12) -> None:
    assert_rows_close(got.o, want.o, rtol=rtol, name="o")
    assert_rows_close(got.state, want.state, rtol=rtol, name="state")


@every_form
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_oracle(form, shape):
    x = iplr_inputs(*shape)
    options = {} if form is iplr_recurrence else {"chunk_size": 8}
    got = form(*x[:-1], initial_state=x.initial_state, **options)
    hold(got, dplr_oracle(*x[:-1], initial_state=x.initial_state))


@every_form
def test_scale_and_no_initial_state(form):
    x = iplr_inputs(1, 9, 2, 4, 3)
    hold(form(*x[:-1], scale=0.3), dplr_oracle(*x[:-1], scale=0.3))


@pytest.mark.parametrize("keys", KEYS)
def test_every_chunk_size_agrees_with_the_recurrence(keys):
    x = iplr_inputs(1, 19, 2, 7, 3, keys=keys)
    want = iplr_recurrence(*x[:-1], initial_state=x.initial_state)
    for C in (1, 2, 3, 4, 7, 8, 16, 32, 64):
        hold(iplr_chunkwise(*x[:-1], initial_state=x.initial_state, chunk_size=C), want)


@pytest.mark.parametrize("keys", KEYS[:3])
def test_float32_chunks_stay_near_the_float64_loop(keys):
    x = iplr_inputs(1, 512, 2, 64, 32, keys=keys, dtype=torch.float32)
    want = iplr_recurrence(*(y.double() for y in x[:5]), initial_state=x.initial_state.double())
    for C in (16, 64):
        got = iplr_chunkwise(*x[:5], initial_state=x.initial_state, chunk_size=C)
        assert_rows_close(got.o, want.o, rtol=1e-5, norm="tensor", name=f"o, C={C}")
        assert_rows_close(got.state, want.state, rtol=1e-5, norm="tensor", name=f"state, C={C}")


def test_both_forms_are_differentiable_and_agree():
    x = iplr_inputs(1, 11, 2, 3, 4)
    do, dstate = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    want = gradients(dplr_oracle, x, do, dstate)
    for form, options in ((iplr_recurrence, {}), (iplr_chunkwise, {"chunk_size": 4})):
        found = gradients(form, x, do, dstate, **options)
        for name, got, ref in zip(x._fields, found, want, strict=True):
            assert_rows_close(got, ref, rtol=1e-11, name=f"d{name}")


def test_the_recurrence_can_be_differentiated_twice():
    x = iplr_inputs(1, 3, 1, 2, 2)
    a = x.a.clone().requires_grad_()
    (first,) = torch.autograd.grad(
        iplr_recurrence(x.q, x.k, x.v, a, x.b).o.sum(), a, create_graph=True
    )
    (second,) = torch.autograd.grad(first.sum(), a)
    assert second.isfinite().all()
    assert second.any()


@every_form
def test_packed_documents_are_sequences_of_their_own(form):
    lengths = [0, 3, 0, 1, 15, 0]
    x = iplr_inputs(1, sum(lengths), 2, 4, 3, N=len(lengths))
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    options = {} if form is iplr_recurrence else {"chunk_size": 4}
    got = form(*x[:-1], initial_state=x.initial_state, cu_seqlens=cu, **options)
    hold(got, dplr_oracle(*x[:-1], initial_state=x.initial_state, cu_seqlens=cu))


@every_form
def test_no_output_depends_on_a_later_token(form):
    x = iplr_inputs(1, 21, 1, 4, 3)
    options = {} if form is iplr_recurrence else {"chunk_size": 16}
    before = form(*x[:-1], initial_state=x.initial_state, **options).o
    for t in (1, 7, 8, 15, 16, 20):
        other = [y.clone() for y in x[:-1]]
        for y in other:
            y[:, t:] = 1.5 * y[:, t:] - 0.25
        after = form(*other, initial_state=x.initial_state, **options).o
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


@every_form
@pytest.mark.parametrize("beta", [None, 0.0, 1.0, 2.0])
def test_the_delta_rule_is_one_of_them(form, beta):
    x = delta_inputs(2, 70, 2, 5, 4, keys="cos0.9", beta=beta)
    step = x.beta[..., None]
    got = form(x.q, x.k, step * x.v, -step * x.k, x.k, initial_state=x.initial_state)
    hold(got, delta_recurrence(*x[:4], initial_state=x.initial_state))


@every_form
def test_nothing_read_is_outer_products_added_up(form):
    x = iplr_inputs(1, 9, 2, 4, 3)
    out = form(*x[:3], torch.zeros_like(x.a), x.b, initial_state=x.initial_state)
    sums = x.initial_state + torch.einsum("bthk,bthv->bhkv", x.k, x.v)
    assert_rows_close(out.state, sums, rtol=1e-12, name="state")


@every_form
def test_a_read_moves_what_it_finds(form):
    """a = e_0, b = e_2 - e_0: what lay in row 0 lies in row 2, exactly."""
    eye = torch.eye(4, dtype=torch.float64)
    zeros = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    S = torch.randn(1, 1, 4, 3, dtype=torch.float64)
    a, b = eye[0].expand_as(zeros), (eye[2] - eye[0]).expand_as(zeros)
    moved = form(zeros, zeros, zeros[..., :3], a, b, initial_state=S).state
    want = torch.stack(
        [torch.zeros_like(S[0, 0, 0]), S[0, 0, 1], S[0, 0, 2] + S[0, 0, 0], S[0, 0, 3]]
    )
    assert torch.equal(moved[0, 0], want)
