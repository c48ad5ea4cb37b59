"""Attention, by name and as a module: stock's results with every cache and mask, on the kernels where they can serve."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import WhisperForCausalLM, WhisperForConditionalGeneration
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.whisper.modeling_whisper import WhisperAttention
from whisper_models import EOS, FRAMES, SOT, TEXT, assert_same, by_name, mel, tiny_whisper

from whisper_triton import StaticEncoderDecoderCache, accelerate, attention, build_static_cache

pytest_plugins = ["whisper_fixtures"]

TOKENS = (SOT, 5, 17, 42, 8, 99, 5)
SLOTS = 10


def dynamic_cache(model: WhisperForConditionalGeneration, batch_size: int) -> Cache:
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def stock_static_cache(model: WhisperForConditionalGeneration, batch_size: int) -> Cache:
    return EncoderDecoderCache(StaticCache(model.config, SLOTS), StaticCache(model.config, FRAMES))


def mixed_cache(model: WhisperForConditionalGeneration, batch_size: int) -> Cache:
    return EncoderDecoderCache(StaticCache(model.config, SLOTS), DynamicCache())


def our_cache(model: WhisperForConditionalGeneration, batch_size: int) -> Cache:
    return build_static_cache(model, batch_size, SLOTS)


def our_cache_not_yet_allocated(model: WhisperForConditionalGeneration, batch_size: int) -> Cache:
    return StaticEncoderDecoderCache(model.config.decoder_layers, SLOTS, FRAMES, model.device)


CACHES = (dynamic_cache, stock_static_cache, mixed_cache, our_cache, our_cache_not_yet_allocated)


@torch.no_grad()
def decode(
    model: WhisperForConditionalGeneration,
    make_cache: Callable[[WhisperForConditionalGeneration, int], Cache] | None,
    chunks: tuple[int, ...] = (3, 1, 1, 1),
    mask: torch.Tensor | None = None,
    batch_size: int = 2,
    **kwargs: Any,
) -> torch.Tensor:
    """Logits (B, sum of chunks, vocabulary) of `TOKENS`, other ones in each row, fed a chunk at a time.

    With a mask (B, sum of chunks): of the unmasked tokens alone.
    """
    model.eval()
    rows = [[(token + 7 * row) % TEXT for token in TOKENS] for row in range(batch_size)]
    ids = torch.tensor(rows, device=model.device)[:, : sum(chunks)]
    features = mel(batch_size, model.device).to(model.dtype)
    encoded = model.model.encoder(features)
    cache = None if make_cache is None else make_cache(model, batch_size)
    logits, start = [], 0
    for chunk in chunks:
        end = start + chunk
        logits.append(
            model(
                encoder_outputs=encoded,
                decoder_input_ids=ids[:, 0 if cache is None else start : end],
                decoder_attention_mask=None if mask is None else mask[:, :end],
                past_key_values=cache,
                use_cache=cache is not None,
                **kwargs,
            ).logits[:, -chunk:]
        )
        start = end
    logits = torch.cat(logits, dim=1)
    return logits if mask is None else logits[mask.bool()]  # what follows from padding alone has no meaning


def assert_decodes_as_stock(
    model: WhisperForConditionalGeneration,
    plug_in: Callable[[WhisperForConditionalGeneration], WhisperForConditionalGeneration],
    make_cache: Callable[[WhisperForConditionalGeneration, int], Cache] | None,
    **kwargs: Any,
) -> None:
    """Compared with stock's own dynamic cache: each token's logits must not depend on how keys and values are kept."""
    stock = decode(model, dynamic_cache, **kwargs)
    exact = decode(copy.deepcopy(model).double(), dynamic_cache, **kwargs)
    assert_same(decode(plug_in(copy.deepcopy(model)), make_cache, **kwargs), stock, exact)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """On a GPU, the backward passes of some PyTorch ops differ from run to run unless asked not to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):  # the backward pass of the others adds in any order, with a warning only
        yield
    torch.use_deterministic_algorithms(False)


