"""What an operator's forward hands to its backward: so many tensors whatever the way, for its outputs are fixed.

The tied family's operators hand over six: by chunks in Triton `tied.Prepared`, in PyTorch `wy.Kept`. The untied one's
hand over eight: `untied.Prepared` or `affine.Kept`. What is not there is an empty tensor. torch alone.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def padded(kept: Iterable[Tensor | None], like: Tensor) -> Six:
    """Six tensors: those kept, then empty ones."""
    first, second, third, fourth, fifth, sixth = _filled(kept, like, 6)
    return first, second, third, fourth, fifth, sixth


def padded_to_eight(kept: Iterable[Tensor | None], like: Tensor) -> Eight:
    """Eight tensors: those kept, then empty ones."""
    *six, seventh, eighth = _filled(kept, like, 8)
    return *padded(six, like), seventh, eighth


def kept_like(q: Tensor, v: Tensor, C: int) -> list[Tensor]:
    """Tensors of the shapes and dtypes of `wy.Kept` for q [B, T, H, K] and v [B, T, H, V]."""
    shape, dtype, exact = _of_chunks(q, C)
    K, V = q.shape[-1], v.shape[-1]
    X = q.new_empty((*shape, C, C), dtype=exact)
    A, L = (q.new_empty((*shape, C, C), dtype=dtype) for _ in range(2))
    ends = ((C, K), (C, V), (K, V))
    return [X, A, L, *(q.new_empty((*shape, *end), dtype=dtype) for end in ends)]


def affine_kept_like(q: Tensor, v: Tensor, C: int) -> list[Tensor]:
    """The same of `affine.Kept`: X, XA, U, starts, QB, QK, AB, AK."""
    shape, dtype, exact = _of_chunks(q, C)
    K, V = q.shape[-1], v.shape[-1]
    X = q.new_empty((*shape, C, C), dtype=exact)
    ends = ((C, K), (C, V), (K, V), *((C, C) for _ in range(4)))
    return [X, *(q.new_empty((*shape, *end), dtype=dtype) for end in ends)]


def _of_chunks(q: Tensor, C: int) -> tuple[tuple[int, int], torch.dtype, torch.dtype]:
    # [N, B H], the dtype of what is computed, and that of the solved triangle
    B, T, H, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    exact = torch.float32 if q.device.type == "mps" else torch.float64
    return (-(-T // C), B * H), dtype, exact


def _filled(kept: Iterable[Tensor | None], like: Tensor, n: int) -> list[Tensor]:
    given = [like.new_empty(0) if x is None else x for x in kept]
    return given + [like.new_empty(0) for _ in range(n - len(given))]
