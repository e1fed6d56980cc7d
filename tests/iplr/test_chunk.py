"""The chunk kernels of free directions without decay; what every rule promises of them is in tests/test_rules.py."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from gdr_teach import iplr_delta_rule
from gdr_teach.aot import SHARED_LIMIT, SPILL_BUDGET, compile_launch
from gdr_teach.iplr.chunk import call, iplr_chunk, iplr_chunk_backward
from gdr_teach.iplr.reference import iplr_recurrence
from gdr_teach.lifts import delta_to_iplr
from gdr_teach.runtime import poisoned, recorded
from gdr_teach.sanitizer import sanitize
from gdr_teach.testing import (
    HARD,
    IplrInputs,
    as_rows,
    assert_near_token_loop,
    assert_rows_close,
    delta_inputs,
    gradients,
    iplr_inputs,
)

NAMES = ("o", "state", "dq", "dk", "dv", "da", "db", "dstate0")
STAGES = ["prepare", "reads", "scan", "states", "reverse_scan", "values", "keys"]


def run(x, cu=None, C: int = 64):
    """Forward and backward; all results."""
    options = {"initial_state": x.initial_state, "cu_seqlens": cu, "chunk_size": C}
    out = iplr_chunk(*x[:-1], **options)
    do, dstate = torch.ones_like(x.v), torch.ones_like(x.initial_state)
    return (*out, *iplr_chunk_backward(do, *x[:-1], dstate=dstate, **options))


def hold(got, x, cu=None) -> None:
    """Everything against the token loop and its autograd, in float64."""
    options = {"initial_state": x.initial_state, "cu_seqlens": cu}
    ones = torch.ones_like(x.v), torch.ones_like(x.initial_state)
    want = iplr_recurrence(*x[:-1], **options)
    wants = gradients(iplr_delta_rule, x, *ones, cu_seqlens=cu, backend="torch", mode="recurrent")
    for name, g, w in zip(NAMES, got, (*want, *wants), strict=True):
        assert_rows_close(as_rows(g), as_rows(w), rtol=1e-11, name=name)


@pytest.mark.parametrize("keys", ["unit", "cos0.9", "identical"])
@pytest.mark.parametrize("C", [1, 4, 16, 32])
def test_any_chunk_size_gives_the_same(C, keys):
    x = iplr_inputs(2, 11 if C == 1 else 34, 1, 5, 3, keys=keys)
    hold(run(x, C=C), x)


def test_tiles_of_channels_and_columns():
    x = iplr_inputs(1, 17, 1, 70, 90)
    hold(run(x, C=16), x)


@pytest.mark.parametrize("C", [4, 16])
def test_packed_lengths_around_the_chunk(C):
    lengths = [0, 1, C - 1, C, C + 1, 2 * C, 0, 3]
    for order in (lengths, lengths[::-1]):
        cu = torch.tensor([0, *itertools.accumulate(order)])
        x = iplr_inputs(1, sum(order), 2, 4, 3, N=len(order))
        with poisoned(), sanitize():
            got = run(x, cu, C)
        hold(got, x, cu)


@pytest.mark.parametrize("shape", [(2, 21, 2, 7, 5), (1, 17, 1, 20, 90), (2, 0, 1, 4, 3)], ids=str)
def test_every_element_is_written_and_nothing_else_is_touched(shape):
    x = iplr_inputs(*shape)
    want = run(x, C=8)
    with poisoned(), sanitize():
        got = run(x, C=8)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("keys", ["unit", "cos0.9", "identical"])
def test_stays_near_the_token_loop(dtype, keys):
    x = iplr_inputs(1, 70, 1, 64, 32, dtype=dtype, keys=keys)
    way = {"backend": "triton", "mode": "chunk"}
    assert_near_token_loop(iplr_delta_rule, x, keys=keys, beta=None, **way)


@pytest.mark.parametrize(("keys", "beta"), HARD)
def test_the_hard_data_of_the_delta_rule_stay_near_the_token_loop_in_float32(keys, beta):
    # in bfloat16 reflections (beta = 2) err by up to 2e-2 here: delta_rule keeps more digits for them
    x = delta_inputs(1, 70, 1, 64, 32, keys=keys, beta=beta)
    lifted = IplrInputs(*delta_to_iplr(*x[:4]), x.initial_state)
    lifted = IplrInputs(*(y.float() for y in lifted))
    way = {"backend": "triton", "mode": "chunk"}
    assert_near_token_loop(iplr_delta_rule, lifted, keys=keys, beta=beta, **way)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_an_inverse_of_large_entries_leaves_no_digit_behind(dtype):
    # along e the state grows by 1.21 a token, and so do the entries of X, past where the guard looks; q, v and S are
    # small, because Q2 and O0 have to fit into float16 as well
    x = iplr_inputs(1, 64, 1, 16, 16, keys="identical")
    e = x.b / x.b.norm(dim=-1, keepdim=True)
    x = x._replace(a=0.21 * e, b=e, q=0.02 * x.q, v=1e-4 * x.v)
    x = x._replace(initial_state=1e-4 * x.initial_state)
    AB = (x.a[0, :, 0] @ x.b[0, :, 0].mT).tril(-1)
    assert torch.linalg.inv(torch.eye(64).double() - AB).abs().max() > 16384
    x = IplrInputs(*(y.to(dtype) for y in x[:-1]), x.initial_state.float())
    exact = IplrInputs(*(y.double() for y in x))
    want = iplr_recurrence(*exact[:-1], initial_state=exact.initial_state)
    got = iplr_chunk(*x[:-1], initial_state=x.initial_state)
    rtol = {torch.float32: 1e-5}.get(dtype, 1e-2)
    for name, g, w in zip(NAMES, got, want, strict=False):
        assert_rows_close(g, w, rtol=rtol, norm="tensor", name=name)


@pytest.mark.parametrize("growth", [1.25, 1.3, 1.45])
def test_an_inverse_that_fp16_makes_nan_is_made_again(growth):
    # some entries are NaN there and all others small: a maximum that passes over NaN would let them through
    x = iplr_inputs(1, 64, 1, 16, 16, keys="identical")
    e = x.b / x.b.norm(dim=-1, keepdim=True)
    x = x._replace(a=(growth - 1) * e, b=e)
    x = IplrInputs(*(y.bfloat16() for y in x[:-1]), x.initial_state.float())
    exact = IplrInputs(*(y.double() for y in x))
    want = iplr_recurrence(*exact[:-1], initial_state=exact.initial_state)
    got = iplr_chunk(*x[:-1], initial_state=x.initial_state)
    for name, g, w in zip(NAMES, got, want, strict=False):
        assert_rows_close(g, w, rtol=1e-2, norm="tensor", name=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_causality_is_exact(dtype):
    x, other = (iplr_inputs(1, 70, 1, 8, 4, dtype=dtype, seed=seed) for seed in (0, 1))
    before = iplr_chunk(*x[:-1], initial_state=x.initial_state).o
    for t in (1, 9, 33, 69):
        changed = [torch.cat([y[:, :t], z[:, t:]], 1) for y, z in zip(x[:-1], other, strict=False)]
        after = iplr_chunk(*changed, initial_state=x.initial_state).o
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("stage", STAGES)
def test_compiles_for_hopper(stage):
    """K = V = 64 in bfloat16; `make compile-check` has the others."""
    x = iplr_inputs(1, 64, 2, 64, 64, dtype=torch.bfloat16)
    options = {"initial_state": x.initial_state, "cu_seqlens": None, "scale": None}
    with recorded("sm_90") as launches:
        this = call(*x[:-1], **options)
        kept = this.forward()[2]
        this.backward(torch.ones_like(x.v), torch.ones_like(x.initial_state), kept)
    names = [launch.kernel.__name__.removesuffix("_untied_kernel") for launch in launches]
    assert names == [name.replace("states", "scan") for name in STAGES]
    report = compile_launch(launches[STAGES.index(stage)], "sm_90")
    assert report.spilled <= SPILL_BUDGET["sm_90"], report
    assert report.tensor_core > 0
    assert report.shared <= SHARED_LIMIT["sm_90"] // 2, f"not two programs at a time: {report}"
