"""The static caches: their size, addresses and positions, what is computed once, and what does not fit."""

import pytest
import torch
from transformers.cache_utils import StaticLayer
from whisper_models import FRAMES, SOT, mel, tiny_whisper

from whisper_triton import StaticEncoderDecoderCache, accelerate, build_static_cache
from whisper_triton.cache import CrossAttentionLayer, SelfAttentionLayer

pytest_plugins = ["whisper_fixtures"]

B, H, S, D = 2, 2, 8, 32  # of the layers below; H and D are the tiny models'


@pytest.fixture(params=["kernels", "reference"])
def kernels_and_reference(request: pytest.FixtureRequest) -> None:
    """Runs a test on the kernels, and on the PyTorch references that serve where there is no GPU."""
    if request.param == "reference":
        request.getfixturevalue("reference_kernels")


def states(device: torch.device, tokens: int, batch_size: int = B) -> torch.Tensor:
    """(B, H, T, D) views of what a projection returns, (B, T, H * D)."""
    return torch.randn(batch_size, tokens, H * D, device=device).view(batch_size, tokens, H, D).transpose(1, 2)


def self_layers(device: torch.device, count: int = 2) -> list[SelfAttentionLayer]:
    return StaticEncoderDecoderCache(count, S, FRAMES, device).self_attention_cache.layers


def all_layers(cache: StaticEncoderDecoderCache) -> list[StaticLayer]:
    return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]


def addresses(cache: StaticEncoderDecoderCache) -> list[int]:
    return [t.data_ptr() for layer in all_layers(cache) for t in (layer.keys, layer.values, layer.cumulative_length)]


def contents(cache: StaticEncoderDecoderCache) -> list[torch.Tensor]:
    return [tensor.clone() for layer in all_layers(cache) for tensor in (layer.keys, layer.values)]


class Decoding:
    """An accelerated tiny model, one window's encoder output, and `step` to decode given tokens with a cache."""

    def __init__(self, device: torch.device, batch_size: int = 1, seed: int = 1) -> None:
        self.device = device
        self.model = accelerate(tiny_whisper(device, seed=3))
        with torch.no_grad():
            self.encoder_outputs = self.model.model.encoder(mel(batch_size, device, seed=seed))
        self.batch_size = batch_size

    @torch.no_grad()
    def step(self, cache: StaticEncoderDecoderCache, *tokens: int) -> torch.Tensor:
        """Logits of the last of `tokens`, the same ones in each row."""
        ids = torch.tensor([tokens] * self.batch_size, device=self.device)
        return self.model(
            encoder_outputs=self.encoder_outputs, decoder_input_ids=ids, past_key_values=cache, use_cache=True
        ).logits[:, -1]


class TestSize:
    def test_there_is_a_layer_for_each_of_the_decoders(self, device: torch.device) -> None:
        """As in turbo and distil, whose `num_hidden_layers` is the encoder's."""
        model = tiny_whisper(device, encoder_layers=3, decoder_layers=2)
        assert model.config.num_hidden_layers == 3
        cache = build_static_cache(model, 4, max_cache_len=20)
        assert [tuple(layer.keys.shape) for layer in all_layers(cache)] == [(4, H, 20, D)] * 2 + [(4, H, FRAMES, D)] * 2
        assert [tuple(layer.values.shape) for layer in all_layers(cache)] == [(4, H, 20, D)] * 2 + [(4, H, FRAMES, D)] * 2

    def test_heads_dtype_and_device_are_the_decoders(self, device: torch.device) -> None:
        model = tiny_whisper(device, dtype=torch.float16, d_model=160, encoder_attention_heads=5, decoder_attention_heads=2)
        for layer in all_layers(build_static_cache(model, 1)):
            assert layer.keys.shape[1::2] == (2, 80)
            assert {t.dtype for t in (layer.keys, layer.values)} == {torch.float16}
            assert {t.device.type for t in (layer.keys, layer.values, layer.cumulative_length)} == {device.type}

    def test_by_default_it_holds_all_the_model_can_take(self, device: torch.device) -> None:
        model = tiny_whisper(device)
        cache = build_static_cache(model, 1)
        assert cache.get_max_length() == model.config.max_target_positions == 64
        assert cache.cross_attention_cache.get_max_length() == model.config.max_source_positions == FRAMES

    @pytest.mark.parametrize("sizes", [(0, 8, 8), (1, 0, 8), (1, 8, 0), (-1, 8, 8)])
    def test_sizes_below_one_are_refused(self, sizes: tuple[int, int, int]) -> None:
        with pytest.raises(ValueError, match="at least 1, got batch_size="):
            build_static_cache(tiny_whisper(), *sizes)

    @pytest.mark.parametrize("is_compileable", [False, True])
    def test_generate_compiles_over_it_only_if_told_so(self, is_compileable: bool) -> None:
        assert build_static_cache(tiny_whisper(), 1, is_compileable=is_compileable).is_compileable is is_compileable


