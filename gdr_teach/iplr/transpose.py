"""The backward of the IPLR rule in plain PyTorch: that of the DPLR rule where nothing fades.

With D_t the gradient of S_t, all that comes after token t included, as `recurrent` has it:

    D_t = D_{t+1} + a_{t+1} du_{t+1}^T + scale * q_t do_t^T                                              (3.8)
    du_t = D_t^T b_t        dv_t = D_t^T k_t        dk_t = D_t v_t                                       (3.9)
    db_t = D_t u_t          da_t = S_{t-1} du_t     dq_t = scale * S_t do_t                             (3.10)

`dplr.transpose` computes these lines, by tokens and by chunks, and leaves its (5.28) out where it is given no decay.
"""

from torch import Tensor

from ..chunkwise import affine
from ..dplr.transpose import dplr_chunkwise_backward, dplr_recurrence_backward


def iplr_recurrence_backward(
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
    """The gradients of `iplr_recurrence`, token after token: (3.8) to (3.10).

    Args: do [B, T, H, V], dstate [N, H, K, V] in the state's dtype; the rest as in the forward.
    Returns: dq, dk, dv, da, db in their inputs' dtypes, dstate0 [N, H, K, V].
    """
    states = {"dstate": dstate, "initial_state": initial_state}
    return dplr_recurrence_backward(do, q, k, v, a, b, scale=scale, cu_seqlens=cu_seqlens, **states)


def iplr_chunkwise_backward(
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
    chunk_size: int = 64,
    kept: affine.Kept | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of `iplr_chunkwise`: (6.27) to (6.29) and the products of (3.4) to (3.6).

    Args and Returns: as `iplr_recurrence_backward`, chunk_size C >= 1, and kept: what the forward gave (None: again).
    """
    options = {"scale": scale, "cu_seqlens": cu_seqlens, "chunk_size": chunk_size, "kept": kept}
    states = {"dstate": dstate, "initial_state": initial_state}
    return dplr_chunkwise_backward(do, q, k, v, a, b, **states, **options)
