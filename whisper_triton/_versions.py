"""The versions this package works with: the one place that names them (`setup.py` reads them from here).

Reads version numbers from the packages' metadata, so that the check imports none of them.
"""

import sys
from importlib import metadata
from pathlib import Path

PYTHON = ">=3.10,<3.14"
SUPPORTED = {
    "torch": ">=2.9",
    "triton": ">=3.5",
    "transformers": ">=5.17,<5.25",
}


def check_versions() -> None:
    """Raise `ImportError` if Python, torch, triton or transformers lies outside its supported range.

    A package that is not installed passes: triton may be missing (the references run then), and for the others
    Python's own "No module named ..." is as clear as ours could be.
    """
    _check("Python", "{}.{}.{}".format(*sys.version_info[:3]), PYTHON)
    for package, versions in SUPPORTED.items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        _check(package, found, versions)


def require_versions() -> None:
    """`check_versions`; but whoever runs the command gets one line and exit status 1, and no traceback."""
    try:
        check_versions()
    except ImportError as error:
        if not _is_command():
            raise
        sys.exit(f"whisper-triton: {error}")


def _is_command() -> bool:
    """Whether Python was started as the script `whisper-triton`, or as `python -m whisper_triton`."""
    script = Path(sys.argv[0]).stem if getattr(sys, "argv", None) else ""
    return script == "whisper-triton" or "-m whisper_triton" in " ".join(getattr(sys, "orig_argv", []))  # Python 3.9 has none


def _check(package: str, found: str, versions: str) -> None:
    # Imported here because setup.py runs this file where packaging may be missing.
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    # The base version, because nightly and vendor builds call themselves 2.11.0.dev20260101+cu130 or 2.9.0a0+nv25.9.
    if not SpecifierSet(versions).contains(Version(found).base_version):
        raise ImportError(f"whisper-triton supports {package} {versions}, but {package} {found} is installed")
