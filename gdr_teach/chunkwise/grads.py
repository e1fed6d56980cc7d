"""Last stage of the backward, all chunks at once: from the states and their gradients to those of q, k, beta and g.

S is the state before the chunk times fade_1, D the gradient of the state after it, both from the walks of `scan`, as are R and dP.
With dA' and dL' the gradients of the scores as if every beta were 1, and U = beta * R:

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
from .decay import base_gates, gate_sums, level_gates, level_pairs
from .place import chunk_place
from .prepare import FORGOTTEN


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
    NV: tl.constexpr,
    C: tl.constexpr,
    BASE: tl.constexpr,
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
        o_t = row + i_t.to(tl.int64) * H  # [C]
        o_tk = o_t[:, None] * K + i_k[None, :]
        o_s = (i_s.to(tl.int64) * H + i_h) * V * K
        i, j = i_t[:, None], i_t[None, :]
        b_beta = tl.load(p_beta + o_t, mask=m_t, other=0.0).to(ACC)  # [C]

        # sums over V. A product that is transposed and then a first operand is miscompiled by triton 3.4 to 3.6:
        # where both X and X^T are wanted, both are computed
        b_dA = tl.zeros([C, C], dtype=ACC)
        b_dAt = tl.zeros([C, C], dtype=ACC)
        b_dL = tl.zeros([C, C], dtype=ACC)
        b_dLt = tl.zeros([C, C], dtype=ACC)
        b_dQr = tl.zeros([C, BK], dtype=ACC)
        b_dKr = tl.zeros([C, BK], dtype=ACC)
        b_RD = tl.zeros([C, BK], dtype=ACC)
        b_fade = tl.zeros([BK], dtype=ACC)
        b_RdP = tl.zeros([C], dtype=ACC)
        for i_vt in tl.static_range(0, NV):
            i_c = i_vt * BV + tl.arange(0, BV)
            m_tv, m_s = m_t[:, None] & (i_c < V)[None, :], (i_c < V)[:, None] & m_k[None, :]
            o_tv = o_t[:, None] * V + i_c[None, :]
            o_h = o_s + i_c[:, None] * K + i_k[None, :]
            b_do = tl.load(p_do + o_tv, mask=m_tv, other=0.0).to(DOT)  # [C, BV]
            b_R = tl.load(p_R + o_tv, mask=m_tv, other=0.0)  # [C, BV]
            b_rest = (b_R - b_R.to(DOT).to(b_R.dtype)).to(DOT)
            b_R = b_R.to(DOT)
            if DOT == tl.bfloat16:
                b_dA = tl.dot(b_do, tl.trans(b_rest), b_dA, input_precision=PREC, out_dtype=ACC)
            b_dA = tl.dot(b_do, tl.trans(b_R), b_dA, input_precision=PREC, out_dtype=ACC)
            b_dAt = tl.dot(b_R, tl.trans(b_do), b_dAt, input_precision=PREC, out_dtype=ACC)
            b_S = tl.load(p_starts + o_h, mask=m_s, other=0.0).to(DOT)  # [BV, BK]
            b_dQr = tl.dot(b_do, b_S, b_dQr, input_precision=PREC, out_dtype=ACC)
            b_dP = tl.load(p_dP + o_tv, mask=m_tv, other=0.0).to(DOT)  # [C, BV]
            b_dL = tl.dot(b_dP, tl.trans(b_R), b_dL, input_precision=PREC, out_dtype=ACC)
            b_dLt = tl.dot(b_R, tl.trans(b_dP), b_dLt, input_precision=PREC, out_dtype=ACC)
            b_dKr = tl.dot(b_dP, b_S, b_dKr, input_precision=PREC, out_dtype=ACC)
            b_D = tl.load(p_ends + o_h, mask=m_s, other=0.0).to(DOT)  # [BV, BK]
            b_RD = tl.dot(b_R, b_D, b_RD, input_precision=PREC, out_dtype=ACC)
            b_RdP += tl.sum(b_R.to(ACC) * b_dP.to(ACC), axis=1)
            if p_g is not None:
                b_fade += tl.sum(b_S.to(ACC) * b_D.to(ACC), axis=0)
        b_dA = tl.where(i >= j, b_dA * (scale * b_beta)[None, :], 0.0)  # (6.15)
        b_dAl = (b_dA - b_dA.to(DOT).to(ACC)).to(DOT)
        b_dA = b_dA.to(DOT)
        b_dAt = tl.where(i <= j, b_dAt * scale, 0.0).to(DOT)
        b_dL = tl.where(i > j, -b_dL * b_beta[None, :], 0.0).to(DOT)
        b_dLt = tl.where(i < j, -b_dLt, 0.0).to(DOT)
        b_dQr *= scale

        b_q = tl.load(p_q + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        b_k = tl.load(p_k + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        if p_g is None:
            b_dq = b_dQr
            b_dk = -b_dKr
            b_y = b_RD
            b_dbeta = tl.sum(b_k.to(ACC) * b_RD, axis=1)  # [C]
        else:
            b_g = tl.load(p_g + o_t[:, None] * G + i_k[None, :] % G, mask=m_tk, other=0.0)
            b_g = tl.maximum(b_g.to(ACC), FORGOTTEN)  # [C, BK]
            b_e = tl.exp(gate_sums((j > 0) & (j <= i), b_g, DOT, PREC, ACC))
            b_dq = b_dQr * b_e  # (6.17)
            b_dk = -b_dKr * b_e  # (6.18)
            b_z = b_q.to(ACC) * b_dq + b_k.to(ACC) * b_dk
            # (6.21): the same truths transposed, and the first gate, which fade_1 holds
            b_dg = gate_sums(i <= j, b_z, DOT, PREC, ACC)
            b_e = tl.exp(gate_sums(j > i, b_g, DOT, PREC, ACC))
            b_y = b_RD * b_e  # (6.19)
            b_z = b_k.to(ACC) * b_y
            b_dbeta = tl.sum(b_z, axis=1)
            b_dg += gate_sums(i > j, b_z * b_beta[:, None], DOT, PREC, ACC)
            b_rest = tl.sum(tl.where(i == 0, 0.0, b_g), axis=0)  # S has faded by the first gate already
            b_dg += (b_fade * tl.exp(b_rest))[None, :]  # every token fades S
        b_dk += b_y * b_beta[:, None]

        for level in tl.static_range(0, 8):
            h: tl.constexpr = C >> (level + 1)
            if h >= BASE:
                # second halves are rows, first halves columns: dL and dL^T share one product
                m_pair, first = level_pairs(i, j, h), i_t % (2 * h) < h
                b_e = tl.exp(gate_sums(level_gates(i, j, h), b_g, DOT, PREC, ACC))  # [C, BK]
                b_qe, b_ke = (b_q.to(ACC) * b_e).to(DOT), (b_k.to(ACC) * b_e).to(DOT)
                b_yq = masked_product(m_pair, b_dA, b_ke, PREC, ACC)  # [C, BK]
                if DOT == tl.bfloat16:
                    b_yq += masked_product(m_pair, b_dAl, b_ke, PREC, ACC)
                b_yk = masked_product(m_pair, b_dAt, b_qe, PREC, ACC)
                b_yk += masked_product(m_pair, b_dL + b_dLt, b_ke, PREC, ACC)
                b_z = b_ke.to(ACC) * b_yk
                b_dbeta += tl.where(first, tl.sum(b_z, axis=1), 0.0)
                b_step = tl.where(first, b_beta, 1.0)[:, None]
                b_dq += b_e * b_yq
                b_dk += b_e * b_step * b_yk
                b_z = b_qe.to(ACC) * b_yq + b_step * b_z
                b_dg += gate_sums(level_gates(j, i, h), b_z, DOT, PREC, ACC)
        m_base = i // BASE == j // BASE
        b_qe, b_ke, b_kw = b_q, b_k, b_k
        if p_g is not None and BASE > 1:
            b_x = gate_sums(base_gates(i, j, BASE), tl.maximum(b_g, FLOOR), DOT, PREC, ACC)
            b_qe = (b_q.to(ACC) * tl.exp(b_x)).to(DOT)
            b_ke = (b_k.to(ACC) * tl.exp(b_x)).to(DOT)
            b_kw = (b_k.to(ACC) * tl.exp(-b_x)).to(DOT)
        b_yq = masked_product(m_base, b_dA, b_kw, PREC, ACC)
        if DOT == tl.bfloat16:
            b_yq += masked_product(m_base, b_dAl, b_kw, PREC, ACC)
        b_yk = masked_product(m_base, b_dL, b_kw, PREC, ACC)  # k as a row
        b_y = masked_product(m_base, b_dAt, b_qe, PREC, ACC)  # k as a column
        b_y += masked_product(m_base, b_dLt, b_ke, PREC, ACC)
        b_z = b_kw.to(ACC) * b_y
        b_dbeta += tl.sum(b_z, axis=1)
        b_y *= b_beta[:, None]
        if p_g is not None and BASE > 1:
            b_dq += tl.exp(b_x) * b_yq
            b_dk += tl.exp(b_x) * b_yk + tl.exp(-b_x) * b_y
            b_z = b_qe.to(ACC) * b_yq + b_ke.to(ACC) * b_yk - b_z * b_beta[:, None]
            b_z = gate_sums(base_gates(j, i, BASE), b_z, DOT, PREC, ACC)
            b_dg += tl.where(b_g > FLOOR, b_z, 0.0)
        else:
            b_dq += b_yq
            b_dk += b_yk + b_y

        tl.store(p_dq + o_tk, b_dq.to(p_dq.dtype.element_ty), mask=m_tk)
        tl.store(p_dk + o_tk, b_dk.to(p_dk.dtype.element_ty), mask=m_tk)
        if p_dg is not None:
            tl.store(p_dg + o_tk, b_dg.to(p_dg.dtype.element_ty), mask=m_tk)
        # (6.20): dividing is what loses fewer digits, where there is something to divide by
        b_big = tl.abs(b_beta) >= 0.0625
        b_RdP = tl.where(i_kt == 0, b_RdP, 0.0) / tl.where(b_big, b_beta, 1.0)
        b_dbeta = tl.where(b_big, b_RdP, b_dbeta)
        o_b = i_kt.to(tl.int64) * rows + o_t
        tl.store(p_dbeta + o_b, b_dbeta.to(p_dbeta.dtype.element_ty), mask=m_t)


@kernel
def masked_product(m, b_x, b_y, PREC: tl.constexpr, ACC: tl.constexpr):
    """x y for x [C, C] where m holds, and y [C, BK]."""
    return tl.dot(tl.where(m, b_x, 0.0).to(b_x.dtype), b_y, input_precision=PREC, out_dtype=ACC)
