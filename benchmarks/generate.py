"""Whole `generate` calls: stock static cache with torch.compile, the same with our attention by name, and `accelerate`.

    python benchmarks/generate.py --model large-v3 --batch 1,8

Random weights in the published shapes (no download), fp16, greedy, 64 new tokens from one 30 s window, encoder included.
First-call time holds what compiling costs. Tokens are compared with those of stock static+compile: with random weights in
fp16 rounding may turn near ties, so the share of equal tokens is reported and a rate is refused only where none agree.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path

import torch
from harness import print_table, write_rows
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

import whisper_triton

# d_model, encoder layers, decoder layers, heads, mel bins, vocabulary
SHAPES = {
    "tiny": (384, 4, 4, 6, 80, 51865),
    "base": (512, 6, 6, 8, 80, 51865),
    "small": (768, 12, 12, 12, 80, 51865),
    "medium": (1024, 24, 24, 16, 80, 51865),
    "large-v3": (1280, 32, 32, 20, 128, 51866),
    "turbo": (1280, 32, 4, 20, 128, 51866),
    "distil-large-v3": (1280, 32, 2, 20, 128, 51866),
}
NEW_TOKENS = 64


def build_model(name: str, dtype: torch.dtype = torch.float16) -> WhisperForConditionalGeneration:
    """A model of the published shape `name` with random weights, on the GPU."""
    d_model, encoder_layers, decoder_layers, heads, mel_bins, vocabulary = SHAPES[name]
    config = WhisperConfig(
        d_model=d_model,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * d_model,
        decoder_ffn_dim=4 * d_model,
        num_mel_bins=mel_bins,
        vocab_size=vocabulary,
        bos_token_id=50257,
        eos_token_id=50257,
        pad_token_id=50257,
        decoder_start_token_id=50258,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        model = WhisperForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    for parameter in model.model.decoder.parameters():  # the default initialisation repeats one token
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.06)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=50258,
        eos_token_id=50257,
        pad_token_id=50257,
        no_timestamps_token_id=50363,
        is_multilingual=False,
        max_length=448,
    )
    return model


def bench(model: WhisperForConditionalGeneration, features: torch.Tensor, calls: int, **kwargs: object) -> dict[str, object]:
    def generate() -> torch.Tensor:
        return model.generate(features, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False, **kwargs)

    torch._dynamo.reset()
    start = time.perf_counter()
    tokens = generate()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    generate()
    times = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(calls):
        start = time.perf_counter()
        generate()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    return {
        "tok/s": features.shape[0] * NEW_TOKENS / median,
        "ms": 1000 * median,
        "spread_ms": 500 * (max(times) - min(times)),
        "first_s": first,
        "peak_GB": torch.cuda.max_memory_allocated() / 1e9,
        "tokens": tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="large-v3", choices=SHAPES)
    parser.add_argument("--batch", default="1,8", help="batch sizes, separated by commas")
    parser.add_argument("--calls", type=int, default=5, help="timed calls a variant")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "rows" / "generate.jsonl")
    args = parser.parse_args()
    model = build_model(args.model)
    rows = []
    for B in map(int, args.batch.split(",")):
        features = torch.randn(B, model.config.num_mel_bins, 3000, device="cuda", dtype=model.dtype)
        found = {}
        model.set_attn_implementation("sdpa")
        found["stock static+compile"] = bench(model, features, args.calls, cache_implementation="static")
        model.set_attn_implementation("whisper_triton")
        found["by name, static+compile"] = bench(model, features, args.calls, cache_implementation="static")
        model.set_attn_implementation("sdpa")
        found["stock dynamic"] = bench(model, features, args.calls)
        with whisper_triton.accelerated(model):
            found["accelerate"] = bench(model, features, args.calls)
        expected = found["stock static+compile"]["tokens"]
        for variant, row in found.items():
            equal = (row.pop("tokens") == expected).float().mean().item()
            if equal == 0.0:
                raise SystemExit(f"{variant}: no token equals stock's")
            rows.append({"model": args.model, "B": B, "variant": variant, **row, "equal_tokens": equal})
        print_table(rows)
        gc.collect()
        torch.cuda.empty_cache()
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
