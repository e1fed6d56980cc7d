"""Every wrong call is answered with the argument, what was wanted and what was got; the golden file has the words.

After a change of words: `python -m pytest tests/test_arguments.py --write-golden`, and read the difference.
"""

import time
from pathlib import Path

import pytest
import torch

from gdr_teach import (
    delta_rule,
    delta_rule_step,
    dplr_delta_rule,
    dplr_delta_rule_step,
    explain,
    gated_delta_rule,
    gated_delta_rule_step,
    iplr_delta_rule,
    iplr_delta_rule_step,
    value_checks,
)
from gdr_teach.arguments import check_call, check_cu_seqlens_values, check_positive_int
from gdr_teach.delta.reference import delta_chunkwise
from gdr_teach.dplr.reference import dplr_chunkwise
from gdr_teach.gated.reference import gated_chunkwise
from gdr_teach.iplr.reference import iplr_chunkwise
from gdr_teach.testing import delta_inputs, dplr_inputs, gated_inputs, iplr_inputs

GOLDEN = Path(__file__).parent / "golden" / "arguments.txt"
X = delta_inputs(2, 5, 3, 4, 6, dtype=torch.float32)
P = delta_inputs(1, 5, 3, 4, 6, dtype=torch.float32, N=2)  # packed: two documents
CU = torch.tensor([0, 2, 5])
G = gated_inputs(2, 5, 3, 4, 6, dtype=torch.float32)
I = iplr_inputs(2, 5, 3, 4, 6, dtype=torch.float32)
D = dplr_inputs(2, 5, 3, 4, 6, dtype=torch.float32)


def call(**changed):
    """delta_rule with right arguments but for those given."""
    arguments = X._asdict() | changed
    first = [arguments.pop(name) for name in ("q", "k", "v", "beta")]
    return delta_rule(*first, **arguments)


def packed(cu_seqlens, **changed):
    """The same, for packed sequences."""
    return call(**(P._asdict() | {"cu_seqlens": cu_seqlens} | changed))


def gated(**changed):
    """gated_delta_rule with right arguments but for those given."""
    arguments = G._asdict() | changed
    first = [arguments.pop(name) for name in ("q", "k", "v", "beta", "log_decay")]
    return gated_delta_rule(*first, **arguments)


def iplr(**changed):
    """iplr_delta_rule with right arguments but for those given."""
    arguments = I._asdict() | changed
    first = [arguments.pop(name) for name in ("q", "k", "v", "a", "b")]
    return iplr_delta_rule(*first, **arguments)


def dplr(**changed):
    """dplr_delta_rule with right arguments but for those given."""
    arguments = D._asdict() | changed
    first = [arguments.pop(name) for name in ("q", "k", "v", "a", "b", "log_decay")]
    return dplr_delta_rule(*first, **arguments)


def gate(at, value):
    """A gate that is right but for one number."""
    g = G.log_decay.clone()
    g[at] = value
    return g


OF_A_STEP = {
    delta_rule_step: X,
    gated_delta_rule_step: G,
    iplr_delta_rule_step: I,
    dplr_delta_rule_step: D,
}


def step(op=delta_rule_step, **changed):
    """One token of a rule with right arguments but for those given; `state` in place of the initial state."""
    x = OF_A_STEP[op]
    arguments = {name: y[:, 0] for name, y in x._asdict().items() if name != "initial_state"}
    arguments |= {"state": x.initial_state} | changed
    return op(**arguments)


