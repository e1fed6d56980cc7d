"""`gated_delta_rule` where its data is hard: decays, keys, rounding; what all rules promise: tests/test_rules.py."""

import itertools

import pytest
import torch

from gdr_teach import explain, gated_delta_rule, value_checks
from gdr_teach.arguments import check_log_decay_values
from gdr_teach.gated.reference import gated_chunkwise, gated_recurrence
from gdr_teach.testing import (
    DECAYS,
    as_rows,
    assert_rows_close,
    gated_inputs,
    gated_oracle,
    gradients,
)

WAYS = list(itertools.product(("torch", "triton"), ("recurrent", "chunk")))
every_way = pytest.mark.parametrize(("backend", "mode"), WAYS, ids=["-".join(w) for w in WAYS])
every_gate = pytest.mark.parametrize("gate", [*DECAYS, "mixed"], ids=str)
every_kind = pytest.mark.parametrize("per", ["head", "channel"])


def rounded_inputs(*sizes, dtype, **options):
    """Inputs in dtype; the gate in float32 beside float16, which has no number as small as a strong gate's gradient."""
    x = gated_inputs(*sizes, dtype=dtype, **options)
    return x._replace(log_decay=x.log_decay.float()) if dtype == torch.float16 else x


def exactly(x):
    """The inputs in float64, and gradients for o and state."""
    x = type(x)(*(y.double() for y in x))
    return x, (torch.randn_like(x.v), torch.randn_like(x.initial_state))


@every_way
@every_gate
@every_kind
@pytest.mark.parametrize("keys", ["unit", "identical", "cos0.9"])
def test_gradients_on_hard_data(backend, mode, gate, per, keys):
    beta = {"unit": 1.0, "identical": 2.0, "cos0.9": None}[keys]
    x = gated_inputs(1, 20, 1, 6, 5, keys=keys, beta=beta, per=per, log_decay=gate)
    _, d = exactly(x)
    found = gradients(gated_delta_rule, x, *d, backend=backend, mode=mode)
    for name, g, w in zip(x._fields, found, gradients(gated_oracle, x, *d), strict=True):
        assert_rows_close(as_rows(g), as_rows(w), rtol=1e-11, name=f"d{name}")


@every_way
def test_zero_keys_and_zero_steps(backend, mode):
    for options in ({"keys": "zero"}, {"beta": 0.0}):
        x = gated_inputs(1, 20, 1, 6, 5, log_decay="mixed", **options)
        _, d = exactly(x)
        found = gradients(gated_delta_rule, x, *d, backend=backend, mode=mode)
        for name, g, w in zip(x._fields, found, gradients(gated_oracle, x, *d), strict=True):
            assert_rows_close(as_rows(g), as_rows(w), rtol=1e-11, name=f"d{name}")


@every_way
@every_kind
def test_the_gradient_of_a_reset_is_zero(backend, mode, per):
    x = gated_inputs(1, 70 if backend == "torch" else 20, 1, 4, 3, per=per)
    x.log_decay[:, 7] = -torch.inf
    x.log_decay[:, 9] = -1e4
    got = gradients(gated_delta_rule, x, *exactly(x)[1], backend=backend, mode=mode)
    assert not got.log_decay[:, [7, 9]].any()
    assert got.log_decay[:, 8].any()
    assert all(g.isfinite().all() for g in got)


# -- rounding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_kind
@pytest.mark.parametrize("gate", [None, -0.6065, -5.0, -20.0, "mixed"], ids=str)
def test_kernel_rounds_no_more_than_pytorch(dtype, per, gate):
    x = rounded_inputs(1, 36, 2, 16, 8, dtype=dtype, keys="cos0.9", per=per, log_decay=gate)
    plain_way, way = ({"backend": b, "mode": "recurrent"} for b in ("torch", "triton"))
    want = gated_oracle(*x[:-1], initial_state=x.initial_state)
    plain = gated_delta_rule(*x[:-1], initial_state=x.initial_state, **plain_way)
    got = gated_delta_rule(*x[:-1], initial_state=x.initial_state, **way)
    for name in ("o", "state"):
        g, p, w = (getattr(out, name) for out in (got, plain, want))
        assert_rows_close(g, w, rtol=1e-7, rounded=p, name=name)
    exact, d = exactly(x)
    triple = (
        gradients(gated_delta_rule, x, *d, **way),
        gradients(gated_delta_rule, x, *d, **plain_way),
        gradients(gated_oracle, exact, *d),
    )
    for name, *gpw in zip(x._fields, *triple, strict=True):
        # a row is what one error is measured by: where a token has one number, the numbers of a head over time
        g, p, w = (y.transpose(1, 2) if y.dim() == 3 else y for y in gpw)
        assert_rows_close(g, w, rtol=1e-7, rounded=p, name=f"d{name}")


