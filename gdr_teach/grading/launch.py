"""How the grader launches a learner's kernel: allocation, grid and arguments. Exercises show this source."""

from collections.abc import Callable

from torch import Tensor


def launch_memory(memory_kernel, q, k, v, scale, initial_state) -> tuple[Tensor, Tensor]:
    """Linear attention over a batch of sequences: one program per sequence and head."""
    from gdr_teach.runtime import new_empty, next_power_of_2

    B, T, H, K = k.shape
    V = v.shape[-1]
    o = new_empty((B, T, H, V), dtype=v.dtype, device=v.device)  # undefined until stored
    state = new_empty((B, H, K, V), dtype=v.dtype, device=v.device)
    tile = {"BK": next_power_of_2(K), "BV": next_power_of_2(V)}  # a tile covers the whole state
    memory_kernel[(B * H,)](q, k, v, initial_state, o, state, scale, T, H, K, V, **tile)
    return o, state


def launch_delta(delta_kernel, q, k, v, beta, scale, initial_state) -> tuple[Tensor, Tensor]:
    """The delta rule over a batch of sequences: one program per sequence and head."""
    from gdr_teach.runtime import new_empty, next_power_of_2

    B, T, H, K = k.shape
    V = v.shape[-1]
    o = new_empty((B, T, H, V), dtype=v.dtype, device=v.device)  # undefined until stored
    state = new_empty((B, H, K, V), dtype=v.dtype, device=v.device)
    tile = {"BK": next_power_of_2(K), "BV": next_power_of_2(V)}  # a tile covers the whole state
    delta_kernel[(B * H,)](q, k, v, beta, initial_state, o, state, scale, T, H, K, V, **tile)
    return o, state


LAUNCH: dict[str, Callable] = {
    "01.memory_kernel": launch_memory,
    "02.delta_kernel": launch_delta,
}
