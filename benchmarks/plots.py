"""Figures from rows, by what they hold: one style, for README in light and dark and for `--plot`.

| rows with | figure |
|---|---|
| `link`, `us`, `floor_us` | a bar a link of a decoder step, its spread as a whisker, its floor marked |
| `tok/s`, `ms`, `variant`, `B` | bars by batch, one a variant, its calls' range as a whisker |
| `length`, or `position` | time by position; a line a `variant`, or a column of times (`ours_us`) |
| `share_%`, or `floor_us` beside times, and `B` | share of the bandwidth by batch; a line a model, or a column of times |
| times and `B` | time by batch; a line a column of times |

Rows that differ in model, GPU, dtype and the like (`PANELS`) get a panel each. Backgrounds are transparent, and every colour is
legible on white and on GitHub's dark page; what a colour says, a marker, a hatching or a label says too. An SVG depends on
rows, title, this file and the version of matplotlib alone. It carries a digest of the first three, and one of itself.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]

TEXT = "#787878"  # more than 4.2 to 1 on white and on #0d1117
# After Okabe and Ito; at least 3 to 1 on both.
PALETTE = ("#187FC4", "#D55E00", "#009E73", "#CC79A7", "#9C6B30", "#8C6BD8", "#8A8700")
# Eight markers and hatchings to seven colours: the eighth label looks unlike the first.
MARKERS, DASHES = "os^DvPXh", ("-", "--", "-.", ":", (0, (6, 1)), (0, (1, 1)))
HATCHES = ("", "///", "\\\\\\", "xxx", "---", "|||", "++", "..")
OURS = ("ours", "accelerate")
NAMES = {"accelerate": "whisper-triton"}  # of what rows call otherwise
PANELS = ("benchmark", "op", "gpu", "dtype", "model", "B", "T", "timestamps", "mode")
LABELS = {  # of columns of times whose names alone say too little
    "not ahead": "ours, not reading ahead",
    "joined": "ours, joined in the launch",
    "cudnn": "SDPA cuDNN",
    "flash": "SDPA flash",
    "efficient": "SDPA efficient",
    "math": "SDPA math",
    "flex": "FlexAttention",
}
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
STYLE = {
    "svg.hashsalt": "whisper-triton",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 9,
    "hatch.linewidth": 0.7,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
}

SEAL = re.compile(r"(picture sha256:)(\w*)")


class Kind(NamedTuple):
    """How rows of one kind are drawn: a panel each that `split` makes, a line or bar a label of `series`."""

    title: str
    draw: Callable[[Axes, Sequence[Row], Kind, dict[str, int]], None]  # the last: each label's place in PALETTE and so on
    series: Callable[[Row], dict[str, float]]
    within: tuple[str, ...]  # those of PANELS that do not make a panel


def digest(rows: Sequence[Row], title: str | None = None) -> str:
    """What an SVG carries to tell which rows it shows, and how this file drew them."""
    made_of = json.dumps([title, list(rows)], sort_keys=True).encode() + Path(__file__).read_bytes()
    return hashlib.sha256(made_of).hexdigest()


def read_digest(path: Path) -> str | None:
    """The digest that `plot` wrote into an SVG; None where there is no such file, or none in it."""
    found = re.search(r"rows sha256:(\w+)", path.read_text(encoding="utf-8")) if path.exists() else None
    return found and found[1]


def seal(svg: str) -> str:
    """The SVG with a digest of all that it says beside, in the place of any before."""
    blank = SEAL.sub(r"\1", svg)
    return SEAL.sub(rf"\g<1>{hashlib.sha256(blank.encode()).hexdigest()}", svg)


def is_as_drawn(path: Path) -> bool:
    """Whether an SVG is what `plot` once wrote, to the last character."""
    svg = path.read_text(encoding="utf-8")
    return SEAL.search(svg) is not None and seal(svg) == svg


def values(rows: Sequence[Row], column: str) -> list[Any]:
    """The different values of a column in order of appearance; None is none."""
    return list(dict.fromkeys(row[column] for row in rows if row.get(column) is not None))


def named(column: str, value: object) -> str:
    if column == "B":
        return f"batch {value}"
    if column == "dtype":
        return DTYPES.get(str(value).removeprefix("torch."), str(value))
    return f"{column} {value}" if column in ("T", "timestamps", "mode") else str(value)


def split(rows: Sequence[Row], *within: str) -> dict[str, list[Row]]:
    """Title and rows of each panel: a panel for each value of PANELS that occurs beside others, but of those `within` it."""
    columns = [column for column in PANELS if column not in within and len(values(rows, column)) > 1]
    panels: dict[str, list[Row]] = {}
    for row in rows:
        title = ", ".join(named(column, row[column]) for column in columns if row.get(column) is not None)
        panels.setdefault(title, []).append(row)
    return panels


def times(row: Row) -> dict[str, float]:
    """{label: time}: the row's `ms` or `us`, or all of its columns of times but spreads, ranges and first calls."""
    found: dict[str, float] = {}
    for column, value in row.items():
        match = re.fullmatch(r"(?:(.+)_)?(us|ms)", column)
        if match and value is not None and not re.search("spread|min|max|first", column):
            name = match[1] and match[1].replace("_", " ")
            found[LABELS.get(name, name) or str(row.get("variant") or row.get("model") or "time")] = value
    return found


