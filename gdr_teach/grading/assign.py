"""A bundle for a class: the exercises as learners get them and the chapters they belong to, and no answer."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from .language import say
from .manifest import PLACE, Exercise, UnusableInput, find_exercise, part_of
from .progress import write_new


def assign(root: Path, out: Path, names: Sequence[str]) -> list[Path]:
    """Write a bundle of the named exercises into the new or empty folder `out`; returns the files written.

    Raises: UnusableInput when a name is unknown or `out` is not empty, before anything is written; OSError.
    """
    chosen = list({(e := find_exercise(root, name)).id: e for name in names}.values())
    if not chosen:
        raise UnusableInput(say("class.no_names"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UnusableInput(say("class.not_empty", path=out))
    files = {PLACE: part_of(root, [exercise.id for exercise in chosen]).encode()}
    for exercise in chosen:
        files |= _notebooks(root, exercise)
    hand_in = "\n".join(f"    {exercise.id}.ipynb" for exercise in chosen)
    files[Path("README.md")] = say("class.readme", files=hand_in).encode()
    try:
        for place, data in files.items():
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            if not write_new(out / place, data):
                raise UnusableInput(say("class.not_empty", path=out))
    except OSError:
        shutil.rmtree(out, ignore_errors=True)  # it was new or empty: half a bundle is none
        raise
    return [out / place for place in files]


def _notebooks(root: Path, exercise: Exercise) -> dict[Path, bytes]:
    """The template and, when it is there, the chapter."""
    exercise_place = Path("exercises") / f"{exercise.id}.ipynb"
    chapter = Path("notebooks") / f"{exercise.chapter}.ipynb"
    if not (root / exercise_place).is_file():
        raise UnusableInput(say("cli.template_missing", path=root / exercise_place))
    places = [exercise_place, *([chapter] if (root / chapter).is_file() else [])]
    return {place: (root / place).read_bytes() for place in places}
