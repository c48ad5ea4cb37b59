"""One decoding step: our captured chain of fused kernels against its floor, by model and batch.

    python benchmarks/decoder_step.py --model large-v3 --batch 1,2,4,8,16

Random weights in the published shapes, fp16, position 64. Milliseconds of a graph replay; the floor is the bytes a step must
read (decoder weights, LM head, cross and self caches) over the bandwidth measured in the same run. Logits are checked first
against a float64 run of the stock modules: at most 1.25 times as far from it as the stock fp16 step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import WhisperForConditionalGeneration
from whisper_triton.benchmarks.generate import SHAPES, build_model, check
from whisper_triton.benchmarks.harness import parse, print_table, read_bandwidth, time_graph, write_rows

import whisper_triton
from whisper_triton.decoder import DecoderStep

POSITION = 64


def step_bytes(model: WhisperForConditionalGeneration, step: DecoderStep) -> int:
    """What a step must read once: the weights that it uses, the cross cache, the slots in use of the self cache."""
    layers = model.model.decoder.layers
    once_a_window = [
        p for layer in layers for m in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj) for p in m.parameters()
    ]
    weights = sum(p.nbytes for p in layers.parameters()) - sum(p.nbytes for p in once_a_window) + model.proj_out.weight.nbytes
    own = step.cache.self_attention_cache.layers
    used = sum(2 * layer.keys[:, :, : POSITION + 1].numel() * layer.keys.element_size() for layer in own)
    cross = sum(layer.keys.nbytes + layer.values.nbytes for layer in step.cache.cross_attention_cache.layers)
    return weights + used + cross


def bench(model: WhisperForConditionalGeneration, name: str, B: int, bandwidth: float) -> dict[str, object]:
    ours, stock = check(model, B)
    with whisper_triton.accelerated(model):
        step = DecoderStep(model, B, model.config.max_source_positions)
        for layer in step.cache.cross_attention_cache.layers:
            layer.keys.normal_(), layer.values.normal_()
            step.cache.is_updated.update(dict.fromkeys(step.cache.is_updated, True))
        position = step.cache.get_seq_length()
        step(model, torch.full((B, 1), 1000, device="cuda"))
        # Replays advance the position: start so that the timed ones lie around POSITION.
        position.fill_(POSITION - 16)
        ms, spread = (us / 1000 for us in time_graph(step.graph, 1, replays=30))
    size = step_bytes(model, step)
    floor = size / bandwidth / 1e6
    return {
        "model": name,
        "B": B,
        "ms": ms,
        "spread_ms": spread,
        "floor_ms": floor,
        "GB/s": size / ms / 1e6,
        "share_%": 100 * floor / ms,
        "error": f"{ours:.1e}",
        "stock_error": f"{stock:.1e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="large-v3", help=f"of {', '.join(SHAPES)}; several separated by commas")
    parser.add_argument("--batch", default="1,2,4,8,16", help="batch sizes, separated by commas")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "rows" / "decoder_step.jsonl")
    args = parse(parser)
    bandwidth = read_bandwidth()
    rows = []
    for name in args.model.split(","):
        model = build_model(name)
        rows += [bench(model, name, B, bandwidth) for B in map(int, args.batch.split(","))]
        del model
    print(f"read bandwidth {bandwidth:.0f} GB/s")
    print_table(rows)
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
