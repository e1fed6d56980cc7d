"""The source of a notebook's function and of all it needs, as cells that run in a fresh process."""

import ast
import inspect
import sys
import textwrap
import types
from typing import Any

PLAIN = (bool, int, float, str, type(None))


def cells_of(function: Any) -> list[str]:
    """Imports, constants and definitions that a function (or kernel) stands on, itself last.

    Raises: OSError or TypeError when Python does not know its source.
    """
    found: dict[str, str] = {}
    _collect(function, found)
    return list(found.values())


def source_of(function: Any) -> str:
    """The definition of a function, or of the function inside a kernel. Raises: OSError, TypeError."""
    return textwrap.dedent(inspect.getsource(_inner(function)))


def _collect(function: Any, found: dict[str, str]) -> None:
    inner = _inner(function)
    source = source_of(function)
    found[inner.__name__] = ""  # so that a function that calls itself ends here
    space = getattr(inner, "__globals__", None) or vars(sys.modules[inner.__module__])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in space and node.id not in found:
            _bind(node.id, space[node.id], inner.__module__, found)
    del found[inner.__name__]  # now behind what it needs
    found[inner.__name__] = source


def _bind(name: str, value: Any, home: str, found: dict[str, str]) -> None:
    """The line that gives `name` its value again, or the definition when it stands in the same notebook."""
    inner = _inner(value)
    module, label = getattr(inner, "__module__", None), getattr(inner, "__name__", None)
    if isinstance(value, types.ModuleType):
        found[name] = f"import {value.__name__} as {name}"
    elif isinstance(value, PLAIN):
        found[name] = f"{name} = {value!r}"
    elif type(value).__name__ == "constexpr":
        found[name] = f"import triton.language\n{name} = triton.language.constexpr({value.value!r})"
    elif module == home and label == name and isinstance(inner, types.FunctionType | type):
        _collect(value, found)
    elif module and label and getattr(sys.modules.get(module), label, None) is value:
        found[name] = f"from {module} import {label} as {name}"


def _inner(value: Any) -> Any:
    fn = getattr(value, "fn", None)
    return fn if isinstance(fn, types.FunctionType) else value
