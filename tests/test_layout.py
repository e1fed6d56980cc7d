"""The architecture, held: who may import whom, what works without triton, and that names can be found."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gdr_teach"
RULES = ("delta", "gated", "iplr", "dplr")
MODULES = sorted(PACKAGE.rglob("*.py"))

# module -> what of the package it may import; downwards only: op -> rule -> chunkwise -> runtime
ROOMS = {
    "notation": set(),
    "packing": set(),
    "memory": {"notation"},
    "stability": {"notation", "arguments"},
    "arguments": {"notation"},
    "paths": {"notation", "arguments", "chunkwise.tiles"},
    "observers": set(),
    "runtime": {"observers"},
    "sanitizer": {"runtime"},
    "aot": {"runtime"},
    "testing": {"notation"},
    "delta.reference": {"notation", "packing", "arguments", "chunkwise.wy"},
    "delta.transpose": {"packing", "chunkwise.wy", "delta.reference"},
    "delta.recurrent": {"notation", "runtime"},
    "chunkwise.wy": set(),
    "chunkwise.levels": set(),
    "chunkwise.pairs": set(),
    "chunkwise.affine": {"chunkwise.wy"},
    "chunkwise.kept": {"notation"},
    "chunkwise.place": {"runtime"},
    "chunkwise.triangular": {"runtime"},
    "chunkwise.decay": {"runtime"},
    "chunkwise.prepare": {
        "runtime",
        "chunkwise.decay",
        "chunkwise.place",
        "chunkwise.triangular",
    },
    "chunkwise.scan": {"runtime", "chunkwise.place", "chunkwise.triangular"},
    "chunkwise.grads": {"runtime", "chunkwise.decay", "chunkwise.place", "chunkwise.triangular"},
    "chunkwise.tiles": set(),
    "chunkwise.tied": {
        "notation",
        "runtime",
        "chunkwise.prepare",
        "chunkwise.scan",
        "chunkwise.grads",
        "chunkwise.tiles",
    },
    "chunkwise.prepare_untied": {
        "runtime",
        "chunkwise.decay",
        "chunkwise.place",
        "chunkwise.triangular",
    },
    "chunkwise.scan_untied": {"runtime", "chunkwise.place", "chunkwise.triangular"},
    "chunkwise.grads_untied": {
        "runtime",
        "chunkwise.decay",
        "chunkwise.grads",
        "chunkwise.place",
        "chunkwise.triangular",
    },
    "chunkwise.untied": {
        "notation",
        "runtime",
        "chunkwise.prepare_untied",
        "chunkwise.scan_untied",
        "chunkwise.grads_untied",
        "chunkwise.tiles",
    },
    "chunkwise.segments": {"runtime", "chunkwise.tiles"},
    "delta.chunk": {"notation", "chunkwise.tied", "chunkwise.segments", "delta.recurrent"},
    "gated.chunk": {"notation", "chunkwise.tied", "chunkwise.segments", "delta.recurrent"},
    "delta.op": {
        "notation",
        "arguments",
        "paths",
        "delta.reference",
        "delta.transpose",
        "delta.recurrent",
        "delta.chunk",
        "chunkwise.tied",
        "chunkwise.kept",
    },
    "delta.step": {
        "notation",
        "arguments",
        "paths",
        "delta.reference",
        "delta.recurrent",
        "delta.op",
    },
    "gated.reference": {
        "notation",
        "packing",
        "arguments",
        "chunkwise.wy",
        "chunkwise.levels",
        "chunkwise.pairs",
        "delta.reference",
    },
    "gated.transpose": {
        "packing",
        "chunkwise.wy",
        "delta.reference",
        "delta.transpose",
        "gated.reference",
    },
    "gated.recurrent": {"notation", "runtime", "delta.recurrent"},
    "gated.op": {
        "notation",
        "arguments",
        "paths",
        "gated.reference",
        "gated.transpose",
        "gated.recurrent",
        "gated.chunk",
        "chunkwise.tied",
        "chunkwise.kept",
    },
    "gated.step": {
        "notation",
        "arguments",
        "paths",
        "gated.reference",
        "gated.recurrent",
        "gated.op",
    },
    "dplr.fading": {"chunkwise.affine", "chunkwise.levels"},
    "dplr.reference": {
        "notation",
        "packing",
        "arguments",
        "chunkwise.wy",
        "chunkwise.affine",
        "delta.reference",
        "gated.reference",
        "dplr.fading",
    },
    "dplr.transpose": {
        "packing",
        "chunkwise.wy",
        "chunkwise.affine",
        "delta.reference",
        "delta.transpose",
        "gated.reference",
        "gated.transpose",
        "dplr.fading",
        "dplr.reference",
    },
    "dplr.recurrent": {"notation", "runtime", "delta.recurrent", "gated.recurrent"},
    "iplr.reference": {
        "notation",
        "packing",
        "arguments",
        "delta.reference",
        "dplr.reference",
    },
    "iplr.transpose": {"chunkwise.affine", "dplr.transpose"},
    "iplr.recurrent": {"notation", "dplr.recurrent"},
    "dplr.chunk": {"notation", "chunkwise.untied", "chunkwise.segments", "dplr.recurrent"},
    "iplr.chunk": {"notation", "dplr.chunk"},
    "dplr.op": {
        "notation",
        "arguments",
        "paths",
        "dplr.reference",
        "dplr.transpose",
        "dplr.recurrent",
        "dplr.chunk",
        "chunkwise.affine",
        "chunkwise.untied",
        "chunkwise.kept",
    },
    "dplr.step": {
        "notation",
        "arguments",
        "paths",
        "dplr.reference",
        "dplr.recurrent",
        "dplr.op",
    },
    "iplr.op": {
        "notation",
        "arguments",
        "paths",
        "dplr.reference",
        "iplr.reference",
        "iplr.transpose",
        "iplr.recurrent",
        "iplr.chunk",
        "chunkwise.affine",
        "chunkwise.untied",
        "chunkwise.kept",
    },
    "iplr.step": {
        "notation",
        "arguments",
        "paths",
        "iplr.reference",
        "iplr.recurrent",
        "iplr.op",
    },
    "lifts": set(),
}
COURSE = {"lab", "grading", "viz", "cli", "doctor"}  # may import any room; no room imports them
HEAVY = {
    "jupyterlab",
    "matplotlib",
    "nbformat",
    "rich",
    "psutil",
    "jupytext",
    "IPython",
}  # the course extra


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path) -> tuple[set[str], set[str]]:
    """The package's own modules that a file imports, and the outside ones, by top-level name."""
    own, outside = set(), set()
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            name = ".".join(part for part in base if part)
            if (PACKAGE / name.replace(".", "/")).is_dir():  # from ..chunkwise import wy
                own |= {f"{name}.{alias.name}" for alias in node.names}
            else:
                own.add(name)
        elif isinstance(node, ast.ImportFrom):
            outside.add(node.module.split(".")[0])
    return own, outside


