"""The table of docs/codecs.md about values of sparse weights, from ``benchmarks/results``.

python benchmarks/sparse_tables.py            prints it
python benchmarks/sparse_tables.py --write    puts it into docs/codecs.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from page_parts import ROOT, markdown, read, show_or_write

__all__ = ["PAGE", "put_into", "tables"]

BEGIN = "<!-- tables: benchmarks/sparse_tables.py -->"
END = "<!-- end of tables -->"
PAGE = ROOT / "docs" / "codecs.md"

# Rows of a model that a table needs more of than this.
_LEAST = 3

_NAMES = {"language_model": "language model, KL", "minilm": "MiniLM, 1 - cosine"}


def tables() -> str:
    """The table with the sentences before it."""
    results = read("sparse_values")
    # A model of which little is measured yet says nothing.
    measured = [key for key in _NAMES if len(results.get(key, ())) > _LEAST]
    models = {key: {row["name"]: row for row in results[key]} for key in measured}
    names = [row["name"] for row in results[next(iter(models))]]
    told = (
        "Forms of models with two of every four elements (`--sparsity 2:4`, with data): what they\n"
        "lose against the pruned model, and against the one before\n"
        "(`benchmarks/bench_sparse_values.py`). `sparse+hyper` loses less than integers in fewer\n"
        "bytes, and a model that comes pruned loses less with it than with codes for its zeros.\n"
        "A model that does not come pruned is better left alone: `hyper` in 2 bits is smaller,\n"
        "and loses less than the pruning.\n"
    )
    columns = ["form"]
    for key in models:
        columns += [
            f"bytes, {_NAMES[key].split(',')[0]}",
            f"{_NAMES[key].split(', ')[1]} from pruned",
        ]
        columns.append("from the model before")
    cells = [[name, *_cells(models, name)] for name in names]
    return f"{told}\n{markdown(columns, cells)}"


def _cells(models: Mapping[str, Mapping[str, Any]], name: str) -> Sequence[str]:
    found: list[str] = []
    for rows in models.values():
        row = rows.get(name)
        if row is None:
            found += ["", "", ""]
            continue
        of_dense = name.startswith("hyper of")
        own = "" if of_dense else f"{row['from_pruned']:.4f}"
        found += [f"{row['bytes']:,}", own, f"{row['from_dense']:.4f}"]
    return found


def put_into(text: str) -> str:
    """The page with the table in its place."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n{tables()}{END}", text)


if __name__ == "__main__":
    show_or_write(tables(), PAGE, put_into)
