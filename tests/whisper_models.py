"""What the drop-in tests run on: tiny random Whispers whose tokens prove something, how they compare with stock, and how
they are interrupted."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LogitsProcessor, WhisperConfig, WhisperForConditionalGeneration
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from whisper_triton import accelerated
from whisper_triton.encoder import CapturedEncoder

# The vocabulary of the tiny models: text, special tokens in the order of the real ones, a timestamp every 0.02 s.
TEXT = 100
EOS, SOT = TEXT, TEXT + 1
LANGUAGES = {f"<|{language}|>": TEXT + 2 + i for i, language in enumerate(("en", "fr", "de", "es"))}
TRANSLATE, TRANSCRIBE, START_OF_LM, START_OF_PREVIOUS, NO_SPEECH, NO_TIMESTAMPS = range(TEXT + 6, TEXT + 12)
FRAMES = 50  # of the encoder's output: one second
VOCABULARY = NO_TIMESTAMPS + 1 + FRAMES + 1
MEL_BINS = 16


def tiny_whisper(
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    is_multilingual: bool = False,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    **config: Any,
) -> WhisperForConditionalGeneration:
    """A random Whisper of 3 encoder and 2 decoder layers, 2 heads of 32, 50 frames and 64 target positions.

    Its weights are drawn again with a standard deviation of 0.3: as initialised by transformers it repeats one token,
    and equal tokens would then prove nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "num_mel_bins": MEL_BINS,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "d_model": 64,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_source_positions": FRAMES,
        "max_target_positions": 64,
        "decoder_start_token_id": SOT,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }
    model = WhisperForConditionalGeneration._from_config(
        WhisperConfig(**(settings | config)), attn_implementation=attn_implementation
    )
    for parameter in model.parameters():
        mean = 1.0 if parameter.dim() == 1 and torch.all(parameter == 1) else 0.0  # a layer norm's weight
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + mean
    # Without it a timestamp would win every other step, and each ends a segment.
    model.model.decoder.embed_tokens.weight.data[NO_TIMESTAMPS + 1 :] *= 0.5
    model.tie_weights()
    rules = {
        "decoder_start_token_id": SOT,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "max_length": model.config.max_target_positions,
        "is_multilingual": is_multilingual,
        "no_timestamps_token_id": NO_TIMESTAMPS,
        "prev_sot_token_id": START_OF_PREVIOUS,
        "max_initial_timestamp_index": FRAMES,
        "return_timestamps": False,
        "suppress_tokens": [START_OF_LM, START_OF_PREVIOUS, NO_SPEECH],
        "begin_suppress_tokens": [EOS],
        "alignment_heads": [[0, 0], [1, 1]],
    }
    if is_multilingual:
        rules |= {"lang_to_id": LANGUAGES, "task_to_id": {"translate": TRANSLATE, "transcribe": TRANSCRIBE}}
    model.generation_config = GenerationConfig(**rules)
    return model.to(device, dtype).eval()


def by_name(model: WhisperForConditionalGeneration) -> WhisperForConditionalGeneration:
    """`model` with our attention by its name alone: caches and forward passes stay transformers' own."""
    model.set_attn_implementation("whisper_triton")
    return model


