"""First stage, all chunks at once: the C x C matrix that turns what the memory gets wrong into what is written.

T' = (I + tril_{-1}(diag(beta) K K^T))^{-1} diag(beta)                                           (2.5)
"""

# pyright: reportArgumentType=false
import triton.language as tl

from ..runtime import kernel
from .place import chunk_place
from .triangular import guarded_inverse


@kernel
def prepare_tied_kernel(
    p_k,  # [B, T, H, K]
    p_beta,  # [B, T, H]
    p_T,  # [B, T, H, C]
    p_cu,  # [N + 1] or None
    T,
    H,
    N,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
    INVERSE: tl.constexpr,
    PREC: tl.constexpr,
    SAFE: tl.constexpr,
    ACC: tl.constexpr,
):
    """(2.5). Grid: chunk slots * H, heads fastest. Tokens that do not exist have k = 0 and beta = 0: identity."""
    i_s, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    row, count = chunk_place(p_cu, i_s, i_h, T, H, N, C)
    i_t = tl.arange(0, C)  # [C]
    i_k = tl.arange(0, BK)  # [BK]
    m_t = i_t < count
    o_t = row + i_t.to(tl.int64) * H  # [C]
    m_tk = m_t[:, None] & (i_k < K)[None, :]
    b_k = tl.load(p_k + o_t[:, None] * K + i_k[None, :], mask=m_tk, other=0.0).to(DOT)  # [C, BK]
    b_beta = tl.load(p_beta + o_t, mask=m_t, other=0.0).to(ACC)  # [C]
    b_L = tl.dot(b_k, tl.trans(b_k), input_precision=PREC, out_dtype=ACC)  # [C, C]
    b_L = tl.where(i_t[:, None] > i_t[None, :], b_L * b_beta[:, None], 0.0)
    # bfloat16 inputs have 8 digits to lose and the inverse's 11 are enough; float16 inputs want them all
    b_X = guarded_inverse(b_L, C, INVERSE, PREC, ACC, SAFE, DOT == tl.float16)
    b_beta = tl.load(p_beta + o_t, mask=m_t, other=0.0).to(
        ACC
    )  # again: held through the inverse it would spill
    b_T = (b_X * b_beta[None, :]).to(p_T.dtype.element_ty)
    tl.store(p_T + o_t[:, None] * C + i_t[None, :], b_T, mask=m_t[:, None])
