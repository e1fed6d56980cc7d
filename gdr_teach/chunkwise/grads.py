"""Last stage of the backward, all chunks at once: from the states and their gradients to those of q, k, beta and g.

S is the state before the chunk times fade_1, D the gradient of the state after it, both from the walks of `scan`, as
are R and dP. With dA' and dL' the gradients of the scores as if every beta were 1, and U = beta * R:

    dA' = scale * tril(dO R^T)      dL' = -tril_{-1}(dP R^T)      dA = dA' diag(beta)   dL = dL' diag(beta)    (6.15)
    dQ~ = scale * dO S^T            dK~ = -dP S^T                 dK^ = beta * R D^T                           (6.16)
    dq_i = exp(g_(1, i]) dQ~_i + sum_j dA_ij exp(g_(j, i]) k_j                                             (6.17)
    dk_i = exp(g_(1, i]) dK~_i + sum_j dL_ij exp(g_(j, i]) k_j + beta_i y_i                                (6.18)
    y_j  = exp(g_(j, end]) (R D^T)_j + sum_i exp(g_(j, i]) (dA'_ij q_i + dL'_ij k_i)                           (6.19)
    dbeta_j = k_j . y_j  =  R_j . dP_j / beta_j                                                                (6.20)

y is what the write of a token hands back, and the first form of (6.20) needs no division; the second loses fewer digits
and is taken where beta allows it. Every exponent is a sum of gates (decay.py), so dg is the transpose of those sums:

    dg_t = sum of x_i * dx_i over all the terms above whose exponent holds g_t                                 (6.21)

in other words what the pairs that cross token t hand back, and no difference of larger sums.
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
from .place import chunk_place
from .triangular import add_product


@kernel
def grads_tied_kernel(
    p_q,  # [B, T, H, K]
    p_k,  # [B, T, H, K]
    p_beta,  # [B, T, H]
    p_g,  # [B, T, H, G] or None
    p_cu,  # [N + 1] or None
    p_do,  # [B, T, H, V]
    p_R,  # [B, T, H, V]
    p_dP,  # [B, T, H, V]
    p_starts,  # [slots, H, V, K]
    p_ends,  # [slots, H, V, K]
    p_dq,  # [B, T, H, K]
    p_dk,  # [B, T, H, K]
    p_dbeta,  # [NK, B, T, H]
    p_dg,  # [B, T, H, K] or None
    rows,
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
    """(6.15) to (6.21) for BK of the K channels. Grid: chunk slots * H * NK, tiles of K fastest, then heads."""
    i_kt, i_sh = tl.program_id(0) % NK, tl.program_id(0) // NK
    i_s, i_h = i_sh // H, i_sh % H
    row, count = chunk_place(p_cu, i_s, i_h, T, H, N, C)
    if count > 0:
        i_t, i_k = tl.arange(0, C), i_kt * BK + tl.arange(0, BK)
        m_t, m_k = i_t < count, i_k < K
        m_tk = m_t[:, None] & m_k[None, :]
        o_t = i_t * H  # [C] inside the chunk: int32, its first row is int64
        o_tk = o_t[:, None] * K + i_k[None, :]
        own = (i_s.to(tl.int64) * H + i_h) * V * K
        b_beta = tl.load(p_beta + row + o_t, mask=m_t, other=0.0).to(ACC)  # [C]
        b_q = tl.load(p_q + row * K + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        b_k = tl.load(p_k + row * K + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        b_g = None
        if p_g is not None:
            o_g = o_t[:, None] * G + i_k[None, :] % G
            b_g = load_gates(p_g + row * G, o_g, m_tk, DOT, ACC)  # [C, BK]

        # sums over V, for q. A product that is transposed and then a first operand is miscompiled by triton 3.4 to 3.6:
        # where both X and X^T are wanted, both are computed
        b_dA = tl.zeros([C, C], dtype=ACC)
        b_dq = tl.zeros([C, BK], dtype=ACC)
        for v0 in range(0, V, BV):
            i_c = v0 + tl.arange(0, BV)
            m_tv, m_s = m_t[:, None] & (i_c < V)[None, :], (i_c < V)[:, None] & m_k[None, :]
            o_tv, o_h = o_t[:, None] * V + i_c[None, :], i_c[:, None] * K + i_k[None, :]
            b_do = tl.load(p_do + row * V + o_tv, mask=m_tv, other=0.0).to(DOT)  # [C, BV]
            b_R = tl.load(p_R + row * V + o_tv, mask=m_tv, other=0.0)  # [C, BV]
            b_S = tl.load(p_starts + own + o_h, mask=m_s, other=0.0).to(DOT)  # [BV, BK]
            b_dA = tl.dot(b_do, tl.trans(b_R.to(DOT)), b_dA, input_precision=PREC, out_dtype=ACC)
            if DOT == tl.bfloat16:
                b_R = tl.trans((b_R - b_R.to(DOT).to(ACC)).to(DOT))
                b_dA = tl.dot(b_do, b_R, b_dA, input_precision=PREC, out_dtype=ACC)
            b_dq = tl.dot(b_do, b_S, b_dq, input_precision=PREC, out_dtype=ACC)
        b_dA = b_dA * (scale * b_beta)[None, :]  # (6.15)
        b_dq *= scale
        b_dq, b_dg = query_side(b_dq, b_dA, b_q, b_k, b_g, C, LEVELS, FLOOR, DOT, PREC, ACC)
        tl.store(p_dq + row * K + o_tk, b_dq.to(p_dq.dtype.element_ty), mask=m_tk)

        # sums over V, for k and beta
        i, j = i_t[:, None], i_t[None, :]
        b_dL = tl.zeros([C, C], dtype=ACC)
        b_dLt = tl.zeros([C, C], dtype=ACC)
        b_RdP = tl.zeros([C], dtype=ACC)
        for v0 in range(0, V, BV):
            i_c = v0 + tl.arange(0, BV)
            m_tv, o_tv = m_t[:, None] & (i_c < V)[None, :], o_t[:, None] * V + i_c[None, :]
            b_R = tl.load(p_R + row * V + o_tv, mask=m_tv, other=0.0).to(DOT)  # [C, BV]
            b_dP = tl.load(p_dP + row * V + o_tv, mask=m_tv, other=0.0).to(DOT)  # [C, BV]
            b_RdP += tl.sum(b_R.to(ACC) * b_dP.to(ACC), axis=1)
            b_dL = tl.dot(b_dP, tl.trans(b_R), b_dL, input_precision=PREC, out_dtype=ACC)
            b_dLt = tl.dot(b_R, tl.trans(b_dP), b_dLt, input_precision=PREC, out_dtype=ACC)
        # dL below the diagonal and dL'^T above it, in one tile
        b_dL = tl.where(i > j, b_dL * b_beta[None, :], tl.where(i < j, b_dLt, 0.0))
        b_dL = (-b_dL).to(DOT)
        b_dAt = tl.zeros([C, C], dtype=ACC)
        b_y = tl.zeros([C, BK], dtype=ACC)
        for v0 in range(0, V, BV):
            i_c = v0 + tl.arange(0, BV)
            m_tv, m_s = m_t[:, None] & (i_c < V)[None, :], (i_c < V)[:, None] & m_k[None, :]
            o_tv, o_h = o_t[:, None] * V + i_c[None, :], i_c[:, None] * K + i_k[None, :]
            b_R = tl.load(p_R + row * V + o_tv, mask=m_tv, other=0.0).to(DOT)  # [C, BV]
            b_do = tl.load(p_do + row * V + o_tv, mask=m_tv, other=0.0).to(DOT)  # [C, BV]
            b_dAt = tl.dot(b_R, tl.trans(b_do), b_dAt, input_precision=PREC, out_dtype=ACC)
            b_D = tl.load(p_ends + own + o_h, mask=m_s, other=0.0).to(DOT)  # [BV, BK]
            b_y = tl.dot(b_R, b_D, b_y, input_precision=PREC, out_dtype=ACC)
        b_dAt = tl.where(i <= j, b_dAt * scale, 0.0).to(DOT)  # (6.15), transposed
        b_dk = tl.zeros([C, BK], dtype=ACC)
        b_fade = tl.zeros([BK], dtype=ACC)
        for v0 in range(0, V, BV):
            i_c = v0 + tl.arange(0, BV)
            m_tv, m_s = m_t[:, None] & (i_c < V)[None, :], (i_c < V)[:, None] & m_k[None, :]
            o_tv, o_h = o_t[:, None] * V + i_c[None, :], i_c[:, None] * K + i_k[None, :]
            b_dP = tl.load(p_dP + row * V + o_tv, mask=m_tv, other=0.0).to(DOT)  # [C, BV]
            b_S = tl.load(p_starts + own + o_h, mask=m_s, other=0.0).to(DOT)  # [BV, BK]
            b_dk = tl.dot((-b_dP).to(DOT), b_S, b_dk, input_precision=PREC, out_dtype=ACC)
            if p_g is not None:
                b_D = tl.load(p_ends + own + o_h, mask=m_s, other=0.0).to(DOT)  # [BV, BK]
                b_fade += tl.sum(b_S.to(ACC) * b_D.to(ACC), axis=0)
        b_dk, b_dbeta, b_dg_k = key_side(
            b_dk, b_y, b_dAt, b_dL, b_q, b_k, b_g, b_beta, C, LEVELS, FLOOR, DOT, PREC, ACC
        )
        tl.store(p_dk + row * K + o_tk, b_dk.to(p_dk.dtype.element_ty), mask=m_tk)
        if p_g is not None:
            b_rest = tl.sum(
                tl.where(i == 0, 0.0, b_g.to(ACC)), axis=0
            )  # S has faded by the first gate already
            b_dg += b_dg_k + (b_fade * tl.exp(b_rest))[None, :]  # every token fades S
            tl.store(p_dg + row * K + o_tk, b_dg.to(p_dg.dtype.element_ty), mask=m_tk)
        # (6.20): dividing is what loses fewer digits, where there is something to divide by
        b_big = tl.abs(b_beta) >= 0.0625
        b_RdP = tl.where(i_kt == 0, b_RdP, 0.0) / tl.where(b_big, b_beta, 1.0)
        b_dbeta = tl.where(b_big, b_RdP, b_dbeta)
        o_b = i_kt.to(tl.int64) * rows + row
        tl.store(p_dbeta + o_b + o_t, b_dbeta.to(p_dbeta.dtype.element_ty), mask=m_t)


@kernel
def query_side(
    b_dq,
    b_dA,
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
    """(6.17) from dQ~ [C, BK] and dA [C, C] in ACC, and q's share of dg (6.21)."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    b_dA = tl.where(i >= j, b_dA, 0.0)
    b_dg = tl.zeros(b_dq.shape, dtype=ACC)
    if b_g is not None:
        b_dq *= tl.exp(gate_sums((j > 0) & (j <= i), b_g, DOT, PREC, ACC))
        # the same truths transposed, and the first gate, which fade_1 holds
        b_dg = gate_gradient(i <= j, b_q.to(ACC) * b_dq, DOT, PREC, ACC)
        for n in range(LEVELS):
            block = C >> n
            b_e = tl.exp(gate_sums(level_gates(i, j, block), b_g, DOT, PREC, ACC))  # [C, BK]
            b_d = tl.where(level_pairs(i, j, block), b_dA, 0.0)
            b_d = rounded_product(b_d, scaled(b_k, b_e, DOT, ACC), DOT, PREC, ACC)  # [C, BK]
            b_dq += b_e * b_d
            b_d = scaled(b_q, b_e, DOT, ACC).to(ACC) * b_d
            b_dg += gate_gradient(level_gates(j, i, block), b_d, DOT, PREC, ACC)
    BASE: tl.constexpr = C >> LEVELS
    b_d = tl.where(i // BASE == j // BASE, b_dA, 0.0)
    if b_g is None or BASE == 1:
        b_dq += rounded_product(b_d, b_k, DOT, PREC, ACC)
    else:
        b_x = base_exponents(i, j, b_g, BASE, FLOOR, DOT, PREC, ACC)
        b_d = rounded_product(b_d, scaled(b_k, tl.exp(-b_x), DOT, ACC), DOT, PREC, ACC)
        b_dq += tl.exp(b_x) * b_d
        b_d = scaled(b_q, tl.exp(b_x), DOT, ACC).to(ACC) * b_d
        b_d = gate_gradient(base_gates(j, i, BASE), b_d, DOT, PREC, ACC)
        b_dg += tl.where(b_g > FLOOR, b_d, 0.0)
    return b_dq, b_dg


@kernel
def key_side(
    b_dk,
    b_y,
    b_dAt,
    b_dL,
    b_q,
    b_k,
    b_g,
    b_beta,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    FLOOR: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
    ACC: tl.constexpr,
):
    """(6.18) to (6.20) from dK~, R D^T [C, BK], dA'^T and dL + dL'^T [C, C], and k's share of dg (6.21)."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    b_dg = tl.zeros(b_dk.shape, dtype=ACC)
    if b_g is not None:
        b_dk *= tl.exp(gate_sums((j > 0) & (j <= i), b_g, DOT, PREC, ACC))
        b_dg = gate_gradient(i <= j, b_k.to(ACC) * b_dk, DOT, PREC, ACC)
        b_y *= tl.exp(gate_sums(j > i, b_g, DOT, PREC, ACC))
    b_z = b_k.to(ACC) * b_y
    b_dbeta = tl.sum(b_z, axis=1)  # [C]
    b_dk += b_beta[:, None] * b_y
    if b_g is not None:
        b_dg += gate_gradient(i > j, b_beta[:, None] * b_z, DOT, PREC, ACC)
        for n in range(LEVELS):
            # second halves are rows, first halves columns, which beta scales
            block = C >> n
            b_e = tl.exp(gate_sums(level_gates(i, j, block), b_g, DOT, PREC, ACC))  # [C, BK]
            b_ke = scaled(b_k, b_e, DOT, ACC)
            b_d = tl.where(level_pairs(i, j, block), b_dL, 0.0).to(DOT)
            b_d = tl.dot(b_d, b_ke, input_precision=PREC, out_dtype=ACC)
            b_s = tl.where(level_pairs(i, j, block), b_dAt, 0.0).to(DOT)
            b_qe = scaled(b_q, b_e, DOT, ACC)
            b_d = tl.dot(b_s, b_qe, b_d, input_precision=PREC, out_dtype=ACC)
            i_t = tl.arange(0, C)
            first = i_t % block < block // 2
            b_z = b_ke.to(ACC) * b_d
            b_dbeta += tl.where(first, tl.sum(b_z, axis=1), 0.0)
            b_step = tl.where(first, b_beta, 1.0)[:, None]
            b_dk += b_step * b_e * b_d
            b_dg += gate_gradient(level_gates(j, i, block), b_step * b_z, DOT, PREC, ACC)
    BASE: tl.constexpr = C >> LEVELS
    m_base = i // BASE == j // BASE
    b_dAt = tl.where(m_base, b_dAt, 0.0).to(DOT)
    b_up = tl.where(m_base & (i < j), b_dL, 0.0).to(DOT)
    b_low = tl.where(m_base & (i > j), b_dL, 0.0).to(DOT)
    if b_g is None or BASE == 1:
        b_row = tl.dot(b_low, b_k, input_precision=PREC, out_dtype=ACC)
        b_col = tl.dot(b_up, b_k, input_precision=PREC, out_dtype=ACC)
        b_col = tl.dot(b_dAt, b_q, b_col, input_precision=PREC, out_dtype=ACC)
        b_dbeta += tl.sum(b_k.to(ACC) * b_col, axis=1)
        b_dk += b_row + b_beta[:, None] * b_col
    else:
        b_x = base_exponents(i, j, b_g, BASE, FLOOR, DOT, PREC, ACC)
        b_e = tl.exp(b_x)
        b_kr, b_kw = scaled(b_k, b_e, DOT, ACC), scaled(b_k, tl.exp(-b_x), DOT, ACC)
        b_row = tl.dot(b_low, b_kw, input_precision=PREC, out_dtype=ACC)
        b_col = tl.dot(b_up, b_kr, input_precision=PREC, out_dtype=ACC)
        b_qe = scaled(b_q, b_e, DOT, ACC)
        b_col = tl.dot(b_dAt, b_qe, b_col, input_precision=PREC, out_dtype=ACC)
        b_z = b_kw.to(ACC) * b_col
        b_dbeta += tl.sum(b_z, axis=1)
        b_dk += b_e * b_row + b_beta[:, None] * tl.exp(-b_x) * b_col
        b_z = b_kr.to(ACC) * b_row - b_beta[:, None] * b_z
        b_z = gate_gradient(base_gates(j, i, BASE), b_z, DOT, PREC, ACC)
        b_dg += tl.where(b_g > FLOOR, b_z, 0.0)
    return b_dk, b_dbeta, b_dg


@kernel
def rounded_product(b_x, b_y, DOT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr):
    """x y for x [C, C] in ACC and y [C, BK] in DOT; bfloat16's 8 digits are too few for x (see `add_product`)."""
    return add_product(tl.zeros(b_y.shape, dtype=ACC), b_x, b_y, DOT, PREC, ACC)
