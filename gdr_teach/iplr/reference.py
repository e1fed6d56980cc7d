"""The IPLR rule in plain PyTorch: token by token, and by chunks (chapter 3).

One token, state S of shape [K, V]. The delta rule reads along its key and writes along it too; here a_t reads and b_t
writes, and the two are free:

    u_t = S_{t-1}^T a_t                       what the state holds in direction a_t                  (3.1)
    S_t = S_{t-1} + b_t u_t^T + k_t v_t^T     moved to b_t, and the new pair beside it               (3.2)
    o_t = scale * S_t^T q_t                   read                                                   (3.3)

The state is multiplied by I + b_t a_t^T: identity plus low rank. With a = -beta k, b = k and beta v in place of v it is
the delta rule. Both functions are ordinary differentiable PyTorch. Needs torch only. Source: Yang et al. 2024,
"Parallelizing linear transformers with the delta rule over sequence length", on generalized rules.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import check_positive_int
from ..delta.reference import start_state
from ..dplr.reference import dplr_chunkwise
from ..notation import Output
from ..packing import per_document


def iplr_recurrence(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    a: Float[Tensor, "B T H K"],
    b: Float[Tensor, "B T H K"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
) -> Output:
    """The IPLR rule, one token after the other: equations (3.1) to (3.3).

    Args: q, k, a, b [B, T, H, K], v [B, T, H, V]; scale: factor on o, default K^-1/2; initial_state [N, H, K, V],
    default zeros; cu_seqlens [N + 1]: where packed documents begin and end. Computes in float64 for float64 inputs,
    else in float32. Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    operands = (q, k, v, a, b)
    if cu_seqlens is not None:
        states = {"initial_state": initial_state}
        return Output(*per_document(iplr_recurrence, cu_seqlens, operands, states, scale=scale))
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    S = start_state(k, v, initial_state)  # [B, H, K, V]
    o = torch.zeros_like(v)[:, :0]
    if q.shape[1]:
        rows = []
        steps = (x.to(S.dtype).unbind(1) for x in operands)
        for q_t, k_t, v_t, a_t, b_t in zip(*steps, strict=True):
            u_t = (a_t[..., None, :] @ S)[..., 0, :]  # [B, H, V]      (3.1)
            S = S + b_t[..., :, None] * u_t[..., None, :]  # (3.2)
            S = S + k_t[..., :, None] * v_t[..., None, :]
            rows.append(scale * (q_t[..., None, :] @ S)[..., 0, :])  # (3.3)
        o = torch.stack(rows, dim=1).to(v.dtype)
    return Output(o, S)


def iplr_chunkwise(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    a: Float[Tensor, "B T H K"],
    b: Float[Tensor, "B T H K"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
    chunk_size: int = 64,
) -> Output:
    """The IPLR rule, C tokens at a time; the rows of Q, K, V, A, B, U and O are the chunk's tokens:

        X = (I - tril_{-1}(A B^T))^{-1}                            every read of a later read's result    (3.4)
        U = X (A S + tril_{-1}(A K^T) V)                           the u_t of the chunk, one per row      (3.5)
        O = scale * (Q S + tril(Q B^T) U + tril(Q K^T) V)                                                 (3.6)
        S' = S + B^T U + K^T V                                                                            (3.7)

    This is the map (6.22) to (6.26) of `chunkwise.affine` without decay, as `dplr_chunkwise` computes it when it is
    given none. Args: as `iplr_recurrence`, and chunk_size C >= 1. The last chunk is filled up with zeros, tokens that
    change nothing. Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    chunk_size = check_positive_int("iplr_chunkwise", "chunk_size", chunk_size)
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    return dplr_chunkwise(q, k, v, a, b, chunk_size=chunk_size, **options)
