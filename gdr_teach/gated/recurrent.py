"""The gated delta rule token by token in Triton, forward and backward (chapter 5).

Programs own what they own in `delta.recurrent`: one head of one sequence and BV of the V columns of its state. The
decay, one number or K of them, is a column that scales the rows of the state.

Backward, with do_t the gradient of o_t, D_t of S_t (all that comes after token t included) and D~_t of S~_t:

    D_t  = exp(g_{t+1}) * D~_{t+1} + scale * q_t do_t^T              dq_t = scale * S_t do_t         (5.11)
    du_t = D_t^T k_t            dr_t = beta_t du_t                   dv_t = dr_t                     (5.12)
    dbeta_t = du_t . r_t        dk_t = D_t u_t - S~_t dr_t                                           (5.13)
    D~_t = D_t - k_t dr_t^T                                                                          (5.14)
    dg_t = rowsum(S~_t * D~_t)                                                                       (5.10)

(5.10) wants S~_t and D~_t at once, and one of them comes forwards in time, the other backwards. The way of the delta
rule, two walks and no state in memory, exists here too: dg_t is the sum of q * dq and k * dk over all later tokens.
It is not taken: that sum is a difference of large numbers, and where the decay is strong nothing is left of it (at
g = -20 float32 keeps no digit, and float64 six). Instead the forward walk is repeated and leaves the state of every
SEG-th token; the reverse walk takes one segment after the other, walks it forwards once more with its S~_t written
down, and then back. That keeps T / SEG + SEG states a head, 2 sqrt(T), and every product is formed as it stands.
"""

from math import isqrt

import torch
import triton.language as tl
from torch import Tensor

from ..delta.recurrent import accumulator, program_place, tile
from ..notation import Output, state_dtype
from ..runtime import kernel, new_empty, next_power_of_2


