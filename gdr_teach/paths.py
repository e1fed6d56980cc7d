"""Which way a call takes: backend, mode, chunk size. `explain` tells it, the operators follow it."""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arguments import TRITON_WIDTH, check_positive_int, check_triton
from .chunkwise.tiles import SHORTEST, target_of, tiles, untied_tiles
from .notation import Path, Sizes

_FOUND_TRITON = (
    importlib.util.find_spec("triton") is not None
)  # torch.compile cannot trace the search
CHUNK_SIZE = 32  # of plain PyTorch; figures in docs/log.md
SHORT = 16  # up to this many tokens "auto" takes the recurrence


def explain(op: Callable, *args, **kwargs) -> Path:
    """Path(backend, mode, chunk_size, segments, launches) of `op(*args, **kwargs)`, without computing it.

    Args: op, one of the package's operators, then its own arguments.
    Raises: what the call itself would raise for its arguments, and TypeError when op is not an operator of gdr_teach.
    """
    home = getattr(op, "__module__", None) or ""
    module: Any = sys.modules.get(home)
    if not home.startswith("gdr_teach.") or not hasattr(module, "path"):
        raise TypeError(f"explain: op must be an operator such as gdr_teach.delta_rule, got {op!r}")
    return module.path(*args, **kwargs)


def choose(
    op: str,
    sizes: Sizes,
    q: Tensor,
    mode: str,
    backend: str,
    *,
    segments: int = 1,
    decay: bool = False,
    untied: bool = False,
) -> Path:
    """The way for one call whose arguments are already checked.

    segments: how many pieces the caller allows a sequence, fewer where it is too short for them. decay: the rule has
    one; untied: it reads and writes along directions of its own. Either asks for other tiles.
    "auto" takes triton for CUDA tensors where it is installed and the sizes fit its kernels, else torch.
    Raises: ValueError or TypeError when triton was asked for and cannot do it, ImportError when it is missing.
    """
    check_positive_int(op, "segments", segments)
    short = mode == "recurrent" or (mode == "auto" and sizes.T <= SHORT)
    if backend == "auto":
        fits = max(sizes.K, sizes.V) <= TRITON_WIDTH and q.dtype != torch.float64
        backend = "triton" if q.device.type == "cuda" and fits and has_triton() else "torch"
    if backend == "triton":
        check_triton(op, sizes, q)
        if not has_triton():
            raise ImportError(
                f"{op}: backend 'triton' wants the package triton, which is not installed. On Linux: "
                "pip install 'triton>=3.6'. Elsewhere use backend='torch'."
            )
        # float32 by chunks is six products for one, its speed not measured; the token kernels lose no digit
        if short or (mode == "auto" and q.dtype == torch.float32):
            return Path("triton", "recurrent", 0, 1, 1)
        choice = untied_tiles if untied else tiles
        C = choice(target_of(q.device), q.dtype, sizes.K, sizes.V, decay=decay).C
        # inside a chunk they count in int32: the rows of its tokens, the longest of which has so many numbers
        row, name = (
            (sizes.K + sizes.V, "(K + V)") if untied else (max(sizes.K, sizes.V), "max(K, V)")
        )
        if C * sizes.H * max(row, C) >= 2**31:
            if mode == "auto":
                return Path("triton", "recurrent", 0, 1, 1)
            limit = f"H < {2**31 // C**2}" if row < C else f"H * {name} < {2**31 // C}"
            raise ValueError(
                f"{op}: mode 'chunk' with backend 'triton' wants {limit}, got H = {sizes.H}, K = {sizes.K}, "
                f"V = {sizes.V}; use mode='recurrent' or backend='torch'"
            )
        # of no length up to T more pieces would be made than this; by the length alone, never by what lies beside it
        segments = max(1, min(segments, -(-sizes.T // (C * SHORTEST))))
        launches = 3 if untied else 2
        return Path("triton", "chunk", C, segments, launches + 3 * (segments > 1))
    if short:
        return Path("torch", "recurrent", 0, 1, 0)
    return Path("torch", "chunk", CHUNK_SIZE, 1, 0)


def has_triton() -> bool:
    """Whether the package triton is installed."""
    return _FOUND_TRITON
