"""Second stage, the only serial one: a walk over the chunks with the state in registers, forward and in reverse.

The two kernels are each other's transpose, line by line. Everything is held as [V, .]: S as [V, K], U as [V, C]. Then
the state, rounded once a chunk, is the first operand of almost every product, where a GPU takes it from registers.

    forward                                         reverse (dO is the gradient of O, D of the state)
    S <- fade_1 * S,  P = V - K~ S                  dU = K^ D + scale * A^T dO
    R = X P,  U = beta * R                          dP = X^T (beta * dU)
    O = scale * (Q~ S + A U)                        D <- fade * D + scale * Q~^T dO - K~^T dP        (6.13)
    S <- fade * S + K^^T U                          D <- fade_1 * D                                  (6.14)

X, A, Q~, K~, K^, fade_1 and fade come from `prepare`; without decay Q~ = Q, K~ = K^ = K, both factors are 1 and
A = tril(Q K^T) is formed here.
"""

# pyright: reportArgumentType=false
import triton.language as tl

from ..runtime import kernel
from .place import sequence_place
from .triangular import add_product, times_inverse


@kernel
def scan_tied_kernel(
    p_q,  # [B, T, H, K] Q~
    p_k,  # [B, T, H, K] K~
    p_kw,  # [B, T, H, K] K^, or None: it is K~
    p_v,  # [B, T, H, V]
    p_beta,  # [B, T, H]
    p_X,  # [B, T, H, C]
    p_Xlow,  # [B, T, H, C]
    p_A,  # [B, T, H, C] or None: formed here
    p_fade,  # [slots, H, 2, K] or None, without decay
    p_state0,  # [N, H, K, V] or None
    p_cu,  # [N + 1] or None
    p_o,  # [B, T, H, V] or None
    p_R,  # [B, T, H, V] or None: the backward wants R and the state before each chunk
    p_starts,  # [slots, H, V, K] or None
    p_state,  # [N, H, K, V] or None
    scale,
    T,
    H,
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
    """(6.13), (6.14), chunk after chunk. Grid: N * H * NV, tiles of V fastest."""
    i_v, i_nh = tl.program_id(0) % NV, tl.program_id(0) // NV
    i_n, i_h = i_nh // H, i_nh % H
    row, count, slot = sequence_place(p_cu, i_n, i_h, T, H, C)
    i_t = tl.arange(0, C)  # [C]
    i_k = tl.arange(0, BK)  # [BK]
    i_c = i_v * BV + tl.arange(0, BV)  # [BV] columns of the textbook's S, rows here
    m_k, m_v = i_k < K, i_c < V
    m_s = m_v[:, None] & m_k[None, :]  # [BV, BK]
    own = i_nh.to(tl.int64) * K * V
    o_s = i_k[None, :] * V + i_c[:, None]  # [BV, BK] of [K, V]
    o_h = i_c[:, None] * K + i_k[None, :]  # [BV, BK] of [V, K]
    o_t = i_t * H  # [C] inside a chunk: int32, the chunk's first row is int64
    o_tk, o_tv = o_t[:, None] * K + i_k[None, :], o_t[:, None] * V + i_c[None, :]
    o_C = o_t[:, None] * C + i_t[None, :]  # [C, C]
    place = slot * H + i_h  # of the chunk among states and factors

    b_S = tl.zeros([BV, BK], dtype=ACC)
    if p_state0 is not None:
        b_S += tl.load(p_state0 + own + o_s, mask=m_s, other=0.0).to(ACC)
    for start in range(0, count, C):
        m_t = start + i_t < count
        m_tk, m_tv = m_t[:, None] & m_k[None, :], m_t[:, None] & m_v[None, :]
        m_C = m_t[:, None]
        b_k = tl.load(p_k + row * K + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        b_v = tl.load(p_v + row * V + o_tv, mask=m_tv, other=0.0)  # [C, BV]
        b_beta = tl.load(p_beta + row + o_t, mask=m_t, other=0.0).to(ACC)  # [C]
        b_Xh = tl.load(p_X + row * C + o_C, mask=m_C, other=0.0)  # [C, C]
        b_Xl = tl.load(p_Xlow + row * C + o_C, mask=m_C, other=0.0)  # [C, C]
        if p_fade is not None:
            b_S *= tl.load(p_fade + place * 2 * K + i_k, mask=m_k, other=0.0)[None, :]
        b_Sd = b_S.to(DOT)
        if p_starts is not None:
            tl.store(p_starts + place * V * K + o_h, b_Sd, mask=m_s)
        b_P = tl.dot(b_Sd, tl.trans(b_k), input_precision=PREC, out_dtype=ACC)  # [BV, C]
        # the difference before the rounding: where the memory is right it is small, and its digits count
        b_P = tl.trans(b_v).to(ACC) - b_P
        b_R = times_inverse(b_P, tl.trans(b_Xh), tl.trans(b_Xl), DOT, PREC, ACC, EXACT)  # [BV, C]
        if p_R is not None:
            tl.store(p_R + row * V + o_tv, tl.trans(b_R.to(p_R.dtype.element_ty)), mask=m_tv)
        b_U = b_R * b_beta[None, :]  # [BV, C]
        if p_o is not None:
            b_q = tl.load(p_q + row * K + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
            if p_A is None:
                b_At = tl.dot(b_k, tl.trans(b_q), input_precision=PREC, out_dtype=ACC)  # A^T [C, C]
                b_At = tl.where(i_t[:, None] <= i_t[None, :], b_At, 0.0).to(DOT)
            else:
                b_At = tl.trans(tl.load(p_A + row * C + o_C, mask=m_C, other=0.0).to(DOT))
            b_o = tl.dot(b_Sd, tl.trans(b_q), input_precision=PREC, out_dtype=ACC)  # [BV, C]
            b_o = add_product(b_o, b_U, b_At, DOT, PREC, ACC) * scale  # (6.13)
            tl.store(p_o + row * V + o_tv, tl.trans(b_o.to(p_o.dtype.element_ty)), mask=m_tv)
        if p_fade is not None:
            b_k = tl.load(p_kw + row * K + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
            b_S *= tl.load(p_fade + place * 2 * K + K + i_k, mask=m_k, other=0.0)[None, :]
        b_S = add_product(b_S, b_U, b_k, DOT, PREC, ACC)  # (6.14)
        row += C * H
        place += H
    if p_state is not None:
        tl.store(p_state + own + o_s, b_S, mask=m_s)


@kernel
def reverse_scan_tied_kernel(
    p_q,  # [B, T, H, K] Q~
    p_k,  # [B, T, H, K] K~
    p_kw,  # [B, T, H, K] K^, or None: it is K~
    p_beta,  # [B, T, H]
    p_X,  # [B, T, H, C]
    p_Xlow,  # [B, T, H, C]
    p_A,  # [B, T, H, C] or None: formed here
    p_fade,  # [slots, H, 2, K] or None, without decay
    p_cu,  # [N + 1] or None
    p_do,  # [B, T, H, V]
    p_dstate,  # [N, H, K, V] or None
    p_dP,  # [B, T, H, V]
    p_ends,  # [slots, H, V, K]
    p_dstate0,  # [N, H, K, V] or None
    scale,
    T,
    H,
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
    """(6.14) reversed, last chunk first. Grid: N * H * NV, tiles of V fastest."""
    i_v, i_nh = tl.program_id(0) % NV, tl.program_id(0) // NV
    i_n, i_h = i_nh // H, i_nh % H
    row, count, slot = sequence_place(p_cu, i_n, i_h, T, H, C)
    i_t = tl.arange(0, C)  # [C]
    i_k = tl.arange(0, BK)  # [BK]
    i_c = i_v * BV + tl.arange(0, BV)  # [BV]
    m_k, m_v = i_k < K, i_c < V
    m_s = m_v[:, None] & m_k[None, :]  # [BV, BK]
    own = i_nh.to(tl.int64) * K * V
    o_s = i_k[None, :] * V + i_c[:, None]  # [BV, BK] of [K, V]
    o_h = i_c[:, None] * K + i_k[None, :]  # [BV, BK] of [V, K]
    o_t = i_t * H  # [C] inside a chunk: int32, the chunk's first row is int64
    o_tk, o_tv = o_t[:, None] * K + i_k[None, :], o_t[:, None] * V + i_c[None, :]
    o_C = o_t[:, None] * C + i_t[None, :]  # [C, C]
    n_chunks = (count + C - 1) // C
    start = (n_chunks - 1) * C
    row += start.to(tl.int64) * H
    place = (slot + n_chunks - 1) * H + i_h  # of the chunk among states and factors

    b_D = tl.zeros([BV, BK], dtype=ACC)
    if p_dstate is not None:
        b_D += tl.load(p_dstate + own + o_s, mask=m_s, other=0.0).to(ACC)
    for _ in range(n_chunks):
        m_t = start + i_t < count
        m_tk, m_tv = m_t[:, None] & m_k[None, :], m_t[:, None] & m_v[None, :]
        m_C = m_t[:, None]
        b_q = tl.load(p_q + row * K + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        b_k = tl.load(p_k + row * K + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        b_do = tl.load(p_do + row * V + o_tv, mask=m_tv, other=0.0).to(DOT)  # [C, BV]
        b_beta = tl.load(p_beta + row + o_t, mask=m_t, other=0.0).to(ACC)  # [C]
        b_Xh = tl.load(p_X + row * C + o_C, mask=m_C, other=0.0)  # [C, C]
        b_Xl = tl.load(p_Xlow + row * C + o_C, mask=m_C, other=0.0)  # [C, C]
        b_Dd = b_D.to(DOT)
        tl.store(p_ends + place * V * K + o_h, b_Dd, mask=m_s)
        if p_A is None:
            b_A = tl.dot(b_q, tl.trans(b_k), input_precision=PREC, out_dtype=ACC)  # [C, C]
            b_A = tl.where(i_t[:, None] >= i_t[None, :], b_A, 0.0).to(DOT)
        else:
            b_A = tl.load(p_A + row * C + o_C, mask=m_C, other=0.0).to(DOT)
        b_kw = b_k
        if p_fade is not None:
            b_kw = tl.load(p_kw + row * K + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
            b_D *= tl.load(p_fade + place * 2 * K + K + i_k, mask=m_k, other=0.0)[None, :]
        b_dU = scale * tl.dot(tl.trans(b_do), b_A, input_precision=PREC, out_dtype=ACC)  # [BV, C]
        b_dU = tl.dot(b_Dd, tl.trans(b_kw), b_dU, input_precision=PREC, out_dtype=ACC)
        b_dP = times_inverse(b_dU * b_beta[None, :], b_Xh, b_Xl, DOT, PREC, ACC, EXACT)  # [BV, C]
        tl.store(p_dP + row * V + o_tv, tl.trans(b_dP.to(p_dP.dtype.element_ty)), mask=m_tv)
        b_D += scale * tl.dot(tl.trans(b_do), b_q, input_precision=PREC, out_dtype=ACC)
        b_D = add_product(b_D, -b_dP, b_k, DOT, PREC, ACC)
        if p_fade is not None:
            b_D *= tl.load(p_fade + place * 2 * K + i_k, mask=m_k, other=0.0)[None, :]
        start -= C
        row -= C * H
        place -= H
    if p_dstate0 is not None:
        tl.store(p_dstate0 + own + o_s, b_D, mask=m_s)
