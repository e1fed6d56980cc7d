"""The chunk kernels with decay; what every rule promises of them is in tests/test_rules.py."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from gdr_teach import gated_delta_rule
from gdr_teach.aot import SHARED_LIMIT, SPILL_BUDGET, compile_launch
from gdr_teach.chunkwise.tiles import levels
from gdr_teach.gated.chunk import call, gated_chunk, gated_chunk_backward
from gdr_teach.gated.reference import gated_recurrence
from gdr_teach.runtime import poisoned, recorded
from gdr_teach.sanitizer import sanitize
from gdr_teach.testing import (
    DECAYS,
    as_rows,
    assert_near_token_loop,
    assert_rows_close,
    gated_inputs,
    gradients,
)

NAMES = ("o", "state", "dq", "dk", "dv", "dbeta", "dlog_decay", "dstate0")
STAGES = ["prepare", "scan", "states", "reverse_scan", "grads"]
every_gate = pytest.mark.parametrize("gate", [None, "mixed", *DECAYS], ids=str)
every_kind = pytest.mark.parametrize("per", ["head", "channel"])


def run(x, cu=None, C: int = 64):
    """Forward and backward; all results."""
    options = {"initial_state": x.initial_state, "cu_seqlens": cu, "chunk_size": C}
    out = gated_chunk(*x[:-1], **options)
    do, dstate = torch.ones_like(x.v), torch.ones_like(x.initial_state)
    return (*out, *gated_chunk_backward(do, *x[:-1], dstate=dstate, **options))


def hold(got, x, cu=None) -> None:
    """Everything against the token loop and its autograd, in float64."""
    options = {"initial_state": x.initial_state, "cu_seqlens": cu}
    ones = torch.ones_like(x.v), torch.ones_like(x.initial_state)
    want = gated_recurrence(*x[:-1], **options)
    wants = gradients(gated_delta_rule, x, *ones, cu_seqlens=cu, backend="torch", mode="recurrent")
    for name, g, w in zip(NAMES, got, (*want, *wants), strict=True):
        assert_rows_close(as_rows(g), as_rows(w), rtol=1e-11, name=name)


@every_kind
@every_gate
@pytest.mark.parametrize("C", [1, 2, 8, 16, 32])
def test_any_chunk_size_gives_the_same(C, gate, per):
    keys, beta = {1: ("unit", None), 2: ("cos0.9", 1.0)}.get(C, ("identical", 2.0))
    sizes = (
        (1, 11, 1, 5, 3) if C < 8 else (2, 19, 1, 5, 3)
    )  # a program a chunk: small ones are many
    x = gated_inputs(*sizes, keys=keys, beta=beta, per=per, log_decay=gate)
    hold(run(x, C=C), x)


def test_tiles_of_channels_and_columns():
    x = gated_inputs(1, 17, 1, 70, 90, log_decay="mixed")
    hold(run(x, C=16), x)


@pytest.mark.parametrize("C", [4, 16])
def test_packed_lengths_around_the_chunk(C):
    lengths = [0, 1, C - 1, C, C + 1, 2 * C, 0, 3]
    for order in (lengths, lengths[::-1]):
        cu = torch.tensor([0, *itertools.accumulate(order)])
        x = gated_inputs(1, sum(order), 2, 4, 3, N=len(order), log_decay="mixed")
        with poisoned(), sanitize():
            got = run(x, cu, C)
        hold(got, x, cu)


@every_kind
@pytest.mark.parametrize("shape", [(2, 21, 2, 7, 5), (1, 17, 1, 20, 90), (2, 0, 1, 4, 3)], ids=str)
def test_every_element_is_written_and_nothing_else_is_touched(shape, per):
    x = gated_inputs(*shape, per=per)
    want = run(x, C=8)
    with poisoned(), sanitize():
        got = run(x, C=8)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def rounded(*sizes, dtype, **options):
    """Inputs in dtype; the gate in float32 beside float16, which has no number as small as a strong gate's gradient."""
    x = gated_inputs(*sizes, dtype=dtype, **options)
    return x._replace(log_decay=x.log_decay.float()) if dtype == torch.float16 else x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@every_gate
def test_stays_near_the_token_loop(dtype, gate):
    keys, beta = ("identical", 2.0) if gate in (0.0, "mixed") else ("cos0.9", 1.0)
    x = rounded(1, 70, 1, 64, 32, dtype=dtype, keys=keys, beta=beta, log_decay=gate)
    way = {"backend": "triton", "mode": "chunk"}
    assert_near_token_loop(gated_delta_rule, x, keys=keys, beta=beta, **way)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gate", [-0.6065, -5.0])
def test_a_promise_changes_no_more_than_rounding(dtype, gate):
    x = rounded(1, 70, 1, 64, 32, dtype=dtype, log_decay=gate)
    way = {"backend": "triton", "mode": "chunk", "min_log_decay": gate}
    assert_near_token_loop(gated_delta_rule, x, keys="unit", beta=None, **way)


def test_a_promise_saves_halvings():
    assert levels(torch.bfloat16, 64, None)[0] == 3
    assert levels(torch.bfloat16, 64, -5.0)[0] == 2
    assert levels(torch.bfloat16, 64, -0.6065)[0] == 0
    assert levels(torch.float32, 64, -0.6065)[0] == 6  # every digit is wanted


@pytest.mark.parametrize("gate", [-5.0, -20.0])
def test_the_gradient_of_a_strong_decay_keeps_its_digits_in_bfloat16(gate):
    # of its own length, which is exp(gate) times smaller than that of q * dq
    x = gated_inputs(1, 40, 1, 16, 16, dtype=torch.bfloat16, log_decay=gate)
    exact = type(x)(*(y.double() for y in x))
    do, dstate = torch.randn_like(exact.v), torch.randn_like(exact.initial_state)
    got = gradients(gated_delta_rule, x, do, dstate, backend="triton", mode="chunk").log_decay
    want = gradients(gated_delta_rule, exact, do, dstate, mode="recurrent").log_decay
    assert_rows_close(got, want, rtol=1e-2, norm="tensor", name="dlog_decay")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_causality_is_exact(dtype):
    x, other = (
        gated_inputs(1, 70, 1, 8, 4, dtype=dtype, seed=seed, log_decay="mixed") for seed in (0, 1)
    )
    before = gated_chunk(*x[:-1], initial_state=x.initial_state).o
    for t in (1, 9, 33, 69):
        changed = [torch.cat([y[:, :t], z[:, t:]], 1) for y, z in zip(x[:-1], other, strict=False)]
        after = gated_chunk(*changed, initial_state=x.initial_state).o
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("stage", STAGES)
def test_compiles_for_hopper(stage):
    """K = V = 64 in bfloat16; `make compile-check` has the others."""
    x = gated_inputs(1, 64, 2, 64, 64, dtype=torch.bfloat16)
    options = {"initial_state": x.initial_state, "cu_seqlens": None, "scale": None}
    with recorded("sm_90") as launches:
        this = call(*x[:-1], **options)
        kept = this.forward()[2]
        this.backward(torch.ones_like(x.v), torch.ones_like(x.initial_state), kept)
    names = [launch.kernel.__name__.removesuffix("_tied_kernel") for launch in launches]
    assert names == ["prepare", "scan", "scan", "reverse_scan", "grads"]
    report = compile_launch(launches[STAGES.index(stage)], "sm_90")
    assert report.spilled <= SPILL_BUDGET["sm_90"], report
    assert report.tensor_core > 0
    assert report.shared <= SHARED_LIMIT["sm_90"] // 2, f"not two programs at a time: {report}"