@pytest.mark.usefixtures("kernels_and_reference")
class TestUpdate:
    def test_it_writes_what_stocks_layer_writes(self, device: torch.device) -> None:
        """Exactly, whatever the layout of the new states; and the untouched slots stay zero."""
        ours, last = self_layers(device)
        stock = StaticLayer(S)
        for tokens in (3, 1, 2):
            key, value = states(device, tokens), states(device, tokens).contiguous()
            returned = ours.update(key, value)
            last.update(key, value)
            stock.update(key, value)
            assert torch.equal(returned[0], stock.keys)
            assert torch.equal(returned[1], stock.values)
            assert returned[0] is ours.keys
            assert returned[1] is ours.values
            assert torch.equal(ours.get_seq_length(), stock.get_seq_length())

    def test_the_cross_layer_is_overwritten_whole_each_time(self, device: torch.device) -> None:
        layer = CrossAttentionLayer(S)
        for _ in range(2):
            key, value = states(device, S), states(device, S)
            layer.update(key, value)
            assert torch.equal(layer.keys, key)
            assert torch.equal(layer.values, value)
            assert layer.get_seq_length().item() == S

    def test_the_cross_layer_takes_the_encoders_number_of_frames_only(self, device: torch.device) -> None:
        layer = CrossAttentionLayer(S)
        with pytest.raises(ValueError, match=f"has {S} slots, the encoder gave {S - 1} frames"):
            layer.update(states(device, S - 1), states(device, S - 1))

    def test_a_write_past_the_last_slot_is_refused_and_changes_nothing(self, device: torch.device) -> None:
        layers = self_layers(device)
        for layer in layers:
            layer.update(states(device, 6), states(device, 6))
        before = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
        with pytest.raises(ValueError, match="the cache has 8 slots, 6 of them in use: 3 more do not fit"):
            layers[0].update(states(device, 3), states(device, 3))
        for layer, (keys, values) in zip(layers, before, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)
            assert layer.get_seq_length().item() == 6
        for layer in layers:  # and what does fit is still welcome
            layer.update(states(device, 2), states(device, 2))
        assert layers[0].get_seq_length().item() == S

    def test_a_write_past_the_last_slot_that_the_host_cannot_see_is_dropped_on_the_device(self, device: torch.device) -> None:
        """As after a step replayed from a graph: the position is ahead of what the host has counted."""
        layer = self_layers(device, count=1)[0]
        layer.update(states(device, 2), states(device, 2))
        layer.cumulative_length.fill_(S - 1)
        expected_keys, expected_values = layer.keys.clone(), layer.values.clone()
        key, value = states(device, 3), states(device, 3)
        layer.update(key, value)  # one token in the last slot, two behind it
        expected_keys[:, :, S - 1], expected_values[:, :, S - 1] = key[:, :, 0], value[:, :, 0]
        assert torch.equal(layer.keys, expected_keys)
        assert torch.equal(layer.values, expected_values)
        layer.update(states(device, 1), states(device, 1))
        assert torch.equal(layer.keys, expected_keys)
        assert torch.equal(layer.values, expected_values)


