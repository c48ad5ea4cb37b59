"""Anchor of the package `whisper_triton.benchmarks`, whose files lie in `benchmarks/` at the top of a checkout.

As with `whisper_triton.kernels`: the folder stands where a reader looks first, but many a project leaves a folder
`benchmarks` beside its packages, so ours has no `__init__.py` and is shipped inside this package. One name for one file: they
import each other as `whisper_triton.benchmarks.<name>`, also where one is run as a script. Only the command
`whisper-triton bench` imports them, when it is called: a program that uses the package loads none of this.
"""

from whisper_triton._anchor import find_folder

__path__ = [find_folder("benchmarks", "harness.py")]
