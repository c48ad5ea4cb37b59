"""README's tables and figures are what benchmarks/rows/ gives, and benchmarks/readme.py says where they are not."""

import json
import re
from pathlib import Path

import pytest

from whisper_triton.benchmarks import captions, columns, plots, readme, readme_tables

MOST_BYTES = 80_000  # of a figure
WHERE = {
    "gpu": "GPU X",
    "driver": "1.2",
    "torch": "2.11",
    "triton": "3.6",
    "transformers": "5.17",
    "revision": "abc",
    "date": "2026-01-01",
}
VERSIONS = "fp16, driver 1.2, torch 2.11, triton 3.6, transformers 5.17:"
CAPTION = f"on GPU X, 2026-01-01 at revision abc; {VERSIONS}"
PAGE = """# Name

Prose | that stays.

<!-- rows: decoder_step -->
whatever stood here
<!-- end -->

More.

<!-- plot: decoder_step -->
<!-- end -->
"""
LINKS = """
<!-- rows: step_links -->
<!-- end -->
<!-- plot: step_links -->
old
<!-- end -->
"""
STEP = {
    "model": "turbo",
    "B": 1,
    "ms": 0.15832,
    "spread_ms": 0.0013,
    "floor_ms": 0.1101,
    "share_%": 69.6,
    "error": "1e-3",
    **WHERE,
}


def write(root: Path, name: str, *rows: dict) -> None:
    folder = root / "benchmarks" / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "decoder_step", STEP, {**STEP, "B": 8, "ms": 0.27, "odd": [1], "benchmark": "step"})
    (tmp_path / "README.md").write_text(PAGE)
    return tmp_path


def test_readme_is_what_the_rows_give() -> None:
    assert readme.differences(readme.ROOT) == [], "run: python benchmarks/readme.py"


