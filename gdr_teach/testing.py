"""What the tests stand on: a float64 oracle, hard inputs, and the one comparison.

The oracle is written from the textbook's formula (state S_t of shape [V, K], a matrix product a token) and shares no
line with `delta.reference`, so that the two can hold each other to account.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .notation import Output, state_dtype

KEYS = ("unit", "identical", "cos0.9", "orthonormal", "zero")
HARD = (("unit", None), ("cos0.9", 1.0), ("cos0.9", 2.0), ("identical", 1.0), ("identical", 2.0))
DECAYS = (0.0, -0.6065, -5.0, -20.0, -1e4, float("-inf"))


class Inputs(NamedTuple):
    """One call's tensors, in the order of `delta_rule`."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    initial_state: Tensor


class GatedInputs(NamedTuple):
    """One call's tensors, in the order of `gated_delta_rule`."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor
    initial_state: Tensor


class IplrInputs(NamedTuple):
    """One call's tensors, in the order of `iplr_delta_rule`."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    initial_state: Tensor


class DplrInputs(NamedTuple):
    """One call's tensors, in the order of `dplr_delta_rule`."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    log_decay: Tensor
    initial_state: Tensor


def delta_inputs(
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    *,
    dtype: torch.dtype = torch.float64,
    keys: str = "unit",
    beta: float | None = None,
    N: int | None = None,
    seed: int = 0,
) -> Inputs:
    """Random inputs of the delta rule, never zero by accident, keys of unit length.

    Args: keys is one of `KEYS`: "unit" (random directions), "identical" (one key a head), "cos0.9" (every two keys of
    a head have cosine 0.9), "orthonormal" (T <= K), "zero". beta: None draws from (0, 2), a number sets all.
    N: sequences of the initial state, default B.
    Returns: Inputs(q, k, v, beta, initial_state), drawn in float64 and rounded to dtype.
    """
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    if keys not in KEYS:
        raise ValueError(f"delta_inputs: keys must be one of {KEYS}, got {keys!r}")
    free, common = normalize(randn(B, T, H, K), dim=-1), normalize(randn(B, 1, H, K), dim=-1)
    if keys == "identical":
        free = common.expand(B, T, H, K).clone()
    elif keys == "cos0.9":
        across = normalize(free - (free * common).sum(-1, keepdim=True) * common, dim=-1)
        free = normalize(0.9**0.5 * common + 0.1**0.5 * across, dim=-1)
    elif keys == "orthonormal":
        if T > K:
            raise ValueError(f"delta_inputs: orthonormal keys need T <= K, got T = {T}, K = {K}")
        free = torch.linalg.qr(randn(B, H, K, T)).Q.permute(0, 3, 1, 2).contiguous()
    elif keys == "zero":
        free = torch.zeros_like(free)
    step = 2 * torch.rand((B, T, H), generator=draw, dtype=torch.float64)
    step = step if beta is None else torch.full_like(step, beta)
    q, v, S0 = randn(B, T, H, K), randn(B, T, H, V), randn(B if N is None else N, H, K, V)
    q, k, v, step = (x.to(dtype) for x in (q, free, v, step))
    return Inputs(q, k, v, step, S0.to(state_dtype(dtype)))


def gated_inputs(
    *sizes: int,
    log_decay: float | str | None = None,
    per: str = "channel",
    seed: int = 0,
    **options,
) -> GatedInputs:
    """Random inputs of the gated delta rule: `delta_inputs` and a decay.

    Args: sizes B, T, H, K, V. log_decay: None draws from (-1, 0), a number sets all, "mixed" draws each from `DECAYS`.
    per: "channel" makes it [B, T, H, K], "head" [B, T, H]. The rest as in `delta_inputs`.
    Returns: GatedInputs(q, k, v, beta, log_decay, initial_state).
    """
    if per not in ("channel", "head"):
        raise ValueError(f"gated_inputs: per must be 'channel' or 'head', got {per!r}")
    x = delta_inputs(*sizes, seed=seed, **options)
    draw = torch.Generator().manual_seed(seed + 1)
    shape = x.k.shape if per == "channel" else x.beta.shape
    g = -torch.rand(shape, generator=draw, dtype=torch.float64)
    if log_decay == "mixed":
        g = torch.tensor(DECAYS, dtype=torch.float64)[(-g * len(DECAYS)).long()]
    elif log_decay is not None:
        g = torch.full_like(g, float(log_decay))
    return GatedInputs(*x[:4], g.to(x.q.dtype), x.initial_state)


def iplr_inputs(*sizes: int, beta: float | None = None, seed: int = 0, **options) -> IplrInputs:
    """Random inputs of the IPLR rule: `delta_inputs`, and a, b that are neither parallel nor of unit length.

    a_t = -(s / l) e + 0.3 n and b_t = l e, with e, n unit directions drawn as the keys are, l from (0.5, 1.5), s from
    (0.2, 1.8): along e the state is multiplied by 1 - s, so that it neither explodes nor is left as it was.
    Args: sizes B, T, H, K, V; dtype, keys, N and seed as in `delta_inputs`. beta: a number sets all s, and n is what is
    left of it at right angles to e: with keys that repeat, one token's 1 - s + 0.3 l n . e would be every token's.
    Returns: IplrInputs(q, k, v, a, b, initial_state).
    """
    x = delta_inputs(*sizes, seed=seed, **options)
    exact = options | {"dtype": torch.float64}
    e, n = (delta_inputs(*sizes, seed=seed + more, **exact).k for more in (2, 3))
    draw = torch.Generator().manual_seed(seed + 4)
    random = torch.rand((2, *x.beta.shape, 1), generator=draw, dtype=torch.float64)
    length, step = 0.5 + random[0], 0.2 + 1.6 * random[1]
    if beta is not None:
        step, n = torch.full_like(step, beta), n - (n * e).sum(-1, keepdim=True) * e
    a, b = 0.3 * n - step / length * e, length * e
    return IplrInputs(*x[:3], a.to(x.q.dtype), b.to(x.q.dtype), x.initial_state)


def dplr_inputs(
    *sizes: int, log_decay: float | str | None = None, per: str = "channel", **options
) -> DplrInputs:
    """Random inputs of the DPLR rule: `iplr_inputs` and the decay of `gated_inputs`; all arguments as there."""
    x = iplr_inputs(*sizes, **options)
    g = gated_inputs(*sizes, log_decay=log_decay, per=per, **options).log_decay
    return DplrInputs(*x[:5], g, x.initial_state)


def delta_oracle(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **options) -> Output:
    """S_t = S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, o_t = scale * S_t q_t: one token, one head at a time.

    Args: as `gdr_teach.delta_rule`. Returns: Output(o, state) in float64, the state as [N, H, K, V]; differentiable.
    """
    return _token_loop(q, k, v, beta, torch.zeros_like(beta), **options)


def gated_oracle(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, **options
) -> Output:
    """The same with S_{t-1} diag(exp(log_decay_t)) in place of S_{t-1}.

    Args: as `gdr_teach.gated_delta_rule`. Returns: as `delta_oracle`.
    """
    return _token_loop(q, k, v, beta, log_decay, **options)


def dplr_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Output:
    """S_t = S_{t-1} M_t + v_t k_t^T with the matrix M_t = diag(exp(log_decay_t)) + a_t b_t^T, o_t = scale * S_t q_t.

    Args: as `gdr_teach.dplr_delta_rule`; log_decay None is IPLR, M_t = I + a_t b_t^T. Returns: as `delta_oracle`.
    """
    q, k, v, a, b = (x.double() for x in (q, k, v, a, b))
    g = torch.zeros_like(k) if log_decay is None else log_decay.double()
    g = g if g.dim() == 4 else g[..., None].expand_as(k)
    (B, T, H, K), V = k.shape, v.shape[-1]
    scale = float(K**-0.5 if scale is None else scale)
    M = torch.diag_embed(g.exp()) + a[..., :, None] * b[..., None, :]  # [B, T, H, K, K]
    ends = [T * n for n in range(B + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    S0 = v.new_zeros(len(ends) - 1, H, K, V) if initial_state is None else initial_state.double()
    q, k, v, M = (x.flatten(0, 1) for x in (q, k, v, M))  # one document after the other
    o, states = [], []
    for n, start in enumerate(ends[:-1]):
        S = S0[n].mT  # [H, V, K]
        for t in range(start, ends[n + 1]):
            S = S @ M[t] + v[t][..., :, None] * k[t][..., None, :]
            o.append(scale * (S @ q[t][..., None])[..., 0])
        states.append(S.mT)
    return Output(
        torch.stack(o).view(B, T, H, V) if o else v.new_zeros(B, T, H, V),
        torch.stack(states) if states else S0,
    )


def _token_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Output:
    q, k, v, beta, log_decay = (x.double() for x in (q, k, v, beta, log_decay))
    B, T, H, K = k.shape
    V = v.shape[-1]
    scale = float(K**-0.5 if scale is None else scale)
    if cu_seqlens is None:
        spans = [(b, 0, T) for b in range(B)]
    else:
        ends = cu_seqlens.tolist()
        spans = [(0, ends[n], ends[n + 1]) for n in range(len(ends) - 1)]
    eye = torch.eye(K, dtype=torch.float64)
    rows: dict[tuple[int, int, int], Tensor] = {}
    finals = []
    for n, (b, start, end) in enumerate(spans):
        heads = []
        for h in range(H):
            S = torch.zeros(V, K, dtype=torch.float64)
            if initial_state is not None:
                S = initial_state[n, h].double().T
            for t in range(start, end):
                kt, step = k[b, t, h], beta[b, t, h]
                S = S * log_decay[b, t, h].exp()  # a number, or one for each of the K columns
                S = S @ (eye - step * torch.outer(kt, kt)) + step * torch.outer(v[b, t, h], kt)
                rows[b, t, h] = scale * (S @ q[b, t, h])
            heads.append(S.T)
        finals.append(torch.stack(heads) if heads else v.new_zeros(0, K, V))
    o = v.new_zeros(B, T, H, V)
    if rows:
        flat = [rows[b, t, h] for b in range(B) for t in range(T) for h in range(H)]
        o = torch.stack(flat).view(B, T, H, V)
    return Output(o, torch.stack(finals) if finals else v.new_zeros(0, H, K, V))


def gradients(op: Any, inputs: Any, do: Tensor, dstate: Tensor, **options) -> Any:
    """The gradients of <o, do> + <state, dstate> in all inputs of a call of `op`, the initial state last."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = op(*leaves[:-1], initial_state=leaves[-1], **options)
    loss = (out.o.double() * do).sum() + (out.state.double() * dstate).sum()
    if not loss.requires_grad:  # no token and no head: nothing depends on anything
        return type(inputs)(*(torch.zeros_like(x) for x in leaves))
    got = torch.autograd.grad(loss, leaves, allow_unused=True)
    return type(inputs)(
        *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, got, strict=True))
    )


