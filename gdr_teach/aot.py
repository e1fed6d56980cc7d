"""Compile a kernel for a GPU that is not there, and read what the compiler says of it.

    with recorded() as launches:
        delta_recurrent(q, k, v, beta)             # launches nothing, remembers what it would launch
    report = compile_launch(launches[0], "sm_90")  # registers, spilled bytes, shared memory

Needs no driver: the triton package carries its own assembler. Wrong numbers and time cannot be seen this way.
"""

import contextlib
import io
import re
from dataclasses import dataclass

import torch
import triton
import triton.knobs as knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .runtime import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}  # bytes a program may have
# bytes a thread may spill: 64 registers' worth, which stay in the first cache; exceptions: tools/compile_check.py
SPILL_BUDGET = {"sm_80": 256, "sm_90": 256, "gfx942": 256}
POINTER = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Report:
    """What one compiled kernel asks of one target: registers a thread, spilled and shared bytes.

    tensor_core counts the matrix instructions in the code (wgmma and mma on NVIDIA, mfma on AMD).
    """

    kernel: str
    target: str
    registers: int
    spilled: int
    shared: int
    tensor_core: int


def compile_launch(launch: Launch, target: str) -> Report:
    """Compile one recorded launch for a target of `TARGETS`.

    Raises: ValueError for an unknown target, and triton's CompilationError where the compiler refuses the kernel.
    """
    if target not in TARGETS:
        raise ValueError(f"compile_launch: target must be one of {list(TARGETS)}, got {target!r}")
    fn = launch.kernel
    given = dict(zip(fn.arg_names, launch.args, strict=False)) | launch.kwargs
    constexpr_names = {p.name for p in fn.params if p.is_constexpr}
    signature, constexprs = {}, {}
    for name in fn.arg_names:
        value = given[name]
        if name in constexpr_names or value is None:
            signature[name], constexprs[name] = "constexpr", value
        else:
            signature[name] = _type_of(value)
    # as at run time: fresh tensors start on 16-byte boundaries, and the compiler may use that
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(fn.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=fn, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {k: v for k, v in launch.kwargs.items() if k in ("num_warps", "num_stages")}
    options["enable_fp_fusion"] = True  # triton 3.9 warns that its default will change
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = (
            True  # a cached kernel would not be assembled, and say nothing
        )
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=TARGETS[target], options=options)
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        spilled = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text)
        tensor_core = text.count("v_mfma_")
    else:
        text = log.getvalue()
        registers = _number(r"Used (\d+) registers", text)
        spilled = _number(r"(\d+) bytes spill stores", text)
        tensor_core = len(re.findall(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"]))
    shared = compiled.metadata.shared
    return Report(fn.__name__, target, registers, spilled, shared, tensor_core)


def _type_of(value) -> str:
    if isinstance(value, torch.Tensor):
        return POINTER[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"compile_launch: no {pattern!r} in the compiler's log:\n{text[-2000:]}")
    return int(found[1])
