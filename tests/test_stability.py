"""Chapter 4's claims in float64: closed forms, the norm theorem, products that grow, and what the report says."""

import math
import re
from decimal import Decimal, localcontext

import pytest
import torch
from torch.linalg import eigvals, matrix_norm, svdvals, vector_norm
from torch.nn.functional import normalize

from gdr_teach import stability
from gdr_teach.delta.reference import delta_recurrence
from gdr_teach.gated.reference import gated_recurrence
from gdr_teach.testing import assert_rows_close, delta_inputs, gated_inputs

TIGHT = 1e-12
F64 = torch.float64


def draw(*shape, dtype=F64):
    return torch.randn(*shape, dtype=dtype)


def unit(*shape):
    return normalize(draw(*shape), dim=-1)


def close(got, want):
    """Numbers [n] or rows [n, K], within 1e-12 of their size."""
    rows = [x[..., None] if x.dim() == 1 else x for x in (got, want)]
    assert_rows_close(*rows, rtol=TIGHT)


def by_size(x):
    """Eigenvalues in one order, as rows of real numbers: sizes, then real parts."""
    return torch.cat([x.abs().sort(-1).values, x.real.sort(-1).values], dim=-1)


def decays(n, K, per):
    head, channel = -torch.rand(n, dtype=F64), -2 * torch.rand(n, K, dtype=F64)
    return {"none": None, "head": head, "channel": channel}[per]


PER = ("none", "head", "channel")


# -- closed forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", PER)
def test_transition_moves_the_old_state(per):
    a, b = draw(2, 7, 4)
    g, S = decays(7, 4, per), draw(7, 4, 3)
    decayed = S
    if g is not None:
        decayed = S * (g if g.dim() == 2 else g[:, None]).exp()[..., None]
    want = decayed + b[..., None] * (a[:, None, :] @ S)
    close((stability.transition(a, b, g) @ S).flatten(1), want.flatten(1))  # (4.1)


def test_transition_is_the_rule_of_the_course():
    x = delta_inputs(1, 6, 1, 5, 3)
    S = x.initial_state[0, 0]
    M = stability.transition(-x.beta[..., None] * x.k, x.k)
    for t in range(6):
        S = M[0, t, 0] @ S + x.beta[0, t, 0] * torch.outer(x.k[0, t, 0], x.v[0, t, 0])
    close(S, delta_recurrence(*x[:4], initial_state=x.initial_state).state[0, 0])


@pytest.mark.parametrize("per", ["head", "channel"])
def test_kda_transition_is_the_gated_rule(per):
    x = gated_inputs(1, 6, 1, 5, 3, per=per)
    S = x.initial_state[0, 0]
    M = stability.transition(*stability.kda_transition(x.k, x.beta, x.log_decay))
    for t in range(6):
        S = M[0, t, 0] @ S + x.beta[0, t, 0] * torch.outer(x.k[0, t, 0], x.v[0, t, 0])
    close(S, gated_recurrence(*x[:5], initial_state=x.initial_state).state[0, 0])


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("K", [1, 2, 3, 8])
def test_spectrum_and_norm_against_eigvals_and_svd(K, per):
    a, b = draw(2, 500, K)
    g = decays(500, K, per)
    M = stability.transition(a, b, g)
    spectrum = stability.transition_spectrum(a, b, g)
    assert spectrum.shape == (500, K)
    assert spectrum.dtype == torch.complex128
    close(by_size(spectrum), by_size(eigvals(M)))  # (4.2)
    want = svdvals(M)
    close(stability.operator_norm(a, b, g), want[:, 0].clone())  # (4.4)
    close(stability.norm_excess(a, b, g) + 1, want[:, 0].clone())
    if per != "channel":
        s1, s2 = stability.singular_pair(a, b, g)
        close(torch.stack([s1, s2], dim=-1), want[:, [0, -1]])
        c = torch.ones(500, dtype=F64) if g is None else g.exp()
        assert (want[:, 1:-1] - c[:, None]).abs().sum() <= TIGHT * max(1, want[:, 1:-1].numel())
    elif K > 1:
        with pytest.raises(ValueError, match=r"log_decay must have shape \[500\], got"):
            stability.singular_pair(a, b, g)


