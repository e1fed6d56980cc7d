"""An oracle by other hands: flash-linear-attention's plain Kimi delta attention agrees with ours."""

import warnings

import pytest
import torch

from gdr_teach import gated_delta_rule
from gdr_teach.testing import assert_rows_close, gated_inputs


@pytest.mark.parametrize(
    ("backend", "mode"), [("torch", "recurrent"), ("torch", "chunk"), ("triton", "recurrent")]
)
@pytest.mark.parametrize("per", ["head", "channel"])
def test_agrees_with_fla(backend, mode, per):
    pytest.importorskip("triton", reason="fla needs triton to import")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fla warns that it sees no GPU
        naive = pytest.importorskip("fla.ops.kda.naive", reason="fla-core is not installed")
    x = gated_inputs(2, 50, 2, 16, 8, dtype=torch.float32, per=per)
    channels = x.log_decay if per == "channel" else x.log_decay[..., None].expand_as(x.k)
    o, state = naive.naive_recurrent_kda(
        x.q, x.k, x.v, channels, x.beta, initial_state=x.initial_state, output_final_state=True
    )
    got = gated_delta_rule(*x[:-1], initial_state=x.initial_state, backend=backend, mode=mode)
    assert_rows_close(got.o, o, rtol=5e-6, name="o")
    assert_rows_close(got.state, state, rtol=5e-6, name="state")
