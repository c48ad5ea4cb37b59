"""The name trap: `kernels` is also a package on PyPI, which transformers imports where it finds it.

Ours must be importable as `whisper_triton.kernels` with that package present and absent, from a checkout and from an
installed tree, from the root of the repository and from elsewhere, and must never stand in its way. Whatever an import
finds depends on what was imported before, so each case runs in a fresh process.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers.utils.import_utils import KERNELS_MIN_VERSION, is_kernels_available

import whisper_triton
from whisper_triton import _versions

ROOT = Path(__file__).parents[1]

# The decorators are used on classes while transformers is imported; nothing else of the package matters to Whisper.
PYPI_KERNELS = """
from unittest.mock import MagicMock

def _decorator(*args, **kwargs):
    return lambda decorated: decorated


use_kernel_forward_from_hub = use_kernelized_func = use_kernel_func_from_hub = _decorator


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)
"""

CHECK_IMPORTS = """
import os, sys

from transformers import WhisperForConditionalGeneration
from transformers.utils import is_kernels_available
import whisper_triton
from whisper_triton import kernels

pypi = os.environ["EXPECT_PYPI_KERNELS"]
assert is_kernels_available() == bool(pypi)
if pypi:
    import kernels as theirs
    assert os.path.dirname(theirs.__file__) == pypi, theirs.__file__

assert os.path.dirname(whisper_triton.__file__) == os.environ["EXPECT_PACKAGE"], whisper_triton.__file__
assert kernels.__path__ == [os.environ["EXPECT_KERNELS"]], kernels.__path__
for op in kernels.__all__:
    assert callable(getattr(kernels, op)), op
folder = kernels.__path__[0] + os.sep
names = [name for name, module in sys.modules.items() if (getattr(module, "__file__", None) or "").startswith(folder)]
assert names and all(name.startswith("whisper_triton.kernels.") for name in names), names
"""

# Behind the checks of what is imported: what a user does.
CHECK_GENERATE = """
import torch
from whisper_models import mel, tiny_whisper
model = tiny_whisper(seed=3)
stock = model.generate(mel(2), max_new_tokens=5)
assert torch.equal(whisper_triton.accelerate(model).generate(mel(2), max_new_tokens=5), stock)
assert torch.equal(whisper_triton.restore(model).generate(mel(2), max_new_tokens=5), stock)
"""

CHECK_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # what makes `import triton` fail as if it were not installed

import torch
import whisper_triton
from whisper_triton import kernels

query = torch.randn(2, 1, 3, 32)
key_cache, value_cache = torch.randn(2, 2, 3, 8, 32)
length = torch.tensor(5)
expected = torch.nn.functional.scaled_dot_product_attention(
    query.transpose(1, 2), key_cache[:, :, :5], value_cache[:, :, :5], scale=0.5
).transpose(1, 2)
for attend in (kernels.decode_attention, kernels.decode_attention_reference):
    torch.testing.assert_close(attend(query, key_cache, value_cache, length, scale=0.5), expected)
"""


CHECK_BENCHMARKS = """
import os, sys

import whisper_triton
from whisper_triton import cli

assert not any(name.startswith("whisper_triton.benchmarks") for name in sys.modules)  # only what the command does loads them
from whisper_triton import benchmarks
from whisper_triton.benchmarks import generate, harness

assert benchmarks.__path__ == [os.environ["EXPECT_BENCHMARKS"]], benchmarks.__path__
folder = benchmarks.__path__[0] + os.sep
names = {name for name, module in sys.modules.items() if (getattr(module, "__file__", None) or "").startswith(folder)}
assert {generate.__name__, harness.__name__} <= names
assert all(name.startswith("whisper_triton.benchmarks.") for name in names), names
"""