def unit(rows: Sequence[Row]) -> str:
    return "us" if any(re.fullmatch("(.+_)?us", column) for row in rows for column in row) else "ms"


def shares(row: Row) -> dict[str, float]:
    """{label: %} of the floor's rate, for the row or each of its times."""
    if "share_%" in row:
        return {str(row.get("model", "ours")): row["share_%"]}
    found = times(row)
    floor = found.pop("floor")
    return {label: 100 * floor / time for label, time in found.items()}


def looks(labels: Iterable[str]) -> dict[str, int]:
    """Each label's place in the cycles of colours, markers and so on: ours has the first to itself, a floor none."""
    labels = [label for label in dict.fromkeys(labels) if label != "floor"]
    ours = [label for label in labels if label in OURS]
    return {label: i for i, label in enumerate(ours + [label for label in labels if label not in ours], start=not ours)}


def label_ends(ax: Axes, ends: Sequence[tuple[str, tuple[float, float], str]]) -> None:
    """(label, end, colour) of lines as text beside the axes, as high as a line ends, or as near to it as there is room."""
    room, lowest = 0.085, -0.04  # of the axes' height: a line of text, and where the first may stand
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = sorted(ends, key=lambda line: to_axes.transform(line[1])[1])
    heights: list[float] = []
    for _, end, _ in ends:
        heights.append(max(to_axes.transform(end)[1], heights[-1] + room if heights else lowest))
    over = max(0.0, heights[-1] - 1)
    for (label, end, colour), height in zip(ends, heights, strict=True):
        # What is too high is pushed down, as far as those below leave room.
        lowest = max(height - over, lowest)
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3}
        at = {"xytext": (1.04, lowest), "textcoords": "axes fraction", "va": "center", "fontsize": 8}
        ax.annotate(NAMES.get(label, label), end, color=colour, arrowprops=line, **at)
        lowest += room