WRONG = {
    # type
    "q a list": lambda: call(q=[1.0]),
    "k None": lambda: call(k=None),
    "v numpy": lambda: call(v=X.v.numpy()),
    "beta a number": lambda: call(beta=0.5),
    "initial_state a number": lambda: call(initial_state=0.0),
    "cu_seqlens a list": lambda: packed([0, 2, 5]),
    "q sparse": lambda: call(q=X.q.to_sparse()),
    # rank
    "q without heads": lambda: call(q=X.q[:, :, 0]),
    "k with an axis too many": lambda: call(k=X.k[None]),
    "v without batch": lambda: call(v=X.v[0]),
    "beta with a last axis": lambda: call(beta=X.beta[..., None]),
    "beta without heads": lambda: call(beta=X.beta[..., 0]),
    "initial_state without batch": lambda: call(initial_state=X.initial_state[0]),
    "cu_seqlens with two axes": lambda: packed(CU[None]),
    "cu_seqlens a scalar": lambda: packed(CU[0]),
    # size
    "k longer": lambda: call(k=torch.cat([X.k, X.k], 1)),
    "k wider": lambda: call(k=torch.cat([X.k, X.k], 3)),
    "k with other heads": lambda: call(k=X.k[:, :, :2]),
    "v shorter": lambda: call(v=X.v[:, :4]),
    "v with another batch": lambda: call(v=X.v[:1]),
    "v with heads first": lambda: call(v=X.v.transpose(1, 2)),
    "beta shorter": lambda: call(beta=X.beta[:, :4]),
    "beta with heads first": lambda: call(beta=X.beta.transpose(1, 2)),
    "K = 0": lambda: call(q=X.q[..., :0], k=X.k[..., :0], initial_state=None),
    "V = 0": lambda: call(v=X.v[..., :0], initial_state=None),
    "initial_state transposed": lambda: call(initial_state=X.initial_state.mT),
    "initial_state of another batch": lambda: call(initial_state=X.initial_state[:1]),
    "initial_state for B instead of N": lambda: packed(CU, initial_state=P.initial_state[:1]),
    "cu_seqlens with B = 2": lambda: call(cu_seqlens=CU, initial_state=None),
    "cu_seqlens empty": lambda: packed(CU[:0]),
    # dtype
    "q integer": lambda: call(q=X.q.int()),
    "q complex": lambda: call(q=X.q.to(torch.complex64)),
    "q bool": lambda: call(q=X.q > 0),
    "q float8": lambda: call(q=X.q.to(torch.float8_e4m3fn)),
    "k in another dtype": lambda: call(k=X.k.half()),
    "v in another dtype": lambda: call(v=X.v.double()),
    "beta in half beside float32": lambda: call(beta=X.beta.half()),
    "beta in double beside float32": lambda: call(beta=X.beta.double()),
    "beta in float32 beside double": lambda: call(
        **{n: x.double() for n, x in X._asdict().items()} | {"beta": X.beta.half()}
    ),
    "initial_state in half": lambda: call(initial_state=X.initial_state.half()),
    "initial_state in bfloat16 beside bfloat16": lambda: call(
        **{n: x.bfloat16() for n, x in X._asdict().items()}
    ),
    "initial_state in float32 beside double": lambda: call(
        **{n: x.double() for n, x in X._asdict().items()} | {"initial_state": X.initial_state}
    ),
    "cu_seqlens in float": lambda: packed(CU.float()),
    "cu_seqlens in int16": lambda: packed(CU.short()),
    # device
    "k on meta": lambda: call(k=X.k.to("meta")),
    "initial_state on meta": lambda: call(initial_state=X.initial_state.to("meta")),
    "cu_seqlens on meta": lambda: packed(CU.to("meta")),
    "triton on meta": lambda: call(
        **{n: x.to("meta") for n, x in X._asdict().items()}, backend="triton"
    ),
    # values
    "cu_seqlens not from 0": lambda: packed(torch.tensor([1, 2, 5])),
    "cu_seqlens not to T": lambda: packed(torch.tensor([0, 2, 4])),
    "cu_seqlens beyond T": lambda: packed(torch.tensor([0, 2, 6])),
    "cu_seqlens falls": lambda: packed(torch.tensor([0, 7, 5])),
    "cu_seqlens negative": lambda: packed(torch.tensor([0, -1, 5])),
    "cu_seqlens falls, triton": lambda: packed(torch.tensor([0, 7, 5]), backend="triton"),
    "cu_seqlens lone end": lambda: packed(torch.tensor([5]), initial_state=None),
    # options
    "scale a tensor": lambda: call(scale=torch.tensor(0.5)),
    "scale a string": lambda: call(scale="0.5"),
    "scale a bool": lambda: call(scale=True),
    "scale complex": lambda: call(scale=1j),
    "mode unknown": lambda: call(mode="parallel"),
    "mode None": lambda: call(mode=None),
    "backend unknown": lambda: call(backend="cuda"),
    "backend a bool": lambda: call(backend=True),
    "triton K too wide": lambda: call(
        q=torch.zeros(2, 5, 3, 300),
        k=torch.zeros(2, 5, 3, 300),
        initial_state=None,
        backend="triton",
    ),
    "triton V too wide": lambda: call(
        v=torch.zeros(2, 5, 3, 257), initial_state=None, backend="triton"
    ),
    "segments zero": lambda: call(segments=0),
    "segments negative": lambda: gated(segments=-2),
    "segments a float": lambda: call(segments=2.0),
    "segments a bool": lambda: call(segments=True),
    "segments None": lambda: gated(segments=None),
    "argument unknown": lambda: call(output_final_state=True),
    "initial_state by position": lambda: delta_rule(*X),
    "beta missing": lambda: delta_rule(*X[:3]),
    # neighbours of the operator
    "explain of no operator": lambda: explain(len, X.q),
    "explain of wrong arguments": lambda: explain(delta_rule, X.q, X.k, X.v, X.beta[..., None]),
    "chunk size zero": lambda: delta_chunkwise(*X[:4], chunk_size=0),
    "chunk size negative": lambda: delta_chunkwise(*X[:4], chunk_size=-16),
    "chunk size a float": lambda: check_positive_int("delta_chunkwise", "chunk_size", 16.0),
    "chunk size a bool": lambda: delta_chunkwise(*X[:4], chunk_size=True),
    # the gate
    "log_decay None": lambda: gated(log_decay=None),
    "log_decay a number": lambda: gated(log_decay=-0.1),
    "log_decay missing": lambda: gated_delta_rule(*G[:4]),
    "log_decay without heads": lambda: gated(log_decay=G.log_decay[:, :, 0, 0]),
    "log_decay with an axis too many": lambda: gated(log_decay=G.log_decay[..., None]),
    "log_decay with one channel": lambda: gated(log_decay=G.log_decay[..., :1]),
    "log_decay of V channels": lambda: gated(log_decay=-X.v.abs()),
    "log_decay shorter": lambda: gated(log_decay=G.log_decay[:, :4]),
    "log_decay with heads first": lambda: gated(log_decay=G.log_decay.transpose(1, 2)),
    "log_decay in half beside float32": lambda: gated(log_decay=G.log_decay.half()),
    "log_decay in double beside float32": lambda: gated(log_decay=G.log_decay.double()),
    "log_decay integer": lambda: gated(log_decay=G.log_decay.int()),
    "log_decay on meta": lambda: gated(log_decay=G.log_decay.to("meta")),
    "log_decay positive": lambda: gated(log_decay=gate((1, 2, 0, 3), 0.25)),
    "log_decay positive, recurrent": lambda: gated(log_decay=gate(0, 1e-30), mode="recurrent"),
    "log_decay positive, triton": lambda: gated(
        log_decay=gate((0, 0), 5.0)[..., 0], backend="triton", mode="recurrent"
    ),
    "log_decay infinite": lambda: gated(log_decay=gate((0, 1), torch.inf)),
    "log_decay nan": lambda: gated(log_decay=gate((1, 4, 2, 1), torch.nan)),
    "log_decay below its promise": lambda: gated(
        log_decay=gate((1, 4, 2, 1), -7.0), min_log_decay=-5.0
    ),
    "log_decay -inf below a promise": lambda: gated(
        log_decay=gate((0, 3), -torch.inf), min_log_decay=-5
    ),
    "min_log_decay positive": lambda: gated(min_log_decay=5.0),
    "min_log_decay nan": lambda: gated(min_log_decay=float("nan")),
    "min_log_decay a tensor": lambda: gated(min_log_decay=torch.tensor(-5.0)),
    "min_log_decay a bool": lambda: gated(min_log_decay=False),
    "min_log_decay a string": lambda: gated(min_log_decay="-5"),
    "beta in half beside a gate": lambda: gated(beta=G.beta.half()),
    "gated: K = 0": lambda: gated(
        q=G.q[..., :0], k=G.k[..., :0], log_decay=G.log_decay[..., :0], initial_state=None
    ),
    "gated: mode unknown": lambda: gated(mode="parallel"),
    "gated: explain of a wrong promise": lambda: explain(
        gated_delta_rule, *G[:-1], min_log_decay=1
    ),
    "gated: chunk size zero": lambda: gated_chunkwise(*G[:-1], chunk_size=0),
    # directions of their own
    "a a list": lambda: iplr(a=[1.0]),
    "b None": lambda: iplr(b=None),
    "a missing": lambda: iplr_delta_rule(*I[:3], b=I.b),
    "b missing": lambda: iplr_delta_rule(*I[:4]),
    "a without heads": lambda: iplr(a=I.a[:, :, 0]),
    "a with one number a token": lambda: iplr(a=X.beta),
    "b with an axis too many": lambda: iplr(b=I.b[None]),
    "a in v's place": lambda: iplr(v=I.a, a=I.v),
    "b in v's place": lambda: iplr(v=I.b, b=I.v),
    "a wider": lambda: iplr(a=torch.cat([I.a, I.a], 3)),
    "a shorter": lambda: iplr(a=I.a[:, :4]),
    "b with other heads": lambda: iplr(b=I.b[:, :, :2]),
    "b with another batch": lambda: iplr(b=I.b[:1]),
    "b with heads first": lambda: iplr(b=I.b.transpose(1, 2)),
    "a in half": lambda: iplr(a=I.a.half()),
    "b in double": lambda: iplr(b=I.b.double()),
    "a in float32 beside bfloat16": lambda: iplr(
        **{n: x.bfloat16() for n, x in I._asdict().items()} | {"a": I.a}
    ),
    "b integer": lambda: iplr(b=I.b.int()),
    "a on meta": lambda: iplr(a=I.a.to("meta")),
    "b sparse": lambda: iplr(b=I.b.to_sparse()),
    "iplr: K = 0": lambda: iplr(
        **{n: x[..., :0] for n, x in I._asdict().items()} | {"v": I.v, "initial_state": None}
    ),
    "iplr: V = 0": lambda: iplr(v=I.v[..., :0], initial_state=None),
    "iplr: initial_state transposed": lambda: iplr(initial_state=I.initial_state.mT),
    "iplr: initial_state in half": lambda: iplr(initial_state=I.initial_state.half()),
    "iplr: cu_seqlens with B = 2": lambda: iplr(cu_seqlens=CU, initial_state=None),
    "iplr: cu_seqlens falls": lambda: iplr_delta_rule(
        *(x[:1] for x in I[:-1]), cu_seqlens=torch.tensor([0, 7, 5])
    ),
    "iplr: scale a tensor": lambda: iplr(scale=torch.tensor(0.5)),
    "iplr: mode unknown": lambda: iplr(mode="parallel"),
    "iplr: backend unknown": lambda: iplr(backend="cuda"),
    "iplr: log_decay given": lambda: iplr(log_decay=D.log_decay),
    "iplr: log_decay by position": lambda: iplr_delta_rule(*D[:-1]),
    "iplr: a promise": lambda: iplr(min_log_decay=-5.0),
    "iplr: triton K too wide": lambda: iplr_delta_rule(
        *(torch.zeros(2, 5, 3, 300) for _ in range(5)), backend="triton"
    ),
    "iplr: triton on meta": lambda: iplr(
        **{n: x.to("meta") for n, x in I._asdict().items()}, backend="triton"
    ),
    "iplr: explain of b in v's place": lambda: explain(iplr_delta_rule, I.q, I.k, I.b, I.a, I.v),
    "iplr: chunk size zero": lambda: iplr_chunkwise(*I[:-1], chunk_size=0),
    "dplr: log_decay missing": lambda: dplr_delta_rule(*D[:5]),
    "dplr: log_decay None": lambda: dplr(log_decay=None),
    "dplr: log_decay a number": lambda: dplr(log_decay=-0.1),
    "dplr: log_decay with an axis too many": lambda: dplr(log_decay=D.log_decay[..., None]),
    "dplr: log_decay of V channels": lambda: dplr(log_decay=-D.v.abs()),
    "dplr: log_decay in half beside float32": lambda: dplr(log_decay=D.log_decay.half()),
    "dplr: log_decay on meta": lambda: dplr(log_decay=D.log_decay.to("meta")),
    "dplr: log_decay positive": lambda: dplr(log_decay=gate((1, 2, 0, 3), 0.25)),
    "dplr: log_decay positive, triton": lambda: dplr(
        log_decay=gate((0, 0), 5.0)[..., 0], backend="triton", mode="recurrent"
    ),
    "dplr: log_decay nan": lambda: dplr(log_decay=gate((1, 4, 2, 1), torch.nan)),
    "dplr: log_decay below its promise": lambda: dplr(
        log_decay=gate((1, 4, 2, 1), -7.0), min_log_decay=-5.0
    ),
    "dplr: min_log_decay positive": lambda: dplr(min_log_decay=5.0),
    "dplr: min_log_decay a tensor": lambda: dplr(min_log_decay=torch.tensor(-5.0)),
    "dplr: a in v's place": lambda: dplr(v=D.a, a=D.v),
    "dplr: b in half": lambda: dplr(b=D.b.half()),
    "dplr: a in float32 beside float16": lambda: dplr(
        **{n: x.half() for n, x in D._asdict().items()} | {"a": D.a, "initial_state": None}
    ),
    "dplr: K = 0": lambda: dplr(
        **{n: x[..., :0] for n, x in D._asdict().items()} | {"v": D.v, "initial_state": None}
    ),
    "dplr: initial_state for another batch": lambda: dplr(initial_state=D.initial_state[:1]),
    "dplr: cu_seqlens in float": lambda: dplr(cu_seqlens=CU.float()),
    "dplr: mode unknown": lambda: dplr(mode="parallel"),
    "dplr: triton V too wide": lambda: dplr(
        v=torch.zeros(2, 5, 3, 257), initial_state=None, backend="triton"
    ),
    "dplr: explain of a wrong promise": lambda: explain(dplr_delta_rule, *D[:-1], min_log_decay=1),
    "dplr: chunk size negative": lambda: dplr_chunkwise(*D[:-1], chunk_size=-16),
    # one token
    "step of a sequence": lambda: delta_rule_step(*X),
    "step: v without batch": lambda: step(v=X.v[0, 0]),
    "step: beta in half": lambda: step(beta=X.beta[:, 0].half()),
    "step: state None": lambda: step(state=None),
    "step: state transposed": lambda: step(state=X.initial_state.mT),
    "step: state in half": lambda: step(state=X.initial_state.half()),
    "step: state on meta": lambda: step(state=X.initial_state.to("meta")),
    "step: scale a tensor": lambda: step(scale=torch.tensor(0.5)),
    "step: inplace a number": lambda: step(inplace=1),
    "step: inplace with gradients": lambda: step(
        state=X.initial_state.clone().requires_grad_(), inplace=True
    ),
    "gated step: log_decay of V channels": lambda: step(
        gated_delta_rule_step, log_decay=-G.v[:, 0].abs()
    ),
    "gated step: log_decay positive": lambda: step(
        gated_delta_rule_step,
        log_decay=gate((1, 0, 2), 0.5)[:, 0],
        state=G.initial_state.clone(),
        inplace=True,
    ),
    "iplr step of a sequence": lambda: iplr_delta_rule_step(*I),
    "iplr step: a in v's place": lambda: step(iplr_delta_rule_step, v=I.a[:, 0], a=I.v[:, 0]),
    "iplr step: b in half": lambda: step(iplr_delta_rule_step, b=I.b[:, 0].half()),
    "iplr step: state None": lambda: step(iplr_delta_rule_step, state=None),
    "iplr step: inplace with gradients": lambda: step(
        iplr_delta_rule_step, a=I.a[:, 0].clone().requires_grad_(), inplace=True
    ),
    "dplr step: a without batch": lambda: step(dplr_delta_rule_step, a=D.a[0, 0]),
    "dplr step: log_decay of V channels": lambda: step(
        dplr_delta_rule_step, log_decay=-D.v[:, 0].abs()
    ),
    "dplr step: log_decay positive": lambda: step(
        dplr_delta_rule_step,
        log_decay=gate((1, 0, 2), 0.5)[:, 0],
        state=D.initial_state.clone(),
        inplace=True,
    ),
    "dplr step: state transposed": lambda: step(dplr_delta_rule_step, state=D.initial_state.mT),
    "dplr step: inplace a string": lambda: step(dplr_delta_rule_step, inplace="yes"),
}


