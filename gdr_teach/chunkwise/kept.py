"""What an operator's forward hands to its backward: six tensors whatever the way, for an operator's outputs are fixed.

By chunks in Triton they are `tied.Prepared`, in PyTorch `wy.Kept`; what is not there is an empty tensor. torch alone.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def padded(kept: Iterable[Tensor | None], like: Tensor) -> Six:
    """Six tensors: those kept, then empty ones."""
    given = [like.new_empty(0) if x is None else x for x in kept]
    first, second, third, fourth, fifth, sixth = given + [
        like.new_empty(0) for _ in range(6 - len(given))
    ]
    return first, second, third, fourth, fifth, sixth


def kept_like(q: Tensor, v: Tensor, C: int) -> list[Tensor]:
    """Tensors of the shapes and dtypes of `wy.Kept` for q [B, T, H, K] and v [B, T, H, V]."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    exact = torch.float32 if q.device.type == "mps" else torch.float64
    shape = (-(-T // C), B * H)
    X = q.new_empty((*shape, C, C), dtype=exact)
    A, L = (q.new_empty((*shape, C, C), dtype=dtype) for _ in range(2))
    ends = ((C, K), (C, V), (K, V))
    return [X, A, L, *(q.new_empty((*shape, *end), dtype=dtype) for end in ends)]
