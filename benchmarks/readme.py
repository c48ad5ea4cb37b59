"""Rewrites the tables and figures of README and RESULTS.md from benchmarks/rows/, and draws the figures into benchmarks/plots/.

    python benchmarks/readme.py
    python benchmarks/readme.py --check    # changes nothing; says what differs and exits with 1

These pages mark a table, and a figure, by its name, its row file's or one of `readme_tables.TABLES`; what stands between the
comments is written here:

    <!-- rows: decoder_step -->
    <!-- end -->
    <!-- plot: decoder_step -->
    <!-- end -->

What has no rows is not marked, and what has some must be, on one page at least. By which command, where and when they were
measured is said from the rows, above a table or, where they have none, above the figure.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from whisper_triton.benchmarks.captions import caption
from whisper_triton.benchmarks.compare import read_rows
from whisper_triton.benchmarks.plots import digest, is_as_drawn, plot, read_digest
from whisper_triton.benchmarks.readme_tables import EXCERPTS, TABLES, render_table

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "benchmarks/RESULTS.md")
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
# A panel for each model and batch: the figure shows those of the first model, the table all.
OF_ONE_MODEL = ("step_links", "step_position")
LINK_BATCHES = (1, 8)  # of which the links are shown: their table would be the longest of all


def load(root: Path, name: str) -> list[Row]:
    """The rows of a table or figure, of benchmarks/rows/NAME.jsonl unless its table says otherwise; ValueError for none."""
    table = TABLES.get(name)
    file = (table and table.file) or name
    rows = read_rows(root / "benchmarks" / "rows" / f"{file}.jsonl")
    if table and table.benchmark:
        # Before rows said their benchmark, a file held those of one.
        own = TABLES[file].benchmark if file in TABLES else None
        rows = [row for row in rows if row.get("benchmark", own) == table.benchmark]
        if not rows:
            raise ValueError(f"{file}.jsonl: no rows of the benchmark {table.benchmark}")
    if name == "step_links":
        rows = [row for row in rows if row["B"] in LINK_BATCHES]
    # Before rows said their dtype, every benchmark ran in fp16.
    return [{"dtype": "float16", **row} for row in rows]


def pages(root: Path) -> dict[str, str]:
    """The text of each page that there is."""
    return {page: (root / page).read_text(encoding="utf-8") for page in PAGES if (root / page).is_file()}


def unmarked(root: Path) -> list[str]:
    """The marks that no page has of what there are rows of."""
    text = "".join(pages(root).values())
    names = [("rows", name) for name in sorted(TABLES.keys() - EXCERPTS)] + [("plot", name) for name in sorted(FIGURES)]
    marks = [f"<!-- {kind}: {name} -->" for kind, name in names]
    return [mark for mark in marks if mark not in text and has_rows(root, mark.split()[2])]


def has_rows(root: Path, name: str) -> bool:
    try:
        load(root, name)
    except ValueError:
        return False
    return True


def render(root: Path) -> tuple[dict[str, str], dict[str, list[Row]]]:
    """The pages as they must be, and the rows of each figure that they show; ValueError for a mark that nothing stands for."""
    figures: dict[str, list[Row]] = {}
    return {page: render_page(root, page, text, figures) for page, text in pages(root).items()}, figures


def render_page(root: Path, page: str, text: str, figures: dict[str, list[Row]]) -> str:
    """One page as it must be; `figures` gets the rows of those that it shows."""

    def block(match: re.Match[str]) -> str:
        start, kind, name, old, end = match.groups()
        if name not in (TABLES if kind == "rows" else FIGURES):
            raise ValueError(f"{page}: nothing is known of <!-- {kind}: {name} -->")
        if "<!-- " in old:
            raise ValueError(f"{page}: <!-- {kind}: {name} --> has no end of its own")
        rows = load(root, name)
        if kind == "rows":
            return f"{start}{render_table(name, rows)}{end}"
        figures[name] = [r for r in rows if name not in OF_ONE_MODEL or r.get("model") == rows[0].get("model")]
        # Beside a table of the same rows its caption says how they were measured.
        said = "" if f"<!-- rows: {name} -->" in text else f"{caption(figures[name], name)}\n\n"
        plots = os.path.relpath("benchmarks/plots", Path(page).parent)
        return f"{start}{said}![{FIGURES[name]}]({plots}/{name}.svg)\n{end}"

    new = BLOCK.sub(block, text)
    if len(re.findall("<!-- (?:rows|plot):", text)) != len(BLOCK.findall(text)):
        raise ValueError(f"{page}: a mark has no <!-- end -->")
    return new


def differences(root: Path) -> list[str]:
    """What of the pages and their figures is not as the rows have it, a line each."""
    new, figures = render(root)
    found = []
    for page, old in pages(root).items():
        blocks = zip(BLOCK.finditer(old), BLOCK.finditer(new[page]), strict=True)
        found += [f"{page}: {a[1].strip()} differs" for a, b in blocks if a[0] != b[0]]
    found += [f"{mark} is on none of {' and '.join(PAGES)}" for mark in unmarked(root)]
    for name, rows in figures.items():
        path = root / "benchmarks" / "plots" / f"{name}.svg"
        if read_digest(path) != digest(rows, FIGURES[name]):
            found.append(f"benchmarks/plots/{name}.svg was not drawn from these rows by this plots.py")
        elif not is_as_drawn(path):
            found.append(f"benchmarks/plots/{name}.svg is not as it was drawn")
    return found


def rewrite(root: Path) -> None:
    """Writes the pages and draws their figures."""
    new, figures = render(root)
    for page, text in new.items():
        (root / page).write_text(text, encoding="utf-8")
    for name, rows in figures.items():
        plot(rows, root / "benchmarks" / "plots" / f"{name}.svg", FIGURES[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if anything differs from the rows")
    args = parser.parse_args()
    try:
        if not args.check:
            rewrite(ROOT)
            if missing := unmarked(ROOT):
                print("\n".join(f"there are rows, but no {mark} on a page" for mark in missing), file=sys.stderr)
                sys.exit(1)
        elif found := differences(ROOT):
            print("\n".join([*found, "run: python benchmarks/readme.py"]))
            sys.exit(1)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
