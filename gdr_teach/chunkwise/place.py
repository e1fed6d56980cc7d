"""Where a program stands: which sequence, head, chunk and columns it owns.

Rows are counted in (token, head) pairs: row = (b * T + t) * H + h, a key lies at row * K. Chunk slots number the chunks
of all sequences with room to spare: document n begins at slot e_n // C + n, since ceil(length / C) is at most
e_{n+1} // C - e_n // C + 1. So T // C + N slots are enough for any packing, and nobody has to know the lengths before
the launch. Grids have one dimension: the first may hold 2^31 - 1 programs, the others 65,535.
"""

import triton.language as tl

from ..runtime import kernel


@kernel
def sequence_place(p_cu, i_n, i_h, T, H, C: tl.constexpr):
    """First row, token count and first chunk slot of sequence i_n, head i_h."""
    if p_cu is not None:
        first = tl.load(p_cu + i_n).to(tl.int64)
        count = (tl.load(p_cu + i_n + 1).to(tl.int64) - first).to(tl.int32)
        slot = first // C + i_n
    else:
        first = i_n.to(tl.int64) * T
        count = T
        slot = i_n.to(tl.int64) * ((T + C - 1) // C)
    return first * H + i_h, count, slot


@kernel
def chunk_place(p_cu, i_s, i_h, T, H, N, C: tl.constexpr):
    """First row of the chunk in slot i_s, and how many tokens are left there (none: 0 or less)."""
    if p_cu is not None:
        low, high = (
            i_s * 0,
            i_s * 0 + N,
        )  # the sequence n with e_n // C + n <= i_s < e_{n+1} // C + n + 1
        while low + 1 < high:
            middle = (low + high) // 2
            if (tl.load(p_cu + middle).to(tl.int64) // C + middle).to(tl.int32) <= i_s:
                low = middle
            else:
                high = middle
        i_n = low
    else:
        i_n = i_s // ((T + C - 1) // C)
    row, count, slot = sequence_place(p_cu, i_n, i_h, T, H, C)
    start = (i_s - slot).to(tl.int32) * C  # of the chunk, in tokens of its sequence
    return row + start.to(tl.int64) * H, count - start
