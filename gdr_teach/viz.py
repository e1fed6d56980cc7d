"""Every figure of the course, each with alt text; needs the `course` extra (matplotlib, IPython).

A figure function takes numbers, returns a matplotlib Figure and writes its alt text from those numbers:

    show(recall_by_pairs(...))          # a cell's last line; the picture, and the same in words below it

Colours are Okabe and Ito's, which colour-blind readers can tell apart; in grey print the markers, the dashes and
the numbers inside the cells tell the rest. Nothing here computes a rule.
"""

import base64
import hashlib
import html
import inspect
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

try:
    from IPython.display import HTML, display
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        "gdr_teach.viz: the figures need matplotlib and IPython. Install the course extra: "
        "pip install -c constraints.txt '.[course]'"
    ) from error

DPI = 80
PNG_LIMIT = 40_000  # bytes, so that a page of figures stays small
STYLES = (  # colour, marker, dashes: one row a curve
    ("#D55E00", "o", "-"),
    ("#0072B2", "s", "--"),
    ("#009E73", "^", ":"),
    ("#000000", "D", "-."),
)
POSITIVE, NEGATIVE = (
    (0, 114, 178),
    (230, 159, 0),
)  # blue and orange, the two signs of a state's cells


# -- showing -------------------------------------------------------------------------------------


def describe(fig: Figure, alt: str) -> Figure:
    """Give a figure its alt text; returns the figure."""
    fig.set_label(" ".join(alt.split()))
    return fig


def show(fig: Figure, alt: str | None = None, *, name: str = "This figure") -> None:
    """Display a figure as a small PNG with its alt text, and the alt text once more in a line that unfolds.

    The alt text travels in the output's metadata, where nbconvert and the site read it; JupyterLab and GitHub
    show the picture and drop the attribute, so the folded line is what their readers' screen readers find.

    Args: fig, from a function of this module; alt, words in place of the figure's own; name, such as "Figure 2.1".
    Raises: ValueError without alt text, or when the PNG is larger than PNG_LIMIT.
    """
    words = " ".join((alt or str(fig.get_label())).split())
    if not words:
        raise ValueError("show: alt must say what the figure shows, got none")
    png = render(fig)
    bundle = {"image/png": base64.b64encode(png).decode(), "text/plain": words}
    display(bundle, raw=True, metadata={"image/png": {"alt": words}})
    folded = f"<details><summary>{html.escape(name)} in words</summary><p>{html.escape(words)}</p></details>"
    display({"text/html": folded, "text/plain": ""}, raw=True)


def render(fig: Figure) -> bytes:
    """The figure as PNG bytes, the same bytes every time; ValueError beyond PNG_LIMIT."""
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    if file.tell() > PNG_LIMIT:
        raise ValueError(f"show: the PNG must have at most {PNG_LIMIT} bytes, got {file.tell()}")
    return file.getvalue()


