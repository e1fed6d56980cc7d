"""The token-by-token kernels themselves: their values and gradients, what they write, read and ask of a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from gdr_teach.aot import SHARED_LIMIT, TARGETS, compile_launch
from gdr_teach.dplr import recurrent
from gdr_teach.dplr.recurrent import dplr_recurrent, dplr_recurrent_backward
from gdr_teach.dplr.reference import dplr_recurrence
from gdr_teach.dplr.transpose import dplr_recurrence_backward
from gdr_teach.runtime import poisoned, recorded
from gdr_teach.sanitizer import sanitize
from gdr_teach.testing import DECAYS, DplrInputs, as_rows, assert_rows_close, dplr_inputs

SPILL_BUDGET = 32  # bytes a thread


def call(forward, backward, x, d, **options):
    """o, state and all gradients."""
    out = forward(*x[:-1], initial_state=x.initial_state, **options)
    grads = backward(d[0], *x[:-1], dstate=d[1], initial_state=x.initial_state, **options)
    return (*out, *grads)


def kernels(x, d, **options):
    return call(dplr_recurrent, dplr_recurrent_backward, x, d, **options)


def reference(x, d, **options):
    exact = DplrInputs(*(y.double() for y in x))
    d = tuple(y.double() for y in d)
    return call(dplr_recurrence, dplr_recurrence_backward, exact, d, **options)


def cotangents(x) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn_like(x.v), torch.randn_like(x.initial_state)


def hold(got, want, rtol: float, norm: str = "row") -> None:
    names = ("o", "state", *(f"d{name}" for name in DplrInputs._fields))
    for name, g, w in zip(names, got, want, strict=True):
        assert_rows_close(as_rows(g), as_rows(w), rtol=rtol, norm=norm, name=name)


# -- values and gradients ----------------------------------------------------------------------------------------------

CASES = {
    "dense": (dplr_inputs(2, 5, 3, 7, 4), None),
    "per head": (dplr_inputs(2, 5, 3, 7, 4, per="head"), None),
    "tiles of V": (dplr_inputs(1, 3, 1, 100, 90), None),
    "segments": (dplr_inputs(1, 35, 2, 4, 3), None),
    "packed": (dplr_inputs(1, 9, 2, 4, 3, N=4), torch.tensor([0, 3, 3, 4, 9])),
    "packed segments": (
        dplr_inputs(1, 70, 1, 4, 3, N=5),
        torch.tensor([0, 16, 16, 33, 64, 70]),
    ),
    "no token": (dplr_inputs(2, 0, 1, 4, 3), None),
    "no head": (dplr_inputs(2, 4, 0, 4, 3), None),
}


@pytest.mark.parametrize("case", CASES)
def test_float64_is_the_reference(case):
    x, cu = CASES[case]
    d = cotangents(x)
    hold(kernels(x, d, cu_seqlens=cu), reference(x, d, cu_seqlens=cu), rtol=1e-12)


@pytest.mark.parametrize("gate", [*DECAYS, "mixed"], ids=str)
@pytest.mark.parametrize("keys", ["unit", "identical", "cos0.9"])
def test_hard_data_in_float64(gate, keys):
    x = dplr_inputs(1, 20, 1, 6, 5, log_decay=gate, keys=keys)
    d = cotangents(x)
    hold(kernels(x, d, scale=0.3), reference(x, d, scale=0.3), rtol=1e-12)


@pytest.mark.parametrize("gate", [None, 0.0, -0.6065, -5.0, -20.0])
@pytest.mark.parametrize("per", ["head", "channel"])
def test_float32_stays_near_float64(gate, per):
    x = dplr_inputs(1, 64, 2, 16, 8, log_decay=gate, per=per, dtype=torch.float32)
    d = cotangents(x)
    hold(kernels(x, d), reference(x, d), rtol=1e-5, norm="tensor")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    x = dplr_inputs(1, 20, 2, 6, 5, dtype=dtype)
    do, dstate = cotangents(x)
    wide = DplrInputs(*(y.float() for y in x))
    got, want = kernels(x, (do, dstate)), kernels(wide, (do.float(), dstate))
    for g, w, y in zip(got, want, (x.v, dstate, *x), strict=True):
        assert g.dtype == y.dtype
        assert torch.equal(g, w.to(y.dtype))


def test_gradcheck():
    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *x):
            ctx.save_for_backward(*x)
            return tuple(dplr_recurrent(*x[:-1], initial_state=x[-1]))

        @staticmethod
        def backward(ctx, do, dstate):
            *x, S0 = ctx.saved_tensors
            return dplr_recurrent_backward(do, *x, dstate=dstate, initial_state=S0)

    leaves = [y.requires_grad_() for y in dplr_inputs(1, 5, 1, 3, 2)]
    assert torch.autograd.gradcheck(Rule.apply, leaves, fast_mode=True, atol=1e-7, nondet_tol=0)


def test_no_initial_state():
    x, _ = CASES["dense"]
    got, want = dplr_recurrent(*x[:-1]), dplr_recurrence(*x[:-1])
    assert_rows_close(got.o, want.o, rtol=1e-12, name="o")
    assert_rows_close(got.state, want.state, rtol=1e-12, name="state")


def test_any_strides_give_the_same_bits():
    x, _ = CASES["dense"]
    d = cotangents(x)
    want = kernels(x, d)
    other = DplrInputs(*(y.mT.contiguous().mT for y in x))
    got = kernels(other, tuple(y.mT.contiguous().mT for y in d))
    assert not any(y.is_contiguous() for y in other)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_the_state_can_be_updated_in_place():
    x, _ = CASES["dense"]
    want = dplr_recurrent(*x[:-1], initial_state=x.initial_state)
    state = x.initial_state.clone()
    got = dplr_recurrent(*x[:-1], initial_state=state, out_state=state)
    assert got.state is state
    assert torch.equal(state, want.state)
    assert torch.equal(got.o, want.o)


def test_no_output_depends_on_a_later_token():
    x = dplr_inputs(1, 20, 1, 4, 3)
    before = dplr_recurrent(*x[:-1], initial_state=x.initial_state).o
    for t in (1, 10, 19):
        other = [y.clone() for y in x[:-1]]
        for y in other:
            y[:, t:] = 1.5 * y[:, t:] - 0.25
        after = dplr_recurrent(*other, initial_state=x.initial_state).o
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


# -- memory ------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kernel", ["dplr_forward_kernel", "dplr_backward_kernel"])
def test_poison_is_seen_when_a_store_is_missing(monkeypatch, kernel):
    # the check above can fail: without the launch, the NaN stay
    class NoLaunch:
        def __getitem__(self, grid):
            return lambda *args: None

    x, _ = CASES["dense"]
    monkeypatch.setattr(recurrent, kernel, NoLaunch())
    with poisoned():
        out = run(x)
    assert all(y.isnan().all() for y in (out[:2] if "forward" in kernel else out[2:]))


@pytest.mark.parametrize("length", [1, 3, 64])
def test_the_length_of_segments_changes_no_bit(monkeypatch, length):
    x, cu = CASES["packed segments"]
    want = run(x, cu)
    monkeypatch.setattr(recurrent, "segment_length", lambda T: length)
    with poisoned():
        got = run(x, cu)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


ON_HOPPER = [("sm_90", dtype, D) for dtype in ("bfloat16", "float16", "float32") for D in (64, 128, 256)]  # fmt: skip
ELSEWHERE = [(t, dtype, 128) for t in TARGETS if t != "sm_90" for dtype in ("bfloat16", "float32")]


@pytest.mark.parametrize(
    ("target", "dtype", "D", "per"),
    [(*case, "channel") for case in ON_HOPPER + ELSEWHERE]
    + [(target, "bfloat16", 128, "head") for target in TARGETS],
)
def test_compiles_within_the_budget(target, dtype, D, per):
    x = dplr_inputs(1, 2, 2, D, D, dtype=getattr(torch, dtype), per=per)
    with recorded() as launches:
        run(x, torch.tensor([0, 2]))
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["dplr_forward_kernel", "dplr_forward_kernel", "dplr_backward_kernel"]
    for launch in launches:
        report = compile_launch(launch, target)
        assert report.spilled <= SPILL_BUDGET, report
        assert report.shared <= SHARED_LIMIT[target], report
        assert 0 < report.registers <= 255, report


def test_rows_beyond_two_to_the_31():
    """A document that starts at token 2^31, in memory that is mapped and never touched before it."""
    start, T = 2**31, 2**31 + 3
    x = dplr_inputs(1, 3, 1, 1, 1, dtype=torch.float16)
    far = [torch.empty(1, T, *y.shape[2:], dtype=y.dtype) for y in x[:-1]]
    for big, y in zip(far, x[:-1], strict=True):
        big[:, start:] = y
    got = dplr_recurrent(*far, initial_state=x.initial_state, cu_seqlens=torch.tensor([start, T]))
    want = dplr_recurrent(*x[:-1], initial_state=x.initial_state)
    assert torch.equal(got.o[:, start:], want.o)
    assert torch.equal(got.state, want.state)


def test_many_heads_need_one_grid_axis():
    # the first axis of a grid may have 2^31 - 1 programs, the others 65,535
    with recorded() as launches:
        run(dplr_inputs(1, 1, 70_000, 1, 1))
    assert [launch.grid for launch in launches] == [(70_000,)] * 3
