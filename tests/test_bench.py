"""`whisper-triton bench`, end to end on a CPU: every command, what its rows hold, and that a wrong result is never timed."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from ctranslate2_writer import write_directory
from whisper_models import tiny_whisper
from whisper_triton.benchmarks.harness import Place
from whisper_triton.benchmarks.models import get_model

from whisper_triton import attention, bench, decode_loop, doctor, fused
from whisper_triton.benchmarks import (
    append_attention,
    compare,
    cross_attention,
    decode_attention,
    decoder_step,
    embed_tokens,
    encoder_kernels,
    harness,
    kernel_tables,
    plots,
    project_cross_kv,
    select_token,
    skinny_linear,
    step_position,
    update_kv_cache,
)
from whisper_triton.benchmarks import generate as benchmark_of_generate
from whisper_triton.cli import main

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

ENVIRONMENT = {"gpu", "driver", "torch", "triton", "transformers", "python", "revision", "date", "command"}


@pytest.fixture
def command() -> Callable[..., Result]:
    """`command("step", ...)` runs `whisper-triton bench step --device cpu ...` in this process."""

    def run(name: str, *args: object) -> Result:
        return CliRunner().invoke(main, ["bench", name, "--device", "cpu", *map(str, args)])

    return run


@pytest.fixture
def measured(command: Callable[..., Result], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """The rows that a run wrote, once it is seen that it went well and that each says where it comes from."""

    def run(*args: object) -> list[dict[str, Any]]:
        result = command(*args, "--output", tmp_path / "new" / "rows.jsonl")
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith(bench.CPU_NOTE)
        rows = [json.loads(line) for line in (tmp_path / "new" / "rows.jsonl").read_text().splitlines()]
        for row in rows:
            assert row.keys() >= ENVIRONMENT | {"benchmark", "model", "dtype", "B"}
            assert (row["gpu"], row["driver"]) == ("none", "none")
            words = ["whisper-triton", "bench", *map(str, args), "--device", "cpu"]  # not where the rows went
            assert sorted(row["command"].split()) == sorted(words)
            assert f"\n{row['benchmark']}\n" in result.stdout
        return rows

    return run


@pytest.fixture
def nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("a wrong result was timed")

    monkeypatch.setattr(harness.Place, "on", lambda device, dtype: harness.Place(torch.device(device), dtype, 10.0))
    monkeypatch.setattr(harness.Place, "measure", fail)
    monkeypatch.setattr(harness.Place, "compile", lambda self, function, **kwargs: function)
    monkeypatch.setattr(benchmark_of_generate.Variant, "time_once", fail)


def refuses(result: Result, exit_code: int, message: str) -> None:
    """Checks that a run ended with one line of its own on stderr, which holds `message`, and printed no table."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout in ("", bench.CPU_NOTE + "\n")
    *progress, last = result.stderr.strip().splitlines()
    assert last.startswith("whisper-triton: ")
    assert message in last
    assert all("|" in line for line in progress), result.stderr  # tqdm's bar


def test_generate(measured: Callable[..., list[dict[str, Any]]]) -> None:
    rows = measured("generate", "--batch", "2", "--new-tokens", "4", "--calls", "1")
    assert [row["variant"] for row in rows] == list(benchmark_of_generate.VARIANTS)
    for row in rows:
        assert (row["benchmark"], row["model"], row["B"], row["new_tokens"]) == ("generate", "toy", 2, 4)
        assert row["tok/s"] == pytest.approx(2 * 4 / row["ms"] * 1000)
        assert row["RTFx"] == pytest.approx(2 * 64 * 0.02 / row["ms"] * 1000)  # 64 frames of 20 ms
        assert row["equal_tokens"] == 1.0
        assert row["first_s"] > 0


