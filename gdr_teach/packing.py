"""Packed sequences: several documents side by side on one time axis, told apart by `cu_seqlens`.

    cu_seqlens = [0, e_1, e_2, ..., T]        document n holds the tokens e_n <= t < e_{n+1}

The definition is a loop: each document is a sequence of its own, with its own start state.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def documents(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """The (start, end) of every document, as Python integers."""
    return list(pairwise(cu_seqlens.tolist()))


def per_document(
    rule: Callable[..., Sequence[Tensor]],
    cu_seqlens: Tensor,
    tokens: Sequence[Tensor],
    states: Mapping[str, Tensor | None],
    **options,
) -> tuple[Tensor, ...]:
    """Run `rule` on every document alone and put the results side by side again.

    tokens have the time on axis 1, states the sequence on axis 0. The rule gives back any number of tensors along
    time and then one along the sequences: a forward (o, state), a backward (dq, dk, dv, dbeta, dstate0).
    """
    results = []
    for n, (start, end) in enumerate(documents(cu_seqlens)):
        own = {name: x if x is None else x[n : n + 1] for name, x in states.items()}
        results.append(rule(*(x[:, start:end] for x in tokens), **own, **options))
    if not results:  # no document at all: let the rule say what empty looks like
        none = {
            name: x if x is None else x.new_zeros((1, *x.shape[1:])) for name, x in states.items()
        }
        *along_time, state = rule(*tokens, **none, **options)
        return (*along_time, state[:0])
    *along_time, state = zip(*results, strict=True)
    return (*(torch.cat(x, dim=1) for x in along_time), torch.cat(state, dim=0))
