"""Rewrites README's tables and figures from benchmarks/rows/, and draws the figures into benchmarks/plots/.

    python benchmarks/readme.py
    python benchmarks/readme.py --check    # changes nothing; says what differs and exits with 1

README marks a table, and a figure, by the name of their row file; what stands between the comments is written here:

    <!-- rows: decoder_step -->
    <!-- end -->
    <!-- plot: decoder_step -->
    <!-- end -->

What has no rows is not marked, and what has some must be. By which command, where and when they were measured is said from
the rows, above a table or, where they have none, above the figure.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from whisper_triton.benchmarks.compare import read_rows
from whisper_triton.benchmarks.plots import digest, is_as_drawn, plot, read_digest
from whisper_triton.benchmarks.readme_tables import TABLES, caption, render_table

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- (rows|plot): (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]

FIGURES = {
    "generate": "Whole calls of generate: tokens per second by batch",
    "decoder_step": "One decoding step: share of the memory's bandwidth by batch",
    "step_links": "Links of a decoding step: what each costs, and its floor",
    "step_position": "One decoding step by position",
    "decode_attention": "Cross-attention of a step, one layer: share of the memory's bandwidth by batch",
    "append_attention": "Self-attention of a step, one layer: time by the length of the cache",
}
# A panel for each model and batch: README shows those of the first model, the table all.
OF_ONE_MODEL = ("step_links", "step_position")
LINK_BATCHES = (1, 8)  # of which README shows the links: its table would be the longest of all


def load(root: Path, name: str) -> list[Row]:
    """The rows of a table or figure, of benchmarks/rows/NAME.jsonl unless its table says otherwise; ValueError for none."""
    table = TABLES.get(name)
    file = (table and table.file) or name
    rows = read_rows(root / "benchmarks" / "rows" / f"{file}.jsonl")
    if table and table.benchmark:
        # Before rows said their benchmark, a file held those of one.
        own = TABLES[file].benchmark
        rows = [row for row in rows if row.get("benchmark", own) == table.benchmark]
        if not rows:
            raise ValueError(f"{file}.jsonl: no rows of the benchmark {table.benchmark}")
    if name == "step_links":
        rows = [row for row in rows if row["B"] in LINK_BATCHES]
    # Before rows said their dtype, every benchmark ran in fp16.
    return [{"dtype": "float16", **row} for row in rows]


def unmarked(root: Path) -> list[str]:
    """The marks that README lacks of what there are rows of."""
    text = (root / "README.md").read_text(encoding="utf-8")
    marks = [f"<!-- {kind}: {name} -->" for kind, names in (("rows", TABLES), ("plot", FIGURES)) for name in names]
    return [mark for mark in marks if mark not in text and has_rows(root, mark.split()[2])]


def has_rows(root: Path, name: str) -> bool:
    try:
        load(root, name)
    except ValueError:
        return False
    return True


def render(root: Path) -> tuple[str, dict[str, list[Row]]]:
    """README as it must be, and the rows of each figure that it shows; ValueError for a mark that nothing stands for."""
    text = (root / "README.md").read_text(encoding="utf-8")
    figures: dict[str, list[Row]] = {}

    def block(match: re.Match[str]) -> str:
        start, kind, name, old, end = match.groups()
        if name not in (TABLES if kind == "rows" else FIGURES):
            raise ValueError(f"README.md: nothing is known of <!-- {kind}: {name} -->")
        if "<!-- " in old:
            raise ValueError(f"README.md: <!-- {kind}: {name} --> has no end of its own")
        rows = load(root, name)
        if kind == "rows":
            return f"{start}{render_table(name, rows)}{end}"
        figures[name] = [r for r in rows if name not in OF_ONE_MODEL or r.get("model") == rows[0].get("model")]
        # Of rows that have a table its caption says how they were measured.
        said = "" if name in TABLES else f"{caption(figures[name], name)}\n\n"
        return f"{start}{said}![{FIGURES[name]}](benchmarks/plots/{name}.svg)\n{end}"

    new = BLOCK.sub(block, text)
    if len(re.findall("<!-- (?:rows|plot):", text)) != len(BLOCK.findall(text)):
        raise ValueError("README.md: a mark has no <!-- end -->")
    return new, figures


def differences(root: Path) -> list[str]:
    """What of README and its figures is not as the rows have it, a line each."""
    new, figures = render(root)
    old = (root / "README.md").read_text(encoding="utf-8")
    blocks = zip(BLOCK.finditer(old), BLOCK.finditer(new), strict=True)
    found = [f"README.md: {a[1].strip()} differs" for a, b in blocks if a[0] != b[0]]
    found += [f"README.md: {mark} is missing" for mark in unmarked(root)]
    for name, rows in figures.items():
        path = root / "benchmarks" / "plots" / f"{name}.svg"
        if read_digest(path) != digest(rows, FIGURES[name]):
            found.append(f"benchmarks/plots/{name}.svg shows other rows or none, or is of another plots.py")
        elif not is_as_drawn(path):
            found.append(f"benchmarks/plots/{name}.svg is not as it was drawn")
    return found


def rewrite(root: Path) -> None:
    """Writes README and draws its figures."""
    new, figures = render(root)
    (root / "README.md").write_text(new, encoding="utf-8")
    for name, rows in figures.items():
        plot(rows, root / "benchmarks" / "plots" / f"{name}.svg", FIGURES[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if anything differs from the rows")
    args = parser.parse_args()
    try:
        if not args.check:
            rewrite(ROOT)
        elif found := differences(ROOT):
            print("\n".join([*found, "run: python benchmarks/readme.py"]))
            sys.exit(1)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