def test_determinant_and_trace():
    a, b = draw(2, 1000, 2)
    g = decays(1000, 2, "head")
    s1, s2 = stability.singular_pair(a, b, g)
    c, s = g.exp(), (a * b).sum(-1)
    p = vector_norm(a, dim=-1) * vector_norm(b, dim=-1)
    close(s1 * s2, (c * (c + s)).abs())  # (4.3)
    close(s1**2 + s2**2, 2 * c**2 + 2 * c * s + p**2)
    close((c**2 - s1**2) * (c**2 - s2**2), c**2 * (s**2 - p**2))  # (4.6)


def exact_excess(a, b):
    """|I + b a^T| - 1 of two float64 vectors with 80 digits."""
    with localcontext() as context:
        context.prec = 80
        x, y = ([Decimal(z) for z in v.tolist()] for v in (a, b))
        dot = lambda u, v: sum((i * j for i, j in zip(u, v, strict=True)), Decimal(0))
        s, square = dot(x, y), dot(x, x) * dot(y, y)
        return float((square.sqrt() + ((s + 2) ** 2 + square - s * s).sqrt()) / 2 - 1)


def nearly_opposite(n, size, angle, K=5):
    """Pairs with |a| |b| = size and `angle` (radians) between b and -a."""
    u, v = unit(n, K), draw(n, K)
    v = normalize(v - (u * v).sum(-1, keepdim=True) * u, dim=-1)
    length = torch.rand(n, 1, dtype=F64) + 0.5
    return length * u, size / length * (math.sin(angle) * v - math.cos(angle) * u)


@pytest.mark.parametrize("angle", [1e-1, 1e-4, 1e-7, 1e-10])
@pytest.mark.parametrize("size", [0.01, 1.0, 1.9])
def test_the_excess_keeps_its_digits_when_b_is_nearly_opposite(size, angle):
    a, b = nearly_opposite(40, size, angle)
    want = torch.tensor([exact_excess(*pair) for pair in zip(a, b, strict=True)], dtype=F64)
    assert (want > 0).all()
    got = stability.norm_excess(a, b)
    assert (
        got / want - 1
    ).abs().max() <= TIGHT  # SVD has no digit left below 1e-16: see the next test
    assert (stability.operator_norm(a, b) - (1 + want)).abs().max() <= TIGHT


def test_svd_loses_what_the_closed_form_keeps():
    a, b = nearly_opposite(40, 1.0, 1e-7)
    want = torch.tensor([exact_excess(*pair) for pair in zip(a, b, strict=True)], dtype=F64)
    svd = svdvals(stability.transition(a, b))[:, 0] - 1
    assert (svd / want - 1).abs().max() > 1e-3


@pytest.mark.parametrize("over", [-1e-3, -1e-9, 0.0, 1e-9, 1e-3])
def test_the_excess_where_only_the_length_is_critical(over):
    a, b = nearly_opposite(40, 2 + over, 0.0)
    want = torch.tensor([exact_excess(*pair) for pair in zip(a, b, strict=True)], dtype=F64)
    got = stability.norm_excess(a, b)
    # the last digits of |a| |b| and of the rounded angle: nothing better than eps^(1/2) at exactly 2
    assert (got - want).abs().max() <= (TIGHT if over else 1e-7)


def test_zero_vectors_and_exact_cases():
    zero, e = torch.zeros(4, dtype=F64), torch.eye(4, dtype=F64)[0]
    for a, b in ((zero, e), (e, zero), (zero, zero)):
        assert stability.norm_excess(a, b) == 0
        assert stability.singular_pair(a, b) == (1, 1)
    assert stability.norm_excess(e, -2 * e) == 0
    assert stability.norm_excess(e, -3 * e) == 1
    reset = torch.tensor(-math.inf, dtype=F64)
    assert stability.operator_norm(e, 3 * e, reset) == 3
    assert stability.singular_pair(zero, e, reset) == (0, 0)


