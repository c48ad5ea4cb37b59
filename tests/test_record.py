"""`record.py` and `merge.py`: what is measured, that what fails or is late costs nothing else, and what becomes of the rows."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from whisper_triton.benchmarks import merge, readme, readme_tables, record

pytest_plugins = ["whisper_fixtures"]

WRITES = """
import sys, time
with open(sys.argv[sys.argv.index("--output") + 1], "w") as rows:
    rows.write("{}\\n{}\\n")
print("a line")
"""
SCRIPTS = {
    "good.py": WRITES,
    "bad.py": f"{WRITES}\nraise ValueError('no luck')",
    "slow.py": f"{WRITES}\nimport os; print(os.getpid())\ntime.sleep(60)",
}


def names_of(*arguments: Any) -> list[str]:
    return [part.name for part in record.parts_of("cuda", *arguments)]


def test_all_that_readme_shows_is_recorded() -> None:
    shown = {table.file or name for name, table in readme_tables.TABLES.items()} | {"step_position"}
    assert {benchmark.rows for benchmark in record.RECORDED} == shown
    assert set(readme.FIGURES) - {"step_links"} <= shown


def test_what_is_measured_and_in_which_order() -> None:
    every = names_of(None, None, None)
    assert every[:2] == ["generate.large-v3.1", "generate.large-v3.8"]
    assert every[2:4] == ["generate.turbo.1", "generate.turbo.8"]  # attention by name among what each measures
    assert len({part.benchmark.words for part in record.parts_of("cuda", ["generate"], None, None)}) == 1
    assert every[-5:-3] == ["generate.medium.4", "skinny_linear.large-v3.1-8-2-4-16-32"]
    assert every[-1] == "embed_tokens.large-v3.1-8-32"
    assert "decoder_step.turbo.1-8-32-2-4-16-64" in every
    assert len(set(every)) == len(every)
    assert names_of(["generate", "encoder"], ["large-v3"], [2, 8]) == [
        "generate.large-v3.8",
        "encoder.large-v3.8",
        "generate.large-v3.2",
    ]
    assert names_of(["decoder_step"], ["medium"], [16, 1]) == ["decoder_step.medium.1-16"]
    assert names_of(["select_token"], ["turbo"], None) == []
    assert len(record.parts_of("cpu", None, None, None)) == len({benchmark.rows for benchmark in record.RECORDED})


def test_the_commands_are_such_as_the_files_take(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in record.parts_of("cuda", None, None, None):
        script, *words = part.command("cuda")
        module = importlib.import_module(f"whisper_triton.benchmarks.{script.removesuffix('.py')}")
        swept: list[SimpleNamespace] = []
        monkeypatch.setattr(module, "measure_named", lambda args, *rest, swept=swept, **more: swept.append(args))
        monkeypatch.setattr(sys, "argv", [script, *words, "--output", "rows.jsonl"])
        module.main()
        (args,) = swept
        assert (args.model, tuple(args.batch), args.output) == (part.model, part.batches, Path("rows.jsonl"))


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stands in for the benchmarks; returns the folder to write to."""
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(record, "SCRIPTS", tmp_path)
    monkeypatch.setattr(record.importlib, "import_module", lambda name: None)
    return tmp_path / "new"


def part_of(script: str, seconds: int | None = None) -> record.Part:
    known = None if seconds is None else {"toy": seconds}
    return record.Part(record.Benchmark(script, f"{script}.py", ("toy",), (1,), known), "toy", (1,))


def test_one_that_fails_costs_no_other(
    scripts: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = [part_of("bad"), part_of("long", seconds=60), part_of("good")]
    monkeypatch.setattr(record, "parts_of", lambda *_: parts)
    monkeypatch.setattr(sys, "argv", ["record.py", "--device", "cpu", "--output", str(scripts), "--limit", "50"])
    with pytest.raises(SystemExit) as ended:
        record.main()
    assert ended.value.code is True
    out, err = capfd.readouterr()
    told = [re.sub(r"\d+ s", "N s", line) for line in err.splitlines()]
    assert told == [
        "bad.toy.1: failed with 1: ValueError: no luck; N s, 2 rows",
        "long.toy.1: skipped: N s left, takes 60; N s, 0 rows",
        "good.toy.1: done; N s, 2 rows",
    ]
    assert [line.split()[0] for line in out.splitlines()] == ["part", "bad.toy.1", "long.toy.1", "good.toy.1"]
    assert (scripts / "good.toy.1.log").read_text() == "a line\n"
    assert sorted(path.name for path in scripts.glob("*.jsonl")) == ["bad.toy.1.jsonl", "good.toy.1.jsonl"]


def test_one_that_is_late_is_ended(scripts: Path) -> None:
    scripts.mkdir()
    ended = record.run_part(part_of("slow"), scripts, "cpu", 3)
    assert (ended["end"], ended["rows"]) == ("out of time", 2)
    assert 3 <= ended["seconds"] < 30
    assert [row["end"] for row in record.record([part_of("good")], scripts, "cpu", 0)] == ["skipped: 0 s left"]


def test_what_runs_ends_with_it(scripts: Path) -> None:
    scripts.mkdir()

    def run() -> None:
        signal.signal(signal.SIGTERM, record.end_with_all)
        record.run_part(part_of("slow"), scripts, "cpu", None)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    log = scripts / "slow.toy.1.log"
    wait_for(lambda: log.exists() and log.read_text().count("\n") == 2)
    process.terminate()
    process.join(30)
    assert process.exitcode == 128 + signal.SIGTERM
    wait_for(lambda: not Path("/proc", log.read_text().split()[-1]).exists())


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.usefixtures("reference_kernels")
def test_a_benchmark_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["record.py", "--device", "cpu", "--output", str(tmp_path), "--only", "update_kv_cache"])
    with pytest.raises(SystemExit) as ended:
        record.main()
    assert not ended.value.code, capfd.readouterr()
    rows = [json.loads(line) for line in (tmp_path / "update_kv_cache.toy.1.jsonl").read_text().splitlines()]
    assert {row["command"] for row in rows} == {"python benchmarks/update_kv_cache.py --model toy --batch 1 --device cpu"}
    assert readme_tables.render_table("update_kv_cache", merge.merge("update_kv_cache", list(tmp_path.glob("*.jsonl"))))


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_a_process_of_its_own_on_a_gpu(tmp_path: Path) -> None:
    part = record.Part(record.Benchmark("update_kv_cache", "update_kv_cache.py", ("tiny",), (1,)), "tiny", (1,))
    ended = record.run_part(part, tmp_path, "cuda", 300)
    assert (ended["end"], ended["rows"]) == ("done", 3), (tmp_path / f"{part.name}.log").read_text()


