"""A bug planted in a module that stays loaded, and taken out again."""

import ast
import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


def mutated_source(module: ModuleType, kernel: str, old: str, new: str) -> str:
    """The module's source with old replaced in one function, or anywhere if kernel is ""; it must be there once."""
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    first, last = 0, len(lines)
    if kernel:
        found = [x for x in ast.walk(ast.parse(source)) if getattr(x, "name", None) == kernel]
        assert len(found) == 1, f"{module.__name__} has {len(found)} definitions of {kernel}"
        first, last = found[0].lineno - 1, found[0].end_lineno
    before, part, after = ("".join(x) for x in (lines[:first], lines[first:last], lines[last:]))
    times = part.count(old)
    assert times == 1, f"{module.__name__} {kernel}: found {times} times, wanted once:\n{old}"
    assert old != new
    return before + part.replace(old, new) + after


@contextlib.contextmanager
def planted(name: str, kernel: str, old: str, new: str, folder: Path) -> Iterator[None]:
    """Inside, the module runs the changed source, and so does every module that took something from it by name.

    The source is a file of its own in `folder`: Triton reads a kernel's source, it does not take the function.
    """
    module = importlib.import_module(name)
    source = mutated_source(module, kernel, old, new)
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(source, encoding="utf-8")
    package = name.partition(".")[0]
    loaded = [m for n, m in sys.modules.items() if n.partition(".")[0] == package]
    saved = [(m.__dict__, dict(m.__dict__)) for m in loaded]
    before = dict(module.__dict__)
    try:
        exec(compile(source, path, "exec"), module.__dict__)
        own = {n: x for n, x in before.items() if getattr(x, "__module__", None) == name}
        for names, _ in saved:
            for n, x in list(names.items()):
                for m, y in own.items():
                    if x is y:
                        names[n] = module.__dict__[m]
        yield
    finally:
        for names, old_names in saved:  # what interpreting has added since may stay
            names.update(old_names)
