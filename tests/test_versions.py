"""The supported ranges: what passes, what is refused and in which words."""

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from conftest import why_not_interpreted
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from whisper_triton import _versions


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Let only `versions` be installed."""

    def version(package: str) -> str:
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(_versions.metadata, "version", version)


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("torch", "2.9"),
        ("torch", "2.9.0"),
        ("torch", "2.11.0+cu130"),
        ("torch", "2.13.0+cpu"),
        ("torch", "2.14.0.dev20261101+cu130"),
        ("torch", "2.9.0a0+50eac811a6.nv25.09"),
        ("triton", "3.5.0"),
        ("triton", "3.6.0+git1234abcd"),
        ("transformers", "5.17.0"),
        ("transformers", "5.24.0.dev0"),
    ],
)
def test_supported_versions_pass(monkeypatch: pytest.MonkeyPatch, package: str, version: str) -> None:
    installed(monkeypatch, **{package: version})
    _versions.check_versions()


def test_no_transformers_is_let_in_that_ci_has_not_run() -> None:
    """Each renames something sooner or later: the newest minor that is tested is the newest that is supported."""
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    tested = max(map(Version, re.findall(r"\b5\.\d+\.\d+\b", makefile)))
    supported = SpecifierSet(_versions.SUPPORTED["transformers"])
    assert tested in supported
    assert Version(f"{tested.major}.{tested.minor}.999") in supported
    assert Version(f"{tested.major}.{tested.minor + 1}.0") not in supported


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("torch", "2.8.1+cu128"),
        ("triton", "3.4.0"),
        ("transformers", "4.57.1"),
        ("transformers", "5.16.9"),
        ("transformers", "5.25.0"),
        ("transformers", "6.0.0.dev0"),
    ],
)
def test_other_versions_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, package: str, version: str) -> None:
    installed(monkeypatch, **{package: version})
    with pytest.raises(ImportError) as error:
        _versions.check_versions()
    assert str(error.value) == (
        f"whisper-triton supports {package} {_versions.SUPPORTED[package]}, but {package} {version} is installed"
    )


def test_missing_packages_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    _versions.check_versions()


@pytest.mark.parametrize(("version", "supported"), [((3, 9), False), ((3, 10), True), ((3, 13), True), ((3, 14), False)])
def test_python(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], supported: bool) -> None:
    installed(monkeypatch)
    monkeypatch.setattr(sys, "version_info", (*version, 7, "final", 0))
    if supported:
        _versions.check_versions()
    else:
        with pytest.raises(ImportError, match=r"supports Python >=3.10,<3.14, but Python 3.\d+.7 is installed"):
            _versions.check_versions()


@pytest.mark.parametrize(
    ("triton", "numpy", "runs"),
    [
        ("3.7.1", "2.4.6", True),
        ("3.6.0", "2.3.5", True),
        ("3.6.0", "2.4.0", False),
        ("3.5.1+git1234", "2.10.0", False),
    ],
)
def test_the_suite_refuses_an_interpreter_that_breaks_with_numpy(triton: str, numpy: str, runs: bool) -> None:
    said = f"the interpreter of triton {triton} breaks with numpy {numpy}: pip install 'numpy<2.4'"
    assert why_not_interpreted(triton, numpy) == (None if runs else said)
