"""Checks of exercise 02, the delta rule. Each one isolates an idea as far as its data can.

The reference is this file's own: plain numpy in float64, written from equations (2.1) to (2.4), so that a fault in
the package cannot pass as the truth about a learner's answer.
"""

from functools import partial

import numpy as np

from ..checks import Check, Untouched
from .data import Rng, memory, memory_without_key, mistakes, normal, returning_keys, two_sizes

# -- the rule, right and wrong ---------------------------------------------------------------------


def step(S, k, v, beta, mistake=""):
    """S + k (beta (v - S^T k))^T for any leading dimensions; `mistake` names one way to get it wrong."""
    beta = np.asarray(beta)[..., None]
    if mistake == "beta_dropped":
        beta = np.ones_like(beta)
    if mistake == "beta_twice":
        beta = beta**2
    if mistake == "key_normalised":
        k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    held = np.einsum("...kv,...k->...v", S, k)  # what the memory holds under k
    u = {
        "hebbian": beta * v,
        "erase_only": -beta * held,
        "erase_full": beta * v - held,
        "wrong_sign": beta * (v + held),
    }.get(mistake, beta * (v - held))
    return S + k[..., :, None] * u[..., None, :]


def walk(q, k, v, beta, scale, initial, mistake=""):
    """The outputs and the last state over all tokens; q, k [B,T,H,K], v [B,T,H,V], initial [B,H,K,V]."""
    S = np.zeros_like(initial) if mistake == "initial_ignored" else initial
    o = np.zeros(v.shape)
    tokens = k.shape[1] - (mistake == "last_token_dropped")
    for t in range(tokens):
        before, S = S, step(S, k[:, t], v[:, t], beta[:, t], mistake)
        seen = before if mistake == "read_before_write" else S
        o[:, t] = scale * np.einsum("bhkv,bhk->bhv", seen, q[:, t])
    return o, S


# -- inputs ----------------------------------------------------------------------------------------


def sequence(rng: Rng, B: int, T: int, H: int, K: int, V: int, scale: float | None = None):
    """The arguments of a whole recurrence; keys come back, and the state is not empty at the start."""
    k = returning_keys(rng, B, T, H, K)
    beta = rng.uniform(0.3, 1.3, (B, T, H)).astype(np.float32)
    scale = float(rng.uniform(0.2, 0.6)) if scale is None else scale
    return (
        normal(rng, B, T, H, K), k, normal(rng, B, T, H, V), beta, scale, normal(rng, B, H, K, V),
    )  # fmt: skip


def small(rng: Rng, B=1, T=7, H=1, scale: float | None = 1.0):
    return sequence(rng, B, T, H, *two_sizes(rng), scale)


# -- 02.read ---------------------------------------------------------------------------------------


def draw_read(rng: Rng, scale: float | None = None):
    K, V = two_sizes(rng)
    return normal(rng, K, V), normal(rng, K), scale or float(rng.uniform(0.2, 0.6))


def read(S, q, scale):
    return (scale * (S.T @ q),)


READ = (
    Check("columns", partial(draw_read, scale=1.0), read),
    Check(
        "scale",
        draw_read,
        read,
        {
            "scale_forgotten": lambda S, q, scale: read(S, q, 1.0),
            "scale_twice": lambda S, q, scale: read(S, q, scale**2),
            "scale_own": lambda S, q, scale: read(S, q, len(q) ** -0.5),
        },
    ),
    Untouched("untouched", draw_read, read),
)

# -- 02.delta_step ---------------------------------------------------------------------------------


def draw_overwrite(rng: Rng):
    return *memory(rng), 1.0


def draw_empty_key(rng: Rng):
    """A memory that holds nothing under k, so that the erasing does not matter."""
    return *memory_without_key(rng), float(rng.uniform(0.3, 0.7))


def draw_half_step(rng: Rng):
    return *memory(rng), float(rng.uniform(0.3, 0.7))


def draw_long_key(rng: Rng):
    """A key of length 1.5 under which nothing is held, beta = 1: only its length matters."""
    S, k, v, _ = draw_empty_key(rng)
    return S, np.float32(1.5) * k, v, 1.0


