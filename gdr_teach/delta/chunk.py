"""The delta rule by chunks in Triton: two launches forward, four backward (derived in chapters 6 and 8).

    forward    prepare -> T'         scan -> o, state                     only T' passes through memory
    backward   prepare -> T'         scan -> S before each chunk, U       reverse scan -> dP = dv, D after each chunk
               grads -> dq, dk, dbeta

Nothing but the inputs is kept from the forward to the backward.
"""

import torch
import triton.language as tl
from torch import Tensor

from ..chunkwise.grads import grads_tied_kernel
from ..chunkwise.prepare import prepare_tied_kernel
from ..chunkwise.scan import reverse_scan_tied_kernel, scan_tied_kernel
from ..notation import Output, state_dtype
from ..runtime import cdiv, compiles, new_empty, next_power_of_2
from .recurrent import accumulator, dense


def delta_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> Output:
    """The delta rule by the chunk kernels: (2.5) to (2.8), two launches, forward only.

    Args: as `gdr_teach.delta_rule`, which checks them and adds the gradients; any strides. chunk_size: a power of two,
    at least 16 where the kernels are compiled.
    Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    call = _Call(q, k, v, beta, scale, initial_state, cu_seqlens, chunk_size)
    o = new_empty(v.shape, dtype=v.dtype, device=v.device)
    state = new_empty(call.state_shape, dtype=call.acc, device=v.device)
    call.scan(call.prepare(), o=o, state=state)
    return Output(o, state)


def delta_chunk_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    dstate: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `delta_chunk`: (2.13) to (2.16), four launches, nothing kept from the forward.

    Args: do [B, T, H, V] and dstate [N, H, K, V], the gradients of o and state; the rest as in the forward.
    Returns: dq, dk, dv, dbeta in their inputs' dtypes, and dstate0 [N, H, K, V].
    """
    call = _Call(q, k, v, beta, scale, initial_state, cu_seqlens, chunk_size)
    do, dstate = do.contiguous(), dstate.contiguous()
    T = call.prepare()
    U = call.like(call.v)
    starts, ends = (call.per_chunk() for _ in range(2))
    call.scan(T, U=U, starts=starts)
    dq, dk, dv, dbeta = (call.like(x) for x in (call.q, call.k, call.v, call.beta))
    dstate0 = new_empty(call.state_shape, dtype=call.acc, device=v.device)
    call.reverse_scan(T, do, dstate, dv, ends, dstate0)
    call.grads(do, U, dv, starts, ends, dq, dk, dbeta)
    return dq, dk, dv, dbeta, dstate0


class _Call:
    """One call's operands, sizes and tile choices, and its launches."""

    def __init__(self, q, k, v, beta, scale, initial_state, cu_seqlens, chunk_size):
        self.q, self.k, self.v, self.beta, self.S0, self.cu = dense(
            q, k, v, beta, initial_state, cu_seqlens
        )
        B, self.T, self.H, self.K = k.shape
        self.V, self.C = v.shape[-1], chunk_size
        self.N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.scale = float(self.K**-0.5 if scale is None else scale)
        self.acc = state_dtype(q.dtype)
        self.state_shape = (self.N, self.H, self.K, self.V)
        # slots for the chunks of all sequences, whatever their lengths: see chunkwise/place.py
        per_sequence = self.N * cdiv(self.T, self.C)
        self.slots = per_sequence if cu_seqlens is None else self.T // self.C + self.N
        compiled = compiles(q)
        self.floor = floor = 16 if compiled else 1  # the smallest side of a compiled tl.dot
        self.BK = max(next_power_of_2(self.K), floor)
        self.BV = min(max(next_power_of_2(self.V), floor), 64)
        self.NV = cdiv(self.V, self.BV)
        half = q.dtype in (torch.float16, torch.bfloat16)
        wide = self.BK >= 128
        self.warps = {
            "prepare": 4,
            "scan": 4,
            "reverse": 8 if wide else 4,
            "grads": 8 if wide else 4,
        }
        names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
        acc = accumulator(self.acc)
        self.dot = names.get(q.dtype, acc)
        self.inverse = tl.float16 if half else acc
        self.safe = "bf16x3" if compiled else "ieee"
        self.precision = "bf16x6" if compiled and not half else "ieee"
        self.acc_name = acc

    def like(self, x: Tensor) -> Tensor:
        return new_empty(x.shape, dtype=x.dtype, device=x.device)

    def per_chunk(self) -> Tensor:
        """A state for every chunk, [slots, H, V, K], in the inputs' dtype: it feeds rounded products only."""
        shape = (self.slots, self.H, self.V, self.K)
        return new_empty(shape, dtype=self.q.dtype, device=self.q.device)

    def prepare(self) -> Tensor:
        shape = (*self.beta.shape, self.C)
        T = new_empty(shape, dtype=self.acc, device=self.q.device)
        grid = (self.slots * self.H,)
        if grid[0] and self.T:
            prepare_tied_kernel[grid](
                self.k,
                self.beta,
                T,
                self.cu,
                self.T,
                self.H,
                self.N,
                self.K,
                self.BK,
                self.C,
                self.dot,
                self.inverse,
                self.precision,
                self.safe,
                self.acc_name,
                num_warps=self.warps["prepare"],
                num_stages=1,
            )
        return T

    def tiles(self) -> tuple:
        return (
            self.K,
            self.V,
            self.BK,
            self.BV,
            self.NV,
            self.C,
            self.dot,
            self.precision,
            self.acc_name,
        )

    def scan(self, T, *, o=None, U=None, starts=None, state=None) -> None:
        grid = (self.N * self.H * self.NV,)
        if grid[0]:
            args = (self.q, self.k, self.v, T, self.S0, self.cu, o, U, starts, state)
            scan_tied_kernel[grid](
                *args,
                self.scale,
                self.T,
                self.H,
                *self.tiles(),
                num_warps=self.warps["scan"],
                num_stages=2,
            )

    def reverse_scan(self, T, do, dstate, dP, ends, dstate0) -> None:
        grid = (self.N * self.H * self.NV,)
        if grid[0]:
            args = (self.q, self.k, T, self.cu, do, dstate, dP, ends, dstate0)
            reverse_scan_tied_kernel[grid](
                *args,
                self.scale,
                self.T,
                self.H,
                *self.tiles(),
                num_warps=self.warps["reverse"],
                num_stages=2,
            )

    def grads(self, do, U, dP, starts, ends, dq, dk, dbeta) -> None:
        grid = (self.slots * self.H,)
        if grid[0] and self.T:
            args = (self.q, self.k, self.v, self.beta, self.cu, do, U, dP, starts, ends)
            args += (dq, dk, dbeta)
            grads_tied_kernel[grid](
                *args,
                self.scale,
                self.T,
                self.H,
                self.N,
                self.K,
                self.V,
                self.BK,
                max(next_power_of_2(self.V), self.floor),
                self.C,
                self.dot,
                self.precision,
                self.acc_name,
                num_warps=self.warps["grads"],
                num_stages=1,
            )
