"""The token-by-token kernels without a decay; what they share with one is in tests/dplr."""

import pytest
import torch

pytest.importorskip("triton")

from gdr_teach.aot import SHARED_LIMIT, TARGETS, compile_launch
from gdr_teach.iplr.recurrent import iplr_recurrent, iplr_recurrent_backward
from gdr_teach.iplr.reference import iplr_recurrence
from gdr_teach.iplr.transpose import iplr_recurrence_backward
from gdr_teach.runtime import poisoned, recorded
from gdr_teach.sanitizer import sanitize
from gdr_teach.testing import IplrInputs, assert_rows_close, iplr_inputs

SPILL_BUDGET = 32  # bytes a thread


def call(forward, backward, x, d, **options):
    """o, state and all gradients."""
    out = forward(*x[:-1], initial_state=x.initial_state, **options)
    grads = backward(d[0], *x[:-1], dstate=d[1], initial_state=x.initial_state, **options)
    return (*out, *grads)


def kernels(x, d, **options):
    return call(iplr_recurrent, iplr_recurrent_backward, x, d, **options)


def reference(x, d, **options):
    exact = IplrInputs(*(y.double() for y in x))
    d = tuple(y.double() for y in d)
    return call(iplr_recurrence, iplr_recurrence_backward, exact, d, **options)


def cotangents(x) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn_like(x.v), torch.randn_like(x.initial_state)


def hold(got, want, rtol: float, norm: str = "row") -> None:
    names = ("o", "state", *(f"d{name}" for name in IplrInputs._fields))
    for name, g, w in zip(names, got, want, strict=True):
        assert_rows_close(g, w, rtol=rtol, norm=norm, name=name)


CASES = {
    "dense": (iplr_inputs(2, 5, 3, 7, 4), None),
    "tiles of V": (iplr_inputs(1, 3, 1, 100, 90), None),
    "packed segments": (
        iplr_inputs(1, 70, 1, 4, 3, N=5),
        torch.tensor([0, 16, 16, 33, 64, 70]),
    ),
    "no token": (iplr_inputs(2, 0, 1, 4, 3), None),
}


@pytest.mark.parametrize("case", CASES)
def test_float64_is_the_reference(case):
    x, cu = CASES[case]
    d = cotangents(x)
    hold(kernels(x, d, cu_seqlens=cu), reference(x, d, cu_seqlens=cu), rtol=1e-12)


@pytest.mark.parametrize("keys", ["unit", "identical", "cos0.9", "zero"])
def test_hard_data_in_float64(keys):
    x = iplr_inputs(1, 20, 1, 6, 5, keys=keys)
    d = cotangents(x)
    hold(kernels(x, d, scale=0.3), reference(x, d, scale=0.3), rtol=1e-12)


@pytest.mark.parametrize("keys", ["unit", "identical", "cos0.9"])
def test_float32_stays_near_float64(keys):
    x = iplr_inputs(1, 64, 2, 16, 8, keys=keys, dtype=torch.float32)
    d = cotangents(x)
    hold(kernels(x, d), reference(x, d), rtol=1e-5, norm="tensor")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    x = iplr_inputs(1, 20, 2, 6, 5, dtype=dtype)
    do, dstate = cotangents(x)
    wide = IplrInputs(*(y.float() for y in x))
    got, want = kernels(x, (do, dstate)), kernels(wide, (do.float(), dstate))
    for g, w, y in zip(got, want, (x.v, dstate, *x), strict=True):
        assert g.dtype == y.dtype
        assert torch.equal(g, w.to(y.dtype))


def test_gradcheck():
    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *x):
            ctx.save_for_backward(*x)
            return tuple(iplr_recurrent(*x[:-1], initial_state=x[-1]))

        @staticmethod
        def backward(ctx, do, dstate):
            *x, S0 = ctx.saved_tensors
            return iplr_recurrent_backward(do, *x, dstate=dstate, initial_state=S0)

    leaves = [y.requires_grad_() for y in iplr_inputs(1, 5, 1, 3, 2)]
    assert torch.autograd.gradcheck(Rule.apply, leaves, fast_mode=True, atol=1e-7, nondet_tol=0)


def run(x, cu=None):
    d = torch.ones_like(x.v), torch.ones_like(x.initial_state)
    return kernels(x, d, cu_seqlens=cu)


@pytest.mark.parametrize("case", CASES)
def test_every_element_is_written_and_nothing_else_is_touched(case):
    x, cu = CASES[case]
    want = run(x, cu)
    with poisoned(), sanitize():
        got = run(x, cu)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_the_state_can_be_updated_in_place():
    x, _ = CASES["dense"]
    want = iplr_recurrent(*x[:-1], initial_state=x.initial_state)
    state = x.initial_state.clone()
    got = iplr_recurrent(*x[:-1], initial_state=state, out_state=state)
    assert got.state is state
    assert torch.equal(state, want.state)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "D"), [("bfloat16", 128), ("float32", 64), ("float32", 256)])
def test_compiles_within_the_budget_and_without_decay(target, dtype, D):
    x = iplr_inputs(1, 2, 2, D, D, dtype=getattr(torch, dtype))
    with recorded() as launches:
        run(x, torch.tensor([0, 2]))
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["dplr_forward_kernel", "dplr_forward_kernel", "dplr_backward_kernel"]
    assert all(dict(zip(x.kernel.arg_names, x.args, strict=True))["p_g"] is None for x in launches)
    for launch in launches:
        report = compile_launch(launch, target)
        assert report.spilled <= SPILL_BUDGET, report
        assert report.shared <= SHARED_LIMIT[target], report
        assert 0 < report.registers <= 255, report
