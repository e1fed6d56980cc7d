"""One source, three ways: interpreted, compiled ahead of time, recorded; and an interpreter that tells the truth."""

import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from gdr_teach import runtime
from gdr_teach.aot import TARGETS, compile_launch
from gdr_teach.runtime import (
    Observer,
    cdiv,
    kernel,
    new_empty,
    next_power_of_2,
    observe,
    poisoned,
    recorded,
)


@kernel
def twice(x):
    """A helper, called by kernels."""
    return x + x


@kernel
def helper_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    """y = 2 x, by a helper and by triton's own sum."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i, mask=i < n, other=0.0)
    tl.store(p_y + i, twice(b_x) + 0 * tl.sum(b_x, axis=0), mask=i < n)


@kernel
def loop_kernel(p_y, n):
    """y = 0 + 1 + ... + (n - 1), by a run-time loop."""
    total = 0
    for i in range(n):
        total += i
    tl.store(p_y, total)


def test_interpreted_for_cpu_tensors():
    x = torch.arange(30.0)
    y = torch.zeros(30)
    helper_kernel[(2,)](x, y, 30, 16)
    assert torch.equal(y, 2 * x)


def test_a_run_time_loop():
    y = torch.zeros(1, dtype=torch.int32)
    loop_kernel[(1,)](y, 10)
    assert y.item() == 45


@pytest.mark.parametrize("target", TARGETS)
def test_compiled_and_interpreted_in_one_process(target):
    x, y = torch.arange(30.0), torch.zeros(30)
    for _ in range(2):  # one after the other, and back: neither leaves anything behind
        with recorded() as launches:
            helper_kernel[(2,)](x, y, 30, BLOCK=16)
        assert compile_launch(launches[0], target).registers > 0
        helper_kernel[(2,)](x, y.zero_(), 30, 16)
        assert torch.equal(y, 2 * x)


def test_recording_runs_nothing():
    y = torch.zeros(30)
    with recorded() as launches:
        helper_kernel[(2,)](torch.ones(30), y, 30, 16)
    assert not y.any()
    assert launches[0].kernel is helper_kernel
    assert launches[0].grid == (2,)


def test_plain_triton_is_left_as_it_was():
    before = {name: getattr(tl, name) for name in ("load", "store", "arange", "dot", "zeros")}
    helper_kernel[(2,)](torch.ones(30), torch.zeros(30), 30, 16)
    assert all(getattr(tl, name) is value for name, value in before.items())
    builder = runtime.interpreter_builder()
    assert type(builder).__module__ == "triton.runtime.interpreter"


def test_mixed_devices_are_named():
    with pytest.raises(ValueError, match=r"helper_kernel: all tensors .* p_x on cpu, p_y on meta"):
        helper_kernel[(2,)](torch.ones(30), torch.zeros(30, device="meta"), 30, 16)


def test_an_unknown_version_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(runtime.triton, "__version__", "4.1.0")
    with pytest.raises(
        RuntimeError, match=r"known version \(3\.6, 3\.7, 3\.8, 3\.9\), got triton 4\.1\.0"
    ):
        helper_kernel[(2,)](torch.ones(30), torch.zeros(30), 30, 16)


@pytest.mark.parametrize(
    ("text", "version"), [("3.6.0", (3, 6)), ("3.10.1+git", (3, 10)), ("main", (0, 0))]
)
def test_versions(text, version):
    assert runtime.triton_version(text) == version


def test_this_version_is_known():
    assert runtime.triton_version() in runtime.KNOWN_INTERPRETERS


@kernel
def failing_kernel(p_x):
    """Raises at run time on the interpreter."""
    tl.static_assert(False, "said on purpose")


def test_an_error_in_a_kernel_comes_out_as_itself_and_leaves_no_trace():
    for _ in range(2):
        with pytest.raises(AssertionError, match="said on purpose"):
            failing_kernel[(1,)](torch.ones(1))
    test_interpreted_for_cpu_tensors()


@kernel
def missing_name_kernel(p_x):
    """Uses a name that this module does not have, and plain triton's interpreter would bring along."""
    tl.store(p_x, dataclasses.field)  # noqa: F821


def test_a_kernel_sees_its_own_names_only():
    with pytest.raises(NameError, match="dataclasses"):
        missing_name_kernel[(1,)](torch.ones(1))
    assert "InterpreterBuilder" not in globals()


