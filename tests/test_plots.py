"""benchmarks/plots.py: each kind of row gets its figure, the same at each run, legible on white and on GitHub's dark page."""

import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from whisper_triton.benchmarks import plots

WHERE = {"gpu": "GPU X", "dtype": "torch.float16"}
MOST_BYTES = 60_000
VARIANTS = ("stock dynamic", "stock static+compile", "accelerate")
ROWS = {
    "tokens": [
        {"model": model, "B": B, "variant": v, "tok/s": 90.0 * B, "ms": 700.0, "min_ms": 600.0, "max_ms": 900.0, **WHERE}
        for model in ("medium", "turbo")
        for B in (1, 2, 8)
        for v in VARIANTS
    ],
    "step share": [
        {"model": m, "B": B, "ms": 1.0, "floor_ms": 0.6, "share_%": 60.0, **WHERE} for m in ("medium", "turbo") for B in (1, 8)
    ],
    "share": [{"B": B, "ours_us": 8.0, "spread_us": 1.0, "cudnn_us": 10.0, "floor_us": 4.0, **WHERE} for B in (1, 3, 4)],
    "links": [
        {"model": "turbo", "B": 1, "link": link, "us": 3.0, "spread_us": 0.5, "floor_us": floor, **WHERE}
        for link, floor in (("fc1", 3.2), ("fc2", 1.0))
    ],
    "position": [
        {"model": "turbo", "B": 8, "variant": v, "position": p, "ms": ms, "spread_ms": 0.1, **WHERE}
        for v, ms in (("accelerate", 1.0), ("stock static+compile", 3.0))
        for p in (16, 440)
    ],
    "time": [{"B": B, "timestamps": t, "ours_us": 3.0, "stock_us": 1400.0, **WHERE} for B in (1, 8) for t in (False, True)],
}
TEXTS = {
    "tokens": {"medium", "turbo", "1", "2", "8", "90", "720", *VARIANTS[:2], "whisper-triton"},
    "step share": {"medium", "turbo", "share of the bandwidth of the memory, %"},
    "share": {"ours", "SDPA cuDNN", "1", "4", "share of the bandwidth of the memory, %"},
    "links": {"fc1", "fc2", "3.0, floor 3.2", "3.0, floor 1.0"},
    "position": {"whisper-triton", "stock static+compile", "position", "time, ms"},
    "time": {"ours", "stock", "timestamps False", "timestamps True", "time, us"},
}


