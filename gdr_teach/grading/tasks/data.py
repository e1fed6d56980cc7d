"""Inputs that several exercises draw: K is never V, memories are never empty, and keys come back."""

from collections.abc import Callable
from functools import partial

import numpy as np

Rng = np.random.Generator


def normal(rng: Rng, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    """The same directions, of length one."""
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def sizes(rng: Rng, count: int) -> list[int]:
    """Sizes of axes, no two of them equal."""
    return rng.choice(np.arange(3, 9), count, replace=False).tolist()


def two_sizes(rng: Rng) -> tuple[int, int]:
    """K and V, never equal."""
    K, V = sizes(rng, 2)
    return K, V


def memory(rng: Rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A filled state, a key of length one, a value."""
    K, V = two_sizes(rng)
    return normal(rng, K, V), unit(normal(rng, K)), normal(rng, V)


def memory_without_key(rng: Rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same, but the state holds nothing under the key."""
    S, k, v = memory(rng)
    S -= np.outer(k, k @ S)
    return S, k, v


def returning_keys(rng: Rng, B: int, T: int, H: int, K: int) -> np.ndarray:
    """Keys [B, T, H, K] of lengths around one; some are met again two tokens later."""
    k = unit(normal(rng, B, T, H, K)) * rng.uniform(0.8, 1.1, (B, T, H, 1)).astype(np.float32)
    k[:, 3::4] = k[:, 1 : T - 2 : 4]
    return k


def mistakes(model: Callable, *names: str) -> dict[str, Callable]:
    """Suspects for a check: the model with each of these mistakes in it."""
    return {name: partial(model, mistake=name) for name in names}