def test_observers_hear_every_access():
    class Listener(Observer):
        def __init__(self):
            self.heard = []

        def allocated(self, tensor):
            self.heard.append(("allocated", tuple(tensor.shape)))

        def launched(self, name, tensors, grid):
            self.heard.append((name, sorted(tensors), grid))

        def loaded(self, access):
            self.heard.append(("load", access.argument, access.program[0], len(access.addresses)))

        def stored(self, access):
            self.heard.append(("store", access.argument, access.program[0], len(access.addresses)))

    x = torch.ones(30)
    with observe(Listener()) as listener:
        y = new_empty((30,), dtype=x.dtype, device=x.device)
        helper_kernel[(2,)](x, y, 30, 16)
    assert listener.heard == [
        ("allocated", (30,)),
        ("helper_kernel", ["p_x", "p_y"], (2,)),
        ("load", "p_x", 0, 16),
        ("store", "p_y", 0, 16),
        ("load", "p_x", 1, 14),
        ("store", "p_y", 1, 14),
    ]


def test_poison():
    make = lambda: new_empty((3, 2), dtype=torch.float16, device=torch.device("cpu"))
    with poisoned():
        assert make().isnan().all()
        with poisoned(7.0):
            assert (make() == 7).all()
        assert make().isnan().all()
    assert make().shape == (3, 2)


@kernel
def loads_without_other_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    """y = x where it was loaded; what stands in the other lanes is nobody's business."""
    i = tl.arange(0, BLOCK)
    tl.store(p_y + i, tl.load(p_x + i, mask=i < n))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32]
)
def test_poison_where_a_load_leaves_out_lanes(dtype):
    x, y = torch.arange(4).to(dtype), torch.zeros(4, dtype=dtype)
    with poisoned():
        loads_without_other_kernel[(1,)](x, y, 3, 4)
    assert torch.equal(y[:3], x[:3])
    assert y[3] == torch.iinfo(dtype).min if dtype == torch.int32 else y[3].isnan()


