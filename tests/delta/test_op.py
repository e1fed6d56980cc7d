"""`delta_rule` where its data is hard: keys, steps, rounding; what all rules promise: tests/test_rules.py."""

import pytest
import torch

from gdr_teach import delta_rule, explain
from gdr_teach.delta.reference import delta_chunkwise, delta_recurrence
from gdr_teach.testing import (
    as_rows,
    assert_rows_close,
    delta_inputs,
    delta_oracle,
    gradients,
)

WAYS = [
    ("torch", "recurrent"),
    ("torch", "chunk"),
    ("triton", "recurrent"),
    ("triton", "chunk"),
]
NAMES = ("dq", "dk", "dv", "dbeta", "dstate0")
every_way = pytest.mark.parametrize(("backend", "mode"), WAYS, ids=["-".join(w) for w in WAYS])


@every_way
@pytest.mark.parametrize("keys", ["unit", "identical", "cos0.9", "zero"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_gradients_on_hard_data(backend, mode, keys, beta):
    x = delta_inputs(1, 20, 1, 6, 5, keys=keys, beta=beta)
    do, dstate = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    found = gradients(delta_rule, x, do, dstate, backend=backend, mode=mode)
    for name, g, w in zip(NAMES, found, gradients(delta_oracle, x, do, dstate), strict=True):
        assert_rows_close(as_rows(g), as_rows(w), rtol=1e-11, name=name)


# -- N2: rounding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keys", ["unit", "cos0.9", "identical"])
def test_kernel_rounds_no_more_than_pytorch(dtype, keys):
    x = delta_inputs(1, 40, 2, 16, 8, dtype=dtype, keys=keys)
    want = delta_oracle(*x[:4], initial_state=x.initial_state)
    plain = delta_recurrence(*x[:4], initial_state=x.initial_state)
    got = delta_rule(*x[:4], initial_state=x.initial_state, backend="triton", mode="recurrent")
    assert got.o.dtype == dtype
    assert got.state.dtype == torch.float32
    assert_rows_close(got.o, want.o, rtol=1e-7, rounded=plain.o, name="o")
    assert_rows_close(got.state, want.state, rtol=1e-7, rounded=plain.state, name="state")
    do, dstate = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    want = gradients(delta_oracle, x, do, dstate)
    plain = gradients(delta_rule, x, do, dstate, backend="torch", mode="recurrent")
    found = gradients(delta_rule, x, do, dstate, backend="triton", mode="recurrent")
    for name, g, p, w in zip(NAMES, found, plain, want, strict=True):
        assert_rows_close(as_rows(g), as_rows(w), rtol=1e-7, rounded=as_rows(p), name=name)


NORMWISE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.mark.parametrize("dtype", NORMWISE, ids=str)
@pytest.mark.parametrize("keys", ["unit", "cos0.9", "identical"])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_chunks_stay_near_the_token_loop(dtype, keys, beta):
    x = delta_inputs(1, 300, 2, 32, 16, dtype=dtype, keys=keys, beta=beta)
    exact = type(x)(*(y.double() for y in x))
    do, dstate = torch.randn_like(exact.v), torch.randn_like(exact.initial_state)
    want = delta_recurrence(*exact[:4], initial_state=exact.initial_state)
    got = delta_rule(*x[:4], initial_state=x.initial_state, backend="torch", mode="chunk")
    options = {"rtol": NORMWISE[dtype], "norm": "tensor"}
    assert_rows_close(got.o, want.o, name="o", **options)
    assert_rows_close(got.state, want.state, name="state", **options)
    wants = gradients(delta_rule, exact, do, dstate, backend="torch", mode="recurrent")
    found = gradients(delta_rule, x, do, dstate, backend="torch", mode="chunk")
    for name, g, w in zip(NAMES, found, wants, strict=True):
        assert_rows_close(as_rows(g), as_rows(w), name=name, **options)


# -- explain -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "options", "way"),
    [
        (16, {}, ("torch", "recurrent", 0, 1, 0)),
        (17, {}, ("torch", "chunk", 32, 1, 0)),
        (17, {"mode": "recurrent"}, ("torch", "recurrent", 0, 1, 0)),
        (4, {"mode": "chunk"}, ("torch", "chunk", 32, 1, 0)),
        (16, {"backend": "triton"}, ("triton", "recurrent", 0, 1, 1)),
        (17, {"backend": "triton"}, ("triton", "chunk", 64, 1, 2)),
        (17, {"backend": "triton", "mode": "chunk"}, ("triton", "chunk", 64, 1, 2)),
    ],
)
def test_explain(T, options, way):
    x = delta_inputs(1, T, 1, 4, 3)
    assert tuple(explain(delta_rule, *x[:4], **options)) == way


def test_explain_wants_an_operator():
    with pytest.raises(TypeError, match="explain: op must be an operator"):
        explain(torch.relu, torch.zeros(1))


def test_auto_takes_what_explain_says():
    x = delta_inputs(1, 70, 1, 4, 3)
    C = explain(delta_rule, *x[:4]).chunk_size
    assert torch.equal(delta_rule(*x[:4]).o, delta_chunkwise(*x[:4], chunk_size=C).o)
    short = [y[:, :16] for y in x[:4]]
    assert torch.equal(delta_rule(*short).o, delta_recurrence(*short).o)


def test_a_token_of_two_billion_numbers_is_not_taken_by_chunks():
    one = torch.zeros(1, dtype=torch.float64)
    k, beta = one.expand(1, 17, 2**25, 64), one.expand(1, 17, 2**25)
    assert explain(delta_rule, k, k, k, beta, backend="triton").mode == "recurrent"
    with pytest.raises(ValueError, match=r"wants H \* max\(K, V\) < 33554432, got H = 33554432"):
        explain(delta_rule, k, k, k, beta, backend="triton", mode="chunk")
