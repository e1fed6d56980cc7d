"""Shapes and data that nobody listed, against the float64 oracle."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdr_teach import delta_rule
from gdr_teach.delta.reference import delta_recurrence
from gdr_teach.testing import Inputs, assert_rows_close, delta_inputs, delta_oracle, gradients

NAMES = ("dq", "dk", "dv", "dbeta", "dstate0")
LIMIT = {torch.float64: 1e-9, torch.float32: 1e-5}


@st.composite
def calls(draw, longest: int, widest: int):
    """Inputs of one call, dense or packed, with or without an initial state."""
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=4))
    pack = draw(st.booleans())
    T = sum(lengths) if pack else lengths[0]
    K, V, H = draw(st.integers(1, widest)), draw(st.integers(1, widest)), draw(st.integers(1, 2))
    x = delta_inputs(
        1,
        T,
        H,
        K,
        V,
        N=len(lengths) if pack else 1,
        dtype=draw(st.sampled_from(list(LIMIT))),
        keys=draw(st.sampled_from(["unit", "identical", "cos0.9", "zero"])),
        beta=draw(st.sampled_from([None, None, 0.0, 1.0, 2.0])),
        seed=draw(st.integers(0, 2**31)),
    )
    cu = torch.tensor([0, *itertools.accumulate(lengths)]) if pack else None
    return x, cu


def hold(x: Inputs, cu, oracle, **way) -> None:
    """Values and gradients of one call, normwise, against the oracle in float64."""
    exact = Inputs(*(y.double() for y in x))
    want = oracle(*exact[:4], initial_state=exact.initial_state, cu_seqlens=cu)
    got = delta_rule(*x[:4], initial_state=x.initial_state, cu_seqlens=cu, **way)
    do, dstate = torch.randn_like(exact.v), torch.randn_like(exact.initial_state)
    wants = gradients(oracle, exact, do, dstate, cu_seqlens=cu)
    found = gradients(delta_rule, x, do, dstate, cu_seqlens=cu, **way)
    pairs = zip(("o", "state", *NAMES), (*got, *found), (*want, *wants), strict=True)
    for name, g, w in pairs:
        assert_rows_close(
            g.reshape(-1), w.reshape(-1), rtol=LIMIT[x.q.dtype], norm="tensor", name=name
        )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(calls(longest=12, widest=24))
@pytest.mark.parametrize(
    ("backend", "mode"), [("torch", "recurrent"), ("torch", "chunk"), ("triton", "recurrent")]
)
def test_small(backend, mode, call):
    hold(*call, delta_oracle, backend=backend, mode=mode)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(calls(longest=300, widest=128))
def test_large_chunks(call):
    # the recurrence in float64 is itself held to the oracle above, and faster
    hold(*call, delta_recurrence, backend="torch", mode="chunk")


@settings(max_examples=4, deadline=None, derandomize=True)
@given(calls(longest=30, widest=128))
def test_wide_tiles(call):
    hold(*call, delta_recurrence, backend="triton", mode="recurrent")