@pytest.mark.parametrize(("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_next_power_of_2(n, power):
    assert next_power_of_2(n) == power


def test_cdiv():
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_with_the_environment_variable_of_plain_triton():
    code = (
        "import torch, triton.language as tl\n"
        "from gdr_teach import delta_rule\n"
        "q = torch.ones(1, 3, 1, 2)\n"
        "out = delta_rule(q, q, q, torch.ones(1, 3, 1), backend='triton')\n"
        "assert torch.isfinite(out.o).all()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**__import__("os").environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# -- bfloat16 ----------------------------------------------------------------------------------------------------------


@kernel
def bf16_kernel(p_x, p_y, p_z, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    """One operation on bfloat16 blocks, named by OP."""
    i = tl.arange(0, BLOCK)
    x = tl.load(p_x + i, mask=i < n, other=1.0)
    y = tl.load(p_y + i, mask=i < n, other=1.0)
    if OP == "add":
        z = x + y
    elif OP == "subtract":
        z = x - y
    elif OP == "multiply":
        z = x * y
    elif OP == "negate":
        z = -x
    elif OP == "scalar":
        z = x * 0.3 + 1
    elif OP == "where":
        z = tl.where(x > y, x, y)
    elif OP == "equal":
        z = tl.where(x == x, y, x)
    elif OP == "maximum":
        z = tl.maximum(x.to(tl.float32), y.to(tl.float32)).to(tl.bfloat16)
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "exp":
        z = tl.exp(x.to(tl.float32)).to(tl.bfloat16)
    elif OP == "sum":
        z = tl.sum(x, axis=0) + tl.zeros([BLOCK], dtype=tl.bfloat16)
    elif OP == "max":
        z = tl.max(x, axis=0).to(tl.bfloat16) + tl.zeros([BLOCK], dtype=tl.bfloat16)
    elif OP == "cumsum":
        z = tl.cumsum(x, axis=0)
    elif OP == "full":
        z = tl.full([BLOCK], 0.3, dtype=tl.bfloat16)
    elif OP == "half":
        z = x.to(tl.float16).to(tl.bfloat16)
    elif OP == "double":
        z = (x.to(tl.float64) / 3).to(tl.bfloat16)
    elif OP == "int":
        z = x.to(tl.int32).to(tl.bfloat16)
    tl.store(p_z + i, z, mask=i < n)


BF16 = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "negate": lambda x, y: -x,
    "scalar": lambda x, y: (x * torch.tensor(0.3).bfloat16()) + 1,
    "where": lambda x, y: torch.where(x > y, x, y),
    "equal": lambda x, y: y,
    "maximum": torch.maximum,
    "abs": lambda x, y: x.abs(),
    "exp": lambda x, y: x.float().exp().bfloat16(),
    "sum": lambda x, y: x.float().sum().bfloat16().expand_as(x),
    "max": lambda x, y: x.max().expand_as(x),
    "cumsum": lambda x, y: x.float().cumsum(0).bfloat16(),
    "full": lambda x, y: torch.full_like(x, 0.3),
    "half": lambda x, y: x.half().bfloat16(),
    "double": lambda x, y: (x.double() / 3).bfloat16(),
    "int": lambda x, y: x.int().bfloat16(),
}


@pytest.mark.parametrize("op", BF16)
def test_bfloat16_is_right_to_the_bit(op):
    x, y = (torch.randn(64) * 10).bfloat16(), torch.randn(64).bfloat16()
    z = torch.full((64,), float("nan"), dtype=torch.bfloat16)
    bf16_kernel[(1,)](x, y, z, 64, op, 64)
    want = BF16[op](x, y)
    assert want.dtype == torch.bfloat16
    assert torch.equal(z, want)


@kernel
def bf16_dot_kernel(p_x, p_y, p_z, N: tl.constexpr):
    """z = x y^T in float32, from bfloat16 operands."""
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x, y = tl.load(p_x + i * N + j), tl.load(p_y + i * N + j)
    tl.store(p_z + i * N + j, tl.dot(x, tl.trans(y)))


def test_bfloat16_dot():
    x, y = torch.randn(2, 16, 16).bfloat16()
    z = torch.empty(16, 16)
    bf16_dot_kernel[(1,)](x, y, z, 16)
    torch.testing.assert_close(z, x.float() @ y.float().T, rtol=1e-6, atol=1e-6)


@kernel
def store_float_kernel(p_x, p_z, BLOCK: tl.constexpr):
    """A float32 block stored to a bfloat16 pointer."""
    i = tl.arange(0, BLOCK)
    tl.store(p_z + i, tl.load(p_x + i).to(p_z.dtype.element_ty))


def test_rounding_to_bfloat16_is_to_nearest_even_with_every_special_value():
    special = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        1e-40,
        -1e-45,
        3.4e38,
        -3.4e38,
        1 + 2**-8,
        1 + 3 * 2**-8,
        1 + 2**-8 + 2**-20,
    ]
    x = torch.cat([torch.tensor(special), torch.randn(128 - len(special)) * 1e3])
    z = torch.empty(128, dtype=torch.bfloat16)
    store_float_kernel[(1,)](x, z, 128)
    want = x.bfloat16()
    assert torch.equal(z.isnan(), want.isnan())
    same = ~want.isnan()
    assert torch.equal(z[same].view(torch.int16), want[same].view(torch.int16))


@kernel
def atomic_kernel(p_x, p_z):
    """An atomic sum."""
    tl.atomic_add(p_z, tl.load(p_x))


def test_what_cannot_be_right_is_refused():
    z = torch.zeros(1, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="atomics on bfloat16"):
        atomic_kernel[(1,)](torch.ones(1).bfloat16(), z)
    z = torch.zeros(1)
    atomic_kernel[(3,)](torch.ones(1), z)
    assert z.item() == 3


def test_a_newer_triton_compiles_with_one_warning(monkeypatch):
    calls = []
    monkeypatch.setattr(runtime.triton, "__version__", "9.9.0")
    monkeypatch.setattr(
        triton.runtime.jit.JITFunction, "run", lambda self, *a, **kw: calls.append(self)
    )
    runtime._warn_untested.cache_clear()
    far = torch.ones(1, device="meta")  # not on the CPU: the compiled way
    with pytest.warns(UserWarning, match="triton 9.9.0 is newer than the tested 3.9"):
        failing_kernel[(1,)](far)
    failing_kernel[(1,)](far)  # a second warning would be an error here
    assert calls == [failing_kernel, failing_kernel]
    runtime._warn_untested.cache_clear()
