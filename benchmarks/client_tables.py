"""The tables of docs/clients.md, from the results of the benchmarks of clients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from client_summary import LIBRARY, engine_name
from page_parts import markdown, read, share

__all__ = ["clients", "elsewhere", "hub"]


def clients() -> Iterator[str]:
    """Packages, each run by its own pipeline with the compressed file in its place."""
    rows = [row for client in read("clients")["rows"] for row in _rows(client)]
    yield (
        "Answers are those on inputs that were not recorded; boxes count as the same with the\n"
        "same class and an overlap of half or more (F1). Load is CPU time to open the pipeline,\n"
        "memory what the process grows by then, and at most: `benchmarks/bench_clients.py`.\n"
        "The last column says whether `optimize` warned of the loss of one of the models.\n"
    )
    columns = (
        "package", "setting", "form", "models", "same answers", "right", "load", "memory", "peak",
        "warned",
    )  # fmt: skip
    yield markdown(columns, rows)


def hub() -> Iterator[str]:
    """Libraries around the Hugging Face hub."""
    yield (
        "MiniLM at 4 bits, packaged by `package hf`, through the snippets of its README. The\n"
        "difference is 1 - cosine from vectors of a session with the library, which rounds\n"
        "activations to int8; the definitions inside the file do not: `benchmarks/bench_hub.py`.\n"
    )
    columns = ("package", "version", "form", "result")
    names = {"portable": "portable", "with_library": "library, by `onnxcomp exec`"}
    rows = [
        (entry["library"], entry["version"], name, _outcome(entry[form]))
        for entry in read("hub")["rows"]
        for form, name in names.items()
        if form in entry
    ]
    yield markdown(columns, rows)


def _outcome(result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"failed: {result['failed']}"
    return f"difference {max(0.0, result['difference']):.0e}"


def _rows(client: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    settings = client["settings"]
    first = next(iter(settings.values()))["compiled"]
    name = f"{client['client']} {client['versions'][client['client']]}"
    what = f"{client['count']} {client['answers']}"
    before = sum(entry.get("bytes_before", 0) for entry in first)
    yield (f"{name}: {what}", "dense", "", f"{before / 1e6:.2f} MB", *_cells(client["dense"]), "")
    for setting, results in sorted(settings.items()):
        size = sum(entry.get("bytes", 0) for entry in results["compiled"])
        warned = "yes" if any(entry.get("warned") for entry in results["compiled"]) else ""
        for form in ("library", "portable"):
            cells = _cells(results[form])
            yield ("", setting, form, f"{size / 1e6:.2f} MB", *cells, warned)


def _cells(result: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in result:
        return ("failed", "", "", "", "")
    return (
        share(result["same"]),
        share(result["right"]) if "right" in result else "",
        f"{result['load_s']:.2f} s",
        f"{result['load_bytes'] / 1e6:.0f} MB",
        f"{result['load_peak_bytes'] / 1e6:.0f} MB",
    )


def elsewhere() -> Iterator[str]:
    """Engines, tools and the browser, with headings of their own."""
    yield from _loading()
    yield from _engines()
    yield from _tools()
    yield from _browser()


def _loading() -> Iterator[str]:
    """Time and memory to load models."""
    found = read("loading")
    yield "## Loading\n"
    yield (
        "CPU time and memory at the peak to load a model with one thread: dense, and compressed\n"
        f"to 4 bits, without the library and with it ({found['processor']},\n"
        "`benchmarks/bench_loading.py`). With the library, weights of convolutions are expanded,\n"
        "too. In common.onnx of ddddocr, one product holds most of the weights.\n"
    )
    forms = ("dense", "portable", "library")
    rows = [
        (
            row["model"],
            *(_load(row[form]) for form in forms),
            *(
                f"{row['portable'][key] / row['dense'][key]:.1f} x"
                for key in ("load_s", "peak_bytes")
            ),
        )
        for row in found["rows"]
    ]
    heads = ("model", "dense", "without the library", "with the library")
    yield markdown((*heads, "time without / dense", "peak without / dense"), rows)


def _engines() -> Iterator[str]:
    """Which engine runs which form of a file."""
    found = read("engines")
    sizes = {form: f"{form}, {size / 1e6:.1f} MB" for form, size in found["bytes"].items()}
    forms = [*sizes, LIBRARY]
    yield "## Other engines\n"
    yield (
        f"MiniLM at 4 bits, one thread, {found['processor']}, without the operator\n"
        "library but for the last column. Each cell: relative error of the output, CPU seconds\n"
        "to load, and memory at the peak while loading; `benchmarks/bench_engines.py` installs\n"
        "and runs them. With the library, activations are rounded to int8.\n"
    )
    rows = [
        (
            f"{engine_name(name)} {row.get('version', 'not installed')}",
            f"`{row['line']}`",
            *(_loaded(row, form) for form in forms),
        )
        for name, row in found["engines"].items()
    ]
    yield markdown(("engine", "line of code", *sizes.values(), LIBRARY), rows)


def _loaded(row: dict[str, Any], form: str) -> str:
    result = row if "failed" in row else row["forms"].get(form)
    if result is None:
        return ""
    if "failed" in result:
        return "refused"
    error, peak = result["error"], result["peak_bytes"] / 1e6
    return f"{error:.0e}, {result['load_s']:.2f} s, {peak:.0f} MB"


def _tools() -> Iterator[str]:
    """What tools make of a compressed file."""
    found = read("engines")
    forms = [form for form in found["bytes"] if form != "dense"]
    yield "## Tools that fold\n"
    yield (
        "The size of what a tool writes. `inspect` notices every file that was folded.\n"
        if all(
            bool(cell.get("noticed")) == (cell.get("bytes", 0) > 2 * found["bytes"]["functions"])
            for row in found["tools"].values()
            for cell in row["forms"].values()
        )
        else "The size of what a tool writes.\n"
    )
    rows = [
        (
            f"{name} {row['version']}",
            *(
                f"{row['forms'][form]['bytes'] / 1e6:.1f} MB"
                if "bytes" in row["forms"][form]
                else "refused"
                for form in forms
            ),
        )
        for name, row in found["tools"].items()
    ]
    yield markdown(("tool", *forms), rows)


def _browser() -> Iterator[str]:
    """The page of examples/web."""
    found = read("web")
    yield "## The browser\n"
    yield (
        f"MiniLM with {found['tokens']} tokens in {found['browser']}, onnxruntime-web\n"
        f"{found['onnxruntime-web']}, one thread, {found['processor']}: medians of\n"
        f"{found['rounds']} visits, forms in turn; `benchmarks/bench_web.py` with the page in\n"
        "`examples/web`. Times are on the clock of a machine with other work, good for comparing\n"
        "rows only. The error is that of the embeddings of sentences.\n"
    )
    rows = [
        (
            row["form"],
            f"{row['bytes'] / 1e6:.1f} MB",
            f"{100 * row['error']:.1f} %" if row.get("error") is not None else "",
            *_times(row),
        )
        for row in found["rows"]
    ]
    columns = ("form", "download", "error", "load", "first run", "run", "memory of the page")
    yield markdown(columns, rows)


def _times(row: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in row:
        return ("failed", "", "", "")
    times = (f"{row[name] / 1e3:.2f} s" for name in ("load_ms", "first_ms", "run_ms"))
    return (*times, f"{row['peak_bytes'] / 1e6:.0f} MB")


def _load(result: dict[str, float]) -> str:
    return f"{result['load_s']:.2f} s, {result['peak_bytes'] / 1e6:.0f} MB"
