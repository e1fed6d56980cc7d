"""The token-by-token kernels themselves: what they write, read and ask of a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from gdr_teach.aot import SHARED_LIMIT, TARGETS, compile_launch
from gdr_teach.gated import recurrent
from gdr_teach.gated.recurrent import gated_recurrent, gated_recurrent_backward, segment_length
from gdr_teach.runtime import poisoned, recorded
from gdr_teach.sanitizer import sanitize
from gdr_teach.testing import gated_inputs

SPILL_BUDGET = 32  # bytes a thread: the backward in float32 at 168 registers, 24 measured


def run(x, cu=None):
    """Forward and backward; all results."""
    options = {"initial_state": x.initial_state, "cu_seqlens": cu}
    out = gated_recurrent(*x[:-1], **options)
    do, dstate = torch.ones_like(x.v), torch.ones_like(x.initial_state)
    return (*out, *gated_recurrent_backward(do, *x[:-1], dstate=dstate, **options))


CASES = {
    "dense": (gated_inputs(2, 5, 3, 7, 4), None),
    "per head": (gated_inputs(2, 5, 3, 7, 4, per="head"), None),
    "tiles of V": (gated_inputs(1, 3, 1, 100, 90), None),
    "segments": (gated_inputs(1, 35, 2, 4, 3), None),
    "packed": (gated_inputs(1, 9, 2, 4, 3, N=4), torch.tensor([0, 3, 3, 4, 9])),
    "packed segments": (
        gated_inputs(1, 70, 1, 4, 3, N=5),
        torch.tensor([0, 16, 16, 33, 64, 70]),
    ),
    "no token": (gated_inputs(2, 0, 1, 4, 3), None),
}


@pytest.mark.parametrize("case", CASES)
def test_every_element_is_written_and_nothing_else_is_touched(case):
    x, cu = CASES[case]
    want = run(x, cu)
    with poisoned(), sanitize():
        got = run(x, cu)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("kernel", ["gated_forward_kernel", "gated_backward_kernel"])
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


def test_segments_are_about_as_many_as_they_are_long():
    assert [segment_length(T) for T in (0, 1, 16, 256, 257, 1024, 4096)] == [16, 16, 16, 16, 16, 32, 64]  # fmt: skip
    for T in (1000, 10_000, 123_456):
        assert segment_length(T) + T / segment_length(T) <= 3 * T**0.5


ON_HOPPER = [("sm_90", dtype, D) for dtype in ("bfloat16", "float16", "float32") for D in (64, 128, 256)]  # fmt: skip
ELSEWHERE = [(t, dtype, 128) for t in TARGETS if t != "sm_90" for dtype in ("bfloat16", "float32")]


@pytest.mark.parametrize(
    ("target", "dtype", "D", "per"),
    [(*case, "channel") for case in ON_HOPPER + ELSEWHERE]
    + [(target, "bfloat16", 128, "head") for target in TARGETS],
)
def test_compiles_within_the_budget(target, dtype, D, per):
    x = gated_inputs(1, 2, 2, D, D, dtype=getattr(torch, dtype), per=per)
    with recorded() as launches:
        run(x, torch.tensor([0, 2]))
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["gated_forward_kernel", "gated_forward_kernel", "gated_backward_kernel"]
    for launch in launches:
        report = compile_launch(launch, target)
        assert report.spilled <= SPILL_BUDGET, report
        assert report.shared <= SHARED_LIMIT[target], report
        assert 0 < report.registers <= 255, report


def test_rows_beyond_two_to_the_31():
    """A document that starts at token 2^31, in memory that is mapped and never touched before it."""
    start, T = 2**31, 2**31 + 3
    x = gated_inputs(1, 3, 1, 1, 1, dtype=torch.float16)
    far = [torch.empty(1, T, *y.shape[2:], dtype=y.dtype) for y in x[:-1]]
    for big, y in zip(far, x[:-1], strict=True):
        big[:, start:] = y
    got = gated_recurrent(*far, initial_state=x.initial_state, cu_seqlens=torch.tensor([start, T]))
    want = gated_recurrent(*x[:-1], initial_state=x.initial_state)
    assert torch.equal(got.o[:, start:], want.o)
    assert torch.equal(got.state, want.state)


def test_many_heads_need_one_grid_axis():
    # the first axis of a grid may have 2^31 - 1 programs, the others 65,535
    with recorded() as launches:
        run(gated_inputs(1, 1, 70_000, 1, 1))
    assert [launch.grid for launch in launches] == [(70_000,)] * 3
