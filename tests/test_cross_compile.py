"""Every kernel builds for every GPU that it claims to run on, without a GPU at hand, and what the builds must keep to."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from attention_cases import needs_gluon
from packaging.version import Version
from whisper_triton.kernels._linear_tiles import choose_tiles

from whisper_triton.kernels import _paced

pytest.importorskip("triton", reason="nothing is compiled without Triton")

ROOT = Path(__file__).parents[1]
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
NVIDIA = TARGETS[:4]
# Bytes of shared memory that a program can have: CUDA C++ Programming Guide, table of technical specifications per compute
# capability (the most for a thread block); AMD Instinct MI300 ISA, local data share.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}
# Of a multiprocessor of sm_90, and what each program takes of it besides: the same table.
MULTIPROCESSOR, RESERVED = 228 << 10, 1 << 10
# Those that may touch what no kernel before them writes, and do, before these have finished.
READ_AHEAD = {"_decode_attention_kernel", "_append_attention_kernel", "_skinny_linear_kernel"}
# The same, of one GPU alone.
PACED = {
    "_paced_linear_kernel", "_paced_rows_kernel", "_paced_attention_kernel", "_paced_stream_kernel",
    "_paced_append_kernel", "_clustered_cross_kernel",
}  # fmt: skip
# Of the decoder's chain, for several rows, which it does not take where shared memory is short.
SEVERAL_ROWS = {"_layer_norm_kernel", "_sum_splits_kernel"}
# Bytes that Triton before 3.7 spills of append_attention: 3.5.1 up to 24 on sm_120, 3.6.0 48 on sm_80 and 16 on sm_120.
SPILLED = 48 if Version(metadata.version("triton")) < Version("3.7") else 0
KERNELS = READ_AHEAD | {
    "_update_kv_cache_kernel", "_merge_splits_kernel", "_embed_tokens_kernel", "_project_cross_kv_kernel",
    "_add_layer_norm_kernel", "_bias_gelu_kernel", "_reduce_chunks_kernel", "_pick_token_kernel",
}  # fmt: skip

Build = dict[str, object]


def cross_compile(cache: Path, *arguments: str) -> object:
    """What tests/cross_compile.py reports. A process of its own, because the suite runs with the interpreter on."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    script = [sys.executable, str(ROOT / "tests" / "cross_compile.py"), *arguments]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> list[Build]:
    return cross_compile(tmp_path_factory.mktemp("triton"))


def of(builds: list[Build], target: str) -> list[Build]:
    """The builds for one GPU, of which there are some."""
    found = [build for build in builds if build["target"] == target and "error" not in build]
    assert found
    return found


@pytest.mark.timeout(1800)  # the first of these tests waits for all builds, and its cores may be busy
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_builds(builds: list[Build], target: str) -> None:
    errors = [build["call"] + "\n" + build["error"] for build in builds if build["target"] == target and "error" in build]
    assert not errors, "\n".join(errors)
    several_rows = SEVERAL_ROWS if SHARED[target] >= 128 << 10 else set()
    assert {build["kernel"] for build in of(builds, target)} == KERNELS | several_rows | paced(target)


def paced(target: str) -> set[str]:
    return PACED if target == "sm_90" and _paced.HAS_GLUON else set()


def spills(builds: list[Build], target: str, is_odd: bool) -> list[str]:
    """One line for each build that holds a part of its state in memory."""
    return [
        f"{build['call']}: {build['kernel']} with {build['num_warps']} warps and {build['registers']} registers"
        f" spills {build['spilled']} bytes"
        for build in of(builds, target)
        if build["is_odd"] == is_odd and build["spilled"] > (SPILLED if build["kernel"] == "_append_attention_kernel" else 0)
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(builds: list[Build], target: str) -> None:
    found = spills(builds, target, is_odd=False)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills_at_odd_addresses_and_strides(builds: list[Build], target: str) -> None:
    found = spills(builds, target, is_odd=True)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_suffices(builds: list[Build], target: str) -> None:
    for build in of(builds, target):
        assert build["shared"] <= SHARED[target], build


@needs_gluon
def test_all_programs_that_go_on_find_room_at_once(builds: list[Build]) -> None:
    seen = set()
    for build in of(builds, "sm_90"):
        found = re.match(r"linear logits B=(\d+) has_copies=True C=(\d+)", build["call"])
        if found is not None and build["kernel"] == "_paced_rows_kernel":
            B, C = map(int, found.groups())
            programs = choose_tiles(B, 51866, C, 1, True, has_copies=True).PROGRAMS
            assert programs * (build["shared"] + RESERVED) <= MULTIPROCESSOR, build
            seen.add((B, C))
    assert seen >= {(1, 1280), (8, 1280), (32, 1280), (8, 768)}


@pytest.mark.parametrize("target", TARGETS)
def test_launches_overlap_where_the_gpu_can(builds: list[Build], target: str) -> None:
    for build in of(builds, target):
        assert (build["before_wait"] is not None) == (target in ("sm_90", "sm_100", "sm_120")), build


@pytest.mark.parametrize("target", [target for target in NVIDIA if target != "sm_80"])
def test_memory_is_touched_only_after_the_previous_kernels_end(builds: list[Build], target: str) -> None:
    # A load that the compiler's pipeline pulls above the wait would read what the previous kernel has yet to write.
    for build in of(builds, target):
        if not build["read_ahead"]:
            assert build["before_wait"] == [], build
        assert not any(access.startswith("st") for access in build["before_wait"]), build
    early = {build["kernel"] for build in of(builds, target) if build["before_wait"]}
    assert early - SEVERAL_ROWS == READ_AHEAD | paced(target)


@needs_gluon
def test_another_prompt_length_builds_nothing_but_where_tiles_change(tmp_path: Path) -> None:
    found = cross_compile(tmp_path, "prompts")
    assert [*found] == ["1", "8"]
    # By batch size and first length: what is built for it. Programs take 8, 16 or 32 rows, and all of them or a part; with two,
    # three and five rows other tiles begin.
    expected = {
        ("1", "3"): {"_paced_rows_kernel"},
        ("1", "5"): {"_paced_rows_kernel", "_update_kv_cache_kernel"},
        ("1", "9"): {"_paced_rows_kernel"},
        ("8", "3"): {"_paced_rows_kernel", "_skinny_linear_kernel"},
        ("8", "5"): {"_update_kv_cache_kernel"},
    }
    for B, by_length in found.items():
        built = set(by_length["2"])
        assert len({build.partition(" ")[0].rpartition(".")[2] for build in built}) == 9
        for T, builds in by_length.items():
            new = {build.partition(" ")[0].rpartition(".")[2] for build in set(builds) - built}
            assert new == expected.get((B, T), set()), (B, T)
            built |= set(builds)