def test_gradients():
    a, b = (x.requires_grad_() for x in draw(2, 3, 4))
    g = (-torch.rand(3, dtype=F64)).requires_grad_()
    assert torch.autograd.gradcheck(stability.operator_norm, (a, b), fast_mode=True)
    assert torch.autograd.gradcheck(stability.operator_norm, (a, b, g), fast_mode=True)
    assert torch.autograd.gradcheck(stability.transition, (a, b, g), fast_mode=True)
    spectrum = lambda *x: stability.transition_spectrum(*x).real
    assert torch.autograd.gradcheck(spectrum, (a, b, g), fast_mode=True)
    opposite = (
        a.detach().clone().requires_grad_()
    )  # where the norm has a corner, a finite gradient still
    stability.operator_norm(opposite, -opposite).sum().backward()
    assert opposite.grad.isfinite().all()


# -- the norm theorem --------------------------------------------------------------------------------


def test_not_parallel_makes_something_longer():
    a, b = draw(2, 10_000, 3)
    b = b * torch.logspace(-3, 1, 10_000, dtype=F64)[:, None]
    excess = stability.norm_excess(a, b)
    assert (excess > 0).all()  # (4.6)
    inside = stability.transition_spectrum(a, b).abs().amax(-1) <= 1
    assert inside.sum() > 1000  # among them many whose eigenvalues say nothing of it


@pytest.mark.parametrize("K", [1, 2, 6])
def test_parallel_is_a_contraction_between_minus_two_and_zero(K):
    a = draw(1, K) * torch.logspace(-2, 2, 9, dtype=F64)[:, None]
    for size in torch.arange(-3, 1.01, 0.125, dtype=F64):
        b = size * a / (a * a).sum(-1, keepdim=True)
        inside = -2 <= size <= 0
        above = stability.norm_excess(a, b) > TIGHT
        assert above.any() == above.all() == (not inside), size  # (4.7)
        want = torch.full((9,), max(abs(1 + size), float(K > 1)), dtype=F64)
        assert (stability.operator_norm(a, b) - want).abs().max() <= TIGHT


def test_iff_on_a_grid():
    products, angles = torch.linspace(-3, 1, 33, dtype=F64), torch.linspace(0, 90, 19, dtype=F64)
    norm, radius = stability.plane(products, angles)
    contraction = norm <= 1 + TIGHT
    want = torch.zeros_like(contraction)
    want[0] = (products >= -2) & (products <= 0)
    want[:, products == 0] = True  # b = 0
    assert torch.equal(contraction, want)
    cosine = torch.deg2rad(angles).cos()[:, None]
    assert (radius - (1 + products * cosine).abs().clamp(min=1)).abs().max() <= TIGHT


@pytest.mark.parametrize("decay", [0.5, 0.8, 0.99])
def test_what_decay_buys(decay):
    norm, _ = stability.plane(
        torch.linspace(-3, 1, 41, dtype=F64), torch.linspace(0, 90, 19, dtype=F64), decay=decay
    )
    x, y = torch.meshgrid(
        torch.linspace(-3, 1, 41, dtype=F64),
        torch.deg2rad(torch.linspace(0, 90, 19, dtype=F64)),
        indexing="xy",
    )
    slack = 1 - decay**2 - (x.abs() + decay * x * y.cos())
    clear = slack.abs() > 1e-9
    want = (x.abs() <= 2) & (slack >= 0)
    assert torch.equal((norm <= 1)[clear], want[clear])  # (4.8)
    assert want[10].any()  # angles that are not 0


def test_the_delta_rule_between_zero_and_two():
    k = 3 * unit(7)
    for beta in torch.linspace(0, 3, 25, dtype=F64):
        step = beta / (k @ k)
        excess = stability.norm_excess(-step * k, k)
        assert (excess <= TIGHT) == (beta <= 2)
        moved = stability.transition_spectrum(-step * k, k)[-1].real
        assert abs(moved - (1 - beta)) <= TIGHT
        assert (moved < -TIGHT) == (beta > 1)  # negative eigenvalues


# -- products ----------------------------------------------------------------------------------------


def projections(T, x=2.0):
    """(4.10): two projections in turn, [1, T, 1, 2]."""
    a = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64)
    b = torch.tensor([[x, -1.0], [-1.0, x]], dtype=F64)
    return (y.repeat(T, 1)[None, :T, None] for y in (a, b))


