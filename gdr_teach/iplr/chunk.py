"""The IPLR rule by chunks in Triton: three launches forward (chapters 3 and 6).

The stages are `chunkwise.untied`'s, the same kernels that DPLR takes; what they do with a decay is left out when they
are compiled without one.
"""

from torch import Tensor

from ..dplr.chunk import call as dplr_call
from ..notation import Output


def iplr_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    segments: int = 1,
) -> Output:
    """The IPLR rule by the chunk kernels: (3.4) to (3.7) as (6.22) to (6.26), three launches, forward only.

    Args: as `gdr_teach.iplr_delta_rule`, which checks them and adds the gradients; any strides. chunk_size: a power of
    two, at least 16 where the kernels are compiled; default: what `chunkwise.tiles` chooses. segments: into how many
    pieces a sequence is cut at most, to walk them side by side (`chunkwise.segments`).
    Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    options |= {"chunk_size": chunk_size, "segments": segments}
    o, state, _ = call(q, k, v, a, b, **options).forward()
    return Output(o, state)


def iplr_chunk_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    dstate: Tensor | None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    segments: int = 1,
    kept: tuple | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of `iplr_chunk`: (6.27) to (6.29) and back to the inputs.

    Args: do [B, T, H, V] and dstate [N, H, K, V] (None: zeros), the gradients of o and state; kept: what the forward's
    first stages wrote (None: they are launched again); the rest as in the forward.
    Returns: dq, dk, dv, da, db in their inputs' shapes and dtypes, and dstate0 [N, H, K, V], None
    without an initial state.
    """
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    options |= {"chunk_size": chunk_size, "segments": segments}
    *grads, _, dstate0 = call(q, k, v, a, b, **options).backward(do, dstate, kept)
    return *grads, dstate0


def call(q, k, v, a, b, **options):
    """The launches of one call."""
    return dplr_call(q, k, v, a, b, None, **options)
