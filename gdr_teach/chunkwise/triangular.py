"""Unit lower triangular matrices inside a kernel: the inverse by divide and conquer.

    (I + A)^{-1},  A strictly lower, C x C.  For two blocks of size m on the diagonal, already inverted to X_1, X_2:

        [I + A_1      0     ]^{-1}     [     X_1         0  ]
        [  A_21    I + A_2  ]       =  [ -X_2 A_21 X_1  X_2 ]                                        (6.1)

log2(C) - 1 doublings, two matrix products each, all on whole C x C tiles with masks. Every intermediate is the inverse
of a diagonal block, whose entries stay small where the state does; a Neumann series would pass through powers of A that
reach 1e18 for identical keys before they cancel (docs/kernels.md).
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
import triton.language as tl

from ..runtime import kernel


@kernel
def unit_lower_inverse(
    b_A, C: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr
):
    """(6.1) for b_A [C, C] in ACC, strictly lower. Operands are rounded to DOT, sums are ACC."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    # blocks of two: [[1, 0], [a, 1]] has the inverse [[1, 0], [-a, 1]]
    b_X = tl.where(i == j, 1.0, tl.where((i // 2 == j // 2) & (i > j), -b_A, 0.0)).to(ACC)
    b_Ad = b_A.to(DOT)  # [C, C]
    for level in tl.static_range(1, 8):
        if 2 << level <= C:
            b_Xd = b_X.to(DOT)
            b_P = tl.dot(b_Xd, b_Ad, input_precision=PREC, out_dtype=ACC)  # X_2 A_21, and more
            same_pair = (i >> (level + 1)) == (j >> (level + 1))
            below = (i >> level) > (j >> level)
            b_P = tl.where(same_pair & below, b_P, 0.0)
            b_X -= tl.dot(b_P.to(DOT), b_Xd, input_precision=PREC, out_dtype=ACC)
    return b_X


@kernel
def refined_inverse(
    b_A, b_X, C: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr
):
    """One step X <- X + X (I - (I + A) X), the residual from operands split in two: the digits the rounding cost."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    b_Ah, b_Xh = b_A.to(DOT), b_X.to(DOT)
    b_R = tl.where(i == j, 1.0, 0.0).to(ACC) - b_X
    b_R -= tl.dot(b_Ah, b_Xh, input_precision=PREC, out_dtype=ACC)
    b_R -= tl.dot(b_Ah, (b_X - b_Xh.to(ACC)).to(DOT), input_precision=PREC, out_dtype=ACC)
    b_R -= tl.dot((b_A - b_Ah.to(ACC)).to(DOT), b_Xh, input_precision=PREC, out_dtype=ACC)
    return b_X + tl.dot(b_Xh, b_R.to(DOT), input_precision=PREC, out_dtype=ACC)


@kernel
def times_inverse(
    b_P,
    b_Xh,
    b_Xl,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
    ACC: tl.constexpr,
    EXACT: tl.constexpr,
):
    """P (X_high + X_low) for P [V, C] in ACC and X [C, C] in DOT; bfloat16's 8 digits are too few for P as well.

    Rounding X once is not enough: with identical keys it is a Toeplitz matrix, the same in every chunk, so its errors
    neither average nor change sign, and at beta = 2 the state grows by them (docs/log.md). For the same reason the sums
    are EXACT, float64, where DOT is float32.
    """
    if EXACT == tl.float64:
        b_X = b_Xh.to(EXACT) + b_Xl.to(EXACT)
        return tl.dot(b_P.to(EXACT), b_X, out_dtype=EXACT).to(ACC)
    b_high = b_P.to(DOT)
    b_Y = tl.dot(b_high, b_Xh, input_precision=PREC, out_dtype=ACC)
    b_Y = tl.dot(b_high, b_Xl, b_Y, input_precision=PREC, out_dtype=ACC)
    if DOT == tl.bfloat16:
        b_low = (b_P - b_high.to(ACC)).to(DOT)
        b_Y = tl.dot(b_low, b_Xh, b_Y, input_precision=PREC, out_dtype=ACC)
    return b_Y


@kernel
def add_product(b_Z, b_x, b_y, DOT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr):
    """Z + x y for x in ACC and y in DOT; bfloat16's 8 digits are too few for x, which enters as high + low."""
    b_high = b_x.to(DOT)
    b_Z = tl.dot(b_high, b_y, b_Z, input_precision=PREC, out_dtype=ACC)
    if DOT == tl.bfloat16:
        b_low = (b_x - b_high.to(ACC)).to(DOT)
        b_Z = tl.dot(b_low, b_y, b_Z, input_precision=PREC, out_dtype=ACC)
    return b_Z


@kernel
def guarded_inverse(
    b_A,
    C: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
    ACC: tl.constexpr,
    SAFE: tl.constexpr,
):
    """The inverse, refined once where DOT is fp16, and again with more range where it left fp16's.

    fp16 has the digits (11) but not the range (65504): keys longer than 1 can leave it. One maximum and one branch
    decide. NaN is counted entry by entry, for it is not below any bound, and a maximum of the entries passes over it.
    """
    if DOT == tl.float16:
        b_X = unit_lower_inverse(b_A, C, DOT, PREC, ACC)
        b_X = refined_inverse(b_A, b_X, C, DOT, PREC, ACC)
        if tl.max(tl.where(tl.abs(b_X) < 16384.0, 0, 1)) > 0:
            b_X = unit_lower_inverse(b_A, C, tl.float32, SAFE, ACC)
    else:
        b_X = unit_lower_inverse(b_A, C, DOT, SAFE, ACC)
    return b_X
