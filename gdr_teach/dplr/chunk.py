"""The DPLR rule by chunks in Triton: three launches forward (chapters 5 and 6).

The stages are `chunkwise.untied`'s, the same kernels that IPLR takes. With decay its first stage also writes down the
scaled operands (5.25), so that all later ones see no exponent but one factor a chunk and channel.
"""

from torch import Tensor

from ..chunkwise.segments import call_in_segments
from ..chunkwise.untied import UntiedCall
from ..notation import Output
from .recurrent import dense


def dplr_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    segments: int = 1,
    min_log_decay: float | None = None,
) -> Output:
    """The DPLR rule by the chunk kernels: (5.25), (5.26) and (6.22) to (6.26), three launches, forward only.

    Args: as `gdr_teach.dplr_delta_rule`, which checks them and adds the gradients; any strides. chunk_size: a power of
    two, at least 16 where the kernels are compiled; default: what `chunkwise.tiles` chooses. segments: into how many
    pieces a sequence is cut at most, to walk them side by side (`chunkwise.segments`).
    Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    options |= {"chunk_size": chunk_size, "segments": segments, "min_log_decay": min_log_decay}
    o, state, _ = call(q, k, v, a, b, log_decay, **options).forward()
    return Output(o, state)


def dplr_chunk_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
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
) -> tuple[Tensor | None, ...]:
    """The gradients of `dplr_chunk`: (6.27) to (6.29) and back to the inputs.

    Args: do [B, T, H, V] and dstate [N, H, K, V] (None: zeros), the gradients of o and state; kept: what the forward's
    first stages wrote (None: they are launched again); the rest as in the forward.
    Returns: dq, dk, dv, da, db, dlog_decay in their inputs' shapes and dtypes, and dstate0 [N, H, K, V], None
    without an initial state.
    """
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    options |= {"chunk_size": chunk_size, "segments": segments, "min_log_decay": min_log_decay}
    return call(q, k, v, a, b, log_decay, **options).backward(do, dstate, kept)


def call(q, k, v, a, b, log_decay, *, initial_state, cu_seqlens, segments=1, **options):
    """The launches of one call; log_decay None: of the IPLR rule."""
    *operands, S0, cu = dense(q, k, v, a, b, log_decay, initial_state, cu_seqlens)
    options |= {"initial_state": S0, "cu_seqlens": cu, "segments": segments}
    return call_in_segments(UntiedCall, tuple(operands), **options)
