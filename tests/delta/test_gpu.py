"""The compiled kernels on a CUDA device: what no interpreter can show. Skipped without one."""

import pytest
import torch

from gdr_teach import delta_rule, explain, value_checks
from gdr_teach.delta.reference import delta_recurrence
from gdr_teach.testing import (
    HARD,
    Inputs,
    assert_near_token_loop,
    assert_rows_close,
    delta_inputs,
    gradients,
)

pytestmark = pytest.mark.gpu
NAMES = ("dq", "dk", "dv", "dbeta", "dstate0")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def rows(x: torch.Tensor) -> torch.Tensor:
    """[B, T, H] as [B, T, H, 1], so that the last axis is a row."""
    return (x[..., None] if x.dim() == 3 else x).cpu()


def on_gpu(x: Inputs) -> Inputs:
    return Inputs(*(y.cuda() for y in x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", ["unit", "cos0.9", "identical"])
@pytest.mark.parametrize("beta", [None, 0.0, 1.0, 2.0])
@pytest.mark.parametrize(
    "shape",
    [(2, 65, 2, 64, 64), (1, 33, 3, 100, 40), (1, 17, 1, 256, 256), (1, 1, 1, 1, 1)],
    ids=str,
)
def test_rounds_no_more_than_pytorch(dtype, keys, beta, shape):
    x = delta_inputs(*shape, dtype=dtype, keys=keys, beta=beta)
    exact = Inputs(*(y.double() for y in x))
    do, dstate = torch.randn_like(exact.v), torch.randn_like(exact.initial_state)
    want = delta_recurrence(*exact[:4], initial_state=exact.initial_state)
    plain = delta_recurrence(*x[:4], initial_state=x.initial_state)
    far = on_gpu(x)
    way = {"backend": "triton", "mode": "recurrent"}
    assert explain(delta_rule, *far[:4], mode="recurrent").backend == "triton"
    got = delta_rule(*far[:4], initial_state=far.initial_state, **way)
    assert_rows_close(got.o.cpu(), want.o, rtol=1e-6, rounded=plain.o, name="o")
    assert_rows_close(got.state.cpu(), want.state, rtol=1e-6, rounded=plain.state, name="state")
    wants = gradients(delta_rule, exact, do, dstate, backend="torch", mode="recurrent")
    plain = gradients(delta_rule, x, do, dstate, backend="torch", mode="recurrent")
    found = gradients(delta_rule, far, do.cuda(), dstate.cuda(), **way)
    for name, g, p, w in zip(NAMES, found, plain, wants, strict=True):
        assert_rows_close(rows(g), rows(w), rtol=1e-6, rounded=rows(p), name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_packed_documents_equal_a_loop_over_them(dtype, where):
    ends, way = [0, 7, 7, 8, 40], {"mode": "recurrent"}
    x = on_gpu(delta_inputs(1, 40, 2, 64, 32, N=4, dtype=dtype))
    cu = torch.tensor(ends, device=where)
    got = delta_rule(*x[:4], initial_state=x.initial_state, cu_seqlens=cu, **way)
    for n in range(4):
        own, start = slice(ends[n], ends[n + 1]), x.initial_state[n : n + 1]
        want = delta_rule(*(y[:, own] for y in x[:4]), initial_state=start, **way)
        assert torch.equal(got.o[:, own], want.o)
        assert torch.equal(got.state[n : n + 1], want.state)


WIDTHS = [
    (2, 200, 2, 64, 64),
    (1, 130, 3, 100, 40),
    (1, 200, 1, 128, 128),
    (1, 70, 1, 256, 256),
    (1, 1, 1, 16, 16),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("keys", "beta"), [*HARD, ("unit", 0.0)])
@pytest.mark.parametrize("shape", WIDTHS, ids=str)
def test_chunk_kernels_stay_near_the_token_loop(dtype, keys, beta, shape):
    x = delta_inputs(*shape, dtype=dtype, keys=keys, beta=beta)
    way = {"backend": "triton", "mode": "chunk"}
    assert_near_token_loop(delta_rule, x, keys=keys, beta=beta, device="cuda", **way)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keys", ["unit", "cos0.9"])
def test_compiled_chunks_round_no_more_than_interpreted_ones(dtype, keys):
    # the interpreter rounds where the kernel does, and takes the same tiles
    x = delta_inputs(2, 130, 2, 64, 64, dtype=dtype, keys=keys, beta=1.0)
    exact, way = Inputs(*(y.double() for y in x)), {"backend": "triton", "mode": "chunk"}
    do, dstate = torch.randn_like(exact.v), torch.randn_like(exact.initial_state)
    want = delta_recurrence(*exact[:4], initial_state=exact.initial_state)
    wants = gradients(delta_rule, exact, do, dstate, mode="recurrent")
    far = on_gpu(x)
    got = delta_rule(*far[:4], initial_state=far.initial_state, **way)
    found = gradients(delta_rule, far, do.cuda(), dstate.cuda(), **way)
    near = delta_rule(*x[:4], initial_state=x.initial_state, **way)
    rounded = gradients(delta_rule, x, do, dstate, **way)
    triples = zip((*got, *found), (*near, *rounded), (*want, *wants), strict=True)
    for name, gpw in zip(("o", "state", *NAMES), triples, strict=True):
        g, p, w = map(rows, gpw)
        assert_rows_close(g, w, rtol=1e-6, rounded=p, name=name)


def test_auto_takes_the_chunk_kernels():
    x = on_gpu(delta_inputs(1, 300, 2, 64, 64, dtype=torch.bfloat16))
    assert tuple(explain(delta_rule, *x[:4])) == ("triton", "chunk", 64, 1, 2)
    assert explain(delta_rule, *(y.float() for y in x[:4])).mode == "recurrent"
    assert explain(delta_rule, *(y[:, :16] for y in x[:4])).mode == "recurrent"


def test_chunk_kernels_on_packed_documents():
    ends = [0, 63, 63, 64, 128, 193, 300]
    x = on_gpu(delta_inputs(1, 300, 2, 64, 64, N=6, dtype=torch.bfloat16))
    way = {"backend": "triton", "mode": "chunk"}
    got = delta_rule(*x[:4], initial_state=x.initial_state, cu_seqlens=torch.tensor(ends), **way)
    for n in range(6):
        own = slice(ends[n], ends[n + 1])
        want = delta_rule(
            *(y[:, own] for y in x[:4]), initial_state=x.initial_state[n : n + 1], **way
        )
        assert torch.equal(got.o[:, own], want.o)
        assert torch.equal(got.state[n : n + 1], want.state)


def test_values_are_looked_at_when_asked():
    x = on_gpu(delta_inputs(1, 5, 1, 4, 4, N=2, dtype=torch.float32))
    with value_checks(), pytest.raises(ValueError, match="must not decrease"):
        delta_rule(*x[:4], cu_seqlens=torch.tensor([0, 7, 5]).cuda())


@pytest.mark.parametrize("mode", ["recurrent", "chunk"])
def test_a_hundred_runs_have_equal_bits(mode):
    x = on_gpu(delta_inputs(4, 130, 8, 64, 64, dtype=torch.bfloat16))
    do, dstate = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    first = gradients(delta_rule, x, do, dstate, mode=mode)
    for _ in range(100):
        again = gradients(delta_rule, x, do, dstate, mode=mode)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_can_be_captured_in_a_graph():
    x = on_gpu(delta_inputs(2, 33, 2, 64, 64, dtype=torch.bfloat16))
    leaves = [y.clone().requires_grad_() for y in x]

    def step():
        out = delta_rule(*leaves[:4], initial_state=leaves[4])
        return torch.autograd.grad(out.o.sum() + out.state.sum(), leaves)

    want = [g.clone() for g in step()]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_seventy_thousand_heads():
    x = on_gpu(delta_inputs(1, 2, 70_000, 4, 4, dtype=torch.float32))
    got = delta_rule(*x[:4], initial_state=x.initial_state)
    want = delta_rule(*x[:4], initial_state=x.initial_state, backend="torch")
    assert_rows_close(got.o.cpu(), want.o.cpu(), rtol=1e-5, name="o")


@pytest.mark.parametrize("mode", ["recurrent", "chunk"])
def test_float64_takes_torch(mode):
    x = on_gpu(delta_inputs(1, 70, 2, 8, 8))
    assert explain(delta_rule, *x[:4]).backend == "torch"
    got = delta_rule(*x[:4], initial_state=x.initial_state, mode=mode)
    near = Inputs(*(y.cpu() for y in x))
    want = delta_recurrence(*near[:4], initial_state=near.initial_state)
    assert_rows_close(got.o.cpu(), want.o, rtol=1e-11, name="o")
    with pytest.raises(TypeError, match="got float64"):
        delta_rule(*x[:4], backend="triton")


def test_torch_compile_in_one_graph():
    x = on_gpu(delta_inputs(1, 33, 2, 64, 64, dtype=torch.bfloat16))
    leaves = [y.clone().requires_grad_() for y in x]

    def loss(q, k, v, beta, S0):
        out = delta_rule(q, k, v, beta, initial_state=S0)
        return out.o.float().square().sum() + out.state.sum()

    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves
    )
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segments_stay_near_the_token_loop(dtype):
    x = delta_inputs(2, 700, 2, 64, 64, dtype=dtype)
    way = {"backend": "triton", "mode": "chunk", "segments": 4}
    assert explain(delta_rule, *on_gpu(x)[:-1], **way).segments > 1
    assert_near_token_loop(delta_rule, x, keys="unit", beta=None, device="cuda", **way)
