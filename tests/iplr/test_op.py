"""`iplr_delta_rule` where its data is hard: keys, rounding, growth; what all rules promise: tests/test_rules.py."""

import itertools

import pytest
import torch

from gdr_teach import delta_rule, explain, iplr_delta_rule
from gdr_teach.iplr.reference import iplr_chunkwise, iplr_recurrence
from gdr_teach.lifts import delta_to_iplr
from gdr_teach.testing import (
    assert_near_token_loop,
    assert_rows_close,
    delta_inputs,
    dplr_oracle,
    gradients,
    iplr_inputs,
)

WAYS = list(itertools.product(("torch", "triton"), ("recurrent", "chunk")))
every_way = pytest.mark.parametrize(("backend", "mode"), WAYS, ids=["-".join(w) for w in WAYS])


def cotangents(x):
    return torch.randn_like(x.v).double(), torch.randn_like(x.initial_state).double()


@every_way
@pytest.mark.parametrize("keys", ["unit", "identical", "cos0.9", "zero"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_gradients_on_hard_data(backend, mode, keys, beta):
    x = iplr_inputs(1, 20, 1, 6, 5, keys=keys, beta=beta)
    d = cotangents(x)
    found = gradients(iplr_delta_rule, x, *d, backend=backend, mode=mode)
    for name, g, w in zip(x._fields, found, gradients(dplr_oracle, x, *d), strict=True):
        assert_rows_close(g, w, rtol=1e-11, name=f"d{name}")


@every_way
def test_the_delta_rule_is_a_special_case(backend, mode):
    x = delta_inputs(1, 20, 2, 6, 5)
    way = {"initial_state": x.initial_state, "backend": backend, "mode": mode}
    want = delta_rule(*x[:-1], **way)
    got = iplr_delta_rule(*delta_to_iplr(*x[:-1]), **way)
    assert_rows_close(got.o, want.o, rtol=1e-12, name="o")
    assert_rows_close(got.state, want.state, rtol=1e-12, name="state")


# -- rounding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keys", ["unit", "cos0.9", "identical"])
def test_kernel_rounds_no_more_than_pytorch(dtype, keys):
    x = iplr_inputs(1, 40, 2, 16, 8, dtype=dtype, keys=keys)
    exact = type(x)(*(y.double() for y in x))
    d, ways = cotangents(x), [{"backend": b, "mode": "recurrent"} for b in ("triton", "torch")]
    results = []
    for op, data, way in zip(
        [iplr_delta_rule] * 2 + [dplr_oracle], (x, x, exact), [*ways, {}], strict=True
    ):
        out = op(*data[:-1], initial_state=data.initial_state, **way)
        results.append((*out, *gradients(op, data, *d, **way)))
    for name, g, p, w in zip(("o", "state", *(f"d{n}" for n in x._fields)), *results, strict=True):
        assert_rows_close(g, w, rtol=1e-7, rounded=p, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keys", ["unit", "cos0.9", "identical"])
def test_chunks_stay_near_the_token_loop(dtype, keys):
    x = iplr_inputs(1, 300, 2, 32, 16, dtype=dtype, keys=keys)
    way = {"backend": "torch", "mode": "chunk"}
    assert_near_token_loop(iplr_delta_rule, x, keys=keys, beta=None, **way)


# -- growth ------------------------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("factor", [10.0, 1e5])
def test_a_state_that_outgrows_its_dtype_is_told_by_inf_and_nan(backend, mode, factor):
    # along e = b the state is multiplied by `factor` a token; float32 ends at 3.4e38
    x = iplr_inputs(1, 70, 1, 6, 5, dtype=torch.float32, keys="identical")
    e = torch.nn.functional.normalize(x.b, dim=-1)
    x = x._replace(a=(factor - 1) * e + 0.01 * torch.randn_like(e), b=e)
    exact = type(x)(*(y.double() for y in x))
    want = iplr_delta_rule(*exact[:-1], initial_state=exact.initial_state, mode="recurrent").o
    got = iplr_delta_rule(*x[:-1], initial_state=x.initial_state, backend=backend, mode=mode)
    finite, size = got.o.isfinite(), want.abs().flatten(2)[0]
    near = (
        (size.amax(dim=-1) > 1e37).nonzero()[0].item()
    )  # before this token no number is too large
    over = (size.amin(dim=-1) > 3.5e38).nonzero()[0].item()  # here every one is
    C = explain(iplr_delta_rule, *x[:-1], backend=backend, mode=mode).chunk_size
    safe = near - near % C if C else near  # by chunks the whole chunk may be lost
    assert finite[:, :safe].all()
    assert not finite[:, over:].any()
    assert not got.state.isfinite().any()
    # and what is finite is right, in the chunk of the overflow too
    rows = finite.all(dim=-1)
    assert rows[:, :safe].all()
    if rows.any():
        assert_rows_close(got.o[rows], want[rows], rtol=1e-5, name="o")
    d = torch.ones_like(want), torch.ones_like(exact.initial_state)
    grads = gradients(iplr_delta_rule, x, *d, backend=backend, mode=mode)
    assert not grads.initial_state.isfinite().any()


# -- explain -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "options", "way"),
    [
        (16, {}, ("torch", "recurrent", 0, 1, 0)),
        (17, {}, ("torch", "chunk", 32, 1, 0)),
        (17, {"mode": "recurrent"}, ("torch", "recurrent", 0, 1, 0)),
        (17, {"backend": "triton", "mode": "recurrent"}, ("triton", "recurrent", 0, 1, 1)),
        (17, {"backend": "triton"}, ("triton", "chunk", 64, 1, 3)),
    ],
)
def test_explain(T, options, way):
    x = iplr_inputs(1, T, 1, 4, 3)
    assert tuple(explain(iplr_delta_rule, *x[:-1], **options)) == way


def test_float32_takes_the_token_kernels():
    x = iplr_inputs(1, 17, 1, 4, 3, dtype=torch.float32)
    assert explain(iplr_delta_rule, *x[:-1], backend="triton").mode == "recurrent"
    assert explain(iplr_delta_rule, *x[:-1], backend="triton", mode="chunk").chunk_size == 16


def test_auto_takes_what_explain_says():
    x = iplr_inputs(1, 70, 1, 4, 3)
    C = explain(iplr_delta_rule, *x[:-1]).chunk_size
    assert torch.equal(iplr_delta_rule(*x[:-1]).o, iplr_chunkwise(*x[:-1], chunk_size=C).o)
    short = [y[:, :16] for y in x[:-1]]
    assert torch.equal(iplr_delta_rule(*short).o, iplr_recurrence(*short).o)


def test_a_token_of_two_billion_numbers_is_not_taken_by_chunks():
    one = torch.zeros(1, dtype=torch.float64)
    k, few = one.expand(1, 17, 2**24, 64), one.expand(1, 17, 2**20, 1)
    operands, narrow = (k,) * 5, (few,) * 5
    way = {"backend": "triton", "mode": "chunk"}
    assert explain(iplr_delta_rule, *operands, backend="triton").mode == "recurrent"
    with pytest.raises(ValueError, match=r"wants H \* \(K \+ V\) < 33554432, got H = 16777216"):
        explain(iplr_delta_rule, *operands, **way)
    with pytest.raises(ValueError, match=r"wants H < 524288, got H = 1048576"):
        explain(iplr_delta_rule, *narrow, **way)
