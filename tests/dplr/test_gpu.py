"""The compiled kernels of the DPLR rule on a CUDA device. Skipped without one."""

import pytest
import torch

from gdr_teach import dplr_delta_rule, dplr_delta_rule_step, explain, value_checks
from gdr_teach.dplr.reference import dplr_recurrence
from gdr_teach.testing import (
    DECAYS,
    assert_near_token_loop,
    assert_rows_close,
    dplr_inputs,
    gradients,
)

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(2, 65, 2, 64, 64), (1, 33, 3, 100, 40), (1, 17, 1, 256, 256), (1, 1, 1, 1, 1)]


def on_gpu(x):
    return type(x)(*(y.cuda() for y in x))


def over_time(x: torch.Tensor) -> torch.Tensor:
    """[B, T, H] as [B, H, T]: where a token has one number, a row is a head's numbers over time."""
    return (x.transpose(1, 2) if x.dim() == 3 else x).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [None, "mixed", *DECAYS], ids=str)
@pytest.mark.parametrize("per", ["head", "channel"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounds_no_more_than_pytorch(dtype, gate, per, shape):
    x = dplr_inputs(*shape, dtype=dtype, keys="cos0.9", per=per, log_decay=gate)
    x = x._replace(log_decay=x.log_decay.float())  # float16 has no gradient of a strong decay
    exact = type(x)(*(y.double() for y in x))
    do, dstate = torch.randn_like(exact.v), torch.randn_like(exact.initial_state)
    far, plain_way = on_gpu(x), {"backend": "torch", "mode": "recurrent"}
    want = dplr_recurrence(*exact[:-1], initial_state=exact.initial_state)
    plain = dplr_recurrence(*x[:-1], initial_state=x.initial_state)
    options = {"backend": "triton", "mode": "recurrent"}
    got = dplr_delta_rule(*far[:-1], initial_state=far.initial_state, **options)
    assert_rows_close(got.o.cpu(), want.o, rtol=1e-6, rounded=plain.o, name="o")
    assert_rows_close(got.state.cpu(), want.state, rtol=1e-6, rounded=plain.state, name="state")
    wants = gradients(dplr_delta_rule, exact, do, dstate, **plain_way)
    plain = gradients(dplr_delta_rule, x, do, dstate, **plain_way)
    found = gradients(dplr_delta_rule, far, do.cuda(), dstate.cuda(), **options)
    for name, *gpw in zip(x._fields, found, plain, wants, strict=True):
        g, p, w = map(over_time, gpw)
        assert_rows_close(g, w, rtol=1e-6, rounded=p, name=f"d{name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate", [None, -5.0], ids=str)
@pytest.mark.parametrize("per", ["head", "channel"])
def test_compiled_chunks_round_no_more_than_interpreted_ones(dtype, gate, per):
    # the interpreter rounds where the kernel does, and takes the same tiles
    x = dplr_inputs(1, 70, 2, 64, 64, dtype=dtype, keys="cos0.9", beta=1.0, per=per, log_decay=gate)
    x = x._replace(log_decay=x.log_decay.float())
    exact, way = type(x)(*(y.double() for y in x)), {"backend": "triton", "mode": "chunk"}
    do, dstate = torch.randn_like(exact.v), torch.randn_like(exact.initial_state)
    want = dplr_recurrence(*exact[:-1], initial_state=exact.initial_state)
    wants = gradients(dplr_delta_rule, exact, do, dstate, mode="recurrent")
    far = on_gpu(x)
    got = dplr_delta_rule(*far[:-1], initial_state=far.initial_state, **way)
    found = gradients(dplr_delta_rule, far, do.cuda(), dstate.cuda(), **way)
    near = dplr_delta_rule(*x[:-1], initial_state=x.initial_state, **way)
    rounded = gradients(dplr_delta_rule, x, do, dstate, **way)
    triples = zip((*got, *found), (*near, *rounded), (*want, *wants), strict=True)
    for name, gpw in zip(("o", "state", *(f"d{n}" for n in x._fields)), triples, strict=True):
        g, p, w = map(over_time, gpw)
        assert_rows_close(g, w, rtol=1e-6, rounded=p, name=name)


WIDTHS = [
    (2, 130, 2, 64, 64),
    (1, 70, 3, 100, 40),
    (1, 130, 1, 128, 128),
    (1, 70, 1, 256, 256),
    (1, 1, 1, 16, 16),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [None, "mixed", *DECAYS], ids=str)
@pytest.mark.parametrize("per", ["head", "channel"])
@pytest.mark.parametrize("shape", WIDTHS, ids=str)
def test_chunk_kernels_stay_near_the_token_loop(dtype, gate, per, shape):
    keys = "identical" if gate in (0.0, "mixed") else "cos0.9"
    x = dplr_inputs(*shape, dtype=dtype, keys=keys, per=per, log_decay=gate)
    x = x._replace(log_decay=x.log_decay.float()) if dtype == torch.float16 else x
    way = {"backend": "triton", "mode": "chunk"}
    assert_near_token_loop(dplr_delta_rule, x, keys=keys, beta=None, device="cuda", **way)


@pytest.mark.parametrize("gate", [-0.6065, -5.0])
def test_a_promise_changes_no_more_than_rounding(gate):
    x = dplr_inputs(2, 130, 2, 64, 64, dtype=torch.bfloat16, log_decay=gate)
    way = {"backend": "triton", "mode": "chunk", "min_log_decay": gate}
    assert_near_token_loop(dplr_delta_rule, x, keys="unit", beta=None, device="cuda", **way)


@pytest.mark.parametrize("T", [1, 16, 300])
def test_auto_takes_the_kernel(T):
    x = on_gpu(dplr_inputs(1, T, 2, 64, 64, dtype=torch.bfloat16))
    assert explain(dplr_delta_rule, *x[:-1], mode="recurrent").backend == "triton"
    assert dplr_delta_rule(*x[:-1]).o.isfinite().all()


def test_long_sequences_in_segments():
    x = dplr_inputs(1, 1000, 2, 16, 16, dtype=torch.float32)
    do, dstate = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    options = {"backend": "triton", "mode": "recurrent"}
    found = gradients(dplr_delta_rule, on_gpu(x), do.cuda(), dstate.cuda(), **options)
    exact = type(x)(*(y.double() for y in x))
    wants = gradients(dplr_delta_rule, exact, do.double(), dstate.double(), backend="torch")
    for name, g, w in zip(x._fields, found, wants, strict=True):
        assert_rows_close(g.cpu(), w, rtol=1e-4, norm="tensor", name=f"d{name}")


@pytest.mark.parametrize("mode", ["recurrent", "chunk"])
@pytest.mark.parametrize("per", ["head", "channel"])
def test_a_hundred_runs_have_equal_bits(per, mode):
    x = on_gpu(dplr_inputs(4, 70, 8, 64, 64, dtype=torch.bfloat16, per=per))
    do, dstate = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    options = {"backend": "triton", "mode": mode}
    first = gradients(dplr_delta_rule, x, do, dstate, **options)
    for _ in range(100):
        again = gradients(dplr_delta_rule, x, do, dstate, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", ["recurrent", "chunk"])
def test_packed_documents_equal_a_loop_over_them(where, mode):
    ends = [0, 7, 7, 8, 90]
    x = on_gpu(dplr_inputs(1, 90, 2, 64, 32, N=4, dtype=torch.bfloat16))
    options = {"backend": "triton", "mode": mode}
    cu = torch.tensor(ends, device=where)
    got = dplr_delta_rule(*x[:-1], initial_state=x.initial_state, cu_seqlens=cu, **options)
    for n in range(4):
        own = slice(ends[n], ends[n + 1])
        start = x.initial_state[n : n + 1]
        want = dplr_delta_rule(*(y[:, own] for y in x[:-1]), initial_state=start, **options)
        assert torch.equal(got.o[:, own], want.o)
        assert torch.equal(got.state[n : n + 1], want.state)


def test_values_are_looked_at_when_asked():
    x = on_gpu(dplr_inputs(1, 5, 1, 4, 4, dtype=torch.float32))
    x.log_decay[0, 2, 0, 1] = 1.0
    with value_checks(), pytest.raises(ValueError, match="log_decay must be <= 0"):
        dplr_delta_rule(*x[:-1])


def test_a_step_in_place_can_be_captured_in_a_graph():
    x = on_gpu(dplr_inputs(2, 1, 4, 64, 64, dtype=torch.bfloat16))
    tokens, state = [y[:, 0] for y in x[:-1]], x.initial_state.clone()
    want = dplr_delta_rule_step(*tokens, state)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        dplr_delta_rule_step(*tokens, state.clone(), inplace=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = dplr_delta_rule_step(*tokens, state, inplace=True)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got.o, want.o)
    assert torch.equal(state, want.state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_are_one_call(dtype):
    x = on_gpu(dplr_inputs(2, 9, 3, 100, 40, dtype=dtype))
    state = x.initial_state.clone()
    tokens = ([y[:, t] for y in x[:-1]] for t in range(9))
    rows = [dplr_delta_rule_step(*token, state, inplace=True).o for token in tokens]
    way = {"initial_state": x.initial_state, "backend": "triton", "mode": "recurrent"}
    want = dplr_delta_rule(*x[:-1], **way)
    # not bit by bit: for T = 1 the kernel is compiled anew, and a product may be fused with another sum
    o, eps = torch.stack(rows, 1), torch.finfo(dtype).eps
    assert_rows_close(o.cpu(), want.o.cpu().double(), rtol=max(1e-5, eps), name="o")
    assert_rows_close(state.cpu(), want.state.cpu().double(), rtol=1e-5, name="state")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segments_stay_near_the_token_loop(dtype):
    x = dplr_inputs(2, 700, 2, 64, 64, dtype=dtype)
    way = {"backend": "triton", "mode": "chunk", "segments": 4}
    assert explain(dplr_delta_rule, *on_gpu(x)[:-1], **way).segments > 1
    assert_near_token_loop(dplr_delta_rule, x, keys="unit", beta=None, device="cuda", **way)
