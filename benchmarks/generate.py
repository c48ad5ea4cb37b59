"""Whole `generate` calls: stock static cache with torch.compile, the same with our attention by name, and `accelerate`.

    python benchmarks/generate.py --model large-v3 --batch 1,8

Random weights in the published shapes (no download), fp16, greedy, 64 new tokens from one 30 s window, encoder included.
First-call time holds what compiling costs. What is timed is checked first by its logits, against a float64 run (`check`): with
random weights rounding turns near ties, after which tokens differ for good, stock's own variants' too, so the share of tokens
that equal stock static+compile's is only reported.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration
from whisper_triton.benchmarks.harness import parse, print_table, write_rows

import whisper_triton
from whisper_triton.decoder import DecoderStep

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
BY_NAME = "attention by name, static+compile"
VARIANTS = ("stock static+compile", BY_NAME, "stock dynamic", "accelerate")


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


def relative_error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return ((logits.double() - exact).norm() / exact.norm()).item()


def check(model: WhisperForConditionalGeneration, B: int) -> tuple[float, float]:
    """(our, stock's) relative error of a step's logits after a prompt; exits if ours exceeds 1.25 times stock's."""
    ids = torch.randint(0, 50000, (B, 5), device="cuda")
    states = torch.randn(B, model.config.max_source_positions, model.config.d_model, device="cuda", dtype=model.dtype)
    with torch.no_grad():
        stock = model(encoder_outputs=(states,), decoder_input_ids=ids, use_cache=False).logits[:, -1]
        model.double()
        exact = model(encoder_outputs=(states.double(),), decoder_input_ids=ids, use_cache=False).logits[:, -1]
        model.to(states.dtype)
        with whisper_triton.accelerated(model):
            step = DecoderStep(model, B, states.shape[1])
            model(encoder_outputs=(states,), decoder_input_ids=ids[:, :4], past_key_values=step.cache, use_cache=True)
            ours = step(model, ids[:, 4:])[:, -1]
    errors = relative_error(ours, exact), relative_error(stock, exact)
    if not errors[0] <= 1.25 * errors[1]:
        raise SystemExit(f"the step is wrong at batch {B}: relative error {errors[0]:.2e}, stock's {errors[1]:.2e}")
    return errors


class Variant:
    """One way to generate: a model of its own, so that what it has compiled stays while others are timed."""

    def __init__(self, name: str, model: WhisperForConditionalGeneration, features: torch.Tensor, **kwargs: object) -> None:
        self.name, self.model, self.features, self.kwargs = name, model, features, kwargs
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # the models', and what other variants keep
        start = time.perf_counter()
        self.tokens = self.generate()
        torch.cuda.synchronize()
        self.first_s = time.perf_counter() - start
        self.generate()
        self.extra_GB = (torch.cuda.max_memory_allocated() - before) / 1e9
        self.times: list[float] = []

    def generate(self) -> torch.Tensor:
        return self.model.generate(
            self.features, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False, **self.kwargs
        )

    def time_once(self) -> None:
        start = time.perf_counter()
        self.generate()
        torch.cuda.synchronize()
        self.times.append(time.perf_counter() - start)

    def row(self, expected: torch.Tensor) -> dict[str, object]:
        equal = (self.tokens == expected).float().mean().item()
        median = statistics.median(self.times)
        return {
            "B": self.features.shape[0],
            "variant": self.name,
            "tok/s": self.features.shape[0] * NEW_TOKENS / median,
            "ms": 1000 * median,
            "min_ms": 1000 * min(self.times),
            "max_ms": 1000 * max(self.times),
            "first_s": self.first_s,
            "extra_GB": self.extra_GB,
            "equal_tokens": equal,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="large-v3", choices=SHAPES)
    parser.add_argument("--batch", default="1,8", help="batch sizes, separated by commas")
    parser.add_argument(
        "--variants", default=";".join(VARIANTS), help="separated by semicolons; tokens are compared to the first's"
    )
    parser.add_argument("--calls", type=int, default=10, help="timed calls a variant, taken in turns")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "rows" / "generate.jsonl")
    args = parse(parser)
    stock, by_name, ours = (build_model(args.model) for _ in range(3))
    for B in map(int, args.batch.split(",")):
        check(ours, B)
    by_name.set_attn_implementation("whisper_triton")
    whisper_triton.accelerate(ours)
    rows = []
    for B in map(int, args.batch.split(",")):
        features = torch.randn(B, stock.config.num_mel_bins, 3000, device="cuda", dtype=stock.dtype)
        torch._dynamo.reset()
        runners = {"stock static+compile": stock, BY_NAME: by_name, "stock dynamic": stock, "accelerate": ours}
        variants = [
            Variant(name, runners[name], features, **({"cache_implementation": "static"} if "static" in name else {}))
            for name in args.variants.split(";")
        ]
        for _ in range(args.calls):
            for variant in variants:
                variant.time_once()
        rows += [{"model": args.model, **variant.row(variants[0].tokens)} for variant in variants]
        print_table(rows)
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
