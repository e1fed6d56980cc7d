"""The backward written by hand against autograd of transition matrices, and against finite differences."""

import pytest
import torch

from gdr_teach.iplr.reference import iplr_recurrence
from gdr_teach.iplr.transpose import iplr_chunkwise_backward, iplr_recurrence_backward
from gdr_teach.testing import IplrInputs, assert_rows_close, dplr_oracle, gradients, iplr_inputs

FORMS = [iplr_recurrence_backward, iplr_chunkwise_backward]
every_form = pytest.mark.parametrize("form", FORMS, ids=["recurrence", "chunk"])


def cotangents(x) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn_like(x.v), torch.randn_like(x.initial_state)


def ours(form, x, do, dstate, **options) -> IplrInputs:
    if form is iplr_recurrence_backward:
        options.pop("chunk_size", None)
    return IplrInputs(*form(do, *x[:-1], dstate=dstate, initial_state=x.initial_state, **options))


def hold(got, want, rtol: float = 1e-11) -> None:
    for name, g, w in zip(want._fields, got, want, strict=True):
        assert g.dtype == w.dtype, name
        assert_rows_close(g, w, rtol=rtol, name=f"d{name}")


SHAPES = [(2, 0, 1, 3, 2), (1, 1, 2, 5, 3), (2, 7, 2, 4, 6), (0, 4, 1, 2, 3), (2, 4, 0, 2, 3)]


@every_form
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(form, shape):
    x = iplr_inputs(*shape)
    d = cotangents(x)
    hold(ours(form, x, *d, chunk_size=4), gradients(iplr_recurrence, x, *d))


@every_form
@pytest.mark.parametrize("keys", ["unit", "identical", "cos0.9", "zero"])
def test_gradients_on_hard_data(form, keys):
    x = iplr_inputs(1, 20, 2, 6, 5, keys=keys)
    d = cotangents(x)
    want = gradients(dplr_oracle, x, *d)
    for C in (1, 5, 8, 64) if form is iplr_chunkwise_backward else (1,):
        hold(ours(form, x, *d, chunk_size=C), want)


@every_form
def test_a_scale_and_two_documents(form):
    x = iplr_inputs(1, 19, 2, 4, 3, N=4)
    cu = torch.tensor([0, 0, 13, 13, 19])
    d, options = cotangents(x), {"cu_seqlens": cu, "scale": 0.3}
    hold(ours(form, x, *d, chunk_size=4, **options), gradients(dplr_oracle, x, *d, **options))


@every_form
def test_finite_differences(form):
    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *x):
            ctx.save_for_backward(*x)
            return tuple(iplr_recurrence(*x[:-1], initial_state=x[-1]))

        @staticmethod
        def backward(ctx, do, dstate):
            return tuple(ours(form, IplrInputs(*ctx.saved_tensors), do, dstate, chunk_size=4))

    leaves = [y.requires_grad_() for y in iplr_inputs(1, 6, 1, 3, 2)]
    assert torch.autograd.gradcheck(Rule.apply, leaves, fast_mode=True, atol=1e-7, nondet_tol=0)
