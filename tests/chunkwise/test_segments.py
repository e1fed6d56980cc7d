"""Segments: the same numbers as the ordinary call, whatever the lengths, and the same bits alone and packed."""

import functools
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from gdr_teach import delta_rule, dplr_delta_rule, gated_delta_rule, iplr_delta_rule
from gdr_teach.aot import SHARED_LIMIT, SPILL_BUDGET, TARGETS, compile_launch
from gdr_teach.chunkwise.segments import SHORTEST, combine_kernel, cut
from gdr_teach.chunkwise.tied import TiedCall
from gdr_teach.delta import chunk as delta_chunk
from gdr_teach.dplr import chunk as dplr_chunk
from gdr_teach.gated import chunk as gated_chunk
from gdr_teach.iplr import chunk as iplr_chunk
from gdr_teach.runtime import poisoned, recorded
from gdr_teach.sanitizer import sanitize
from gdr_teach.testing import (
    DECAYS,
    DplrInputs,
    GatedInputs,
    Inputs,
    IplrInputs,
    as_rows,
    assert_near_token_loop,
    assert_rows_close,
    delta_inputs,
    dplr_inputs,
    gated_inputs,
    gradients,
    iplr_inputs,
)

RULES = {  # by the inputs: the operator and its launches by chunks
    Inputs: (delta_rule, delta_chunk.call),
    GatedInputs: (gated_delta_rule, gated_chunk.call),
    IplrInputs: (iplr_delta_rule, iplr_chunk.call),
    DplrInputs: (dplr_delta_rule, dplr_chunk.call),
}
TIED = ["prepare", "scan", "scan", "combine", "scan"]
TIED += ["reverse_scan", "combine", "scan", "reverse_scan", "grads"]
UNTIED = ["prepare", "reads", *TIED[1:-1], "values", "keys"]


def ones(x) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones_like(x.v), torch.ones_like(x.initial_state)


def call(x, cu=None, **options):
    """The launches of one call of the rule whose inputs these are."""
    options = {"initial_state": x.initial_state, "cu_seqlens": cu, "scale": None} | options
    return RULES[type(x)][1](*x[:-1], **options)


def run(x, cu=None, **options):
    """Forward and backward; all results."""
    this = call(x, cu, **options)
    o, state, kept = this.forward()
    grads = call(x, cu, **options).backward(*ones(x), kept)
    return o, state, *(y for y in grads if y is not None)


def near(got, want, rtol: float = 1e-11) -> None:
    for n, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_rows_close(as_rows(g), as_rows(w), rtol=rtol, name=f"result {n}")


def hold(x, cu=None, **options):
    """A call in segments against the token loop; all results."""
    got = run(x, cu, **options)
    op = RULES[type(x)][0]
    loop = {"cu_seqlens": cu, "backend": "torch", "mode": "recurrent"}
    want = op(*x[:-1], initial_state=x.initial_state, **loop)
    near(got, (*want, *gradients(op, x, *ones(x), **loop)))
    return got


@pytest.mark.parametrize(
    ("per", "gate"),
    [("channel", gate) for gate in (None, "mixed", *DECAYS)]
    + [("head", gate) for gate in (None, "mixed", -5.0, float("-inf"))],
)
def test_any_decay(per, gate):
    keys, beta = ("identical", 2.0) if gate in (0.0, "mixed") else ("cos0.9", 1.0)
    x = gated_inputs(1, 37, 1, 5, 3, keys=keys, beta=beta, per=per, log_decay=gate)
    hold(x, chunk_size=8, segments=2)


@pytest.mark.parametrize("gate", ["none", None, "mixed", *DECAYS], ids=str)
def test_any_decay_with_free_directions(gate):
    keys = "identical" if gate in (0.0, "mixed") else "cos0.9"
    if gate == "none":
        x = iplr_inputs(1, 37, 1, 5, 3, keys=keys)
    else:
        per = "head" if gate == -5.0 else "channel"
        x = dplr_inputs(1, 37, 1, 5, 3, keys=keys, per=per, log_decay=gate)
    hold(x, chunk_size=8, segments=2)