@pytest.mark.parametrize("page", [*readme.PAGES, "CONTRIBUTING.md", "SECURITY.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = readme.ROOT / page
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text())
    assert links or page == "CONTRIBUTING.md"
    assert not [link for link in links if "://" not in link and not (path.parent / link).exists()]


def test_figures_are_small() -> None:
    figures = list((readme.ROOT / "benchmarks" / "plots").glob("*.svg"))
    assert figures
    assert {path.name: path.stat().st_size for path in figures if path.stat().st_size > MOST_BYTES} == {}


def test_rewrite(root: Path) -> None:
    readme.rewrite(root)
    assert (
        (root / "README.md").read_text()
        == f"""# Name

Prose | that stays.

<!-- rows: decoder_step -->
`python benchmarks/decoder_step.py` {CAPTION}

| model | batch | ms | floor, ms | share of the bandwidth |
| --- | --- | --- | --- | --- |
| turbo | 1 | 0.1583 ± 0.0013 | 0.110 | 70 % |
| turbo | 8 | 0.2700 ± 0.0013 | 0.110 | 70 % |
<!-- end -->

More.

<!-- plot: decoder_step -->
![One decoding step: share of the memory's bandwidth by batch](benchmarks/plots/decoder_step.svg)
<!-- end -->
"""
    )
    assert readme.differences(root) == []


def test_differences(root: Path) -> None:
    every = [
        "README.md: <!-- rows: decoder_step --> differs",
        "README.md: <!-- plot: decoder_step --> differs",
        "benchmarks/plots/decoder_step.svg was not drawn from these rows by this plots.py",
    ]
    assert readme.differences(root) == every
    readme.rewrite(root)
    write(root, "decoder_step", STEP, {**STEP, "B": 8, "ms": 0.28})
    assert readme.differences(root) == [every[0], every[2]]


def test_a_figure_that_was_altered(root: Path) -> None:
    readme.rewrite(root)
    path = root / "benchmarks" / "plots" / "decoder_step.svg"
    drawn = path.read_text()
    path.write_text(drawn.replace(">turbo<", ">ours<"))
    assert path.read_text() != drawn
    assert readme.differences(root) == ["benchmarks/plots/decoder_step.svg is not as it was drawn"]
    path.write_text(re.sub(r", picture sha256:\w+", "", drawn))
    assert readme.differences(root) == ["benchmarks/plots/decoder_step.svg is not as it was drawn"]


def test_figures_of_another_plots(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    readme.rewrite(root)
    other = tmp_path / "plots.py"
    other.write_text(Path(plots.__file__).read_text().replace("#187FC4", "#187FC5"))
    monkeypatch.setattr(plots, "__file__", str(other))
    assert readme.differences(root) == ["benchmarks/plots/decoder_step.svg was not drawn from these rows by this plots.py"]


def test_rows_of_two_benchmarks_in_one_file(root: Path) -> None:
    readme.rewrite(root)
    links = [
        {"benchmark": "step_links", "model": "turbo", "B": 1, "link": link, "us": us, "floor_us": 2.0, **WHERE}
        for link, us in (("fc1", 3.0), ("fc2", 2.51))
    ]
    links[1]["spread_us"] = 0.2
    write(root, "decoder_step", STEP, {**STEP, "B": 8, "ms": 0.27, "odd": [1], "benchmark": "step"}, *links)
    # What there are rows of must be shown; the rows of steps are as they were.
    marks = [f"<!-- {kind}: step_links --> is on none of README.md and benchmarks/RESULTS.md" for kind in ("rows", "plot")]
    assert readme.differences(root) == marks
    with (root / "README.md").open("a") as page:
        page.write(LINKS)
    assert len(readme.differences(root)) == 3  # the table, the figure, and what shows it
    readme.rewrite(root)
    assert readme.differences(root) == []
    text = (root / "README.md").read_text()
    assert "| model | batch | fc1, us (floor) | fc2, us (floor) |" in text
    assert "| turbo | 1 | 3.00 (2.00) | 2.5 ± 0.2 (2.00) |" in text
    assert plots.read_digest(root / "benchmarks" / "plots" / "step_links.svg")


def test_readme_shows_one_gpu_whatever_was_measured_since() -> None:
    def call(variant: str, rate: float, gpu: str, date: str) -> dict:
        times = {"tok/s": rate, "ms": 64.0, "min_ms": 32.0, "max_ms": 128.0}
        return {"model": "turbo", "B": 1, "variant": variant, **times, "dtype": "float16", **WHERE, "gpu": gpu, "date": date}

    def shown(rows: list[dict]) -> list[str]:
        return readme_tables.render_table("calls", rows).splitlines()

    readmes = [call("stock static+compile", 500.0, readme_tables.README_GPU, "2026-01-01")]
    readmes += [call("attention by name, static+compile", 600.0, readme_tables.README_GPU, "2026-01-01")]
    readmes += [call("accelerate", 3000.0, readme_tables.README_GPU, "2026-01-01")]
    older, newer = (call("accelerate", rate, f"GPU {rate}", f"2026-01-0{date}") for rate, date in ((1.0, 2), (2.0, 3)))
    caption, _, header, _, *lines = shown([older, newer, *readmes])
    assert f" on {readme_tables.README_GPU}, 2026-01-01 " in caption
    assert header == "| model | batch | stock static+compile, tok/s | whisper-triton, tok/s | times stock static+compile |"
    assert lines == ["| turbo | 1 | 500 (250-1000) | 3000 (1500-6000) | 6.00 |"]
    assert "on GPU 2.0, 2026-01-03 " in shown([older, newer])[0]  # without it the newest


def test_what_rows_say_of_themselves(root: Path) -> None:
    told = {
        **STEP,
        "command": "whisper-triton bench step",
        "dtype": "torch.bfloat16",
        "compiled_ms": 0.4,
        "compiled_spread_ms": 0.02,
    }
    other = {**STEP, "gpu": "GPU Y", "date": "2026-01-02", "source": "a note"}
    links = {**STEP, "benchmark": "step_links"}
    write(root, "decoder_step", told, other, links)
    text = readme_tables.render_table("decoder_step", readme.load(root, "decoder_step")).splitlines()
    assert text[0].startswith(
        "`whisper-triton bench step` on GPU X, 2026-01-01 at revision abc; "
        "`python benchmarks/decoder_step.py` on GPU Y, 2026-01-02 at revision abc; bf16, fp16, driver 1.2"
    )
    assert text[0].endswith(" (a note):")
    assert text[2] == "| gpu | dtype | model | batch | ms | floor, ms | share of the bandwidth | stock compiled, ms |"
    assert text[4:] == [
        "| GPU X | bf16 | turbo | 1 | 0.1583 ± 0.0013 | 0.110 | 70 % | 0.40 ± 0.02 |",
        "| GPU Y | fp16 | turbo | 1 | 0.1583 ± 0.0013 | 0.110 | 70 % | - |",
    ]


def test_commands_that_differ_in_models_and_batches_are_one() -> None:
    script = "python benchmarks/x.py"
    said = [
        f"{script} --model turbo --batch 8 --calls 4",
        f"{script} --model turbo --batch 1 --calls 4",
        f"{script} --model tiny --batch 1,8 --calls 4",
        f"{script} --model medium --batch 2 --calls 4",
        f"{script} --model turbo --batch 16 --calls 5",
        f"{script} --way 'a b'",
        script,
    ]
    assert captions.commands([{"command": command} for command in said], "y") == [
        f"{script} --model turbo,tiny --batch 1,8 --calls 4",
        f"{script} --model medium --batch 2 --calls 4",
        f"{script} --model turbo --batch 16 --calls 5",
        f"{script} --way 'a b'",
        script,
    ]
    assert captions.commands([{}], "y") == ["python benchmarks/y.py"]
    ended = [{"command": f"{script} --batch 1,8,32", "B": B} for B in (1, 8)]
    assert captions.commands(ended, "y") == [f"{script} --batch 1,8"]
    ended = [
        {"command": f"{script} --model turbo,tiny,medium --batch 1,8", "model": model, "B": B}
        for model, B in (("turbo", 1), ("turbo", 8), ("tiny", 1))
    ]
    assert captions.commands(ended, "y") == [f"{script} --model turbo --batch 1,8", f"{script} --model tiny --batch 1"]


def test_captions_go_gpu_by_gpu_and_name_few_commands() -> None:
    def row(B: int, options: str, **more: object) -> dict:
        return {"model": "turbo", "B": B, "dtype": "float16", "command": f"python x.py {options}", **WHERE, **more}

    two = [row(1, "--calls 1"), row(8, "--calls 2")]
    other = [row(1, "--calls 1", gpu="GPU Y", revision="def"), row(8, "--calls 2", gpu="GPU Y", date="2026-01-02")]
    both = "on GPU X, 2026-01-01 at revision abc and on GPU Y, 2026-01-01, 2026-01-02 at revision def, abc"
    listed = "`python x.py --calls 1`, `python x.py --calls 2`"
    assert captions.caption(two + other, "generate") == f"{listed} {both}; {VERSIONS}"
    # Of more, what measures them anew, where there is such: not that it made the rows.
    three = [*two, row(4, "--calls 3")]
    again = "Several commands, which `python benchmarks/record.py --output new --only generate` runs again,"
    assert captions.caption(three, "generate") == f"{again} {CAPTION}"
    unheard = [*two, row(3, "--calls 3")]
    for rows, name in ((unheard, "generate"), (three, "y"), (three, "select_token")):
        assert captions.caption(rows, name).count("`python x.py --calls ") == 3


def test_a_figure_without_a_table_says_how_it_was_measured(root: Path) -> None:
    rows = [
        {"benchmark": "step_position", "model": model, "B": 1, "variant": "accelerate", "position": p, "ms": 1.5, **WHERE}
        for model in ("turbo", "tiny")
        for p in (20, 40)
    ]
    write(root, "step_position", *(row | {"command": f"python x.py {row['model']}"} for row in rows))
    (root / "README.md").write_text("<!-- plot: step_position -->\n<!-- end -->\n")
    readme.rewrite(root)
    _, caption, _, figure, _ = (root / "README.md").read_text().splitlines()
    assert caption == f"`python x.py turbo` {CAPTION}"  # of the first model, which alone is shown
    assert figure == "![One decoding step by position](benchmarks/plots/step_position.svg)"


def test_generate_has_a_line_a_batch() -> None:
    def call(variant: str, B: int, ms: float, **more: object) -> dict:
        calls = {"tok/s": 64e3 * B / ms, "ms": ms, "min_ms": 0.8 * ms, "max_ms": 2 * ms, "first_s": ms / 10}
        calls |= {"ms/token": ms / 64, "RTFx": 3e4 * B / ms, "extra_GB": B / 8, "equal_tokens": 0.875}
        return {"model": "turbo", "B": B, "variant": variant, **calls, "dtype": "fp16", **WHERE, **more}

    rows = [call("accelerate", 1, 64.0), call("stock static+compile", 1, 128.0), call("accelerate", 8, 512.0)]
    lines = readme_tables.render_table("generate", rows).splitlines()[2:]
    assert lines[0] == (
        "| model | batch | stock static+compile, tok/s | whisper-triton, tok/s | times stock static+compile "
        "| whisper-triton, ms a token | whisper-triton, RTFx | whisper-triton, tokens equal to stock's "
        "| GB beyond the model: stock static+compile, whisper-triton | first call, s: stock static+compile, whisper-triton |"
    )
    assert lines[2:] == [
        "| turbo | 1 | 500 (250-625) | 1000 (500-1250) | 2.00 | 1.00 | 469 | 88 % | 0.125, 0.125 | 12.8, 6.40 |",
        "| turbo | 8 | - | 1000 (500-1250) | - | 8.00 | 469 | 88 % | - | - |",
    ]


def sides(first: str, second: str, **more: object) -> dict:
    """A row that compares two ways, the first taking 3 us and the second 2."""
    times = {f"{first}_us": 3.0, f"{first}_spread_us": 0.1, f"{second}_us": 2.0, f"{second}_spread_us": 0.02}
    return {"model": "tiny", "B": 1, **times, f"{first}/{second}": 1.5, **WHERE, **more}


def way(key: str, name: str, us: float, **more: object) -> dict:
    return {"model": "tiny", "B": 1, key: name, "us": us, "spread_us": 0.1, **WHERE, **more}


STACK = {"cost": "launches", "part": "self", "length": 448, "how": "compiled"}
CHOICE = {"timestamps": True, "what": "choice"}


@pytest.mark.parametrize(
    ("name", "rows", "header", "lines"),
    [
        (
            "reshape_free",
            [
                sides("reshaping", "reshape_free", T=T, part="self", layers=1, how=h)
                for T, h in ((1, "eager"), (1, "graph"), (4, "eager"))
            ],
            "model | batch | tokens | part | eager, us: reshaping / reshape-free | graph, us: reshaping / reshape-free",
            [
                "tiny | 1 | 1 | self | 3.00 ± 0.10 / 2.00 ± 0.02 = 1.50 | 3.00 ± 0.10 / 2.00 ± 0.02 = 1.50",
                "tiny | 1 | 4 | self | 3.00 ± 0.10 / 2.00 ± 0.02 = 1.50 | -",
            ],
        ),
        (
            "flash_layout",
            [
                way("way", "flash, slices", 3.0, **{"way/ours": 1.5}, graph_breaks=1, **STACK),
                way("way", "ours", 2.0, **{"way/ours": 1.0}, graph_breaks=0, **STACK),
            ],
            "model | batch | cost | part | length | how | flash, slices, us | ours, us | flash, slices / ours "
            "| graph breaks: flash, slices | graph breaks: ours",
            ["tiny | 1 | launches | self | 448 | compiled | 3.00 ± 0.10 | 2.00 ± 0.10 | 1.50 | 1 | 0"],
        ),
        (
            "cross_kv_reuse",
            [
                sides("recompute", "reuse", layers=8, how="eager"),
                sides("recompute", "reuse", layers=8, how="generate", equal_tokens=1.0),
            ],
            "model | layers | batch | how | recompute, us | reuse, us | recompute / reuse | equal tokens",
            [
                "tiny | 8 | 1 | eager | 3.00 ± 0.10 | 2.00 ± 0.02 | 1.50 | -",
                "tiny | 8 | 1 | generate | 3.00 ± 0.10 | 2.00 ± 0.02 | 1.50 | 100 %",
            ],
        ),
        (
            "logits_processors",
            [
                way("how", "stock", 90.0, over_ours=30.0, launches=111, is_whole=None, **CHOICE),
                way("how", "compiled", 60.0, over_ours=20.0, launches=None, is_whole=False, **CHOICE),
                way("how", "ours, graph", 3.0, over_ours=1.0, launches=None, is_whole=None, **CHOICE),
            ],
            "batch | timestamps | what | stock, us | compiled, us | ours, graph, us "
            "| stock / ours, graph | compiled / ours, graph | compiled whole | stock's launches",
            ["1 | with | choice | 90.00 ± 0.10 | 60.00 ± 0.10 | 3.00 ± 0.10 | 30.0 | 20.0 | no | 111"],
        ),
    ],
)
def test_tables_of_the_open_questions(name: str, rows: list[dict], header: str, lines: list[str]) -> None:
    found = readme_tables.render_table(name, rows).splitlines()
    assert found[0].startswith(f"`python benchmarks/{name}.py` on GPU X")
    assert found[2] == f"| {header} |"
    assert found[4:] == [f"| {line} |" for line in lines]


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("<!-- rows: unheard_of -->\n<!-- end -->\n", "nothing is known of <!-- rows: unheard_of -->"),
        ("<!-- rows: encoder -->\n<!-- end -->\n", r"encoder\.jsonl: No such file"),
        ("<!-- plot: generate -->\n<!-- end -->\n", r"generate\.jsonl: No such file"),
        ("<!-- plot: step_position -->\n<!-- end -->\n", r"step_position\.jsonl: No such file"),
        ("<!-- rows: step_links -->\n<!-- end -->\n", r"decoder_step\.jsonl: no rows of the benchmark step_links"),
        ("<!-- rows: decoder_step -->\n<!-- plot: decoder_step -->\n<!-- end -->\n", "has no end of its own"),
        ("<!-- rows: decoder_step -->\n", "a mark has no <!-- end -->"),
        ("<!-- rows: decoder_step --> \n<!-- end -->\n", "a mark has no <!-- end -->"),
    ],
)
def test_marks_that_are_wrong(root: Path, page: str, reason: str) -> None:
    (root / "README.md").write_text(page)
    for call in (readme.rewrite, readme.differences):
        with pytest.raises(ValueError, match=reason):
            call(root)
    assert (root / "README.md").read_text() == page