def draw_lines(ax: Axes, rows: Sequence[Row], x: str, kind: Kind, places: dict[str, int], limit: float = 0) -> None:
    """A line a label over column x, from zero to `limit` at least, or logarithmic where times differ more than 20-fold."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: row[x]):
        for label, y in kind.series(row).items():
            series.setdefault(label, []).append((row[x], y))
    if x == "B":
        batches = sorted(values(rows, "B"))
        ax.set_xscale("log", base=2)
        ticks = [B for B in batches if math.log2(B).is_integer()] or batches
        ax.set_xticks(ticks, [str(B) for B in ticks])
        ax.minorticks_off()
    ys = [y for points in series.values() for _, y in points]
    if not limit and max(ys) > 20 * min(ys):
        ax.set_yscale("log")
    else:
        ax.set_ylim(0, max(limit, 1.1 * max(ys)))
    ends = []
    for label, points in series.items():
        style = {"color": TEXT, "linestyle": (0, (2, 2)), "linewidth": 1.2}
        if label in places:
            colour, marker, dashes = (cycle[places[label] % len(cycle)] for cycle in (PALETTE, MARKERS, DASHES))
            style = {"color": colour, "marker": marker, "markersize": 4, "linestyle": dashes, "linewidth": 1.6}
        ax.plot(*zip(*points, strict=True), **style)
        ends.append((label, points[-1], style["color"]))
    ax.grid(color=TEXT, alpha=0.2, linewidth=0.6)
    label_ends(ax, ends)


def draw_share(ax: Axes, rows: Sequence[Row], kind: Kind, places: dict[str, int]) -> None:
    draw_lines(ax, rows, "B", kind, places, limit=100)
    what = "rate of a large product" if "TFLOP/s" in rows[0] else "bandwidth of the memory"
    ax.set(xlabel="batch", ylabel=f"share of the {what}, %")


def draw_position(ax: Axes, rows: Sequence[Row], kind: Kind, places: dict[str, int]) -> None:
    x = "length" if "length" in rows[0] else "position"
    draw_lines(ax, rows, x, kind, places)
    ax.set(xlabel="tokens in the cache" if x == "length" else "position", ylabel=f"time, {unit(rows)}")


def draw_time(ax: Axes, rows: Sequence[Row], kind: Kind, places: dict[str, int]) -> None:
    draw_lines(ax, rows, "B", kind, places)
    ax.set(xlabel="batch", ylabel=f"time, {unit(rows)}")


def draw_tokens(ax: Axes, rows: Sequence[Row], kind: Kind, places: dict[str, int]) -> None:
    there = [variant for variant in places if variant in values(rows, "variant")]
    batches, width = sorted(values(rows, "B")), 0.84 / len(there)
    variants = sorted(there, key=lambda variant: variant in OURS)  # ours at the right end of a batch's bars
    for nth, variant in enumerate(variants):
        own = [row for row in rows if row["variant"] == variant]
        at = [batches.index(row["B"]) + (nth - (len(variants) - 1) / 2) * width for row in own]
        colour, hatch = (cycle[places[variant] % len(cycle)] for cycle in (PALETTE, HATCHES))
        heights = [row["tok/s"] for row in own]
        ax.bar(at, heights, width, label=variant, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        for x, row in zip(at, own, strict=True):
            slowest, fastest = (row["tok/s"] * row["ms"] / row.get(end, row["ms"]) for end in ("max_ms", "min_ms"))
            ax.plot([x, x], [slowest, fastest], color=TEXT, linewidth=1)
            at_top = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
            ax.annotate(f"{row['tok/s']:.0f}", (x, fastest), fontsize=7, rotation=90, **at_top)
    ax.margins(y=0.16)
    ax.set_xticks(range(len(batches)), [str(B) for B in batches])
    ax.set(xlabel="batch", ylabel="tok/s")


def draw_links(ax: Axes, rows: Sequence[Row], kind: Kind, places: dict[str, int]) -> None:
    ax.barh(range(len(rows)), [row["us"] for row in rows], 0.6, color=PALETTE[0])
    whiskers = [[row["us"] + sign * row.get("spread_us", 0.0) for sign in (-1, 1)] for row in rows]
    for y, (row, whisker) in enumerate(zip(rows, whiskers, strict=True)):
        ax.plot([row["floor_us"]] * 2, [y - 0.42, y + 0.42], color=PALETTE[1], linewidth=2.5)
        ax.plot(whisker, [y, y], color=TEXT, linewidth=1)
        text, end = f"{row['us']:.1f}, floor {row['floor_us']:.1f}", max(whisker[1], row["floor_us"])
        ax.annotate(text, (end, y), (5, 0), textcoords="offset points", va="center", fontsize=7.5)
    ax.set_yticks(range(len(rows)), [str(row["link"]) for row in rows])
    ax.invert_yaxis()
    # A link's time may be a difference, and noise make that negative.
    most = max(max(whisker[1], row["floor_us"]) for row, whisker in zip(rows, whiskers, strict=True))
    ax.set_xlim(min(0, *(whisker[0] for whisker in whiskers)), 1.45 * most)
    ax.set_xlabel("us: bar; its spread: whisker; its floor: line")


def shorten(svg: str) -> str:
    """The same picture in about half the bytes: no font named at each text, no hundredths of a pixel, no indentation."""
    family = re.search(r"font-family: [^;]+", svg)
    svg = re.sub(r"font-family: [^;]+; ", "", svg).replace("*{", "*{" + family[0] + "; ", 1)
    svg = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", svg)
    return re.sub(r"\n +", "\n", re.sub(r"(\d\.\d\d)\d+", r"\1", svg))


KINDS = {
    "tokens": Kind("Tokens per second of generate", draw_tokens, lambda row: {row["variant"]: row["tok/s"]}, ("B",)),
    "share": Kind("Share of the bandwidth", draw_share, shares, ("B",)),
    "step share": Kind("Share of the bandwidth", draw_share, shares, ("B", "model")),
    "links": Kind("Time of each link of a step, and its floor", draw_links, lambda row: {}, ()),
    "position": Kind("Time by position", draw_position, times, ()),
    "time": Kind("Time by batch", draw_time, times, ("B",)),
}


def kind_of(row: Row) -> str:
    """The kind of figure that shows a row; ValueError if none does."""
    has = {column for column, value in row.items() if value is not None}
    if {"link", "us", "floor_us"} <= has:
        return "links"
    if {"tok/s", "ms", "variant", "B"} <= has:
        return "tokens"
    if times(row) and ("length" in has or ("position" in has and "share_%" not in has)):
        return "position"
    if "B" in has and ("share_%" in has or "floor" in times(row)):
        return "step share" if "share_%" in has else "share"
    if "B" in has and times(row):
        return "time"
    raise ValueError(f"no figure shows rows of the columns {', '.join(row)}")


def plot(rows: Sequence[Row], path: Path, title: str | None = None) -> None:
    """Draws what fits the rows' kind into `path`, whose suffix is the format; rows of several kinds get panels of each.

    The title is the first kind's unless given; below it stands what all rows share: GPU, dtype, model, batch.
    Raises ValueError for no rows, and for such as no figure shows.
    """
    if not rows:
        raise ValueError("there are no rows to plot")
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(kind_of(row), []).append(row)
    panels = []
    for kind, own in ((KINDS[name], own) for name, own in kinds.items()):
        places = looks(label for row in own for label in kind.series(row))
        panels += [(name, kind, part, places) for name, part in split(own, *kind.within).items()]
    title = title or KINDS[next(iter(kinds))].title
    shared = [named(column, found[0]) for column in PANELS if len(found := values(rows, column)) == 1]
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 2.8 * down + 0.9), layout="constrained")
        axes = list(figure.subplots(down, across, squeeze=False).flat)
        for ax, (name, kind, part, places) in zip(axes, panels, strict=False):
            ax.set_title(name)
            kind.draw(ax, part, kind, places)
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        legend: dict[str, Any] = {}
        for ax in axes:
            legend |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        if legend:
            columns = 4 if sum(map(len, legend)) < 80 else 2
            labels = [NAMES.get(label, label) for label in legend]
            figure.legend(legend.values(), labels, loc="outside lower center", ncols=columns, frameon=False)
        figure.suptitle(f"{title}\n{', '.join(shared)}", fontsize=10.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".svg":
            figure.savefig(path, transparent=True, dpi=150)
            return
        drawn = io.StringIO()
        says = {"Date": None, "Title": title, "Description": f"rows sha256:{digest(rows, title)}, picture sha256:"}
        figure.savefig(drawn, format="svg", transparent=True, metadata=says)
    path.write_text(seal(shorten(drawn.getvalue())), encoding="utf-8")
