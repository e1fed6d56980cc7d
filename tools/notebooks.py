"""Keeps the course's notebooks executed, canonical and small.

    python tools/notebooks.py                 execute what changed, write every notebook in the one format
    python tools/notebooks.py --all           execute everything anew
    python tools/notebooks.py --check         change nothing; say what is wrong, exit 1 if anything is
    python tools/notebooks.py PATH ...        only these

Edit a notebook wherever you like, then run the first line. Execution stores a hash of the cells' sources in the
notebook; `--check` fails when the sources were edited after that, and when a source shown live (`viz.source`) is
no longer what the package says.
"""

import argparse
import ast
import base64
import hashlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
SHOWN = "shown-source"  # the tag of a code cell that may be longer: it shows a kernel
MAX_NOTEBOOK, MAX_PNG, MAX_LINES = 400_000, 40_000, 25  # bytes, bytes, lines of a code cell
CELLS, WORDS = range(25, 46), range(900, 1701)  # of a chapter; 00 is a door, not a chapter
TIMEOUT = 120  # seconds for one cell
MACHINE = re.compile(
    r"/(?:home|root|work|tmp|usr|opt|Users|var)/|site-packages|0x[0-9a-f]{6,}|Wall time|CPU times"
    r"|\b\d+(?:\.\d+)? ?(?:ms|µs|seconds)\b"
)


# -- reading -------------------------------------------------------------------------------------


