"""First stage, all chunks at once: the C x C matrix that turns what the memory gets wrong into what is written.

    L_ij = k_i^T exp(g_(j, i]) k_j,  i > j        X = (I + L diag(beta))^{-1}                         (6.10)
    A_ij = q_i^T exp(g_(j, i]) k_j,  i >= j                                                          (6.11)
    Q~ = exp(g_(1, i]) q         K~ = exp(g_(1, i]) k         K^ = exp(g_(j, end]) k                  (6.12)
    fade_1 = exp(g_1)            fade = exp(g_(1, end])

The gate of the chunk's first token is kept apart from all others: the walk multiplies the state by it, in float32, and so
the first token reads with a factor of 1, whatever float16 can hold. Without decay every factor is 1: X is all there is to do, and the next stage forms A from q and k as they are. The T of
(2.5) is diag(beta) X. X itself passes on, because what the memory gets wrong, R = X (V - K~ S), serves the backward
better than U = beta R: the gradient of beta needs it where beta is 0.
"""

# pyright: reportArgumentType=false
import triton.language as tl

from ..runtime import kernel
from .decay import base_gates, gate_sums, level_gates, level_pairs
from .place import chunk_place
from .triangular import guarded_inverse

FORGOTTEN = tl.constexpr(-2048.0)  # exp of it is exactly 0; in place of -inf it keeps 0 * inf away


