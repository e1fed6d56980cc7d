"""Chapter 1: the state as an associative memory, written by adding and never erasing.

State S of shape [K, V] (the transpose of the textbook's S_t), key k_t, value v_t, query q_t:

    S_t = S_{t-1} + k_t v_t^T                       write: Hebb's rule, one outer product          (1.1)
    o_t = scale * S_t^T q_t                         read                                           (1.2)
    S^T k_j = |k_j|^2 v_j + sum_{i != j} (k_i . k_j) v_i       what comes back: value + crosstalk  (1.3)
    mean |S^T k_j - v_j|^2 = (T - 1) / K            T random unit keys, unit values                (1.3b)
    O = scale * (Q S_0 + tril(Q K^T) V)             all reads at once: causal linear attention     (1.4)

Orthonormal keys recall exactly; all others disturb each other, and nothing is ever taken out. Everything is
ordinary differentiable PyTorch. Needs torch only. Source: Schlag, Irie, Schmidhuber 2021, "Linear transformers
are secretly fast weight programmers", section 2.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from .notation import Output, state_dtype


def write(
    S: Float[Tensor, "*batch K V"], k: Float[Tensor, "*batch K"], v: Float[Tensor, "*batch V"]
) -> Float[Tensor, "*batch K V"]:
    """The state after one more pair: S + k v^T (1.1).

    Args:
        S: the state so far [..., K, V].
        k: the key [..., K], used as given.
        v: the value [..., V].

    Returns: a new state [..., K, V] in S's dtype; S is left as it was.
    Raises: ValueError when k or v does not fit S.
    """
    _check("write", "k", k, [*S.shape[:-2], S.shape[-2]])
    _check("write", "v", v, [*S.shape[:-2], S.shape[-1]])
    return S + k[..., :, None].to(S.dtype) * v[..., None, :].to(S.dtype)


def read(
    S: Float[Tensor, "*batch K V"], q: Float[Tensor, "*batch K"], *, scale: float = 1.0
) -> Float[Tensor, "*batch V"]:
    """What the state answers to one query: scale * S^T q (1.2).

    Args:
        S: the state [..., K, V].
        q: the query [..., K]; a stored key asks for its value.
        scale: factor on the answer.

    Returns: the answer [..., V] in S's dtype.
    Raises: ValueError when q does not fit S.
    """
    _check("read", "q", q, [*S.shape[:-2], S.shape[-2]])
    return scale * (q[..., None, :].to(S.dtype) @ S)[..., 0, :]


def hebbian_state(
    k: Float[Tensor, "*batch T K"], v: Float[Tensor, "*batch T V"]
) -> Float[Tensor, "*batch K V"]:
    """The state after T writes (1.1) into an empty memory: S = sum_t k_t v_t^T = K^T V, in any order.

    Args:
        k: keys [..., T, K].
        v: values [..., T, V].

    Returns: the state [..., K, V], zeros for T = 0; float64 for float64 keys, else float32.
    Raises: ValueError when v does not belong to k.
    """
    _check("hebbian_state", "v", v, [*k.shape[:-1], v.shape[-1]])
    dtype = state_dtype(k.dtype)
    return k.to(dtype).mT @ v.to(dtype)


def recall_error(
    S: Float[Tensor, "*batch K V"], k: Float[Tensor, "*batch T K"], v: Float[Tensor, "*batch T V"]
) -> Float[Tensor, "*batch T"]:
    """How far each stored value is from what its key brings back: |S^T k_t - v_t| / |v_t|.

    0 is perfect recall, 1 is as good as answering zero. A zero value gives inf, or nan when it is recalled.

    Args:
        S: the state [..., K, V].
        k: keys [..., T, K].
        v: the values that belong to them [..., T, V].

    Returns: one number a pair [..., T], in S's dtype, without a unit.
    Raises: ValueError when k or v does not fit S.
    """
    _check("recall_error", "k", k, [*S.shape[:-2], k.shape[-2], S.shape[-2]])
    _check("recall_error", "v", v, [*k.shape[:-1], S.shape[-1]])
    k, v = k.to(S.dtype), v.to(S.dtype)
    return torch.linalg.vector_norm(k @ S - v, dim=-1) / torch.linalg.vector_norm(v, dim=-1)


def linear_attention_recurrence(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "B H K V"] | None = None,
) -> Output:
    """Causal linear attention, one token after the other: write (1.1), then read (1.2).

    Args:
        q: queries [B, T, H, K].
        k: keys [B, T, H, K].
        v: values [B, T, H, V].
        scale: factor on the output; default K ** -0.5.
        initial_state: the state before the first token [B, H, K, V]; default zeros.

    Returns: Output(o [B, T, H, V] in v's dtype, state [B, H, K, V]), computed in float64 for float64
    inputs, else in float32.
    Raises: ValueError when k, v or initial_state does not fit q.
    """
    scale, S = _start("linear_attention_recurrence", q, k, v, scale, initial_state)
    o = v.new_empty((*v.shape[:1], 0, *v.shape[2:]))
    if q.shape[1]:
        rows = []
        for q_t, k_t, v_t in zip(*(x.unbind(1) for x in (q, k, v)), strict=True):
            S = write(S, k_t, v_t)  # (1.1)
            rows.append(read(S, q_t, scale=scale))  # (1.2)
        o = torch.stack(rows, dim=1).to(v.dtype)
    return Output(o, S)


def linear_attention_masked(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "B H K V"] | None = None,
) -> Output:
    """The same without a loop: scores masked to the past, no softmax (1.4). T^2 scores instead of T states.

    Args, Returns, Raises: as `linear_attention_recurrence`, which it equals up to rounding.
    """
    scale, S = _start("linear_attention_masked", q, k, v, scale, initial_state)
    Q, K, V = (x.transpose(1, 2).to(S.dtype) for x in (q, k, v))  # [B, H, T, .]
    O = scale * (Q @ S + (Q @ K.mT).tril() @ V)  # [B, H, T, V]      (1.4)
    return Output(O.transpose(1, 2).to(v.dtype), S + K.mT @ V)


def _start(op: str, q, k, v, scale, initial_state) -> tuple[float, Tensor]:
    # the checked call's scale and its state before the first token [B, H, K, V]
    B, T, H, K = q.shape
    _check(op, "k", k, [B, T, H, K])
    _check(op, "v", v, [B, T, H, v.shape[-1]])
    shape = [B, H, K, v.shape[-1]]
    if initial_state is not None:
        _check(op, "initial_state", initial_state, shape)
        S = initial_state.to(state_dtype(q.dtype), copy=True)
    else:
        S = torch.zeros(shape, dtype=state_dtype(q.dtype), device=q.device)
    return (K**-0.5 if scale is None else scale), S


def _check(op: str, name: str, x: Tensor, wanted: list[int]) -> None:
    # outer products broadcast where they should not: one wrong size would give a wrong state, no error
    if list(x.shape) != wanted:
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {list(x.shape)}")
