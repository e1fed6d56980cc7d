"""First stages of the untied family, all chunks at once: what every token of a chunk reads, as a map of the state.

A query reads after its token's gate, a before it; the writes are b's and k's, of directions of their own (5.26):

    QB_ij = q_i^T exp(g_(j, i]) b_j      QK_ij = q_i^T exp(g_(j, i]) k_j        i >= j
    AB_ij = a_i^T exp(g_(j, i-1]) b_j    AK_ij = a_i^T exp(g_(j, i-1]) k_j      i > j                 (6.30)
    X = (I - AB)^{-1}                                                                                (6.31)
    Q~ = exp(g_(start, i]) q     A~ = exp(g_(start, i-1]) a     B^ = exp(g_(j, end]) b     K^ = exp(g_(j, end]) k
    fade = exp(g_(start, end])                                                                       (6.32)

With them the reads of a chunk, a's and the queries', are affine maps of the state S before it, known before S is:

    U = W S + U0         W = X A~            U0 = X (AK V)                                           (6.33)
    O = Q2 S + O0        Q2 = Q~ + QB W      O0 = QB U0 + QK V                                       (6.34)

Without decay every factor is 1 and (6.32) is the operands as they are. One kernel makes (6.30) to (6.32), a second one
(6.33) and (6.34), tile after tile of K and of V: W and Q2 are to A~ and Q~ what U0 and O0 are to AK V and QK V.
"""

# pyright: reportArgumentType=false
import triton.language as tl

from ..runtime import kernel
from .decay import base_exponents, gate_sums, level_gates, level_pairs, load_gates, scaled
from .place import chunk_place
from .triangular import add_product, guarded_inverse, times_inverse


