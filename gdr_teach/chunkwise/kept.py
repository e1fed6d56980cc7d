"""What an operator's forward hands to its backward: so many tensors whatever the way, for its outputs are fixed.

The tied family's operators hand over six: by chunks in Triton `tied.Prepared`, in PyTorch `wy.Kept`. The untied one's
hand over eight: `untied.Prepared` or `affine.Kept`. A call in segments adds two tensors to what is prepared. What is
not there is an empty tensor. torch alone.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..notation import state_dtype

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


def prepared_like(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, C: int, G: int, *, decay: bool
) -> list[Tensor]:
    """The same of `tied.Prepared`, and where G, the segments, are more than one, of the S and M beside it."""
    (B, T, slots), (H, K), gates = _joined(q, cu_seqlens, C, G), q.shape[2:], (0,)
    A = (B, T, H, C) if decay or q.dtype == torch.float32 else gates
    operands, fade = ((3, B, T, H, K), (slots, H, 2, K)) if decay else (gates, gates)
    kept = [q.new_empty(shape) for shape in ((2, B, T, H, C), A, operands)]
    return [*kept, _state(q, fade), *_maps(q, v, cu_seqlens, G)]


def untied_prepared_like(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, C: int, G: int, *, decay: bool
) -> list[Tensor]:
    """The same of `untied.Prepared`."""
    (B, T, slots), (H, K), gates = _joined(q, cu_seqlens, C, G), q.shape[2:], (0,)
    operands, fade = ((4, B, T, H, K), (slots, H, K)) if decay else (gates, gates)
    kept = [q.new_empty(shape) for shape in ((2, B, T, H, C), (3, B, T, H, C), operands)]
    reads = (q.new_empty((B, T, H, K + v.shape[-1])) for _ in range(2))
    return [*kept, _state(q, fade), *reads, *_maps(q, v, cu_seqlens, G)]


def _joined(q: Tensor, cu_seqlens: Tensor | None, C: int, G: int) -> tuple[int, int, int]:
    # batch and tokens as the kernels see them, and their chunk slots: segments are documents of one sequence
    B, T = q.shape[:2]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if G == 1:
        return B, T, N * -(-T // C) if cu_seqlens is None else T // C + N
    return 1, B * T, B * T // C + N * G


def _state(q: Tensor, shape: tuple[int, ...]) -> Tensor:
    return q.new_empty(shape, dtype=state_dtype(q.dtype) if shape != (0,) else q.dtype)


def _maps(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, G: int) -> list[Tensor]:
    # S [N G, H, K, V] and M [N G, H, K, K] of `segments`
    if G == 1:
        return []
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return [_state(q, (N * G, *q.shape[2:], width)) for width in (v.shape[-1], q.shape[-1])]


def _of_chunks(q: Tensor, C: int) -> tuple[tuple[int, int], torch.dtype, torch.dtype]:
    # [N, B H], the dtype of what is computed, and that of the solved triangle
    B, T, H, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    exact = torch.float32 if q.device.type == "mps" else torch.float64
    return (-(-T // C), B * H), dtype, exact


def _filled(kept: Iterable[Tensor | None], like: Tensor, n: int) -> list[Tensor]:
    given = [like.new_empty(0) if x is None else x for x in kept]
    return given + [like.new_empty(0) for _ in range(n - len(given))]
