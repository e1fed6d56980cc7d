"""The IPLR rule token by token in Triton, forward and backward (chapter 3): the kernels of the DPLR rule, no decay.

A program holds a tile of the state in registers and walks the tokens: (3.1) to (3.3), and for the gradients (3.8) to
(3.10). `dplr.recurrent` has the kernels; what they do with a decay is left out when they are compiled without one.
"""

from torch import Tensor

from ..dplr.recurrent import dplr_recurrent, dplr_recurrent_backward
from ..notation import Output


def iplr_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_state: Tensor | None = None,
) -> Output:
    """The IPLR rule by the token-by-token kernel: (3.1) to (3.3), one launch, forward only.

    Args: as `iplr_recurrence`; any strides. out_state: where to write the last state, contiguous; it may be the initial
    state, which is then updated in place. Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    options = {"scale": scale, "cu_seqlens": cu_seqlens, "out_state": out_state}
    return dplr_recurrent(q, k, v, a, b, initial_state=initial_state, **options)


def iplr_recurrent_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    dstate: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of `iplr_recurrent`: (3.8) to (3.10), two launches, nothing kept from the forward.

    Args: do [B, T, H, V] and dstate [N, H, K, V], the gradients of o and state; the rest as in the forward.
    Returns: dq, dk, dv, da, db in their inputs' dtypes, and dstate0 [N, H, K, V].
    """
    states = {"dstate": dstate, "initial_state": initial_state}
    return dplr_recurrent_backward(do, q, k, v, a, b, scale=scale, cu_seqlens=cu_seqlens, **states)
