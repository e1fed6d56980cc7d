"""One token of the DPLR rule at a time: T steps are one call."""

import pytest
import torch
from torch import library

pytest.importorskip("triton")

from gdr_teach import dplr_delta_rule, dplr_delta_rule_step
from gdr_teach.runtime import poisoned
from gdr_teach.sanitizer import sanitize
from gdr_teach.testing import assert_rows_close, dplr_inputs

INPUTS = {
    "head": dplr_inputs(2, 9, 3, 4, 5, per="head", log_decay="mixed"),
    "channel": dplr_inputs(2, 9, 3, 4, 5),
}
every_input = pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)


def tokens(x, t):
    return [y[:, t] for y in x[:-1]]


@every_input
@pytest.mark.parametrize("inplace", [False, True])
def test_steps_are_one_call(x, inplace):
    state, rows = x.initial_state.clone(), []
    for t in range(9):
        out = dplr_delta_rule_step(*tokens(x, t), state, scale=0.3, inplace=inplace)
        rows.append(out.o)
        assert (out.state is state) == inplace
        state = out.state
    want = dplr_delta_rule(*x[:-1], initial_state=x.initial_state, scale=0.3, mode="recurrent")
    assert_rows_close(torch.stack(rows, 1), want.o, rtol=1e-12, name="o")
    assert_rows_close(state, want.state, rtol=1e-12, name="state")


@every_input
def test_only_the_state_changes_and_only_when_asked(x):
    saved = [y.clone() for y in x]
    out = dplr_delta_rule_step(*tokens(x, 0), x.initial_state)
    assert all(torch.equal(y, s) for y, s in zip(x, saved, strict=True))
    assert out.state.data_ptr() != x.initial_state.data_ptr()
    mine = x.initial_state.clone()
    again = dplr_delta_rule_step(*tokens(x, 0), mine, inplace=True)
    assert torch.equal(again.o, out.o)
    assert torch.equal(mine, out.state)
    assert all(torch.equal(y, s) for y, s in zip(x, saved, strict=True))


@every_input
def test_a_state_with_strides_is_updated_where_it_lies(x):
    buffer = torch.full((2, 3, 4, 10), float("nan"), dtype=torch.float64)
    state = buffer[..., ::2]
    state.copy_(x.initial_state)
    want = dplr_delta_rule_step(*tokens(x, 0), x.initial_state)
    dplr_delta_rule_step(*tokens(x, 0), state, inplace=True)
    assert torch.equal(state, want.state)
    assert buffer[..., 1::2].isnan().all()


@every_input
def test_the_kernel_updates_in_place(x):
    operator = torch.ops.gdr_teach.dplr_delta_rule_step
    for state in (x.initial_state.clone(), x.initial_state.mT.contiguous().mT):
        with poisoned(), sanitize():
            o = operator(*tokens(x, 0), state, 0.5, "triton")
        want = dplr_delta_rule_step(*tokens(x, 0), x.initial_state, scale=0.5)
        assert_rows_close(o, want.o, rtol=1e-12, name="o")
        assert_rows_close(state, want.state, rtol=1e-12, name="state")


@every_input
def test_a_step_is_differentiable(x):
    leaves = [y.clone().requires_grad_() for y in (*tokens(x, 0), x.initial_state)]
    out = dplr_delta_rule_step(*leaves)
    got = torch.autograd.grad(out.o.sum() + out.state.sin().sum(), leaves)
    again = [y.detach().clone().requires_grad_() for y in leaves]
    out = dplr_delta_rule(
        *(y[:, None] for y in again[:-1]), initial_state=again[-1], mode="recurrent"
    )
    want = torch.autograd.grad(out.o.sum() + out.state.sin().sum(), again)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@every_input
def test_dtypes(x):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for inplace in (False, True):
            half = [y.to(dtype) for y in tokens(x, 0)]
            out = dplr_delta_rule_step(*half, x.initial_state.float(), inplace=inplace)
            assert out.o.dtype == dtype
            assert out.state.dtype == torch.float32


@every_input
def test_no_sequence_and_no_head(x):
    for cut in (lambda y: y[:0], lambda y: y[:, :0]):
        for inplace in (False, True):
            one = [cut(y) for y in (*tokens(x, 0), x.initial_state)]
            out = dplr_delta_rule_step(*one, inplace=inplace)
            assert out.o.shape == one[2].shape
            assert out.state.shape == one[-1].shape


@every_input
def test_in_one_graph(x):
    torch.compiler.reset()

    def two(state, *tokens):
        o = dplr_delta_rule_step(*tokens, state, inplace=True).o
        return o + dplr_delta_rule_step(*tokens, state, inplace=True).o

    a, b = x.initial_state.clone(), x.initial_state.clone()
    want = two(a, *tokens(x, 0))
    got = torch.compile(two, fullgraph=True, backend="aot_eager")(b, *tokens(x, 0))
    assert torch.equal(got, want)
    assert torch.equal(a, b)


@every_input
def test_opcheck(x):
    operator = torch.ops.gdr_teach.dplr_delta_rule_step.default
    for backend in ("torch", "triton"):
        library.opcheck(operator, (*tokens(x, 0), x.initial_state.clone(), 0.5, backend))
