"""The files of `benchmarks/` as scripts: each that has a command line is run or read here, or has a test file of its own."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from whisper_models import mel, tiny_whisper
from whisper_triton.benchmarks.models import SHAPES, build_model

import whisper_triton
from whisper_triton import fused_encoder
from whisper_triton.benchmarks import (
    detect_language,
    embed_tokens,
    encoder,
    encoder_kernels,
    first_call,
    harness,
    host_overhead,
    prefill,
    project_cross_kv,
    readme,
    readme_tables,
    select_token,
    skinny_linear,
    step_position,
)
from whisper_triton.encoder import CapturedEncoder

if TYPE_CHECKING:
    from benchmark_fixtures import Run

pytest_plugins = ["benchmark_fixtures", "whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

FOLDER = Path(harness.__file__).parent
MAINS = {path.stem: path.read_text() for path in FOLDER.glob("*.py") if "\ndef main(" in path.read_text()}
SWEEPS = sorted(name for name, text in MAINS.items() if "measure_named(" in text)
TUNERS = sorted(name for name in MAINS if name.startswith("tune_"))
PLACE = harness.Place(torch.device("cpu"), torch.float32, 10.0)
CALLS = ("first", "second", "other_prompt", "longer")


def test_every_command_line_is_tested() -> None:
    others = {"compare": "test_compare.py", "readme": "test_readme_tables.py"}
    others |= dict.fromkeys(("merge", "record"), "test_record.py")
    assert set(MAINS) == {*SWEEPS, *TUNERS, *others}
    for name, test in others.items():
        assert f"{name}.main()" in (Path(__file__).parent / test).read_text()


@pytest.mark.parametrize("name", SWEEPS)
def test_command_lines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each would measure: its `bench`, which other tests run, for the models and batches named."""
    module = importlib.import_module(f"whisper_triton.benchmarks.{name}")
    swept: list[Any] = []

    def measure_named(args: Any, name: str, benches: dict[str, Callable], loader: Callable, **kwargs: Any) -> None:
        swept.append((name, args.batch, args.model or args.default_model, all(map(callable, benches.values()))))

    monkeypatch.setattr(module, "measure_named", measure_named)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    module.main()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--model", "tiny,base", "--batch", "3"])
    module.main()
    assert swept[0][0] == name
    assert all(isinstance(B, int) for B in swept[0][1])
    assert "large-v3" in swept[0][2]
    assert swept[1] == (name, [3], "tiny,base", True)


NUMBERS = "takes numbers from 1 to 2147483647, separated by commas, got"
BAD_ARGUMENTS = [
    ("generate", "--batch 0", f"--batch: {NUMBERS} '0'"),
    ("generate", "--variants nonsense", "--variants: takes stock static+compile; attention by name, static+compile; "),
    ("generate", "--calls 0", "--calls: takes a number from 1 to 2147483647, got '0'"),
    ("generate", "--new-tokens 441", "--new-tokens: takes a number from 1 to 440, got '441'"),
    ("first_call", "--variants 'stock dynamic;x'", "--variants: takes accelerate, nothing cached; "),
    ("host_overhead", "--calls=-1", "--calls: takes a number from 1 to 2147483647, got '-1'"),
    ("reshape_free", "--batch x", f"--batch: {NUMBERS} 'x'"),
    ("step_position", "--positions a", f"--positions: {NUMBERS} 'a'"),
    ("encoder", "--at-once 1,,2", f"--at-once: {NUMBERS} '1,,2'"),
    ("cross_kv_reuse", "--layers 0", "--layers: takes a number from 1 to 2147483647, got '0'"),
    ("prefill", "--tokens 0", "--tokens: takes a number from 1 to 440, got '0'"),
    ("tune_step", "--batch x", f"--batch: {NUMBERS} 'x'"),
    ("encoder", "--device cuda", "--device: there is nothing to measure without a GPU, and torch finds none"),
    ("encoder", "--device tpu", "--device: takes cuda or cpu, got 'tpu'"),
]


