"""One decoding step: our captured chain of fused kernels against its floor and stock's compiled step, by model and batch.

    python benchmarks/decoder_step.py --model large-v3 --batch 1,2,4,8,16 --compile reduce-overhead
    whisper-triton bench step --model large-v3,turbo --batch 1,8

Random weights in the published shapes or a real checkpoint, position 64. Milliseconds of a graph replay; the floor is the bytes
a step must read (decoder weights, LM head, cross and self caches) over the bandwidth measured in the same run. `compiled` is
stock with its static cache, the step under `torch.compile(fullgraph=True)`, which replays a graph too: its calls follow
one another, so that what the host needs beside the GPU does not count unless it needs longer. Logits are checked first against
a float64 run of the stock modules: at most 1.25 times as far from it as the stock step in the same dtype (fp32: 2). `modules`
is what a batch of more than 32 has, beside the chain: the model's modules in the graph, whose linear layers are cuBLAS's.

The rows `step_links` say what the chain gains, a layer, when the launches of one link are left out of the captured step (the
links behind it then read whatever lies in memory), beside the floor of its bytes. Links overlap, which is what dependent
launch is for, so the gains need not add up to the step: each is what a link costs where it stands, not what it takes alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from transformers import StaticCache, WhisperForConditionalGeneration
from transformers.cache_utils import EncoderDecoderCache
from whisper_triton.benchmarks.harness import Place, Row, measure_on_cpu, time_device, time_graph
from whisper_triton.benchmarks.models import StepInput, check, check_logits, checked_rows, models_on, step_input
from whisper_triton.benchmarks.tasks import measure_named, parser_for

import whisper_triton
from whisper_triton import decoder, fused
from whisper_triton.cache import CACHE_NAME
from whisper_triton.decoder import DecoderStep

POSITION = 64
CROSS = "cross query and attention"  # which some launch together
LINKS = ("q/k/v", "self-attention", "self out", CROSS, "cross out", "fc1", "fc2")  # of a layer
MODES = ("reduce-overhead", "max-autotune", "none")


def step_bytes(model: WhisperForConditionalGeneration, step: DecoderStep) -> dict[str, int]:
    """What a step must read once, by link and in all layers: weights, the cross cache, the slots in use of the self cache.

    The input's embeddings are left out: a step reads a row of each.
    """
    own, cross = (part.layers for part in (step.cache.self_attention_cache, step.cache.cross_attention_cache))
    found = dict.fromkeys(LINKS, 0)
    for layer, of_self, of_cross in zip(model.model.decoder.layers, own, cross, strict=False):
        mine, other = layer.self_attn, layer.encoder_attn
        for link, modules in {
            "q/k/v": (layer.self_attn_layer_norm, mine.q_proj, mine.k_proj, mine.v_proj),
            "self out": (mine.out_proj,),
            CROSS: (layer.encoder_attn_layer_norm, other.q_proj),
            "cross out": (other.out_proj,),
            "fc1": (layer.final_layer_norm, layer.fc1),
            "fc2": (layer.fc2,),
        }.items():
            found[link] += nbytes(*modules)
        found["self-attention"] += 2 * of_self.keys[:, :, : POSITION + 1].numel() * of_self.keys.element_size()
        found[CROSS] += of_cross.keys.nbytes + of_cross.values.nbytes
    return found | {"LM head": nbytes(model.proj_out)}


def nbytes(*modules: nn.Module) -> int:
    return sum(p.nbytes for module in modules for p in module.parameters())


def prepare(model: WhisperForConditionalGeneration, B: int) -> DecoderStep:
    """A step of an accelerated model over a full cross cache."""
    step = DecoderStep(model, B, model.config.max_source_positions)
    for layer in step.cache.cross_attention_cache.layers:
        layer.keys.normal_(), layer.values.normal_()
    step.cache.is_updated.update(dict.fromkeys(step.cache.is_updated, True))
    return step


@torch.no_grad()
def time_step(
    model: WhisperForConditionalGeneration, step: DecoderStep, place: int = POSITION, replays: int = 30
) -> tuple[float, float]:
    """(median, spread) in ms of a step around the position `place`, as it is captured now; on a CPU through the references."""
    ids = torch.full((step.encoder_states.shape[0], 1), min(1000, model.config.vocab_size - 1), device=model.device)
    position = step.cache.get_seq_length()
    first = max(0, place - replays // 2 - 3)  # replays advance the position: so that the timed ones lie around it
    position.fill_(first)
    if model.device.type != "cuda":
        median, spread = measure_on_cpu([lambda: step._run(model, ids)])
    else:
        step.passes.clear()
        step(model, ids)
        position.fill_(first)
        median, spread = time_graph(step.graph, 1, replays)
    return median / 1000, spread / 1000


@contextmanager
def without(model: WhisperForConditionalGeneration, link: str) -> Iterator[None]:
    """Leaves out the launches of a link of the chain: a buffer that nobody has written takes the place of its result."""
    decoder = model.model.decoder
    weights = {model.proj_out.weight: "LM head"}
    for layer in decoder.layers:
        weights |= {
            layer.self_attn.q_proj.weight: "q/k/v",
            layer.self_attn.out_proj.weight: "self out",
            layer.encoder_attn.out_proj.weight: "cross out",
            layer.fc1.weight: "fc1",
            layer.fc2.weight: "fc2",
        }
    linear = fused.skinny_linear

    def maybe_linear(x: torch.Tensor, parts: tuple[torch.Tensor, ...], *args: object, **kwargs: object) -> torch.Tensor:
        if weights[parts[0]] != link:
            return linear(x, parts, *args, **kwargs)
        return x.new_empty(x.shape[0], sum(len(part) for part in parts))

    def no_attention(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return x.new_empty(x.shape)

    names = {"self-attention": "append_attention", CROSS: "cross_attention"}
    replacement = (names[link], no_attention) if link in names else ("skinny_linear", maybe_linear)
    with mock.patch.object(fused, *replacement):
        yield


def stock_step(
    model: WhisperForConditionalGeneration, given: StepInput, compiler: Callable
) -> tuple[Callable[[], torch.Tensor], EncoderDecoderCache]:
    """Stock's step after the prompt of `given`, compiled, and its cache; each call decodes the prompt's last token at the next
    position.
    """
    config = model.config.get_text_config(decoder=True)
    cache = EncoderDecoderCache(
        StaticCache(config=config, max_cache_len=model.config.max_target_positions),
        StaticCache(config=config, max_cache_len=model.config.max_source_positions),
    )
    kwargs = {"encoder_outputs": (given.states,), CACHE_NAME: cache, "use_cache": True}
    model(decoder_input_ids=given.ids[:, :4], **kwargs)  # eagerly, as stock does: it allocates the cache
    last = given.ids[:, 4:].clone()
    compiled = compiler(lambda ids: model(decoder_input_ids=ids, **kwargs).logits)

    def step() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the last call returned may be overwritten
        return compiled(last)

    return step, cache


@torch.no_grad()
def time_compiled(
    model: WhisperForConditionalGeneration, B: int, place: Place, mode: str, positions: Sequence[int] = (POSITION,)
) -> list[tuple[float, float]]:
    """(median, spread) in ms of stock's compiled step around each position; exits if it is wrong."""
    given = step_input(model, B)
    torch.compiler.reset()
    step, cache = stock_step(model, given, lambda function: place.compile(function, mode=mode))
    check_logits("stock's compiled step", step()[:, -1].clone(), given, bound=2)
    for _ in range(5 if place.is_gpu else 0):  # which warm up, and record
        step()
    times = []
    for position in positions:
        for layer in cache.self_attention_cache.layers:
            layer.cumulative_length.fill_(max(5, position - 15))  # of 30 calls
        median, spread = time_device(step) if place.is_gpu else measure_on_cpu([step])
        times.append((median / 1000, spread / 1000))
    return times