@kernel
def gated_forward_kernel(
    p_q,  # [B, T, H, K]
    p_k,  # [B, T, H, K]
    p_v,  # [B, T, H, V]
    p_beta,  # [B, T, H]
    p_g,  # [B, T, H, G]
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
    """Equations (5.1) to (5.5), token after token. Grid: `program_place`. Writes o and state, or starts."""
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
        b_beta = tl.load(p_beta + row).to(ACC)
        b_g = tl.load(p_g + row * G + i_k % G, mask=m_k, other=0.0).to(ACC)  # [BK]
        b_S = b_S * tl.exp(b_g)[:, None]  # [BK, BV]      (5.1)
        b_r = b_v - tl.sum(b_S * b_k[:, None], axis=0)  # [BV]      (5.2)
        b_S += b_k[:, None] * (b_beta * b_r)[None, :]  # [BK, BV]      (5.3), (5.4)
        if p_o is not None:
            b_q = tl.load(p_q + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
            b_o = tl.sum(b_S * b_q[:, None], axis=0) * scale  # [BV]      (5.5)
            tl.store(p_o + row * V + i_c, b_o.to(p_o.dtype.element_ty), mask=m_v)
        row += H
    if p_state is not None:
        tl.store(p_state + own + o_s, b_S, mask=m_s)


@kernel
def first_segment(row, i_nh, H, SEG):
    """Where the starts of a sequence's segments begin, counted in states, for its first row and head.

    Sequence n with its first token at e has the slots from e // SEG + n on: one for each SEG tokens that any sequence
    before it could have filled, and one for the last, partly filled segment of each.
    """
    slot = row // H // SEG + i_nh // H
    return slot * H + i_nh % H


@kernel
def gated_backward_kernel(
    p_q,  # [B, T, H, K]
    p_k,  # [B, T, H, K]
    p_v,  # [B, T, H, V]
    p_beta,  # [B, T, H]
    p_g,  # [B, T, H, G]
    p_starts,  # [B * T // SEG + N, H, K, V]
    p_cu,  # [N + 1] or None
    p_do,  # [B, T, H, V]
    p_dstate,  # [N, H, K, V]
    p_faded,  # [N * H * NV, SEG, BK, BV] the S~_t of one segment of each program
    p_dq,  # [B, T, H, NV, K]
    p_dk,  # [B, T, H, NV, K]
    p_dv,  # [B, T, H, V]
    p_dbeta,  # [B, T, H, NV]
    p_dg,  # [B, T, H, NV, K]
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
    """(5.10) to (5.14), last segment first, each walked forwards and then back. Grid: `program_place`."""
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
    o_f = tl.arange(0, BK)[:, None] * BV + tl.arange(0, BV)[None, :]  # [BK, BV]
    faded = (i_nh.to(tl.int64) * NV + i_v) * SEG * BK * BV

    b_D = tl.load(p_dstate + own + o_s, mask=m_s, other=0.0).to(ACC)  # [BK, BV]
    row += segments.to(tl.int64) * SEG * H
    for s in range(segments):
        row -= SEG * H
        slot -= H
        length = tl.minimum(count - (segments - 1 - s) * SEG, SEG)  # tokens of this segment
        b_S = tl.load(p_starts + slot * K * V + o_s, mask=m_s, other=0.0)  # [BK, BV]
        for _ in range(length):
            b_k = tl.load(p_k + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
            b_v = tl.load(p_v + row * V + i_c, mask=m_v, other=0.0).to(ACC)  # [BV]
            b_beta = tl.load(p_beta + row).to(ACC)
            b_g = tl.load(p_g + row * G + i_k % G, mask=m_k, other=0.0).to(ACC)  # [BK]
            b_S = b_S * tl.exp(b_g)[:, None]  # (5.1)
            tl.store(p_faded + faded + o_f, b_S)
            b_r = b_v - tl.sum(b_S * b_k[:, None], axis=0)  # (5.2)
            b_S += b_k[:, None] * (b_beta * b_r)[None, :]  # (5.4)
            row += H
            faded += BK * BV
        tl.debug_barrier()  # what one thread has written another may read
        for _ in range(length):
            row -= H
            faded -= BK * BV
            b_q = tl.load(p_q + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
            b_k = tl.load(p_k + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
            b_v = tl.load(p_v + row * V + i_c, mask=m_v, other=0.0).to(ACC)  # [BV]
            b_beta = tl.load(p_beta + row).to(ACC)
            b_g = tl.load(p_g + row * G + i_k % G, mask=m_k, other=0.0).to(ACC)  # [BK]
            b_do = tl.load(p_do + row * V + i_c, mask=m_v, other=0.0).to(ACC)  # [BV]
            b_S = tl.load(p_faded + faded + o_f)  # [BK, BV]: S~_t
            b_r = b_v - tl.sum(b_S * b_k[:, None], axis=0)  # [BV]      (5.2)
            b_u = b_beta * b_r  # [BV]      (5.3)
            b_dq = tl.sum((b_S + b_k[:, None] * b_u[None, :]) * b_do[None, :], axis=1) * scale
            b_D += (scale * b_q)[:, None] * b_do[None, :]  # (5.11)
            b_du = tl.sum(b_D * b_k[:, None], axis=0)  # [BV]      (5.12)
            b_dr = b_beta * b_du  # [BV]
            b_dk = tl.sum(b_D * b_u[None, :] - b_S * b_dr[None, :], axis=1)  # [BK]      (5.13)
            b_D -= b_k[:, None] * b_dr[None, :]  # (5.14)
            b_dg = tl.sum(b_D * b_S, axis=1)  # [BK]      (5.10)
            b_D = b_D * tl.exp(b_g)[:, None]
            part = row * NV + i_v  # this program's share of the sums over V
            tl.store(p_dq + part * K + i_k, b_dq, mask=m_k)
            tl.store(p_dk + part * K + i_k, b_dk, mask=m_k)
            tl.store(p_dv + row * V + i_c, b_dr.to(p_dv.dtype.element_ty), mask=m_v)
            tl.store(p_dbeta + part, tl.sum(b_du * b_r, axis=0))
            tl.store(p_dg + part * K + i_k, b_dg, mask=m_k)
        tl.debug_barrier()  # read before the next segment overwrites it
    tl.store(p_dstate0 + own + o_s, b_D, mask=m_s)


def gated_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_state: Tensor | None = None,
) -> Output:
    """The gated delta rule by the token-by-token kernel: (5.1) to (5.5), one launch, forward only.

    Args: as `gdr_teach.gated_delta_rule`, which checks them and adds the gradients; any strides. out_state: where to
    write the last state, contiguous; it may be the initial state, which is then updated in place.
    Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    operands = _dense(q, k, v, beta, log_decay, initial_state, cu_seqlens)
    o = new_empty(v.shape, dtype=v.dtype, device=v.device)
    shape = (_sequences(q, cu_seqlens), *k.shape[2:], v.shape[-1])
    state = out_state
    if state is None:
        state = new_empty(shape, dtype=state_dtype(q.dtype), device=q.device)
    if state.numel():
        grid, sizes = _launch(q, v, log_decay, shape[0], scale)
        gated_forward_kernel[grid](*operands, o, None, state, *sizes)
    return Output(o, state)


def gated_recurrent_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    dstate: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `gated_recurrent`: (5.10) to (5.14), two launches, nothing kept from the forward.

    Args: do [B, T, H, V] and dstate [N, H, K, V], the gradients of o and state; the rest as in the forward.
    Returns: dq, dk, dv, dbeta, dlog_decay in their inputs' shapes and dtypes, and dstate0 [N, H, K, V].
    """
    operands = _dense(q, k, v, beta, log_decay, initial_state, cu_seqlens)
    *tokens, _, cu = operands
    (B, T, H, K), V, N, acc = k.shape, v.shape[-1], dstate.shape[0], dstate.dtype
    BK, BV, NV = tile(K, V)
    seg = segment_length(T)

    def empty(*shape: int, dtype: torch.dtype = acc) -> Tensor:
        return new_empty(shape, dtype=dtype, device=q.device)

    dq, dk, dg = (empty(B, T, H, NV, K) for _ in range(3))
    dv, dbeta, dstate0 = empty(*v.shape, dtype=v.dtype), empty(B, T, H, NV), empty(*dstate.shape)
    if dstate.numel():
        starts = empty(B * T // seg + N, H, K, V)
        faded = empty(N * H * NV, seg, BK, BV)
        grid, sizes = _launch(q, v, log_decay, N, scale)
        gated_forward_kernel[grid](*operands, None, starts, None, *sizes)
        do, dstate = do.contiguous(), dstate.contiguous()
        grads = (dq, dk, dv, dbeta, dg, dstate0)
        gated_backward_kernel[grid](*tokens, starts, cu, do, dstate, faded, *grads, *sizes)
    dq, dk, dg, dbeta = (x.sum(3) for x in (dq, dk, dg, dbeta))
    dg = dg if log_decay.dim() == 4 else dg.sum(-1)
    return (
        dq.to(q.dtype),
        dk.to(k.dtype),
        dv,
        dbeta.to(beta.dtype),
        dg.to(log_decay.dtype),
        dstate0,
    )


def segment_length(T: int) -> int:
    """About sqrt(T): as many tokens in a segment as there are segments. At most 16 tokens are one segment."""
    return max(16, next_power_of_2(isqrt(T)))


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    # the operands as the kernels want them: contiguous, and the last one, cu_seqlens, beside q
    *operands, cu = (None if x is None else x.contiguous() for x in tensors)
    device = tensors[0].device if tensors[0] is not None else None
    return [*operands, None if cu is None else cu.to(device, non_blocking=True)]


def _launch(q: Tensor, v: Tensor, log_decay: Tensor, N: int, scale: float | None):
    # the grid, and the arguments that close the list of both kernels
    T, H, K = q.shape[1:]
    V = v.shape[-1]
    BK, BV, NV = tile(K, V)
    scale = K**-0.5 if scale is None else scale
    G = 1 if log_decay.dim() == 3 else K
    acc = accumulator(state_dtype(q.dtype))
    return (NV * N * H,), (scale, T, H, segment_length(T), K, V, G, BK, BV, NV, acc)