def answer(wrong) -> str:
    """The type and words of what a wrong call raises."""
    try:
        wrong()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def test_every_wrong_call_has_its_golden_answer(request):
    found = "".join(f"{name}\n    {answer(wrong)}\n" for name, wrong in WRONG.items())
    if request.config.getoption("--write-golden"):
        GOLDEN.write_text(found)
    assert found == GOLDEN.read_text()


def test_the_golden_answers_say_what_was_wanted_and_got():
    lines = GOLDEN.read_text().splitlines()
    answers = dict(zip(lines[::2], (line.strip() for line in lines[1::2]), strict=True))
    assert len(answers) >= 180
    from_python = (
        "argument unknown",
        "initial_state by position",
        "beta missing",
        "log_decay missing",
        "a missing",
        "b missing",
        "iplr: log_decay given",
        "iplr: log_decay by position",
        "iplr: a promise",
        "dplr: log_decay missing",
    )  # Python's own words
    rules = ("delta", "gated", "iplr", "dplr")
    ops = ["delta_rule", *(f"{rule}_delta_rule" for rule in rules[1:])]
    names = (
        *ops,
        *(f"{op}_step" for op in ops),
        "explain",
        *(f"{rule}_chunkwise" for rule in rules),
    )
    for name, words in answers.items():
        assert words != "nothing raised", name
        if name not in from_python:
            assert ", got " in words, f"{name}: {words}"
            assert words.split(": ")[1] in names, f"{name}: {words}"


