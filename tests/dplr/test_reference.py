"""The DPLR rule in plain PyTorch against transition matrices in float64, and the identities that define it."""

import pytest
import torch

from gdr_teach.dplr.reference import dplr_chunkwise, dplr_recurrence
from gdr_teach.iplr.reference import iplr_recurrence
from gdr_teach.testing import (
    DECAYS,
    as_rows,
    assert_rows_close,
    dplr_inputs,
    dplr_oracle,
    gradients,
)

FORMS = [dplr_recurrence, dplr_chunkwise]
KEYS = ("unit", "identical", "cos0.9")
every_form = pytest.mark.parametrize("form", FORMS, ids=["recurrence", "chunk"])
every_gate = pytest.mark.parametrize("gate", [*DECAYS, "mixed"], ids=str)
every_kind = pytest.mark.parametrize("per", ["head", "channel"])


def hold(got, want, rtol: float = 1e-12) -> None:
    assert_rows_close(got.o, want.o, rtol=rtol, name="o")
    assert_rows_close(got.state, want.state, rtol=rtol, name="state")


SHAPES = [
    (2, 0, 1, 3, 2),
    (1, 1, 2, 5, 3),
    (2, 7, 2, 4, 6),
    (1, 33, 1, 8, 5),
    (0, 4, 1, 2, 3),
    (2, 4, 0, 2, 3),
]


@every_form
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_oracle(form, shape):
    x = dplr_inputs(*shape)
    options = {} if form is dplr_recurrence else {"chunk_size": 8}
    got = form(*x[:-1], initial_state=x.initial_state, **options)
    hold(got, dplr_oracle(*x[:-1], initial_state=x.initial_state))


@every_form
def test_scale_and_no_initial_state(form):
    x = dplr_inputs(1, 9, 2, 4, 3)
    hold(form(*x[:-1], scale=0.3), dplr_oracle(*x[:-1], scale=0.3))


@every_kind
@every_gate
@pytest.mark.parametrize("keys", KEYS)
def test_every_chunk_size_agrees_with_the_oracle(per, gate, keys):
    x = dplr_inputs(1, 19, 2, 7, 3, per=per, log_decay=gate, keys=keys)
    want = dplr_oracle(*x[:-1], initial_state=x.initial_state)
    hold(dplr_recurrence(*x[:-1], initial_state=x.initial_state), want)
    for C in (1, 2, 3, 4, 7, 8, 16, 32, 64):
        hold(dplr_chunkwise(*x[:-1], initial_state=x.initial_state, chunk_size=C), want)


@every_gate
def test_many_chunks_agree_with_the_token_loop(gate):
    x = dplr_inputs(1, 201, 2, 8, 5, log_decay=gate)
    want = dplr_recurrence(*x[:-1], initial_state=x.initial_state)
    for C in (16, 64):
        got = dplr_chunkwise(*x[:-1], initial_state=x.initial_state, chunk_size=C)
        hold(got, want, rtol=1e-11)


@every_kind
@every_form
@every_gate
def test_autograd_of_both_forms(form, gate, per):
    x = dplr_inputs(1, 11, 2, 3, 4, per=per, log_decay=gate)
    do, dstate = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    options = {"chunk_size": 5} if form is dplr_chunkwise else {}
    want = gradients(dplr_oracle, x, do, dstate)
    found = gradients(form, x, do, dstate, **options)
    for name, got, ref in zip(x._fields, found, want, strict=True):
        assert_rows_close(as_rows(got), as_rows(ref), rtol=1e-11, name=f"d{name}")


@every_gate
@pytest.mark.parametrize("keys", KEYS)
def test_float32_chunks_stay_near_the_float64_loop(gate, keys):
    x = dplr_inputs(1, 300, 2, 32, 16, keys=keys, log_decay=gate, dtype=torch.float32)
    want = dplr_recurrence(*(y.double() for y in x[:-1]), initial_state=x.initial_state.double())
    for C in (16, 64):
        got = dplr_chunkwise(*x[:-1], initial_state=x.initial_state, chunk_size=C)
        assert got.state.dtype == torch.float32
        assert_rows_close(got.o, want.o, rtol=1e-5, norm="tensor", name=f"o, C={C}")
        assert_rows_close(got.state, want.state, rtol=1e-5, norm="tensor", name=f"state, C={C}")


