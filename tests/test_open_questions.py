"""The files on the open questions, each run whole in its small mode: what its rows hold, and that it refuses a wrong result."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ENVIRONMENT = {"gpu", "driver", "torch", "triton", "transformers", "python", "revision", "date"}
WAYS = ("flash", "flash, copies", "SDPA flash", "ours")
PASSES = ("first", "second", "third")
TRACED = ("is_whole", "why", "graphs")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def run(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], list[dict]]:
    """Runs a file's `main` in the small mode and returns the rows it wrote."""

    def run(name: str) -> list[dict]:
        output = tmp_path / f"{name}.jsonl"
        monkeypatch.setattr(sys, "argv", [name, "--device", "cpu", "--batch", "2", "--output", str(output)])
        try:
            load(name).main()
        finally:
            torch._dynamo.reset()
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


def assert_timed(rows: list[dict], columns: set[str]) -> None:
    for row in rows:
        assert set(row) == columns | ENVIRONMENT, row
        assert all(row[name] >= 0 for name in columns if name.endswith("_us") or name == "us"), row


class TestReshapeFree:
    def test_rows(self, run):
        rows = run("reshape_free")
        ways = {f"{way}{unit}" for way in ("reshaping", "reshape_free") for unit in ("_us", "_spread_us")}
        assert_timed(rows, {"model", "B", "T", "part", "layers", "how", "reshaping/reshape_free"} | ways)
        found = {(row["T"], row["part"], row["how"]) for row in rows}
        assert found == {
            (T, part, how) for T in (1, 4) for part in ("self", "cross", "stack") for how in ("eager", "compiled")
        } - {(4, "stack", "compiled")}
        assert len(found) == len(rows)

    @pytest.mark.parametrize("form", ["reshaping", "reshape_free"])
    def test_a_form_without_the_mask_is_refused(self, form, load, run, monkeypatch):
        right = getattr(load("reshape_free"), form)

        def unmasked(query, keys, values, mask):
            return right(query, keys, values, None)

        monkeypatch.setattr(load("reshape_free"), form, unmasked)
        with pytest.raises(SystemExit, match="unmasked is wrong"):
            run("reshape_free")

    def test_a_stack_that_is_wrong_only_as_a_whole_is_refused(self, load, run, monkeypatch):
        module = load("reshape_free")
        right = module.stack

        def short(attention, query, layers, mask):
            return right(attention, query, layers[:1] if attention is module.reshape_free else layers, mask)

        monkeypatch.setattr(module, "stack", short)
        with pytest.raises(SystemExit, match="stack of reshape_free is wrong"):
            run("reshape_free")


class TestFlashLayout:
    def test_rows(self, run):
        rows = run("flash_layout")
        columns = {"model", "B", "cost", "part", "length", "way", "how", "us", "spread_us", "way/ours"}
        launches = [row for row in rows if row["cost"] == "launches"]
        assert_timed(launches, columns | {"graph_breaks"})
        assert_timed([row for row in rows if row["cost"] != "launches"], columns)
        full = {("transposes", part, length, way) for part, length in (("self", 24), ("cross", 40)) for way in WAYS}
        partly = {("unread slots", "self", length, way) for length in (20, 24) for way in ("flash, slices", "ours")}
        found = [(row["cost"], row["part"], row["length"], row["way"]) for row in rows if row["cost"] != "launches"]
        assert sorted(found) == sorted(full | partly)
        # The length on the host costs a break; the one on the device none. All slots are read only where all are full.
        assert {row["way"]: row["graph_breaks"] for row in launches if row["how"] == "compiled"} == {
            "flash": 0,
            "flash, slices": 1,
            "ours": 0,
        }
        passes = {(row["how"], row["way"]) for row in launches if "pass" in row["how"]}
        assert passes == {(f"compiled, {n} pass", way) for n in PASSES for way in ("flash, slices", "ours")}

    @pytest.mark.parametrize("way", ["flash, copies", "ours"])
    def test_a_way_that_leaves_out_a_slot_is_refused(self, way, load, run, monkeypatch):
        right = load("flash_layout").WAYS[way]
        monkeypatch.setitem(load("flash_layout").WAYS, way, lambda q, k, v: right(q, k[:, :, :-1], v[:, :, :-1]))
        with pytest.raises(SystemExit, match=f"{way} is wrong"):
            run("flash_layout")

    def test_a_stack_that_does_not_write_is_refused(self, load, run, monkeypatch):
        module = load("flash_layout")
        monkeypatch.setattr(module.Stack, "_written", lambda self, keys, values, length: [keys, values])
        with pytest.raises(SystemExit, match="flash is wrong: relative error nan"):
            run("flash_layout")


class TestCrossKvReuse:
    def test_rows(self, run):
        rows = run("cross_kv_reuse")
        ways = {f"{way}{unit}" for way in ("recompute", "reuse") for unit in ("_us", "_spread_us")}
        columns = {"model", "layers", "B", "how", "recompute/reuse"} | ways
        assert_timed(rows[:2], columns)
        assert_timed(rows[2:], columns | {"equal_tokens"})
        assert [row["how"] for row in rows] == ["eager", "compiled", "generate"]
        assert rows[2]["equal_tokens"] == 1.0

    def test_keys_and_values_that_are_not_computed_again_are_refused(self, load, run, monkeypatch):
        monkeypatch.setattr(load("cross_kv_reuse"), "forget", lambda cache: None)
        with pytest.raises(SystemExit, match="recompute, eager is wrong"):
            run("cross_kv_reuse")


class TestLogitsProcessors:
    def test_rows(self, run):
        rows = run("logits_processors")
        assert_timed(rows, {"B", "timestamps", "what", "how", "us", "spread_us", "over_ours", "launches", *TRACED})
        choices = [row for row in rows if row["what"] == "choice"]
        growing = [f"growing, {n} pass" for n in PASSES]
        assert [row["how"] for row in choices] == ["stock", "compiled", *growing, "ours", "stock", "compiled", "ours"]
        assert [row["how"] for row in rows if row["what"] == "processors"] == ["stock", "compiled"] * 2
        assert all(row["over_ours"] > 0 for row in choices)
        for row in rows:
            if row["how"] not in ("stock", "ours"):  # only the rules of timestamps cannot be taken whole
                assert row["is_whole"] != row["timestamps"], row
                assert (row["graphs"] == 1) == (row["is_whole"] and row["how"] == "compiled"), row
                assert ("timestamp" in (row["why"] or "") or "tolist" in (row["why"] or "")) == row["timestamps"], row

    def test_another_token_than_stocks_is_refused(self, load, run, monkeypatch):
        module = load("logits_processors")
        monkeypatch.setattr(module, "compiled", lambda call, device: lambda logits: call(logits).roll(1, -1))
        with pytest.raises(SystemExit, match="processors, compiled is wrong"):
            run("logits_processors")

    def test_another_token_of_ours_is_refused(self, load, run, monkeypatch):
        selection = load("logits_processors").selection_for(1, load("select_token").processors_for(False, "cpu"), "cpu")[0]
        right = type(selection).__call__
        monkeypatch.setattr(type(selection), "__call__", lambda self, logits: right(self, logits.flip(-1)))
        monkeypatch.setattr(load("logits_processors").Bench, "of_stock", lambda *args: [])
        with pytest.raises(SystemExit, match="ours is wrong"):
            run("logits_processors")
