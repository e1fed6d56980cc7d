"""The launches of the tied family, forward and backward: what a rule's chunk.py calls.

    forward    prepare -> X (and, with decay, A, Q~, K~, K^, fade)       scan -> o, state
    backward   scan -> R and S before each chunk    reverse scan -> dP = dv and D after each chunk    grads -> the rest

Two launches forward and three backward. From forward to backward only what `prepare` wrote is kept. `maps` and
`start_gradient` are what `segments` asks for beside these.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..notation import state_dtype
from ..runtime import cdiv, new_empty, recording
from .grads import grads_tied_kernel
from .prepare import prepare_tied_kernel
from .scan import reverse_scan_tied_kernel, scan_tied_kernel
from .tiles import Tiles, levels, target_of, tiles


class Prepared(NamedTuple):
    """What passes from the first stage to all others; what is not needed is empty."""

    X: Tensor  # [2, B, T, H, C]: rounded, and what the rounding left
    A: Tensor | None = None  # [B, T, H, C]
    operands: Tensor | None = None  # [3, B, T, H, K]: Q~, K~, K^
    fade: Tensor | None = None  # [slots, H, 2, K]


class TiedCall:
    """One call's operands (dense, checked), sizes and tiles, and its launches."""

    Kept = Prepared  # what `forward` hands to `backward`

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        *,
        scale: float | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        chunk_size: int | None = None,
        min_log_decay: float | None = None,
    ):
        self.q, self.k, self.v, self.beta, self.g = q, k, v, beta, log_decay
        self.S0, self.cu = initial_state, cu_seqlens
        B, self.T, self.H, self.K = k.shape
        self.V = v.shape[-1]
        self.N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.scale = float(self.K**-0.5 if scale is None else scale)
        self.acc = state_dtype(q.dtype)
        self.state_shape = (self.N, self.H, self.K, self.V)
        target = recording() or target_of(q.device)
        chosen = tiles(target, q.dtype, self.K, self.V, decay=log_decay is not None)
        self.tiles: Tiles = chosen if chunk_size is None else chosen._replace(C=chunk_size)
        self.C = self.tiles.C
        # slots for the chunks of all sequences, whatever their lengths: see place.py
        per_sequence = self.N * cdiv(self.T, self.C)
        self.slots = per_sequence if cu_seqlens is None else self.T // self.C + self.N
        if log_decay is None:
            self.G, self.levels, self.grads_levels = 0, (0, 0.0), (0, 0.0)
        else:
            self.G = 1 if log_decay.dim() == 3 else self.K
            self.levels = self.grads_levels = levels(q.dtype, self.C, min_log_decay)
            # inside a base block dg is a difference of sums: none of that without a promise about the gates
            if min_log_decay is None:
                self.grads_levels = levels(torch.float32, self.C, None)
        half = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
        self.ACC = tl.float64 if self.acc == torch.float64 else tl.float32
        self.DOT = half.get(q.dtype, self.ACC)
        compiled = target != "cpu"
        self.PREC = "bf16x6" if compiled and q.dtype not in half else "ieee"
        self.SAFE = ("bf16x3" if q.dtype in half else self.PREC) if compiled else "ieee"
        # float32 solves in float64, which AMD's compiler has no product for
        self.EXACT = tl.float32 if q.dtype in half or target == "gfx942" else tl.float64
        self.wants_A = log_decay is not None or q.dtype == torch.float32  # else the walk forms it
        self.INVERSE = tl.float16 if q.dtype in half else self.EXACT

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return new_empty(
            shape, dtype=self.q.dtype if dtype is None else dtype, device=self.q.device
        )

    def prepare(self) -> Prepared:
        B, T, H = self.beta.shape
        tile, grid = self.tiles.prepare, (self.slots * H,)
        X = self.empty(2, B, T, H, self.C)
        A = self.empty(B, T, H, self.C) if self.wants_A else self.empty(0)
        if self.g is None:
            out = Prepared(X, A, self.empty(0), self.empty(0))
            extra = (None,) * 4
        else:
            operands = self.empty(3, B, T, H, self.K)
            fade = self.empty(self.slots, H, 2, self.K, dtype=self.acc)
            out = Prepared(X, A, operands, fade)
            extra = (*operands.unbind(0), fade)
        if grid[0] and T:
            q, A = (self.q, A) if self.wants_A else (None, None)
            arrays = (q, self.k, self.beta, self.g, self.cu, *X.unbind(0), A, *extra)
            sizes = (T, H, self.N, self.K, self.G, tile.BK, self.C, *self.levels)
            DOT = self.DOT if self.INVERSE == tl.float16 else self.EXACT
            kinds = (DOT, self.INVERSE, self.PREC, self.SAFE, self.EXACT)
            prepare_tied_kernel[grid](
                *arrays, *sizes, *kinds, num_warps=tile.warps, num_stages=tile.stages
            )
        return out

    def _walk(self, tile) -> tuple[tuple[int], tuple, dict]:
        # grid, sizes and options of a walk
        NV = cdiv(self.V, tile.BV)
        sizes = (self.scale, self.T, self.H, self.K, self.V, tile.BK, tile.BV, NV, self.C)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        kinds = (self.DOT, self.PREC, self.ACC, self.EXACT)
        return (self.N * self.H * NV,), (*sizes, *kinds), options

    def _operands(self, x: Prepared) -> tuple:
        # Q~, K~, K^ and A, fade as the walks take them
        A = x.A if self.wants_A else None
        if self.g is None or x.operands is None:
            return (self.q, self.k, None), (A, None)
        return x.operands.unbind(0), (A, x.fade)

    def scan(self, x: Prepared, *, o=None, state=None, R=None, starts=None) -> None:
        grid, sizes, options = self._walk(self.tiles.scan)
        if grid[0]:
            qkk, decayed = self._operands(x)
            arrays = (
                *qkk,
                self.v,
                self.beta,
                *x.X.unbind(0),
                *decayed,
                self.S0,
                self.cu,
                o,
                R,
                starts,
                state,
            )
            scan_tied_kernel[grid](*arrays, *sizes, **options)

    def reverse_scan(self, x: Prepared, do, dstate, *, dP, ends, dstate0) -> None:
        grid, sizes, options = self._walk(self.tiles.reverse)
        if grid[0]:
            qkk, decayed = self._operands(x)
            arrays = (
                *qkk,
                self.beta,
                *x.X.unbind(0),
                *decayed,
                self.cu,
                do,
                dstate,
                dP,
                ends,
                dstate0,
            )
            reverse_scan_tied_kernel[grid](*arrays, *sizes, **options)

    def grads(self, do, R, dP, starts, ends) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dbeta and dlog_decay, in their inputs' shapes and dtypes."""
        tile = self.tiles.grads
        NK = cdiv(self.K, tile.BK)
        dq, dk = self.empty(*self.q.shape), self.empty(*self.k.shape)
        shape, kind = self.beta.shape, self.beta.dtype if NK == 1 else self.acc
        dbeta = self.empty(NK, *shape, dtype=kind)
        dg = None
        if self.g is not None:
            kind = self.g.dtype if self.g.dim() == 4 else self.acc
            dg = self.empty(*self.k.shape, dtype=kind)
        grid = (self.slots * self.H * NK,)
        if grid[0] and self.T:
            arrays = (
                self.q,
                self.k,
                self.beta,
                self.g,
                self.cu,
                do,
                R,
                dP,
                starts,
                ends,
                dq,
                dk,
                dbeta,
                dg,
            )
            sizes = (self.beta.numel(), self.scale, self.T, self.H, self.N, self.K, self.V, self.G)
            sizes += (tile.BK, tile.BV, NK, self.C, *self.grads_levels)
            kinds = (self.DOT, self.PREC, self.ACC)
            grads_tied_kernel[grid](
                *arrays, *sizes, *kinds, num_warps=tile.warps, num_stages=tile.stages
            )
        dbeta = dbeta[0] if NK == 1 else dbeta.sum(0).to(self.beta.dtype)
        if dg is not None and self.g is not None and self.g.dim() == 3:
            dg = dg.sum(-1).to(self.g.dtype)
        return dq, dk, dbeta, dg

    def maps(self, x: Prepared) -> tuple[Tensor, Tensor]:
        """M [N, H, K, K] and N [N, H, K, V] of (6.50), each sequence's map of its initial state. Two launches."""
        N = self.empty(*self.state_shape, dtype=self.acc)
        self._from(None, self.v).scan(x, state=N)
        eye = torch.eye(self.K, dtype=self.acc, device=self.k.device)
        M = eye.repeat(self.N, self.H, 1, 1)  # a program reads what it will overwrite
        self._from(M, torch.zeros_like(self.k)).scan(x, state=M)
        return M, N

    def start_gradient(self, x: Prepared, do: Tensor) -> Tensor:
        """E [N, H, K, V] of (6.51): the initial states' gradient where that of the last ones is zero. One launch."""
        dP, ends = self.empty(*self.v.shape), self.empty(self.slots, self.H, self.V, self.K)
        E = self.empty(*self.state_shape, dtype=self.acc)
        self.reverse_scan(x, do, None, dP=dP, ends=ends, dstate0=E)
        return E

    def _from(self, S0: Tensor | None, v: Tensor) -> "TiedCall":
        # the same keys with another initial state and other values
        options = {"scale": self.scale, "initial_state": S0, "cu_seqlens": self.cu}
        return TiedCall(self.q, self.k, v, self.beta, self.g, chunk_size=self.C, **options)

    def forward(self, x: Prepared | None = None) -> tuple[Tensor, Tensor, Prepared]:
        """o [B, T, H, V], the last state [N, H, K, V], and what the backward needs. x: what `prepare` gave."""
        x = self.prepare() if x is None else x
        o, state = self.empty(*self.v.shape), self.empty(*self.state_shape, dtype=self.acc)
        self.scan(x, o=o, state=state)
        return o, state, x

    def backward(self, do: Tensor, dstate: Tensor | None, kept: Iterable | None) -> tuple:
        """dq, dk, dv, dbeta, dlog_decay (None without decay), dstate0 (None without an initial state).

        dstate None: zeros. kept: what `forward` gave; None launches `prepare` again.
        """
        x = self.prepare() if kept is None else Prepared(*kept)
        do, dstate = do.contiguous(), None if dstate is None else dstate.contiguous()
        per_chunk = (
            self.slots,
            self.H,
            self.V,
            self.K,
        )  # in the inputs' dtype: they feed rounded products
        starts, ends, dv = (self.empty(*s) for s in (per_chunk, per_chunk, self.v.shape))
        # at beta = 2 and identical keys dq sums R over a chunk with alternating signs, and 8 digits are too few
        bf16 = self.q.dtype == torch.bfloat16
        R = self.empty(*self.v.shape, dtype=torch.float32 if bf16 else None)
        dstate0 = None if self.S0 is None else self.empty(*self.state_shape, dtype=self.acc)
        self.scan(x, R=R, starts=starts)
        self.reverse_scan(x, do, dstate, dP=dv, ends=ends, dstate0=dstate0)
        dq, dk, dbeta, dg = self.grads(do, R, dv, starts, ends)
        return dq, dk, dv, dbeta, dg, dstate0
