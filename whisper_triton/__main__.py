"""`python -m whisper_triton` is the command `whisper-triton`, for where scripts are not on the path."""

from whisper_triton.cli import main

main(prog_name="whisper-triton")
