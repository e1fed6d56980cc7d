"""An oracle by other hands: flash-linear-attention's plain delta rule agrees with ours."""

import warnings

import pytest
import torch

from gdr_teach import delta_rule
from gdr_teach.testing import assert_rows_close, delta_inputs


@pytest.mark.parametrize(
    ("backend", "mode"), [("torch", "recurrent"), ("torch", "chunk"), ("triton", "recurrent")]
)
def test_agrees_with_fla(backend, mode):
    pytest.importorskip("triton", reason="fla needs triton to import")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fla warns that it sees no GPU
        naive = pytest.importorskip("fla.ops.delta_rule.naive", reason="fla-core is not installed")
    x = delta_inputs(2, 50, 2, 16, 8, dtype=torch.float32)
    heads_first = [y.transpose(1, 2).contiguous() for y in x[:4]]
    o, state = naive.delta_rule_recurrence(*heads_first, initial_state=x.initial_state)
    got = delta_rule(*x[:4], initial_state=x.initial_state, backend=backend, mode=mode)
    assert_rows_close(got.o, o.transpose(1, 2).contiguous(), rtol=5e-6, name="o")
    assert_rows_close(got.state, state, rtol=5e-6, name="state")
