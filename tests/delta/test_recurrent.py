"""The token-by-token kernels themselves: what they write, read and ask of a GPU."""

import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl

from gdr_teach.aot import SHARED_LIMIT, TARGETS, compile_launch
from gdr_teach.delta import recurrent
from gdr_teach.delta.recurrent import delta_recurrent, delta_recurrent_backward, tile
from gdr_teach.runtime import kernel, poisoned, recorded
from gdr_teach.sanitizer import sanitize
from gdr_teach.testing import delta_inputs

SPILL_BUDGET = 16  # bytes a thread


def run(x, cu=None):
    """Forward and backward; all results."""
    options = {"initial_state": x.initial_state, "cu_seqlens": cu}
    out = delta_recurrent(*x[:4], **options)
    do, dstate = torch.ones_like(x.v), torch.ones_like(x.initial_state)
    return (*out, *delta_recurrent_backward(do, *x[:4], dstate=dstate, **options))


CASES = {
    "dense": (delta_inputs(2, 5, 3, 7, 4), None),
    "tiles of V": (delta_inputs(1, 3, 1, 100, 90), None),
    "packed": (delta_inputs(1, 9, 2, 4, 3, N=4), torch.tensor([0, 3, 3, 4, 9])),
    "no token": (delta_inputs(2, 0, 1, 4, 3), None),
}


@pytest.mark.parametrize("case", CASES)
def test_every_element_is_written_and_nothing_else_is_touched(case):
    x, cu = CASES[case]
    want = run(x, cu)
    with poisoned(), sanitize():
        got = run(x, cu)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_poison_is_seen_when_a_store_is_missing(monkeypatch):
    # the check above can fail: without the launch, the NaN stay
    class NoLaunch:
        def __getitem__(self, grid):
            return lambda *args: None

    x, _ = CASES["dense"]
    monkeypatch.setattr(recurrent, "delta_forward_kernel", NoLaunch())
    with poisoned():
        out = delta_recurrent(*x[:4])
    assert out.o.isnan().all()
    assert out.state.isnan().all()


@pytest.mark.parametrize("K", [1, 3, 16, 64, 100, 128, 200, 256])
@pytest.mark.parametrize("V", [1, 5, 16, 64, 100, 128, 200, 256])
def test_tiles_cover_the_state(K, V):
    BK, BV, NV = tile(K, V)
    assert BK >= K
    assert BV * NV >= V
    assert BV * (NV - 1) < V
    assert BK * BV <= 8192
    assert BK & (BK - 1) == 0
    assert BV & (BV - 1) == 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_compiles_within_the_budget(target, dtype, D):
    x = delta_inputs(1, 2, 2, D, D, dtype=dtype)
    with recorded() as launches:
        run(x, torch.tensor([0, 2]))
        run(x._replace(initial_state=torch.zeros(1, 2, D, D)))
    names = [launch.kernel.__name__ for launch in launches]
    assert names[:4] == [
        "delta_forward_kernel",
        "delta_forward_kernel",
        "delta_reverse_kernel",
        "delta_replay_kernel",
    ]
    for launch in launches:
        report = compile_launch(launch, target)
        assert report.spilled <= SPILL_BUDGET, report
        assert report.shared <= SHARED_LIMIT[target], report
        assert 0 < report.registers <= 255, report


def test_rows_beyond_two_to_the_31():
    """A document that starts at token 2^31, in memory that is mapped and never touched before it."""
    start, T = 2**31, 2**31 + 3
    x = delta_inputs(1, 3, 1, 1, 1, dtype=torch.float16)
    far = [torch.empty(1, T, *y.shape[2:], dtype=y.dtype) for y in x[:4]]
    for big, y in zip(far, x[:4], strict=True):
        big[:, start:] = y
    got = delta_recurrent(*far, initial_state=x.initial_state, cu_seqlens=torch.tensor([start, T]))
    want = delta_recurrent(*x[:4], initial_state=x.initial_state)
    assert torch.equal(got.o[:, start:], want.o)
    assert torch.equal(got.state, want.state)


@kernel
def place_kernel(p_out, T, H):
    """The first row of every sequence of a dense batch."""
    _, _, row, _ = recurrent.program_place(None, T, H, 1, False)
    tl.store(p_out + tl.program_id(0), row)


def test_rows_of_a_dense_batch_beyond_two_to_the_31():
    rows = torch.zeros(3, dtype=torch.int64)
    place_kernel[(3,)](rows, 2**30, 1)
    assert rows.tolist() == [0, 2**30, 2**31]


def test_many_heads_need_one_grid_axis():
    # the first axis of a grid may have 2^31 - 1 programs, the others 65,535
    x = delta_inputs(1, 1, 70_000, 1, 1)
    with recorded() as launches:
        run(x)
    assert [launch.grid for launch in launches] == [(70_000,)] * 4
