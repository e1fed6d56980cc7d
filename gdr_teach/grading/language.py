"""Every sentence a learner reads, as data keyed by language: text/en.toml is complete, others fall back to it."""

import os
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

DEFAULT = "en"


def language() -> str:
    """The language asked for with GDR_LANG, as a bare code: zh for zh_CN.UTF-8."""
    return os.environ.get("GDR_LANG", "").replace("-", "_").split("_")[0].split(".")[0] or DEFAULT


def say(key: str, **values: Any) -> str:
    """The sentence under a dotted key, filled in. Raises: KeyError when English lacks it."""
    sentence = _sentences(language()).get(key)
    return (_sentences(DEFAULT)[key] if sentence is None else sentence).format(**values)


def pick(by_language: Mapping[str, Any]) -> Any:
    """The entry for the language asked for, else the English one."""
    return by_language.get(language(), by_language[DEFAULT])


def printable(text: str) -> str:
    """Text that a file system or a learner made up, fit for one line of a report."""
    return "".join(c if c.isprintable() else "?" for c in text)


@cache
def _sentences(code: str) -> dict[str, str]:
    file = Path(__file__).parent / "text" / f"{code}.toml"
    if not (code.isalpha() and file.is_file()):
        return {}
    return dict(_flat("", tomllib.loads(file.read_text(encoding="utf-8"))))


def _flat(prefix: str, table: Mapping[str, Any]):
    for key, value in table.items():
        if isinstance(value, str):
            yield prefix + key, value
        else:
            yield from _flat(f"{prefix}{key}.", value)
