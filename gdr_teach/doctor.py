"""`gdr-teach doctor`: is this machine ready for the course, and if not, what is to be done?

One line a check: state (ok, missing, fault), what was found, what it is for, and what to do. Everything is imported
inside its check, so that the doctor also runs where torch or triton is missing. A GPU and the notebook tools are
nice to have; a fault, or the lack of something that this machine needs, makes the exit code 1.
"""

import importlib
import os
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TextIO

GIB = 2**30
DISK_WANTED, MEMORY_WANTED = 1.0, 2.0  # GiB
COLOUR = {"ok": "green", "missing": "yellow", "fault": "bold red"}


class Finding(NamedTuple):
    """What one check found. `needed` says whether the lack of it keeps this machine from the course."""

    state: str  # "ok", "missing" or "fault"
    found: str = ""
    needed: bool = True
    wanted: float = 0.0  # for the advice


Words = dict[str, Any]


def run_doctor(stream: TextIO | None = None) -> int:
    """Print one line per check and a closing line to `stream` (default stdout); 0 when ready, else 1."""
    words = load_words()
    write = printer(sys.stdout if stream is None else stream)
    to_repair = []
    for name, check in CHECKS.items():
        try:
            finding = check(words)
        except Exception as error:  # noqa: BLE001  a check that breaks is a finding, the others still run
            finding = Finding("fault", f"{type(error).__name__}: {one_line(error)}")
        write(finding.state, *line(name, finding, words))
        if finding.state == "fault" or (finding.state == "missing" and finding.needed):
            to_repair.append(name)
    if to_repair:
        write("fault", words["not_ready"].format(names=", ".join(to_repair)), "")
        return 1
    write("ok", words["ready"], "")
    return 0


def line(name: str, finding: Finding, words: Words) -> tuple[str, str]:
    """The coloured head and the plain rest of one line."""
    rest = words["line"].format(name=name, found=finding.found, purpose=words[name]["purpose"])
    if finding.state != "ok":
        rest += words["do"].format(advice=words[name]["advice"].format(wanted=finding.wanted))
    return f"{words[finding.state]:<8} ", " ".join(rest.split())


def load_words(language: str | None = None) -> Words:
    """The words in `language` (default: GDR_LANG, else English); what a language lacks is said in English."""
    with (Path(__file__).parent / "doctor.toml").open("rb") as file:
        tables = tomllib.load(file)
    spoken = tables.get(language or os.environ.get("GDR_LANG", "en"), {})
    return tables["en"] | spoken


def printer(stream: TextIO) -> Callable[[str, str, str], None]:
    """A function that writes (state, head, rest) as one line: in colour through rich where it is installed."""
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        return lambda state, head, rest: print(head + rest, file=stream)
    console = Console(file=stream, highlight=False, soft_wrap=True, force_jupyter=False)
    return lambda state, head, rest: console.print(Text(head, style=COLOUR[state]) + Text(rest))


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


# -- the checks ----------------------------------------------------------------------------------


def python(words: Words) -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding("ok" if sys.version_info >= (3, 11) else "fault", found)


def imports(package: str, words: Words, *, needed: bool = True) -> Finding:
    """Whether `package` can be imported, and its version."""
    if not installed(package):
        return Finding("missing", words["none"], needed)
    try:
        module = importlib.import_module(package)
    except Exception as error:  # noqa: BLE001  whatever a broken package raises is its fault
        return Finding("fault", words["broken"].format(error=one_line(error)))
    return Finding("ok", str(getattr(module, "__version__", "")))


def installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # a name set to None in sys.modules: blocked on purpose
        return False


def notebook_tool(package: str, words: Words) -> Finding:
    """Whether a package of the `course` extra is there; it is not imported, which would be slow."""
    try:
        return Finding("ok", version(package), needed=False)
    except PackageNotFoundError:
        return Finding("missing", words["none"], needed=False)


def triton(words: Words) -> Finding:
    on_linux = sys.platform == "linux"  # elsewhere there is none to install
    finding = imports("triton", words, needed=on_linux)
    if finding.state != "ok" or not installed("torch"):
        return finding
    from .runtime import KNOWN_INTERPRETERS, triton_version

    if triton_version() in KNOWN_INTERPRETERS:
        return finding
    known = ", ".join(f"{major}.{minor}" for major, minor in KNOWN_INTERPRETERS)
    return Finding("fault", words["unknown_triton"].format(version=finding.found, known=known))


def gpu(words: Words) -> Finding:
    if not installed("torch"):
        return Finding("missing", words["not_tried"].format(needs="torch"), needed=False)
    import torch

    if not torch.cuda.is_available():
        return Finding("missing", words["none"], needed=False)
    return Finding("ok", torch.cuda.get_device_name())


def delta_by_hand(backend: str, needs: tuple[str, ...], words: Words, **options) -> Finding:
    """Two writes to one key: 2 with beta 1, then 4 with beta 1/2. Reads 2, then 2 + (4 - 2)/2 = 3."""
    absent = [name for name in needs if not installed(name)]
    if absent:
        needed = absent != ["triton"] or sys.platform == "linux"
        return Finding("missing", words["not_tried"].format(needs=", ".join(absent)), needed)
    import torch

    from .delta.op import delta_rule

    key = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).view(1, 2, 1, 2)  # [B=1, T=2, H=1, K=2]
    v = torch.tensor([2.0, 4.0]).view(1, 2, 1, 1)
    beta = torch.tensor([1.0, 0.5]).view(1, 2, 1)
    out = delta_rule(key, key, v, beta, scale=1.0, backend=backend, **options)
    got = out.o.flatten().tolist() + out.state.flatten().tolist()
    wanted = [2.0, 3.0, 3.0, 0.0]
    if all(abs(x - y) <= 1e-6 for x, y in zip(got, wanted, strict=True)):
        return Finding("ok")
    return Finding("fault", words["wrong"].format(wanted=wanted, got=got))


def disk(words: Words) -> Finding:
    total, _, free = shutil.disk_usage(Path.cwd())
    found = words["free"].format(free=free / GIB, total=total / GIB)
    return Finding("ok" if free >= DISK_WANTED * GIB else "fault", found, wanted=DISK_WANTED)


def memory(words: Words) -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Finding(
        "ok" if total >= MEMORY_WANTED else "fault", f"{total:.1f} GiB", wanted=MEMORY_WANTED
    )


def my(words: Words) -> Finding:
    here = Path.cwd()
    course = next(
        (p for p in (here, *here.parents) if (p / "exercises" / "manifest.toml").is_file()), None
    )
    if course is None:
        return Finding("missing", words["not_course"], needed=False)
    folder = course / "my" if (course / "my").exists() else course
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Finding("ok", str(course / "my"))
    except OSError as error:
        return Finding("fault", one_line(error))


CHECKS: dict[str, Callable[[Words], Finding]] = {
    "python": python,
    "torch": lambda words: imports("torch", words),
    "numpy": lambda words: imports("numpy", words),
    "jaxtyping": lambda words: imports("jaxtyping", words),
    "triton": triton,
    "delta": lambda words: delta_by_hand("torch", ("torch",), words),
    "kernel": lambda words: delta_by_hand("triton", ("torch", "triton"), words, mode="recurrent"),
    "gpu": gpu,
    "jupyterlab": lambda words: notebook_tool("jupyterlab", words),
    "matplotlib": lambda words: notebook_tool("matplotlib", words),
    "nbval": lambda words: notebook_tool("nbval", words),
    "disk": disk,
    "memory": memory,
    "my": my,
}
