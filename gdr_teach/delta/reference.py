"""The delta rule in plain PyTorch: token by token, and by chunks (chapter 2; the chunk form is derived in chapter 6).

One token, state S of shape [K, V] (the transpose of the textbook's S_t):

    r_t = v_t - S_{t-1}^T k_t                 what the memory gets wrong about key k_t           (2.1)
    u_t = beta_t r_t                          the correction that is written                     (2.2)
    S_t = S_{t-1} + k_t u_t^T                 erase and write in one rank-one step               (2.3)
    o_t = scale * S_t^T q_t                   read                                               (2.4)

Both functions are ordinary differentiable PyTorch. Needs torch only. Source: Yang et al. 2024, "Parallelizing
linear transformers with the delta rule over sequence length", sections 2 and 3.
"""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import check_positive_int
from ..chunkwise import wy
from ..notation import Output, state_dtype
from ..packing import per_document


def delta_recurrence(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
) -> Output:
    """The delta rule, one token after the other: equations (2.1) to (2.4).

    Args: as `gdr_teach.delta_rule`. Computes in float64 for float64 inputs, else in float32.
    Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    if cu_seqlens is not None:
        states = {"initial_state": initial_state}
        return Output(
            *per_document(delta_recurrence, cu_seqlens, (q, k, v, beta), states, scale=scale)
        )
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    S = start_state(k, v, initial_state)  # [B, H, K, V]
    o = torch.zeros_like(v)[:, :0]
    if q.shape[1]:
        rows = []
        steps = (x.to(S.dtype).unbind(1) for x in (q, k, v, beta))
        for q_t, k_t, v_t, beta_t in zip(*steps, strict=True):
            r_t = v_t - (k_t[..., None, :] @ S)[..., 0, :]  # [B, H, V]      (2.1)
            u_t = beta_t[..., None] * r_t  # (2.2)
            S = S + k_t[..., :, None] * u_t[..., None, :]  # (2.3)
            rows.append(scale * (q_t[..., None, :] @ S)[..., 0, :])  # (2.4)
        o = torch.stack(rows, dim=1).to(v.dtype)
    return Output(o, S)


def delta_chunkwise(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
    chunk_size: int = 64,
) -> Output:
    """The delta rule, C tokens at a time: matrix products inside a chunk, one state handed from chunk to chunk.

        T = (I + tril_{-1}(diag(beta) K K^T))^{-1} diag(beta)     all corrections of the chunk at once    (2.5)
        U = T (V - K S) = u - w S                                 the u_t of the chunk, one per row       (2.6)
        O = scale * (Q S + tril(Q K^T) U)                                                                 (2.7)
        S' = S + K^T U                                                                                    (2.8)

    `chunkwise.wy` has it step by step. Args: as `gdr_teach.delta_rule`, and chunk_size C >= 1. The last chunk is filled
    up with beta = 0 and k = 0, tokens that change nothing.
    Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    chunk_size = check_positive_int("delta_chunkwise", "chunk_size", chunk_size)
    if cu_seqlens is not None:
        states, options = (
            {"initial_state": initial_state},
            {"scale": scale, "chunk_size": chunk_size},
        )
        return Output(
            *per_document(delta_chunkwise, cu_seqlens, (q, k, v, beta), states, **options)
        )
    return chunkwise(q, k, v, beta, scale, initial_state, chunk_size)[0]


def chunkwise(q, k, v, beta, scale, initial_state, C: int) -> tuple[Output, wy.Kept]:
    """`delta_chunkwise` without documents, and what its backward can take over."""
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    S = start_state(k, v, initial_state)  # [B, H, K, V]
    one = partial(_segment, scale=scale, C=C)
    o, S, kept = wy.forward_by_segments(one, (q, k, v, beta), S, C)
    return Output(o, S), wy.Kept(*kept)


def _segment(q, k, v, beta, S: Tensor, *, scale: float, C: int):
    return wy.forward(chunk_operands(q, k, v, beta, S.dtype, C), S, scale)


def chunk_operands(q, k, v, beta, dtype: torch.dtype, C: int) -> wy.Chunks:
    """The operands of the chunk map: no decay, so Q~, K~ and K^ are q and k themselves."""
    x = without_scores(q, k, v, beta, dtype, C)
    exact = x.K.to(wy.exact_dtype(k))
    return x._replace(A=(x.Q @ x.K.mT).tril(), L=(exact @ exact.mT).tril(-1))


def without_scores(q, k, v, beta, dtype: torch.dtype, C: int) -> wy.Chunks:
    """`chunk_operands` with A and L left empty: the backward does not read them there."""
    Q, K, V, b = (wy.chunks(x.to(dtype), C) for x in (q, k, v, beta[..., None]))
    return wy.Chunks(Q, K, K, V, b, A=Q.new_empty(0), L=Q.new_empty(0))


def start_state(k: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    """The state before the first token [B, H, K, V]: a copy of the one given, else zeros."""
    if initial_state is not None:
        return initial_state.clone()
    shape = (k.shape[0], k.shape[2], k.shape[3], v.shape[3])
    return torch.zeros(shape, dtype=state_dtype(k.dtype), device=k.device)


def correction_matrix(K: Tensor, beta: Tensor) -> Tensor:
    """T = diag(beta) X, (2.5) with X of (6.3), for K [..., C, K] and beta [..., C, 1], in float64.

    To be rounded only after it is multiplied: with identical keys and beta = 2 every chunk has the same T, and the same
    rounding of it at every chunk adds up (2e-5 after 200 tokens against 7e-7, docs/log.md).
    """
    K = K.to(wy.exact_dtype(K))
    return beta.to(K.dtype) * wy.inverse((K @ K.mT).tril(-1), beta)
