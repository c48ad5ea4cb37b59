"""The files on the open questions, each run whole in its small mode: what its rows hold, and that it refuses a wrong result."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from whisper_triton.benchmarks.models import SHAPES, build_model
from whisper_triton.benchmarks.questions import PASSES

from whisper_triton.benchmarks import cross_kv_reuse, flash_layout, harness, logits_processors, reshape_free
from whisper_triton.decode_loop import TokenSelection

if TYPE_CHECKING:
    from benchmark_fixtures import Run

pytest_plugins = ["benchmark_fixtures", "whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

PLACE = harness.Place(torch.device("cpu"), torch.float32, 10.0)
TOY = SHAPES["toy"]
ENVIRONMENT = {"gpu", "driver", "torch", "triton", "transformers", "python", "revision", "date", "command"}
SHARED = {"benchmark", "model", "dtype", "B"}
WAYS = ("flash", "flash, copies", "SDPA flash", "ours")
TRACED = ("is_whole", "why", "graphs")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType, Any], None]:
    """Runs a file's `bench`, in which something is wrong, nothing being traced or timed."""

    def bench(module: ModuleType, subject: Any) -> None:
        monkeypatch.setattr(harness, "measure_on_cpu", lambda calls: (1.0, 0.0))
        monkeypatch.setattr(module, "compiled", lambda function, place, **options: function)
        with torch.no_grad():
            module.bench(PLACE, subject, 1)

    return bench


def assert_timed(rows: list[dict[str, Any]], columns: set[str]) -> None:
    for row in rows:
        assert set(row) == columns | SHARED | ENVIRONMENT, row
        assert all(row[name] >= 0 for name in columns if name.endswith("_us") or name == "us"), row


class TestReshapeFree:
    def test_rows(self, run: Run) -> None:
        rows = run(reshape_free)
        ways = {f"{way}{unit}" for way in ("reshaping", "reshape_free") for unit in ("_us", "_spread_us")}
        assert_timed(rows, {"T", "part", "layers", "how", "reshaping/reshape_free"} | ways)
        found = {(row["T"], row["part"], row["how"]) for row in rows}
        assert found == {
            (T, part, how) for T in (1, 4) for part in ("self", "cross", "stack") for how in ("eager", "compiled")
        } - {(4, "stack", "compiled")}
        assert len(found) == len(rows)

    @pytest.mark.parametrize("form", ["reshaping", "reshape_free"])
    def test_a_form_without_the_mask_is_refused(self, form, bench, monkeypatch):
        right = getattr(reshape_free, form)

        def unmasked(query, keys, values, mask):
            return right(query, keys, values, None)

        monkeypatch.setattr(reshape_free, form, unmasked)
        with pytest.raises(SystemExit, match="unmasked is wrong"):
            bench(reshape_free, TOY)

    def test_a_stack_that_is_wrong_only_as_a_whole_is_refused(self, bench, monkeypatch):
        right = reshape_free.stack

        def short(attention, query, layers, mask):
            return right(attention, query, layers[:1] if attention is reshape_free.reshape_free else layers, mask)

        monkeypatch.setattr(reshape_free, "stack", short)
        with pytest.raises(SystemExit, match="stack of reshape_free is wrong"):
            bench(reshape_free, TOY)


