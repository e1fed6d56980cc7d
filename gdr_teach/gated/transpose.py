"""The backward of the gated delta rule in plain PyTorch, line by line the transpose of `reference`.

do is the gradient of o, dstate the gradient of the last state; D is the gradient of the state at the place named.
The gradient of a decay needs care. From (5.1), with D~_t the gradient of S~_t,

    dg_t = rowsum(S~_t * D~_t)                                                                       (5.10)

is a product of two small numbers where the decay is strong. The formula of the papers, a cumulative sum of
q * dq + k * dk over all later tokens, gets it as a difference of large ones: at g = -20 no digit is left in float32.
Here every exponent is a sum of g over the tokens that a pair crosses, and so dg is the same sum turned around: what
the pairs that cross token t, and no others, hand back.
"""

import torch
from torch import Tensor

from ..delta.reference import chunks, start_state, tokens
from ..delta.transpose import outer, read, write
from ..packing import per_document
from .reference import (
    after,
    by_row,
    chunk_operands,
    corners,
    correction_matrix,
    decayed_scores,
    halves,
    level_decays,
    level_sizes,
    shifted,
    to_power_of_two,
    upto,
)


def gated_recurrence_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    dstate: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of `gated_recurrence`, token after token: (5.10) to (5.14), written out in `recurrent`.

    Args: do [B, T, H, V], dstate [N, H, K, V] in the state's dtype; the rest as in the forward.
    Returns: dq, dk, dv, dbeta, dlog_decay in their inputs' shapes and dtypes, dstate0 [N, H, K, V].
    """
    operands = (q, k, v, beta, log_decay)
    if cu_seqlens is not None:
        states = {"dstate": dstate, "initial_state": initial_state}
        return per_document(
            gated_recurrence_backward, cu_seqlens, (do, *operands), states, scale=scale
        )
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    S = start_state(k, v, initial_state)
    Q, K, V, b, g, dO = (x.to(S.dtype) for x in (*operands[:4], by_row(log_decay), do))
    decay = g.exp()[..., None]  # [B, T, H, K or 1, 1]
    faded, r, written = [], [], []  # S~_t, r_t and S_t
    for t in range(q.shape[1]):
        faded.append(decay[:, t] * S)  # (5.1)
        r.append(V[:, t] - read(faded[t], K[:, t]))  # (5.2)
        S = faded[t] + outer(K[:, t], b[:, t, :, None] * r[t])
        written.append(S)
    D = dstate.clone()
    dQ, dK, dV, db, dg = (torch.zeros_like(x) for x in (Q, K, V, b, K))
    for t in reversed(range(q.shape[1])):
        D = D + scale * outer(Q[:, t], dO[:, t])  # (5.11)
        du = read(D, K[:, t])
        dr = b[:, t, :, None] * du  # (5.12)
        dV[:, t] = dr
        db[:, t] = (du * r[t]).sum(-1)  # (5.13)
        dK[:, t] = write(D, b[:, t, :, None] * r[t]) - write(faded[t], dr)
        dQ[:, t] = scale * write(written[t], dO[:, t])
        D = D - outer(K[:, t], dr)  # (5.14)
        dg[:, t] = (faded[t] * D).sum(-1)  # (5.10)
        D = decay[:, t] * D
    dlog_decay = like(dg, log_decay)
    return dQ.to(q.dtype), dK.to(k.dtype), dV.to(v.dtype), db.to(beta.dtype), dlog_decay, D


def gated_chunkwise_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    dstate: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, ...]:
    """The gradients of `gated_chunkwise`: a forward walk for S and U, a reverse walk for D, then all chunks at once.

    In the letters of (5.6) to (5.9), with P = V - K~ S and dO already multiplied by scale:

        dU = A^T dO + K^ D        dP = T^T dU        D <- exp(g_(start, end]) * D + Q~^T dO - K~^T dP     (5.15)
        dA = tril(dO U^T)         dL = -tril_{-1}(dP U^T)        dV = dP                                  (5.16)
        dQ~ = dO S^T              dK~ = -dP S^T                  dK^ = U D^T                              (5.17)
        dbeta = rowsum((P - L U) * (dU - L^T dP))                                                         (5.18)

    and from dA, dL, dQ~, dK~, dK^ back through the exponents of (5.6) and (5.7) to q, k and g.
    Args and Returns: as `gated_recurrence_backward`, and chunk_size C >= 1.
    """
    operands = (q, k, v, beta, log_decay)
    if cu_seqlens is not None:
        states = {"dstate": dstate, "initial_state": initial_state}
        options = {"scale": scale, "chunk_size": chunk_size}
        return per_document(
            gated_chunkwise_backward, cu_seqlens, (do, *operands), states, **options
        )
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    S = start_state(k, v, initial_state)
    Q, K, V, b, g = chunk_operands(*operands, S.dtype, chunk_size)  # [B, H, N, C, .]
    dO = scale * chunks(do.to(S.dtype), chunk_size)
    from_start, to_end = upto(g).exp(), after(g).exp()
    whole = g.sum(-2)[..., None].exp()  # [B, H, N, K or 1, 1]
    Qr, Kr, Kw = Q * from_start, K * from_start, K * to_end  # (5.6)
    A = decayed_scores(Q, K, g)
    T, L = correction_matrix(K, b, g)
    L, dU = L.to(S.dtype), A.mT @ dO
    u, w, y, x = (
        (M @ z.to(T.dtype)).to(S.dtype) for M, z in ((T, V), (T, Kr), (T.mT, dU), (T.mT, Kw))
    )
    N = Q.shape[2]

    starts, U = S.new_empty((*S.shape[:2], N, *S.shape[2:])), torch.empty_like(V)
    for n in range(N):
        starts[:, :, n] = S
        U[:, :, n] = u[:, :, n] - w[:, :, n] @ S  # (5.8)
        S = whole[:, :, n] * S + Kw[:, :, n].mT @ U[:, :, n]  # (5.9)
    ends, dP = torch.empty_like(starts), torch.empty_like(V)
    D = dstate.clone()
    for n in reversed(range(N)):
        ends[:, :, n] = D
        dP[:, :, n] = y[:, :, n] + x[:, :, n] @ D  # (5.15)
        D = whole[:, :, n] * D + Qr[:, :, n].mT @ dO[:, :, n] - Kr[:, :, n].mT @ dP[:, :, n]

    dU = dU + Kw @ ends
    dQr, dKr, dKw = dO @ starts.mT, -dP @ starts.mT, U @ ends.mT  # (5.17)
    dA, dL = dO @ U.mT, (-dP @ U.mT).tril(-1)  # (5.16)
    dQ, dK, dg = decayed_scores_backward(dA, Q, K, g)
    dK_read, dK_write, dg_erase = decayed_scores_backward(dL, K, K, g)
    dQ = dQ + dQr * from_start
    dK = dK + dK_read + dK_write + dKr * from_start + dKw * to_end
    dg = dg + dg_erase + upto_transposed(Qr * dQr + Kr * dKr) + after_transposed(Kw * dKw)
    dg = (
        dg + (whole * starts * ends).sum(-1)[..., None, :]
    )  # [B, H, N, 1, K]: every token of the chunk
    R = V - Kr @ starts - L @ U
    db = (R * (dU - L.mT @ dP)).sum(-1, keepdim=True)  # (5.18)
    dQ, dK, dV, db, dg = (tokens(z, q.shape[1]) for z in (dQ, dK, dP, db, dg))
    dlog_decay = like(dg, log_decay)
    return dQ.to(q.dtype), dK.to(k.dtype), dV.to(v.dtype), db[..., 0].to(beta.dtype), dlog_decay, D


def decayed_scores_backward(
    dA: Tensor, x: Tensor, y: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients dx, dy, dg [..., C, K] of `decayed_scores`, level by level; dA above the diagonal is not read."""
    C = x.shape[-2]
    dA = to_power_of_two(to_power_of_two(dA).mT).mT
    x, y, g = (to_power_of_two(z) for z in (x, y, g))
    d = dA.diagonal(dim1=-2, dim2=-1)[..., None]
    dx, dy, dg = d * y, d * x, torch.zeros_like(x)  # no decay on the diagonal
    for h in level_sizes(C):
        to_cut, from_cut = level_decays(g, h)
        columns, rows = halves(y, h)[0] * to_cut, halves(x, h)[1] * from_cut
        dscores = corners(dA, h)
        drows, dcolumns = dscores @ columns, dscores.mT @ rows
        halves(dx, h)[1].add_(drows * from_cut)
        halves(dy, h)[0].add_(dcolumns * to_cut)
        halves(dg, h)[1].add_(upto_transposed(rows * drows))
        halves(dg, h)[0].add_(after_transposed(columns * dcolumns))
    return dx[..., :C, :], dy[..., :C, :], dg[..., :C, :]


def upto_transposed(x: Tensor) -> Tensor:
    """The transpose of `upto`: sums over each token and those after it."""
    return x.flip(-2).cumsum(-2).flip(-2)


def after_transposed(x: Tensor) -> Tensor:
    """The transpose of `after`: sums over the tokens before each one."""
    return shifted(x).cumsum(-2)


def like(dg: Tensor, log_decay: Tensor) -> Tensor:
    """dg [B, T, H, K], a number a row of the state, in log_decay's shape and dtype."""
    return (dg if log_decay.dim() == 4 else dg.sum(-1)).to(log_decay.dtype)
