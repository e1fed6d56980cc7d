"""The serial stage of the untied family: a walk over the chunks with the state in registers, forward and in reverse.

As in `scan`, everything is held as [V, .] and the two kernels are each other's transpose, line by line:

    forward                                         reverse (dO is the gradient of O, D of the state)
    U = W S + U0                                    Y = B^ D
    O = scale * (Q2 S + O0)                         D <- fade * D + W^T Y + scale * Q2^T dO          (6.35)
    S <- fade * S + B^^T U + K^^T V

W, U0, Q2, O0 come from `prepare_untied`. The state changes by a sum of C outer products, never by a K x K matrix: with
C < K that is fewer numbers to read, and their roundings do not come back in every chunk (decision 0014). The reverse
walk is light, for what it needs of the inside of a chunk is in W and Q2 already; everything else is for
`grads_untied`, all chunks at once.
"""

# pyright: reportArgumentType=false
import triton.language as tl

from ..runtime import kernel
from .place import sequence_place
from .triangular import add_product


@kernel
def scan_untied_kernel(
    p_B,  # [B, T, H, K] B^
    p_K,  # [B, T, H, K] K^
    p_v,  # [B, T, H, V]
    p_U,  # [B, T, H, K + V] W and U0
    p_O,  # [B, T, H, K + V] Q2 and O0, or None: nobody wants o
    p_fade,  # [slots, H, K] or None, without decay
    p_state0,  # [N, H, K, V] or None
    p_cu,  # [N + 1] or None
    p_o,  # [B, T, H, V] or None
    p_u,  # [B, T, H, V] or None: the backward wants U and the state before each chunk
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
):
    """(6.35), left, chunk after chunk. Grid: N * H * NV, tiles of V fastest."""
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
    o_xk = o_t[:, None] * (K + V) + i_k[None, :]  # [C, BK] of [., K + V]
    o_xv = o_t[:, None] * (K + V) + K + i_c[None, :]  # [C, BV]
    place = slot * H + i_h  # of the chunk among states and factors

    b_S = tl.zeros([BV, BK], dtype=ACC)
    if p_state0 is not None:
        b_S += tl.load(p_state0 + own + o_s, mask=m_s, other=0.0).to(ACC)
    for start in range(0, count, C):
        m_t = start + i_t < count
        m_tk, m_tv = m_t[:, None] & m_k[None, :], m_t[:, None] & m_v[None, :]
        base = row * (K + V)
        b_W = tl.load(p_U + base + o_xk, mask=m_tk, other=0.0)  # [C, BK]
        b_U0 = tl.load(p_U + base + o_xv, mask=m_tv, other=0.0)  # [C, BV]
        b_B = tl.load(p_B + row * K + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        b_K = tl.load(p_K + row * K + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        b_v = tl.load(p_v + row * V + o_tv, mask=m_tv, other=0.0).to(DOT)  # [C, BV]
        b_Sd = b_S.to(DOT)
        if p_starts is not None:
            tl.store(p_starts + place * V * K + o_h, b_Sd, mask=m_s)
        b_U = tl.trans(b_U0).to(ACC)
        b_U = tl.dot(b_Sd, tl.trans(b_W), b_U, input_precision=PREC, out_dtype=ACC)  # [BV, C]
        if p_u is not None:
            tl.store(p_u + row * V + o_tv, tl.trans(b_U.to(p_u.dtype.element_ty)), mask=m_tv)
        if p_o is not None:
            b_Q = tl.load(p_O + base + o_xk, mask=m_tk, other=0.0)  # [C, BK]
            b_O = tl.trans(tl.load(p_O + base + o_xv, mask=m_tv, other=0.0)).to(ACC)
            b_O = tl.dot(b_Sd, tl.trans(b_Q), b_O, input_precision=PREC, out_dtype=ACC) * scale
            tl.store(p_o + row * V + o_tv, tl.trans(b_O.to(p_o.dtype.element_ty)), mask=m_tv)
        if p_fade is not None:
            b_S *= tl.load(p_fade + place * K + i_k, mask=m_k, other=0.0)[None, :]
        b_S = add_product(b_S, b_U, b_B, DOT, PREC, ACC)
        b_S = tl.dot(tl.trans(b_v), b_K, b_S, input_precision=PREC, out_dtype=ACC)
        row += C * H
        place += H
    if p_state is not None:
        tl.store(p_state + own + o_s, b_S, mask=m_s)


@kernel
def reverse_scan_untied_kernel(
    p_B,  # [B, T, H, K] B^
    p_U,  # [B, T, H, K + V] W, and U0, which is not read
    p_O,  # [B, T, H, K + V] Q2, and O0, which is not read
    p_fade,  # [slots, H, K] or None, without decay
    p_cu,  # [N + 1] or None
    p_do,  # [B, T, H, V]
    p_dstate,  # [N, H, K, V] or None
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
):
    """(6.35), right, last chunk first. Grid: N * H * NV, tiles of V fastest."""
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
    o_xk = o_t[:, None] * (K + V) + i_k[None, :]  # [C, BK] of [., K + V]
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
        base = row * (K + V)
        b_B = tl.load(p_B + row * K + o_tk, mask=m_tk, other=0.0).to(DOT)  # [C, BK]
        b_W = tl.load(p_U + base + o_xk, mask=m_tk, other=0.0)  # [C, BK]
        b_Q = tl.load(p_O + base + o_xk, mask=m_tk, other=0.0)  # [C, BK]
        b_do = tl.load(p_do + row * V + o_tv, mask=m_tv, other=0.0)  # [C, BV]
        b_do = tl.trans((b_do.to(ACC) * scale).to(DOT))  # [BV, C]
        b_Dd = b_D.to(DOT)
        tl.store(p_ends + place * V * K + o_h, b_Dd, mask=m_s)
        b_Y = tl.dot(b_Dd, tl.trans(b_B), input_precision=PREC, out_dtype=ACC)  # [BV, C]
        if p_fade is not None:
            b_D *= tl.load(p_fade + place * K + i_k, mask=m_k, other=0.0)[None, :]
        b_D = add_product(b_D, b_Y, b_W, DOT, PREC, ACC)
        b_D = tl.dot(b_do, b_Q, b_D, input_precision=PREC, out_dtype=ACC)
        start -= C
        row -= C * H
        place -= H
    if p_dstate0 is not None:
        tl.store(p_dstate0 + own + o_s, b_D, mask=m_s)
