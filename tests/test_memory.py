"""Chapter 1's claims in float64: every identity holds to 1e-12."""

import itertools
import re

import pytest
import torch

from gdr_teach import memory

TIGHT = 1e-12
SIZES = [(1, 1, 1, 1, 1), (2, 5, 3, 4, 7), (1, 0, 2, 3, 2), (2, 1, 1, 5, 3), (1, 33, 2, 16, 9)]


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def far(x, y):
    """The largest difference, or 0 when there is nothing to compare."""
    assert x.shape == y.shape
    assert x.dtype == y.dtype
    return (x - y).abs().max().item() if x.numel() else 0.0


def attention_inputs(B, T, H, K, V, dtype=torch.float64):
    q, k = (draw(B, T, H, K, dtype=dtype) for _ in range(2))
    return q, k, draw(B, T, H, V, dtype=dtype)


@pytest.mark.parametrize("T", [0, 1, 6])
def test_hebbian_state_is_T_writes(T):
    k, v = draw(2, T, 3), draw(2, T, 5)
    S = torch.zeros(2, 3, 5, dtype=torch.float64)
    for t in range(T):
        S = memory.write(S, k[:, t], v[:, t])
    assert far(memory.hebbian_state(k, v), S) <= TIGHT


def test_order_of_writes_does_not_matter():
    k, v = draw(4, 3), draw(4, 2)
    S = memory.hebbian_state(k, v)
    for order in itertools.permutations(range(4)):
        assert far(memory.hebbian_state(k[list(order)], v[list(order)]), S) <= TIGHT


def test_orthonormal_keys_recall_exactly():
    k = torch.linalg.qr(draw(7, 7)).Q[:5]  # five orthonormal rows
    v = draw(5, 3)
    S = memory.hebbian_state(k, v)
    assert memory.recall_error(S, k, v).max() <= TIGHT
    assert memory.recall_error(S + 1, k, v).min() > 0.01  # the measure does see a wrong state


def test_recall_is_value_plus_crosstalk():
    k, v = draw(6, 4), draw(6, 3)
    S = memory.hebbian_state(k, v)
    G = k @ k.mT  # [T, T], G[i, j] = k_i . k_j
    for j in range(6):
        crosstalk = sum(G[i, j] * v[i] for i in range(6) if i != j)
        assert far(memory.read(S, k[j]), G[j, j] * v[j] + crosstalk) <= TIGHT  # (1.3)


def test_recall_error_of_two_keys_is_their_cosine():
    c = 0.6
    k = torch.tensor([[1.0, 0.0], [c, (1 - c**2) ** 0.5]], dtype=torch.float64)
    v = torch.eye(2, dtype=torch.float64)
    error = memory.recall_error(memory.hebbian_state(k, v), k, v)
    assert far(error, torch.full((2,), c, dtype=torch.float64)) <= TIGHT


@pytest.mark.parametrize(("T", "K"), [(2, 5), (9, 4), (40, 16)])
def test_squared_error_of_random_unit_keys(T, K):
    k, v = (torch.nn.functional.normalize(draw(4000, T, width), dim=-1) for width in (K, 3))
    v[:, 1:] = v[:, :1]  # whatever the values: here all of a memory are the same
    error = memory.recall_error(memory.hebbian_state(k, v), k, v).square().mean(-1)
    assert abs(error.mean() - (T - 1) / K) <= 5 * error.std() / 4000**0.5  # (1.3b)


def test_read_scales_and_is_linear():
    S, q = draw(2, 3, 5), draw(2, 3)
    assert far(memory.read(S, q, scale=0.5), 0.5 * memory.read(S, q)) <= TIGHT
    assert far(memory.read(S, 2 * q), 2 * memory.read(S, q)) <= TIGHT


@pytest.mark.parametrize(("B", "T", "H", "K", "V"), SIZES)
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("scale", [None, 1.7])
def test_recurrence_equals_masked_form(B, T, H, K, V, started, scale):
    x = attention_inputs(B, T, H, K, V)
    S0 = draw(B, H, K, V) if started else None
    slow = memory.linear_attention_recurrence(*x, scale=scale, initial_state=S0)
    fast = memory.linear_attention_masked(*x, scale=scale, initial_state=S0)
    assert slow.o.shape == (B, T, H, V)
    assert slow.state.shape == (B, H, K, V)
    assert far(slow.o, fast.o) <= TIGHT
    assert far(slow.state, fast.state) <= TIGHT


