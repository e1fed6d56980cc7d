"""An oracle by other hands: flash-linear-attention's plain DPLR agrees with ours."""

import warnings

import pytest
import torch

from gdr_teach.dplr.reference import dplr_chunkwise, dplr_recurrence
from gdr_teach.testing import assert_rows_close, dplr_inputs


def by_kernel(*x, **options):
    from gdr_teach.dplr.recurrent import dplr_recurrent

    return dplr_recurrent(*x, **options)


@pytest.mark.parametrize("form", [dplr_recurrence, dplr_chunkwise, by_kernel])
def test_agrees_with_fla(form):
    pytest.importorskip("triton", reason="fla needs triton to import")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fla warns that it sees no GPU
        where = "fla.ops.generalized_delta_rule.dplr.naive"
        naive = pytest.importorskip(where, reason="fla-core is not installed")
    x = dplr_inputs(2, 50, 2, 16, 8, dtype=torch.float32)
    heads_first = [y.transpose(1, 2).contiguous() for y in x[:-1]]
    o, state = naive.dplr_recurrence(*heads_first, initial_state=x.initial_state)
    got = form(*x[:-1], initial_state=x.initial_state)
    assert_rows_close(got.o, o.transpose(1, 2).contiguous(), rtol=5e-6, name="o")
    assert_rows_close(got.state, state, rtol=5e-6, name="state")