class TestPosition:
    def test_all_layers_share_one_that_the_last_layer_advances(self, device: torch.device) -> None:
        first, last = self_layers(device)
        assert first.cumulative_length is last.cumulative_length
        first.update(states(device, 3), states(device, 3))
        assert first.get_seq_length().item() == 0
        last.update(states(device, 3), states(device, 3))
        assert first.get_seq_length().item() == 3
        assert first.cumulative_length is last.cumulative_length

    def test_tokens_taken_back_are_taken_back_once(self, device: torch.device) -> None:
        """By `crop`, which a cache calls of each of its layers."""
        decoding = Decoding(device)
        cache = build_static_cache(decoding.model, 1, max_cache_len=20)
        decoding.step(cache, 5, 6)
        wanted = [decoding.step(cache, token) for token in (7, 8)]
        part = cache.self_attention_cache
        part.crop(-2), part.crop(0)
        assert (cache.get_seq_length().item(), part.layers[0].host_length) == (2, 2)
        assert all(torch.equal(decoding.step(cache, token), logits) for token, logits in zip((7, 8), wanted, strict=True))
        with pytest.raises(ValueError, match="with a minus, got 3"):
            part.crop(3)
        assert cache.get_seq_length() == 4

    def test_states_on_another_device_are_refused(self) -> None:
        """Each layer would else get a position of its own, which only the last layer's would leave."""
        layer = self_layers(torch.device("meta"))[0]
        with pytest.raises(ValueError, match="positions are on meta, the states on cpu"):
            layer.update(states(torch.device("cpu"), 1), states(torch.device("cpu"), 1))

    def test_the_sequence_length_is_read_on_the_device(self, device: torch.device) -> None:
        decoding = Decoding(device)
        cache = build_static_cache(decoding.model, 1)
        lengths = [cache.get_seq_length().item()]
        for tokens in ((SOT, 5, 9), (7,), (4,)):
            decoding.step(cache, *tokens)
            lengths.append(cache.get_seq_length().item())
        assert lengths == [0, 3, 4, 5]
        assert cache.get_seq_length().device.type == device.type


@pytest.mark.usefixtures("reference_kernels")
class TestCrossStates:
    def count_projections(self, decoding: Decoding) -> dict[tuple[int, str], int]:
        """How often the cross-attention of each layer has computed its keys and its values, from now on."""
        counts: dict[tuple[int, str], int] = {}
        for i, layer in enumerate(decoding.model.model.decoder.layers):
            for name in ("k_proj", "v_proj"):
                counts[i, name] = 0

                def count(*args: object, key: tuple[int, str] = (i, name)) -> None:
                    counts[key] += 1

                getattr(layer.encoder_attn, name).register_forward_hook(count)
        return counts

    def test_they_are_computed_once(self, device: torch.device) -> None:
        decoding = Decoding(device)
        counts = self.count_projections(decoding)
        cache = build_static_cache(decoding.model, 1)
        assert cache.is_updated == {0: False, 1: False}
        for tokens in ((SOT, 5), (7,), (4,)):
            decoding.step(cache, *tokens)
            assert cache.is_updated == {0: True, 1: True}
        assert set(counts.values()) == {1}

    def test_they_are_computed_once_a_window_in_generate(self, device: torch.device) -> None:
        decoding = Decoding(device)
        counts = self.count_projections(decoding)
        decoding.model.generate(mel(1, device), max_new_tokens=10)
        assert set(counts.values()) == {1}

    def test_they_are_computed_again_after_reset(self, device: torch.device) -> None:
        decoding, other = Decoding(device), Decoding(device, seed=2)
        counts = self.count_projections(other)
        cache = build_static_cache(decoding.model, 1)
        decoding.step(cache, SOT, 5)
        cache.reset()
        assert cache.is_updated == {0: False, 1: False}
        logits = other.step(cache, SOT, 5)
        assert set(counts.values()) == {1}
        assert torch.equal(logits, other.step(build_static_cache(other.model, 1), SOT, 5))

    def test_the_flag_is_a_layers_own(self, device: torch.device) -> None:
        decoding = Decoding(device)
        counts = self.count_projections(decoding)
        cache = build_static_cache(decoding.model, 1)
        decoding.step(cache, SOT, 5)
        cache.is_updated[1] = False
        decoding.step(cache, 7)
        assert counts == {(0, "k_proj"): 1, (0, "v_proj"): 1, (1, "k_proj"): 2, (1, "v_proj"): 2}