@kernel
def prepare_untied_kernel(
    p_q,  # [B, T, H, K]
    p_k,  # [B, T, H, K]
    p_a,  # [B, T, H, K]
    p_b,  # [B, T, H, K]
    p_g,  # [B, T, H, G] or None
    p_cu,  # [N + 1] or None
    p_X,  # [B, T, H, C] X rounded
    p_Xlow,  # [B, T, H, C] what the rounding left
    p_QB,  # [B, T, H, C]
    p_QK,  # [B, T, H, C]
    p_AK,  # [B, T, H, C]
    p_Q,  # [B, T, H, K] Q~, or None, without decay, and so the next four
    p_A,  # [B, T, H, K] A~
    p_B,  # [B, T, H, K] B^
    p_K,  # [B, T, H, K] K^
    p_fade,  # [slots, H, K]
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
    """(6.30) to (6.32). Grid: chunk slots * H, heads fastest. Tokens that do not exist are zeros: the identity."""
    i_s, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    row, count = chunk_place(p_cu, i_s, i_h, T, H, N, C)
    i_t = tl.arange(0, C)  # [C]
    m_t = i_t < count
    o_t = i_t * H  # [C] from here on int32: only a chunk's first row may lie far away
    b_QB = tl.zeros([C, C], dtype=ACC)
    b_QK = tl.zeros([C, C], dtype=ACC)
    b_AB = tl.zeros([C, C], dtype=ACC)
    b_AK = tl.zeros([C, C], dtype=ACC)
    for k0 in range(0, K, BK):
        i_k = k0 + tl.arange(0, BK)  # [BK]
        m_tk = m_t[:, None] & (i_k < K)[None, :]
        o_tk = o_t[:, None] * K + i_k[None, :]
        b_q = tl.load(p_q + row * K + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        b_k = tl.load(p_k + row * K + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        b_a = tl.load(p_a + row * K + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        b_b = tl.load(p_b + row * K + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        if p_g is None:
            b_bt, b_kt = tl.trans(b_b), tl.trans(b_k)
            b_QB = tl.dot(b_q, b_bt, b_QB, input_precision=PREC, out_dtype=ACC)
            b_QK = tl.dot(b_q, b_kt, b_QK, input_precision=PREC, out_dtype=ACC)
            b_AB = tl.dot(b_a, b_bt, b_AB, input_precision=PREC, out_dtype=ACC)
            b_AK = tl.dot(b_a, b_kt, b_AK, input_precision=PREC, out_dtype=ACC)
        else:
            o_g = o_t[:, None] * G + i_k[None, :] % G
            b_g = load_gates(p_g + row * G, o_g, m_tk, DOT, ACC)  # [C, BK]
            b_QB, b_QK = faded_scores(
                b_QB, b_QK, b_q, b_b, b_k, b_g, 0, C, LEVELS, FLOOR, DOT, PREC, ACC
            )
            b_AB, b_AK = faded_scores(
                b_AB, b_AK, b_a, b_b, b_k, b_g, 1, C, LEVELS, FLOOR, DOT, PREC, ACC
            )
            i, t = i_t[:, None], i_t[None, :]
            b_e = tl.exp(gate_sums(t <= i, b_g, DOT, PREC, ACC))  # [C, BK]
            tl.store(p_Q + row * K + o_tk, scaled(b_q, b_e, p_Q.dtype.element_ty, ACC), mask=m_tk)
            b_e = tl.exp(gate_sums(t < i, b_g, DOT, PREC, ACC))  # [C, BK]
            tl.store(p_A + row * K + o_tk, scaled(b_a, b_e, p_A.dtype.element_ty, ACC), mask=m_tk)
            b_e = tl.exp(gate_sums(t > i, b_g, DOT, PREC, ACC))  # [C, BK]
            tl.store(p_B + row * K + o_tk, scaled(b_b, b_e, p_B.dtype.element_ty, ACC), mask=m_tk)
            tl.store(p_K + row * K + o_tk, scaled(b_k, b_e, p_K.dtype.element_ty, ACC), mask=m_tk)
            o_f = (i_s.to(tl.int64) * H + i_h) * K + i_k
            b_total = tl.sum(b_g.to(ACC), axis=0)  # [BK]
            tl.store(p_fade + o_f, tl.exp(b_total), mask=i_k < K)
    o_C = row * C + o_t[:, None] * C + i_t[None, :]
    i, j = i_t[:, None], i_t[None, :]
    b_QB, b_QK = tl.where(i >= j, b_QB, 0.0), tl.where(i >= j, b_QK, 0.0)
    tl.store(p_QB + o_C, b_QB.to(p_QB.dtype.element_ty), mask=m_t[:, None])
    tl.store(p_QK + o_C, b_QK.to(p_QK.dtype.element_ty), mask=m_t[:, None])
    b_AK = tl.where(i > j, b_AK, 0.0)
    tl.store(p_AK + o_C, b_AK.to(p_AK.dtype.element_ty), mask=m_t[:, None])
    b_AB = tl.where(i > j, -b_AB, 0.0)
    b_X = guarded_inverse(b_AB, C, INVERSE, PREC, ACC, SAFE)
    b_high = b_X.to(p_X.dtype.element_ty)
    tl.store(p_X + o_C, b_high, mask=m_t[:, None])
    b_low = (b_X - b_high.to(ACC)).to(p_X.dtype.element_ty)
    tl.store(p_Xlow + o_C, b_low, mask=m_t[:, None])


@kernel
def faded_scores(
    b_XB,
    b_XK,
    b_x,
    b_b,
    b_k,
    b_g,
    LAG: tl.constexpr,  # 0: x reads after its token's gate, as q; 1: before it, as a
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    FLOOR: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
    ACC: tl.constexpr,
):
    """(6.30) of one reader x from BK channels, added to its two scores; above its last pair nothing is meant."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    for n in range(LEVELS):
        block = C >> n
        b_e = tl.exp(gate_sums(level_gates(i, j, block, LAG), b_g, DOT, PREC, ACC))  # [C, BK]
        b_xe = scaled(b_x, b_e, DOT, ACC)
        b_we = tl.trans(scaled(b_b, b_e, DOT, ACC))
        b_s = tl.dot(b_xe, b_we, input_precision=PREC, out_dtype=ACC)
        b_XB += tl.where(level_pairs(i, j, block), b_s, 0.0)
        b_we = tl.trans(scaled(b_k, b_e, DOT, ACC))
        b_s = tl.dot(b_xe, b_we, input_precision=PREC, out_dtype=ACC)
        b_XK += tl.where(level_pairs(i, j, block), b_s, 0.0)
    BASE: tl.constexpr = C >> LEVELS
    if BASE > 1:
        b_e = base_exponents(i, j, b_g, BASE, FLOOR, DOT, PREC, ACC, LAG)  # [C, BK]
        b_x = scaled(b_x, tl.exp(b_e), DOT, ACC)
        if LAG == 1:
            b_e = base_exponents(i, j, b_g, BASE, FLOOR, DOT, PREC, ACC)
        b_e = tl.exp(-b_e)
        b_b, b_k = scaled(b_b, b_e, DOT, ACC), scaled(b_k, b_e, DOT, ACC)
    if BASE > 1 or LAG == 0:  # in a block of one token only its query reads
        m_base = i // BASE == j // BASE
        b_s = tl.dot(b_x, tl.trans(b_b), input_precision=PREC, out_dtype=ACC)
        b_XB += tl.where(m_base, b_s, 0.0)
        b_s = tl.dot(b_x, tl.trans(b_k), input_precision=PREC, out_dtype=ACC)
        b_XK += tl.where(m_base, b_s, 0.0)
    return b_XB, b_XK


@kernel
def reads_untied_kernel(
    p_Q,  # [B, T, H, K] Q~
    p_A,  # [B, T, H, K] A~
    p_v,  # [B, T, H, V]
    p_X,  # [B, T, H, C]
    p_Xlow,  # [B, T, H, C]
    p_QB,  # [B, T, H, C]
    p_QK,  # [B, T, H, C]
    p_AK,  # [B, T, H, C]
    p_cu,  # [N + 1] or None
    p_U,  # [B, T, H, K + V] W and U0
    p_O,  # [B, T, H, K + V] Q2 and O0
    T,
    H,
    N,
    K: tl.constexpr,
    V: tl.constexpr,
    BX: tl.constexpr,
    NK: tl.constexpr,
    NX: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
    ACC: tl.constexpr,
    EXACT: tl.constexpr,
):
    """(6.33) and (6.34) for BX columns of K or of V. Grid: chunk slots * H * NX, tiles fastest, NK of them of K."""
    i_x, i_sh = tl.program_id(0) % NX, tl.program_id(0) // NX
    i_s, i_h = i_sh // H, i_sh % H
    row, count = chunk_place(p_cu, i_s, i_h, T, H, N, C)
    if count > 0:
        i_t = tl.arange(0, C)  # [C]
        m_t = i_t < count
        o_t = i_t * H  # [C]
        o_C = row * C + o_t[:, None] * C + i_t[None, :]  # [C, C]
        m_C = m_t[:, None]
        # everything is held transposed, [BX, C]: sums stay in registers as the first operands of the next product
        if i_x < NK:
            i_c = i_x * BX + tl.arange(0, BX)  # [BX]
            m_c, o_c = i_c < K, i_c
            m_tk = m_t[:, None] & m_c[None, :]
            o_tk = row * K + o_t[:, None] * K + i_c[None, :]
            b_Z = tl.trans(tl.load(p_A + o_tk, mask=m_tk, other=0.0)).to(ACC)  # A~^T
            b_Y = tl.trans(tl.load(p_Q + o_tk, mask=m_tk, other=0.0)).to(ACC)  # Q~^T
        else:
            i_c = (i_x - NK) * BX + tl.arange(0, BX)
            m_c, o_c = i_c < V, K + i_c
            m_tv = m_t[:, None] & m_c[None, :]
            o_tv = row * V + o_t[:, None] * V + i_c[None, :]
            b_vt = tl.trans(tl.load(p_v + o_tv, mask=m_tv, other=0.0).to(DOT))  # [BX, C]
            b_AKt = tl.trans(tl.load(p_AK + o_C, mask=m_C, other=0.0).to(DOT))
            b_Z = tl.dot(b_vt, b_AKt, input_precision=PREC, out_dtype=ACC)  # (AK V)^T
            b_QKt = tl.trans(tl.load(p_QK + o_C, mask=m_C, other=0.0).to(DOT))
            b_Y = tl.dot(b_vt, b_QKt, input_precision=PREC, out_dtype=ACC)  # (QK V)^T
        b_Xh = tl.trans(tl.load(p_X + o_C, mask=m_C, other=0.0))
        b_Xl = tl.trans(tl.load(p_Xlow + o_C, mask=m_C, other=0.0))
        b_U = times_inverse(b_Z, b_Xh, b_Xl, DOT, PREC, ACC, EXACT)  # (6.33)
        b_QBt = tl.trans(tl.load(p_QB + o_C, mask=m_C, other=0.0).to(DOT))
        b_O = add_product(b_Y, b_U, b_QBt, DOT, PREC, ACC)  # (6.34)
        o_tx = row * (K + V) + o_t[:, None] * (K + V) + o_c[None, :]
        m_tx = m_t[:, None] & m_c[None, :]
        tl.store(p_U + o_tx, tl.trans(b_U.to(p_U.dtype.element_ty)), mask=m_tx)
        tl.store(p_O + o_tx, tl.trans(b_O.to(p_O.dtype.element_ty)), mask=m_tx)