@pytest.mark.parametrize(("name", "words", "said"), BAD_ARGUMENTS, ids=[" ".join(case[:2]) for case in BAD_ARGUMENTS])
def test_bad_arguments(
    name: str, words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *shlex.split(words)])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"whisper_triton.benchmarks.{name}").main()
    assert f"error: argument {said}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--positions", "5,20000"], "the last position whose surroundings the cache holds is 433, got 20000"),
        (["--model", "./nowhere"], "./nowhere: no such directory"),
    ],
)
def test_what_a_model_has_not(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["step_position.py", "--device", "cpu", *words])
    with pytest.raises(SystemExit, match=said):
        step_position.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", TUNERS)
def test_there_is_nothing_to_tune_without_a_gpu(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"whisper_triton.benchmarks.{name}").main()
    assert "there is nothing to measure without a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "option"), [(encoder, "--profile"), (project_cross_kv, "--tune")])
def test_what_needs_a_gpu_says_so(
    module: ModuleType, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", option, "--device", "cpu"])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert f"error: {option} needs a GPU" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("name", "way"), [("layer_by_layer", "layers"), ("copied", "compiled")])
def test_no_wrong_alternative_of_the_projection_is_timed(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.Place, "compile", lambda self, function: function)
    monkeypatch.setattr(project_cross_kv, name, lambda *args: None)
    with torch.no_grad(), pytest.raises(SystemExit, match=f"project_cross_kv, {way}: keys of layer 0 is wrong"):
        project_cross_kv.bench(PLACE, SHAPES["toy"], 1)


class TestEncoder:
    def test_rows(self, run: Run) -> None:
        default, *others = run(encoder, "--compile", "none") + run(encoder, "--compile", "none", "--at-once", "1,2,4")
        assert [row["at_once"] for row in (default, *others)] == [2, 1, 2]
        for row in (default, *others):
            assert row["share_%"] == pytest.approx(100 * row["floor_ms"] / row["ours_ms"])
            assert min(row["eager_ms"], row["call_ms"]) > 0

    def test_a_compiled_one_beside_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(harness, "measure_on_cpu", lambda calls: (2000.0, 10.0))
        monkeypatch.setattr(encoder, "compiled", lambda function, place, **options: function)
        with torch.no_grad():
            (row,) = encoder.bench(PLACE, build_model("toy", torch.float32, "cpu"), 1)
        assert (row["compiled_ms"], row["compiled/ours"], row["mode"]) == (2.0, 1.0, "reduce-overhead")

    def test_attention_that_is_wrong_is_not_timed(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        right = torch.nn.functional.scaled_dot_product_attention
        results = (lambda *qkv: right(*qkv), lambda *qkv: right(*qkv), lambda q, k, v: right(q, k, k))  # two to check by
        monkeypatch.setattr(encoder, "SHOWN", ("flash",))
        turns = chain(results, repeat(results[0]))
        monkeypatch.setattr(encoder, "scaled_dot_product_attention", lambda *qkv: next(turns)(*qkv))
        (row,) = run(encoder, "--compile", "none")
        assert row["sdpa_flash_us"] is None
        assert "sdpa_flash is wrong and not timed" in capsys.readouterr().err

    def test_a_wrong_one_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = fused_encoder.bias_gelu
        monkeypatch.setattr(fused_encoder, "bias_gelu", lambda x, bias: right(x, 1.01 * bias + 0.01))
        with torch.no_grad(), pytest.raises(SystemExit, match="the encoder is wrong: relative error"):
            encoder.bench(PLACE, build_model("toy", torch.float32, "cpu"), 1, mode="none")


def test_prefill(run: Run) -> None:
    (row,) = run(prefill, "--calls", "1")
    assert (row["T"], row["captured"]) == (4, False)
    assert min(row[f"{name}_ms"] for name in ("stock", "layer by layer", "now", "project")) > 0


@pytest.mark.parametrize("module", [embed_tokens, project_cross_kv, select_token, skinny_linear])
def test_kernels_that_have_a_table(module: ModuleType, run: Run) -> None:
    assert {row["benchmark"] for row in run(module, B=1)} <= readme_tables.TABLES.keys()  # in fp32 chain and links take one row


def test_two_kernels_of_one_file_have_tables_of_their_own(run: Run, tmp_path: Path) -> None:
    names = ("add_layer_norm", "bias_gelu")
    run(encoder_kernels, benchmarks=names)
    rows = tmp_path / "benchmarks" / "rows"
    rows.mkdir(parents=True)
    (tmp_path / "rows.jsonl").rename(rows / "encoder_kernels.jsonl")
    for name in names:
        assert {row["benchmark"] for row in readme.load(tmp_path, name)} == {name}


class TestDetectLanguage:
    def test_rows(self, run: Run) -> None:
        rows = run(detect_language, "--calls", "1")
        assert [row["variant"] for row in rows] == list(detect_language.VARIANTS)
        for row in rows:
            assert min(row["told_ms"], row["detected_ms"]) > 0
            assert row["detection_ms"] == row["detected_ms"] - row["told_ms"]

    def test_another_language_than_stocks_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        models = detect_language.Models("toy", PLACE)
        monkeypatch.setattr(models.ours, "detect_language", lambda *args, **kwargs: torch.full((2,), 50300))
        with pytest.raises(SystemExit, match="accelerate is wrong: a token's logit is"):
            detect_language.bench(PLACE, models, 2, calls=1)


class TestHostOverhead:
    def test_rows(self, run: Run) -> None:
        rows = run(host_overhead, "--calls", "1")
        assert [row["variant"] for row in rows] == list(host_overhead.VARIANTS)
        for row in rows:
            parts = [row[f"{name}_ms"] for name in ("before", "between", "after")]
            assert min(parts) > 0
            assert row["around_ms"] == pytest.approx(sum(parts))
            assert "busy_ms" not in row  # there is no GPU to be at work

    @pytest.mark.parametrize(("right", "call"), [(2, "last call"), (3, "last call with marks")])
    def test_wrong_tokens_of_a_later_call_are_refused(self, right: int, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
        generate, calls = host_overhead.Variant.generate, Counter()

        def others(self: host_overhead.Variant) -> torch.Tensor:
            calls[self.name] += 1
            return generate(self) + (calls[self.name] > right)

        monkeypatch.setattr(host_overhead.Variant, "generate", others)
        with pytest.raises(SystemExit, match=f"stock dynamic's {call} is wrong: a token's logit is"):
            host_overhead.bench(PLACE, host_overhead.Models("toy", PLACE), 1, calls=1)

    def test_what_lies_where(self) -> None:
        """A call from 0 to 100 ms."""
        stages = [
            host_overhead.Stage(stage[0], True, *stage[1:])
            for stage in (
                (host_overhead.ENCODER, 0.005, 0.015),
                (host_overhead.PROJECTION, 0.016, 0.018),
                (host_overhead.PASS, 0.019, 0.030),
                (host_overhead.PASS, 0.031, 0.090),
            )
        ]
        clock = host_overhead.Clock(PLACE)
        found = host_overhead.split_of(clock, 0.0, stages, 0.1)
        assert found == pytest.approx({"before": 5, "between": 2, "after": 10, "around": 17, "work": 82})
        with pytest.raises(SystemExit, match="a call ran 0 encoders and 2 passes"):
            host_overhead.split_of(clock, 0.0, stages[1:], 0.1)

    @pytest.mark.usefixtures("eager_steps")
    def test_the_stages_of_our_loop(self, device: torch.device, loops: list[int]) -> None:
        model = whisper_triton.accelerate(tiny_whisper(device))
        features = mel(1, device)
        stages = host_overhead.Stages(host_overhead.Clock(PLACE))
        with stages.marking():
            tokens = model.generate(features, max_new_tokens=6, min_new_tokens=6, num_beams=1)
        assert torch.equal(tokens, model.generate(features, max_new_tokens=6, min_new_tokens=6, num_beams=1))
        assert loops == [loops[0]] * 2  # ours in both calls, and after as many steps
        assert Counter(stage.name for stage in stages.found) == {
            host_overhead.ENCODER: 1,
            host_overhead.PROJECTION: 1,
            host_overhead.PASS: 1 + loops[0],  # the prompt
        }
        assert all(stage.is_one_launch for stage in stages.found[-loops[0] :])

    def test_a_graph_of_the_encoder_is_seen_where_it_starts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Which may be before stock has begun, with nobody calling the encoder later."""
        monkeypatch.setattr(CapturedEncoder, "start", lambda graph, features: features)
        graph, stages = CapturedEncoder.__new__(CapturedEncoder), host_overhead.Stages(host_overhead.Clock(PLACE))
        graph.stream = None
        with stages.marking():
            assert graph.start(features := mel(1)) is features
        assert [(stage.name, stage.is_one_launch) for stage in stages.found] == [(host_overhead.ENCODER, True)]

    def test_work_that_overlaps_counts_once(self) -> None:
        assert host_overhead.covered([(5, 7), (0, 2), (1, 3), (1.5, 2.5)]) == 5
        assert host_overhead.covered([]) == 0


class TestFirstCall:
    def test_rows(self, run: Run) -> None:
        rows = run(first_call)
        assert [row["variant"] for row in rows] == list(first_call.VARIANTS)
        assert all(row[f"{call}_s"] > 0 for row in rows for call in CALLS)

    @pytest.mark.parametrize("call", CALLS)
    def test_wrong_tokens_are_refused(self, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def run_here(place: harness.Place, folder: Path, function: Callable, *args: Any) -> Any:
            found = function(*args)
            if folder.name == "compiled":
                seconds, tokens = found[call]
                tokens[-1][-1] += 1
                found[call] = seconds, tokens
            return found

        monkeypatch.setattr(first_call, "in_new_process", run_here)
        with pytest.raises(SystemExit, match=f"stock static.compile, nothing cached, {call} call is wrong: a token's logit is"):
            first_call.bench(PLACE, first_call.load("toy", PLACE), 2)

    def test_calls_differ_in_prompt_and_length(self) -> None:
        model = build_model("toy", torch.float32, "cpu")
        calls = first_call.calls_of(model, 64, 200)
        assert list(calls) == [*CALLS]
        assert [len(kwargs.get("prompt_ids", ())) for kwargs in calls.values()] == [0, 0, first_call.PROMPT, 0]
        assert [kwargs["min_new_tokens"] for kwargs in calls.values()] == [64, 64, 64, 200]

    @pytest.mark.parametrize("device", ["cpu", "cuda"])  # where a process is copied, and where it begins with nothing
    def test_a_process_of_its_own(self, device: str, tmp_path: Path) -> None:
        place = PLACE._replace(device=torch.device(device))
        before = dict(os.environ)
        for variable, name in first_call.CACHES.items():
            assert first_call.in_new_process(place, tmp_path, os.getenv, variable) == str(tmp_path / name)
        pids = {first_call.in_new_process(place, tmp_path, os.getpid) for _ in range(2)}
        assert len(pids - {os.getpid()}) == 2
        assert dict(os.environ) == before

    def test_kernels_that_fail_are_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(first_call, "failed_gpus", lambda: (0,))
        monkeypatch.setattr(first_call, "why_reference", lambda device: f"no kernels on {device}")
        with pytest.raises(SystemExit, match="accelerate: no kernels on cuda:0"):
            first_call.run_calls(PLACE, "toy", 1, "accelerate", 4, 8)


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_first_call_on_a_gpu() -> None:
    place = harness.Place(torch.device("cuda"), torch.float16, 1000.0)
    built, cached, *_ = first_call.bench(place, first_call.load("tiny", place), 1)
    assert cached["first_s"] < built["first_s"]


@pytest.mark.gpu
def test_host_overhead_on_a_gpu() -> None:
    place = harness.Place(torch.device("cuda"), torch.float16, 1000.0)
    rows = host_overhead.bench(place, host_overhead.Models("tiny", place), 2, calls=2, new_tokens=8)
    for row in rows:
        assert 0 < row["busy_ms"] < row["ms"]
        assert 0 < row["around_ms"] < row["ms"]


def test_a_revision_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    harness.environment.cache_clear()
    monkeypatch.setenv("WHISPER_TRITON_REVISION", "told")
    try:
        assert harness.environment("cpu")["revision"] == "told"
    finally:
        harness.environment.cache_clear()


def test_rows_of_before_are_kept_where_writing_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    harness.write_rows(tmp_path / "rows.jsonl", [{"B": 1}], "a command", "cpu")
    with pytest.raises(TypeError):
        harness.write_rows(tmp_path / "rows.jsonl", [{"B": object()}], "a command", "cpu")
    assert '"B": 1' in (tmp_path / "rows.jsonl").read_text()
