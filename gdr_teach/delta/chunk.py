"""The delta rule by chunks in Triton: two launches forward, three backward (derived in chapters 6 and 8).

    forward    prepare -> X         scan -> o, state                     only X passes through memory
    backward   scan -> R, S before each chunk    reverse scan -> dP = dv, D after each chunk    grads -> dq, dk, dbeta

The stages are `chunkwise`'s (6.10) to (6.21) without decay. From forward to backward X alone is kept, rounded and what
the rounding left: 2 C numbers a token.
"""

from torch import Tensor

from ..chunkwise.segments import call_in_segments
from ..chunkwise.tied import TiedCall
from ..notation import Output
from .recurrent import dense


def delta_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    segments: int = 1,
) -> Output:
    """The delta rule by the chunk kernels: (2.5) to (2.8), two launches, forward only.

    Args: as `gdr_teach.delta_rule`, which checks them and adds the gradients; any strides. chunk_size: a power of two,
    at least 16 where the kernels are compiled; default: what `chunkwise.tiles` chooses. segments: into how many pieces
    a sequence is cut at most, to walk them side by side (`chunkwise.segments`); then five launches.
    Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    options |= {"chunk_size": chunk_size, "segments": segments}
    o, state, _ = call(q, k, v, beta, **options).forward()
    return Output(o, state)


def delta_chunk_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    dstate: Tensor | None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    segments: int = 1,
    kept: tuple | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of `delta_chunk`: (2.13) to (2.16), three launches.

    Args: do [B, T, H, V] and dstate [N, H, K, V] (None: zeros), the gradients of o and state; kept: what the forward's
    first stage wrote (None: it is launched again); the rest as in the forward.
    Returns: dq, dk, dv, dbeta in their inputs' dtypes, and dstate0 [N, H, K, V], None without an initial state.
    """
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    options |= {"chunk_size": chunk_size, "segments": segments}
    dq, dk, dv, dbeta, _, dstate0 = call(q, k, v, beta, **options).backward(do, dstate, kept)
    return dq, dk, dv, dbeta, dstate0


def call(q, k, v, beta, *, initial_state, cu_seqlens, segments=1, **options):
    """The launches of one call."""
    q, k, v, beta, S0, cu = dense(q, k, v, beta, initial_state, cu_seqlens)
    options |= {"initial_state": S0, "cu_seqlens": cu, "segments": segments}
    return call_in_segments(TiedCall, (q, k, v, beta, None), **options)