@pytest.mark.parametrize("room", ROOMS)
def test_the_arrows_point_downwards(room):
    own, outside = imports(PACKAGE / (room.replace(".", "/") + ".py"))
    assert own <= ROOMS[room], f"{room} may not import {own - ROOMS[room]}"
    assert not outside & HEAVY, f"{room} needs {outside & HEAVY}, which only the course has"
    assert "gdr_teach" not in outside, f"{room}: name neighbours by dots"


def test_every_module_has_its_room():
    for path in MODULES:
        name = name_of(path)
        known = name in ROOMS or name.split(".")[0] in COURSE or name.endswith("__init__")
        assert known, f"{name} has no room: add it to ROOMS or COURSE here"


def test_the_reference_needs_torch_only():
    plain = [f"{rule}/{name}" for rule in RULES for name in ("reference", "transpose")]
    plain += [f"chunkwise/{name}" for name in ("wy", "affine", "levels", "pairs", "kept", "tiles")]
    for name in (*plain, "dplr/fading", "lifts", "memory", "packing", "notation"):
        _, outside = imports(PACKAGE / f"{name}.py")
        standard = {"typing", "types", "collections", "itertools", "functools", "math"}
        assert outside <= {"torch", "jaxtyping"} | standard, (name, outside)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_has_the_names_of_every_rule(rule):
    for name in ("reference", "recurrent", "op"):
        assert (PACKAGE / rule / f"{name}.py").exists()
        assert (ROOT / "tests" / rule / f"test_{name}.py").exists()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_say_what_they_are_for(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    lines = len(path.read_text().splitlines())
    assert lines <= 500, f"{path.name} has {lines} lines: split it"


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


BLOCK = "import sys; sys.modules['triton'] = None\n"  # importing triton raises ImportError, find_spec ValueError


def test_without_triton_the_torch_half_works():
    code = BLOCK + (
        "import torch, gdr_teach\n"
        "from gdr_teach import delta_rule\n"
        "q = torch.ones(1, 20, 1, 2, requires_grad=True)\n"
        "out = delta_rule(q, q, q, torch.ones(1, 20, 1))\n"
        "out.o.sum().backward()\n"
        "assert q.grad.isfinite().all()\n"
        "try:\n"
        "    delta_rule(q, q, q, torch.ones(1, 20, 1), backend='triton')\n"
        "except ImportError as error:\n"
        "    assert \"pip install 'triton>=3.6'\" in str(error), error\n"
        "else:\n"
        "    raise SystemExit('backend triton did not complain')\n"
        "try:\n"
        "    import gdr_teach.runtime\n"
        "except ImportError as error:\n"
        "    assert \"pip install 'triton>=3.6'\" in str(error), error\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_neither_torch_nor_triton():
    done = python(
        "import gdr_teach, sys; print([m for m in ('torch', 'triton', 'numpy') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_importing_the_operator_imports_no_kernel():
    done = python(
        "from gdr_teach import delta_rule; import sys; print('gdr_teach.runtime' in sys.modules)"
    )
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def test_public_names_exist_and_unknown_ones_are_named():
    import gdr_teach

    for name in gdr_teach.__all__:
        assert getattr(gdr_teach, name) is not None
        assert name in dir(gdr_teach)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gdr_teach.nothing  # noqa: B018
