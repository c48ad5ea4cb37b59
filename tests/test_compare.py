"""benchmarks/compare.py: rows are matched by what identifies them, and judged by their spread."""

import json
from pathlib import Path

import pytest

from whisper_triton.benchmarks import compare, merge

WHERE = {"gpu": "GPU X", "torch": "2.11", "revision": "abc", "date": "2026-01-01"}


def write(path: Path, *rows: dict, **where: str) -> Path:
    path.write_text("".join(json.dumps({**row, **WHERE, **where}) + "\n" for row in rows))
    return path


def step(B: int, ms: float, spread: float = 0.01, **more: object) -> dict:
    return {"model": "turbo", "B": B, "ms": ms, "spread_ms": spread, "share_%": 60.0, "error": "1e-3", **more}


def lines(tmp_path: Path, a: list[dict], b: list[dict]) -> dict[str, str]:
    """The lines of a comparison by what they begin with, up to two spaces."""
    text = compare.compare(write(tmp_path / "a.jsonl", *a), write(tmp_path / "b.jsonl", *b))
    return {line.split("  ")[0]: line for line in text.splitlines()}


@pytest.mark.parametrize(
    ("after", "ratio", "word"),
    [
        (step(1, 0.9), "0.900", "faster"),
        (step(1, 1.1), "1.100", "slower"),
        (step(1, 1.019), "1.019", "-"),  # the ranges touch: 1.01 and 1.009
        (step(1, 0.9, spread=0.2), "0.900", "-"),
        ({"model": "turbo", "B": 1, "ms": 0.9, "share_%": 60.0}, "0.900", "no spread"),
    ],
)
def test_verdict(tmp_path: Path, after: dict, ratio: str, word: str) -> None:
    line = lines(tmp_path, [step(1, 1.0)], [after])["model=turbo B=1"]
    assert line.endswith(word)  # within the spread the last word is the missing ratio of tok/s
    assert ratio in line


def test_least_and_greatest_are_a_range_and_tokens_are_compared(tmp_path: Path) -> None:
    def call(ms: float, least: float, greatest: float, **more: object) -> dict:
        return {"variant": "ours", "B": 2, "tok/s": 128e3 / ms, "ms": ms, "min_ms": least, "max_ms": greatest, **more}

    near = lines(tmp_path, [call(100.0, 90.0, 110.0)], [call(80.0, 79.0, 90.0)])["variant=ours B=2"]
    far = lines(tmp_path, [call(100.0, 90.0, 110.0)], [call(80.0, 79.0, 89.9)])["variant=ours B=2"]
    assert near.endswith("0.800  1.250")
    assert far.endswith("0.800  1.250        faster")


def test_only_what_identifies_a_row_matters(tmp_path: Path) -> None:
    # A column of one file, a measurement in whole numbers, an odd type, a version: none keeps rows from matching.
    after = step(1, 1.0, benchmark="step", launches=3, stock_waits=True, tiles=[1, 2], RTFx=3.0, path="chain")
    before = step(1, 1.0, launches=90, stock_waits=False, first_s=2, path="modules")
    text = "\n".join(lines(tmp_path, [before, step(2, 1.0)], [after, step(4, 1.0)]).values())
    assert "1 row of both: 1 within the spread" in text
    assert "only in a: model=turbo B=2" in text
    assert "only in b: model=turbo B=4" in text


def test_all_that_both_files_tell_identifies(tmp_path: Path) -> None:
    found = lines(tmp_path, [step(1, 1.0, link=["fc1", 2]), step(1, 2.0, link=["fc2", 2])], [step(1, 1.0, link=["fc2", 2])])
    assert "0.500" in found["model=turbo B=1 link=['fc2', 2]"]
    assert "only in a: model=turbo B=1 link=['fc1', 2]" in found


def test_rows_that_cannot_be_told_apart(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", step(1, 1.0, dtype="fp16"), step(1, 1.0, dtype="bf16"))
    b = write(tmp_path / "b.jsonl", step(1, 1.0))
    with pytest.raises(ValueError, match=r"a\.jsonl: two rows with model=turbo B=1,"):
        compare.compare(a, b)


def test_files_of_two_benchmarks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no benchmark both: step and encoder"):
        lines(tmp_path, [step(1, 1.0, benchmark="step")], [step(1, 1.0, benchmark="encoder")])


def link(us: float, spread: float = 0.2) -> dict:
    return {"benchmark": "step_links", "B": 1, "link": "fc1", "us": us, "spread_us": spread, "floor_us": 1.0}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (link(-1.0), link(-1.0), "-1 us (-1.2 to -0.8)  -1 us (-1.2 to -0.8)  -      -"),
        (link(0.0), link(0.1), "0 us (-0.2 to 0.2)  0.1 us (-0.1 to 0.3)  -      -"),
        (link(0.1, 0.5), link(-0.3), "0.1 us (-0.4 to 0.6)  -0.3 us (-0.5 to -0.1)  -      -"),
        (link(-1.0), link(1.0), "-1 us (-1.2 to -0.8)  1 us (0.8 to 1.2)  -      -            slower"),
    ],
)
def test_differences_about_zero_and_below(tmp_path: Path, before: dict, after: dict, said: str) -> None:
    (line,) = (line for line in lines(tmp_path, [before], [after]).values() if "link=fc1" in line)
    assert line == f"benchmark=step_links B=1 link=fc1  {said}"


