"""Decay between the tokens of a chunk, inside a kernel: which gates a pair crosses, and their sums as products.

A pair of tokens j < i is faded by exp(g_(j, i]), the gates after j up to i. One product of two scaled operands gives it
if the exponent splits at a point between them,

    g_(j, i] = g_(j, cut] + g_(cut, i]        both <= 0, each summed from the cut                    (5.19)

so pairs are sorted by halving (levels.py has the same in PyTorch): in each block of C, C / 2, ... tokens the second
half reads what the first half wrote. A token is a row or a column of a level, never both, and one tile of exponents
serves rows and columns. After LEVELS halvings blocks of BASE = C >> LEVELS tokens are left. There the cut is the
block's first token: a row has g_(first, i] + SHIFT, a column -g_(first, j] - SHIFT, and BASE says how far from zero
that may go. The shift is a constant, so a token's scores still depend on nothing later, bit for bit. BASE = 1 is
exact for any decay; without decay LEVELS = 0 and all exponents are zero. The levels are a loop that stays one:
unrolled, the tiles of all of them would want registers at once.

Every sum is a product with a matrix of zeros and ones. Sums along an axis would go through shared memory thread by
thread, and differences of longer sums would lose every digit where a gate is strong.
"""

# pyright: reportArgumentType=false
import triton.language as tl

from ..runtime import kernel

FORGOTTEN = tl.constexpr(-2048.0)  # exp of it is exactly 0; in place of -inf it keeps 0 * inf away


@kernel
def level_gates(i, t, block, LAG: tl.constexpr = 0):
    """Whether i's exponent in its block holds the gate of t: (cut, i - LAG] in the second half, (i, cut] in the first.

    LAG 0: the row reads the state after its token's gate, 1: before it.
    """
    second = i // block * block + block // 2  # the first token after the cut
    return ((t >= second) & (t <= i - LAG)) | ((t < second) & (t > i))


@kernel
def level_pairs(i, j, block):
    """Whether tokens i and j, in any order, lie in the two halves of one block."""
    return (i // block == j // block) & (i // (block // 2) != j // (block // 2))


@kernel
def base_gates(i, t, BASE: tl.constexpr, LAG: tl.constexpr = 0):
    """Whether i's exponent in its base block holds the gate of token t: (first, i - LAG]."""
    return (t > i // BASE * BASE) & (t <= i - LAG)


@kernel
def gate_sums(m_M, b_g, DOT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr):
    """M g for a matrix M [C, C] of truths and b_g [C, BK] in ACC or bfloat16.

    In half precision g enters as high + low, where 2^-17 of an exponent x is at most 2^-17 |x| exp(x) < 3e-6 of a
    factor, or as it is where it was given in bfloat16.
    """
    if b_g.dtype == tl.bfloat16:
        b_M = tl.where(m_M, 1.0, 0.0).to(tl.bfloat16)
        b_sums = tl.dot(b_M, b_g, input_precision=PREC, out_dtype=ACC)
    elif DOT == ACC:
        b_M = tl.where(m_M, 1.0, 0.0).to(ACC)
        b_sums = tl.dot(b_M, b_g, input_precision=PREC, out_dtype=ACC)
    else:
        b_M = tl.where(m_M, 1.0, 0.0).to(tl.bfloat16)
        b_high = b_g.to(tl.bfloat16)
        b_low = (b_g - b_high.to(ACC)).to(tl.bfloat16)
        b_sums = tl.dot(b_M, b_low, input_precision=PREC, out_dtype=ACC)
        b_sums = tl.dot(b_M, b_high, b_sums, input_precision=PREC, out_dtype=ACC)
    return b_sums


@kernel
def base_exponents(
    i,
    t,
    b_g,
    BASE: tl.constexpr,
    FLOOR: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
    ACC: tl.constexpr,
    LAG: tl.constexpr = 0,
):
    """g_(first, i - LAG] + SHIFT [C, BK], gates not below FLOOR, SHIFT half of the way BASE - 1 of them can go."""
    b_g = tl.maximum(b_g.to(ACC), FLOOR).to(b_g.dtype)
    return gate_sums(base_gates(i, t, BASE, LAG), b_g, DOT, PREC, ACC) - 0.5 * (BASE - 1) * FLOOR


@kernel
def gate_gradient(m_M, b_z, DOT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr):
    """M z, as `gate_sums`, for what pairs hand back; beside bfloat16 operands its 8 digits are enough for them too."""
    if DOT == tl.bfloat16:
        b_z = b_z.to(DOT)
    return gate_sums(m_M, b_z, DOT, PREC, ACC)


@kernel
def scaled(b_x, b_e, DOT: tl.constexpr, ACC: tl.constexpr):
    """x * e, rounded once."""
    return (b_x.to(ACC) * b_e).to(DOT)


@kernel
def load_gates(p_g, offsets, mask, DOT: tl.constexpr, ACC: tl.constexpr):
    """Gates [C, BK], -inf as a number whose exp is 0; in ACC, or in bfloat16 where that is what they and DOT are."""
    b_g = tl.load(p_g + offsets, mask=mask, other=0.0)
    if DOT == tl.bfloat16 and p_g.dtype.element_ty == tl.bfloat16:
        b_g = tl.maximum(b_g.to(ACC), FORGOTTEN).to(tl.bfloat16)
    else:
        b_g = tl.maximum(b_g.to(ACC), FORGOTTEN)
    return b_g
