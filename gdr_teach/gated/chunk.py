"""The gated delta rule by chunks in Triton: two launches forward, three backward (derived in chapters 6 and 8).

The stages are `chunkwise`'s (6.10) to (6.21), the same kernels that the delta rule takes. With decay, `prepare` also
writes down the scaled operands: decay is a change of basis inside a chunk, and the serial walks see none of its
exponents but one factor a chunk. What `prepare` wrote is kept for the backward, 3 K + 3 C numbers a token.
"""

from torch import Tensor

from ..chunkwise.segments import call_in_segments
from ..chunkwise.tied import TiedCall
from ..delta.recurrent import dense
from ..notation import Output


def gated_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    segments: int = 1,
    min_log_decay: float | None = None,
) -> Output:
    """The gated delta rule by the chunk kernels: (5.6) to (5.9), two launches, forward only.

    Args: as `gdr_teach.gated_delta_rule`, which checks them and adds the gradients; any strides. chunk_size: a power of
    two, at least 16 where the kernels are compiled; default: what `chunkwise.tiles` chooses. segments: into how many
    pieces a sequence is cut at most, to walk them side by side (`chunkwise.segments`); then five launches.
    Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    options |= {"chunk_size": chunk_size, "segments": segments, "min_log_decay": min_log_decay}
    o, state, _ = call(q, k, v, beta, log_decay, **options).forward()
    return Output(o, state)


def gated_chunk_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    dstate: Tensor | None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    segments: int = 1,
    min_log_decay: float | None = None,
    kept: tuple | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of `gated_chunk`: (5.15) to (5.18), three launches.

    Args: do [B, T, H, V] and dstate [N, H, K, V] (None: zeros), the gradients of o and state; kept: what the forward's
    first stage wrote (None: it is launched again); the rest as in the forward.
    Returns: dq, dk, dv, dbeta, dlog_decay in their inputs' shapes and dtypes, and dstate0 [N, H, K, V], None without an
    initial state.
    """
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    options |= {"chunk_size": chunk_size, "segments": segments, "min_log_decay": min_log_decay}
    return call(q, k, v, beta, log_decay, **options).backward(do, dstate, kept)


def call(q, k, v, beta, log_decay, *, initial_state, cu_seqlens, segments=1, **options):
    """The launches of one call."""
    q, k, v, beta, S0, cu = dense(q, k, v, beta, initial_state, cu_seqlens)
    options |= {"initial_state": S0, "cu_seqlens": cu, "segments": segments}
    return call_in_segments(TiedCall, (q, k, v, beta, log_decay.contiguous()), **options)
