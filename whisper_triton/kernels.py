"""Anchor of the package `whisper_triton.kernels`, whose files lie in `kernels/` at the top of a checkout.

That folder cannot be imported as `kernels`: the name belongs to a package on PyPI that transformers itself imports.
So it holds no `__init__.py`, and this module becomes its package by setting `__path__`. Import the files as
`whisper_triton.kernels.<name>` only: under two names a file would register its ops twice.

The public functions are re-exported, each one in place of the submodule of the same name.
"""

from whisper_triton._anchor import find_folder

__path__ = [find_folder("kernels", "update_kv_cache.py")]

# Absolute imports, because to Python this is a plain module, whose relative imports start at `whisper_triton`.
from whisper_triton.kernels._cross_table import CrossTable, cross_table
from whisper_triton.kernels._dispatch import backend
from whisper_triton.kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference
from whisper_triton.kernels.append_attention import append_attention, append_attention_reference
from whisper_triton.kernels.bias_gelu import bias_gelu, bias_gelu_reference
from whisper_triton.kernels.cross_attention import cross_attention, cross_attention_reference
from whisper_triton.kernels.decode_attention import decode_attention, decode_attention_reference
from whisper_triton.kernels.embed_tokens import embed_tokens, embed_tokens_reference
from whisper_triton.kernels.project_cross_kv import project_cross_kv, project_cross_kv_reference
from whisper_triton.kernels.select_token import select_token, select_token_reference
from whisper_triton.kernels.skinny_linear import skinny_linear, skinny_linear_reference
from whisper_triton.kernels.update_kv_cache import update_kv_cache, update_kv_cache_reference

__all__ = [
    "CrossTable",
    "add_layer_norm",
    "add_layer_norm_reference",
    "append_attention",
    "append_attention_reference",
    "backend",
    "bias_gelu",
    "bias_gelu_reference",
    "cross_attention",
    "cross_attention_reference",
    "cross_table",
    "decode_attention",
    "decode_attention_reference",
    "embed_tokens",
    "embed_tokens_reference",
    "project_cross_kv",
    "project_cross_kv_reference",
    "select_token",
    "select_token_reference",
    "skinny_linear",
    "skinny_linear_reference",
    "update_kv_cache",
    "update_kv_cache_reference",
]