def one_step(S, k, v, beta, mistake=""):
    return (step(S, k, v, beta, mistake),)


STEP = (
    Check(
        "overwrite",
        draw_overwrite,
        one_step,
        mistakes(one_step, "hebbian", "erase_only", "wrong_sign"),
    ),
    Check(
        "write_rate",
        draw_empty_key,
        one_step,
        mistakes(one_step, "beta_dropped", "beta_twice", "erase_only"),
    ),
    Check(
        "erase_rate",
        draw_half_step,
        one_step,
        mistakes(one_step, "erase_full", "beta_dropped", "beta_twice", "hebbian", "wrong_sign"),
    ),
    Check("long_key", draw_long_key, one_step, mistakes(one_step, "key_normalised", "erase_only")),
    Untouched("untouched", draw_half_step, one_step),
)

# -- 02.gradient -----------------------------------------------------------------------------------


def gradient(S, k, v):
    return (np.outer(k, S.T @ k - v),)


def draw_solved(rng: Rng):
    """A memory that already holds v under k."""
    S, k, v = memory(rng)
    return step(S, k, v, 1.0).astype(np.float32), k, v


def near_zero(S, k, v):
    return (np.zeros_like(S),)


GRADIENT = (
    Check(
        "slope",
        memory,
        gradient,
        {
            "downhill": lambda S, k, v: (-gradient(S, k, v)[0],),
            "factor_two": lambda S, k, v: (2 * gradient(S, k, v)[0],),
            "no_residual": lambda S, k, v: (-np.outer(k, v),),
            "no_target": lambda S, k, v: (np.outer(k, S.T @ k),),
        },
    ),
    Check("solved", draw_solved, near_zero),
    Untouched("untouched", memory, gradient),
)

# -- 02.delta_loop ---------------------------------------------------------------------------------

RULE = ("hebbian", "beta_dropped", "beta_twice", "erase_full", "wrong_sign", "key_normalised")
ORDER = ("initial_ignored", "last_token_dropped")


def last_state(*inputs, mistake=""):
    return None, walk(*inputs, mistake=mistake)[1]


def outputs(*inputs, mistake=""):
    return walk(*inputs, mistake=mistake)[0], None


def without_scale(q, k, v, beta, scale, initial):
    return outputs(q, k, v, beta, 1.0, initial)


LOOP = (
    Check("state", partial(small, scale=None), last_state, mistakes(last_state, *RULE, *ORDER)),
    Check("order", small, outputs, mistakes(outputs, "read_before_write", *RULE, *ORDER)),
    Check(
        "scale",
        partial(small, scale=None),
        outputs,
        {"scale_forgotten": without_scale},
    ),
    Check("heads", partial(small, B=2, T=19, H=2), walk),
    Untouched("untouched", partial(small, B=2, H=2), walk),
)

# -- 02.delta_kernel -------------------------------------------------------------------------------


def full_tile(rng: Rng):
    """K and V are powers of two, so no lane of the tile hangs over."""
    return sequence(rng, 1, 5, 1, 8, 4, scale=1.0)


def wide_tile(rng: Rng):
    return sequence(rng, 1, 5, 1, 4, 8)


def ragged_tile(rng: Rng):
    return sequence(rng, 1, 5, 1, *rng.permutation([5, 11]).tolist(), scale=1.0)


def many_heads(rng: Rng):
    return sequence(rng, 2, 19, 2, 8, 4, scale=1.0)


KERNEL = (
    Check("rule", full_tile, walk, mistakes(walk, "read_before_write", *RULE, *ORDER)),
    Check("scale", wide_tile, walk, {"scale_forgotten": without_scale}),
    Check("masks", ragged_tile, walk),
    Check("heads", many_heads, walk),
    Untouched("untouched", full_tile, walk),
)

CHECKS = {
    "02.read": READ,
    "02.delta_step": STEP,
    "02.gradient": GRADIENT,
    "02.delta_loop": LOOP,
    "02.delta_kernel": KERNEL,
}
