"""`dplr_delta_rule` where its data is hard: decays, keys, rounding, growth; what all promise: tests/test_rules.py."""

import itertools

import pytest
import torch

from gdr_teach import dplr_delta_rule, explain, gated_delta_rule
from gdr_teach.dplr.reference import dplr_chunkwise, dplr_recurrence
from gdr_teach.lifts import gated_to_dplr
from gdr_teach.testing import (
    DECAYS,
    as_rows,
    assert_near_token_loop,
    assert_rows_close,
    dplr_inputs,
    dplr_oracle,
    gated_inputs,
    gradients,
)

WAYS = list(itertools.product(("torch", "triton"), ("recurrent", "chunk")))
every_way = pytest.mark.parametrize(("backend", "mode"), WAYS, ids=["-".join(w) for w in WAYS])
every_gate = pytest.mark.parametrize("gate", [*DECAYS, "mixed"], ids=str)
every_kind = pytest.mark.parametrize("per", ["head", "channel"])
HARD = {"unit": 1.0, "identical": 2.0, "cos0.9": None}


def cotangents(x):
    return torch.randn_like(x.v).double(), torch.randn_like(x.initial_state).double()


@every_way
@every_gate
@every_kind
def test_gradients_on_hard_data(backend, mode, gate, per):
    for keys, beta in HARD.items():
        x = dplr_inputs(1, 20, 1, 6, 5, keys=keys, beta=beta, per=per, log_decay=gate)
        d = cotangents(x)
        found = gradients(dplr_delta_rule, x, *d, backend=backend, mode=mode)
        for name, g, w in zip(x._fields, found, gradients(dplr_oracle, x, *d), strict=True):
            assert_rows_close(as_rows(g), as_rows(w), rtol=1e-11, name=f"d{name} at {keys}")


@every_way
def test_zero_keys_and_zero_directions(backend, mode):
    x = dplr_inputs(1, 20, 1, 6, 5, log_decay="mixed", keys="zero")  # then a and b are zero too
    for case in (x, x._replace(a=torch.randn_like(x.a)), x._replace(b=torch.randn_like(x.b))):
        d = cotangents(case)
        found = gradients(dplr_delta_rule, case, *d, backend=backend, mode=mode)
        for name, g, w in zip(x._fields, found, gradients(dplr_oracle, case, *d), strict=True):
            assert_rows_close(as_rows(g), as_rows(w), rtol=1e-11, name=f"d{name}")


@every_way
@every_kind
def test_the_gradient_of_a_reset_is_zero(backend, mode, per):
    x = dplr_inputs(1, 70 if backend == "torch" else 20, 1, 4, 3, per=per)
    x.log_decay[:, 7] = -torch.inf
    x.log_decay[:, 9] = -1e4
    got = gradients(dplr_delta_rule, x, *cotangents(x), backend=backend, mode=mode)
    assert not got.log_decay[:, [7, 9]].any()
    assert got.log_decay[:, 8].any()
    assert all(g.isfinite().all() for g in got)


@every_way
@every_kind
def test_the_gated_rule_is_a_special_case(backend, mode, per):
    x = gated_inputs(1, 20, 2, 6, 5, per=per)
    way = {"initial_state": x.initial_state, "backend": backend, "mode": mode}
    want = gated_delta_rule(*x[:-1], **way)
    got = dplr_delta_rule(*gated_to_dplr(*x[:-1]), **way)
    assert_rows_close(got.o, want.o, rtol=1e-12, name="o")
    assert_rows_close(got.state, want.state, rtol=1e-12, name="state")


