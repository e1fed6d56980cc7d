"""The DPLR rule token by token in Triton, forward and backward (chapter 5); without a decay it is IPLR (chapter 3).

Programs own what they own in `delta.recurrent`: one head of one sequence and BV of the V columns of its state. Whether
there is a decay is known when compiling: IPLR launches these kernels without p_g, and no exponential is left in them.

Backward, with do_t the gradient of o_t and D_t of S_t (all that comes after token t included):

    D_t  = exp(g_{t+1}) * D_{t+1} + a_{t+1} du_{t+1}^T + scale * q_t do_t^T                          (5.29)
    du_t = D_t^T b_t            dv_t = D_t^T k_t            dk_t = D_t v_t                           (5.30)
    db_t = D_t u_t              da_t = S_{t-1} du_t         dq_t = scale * S_t do_t                  (5.31)
    (the next token's)          exp(g_t) * D_t + a_t du_t^T                                          (5.32)
    dg_t = exp(g_t) * rowsum(S_{t-1} * D_t)                                                          (5.28)

da and dg want S_{t-1} beside D_t, and one of them comes forwards in time, the other backwards. As in `gated.recurrent`
the forward walk is repeated and leaves the state of every SEG-th token; the reverse walk takes one segment after the
other, walks it forwards once more with its S_{t-1} written down, and then back.
"""

import torch
import triton.language as tl
from torch import Tensor

from ..delta.recurrent import accumulator, program_place, tile
from ..gated.recurrent import first_segment, segment_length
from ..notation import Output, state_dtype
from ..runtime import kernel, new_empty


@kernel
def dplr_step(b_S, b_k, b_v, b_a, b_b, p_g, row, G: tl.constexpr, i_k, m_k):
    """(5.22) and (5.23): the state [BK, BV] after the token of a row."""
    b_u = tl.sum(b_S * b_a[:, None], axis=0)  # [BV]      (5.22)
    if p_g is not None:
        b_g = tl.load(p_g + row * G + i_k % G, mask=m_k, other=0.0).to(b_S.dtype)  # [BK]
        b_S = b_S * tl.exp(b_g)[:, None]
    return b_S + (b_b[:, None] * b_u[None, :] + b_k[:, None] * b_v[None, :])  # (5.23)