class TestKernels:
    """The whole way down to the kernels, in Triton's interpreter where there is no GPU: so only few tokens."""

    def test_a_module_with_our_cache(self, device: torch.device, calls: Counter[str]) -> None:
        assert_decodes_as_stock(tiny_whisper(device), accelerate, our_cache, chunks=(2, 1, 1))
        assert calls == {"append_attention": 2 * 2, "decode_attention": 2 * 2}  # two steps of two layers

    @pytest.mark.parametrize("make_cache", [dynamic_cache, stock_static_cache, our_cache])
    def test_by_name(self, device: torch.device, calls: Counter[str], make_cache: Callable) -> None:
        assert_decodes_as_stock(tiny_whisper(device), by_name, make_cache, chunks=(2, 1), batch_size=1)
        assert calls == {"decode_attention": 2 * 2}  # self and cross in each of two layers


@pytest.mark.usefixtures("reference_kernels")
class TestAgainstStock:
    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    @pytest.mark.parametrize("make_cache", [None, *CACHES])
    def test_a_prompt_and_steps(self, device: torch.device, plug_in: Callable, make_cache: Callable | None) -> None:
        assert_decodes_as_stock(tiny_whisper(device), plug_in, make_cache)

    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    @pytest.mark.parametrize("make_cache", CACHES)
    def test_steps_from_the_first_token_on(self, device: torch.device, plug_in: Callable, make_cache: Callable) -> None:
        """A prompt of one token meets a cache that is empty, and perhaps not allocated."""
        assert_decodes_as_stock(tiny_whisper(device), plug_in, make_cache, chunks=(1, 1, 1))

    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    @pytest.mark.parametrize("make_cache", CACHES)
    def test_several_tokens_at_once_on_a_cache_in_use(
        self, device: torch.device, plug_in: Callable, make_cache: Callable
    ) -> None:
        assert_decodes_as_stock(tiny_whisper(device), plug_in, make_cache, chunks=(2, 3, 1, 1))

    @pytest.mark.parametrize("make_cache", [our_cache, our_cache_not_yet_allocated])
    @pytest.mark.parametrize("chunks", [(3, 1, 1, 1), (1, 1, 1), (2, 3, 1)])
    @pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
    def test_a_stock_model_with_our_cache(
        self, device: torch.device, attn_implementation: str, chunks: tuple[int, ...], make_cache: Callable
    ) -> None:
        model = tiny_whisper(device, attn_implementation=attn_implementation)
        assert_decodes_as_stock(model, lambda model: model, make_cache, chunks=chunks)

    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, device: torch.device, plug_in: Callable, dtype: torch.dtype) -> None:
        assert_decodes_as_stock(tiny_whisper(device, dtype=dtype), plug_in, our_cache)

    @pytest.mark.parametrize("make_cache", CACHES)
    def test_a_model_loaded_eager(self, device: torch.device, make_cache: Callable) -> None:
        assert_decodes_as_stock(tiny_whisper(device, attn_implementation="eager"), accelerate, make_cache)

    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    def test_the_encoder(self, device: torch.device, plug_in: Callable) -> None:
        model = tiny_whisper(device)

        @torch.no_grad()
        def encode(model: WhisperForConditionalGeneration) -> torch.Tensor:
            return model.model.encoder(mel(2, device).to(model.dtype)).last_hidden_state

        stock, exact = encode(model), encode(copy.deepcopy(model).double())
        assert_same(encode(plug_in(model)), stock, exact)

    def test_a_decoder_alone_by_name(self, device: torch.device) -> None:
        """`WhisperForCausalLM`, the assistant of speculative decoding, without an encoder."""
        model = WhisperForCausalLM(tiny_whisper(device).config).to(device).eval()
        ids = torch.tensor([TOKENS], device=device)

        @torch.no_grad()
        def run(model: WhisperForCausalLM) -> torch.Tensor:
            prompt = model(ids[:, :3], use_cache=True)
            steps = [model(ids[:, i : i + 1], past_key_values=prompt.past_key_values).logits for i in range(3, 6)]
            return torch.cat([prompt.logits, *steps], dim=1)

        stock, exact = run(model), run(copy.deepcopy(model).double())
        model.set_attn_implementation("whisper_triton")
        assert_same(run(model), stock, exact)

    def test_slots_past_the_position_are_never_read(self, device: torch.device) -> None:
        for plug_in in (accelerate, by_name):

            def poisoned(model: WhisperForConditionalGeneration, batch_size: int) -> Cache:
                cache = our_cache(model, batch_size)
                for layer in cache.self_attention_cache.layers:
                    layer.keys.fill_(torch.nan)
                    layer.values.fill_(torch.nan)
                return cache

            assert_decodes_as_stock(tiny_whisper(device), plug_in, poisoned)