def mel(batch_size: int, device: torch.device | str = "cpu", seconds: float = 1, seed: int = 1) -> torch.Tensor:
    """Random input features of the tiny models, whose window is one second."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, MEL_BINS, round(2 * FRAMES * seconds), generator=generator).to(device)


class Recorder(LogitsProcessor):
    """Keeps the scores it is shown, one tensor a step.

    A forward hook would do it too, but a model with hooks in its decoder is not replayed from a CUDA graph.
    """

    def __init__(self) -> None:
        self.scores: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.scores.append(scores.clone())
        return scores


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """The batch size of each pass of the encoder, its graph's replays too. Inside the encoder a hook, or a forward pass put
    on an instance, would have every pass made: so the classes count.
    """
    sizes: list[int] = []

    def count(function: Callable[..., Any], this: Callable[[Any], bool]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
            if this(self):
                sizes.append(len(args[0] if args else kwargs["input_features"]))
            return function(self, *args, **kwargs)

        return counting

    with pytest.MonkeyPatch.context() as patch:
        forward, replay = WhisperEncoder.forward, CapturedEncoder.start
        patch.setattr(WhisperEncoder, "forward", count(forward, lambda encoder: encoder is model.model.encoder))
        patch.setattr(CapturedEncoder, "start", count(replay, lambda graph: True))
        yield sizes


class Interrupt(TorchDispatchMode):
    """Raises `error` at the operation of number `at`, as Ctrl-C does wherever the host is; counts them."""

    def __init__(self, error: type[BaseException], at: int = -1) -> None:
        super().__init__()
        self.error, self.at, self.seen = error, at, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        if self.seen == self.at:
            raise self.error(f"in {function}")
        return function(*args, **(kwargs or {}))


def tensors_of(output: Any) -> dict[str, torch.Tensor]:
    """All tensors of nested dicts, tuples, lists, model outputs and caches, by their path."""
    if isinstance(output, torch.Tensor):
        return {"": output}
    if isinstance(output, EncoderDecoderCache):
        output = {"self": output.self_attention_cache, "cross": output.cross_attention_cache}
    elif isinstance(output, Cache):
        output = [(layer.keys, layer.values) for layer in output.layers]
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, list | tuple):
        items = enumerate(output)
    else:
        return {}
    return {f"{key}.{path}": tensor for key, value in items for path, tensor in tensors_of(value).items()}


def assert_same(ours: Any, stock: Any, exact: Any) -> None:
    """The same tensors: whole numbers equal, and all others together at most twice as far from `exact` as stock's.

    Args:
        exact: what stock returns in float64.
    """
    ours, stock, exact = tensors_of(ours), tensors_of(stock), tensors_of(exact)
    assert list(ours) == list(stock)
    assert list(exact) == list(stock)
    assert stock, "there is nothing to compare"
    errors = {"ours": 0.0, "stock": 0.0}
    for path in stock:
        assert ours[path].shape == stock[path].shape, path
        assert ours[path].dtype == stock[path].dtype, path
        if not stock[path].is_floating_point():
            assert torch.equal(ours[path], stock[path]), path
            assert torch.equal(exact[path], stock[path]), path
            continue
        finite = stock[path].isfinite()  # a suppressed token's score is -inf
        assert torch.equal(ours[path].isfinite(), finite), path
        for name, tensor in (("ours", ours[path]), ("stock", stock[path])):
            errors[name] += (tensor.double() - exact[path].double())[finite].square().sum().item()
    assert errors["ours"] ** 0.5 <= 2 * errors["stock"] ** 0.5


def assert_generates_as_stock(
    model: WhisperForConditionalGeneration, features: torch.Tensor, *, distinct: int = 8, **kwargs: Any
) -> Any:
    """`generate` returns the same with `model` accelerated and not, with the scores of each step as near to float64's.

    Args:
        distinct: stock must give so many different tokens: a few repeated ones would prove nothing.

    Returns:
        stock's result.
    """

    def run(runner: WhisperForConditionalGeneration) -> dict[str, Any]:
        torch.manual_seed(0)
        recorder = Recorder()
        result = runner.generate(features.to(runner.dtype), logits_processor=[recorder], **kwargs)
        return {"result": result, "scores": recorder.scores}

    stock, exact = run(model), run(copy.deepcopy(model).double())
    with accelerated(model):
        ours = run(model)
    assert_same(ours, stock, exact)
    tokens = stock["result"] if isinstance(stock["result"], torch.Tensor) else stock["result"]["sequences"]
    assert tokens.unique().numel() >= distinct
    return stock["result"]