def test_recurrence_is_the_sum_over_the_past():
    q, k, v = attention_inputs(1, 6, 1, 4, 3)
    o = memory.linear_attention_recurrence(q, k, v).o[0, :, 0]
    for t in range(6):
        past = [(q[0, t, 0] @ k[0, s, 0]) * v[0, s, 0] for s in range(t + 1)]
        assert far(o[t], 4**-0.5 * torch.stack(past).sum(0)) <= TIGHT


@pytest.mark.parametrize(
    "attend", [memory.linear_attention_recurrence, memory.linear_attention_masked]
)
def test_split_anywhere(attend):
    x = attention_inputs(2, 7, 2, 3, 4)
    whole = attend(*x)
    for cut in range(8):
        first = attend(*(y[:, :cut] for y in x))
        last = attend(*(y[:, cut:] for y in x), initial_state=first.state)
        assert far(torch.cat([first.o, last.o], dim=1), whole.o) <= TIGHT
        assert far(last.state, whole.state) <= TIGHT


@pytest.mark.parametrize(
    "attend", [memory.linear_attention_recurrence, memory.linear_attention_masked]
)
def test_inputs_stay_and_nothing_is_shared(attend):
    x = attention_inputs(1, 0, 2, 3, 4)
    S0 = draw(1, 2, 3, 4)
    kept = S0.clone()
    out = attend(*x, initial_state=S0)
    out.state.add_(1)
    assert far(S0, kept) == 0


@pytest.mark.parametrize(
    "attend", [memory.linear_attention_recurrence, memory.linear_attention_masked]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_accumulates_in_float32(attend, dtype):
    x = attention_inputs(1, 9, 2, 4, 3, dtype=dtype)
    out = attend(*x)
    exact = attend(*(y.double() for y in x))
    assert out.o.dtype == dtype
    assert out.state.dtype == torch.float32
    assert (out.state.double() - exact.state).abs().max() <= 1e-5
    assert (out.o.double() - exact.o).abs().max() <= 8 * torch.finfo(
        dtype
    ).eps * exact.o.abs().max()


def test_gradients():
    x = [y.requires_grad_() for y in attention_inputs(1, 3, 2, 2, 3)]
    S0 = draw(1, 2, 2, 3).requires_grad_()
    for attend in (memory.linear_attention_recurrence, memory.linear_attention_masked):
        run = lambda q, k, v, S, f=attend: tuple(f(q, k, v, initial_state=S))
        assert torch.autograd.gradcheck(run, (*x, S0), fast_mode=True)


WRONG = [
    ("write: k must have shape [3], got [1]", lambda: memory.write(draw(3, 2), draw(1), draw(2))),
    ("write: v must have shape [2], got [1]", lambda: memory.write(draw(3, 2), draw(3), draw(1))),
    ("read: q must have shape [3], got [2]", lambda: memory.read(draw(3, 2), draw(2))),
    (
        "hebbian_state: v must have shape [4, 2], got [1, 2]",
        lambda: memory.hebbian_state(draw(4, 3), draw(1, 2)),
    ),
    (
        "recall_error: k must have shape [4, 3], got [4, 2]",
        lambda: memory.recall_error(draw(3, 2), draw(4, 2), draw(4, 2)),
    ),
    (
        "linear_attention_masked: initial_state must have shape [1, 2, 3, 5], got [2, 3, 5]",
        lambda: memory.linear_attention_masked(
            *attention_inputs(1, 4, 2, 3, 5), initial_state=draw(2, 3, 5)
        ),
    ),
]


@pytest.mark.parametrize(("message", "call"), WRONG, ids=[m for m, _ in WRONG])
def test_wrong_shapes_are_named(message, call, monkeypatch):
    # without the shape hook of the test run, which would answer first
    for name in ("write", "read", "hebbian_state", "recall_error", "linear_attention_masked"):
        plain = getattr(memory, name)
        while hasattr(plain, "__wrapped__"):
            plain = plain.__wrapped__
        monkeypatch.setattr(memory, name, plain)
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