@pytest.mark.usefixtures("reference_kernels")
class TestInPlace:
    def test_addresses_outlive_windows_resets_and_reorderings(self, device: torch.device) -> None:
        decoding = Decoding(device, batch_size=2)
        cache = build_static_cache(decoding.model, 2)
        before = addresses(cache)
        for _ in range(2):
            decoding.step(cache, SOT, 5)
            decoding.step(cache, 7)
            cache.reorder_cache(torch.tensor([1, 1], device=device))
            cache.reset()
        assert addresses(cache) == before

    def test_tensors_are_marked_as_static_for_torch_compile(self, device: torch.device) -> None:
        for layer in all_layers(build_static_cache(tiny_whisper(device), 1)):
            for tensor in (layer.keys, layer.values, layer.cumulative_length):
                assert tensor._dynamo_static_input_type == "unguarded"

    def test_reset_forgets_everything(self, device: torch.device) -> None:
        decoding = Decoding(device)
        cache = build_static_cache(decoding.model, 1)
        expected = [decoding.step(cache, SOT, 5), decoding.step(cache, 7)]
        cache.reset()
        assert cache.get_seq_length().item() == 0
        assert not any(tensor.any() for layer in cache.self_attention_cache.layers for tensor in (layer.keys, layer.values))
        for _ in range(3):  # more than the slots would hold if the host's count were kept
            cache.reset()
            for _ in range(30):
                decoding.step(cache, 3)
        cache.reset()
        assert torch.equal(decoding.step(cache, SOT, 5), expected[0])
        assert torch.equal(decoding.step(cache, 7), expected[1])

    @pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 1], [0, 1, 2]])
    def test_reorder_cache_is_stocks_reordering_in_place(self, device: torch.device, order: list[int]) -> None:
        decoding = Decoding(device, batch_size=3)
        cache = build_static_cache(decoding.model, 3)
        decoding.step(cache, SOT, 5)
        for layer in cache.self_attention_cache.layers:  # equal rows would hide a wrong order
            layer.keys.copy_(torch.randn_like(layer.keys))
            layer.values.copy_(torch.randn_like(layer.values))
        before, expected = addresses(cache), [tensor[order] for tensor in contents(cache)]
        cache.reorder_cache(torch.tensor(order, device=device))
        assert addresses(cache) == before
        for found, wanted in zip(contents(cache), expected, strict=True):
            assert torch.equal(found, wanted)

    def test_reorder_cache_before_anything_is_written_does_nothing(self, device: torch.device) -> None:
        StaticEncoderDecoderCache(2, S, FRAMES, device).reorder_cache(torch.tensor([0, 0], device=device))


