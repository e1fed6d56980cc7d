"""How big the tiles of the chunk kernels are: by what is compiled for, the dtype and the widths.

Found by compiling every choice (`make compile-check` prints what each asks for) and, for sm_90, timing some on a GPU
(docs/log.md). A tile that spills or does not fit is replaced by a smaller one, and `gdr_teach.explain` tells its chunk.
Needs torch alone, so that `explain` works without triton.
"""

from math import log
from typing import NamedTuple

import torch

SHORTEST = 4  # chunks in a segment at least: a step of `combine` reads as much as two to four chunks of a walk


class Stage(NamedTuple):
    """Tile widths and warps of one kernel: BK of the K channels, BV of the V columns."""

    BK: int
    BV: int
    warps: int
    stages: int = 1


class Tiles(NamedTuple):
    """One call's choice: the chunk size and the four kernels."""

    C: int
    prepare: Stage
    scan: Stage
    reverse: Stage
    grads: Stage


def target_of(device: torch.device) -> str:
    """The name of `aot.TARGETS` whose tiles a device takes; "cpu" where kernels are interpreted."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return "gfx942"
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return "sm_90" if shared >= 232_448 else "sm_80"


def tiles(target: str, dtype: torch.dtype, K: int, V: int, *, decay: bool) -> Tiles:
    """The tiles of one call; K and V up to 256.

    C = 64 makes products of 64 x 64 x 64, which Hopper's tensor cores take from registers; with decay they would
    spill thousands of bytes, and there and everywhere else C = 32 makes smaller ones. float32 wants C = 16: its
    error grows as C squared where keys repeat, and a product is six.
    """
    BK, BV, half = width(K, target), width(V, target), dtype in (torch.float16, torch.bfloat16)
    wide = BK > 128  # then the state alone takes half of the registers
    if dtype == torch.float32:
        walk = Stage(BK, min(BV, 16), 8 if wide and target != "gfx942" else 4, 2)
        return Tiles(16, Stage(min(BK, 16), 0, 4), walk, walk, Stage(min(BK, 64), min(BV, 16), 4))
    if not half or (target in ("sm_90", "cpu") and not decay and not wide):
        walk = Stage(BK, min(BV, 64), 4, 2)
        return Tiles(64, Stage(min(BK, 64), 0, 4), walk, walk, Stage(min(BK, 64), min(BV, 64), 4))
    walk = Stage(BK, min(BV, 16 if wide else 32), 4, 1 if wide else 2)
    prepare = Stage(min(BK, 32 if decay and dtype == torch.float16 else 64), 0, 4)
    return Tiles(32, prepare, walk, walk, Stage(min(BK, 64), min(BV, 32), 4))


def width(n: int, target: str) -> int:
    """The power of two that holds n; compiled products want at least 16."""
    return max(1 << (n - 1).bit_length(), 1 if target == "cpu" else 16)


def levels(dtype: torch.dtype, C: int, bound: float | None) -> tuple[int, float]:
    """LEVELS and FLOOR of `chunkwise.decay`: halvings down to blocks with one reference, and their gates' floor.

    A factor in such a block lies between exp(-reach / 2) and exp(reach / 2), and without decay it is exp(reach / 2):
    a power of two, which rounds nothing. bfloat16 has room for 2^86: without a promise (bound) its blocks have 8
    tokens, and gates below -17 count as -17, 4e-8 in place of less. float16 has room for 2^4 before digits go, and
    float32 and float64 want every digit: blocks of 1.
    """
    reach = {torch.bfloat16: 172 * log(2), torch.float16: 8 * log(2)}.get(dtype, 0.0)
    block = 8 if dtype == torch.bfloat16 else 1
    if bound is not None and reach:
        while 2 * block <= C and (2 * block - 1) * -bound <= reach:
            block *= 2
    block = min(block, C)
    return (C // block).bit_length() - 1, -reach / max(block - 1, 1)


class UntiedTiles(NamedTuple):
    """One call's choice for the untied family: the chunk size and the six kernels."""

    C: int
    prepare: Stage
    reads: Stage  # BV: columns of either kind, of K or of V
    scan: Stage
    reverse: Stage
    values: Stage
    keys: Stage


def untied_tiles(target: str, dtype: torch.dtype, K: int, V: int, *, decay: bool) -> UntiedTiles:
    """The tiles of one call of the untied family; K and V up to 256. Why these sizes: see `tiles`."""
    BK, BV, half = width(K, target), width(V, target), dtype in (torch.float16, torch.bfloat16)
    wide = BK > 128
    if dtype == torch.float32:
        walk = Stage(BK, min(BV, 16), 8 if wide and target != "gfx942" else 4, 2)
        small = Stage(min(BK, 16), min(BV, 16), 4)
        return UntiedTiles(16, small, small, walk, walk, small, Stage(min(BK, 64), min(BV, 16), 4))
    if not half or (target in ("sm_90", "cpu") and not decay and not wide):
        walk, part = Stage(BK, min(BV, 64), 4, 2), Stage(min(BK, 64), min(BV, 64), 4)
        return UntiedTiles(64, part, part, walk, walk, part, part)
    walk = Stage(BK, min(BV, 16 if wide else 32), 4, 1 if wide else 2)
    part = Stage(min(BK, 64), min(BV, 32), 4)
    prepare = Stage(min(BK, 32 if decay else 64), 0, 4)
    keys = Stage(min(BK, 32), min(BV, 32), 4) if decay and target == "gfx942" else part
    return UntiedTiles(32, prepare, part, walk, walk, part, keys)
