"""Checks of exercise 01, a matrix as memory. Each one isolates an idea as far as its data can.

The reference is this file's own: plain numpy in float64, written from equations (1.1) to (1.3), so that a fault in
the package cannot pass as the truth about a learner's answer.
"""

from functools import partial

import numpy as np

from ..checks import Check, Untouched
from .data import (
    Rng,
    memory,
    memory_without_key,
    mistakes,
    normal,
    returning_keys,
    sizes,
    two_sizes,
    unit,
)

# -- the rule, right and wrong ---------------------------------------------------------------------


def step(S, k, v, mistake=""):
    """S + k v^T for any leading dimensions; `mistake` names one way to get it wrong."""
    if mistake == "key_normalised":
        k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    if mistake == "subtracted":
        v = -v
    if mistake == "erased_first":
        v = v - np.einsum("...kv,...k->...v", S, k)
    kept = np.zeros_like(S) if mistake == "old_pairs_lost" else S
    return kept + k[..., :, None] * v[..., None, :]


def walk(q, k, v, scale, initial, mistake=""):
    """The outputs and the last state over all tokens; q, k [B,T,H,K], v [B,T,H,V], initial [B,H,K,V]."""
    S = np.zeros_like(initial) if mistake == "initial_ignored" else initial
    states = [S]
    for t in range(k.shape[1] - (mistake == "last_token_dropped")):
        states.append(step(states[-1], k[:, t], v[:, t], mistake))
    o = np.zeros(v.shape)
    for t in range(len(states) - 1):
        seen = states[t + 1]  # after the write of token t
        if mistake in ("read_before_write", "own_pair_missing"):
            seen = states[t]
        if mistake == "future_seen":
            seen = states[-1]
        if mistake == "initial_not_read":
            seen = seen - initial
        if mistake == "initial_not_scaled":
            seen = seen - initial + initial / scale
        o[:, t] = scale * np.einsum("bhkv,bhk->bhv", seen, q[:, t])
    return o, states[-1]


def walk_heads_first(q, k, v, scale, initial):
    """The same for one who takes memory that lies as [B, T, H, .] for [B, H, T, .]."""
    B, T, H, _ = k.shape
    q, k, v = (x.reshape(B, H, T, -1).swapaxes(1, 2) for x in (q, k, v))
    o, S = walk(q, k, v, scale, initial)
    return o.swapaxes(1, 2).reshape(B, T, H, -1), S


# -- 01.write --------------------------------------------------------------------------------------


def draw_long_key(rng: Rng):
    """A key of length 1.5 under which nothing is held."""
    S, k, v = memory_without_key(rng)
    return S, np.float32(1.5) * k, v


def one_step(S, k, v, mistake=""):
    return (step(S, k, v, mistake),)


WRITE = (
    Check(
        "pair",
        memory_without_key,
        one_step,
        mistakes(one_step, "old_pairs_lost", "subtracted"),
    ),
    Check("kept", memory, one_step, mistakes(one_step, "erased_first", "old_pairs_lost")),
    Check(
        "long_key", draw_long_key, one_step, mistakes(one_step, "key_normalised", "old_pairs_lost")
    ),
    Untouched("untouched", memory, one_step),
)

# -- 01.read_all -----------------------------------------------------------------------------------


def draw_unit_queries(rng: Rng):
    """Queries of length one, the first of them asked again at the end."""
    N, K, V = sizes(rng, 3)
    Q = unit(normal(rng, N, K))
    Q[-1] = Q[0]
    return normal(rng, K, V), Q, 1.0


def draw_queries(rng: Rng, scale: float | None = None):
    """Queries of lengths between a half and two."""
    S, Q, _ = draw_unit_queries(rng)
    Q *= rng.uniform(0.5, 2.0, (len(Q), 1)).astype(np.float32)
    return S, Q, scale or float(rng.uniform(0.2, 0.6))


def read_all(S, Q, scale):
    return (scale * (Q @ S),)


READ_ALL = (
    Check("rows", draw_unit_queries, read_all),
    Check(
        "lengths",
        partial(draw_queries, scale=1.0),
        read_all,
        {"query_normalised": lambda S, Q, scale: read_all(S, unit(Q), scale)},
    ),
    Check(
        "scale",
        draw_queries,
        read_all,
        {
            "scale_forgotten": lambda S, Q, scale: read_all(S, Q, 1.0),
            "scale_twice": lambda S, Q, scale: read_all(S, Q, scale**2),
            "scale_own": lambda S, Q, scale: read_all(S, Q, len(S) ** -0.5),
        },
    ),
    Untouched("untouched", draw_queries, read_all),
)

# -- 01.interference -------------------------------------------------------------------------------


def draw_unit_pairs(rng: Rng):
    """Unit keys, values, and the number of a pair that has others before and after it."""
    N, K, V = sizes(rng, 3)
    return unit(normal(rng, N, K)), normal(rng, N, V), int(rng.integers(1, N - 1))


def draw_long_pairs(rng: Rng):
    """Keys of lengths between 1.2 and 2."""
    k, v, j = draw_unit_pairs(rng)
    return k * rng.uniform(1.2, 2.0, (len(k), 1)).astype(np.float32), v, j


