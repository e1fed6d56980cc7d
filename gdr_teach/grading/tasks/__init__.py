"""The checks of every task, by exercise. Only the process that takes the verdict imports these modules."""

from importlib import import_module

from ..checks import Check


def checks_of(task_id: str) -> tuple[Check, ...]:
    """The checks of a task, in the order they are run. Raises: KeyError when the task has none."""
    chapter = task_id.split(".", maxsplit=1)[0]
    return import_module(f"{__name__}.exercise_{chapter}").CHECKS[task_id]
