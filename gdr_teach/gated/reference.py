"""The gated delta rule in plain PyTorch: token by token, and by chunks (chapter 5).

One token, state S of shape [K, V]; g_t = log_decay_t <= 0 is one number a head, or one for each of the K rows:

    S~_t = exp(g_t) * S_{t-1}                 forget first, row by row                               (5.1)
    r_t = v_t - S~_t^T k_t                    what the faded memory gets wrong about key k_t         (5.2)
    u_t = beta_t r_t                          the correction that is written                         (5.3)
    S_t = S~_t + k_t u_t^T                                                                           (5.4)
    o_t = scale * S_t^T q_t                                                                          (5.5)

With g = 0 this is the delta rule (2.1) to (2.4). Both functions are ordinary differentiable PyTorch and right for any
decay, -inf (a reset) included. Needs torch only. Sources: Yang et al. 2024, "Gated Delta Networks"; Kimi Team
2025, "Kimi Linear".
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from ..arguments import check_positive_int
from ..delta.reference import chunks, start_state, tokens
from ..notation import Output
from ..packing import per_document

FORGOTTEN = -2048.0  # exp of it is exactly 0 in float64 too; in place of -inf it keeps 0 * inf away


def gated_recurrence(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
) -> Output:
    """The gated delta rule, one token after the other: equations (5.1) to (5.5).

    Args: as `gdr_teach.gated_delta_rule`. Computes in float64 for float64 inputs, else in float32.
    Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    operands = (q, k, v, beta, log_decay)
    if cu_seqlens is not None:
        states = {"initial_state": initial_state}
        return Output(*per_document(gated_recurrence, cu_seqlens, operands, states, scale=scale))
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    S = start_state(k, v, initial_state)  # [B, H, K, V]
    operands = (q, k, v, beta, by_row(log_decay).exp())
    o = torch.zeros_like(v)[:, :0]
    if q.shape[1]:
        rows = []
        for q_t, k_t, v_t, beta_t, decay_t in zip(
            *(x.to(S.dtype).unbind(1) for x in operands), strict=True
        ):
            S = decay_t[..., None] * S  # (5.1)
            r_t = v_t - (k_t[..., None, :] @ S)[..., 0, :]  # [B, H, V]      (5.2)
            u_t = beta_t[..., None] * r_t  # (5.3)
            S = S + k_t[..., :, None] * u_t[..., None, :]  # (5.4)
            rows.append(scale * (q_t[..., None, :] @ S)[..., 0, :])  # (5.5)
        o = torch.stack(rows, dim=1).to(v.dtype)
    return Output(o, S)


def gated_chunkwise(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
    chunk_size: int = 64,
) -> Output:
    """The gated delta rule, C tokens at a time.

    Inside a chunk, i and j count its tokens and g_(j, i] is the sum of g over the tokens after j up to i:

        Q~_i = exp(g_(start, i]) q_i     K~_i = exp(g_(start, i]) k_i     K^_j = exp(g_(j, end]) k_j      (5.6)
        A_ij = q_i^T exp(g_(j, i]) k_j,  i >= j        L_ij = k_i^T exp(g_(j, i]) k_j,  i > j             (5.7)
        T = (I + diag(beta) L)^{-1} diag(beta)         U = T (V - K~ S)                                   (5.8)
        O = scale * (Q~ S + A U)                       S' = exp(g_(start, end]) * S + K^^T U              (5.9)

    Both reads, of the query and of the erasing key, see the decayed state, so both carry the sum with their own token
    included. No exponent in (5.6) to (5.9) is positive: nothing overflows, whatever the decay.

    Args: as `gdr_teach.gated_delta_rule`, and chunk_size C >= 1. The last chunk is filled up with zeros, tokens that
    change nothing. Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V]).
    """
    chunk_size = check_positive_int("gated_chunkwise", "chunk_size", chunk_size)
    operands = (q, k, v, beta, log_decay)
    if cu_seqlens is not None:
        states, options = {"initial_state": initial_state}, {"scale": scale}
        options["chunk_size"] = chunk_size
        return Output(*per_document(gated_chunkwise, cu_seqlens, operands, states, **options))
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    S = start_state(k, v, initial_state)  # [B, H, K, V]
    Q, Kc, Vc, b, g = chunk_operands(*operands, S.dtype, chunk_size)  # [B, H, N, C, .]
    from_start, to_end = upto(g).exp(), after(g).exp()  # [B, H, N, C, K or 1]
    whole = g.sum(-2)[..., None].exp()  # [B, H, N, K or 1, 1]
    Qr, Kr, Kw = Q * from_start, Kc * from_start, Kc * to_end  # (5.6)
    A = decayed_scores(Q, Kc, g)  # (5.7)
    T, _ = correction_matrix(Kc, b, g)  # (5.8)
    u, w = ((T @ x.to(T.dtype)).to(S.dtype) for x in (Vc, Kr))  # (5.8) multiplied out
    o = []
    for n in range(Q.shape[2]):
        U = u[:, :, n] - w[:, :, n] @ S  # [B, H, C, V]
        o.append(scale * (Qr[:, :, n] @ S + A[:, :, n] @ U))  # (5.9)
        S = whole[:, :, n] * S + Kw[:, :, n].mT @ U
    O = torch.stack(o, dim=2) if o else Vc
    return Output(tokens(O, q.shape[1]).to(v.dtype), S)