def as_rows(x: Tensor) -> Tensor:
    """[B, T, H] as [B, T, H, 1], so that the last axis is a row of `assert_rows_close`."""
    return x[..., None] if x.dim() == 3 else x


# -- the one comparison ------------------------------------------------------------------------------------------------


def assert_rows_close(
    got: Tensor,
    want: Tensor,
    *,
    rtol: float,
    name: str = "result",
    norm: str = "row",
    rounded: Tensor | None = None,
) -> None:
    """Assert that `got` equals `want`, and first that the comparison could tell if it did not.

    The last axis is a row, compared by its Euclidean length. The tensors must not share storage.

    - norm="row": every row within rtol of its own length, or, where it is shorter than that, of max(0.1, width^-1/2)
      times the root mean square length of all rows: a row that is nearly zero by cancellation cannot have more digits
      than its terms, and a row of one number is nearly zero often.
    - norm="tensor": the whole tensor within rtol of its length.
    - rounded: the same algorithm carried out by PyTorch with rounding where the kernel rounds. Each row may then err
      by twice as much, for its length, as the worst row of `rounded`, plus one unit in the last place of got's dtype.
      (Not of the same row: sums in another order draw another error from the same distribution.)

    Before that the comparison must reject zeros, a flipped sign, a shift by one token (axis 1, where there is more than
    one) and one wrong row: a test that could not fail is an error. An empty tensor, or one that is exactly zero, is
    compared exactly.
    Raises: AssertionError that names the worst row.
    """
    if norm not in ("row", "tensor"):
        raise ValueError(f"assert_rows_close: norm must be 'row' or 'tensor', got {norm!r}")
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, wanted {list(want.shape)}"
    shared = (
        got.numel() > 0 and got.untyped_storage().data_ptr() == want.untyped_storage().data_ptr()
    )
    assert not shared, (
        f"{name}: got and want share storage, so they are equal whatever was computed"
    )
    exact = want.detach().double()
    assert exact.isfinite().all(), f"{name}: the wanted values are not finite"
    if exact.numel() == 0 or not exact.any():
        assert not got.any(), f"{name}: wanted exact zeros, got up to {got.abs().max().item():.3g}"
        return
    allowed = _allowed(got.dtype, exact, rtol, norm, rounded)
    for kind, wrong in _wrong_answers(exact):
        rejected = _excess(wrong, exact, allowed, norm)[0] > 1
        assert rejected, (
            f"{name}: the comparison would accept {kind}; use other data or less tolerance"
        )
    worst, row = _excess(got.detach().double(), exact, allowed, norm)
    where = "the whole tensor" if norm == "tensor" else f"row {row}"
    assert worst <= 1, f"{name}: {where} errs {worst:.3g} times the allowed error (rtol {rtol:.1e})"