@pytest.mark.parametrize("T", [1, 16, 17, 32, 33, 49])
def test_lengths_around_the_segment_and_the_chunk(T):
    x = delta_inputs(1, T, 1, 3, 2, keys="identical", beta=2.0)
    got = hold(x, chunk_size=4, segments=8)
    ordinary = run(x, chunk_size=4)
    near(got, ordinary)
    if T <= 4 * SHORTEST:  # too short to be cut: the ordinary call's bits
        assert all(torch.equal(g, w) for g, w in zip(got, ordinary, strict=True))


@pytest.mark.parametrize(("shape", "C"), [((2, 67, 1, 7, 20), 16), ((1, 65, 1, 70, 3), 8)])
def test_batches_and_tiles(shape, C):
    hold(gated_inputs(*shape), chunk_size=C, segments=2)


@pytest.mark.parametrize("shape", [(0, 3, 1, 4, 3), (2, 0, 1, 4, 3), (2, 3, 0, 4, 3)], ids=str)
def test_empty_axes(shape):
    x = gated_inputs(*shape)
    got, want = (run(x, chunk_size=4, segments=n) for n in (3, 1))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("inputs", [gated_inputs, dplr_inputs])
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_documents(reverse, inputs):
    lengths = [0, 1, 37, 0, 9, 0][:: -1 if reverse else 1]
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    x = inputs(1, sum(lengths), 1, 4, 3, N=len(lengths), per="head" if reverse else "channel")
    got = hold(x, cu, chunk_size=8, segments=3)
    for n, (start, end) in enumerate(itertools.pairwise(cu.tolist())):
        if end - start == 1:
            continue
        own = type(x)(*(y[:, start:end] for y in x[:-1]), x.initial_state[n : n + 1])
        alone = run(own, chunk_size=8, segments=3)
        along, states = (slice(None), slice(start, end)), slice(n, n + 1)
        mine = [y[states if y.shape == x.initial_state.shape else along] for y in got]
        assert all(torch.equal(g, w) for g, w in zip(mine, alone, strict=True)), f"document {n}"


@pytest.mark.parametrize("inputs", [gated_inputs, dplr_inputs, iplr_inputs])
@pytest.mark.parametrize("pack", [False, True], ids=["dense", "packed"])
def test_every_element_is_written_and_nothing_else_is_touched(pack, inputs):
    cu = torch.tensor([0, 0, 18, 21]) if pack else None
    x = inputs(1, 21, 1, 5, 3, N=3 if pack else 1)
    want = run(x, cu, chunk_size=4, segments=2)
    with poisoned(), sanitize():
        got = run(x, cu, chunk_size=4, segments=2)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize(("inputs", "n"), [(gated_inputs, 6), (dplr_inputs, 8)])
def test_without_states_and_without_what_the_forward_kept(inputs, n):
    x = inputs(1, 35, 1, 4, 3)
    options = {"initial_state": None, "chunk_size": 8}
    do = torch.ones(1, dtype=torch.float64).expand(x.v.shape)
    o, state, kept = call(x, segments=2, **options).forward()
    wanted, ordinary, _ = call(x, **options).forward()
    assert_rows_close(o, wanted, rtol=1e-11)
    assert_rows_close(state, ordinary, rtol=1e-11)
    *want, none = call(x, **options).backward(do, None, None)
    assert none is None
    assert len(kept) == n
    for given in (kept, None):
        *got, none = call(x, segments=2, **options).backward(do, None, given)
        assert none is None
        near((o, state, *got, state), (wanted, ordinary, *want, ordinary))
    assert [y.shape for y in kept[-2:]] == [(2, 1, 4, 3), (2, 1, 4, 4)]


# -- digits ------------------------------------------------------------------------------------------------------------


class Cut(torch.autograd.Function):
    """A call in segments, for `assert_near_token_loop`."""

    @staticmethod
    def forward(ctx, inputs, segments, *x):
        ctx.inputs, ctx.segments = inputs, segments
        ctx.save_for_backward(*x)
        return call(inputs(*x), segments=segments).forward()[:2]

    @staticmethod
    def backward(ctx, do, dstate):
        x = ctx.inputs(*ctx.saved_tensors)
        grads = call(x, segments=ctx.segments).backward(do, dstate, None)
        return None, None, *(g for g in grads if g is not None)


