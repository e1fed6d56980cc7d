"""First stage, all chunks at once: the C x C matrix that turns what the memory gets wrong into what is written.

    L_ij = k_i^T exp(g_(j, i]) k_j,  i > j        X = (I + L diag(beta))^{-1}                         (6.10)
    A_ij = q_i^T exp(g_(j, i]) k_j,  i >= j                                                          (6.11)
    Q~ = exp(g_(1, i]) q         K~ = exp(g_(1, i]) k         K^ = exp(g_(j, end]) k                  (6.12)
    fade_1 = exp(g_1)            fade = exp(g_(1, end])

The gate of the chunk's first token is kept apart from all others: the walk multiplies the state by it, in float32,
and so the first token reads with a factor of 1, whatever float16 can hold. Without decay every factor is 1: X is all
there is to do, and the walk forms A from q and k as they are (in float32, where a product is six and wants
registers, A is formed here all the same). The T of (2.5) is diag(beta) X. X itself passes on, because what the
memory gets wrong, R = X (V - K~ S), serves the backward better than U = beta R: the gradient of beta needs it where
beta is 0.
"""

# pyright: reportArgumentType=false
import triton.language as tl

from ..runtime import kernel
from .decay import base_exponents, gate_sums, level_gates, level_pairs, load_gates, scaled
from .place import chunk_place
from .triangular import guarded_inverse


@kernel
def prepare_tied_kernel(
    p_q,  # [B, T, H, K] or None, where nobody wants A
    p_k,  # [B, T, H, K]
    p_beta,  # [B, T, H]
    p_g,  # [B, T, H, G] or None
    p_cu,  # [N + 1] or None
    p_X,  # [B, T, H, C] X rounded
    p_Xlow,  # [B, T, H, C] what the rounding left
    p_A,  # [B, T, H, C] or None
    p_Qr,  # [B, T, H, K] or None, without decay, and so the next three
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
    LEVELS: tl.constexpr,
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
    o_t = i_t * H  # [C] from here on int32: only a chunk's first row may lie far away
    b_L = tl.zeros([C, C], dtype=ACC)
    b_A = tl.zeros([C, C], dtype=ACC)
    for k0 in range(0, K, BK):
        i_k = k0 + tl.arange(0, BK)  # [BK]
        m_tk = m_t[:, None] & (i_k < K)[None, :]
        o_tk = o_t[:, None] * K + i_k[None, :]
        b_k = tl.load(p_k + row * K + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        if p_q is not None:
            b_q = tl.load(p_q + row * K + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        if p_g is None:
            b_L = tl.dot(b_k, tl.trans(b_k), b_L, input_precision=PREC, out_dtype=ACC)
            if p_A is not None:
                b_A = tl.dot(b_q, tl.trans(b_k), b_A, input_precision=PREC, out_dtype=ACC)
        else:
            o_g = o_t[:, None] * G + i_k[None, :] % G
            b_g = load_gates(p_g + row * G, o_g, m_tk, DOT, ACC)  # [C, BK]
            b_A, b_L = decayed_scores(b_A, b_L, b_q, b_k, b_g, C, LEVELS, FLOOR, DOT, PREC, ACC)
            i, t = i_t[:, None], i_t[None, :]
            b_e = tl.exp(gate_sums((t > 0) & (t <= i), b_g, DOT, PREC, ACC))  # [C, BK]
            tl.store(p_Qr + row * K + o_tk, scaled(b_q, b_e, p_Qr.dtype.element_ty, ACC), mask=m_tk)
            tl.store(p_Kr + row * K + o_tk, scaled(b_k, b_e, p_Kr.dtype.element_ty, ACC), mask=m_tk)
            b_e = tl.exp(gate_sums(t > i, b_g, DOT, PREC, ACC))  # [C, BK]
            tl.store(p_Kw + row * K + o_tk, scaled(b_k, b_e, p_Kw.dtype.element_ty, ACC), mask=m_tk)
            o_f = (i_s.to(tl.int64) * H + i_h) * 2 * K + i_k
            b_first = tl.sum(tl.where(i == 0, b_g.to(ACC), 0.0), axis=0)  # [BK]
            tl.store(p_fade + o_f, tl.exp(b_first), mask=i_k < K)
            b_rest = tl.sum(tl.where(i == 0, 0.0, b_g.to(ACC)), axis=0)
            tl.store(p_fade + o_f + K, tl.exp(b_rest), mask=i_k < K)
    o_C = o_t[:, None] * C + i_t[None, :]
    if p_A is not None:
        b_A = tl.where(i_t[:, None] >= i_t[None, :], b_A, 0.0)
        tl.store(p_A + row * C + o_C, b_A.to(p_A.dtype.element_ty), mask=m_t[:, None])
    b_beta = tl.load(p_beta + row + o_t, mask=m_t, other=0.0).to(ACC)  # [C]
    b_L = tl.where(i_t[:, None] > i_t[None, :], b_L * b_beta[None, :], 0.0)
    b_X = guarded_inverse(b_L, C, INVERSE, PREC, ACC, SAFE)
    b_high = b_X.to(p_X.dtype.element_ty)
    tl.store(p_X + row * C + o_C, b_high, mask=m_t[:, None])
    b_low = (b_X - b_high.to(ACC)).to(p_X.dtype.element_ty)
    tl.store(p_Xlow + row * C + o_C, b_low, mask=m_t[:, None])


@kernel
def decayed_scores(
    b_A,
    b_L,
    b_q,
    b_k,
    b_g,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    FLOOR: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
    ACC: tl.constexpr,
):
    """(6.10) and (6.11) from BK channels, added to b_A and b_L [C, C]; what lies above the diagonal is not meant."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    for n in range(LEVELS):
        block = C >> n
        b_e = tl.exp(gate_sums(level_gates(i, j, block), b_g, DOT, PREC, ACC))  # [C, BK]
        b_ke = scaled(b_k, b_e, DOT, ACC)
        b_s = tl.dot(b_ke, tl.trans(b_ke), input_precision=PREC, out_dtype=ACC)
        b_L += tl.where(level_pairs(i, j, block), b_s, 0.0)
        b_qe = scaled(b_q, b_e, DOT, ACC)
        b_s = tl.dot(b_qe, tl.trans(b_ke), input_precision=PREC, out_dtype=ACC)
        b_A += tl.where(level_pairs(i, j, block), b_s, 0.0)
    BASE: tl.constexpr = C >> LEVELS
    m_base = i // BASE == j // BASE
    if BASE == 1:  # the diagonal, which L has not
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PREC, out_dtype=ACC)
    else:
        b_x = base_exponents(i, j, b_g, BASE, FLOOR, DOT, PREC, ACC)
        b_kw = tl.trans(scaled(b_k, tl.exp(-b_x), DOT, ACC))
        b_e = tl.exp(b_x)
        b_s = tl.dot(scaled(b_k, b_e, DOT, ACC), b_kw, input_precision=PREC, out_dtype=ACC)
        b_L += tl.where(m_base, b_s, 0.0)
        b_s = tl.dot(scaled(b_q, b_e, DOT, ACC), b_kw, input_precision=PREC, out_dtype=ACC)
    b_A += tl.where(m_base, b_s, 0.0)
    return b_A, b_L