@every_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(form, dtype):
    x = dplr_inputs(1, 20, 2, 4, 3, dtype=dtype)
    got = form(*x[:-1], initial_state=x.initial_state)
    assert (got.o.dtype, got.state.dtype) == (dtype, torch.float32)
    want = dplr_oracle(*x[:-1], initial_state=x.initial_state)
    assert_rows_close(got.state, want.state, rtol=1e-5, name="state")
    assert_rows_close(got.o, want.o, rtol=torch.finfo(dtype).eps, name="o")


@every_form
@every_kind
def test_packed_documents_are_sequences_of_their_own(form, per):
    lengths = [0, 3, 0, 1, 15, 0]
    x = dplr_inputs(1, sum(lengths), 2, 4, 3, N=len(lengths), per=per, log_decay="mixed")
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    options = {} if form is dplr_recurrence else {"chunk_size": 4}
    got = form(*x[:-1], initial_state=x.initial_state, cu_seqlens=cu, **options)
    hold(got, dplr_oracle(*x[:-1], initial_state=x.initial_state, cu_seqlens=cu))


# -- causality and identities ------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("gate", [None, 0.0, -20.0, "mixed"])
def test_no_output_depends_on_a_later_token(form, gate):
    x = dplr_inputs(1, 21, 1, 4, 3, log_decay=gate)
    options = {} if form is dplr_recurrence else {"chunk_size": 16}
    before = form(*x[:-1], initial_state=x.initial_state, **options).o
    for t in (1, 7, 8, 15, 16, 20):
        other = [y.clone() for y in x[:-1]]
        for y in other:
            y[:, t:] = 1.5 * y[:, t:] - 0.25
        after = form(*other, initial_state=x.initial_state, **options).o
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


@every_kind
@every_form
def test_without_decay_it_is_the_iplr_rule(form, per):
    x = dplr_inputs(2, 70, 2, 5, 4, per=per, log_decay=0.0)
    want = iplr_recurrence(*x[:5], initial_state=x.initial_state)
    hold(form(*x[:-1], initial_state=x.initial_state), want)
    hold(form(*x[:5], initial_state=x.initial_state), want)


@every_form
@pytest.mark.parametrize("gate", [None, "mixed"])
def test_equal_channels_are_one_head(form, gate):
    x = dplr_inputs(2, 70, 2, 5, 4, per="head", log_decay=gate)
    channels = x.log_decay[..., None].expand_as(x.k)
    want = form(*x[:-1], initial_state=x.initial_state)
    hold(form(*x[:5], channels, initial_state=x.initial_state), want)


@every_kind
@every_form
@pytest.mark.parametrize("t", [0, 1, 37, 69])
def test_minus_infinity_keeps_only_what_is_written_back(form, per, t):
    x = dplr_inputs(2, 70, 2, 5, 4, per=per)
    x.log_decay[:, t] = -torch.inf
    whole = form(*x[:-1], initial_state=x.initial_state)
    before = dplr_recurrence(*(y[:, :t] for y in x[:-1]), initial_state=x.initial_state).state
    read = torch.einsum("bhkv,bhk->bhv", before, x.a[:, t])
    kept = torch.einsum("bhk,bhv->bhkv", x.b[:, t], read)
    kept = kept + torch.einsum("bhk,bhv->bhkv", x.k[:, t], x.v[:, t])
    rest = dplr_recurrence(*(y[:, t + 1 :] for y in x[:-1]), initial_state=kept)
    assert_rows_close(whole.state, rest.state, rtol=1e-12, name="state")
    assert_rows_close(whole.o[:, t + 1 :].clone(), rest.o, rtol=1e-12, name="o")


@every_form
def test_zero_directions_only_fade(form):
    x = dplr_inputs(1, 9, 2, 4, 3, keys="zero")
    got = form(*x[:-1], initial_state=x.initial_state).state
    faded = x.log_decay.sum(1).exp()[..., None] * x.initial_state
    assert_rows_close(got, faded, rtol=1e-12, name="state")


@every_form
def test_values_that_shrink_below_the_smallest_number_are_zero_and_not_nan(form):
    x = dplr_inputs(1, 70, 1, 4, 3, log_decay=-1e4, dtype=torch.float32, keys="zero")
    out = form(*x[:-1], initial_state=torch.full_like(x.initial_state, 1e30))
    assert not out.o.any()
    assert not out.state.any()