def run_python(code: str, cwd: Path, *paths: Path, **variables: str) -> None:
    """Run `code` in a fresh interpreter in `cwd` with `paths` searched first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **variables}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the package was installed, from a copy: a build leaves files in its source folder."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("whisper_triton", "kernels", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", target, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def distribution(installed: Path) -> Message:
    """The installed tree's METADATA."""
    (found,) = installed.glob("whisper_triton-*.dist-info/METADATA")
    return Parser().parsestr(found.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pypi_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the PyPI package `kernels`: the real one, or a stand-in in a version that transformers accepts."""
    if is_kernels_available():
        return Path(metadata.distribution("kernels").locate_file("."))
    folder = tmp_path_factory.mktemp("pypi")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(PYPI_KERNELS)
    (folder / f"kernels-{KERNELS_MIN_VERSION}.dist-info").mkdir()
    (folder / f"kernels-{KERNELS_MIN_VERSION}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
    )
    return folder


# Each place alone or beside it, and the root of the checkout, where the trap is, both.
ALONE = pytest.mark.skipif(is_kernels_available(), reason="the PyPI package kernels is installed")


@pytest.mark.parametrize(
    ("place", "with_pypi_kernels"),
    [
        pytest.param("root", False, id="root-alone", marks=ALONE),
        pytest.param("root", True, id="root-beside-pypi-kernels"),
        pytest.param("elsewhere", False, id="elsewhere-alone", marks=ALONE),
        pytest.param("installed", True, id="installed-beside-pypi-kernels"),
    ],
)
def test_kernels_are_ours_and_transformers_keeps_its_own(
    place: str, with_pypi_kernels: bool, installed: Path, pypi_kernels: Path, tmp_path: Path
) -> None:
    package, kernels = ROOT / "whisper_triton", ROOT / "kernels"
    if place == "installed":
        package, kernels = installed / "whisper_triton", installed / "whisper_triton" / "kernels"
    run_python(
        CHECK_IMPORTS + (CHECK_GENERATE if with_pypi_kernels and place == "root" else ""),
        ROOT if place == "root" else tmp_path,
        *([] if place == "root" else [package.parent]),  # in its root Python finds the checkout by itself
        *([pypi_kernels] if with_pypi_kernels else []),
        ROOT / "tests",
        TRITON_INTERPRET="0",  # the interpreter would take long
        EXPECT_PYPI_KERNELS=str(pypi_kernels / "kernels") if with_pypi_kernels else "",
        EXPECT_PACKAGE=str(package),
        EXPECT_KERNELS=str(kernels),
    )


@pytest.mark.parametrize("kind", ["checkout", "installed"])
def test_benchmarks_are_ours_and_loaded_by_the_command_alone(kind: str, installed: Path, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()  # another project's
    (tmp_path / "benchmarks" / "__init__.py").touch()
    benchmarks = ROOT / "benchmarks" if kind == "checkout" else installed / "whisper_triton" / "benchmarks"
    root = ROOT if kind == "checkout" else installed
    run_python(CHECK_BENCHMARKS, tmp_path, tmp_path, root, EXPECT_BENCHMARKS=str(benchmarks))


def test_installed_files(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*.py")}

    assert {path.name for path in installed.iterdir()} - {"bin"} == {
        "whisper_triton",
        next(installed.glob("*.dist-info")).name,
    }
    folders = ("kernels", "benchmarks")
    mapped = {f"{folder}/{name}" for folder in folders for name in files(ROOT / folder)}
    assert files(installed / "whisper_triton") == files(ROOT / "whisper_triton") | mapped
    assert not (installed / "whisper_triton" / "benchmarks" / "rows").exists()  # measurements are no code


@pytest.mark.parametrize("folder", ["kernels", "benchmarks"])
def test_mapped_folders_are_no_packages(folder: str) -> None:
    # With an __init__.py, transformers would import our kernels as that package from the root of a checkout.
    assert not (ROOT / folder / "__init__.py").exists()


def test_benchmarks_import_each_other_by_one_name() -> None:
    # By its bare name, which a script's folder makes importable, a file would be there twice.
    paths = list((ROOT / "benchmarks").glob("*.py"))
    found = {}
    for path in paths:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        found[path.name] = names & {other.stem for other in paths}
    assert {name: names for name, names in found.items() if names} == {}


def test_metadata_names_the_version(distribution: Message) -> None:
    assert distribution["Version"] == whisper_triton.__version__


def test_metadata_names_the_supported_ranges(distribution: Message) -> None:
    requirements = {
        requirement.name: requirement
        for requirement in map(Requirement, distribution.get_all("Requires-Dist"))
        if "extra" not in str(requirement.marker)
    }
    for package, versions in _versions.SUPPORTED.items():
        assert requirements[package].specifier == SpecifierSet(versions)
    assert str(requirements["triton"].marker) == 'platform_system == "Linux"'
    assert SpecifierSet(distribution["Requires-Python"]) == SpecifierSet(_versions.PYTHON)


@pytest.mark.parametrize("kind", ["checkout", "installed"])
def test_references_run_where_triton_is_missing(kind: str, installed: Path, tmp_path: Path) -> None:
    code = CHECK_WITHOUT_TRITON + (CHECK_GENERATE if kind == "checkout" else "")
    run_python(code, tmp_path, ROOT if kind == "checkout" else installed, ROOT / "tests")


def test_ci_runs_the_suite_with_the_oldest_and_the_newest_transformers() -> None:
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    supported = SpecifierSet(_versions.SUPPORTED["transformers"])
    oldest = re.search(r"^OLDEST_TRANSFORMERS = transformers==(\S+)$", makefile, re.M)[1]
    assert oldest in supported
    assert f">={oldest}" == str(next(one for one in supported if one.operator == ">=")) + ".0"  # and nothing older is
    newest = re.search(r"^TRANSFORMERS \?= .*'transformers==' \+ \('([\d.]+)'", makefile, re.M)[1]
    assert Version(newest) > Version(oldest)
    assert newest in supported
    assert re.search(r"^PYPI_KERNELS = kernels==\S+$", makefile, re.M)  # beside which the oldest is tested
    assert {"test", "test-oldest"} <= set(re.search(r"^for target in (.+); do$", ci, re.M)[1].split())