def in_segments(inputs, op, *x, initial_state, segments=1, **way):
    if segments == 1:
        return op(*x, initial_state=initial_state, **way)
    o, state = Cut.apply(inputs, segments, *x, initial_state)
    return type(op(*x, initial_state=initial_state, **way))(o, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gate", ["mixed", 0.0], ids=str)
def test_stays_near_the_token_loop(dtype, gate):
    keys, beta = ("identical", 2.0) if gate == 0.0 else ("unit", None)
    if gate == 0.0:
        x = delta_inputs(
            1, 320 if dtype == torch.bfloat16 else 80, 1, 32, 16, dtype=dtype, keys=keys, beta=beta
        )
        op = functools.partial(in_segments, type(x), delta_rule)
    else:
        x = gated_inputs(
            1, 160 if dtype == torch.bfloat16 else 80, 1, 32, 16, dtype=dtype, log_decay=gate
        )
        op = functools.partial(in_segments, type(x), gated_delta_rule)
    assert_near_token_loop(op, x, keys=keys, beta=beta, segments=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_reflections_err_no_more_than_twice_as_much(dtype):
    x = delta_inputs(1, 192, 1, 32, 16, dtype=dtype, keys="identical", beta=2.0)
    want = run(type(x)(*(y.double() for y in x)), chunk_size=32)
    # of one tensor the ratio is chance: few numbers decide it, and seeds give 0.3 to 2
    total = []
    for n in (3, 1):
        got = run(x, chunk_size=16, segments=n)
        errors = [(g.double() - w).norm() / w.norm() for g, w in zip(got, want, strict=True)]
        total.append(torch.stack(errors).norm())
    assert total[0] <= 2 * total[1]


# -- where to cut, and what is launched --------------------------------------------------------------------------------


def test_a_document_is_cut_by_its_own_length():
    lengths, C, G = [0, 1, 16, 17, 60, 0, 200, 33], 4, 5
    cu, last = cut(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), C, G)
    first = 0
    for n, length in enumerate(lengths):
        own = cu[n * G : n * G + G].tolist()
        assert own[0] == first
        chunks = -(-length // C)
        L = max(-(-chunks // G), SHORTEST) * C
        assert own == [first + min(g * L, length) for g in range(G)]
        assert last[n] == n * G + max(-(-length // L) - 1, 0)
        first += length
    assert cu[-1] == first
    assert len(cu) == len(lengths) * G + 1


def test_no_length_is_read_on_the_host():
    with FakeTensorMode():  # a number read from such a tensor is an error
        cu, last = cut(torch.empty(8, dtype=torch.int32), 64, 4)
        assert (cu.shape, last.shape) == ((29,), (7,))


def test_one_segment_is_the_ordinary_call():
    x = delta_inputs(1, 5, 1, 2, 2)
    assert type(call(x, segments=1)) is TiedCall
    with pytest.raises(ValueError, match="segments: wanted a whole number from 1, got 0"):
        call(x, segments=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_free_directions_stay_near_the_token_loop(dtype):
    x = dplr_inputs(1, 160 if dtype == torch.bfloat16 else 80, 1, 32, 16, dtype=dtype)
    op = functools.partial(in_segments, type(x), dplr_delta_rule)
    assert_near_token_loop(op, x, keys="unit", beta=None, segments=2)


@pytest.mark.parametrize(
    ("inputs", "names"),
    [(delta_inputs, TIED), (gated_inputs, TIED), (iplr_inputs, UNTIED), (dplr_inputs, UNTIED)],
)
def test_what_is_launched_each_way(inputs, names):
    x = inputs(1, 64, 2, 64, 64, dtype=torch.bfloat16)
    with recorded("sm_90") as launches:
        run(x, segments=4)
    found = [launch.kernel.__name__.removesuffix("_kernel") for launch in launches]
    assert [name.removesuffix("_tied").removesuffix("_untied") for name in found] == names


@pytest.mark.parametrize("target", TARGETS)
def test_combine_compiles(target):
    x = delta_inputs(1, 64, 1, 128, 128, dtype=torch.bfloat16)
    with recorded(target) as launches:
        run(x, segments=4)
    for launch in launches:
        if launch.kernel is combine_kernel:
            report = compile_launch(launch, target)
            assert report.spilled <= SPILL_BUDGET[target], report
            assert report.shared <= SHARED_LIMIT[target] // 2, report
            assert report.tensor_core > 0