def test_two_harmless_transitions_in_turn_diverge():
    a, b = projections(2000)
    M = stability.transition(a, b)[0, :2, 0]
    assert stability.transition_spectrum(a, b).abs().max() == 1
    for m in M:  # alone, each may come as often as it likes
        close(torch.linalg.matrix_power(m, 9), m)
    assert eigvals(M[1] @ M[0]).abs().max() == 4  # (4.10)
    growth = stability.product_norms(a, b)[0, :, 0]
    assert growth[-1] > 1995  # 2^1995: float64 ends at 2^1024
    close(growth[2:] - growth[:-2], torch.full((1998,), 2.0, dtype=F64) + 0 * growth[2:])


@pytest.mark.parametrize("per", PER)
def test_product_norms_are_norms_of_products(per):
    a, b = draw(2, 2, 9, 3, 4)
    g = {"none": None, "head": -torch.rand(2, 9, 3), "channel": -torch.rand(2, 9, 3, 4)}[per]
    M = stability.transition(a, b, g)
    for window in (None, 1, 4, 20):
        want = torch.zeros(2, 9, 3, dtype=F64)
        for t in range(9):
            first = 0 if window is None else t - t % window
            P = torch.eye(4, dtype=F64)
            for s in range(first, t + 1):
                P = M[:, s] @ P
            want[:, t] = matrix_norm(P, 2).log2()
        assert_rows_close(stability.product_norms(a, b, g, window=window), want, rtol=TIGHT)


def test_a_reset_ends_every_product():
    k, g = unit(1, 5, 1, 3), torch.zeros(1, 5, 1, dtype=F64)
    g[0, 2] = -math.inf
    x = stability.kda_transition(k, torch.ones(1, 5, 1, dtype=F64), g)
    assert stability.product_norms(*x)[0, 2:].tolist() == [[-math.inf]] * 3
    assert stability.stability_report(*x).verdict == "contraction"


def test_products_in_float32_overflow_where_doublings_do_not():
    a, b = (x.float() for x in projections(300))
    assert stability.product_norms(a, b).isfinite().all()
    P = torch.eye(2)
    for m in stability.transition(a, b)[0, :, 0].float():
        P = m @ P
    assert not P.isfinite().all()


# -- safe parametrisations ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_safe_parallel_is_safe_for_any_number(dtype):
    raw = torch.linspace(-40, 40, 81, dtype=dtype)
    for size in (0.0, 1e-6, 1e-3, 1.0, 1e3):
        a = size * unit(81, 6).to(dtype)
        b = stability.safe_parallel(a, raw)
        assert b.dtype == dtype
        excess = stability.norm_excess(a, b)
        assert excess.max() <= (TIGHT if dtype == torch.float64 else 1e-6)
    assert b.abs().max() > 0
    ends = (a * stability.safe_parallel(a, raw)).sum(-1)[[0, 40, -1]]
    assert (ends - torch.tensor([0.0, -1.0, -2.0], dtype=dtype)).abs().max() <= 1e-6
    assert not stability.safe_parallel(0 * a, raw).any()


def test_safe_parallel_in_half_precision_turns_b_a_little():
    a, raw = unit(50, 8).bfloat16(), torch.full((50,), 3.0)
    b = stability.safe_parallel(a, raw)
    assert b.dtype == torch.bfloat16
    assert 0 < stability.norm_excess(a, b).max() < 0.02


def test_safe_parallel_gradients():
    for a in (draw(3, 4), torch.zeros(3, 4, dtype=F64)):
        x = (a.requires_grad_(), draw(3).requires_grad_())
        safe = lambda a, raw: stability.safe_parallel(a, raw, eps=0.1)
        assert torch.autograd.gradcheck(safe, x)


