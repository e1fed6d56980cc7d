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
    explain,
    gated_delta_rule,
    gated_delta_rule_step,
    value_checks,
)
from gdr_teach.arguments import check_call, check_cu_seqlens_values, check_positive_int
from gdr_teach.delta.reference import delta_chunkwise
from gdr_teach.gated.reference import gated_chunkwise
from gdr_teach.testing import delta_inputs, gated_inputs

GOLDEN = Path(__file__).parent / "golden" / "arguments.txt"
X = delta_inputs(2, 5, 3, 4, 6, dtype=torch.float32)
P = delta_inputs(1, 5, 3, 4, 6, dtype=torch.float32, N=2)  # packed: two documents
CU = torch.tensor([0, 2, 5])
G = gated_inputs(2, 5, 3, 4, 6, dtype=torch.float32)


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


def gate(at, value):
    """A gate that is right but for one number."""
    g = G.log_decay.clone()
    g[at] = value
    return g


def step(op=delta_rule_step, **changed):
    """One token of a rule with right arguments but for those given; `state` in place of the initial state."""
    x = X if op is delta_rule_step else G
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
    assert len(answers) >= 60
    from_python = (
        "argument unknown",
        "initial_state by position",
        "beta missing",
        "log_decay missing",
    )  # Python's own words
    rules = ("delta_rule", "delta_rule_step", "gated_delta_rule", "gated_delta_rule_step")
    names = (*rules, "explain", "delta_chunkwise", "gated_chunkwise")
    for name, words in answers.items():
        assert words != "nothing raised", name
        if name not in from_python:
            assert ", got " in words, f"{name}: {words}"
            assert words.split(": ")[1] in names, f"{name}: {words}"


def test_wrong_calls_launch_nothing_and_change_nothing():
    saved = [x.clone() for x in (*X, *P, *G)]
    for wrong in WRONG.values():
        answer(wrong)
    assert all(torch.equal(x, y) for x, y in zip((*X, *P, *G), saved, strict=True))


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