def test_each_of_the_seconds_of_first_calls(tmp_path: Path) -> None:
    def calls(first: float, other_prompt: float, variant: str = "ours") -> dict:
        return {"B": 1, "variant": variant, "first_s": first, "other_prompt_s": other_prompt, "new_tokens": 64}

    found = lines(tmp_path, [calls(4.0, 1.0), calls(9.0, 2.0, "stock")], [calls(2.0, 3.0)])
    assert "4 s" in found["B=1 variant=ours new_tokens=64: first"]
    assert "0.500" in found["B=1 variant=ours new_tokens=64: first"]
    assert "3.000" in found["B=1 variant=ours new_tokens=64: other prompt"]
    assert "1 row of both, 2 times: 2 no spread" in found


def test_warns_of_another_gpu_and_versions(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", step(1, 1.0))
    b = write(tmp_path / "b.jsonl", step(1, 1.0), gpu="GPU Y", torch="2.12", revision="def", date="2026-02-02")
    warnings = [line for line in compare.compare(a, b).splitlines() if line.startswith("warning")]
    assert warnings == ["warning: gpu differs: GPU X in a, GPU Y in b", "warning: torch differs: 2.11 in a, 2.12 in b"]
    assert "warning" not in compare.compare(a, a)


def test_rows_of_a_gpu_are_compared_with_its_own(tmp_path: Path) -> None:
    def rows(**times: float) -> list[dict]:
        return [step(1, ms, gpu=f"GPU {name}") for name, ms in times.items()]

    def compared(a: list[dict], b: list[dict]) -> list[str]:
        for name, own in (("a", a), ("b", b)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(WHERE | row) + "\n" for row in own))
        return compare.compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl").splitlines()

    both = compared(rows(X=1.0, Y=2.0), rows(Y=1.0, X=1.0))
    assert [line.split("  ")[0] for line in both[4:6]] == ["GPU X: model=turbo B=1", "GPU Y: model=turbo B=1"]
    assert both[-1] == "2 rows of both: 1 faster, 1 within the spread"
    one = compared(rows(X=1.0, Y=2.0), rows(Y=2.0, Z=3.0))
    assert one[-3:] == ["1 row of both: 1 within the spread", "only in a: all 1 of GPU X", "only in b: all 1 of GPU Z"]
    assert not [line for line in (*both, *one) if line.startswith("warning")]
    none = compared(rows(X=1.0, Y=2.0), rows(Z=2.0))
    assert none[2] == "warning: gpu differs: GPU X, GPU Y in a, GPU Z in b"
    assert [line.split(":")[0] for line in none[5:7]] == ["GPU X / GPU Z", "GPU Y / GPU Z"]


@pytest.mark.parametrize("path", sorted(merge.ROWS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_every_committed_file_is_as_fast_as_itself(path: Path) -> None:
    said = compare.compare(path, path)
    rows = len(compare.read_rows(path))
    assert f"\n{rows} rows of both" in said
    for word in ("faster", "slower", "warning", "only in", "no time"):
        assert word not in said


@pytest.mark.parametrize("row", [{"B": 1, "ours_us": 2.0, "stock_us": 9.0}, {"B": 1, "floor_us": 9.0, "flash_us": 2.0}])
def test_main_time_of_a_kernel(tmp_path: Path, row: dict) -> None:
    assert "2 us" in lines(tmp_path, [row], [row])["B=1"]


def test_a_time_has_its_own_spread_and_what_was_traced_does_not_identify(tmp_path: Path) -> None:
    def row(us: float, graphs: int) -> dict:
        return {"B": 1, "how": "eager", "a_us": us, "a_spread_us": 0.5, "b_us": 1.0, "b_spread_us": 9.0, "graphs": graphs}

    assert lines(tmp_path, [row(2.0, 1)], [row(3.1, 2)])["B=1 how=eager"].endswith("slower")
    assert not lines(tmp_path, [row(2.0, 1)], [row(2.9, 2)])["B=1 how=eager"].endswith("slower")


def test_a_time_that_is_missing(tmp_path: Path) -> None:
    assert lines(tmp_path, [step(1, 1.0)], [step(1, None)])["model=turbo B=1"].endswith("no time")


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "a.jsonl", step(1, 1.0))
    bad = tmp_path / "bad.jsonl"
    monkeypatch.setattr("sys.argv", ["compare.py", str(good), str(good)])
    compare.main()
    assert "1 within the spread" in capsys.readouterr().out
    for text, reason in (("{", "line 1"), ("", "no rows"), ("[1]", "line 1: not a row"), (None, "No such file")):
        bad.unlink(missing_ok=True)
        if text is not None:
            bad.write_text(text)
        monkeypatch.setattr("sys.argv", ["compare.py", str(good), str(bad)])
        with pytest.raises(SystemExit, match="2"):
            compare.main()
        error = capsys.readouterr().err
        assert "bad.jsonl" in error
        assert reason in error