NORMWISE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.mark.parametrize("dtype", NORMWISE, ids=str)
@every_gate
@pytest.mark.parametrize("keys", ["unit", "cos0.9", "identical"])
def test_chunks_stay_near_the_token_loop(dtype, gate, keys):
    x = rounded_inputs(1, 200, 2, 32, 16, dtype=dtype, keys=keys, beta=1.0, log_decay=gate)
    exact, d = exactly(x)
    options = {"rtol": NORMWISE[dtype], "norm": "tensor"}
    want = gated_recurrence(*exact[:-1], initial_state=exact.initial_state)
    got = gated_delta_rule(*x[:-1], initial_state=x.initial_state, backend="torch", mode="chunk")
    assert_rows_close(got.o, want.o, name="o", **options)
    assert_rows_close(got.state, want.state, name="state", **options)
    wants = gradients(gated_delta_rule, exact, *d, backend="torch", mode="recurrent")
    found = gradients(gated_delta_rule, x, *d, backend="torch", mode="chunk")
    for name, g, w in zip(x._fields, found, wants, strict=True):
        assert_rows_close(as_rows(g), as_rows(w), name=f"d{name}", **options)


@pytest.mark.parametrize(("backend", "mode"), WAYS[1:])
@pytest.mark.parametrize("gate", [-5.0, -20.0, -60.0])
def test_the_gradient_of_a_strong_decay_keeps_its_digits(backend, mode, gate):
    # relative to itself, which is e^gate times smaller than q * dq: as a difference of sums it would be noise
    x = gated_inputs(1, 40, 1, 8, 8, dtype=torch.float32, log_decay=gate)
    exact, d = exactly(x)
    want = gradients(gated_oracle, exact, *d).log_decay
    got = gradients(gated_delta_rule, x, *d, backend=backend, mode=mode).log_decay
    assert 0 < want.abs().max() < 1e2 * torch.tensor(gate).exp()
    assert_rows_close(got, want, rtol=1e-5, name="dlog_decay")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gates_may_stay_in_float32(dtype):
    x = gated_inputs(1, 20, 1, 4, 3, dtype=dtype)
    gate = torch.full_like(x.log_decay, -0.1, dtype=torch.float32)  # not a number of either dtype
    for backend, mode in WAYS:
        got = gated_delta_rule(*x[:4], gate, backend=backend, mode=mode).o
        rounded = gated_delta_rule(*x[:4], gate.to(dtype), backend=backend, mode=mode).o
        want = gated_oracle(*x[:4], gate).o
        if (backend, mode) == ("triton", "chunk"):  # its operands' rounding is as large
            assert not torch.equal(got, rounded)
        else:
            assert (got - want).norm() < (rounded - want).norm()


# -- the promise -------------------------------------------------------------------------------------------------------


@every_way
def test_a_promise_changes_no_bit(backend, mode):
    x = gated_inputs(1, 20, 2, 4, 3, dtype=torch.float32)
    free, bound = (
        gated_delta_rule(*x[:-1], backend=backend, mode=mode, min_log_decay=m) for m in (None, -1)
    )
    assert torch.equal(free.o, bound.o)
    assert torch.equal(free.state, bound.state)


@every_way
def test_a_broken_promise_is_told(backend, mode):
    x = gated_inputs(1, 20, 2, 4, 3)
    x.log_decay[0, 3, 1, 2] = -1.5
    want = r"log_decay must be >= min_log_decay = -1\.25, got -1\.5 at \[0, 3, 1, 2\]"
    with pytest.raises(ValueError, match=want):
        gated_delta_rule(*x[:-1], backend=backend, mode=mode, min_log_decay=-1.25)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gate_at_the_bound_keeps_the_promise(dtype):
    # -0.6065 rounds to a number below itself in two of the three
    x = gated_inputs(1, 3, 1, 2, 2, dtype=dtype, log_decay=-0.6065)
    gated_delta_rule(*x[:-1], min_log_decay=-0.6065)


def test_gates_on_a_device_are_looked_at_only_when_asked():
    """CUDA tensors without a GPU: a stand-in that says where it lives and cannot be looked at."""

    class Far:
        device = torch.device("cuda")

        def __le__(self, other):
            raise LookupError

    check_log_decay_values("gated_delta_rule", Far(), None)
    with value_checks(), pytest.raises(LookupError):
        check_log_decay_values("gated_delta_rule", Far(), None)


# -- explain -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "options", "way"),
    [
        (16, {}, ("torch", "recurrent", 0, 1, 0)),
        (17, {}, ("torch", "chunk", 32, 1, 0)),
        (17, {"mode": "recurrent", "min_log_decay": -5}, ("torch", "recurrent", 0, 1, 0)),
        (17, {"backend": "triton", "mode": "recurrent"}, ("triton", "recurrent", 0, 1, 1)),
        (17, {"backend": "triton"}, ("triton", "chunk", 64, 1, 2)),
    ],
)
def test_explain(T, options, way):
    x = gated_inputs(1, T, 1, 4, 3)
    assert tuple(explain(gated_delta_rule, *x[:-1], **options)) == way


def test_auto_takes_what_explain_says():
    x = gated_inputs(1, 70, 1, 4, 3)
    C = explain(gated_delta_rule, *x[:-1]).chunk_size
    assert torch.equal(gated_delta_rule(*x[:-1]).o, gated_chunkwise(*x[:-1], chunk_size=C).o)
    short = [y[:, :16] for y in x[:-1]]
    assert torch.equal(gated_delta_rule(*short).o, gated_recurrence(*short).o)
