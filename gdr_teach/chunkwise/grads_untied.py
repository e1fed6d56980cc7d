"""Last stages of the untied family's backward, all chunks at once: first along V, then along K.

S is the state before the chunk, D the gradient of the state after it, U what a read, all from the walks. Along V, where
dP is the gradient of A~ S + AK V:

    dU = B^ D + scale * QB^T dO        dP = X^T dU        dV = K^ D + scale * QK^T dO + AK^T dP       (6.36)

Along K, with the gradients of the scores formed where they are used and not kept:

    dQB = scale * dO U^T    dQK = scale * dO V^T    dAB = dP U^T    dAK = dP V^T                      (6.37)
    dQ~ = scale * dO S^T    dA~ = dP S^T            dB^ = U D^T     dK^ = V D^T                       (6.38)
    dq_i = exp(g_(start, i]) dQ~_i + sum_j exp(g_(j, i]) (dQB_ij b_j + dQK_ij k_j)
    da_i = exp(g_(start, i-1]) dA~_i + sum_j exp(g_(j, i-1]) (dAB_ij b_j + dAK_ij k_j)                (6.39)
    db_j = exp(g_(j, end]) dB^_j + sum_i (exp(g_(j, i]) dQB_ij q_i + exp(g_(j, i-1]) dAB_ij a_i)
    dk_j = the same with dK^, dQK and dAK                                                            (6.40)

(5.26) says which pairs a sum holds. dAB needs no product with X, for U is X times that side already. q and a are
readers, b and k writers, and each pair goes through one function. dg_t is the sum of x dx over all terms whose
exponent holds g_t, formed term by term as in (6.21), and rowsum(S * D) * fade, since every token fades S.
"""

# pyright: reportArgumentType=false
import triton.language as tl

from ..runtime import kernel
from .decay import (
    base_exponents,
    base_gates,
    gate_gradient,
    gate_sums,
    level_gates,
    level_pairs,
    load_gates,
    scaled,
)
from .grads import rounded_product
from .place import chunk_place
from .triangular import add_product, times_inverse


@kernel
def values_untied_kernel(
    p_B,  # [B, T, H, K] B^
    p_K,  # [B, T, H, K] K^
    p_X,  # [B, T, H, C]
    p_Xlow,  # [B, T, H, C]
    p_QB,  # [B, T, H, C]
    p_QK,  # [B, T, H, C]
    p_AK,  # [B, T, H, C]
    p_cu,  # [N + 1] or None
    p_do,  # [B, T, H, V]
    p_ends,  # [slots, H, V, K]
    p_dP,  # [B, T, H, V]
    p_dv,  # [B, T, H, V]
    scale,
    T,
    H,
    N,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NV: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
    ACC: tl.constexpr,
    EXACT: tl.constexpr,
):
    """(6.36) for BV of the V columns. Grid: chunk slots * H * NV, tiles of V fastest, then heads."""
    i_v, i_sh = tl.program_id(0) % NV, tl.program_id(0) // NV
    i_s, i_h = i_sh // H, i_sh % H
    row, count = chunk_place(p_cu, i_s, i_h, T, H, N, C)
    if count > 0:
        i_t, i_c = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
        m_t, m_v = i_t < count, i_c < V
        m_C = m_t[:, None]
        o_t = i_t * H  # [C] inside the chunk: int32, its first row is int64
        o_C = row * C + o_t[:, None] * C + i_t[None, :]  # [C, C]
        o_tv = row * V + o_t[:, None] * V + i_c[None, :]
        m_tv = m_t[:, None] & m_v[None, :]
        own = (i_s.to(tl.int64) * H + i_h) * V * K
        # everything is held transposed, [BV, C], as in the walks
        b_dU = tl.zeros([BV, C], dtype=ACC)
        b_dv = tl.zeros([BV, C], dtype=ACC)
        for k0 in range(0, K, BK):
            i_k = k0 + tl.arange(0, BK)
            m_tk, m_s = m_t[:, None] & (i_k < K)[None, :], m_v[:, None] & (i_k < K)[None, :]
            o_tk = row * K + o_t[:, None] * K + i_k[None, :]
            o_h = own + i_c[:, None] * K + i_k[None, :]
            b_D = tl.load(p_ends + o_h, mask=m_s, other=0.0).to(DOT)  # [BV, BK]
            b_Bt = tl.trans(tl.load(p_B + o_tk, mask=m_tk, other=0.0).to(DOT))  # [BK, C]
            b_dU = tl.dot(b_D, b_Bt, b_dU, input_precision=PREC, out_dtype=ACC)
            b_Kt = tl.trans(tl.load(p_K + o_tk, mask=m_tk, other=0.0).to(DOT))
            b_dv = tl.dot(b_D, b_Kt, b_dv, input_precision=PREC, out_dtype=ACC)
        b_do = tl.load(p_do + o_tv, mask=m_tv, other=0.0)  # [C, BV]
        b_do = tl.trans((b_do.to(ACC) * scale).to(DOT))  # [BV, C]
        b_QB = tl.load(p_QB + o_C, mask=m_C, other=0.0).to(DOT)  # [C, C]
        b_dU = tl.dot(b_do, b_QB, b_dU, input_precision=PREC, out_dtype=ACC)
        b_QK = tl.load(p_QK + o_C, mask=m_C, other=0.0).to(DOT)
        b_dv = tl.dot(b_do, b_QK, b_dv, input_precision=PREC, out_dtype=ACC)
        b_Xh = tl.load(p_X + o_C, mask=m_C, other=0.0)
        b_Xl = tl.load(p_Xlow + o_C, mask=m_C, other=0.0)
        b_dP = times_inverse(b_dU, b_Xh, b_Xl, DOT, PREC, ACC, EXACT)  # [BV, C]
        tl.store(p_dP + o_tv, tl.trans(b_dP.to(p_dP.dtype.element_ty)), mask=m_tv)
        b_AK = tl.load(p_AK + o_C, mask=m_C, other=0.0).to(DOT)
        b_dv = add_product(b_dv, b_dP, b_AK, DOT, PREC, ACC)
        tl.store(p_dv + o_tv, tl.trans(b_dv.to(p_dv.dtype.element_ty)), mask=m_tv)


