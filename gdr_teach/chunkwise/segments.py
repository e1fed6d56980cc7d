"""Two levels of walks, for few heads and long sequences: pieces of a sequence side by side, for both families.

The walk over chunks is the only serial stage, and with few heads it leaves a GPU idle. Over any stretch of tokens a
rule is an affine map of the state, and so every sequence is cut into segments g = 0, 1, ... of L tokens:

    S_{g+1} = M_g S_g + N_g        S_g the state before segment g, N_g its last state from zero,     (6.50)
                                   M_g its last state from the identity where every v is zero
    D_{g-1} = M_g^T D_g + E_g      D_g the gradient of S_{g+1}, E_g that of S_g where D_g is zero    (6.51)

    forward     walks for N and M, all segments at once      combine (6.50) -> S_g      the ordinary call
    backward    reverse walk for E, all segments at once     combine (6.51) -> D_g      the ordinary call

A segment is a document with an initial state of its own, so the ordinary call takes the segments as packed documents;
L is a multiple of the chunk size, so their chunks are the document's own. Its walk is 1 / G as long and is made three
times instead of once (forward) and three times instead of twice (backward). M is a walk of its own over K columns, not
K more columns of the walk for N: it takes the same kernel as it is, and nobody copies v to put zeros beside it.

The maps pass in the state's dtype and their product keeps its digits: where keys repeat and beta is 2, M is a product
of reflections, along which an error never fades.
"""

# pyright: reportArgumentType=false
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..runtime import cdiv, kernel, recording
from .tiles import SHORTEST, target_of, width