def assert_near_token_loop(
    op: Any, x: Any, *, keys: str, beta: float | None, device: str = "cpu", **way
) -> None:
    """Assert that a call of `op` by chunks stays near the float64 token loop: values, and all gradients of random ones.

    The budget, of a tensor's length: 1e-5 in float32, 1e-2 in float16 and bfloat16, 2e-2 there for keys of cosine
    0.9. dbeta at identical keys or beta = 2 gets more, 1e-4 and 3e-2: it is what is left of larger sums (an exact
    inverse rounded to bfloat16 gives 6.6e-2). dlog_decay in half precision is held to 2e-2 of the length of q * dq
    beside its own, whose sums it is, and to 1e-1 where keys are identical and beta = 2: one decay a head gets
    k . dk, and dk is nearly orthogonal to k there. da and db at identical keys get 3e-2 in bfloat16: what a reads is
    what is left of a larger state (a float64 loop that reads S and D rounded to bfloat16 gives 1.6e-2).
    Args: x as from the `_inputs` of a rule; device: where the call is made; way: mode, backend, min_log_decay.
    """
    exact = type(x)(*(y.double() for y in x))
    do, dstate = torch.randn_like(exact.v), torch.randn_like(exact.initial_state)
    loop = {"backend": "torch", "mode": "recurrent"}
    want = op(*exact[:-1], initial_state=exact.initial_state, **loop)
    wants = gradients(op, exact, do, dstate, **loop)
    far = type(x)(*(y.to(device) for y in x))
    got = op(*far[:-1], initial_state=far.initial_state, **way)
    found = gradients(op, far, do.to(device), dstate.to(device), **way)
    rtol = 1e-5 if x.q.dtype == torch.float32 else 2e-2 if keys == "cos0.9" else 1e-2
    names = ("o", "state", *(f"d{name}" for name in x._fields))
    for name, *pair in zip(names, (*got, *found), (*want, *wants), strict=True):
        g, w = (as_rows(y.cpu()) for y in pair)
        limit = rtol
        if name == "dbeta" and (keys == "identical" or beta == 2.0):
            limit = 1e-4 if rtol == 1e-5 else 3e-2
        if name in ("da", "db") and keys == "identical" and x.q.dtype == torch.bfloat16:
            limit = 3e-2
        if name == "dlog_decay" and rtol > 1e-5:
            beside = (exact.q * wants.q).flatten()  # the scale that its error is measured by
            g, w = (torch.cat([y.double().flatten(), beside]) for y in (g, w))
            limit = 1e-1 if (keys, beta) == ("identical", 2.0) else 2e-2
        assert_rows_close(g, w, rtol=limit, norm="tensor", name=name)