def by_row(log_decay: Tensor) -> Tensor:
    """[B, T, H] as [B, T, H, 1], one decay for all K rows; [B, T, H, K] as it is."""
    return log_decay[..., None] if log_decay.dim() == 3 else log_decay


def chunk_operands(q, k, v, beta, log_decay, dtype: torch.dtype, C: int) -> tuple[Tensor, ...]:
    """q, k, v, beta and g as chunks [B, H, N, C, .] in the state's dtype, -inf as `FORGOTTEN`."""
    operands = (q, k, v, beta[..., None], by_row(log_decay))
    Q, K, V, b, g = (chunks(x.to(dtype), C) for x in operands)
    return Q, K, V, b, g.clamp_min(FORGOTTEN)


def correction_matrix(K: Tensor, beta: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """T and L of (5.7) and (5.8) for K [..., C, K], beta [..., C, 1]: float64, to be rounded once multiplied."""
    # why float64: `delta.reference.correction_matrix`; Apple's GPUs have none
    exact = torch.float32 if K.device.type == "mps" else torch.float64
    K, beta, g = K.to(exact), beta.to(exact), g.to(exact)
    L = decayed_scores(K, K, g).tril(-1)
    T = torch.linalg.solve_triangular(
        beta * L, torch.diag_embed(beta[..., 0]), upper=False, unitriangular=True
    )
    return T, L


# -- decay between two tokens of a chunk -------------------------------------------------------------------------------


def decayed_scores(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """A_ij = x_i^T exp(g_(j, i]) y_j for i >= j, else 0: (5.7), for any g <= 0.

    exp(g_(start, i] - g_(start, j]) would be one product, but of numbers that overflow, or that agree in all their
    digits once the sums are large. So pairs are sorted by halving: cut the chunk in two, the second half reads what the
    first half wrote, and the exponent has two parts on either side of the cut,

        g_(j, i] = g_(j, cut] + g_(cut, i]         both <= 0, both summed from the cut,

    one for the row and one for the column: a matrix product. Pairs inside one half: the same again, down to one token.
    A gate is summed only where a pair really crosses it, so a token's scores depend on nothing later, bit for bit.
    """
    C = x.shape[-2]
    x, y, g = (to_power_of_two(z) for z in (x, y, g))
    A = torch.diag_embed((x * y).sum(-1))
    for h in level_sizes(C):
        to_cut, from_cut = level_decays(g, h)
        columns, rows = halves(y, h)[0] * to_cut, halves(x, h)[1] * from_cut
        corners(A, h).copy_(rows @ columns.mT)
    return A[..., :C, :C]


def level_sizes(C: int) -> list[int]:
    """The half sizes 1, 2, 4, ... of the blocks that a chunk of C tokens is cut into."""
    return [1 << n for n in range((C - 1).bit_length())]


def to_power_of_two(x: Tensor) -> Tensor:
    """[..., C, D] filled up with zeros to the next power of two of tokens."""
    C = x.shape[-2]
    return pad(x, (0, 0, 0, (1 << (C - 1).bit_length()) - C))


def halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """Views of [..., C, D] in blocks of 2 h tokens: the first and the second halves, each [..., C / 2h, h, D]."""
    blocks = x.unflatten(-2, (-1, 2, h))
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def level_decays(g: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """exp(g_(j, cut]) for the first halves and exp(g_(cut, i]) for the second ones, summed from the cut."""
    first, second = halves(g, h)
    return after(first).exp(), upto(second).exp()


def corners(A: Tensor, h: int) -> Tensor:
    """A view of A [..., C, C]: rows of second halves, columns of the first half of their block [..., C / 2h, h, h]."""
    blocks = A.unflatten(-1, (-1, 2, h)).unflatten(
        -4, (-1, 2, h)
    )  # [..., block, half, i, block, half, j]
    own = blocks.diagonal(dim1=-6, dim2=-3)  # [..., half, i, half, j, block]
    return own[..., 1, :, 0, :, :].movedim(-1, -3)


def upto(x: Tensor) -> Tensor:
    """Sums over the tokens of [..., C, D] up to and with each one."""
    return x.cumsum(-2)


def after(x: Tensor) -> Tensor:
    """Sums over the tokens of [..., C, D] after each one, added from the far end: no difference of larger sums."""
    return shifted(x.flip(-2)).cumsum(-2).flip(-2)


def shifted(x: Tensor) -> Tensor:
    """[..., C, D] one token later: zeros at the first, the last one dropped."""
    return pad(x, (0, 0, 1, 0))[..., :-1, :]
