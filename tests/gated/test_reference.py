"""The gated delta rule in plain PyTorch against the float64 oracle, and the identities that define it."""

import pytest
import torch

from gdr_teach.delta.reference import delta_recurrence
from gdr_teach.gated.reference import gated_chunkwise, gated_recurrence
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