def notebooks() -> list[Path]:
    """The course in its order."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def load(path: Path) -> nbformat.NotebookNode:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a missing cell id is repaired by `canonical`
        return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)


def code_cells(nb) -> list:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def outputs(nb) -> Iterator[tuple[int, nbformat.NotebookNode]]:
    """(number of the cell, output), for every output."""
    for i, cell in enumerate(nb.cells):
        for output in cell.get("outputs", []):
            yield i, output


def source_hash(nb) -> str:
    """A hash of what execution depends on: kinds, sources and tags of the cells, in order."""
    parts = [[c.cell_type, c.source, sorted(c.metadata.get("tags", []))] for c in nb.cells]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def words(nb) -> int:
    """English words of the prose: no code, no formulas, no addresses."""
    text = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    for noise in (
        r"```.*?```",
        r"\$\$.*?\$\$",
        r"\$[^$\n]*\$",
        r"`[^`\n]*`",
        r"\]\([^)]*\)",
        r"<[^>]*>",
    ):
        text = re.sub(noise, " ", text, flags=re.DOTALL)
    return len(re.findall(r"[A-Za-z][A-Za-z'’-]*", text))


# -- the one format ------------------------------------------------------------------------------


def canonical(nb) -> nbformat.NotebookNode:
    """The same notebook without anything that depends on who saved it, when, or with what."""
    nb = nbformat.from_dict(json.loads(json.dumps(nb)))
    nb.nbformat, nb.nbformat_minor = 4, 5
    stored = nb.metadata.get("gdr_teach", {})
    nb.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}, "gdr_teach": stored}
    )
    seen: dict[str, int] = {}
    for cell in nb.cells:
        name = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        seen[name] = seen.get(name, 0) + 1
        cell.id = name if seen[name] == 1 else f"{name}-{seen[name]}"
        tags = sorted(cell.metadata.get("tags", []))
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    for number, cell in enumerate(code_cells(nb), start=1):
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
    return nb


def dumps(nb) -> str:
    return nbformat.writes(nb, version=4).rstrip("\n") + "\n"


# -- executing -----------------------------------------------------------------------------------


def stale(nb) -> bool:
    """Whether the outputs belong to other sources than those in the notebook or, if shown, in the package."""
    return nb.metadata.get("gdr_teach", {}).get("source_hash") != source_hash(nb) or any(
        text != shown for _, shown, text in live_sources(nb)
    )


def execute(nb, folder: Path) -> nbformat.NotebookNode:
    """The notebook run top to bottom in a fresh kernel, in the canonical format; an error stops it."""
    import matplotlib.font_manager  # noqa: F401  its first import builds a cache and says so
    from nbclient import NotebookClient

    nb = canonical(nb)
    for cell in code_cells(nb):
        cell.outputs, cell.execution_count = [], None
    env = {**os.environ, "GDR_LANG": "en", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    options = {"timeout": TIMEOUT, "kernel_name": KERNEL["name"], "record_timing": False}
    options["extra_arguments"] = ["--IPKernelApp.log_level=40"]  # errors only
    client = NotebookClient(nb, coalesce_streams=True, resources=_at(folder), **options)
    client.execute(env=env)
    nb.metadata["gdr_teach"] = {"source_hash": source_hash(nb)}
    return canonical(nb)


def _at(folder: Path) -> dict:
    return {"metadata": {"path": str(folder)}}


# -- checking ------------------------------------------------------------------------------------


def faults(path: Path) -> list[str]:
    """What is wrong with a notebook, one sentence each; empty when all is well."""
    text = path.read_text(encoding="utf-8")
    nb = load(path)
    found = []
    if text != dumps(canonical(nb)):
        found.append("is not in the canonical format")
    if nb.metadata.get("gdr_teach", {}).get("source_hash") != source_hash(nb):
        found.append("was edited after it was executed")
    if len(text.encode()) > MAX_NOTEBOOK:
        found.append(f"must have at most {MAX_NOTEBOOK} bytes, got {len(text.encode())}")
    for i, shown, now in live_sources(nb):
        if shown != now:
            found.append(f"cell {i} shows a source that has changed in the package")
    found += _cell_faults(nb)
    found += _output_faults(nb)
    found += _link_faults(nb, path.parent)
    if not path.name.startswith("00"):
        if len(nb.cells) not in CELLS:
            found.append(f"must have {CELLS[0]} to {CELLS[-1]} cells, got {len(nb.cells)}")
        if words(nb) not in WORDS:
            found.append(f"must have {WORDS[0]} to {WORDS[-1]} words, got {words(nb)}")
    return found


def _cell_faults(nb) -> Iterator[str]:
    for i, cell in enumerate(nb.cells):
        lines = len(cell.source.splitlines())
        shown = SHOWN in cell.metadata.get("tags", [])
        if cell.cell_type == "code" and lines > MAX_LINES and not shown:
            yield f"cell {i} must have at most {MAX_LINES} lines, got {lines}"
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            yield f"cell {i} was not executed"
        if cell.cell_type == "markdown" and "base64" in cell.source:
            yield f"cell {i} carries a picture in its source"
        if re.search(r"!\[\s*\]\(|<img(?![^>]*alt=\"[^\"]+\")", cell.source):
            yield f"cell {i} has a picture without alt text"


def _output_faults(nb) -> Iterator[str]:
    for i, output in outputs(nb):
        if output.output_type == "error" or output.get("name") == "stderr":
            yield f"cell {i} must not write to stderr or fail"
        data = output.get("data", {})
        for kind, content in data.items():
            if kind.startswith("application/vnd.jupyter.widget"):
                yield f"cell {i} needs a widget"
            if kind.startswith("image/"):
                if not output.metadata.get(kind, {}).get("alt", "").strip():
                    yield f"cell {i} has a picture without alt text"
                if kind == "image/png" and len(base64.b64decode(content)) > MAX_PNG:
                    yield f"cell {i} has a PNG of more than {MAX_PNG} bytes"
        page = data.get("text/html", "")
        if re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page):
            yield f"cell {i} fetches something from outside"
        if re.search(r"<img(?![^>]*alt=\"[^\"]+\")", page):
            yield f"cell {i} has a picture without alt text"
        if "☑" in output.get("text", ""):
            yield f"cell {i} shows somebody's progress: execute it without my/"
        if hit := MACHINE.search(output.get("text", "") + data.get("text/plain", "") + page):
            yield f"cell {i} shows something of this machine or moment: {hit[0]!r}"


def _link_faults(nb, folder: Path) -> Iterator[str]:
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "markdown":
            continue
        for target in re.findall(r"\]\(([^)#\s]+)", cell.source):
            if re.match(r"https?:", target):
                continue
            file = (folder / target).resolve()
            if file.parent == ROOT / "my":  # a learner's copy: its template is what we have
                file = ROOT / "exercises" / file.name
            if not file.exists():
                yield f"cell {i} links to {target}, which is not there"


def live_sources(nb) -> Iterator[tuple[int, str, str]]:
    """(cell, source as shown, source in the package) of everything shown by `viz.source`."""
    for i, output in outputs(nb):
        where = output.get("metadata", {}).get("text/html", {}).get("source")
        if where:
            yield i, output.data["text/plain"], package_source(where)


def package_source(where: str) -> str:
    """The source of "package.module:name" as `inspect` would give it, without importing anything."""
    module, _, name = where.partition(":")
    file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if not file.exists():
        return ""
    text = file.read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            return "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    return ""


# -- the command line ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks; default: all of the course")
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 on faults")
    parser.add_argument("--all", action="store_true", help="execute also what did not change")
    args = parser.parse_args(argv)
    bad = 0
    for path in args.paths or notebooks():
        if not args.check:
            nb = load(path)
            if args.all or stale(nb):
                start = time.monotonic()
                nb = execute(nb, path.parent)
                print(f"{path.name}: executed in {time.monotonic() - start:.1f} s", file=sys.stderr)
            path.write_text(dumps(canonical(nb)), encoding="utf-8")
        for fault in faults(path):
            bad += 1
            print(f"{path.name}: {fault}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