def draw_repeated_key(rng: Rng):
    """Unit keys, and key j was stored before, with another value."""
    k, v, j = draw_unit_pairs(rng)
    k[rng.integers(0, j)] = k[j]
    return k, v, j


def crosstalk(k, v, j, mistake=""):
    """The sum over i != j of (k_i . k_j) v_i."""
    weights, number = k @ k[j], np.arange(len(k))
    if mistake == "cosines":
        weights = weights / np.linalg.norm(k, axis=1) / np.linalg.norm(k[j])
    others = {
        "own_included": number >= 0,
        "own_only": number == j,
        "earlier_only": number < j,
        "same_key_left_out": (k != k[j]).any(1),
    }.get(mistake, number != j)
    sign = -1 if mistake == "sign_turned" else 1
    part = sign * (weights * others) @ v
    return (part + weights[j] * v[j] - v[j] if mistake == "unit_assumed" else part,)


INTERFERENCE = (
    Check(
        "others",
        draw_unit_pairs,
        crosstalk,
        mistakes(crosstalk, "own_included", "own_only", "earlier_only", "sign_turned"),
    ),
    Check("lengths", draw_long_pairs, crosstalk, mistakes(crosstalk, "unit_assumed", "cosines")),
    Check("repeated", draw_repeated_key, crosstalk, mistakes(crosstalk, "same_key_left_out")),
    Untouched("untouched", draw_unit_pairs, crosstalk),
)

# -- 01.causal_attention ---------------------------------------------------------------------------


def sequence(rng: Rng, B: int, T: int, H: int, K: int, V: int, scale: float | None = None):
    """The arguments of a whole recurrence; keys come back, and the state is not empty at the start."""
    k = returning_keys(rng, B, T, H, K)
    scale = float(rng.uniform(0.2, 0.6)) if scale is None else scale
    return normal(rng, B, T, H, K), k, normal(rng, B, T, H, V), scale, normal(rng, B, H, K, V)


def small(rng: Rng, B=1, T=7, H=1, scale: float | None = 1.0):
    return sequence(rng, B, T, H, *two_sizes(rng), scale)


def last_state(*inputs, mistake=""):
    return None, walk(*inputs, mistake=mistake)[1]


def outputs(*inputs, mistake=""):
    return walk(*inputs, mistake=mistake)[0], None


def scaled(change):
    """The outputs under another scale than the one that was given."""
    return lambda q, k, v, scale, initial: outputs(q, k, v, change(scale), initial)


def scaled_state(q, k, v, scale, initial):
    return last_state(q, k, scale * v, 1.0, initial)


RULE = ("erased_first", "old_pairs_lost", "key_normalised")

ATTENTION = (
    Check(
        "state",
        partial(small, scale=None),
        last_state,
        {
            **mistakes(last_state, *RULE, "initial_ignored", "last_token_dropped"),
            "state_scaled": scaled_state,
        },
    ),
    Check(
        "order",
        small,
        outputs,
        mistakes(
            outputs,
            "own_pair_missing",
            "future_seen",
            "initial_not_read",
            "last_token_dropped",
            *RULE,
        ),
    ),
    Check(
        "scale",
        partial(small, scale=None),
        outputs,
        {
            "scale_forgotten": scaled(lambda scale: 1.0),
            "scale_twice": scaled(lambda scale: scale**2),
            **mistakes(outputs, "initial_not_scaled"),
        },
    ),
    Check("heads", partial(small, B=2, T=9, H=2), walk, {"heads_reshaped": walk_heads_first}),
    Untouched("untouched", partial(small, B=2, H=2), walk),
)

# -- 01.memory_kernel ------------------------------------------------------------------------------


def full_tile(rng: Rng):
    """K and V are powers of two, so no lane of the tile hangs over."""
    return sequence(rng, 1, 5, 1, 8, 4, scale=1.0)


def wide_tile(rng: Rng):
    return sequence(rng, 1, 5, 1, 4, 8)


def ragged_tile(rng: Rng):
    return sequence(rng, 1, 5, 1, *rng.permutation([5, 11]).tolist(), scale=1.0)


def many_heads(rng: Rng):
    return sequence(rng, 2, 7, 2, 8, 4, scale=1.0)


KERNEL = (
    Check("rule", full_tile, walk, mistakes(walk, "read_before_write", *RULE)),
    Check(
        "scale",
        wide_tile,
        walk,
        {
            "scale_forgotten": scaled(lambda scale: 1.0),
            "scale_twice": scaled(lambda scale: scale**2),
            "state_scaled": scaled_state,
        },
    ),
    Check("masks", ragged_tile, walk),
    Check("heads", many_heads, walk, {"rows_by_head": walk_heads_first}),
    Untouched("untouched", full_tile, walk),
)

CHECKS = {
    "01.write": WRITE,
    "01.read_all": READ_ALL,
    "01.interference": INTERFERENCE,
    "01.causal_attention": ATTENTION,
    "01.memory_kernel": KERNEL,
}