@pytest.mark.usefixtures("reference_kernels")
class TestLegacyFormat:
    def test_it_is_one_tuple_a_layer_of_the_slots_in_use(self, device: torch.device) -> None:
        decoding = Decoding(device)
        cache = build_static_cache(decoding.model, 1)
        decoding.step(cache, SOT, 5, 9)
        legacy = cache.to_legacy_cache()
        assert [[tuple(t.shape) for t in layer] for layer in legacy] == [
            [(1, H, 3, D), (1, H, 3, D), (1, H, FRAMES, D), (1, H, FRAMES, D)]
        ] * 2
        own, cross = cache.self_attention_cache.layers[1], cache.cross_attention_cache.layers[1]
        for found, wanted in zip(legacy[1], (own.keys[:, :, :3], own.values[:, :, :3], cross.keys, cross.values), strict=True):
            assert torch.equal(found, wanted)

    def test_a_cache_made_from_it_continues_alike_on_memory_of_its_own(self, device: torch.device) -> None:
        decoding = Decoding(device)
        cache = build_static_cache(decoding.model, 1)
        decoding.step(cache, SOT, 5, 9)
        copied = StaticEncoderDecoderCache.from_legacy_cache(cache.to_legacy_cache(), cache.get_max_length())
        assert copied.is_updated == {0: True, 1: True}
        assert not set(addresses(copied)) & set(addresses(cache))
        for token in (7, 4):
            assert torch.equal(decoding.step(copied, token), decoding.step(cache, token))
        for found, wanted in zip(contents(copied), contents(cache), strict=True):
            assert torch.equal(found, wanted)

    def test_one_that_holds_no_token_yet_continues_alike_too(self, device: torch.device) -> None:
        decoding = Decoding(device)
        cache = build_static_cache(decoding.model, 1)
        decoding.step(cache, SOT)
        cache.self_attention_cache.reset()  # the cross keys and values are there, as after a projection
        legacy = cache.to_legacy_cache()
        assert {tuple(t.shape) for layer in legacy for t in layer[:2]} == {(1, H, 0, D)}
        copied = StaticEncoderDecoderCache.from_legacy_cache(legacy, cache.get_max_length())
        assert copied.check_length() == 0
        for token in (SOT, 4):
            assert torch.equal(decoding.step(copied, token), decoding.step(cache, token))

    def test_a_cache_too_small_for_it_is_refused(self, device: torch.device) -> None:
        decoding = Decoding(device)
        cache = build_static_cache(decoding.model, 1)
        decoding.step(cache, SOT, 5, 9)
        with pytest.raises(ValueError, match="the cache has 2 slots, 0 of them in use: 3 more do not fit"):
            StaticEncoderDecoderCache.from_legacy_cache(cache.to_legacy_cache(), 2)

    @pytest.mark.parametrize("layers", [(), ((torch.zeros(1, H, 1, D),) * 2,)], ids=["no layers", "two tensors a layer"])
    def test_anything_else_is_refused(self, layers: tuple) -> None:
        with pytest.raises(ValueError, match="tuple of \\(self keys, self values, cross keys, cross values\\) a layer"):
            StaticEncoderDecoderCache.from_legacy_cache(layers, S)

    def test_a_cache_without_cross_states_has_none(self, device: torch.device) -> None:
        """Zeros would pass for keys and values that are computed already."""
        cache = build_static_cache(tiny_whisper(device), 1)
        with pytest.raises(ValueError, match="holds no cross keys and values yet"):
            cache.to_legacy_cache()


@pytest.mark.usefixtures("reference_kernels")
class TestThroughTheModel:
    @pytest.mark.parametrize("tokens", [1, 2])
    def test_a_token_past_the_last_slot_is_refused(self, device: torch.device, tokens: int) -> None:
        decoding = Decoding(device)
        cache = build_static_cache(decoding.model, 1, max_cache_len=4)
        decoding.step(cache, SOT, 5, 9)
        decoding.step(cache, 7)
        before = contents(cache)
        with pytest.raises(ValueError, match=f"the cache has 4 slots, 4 of them in use: {tokens} more do not fit"):
            decoding.step(cache, *[4] * tokens)
        assert cache.get_seq_length().item() == 4
        for found, wanted in zip(contents(cache), before, strict=True):
            assert torch.equal(found, wanted)

    def test_a_batch_of_another_size_is_refused(self, device: torch.device) -> None:
        decoding = Decoding(device, batch_size=2)
        with pytest.raises(ValueError, match=r"caches \(3, 2, 64, 32\) \(B, H, S, D\) do not fit keys \(2, 2, 2, 32\)"):
            decoding.step(build_static_cache(decoding.model, 3), SOT, 5)
