"""The kernels in Gluon, which Triton's interpreter does not know, by an emulator of their PTX: tests/ptx.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from attention_cases import needs_gluon

pytest.importorskip("triton", reason="nothing is compiled without Triton")

ROOT = Path(__file__).parents[1]


@needs_gluon
def test_every_case_is_right_and_every_damage_is_noticed(tmp_path: Path) -> None:
    # A process of its own, because the suite runs with the interpreter on.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    script = [sys.executable, str(ROOT / "tests" / "run_emulated.py")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [f"{case['name']}: {case['error']}, at most {case['bound']}" for case in cases if not case["ok"]]
    assert not wrong, "\n".join(wrong)
    assert done.returncode == 0, done.stderr
    kinds = {case["name"].partition(" ")[0] for case in cases}
    assert kinds == {"linear", "rows", "attention", "stream", "append", "cross", "copies", "damaged:"}
