"""Chapter 4: which transitions keep the state bounded, token by token and in long products.

A token moves the old state, of shape [K, V], by one K x K matrix from the left: S_t = M_t S_{t-1} + k_t v_t^T with

    M_t = D_t + b_t a_t^T                 D_t = diag(exp(log_decay_t)), a reads, b writes             (4.1)

First D = c I: no decay (c = 1) or one a head. Write s = a . b and p = |a| |b|. M maps every x with a . x = 0 to c x,
and b to (c + s) b: the eigenvalues are

    c, K - 1 times, and c + s             without decay inside the circle iff -2 <= s <= 0            (4.2)

M and M^T multiply what is orthogonal to both a and b by c. On the plane of a and b the determinant of M is c (c + s)
and the trace of M^T M is 2c^2 + 2cs + p^2, so the two singular values there have

    s1 s2 = |c (c + s)|,  s1^2 + s2^2 = 2c^2 + 2cs + p^2                                              (4.3)

Twice the determinant less or more leaves p^2 and R^2 = (s + 2c)^2 + (p^2 - s^2): the squares of s1 + s2 and s1 - s2,
in one order or the other. For K >= 2 the norm of M is

    s1 = (p + R) / 2                      and the smallest singular value is s2 = |c (c + s)| / s1    (4.4)
    s1 - c = 2c (p + s) / (R + 2c - p)    the same without cancellation, for p < 2c                   (4.5)

with p + s = (p^2 - s^2) / (p - s) when s < 0, and p^2 - s^2 = |a|^2 |b - a s/|a|^2|^2 from the part of b across a.
The norm theorem: c^4 - c^2 (s1^2 + s2^2) + (s1 s2)^2 is

    (c^2 - s1^2)(c^2 - s2^2) = c^2 (s^2 - p^2)                                                        (4.6)

negative for c > 0 and a, b not parallel: then s1 > c. Without decay some vector is made longer, wherever the
eigenvalues lie. For b = lambda a, M is symmetric and its norm is the larger of 1 (K >= 2) and |1 + lambda |a|^2|:

    |I + b a^T| <= 1    iff    b = lambda a with -2 <= lambda |a|^2 <= 0  (or a = 0, or b = 0)        (4.7)
    |c I + b a^T| <= 1  iff    p <= 2 and p + c s <= 1 - c^2              from R <= 2 - p, K >= 2     (4.8)

For the delta rule, b = k and a = -beta k, (4.7) reads 0 <= beta |k|^2 <= 2; where it is above 1 the moving eigenvalue
is negative. (4.8) is what decay buys: room for a and b that are not parallel.

Any D <= 1: a token that erases after its decay, or decays after it has erased, is a product of two contractions.

    M = (I + lambda b b^T) D, a = lambda D b,   or   M = D (I + lambda a a^T), b = lambda D a,
    with -2 <= lambda |b|^2 <= 0 (|a|^2)                  enough for |M| <= 1, not necessary          (4.9)

Products: |M_t ... M_1| <= |M_t| ... |M_1|, so tokens with norm at most 1 never let anything grow. Nothing like it holds
for spectral radii: with a_1 = (0, 1), b_1 = (x, -1) and a_2 = (1, 0), b_2 = (-1, x) both transitions are projections
(eigenvalues 1 and 0), and M_2 M_1 has the eigenvalues x^2 and 0                                      (4.10)

All is computed in float64, whatever the inputs' dtype. Needs torch only. Sources: Yang et al. 2024, "Parallelizing
linear transformers with the delta rule"; Grazzi et al. 2024, "Unlocking state-tracking in linear RNNs through negative
eigenvalues"; Peng et al. 2025, "RWKV-7 Goose"; Kimi Team 2025, "Kimi Linear".
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor
from torch.linalg import matrix_norm, vector_norm
from torch.nn.functional import normalize

from .arguments import check_log_decay_values, check_positive_int
from .notation import state_dtype

STARTS, WINDOWS = 64, 4096  # how many windows `stability_report` looks at in one head
SPLIT = 2.0**27 + 1  # cuts a float64 into two halves

Number = Float[Tensor, "*batch"]
Vector = Float[Tensor, "*batch K"]
Decay = Float[Tensor, "*batch K"] | Float[Tensor, "*batch"]
Sequence = Float[Tensor, "B T H K"]
Decays = Float[Tensor, "B T H K"] | Float[Tensor, "B T H"]
Place = tuple[int, int, int]  # batch, time, head


class Transition(NamedTuple):
    """The three tensors that make a transition (4.1), in the order of every function here."""

    a: Tensor
    b: Tensor
    log_decay: Tensor | None


def transition(a: Vector, b: Vector, log_decay: Decay | None = None) -> Float[Tensor, "*batch K K"]:
    """The matrix that moves the old state: M = D + b a^T (4.1), so that the new one is M @ S.

    Args:
        a: read direction [..., K].
        b: write direction [..., K].
        log_decay: natural logarithm of the decay, <= 0, one a head [...] or one a channel [..., K]; None is no decay.

    Returns: matrices [..., K, K] in float64; differentiable.
    Raises: ValueError for a wrong shape or a positive log_decay, TypeError for what is no floating tensor.
    """
    return _matrix(*_operands("transition", a, b, log_decay))


def transition_spectrum(
    a: Vector, b: Vector, log_decay: Decay | None = None
) -> Complex[Tensor, "*batch K"]:
    """The eigenvalues of M (4.1).

    Without decay, or with one a head, in closed form (4.2): c, K - 1 times, and last c + a . b, the one that moves.
    With one decay a channel by `torch.linalg.eigvals`, in no particular order.

    Args, Raises: as `transition`. Returns: eigenvalues [..., K], complex128 also where they are real.
    """
    a, b, D = _operands("transition_spectrum", a, b, log_decay)
    if D.shape[-1] > 1:
        return torch.linalg.eigvals(_matrix(a, b, D))
    still = D.expand(*a.shape[:-1], a.shape[-1] - 1)
    return torch.cat([still, D + _dot(a, b)[..., None]], dim=-1).to(torch.complex128)  # (4.2)


def operator_norm(a: Vector, b: Vector, log_decay: Decay | None = None) -> Number:
    """The largest singular value of M: by how much one token can make a column of the state longer.

    Closed form (4.4), (4.5) without decay or with one a head; otherwise by SVD.

    Args, Raises: as `transition`.
    Returns: norms [...] in float64; differentiable, by SVD only where the largest singular value is single.
    """
    a, b, D = _operands("operator_norm", a, b, log_decay)
    return D[..., 0] + _above_c(a, b, D) if D.shape[-1] == 1 else matrix_norm(_matrix(a, b, D), 2)


def norm_excess(a: Vector, b: Vector, log_decay: Decay | None = None) -> Number:
    """The norm of M less 1, with digits of its own where rounding beside 1 would lose them; <= 0: nothing gets longer.

    Without decay its relative error is about eps / |2 - |a| |b|| (4.5): b may be as nearly opposite to a as it likes.

    Args, Returns, Raises: as `operator_norm`.
    """
    a, b, D = _operands("norm_excess", a, b, log_decay)
    if D.shape[-1] > 1:
        return matrix_norm(_matrix(a, b, D), 2) - 1
    return (D[..., 0] - 1) + _above_c(a, b, D)


def singular_pair(a: Vector, b: Vector, log_decay: Number | None = None) -> tuple[Number, Number]:
    """The largest and the smallest singular value of c I + b a^T (4.4); the K - 2 between them are c.

    Args, Raises: as `transition`; log_decay, one a head or None. Returns: (s1, s2) [...], equal for K = 1.
    """
    a, b, D = _operands("singular_pair", a, b, log_decay)
    if D.shape[-1] > 1:
        _check("singular_pair", "log_decay", log_decay, a.shape[:-1])
    c = D[..., 0]
    s1, product = c + _above_c(a, b, D), (c * (c + _dot(a, b))).abs()
    return s1, (product / torch.where(s1 > 0, s1, 1.0) if a.shape[-1] > 1 else s1)  # (4.4)


def plane(product: Tensor, angle: Tensor, *, decay: float = 1.0) -> tuple[Tensor, Tensor]:
    """Norm and spectral radius of c I + b a^T for all shapes of a and b; `viz.phase_diagram` draws them.

    Args: product, |a| |b| [x], negative when b points against a (lambda |a|^2 where they are parallel); angle, degrees
    from 0 to 90 between b and the line of a [y]; decay, c in (0, 1].
    Returns: (norm, radius), each [y, x].
    """
    x, angle = product.double(), torch.deg2rad(angle.double())[:, None]
    b = torch.stack([x * angle.cos(), x * angle.sin()], dim=-1)  # [y, x, 2]
    a = torch.tensor([1.0, 0.0], dtype=torch.float64).expand_as(b)
    g = torch.full(b.shape[:-1], math.log(decay), dtype=torch.float64)
    return operator_norm(a, b, g), transition_spectrum(a, b, g).abs().amax(-1)


def safe_parallel(a: Vector, raw: Number, *, eps: float = 1e-6) -> Vector:
    """A write direction that keeps I + b a^T a contraction, from a number that may be anything.

        b = lambda a,  lambda = -2 sigmoid(raw) / (|a|^2 + eps)

    so that lambda |a|^2 lies between -2 and 0 (4.7): raw = 0 erases what a reads, a large raw turns its sign, a very
    negative one leaves it. b is smooth everywhere, and zero where a is.

    Args: a, read direction [..., K]; raw, unconstrained [...]; eps, the |a|^2 below which b tends to 0.
    Returns: b [..., K] in a's dtype, computed in float32 at least; rounding to that dtype turns it a little.
    Raises: ValueError for a wrong shape or eps <= 0.
    """
    _check("safe_parallel", "a", a)
    _check("safe_parallel", "raw", raw, a.shape[:-1])
    if not eps > 0:
        raise ValueError(f"safe_parallel: eps must be positive, got {eps}")
    wide = a.to(state_dtype(a.dtype))
    step = -2 * raw.to(wide.dtype).sigmoid() / (_dot(wide, wide) + eps)
    return (step[..., None] * wide).to(a.dtype)


def kda_transition(k: Vector, beta: Number, log_decay: Decay) -> Transition:
    """Decay, then the delta rule, as in Kimi Delta Attention and the gated delta rule: M = (I - beta k k^T) D.

    Guaranteed (4.9): a contraction in norm, |M| <= max D, for unit k and 0 <= beta <= 2, whatever the other tokens
    are. For other keys |M| <= max(1, |1 - beta |k|^2|) max D.

    Args: k, key [..., K], used as given; beta, step size [...]; log_decay, <= 0, [...] or [..., K].
    Returns: Transition(a = -beta D k, b = k, log_decay).
    Raises: as `transition`.
    """
    _check("kda_transition", "k", k)
    _check("kda_transition", "beta", beta, k.shape[:-1])
    _check("kda_transition", "log_decay", log_decay, k.shape[:-1], k.shape)
    decay = log_decay.exp() if log_decay.shape == k.shape else log_decay.exp()[..., None]
    return Transition(-beta[..., None] * decay * k, k, log_decay)


def rwkv7_transition(raw_decay: Vector, kappa: Vector, alpha: Vector) -> Transition:
    """RWKV-7's transition: M = D - (alpha * n) n^T with n = kappa / |kappa| and log D = -e^{-1/2} sigmoid(raw_decay).

    Guaranteed: the spectrum only. For 0 < alpha <= 1, M has the eigenvalues of the symmetric matrix
    D - m m^T, m = sqrt(alpha) n (a change of basis by sqrt(alpha)). They are real, at most max D < 1 and at least
    min D - |m|^2 > -1/2, as D > e^{-0.61}; alpha = 0 is the limit.
    Not guaranteed: the norm, which may exceed 1, and products. The basis in which a token shrinks everything depends
    on its alpha, so two tokens that alternate can grow without bound.

    Args: raw_decay, unconstrained [..., K]; kappa, removal key [..., K], not zero; alpha in [0, 1].
    Returns: Transition(a = -n, b = alpha * n, log_decay [..., K]).
    Raises: as `transition`; ValueError for an alpha outside [0, 1].
    """
    for name, x in (("raw_decay", raw_decay), ("kappa", kappa), ("alpha", alpha)):
        _check("rwkv7_transition", name, x, raw_decay.shape)
    _check_values("rwkv7_transition", "alpha", alpha, (alpha >= 0) & (alpha <= 1), "in [0, 1]")
    n = normalize(kappa, dim=-1)
    return Transition(-n, alpha * n, -math.exp(-0.5) * raw_decay.sigmoid())


def product_norms(
    a: Sequence, b: Sequence, log_decay: Decays | None = None, *, window: int | None = None
) -> Float[Tensor, "B T H"]:
    """log2 of the norm of M_t ... M_1, all transitions so far: by how much a state can have grown. Never overflows.

    Args: a, b, directions [B, T, H, K]; log_decay, <= 0, [B, T, H] or [B, T, H, K] or None; window, start anew every so
    many tokens, so that the last entry of each window is the growth inside it.
    Returns: doublings [B, T, H] in float64, without gradient; -inf once the product is zero.
    Raises: as `transition`; ValueError for window < 1, or for a or b that is not finite.
    """
    a, b, D = _sequence("product_norms", a, b, log_decay)
    B, T, H, K = a.shape
    window = T if window is None else check_positive_int("product_norms", "window", window)
    eye = torch.eye(K, dtype=torch.float64, device=a.device).expand(B, H, K, K)
    P, doublings = eye, a.new_zeros(B, H)
    rows = [a.new_zeros(B, 0, H)]
    for t in range(T):
        if t % window == 0:
            P, doublings = eye, a.new_zeros(B, H)
        P, doublings = _advance(a[:, t], b[:, t], D[:, t], P, doublings)
        rows.append((doublings + matrix_norm(P, 2).log2())[:, None])
    return torch.cat(rows, dim=1)


@dataclass(frozen=True, eq=False)
class StabilityReport:
    """What `stability_report` found. `str()` of it is at most ten lines.

    verdict is one of three; a number counts as above 1 when it is above 1 + tolerance:

    - "contraction": no token's norm is above 1. Whatever their order and number, n such tokens make no state longer
      than (1 + tolerance)^n times.
    - "can blow up": a single token, or in some head its window of largest growth, has a spectral radius above 1, or a
      single token is a shear (no decay, a . b = 0, neither zero): repeating it makes the state grow without bound.
    - "bounded so far": some token's norm is above 1, but no such product was found. This sequence makes no state longer
      than 2^max(growth, 0) times (when windows_complete); other orders or lengths of the same tokens may do worse.

    reason: one clause on why, with the place. norm, radius: the largest of a token, 0 without tokens; norm_at and
    radius_at: their (batch, time, head) or None. growth: log2 of the largest norm of a product over the tokens
    start, ..., end - 1 of one head, 0 without tokens; window = (start, end) and window_at = (batch, head), or None.
    windows_complete: False when there were too many windows: growth is then the largest of those looked at.
    not_parallel, out_of_range [B, T, H]: where the sufficient condition (4.9) is broken, and by which clause. Such a
    token may still have a norm below 1, when it decays enough.
    """

    verdict: str
    reason: str
    norm: float
    norm_at: Place | None
    radius: float
    radius_at: Place | None
    growth: float
    window: tuple[int, int] | None
    window_at: tuple[int, int] | None
    windows_complete: bool
    not_parallel: Bool[Tensor, "B T H"]
    out_of_range: Bool[Tensor, "B T H"]

    def __str__(self) -> str:
        lines = [f"{self.verdict}: {self.reason}"]
        if self.window and self.window_at:
            span = _span(self.window, self.window_at)
            lines += [
                f"largest norm of a token      {self.norm:.6g}{_at(self.norm_at)}",
                f"largest spectral radius      {self.radius:.6g}{_at(self.radius_at)}",
                f"largest growth of a product  2^{self.growth:.4f}, {span}",
            ]
        if not self.windows_complete:
            lines[-1] += " (not all windows were looked at)"
        clauses = {"a, b not parallel": self.not_parallel, "lambda out of range": self.out_of_range}
        for clause, broken in clauses.items():
            first = f", first{_at(_peak(broken.double())[1])}" if broken.any() else ""
            lines.append(f"{clause:<28} {int(broken.sum())} of {broken.numel()} tokens{first}")
        return "\n".join(lines)


def stability_report(
    a: Sequence, b: Sequence, log_decay: Decays | None = None, *, tolerance: float = 1e-6
) -> StabilityReport:
    """Whether and where a sequence of transitions can blow up.

    A window of largest growth can be taken to begin and end at tokens with norm above 1: others at its ends make it no
    larger. So only such windows are looked at: in each head all of them up to STARTS starts and WINDOWS windows, beyond
    that evenly spread ones.

    Args, Raises: as `product_norms`; tolerance, >= 0: how far above 1 a norm or a radius still counts as 1.
    Returns: StabilityReport, which says what its verdict means.
    """
    if not tolerance >= 0:
        raise ValueError(f"stability_report: tolerance must be >= 0, got {tolerance}")
    a, b, D = _sequence("stability_report", a, b, log_decay)
    not_parallel, out_of_range = _broken(a, b, D, tolerance)
    log_decay = None if log_decay is None else log_decay.detach()
    excess = norm_excess(a, b, log_decay)
    radii = transition_spectrum(a, b, log_decay).abs().amax(-1)
    (norm, norm_at), (radius, radius_at) = _peak(1 + excess), _peak(radii)
    growth, window, window_at, complete = 0.0, None, None, True
    if norm_at:
        growth, window = (math.log2(norm) if norm else -math.inf), (norm_at[1], norm_at[1] + 1)
        window_at = (norm_at[0], norm_at[2])

    long, reason = excess > tolerance, ""  # [B, T, H]
    for i_b, i_h in long.any(dim=1).nonzero().tolist():
        head = (i_b, slice(None), i_h)
        most, span, radius_of, every = _best_window(a[head], b[head], D[head], long[head])
        complete &= every
        if most > growth:
            growth, window, window_at = most, span, (i_b, i_h)
        if not reason and radius_of > math.log2(1 + tolerance):
            reason = f"a product of spectral radius 2^{radius_of:.4g}, {_span(span, (i_b, i_h))}"
    s, p = _dot(a, b), vector_norm(a, dim=-1) * vector_norm(b, dim=-1)
    shear = long & (D == 1).all(-1) & (s.abs() <= tolerance * p)  # its n-th power: I + n b a^T
    if radius > 1 + tolerance:
        reason = f"spectral radius {radius:.6g}{_at(radius_at)}"
    elif shear.any():
        reason = f"a shear, whose powers grow,{_at(_peak(shear.double())[1])}"
    verdict = "can blow up" if reason else "bounded so far" if long.any() else "contraction"
    reason = reason or f"{int(long.sum())} of {long.numel()} tokens have a norm above 1"
    return StabilityReport(
        verdict, reason, norm, norm_at, radius, radius_at,
        growth, window, window_at, complete, not_parallel, out_of_range,
    )  # fmt: skip


def _operands(op: str, a: Tensor, b: Tensor, log_decay) -> tuple[Tensor, Tensor, Tensor]:
    # checked, in float64; D is [..., 1] when all channels share one decay, else [..., K]
    _check(op, "a", a)
    if not a.dim() or not a.shape[-1]:
        raise ValueError(f"{op}: a must have a last dimension of at least 1, got {list(a.shape)}")
    _check(op, "b", b, a.shape)
    a, b = a.double(), b.double()
    if log_decay is None:
        return a, b, torch.ones_like(a[..., :1])
    _check(op, "log_decay", log_decay, a.shape[:-1], a.shape)
    check_log_decay_values(op, log_decay, None)
    D = log_decay.double().exp()
    return a, b, D if log_decay.dim() == a.dim() else D[..., None]


def _sequence(op: str, a: Tensor, b: Tensor, log_decay) -> tuple[Tensor, Tensor, Tensor]:
    _check(op, "a", a)
    if a.dim() != 4:
        raise ValueError(f"{op}: a must have shape [B, T, H, K], got {list(a.shape)}")
    a, b, D = (x.detach() for x in _operands(op, a, b, log_decay))
    _check_values(op, "a", a, a.isfinite(), "finite")
    _check_values(op, "b", b, b.isfinite(), "finite")
    return a, b, D


def _check(op: str, name: str, x, *shapes: torch.Size) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        got = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must have a floating dtype, got {got}")
    if shapes and x.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {list(x.shape)}")


def _check_values(op: str, name: str, x: Tensor, right: Tensor, wanted: str) -> None:
    if not right.all():
        at = (~right).nonzero()[0].tolist()
        raise ValueError(f"{op}: {name} must be {wanted}, got {x[tuple(at)].item():.6g} at {at}")


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)


def _matrix(a: Tensor, b: Tensor, D: Tensor) -> Tensor:
    return torch.diag_embed(D.expand_as(a)) + b[..., :, None] * a[..., None, :]  # (4.1)


def _above_c(a: Tensor, b: Tensor, D: Tensor) -> Tensor:
    # s1 - c for D = c I
    c, s = D[..., 0], _dot(a, b)
    if a.shape[-1] == 1:
        return (c + s).abs() - c
    length = vector_norm(a, dim=-1)
    p = length * vector_norm(b, dim=-1)
    area = length * vector_norm(_across(a, b), dim=-1)  # sqrt(p^2 - s^2)
    R = vector_norm(torch.stack([s + 2 * c, area], dim=-1), dim=-1)
    against = s < 0
    sum_ps = torch.where(against, area.square() / torch.where(against, p - s, 1.0), p + s)
    gap = 2 * c - p
    near = gap > 0
    return torch.where(
        near, 2 * c * sum_ps / torch.where(near, R + gap, 1.0), (R - gap) / 2
    )  # (4.5)


def _across(a: Tensor, b: Tensor) -> Tensor:
    # The part of b at right angles to a, each entry to nearly all its digits however small it is. Subtracting nearly
    # equal numbers is exact; what spoils b - lambda a is the rounding of lambda a. That error is itself a float64
    # number (Dekker's product, from halves of at most 26 bits) and is taken off afterwards.
    square = _dot(a, a)
    square = torch.where(square > 0, square, 1.0)[..., None]
    step = _dot(a, b)[..., None] / square
    product = step * a
    with torch.no_grad():
        x, y = (z * SPLIT - (z * SPLIT - z) for z in (step, a))
        x_low, y_low = step - x, a - y
        lost = ((x * y - product) + x * y_low + x_low * y) + x_low * y_low
    across = (b - product) - lost
    return across - (_dot(a, across)[..., None] / square) * a  # lambda was rounded, too


def _advance(
    a: Tensor, b: Tensor, D: Tensor, P: Tensor, doublings: Tensor
) -> tuple[Tensor, Tensor]:
    # one token more: M P, with entries below 1; the state's own update, applied to P
    P = D[..., None] * P + b[..., :, None] * (a[..., None, :] @ P)
    exponent = torch.frexp(P.abs().amax(dim=(-2, -1))).exponent
    return torch.ldexp(P, -exponent[..., None, None]), doublings + exponent


def _broken(a: Tensor, b: Tensor, D: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    # where neither form of (4.9) holds: by direction, or only by lambda
    parallel, ranged = [], []
    for x, y in ((a, b), (b, a)):  # x = lambda D y with -2 <= lambda |y|^2 <= 0
        Dy = D * y
        square = _dot(Dy, Dy)
        step = _dot(x, Dy) / torch.where(square > 0, square, 1.0)
        across = vector_norm(x - step[..., None] * Dy, dim=-1)
        size = step * _dot(y, y)
        parallel.append((across <= tolerance * vector_norm(x, dim=-1)) | ~y.any(-1))
        ranged.append(parallel[-1] & (size >= -2 - tolerance) & (size <= tolerance))
    straight, holds = parallel[0] | parallel[1], ranged[0] | ranged[1]
    return ~straight, straight & ~holds


def _best_window(a: Tensor, b: Tensor, D: Tensor, long: Tensor):
    # of one head [T, K]: largest growth, its (start, end), log2 of that product's radius, whether all were looked at
    marks = long.nonzero()[:, 0].tolist()
    starts = _spread(marks, STARTS)
    ends = _spread(marks, WINDOWS // len(starts))
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)[None]
    P, doublings = eye[:0], a.new_zeros(0)
    most, span, M, shift = -math.inf, (0, 0), eye[0], 0.0
    for t in range(starts[0], marks[-1] + 1):
        if t in starts:
            P, doublings = torch.cat([P, eye]), torch.cat([doublings, a.new_zeros(1)])
        P, doublings = _advance(a[t], b[t], D[t], P, doublings)
        growth = doublings + matrix_norm(P, 2).log2() if t in ends else doublings[:0]
        if len(growth) and growth.max().item() > most:
            i = int(growth.argmax())
            most, span, M, shift = growth[i].item(), (starts[i], t + 1), P[i], doublings[i].item()
    radius = torch.linalg.eigvals(M).abs().max().log2().item() + shift
    if radius < most - 23:  # sqrt(eps) of the norm: what rounding makes of a nilpotent product
        radius = -math.inf
    return most, span, radius, len(starts) == len(ends) == len(marks)


def _spread(marks: list[int], count: int) -> list[int]:
    # at most `count` of the marks, evenly spread, the first and the last among them
    if len(marks) <= count:
        return marks
    return [marks[round(i * (len(marks) - 1) / (count - 1))] for i in range(count)]


def _peak(x: Tensor) -> tuple[float, Place | None]:
    if not x.numel():
        return 0.0, None
    i_b, t, i_h = (int(i) for i in torch.unravel_index(x.argmax(), x.shape))
    return x[i_b, t, i_h].item(), (i_b, t, i_h)


def _at(place: Place | None) -> str:
    return " at batch {}, token {}, head {}".format(*place) if place else ""


def _span(window: tuple[int, int], at: tuple[int, int]) -> str:
    return f"tokens {window[0]} to {window[1] - 1}, batch {at[0]}, head {at[1]}"
