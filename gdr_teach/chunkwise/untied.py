"""The launches of the untied family, forward and backward: what the chunk.py of a rule with free directions calls.

    forward    prepare -> X, scores and, with decay, Q~, A~, B^, K^, fade    reads -> W, U0, Q2, O0    scan -> o, state
    backward   scan -> U and S before each chunk    reverse scan -> D after each chunk    values -> dP, dv
               keys -> the rest

Three launches forward and four backward; what the first two wrote is kept in between.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..notation import state_dtype
from ..runtime import cdiv, new_empty, recording
from .grads_untied import keys_untied_kernel, values_untied_kernel
from .prepare_untied import prepare_untied_kernel, reads_untied_kernel
from .scan_untied import reverse_scan_untied_kernel, scan_untied_kernel
from .tiles import UntiedTiles, levels, target_of, untied_tiles


class Prepared(NamedTuple):
    """What passes from the first two stages to all others; without decay operands and fade are empty."""

    X: Tensor  # [2, B, T, H, C]: rounded, and what the rounding left
    scores: Tensor  # [3, B, T, H, C]: QB, QK, AK
    operands: Tensor  # [4, B, T, H, K]: Q~, A~, B^, K^
    fade: Tensor  # [slots, H, K]
    U: Tensor  # [B, T, H, K + V]: W and U0
    O: Tensor  # [B, T, H, K + V]: Q2 and O0


class UntiedCall:
    """One call's operands (dense, checked), sizes and tiles, and its launches."""

    Kept = Prepared  # what `forward` gives and `backward` takes over

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        log_decay: Tensor | None,
        *,
        scale: float | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        chunk_size: int | None = None,
        min_log_decay: float | None = None,
    ):
        self.q, self.k, self.v, self.a, self.b, self.g = q, k, v, a, b, log_decay
        self.S0, self.cu = initial_state, cu_seqlens
        B, self.T, self.H, self.K = k.shape
        self.V = v.shape[-1]
        self.N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.scale = float(self.K**-0.5 if scale is None else scale)
        self.acc = state_dtype(q.dtype)
        self.state_shape = (self.N, self.H, self.K, self.V)
        target = recording() or target_of(q.device)
        chosen = untied_tiles(target, q.dtype, self.K, self.V, decay=log_decay is not None)
        self.tiles: UntiedTiles = chosen if chunk_size is None else chosen._replace(C=chunk_size)
        self.C = self.tiles.C
        # slots for the chunks of all sequences, whatever their lengths: see place.py
        per_sequence = self.N * cdiv(self.T, self.C)
        self.slots = per_sequence if cu_seqlens is None else self.T // self.C + self.N
        self.G, self.levels, self.grads_levels = 0, (0, 0.0), (0, 0.0)
        if log_decay is not None:
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
        self.INVERSE = tl.float16 if q.dtype in half else self.EXACT

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return new_empty(
            shape, dtype=self.q.dtype if dtype is None else dtype, device=self.q.device
        )

    def prepare(self) -> Prepared:
        B, T, H = self.q.shape[:3]
        X, scores = self.empty(2, B, T, H, self.C), self.empty(3, B, T, H, self.C)
        operands, fade, extra = self.empty(0), self.empty(0), (None,) * 5
        if self.g is not None:
            operands = self.empty(4, B, T, H, self.K)
            fade = self.empty(self.slots, H, self.K, dtype=self.acc)
            extra = (*operands.unbind(0), fade)
        U, O = (self.empty(B, T, H, self.K + self.V) for _ in range(2))
        x = Prepared(X, scores, operands, fade, U, O)
        if self.slots * H and T:
            tile = self.tiles.prepare
            arrays = (self.q, self.k, self.a, self.b, self.g, self.cu, *X.unbind(0))
            sizes = (T, H, self.N, self.K, self.G, tile.BK, self.C, *self.levels)
            DOT = self.DOT if self.INVERSE == tl.float16 else self.EXACT
            kinds = (DOT, self.INVERSE, self.PREC, self.SAFE, self.EXACT)
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            grid = (self.slots * H,)
            prepare_untied_kernel[grid](
                *arrays, *scores.unbind(0), *extra, *sizes, *kinds, **options
            )
            tile = self.tiles.reads
            NK, NV = cdiv(self.K, tile.BV), cdiv(self.V, tile.BV)
            Q, A, _, _ = self._operands(x)
            arrays = (Q, A, self.v, *X.unbind(0), *scores.unbind(0), self.cu, U, O)
            sizes = (T, H, self.N, self.K, self.V, tile.BV, NK, NK + NV, self.C)
            kinds = (self.DOT, self.PREC, self.ACC, self.EXACT)
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            grid = (self.slots * H * (NK + NV),)
            reads_untied_kernel[grid](*arrays, *sizes, *kinds, **options)
        return x

    def _operands(self, x: Prepared) -> tuple[Tensor, ...]:
        # Q~, A~, B^, K^
        if self.g is None:
            return self.q, self.a, self.b, self.k
        return x.operands.unbind(0)

    def _walk(self, tile) -> tuple[tuple[int], tuple, dict]:
        # grid, sizes and options of a walk
        NV = cdiv(self.V, tile.BV)
        sizes = (self.scale, self.T, self.H, self.K, self.V, tile.BK, tile.BV, NV, self.C)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        return (self.N * self.H * NV,), (*sizes, self.DOT, self.PREC, self.ACC), options

    def scan(self, x: Prepared, *, o=None, state=None, u=None, starts=None) -> None:
        grid, sizes, options = self._walk(self.tiles.scan)
        if grid[0]:
            _, _, B, K = self._operands(x)
            fade = None if self.g is None else x.fade
            O = None if o is None else x.O
            arrays = (B, K, self.v, x.U, O, fade, self.S0, self.cu, o, u, starts, state)
            scan_untied_kernel[grid](*arrays, *sizes, **options)

    def reverse_scan(self, x: Prepared, do, dstate, *, ends, dstate0) -> None:
        grid, sizes, options = self._walk(self.tiles.reverse)
        if grid[0]:
            _, _, B, _ = self._operands(x)
            fade = None if self.g is None else x.fade
            arrays = (B, x.U, x.O, fade, self.cu, do, dstate, ends, dstate0)
            reverse_scan_untied_kernel[grid](*arrays, *sizes, **options)

    def values(self, x: Prepared, do, ends, *, dP, dv) -> None:
        tile = self.tiles.values
        NV = cdiv(self.V, tile.BV)
        grid = (self.slots * self.H * NV,)
        if grid[0] and self.T:
            _, _, B, K = self._operands(x)
            arrays = (B, K, *x.X.unbind(0), *x.scores.unbind(0), self.cu, do, ends, dP, dv)
            sizes = (self.scale, self.T, self.H, self.N, self.K, self.V)
            kinds = (tile.BK, tile.BV, NV, self.C, self.DOT, self.PREC, self.ACC, self.EXACT)
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            values_untied_kernel[grid](*arrays, *sizes, *kinds, **options)

    def keys(self, do, u, dP, starts, ends) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, da, db and dlog_decay, in their inputs' shapes and dtypes."""
        tile = self.tiles.keys
        NK = cdiv(self.K, tile.BK)
        dq, dk, da, db = (self.empty(*self.q.shape) for _ in range(4))
        dg = None
        if self.g is not None:
            kind = self.g.dtype if self.g.dim() == 4 else self.acc
            dg = self.empty(*self.k.shape, dtype=kind)
        grid = (self.slots * self.H * NK,)
        if grid[0] and self.T:
            arrays = (self.q, self.k, self.v, self.a, self.b, self.g, self.cu, do, u, dP)
            arrays += (starts, ends, dq, dk, da, db, dg)
            sizes = (self.scale, self.T, self.H, self.N, self.K, self.V, self.G)
            sizes += (tile.BK, tile.BV, NK, self.C, *self.grads_levels)
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            keys_untied_kernel[grid](*arrays, *sizes, self.DOT, self.PREC, self.ACC, **options)
        if dg is not None and self.g is not None and self.g.dim() == 3:
            dg = dg.sum(-1).to(self.g.dtype)
        return dq, dk, da, db, dg

    def maps(self, x: Prepared) -> tuple[Tensor, Tensor]:
        """M [N, H, K, K] and N [N, H, K, V] of (6.50), each sequence's map of its initial state. Two launches."""
        N = self.empty(*self.state_shape, dtype=self.acc)
        self._from(None, self.v).scan(x, state=N)
        eye = torch.eye(self.K, dtype=self.acc, device=self.k.device)
        M, zero = eye.repeat(self.N, self.H, 1, 1), torch.zeros_like(self.k)
        U = torch.cat(
            [x.U[..., : self.K], zero], -1
        )  # what a reads of the values is zero with them
        self._from(M, zero).scan(x._replace(U=U), state=M)
        return M, N

    def start_gradient(self, x: Prepared, do: Tensor) -> Tensor:
        """E [N, H, K, V] of (6.51): the initial states' gradient where that of the last ones is zero. One launch."""
        ends = self.empty(self.slots, self.H, self.V, self.K)
        E = self.empty(*self.state_shape, dtype=self.acc)
        self.reverse_scan(x, do, None, ends=ends, dstate0=E)
        return E

    def _from(self, S0: Tensor | None, v: Tensor) -> "UntiedCall":
        # the same transitions with another initial state and other values
        options = {"scale": self.scale, "initial_state": S0, "cu_seqlens": self.cu}
        directions = (self.a, self.b, self.g)
        return UntiedCall(self.q, self.k, v, *directions, chunk_size=self.C, **options)

    def forward(self, x: Prepared | None = None) -> tuple[Tensor, Tensor, Prepared]:
        """o [B, T, H, V], the last state [N, H, K, V], and what the backward needs. x: what `prepare` gave."""
        x = self.prepare() if x is None else x
        o, state = self.empty(*self.v.shape), self.empty(*self.state_shape, dtype=self.acc)
        self.scan(x, o=o, state=state)
        return o, state, x

    def backward(self, do: Tensor, dstate: Tensor | None, kept: Iterable | None) -> tuple:
        """dq, dk, dv, da, db, dlog_decay (None without decay), dstate0 (None without an initial state).

        dstate None: zeros. kept: what `forward` gave; None launches its first two stages again.
        """
        x = self.prepare() if kept is None else Prepared(*kept)
        do, dstate = do.contiguous(), None if dstate is None else dstate.contiguous()
        per_chunk = (self.slots, self.H, self.V, self.K)  # in the inputs' dtype: products take them
        starts, ends = self.empty(*per_chunk), self.empty(*per_chunk)
        u, dP, dv = (self.empty(*self.v.shape) for _ in range(3))
        dstate0 = None if self.S0 is None else self.empty(*self.state_shape, dtype=self.acc)
        self.scan(x, u=u, starts=starts)
        self.reverse_scan(x, do, dstate, ends=ends, dstate0=dstate0)
        self.values(x, do, ends, dP=dP, dv=dv)
        dq, dk, da, db, dg = self.keys(do, u, dP, starts, ends)
        return dq, dk, dv, da, db, dg, dstate0
