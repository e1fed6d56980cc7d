"""The backward written by hand against autograd of transition matrices, and against finite differences."""

import pytest
import torch

from gdr_teach.dplr.reference import dplr_recurrence
from gdr_teach.dplr.transpose import dplr_chunkwise_backward, dplr_recurrence_backward
from gdr_teach.testing import (
    DECAYS,
    DplrInputs,
    as_rows,
    assert_rows_close,
    dplr_inputs,
    dplr_oracle,
    gradients,
)

FORMS = [dplr_recurrence_backward, dplr_chunkwise_backward]
every_form = pytest.mark.parametrize("form", FORMS, ids=["recurrence", "chunk"])
every_gate = pytest.mark.parametrize("gate", [None, "mixed", *DECAYS], ids=str)
every_kind = pytest.mark.parametrize("per", ["head", "channel"])


def cotangents(x) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn_like(x.v), torch.randn_like(x.initial_state)


def ours(form, x, do, dstate, **options) -> DplrInputs:
    if form is dplr_recurrence_backward:
        options.pop("chunk_size", None)
    return DplrInputs(*form(do, *x[:-1], dstate=dstate, initial_state=x.initial_state, **options))


def hold(got, want, rtol: float = 1e-11) -> None:
    for name, g, w in zip(want._fields, got, want, strict=True):
        assert g.dtype == w.dtype, name
        assert_rows_close(as_rows(g), as_rows(w), rtol=rtol, name=f"d{name}")


SHAPES = [(2, 0, 1, 3, 2), (1, 1, 2, 5, 3), (2, 7, 2, 4, 6), (0, 4, 1, 2, 3), (2, 4, 0, 2, 3)]


@every_form
@every_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(form, per, shape):
    x = dplr_inputs(*shape, per=per)
    d = cotangents(x)
    hold(ours(form, x, *d, chunk_size=4), gradients(dplr_recurrence, x, *d))


@every_form
@every_gate
@every_kind
@pytest.mark.parametrize("keys", ["unit", "identical", "cos0.9"])
def test_gradients_on_hard_data(form, gate, per, keys):
    x = dplr_inputs(1, 20, 1, 6, 5, keys=keys, per=per, log_decay=gate)
    d = cotangents(x)
    want = gradients(dplr_oracle, x, *d)
    for C in (1, 5, 8, 64) if form is dplr_chunkwise_backward else (1,):
        hold(ours(form, x, *d, chunk_size=C), want)


@every_form
def test_a_scale_and_two_documents(form):
    x = dplr_inputs(1, 19, 2, 4, 3, N=4, log_decay="mixed")
    cu = torch.tensor([0, 0, 13, 13, 19])
    d, options = cotangents(x), {"cu_seqlens": cu, "scale": 0.3}
    hold(ours(form, x, *d, chunk_size=4, **options), gradients(dplr_oracle, x, *d, **options))


@every_form
@pytest.mark.parametrize("through", ["o", "state"])
def test_gradients_through_one_output_only(form, through):
    x = dplr_inputs(1, 9, 2, 4, 3)
    do, dstate = cotangents(x)
    d = do * (through == "o"), dstate * (through == "state")
    hold(ours(form, x, *d, chunk_size=4), gradients(dplr_oracle, x, *d))


@every_form
def test_finite_differences(form):
    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *x):
            ctx.save_for_backward(*x)
            return tuple(dplr_recurrence(*x[:-1], initial_state=x[-1]))

        @staticmethod
        def backward(ctx, do, dstate):
            return tuple(ours(form, DplrInputs(*ctx.saved_tensors), do, dstate, chunk_size=4))

    leaves = [y.requires_grad_() for y in dplr_inputs(1, 6, 1, 3, 2)]
    assert torch.autograd.gradcheck(Rule.apply, leaves, fast_mode=True, atol=1e-7, nondet_tol=0)


@pytest.mark.parametrize("gate", [-0.6065, -5.0, -20.0])
@every_kind
def test_float32_keeps_the_digits_of_the_decays_gradient(gate, per):
    x = dplr_inputs(1, 64, 2, 16, 8, log_decay=gate, per=per, dtype=torch.float32)
    exact = DplrInputs(*(y.double() for y in x))
    do, dstate = cotangents(exact)
    want = gradients(dplr_recurrence, exact, do, dstate).log_decay
    for form in FORMS:
        got = ours(form, x, do.float(), dstate.float(), chunk_size=64).log_decay
        assert_rows_close(as_rows(got), as_rows(want), rtol=5e-6, norm="tensor", name="dlog_decay")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_kind
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype, per):
    x = dplr_inputs(1, 20, 2, 4, 3, dtype=dtype, per=per)
    wide = DplrInputs(*(y.float() for y in x))
    do, dstate = cotangents(wide)
    do = do.to(dtype)
    for form in FORMS:
        want = ours(form, wide, do.float(), dstate, chunk_size=8)
        got = ours(form, x, do, dstate, chunk_size=8)
        for name, g, w, y in zip(want._fields, got, want, x, strict=True):
            assert g.dtype == y.dtype, name
            assert torch.equal(g, w.to(y.dtype)), name


def test_what_the_forward_kept_changes_no_bit():
    from gdr_teach.dplr.reference import chunkwise

    x = dplr_inputs(2, 21, 2, 4, 3)
    do, dstate = cotangents(x)
    options = {"scale": None, "initial_state": x.initial_state}
    _, kept = chunkwise(*x[:-1], C=8, **options)
    want = ours(dplr_chunkwise_backward, x, do, dstate, chunk_size=8)
    got = ours(dplr_chunkwise_backward, x, do, dstate, chunk_size=8, kept=kept)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