def source(*functions: Any) -> None:
    """Display the source of functions or kernels as it is in the installed package, so that no copy can age."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    box = "background:#fff;color:#111;border:1px solid #bbb;padding:.6em;overflow-x:auto"
    pre = "margin:0;font:13px/1.4 monospace;color:#111;white-space:pre;overflow-x:auto"
    formatter = HtmlFormatter(noclasses=True, nobackground=True, cssstyles=box, prestyles=pre)
    for f in functions:
        plain = inspect.unwrap(getattr(f, "fn", f))  # a kernel keeps its function in .fn
        text = inspect.getsource(plain).rstrip()
        page = highlight(text, PythonLexer(), formatter)
        where = f"{plain.__module__}:{plain.__qualname__}"
        bundle = {"text/html": page, "text/plain": text}
        display(bundle, raw=True, metadata={"text/html": {"source": where}})


# -- the road ------------------------------------------------------------------------------------


ROAD = (  # chapter, question, the same in Chinese
    ("01_memory", "What is the state S_t?", "什么是 S_t（记忆）？"),
    ("02_delta_rule", "The delta rule: why subtract, then add?", "Delta 规则：为什么“先减后加”？"),
    ("03_iplr", "IPLR: what if forgetting were free?", "IPLR：怎样更灵活地“遗忘”？"),
    ("04_stability", "Stability: what must not be added?", "数值稳定性：为什么不能随便乱加？"),
    ("05_dplr", "DPLR: what does a diagonal matrix buy?", "DPLR：引入对角矩阵有什么用？"),
    ("06_chunkwise_wy", "Chunks: how is it computed fast?", "分块计算（chunkwise）：怎样算得快？"),
)


def roadmap(progress: str, folder: Path | str = ".") -> str:
    """The course's six questions as a checklist in English and Chinese.

    Args: progress, what `gdr-teach progress` prints, "[x] 02.read ..." a task, or "" when there is none;
        folder, where the chapters are: one that is not there is called planned.
    """
    tasks = re.findall(r"^\[(.)\] (\d\d)\.", progress, re.MULTILINE)
    lines = []
    for number, (chapter, english, chinese) in enumerate(ROAD, start=1):
        marks = [mark != " " for mark, of in tasks if of == chapter[:2]]
        state = f"{sum(marks)} of {len(marks)} tasks passed" if marks else "open it and read"
        if not (Path(folder) / f"{chapter}.ipynb").exists():
            state = "planned"
        box = "☑" if marks and all(marks) else "☐"
        lines.append(
            f"{box} {number}  {english}\n     {chinese}\n     chapter {chapter[:2]}: {state}\n"
        )
    return "\n".join(lines)


# -- curves --------------------------------------------------------------------------------------


def recall_by_pairs(pairs: Sequence[int], errors: Mapping[str, Sequence[float]], K: int) -> Figure:
    """Mean recall error against the number of stored pairs, one curve a rule; a line marks K pairs.

    Args: pairs, the numbers of pairs stored; errors, name -> mean recall error at each; K, the key width.
    """
    fig, ax = _axes()
    _curves(ax, pairs, errors)
    ax.axvline(K, color="0.5", lw=1)
    ax.annotate(f"K = {K}", (K, 0.98), xycoords=("data", "axes fraction"), xytext=(4, 0),
                textcoords="offset points", va="top", color="0.35")  # fmt: skip
    ax.set_xlabel("stored pairs T")
    ax.set_ylabel(r"mean recall error $|S^T k - v|\,/\,|v|$")
    ax.legend(frameon=False)
    ends = "; ".join(
        f"{name}: {_at(pairs, y, K)} at {K} pairs, {y[-1]:.2f} at {pairs[-1]}"
        for name, y in errors.items()
    )
    return describe(
        fig,
        f"Line chart of the mean recall error against the number of stored pairs, from {pairs[0]} to "
        f"{pairs[-1]}, for keys of width {K}. {ends}.",
    )


def recall_by_width(
    pairs: Sequence[int],
    measured: Mapping[int, Sequence[float]],
    expected: Mapping[int, Sequence[float]],
) -> Figure:
    """Recall error against the number of stored pairs, one key width a curve: a line expected, dots measured.

    Args: pairs, the numbers of pairs stored; measured and expected, key width K -> root mean square error at each.
    """
    fig, ax = _axes()
    for (K, y), (colour, marker, dashes) in zip(expected.items(), STYLES, strict=False):
        ax.plot(pairs, y, color=colour, ls=dashes)
        ax.plot(pairs, measured[K], marker, color=colour, mfc="white", ms=5)
        ax.plot([], [], color=colour, ls=dashes, marker=marker, mfc="white", ms=5, label=f"K = {K}")
    ax.axhline(1, color="0.5", lw=1)
    ax.annotate("as bad as answering zero", (0, 1), xycoords=("axes fraction", "data"), xytext=(4, 3),
                textcoords="offset points", color="0.35", fontsize="small")  # fmt: skip
    _powers_of_two(ax.xaxis, pairs)
    ax.set_yscale("log")
    ax.set_yticks(
        [0.05, 0.1, 0.2, 0.5, 1, 2, 5], labels=["0.05", "0.1", "0.2", "0.5", "1", "2", "5"]
    )
    ax.yaxis.minorticks_off()
    ax.set_xlabel("stored pairs T (doubling)")
    ax.set_ylabel("recall error, root mean square\n(no unit, log scale)")
    ax.legend(frameon=False, title="line expected, marker measured", loc="lower right")
    ends = "; ".join(
        f"width {K}: {y[0]:.2f} measured with {pairs[0]} pairs, {expected[K][0]:.2f} expected, and {y[-1]:.2f} "
        f"with {pairs[-1]}, {expected[K][-1]:.2f} expected"
        for K, y in measured.items()
    )
    return describe(
        fig,
        "Line chart with logarithmic axes of the recall error against the number of stored pairs, one line a key "
        f"width: measured markers lie on the expected lines, which rise in parallel, wider keys lower. {ends}.",
    )


def stored_numbers(tokens: Sequence[int], numbers: Mapping[str, Sequence[int]]) -> Figure:
    """How many numbers a model keeps against the tokens it has read, one curve a way of keeping them.

    Args: tokens, token counts; numbers, name -> numbers kept after each.
    """
    fig, ax = _axes()
    _curves(ax, tokens, numbers)
    _powers_of_two(ax.xaxis, tokens)
    ax.set_yscale("log")
    ax.yaxis.minorticks_off()
    ax.set_xlabel("tokens read t (doubling)")
    ax.set_ylabel("numbers kept for one head\n(log scale)")
    ax.legend(frameon=False)
    ends = "; ".join(
        f"{name}: {y[0]:,} numbers after {_tokens(tokens[0])}, {y[-1]:,} after {_tokens(tokens[-1])}"
        for name, y in numbers.items()
    )
    return describe(
        fig,
        "Line chart with logarithmic axes of the numbers that one head keeps against the tokens it has read. "
        f"{ends}.",
    )


def recall_by_age(errors: Mapping[str, Sequence[float]]) -> Figure:
    """Mean recall error of a pair against how many writes came after it, one curve a rule.

    Args: errors, name -> error at age 0 (the newest pair), 1, 2, ...
    """
    fig, ax = _axes()
    ages = list(range(len(next(iter(errors.values())))))
    _curves(ax, ages, errors)
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    ax.set_xlabel("age: writes since the pair was stored")
    ax.set_ylabel(r"mean recall error $|S^T k - v|\,/\,|v|$")
    ax.legend(frameon=False)
    ends = "; ".join(
        f"{name}: {y[0]:.2f} for the newest pair, {y[-1]:.2f} for one followed by {ages[-1]} more writes"
        for name, y in errors.items()
    )
    return describe(fig, f"Line chart of the mean recall error against a pair's age. {ends}.")


def error_by_beta(beta: Sequence[float], measured: Sequence[float]) -> Figure:
    """What is left of the error after one write, against the step size: the line |1 - beta| and measured dots.

    Args: beta, step sizes; measured, |r after| / |r before| at each, for keys of length 1.
    """
    fig, ax = _axes()
    x = np.linspace(min(beta), max(beta), 301)
    (colour, _, _), (dots, marker, _) = STYLES[:2]
    ax.axhspan(1, max(1.05, max(measured) * 1.05), color="0.92")
    ax.text(min(beta) + 0.02, 1.02, "error grows", va="bottom", color="0.35")
    ax.plot(x, np.abs(1 - x), color=colour, label=r"$|1-\beta|$")
    ax.plot(beta, measured, marker, color=dots, mfc="white", label="measured")
    for at, words in (
        (0, "nothing\nwritten"),
        (1, "exact\noverwrite"),
        (2, "same size,\nother sign"),
    ):
        ax.annotate(words, (at, abs(1 - at)), xytext=(at, 0.52 if at == 1 else 0.55), ha="center",
                    fontsize="small", arrowprops={"arrowstyle": "-", "color": "0.6"})  # fmt: skip
    ax.set_xlabel(r"step size $\beta$ (no unit)")
    ax.set_ylabel("error left after one write,\nas a share of the error before")
    ax.legend(frameon=False, loc="lower left")
    return describe(
        fig,
        "A V-shaped line, the absolute value of 1 minus beta, with measured dots on it. The error left after one "
        "write is all of it at beta 0, nothing at beta 1, all of it again at beta 2 with the sign turned, and "
        f"grows beyond: {measured[-1]:.2f} times the error before at beta {beta[-1]:g}.",
    )


def growth(log2_norms: Mapping[str, Sequence[float]]) -> Figure:
    """Norm of the product of the first t transitions: name -> log2 of it after 1, 2, ... tokens, one curve a name."""
    fig, ax = _axes()
    T = len(next(iter(log2_norms.values())))
    _curves(ax, range(1, T + 1), log2_norms)
    ax.set(xlabel="tokens t", ylabel="norm of the product so far\n(doublings: log2, no unit)")
    ax.legend(frameon=False)
    ends = "; ".join(f"{name}: {y[-1]:.1f}, at most {max(y):.1f}" for name, y in log2_norms.items())
    alt = f"Line chart of the norm of all transitions' product, in doublings. At {_tokens(T)}: {ends}."
    return describe(fig, alt)


def phase_diagram(products: Any, angles: Any, panels: Mapping[str, Sequence[Any]]) -> Figure:
    """Three regions of c I + b a^T and lines of equal norm: title -> `stability.plane(products, angles, decay=c)`."""
    fig = Figure(figsize=(0.6 + 2.6 * len(panels), 3.2), layout="constrained")
    alt = "Maps: lambda |a|^2 across, the angle between b and the line of a upwards; beyond: norm above 1."
    names = {"#009E73": "contraction", "#FBE7B2": "only spectrum inside", "0.7": "spectrum outside"}
    for i, (title, (norm, radius)) in enumerate(panels.items(), start=1):
        ax = fig.add_subplot(1, len(panels), i, title=title, yticks=range(0, 91, 15))
        ax.set(xlabel=r"$\lambda|a|^2$, or $\pm|a|\,|b|$", ylabel="angle of b to a's line (°)")
        ax.contourf(products, angles, radius, [0, 1 + 1e-9, 99], colors=list(names)[1:])
        ax.contourf(products, angles, norm, [0, 1 + 1e-9], colors=list(names)[:1])
        ax.clabel(ax.contour(products, angles, norm, [1.1, 1.5, 2], colors="0.2"))
        inside = np.asarray(norm) <= 1 + 1e-9
        x, up = np.asarray(products)[inside[0]], np.asarray(angles)[inside.sum(1) > 1]
        ax.plot(x, 0 * x, color="#009E73", lw=7, clip_on=False, solid_capstyle="butt")
        alt += f" {title}: contraction from {_number(x[0])} to {_number(x[-1])} at 0, up to {up[-1]:.0f} degrees."
    keys = [ax.fill([], [], color=colour)[0] for colour in names]
    fig.legend(keys, names.values(), loc="outside lower center", ncols=3, frameon=False)
    return describe(fig, alt)


def _axes() -> tuple[Figure, Any]:
    fig = Figure(figsize=(6.4, 3.4), layout="constrained")
    ax = fig.add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    return fig, ax


def _curves(ax, x: Sequence[float], lines: Mapping[str, Sequence[float]]) -> None:
    for (name, y), (colour, marker, dashes) in zip(lines.items(), STYLES, strict=False):
        every = max(1, len(x) // 32)  # or the markers hide the dashes
        ax.plot(x, y, color=colour, marker=marker, ls=dashes, ms=4.5, label=name, markevery=every)


def _powers_of_two(axis, at: Sequence[int]) -> None:
    # every number of `at` a tick, written out; every second one when there are many
    axis.axes.set_xscale("log", base=2)
    shown = at if len(at) <= 10 else at[::2]
    axis.set_ticks(shown, labels=[f"{x:,}" for x in shown])
    axis.set_tick_params(which="minor", length=0)


def _tokens(count: int) -> str:
    return f"{count:,} token" + ("" if count == 1 else "s")


def _at(x: Sequence[float], y: Sequence[float], at: float) -> str:
    return f"{np.interp(at, x, y):.2f}"


# -- states --------------------------------------------------------------------------------------


def states(panels: Mapping[str, Any], *, alt: str | None = None) -> Figure:
    """States [K, V] side by side as heat maps on one colour scale; small ones carry their numbers.

    Args: panels, title -> state; alt, one more sentence for the alt text.
    """
    S = {title: np.asarray(x, dtype=float) for title, x in panels.items()}
    top = max(float(np.abs(x).max(initial=0.0)) for x in S.values()) or 1.0
    K, V = next(iter(S.values())).shape
    labels = ("value channel (V)", "key channel (K)", "entry of S (units of v)")
    fig = _heat_maps(S, top, labels, size=(1.2 + 2.1 * len(S), 2.9))
    words = f"Heat maps of states with {K} key channels (rows) and {V} value channels (columns). {_rows(S)}. "
    return describe(fig, words + (alt or ""))


def overlaps(panels: Mapping[str, Any]) -> Figure:
    """Overlaps of keys side by side: entry (j, i) is k_j . k_i, how loudly pair i answers when key j asks.

    Args: panels, title -> the T x T overlaps of unit keys, T at most 8.
    """
    G = {title: np.asarray(x, dtype=float) for title, x in panels.items()}
    T = len(next(iter(G.values())))
    labels = ("pair i that answers", "key j that asks", r"overlap $k_j^\top k_i$ (no unit)")
    fig = _heat_maps(G, 1.0, labels, size=(1.0 + 2.6 * len(G), 2.9))
    words = f"Heat maps of the overlaps of {T} unit keys; row j: how loudly each pair answers to key j. "
    return describe(fig, words + f"{_rows(G)}.")


def _heat_maps(
    panels: Mapping[str, np.ndarray],
    top: float,
    labels: tuple[str, str, str],
    size: tuple[float, float],
) -> Figure:
    # one colour scale from -top to top; labels: columns, rows, colour bar
    columns, rows, bar = labels
    fig = Figure(figsize=size, layout="constrained")
    axes = fig.subplots(1, len(panels), squeeze=False)[0]
    ends = [[channel / 255 for channel in sign] for sign in (NEGATIVE, POSITIVE)]
    signs = LinearSegmentedColormap.from_list("signs", [ends[0], (1, 1, 1), ends[1]])
    for ax, (title, x) in zip(axes, panels.items(), strict=True):
        picture = ax.imshow(x, cmap=signs, vmin=-top, vmax=top, aspect="auto")
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel(columns)
        ax.set_xticks(range(x.shape[1]))
        ax.set_yticks(range(x.shape[0]))
        if x.size <= 64:
            for (i, j), cell in np.ndenumerate(x):
                dark = cell > 0.93 * top  # where black and white are equally readable
                ax.text(j, i, _number(cell), ha="center", va="center", fontsize="small",
                        color="white" if dark else "black")  # fmt: skip
    axes[0].set_ylabel(rows)
    fig.colorbar(picture, ax=list(axes), label=bar, shrink=0.9)
    return fig


def _rows(panels: Mapping[str, np.ndarray]) -> str:
    return ". ".join(
        f"{title}: " + "; ".join(", ".join(_number(c) for c in row) for row in x)
        for title, x in panels.items()
        if x.size <= 64
    )


class Step(NamedTuple):
    """One frame of the scrubber: the state after a token and a sentence on what the token did."""

    S: Any  # [K, V]
    note: str


def scrubber(steps: Sequence[Step], *, title: str) -> HTML:
    """The state over time, to step through: plain HTML and a little script, no widgets, nothing fetched.

    Without script all frames stand side by side. Entries that a token changed are framed. Keys: the slider takes
    the arrow keys, Home and End, the buttons Enter and Space.
    """
    arrays = [np.asarray(s.S, dtype=float) for s in steps]
    top = max(float(np.abs(x).max(initial=0.0)) for x in arrays) or 1.0
    frames = []
    for t, (x, step) in enumerate(zip(arrays, steps, strict=True)):
        old = arrays[t - 1] if t else x
        frames.append(_frame(t, x, old, top, step.note))
    name = "gdr-" + hashlib.sha256("".join([title, *frames]).encode()).hexdigest()[:8]
    body = _PAGE.replace("NAME", name).replace("TITLE", html.escape(title))
    return HTML(body.replace("LAST", str(len(steps) - 1)).replace("FRAMES", "\n".join(frames)))


def _frame(t: int, x: np.ndarray, old: np.ndarray, top: float, note: str) -> str:
    head = "".join(
        f'<th scope="col" style="text-align:right">value {j}</th>' for j in range(x.shape[1])
    )
    rows = []
    for i, (row, was) in enumerate(zip(x, old, strict=True)):
        cells = "".join(_cell(c, w, top) for c, w in zip(row, was, strict=True))
        rows.append(
            f'<tr style="background:#fff"><th scope="row" style="color:#111">key {i}</th>{cells}</tr>'
        )
    return (
        f'<section style="width:15em"><table style="border-collapse:separate;border-spacing:3px;margin:0">'
        f'<caption style="text-align:left;color:#111">state after {t} token{"" if t == 1 else "s"}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        f'<p style="margin:.4em 0;min-height:2.8em">{html.escape(note)}</p></section>'
    )


def _cell(c: float, was: float, top: float) -> str:
    share = 0.75 * abs(c) / top
    sign = POSITIVE if c > 0 else NEGATIVE
    r, g, b = (round(255 + share * (channel - 255)) for channel in sign)
    frame = "#111" if abs(c - was) > 1e-9 else "transparent"
    style = f"background:rgb({r},{g},{b});border:2px solid {frame}"
    return f'<td style="{style};padding:.2em .5em;text-align:right;color:#111">{_number(c)}</td>'


def _number(x: float) -> str:
    text = f"{x:.2f}"
    return (text[1:] if float(text) == 0 and text[0] == "-" else text).replace("-", "−")


_PAGE = """\
<div id="NAME" data-lm-suppress-shortcuts="true" style="background:#fff;color:#111;padding:.8em;\
border:1px solid #bbb;font:14px/1.4 sans-serif">
<p style="margin:0 0 .5em"><strong>TITLE</strong></p>
<div class="frames" style="display:flex;flex-wrap:wrap;gap:1em 2em">
FRAMES
</div>
</div>
<script>
(function () {
  var box = document.getElementById("NAME");
  if (!box || box.querySelector("input")) return;
  var frames = box.querySelectorAll("section"), last = LAST;
  var bar = document.createElement("div");
  bar.style.cssText = "display:flex;gap:.6em;align-items:center;margin-bottom:.6em";
  function add(tag, set) {
    var e = document.createElement(tag);
    for (var key in set) e[key] = set[key];
    bar.appendChild(e);
    return e;
  }
  var back = add("button", {type: "button", textContent: "\\u25c0 back"});
  var slider = add("input", {type: "range", min: 0, max: last, step: 1, value: 0});
  slider.setAttribute("aria-label", "token t");
  var on = add("button", {type: "button", textContent: "next \\u25b6"});
  var told = add("output", {});
  told.setAttribute("aria-live", "polite");
  function draw() {
    var t = Number(slider.value);
    frames.forEach(function (f, i) { f.style.display = i === t ? "" : "none"; f.style.width = ""; });
    told.textContent = "t = " + t + " of " + last;
    slider.setAttribute("aria-valuetext", told.textContent);
    back.disabled = t === 0;
    on.disabled = t === last;
  }
  function move(by) { slider.value = Number(slider.value) + by; draw(); }
  back.onclick = function () { move(-1); };
  on.onclick = function () { move(1); };
  slider.oninput = draw;
  box.addEventListener("keydown", function (e) { e.stopPropagation(); });  // or JupyterLab takes the focus
  box.insertBefore(bar, box.children[1]);
  draw();
})();
</script>
"""