@pytest.mark.parametrize(
    ("spread", "compiled_spread", "factor"), [(0.007, 0.019, "2.53"), (0.008, 0.0, "-"), (0.0, 0.021, "-")]
)
def test_a_disturbed_step_has_no_factor(spread: float, compiled_spread: float, factor: str) -> None:
    compiled = {"compiled_ms": 0.4, "compiled_spread_ms": compiled_spread, "compiled/ours": 2.526}
    table = readme_tables.render_table("decoder_step", [STEP | compiled | {"spread_ms": spread}])
    assert table.splitlines()[-1].endswith(f" | {factor} |")


def test_a_column_that_is_missing(root: Path) -> None:
    write(root, "decoder_step", {column: value for column, value in STEP.items() if column != "floor_ms"})
    with pytest.raises(ValueError, match=r"rows/decoder_step\.jsonl: no row has the column floor_ms"):
        readme.rewrite(root)


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (0.93799, 0.0044, "0.938 ± 0.005"),
        (1.30925, 0.00897, "1.309 ± 0.009"),
        (5.5278, 0.147, "5.53 ± 0.15"),
        (38.7012, 0.9468, "38.7 ± 1.0"),
        (298.18, 41.5, "298 ± 42"),
        (0.5, 0.00001, "0.5000 ± 0.0001"),
        (0.93799, None, "0.938"),
        (16013.47, None, "16013"),
        (0.0760, None, "0.0760"),
        (0.0, 0.0, "0"),
        (0.0, 0.2, "0.0 ± 0.2"),
        (0.075, 0.4505, "0.1 ± 0.5"),
        (-0.04, 0.3, "0.0 ± 0.3"),
        (-1.23, 0.3, "-1.2 ± 0.3"),
    ],
)
def test_number(value: float, spread: float | None, text: str) -> None:
    assert columns.number(value, spread) == text


def test_command(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(readme, "ROOT", root)
    monkeypatch.setattr("sys.argv", ["readme.py", "--check"])
    with pytest.raises(SystemExit, match="1"):
        readme.main()
    assert "<!-- rows: decoder_step --> differs" in capsys.readouterr().out
    assert (root / "README.md").read_text() == PAGE
    monkeypatch.setattr("sys.argv", ["readme.py"])
    readme.main()
    monkeypatch.setattr("sys.argv", ["readme.py", "--check"])
    readme.main()
    (root / "benchmarks" / "rows" / "decoder_step.jsonl").unlink()
    with pytest.raises(SystemExit, match="2"):
        readme.main()
    assert "decoder_step.jsonl: No such file" in capsys.readouterr().err