@pytest.mark.parametrize("per", ["head", "channel"])
def test_kda_is_a_contraction_in_norm(per):
    k, g = unit(1, 400, 2, 6), -3 * torch.rand(1, 400, 2, 6, dtype=F64).square()
    g = g if per == "channel" else g[..., 0]
    for beta in (0.0, 0.5, 1.0, 2.0):
        x = stability.kda_transition(k, torch.full((1, 400, 2), beta, dtype=F64), g)
        most = g.exp() if per == "head" else g.exp().amax(-1)
        assert (stability.operator_norm(*x) - most).max() <= 1e-7  # eps^(1/2) at beta = 2
        report = stability.stability_report(*x)
        assert report.verdict == "contraction"
        assert not report.not_parallel.any()
        assert not report.out_of_range.any()
    long = stability.kda_transition(k, torch.full((1, 400, 2), 2.5, dtype=F64), 0 * g)
    assert (stability.operator_norm(*long) - 1.5).abs().max() <= TIGHT


def test_decay_after_the_erase_is_one_too():
    k, D = unit(1, 50, 1, 6), torch.rand(1, 50, 1, 6, dtype=F64)
    report = stability.stability_report(-1.5 * k, D * k, D.log())
    assert report.verdict == "contraction"
    assert not report.not_parallel.any()


def test_rwkv7_has_a_bounded_spectrum():
    raw, kappa = 4 * draw(3000, 5), draw(3000, 5)
    alpha = torch.rand(3000, 5, dtype=F64)
    alpha[:1000] = alpha[:1000].round()  # the limits 0 and 1
    a, b, g = stability.rwkv7_transition(raw, kappa, alpha)
    spectrum = stability.transition_spectrum(a, b, g)
    n = normalize(kappa, dim=-1)
    m = alpha.sqrt() * n
    symmetric = torch.diag_embed(g.exp()) - m[..., :, None] * m[..., None, :]
    assert spectrum.imag.abs().max() <= 1e-6  # defective where alpha is 0: roots of rounding
    assert (spectrum.real.sort(-1).values - torch.linalg.eigvalsh(symmetric)).abs().max() <= 1e-6
    assert spectrum.real.min() > -0.5
    assert spectrum.real.max() <= g.exp().max() + 1e-6
    assert (g > -0.6066).all()


def rwkv7_pair(raw_decay):
    """Two transitions that RWKV-7 may choose, in turn: [1, 40, 1, 2]."""
    x = math.pi / 8
    kappa = torch.tensor([[math.cos(x), -math.sin(x)], [-math.sin(x), math.cos(x)]], dtype=F64)
    alpha = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64)
    sequence = [y.repeat(20, 1)[None, :, None] for y in (kappa, alpha)]
    return stability.rwkv7_transition(torch.full_like(sequence[0], raw_decay), *sequence)


def test_rwkv7_may_make_something_longer_and_its_products_may_diverge():
    x = rwkv7_pair(raw_decay=-4.0)  # 1 % of the state fades each token
    assert stability.operator_norm(*x).min() > 1.05
    report = stability.stability_report(*x)
    assert report.radius < 1
    assert report.growth > 5
    assert report.verdict == "can blow up"
    assert "a product of spectral radius 2^" in report.reason
    strong = stability.stability_report(*rwkv7_pair(raw_decay=4.0))
    assert strong.verdict == "contraction"


# -- reports -----------------------------------------------------------------------------------------


def tokens(B=2, T=12, H=2, K=4, beta=None, dtype=F64):
    k = unit(B, T, H, K)
    beta = 2 * torch.rand(B, T, H, 1, dtype=F64) if beta is None else beta
    k = k.to(dtype)
    return (-beta * k).to(dtype), k


def test_report_on_the_identity():
    report = stability.stability_report(*(torch.zeros(1, 5, 2, 3),) * 2)
    assert report.verdict == "contraction"
    assert report.norm == report.radius == 1
    assert report.growth == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_report_on_the_delta_rule(dtype):
    report = stability.stability_report(*tokens(dtype=dtype))
    assert report.verdict == "contraction"
    assert report.reason == "0 of 48 tokens have a norm above 1"
    assert abs(report.norm - 1) <= 1e-6
    assert not report.not_parallel.any()
    assert not report.out_of_range.any()


def test_report_on_bfloat16_is_about_the_rounded_vectors():
    report = stability.stability_report(*tokens(beta=1.5, dtype=torch.bfloat16))
    assert report.verdict != "contraction"
    assert report.not_parallel.any()
    assert 1 < report.norm < 1.01