def row_error(got: Tensor, want: Tensor) -> Tensor:
    """The Euclidean length of got - want, row by row (last axis), in float64; nan and inf count as inf."""
    error = (got.double() - want.double()).norm(dim=-1)
    return torch.where(error.isfinite(), error, torch.full_like(error, torch.inf))


def _allowed(dtype, want: Tensor, rtol: float, norm: str, rounded: Tensor | None) -> Tensor:
    length = want.norm(dim=-1)
    if norm == "tensor":
        return rtol * want.norm()
    floor = max(0.1, want.shape[-1] ** -0.5) * length.square().mean().sqrt()
    length = torch.maximum(length, floor)
    if rounded is not None:
        worst = (row_error(rounded, want) / length).max().item()
        rtol = max(rtol, 2 * worst + torch.finfo(dtype).eps)
    return rtol * length


def _excess(got: Tensor, want: Tensor, allowed: Tensor, norm: str) -> tuple[float, list[int]]:
    # the largest error as a multiple of what is allowed, and its row
    error = row_error(got, want)
    if norm == "tensor":
        return (error.norm() / allowed).item(), []
    ratio = error / allowed
    worst = int(ratio.argmax())
    return ratio.flatten()[worst].item(), [
        int(i) for i in torch.unravel_index(torch.tensor(worst), ratio.shape)
    ]


def _wrong_answers(want: Tensor):
    yield "zeros", torch.zeros_like(want)
    yield "a flipped sign", -want
    if want.dim() >= 2 and want.shape[1] > 1 and not torch.equal(want.roll(1, dims=1), want):
        yield "a shift by one token", want.roll(1, dims=1)
    rows = want.reshape(-1, want.shape[-1])
    if len(rows) > 1:
        wrong = rows.clone()
        longest = int(rows.norm(dim=-1).argmax())
        wrong[longest] = -wrong[longest]
        yield "one wrong row", wrong.view_as(want)