def test_wrong_calls_launch_nothing_and_change_nothing():
    saved = [x.clone() for x in (*X, *P, *G, *I, *D)]
    for wrong in WRONG.values():
        answer(wrong)
    assert all(torch.equal(x, y) for x, y in zip((*X, *P, *G, *I, *D), saved, strict=True))


def test_the_checks_take_less_than_a_millisecond():
    options = {
        "scale": None,
        "initial_state": X.initial_state,
        "cu_seqlens": None,
        "mode": "auto",
        "backend": "auto",
    }
    layout = {"q": "B T H K", "k": "B T H K", "v": "B T H V", "beta": "B T H"}
    tensors = {name: getattr(X, name) for name in layout}
    times = []
    for _ in range(50):
        start = time.perf_counter()
        sizes = check_call("delta_rule", layout, tensors, **options)
        times.append(time.perf_counter() - start)
    assert tuple(sizes) == (2, 5, 3, 4, 6, 2)
    assert sorted(times)[25] < 1e-3


def test_what_is_right_is_accepted():
    call()
    call(scale=2, mode="recurrent", backend="torch")
    call(scale=0.0)
    packed(CU)
    packed(CU.int())
    call(
        **{n: x.half() for n, x in X._asdict().items()}
        | {"beta": X.beta, "initial_state": X.initial_state}
    )
    call(**{n: x.bfloat16() for n, x in X._asdict().items()} | {"initial_state": None})
    gated()
    gated(log_decay=gate((0, 1), -torch.inf), min_log_decay=-torch.inf)
    gated(log_decay=G.log_decay[..., 0], min_log_decay=-1)
    gated(log_decay=torch.zeros_like(G.log_decay), min_log_decay=0.0)
    step(inplace=False)
    step(gated_delta_rule_step, log_decay=G.log_decay[:, 0, :, 0])
    iplr()
    iplr(scale=2, mode="chunk", backend="torch")
    iplr(**{n: x.bfloat16() for n, x in I._asdict().items()} | {"initial_state": None})
    dplr()
    dplr(log_decay=gate((0, 1), -torch.inf), min_log_decay=-torch.inf)
    dplr(log_decay=D.log_decay[..., 0], min_log_decay=-1)
    half = {n: x.half() for n, x in D._asdict().items()}
    dplr(**half | {"log_decay": D.log_decay, "initial_state": D.initial_state})
    step(iplr_delta_rule_step)
    step(dplr_delta_rule_step, log_decay=D.log_decay[:, 0, :, 0])
    wide = torch.zeros(2, 5, 3, 300)
    assert explain(delta_rule, wide, wide, X.v, X.beta).backend == "torch"


def test_values_on_a_device_are_looked_at_only_when_asked(monkeypatch):
    """CUDA tensors without a GPU: a stand-in that says where it lives and counts who looks."""

    class Far:
        device = torch.device("cuda")
        looked = 0

        def tolist(self):
            self.looked += 1
            return [0, 9, 5]

    far = Far()
    check_cu_seqlens_values("delta_rule", far, 5)
    assert far.looked == 0
    with value_checks(), pytest.raises(ValueError, match="must not decrease, got 9 then 5"):
        check_cu_seqlens_values("delta_rule", far, 5)
    assert far.looked == 1
    check_cu_seqlens_values("delta_rule", far, 5)
    assert far.looked == 1
