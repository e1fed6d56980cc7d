"""The gated delta rule in plain PyTorch against the float64 oracle, and the identities that define it."""

import pytest
import torch

from gdr_teach.delta.reference import delta_recurrence
from gdr_teach.gated.reference import (
    after,
    corners,
    decayed_scores,
    gated_chunkwise,
    gated_recurrence,
    upto,
)
from gdr_teach.gated.transpose import (
    after_transposed,
    decayed_scores_backward,
    upto_transposed,
)
from gdr_teach.testing import (
    DECAYS,
    as_rows,
    assert_rows_close,
    gated_inputs,
    gated_oracle,
    gradients,
)

FORMS = [gated_recurrence, gated_chunkwise]
every_form = pytest.mark.parametrize("form", FORMS, ids=["recurrence", "chunk"])
every_gate = pytest.mark.parametrize("gate", [*DECAYS, "mixed"], ids=str)
every_kind = pytest.mark.parametrize("per", ["head", "channel"])


def hold(got, want, rtol: float = 1e-12) -> None:
    assert_rows_close(got.o, want.o, rtol=rtol, name="o")
    assert_rows_close(got.state, want.state, rtol=rtol, name="state")


@every_kind
@every_gate
def test_every_chunk_size_agrees_with_the_oracle(per, gate):
    x = gated_inputs(1, 12, 2, 16, 3, per=per, log_decay=gate)
    want = gated_oracle(*x[:-1], initial_state=x.initial_state)
    hold(gated_recurrence(*x[:-1], initial_state=x.initial_state), want)
    for C in (1, 2, 3, 4, 7, 8, 16, 32, 64):
        hold(gated_chunkwise(*x[:-1], initial_state=x.initial_state, chunk_size=C), want)


@every_kind
@every_form
@every_gate
def test_autograd_of_both_forms(form, gate, per):
    x = gated_inputs(1, 11, 2, 3, 4, per=per, log_decay=gate)
    do, dstate = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    options = {"chunk_size": 5} if form is gated_chunkwise else {}
    want = gradients(gated_oracle, x, do, dstate)
    for name, got, ref in zip(
        x._fields, gradients(form, x, do, dstate, **options), want, strict=True
    ):
        assert_rows_close(as_rows(got), as_rows(ref), rtol=1e-11, name=f"d{name}")


@every_gate
@pytest.mark.parametrize("keys", ["unit", "identical", "cos0.9"])
def test_float32_chunks_stay_near_the_float64_loop(gate, keys):
    x = gated_inputs(1, 300, 2, 32, 16, keys=keys, beta=1.0, log_decay=gate)
    want = gated_recurrence(*x[:-1], initial_state=x.initial_state)
    for C in (16, 64):
        got = gated_chunkwise(
            *(y.float() for y in x[:-1]), initial_state=x[-1].float(), chunk_size=C
        )
        assert_rows_close(got.o, want.o, rtol=1e-5, norm="tensor", name=f"o, C={C}")
        assert_rows_close(got.state, want.state, rtol=1e-5, norm="tensor", name=f"state, C={C}")


# -- identities --------------------------------------------------------------------------------------------------------


@every_kind
@every_form
def test_without_decay_it_is_the_delta_rule(form, per):
    x = gated_inputs(2, 70, 2, 5, 4, per=per, log_decay=0.0)
    want = delta_recurrence(*x[:4], initial_state=x.initial_state)
    hold(form(*x[:-1], initial_state=x.initial_state), want)


@every_form
@pytest.mark.parametrize("gate", [None, "mixed"])
def test_equal_channels_are_one_head(form, gate):
    x = gated_inputs(2, 70, 2, 5, 4, per="head", log_decay=gate)
    channels = x.log_decay[..., None].expand_as(x.k)
    want = form(*x[:-1], initial_state=x.initial_state)
    hold(form(*x[:4], channels, initial_state=x.initial_state), want)


@every_kind
@every_form
@pytest.mark.parametrize("t", [0, 1, 37, 69])
def test_minus_infinity_starts_afresh(form, per, t):
    x = gated_inputs(2, 70, 2, 5, 4, per=per)
    x.log_decay[:, t] = -torch.inf
    whole = form(*x[:-1], initial_state=x.initial_state)
    afresh = gated_recurrence(*(y[:, t:] for y in x[:-1]))
    assert_rows_close(whole.o[:, t:].clone(), afresh.o, rtol=1e-12, name="o")
    assert_rows_close(whole.state, afresh.state, rtol=1e-12, name="state")


@every_form
def test_beta_zero_only_fades(form):
    x = gated_inputs(1, 9, 2, 4, 3, beta=0.0)
    got = form(*x[:-1], initial_state=x.initial_state).state
    faded = x.log_decay.sum(1).exp()[..., None] * x.initial_state
    assert_rows_close(got, faded, rtol=1e-12, name="state")


@every_form
def test_values_that_shrink_below_the_smallest_number_are_zero_and_not_nan(form):
    x = gated_inputs(1, 70, 1, 4, 3, log_decay=-1e4, dtype=torch.float32)
    out = form(*x[:-1], initial_state=torch.full_like(x.initial_state, 1e30))
    assert out.o.isfinite().all()
    assert out.state.abs().max() < 1e3


# -- the scores of a chunk ---------------------------------------------------------------------------------------------


def pairwise(x, y, g):
    """`decayed_scores` from its definition: the gates between two tokens, added up pair by pair."""
    C = x.shape[-2]
    A = x.new_zeros(*x.shape[:-2], C, C)
    for i in range(C):
        for j in range(i + 1):
            A[..., i, j] = (x[..., i, :] * g[..., j + 1 : i + 1, :].sum(-2).exp() * y[..., j, :]).sum(-1)  # fmt: skip
    return A


@pytest.mark.parametrize("C", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("width", [1, 4])
def test_scores_and_their_gradients(C, width):
    x, y = torch.randn(2, 3, C, 4, dtype=torch.float64).unbind()
    g = -torch.rand(3, C, width, dtype=torch.float64)
    leaves = [z.clone().requires_grad_() for z in (x, y, g)]
    want, got = pairwise(*leaves), decayed_scores(x, y, g)
    assert_rows_close(got, want, rtol=1e-13, name="scores")
    dA = torch.randn_like(got)
    dx, dy, dg = decayed_scores_backward(dA, x, y, g)
    wants = torch.autograd.grad(want, leaves, dA, allow_unused=True)
    dg = dg.sum(-1, keepdim=True) if width == 1 else dg
    for name, a, b in zip(("dx", "dy", "dg"), (dx, dy, dg), wants, strict=True):
        assert_rows_close(a, b, rtol=1e-12, name=name)


def test_corners_are_a_view_that_covers_every_pair_once():
    seen = torch.eye(16)
    for h in (1, 2, 4, 8):
        corners(seen, h).add_(1)
    assert torch.equal(seen, torch.ones(16, 16).tril())


@pytest.mark.parametrize(("sums", "turned"), [(upto, upto_transposed), (after, after_transposed)])
def test_sums_and_their_transposes(sums, turned):
    x, y = torch.randn(2, 7, 3, dtype=torch.float64).unbind()
    assert torch.allclose((sums(x) * y).sum(), (x * turned(y)).sum(), rtol=1e-13)
    strict = sums is after
    assert torch.allclose(sums(x)[2], x[3:].sum(0) if strict else x[:3].sum(0), rtol=1e-13)