class TestByName:
    def test_attention_and_mask_are_both_known_to_transformers(self) -> None:
        """With the attention alone, transformers would hand it no mask at all."""
        assert ALL_ATTENTION_FUNCTIONS["whisper_triton"] is attention.attention_forward
        assert ALL_MASK_ATTENTION_FUNCTIONS["whisper_triton"] is attention.attention_mask

    @pytest.mark.usefixtures("reference_kernels")
    def test_from_pretrained_takes_the_name(self, device: torch.device, tmp_path: Path, calls: Counter[str]) -> None:
        stock = tiny_whisper(device)
        stock.save_pretrained(tmp_path)
        model = WhisperForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="whisper_triton").to(device)
        assert model.config._attn_implementation == "whisper_triton"
        features = mel(2, device)
        tokens = model.generate(features, max_new_tokens=10)
        assert tokens.tolist() == stock.generate(features, max_new_tokens=10).tolist()
        assert calls["decode_attention"] == 2 * 2 * 9  # self and cross, two layers, all tokens but the prompt's

    @pytest.mark.usefixtures("reference_kernels")
    def test_generate_with_a_static_cache(self, device: torch.device, calls: Counter[str]) -> None:
        model, features = tiny_whisper(device), mel(2, device)
        kwargs = {"max_new_tokens": 10, "cache_implementation": "static", "disable_compile": True}
        stock = model.generate(features, **kwargs).tolist()
        assert by_name(model).generate(features, **kwargs).tolist() == stock
        assert calls["decode_attention"] == 2 * 2 * 9


@pytest.mark.usefixtures("reference_kernels")
class TestPaddingMask:
    LEFT = ((1, 1, 1, 1, 1, 1), (0, 0, 1, 1, 1, 1))
    WITHIN = ((1, 1, 1, 1, 1, 1), (1, 0, 1, 1, 0, 1))
    NONE = ((1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1))

    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    @pytest.mark.parametrize("make_cache", [None, *CACHES])
    @pytest.mark.parametrize("mask", [LEFT, WITHIN, NONE], ids=["left", "within", "none"])
    def test_a_batch(
        self, device: torch.device, plug_in: Callable, make_cache: Callable | None, mask: tuple[tuple[int, ...], ...]
    ) -> None:
        model, mask = tiny_whisper(device), torch.tensor(mask, device=device)
        assert_decodes_as_stock(model, plug_in, make_cache, mask=mask)
        if not mask.all():
            unmasked = decode(model, dynamic_cache)[mask.bool()]
            assert not torch.allclose(decode(model, dynamic_cache, mask=mask), unmasked)  # the mask matters

    def test_a_batch_in_a_model_loaded_eager(self, device: torch.device) -> None:
        mask = torch.tensor(self.LEFT, device=device)
        assert_decodes_as_stock(tiny_whisper(device, attn_implementation="eager"), accelerate, our_cache, mask=mask)


