"""Rewrites constraints.txt: keeps the versions chosen by hand, resolves all others anew.

Usage: python tools/constraints.py        (or `make constraints`)

The first block of constraints.txt, up to the blank line, is chosen by hand: torch with the triton
it was built for, and the oracle. To move on, edit it there and run this; then run `make test`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "constraints.txt"
RESOLVED = "# resolved by `make constraints`\n"
OLDEST_PYTHON = "3.11.0"  # some packages ask for a later 3.11.x
# Of the environment itself, or drawn in and pinned by CUDA builds of torch: not ours to pin.
LEFT_OUT = re.compile(r"^(gdr[-_]teach|pip|setuptools|nvidia[-_].*|cuda[-_].*)$")


def chosen_by_hand(text: str) -> str:
    """The first block, comments included."""
    block, found, _ = text.partition("\n\n")
    if not found or "torch==" not in block:
        raise SystemExit(
            "constraints.txt must open with a block that pins torch, then a blank line"
        )
    return block + "\n"


def names(block: str) -> set[str]:
    return {line.split("==")[0] for line in block.splitlines() if "==" in line}


def requirements() -> list[str]:
    """All that the package and its extras ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return sum(project["optional-dependencies"].values(), project["dependencies"])


def resolve(block: str) -> dict[str, str]:
    """Name to version of all that would be installed under `block`, on the oldest Python we promise."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        pip = [str(Path(folder) / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        # A new pip resolves from the index's metadata and downloads nothing.
        subprocess.run([*pip, "install", "--quiet", "--upgrade", "pip"], check=True)
        pins, report = Path(folder) / "chosen.txt", Path(folder) / "report.json"
        pins.write_text(block)
        oldest = ["--python-version", OLDEST_PYTHON, "--only-binary", ":all:", "--target", folder]
        dry = ["install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report)]
        pinned = ["--constraint", str(pins), *requirements()]
        subprocess.run([*pip, *dry, *oldest, *pinned], check=True)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    # "2.13.0+cpu" names one build of 2.13.0; the constraint is on the version.
    versions = {p["name"].lower().replace("_", "-"): p["version"].split("+")[0] for p in found}
    return {name: version for name, version in versions.items() if not LEFT_OUT.match(name)}


def main() -> int:
    block = chosen_by_hand(FILE.read_text())
    rest = {name: version for name, version in resolve(block).items() if name not in names(block)}
    lines = "".join(f"{name}=={rest[name]}\n" for name in sorted(rest))
    FILE.write_text(f"{block}\n{RESOLVED}{lines}")
    print(f"constraints.txt: {len(names(block))} chosen, {len(rest)} resolved")
    return 0


if __name__ == "__main__":
    sys.exit(main())
