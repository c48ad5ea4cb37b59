"""Whisper's decoder on hand-written Triton kernels, under the `generate` of transformers.

    model = WhisperForConditionalGeneration.from_pretrained(...)
    whisper_triton.accelerate(model)        # in place; `restore(model)` undoes it

Importing the package also makes `attn_implementation="whisper_triton"` known to transformers.
"""

from ._versions import require_versions

require_versions()  # before anything that an old version would break on

from . import kernels  # noqa: E402
from .attention import register as _register  # noqa: E402
from .cache import StaticEncoderDecoderCache, build_static_cache  # noqa: E402
from .patching import accelerate, accelerated, is_accelerated, restore  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "StaticEncoderDecoderCache",
    "accelerate",
    "accelerated",
    "build_static_cache",
    "is_accelerated",
    "kernels",
    "restore",
]

_register()
