"""The gated delta rule in plain PyTorch: token by token, and by chunks (chapter 5).

One token, state S of shape [K, V]; g_t = log_decay_t <= 0 is one number a head, or one for each of the K rows:

    S~_t = exp(g_t) * S_{t-1}                 forget first, row by row                               (5.1)
    r_t = v_t - S~_t^T k_t                    what the faded memory gets wrong about key k_t         (5.2)
    u_t = beta_t r_t                          the correction that is written                         (5.3)
    S_t = S~_t + k_t u_t^T                                                                           (5.4)
    o_t = scale * S_t^T q_t                                                                          (5.5)

With g = 0 this is the delta rule (2.1) to (2.4). Both functions are ordinary differentiable PyTorch and right for any
decay, -inf (a reset) included. Needs torch only. Sources: Yang et al. 2024, "Gated Delta Networks"; Kimi Team
2025, "Kimi Linear".
"""

from functools import partial
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import check_positive_int
from ..chunkwise import levels, pairs, wy
from ..delta.reference import start_state
from ..notation import Output
from ..packing import per_document


def gated_recurrence(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
) -> Output:
    """The gated delta rule, one token after the other: equations (5.1) to (5.5).

    Args: as `gdr_teach.gated_delta_rule`. Computes in float64 for float64 inputs, else in float32.
    Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    operands = (q, k, v, beta, log_decay)
    if cu_seqlens is not None:
        states = {"initial_state": initial_state}
        return Output(*per_document(gated_recurrence, cu_seqlens, operands, states, scale=scale))
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    S = start_state(k, v, initial_state)  # [B, H, K, V]
    operands = (q, k, v, beta, by_row(log_decay).exp())
    o = torch.zeros_like(v)[:, :0]
    if q.shape[1]:
        rows = []
        for q_t, k_t, v_t, beta_t, decay_t in zip(
            *(x.to(S.dtype).unbind(1) for x in operands), strict=True
        ):
            S = decay_t[..., None] * S  # (5.1)
            r_t = v_t - (k_t[..., None, :] @ S)[..., 0, :]  # [B, H, V]      (5.2)
            u_t = beta_t[..., None] * r_t  # (5.3)
            S = S + k_t[..., :, None] * u_t[..., None, :]  # (5.4)
            rows.append(scale * (q_t[..., None, :] @ S)[..., 0, :])  # (5.5)
        o = torch.stack(rows, dim=1).to(v.dtype)
    return Output(o, S)


def gated_chunkwise(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
    chunk_size: int = 64,
) -> Output:
    """The gated delta rule, C tokens at a time.

    Inside a chunk, i and j count its tokens and g_(j, i] is the sum of g over the tokens after j up to i:

        Q~_i = exp(g_(start, i]) q_i     K~_i = exp(g_(start, i]) k_i     K^_j = exp(g_(j, end]) k_j      (5.6)
        A_ij = q_i^T exp(g_(j, i]) k_j,  i >= j        L_ij = k_i^T exp(g_(j, i]) k_j,  i > j             (5.7)
        T = (I + diag(beta) L)^{-1} diag(beta)         U = T (V - K~ S)                                   (5.8)
        O = scale * (Q~ S + A U)                       S' = exp(g_(start, end]) * S + K^^T U              (5.9)

    Both reads, of the query and of the erasing key, see the decayed state, so both carry the sum with their own token
    included. No exponent in (5.6) to (5.9) is positive: nothing overflows, whatever the decay.

    Args: as `gdr_teach.gated_delta_rule`, and chunk_size C >= 1. The last chunk is filled up with zeros, tokens that
    change nothing. Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    chunk_size = check_positive_int("gated_chunkwise", "chunk_size", chunk_size)
    operands = (q, k, v, beta, log_decay)
    if cu_seqlens is not None:
        states, options = {"initial_state": initial_state}, {"scale": scale}
        options["chunk_size"] = chunk_size
        return Output(*per_document(gated_chunkwise, cu_seqlens, operands, states, **options))
    return chunkwise(*operands, scale, initial_state, chunk_size)[0]


def chunkwise(q, k, v, beta, log_decay, scale, initial_state, C: int) -> tuple[Output, wy.Kept]:
    """`gated_chunkwise` without documents, and what its backward can take over."""
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    S = start_state(k, v, initial_state)  # [B, H, K, V]
    operands = (q, k, v, beta, log_decay)
    one = partial(_segment, scale=scale, C=C)
    o, S, kept = wy.forward_by_segments(one, operands, S, C)
    return Output(o, S), wy.Kept(*kept)


def _segment(q, k, v, beta, log_decay, S: Tensor, *, scale: float, C: int):
    x = chunk_operands(q, k, v, beta, log_decay, S.dtype, C)
    return wy.forward(x, S, scale)  # (5.8), (5.9)


def by_row(log_decay: Tensor) -> Tensor:
    """[B, T, H] as [B, T, H, 1], one decay for all K rows; [B, T, H, K] as it is."""
    return log_decay[..., None] if log_decay.dim() == 3 else log_decay


def chunk_operands(q, k, v, beta, log_decay, dtype: torch.dtype, C: int) -> wy.Chunks:
    """The operands of the chunk map."""
    x, Q, K, f = without_scores(q, k, v, beta, log_decay, dtype, C)
    A, L = decays(log_decay).scores(Q, K, f, wy.exact_dtype(K))  # (5.7)
    return x._replace(A=A, L=L)


def decays(log_decay: Tensor) -> ModuleType:
    """Where the decay between tokens is computed: both modules have the same functions."""
    return pairs if log_decay.dim() == 3 else levels


def without_scores(q, k, v, beta, log_decay, dtype: torch.dtype, C: int):
    """`chunk_operands` with A and L left empty, and q, k [N, B H, C, K] and what `fade` made of them."""
    operands = (q, k, v, beta[..., None], by_row(log_decay))
    Q, K, V, b, g = (wy.chunks(x.to(dtype), C) for x in operands)
    f = decays(log_decay).fade(Q, K, g)  # (5.6)
    none = Q.new_empty(0)
    return wy.Chunks(f.Q, f.K, f.W, V, b, none, none, f.whole), Q, K, f