def time_modules(model: WhisperForConditionalGeneration, B: int, given: StepInput) -> tuple[float, float]:
    """(median, spread) in ms of the step that more rows than the chain takes have, with the model's modules in the graph."""
    with mock.patch.object(decoder, "is_fusable", return_value=False):
        check(model, B, given)
        with whisper_triton.accelerated(model):
            return time_step(model, prepare(model, B))


def bench(place: Place, model: WhisperForConditionalGeneration, B: int, *, mode: str = "none") -> list[Row]:
    """The row of the step, then one a link where the chain of fused kernels covers the model."""
    given = step_input(model, checked_rows(B))
    ours, stock = check(model, B, given)
    compiled = None if mode == "none" else time_compiled(model, B, place, mode)[0]
    with whisper_triton.accelerated(model):
        step = prepare(model, B)
        ms, spread = time_step(model, step)
        parts = step_bytes(model, step)
        links = {}
        for link in parts if step.fused is not None else ():
            with without(model, link):
                links[link] = time_step(model, step)
    modules = None if step.fused is None else time_modules(model, B, given)
    size = sum(parts.values())
    floor = place.floor_us(size) / 1000
    row: Row = {
        "benchmark": "step",
        "B": B,
        "ms": ms,
        "spread_ms": spread,
        "floor_ms": floor,
        "MB": size / 1e6,
        "GB/s": size / ms / 1e6,
        "share_%": 100 * floor / ms,
        "bandwidth_GB/s": place.bandwidth,
        "path": "modules" if step.fused is None else "chain",
    }
    if compiled is not None:
        row |= {"compiled_ms": compiled[0], "compiled_spread_ms": compiled[1], "compiled/ours": compiled[0] / ms, "mode": mode}
    if modules is not None:
        row |= {"modules_ms": modules[0], "modules_spread_ms": modules[1]}
    row |= {"error": f"{ours:.1e}", "stock_error": f"{stock:.1e}"}
    rows = [row]
    for link, (without_ms, without_spread) in links.items():
        times = 1 if link == "LM head" else len(model.model.decoder.layers)
        rows.append(
            {
                "benchmark": "step_links",
                "B": B,
                "link": link,
                "us": 1000 * (ms - without_ms) / times,
                "spread_us": 1000 * (spread + without_spread) / times,
                "floor_us": place.floor_us(parts[link]) / times,
                "MB": parts[link] / times / 1e6,
            }
        )
    return rows


def main() -> None:
    parser = parser_for(__doc__, "large-v3", "1,2,4,8,16")
    parser.add_argument("--compile", default="none", choices=MODES, help="mode of stock's torch.compile")
    args = parser.parse_args()
    measure_named(args, "decoder_step", {"step": functools.partial(bench, mode=args.compile)}, models_on)


if __name__ == "__main__":
    main()
