"""The chunk form in plain PyTorch, one step a function, for the tied family (derived in chapter 6).

Every rule that erases what the key recalls becomes the same map once its chunk is prepared: C tokens, the state S
before them, and operands in which decay, if any, is already written (Q~, K~ read, K^ writes; without decay Q, K, K):

    r_i = v_i - S^T k~_i - sum_{j<i} L_ij beta_j r_j          what the memory gets wrong, after the tokens before i
    (I + L diag(beta)) R = V - K~ S                           all i at once                           (6.2)
    X = (I + L diag(beta))^{-1}                               once a chunk, before S is known         (6.3)
    R = X V - (X K~) S,   U = beta * R                                                                (6.4)
    S' = fade * S + K^^T U                                    the walk, chunk after chunk             (6.5)
    O = scale * (Q~ S + A U)                                  all chunks at once again                (6.6)

The backward is the same steps turned around, with dO already multiplied by scale and D the gradient of S':

    dU = A^T dO + K^ D      D <- fade * D + Q~^T dO - (X K~)^T (beta * dU)      dP = X^T (beta * dU)    (6.7)
    dQ~ = dO S^T    dK~ = -dP S^T    dK^ = U D^T    dV = dP                                           (6.8)
    dA = dO U^T     dL = -dP U^T     dfade = rowsum(S * D)     dbeta = rowsum(R * (dU - L^T dP))      (6.9)

Tensors of chunks are [N, B H, C, .]: the walk takes one slice of memory a step. Needs torch only.
Source: Bischof and Van Loan 1987 for the WY form; Yang et al. 2024, section 3, for its use here.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

SEGMENT = 1 << 18  # numbers of an operand that a CPU works on at a time: about what its caches hold


class Chunks(NamedTuple):
    """The operands of the chunk map; fade is None without decay, and L may have more digits than the rest."""

    Q: Tensor  # [N, B H, C, K] Q~
    K: Tensor  # [N, B H, C, K] K~
    W: Tensor  # [N, B H, C, K] K^
    V: Tensor  # [N, B H, C, V]
    beta: Tensor  # [N, B H, C, 1]
    A: Tensor  # [N, B H, C, C] lower triangular
    L: Tensor  # [N, B H, C, C] strictly lower triangular
    fade: Tensor | None = None  # [N, B H, K or 1, 1]


class Kept(NamedTuple):
    """What the backward can take over from the forward."""

    X: Tensor  # [N, B H, C, C]
    A: Tensor  # [N, B H, C, C]
    L: Tensor  # [N, B H, C, C] in A's dtype
    XK: Tensor  # [N, B H, C, K] X K~
    R: Tensor  # [N, B H, C, V]
    starts: Tensor  # [N, B H, K, V] the state before each chunk


class Gradients(NamedTuple):
    """The gradients of `Chunks`, in its order; dA and dL are right where A and L are not zero, and so is dfade."""

    dQ: Tensor  # noqa: N815
    dK: Tensor  # noqa: N815
    dW: Tensor  # noqa: N815
    dV: Tensor  # noqa: N815
    dbeta: Tensor
    dA: Tensor  # noqa: N815
    dL: Tensor  # noqa: N815
    dfade: Tensor | None


def exact_dtype(x: Tensor) -> torch.dtype:
    """What the triangle is solved in: float64, which Apple's GPUs do not have (decision 0011)."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def chunks(x: Tensor, C: int) -> Tensor:
    """[B, T, H, D] as [N, B H, C, D], the last chunk filled up with zeros: tokens that change nothing."""
    B, T, H, D = x.shape
    N = -(-T // C)
    if N * C > T:
        x = pad(x, (0, 0, 0, 0, 0, N * C - T))
    return x.view(B, N, C, H, D).permute(1, 0, 3, 2, 4).reshape(N, B * H, C, D)


def put(x: Tensor, out: Tensor) -> None:
    """[N, B H, C, D] written to out [B, T, H, D] or [B, T, H], in its dtype: the way back, the filling cut off."""
    out = out.view(*out.shape[:3], x.shape[-1])
    (B, T, H, D), (N, _, C, _) = out.shape, x.shape
    x, whole = x.view(N, B, H, C, D).permute(1, 0, 3, 2, 4), T // C
    out[:, : whole * C].unflatten(1, (whole, C)).copy_(x[:, :whole])
    if T > whole * C:
        out[:, whole * C :].copy_(x[:, whole, : T - whole * C])


@cache
def keep_freed_memory() -> None:
    """Freed memory stays with the process: glibc gives blocks of more than 128 KiB back, to be cleared once more.

    A freed block of up to 32 MiB raises that bound to its size for good (mallopt(3), M_MMAP_THRESHOLD); it is never
    touched, so it costs nothing. With another allocator nothing happens.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


def segments(q: Tensor, v: Tensor, C: int) -> list[slice]:
    """Whole chunks of the time axis of q [B, T, H, K] and v [B, T, H, V], at most about SEGMENT numbers of each.

    On the CPU the stages of one segment find each other's results in the cache; elsewhere there is one segment.
    """
    (B, T, H, K), V = q.shape, v.shape[-1]
    n = max(1, SEGMENT // max(1, B * H * C * max(K, V))) if q.device.type == "cpu" else max(1, T)
    return [slice(start, min(start + n * C, T)) for start in range(0, max(T, 1), n * C)]


def forward_by_segments(
    one: Callable[..., tuple[Tensor, Tensor, Sequence[Tensor]]],
    operands: Sequence[Tensor],
    S: Tensor,
    C: int,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """o [B, T, H, V], the last state [B, H, K, V] and what may be kept, of either family.

    operands [B, T, ...] start with q, k, v; one takes those of a segment and the state S [B H, K, V] before it; gives
    back O [N, B H, C, V], the state after it, and what may be kept, chunk by chunk.
    """
    keep_freed_memory()
    q, _, v = operands[:3]
    shape, S, o, parts = S.shape, S.flatten(0, 1), torch.empty_like(v), []
    for s in segments(q, v, C):
        O, S, kept = one(*(x[:, s] for x in operands), S)
        put(O, o[:, s])
        parts.append(kept)
    return o, S.view(shape), tuple(torch.cat(x) for x in zip(*parts, strict=True))


def backward_by_segments(
    one: Callable[..., tuple[tuple[Tensor, ...], Tensor]],
    do: Tensor,
    operands: Sequence[Tensor],
    kept: Sequence[Tensor],
    D: Tensor,
    C: int,
) -> tuple[Tensor, ...]:
    """The gradients of `forward_by_segments` in its operands and the first state, from those of o and the last state.

    one takes a segment of do [B, T, H, V] and of the operands, what was kept of it, and D [B H, K, V]; gives back the
    operands' gradients [N, B H, C, .] and the D before it.
    """
    shape, D, grads = D.shape, D.flatten(0, 1), [torch.empty_like(x) for x in operands]
    for s in reversed(segments(operands[0], operands[2], C)):
        own = [x[s.start // C : -(-s.stop // C)] for x in kept]
        parts, D = one(do[:, s], *(x[:, s] for x in operands), own, D)
        for part, grad in zip(parts, grads, strict=True):
            put(part, grad[:, s])
    return *grads, D.view(shape)


def inverse(L: Tensor, beta: Tensor) -> Tensor:
    """X of (6.3) for L [..., C, C] and beta [..., C, 1], in L's dtype: rounded once multiplied (decision 0011)."""
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand(L.shape)
    columns = beta.to(L.dtype).mT  # diag(beta) from the right scales columns
    return torch.linalg.solve_triangular(L * columns, eye, upper=False, unitriangular=True)


def times(X: Tensor, y: Tensor) -> Tensor:
    """X y, multiplied in X's dtype and rounded to that of y."""
    return (X @ y.to(X.dtype)).to(y.dtype)


def walk(x: Chunks, XV: Tensor, XK: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The state before every chunk [N, B H, K, V], R [N, B H, C, V], and the state after the last: (6.4), (6.5)."""
    if not len(XV):
        return XV.new_empty((0, *S.shape)), XV, S
    starts, R, beta_W = (
        [],
        [],
        x.beta * x.W,
    )  # beta from this side: the loop is as long as Python is busy in it
    fades = [None] * len(XV) if x.fade is None else x.fade.unbind()
    slices = zip(XV.unbind(), XK.unbind(), beta_W.mT.unbind(), fades, strict=True)
    for n, (xv, xk, w, fade) in enumerate(slices):
        starts.append(S)
        R.append(torch.baddbmm(xv, xk, S, alpha=-1))  # (6.4)
        S = torch.baddbmm(S if fade is None else fade * S, w, R[n])  # (6.5)
    return torch.stack(starts), torch.stack(R), S


def forward(x: Chunks, S: Tensor, scale: float) -> tuple[Tensor, Tensor, Kept]:
    """O [N, B H, C, V], the last state, and what may be kept, from the state S [B H, K, V] before the first chunk."""
    X = inverse(x.L, x.beta)
    XK = times(X, x.K)
    starts, R, S = walk(x, times(X, x.V), XK, S)
    O = plus_(x.Q @ starts, x.A, x.beta * R).mul_(scale)  # (6.6)
    return O, S, Kept(X, x.A, x.L.to(R.dtype), XK, R, starts)


def plus_(x: Tensor, y: Tensor, z: Tensor, sign: int = 1) -> Tensor:
    """x + sign * y z, written to x, for products of all chunks [N, B H, ., .]."""
    x.flatten(0, 1).baddbmm_(y.flatten(0, 1), z.flatten(0, 1), alpha=sign)
    return x


def backward(x: Chunks, kept: Kept, dO: Tensor, D: Tensor) -> tuple[Gradients, Tensor]:
    """The gradients of `forward` in all operands and in S; dO is already multiplied by scale, D that of the last state.

    Of x it reads neither A nor L: `kept` has them.
    """
    X, A, L, XK, R, starts = kept
    dU, G = A.mT @ dO, x.Q.mT @ dO
    ends = G.new_empty(
        (len(G) + 1, *D.shape)
    )  # the gradient of the state after each chunk, the first state's first
    ends[-1] = D
    fades = [None] * len(G) if x.fade is None else x.fade.unbind()
    operands = (ends[1:], ends[:-1], dU, x.W, G, (x.beta * XK).mT)
    slices = zip(*(y.unbind() for y in operands), fades, strict=True)
    for end, start, du, w, g, xk, fade in reversed(list(slices)):  # (6.7)
        du.baddbmm_(w, end)
        g.baddbmm_(xk, du, alpha=-1)
        torch.add(g, end, out=start) if fade is None else torch.addcmul(g, fade, end, out=start)
    D, ends = ends[0], ends[1:]
    dP = times(X.mT, x.beta * dU)
    plus_(dU, L.mT, dP, -1)
    U, minus = x.beta * R, -dP
    grads = Gradients(
        dO @ starts.mT,  # (6.8)
        minus @ starts.mT,
        U @ ends.mT,
        dP,
        (R * dU).sum(-1, keepdim=True),  # (6.9)
        dO @ U.mT,
        minus @ U.mT,
        None if x.fade is None else (starts * ends).sum(-1, keepdim=True),
    )
    return grads, D
