"""Decay between the tokens of a chunk, inside a kernel: which gates a pair crosses, and their sums as products.

A pair of tokens j < i is faded by exp(g_(j, i]), the gates after j up to i. One product of two scaled operands gives it
if the exponent splits at a point between them,

    g_(j, i] = g_(j, cut] + g_(cut, i]        both <= 0, each summed from the cut                    (5.19)

so pairs are sorted by halving (gated/reference.py has the same in PyTorch): at half size h the second half of each block
of 2 h tokens reads what the first half wrote. A token is a row or a column of a level, never both, and one tile of
exponents serves rows and columns. Inside blocks of BASE tokens the cut is the block's first token, and a column's
exponent -g_(first, j] is positive: BASE says how far that may go. BASE = 1 is exact for any decay; BASE = C without one.

Every sum is a product with a matrix of zeros and ones. Sums along an axis would go through shared memory thread by thread,
and differences of longer sums would lose every digit where a gate is strong.
"""

# pyright: reportArgumentType=false
import triton.language as tl

from ..runtime import kernel


@kernel
def level_gates(i, t, h: tl.constexpr):
    """Whether row i's exponent at half size h holds the gate of token t: second halves (cut, i], first halves (i, cut]."""
    first_of_second = i // (2 * h) * (2 * h) + h
    crossed_by_row = (t >= first_of_second) & (t <= i)
    crossed_by_column = (t > i) & (t < first_of_second)
    return ((i >= first_of_second) & crossed_by_row) | ((i < first_of_second) & crossed_by_column)


@kernel
def level_pairs(i, j, h: tl.constexpr):
    """Whether tokens i and j, in any order, lie in the two halves of one block of 2 h tokens."""
    return (i // (2 * h) == j // (2 * h)) & (i // h != j // h)


@kernel
def base_gates(i, t, BASE: tl.constexpr):
    """Whether row i's exponent in its base block holds the gate of token t: (first, i]."""
    return (t > i // BASE * BASE) & (t <= i)


@kernel
def gate_sums(m_M, b_g, DOT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr):
    """M g for a matrix M [C, C] of truths and b_g [C, BK] in ACC.

    In half precision g enters as high + low: 2^-17 of an exponent x is at most 2^-17 |x| exp(x) < 3e-6 of a factor.
    """
    if DOT == ACC:
        b_M = tl.where(m_M, 1.0, 0.0).to(ACC)
        b_sums = tl.dot(b_M, b_g, input_precision=PREC, out_dtype=ACC)
    else:
        b_M = tl.where(m_M, 1.0, 0.0).to(tl.bfloat16)
        b_high = b_g.to(tl.bfloat16)
        b_low = (b_g - b_high.to(ACC)).to(tl.bfloat16)
        b_sums = tl.dot(b_M, b_low, input_precision=PREC, out_dtype=ACC)
        b_sums = tl.dot(b_M, b_high, b_sums, input_precision=PREC, out_dtype=ACC)
    return b_sums
