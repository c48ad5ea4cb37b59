"""Fixtures of the benchmarks' tests; a test module takes them with `pytest_plugins = ["benchmark_fixtures"]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from whisper_triton.benchmarks import readme_tables

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a file's `main` in the small mode and returns the rows it wrote, of which README's table can be made."""

    def run(module: ModuleType, *words: str) -> list[dict[str, Any]]:
        name, output = module.__name__.rpartition(".")[2], tmp_path / "rows.jsonl"
        words = ("--device", "cpu", "--batch", "2", *words)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words, "--output", str(output)])
        try:
            module.main()
        finally:
            torch._dynamo.reset()
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        for row in rows:
            told = [row[column] for column in ("benchmark", "model", "dtype", "B", "gpu")]
            assert told == [name, "toy", "float32", 2, "none"]
            assert row["command"] == f"python benchmarks/{name}.py {' '.join(words)}"
        if name in readme_tables.TABLES:
            assert readme_tables.render_table(name, rows).startswith("`python benchmarks/")
        return rows

    return run