def test_report_on_a_step_beyond_two():
    report = stability.stability_report(*tokens(beta=2.5))
    assert report.verdict == "can blow up"
    assert abs(report.norm - 1.5) <= TIGHT
    assert abs(report.radius - 1.5) <= TIGHT
    assert report.out_of_range.all()
    assert not report.not_parallel.any()


def one_bad_token(eigenvalue):
    a, b = tokens()
    a[1, 5, 1] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    b[1, 5, 1] = torch.tensor([2.0, eigenvalue - 1, 0.0, 0.0])
    return a, b


def test_report_on_one_bad_token():
    a, b = one_bad_token(0.0)
    report = stability.stability_report(a, b)
    assert report.verdict == "bounded so far"
    assert report.reason == "1 of 48 tokens have a norm above 1"
    assert abs(report.norm - 5**0.5) <= TIGHT
    assert report.norm_at == (1, 5, 1)
    assert abs(report.growth - math.log2(5) / 2) <= TIGHT
    assert report.window == (5, 6)
    assert report.window_at == (1, 1)
    assert report.not_parallel.nonzero().tolist() == [[1, 5, 1]]
    text = str(report)
    assert "largest norm of a token      2.23607 at batch 1, token 5, head 1" in text
    assert "a, b not parallel            1 of 48 tokens, first at batch 1, token 5, head 1" in text
    assert len(text.splitlines()) <= 10
    assert max(map(len, text.splitlines())) <= 100


def test_report_on_a_bad_eigenvalue_and_on_a_shear():
    report = stability.stability_report(*one_bad_token(-1.5))
    assert report.verdict == "can blow up"
    assert report.radius_at == (1, 5, 1)
    assert report.reason == "spectral radius 1.5 at batch 1, token 5, head 1"
    shear = stability.stability_report(*one_bad_token(1.0))
    assert shear.radius == 1
    assert shear.verdict == "can blow up"
    assert shear.reason == "a shear, whose powers grow, at batch 1, token 5, head 1"


def test_decay_that_saves_a_bad_token():
    a, b = one_bad_token(0.0)
    a, b = a / 4, b / 4  # not parallel still, and too long without decay
    assert stability.stability_report(a, b).norm > 1
    report = stability.stability_report(a, b, torch.full((2, 12, 2), math.log(0.8)))
    assert report.verdict == "contraction"
    assert report.not_parallel[1, 5, 1]  # sufficient, not necessary


def test_decay_beside_an_unchanged_erase_is_no_contraction():
    a, b = tokens(beta=2.0)
    g = torch.full((2, 12, 2), math.log(0.5), dtype=F64)
    report = stability.stability_report(a, b, g)  # 0.5 I - 2 k k^T, not (I - 2 k k^T) 0.5
    assert report.out_of_range.all()
    assert abs(report.radius - 1.5) <= TIGHT
    assert stability.stability_report(0.5 * a, b, g).verdict == "contraction"


def test_report_on_projections_in_turn():
    report = stability.stability_report(*projections(40))
    assert report.radius == 1
    assert report.verdict == "can blow up"
    assert report.window == (0, 40)
    assert report.windows_complete
    assert report.reason == "a product of spectral radius 2^40, tokens 0 to 39, batch 0, head 0"


@pytest.mark.parametrize("per", PER)
def test_largest_window_against_all_windows(per):
    for seed in range(5):
        torch.manual_seed(seed)
        a, b = 0.7 * draw(2, 1, 10, 2, 3)
        g = {"none": None, "head": -torch.rand(1, 10, 2), "channel": -torch.rand(1, 10, 2, 3)}[per]
        best = (-math.inf, None)
        for start in range(10):
            span = slice(start, None)
            part = [None if x is None else x[:, span] for x in (a, b, g)]
            growth = stability.product_norms(*part)
            t, h = divmod(int(growth.argmax()), 2)
            best = max(best, (growth.max().item(), (start, start + t + 1, h)))
        report = stability.stability_report(a, b, g)
        assert report.windows_complete
        assert abs(report.growth - best[0]) <= 1e-11
        assert (*report.window, report.window_at[1]) == best[1]


