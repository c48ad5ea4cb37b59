"""Fixtures of the benchmarks' tests; a test module takes them with `pytest_plugins = ["benchmark_fixtures"]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from whisper_triton.benchmarks import readme_tables

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a file's `main` in the small mode and returns the rows it wrote, of which README's tables can be made.

    They are of one benchmark, which has the file's name, or of those named, and of batch `B`.
    """

    def run(module: ModuleType, *words: str, benchmarks: Sequence[str] = (), B: int = 2) -> list[dict[str, Any]]:
        name, output = module.__name__.rpartition(".")[2], tmp_path / "rows.jsonl"
        words = ("--device", "cpu", "--batch", str(B), *words)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words, "--output", str(output)])
        try:
            module.main()
        finally:
            torch._dynamo.reset()
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert list(dict.fromkeys(row["benchmark"] for row in rows)) == list(benchmarks or [name])
        for row in rows:
            told = [row[column] for column in ("model", "dtype", "B", "gpu")]
            assert told == ["toy", "float32", B, "none"]
            assert row["command"] == f"python benchmarks/{name}.py {' '.join(words)}"
        for table in benchmarks or [name]:
            if table in readme_tables.TABLES:
                own = [row for row in rows if row["benchmark"] == table]
                assert readme_tables.render_table(table, own).startswith(f"`python benchmarks/{name}.py")
        return rows

    return run