class TestFlashLayout:
    def test_rows(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(flash_layout, "TOKENS", 2)
        rows = run(flash_layout)
        columns = {"cost", "part", "length", "way", "how", "us", "spread_us", "way/ours"}
        launches = [row for row in rows if row["cost"] == "launches"]
        assert_timed(launches, columns | {"graph_breaks"})
        assert_timed([row for row in rows if row["cost"] != "launches"], columns)
        full = {("transposes", part, length, way) for part, length in (("self", 448), ("cross", 64)) for way in WAYS}
        lengths = (20, 100, 200, 448)
        partly = {("unread slots", "self", length, way) for length in lengths for way in ("flash, slices", "ours")}
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
    def test_a_way_that_leaves_out_a_slot_is_refused(self, way, bench, monkeypatch):
        right = flash_layout.WAYS[way]
        monkeypatch.setitem(flash_layout.WAYS, way, lambda q, k, v: right(q, k[:, :, :-1], v[:, :, :-1]))
        with pytest.raises(SystemExit, match=f"{way} is wrong"):
            bench(flash_layout, TOY)

    def test_a_stack_that_does_not_write_is_refused(self, bench, monkeypatch):
        monkeypatch.setattr(flash_layout.Stack, "_written", lambda self, keys, values, length: [keys, values])
        with pytest.raises(SystemExit, match="flash is wrong: relative error nan"):
            bench(flash_layout, TOY)


class TestCrossKvReuse:
    def test_rows(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        # A step that reuses is traced by the tests of `bench step` too.
        trace = iter([cross_kv_reuse.compiled])
        monkeypatch.setattr(cross_kv_reuse, "compiled", lambda forward, place: next(trace, lambda f, _: f)(forward, place))
        rows = run(cross_kv_reuse, "--layers", "1")
        ways = {f"{way}{unit}" for way in ("recompute", "reuse") for unit in ("_us", "_spread_us")}
        columns = {"layers", "how", "recompute/reuse"} | ways
        assert_timed(rows[:2], columns)
        assert_timed(rows[2:], columns | {"equal_tokens"})
        assert [row["how"] for row in rows] == ["eager", "compiled", "generate"]
        assert {row["layers"] for row in rows} == {1}  # of two
        assert rows[2]["equal_tokens"] == 1.0

    def test_keys_and_values_that_are_not_computed_again_are_refused(self, bench, monkeypatch):
        monkeypatch.setattr(cross_kv_reuse, "forget", lambda cache: None)
        with pytest.raises(SystemExit, match="recompute, eager is wrong"):
            bench(cross_kv_reuse, build_model("toy", torch.float32, "cpu"))

    @pytest.mark.parametrize(
        ("right", "call"), [(1, "reuse, generate"), (2, "reuse, the last call of generate"), (3, "recompute, generate")]
    )
    def test_other_tokens_of_generate_are_refused(self, right, call, bench, monkeypatch):
        model = build_model("toy", torch.float32, "cpu")
        generate, calls = model.generate, itertools.count(1)  # the first call's rules and prompt are what is checked by

        def others(features, **kwargs):
            return generate(features, **kwargs) + (next(calls) > right)

        monkeypatch.setattr(model, "generate", others)
        monkeypatch.setattr(cross_kv_reuse, "bench_step", lambda *args: [])
        with pytest.raises(SystemExit, match=f"{call} is wrong: a token's logit is"):
            bench(cross_kv_reuse, model)


class TestLogitsProcessors:
    def test_rows(self, run: Run) -> None:
        rows = run(logits_processors)
        assert_timed(rows, {"timestamps", "what", "how", "us", "spread_us", "over_ours", "launches", *TRACED})
        choices = [row for row in rows if row["what"] == "choice"]
        growing = [f"growing, {n} pass" for n in PASSES]
        assert [row["how"] for row in choices] == ["stock", "compiled", *growing, "ours", "ours"]
        assert [row["how"] for row in rows if row["what"] == "processors"] == ["stock", "compiled"] * 2
        assert all(row["over_ours"] > 0 for row in choices)
        for row in rows:
            if row["how"] not in ("stock", "ours"):  # only the rules of timestamps cannot be taken whole
                assert row["is_whole"] != row["timestamps"], row
                assert (row["graphs"] == 1) == (row["is_whole"] and row["how"] == "compiled"), row
                assert ("timestamp" in (row["why"] or "") or "tolist" in (row["why"] or "")) == row["timestamps"], row

    def test_another_token_than_stocks_is_refused(self, monkeypatch):
        monkeypatch.setattr(logits_processors, "compiled", lambda call, place: lambda logits: call(logits).roll(1, -1))
        with pytest.raises(SystemExit, match="processors, compiled is wrong"):
            logits_processors.Bench(PLACE, TOY, 1, False).rows(False, False)

    def test_another_token_of_ours_is_refused(self, bench, monkeypatch):
        right = TokenSelection.__call__
        monkeypatch.setattr(TokenSelection, "__call__", lambda self, logits: right(self, logits.flip(-1)))
        monkeypatch.setattr(logits_processors.Bench, "of_stock", lambda *args: [])
        with pytest.raises(SystemExit, match="ours is wrong"):
            bench(logits_processors, TOY)
