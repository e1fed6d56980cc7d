"""The planted bugs of planted.txt, read."""

import re
from pathlib import Path
from typing import NamedTuple

CAUGHT_BY = {
    "memory": "sanitizer",
    "race": "sanitizer",
    "uninitialised": "sanitizer",
    "unwritten": "poison",
    "number": "oracle",
    "equivalent": "",
}


class Bug(NamedTuple):
    """One wrong edit of one function; function "" means anywhere in the module."""

    module: str
    function: str
    name: str
    kind: str
    why: str
    old: str
    new: str


def read(text: str) -> list[Bug]:
    """Every entry of a list of planted bugs."""
    bugs = []
    for entry in re.split(r"^(?=\[)", text, flags=re.MULTILINE)[1:]:
        head, why, *edit = entry.splitlines()
        found = re.fullmatch(r"\[(\S+) ?(\S*)\] (.+) -- (\w+)", head)
        assert found, f"not the head of an entry: {head}"
        module, function, name, kind = found.groups()
        old, new = (
            "\n".join(x[2:] for x in edit if x[:2].ljust(2) == sign) for sign in ("- ", "+ ")
        )
        bugs.append(Bug(f"gdr_teach.{module}", function, name, kind, why.strip(), old, new))
    return bugs


BUGS = read((Path(__file__).parent / "planted.txt").read_text(encoding="utf-8"))