# -- rounding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_kind
@pytest.mark.parametrize("gate", [None, -0.6065, -5.0, -20.0, "mixed"], ids=str)
def test_kernel_rounds_no_more_than_pytorch(dtype, per, gate):
    # six states: after a strong decay the error of one is little more than a single number, that of its last u
    x = dplr_inputs(3, 12, 2, 16, 8, dtype=dtype, keys="cos0.9", per=per, log_decay=gate)
    x = x._replace(log_decay=x.log_decay.float())  # float16 has no gradient of a strong decay
    exact = type(x)(*(y.double() for y in x))
    d, ways = cotangents(x), [{"backend": b, "mode": "recurrent"} for b in ("triton", "torch")]
    results = []
    for op, data, way in zip(
        [dplr_delta_rule] * 2 + [dplr_oracle], (x, x, exact), [*ways, {}], strict=True
    ):
        out = op(*data[:-1], initial_state=data.initial_state, **way)
        results.append((*out, *gradients(op, data, *d, **way)))
    for name, *gpw in zip(("o", "state", *(f"d{n}" for n in x._fields)), *results, strict=True):
        # a row is what one error is measured by: where a token has one number, the numbers of a head over time
        g, p, w = (y.transpose(1, 2) if y.dim() == 3 else y for y in gpw)
        assert_rows_close(g, w, rtol=1e-7, rounded=p, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_gate
@pytest.mark.parametrize("keys", ["unit", "cos0.9", "identical"])
def test_chunks_stay_near_the_token_loop(dtype, gate, keys):
    x = dplr_inputs(1, 200, 2, 32, 16, dtype=dtype, keys=keys, log_decay=gate)
    x = x._replace(log_decay=x.log_decay.float()) if dtype == torch.float16 else x
    way = {"backend": "torch", "mode": "chunk"}
    assert_near_token_loop(dplr_delta_rule, x, keys=keys, beta=None, **way)


@pytest.mark.parametrize(("backend", "mode"), WAYS[1:])
@pytest.mark.parametrize("gate", [-5.0, -20.0, -60.0])
def test_the_gradient_of_a_strong_decay_keeps_its_digits(backend, mode, gate):
    # relative to itself, which is e^gate times smaller than q * dq: as a difference of sums it would be noise
    x = dplr_inputs(1, 40, 1, 8, 8, dtype=torch.float32, log_decay=gate)
    exact = type(x)(*(y.double() for y in x))
    d = cotangents(x)
    want = gradients(dplr_oracle, exact, *d).log_decay
    got = gradients(dplr_delta_rule, x, *d, backend=backend, mode=mode).log_decay
    assert 0 < want.abs().max() < 1e3 * torch.tensor(gate).exp()
    assert_rows_close(got, want, rtol=1e-5, name="dlog_decay")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gates_may_stay_in_float32(dtype):
    x = dplr_inputs(1, 20, 1, 4, 3, dtype=dtype)
    gate = torch.full_like(x.log_decay, -0.1, dtype=torch.float32)  # not a number of either dtype
    for backend, mode in WAYS:
        got = dplr_delta_rule(*x[:5], gate, backend=backend, mode=mode).o
        rounded = dplr_delta_rule(*x[:5], gate.to(dtype), backend=backend, mode=mode).o
        want = dplr_oracle(*x[:5], gate).o
        if (backend, mode) == ("triton", "chunk"):  # its operands' rounding is as large
            assert not torch.equal(got, rounded)
        else:
            assert (got - want).norm() < (rounded - want).norm()


# -- the promise -------------------------------------------------------------------------------------------------------


@every_way
def test_a_promise_changes_no_bit(backend, mode):
    x = dplr_inputs(1, 20, 2, 4, 3, dtype=torch.float32)
    free, bound = (
        dplr_delta_rule(*x[:-1], backend=backend, mode=mode, min_log_decay=m) for m in (None, -1)
    )
    assert torch.equal(free.o, bound.o)
    assert torch.equal(free.state, bound.state)


@every_way
def test_a_broken_promise_is_told(backend, mode):
    x = dplr_inputs(1, 20, 2, 4, 3)
    x.log_decay[0, 3, 1, 2] = -1.5
    want = r"log_decay must be >= min_log_decay = -1\.25, got -1\.5 at \[0, 3, 1, 2\]"
    with pytest.raises(ValueError, match=want):
        dplr_delta_rule(*x[:-1], backend=backend, mode=mode, min_log_decay=-1.25)


# -- growth ------------------------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("factor", [10.0, 1e5])
def test_a_state_that_outgrows_its_dtype_is_told_by_inf_and_nan(backend, mode, factor):
    # along e = b the state is multiplied by `factor` a token; float32 ends at 3.4e38
    x = dplr_inputs(1, 70, 1, 6, 5, dtype=torch.float32, keys="identical", log_decay=-0.1)
    e = torch.nn.functional.normalize(x.b, dim=-1)
    x = x._replace(a=(factor - 1) * e + 0.01 * torch.randn_like(e), b=e)
    exact = type(x)(*(y.double() for y in x))
    want = dplr_delta_rule(*exact[:-1], initial_state=exact.initial_state, mode="recurrent").o
    got = dplr_delta_rule(*x[:-1], initial_state=x.initial_state, backend=backend, mode=mode)
    finite, size = got.o.isfinite(), want.abs().flatten(2)[0]
    near = (
        (size.amax(dim=-1) > 1e37).nonzero()[0].item()
    )  # before this token no number is too large
    over = (size.amin(dim=-1) > 3.5e38).nonzero()[0].item()  # here every one is
    C = explain(dplr_delta_rule, *x[:-1], backend=backend, mode=mode).chunk_size
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
    grads = gradients(dplr_delta_rule, x, *d, backend=backend, mode=mode)
    assert not grads.initial_state.isfinite().any()


# -- explain -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "options", "way"),
    [
        (16, {}, ("torch", "recurrent", 0, 1, 0)),
        (17, {}, ("torch", "chunk", 32, 1, 0)),
        (17, {"mode": "recurrent", "min_log_decay": -5}, ("torch", "recurrent", 0, 1, 0)),
        (17, {"backend": "triton", "mode": "recurrent"}, ("triton", "recurrent", 0, 1, 1)),
        (17, {"backend": "triton"}, ("triton", "chunk", 64, 1, 3)),
    ],
)
def test_explain(T, options, way):
    x = dplr_inputs(1, T, 1, 4, 3)
    assert tuple(explain(dplr_delta_rule, *x[:-1], **options)) == way