@pytest.mark.parametrize(
    "words", [["--only", "nothing"], ["--models", "nobody"], ["--batch", "1000"], ["--batch", "x"], ["--device", "cuda"]]
)
def test_what_is_not_recorded(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(record.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["record.py", "--output", str(tmp_path / "new"), *words])
    with pytest.raises(SystemExit, match="2"):
        record.main()
    assert not (tmp_path / "new").exists()


def test_the_folder_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.setattr(sys, "argv", ["record.py", "--device", "cpu", "--output", str(tmp_path / "rows.jsonl")])
    with pytest.raises(SystemExit, match="2"):
        record.main()
    assert "rows.jsonl is a file" in capsys.readouterr().err


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def step(model: str, B: int, ms: float, **more: Any) -> dict[str, Any]:
    return {"benchmark": "step", "model": model, "B": B, "ms": ms, **more}


class TestMerge:
    def test_rows_of_runs_become_a_file(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        link = {"benchmark": "step_links", "model": "turbo", "B": 1, "link": "fc1", "us": 2.5}
        rows, old, new = (tmp_path / name for name in ("rows", "old", "new"))
        write(old / "decoder_step.turbo.1-8.jsonl", step("turbo", 1, 1.5), link, step("turbo", 8, 2.5))
        write(old / "decoder_step.large-v3.8-1.jsonl", step("large-v3", 8, 4.5), step("large-v3", 1, 3.5))
        write(new / "decoder_step.turbo.8.jsonl", step("turbo", 8, 2.25, compiled_ms=9.5, mode="reduce-overhead"))
        write(rows / "encoder.jsonl", {"B": 1})
        monkeypatch.setattr(sys, "argv", ["merge.py", str(old), str(new), "--output", str(rows)])
        merge.main()
        found = [json.loads(line) for line in (rows / "decoder_step.jsonl").read_text().splitlines()]
        told = [(row["model"], row["B"], row["ms"]) for row in found[:-1]]
        assert told == [("large-v3", 1, 3.5), ("large-v3", 8, 4.5), ("turbo", 1, 1.5), ("turbo", 8, 2.25)]
        assert found[-1] == link
        assert (rows / "encoder.jsonl").read_text() == '{"B": 1}\n'  # of neither run

    def test_anew_in_place_of_rows_that_say_less(self, tmp_path: Path) -> None:
        paths = [
            write(tmp_path / "a.jsonl", {"B": 1, "us": 1.5}, {"B": 8, "us": 2.5}),
            write(tmp_path / "b.jsonl", {"benchmark": "a", "model": "large-v3", "B": 8, "us": 2.25}),
        ]
        assert [row["us"] for row in merge.merge("a", paths)] == [2.25, 1.5]

    def test_rows_of_another_gpu_stay(self, tmp_path: Path) -> None:
        one, other = {"gpu": "one"}, {"gpu": "other"}
        paths = [
            write(tmp_path / "a.jsonl", {"B": 1, "us": 1.5} | one, {"B": 8, "us": 2.5} | one),
            write(tmp_path / "b.jsonl", {"B": 1, "us": 3.5} | other),
            write(tmp_path / "c.jsonl", {"B": 1, "us": 3.25} | other, {"B": 8, "us": 2.25} | one),
        ]
        assert [(row["gpu"], row["us"]) for row in merge.merge("a", paths)] == [("one", 1.5), ("other", 3.25), ("one", 2.25)]

    def test_rows_that_cannot_be_told_apart(self, tmp_path: Path) -> None:
        paths = [
            write(tmp_path / "a.jsonl", step("turbo", 1, 1.5)),
            write(tmp_path / "b.jsonl", {"benchmark": "step", "ms": 2.5}),
        ]
        with pytest.raises(ValueError, match="two rows with"):
            merge.merge("a", [write(tmp_path / "c.jsonl", step("turbo", 1, 1.5), step("turbo", 8, 2.5)), *paths])

    def test_rows_of_a_cpu_are_not_published(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(merge, "ROWS", tmp_path / "rows")
        write(tmp_path / "new" / "a.jsonl", step("toy", 1, 1.0, gpu="none"))
        command = ["merge.py", str(tmp_path / "new"), "--output"]
        monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "rows")])
        with pytest.raises(SystemExit, match="2"):
            merge.main()
        assert not (tmp_path / "rows").exists()
        monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "mine")])
        merge.main()
        assert (tmp_path / "mine" / "a.jsonl").exists()

    def test_nothing_to_merge(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(sys, "argv", ["merge.py", str(tmp_path), "--output", str(tmp_path / "rows")])
        with pytest.raises(SystemExit, match="2"):
            merge.main()
        assert not (tmp_path / "rows").exists()
