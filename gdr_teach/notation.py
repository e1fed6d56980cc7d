"""The letters, the shapes, and what an operator returns.

B batch, T time, H heads, K key width, V value width, N sequences (B of them, or the packed documents), C chunk.
docs/notation.md is the same table for readers.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Output(NamedTuple):
    """What every rule returns: `o` [B, T, H, V] in v's dtype and `state` [N, H, K, V] in the state's dtype."""

    o: Tensor
    state: Tensor


class Path(NamedTuple):
    """The way a call takes, as told by `gdr_teach.explain`.

    backend is "torch" or "triton"; mode is "recurrent" or "chunk"; chunk_size is 0 for the recurrence;
    segments is the number of pieces one sequence is cut into; launches counts the kernels of one forward
    call (0 for plain PyTorch, which launches what PyTorch decides).
    """

    backend: str
    mode: str
    chunk_size: int
    segments: int
    launches: int


class Sizes(NamedTuple):
    """The sizes of one call; N is the number of sequences."""

    B: int
    T: int
    H: int
    K: int
    V: int
    N: int


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the state is kept and accumulated in: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_like(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape [N, H, K, V] and dtype of the states of a call."""
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (N, q.shape[2], q.shape[3], v.shape[3]), state_dtype(q.dtype)