@kernel
def keys_untied_kernel(
    p_q,  # [B, T, H, K]
    p_k,  # [B, T, H, K]
    p_v,  # [B, T, H, V]
    p_a,  # [B, T, H, K]
    p_b,  # [B, T, H, K]
    p_g,  # [B, T, H, G] or None
    p_cu,  # [N + 1] or None
    p_do,  # [B, T, H, V]
    p_u,  # [B, T, H, V]
    p_dP,  # [B, T, H, V]
    p_starts,  # [slots, H, V, K]
    p_ends,  # [slots, H, V, K]
    p_dq,  # [B, T, H, K]
    p_dk,  # [B, T, H, K]
    p_da,  # [B, T, H, K]
    p_db,  # [B, T, H, K]
    p_dg,  # [B, T, H, K] or None
    scale,
    T,
    H,
    N,
    K: tl.constexpr,
    V: tl.constexpr,
    G: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NK: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    FLOOR: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
    ACC: tl.constexpr,
):
    """(6.37) to (6.40) for BK of the K channels. Grid: chunk slots * H * NK, tiles of K fastest, then heads."""
    i_kt, i_sh = tl.program_id(0) % NK, tl.program_id(0) // NK
    i_s, i_h = i_sh // H, i_sh % H
    row, count = chunk_place(p_cu, i_s, i_h, T, H, N, C)
    if count > 0:
        i_t, i_k = tl.arange(0, C), i_kt * BK + tl.arange(0, BK)
        m_t, m_k = i_t < count, i_k < K
        m_tk = m_t[:, None] & m_k[None, :]
        o_t = i_t * H  # [C] inside the chunk: int32, its first row is int64
        o_tk = row * K + o_t[:, None] * K + i_k[None, :]
        own = (i_s.to(tl.int64) * H + i_h) * V * K
        b_b = tl.load(p_b + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        b_k = tl.load(p_k + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        b_g = None
        if p_g is not None:
            o_g = row * G + o_t[:, None] * G + i_k[None, :] % G
            b_g = load_gates(p_g, o_g, m_tk, DOT, ACC)  # [C, BK]
        places = (o_t, i_k, m_t, m_k, row * V, own)

        # the readers, q and a
        b_dXB, b_dXK, b_dx = reader_sums(
            p_do, scale, p_u, p_v, p_starts, places, K, V, BV, C, DOT, PREC, ACC
        )
        b_q = tl.load(p_q + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        b_dx, b_dg = reader_side(
            b_dx, b_dXB, b_dXK, b_q, b_b, b_k, b_g, 0, C, LEVELS, FLOOR, DOT, PREC, ACC
        )
        tl.store(p_dq + o_tk, b_dx.to(p_dq.dtype.element_ty), mask=m_tk)
        b_dXB, b_dXK, b_dx = reader_sums(
            p_dP, 1.0, p_u, p_v, p_starts, places, K, V, BV, C, DOT, PREC, ACC
        )
        b_a = tl.load(p_a + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        b_dx, b_dg_x = reader_side(
            b_dx, b_dXB, b_dXK, b_a, b_b, b_k, b_g, 1, C, LEVELS, FLOOR, DOT, PREC, ACC
        )
        tl.store(p_da + o_tk, b_dx.to(p_da.dtype.element_ty), mask=m_tk)
        if p_g is not None:
            b_dg += b_dg_x

        # the writers, b and k
        b_dQWt, b_dAWt, b_dx = writer_sums(
            p_u, p_do, scale, p_dP, p_ends, places, K, V, BV, C, DOT, PREC, ACC
        )
        b_dx, b_dg_x = writer_side(
            b_dx, b_dQWt, b_dAWt, b_b, b_q, b_a, b_g, C, LEVELS, FLOOR, DOT, PREC, ACC
        )
        tl.store(p_db + o_tk, b_dx.to(p_db.dtype.element_ty), mask=m_tk)
        if p_g is not None:
            b_dg += b_dg_x
        b_dQWt, b_dAWt, b_dx = writer_sums(
            p_v, p_do, scale, p_dP, p_ends, places, K, V, BV, C, DOT, PREC, ACC
        )
        b_dx, b_dg_x = writer_side(
            b_dx, b_dQWt, b_dAWt, b_k, b_q, b_a, b_g, C, LEVELS, FLOOR, DOT, PREC, ACC
        )
        tl.store(p_dk + o_tk, b_dx.to(p_dk.dtype.element_ty), mask=m_tk)
        if p_g is not None:
            b_fade = tl.zeros([BK], dtype=ACC)
            for v0 in range(0, V, BV):
                i_c = v0 + tl.arange(0, BV)
                m_s = (i_c < V)[:, None] & m_k[None, :]
                o_h = own + i_c[:, None] * K + i_k[None, :]
                b_S = tl.load(p_starts + o_h, mask=m_s, other=0.0).to(ACC)  # [BV, BK]
                b_D = tl.load(p_ends + o_h, mask=m_s, other=0.0).to(ACC)  # [BV, BK]
                b_fade += tl.sum(b_S * b_D, axis=0)
            b_fade *= tl.exp(tl.sum(b_g.to(ACC), axis=0))
            b_dg += b_dg_x + b_fade[None, :]
            tl.store(p_dg + o_tk, b_dg.to(p_dg.dtype.element_ty), mask=m_tk)


@kernel
def reader_sums(
    p_dy,  # dO or dP [B, T, H, V]
    factor,
    p_u,
    p_v,
    p_starts,
    places,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
    ACC: tl.constexpr,
):
    """factor * dY U^T, factor * dY V^T [C, C] and factor * dY S^T [C, BK]: (6.37), (6.38) of one reader."""
    o_t, i_k, m_t, m_k, first, own = places
    b_dXB = tl.zeros([C, C], dtype=ACC)
    b_dXK = tl.zeros([C, C], dtype=ACC)
    b_dx = tl.zeros([C, i_k.shape[0]], dtype=ACC)
    for v0 in range(0, V, BV):
        i_c = v0 + tl.arange(0, BV)
        m_tv, m_s = m_t[:, None] & (i_c < V)[None, :], (i_c < V)[:, None] & m_k[None, :]
        o_tv, o_h = first + o_t[:, None] * V + i_c[None, :], own + i_c[:, None] * K + i_k[None, :]
        b_dy = tl.load(p_dy + o_tv, mask=m_tv, other=0.0).to(DOT)  # [C, BV]
        b_u = tl.trans(tl.load(p_u + o_tv, mask=m_tv, other=0.0))  # [BV, C]
        b_v = tl.trans(tl.load(p_v + o_tv, mask=m_tv, other=0.0).to(DOT))
        b_S = tl.load(p_starts + o_h, mask=m_s, other=0.0).to(DOT)  # [BV, BK]
        b_dXB = tl.dot(b_dy, b_u.to(DOT), b_dXB, input_precision=PREC, out_dtype=ACC)
        b_dXK = tl.dot(b_dy, b_v, b_dXK, input_precision=PREC, out_dtype=ACC)
        b_dx = tl.dot(b_dy, b_S, b_dx, input_precision=PREC, out_dtype=ACC)
    return b_dXB * factor, b_dXK * factor, b_dx * factor


@kernel
def writer_sums(
    p_w,  # U or V [B, T, H, V]
    p_do,
    scale,
    p_dP,
    p_ends,
    places,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
    ACC: tl.constexpr,
):
    """scale * W dO^T, W dP^T [C, C] and W D^T [C, BK]: (6.37) transposed, and (6.38), of one writer."""
    o_t, i_k, m_t, m_k, first, own = places
    b_dQWt = tl.zeros([C, C], dtype=ACC)
    b_dAWt = tl.zeros([C, C], dtype=ACC)
    b_dw = tl.zeros([C, i_k.shape[0]], dtype=ACC)
    for v0 in range(0, V, BV):
        i_c = v0 + tl.arange(0, BV)
        m_tv, m_s = m_t[:, None] & (i_c < V)[None, :], (i_c < V)[:, None] & m_k[None, :]
        o_tv, o_h = first + o_t[:, None] * V + i_c[None, :], own + i_c[:, None] * K + i_k[None, :]
        b_w = tl.load(p_w + o_tv, mask=m_tv, other=0.0).to(DOT)  # [C, BV]
        b_do = tl.trans(tl.load(p_do + o_tv, mask=m_tv, other=0.0).to(DOT))  # [BV, C]
        b_dP = tl.trans(tl.load(p_dP + o_tv, mask=m_tv, other=0.0).to(DOT))
        b_D = tl.load(p_ends + o_h, mask=m_s, other=0.0).to(DOT)  # [BV, BK]
        b_dQWt = tl.dot(b_w, b_do, b_dQWt, input_precision=PREC, out_dtype=ACC)
        b_dAWt = tl.dot(b_w, b_dP, b_dAWt, input_precision=PREC, out_dtype=ACC)
        b_dw = tl.dot(b_w, b_D, b_dw, input_precision=PREC, out_dtype=ACC)
    return b_dQWt * scale, b_dAWt, b_dw


@kernel
def reader_side(
    b_dx,
    b_dXB,
    b_dXK,
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
    """(6.39) of one reader x from dX~ [C, BK] and its scores' gradients [C, C] in ACC, and its share of dg."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    b_dXB, b_dXK = tl.where(i - LAG >= j, b_dXB, 0.0), tl.where(i - LAG >= j, b_dXK, 0.0)
    b_dg = tl.zeros(b_dx.shape, dtype=ACC)
    if b_g is not None:
        b_dx *= tl.exp(gate_sums(j <= i - LAG, b_g, DOT, PREC, ACC))
        b_dg = gate_gradient(i <= j - LAG, b_x.to(ACC) * b_dx, DOT, PREC, ACC)  # transposed truths
        for n in range(LEVELS):
            block = C >> n
            b_e = tl.exp(gate_sums(level_gates(i, j, block, LAG), b_g, DOT, PREC, ACC))  # [C, BK]
            m_pair = level_pairs(i, j, block)
            b_we = scaled(b_b, b_e, DOT, ACC)
            b_d = rounded_product(tl.where(m_pair, b_dXB, 0.0), b_we, DOT, PREC, ACC)  # [C, BK]
            b_we = scaled(b_k, b_e, DOT, ACC)
            b_d += rounded_product(tl.where(m_pair, b_dXK, 0.0), b_we, DOT, PREC, ACC)
            b_dx += b_e * b_d
            b_d = scaled(b_x, b_e, DOT, ACC).to(ACC) * b_d
            b_dg += gate_gradient(level_gates(j, i, block, LAG), b_d, DOT, PREC, ACC)
    BASE: tl.constexpr = C >> LEVELS
    if b_g is None or BASE > 1 or LAG == 0:  # in a block of one token only its query reads
        m_base = i // BASE == j // BASE
        b_dXB, b_dXK = tl.where(m_base, b_dXB, 0.0), tl.where(m_base, b_dXK, 0.0)
        if b_g is None or BASE == 1:
            b_dx += rounded_product(b_dXB, b_b, DOT, PREC, ACC)
            b_dx += rounded_product(b_dXK, b_k, DOT, PREC, ACC)
        else:
            b_e = tl.exp(-base_exponents(i, j, b_g, BASE, FLOOR, DOT, PREC, ACC))
            b_d = rounded_product(b_dXB, scaled(b_b, b_e, DOT, ACC), DOT, PREC, ACC)
            b_d += rounded_product(b_dXK, scaled(b_k, b_e, DOT, ACC), DOT, PREC, ACC)
            b_e = tl.exp(base_exponents(i, j, b_g, BASE, FLOOR, DOT, PREC, ACC, LAG))
            b_dx += b_e * b_d
            b_d = scaled(b_x, b_e, DOT, ACC).to(ACC) * b_d
            b_d = gate_gradient(base_gates(j, i, BASE, LAG), b_d, DOT, PREC, ACC)
            b_dg += tl.where(b_g > FLOOR, b_d, 0.0)
    return b_dx, b_dg


@kernel
def writer_side(
    b_dw,
    b_dQWt,
    b_dAWt,
    b_w,
    b_q,
    b_a,
    b_g,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    FLOOR: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
    ACC: tl.constexpr,
):
    """(6.40) of one writer w from dW^ [C, BK] and its scores' gradients, transposed, [C, C], and its share of dg."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]  # i: the writer, a row here
    b_dQWt = tl.where(i <= j, b_dQWt, 0.0).to(DOT)
    b_dAWt = tl.where(i < j, b_dAWt, 0.0).to(DOT)
    b_dg = tl.zeros(b_dw.shape, dtype=ACC)
    if b_g is not None:
        b_dw *= tl.exp(gate_sums(j > i, b_g, DOT, PREC, ACC))
        b_dg = gate_gradient(i > j, b_w.to(ACC) * b_dw, DOT, PREC, ACC)  # transposed truths
        for n in range(LEVELS):
            block = C >> n
            m_pair = level_pairs(i, j, block)
            b_e = tl.exp(gate_sums(level_gates(i, j, block, 1), b_g, DOT, PREC, ACC))  # [C, BK]
            b_d = tl.where(m_pair, b_dAWt, 0.0).to(DOT)
            b_xe = scaled(b_a, b_e, DOT, ACC)
            b_d = tl.dot(b_d, b_xe, input_precision=PREC, out_dtype=ACC)
            # of the first halves, the writers, the two tiles of exponents are the same
            b_e = tl.exp(gate_sums(level_gates(i, j, block), b_g, DOT, PREC, ACC))  # [C, BK]
            b_s = tl.where(m_pair, b_dQWt, 0.0).to(DOT)
            b_xe = scaled(b_q, b_e, DOT, ACC)
            b_d = tl.dot(b_s, b_xe, b_d, input_precision=PREC, out_dtype=ACC)
            b_dw += b_e * b_d
            b_d = scaled(b_w, b_e, DOT, ACC).to(ACC) * b_d
            b_dg += gate_gradient(level_gates(j, i, block), b_d, DOT, PREC, ACC)
    BASE: tl.constexpr = C >> LEVELS
    m_base = i // BASE == j // BASE
    b_dQWt = tl.where(m_base, b_dQWt, 0.0).to(DOT)
    if b_g is None or BASE == 1:
        b_d = tl.dot(b_dQWt, b_q, input_precision=PREC, out_dtype=ACC)
        if b_g is None:
            b_d = tl.dot(b_dAWt, b_a, b_d, input_precision=PREC, out_dtype=ACC)
        b_dw += b_d
    else:
        b_dAWt = tl.where(m_base, b_dAWt, 0.0).to(DOT)
        b_e = tl.exp(base_exponents(i, j, b_g, BASE, FLOOR, DOT, PREC, ACC, 1))
        b_d = tl.dot(b_dAWt, scaled(b_a, b_e, DOT, ACC), input_precision=PREC, out_dtype=ACC)
        b_x = base_exponents(i, j, b_g, BASE, FLOOR, DOT, PREC, ACC)
        b_xe = scaled(b_q, tl.exp(b_x), DOT, ACC)
        b_d = tl.dot(b_dQWt, b_xe, b_d, input_precision=PREC, out_dtype=ACC)
        b_e = tl.exp(-b_x)
        b_dw += b_e * b_d
        b_d = scaled(b_w, b_e, DOT, ACC).to(ACC) * b_d
        b_d = -gate_gradient(base_gates(j, i, BASE), b_d, DOT, PREC, ACC)
        b_dg += tl.where(b_g > FLOOR, b_d, 0.0)
    return b_dw, b_dg
