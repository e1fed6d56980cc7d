"""Times the grading of a class: 200 notebooks of exercise 02, as learners hand them in.

    python benchmarks/grade_class.py [--notebooks 200] [--jobs 2]

One in ten is a broken file, one in ten is untouched, one in forty runs for ever in one of its tasks, one in ten holds a
wrong answer; the rest are solved. Says how long it took and checks that every row holds what it should.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from gdr_teach.grading.classroom import grade_all, submissions
from gdr_teach.grading.manifest import find_root

ROOT = find_root(Path(__file__))
NAME = "02_delta_rule.ipynb"


def handed_in(number: int, solved: str, untouched: str) -> tuple[str, int | None]:
    """A notebook's text, and the points it is worth; None: it cannot be used."""
    if number % 10 == 3:
        return solved[: len(solved) // 2], None
    if number % 10 == 6:
        return untouched, 0
    if number % 40 == 1:
        return changed(solved, "return scale * (S.T @ q)", "while True: pass"), 14
    if number % 10 == 8:
        return changed(solved, "u = beta * (v - S.T @ k)", "u = beta * v"), 13
    return solved, 16


def changed(text: str, old: str, new: str) -> str:
    assert json.dumps(old)[1:-1] in text, old
    return text.replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notebooks", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    solved, untouched = (
        (ROOT / folder / NAME).read_text(encoding="utf-8") for folder in ("solutions", "exercises")
    )
    with tempfile.TemporaryDirectory() as folder:
        wanted = {}
        for number in range(options.notebooks):
            learner = f"learner {number:03}"
            text, wanted[learner] = handed_in(number, solved, untouched)
            (Path(folder) / learner).mkdir()
            (Path(folder) / learner / NAME).write_text(text, encoding="utf-8")
        began = time.perf_counter()
        results = grade_all(submissions([Path(folder)]), ROOT, 0, options.jobs)
        took = time.perf_counter() - began
    got = {r.submission.learner: r.report.score if r.report else None for r in results}
    wrong = [learner for learner in wanted if got[learner] != wanted[learner]]
    print(f"{len(results)} notebooks in {took:.0f} s, {options.jobs} at a time")
    print("points: " + ", ".join(f"{n} x {points}" for points, n in Counter(got.values()).items()))
    if wrong:
        print(f"not what they are worth: {', '.join(wrong)}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