def copied_in(run: Callable[[], Any]) -> list[str]:
    """The ops in `run` that fill a new 4-d tensor of floats from others without computing, that is, copies."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            result = func(*args, **(kwargs or {}))
            is_large = isinstance(result, torch.Tensor) and result.dim() == 4 and result.is_floating_point()
            if is_large and func.name().split(".")[0] in {
                f"aten::{op}" for op in ("clone", "cat", "copy_", "_to_copy", "index_copy_")
            }:
                copies.append(func.name())
            return result

    copies: list[str] = []
    with torch.no_grad(), Watch():
        run()
    return copies


@pytest.mark.usefixtures("reference_kernels")
class TestCopies:
    def copies(self, model: WhisperForConditionalGeneration, make_cache: Callable) -> tuple[list[str], list[str]]:
        """In a prompt, and in a step."""
        cache = make_cache(model, 2)
        with torch.no_grad():
            encoded = model.model.encoder(mel(2, model.device))

        def run(tokens: int) -> Callable[[], Any]:
            ids = torch.full((2, tokens), 5, device=model.device)
            return lambda: model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache)

        return copied_in(run(3)), copied_in(run(1))

    def test_the_decode_path_copies_no_states(self, device: torch.device) -> None:
        assert self.copies(accelerate(tiny_whisper(device)), our_cache) == ([], [])

    def test_stocks_does(self, device: torch.device) -> None:
        """So the test above can fail."""
        for make_cache in (dynamic_cache, stock_static_cache):
            prompt, step = self.copies(tiny_whisper(device), make_cache)
            assert prompt
            assert step


@pytest.mark.usefixtures("reference_kernels")
class TestOutputAttentions:
    KEYS = ("encoder_attentions", "decoder_attentions", "cross_attentions")

    @torch.no_grad()
    def run(self, model: WhisperForConditionalGeneration, **kwargs: Any) -> dict[str, Any]:
        ids = torch.tensor([TOKENS[:4]] * 2, device=model.device)
        outputs = model(mel(2, model.device).to(model.dtype), decoder_input_ids=ids, use_cache=False, **kwargs)
        return {key: outputs[key] for key in ("logits", *self.KEYS) if key in outputs}

    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    def test_the_weights_are_stock_eagers(self, device: torch.device, plug_in: Callable) -> None:
        model = tiny_whisper(device, attn_implementation="eager")
        stock = self.run(model, output_attentions=True)
        exact = self.run(copy.deepcopy(model).double(), output_attentions=True)
        assert [len(stock[key]) for key in self.KEYS] == [3, 2, 2]
        assert_same(self.run(plug_in(model), output_attentions=True), stock, exact)

    def test_a_model_loaded_with_sdpa_has_none_as_in_stock(self, device: torch.device) -> None:
        model = tiny_whisper(device)
        stock = self.run(model, output_attentions=True)
        exact = self.run(copy.deepcopy(model).double(), output_attentions=True)
        assert not any(stock.get(key) for key in self.KEYS)
        assert_same(self.run(accelerate(model), output_attentions=True), stock, exact)

    def test_the_configs_flag_does_the_same(self, device: torch.device) -> None:
        model = tiny_whisper(device, attn_implementation="eager")
        model.config.output_attentions = True
        stock, exact = self.run(model), self.run(copy.deepcopy(model).double())
        assert [len(stock[key]) for key in self.KEYS] == [3, 2, 2]
        assert_same(self.run(accelerate(model)), stock, exact)

    @pytest.mark.parametrize("make_cache", CACHES)
    def test_with_a_cache(self, device: torch.device, make_cache: Callable) -> None:
        model = tiny_whisper(device, attn_implementation="eager")
        assert_decodes_as_stock(model, accelerate, make_cache, output_attentions=True)

    def test_in_generate(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, attn_implementation="eager"), mel(2, device)
        kwargs = {"max_new_tokens": 6, "output_attentions": True, "return_dict_in_generate": True}
        stock = model.generate(features, **kwargs)
        exact = copy.deepcopy(model).double().generate(features.double(), **kwargs)
        assert len(stock.cross_attentions) == 6
        assert_same(accelerate(model).generate(features, **kwargs), stock, exact)


@pytest.mark.usefixtures("reference_kernels", "deterministic")
class TestTraining:
    LABELS = ((7, 9, 23, 41, EOS), (3, 88, 12, EOS, -100))

    def gradients(
        self, model: WhisperForConditionalGeneration, labels: tuple = LABELS, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Of all parameters that have one, and the loss."""
        model.train()
        torch.manual_seed(0)
        features = mel(len(labels), model.device).to(model.dtype)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):  # its convolutions otherwise add in any order
            loss = model(features, labels=torch.tensor(labels, device=model.device), **kwargs).loss
            loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return found | {"loss": loss.detach()}

    def assert_trains_as_stock(self, model: WhisperForConditionalGeneration, plug_in: Callable, **kwargs: Any) -> None:
        """Bit by bit: the stock path is stock's own code on the same numbers."""
        ours, stock = plug_in(copy.deepcopy(model)), copy.deepcopy(model)
        found, wanted = self.gradients(ours, **kwargs), self.gradients(stock, **kwargs)
        assert found.keys() == wanted.keys()
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained | {"loss"} == wanted.keys()
        for name, gradient in wanted.items():
            # The weight of a single key is 1 whatever it is.
            assert gradient.any() or (
                len(kwargs.get("labels", self.LABELS)[0]) == 1 and "decoder" in name and "self_attn.k_proj" in name
            )
            assert torch.equal(found[name], gradient), name

    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    @pytest.mark.parametrize("use_cache", [False, True])
    def test_gradients_with_output_attentions(self, device: torch.device, plug_in: Callable, use_cache: bool) -> None:
        model = tiny_whisper(device, attn_implementation="eager")
        self.assert_trains_as_stock(model, plug_in, output_attentions=True, use_cache=use_cache)

    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    def test_gradients(self, device: torch.device, plug_in: Callable) -> None:
        self.assert_trains_as_stock(tiny_whisper(device), plug_in)

    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    def test_gradients_with_dropout(self, device: torch.device, plug_in: Callable) -> None:
        """The random numbers drawn are stock's too, one for one."""
        model = tiny_whisper(device, attention_dropout=0.3, dropout=0.1, activation_dropout=0.1)
        self.assert_trains_as_stock(model, plug_in)

    @pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    def test_gradients_with_checkpointing(self, device: torch.device, plug_in: Callable) -> None:
        model = tiny_whisper(device)
        model.gradient_checkpointing_enable()
        self.assert_trains_as_stock(model, plug_in, use_cache=False)

    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    @pytest.mark.parametrize("trained", ["encoder.", "k_proj", "v_proj", "layers.0.encoder_attn.v_proj"])
    @pytest.mark.parametrize("labels", [((7,), (3,)), LABELS], ids=["one token", "five tokens"])
    def test_gradients_where_only_some_parameters_train(
        self, device: torch.device, plug_in: Callable, trained: str, labels: tuple
    ) -> None:
        """Then keys and values may need a gradient where the query needs none."""
        model = tiny_whisper(device)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = trained in name and parameter.requires_grad
        self.assert_trains_as_stock(model, plug_in, labels=labels)

    @pytest.mark.parametrize("tokens", [1, 3])
    def test_gradients_through_a_static_cache(self, device: torch.device, tokens: int) -> None:
        def run(model: WhisperForConditionalGeneration, cache: Cache) -> dict[str, torch.Tensor]:
            ids = torch.tensor([TOKENS[:tokens]], device=device)
            logits = model(mel(1, device).to(model.dtype), decoder_input_ids=ids, past_key_values=cache).logits
            logits.square().sum().backward()
            return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

        model = tiny_whisper(device)
        ours = accelerate(copy.deepcopy(model))
        exact = copy.deepcopy(model).double()
        wanted = run(model, stock_static_cache(model, 1))
        assert all(name in wanted for name, parameter in model.named_parameters() if parameter.requires_grad)
        assert_same(run(ours, our_cache(ours, 1)), wanted, run(exact, stock_static_cache(exact, 1)))

    @torch.enable_grad()
    def test_a_cache_may_need_gradients_where_nothing_else_does(self, device: torch.device) -> None:
        def run(model: WhisperForConditionalGeneration, cache: Cache) -> torch.Tensor:
            encoded = model.model.encoder(mel(1, device).to(model.dtype))
            for i, ids in enumerate((TOKENS[:3], TOKENS[3:4])):
                model.requires_grad_(i == 0)
                ids = torch.tensor([ids], device=device)
                encoded.last_hidden_state = encoded.last_hidden_state.detach()
                out = model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache)
            assert out.logits.requires_grad
            return out.logits.detach()

        model = tiny_whisper(device)
        ours, exact = accelerate(copy.deepcopy(model)), copy.deepcopy(model).double()
        caches = our_cache(ours, 1), stock_static_cache(model, 1), stock_static_cache(exact, 1)
        assert_same(run(ours, caches[0]), run(model, caches[1]), run(exact, caches[2]))

    def test_dropout_in_a_model_without_gradients(self, device: torch.device) -> None:
        def run(model: WhisperForConditionalGeneration) -> torch.Tensor:
            model.train()
            torch.manual_seed(0)
            ids = torch.tensor([TOKENS[:4]], device=device)
            with torch.no_grad():
                return model(mel(1, device), decoder_input_ids=ids).logits

        model = tiny_whisper(device, attention_dropout=0.5)
        stock = run(model)
        assert not torch.equal(run(tiny_whisper(device)), stock)  # the dropout matters
        assert torch.equal(run(accelerate(model)), stock)