@kernel
def dplr_forward_kernel(
    p_q,  # [B, T, H, K]
    p_k,  # [B, T, H, K]
    p_v,  # [B, T, H, V]
    p_a,  # [B, T, H, K]
    p_b,  # [B, T, H, K]
    p_g,  # [B, T, H, G] or None
    p_state0,  # [N, H, K, V] or None
    p_cu,  # [N + 1] or None
    p_o,  # [B, T, H, V] or None
    p_starts,  # [B * T // SEG + N, H, K, V] or None
    p_state,  # [N, H, K, V] or None
    scale,
    T,
    H,
    SEG,
    K: tl.constexpr,
    V: tl.constexpr,
    G: tl.constexpr,  # 1: one decay a head; K: one a row of the state
    BK: tl.constexpr,
    BV: tl.constexpr,
    NV: tl.constexpr,
    ACC: tl.constexpr,
):
    """Equations (5.22) to (5.24), token after token. Grid: `program_place`. Writes o and state, or starts."""
    i_v, i_nh, row, count = program_place(p_cu, T, H, NV, p_cu is not None)
    i_k = tl.arange(0, BK)  # [BK]
    i_c = i_v * BV + tl.arange(0, BV)  # [BV] columns of the state
    m_k = i_k < K
    m_v = i_c < V
    m_s = m_k[:, None] & m_v[None, :]  # [BK, BV]
    o_s = i_k[:, None] * V + i_c[None, :]  # [BK, BV] inside one state
    own = i_nh.to(tl.int64) * K * V
    slot = first_segment(row, i_nh, H, SEG)

    b_S = tl.zeros([BK, BV], dtype=ACC)
    if p_state0 is not None:
        b_S += tl.load(p_state0 + own + o_s, mask=m_s, other=0.0).to(ACC)
    for t in range(count):
        if p_starts is not None:  # noqa: SIM102  known when compiling; the next one is not
            if t % SEG == 0:
                tl.store(p_starts + slot * K * V + o_s, b_S, mask=m_s)
                slot += H
        b_k = tl.load(p_k + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
        b_v = tl.load(p_v + row * V + i_c, mask=m_v, other=0.0).to(ACC)  # [BV]
        b_a = tl.load(p_a + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
        b_b = tl.load(p_b + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
        b_S = dplr_step(b_S, b_k, b_v, b_a, b_b, p_g, row, G, i_k, m_k)  # [BK, BV]
        if p_o is not None:
            b_q = tl.load(p_q + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
            b_o = tl.sum(b_S * b_q[:, None], axis=0) * scale  # [BV]      (5.24)
            tl.store(p_o + row * V + i_c, b_o.to(p_o.dtype.element_ty), mask=m_v)
        row += H
    if p_state is not None:
        tl.store(p_state + own + o_s, b_S, mask=m_s)


@kernel
def dplr_backward_kernel(
    p_q,  # [B, T, H, K]
    p_k,  # [B, T, H, K]
    p_v,  # [B, T, H, V]
    p_a,  # [B, T, H, K]
    p_b,  # [B, T, H, K]
    p_g,  # [B, T, H, G] or None
    p_starts,  # [B * T // SEG + N, H, K, V]
    p_cu,  # [N + 1] or None
    p_do,  # [B, T, H, V]
    p_dstate,  # [N, H, K, V]
    p_before,  # [N * H * NV, SEG, BK, BV] the S_{t-1} of one segment of each program
    p_dq,  # [B, T, H, NV, K]
    p_dk,  # [B, T, H, NV, K]
    p_dv,  # [B, T, H, V]
    p_da,  # [B, T, H, NV, K]
    p_db,  # [B, T, H, NV, K]
    p_dg,  # [B, T, H, NV, K] or None
    p_dstate0,  # [N, H, K, V]
    scale,
    T,
    H,
    SEG,
    K: tl.constexpr,
    V: tl.constexpr,
    G: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NV: tl.constexpr,
    ACC: tl.constexpr,
):
    """(5.28) to (5.32), last segment first, each walked forwards and then back. Grid: `program_place`."""
    i_v, i_nh, row, count = program_place(p_cu, T, H, NV, p_cu is not None)
    i_k = tl.arange(0, BK)  # [BK]
    i_c = i_v * BV + tl.arange(0, BV)  # [BV]
    m_k = i_k < K
    m_v = i_c < V
    m_s = m_k[:, None] & m_v[None, :]  # [BK, BV]
    o_s = i_k[:, None] * V + i_c[None, :]  # [BK, BV]
    own = i_nh.to(tl.int64) * K * V
    segments = (count + SEG - 1) // SEG
    slot = first_segment(row, i_nh, H, SEG) + segments.to(tl.int64) * H
    o_b = tl.arange(0, BK)[:, None] * BV + tl.arange(0, BV)[None, :]  # [BK, BV]
    before = (i_nh.to(tl.int64) * NV + i_v) * SEG * BK * BV

    b_D = tl.load(p_dstate + own + o_s, mask=m_s, other=0.0).to(ACC)  # [BK, BV]
    row += segments.to(tl.int64) * SEG * H
    for s in range(segments):
        row -= SEG * H
        slot -= H
        length = tl.minimum(count - (segments - 1 - s) * SEG, SEG)  # tokens of this segment
        b_S = tl.load(p_starts + slot * K * V + o_s, mask=m_s, other=0.0)  # [BK, BV]
        for _ in range(length):
            tl.store(p_before + before + o_b, b_S)
            b_k = tl.load(p_k + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
            b_v = tl.load(p_v + row * V + i_c, mask=m_v, other=0.0).to(ACC)  # [BV]
            b_a = tl.load(p_a + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
            b_b = tl.load(p_b + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
            b_S = dplr_step(b_S, b_k, b_v, b_a, b_b, p_g, row, G, i_k, m_k)  # [BK, BV]
            row += H
            before += BK * BV
        tl.debug_barrier()  # what one thread has written another may read
        for _ in range(length):
            row -= H
            before -= BK * BV
            b_q = tl.load(p_q + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
            b_do = tl.load(p_do + row * V + i_c, mask=m_v, other=0.0).to(ACC)  # [BV]
            b_D += (scale * b_q)[:, None] * b_do[None, :]  # (5.29)
            b_k = tl.load(p_k + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
            b_v = tl.load(p_v + row * V + i_c, mask=m_v, other=0.0).to(ACC)  # [BV]
            b_a = tl.load(p_a + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
            b_b = tl.load(p_b + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
            b_S = tl.load(p_before + before + o_b)  # [BK, BV]: S_{t-1}
            b_u = tl.sum(b_S * b_a[:, None], axis=0)  # [BV]      (5.22)
            b_du = tl.sum(b_D * b_b[:, None], axis=0)  # [BV]      (5.30)
            b_dv = tl.sum(b_D * b_k[:, None], axis=0)  # [BV]
            part = (row * NV + i_v) * K + i_k  # this program's share of the sums over V
            tl.store(p_dv + row * V + i_c, b_dv.to(p_dv.dtype.element_ty), mask=m_v)
            tl.store(p_dk + part, tl.sum(b_D * b_v[None, :], axis=1), mask=m_k)
            tl.store(p_db + part, tl.sum(b_D * b_u[None, :], axis=1), mask=m_k)  # (5.31)
            tl.store(p_da + part, tl.sum(b_S * b_du[None, :], axis=1), mask=m_k)
            if p_g is not None:
                b_g = tl.load(p_g + row * G + i_k % G, mask=m_k, other=0.0).to(ACC)  # [BK]
                b_decay = tl.exp(b_g)  # [BK]
                b_dg = b_decay * tl.sum(b_S * b_D, axis=1)  # [BK]      (5.28)
                tl.store(p_dg + part, b_dg, mask=m_k)
                b_S = b_S * b_decay[:, None]
                b_D = b_D * b_decay[:, None]
            b_S += b_b[:, None] * b_u[None, :] + b_k[:, None] * b_v[None, :]  # (5.23): S_t
            tl.store(p_dq + part, tl.sum(b_S * b_do[None, :], axis=1) * scale, mask=m_k)
            b_D += b_a[:, None] * b_du[None, :]  # (5.32)
        tl.debug_barrier()  # read before the next segment overwrites it
    tl.store(p_dstate0 + own + o_s, b_D, mask=m_s)


def dplr_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_state: Tensor | None = None,
) -> Output:
    """The DPLR rule by the token-by-token kernel: (5.22) to (5.24), one launch, forward only.

    Args: as `dplr_recurrence`, log_decay None for no decay; any strides. out_state: where to write the last state,
    contiguous; it may be the initial state, which is then updated in place.
    Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    operands = dense(q, k, v, a, b, log_decay, initial_state, cu_seqlens)
    o = new_empty(v.shape, dtype=v.dtype, device=v.device)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    state = out_state
    if state is None:
        shape = (N, *k.shape[2:], v.shape[-1])
        state = new_empty(shape, dtype=state_dtype(q.dtype), device=q.device)
    if state.numel():
        grid, sizes = _launch(q, v, log_decay, N, scale)
        dplr_forward_kernel[grid](*operands, o, None, state, *sizes)
    return Output(o, state)


def dplr_recurrent_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    *,
    dstate: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of `dplr_recurrent`: (5.28) to (5.32), two launches, nothing kept from the forward.

    Args: do [B, T, H, V] and dstate [N, H, K, V], the gradients of o and state; the rest as in the forward.
    Returns: dq, dk, dv, da, db and, with a decay, dlog_decay, in their inputs' shapes and dtypes, and last dstate0
    [N, H, K, V].
    """
    operands = dense(q, k, v, a, b, log_decay, initial_state, cu_seqlens)
    *tokens, _, cu = operands
    (B, T, H, K), V, N, acc = k.shape, v.shape[-1], dstate.shape[0], dstate.dtype
    BK, BV, NV = tile(K, V)
    seg = segment_length(T)

    def empty(*shape: int, dtype: torch.dtype = acc) -> Tensor:
        return new_empty(shape, dtype=dtype, device=q.device)

    dq, dk, da, db = (empty(B, T, H, NV, K) for _ in range(4))
    dg = None if log_decay is None else empty(B, T, H, NV, K)
    dv, dstate0 = empty(*v.shape, dtype=v.dtype), empty(*dstate.shape)
    if dstate.numel():
        starts, before = empty(B * T // seg + N, H, K, V), empty(N * H * NV, seg, BK, BV)
        grid, sizes = _launch(q, v, log_decay, N, scale)
        dplr_forward_kernel[grid](*operands, None, starts, None, *sizes)
        do, dstate = do.contiguous(), dstate.contiguous()
        grads = (dq, dk, dv, da, db, dg, dstate0)
        dplr_backward_kernel[grid](*tokens, starts, cu, do, dstate, before, *grads, *sizes)
    pairs = zip((dq, dk, da, db), (q, k, a, b), strict=True)
    dq, dk, da, db = (x.sum(3).to(y.dtype) for x, y in pairs)
    if log_decay is None or dg is None:
        return dq, dk, dv, da, db, dstate0
    dg = dg.sum(3)
    dg = dg if log_decay.dim() == 4 else dg.sum(-1)
    return dq, dk, dv, da, db, dg.to(log_decay.dtype), dstate0


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """The operands as the kernels want them: contiguous, and the last one, cu_seqlens, beside q."""
    *operands, cu = (None if x is None else x.contiguous() for x in tensors)
    device = tensors[0].device if tensors[0] is not None else None
    return [*operands, None if cu is None else cu.to(device, non_blocking=True)]


def _launch(q: Tensor, v: Tensor, log_decay: Tensor | None, N: int, scale: float | None):
    # the grid, and the arguments that close the list of both kernels
    T, H, K = q.shape[1:]
    V = v.shape[-1]
    BK, BV, NV = tile(K, V)
    scale = K**-0.5 if scale is None else scale
    G = K if log_decay is not None and log_decay.dim() == 4 else 1
    acc = accumulator(state_dtype(q.dtype))
    return (NV * N * H,), (scale, T, H, segment_length(T), K, V, G, BK, BV, NV, acc)
