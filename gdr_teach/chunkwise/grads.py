"""Last stage of the backward, all chunks at once: from the states and their gradients to those of q, k and beta.

With S the state before the chunk, D the gradient of the state after it, A = tril(Q K^T), L = tril_{-1}(K K^T):

    G = tril_{-1}(dP U^T)      dA = scale * tril(dO U^T)                                             (2.14)
    dQ = scale * dO S^T + dA K
    dK = U D^T + dA^T Q - dP S^T - (G + G^T) K                                                       (2.15)
    dbeta = rowsum((P - L U) * Z),  P = V - K S,  Z = dU - L^T dP,  dU = K D + scale * A^T dO         (2.16)

Z is dP / beta, which is at hand; only where beta is small is it computed from its own formula.
"""

# pyright: reportArgumentType=false
import triton.language as tl

from ..runtime import kernel
from .place import chunk_place


@kernel
def grads_tied_kernel(
    p_q,  # [B, T, H, K]
    p_k,  # [B, T, H, K]
    p_v,  # [B, T, H, V]
    p_beta,  # [B, T, H]
    p_cu,  # [N + 1] or None
    p_do,  # [B, T, H, V]
    p_U,  # [B, T, H, V]
    p_dP,  # [B, T, H, V]
    p_starts,  # [slots, H, V, K]
    p_ends,  # [slots, H, V, K]
    p_dq,  # [B, T, H, K]
    p_dk,  # [B, T, H, K]
    p_dbeta,  # [B, T, H]
    scale,
    T,
    H,
    N,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
    ACC: tl.constexpr,
):
    """(2.14) to (2.16), V in one tile. Grid: chunk slots * H, heads fastest."""
    i_s, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    row, count = chunk_place(p_cu, i_s, i_h, T, H, N, C)
    if count > 0:
        i_t, i_k, i_c = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
        m_t = i_t < count
        m_tk, m_tv = m_t[:, None] & (i_k < K)[None, :], m_t[:, None] & (i_c < V)[None, :]
        m_s = (i_c < V)[:, None] & (i_k < K)[None, :]
        o_t = row + i_t.to(tl.int64) * H  # [C]
        o_tk, o_tv = o_t[:, None] * K + i_k[None, :], o_t[:, None] * V + i_c[None, :]
        o_h = (i_s.to(tl.int64) * H + i_h) * V * K + i_c[:, None] * K + i_k[None, :]
        # a product that is transposed and then a first operand is miscompiled by triton 3.4 to 3.6:
        # wherever both X and X^T are wanted, both are computed
        lower, upper = i_t[:, None] >= i_t[None, :], i_t[:, None] <= i_t[None, :]
        strict, above = i_t[:, None] > i_t[None, :], i_t[:, None] < i_t[None, :]

        b_k = tl.load(p_k + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        b_do = tl.load(p_do + o_tv, mask=m_tv, other=0.0).to(DOT)  # [C, BV]
        b_U = tl.load(p_U + o_tv, mask=m_tv, other=0.0).to(DOT)  # [C, BV]
        b_S = tl.load(p_starts + o_h, mask=m_s, other=0.0).to(DOT)  # [BV, BK]
        b_dA = tl.dot(b_do, tl.trans(b_U), input_precision=PREC, out_dtype=ACC)  # [C, C]
        b_dA = tl.where(lower, b_dA, 0.0).to(DOT)
        b_dq = tl.dot(b_do, b_S, input_precision=PREC, out_dtype=ACC)  # [C, BK]
        b_dq = tl.dot(b_dA, b_k, b_dq, input_precision=PREC, out_dtype=ACC) * scale
        tl.store(p_dq + o_tk, b_dq.to(p_dq.dtype.element_ty), mask=m_tk)

        b_q = tl.load(p_q + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        b_dA = tl.dot(b_U, tl.trans(b_do), input_precision=PREC, out_dtype=ACC)  # dA^T
        b_dA = tl.where(upper, b_dA, 0.0).to(DOT)
        b_dk = tl.dot(b_dA, b_q, input_precision=PREC, out_dtype=ACC) * scale  # [C, BK]
        b_D = tl.load(p_ends + o_h, mask=m_s, other=0.0).to(DOT)  # [BV, BK]
        b_dk = tl.dot(b_U, b_D, b_dk, input_precision=PREC, out_dtype=ACC)
        b_dP = tl.load(p_dP + o_tv, mask=m_tv, other=0.0).to(DOT)  # [C, BV]
        b_G = tl.dot(b_dP, tl.trans(b_U), input_precision=PREC, out_dtype=ACC)
        b_G = tl.where(strict, b_G, 0.0)
        b_Gt = tl.dot(b_U, tl.trans(b_dP), input_precision=PREC, out_dtype=ACC)
        b_G = (b_G + tl.where(above, b_Gt, 0.0)).to(DOT)  # G + G^T
        b_dk -= tl.dot(b_dP, b_S, input_precision=PREC, out_dtype=ACC)
        b_dk -= tl.dot(b_G, b_k, input_precision=PREC, out_dtype=ACC)
        tl.store(p_dk + o_tk, b_dk.to(p_dk.dtype.element_ty), mask=m_tk)

        # R = P - L U is what the memory got wrong, and dP = beta * Z with Z the gradient of R
        b_KK = tl.dot(b_k, tl.trans(b_k), input_precision=PREC, out_dtype=ACC)  # [C, C]
        b_R = tl.load(p_v + o_tv, mask=m_tv, other=0.0).to(ACC)  # [C, BV]
        b_R -= tl.dot(b_k, tl.trans(b_S), input_precision=PREC, out_dtype=ACC)
        b_L = tl.where(strict, b_KK, 0.0).to(DOT)
        b_R -= tl.dot(b_L, b_U, input_precision=PREC, out_dtype=ACC)
        b_beta = tl.load(p_beta + o_t, mask=m_t, other=1.0).to(ACC)  # [C]
        small = tl.abs(b_beta) < 0.0625
        b_dbeta = tl.sum(b_R * b_dP.to(ACC), axis=1) / tl.where(small, 1.0, b_beta)
        if (
            tl.sum(small.to(tl.int32), axis=0) > 0
        ):  # Z by itself, where dividing by beta would lose it
            b_A = tl.dot(b_k, tl.trans(b_q), input_precision=PREC, out_dtype=ACC) * scale  # A^T
            b_A = tl.where(upper, b_A, 0.0).to(DOT)
            b_L = tl.where(above, b_KK, 0.0).to(DOT)  # L^T
            b_Z = tl.dot(b_k, tl.trans(b_D), input_precision=PREC, out_dtype=ACC)
            b_Z = tl.dot(b_A, b_do, b_Z, input_precision=PREC, out_dtype=ACC)  # dU
            b_Z -= tl.dot(b_L, b_dP, input_precision=PREC, out_dtype=ACC)
            b_dbeta = tl.where(small, tl.sum(b_R * b_Z, axis=1), b_dbeta)
        tl.store(p_dbeta + o_t, b_dbeta.to(p_dbeta.dtype.element_ty), mask=m_t)