@kernel
def prepare_tied_kernel(
    p_q,  # [B, T, H, K] or None, without decay
    p_k,  # [B, T, H, K]
    p_beta,  # [B, T, H]
    p_g,  # [B, T, H, G] or None
    p_cu,  # [N + 1] or None
    p_X,  # [B, T, H, C]
    p_A,  # [B, T, H, C] or None, and so the next four
    p_Qr,  # [B, T, H, K]
    p_Kr,  # [B, T, H, K]
    p_Kw,  # [B, T, H, K]
    p_fade,  # [slots, H, 2, K]
    T,
    H,
    N,
    K: tl.constexpr,
    G: tl.constexpr,  # 1: one decay a head; K: one a key channel
    BK: tl.constexpr,
    C: tl.constexpr,
    BASE: tl.constexpr,
    FLOOR: tl.constexpr,
    DOT: tl.constexpr,
    INVERSE: tl.constexpr,
    PREC: tl.constexpr,
    SAFE: tl.constexpr,
    ACC: tl.constexpr,
):
    """(6.10) to (6.12). Grid: chunk slots * H, heads fastest. Tokens that do not exist are zeros: the identity."""
    i_s, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    row, count = chunk_place(p_cu, i_s, i_h, T, H, N, C)
    i_t = tl.arange(0, C)  # [C]
    m_t = i_t < count
    o_t = row + i_t.to(tl.int64) * H  # [C]
    b_L = tl.zeros([C, C], dtype=ACC)
    b_A = tl.zeros([C, C], dtype=ACC)
    for k0 in range(0, K, BK):
        i_k = k0 + tl.arange(0, BK)  # [BK]
        m_tk = m_t[:, None] & (i_k < K)[None, :]
        o_tk = o_t[:, None] * K + i_k[None, :]
        b_k = tl.load(p_k + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        if p_g is None:
            b_L = tl.dot(b_k, tl.trans(b_k), b_L, input_precision=PREC, out_dtype=ACC)
        else:
            b_q = tl.load(p_q + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
            b_g = tl.load(p_g + o_t[:, None] * G + i_k[None, :] % G, mask=m_tk, other=0.0)
            b_g = tl.maximum(b_g.to(ACC), FORGOTTEN)  # [C, BK]
            b_A, b_L = decayed_scores(b_A, b_L, b_q, b_k, b_g, C, BASE, FLOOR, DOT, PREC, ACC)
            i, t = i_t[:, None], i_t[None, :]
            b_e = tl.exp(gate_sums((t > 0) & (t <= i), b_g, DOT, PREC, ACC))  # [C, BK]
            tl.store(p_Qr + o_tk, (b_q.to(ACC) * b_e).to(p_Qr.dtype.element_ty), mask=m_tk)
            tl.store(p_Kr + o_tk, (b_k.to(ACC) * b_e).to(p_Kr.dtype.element_ty), mask=m_tk)
            b_e = tl.exp(gate_sums(t > i, b_g, DOT, PREC, ACC))  # [C, BK]
            tl.store(p_Kw + o_tk, (b_k.to(ACC) * b_e).to(p_Kw.dtype.element_ty), mask=m_tk)
            o_f = (i_s.to(tl.int64) * H + i_h) * 2 * K + i_k
            b_first = tl.sum(tl.where(i == 0, b_g, 0.0), axis=0)  # [BK]
            tl.store(p_fade + o_f, tl.exp(b_first), mask=i_k < K)
            b_rest = tl.sum(tl.where(i == 0, 0.0, b_g), axis=0)
            tl.store(p_fade + o_f + K, tl.exp(b_rest), mask=i_k < K)
    o_C = o_t[:, None] * C + i_t[None, :]
    if p_A is not None:
        b_A = tl.where(i_t[:, None] >= i_t[None, :], b_A, 0.0)
        tl.store(p_A + o_C, b_A.to(p_A.dtype.element_ty), mask=m_t[:, None])
    b_beta = tl.load(p_beta + o_t, mask=m_t, other=0.0).to(ACC)  # [C]
    b_L = tl.where(i_t[:, None] > i_t[None, :], b_L * b_beta[None, :], 0.0)
    b_X = guarded_inverse(b_L, C, INVERSE, PREC, ACC, SAFE)
    tl.store(p_X + o_C, b_X.to(p_X.dtype.element_ty), mask=m_t[:, None])


@kernel
def decayed_scores(
    b_A,
    b_L,
    b_q,
    b_k,
    b_g,
    C: tl.constexpr,
    BASE: tl.constexpr,
    FLOOR: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
    ACC: tl.constexpr,
):
    """(6.10) and (6.11) from BK channels, added to b_A and b_L [C, C]; what lies above the diagonal is not meant."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    for level in tl.static_range(0, 8):
        h: tl.constexpr = C >> (level + 1)
        if h >= BASE:
            b_e = tl.exp(gate_sums(level_gates(i, j, h), b_g, DOT, PREC, ACC))  # [C, BK]
            b_qe, b_ke = (b_q.to(ACC) * b_e).to(DOT), (b_k.to(ACC) * b_e).to(DOT)
            m_pair = level_pairs(i, j, h)
            b_s = tl.dot(b_qe, tl.trans(b_ke), input_precision=PREC, out_dtype=ACC)
            b_A += tl.where(m_pair, b_s, 0.0)
            b_s = tl.dot(b_ke, tl.trans(b_ke), input_precision=PREC, out_dtype=ACC)
            b_L += tl.where(m_pair, b_s, 0.0)
    m_base = i // BASE == j // BASE
    b_row, b_col = b_q, b_k
    if BASE > 1:
        b_x = gate_sums(base_gates(i, j, BASE), tl.maximum(b_g, FLOOR), DOT, PREC, ACC)
        b_row, b_col = (b_q.to(ACC) * tl.exp(b_x)).to(DOT), (b_k.to(ACC) * tl.exp(-b_x)).to(DOT)
        b_s = (b_k.to(ACC) * tl.exp(b_x)).to(DOT)
        b_s = tl.dot(b_s, tl.trans(b_col), input_precision=PREC, out_dtype=ACC)
        b_L += tl.where(m_base, b_s, 0.0)
    b_s = tl.dot(b_row, tl.trans(b_col), input_precision=PREC, out_dtype=ACC)
    b_A += tl.where(m_base, b_s, 0.0)
    return b_A, b_L
