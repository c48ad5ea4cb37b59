"""Where the files of `whisper_triton.kernels` and `whisper_triton.benchmarks` lie, which a checkout holds at its top."""

from pathlib import Path

_HERE = Path(__file__).parent


def find_folder(name: str, file: str) -> str:
    """The folder `name` inside the installed package or, in a checkout, beside it: whichever holds `file`.

    Beside an installed package a folder of that name may be another project's, so only one with a file of ours is ours.

    Raises:
        ImportError: neither does.
    """
    folders = (_HERE / name, _HERE.parent / name)
    for folder in folders:
        if (folder / file).is_file():
            return str(folder)
    raise ImportError(f"the {name} of whisper-triton lie neither in {folders[0]} nor in {folders[1]}")
