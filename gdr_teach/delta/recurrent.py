"""The delta rule token by token in Triton, forward and backward (chapter 2; the backward is derived in chapter 8).

One program owns one head of one sequence and BV of the V columns of its state, all K rows of them, and walks the
tokens in order. Columns of S never talk to each other in the forward: (2.1) to (2.4) hold column by column.

Backward, with do_t the gradient of o_t and D_t the gradient of S_t (all that comes after token t included):

    D_t  = D_{t+1 side} + scale * q_t do_t^T                                                     (2.9)
    du_t = D_t^T k_t          dr_t = beta_t du_t          dv_t = dr_t                            (2.10)
    dbeta_t = du_t . r_t      dk_t = D_t u_t - S_{t-1} dr_t                                      (2.11)
    D_{t-1 side} = D_t - k_t dr_t^T                       dq_t = scale * S_t do_t                (2.12)

D runs backwards in time and S forwards, and neither can be undone (at beta = 1 a step forgets), so there are two
walks: `delta_reverse_kernel` needs r_t alone, `delta_replay_kernel` walks forward again with S_t = S_{t-1} + k_t u_t^T.
No state is stored per token. Sums over V columns of different programs are written side by side and added in a fixed
order afterwards: no atomics, the same bits every time.
"""

import torch
import triton.language as tl
from torch import Tensor

from ..notation import Output, state_dtype
from ..runtime import cdiv, kernel, new_empty, next_power_of_2


@kernel
def program_place(p_cu, T, H, NV: tl.constexpr, PACKED: tl.constexpr):
    """Which columns, sequence and head a program owns, and its first token's row and token count.

    Grid: one dimension, NV * N * H programs, columns fastest, so that programs sharing q, k, v are neighbours.
    """
    i = tl.program_id(0)
    i_v = i % NV
    i_nh = i // NV
    i_n = i_nh // H
    i_h = i_nh % H
    if PACKED:
        first = tl.load(p_cu + i_n).to(tl.int64)
        count = (tl.load(p_cu + i_n + 1).to(tl.int64) - first).to(tl.int32)
    else:
        first = i_n.to(tl.int64) * T
        count = T
    return i_v, i_nh, first * H + i_h, count  # rows are counted in (token, head) pairs