def cut(ends: Tensor, C: int, G: int) -> tuple[Tensor, Tensor]:
    """Where the segments begin and end, and which is the last of its document that has tokens.

    A document of n chunks is cut every max(ceil(n / G), SHORTEST) chunks, whatever lies beside it; it has G segments,
    the last of them empty where fewer are enough. Nothing is read on the host.
    Args: ends [N + 1], the documents' as in cu_seqlens. Returns: int64 [N G + 1] and [N].
    """
    first, length = ends[:-1].long(), ends.diff().long()
    L = (((length + C - 1) // C + G - 1) // G).clamp(min=SHORTEST) * C  # [N] tokens of a segment
    starts = torch.arange(G, device=ends.device) * L[:, None]  # [N, G]
    starts = first[:, None] + torch.minimum(starts, length[:, None])
    last = ((length + L - 1) // L - 1).clamp(min=0)
    last += torch.arange(len(last), device=ends.device) * G
    return torch.cat([starts.flatten(), ends[-1:].long()]), last


@kernel
def combine_kernel(
    p_M,  # [N G, H, K, K]
    p_N,  # [N G, H, K, V]: N, in reverse E
    p_first,  # [N, H, K, V] or None, zeros: the initial state, in reverse the last one's gradient
    p_cu,  # [N G + 1]
    p_S,  # [N G, H, K, V]: S, in reverse D
    G,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NV: tl.constexpr,
    REVERSE: tl.constexpr,
    PREC: tl.constexpr,
    ACC: tl.constexpr,
):
    """(6.50), in reverse (6.51), segment after segment. Grid: N * H * NV, tiles of V fastest.

    A program owns all rows of BV columns. What it has stored is its next operand: K rows need not fit into registers.
    """
    i_v, i_nh = tl.program_id(0) % NV, tl.program_id(0) // NV
    i_n, i_h = i_nh // H, i_nh % H
    i_r = tl.arange(0, BK)  # [BK]
    i_c = i_v * BV + tl.arange(0, BV)  # [BV]
    segment = i_n * G + (G - 1 if REVERSE else 0)
    for k0 in range(0, K, BK):
        m_s = (k0 + i_r < K)[:, None] & (i_c < V)[None, :]
        o_s = (k0 + i_r)[:, None] * V + i_c[None, :]  # [BK, BV]
        b_S = tl.zeros([BK, BV], dtype=ACC)
        if p_first is not None:
            b_S += tl.load(p_first + i_nh.to(tl.int64) * K * V + o_s, mask=m_s, other=0.0).to(ACC)
        tl.store(p_S + (segment.to(tl.int64) * H + i_h) * K * V + o_s, b_S, mask=m_s)
    for _ in range(1, G):
        tl.debug_barrier()  # what one thread has written another may read
        count = tl.load(p_cu + segment + 1) - tl.load(p_cu + segment)
        own = segment.to(tl.int64) * H + i_h  # the segment that is crossed
        segment += -1 if REVERSE else 1
        after = segment.to(tl.int64) * H + i_h
        for k0 in range(0, K, BK):
            m_s = (k0 + i_r < K)[:, None] & (i_c < V)[None, :]
            o_s = (k0 + i_r)[:, None] * V + i_c[None, :]  # [BK, BV]
            if count > 0:
                b_S = tl.load(p_N + own * K * V + o_s, mask=m_s, other=0.0)
                for j0 in range(0, K, BK):
                    i_k, i_j = (k0 + i_r)[:, None], (j0 + i_r)[None, :]
                    o_M = i_j * K + i_k if REVERSE else i_k * K + i_j  # [BK, BK]
                    m_M = (i_k < K) & (i_j < K)
                    b_M = tl.load(p_M + own * K * K + o_M, mask=m_M, other=0.0)
                    m_j = (j0 + i_r < K)[:, None] & (i_c < V)[None, :]
                    o_j = (j0 + i_r)[:, None] * V + i_c[None, :]
                    b_j = tl.load(p_S + own * K * V + o_j, mask=m_j, other=0.0)
                    b_S = tl.dot(b_M, b_j, b_S, input_precision=PREC, out_dtype=ACC)
            else:  # without tokens nothing happens, and not to the last digit either
                b_S = tl.load(p_S + own * K * V + o_s, mask=m_s, other=0.0)
            tl.store(p_S + after * K * V + o_s, b_S, mask=m_s)


class SegmentedCall:
    """The launches of one call that is cut into segments; forward and backward as those of the ordinary call."""

    def __init__(
        self,
        family: Callable[..., Any],
        operands: tuple[Tensor | None, ...],
        *,
        segments: int,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        **options,
    ):
        whole = family(*operands, initial_state=initial_state, cu_seqlens=cu_seqlens, **options)
        self.N, self.G, self.S0, self.ACC = whole.N, segments, initial_state, whole.ACC
        self.shape = whole.v.shape
        self.shapes = [None if x is None else x.shape for x in operands]
        ends = cu_seqlens
        if ends is None:
            ends = torch.arange(whole.N + 1, device=whole.q.device) * whole.T
        self.cu, self.last = cut(ends, whole.C, segments)
        tokens = whole.q.shape[0] * whole.T
        joined = (None if x is None else x.view(1, tokens, *x.shape[2:]) for x in operands)
        self.call = family(*joined, initial_state=None, cu_seqlens=self.cu, **options)

    def combine(self, M: Tensor, N: Tensor, first: Tensor | None, *, reverse: bool) -> Tensor:
        """S [N G, H, K, V] before each segment, or D after each."""
        H, K, V = N.shape[1:]
        S = self.call.empty(*N.shape, dtype=N.dtype)
        target = recording() or target_of(N.device)
        BK, BV = min(width(K, target), 64), min(width(V, target), 16)
        NV = cdiv(V, BV)
        grid = (self.N * H * NV,)
        if grid[0]:
            arrays, tiles = (M, N, first, self.cu, S), (self.G, H, K, V, BK, BV, NV)
            prec = "ieee" if target == "cpu" else "bf16x6"
            combine_kernel[grid](*arrays, *tiles, reverse, prec, self.ACC, num_warps=4)
        return S

    def forward(self) -> tuple[Tensor, Tensor, tuple]:
        """o [B, T, H, V], the last state [N, H, K, V], and what the backward needs: the call's own, S and M."""
        x = self.call.prepare()
        M, N = self.call.maps(x)
        self.call.S0 = S = self.combine(M, N, self.S0, reverse=False)
        o, state, _ = self.call.forward(x)
        return o.view(self.shape), state.index_select(0, self.last), (*x, S, M)

    def backward(self, do: Tensor, dstate: Tensor | None, kept: tuple | None) -> tuple:
        """As the ordinary call's. kept: what `forward` gave; None, or no S or M in it, makes that again."""
        *x, S, M = (*self.call.prepare(), None, None) if kept is None else kept
        x = self.call.Kept(*x)
        if S is None or M is None:
            M, N = self.call.maps(x)
            S = self.combine(M, N, self.S0, reverse=False)
        self.call.S0, do = S, do.contiguous().view(self.call.v.shape)
        E = self.call.start_gradient(x, do)
        dstate = None if dstate is None else dstate.contiguous()
        D = self.combine(M, E, dstate, reverse=True)
        *grads, dS = self.call.backward(do, D, x)
        grads = (
            None if x is None else x.view(shape)
            for x, shape in zip(grads, self.shapes, strict=True)
        )
        return *grads, None if self.S0 is None else dS[:: self.G].contiguous()


def call_in_segments(
    family: Callable[..., Any], operands: tuple[Tensor | None, ...], *, segments: int, **options
) -> Any:
    """`family(*operands, **options)`, or the same in segments where there is more than one."""
    if segments < 1:
        raise ValueError(f"segments: wanted a whole number from 1, got {segments}")
    if segments == 1:
        return family(*operands, **options)
    return SegmentedCall(family, operands, segments=segments, **options)