def test_step(measured: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    # Stock's step is traced by the test of steps by position.
    monkeypatch.setattr(decoder_step, "time_compiled", lambda model, B, place, mode: [(20.0, 1.0)])
    step, *links = measured("step", "--batch", "1")
    assert step["benchmark"] == "step"
    assert step["path"] == "chain"
    assert step["modules_ms"] > 0
    assert (step["compiled/ours"], step["mode"]) == (pytest.approx(20.0 / step["ms"]), "reduce-overhead")
    assert step["share_%"] == pytest.approx(100 * step["GB/s"] / step["bandwidth_GB/s"])
    assert [row["link"] for row in links] == [
        *("q/k/v", "self-attention", "self out", "cross query and attention", "cross out", "fc1", "fc2", "LM head")
    ]
    # Two layers, and the final layer norm and the LM head's weights once.
    assert sum(row["MB"] * (1 if row["link"] == "LM head" else 2) for row in links) == pytest.approx(step["MB"])
    assert all(row["floor_us"] > 0 for row in links)


def test_step_of_a_checkpoint_without_stock(measured: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "english", tiny_whisper(max_source_positions=1500))
    rows = measured("step", "--model", directory, "--batch", "2", "--compile", "none")
    assert [row["model"] for row in rows] == [str(directory)]  # in fp32 the chain takes one row: no links
    assert rows[0]["path"] == "modules"
    assert "modules_ms" not in rows[0]
    assert "compiled_ms" not in rows[0]


def test_kernels(measured: Callable[..., list[dict[str, Any]]]) -> None:
    rows = measured("kernels", "--batch", "1")
    assert list(dict.fromkeys(row["benchmark"] for row in rows)) == list(bench.KERNELS)
    by_name = {row["benchmark"]: row for row in rows}
    assert by_name["decode_attention"].keys() >= {f"{name}_us" for name in ("flash", "cudnn", "math", "flex", "compiled")}
    assert by_name["decode_attention"]["cudnn_us"] is None  # there is none on a CPU
    assert by_name["select_token"]["compiled_us"] > 0
    assert by_name["append_attention"].keys() >= {"stock_us", "flex_us", "compiled_us", "length"}
    for row in rows:
        ours = "ours_ms" if row["benchmark"] == "project_cross_kv" else "ours_us"
        assert row[ours] > 0


def wrong(function: Callable[..., Any]) -> Callable[..., Any]:
    """What `function` returns, a hundredth too much."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return tuple(1.01 * t for t in result) if isinstance(result, tuple) else 1.01 * result

    return call


def idle(*args: object, **kwargs: object) -> None:
    """A kernel that writes nothing."""


@pytest.mark.usefixtures("nothing_is_timed")
@pytest.mark.parametrize(
    ("name", "module", "replacement"),
    [
        ("decode_attention", decode_attention, wrong),
        ("append_attention", append_attention, wrong),
        ("update_kv_cache", update_kv_cache, idle),
        ("cross_attention", cross_attention, wrong),
        ("skinny_linear", skinny_linear, wrong),
        ("embed_tokens", embed_tokens, wrong),
        ("select_token", decode_loop, idle),
        ("project_cross_kv", project_cross_kv, idle),
        ("add_layer_norm", encoder_kernels, wrong),
        ("bias_gelu", encoder_kernels, idle),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_kernel_is_not_timed(
    name: str, module: Any, replacement: Any, command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, name, wrong(getattr(module, name)) if replacement is wrong else replacement)
    result = command("kernels", "--only", name, "--batch", 1, "--output", tmp_path / "rows.jsonl")
    refuses(result, 1, f"{name}")
    assert "wrong" in result.stderr
    assert not (tmp_path / "rows.jsonl").exists()


def wrong_where(choose: Callable[..., None], condition: Callable[..., bool]) -> Callable[..., None]:
    """A choice of the next tokens, each one too many where the condition holds."""

    def call(logits: torch.Tensor, rules: Any, state: Any, **kwargs: Any) -> None:
        choose(logits, rules, state, **kwargs)
        state.next_ids.add_(condition(rules, **kwargs))

    return call


@pytest.mark.parametrize(
    ("name", "condition"),
    [
        ("blocks of 2048", lambda rules, block_size, **_: block_size == 2048),
        ("sampling", lambda rules, **_: rules.temperature.item() > 0),
        ("top-k", lambda rules, top_k, **_: top_k),
    ],
)
def test_no_wrong_way_to_choose_is_timed(
    name: str, condition: Callable[..., bool], command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select_token, "select_token", wrong_where(select_token.select_token, condition))
    monkeypatch.setattr(harness, "measure_on_cpu", lambda calls: (1.0, 0.0))
    result = command("kernels", "--only", "select_token", "--batch", 1)
    refuses(result, 1, f"select_token, {name} is wrong: 100.0 % of the tokens are not the reference's")


def test_a_compiled_choice_that_is_wrong_is_not_timed(command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        harness.Place, "compile", lambda self, choose, **kwargs: wrong_where(choose, lambda rules: rules.limits.numel() > 0)
    )
    result = command("kernels", "--only", "select_token", "--batch", 1)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("compiled is wrong and not timed: relative error") == 2


def test_a_wrong_alternative_is_not_timed(command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.Place, "compile", lambda self, function, **kwargs: function)
    monkeypatch.setattr(decode_attention, "flex", lambda *args: lambda q, k, v, scale: torch.zeros_like(q))
    result = command("kernels", "--only", "decode_attention", "--batch", 1)
    assert result.exit_code == 0, result.output
    assert "flex is wrong and not timed: relative error 1.00e+00" in result.stderr
    names, values = (line.split() for line in result.stdout.splitlines()[-2:])
    row = dict(zip(names, values, strict=True))
    assert (row["flex_us"], row["math_us"] != "-") == ("-", True)


@pytest.mark.usefixtures("nothing_is_timed")
def test_a_wrong_step_is_not_timed(command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "skinny_linear", wrong(fused.skinny_linear))
    refuses(command("step", "--batch", 1, "--compile", "none"), 1, "the step is wrong in 8 rows: ")


@pytest.mark.usefixtures("nothing_is_timed")
def test_wrong_tokens_are_not_timed(command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("generate", "--batch", 1, "--new-tokens", 4, "--calls", 1)
    generate = benchmark_of_generate.Variant.generate

    def others(self: benchmark_of_generate.Variant) -> torch.Tensor:
        return generate(self) + (self.name == "accelerate")

    with monkeypatch.context() as patch:
        patch.setattr(benchmark_of_generate.Variant, "generate", others)
        refuses(command(*arguments), 1, "accelerate is wrong: a token's logit is")
    monkeypatch.setattr(attention, "decode_attention", wrong(attention.decode_attention))
    monkeypatch.setattr(fused, "cross_attention", wrong(fused.cross_attention))
    refuses(command(*arguments), 1, "the step is wrong in 8 rows: ")


@pytest.mark.usefixtures("nothing_is_timed")
def test_wrong_tokens_of_the_last_row_are_not_timed(command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    generate = benchmark_of_generate.Variant.generate

    def others(self: benchmark_of_generate.Variant) -> torch.Tensor:
        tokens = generate(self).clone()
        tokens[-1] += self.name == "accelerate"
        return tokens

    monkeypatch.setattr(benchmark_of_generate.Variant, "generate", others)
    arguments = ("generate", "--batch", 4, "--new-tokens", 4, "--calls", 1)
    refuses(command(*arguments), 1, "accelerate is wrong: a token's logit is")


def test_wrong_tokens_from_a_later_call_on_are_no_row(
    command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As of what is captured in the first call, or the second, and only replayed in those that are timed."""
    generate, calls = benchmark_of_generate.Variant.generate, Counter()

    def others(self: benchmark_of_generate.Variant) -> torch.Tensor:
        calls[self.name] += 1
        return generate(self) + (self.name == "accelerate" and calls[self.name] > 2)

    monkeypatch.setattr(benchmark_of_generate.Variant, "generate", others)
    arguments = ("generate", "--batch", 1, "--new-tokens", 4, "--calls", 1, "--output", tmp_path / "rows.jsonl")
    refuses(command(*arguments), 1, "accelerate's last call is wrong: a token's logit is")
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (("step", "--batch", "0"), 2, "--batch takes numbers from 1 to 2147483647, separated by commas, got '0'"),
        (("step", "--batch", "99999999999999999999"), 2, "got '99999999999999999999'"),
        (("step", "--batch", "1,two"), 2, "got '1,two'"),
        (("kernels", "--model", "toy,"), 2, "--model takes names separated by commas, got 'toy,'"),
        (("kernels", "--only", "attention"), 2, "no kernel 'attention': there are decode_attention, "),
        (("kernels", "--model", "./nowhere"), 1, "./nowhere: no such directory"),
        (("generate", "--plot", "x.png"), 1, "--plot needs matplotlib"),
        (("kernels", "--output", "/dev/null/rows.jsonl"), 1, "/dev/null: cannot write there: it is a file, not a directory"),
        (("kernels", "--output", "/proc/x/rows.jsonl"), 1, "/proc/x: cannot write there: No such file or directory"),
    ],
)
def test_bad_options(
    arguments: tuple[str, ...],
    exit_code: int,
    message: str,
    command: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    refuses(command(*arguments), exit_code, message)


@pytest.mark.usefixtures("nothing_is_timed")
@pytest.mark.parametrize(
    ("path", "exit_code", "message"),
    [
        ("x.xyz", 2, "got 'x.xyz'"),
        ("x.pgf", 2, "got 'x.pgf'"),
        ("plot", 2, "--plot takes a file whose name ends in one of .svg, "),
        ("/proc/x/y.png", 1, "/proc/x: cannot write there: No such file or directory"),
    ],
)
def test_a_plot_that_cannot_be_drawn(path: str, exit_code: int, message: str, command: Callable[..., Result]) -> None:
    refuses(command("kernels", "--plot", path), exit_code, message)


def test_a_plot_that_cannot_be_drawn_after_all(
    command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots.Figure, "savefig", full)
    result = command("kernels", "--only", "embed_tokens", "--batch", 1, "--plot", tmp_path / "x.png")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "whisper-triton: [Errno 28] No space left on device"


def test_out_of_memory(command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*args: object, **kwargs: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(decoder_step, "bench", allocate)
    refuses(command("step", "--batch", 1), 1, "cpu is out of memory: try a smaller --batch or --model")


def test_every_kernel_is_measured() -> None:
    assert set(bench.KERNELS) == set(doctor.KERNELS) == set(kernel_tables.KERNELS)


@pytest.mark.gpu
@pytest.mark.timeout(900)  # most of it to compile the alternatives
@pytest.mark.parametrize(("name", "batches"), [("generate", "1,2"), ("step", "1,2"), ("kernels", "2")])
def test_on_a_gpu(name: str, batches: str, tmp_path: Path) -> None:
    arguments = ["bench", name, "--model", "tiny", "--batch", batches, "--output", str(tmp_path / "rows.jsonl")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["B"] for row in rows} == set(map(int, batches.split(",")))
    assert all(row["gpu"] == torch.cuda.get_device_name() and row["dtype"] == "float16" for row in rows)
    if name == "step":
        assert all(row["path"] == "chain" for row in rows if row["benchmark"] == "step")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_to_be_had() -> None:
    refuses(CliRunner().invoke(main, ["bench", "step", "--device", "cuda"]), 2, "device 'cuda' is not to be had")


def test_rows_are_drawn_and_compared(command: Callable[..., Result], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    result = command("kernels", "--only", "embed_tokens", "--batch", "1,2", "--output", rows, "--plot", tmp_path / "out.svg")
    assert result.exit_code == 0, result.output
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    for row in written:
        del row["command"]
    assert plots.read_digest(tmp_path / "out.svg") == plots.digest(written, "Time by batch")

    for arguments in (["bench"], ["bench", "step"]):
        result = CliRunner().invoke(main, [*arguments, "--compare", str(rows), str(rows)])
        assert result.exit_code == 0
        assert result.stdout == compare.compare(rows, rows) + "\n"
        assert "2 rows of both: 2 within the spread" in result.stdout
    (tmp_path / "none.jsonl").touch()
    refuses(CliRunner().invoke(main, ["bench", "--compare", str(rows), str(tmp_path / "none.jsonl")]), 1, "no rows")


def test_a_step_by_position() -> None:
    place = Place.on(torch.device("cpu"), torch.float32)
    rows = step_position.bench(place, get_model("toy", torch.float32, "cpu"), 2, positions=(6, 10))
    assert [(row["variant"], row["position"]) for row in rows] == [
        (variant, position) for variant in (step_position.COMPILED, step_position.OURS) for position in (6, 10)
    ]
    assert all(row["ms"] > 0 and row["B"] == 2 for row in rows)