def said_of_generate(plug_in: Callable, reason: str) -> list[str]:
    """What the log says of a `generate` that neither the attention nor, of an accelerated model, the caches cover."""
    caches = [f"generate runs over stock's cache, one kernel at a time: {reason}"] if plug_in is accelerate else []
    return [f"attention takes the stock path: {reason}", *caches]


@pytest.mark.usefixtures("reference_kernels")
class TestFallbacks:
    """Each says so once in the log, however many layers and calls it concerns."""

    def test_nothing_is_logged_where_the_kernels_serve(self, device: torch.device, fallbacks: Callable) -> None:
        for plug_in in (accelerate, by_name):
            for make_cache in (None, *CACHES):
                decode(plug_in(tiny_whisper(device)), make_cache)
            plug_in(tiny_whisper(device)).generate(mel(2, device), max_new_tokens=5)
        assert fallbacks() == []

    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    def test_a_padding_mask(self, device: torch.device, plug_in: Callable, fallbacks: Callable) -> None:
        mask = torch.tensor(TestPaddingMask.LEFT, device=device)
        for _ in range(2):
            decode(plug_in(tiny_whisper(device)), our_cache, mask=mask)
        assert fallbacks() == ["attention takes the stock path: a padding mask over the cache"]

    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    def test_output_attentions(self, device: torch.device, plug_in: Callable, fallbacks: Callable) -> None:
        for _ in range(2):
            decode(plug_in(tiny_whisper(device)), our_cache, output_attentions=True)
        assert fallbacks() == ["attention takes the stock path: output_attentions=True: the kernels never hold the weights"]

    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    def test_gradients(self, device: torch.device, plug_in: Callable, fallbacks: Callable) -> None:
        model = plug_in(tiny_whisper(device))
        for _ in range(2):
            model(mel(1, device), labels=torch.tensor([[5, 7]], device=device)).loss.backward()
        assert fallbacks() == ["attention takes the stock path: gradients: the kernels have no backward pass"]

    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    def test_dropout(self, device: torch.device, plug_in: Callable, fallbacks: Callable) -> None:
        model = plug_in(tiny_whisper(device, attention_dropout=0.1)).train()
        for _ in range(2):
            model(mel(1, device), labels=torch.tensor([[5, 7]], device=device))
        assert fallbacks() == ["attention takes the stock path: dropout"]

    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    @pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float64, 32), (torch.float32, 48)])
    def test_dtypes_and_head_dims_that_no_kernel_takes(
        self, device: torch.device, plug_in: Callable, dtype: torch.dtype, head_dim: int, fallbacks: Callable
    ) -> None:
        model, features = tiny_whisper(device, seed=3, d_model=2 * head_dim, dtype=dtype), mel(2, device).to(dtype)
        kwargs = {"max_new_tokens": 10, "return_dict_in_generate": True, "output_scores": True}
        stock = model.generate(features, **kwargs)
        plug_in(model)
        for _ in range(2):
            ours = model.generate(features, **kwargs)
            assert ours.sequences.tolist() == stock.sequences.tolist()
            for found, wanted in zip(ours.scores, stock.scores, strict=True):
                torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert fallbacks() == said_of_generate(plug_in, f"{dtype} with head dim {head_dim}")

    @pytest.mark.parametrize("name", ["head_mask", "position_bias"])
    def test_a_head_mask_or_position_bias(self, device: torch.device, name: str, fallbacks: Callable) -> None:
        model = tiny_whisper(device)
        module: WhisperAttention = model.model.decoder.layers[0].self_attn
        states = torch.randn(2, 4, model.config.d_model, device=device)
        extra = {name: torch.randn(1, 2, 4, 4, device=device)}
        with torch.no_grad():
            stock = module(states, **extra)[0]
            accelerate(model)
            for _ in range(2):
                assert torch.equal(module(states, **extra)[0], stock)
        assert fallbacks() == ["attention takes the stock path: a head mask or position bias"]

    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    def test_autocast(self, device: torch.device, plug_in: Callable, fallbacks: Callable) -> None:
        """The states then have another dtype than the model, for which a static cache was allocated."""
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        results = []
        for prepare in (lambda model: model, plug_in):
            prepare(model)
            with torch.autocast(device.type, torch.bfloat16):
                results.append(model.generate(features, max_new_tokens=10).tolist())
        assert results[0] == results[1]
        reason = "autocast: states have another dtype than the model and its caches"
        assert fallbacks() == said_of_generate(plug_in, reason)

    def test_one_sequence_and_the_encoders_output_of_two(self, device: torch.device) -> None:
        """Stock then lines the frames up as if they were one long recording."""
        model = tiny_whisper(device)

        @torch.no_grad()
        def run(model: WhisperForConditionalGeneration) -> torch.Tensor:
            encoded = model.model.encoder(mel(2, device).to(model.dtype))
            ids = torch.tensor([TOKENS[:4]], device=device)
            return model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits

        stock, exact = run(model), run(copy.deepcopy(model).double())
        assert_same(run(accelerate(model)), stock, exact)

    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    def test_submodules_run_once_a_forward_pass(self, device: torch.device, plug_in: Callable) -> None:
        """Also on the stock path: a hook or an adapter's dropout would else act twice."""
        model = plug_in(tiny_whisper(device))
        runs: list[int] = []
        model.model.decoder.layers[0].self_attn.q_proj.register_forward_hook(lambda *args: runs.append(1))
        decode(model, our_cache, mask=torch.tensor(TestPaddingMask.LEFT, device=device))
        assert len(runs) == 4


@pytest.mark.parametrize("kwargs", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_float64_does_not_reach_a_kernel(device: torch.device, kwargs: dict[str, Any]) -> None:
    """The references would take it; the kernels, in the interpreter too, say no."""
    model, features = tiny_whisper(device, seed=3, dtype=torch.float64), mel(1, device).double()
    stock = model.generate(features, max_new_tokens=5, **kwargs).tolist()
    assert accelerate(model).generate(features, max_new_tokens=5, **kwargs).tolist() == stock