def test_many_bad_tokens_are_sampled():
    a, b = draw(2, 1, 200, 1, 3) / 2
    report = stability.stability_report(a, b)
    assert not report.windows_complete
    assert "not all windows were looked at" in str(report)
    assert report.growth >= stability.product_norms(a, b).max() - 1


@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (0, 5, 3, 4), (2, 5, 0, 4)])
@pytest.mark.parametrize("per", PER)
def test_no_token(shape, per):
    a = torch.zeros(shape)
    g = {"none": None, "head": torch.zeros(shape[:-1]), "channel": a}[per]
    report = stability.stability_report(a, a, g)
    assert report.verdict == "contraction"
    assert (report.norm, report.norm_at, report.growth, report.window) == (0, None, 0, None)
    assert "0 of 0 tokens" in str(report)
    assert stability.product_norms(a, a, g).shape == shape[:-1]


def test_one_channel():
    a, b = torch.ones(1, 3, 1, 1), torch.tensor([-0.5, -2.0, -3.0])[None, :, None, None]
    assert stability.operator_norm(a, b).flatten().tolist() == [0.5, 1.0, 2.0]
    assert stability.product_norms(a, b).flatten().tolist() == [-1.0, -1.0, 0.0]
    report = stability.stability_report(a, b)
    assert report.verdict == "can blow up"
    assert report.radius_at == (0, 2, 0)
    assert report.out_of_range.flatten().tolist() == [False, False, True]


def test_inputs_stay_and_carry_no_graph():
    a, b = (x.requires_grad_() for x in tokens())
    kept = a.detach().clone()
    stability.stability_report(a, b)
    assert not stability.product_norms(a, b).requires_grad
    assert torch.equal(a, kept)


A = torch.zeros(1, 2, 3, 4)
NAN = A.clone()
NAN[0, 1, 2, 3] = math.nan
WRONG = [
    ("operator_norm: b must have shape [4], got [3]", "operator_norm", (torch.ones(4), torch.ones(3))),
    ("transition: a must have a last dimension of at least 1, got [2, 0]", "transition", (A[0, :, 0, :0],) * 2),
    ("transition: log_decay must have shape [1, 2, 3] or [1, 2, 3, 4], got [1, 2]", "transition", (A, A, A[..., 0, 0])),
    ("norm_excess: log_decay must be <= 0 (the decay's natural", "norm_excess", (A, A, A[..., 0] + 1)),
    ("stability_report: a must be a torch.Tensor, got list", "stability_report", ([1.0], A)),
    ("stability_report: b must have a floating dtype, got int64", "stability_report", (A, A.long())),
    ("stability_report: a must have shape [B, T, H, K], got [2, 3, 4]", "stability_report", (A[0], A[0])),
    ("stability_report: b must be finite, got nan at [0, 1, 2, 3]", "stability_report", (A, NAN)),
    ("product_norms: a must be finite, got nan at [0, 1, 2, 3]", "product_norms", (NAN, A)),
    ("safe_parallel: raw must have shape [1, 2, 3], got [1]", "safe_parallel", (A, torch.ones(1))),
    ("kda_transition: beta must have shape [1, 2, 3], got [1, 2, 3, 4]", "kda_transition", (A, A, A)),
    ("rwkv7_transition: alpha must be in [0, 1], got 2 at [0, 0, 0, 0]", "rwkv7_transition", (A, A, A + 2)),
]  # fmt: skip


@pytest.mark.parametrize(("message", "name", "arguments"), WRONG, ids=[m for m, *_ in WRONG])
def test_wrong_calls_are_named(message, name, arguments):
    f = getattr(stability, name)
    while hasattr(
        f, "__wrapped__"
    ):  # without the shape hook of the test run, which would answer first
        f = f.__wrapped__
    kind = TypeError if "torch.Tensor" in message or "dtype" in message else ValueError
    with pytest.raises(kind, match=re.escape(message)):
        f(*arguments)


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        stability.product_norms(A, A, window=0)
    with pytest.raises(ValueError, match="tolerance must be >= 0, got -1"):
        stability.stability_report(A, A, tolerance=-1.0)
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        stability.safe_parallel(A, A[..., 0], eps=0.0)