@kernel
def delta_forward_kernel(
    p_q,  # [B, T, H, K]
    p_k,  # [B, T, H, K]
    p_v,  # [B, T, H, V]
    p_beta,  # [B, T, H]
    p_state0,  # [N, H, K, V] or None
    p_cu,  # [N + 1] or None
    p_o,  # [B, T, H, V] or None
    p_r,  # [B, T, H, V] or None
    p_state,  # [N, H, K, V]
    scale,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NV: tl.constexpr,
    ACC: tl.constexpr,
):
    """Equations (2.1) to (2.4), token after token. Grid: `program_place`. Writes o, or r for the backward, or both."""
    i_v, i_nh, row, count = program_place(p_cu, T, H, NV, p_cu is not None)
    i_k = tl.arange(0, BK)  # [BK]
    i_c = i_v * BV + tl.arange(0, BV)  # [BV] columns of the state
    m_k = i_k < K
    m_v = i_c < V
    m_s = m_k[:, None] & m_v[None, :]  # [BK, BV]
    o_s = i_nh.to(tl.int64) * K * V + i_k[:, None] * V + i_c[None, :]  # [BK, BV]

    b_S = tl.zeros([BK, BV], dtype=ACC)
    if p_state0 is not None:
        b_S += tl.load(p_state0 + o_s, mask=m_s, other=0.0).to(ACC)
    for _ in range(count):
        b_k = tl.load(p_k + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
        b_v = tl.load(p_v + row * V + i_c, mask=m_v, other=0.0).to(ACC)  # [BV]
        b_beta = tl.load(p_beta + row).to(ACC)
        b_r = b_v - tl.sum(b_S * b_k[:, None], axis=0)  # [BV]      (2.1)
        b_S += b_k[:, None] * (b_beta * b_r)[None, :]  # [BK, BV]      (2.2), (2.3)
        if p_r is not None:
            tl.store(p_r + row * V + i_c, b_r, mask=m_v)
        if p_o is not None:
            b_q = tl.load(p_q + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
            b_o = tl.sum(b_S * b_q[:, None], axis=0) * scale  # [BV]      (2.4)
            tl.store(p_o + row * V + i_c, b_o.to(p_o.dtype.element_ty), mask=m_v)
        row += H
    tl.store(p_state + o_s, b_S, mask=m_s)


@kernel
def delta_reverse_kernel(
    p_q,  # [B, T, H, K]
    p_k,  # [B, T, H, K]
    p_beta,  # [B, T, H]
    p_r,  # [B, T, H, V]
    p_cu,  # [N + 1] or None
    p_do,  # [B, T, H, V]
    p_dstate,  # [N, H, K, V]
    p_dr,  # [B, T, H, V]
    p_dk,  # [NV, B, T, H, K]
    p_dbeta,  # [NV, B, T, H]
    p_dstate0,  # [N, H, K, V]
    rows,
    scale,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NV: tl.constexpr,
    ACC: tl.constexpr,
):
    """(2.9) to (2.12) without the S_{t-1} term, last token first. Grid: `program_place`. rows = B * T * H."""
    i_v, i_nh, row, count = program_place(p_cu, T, H, NV, p_cu is not None)
    i_k = tl.arange(0, BK)  # [BK]
    i_c = i_v * BV + tl.arange(0, BV)  # [BV]
    m_k = i_k < K
    m_v = i_c < V
    m_s = m_k[:, None] & m_v[None, :]  # [BK, BV]
    o_s = i_nh.to(tl.int64) * K * V + i_k[:, None] * V + i_c[None, :]  # [BK, BV]
    part = i_v.to(tl.int64) * rows  # this program's share of the sums over V

    b_D = tl.load(p_dstate + o_s, mask=m_s, other=0.0).to(ACC)  # [BK, BV]
    row += (count - 1).to(tl.int64) * H
    for _ in range(count):
        b_q = tl.load(p_q + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
        b_k = tl.load(p_k + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
        b_beta = tl.load(p_beta + row).to(ACC)
        b_r = tl.load(p_r + row * V + i_c, mask=m_v, other=0.0).to(ACC)  # [BV]
        b_do = tl.load(p_do + row * V + i_c, mask=m_v, other=0.0).to(ACC)  # [BV]
        b_D += (scale * b_q)[:, None] * b_do[None, :]  # (2.9)
        b_du = tl.sum(b_D * b_k[:, None], axis=0)  # [BV]      (2.10)
        b_dr = b_beta * b_du  # [BV]
        b_dk = tl.sum(b_D * (b_beta * b_r)[None, :], axis=1)  # [BK]      (2.11), first term
        b_D -= b_k[:, None] * b_dr[None, :]  # (2.12)
        tl.store(p_dr + row * V + i_c, b_dr, mask=m_v)
        tl.store(p_dk + (part + row) * K + i_k, b_dk, mask=m_k)
        tl.store(p_dbeta + part + row, tl.sum(b_du * b_r, axis=0))
        row -= H
    tl.store(p_dstate0 + o_s, b_D, mask=m_s)


@kernel
def delta_replay_kernel(
    p_k,  # [B, T, H, K]
    p_beta,  # [B, T, H]
    p_r,  # [B, T, H, V]
    p_state0,  # [N, H, K, V] or None
    p_cu,  # [N + 1] or None
    p_do,  # [B, T, H, V]
    p_dr,  # [B, T, H, V]
    p_dq,  # [NV, B, T, H, K]
    p_dk,  # [NV, B, T, H, K], read and written
    rows,
    scale,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NV: tl.constexpr,
    ACC: tl.constexpr,
):
    """The states once more, in order: dq (2.12) and the S_{t-1} term of dk (2.11). Grid: `program_place`."""
    i_v, i_nh, row, count = program_place(p_cu, T, H, NV, p_cu is not None)
    i_k = tl.arange(0, BK)  # [BK]
    i_c = i_v * BV + tl.arange(0, BV)  # [BV]
    m_k = i_k < K
    m_v = i_c < V
    m_s = m_k[:, None] & m_v[None, :]  # [BK, BV]
    o_s = i_nh.to(tl.int64) * K * V + i_k[:, None] * V + i_c[None, :]  # [BK, BV]
    part = i_v.to(tl.int64) * rows

    b_S = tl.zeros([BK, BV], dtype=ACC)
    if p_state0 is not None:
        b_S += tl.load(p_state0 + o_s, mask=m_s, other=0.0).to(ACC)
    for _ in range(count):
        b_k = tl.load(p_k + row * K + i_k, mask=m_k, other=0.0).to(ACC)  # [BK]
        b_beta = tl.load(p_beta + row).to(ACC)
        b_r = tl.load(p_r + row * V + i_c, mask=m_v, other=0.0).to(ACC)  # [BV]
        b_dr = tl.load(p_dr + row * V + i_c, mask=m_v, other=0.0).to(ACC)  # [BV]
        b_do = tl.load(p_do + row * V + i_c, mask=m_v, other=0.0).to(ACC)  # [BV]
        b_dk = tl.load(p_dk + (part + row) * K + i_k, mask=m_k, other=0.0)  # [BK]
        b_dk -= tl.sum(b_S * b_dr[None, :], axis=1)  # [BK]      (2.11), second term: S_{t-1}
        b_S += b_k[:, None] * (b_beta * b_r)[None, :]  # (2.3)
        b_dq = tl.sum(b_S * b_do[None, :], axis=1) * scale  # [BK]      (2.12): S_t
        tl.store(p_dk + (part + row) * K + i_k, b_dk, mask=m_k)
        tl.store(p_dq + (part + row) * K + i_k, b_dq, mask=m_k)
        row += H


def tile(K: int, V: int) -> tuple[int, int, int]:
    """(BK, BV, NV): all K rows, and as many columns as keep the tile at 4096 numbers, 32 to a thread of 128."""
    BK = next_power_of_2(K)
    BV = min(next_power_of_2(V), max(4096 // BK, 16))
    return BK, BV, cdiv(V, BV)


def delta_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Output:
    """The delta rule by the token-by-token kernel: (2.1) to (2.4), one launch, forward only.

    Args: as `gdr_teach.delta_rule`, which checks them and adds the gradients; any strides.
    Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    q, k, v, beta, S0, cu = dense(q, k, v, beta, initial_state, cu_seqlens)
    o = new_empty(v.shape, dtype=v.dtype, device=v.device)
    state, _ = _forward(q, k, v, beta, S0, cu, scale, o=o)
    return Output(o, state)


def delta_recurrent_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `delta_recurrent`: (2.9) to (2.12), three launches, nothing kept from the forward.

    Args: do [B, T, H, V] and dstate [N, H, K, V], the gradients of o and state; the rest as in the forward.
    Returns: dq, dk, dv, dbeta in their inputs' dtypes, and dstate0 [N, H, K, V].
    """
    q, k, v, beta, S0, cu = dense(q, k, v, beta, initial_state, cu_seqlens)
    do, dstate = do.contiguous(), dstate.contiguous()
    B, T, H, K = k.shape
    V = v.shape[-1]
    BK, BV, NV = tile(K, V)
    acc = dstate.dtype
    _, r = _forward(q, k, v, beta, S0, cu, scale, o=None)
    dr = new_empty(v.shape, dtype=acc, device=v.device)
    dq, dk = (new_empty((NV, *k.shape), dtype=acc, device=k.device) for _ in range(2))
    dbeta = new_empty((NV, *beta.shape), dtype=acc, device=k.device)
    dstate0 = new_empty(dstate.shape, dtype=acc, device=k.device)
    grid = (NV * dstate.shape[0] * H,)
    scale = K**-0.5 if scale is None else scale
    sizes = (B * T * H, scale, T, H, K, V, BK, BV, NV, accumulator(acc))
    if grid[0]:
        delta_reverse_kernel[grid](q, k, beta, r, cu, do, dstate, dr, dk, dbeta, dstate0, *sizes)
        delta_replay_kernel[grid](k, beta, r, S0, cu, do, dr, dq, dk, *sizes)
    dq, dk, dbeta = dq.sum(0).to(q.dtype), dk.sum(0).to(k.dtype), dbeta.sum(0).to(beta.dtype)
    return dq, dk, dr.to(v.dtype), dbeta, dstate0


def _forward(q, k, v, beta, S0, cu, scale, *, o: Tensor | None) -> tuple[Tensor, Tensor | None]:
    # one launch of the forward kernel: writes o where there is one, else r for the backward
    T, H, K = k.shape[1:]
    V = v.shape[-1]
    BK, BV, NV = tile(K, V)
    acc = state_dtype(q.dtype)
    N = k.shape[0] if cu is None else cu.numel() - 1
    state = new_empty((N, H, K, V), dtype=acc, device=k.device)
    r = new_empty(v.shape, dtype=acc, device=v.device) if o is None else None
    grid = (NV * N * H,)
    scale = K**-0.5 if scale is None else scale
    if grid[0]:
        sizes = (scale, T, H, K, V, BK, BV, NV, accumulator(acc))
        delta_forward_kernel[grid](q, k, v, beta, S0, cu, o, r, state, *sizes)
    return state, r


def dense(q, k, v, beta, initial_state, cu_seqlens):
    """The operands as the kernels want them: contiguous, cu_seqlens beside q."""
    S0 = None if initial_state is None else initial_state.contiguous()
    cu = None if cu_seqlens is None else cu_seqlens.to(q.device, non_blocking=True).contiguous()
    return q.contiguous(), k.contiguous(), v.contiguous(), beta.contiguous(), S0, cu


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The Triton type of the state: float64 (interpreter only) or float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32