def texts(path: Path) -> set[str]:
    return {"".join(element.itertext()).strip() for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")}


@pytest.mark.parametrize("kind", ROWS)
def test_figure(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "figure.svg"
    plots.plot(ROWS[kind], path, "A title")
    drawn = path.read_text()
    assert len(drawn) < MOST_BYTES
    found = texts(path)
    assert found >= TEXTS[kind] | {"A title"}
    assert any(text.startswith("GPU X, fp16") for text in found)
    assert "dc:date" not in drawn
    colours = set(re.findall("#[0-9a-f]{6}", drawn.lower()))
    assert colours <= {colour.lower() for colour in (plots.TEXT, *plots.PALETTE, "#ffffff")}  # white: the hatching


def test_the_same_each_time(tmp_path: Path) -> None:
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    for path in (first, second):
        plots.plot(ROWS["tokens"][:6], path)  # hatchings, clip paths and markers have ids made from a hash
    assert first.read_bytes() == second.read_bytes()


def test_digest_tells_rows_and_title(tmp_path: Path) -> None:
    rows, path = ROWS["links"], tmp_path / "figure.svg"
    assert plots.read_digest(path) is None
    plots.plot(rows, path, "A title")
    assert plots.read_digest(path) == plots.digest(rows, "A title")
    assert plots.digest(rows, "Another") != plots.digest(rows, "A title")
    assert plots.digest([{**rows[0], "us": 3.1}, *rows[1:]], "A title") != plots.digest(rows, "A title")


def test_other_formats(tmp_path: Path) -> None:
    plots.plot(ROWS["links"] + ROWS["position"], tmp_path / "new" / "both.png")
    assert (tmp_path / "new" / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ROWS)
def test_kind(kind: str) -> None:
    assert {plots.kind_of(row) for row in ROWS[kind]} == {kind}


def test_kind_by_length() -> None:
    assert plots.kind_of({"B": 1, "length": 20, "ours_us": 3.0, "stock_us": 21.0}) == "position"


def test_what_no_figure_shows(tmp_path: Path) -> None:
    for rows, reason in (([], "no rows"), ([{"B": 1, "first_s": 2.0}], "the columns B, first_s")):
        with pytest.raises(ValueError, match=reason):
            plots.plot(rows, tmp_path / "figure.svg")
    assert not list(tmp_path.iterdir())


def test_times_are_not_spreads_or_ranges() -> None:
    row = {
        "ours_us": 1.0,
        "spread_us": 2.0,
        "joined_spread_us": 3.0,
        "floor_us": 4.0,
        "first_ms": 5.0,
        "tok/s": 6.0,
        "x_us": None,
    }
    assert plots.times(row) == {"ours": 1.0, "floor": 4.0}
    assert plots.times({"variant": "v_1", "ms": 1.0, "min_ms": 0.5, "max_ms": 2.0}) == {"v_1": 1.0}


def test_shares() -> None:
    assert plots.shares(ROWS["share"][0]) == {"ours": 50.0, "SDPA cuDNN": 40.0}
    assert plots.shares(ROWS["step share"][0]) == {"medium": 60.0}


def test_bars_are_as_long_as_what_was_measured() -> None:
    axes = Figure().subplots(1, 2)
    links, tokens = plots.KINDS["links"], plots.KINDS["tokens"]
    links.draw(axes[0], ROWS["links"], links, {})
    assert list(axes[0].containers[0].datavalues) == [3.0, 3.0]
    assert [list(line.get_xdata()) for line in axes[0].lines] == [[3.2, 3.2], [2.5, 3.5], [1.0, 1.0], [2.5, 3.5]]
    tokens.draw(axes[1], ROWS["tokens"][:9], tokens, plots.looks(VARIANTS))
    assert {bars.get_label(): list(bars.datavalues) for bars in axes[1].containers} == {
        variant: [90.0, 180.0, 720.0] for variant in VARIANTS
    }
    assert list(axes[1].lines[0].get_ydata()) == [70.0, 105.0]  # the slowest and the fastest call


def test_a_panel_has_bars_of_what_was_measured_there_alone() -> None:
    ax, tokens = Figure().subplots(), plots.KINDS["tokens"]
    there = [row for row in ROWS["tokens"][:9] if row["variant"] != VARIANTS[0]]
    tokens.draw(ax, there, tokens, plots.looks(VARIANTS))
    assert [bars.get_label() for bars in ax.containers] == [*VARIANTS[1:]]  # what the legend is made of
    widths = [bar.get_width() for bars in ax.containers for bar in bars]
    assert widths == pytest.approx([0.42] * 6)


def test_labels_of_lines_do_not_lie_on_each_other() -> None:
    for ends in ([0.0] * 6, [100.0] * 6, [0, 1, 50, 51, 99, 100]):
        ax = Figure().subplots()
        ax.set_ylim(0, 100)
        plots.label_ends(ax, [(str(i), (1.0, end), plots.TEXT) for i, end in enumerate(ends)])
        heights = sorted(text.xyann[1] for text in ax.texts)
        assert all(b - a > 0.08 for a, b in itertools.pairwise(heights))
        assert heights[0] > -0.1
        assert heights[-1] < 1.1


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_colours_are_legible(page: str) -> None:
    def contrast(colour: str) -> float:
        lower, higher = sorted((luminance(colour), luminance(page)))
        return (higher + 0.05) / (lower + 0.05)

    assert contrast(plots.TEXT) > 4.2
    assert min(map(contrast, plots.PALETTE)) >= 3


def test_no_two_of_many_lines_look_alike() -> None:
    def look(i: int) -> tuple[object, ...]:
        return tuple(cycle[i % len(cycle)] for cycle in (plots.PALETTE, plots.MARKERS, plots.DASHES))

    places = plots.looks([*map(str, range(12)), "floor", "ours", "3"])
    assert places["ours"] == 0
    assert "floor" not in places
    assert len({look(place) for place in places.values()}) == len(places) == 13
    assert len({plots.HATCHES[place % len(plots.HATCHES)] for place in range(len(plots.PALETTE) + 1)}) == len(plots.PALETTE) + 1
