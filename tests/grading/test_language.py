"""English is complete; what another language says has the same blanks to fill in; every sentence is used."""

import re
import string
import tomllib
from pathlib import Path

import pytest

from gdr_teach.grading import language
from gdr_teach.grading.language import pick, say
from gdr_teach.grading.manifest import exercises
from gdr_teach.grading.tasks import checks_of

TEXT = Path(language.__file__).parent / "text"


def sentences(code: str) -> dict[str, str]:
    return dict(language._flat("", tomllib.loads((TEXT / f"{code}.toml").read_text())))


def blanks(sentence: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(sentence) if name}


@pytest.mark.parametrize("code", [path.stem for path in TEXT.glob("*.toml") if path.stem != "en"])
def test_translations_fit_the_english(code):
    english = sentences("en")
    for key, sentence in sentences(code).items():
        assert key in english, key
        assert blanks(sentence) == blanks(english[key]), key


def test_every_check_and_mistake_has_its_sentences(root):
    english = sentences("en")
    wanted = set()
    for exercise in exercises(root):
        for task in exercise.tasks:
            for check in checks_of(task.id):
                wanted |= {f"mistakes.{name}" for name in check.suspects}
                if check.id != "untouched":
                    wanted |= {f"checks.{task.id}.{check.id}.{end}" for end in ("right", "wrong")}
    have = {key for key in english if key.startswith(("checks.", "mistakes."))}
    assert wanted == have


def test_every_sentence_is_said_somewhere():
    package = Path(language.__file__).parents[1]
    files = [package / "cli.py", *(package / "grading").glob("*.py")]
    text = "\n".join(file.read_text() for file in files)
    for key in sentences("en"):
        part, _, name = key.partition(".")
        if part in ("reason", "cli", "notebook"):
            assert re.search(rf"\b{name}\b", text) or name.endswith("_help"), key


def test_the_language_is_chosen(monkeypatch):
    by_language = {"en": "read", "zh": "读"}
    for asked, wanted in (
        ("", "read"),
        ("zh_CN.UTF-8", "读"),
        ("zh-TW", "读"),
        ("../x", "read"),
        ("fr", "read"),
    ):
        monkeypatch.setenv("GDR_LANG", asked)
        assert pick(by_language) == wanted
    monkeypatch.setenv("GDR_LANG", "zh")
    assert say("reason.untouched") == "输入没有被改动"
    assert say("reason.exited", code=0).startswith("It ended its process")  # not translated yet
