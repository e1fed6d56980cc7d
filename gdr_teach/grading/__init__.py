"""Checking a learner's answers: `check` and `hint` in a notebook, `gdr-teach grade` on the command line.

Reading order, from the data to the verdict:

1. `manifest`, `language`    which tasks there are; every sentence a learner reads
2. `checks`, `tasks`         what a check is, and the checks of each exercise with their float64 references
3. `protocol`                the only thing that crosses a process border: a JSON header and raw arrays
4. `server`, `worker`        the processes that run the learner's code; they hold no reference
5. `client`, `job`, `grade`  the process that holds the references and takes the verdict
6. `notebook`, `progress`    what a learner calls, and what is remembered
7. `classroom`, `exports`, `assign`      many learners: their notebooks, what an instructor takes away, bundles for them

Importing this package imports neither torch nor triton. docs/grading.md explains the design and its limits.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .notebook import check as check
    from .notebook import hint as hint

__all__ = ["check", "hint"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.notebook"), name)
    globals()[name] = value
    return value
