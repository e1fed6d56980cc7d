"""Every rule of the family as arguments of a more general one, and of other people's rules: a few lines each.

    delta -> iplr -> dplr        gated delta, KDA, RWKV-7, Mamba-2 -> dplr        DeltaProduct -> delta

    iplr_recurrence(*delta_to_iplr(q, k, v, beta)) = delta_recurrence(q, k, v, beta)

A lift is an identity, not an approximation: same outputs, same states, and gradients that flow back through it. It is
for understanding and for tests, not for speed: the general rule does more work (docs/kernels.md). Papers write the
state as S [V, K] and multiply from the right; here it is [K, V], so that in S (D - x y^T) x is read and y written.
Needs torch only.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def delta_to_iplr(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
) -> tuple[Tensor, ...]:
    """The delta rule reads along its key, writes along it, and takes beta of what it finds away.

        S_t = S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T        a = -beta k    b = k    v <- beta v

    Returns: q, k, v, a, b of `iplr_recurrence`. Source: Yang et al. 2024, the delta rule as a matrix product a token.
    """
    beta = beta[..., None].to(k.dtype)
    return q, k, beta * v, -beta * k, k


def iplr_to_dplr(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    a: Float[Tensor, "B T H K"],
    b: Float[Tensor, "B T H K"],
) -> tuple[Tensor, ...]:
    """The identity is a diagonal matrix: exp(0).

        S_t = S_{t-1} (I + a_t b_t^T) + v_t k_t^T        log_decay = 0

    Returns: q, k, v, a, b, log_decay of `dplr_recurrence`. Source: Yang et al. 2024, on generalized delta rules.
    """
    return q, k, v, a, b, torch.zeros_like(k)


def gated_to_dplr(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"],
) -> tuple[Tensor, ...]:
    """The gated delta rule fades first and reads then; to read before the decay, the decay goes into a.

        S_t = S_{t-1} D_t (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,  D_t = diag(exp(log_decay_t))
            = S_{t-1} (D_t - beta_t (D_t k_t) k_t^T) + beta_t v_t k_t^T
        a = -beta exp(log_decay) * k    b = k    v <- beta v

    One decay a head is Gated DeltaNet, one a channel Kimi delta attention (KDA): log_decay [B, T, H] or [B, T, H, K].
    Returns: q, k, v, a, b, log_decay of `dplr_recurrence`. Sources: Yang et al. 2024, "Gated Delta Networks", the gated
    delta rule; Kimi Team 2025, "Kimi Linear", the recurrence of KDA.
    """
    beta = beta[..., None].to(k.dtype)
    by_row = log_decay[..., None] if log_decay.dim() == 3 else log_decay
    return q, k, beta * v, -beta * by_row.exp().to(k.dtype) * k, k, log_decay


def rwkv7_to_dplr(
    r: Float[Tensor, "B T H K"],
    w: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    kappa: Float[Tensor, "B T H K"],
    alpha: Float[Tensor, "B T H K"],
) -> tuple[Tensor, ...]:
    """RWKV-7 erases along one key, kappa, at a rate of its own for every channel, and writes along another, k.

        S_t = S_{t-1} (diag(exp(w_t)) - kappa_t (alpha_t * kappa_t)^T) + v_t k_t^T        y_t = S_t r_t
        q = r    a = -kappa    b = kappa * alpha    log_decay = w

    Args: r receptance, w the logarithm of the paper's decay w_t, k replacement key, kappa the unit removal key (there
    kappa-hat), alpha the in-context learning rate (there a_t). The paper does not scale its output: scale=1.0.
    Returns: q, k, v, a, b, log_decay of `dplr_recurrence`. Source: Peng et al. 2025, "RWKV-7 'Goose' with Expressive
    Dynamic State Evolution", the state evolution of time mixing.
    """
    return r, k, v, -kappa, kappa * alpha, w


def mamba2_to_dplr(
    C: Float[Tensor, "B T H K"],
    B: Float[Tensor, "B T H K"],
    x: Float[Tensor, "B T H V"],
    dt: Float[Tensor, "B T H"],
    A: Float[Tensor, " H"],
) -> tuple[Tensor, ...]:
    """Mamba-2 fades the whole state by one number a head and never looks at it: nothing is read, nothing erased.

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T        y_t = h_t^T C_t
        q = C    k = B    v = dt x    a = b = 0    log_decay = dt A, one a head

    Args: A < 0 and dt > 0, which is after its softplus; B and C already repeated for each head of their group. The skip
    D x is not part of the state. The paper does not scale its output: scale=1.0.
    Returns: q, k, v, a, b, log_decay of `dplr_recurrence`. Source: Dao and Gu 2024, "Transformers are SSMs", selective
    state spaces with a scalar times the identity.
    """
    none = torch.zeros_like(B)
    return C, B, dt[..., None].to(x.dtype) * x, none, none, dt * A


def deltaproduct_to_delta(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T n H K"],
    v: Float[Tensor, "B T n H V"],
    beta: Float[Tensor, "B T n H"],
) -> tuple[Tensor, ...]:
    """DeltaProduct takes n steps of the delta rule a token: n tokens of the delta rule, of which the last is asked.

        S_{t,j} = S_{t,j-1} (I - beta_{t,j} k_{t,j} k_{t,j}^T) + beta_{t,j} v_{t,j} k_{t,j}^T,  j = 1 ... n
        S_{t,0} = S_{t-1,n}        o_t = S_{t,n} q_t

    The outputs of the token loop are o[:, n - 1 :: n]; those between are zero, their queries being zero. cu_seqlens, if
    any, is to be multiplied by n.
    Args: n >= 1. Returns: q, k, v, beta of `delta_recurrence`, with n T tokens. Source: Siems et al. 2025,
    "DeltaProduct", the product of generalized Householder matrices.
    """
    asked = torch.cat([torch.zeros_like(k[:, :, 1:]), q[:, :, None]], dim=2)
    return tuple(x.flatten(1, 2) for x in (asked, k, v, beta))
