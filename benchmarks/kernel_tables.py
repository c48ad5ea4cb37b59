"""The tables that show a kernel beside its alternatives, one for each that `whisper-triton bench kernels` measures."""

from __future__ import annotations

from whisper_triton.benchmarks.columns import BATCH, TIMESTAMPS, Column, Table, measured

STOCK_OVER_OURS = measured("stock / ours", "stock/ours")
BEST_OVER_OURS = measured("best of these / ours", "best/ours")
ALTERNATIVES = [
    measured("SDPA cuDNN", "cudnn_us", optional=True),
    measured("SDPA flash", "flash_us", optional=True),
    measured("SDPA efficient", "efficient_us", optional=True),
    measured("SDPA math", "math_us", optional=True),
    measured("FlexAttention", "flex_us", optional=True),
]
# Of what stands between the encoder's products: add_layer_norm and bias_gelu, whose rows are in one file.
BETWEEN = [
    BATCH,
    measured("floor", "floor_us"),
    measured("ours", "ours_us", "spread_us"),
    measured("eager", "eager_us"),
    measured("compiled", "compiled_us"),
    measured("ours, hot", "ours_hot_us"),
    measured("eager, hot", "eager_hot_us"),
    measured("compiled, hot", "compiled_hot_us"),
    BEST_OVER_OURS,
]
KERNELS = {
    "select_token": Table(
        [
            BATCH,
            TIMESTAMPS,
            measured("ours, us", "ours_us", "spread_us"),
            measured("ours sampling, us", "ours_sampling_us"),
            measured("ours top-k, us", "ours_top_k_us", optional=True),
            measured("compiled reference, us", "compiled_us", optional=True),
            measured("stock eager, us", "stock_eager_us"),
            measured("stock in a graph, us", "stock_graph_us", optional=True),
            Column("stock's launches", ("stock_launches",), optional=True),
        ],
    ),
    "decode_attention": Table(
        [
            BATCH,
            measured("floor", "floor_us"),
            measured("ours", "ours_us", "spread_us"),
            measured("ours, joined in the launch", "joined_us", "joined_spread_us", optional=True),
            *ALTERNATIVES,
            measured("compiled reference", "compiled_us", optional=True),
            measured("best SDPA / ours", "best_sdpa/ours"),
        ],
    ),
    "cross_attention": Table(
        [
            BATCH,
            measured("floor", "floor_us"),
            measured("ours", "ours_us", "spread_us"),
            measured("ours, apart", "apart_us", "apart_spread_us"),
            *ALTERNATIVES,
            measured("compiled", "compiled_us", optional=True),
            BEST_OVER_OURS,
        ],
    ),
    "append_attention": Table(
        [
            BATCH,
            Column("length", ("length",)),
            measured("ours", "ours_us", "spread_us"),
            measured("stock", "stock_us"),
            measured("stock compiled", "compiled_us", optional=True),
            *ALTERNATIVES,
            STOCK_OVER_OURS,
        ],
    ),
    "update_kv_cache": Table(
        [
            BATCH,
            Column("tokens", ("T",)),
            measured("floor", "floor_us"),
            measured("ours", "ours_us", "spread_us"),
            measured("stock", "stock_us"),
            measured("stock compiled", "compiled_us", optional=True),
            STOCK_OVER_OURS,
        ],
    ),
    "skinny_linear": Table(
        [
            BATCH,
            Column("link", ("link",)),
            measured("floor", "floor_us"),
            measured("ours", "ours_us", "spread_us"),
            measured("eager", "eager_us"),
            measured("compiled", "compiled_us"),
            measured("compiled, packed", "packed_us", optional=True),
            BEST_OVER_OURS,
        ],
    ),
    "project_cross_kv": Table(
        [
            BATCH,
            measured("ours, ms", "ours_ms", "spread_ms"),
            measured("layer by layer, ms", "layers_ms", "layers_spread_ms"),
            measured("compiled, ms", "compiled_ms", "compiled_spread_ms"),
            measured("products alone, ms", "cublas_ms", "cublas_spread_ms"),
            measured("ours, TFLOP/s", "ours_TFLOP/s"),
            measured("products alone, TFLOP/s", "cublas_TFLOP/s"),
            measured("layer by layer / ours", "layers/ours"),
        ],
    ),
    "embed_tokens": Table(
        [
            BATCH,
            measured("ours", "ours_us", "spread_us"),
            measured("eager", "eager_us"),
            measured("compiled", "compiled_us"),
            BEST_OVER_OURS,
        ],
    ),
    "add_layer_norm": Table(BETWEEN, benchmark="add_layer_norm", file="encoder_kernels"),
    "bias_gelu": Table(BETWEEN, benchmark="bias_gelu", file="encoder_kernels"),
}
