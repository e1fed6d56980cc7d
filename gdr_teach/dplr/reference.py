"""The DPLR rule in plain PyTorch: token by token, and by chunks (chapter 5).

One token, state S of shape [K, V]; a_t reads, b_t writes, g_t = log_decay_t <= 0 is one number for each of the K rows,
or one a head:

    u_t = S_{t-1}^T a_t                       what the state, not yet faded, holds in direction a_t          (5.22)
    S_t = exp(g_t) * S_{t-1} + b_t u_t^T + k_t v_t^T                                                 (5.23)
    o_t = scale * S_t^T q_t                                                                          (5.24)

The state is multiplied by diag(exp(g_t)) + b_t a_t^T: diagonal plus low rank. With g = 0 this is IPLR, (3.1) to (3.3),
and so is leaving log_decay out. Both functions are ordinary differentiable PyTorch and right for any decay, -inf
included, which forgets all but what b_t writes back. Needs torch only. Sources: Peng et al. 2025, "RWKV-7", section 4;
Yang et al. 2024, "Parallelizing linear transformers with the delta rule over sequence length", on generalized rules.
"""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import check_positive_int
from ..chunkwise import affine, wy
from ..delta.reference import start_state
from ..gated.reference import by_row
from ..notation import Output
from ..packing import per_document
from . import fading


def dplr_recurrence(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    a: Float[Tensor, "B T H K"],
    b: Float[Tensor, "B T H K"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
) -> Output:
    """The DPLR rule, one token after the other: equations (5.22) to (5.24).

    Args: q, k, a, b [B, T, H, K], v [B, T, H, V]; log_decay [B, T, H, K] or [B, T, H], natural logarithm, <= 0, None
    for no decay; scale: factor on o, default K^-1/2; initial_state [N, H, K, V], default zeros; cu_seqlens [N + 1]:
    where packed documents begin and end. Computes in float64 for float64 inputs, else in float32.
    Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    operands = given(q, k, v, a, b, log_decay)
    if cu_seqlens is not None:
        states = {"initial_state": initial_state}
        return Output(*per_document(dplr_recurrence, cu_seqlens, operands, states, scale=scale))
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    S = start_state(k, v, initial_state)  # [B, H, K, V]
    decays = [1.0] * q.shape[1]
    if log_decay is not None:
        decays = by_row(log_decay).to(S.dtype).exp()[..., None].unbind(1)
    o = torch.zeros_like(v)[:, :0]
    if q.shape[1]:
        rows = []
        steps = (x.to(S.dtype).unbind(1) for x in (q, k, v, a, b))
        for q_t, k_t, v_t, a_t, b_t, decay_t in zip(*steps, decays, strict=True):
            u_t = (a_t[..., None, :] @ S)[..., 0, :]  # [B, H, V]      (5.22)
            S = decay_t * S + b_t[..., :, None] * u_t[..., None, :]  # (5.23)
            S = S + k_t[..., :, None] * v_t[..., None, :]
            rows.append(scale * (q_t[..., None, :] @ S)[..., 0, :])  # (5.24)
        o = torch.stack(rows, dim=1).to(v.dtype)
    return Output(o, S)


def dplr_chunkwise(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    a: Float[Tensor, "B T H K"],
    b: Float[Tensor, "B T H K"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
    chunk_size: int = 64,
) -> Output:
    """The DPLR rule, C tokens at a time.

    Inside a chunk, i and j count its tokens and g_(j, i] is the sum of g over the tokens after j up to i:

        Q~_i = exp(g_(start, i]) q_i        A~_i = exp(g_(start, i-1]) a_i
        B^_j = exp(g_(j, end]) b_j          K^_j = exp(g_(j, end]) k_j                                (5.25)

    The query reads the decayed state and carries its own token's gate; a reads the state before the decay and does not.
    The scores of q and a on b and k are (5.26) in `fading`, and the chunk is the affine map (6.22) to (6.26). No
    exponent anywhere is positive: nothing overflows, whatever the decay.

    Args: as `dplr_recurrence`, and chunk_size C >= 1. The last chunk is filled up with zeros, tokens that change
    nothing. Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    chunk_size = check_positive_int("dplr_chunkwise", "chunk_size", chunk_size)
    operands = given(q, k, v, a, b, log_decay)
    if cu_seqlens is not None:
        states, options = {"initial_state": initial_state}, {"scale": scale}
        options["chunk_size"] = chunk_size
        return Output(*per_document(dplr_chunkwise, cu_seqlens, operands, states, **options))
    return chunkwise(*operands, scale=scale, initial_state=initial_state, C=chunk_size)[0]


def chunkwise(*operands: Tensor, scale, initial_state, C: int) -> tuple[Output, affine.Kept]:
    """`dplr_chunkwise` without documents, and what its backward can take over."""
    _, k, v, *_ = operands
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    S = start_state(k, v, initial_state)  # [B, H, K, V]
    one = partial(_segment, scale=scale, C=C)
    o, S, kept = wy.forward_by_segments(one, operands, S, C)
    return Output(o, S), affine.Kept(*kept)


def _segment(*operands_and_S: Tensor, scale: float, C: int):
    *operands, S = operands_and_S
    return affine.forward(*chunk_operands(*operands, dtype=S.dtype, C=C), S, scale)


def chunk_operands(q, k, v, a, b, log_decay=None, *, dtype: torch.dtype, C: int):
    """The operands and scores of the chunk map."""
    x, f = without_scores(q, k, v, a, b, log_decay, dtype=dtype, C=C)
    if f is None:
        return x, affine.scores(x)
    Q, K, B = (wy.chunks(y.to(dtype), C) for y in (q, k, b))
    return x, fading.scores(Q, B, K, f, wy.exact_dtype(K))


def without_scores(q, k, v, a, b, log_decay=None, *, dtype: torch.dtype, C: int):
    """The operands of the chunk map, and what `fading.fade` made of them: None where nothing fades."""
    Q, K, V, A, B = (wy.chunks(x.to(dtype), C) for x in (q, k, v, a, b))
    if log_decay is None:
        return affine.Chunks(Q, A, B, K, V), None
    g = wy.chunks(by_row(log_decay).to(dtype).expand(k.shape), C)
    f = fading.fade(Q, A, B, K, g)
    return affine.Chunks(f.Q, f.A, f.B, f.K, V, f.whole), f


def given(*operands: Tensor | None) -> tuple[Tensor, ...]:
    """The operands that are there: without decay, five."""
    return tuple(x for x in operands if x is not None)
