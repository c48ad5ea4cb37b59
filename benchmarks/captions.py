"""The captions of tables and figures in README and RESULTS.md: by which commands, on what, when and with which versions."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import pairwise

from whisper_triton.benchmarks.plots import Row, named, values
from whisper_triton.benchmarks.record import parts_of

MOST_COMMANDS = 2  # that a caption lists for a GPU, where record.py can measure the same again


def commands(rows: Sequence[Row], name: str) -> list[str]:
    """By which the rows were measured; of commands that differ in models and batches alone the one that measures as much.

    Models that have no row, and batches of which a model has none, as of a run that was ended, are left out.
    """
    found: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for said in values(rows, "command") or [f"python benchmarks/{name}.py"]:
        words, given = shlex.split(said), {"--model": "", "--batch": ""}
        for i, word in enumerate(words[:-1]):
            if word in given:
                given[word], words[i + 1] = words[i + 1], word
        batches_of, batches = found.setdefault(tuple(words), {}), given["--batch"].split(",")
        own = [row for row in rows if row.get("command") == said and "B" in row]
        for model in given["--model"].split(","):
            there = {str(row["B"]) for row in own if row.get("model", model) == model or not model}
            if there or not own:
                batches_of.setdefault(model, []).extend([B for B in batches if B in there] or batches)
    lines = []
    for words, batches_of in found.items():
        models_of: dict[str, list[str]] = {}
        for model, batches in batches_of.items():
            models_of.setdefault(",".join(sorted(set(batches), key=lambda B: (len(B), B))), []).append(model)
        for batches, models in models_of.items():
            all_of = {"--model": ",".join(models), "--batch": batches}
            # Where one of these words is repeated, its value was.
            told = [all_of.get(word, word) if before == word else word for before, word in pairwise(("", *words))]
            lines.append(shlex.join(told))
    return lines


def recorded(rows: Sequence[Row], name: str) -> str | None:
    """The command of record.py that measures these rows anew, others perhaps too; None where it does not."""
    measured = {(part.model, B) for part in parts_of("cuda", [name], None, None) for B in part.batches}
    if not measured.issuperset((row.get("model"), row.get("B")) for row in rows):
        return None
    return shlex.join(["python", "benchmarks/record.py", "--output", "new", "--only", name])


def caption(rows: Sequence[Row], name: str) -> str:
    """By which commands, on what, when and with which versions the rows were measured; GPU by GPU."""
    places: dict[str, list[str]] = {}
    for gpu in values(rows, "gpu"):
        own = [row for row in rows if row["gpu"] == gpu]
        listed = commands(own, name)
        again = recorded(own, name) if len(listed) > MOST_COMMANDS else None
        by = f"several commands, which `{again}` runs again," if again else ", ".join(f"`{command}`" for command in listed)
        when = f"{', '.join(sorted(values(own, 'date')))} at revision {', '.join(values(own, 'revision'))}"
        places.setdefault(by, []).append(f"on {gpu}, {when}")
    said = [f"{by} {' and '.join(where)}" for by, where in places.items()]
    with_what = [", ".join(named("dtype", dtype) for dtype in values(rows, "dtype"))]
    versions = ("driver", "torch", "triton", "transformers")
    with_what += [f"{column} {', '.join(map(str, found))}" for column in versions if (found := values(rows, column))]
    notes = "".join(f" ({source})" for source in values(rows, "source"))
    line = f"{'; '.join([*said, ', '.join(with_what)])}{notes}:"
    return line[0].upper() + line[1:]
