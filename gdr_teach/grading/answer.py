"""What the source of an answer shows without running it: is it still the stub, does it use the library?"""

import ast
from collections.abc import Iterable, Sequence

# What a learner's code may import of this package while it is graded; the rest would be the answer.
OPEN = frozenset(
    "gdr_teach gdr_teach.Output gdr_teach.runtime gdr_teach.sanitizer gdr_teach.notation gdr_teach.viz "
    "gdr_teach.grading gdr_teach.grading.launch gdr_teach.grading.absent".split()
)
LIBRARIES = ("gdr_teach", "fla")  # fla: flash-linear-attention, the same operators by others

Function = ast.FunctionDef | ast.AsyncFunctionDef


def closed(module: str) -> bool:
    """Whether a module holds operators or references that an answer has to be written without."""
    return module.split(".", maxsplit=1)[0] in LIBRARIES and module not in OPEN


def plain(source: str) -> str:
    """A cell without what only IPython understands: magics, shell lines, trailing question marks."""
    if source.lstrip().startswith("%%"):
        return ""
    lines = source.split("\n")
    return "\n".join("" if _only_ipython(line) else line for line in lines)


def parse(source: str) -> ast.Module | None:
    """The cell's syntax tree, or None when it has none."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def find(trees: Iterable[ast.Module], name: str) -> Function | None:
    """The last definition of a function at the top level of some cells."""
    found = None
    for tree in trees:
        for node in tree.body:
            if isinstance(node, Function) and node.name == name:
                found = node
    return found


def untouched(answer: Function, template: Function | None) -> bool:
    """Whether nothing was written: the template's body, or one that does nothing at all."""
    body = _body(answer)
    if all(_says_nothing(statement) for statement in body):
        return True
    return template is not None and list(map(ast.dump, body)) == list(
        map(ast.dump, _body(template))
    )


def uses_library(trees: Sequence[ast.Module], name: str) -> bool:
    """Whether a function, or one of the cells' functions it names, names an operator or reference of the library."""
    forbidden = {bound for tree in trees for bound in _closed_names(tree)}
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        function = None if current in seen else find(trees, current)
        seen.add(current)
        if function is None:
            continue
        used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        if used & forbidden or any(_closed_names(function)) or any(_closed_paths(function)):
            return True
        waiting.extend(used)
    return False


def _closed_names(tree: ast.AST) -> Iterable[str]:
    """The names that imports bind to closed modules or to what is in them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname and closed(alias.name):
                    yield alias.asname
                if alias.name.split(".")[0] == "fla":
                    yield alias.asname or "fla"
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if closed(node.module) or (node.module == "gdr_teach" and _public(alias.name)):
                    yield alias.asname or alias.name


def _closed_paths(tree: ast.AST) -> Iterable[str]:
    """Dotted names such as gdr_teach.delta_rule."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            if path.startswith("gdr_teach.") and _public(path.split(".")[1]):
                yield path


def _public(name: str) -> bool:
    return f"gdr_teach.{name}" not in OPEN


def _body(function: Function) -> list[ast.stmt]:
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(
        getattr(first.value, "value", None), str
    )
    return function.body[1:] if documented else function.body


def _says_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr | ast.Return):
        value = statement.value
        return value is None or (isinstance(value, ast.Constant) and value.value in (None, ...))
    if isinstance(statement, ast.Raise):
        return "NotImplementedError" in ast.dump(statement)
    return isinstance(statement, ast.Pass)


def _only_ipython(line: str) -> bool:
    text = line.strip()
    return text.startswith(("%", "!")) or (text.endswith("?") and not text.startswith("#"))
