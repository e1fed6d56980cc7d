"""A lift is an identity: the target's recurrence on lifted arguments is the source's, or the paper's formula."""

import pytest
import torch

from gdr_teach import lifts
from gdr_teach.delta.reference import delta_recurrence
from gdr_teach.dplr.reference import dplr_recurrence
from gdr_teach.gated.reference import gated_recurrence
from gdr_teach.iplr.reference import iplr_recurrence
from gdr_teach.testing import (
    DECAYS,
    KEYS,
    Inputs,
    as_rows,
    assert_rows_close,
    delta_inputs,
    gated_inputs,
    gradients,
    iplr_inputs,
)

SIZES = (2, 23, 2, 5, 4)


def hold(got, want) -> None:
    assert_rows_close(got[0], want[0], rtol=1e-12, name="o")
    assert_rows_close(got[1], want[1], rtol=1e-12, name="state")


def same_gradients(lifted, rule, x) -> None:
    """Gradients flow back through the lift, to every argument of the source."""
    d = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    for name, g, w in zip(x._fields, gradients(lifted, x, *d), gradients(rule, x, *d), strict=True):
        assert_rows_close(as_rows(g), as_rows(w), rtol=1e-11, name=f"d{name}")


@pytest.mark.parametrize("keys", [key for key in KEYS if key != "orthonormal"])
@pytest.mark.parametrize("beta", [None, 0.0, 1.0, 2.0])
def test_delta_to_iplr(keys, beta):
    x = delta_inputs(*SIZES, keys=keys, beta=beta)
    lifted = iplr_recurrence(*lifts.delta_to_iplr(*x[:-1]), initial_state=x.initial_state)
    hold(lifted, delta_recurrence(*x[:-1], initial_state=x.initial_state))


def test_iplr_to_dplr():
    x = iplr_inputs(*SIZES)
    lifted = dplr_recurrence(*lifts.iplr_to_dplr(*x[:-1]), initial_state=x.initial_state)
    hold(lifted, iplr_recurrence(*x[:-1], initial_state=x.initial_state))


@pytest.mark.parametrize("per", ["head", "channel"])
@pytest.mark.parametrize("gate", [None, "mixed", *DECAYS], ids=str)
def test_gated_to_dplr(per, gate):
    x = gated_inputs(*SIZES, per=per, log_decay=gate)
    lifted = dplr_recurrence(*lifts.gated_to_dplr(*x[:-1]), initial_state=x.initial_state)
    hold(lifted, gated_recurrence(*x[:-1], initial_state=x.initial_state))


def test_gradients_flow_back_through_a_lift():
    x, y = delta_inputs(*SIZES), iplr_inputs(*SIZES)
    lift = lambda rule, to: lambda *args, **options: rule(*to(*args), **options)
    same_gradients(lift(iplr_recurrence, lifts.delta_to_iplr), delta_recurrence, x)
    same_gradients(lift(dplr_recurrence, lifts.iplr_to_dplr), iplr_recurrence, y)
    for per in ("head", "channel"):
        z = gated_inputs(*SIZES, per=per, log_decay="mixed")
        same_gradients(lift(dplr_recurrence, lifts.gated_to_dplr), gated_recurrence, z)


def test_a_float32_beta_beside_half_precision_changes_no_dtype():
    x = gated_inputs(*SIZES, dtype=torch.bfloat16)
    *tensors, g = lifts.gated_to_dplr(*x[:3], x.beta.float(), x.log_decay.float())
    assert {y.dtype for y in tensors} == {torch.bfloat16}
    assert g.dtype == torch.float32
    assert {y.dtype for y in lifts.delta_to_iplr(*x[:3], x.beta.float())} == {torch.bfloat16}


# -- rules that are not ours, from their papers' formulas: state [V, K], one matrix product a token --------------------


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_rwkv7_to_dplr():
    B, T, H, K, V = SIZES
    r, k, kappa = randn(3, B, T, H, K).unbind()
    kappa, v = kappa / kappa.norm(dim=-1, keepdim=True), randn(B, T, H, V)
    alpha = torch.rand(B, T, H, K, dtype=torch.float64)
    w = -0.6065 * torch.sigmoid(randn(B, T, H, K))
    S0 = randn(B, H, V, K)
    S, rows = S0, []
    for t in range(T):
        left = torch.diag_embed(w[:, t].exp())
        left = left - kappa[:, t, :, :, None] @ (alpha * kappa)[:, t, :, None, :]
        S = S @ left + v[:, t, :, :, None] @ k[:, t, :, None, :]
        rows.append((S @ r[:, t, :, :, None])[..., 0])
    arguments = lifts.rwkv7_to_dplr(r, w, k, v, kappa, alpha)
    lifted = dplr_recurrence(*arguments, scale=1.0, initial_state=S0.mT.contiguous())
    hold(lifted, (torch.stack(rows, dim=1), S.mT))


def test_mamba2_to_dplr():
    batch, T, H, K, V = SIZES
    C, B, x = randn(batch, T, H, K), randn(batch, T, H, K), randn(batch, T, H, V)
    dt, A = torch.rand(batch, T, H, dtype=torch.float64), -torch.arange(1.0, H + 1).double()
    h0 = randn(batch, H, K, V)
    h, rows = h0, []
    for t in range(T):
        fade = (dt[:, t] * A).exp()[..., None, None]
        h = fade * h + dt[:, t, :, None, None] * torch.einsum("bhk,bhv->bhkv", B[:, t], x[:, t])
        rows.append(torch.einsum("bhkv,bhk->bhv", h, C[:, t]))
    lifted = dplr_recurrence(*lifts.mamba2_to_dplr(C, B, x, dt, A), scale=1.0, initial_state=h0)
    hold(lifted, (torch.stack(rows, dim=1), h))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_deltaproduct_to_delta(n):
    B, T, H, K, V = SIZES
    steps = delta_inputs(B, T * n, H, K, V)
    k, v, beta = (x.unflatten(1, (T, n)) for x in steps[1:4])
    q, S0 = randn(B, T, H, K), randn(B, H, V, K)
    eye, S, rows = torch.eye(K, dtype=torch.float64), S0, []
    for t in range(T):
        for j in range(n):
            step, key = beta[:, t, j, :, None, None], k[:, t, j, :, :, None]
            S = S @ (eye - step * key @ key.mT) + step * v[:, t, j, :, :, None] @ key.mT
        rows.append((S @ q[:, t, :, :, None])[..., 0] * K**-0.5)
    lifted = Inputs(*lifts.deltaproduct_to_delta(q, k, v, beta), S0.mT.contiguous())
    out = delta_recurrence(*lifted[:-1], initial_state=lifted.initial_state)
    hold((out.o[:, n - 1 :: n].clone(), out.state), (torch.stack(rows, dim=1), S.mT))
    between = out.o.unflatten(1, (T, n))[:, :, : n - 1]
    assert not between.any()