def test_float32_takes_the_token_kernels():
    x = dplr_inputs(1, 17, 1, 4, 3, dtype=torch.float32)
    assert explain(dplr_delta_rule, *x[:-1], backend="triton").mode == "recurrent"
    assert explain(dplr_delta_rule, *x[:-1], backend="triton", mode="chunk").chunk_size == 16


def test_auto_takes_what_explain_says():
    x = dplr_inputs(1, 70, 1, 4, 3)
    C = explain(dplr_delta_rule, *x[:-1]).chunk_size
    assert torch.equal(dplr_delta_rule(*x[:-1]).o, dplr_chunkwise(*x[:-1], chunk_size=C).o)
    short = [y[:, :16] for y in x[:-1]]
    assert torch.equal(dplr_delta_rule(*short).o, dplr_recurrence(*short).o)


def test_a_token_of_two_billion_numbers_is_not_taken_by_chunks():
    one = torch.zeros(1, dtype=torch.float64)
    k, few = one.expand(1, 17, 2**24, 64), one.expand(1, 17, 2**20, 1)
    operands, narrow = (k,) * 6, (few,) * 6
    way = {"backend": "triton", "mode": "chunk"}
    assert explain(dplr_delta_rule, *operands, backend="triton").mode == "recurrent"
    with pytest.raises(ValueError, match=r"wants H \* \(K \+ V\) < 33554432, got H = 16777216"):
        explain(dplr_delta_rule, *operands, **way)
    with pytest.raises(ValueError, match=r"wants H < 524288, got H = 1048576"):
        explain(dplr_delta_rule, *narrow, **way)
