"""One table of all clients that were run, from the results of their benchmarks.

python benchmarks/client_summary.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from page_parts import markdown, read, share

__all__ = ["COLUMNS", "LIBRARY", "engine_name", "rows", "summary"]

COLUMNS = (
    "client", "with the library", "without", "CPU time to load / dense", "peak to load / dense",
)  # fmt: skip
SETTING = "4 bits, recorded"
LIBRARY = "functions, with the library"
NO_WAY = "takes no library"


def summary() -> Iterator[str]:
    """The table with the sentences before it."""
    yield (
        "Every client in an environment of its own with what its registry has, at 4 bits.\n"
        "A share is that of answers which are the dense model's (packages, with recorded\n"
        "inputs), an error that of the outputs against a session's on the same file; with the\n"
        "library, activations are rounded to int8. Ratios are with the library / without it.\n"
        "`python benchmarks/bench_clients.py --environments FOLDER --all` installs and runs all\n"
        "but the browser and prints this table.\n"
    )
    yield markdown(COLUMNS, list(rows()))


def rows() -> Iterator[tuple[str, ...]]:
    """A row for each client."""
    for client in read("clients")["rows"]:
        yield _package(client)
    for engine in read("engines")["engines"].items():
        yield _engine(*engine)
    for library in read("hub")["rows"]:
        yield _hub(library)
    for service in read("services")["rows"]:
        yield _service(service)
    yield _browser(read("web"))


def _package(client: Mapping[str, Any]) -> tuple[str, ...]:
    name = f"{client['client']} {client['versions'][client['client']]}"
    forms = client["settings"].get(SETTING) or next(iter(client["settings"].values()))
    cells = [
        f"failed: {forms[form]['failed']}"
        if "failed" in forms[form]
        else share(forms[form]["same"])
        for form in ("library", "portable")
    ]
    runs = [forms[form] for form in ("library", "portable")]
    return (name, *cells, *_ratios(client["dense"], runs, "load_s", "load_peak_bytes"))


def _engine(name: str, engine: Mapping[str, Any]) -> tuple[str, ...]:
    plain = engine_name(name)
    if "failed" in engine:
        return (plain, "", f"not installed: {engine['failed']}", "", "")
    forms = engine["forms"]
    library = forms.get(LIBRARY)
    without = forms["functions"]
    text = _error(without)
    if "failed" in without:
        without = forms["inlined"]
        text = f"inlined: {_error(without)}; functions: {text}"
    return (
        f"{plain} {engine['version']}",
        NO_WAY if library is None else _error(library),
        text,
        *_ratios(forms["dense"], [library, without], "load_s", "peak_bytes"),
    )


def engine_name(name: str) -> str:
    """Its name without the version that tells it from others."""
    return name.rpartition("-")[0] if name[-1].isdigit() else name


def _error(result: Mapping[str, Any]) -> str:
    if "failed" in result:
        return f"refused, `{str(result['failed']).replace('|', 'and')}`"
    return f"error {result['error']:.0e}"


def _hub(row: Mapping[str, Any]) -> tuple[str, ...]:
    if "failed" in row:
        return (row["library"], "", f"not installed: {row['failed']}", "", "")
    cells = [_difference(row.get(form)) for form in ("with_library", "portable")]
    return (f"{row['library']} {row['version']}", *cells, "", "")


def _difference(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return NO_WAY
    if "failed" in result:
        return f"failed: {result['failed']}"
    return f"1 - cosine {max(0.0, result['difference']):.0e}"


def _service(row: Mapping[str, Any]) -> tuple[str, ...]:
    if "failed" in row:
        return (row["service"], f"not installed: {row['failed']}", "", "", "")
    return (f"{row['service']} {row['version']}", f"error {row['largest_error']:.0e}", "", "", "")


def _browser(web: Mapping[str, Any]) -> tuple[str, ...]:
    forms = {row["form"]: row for row in web["rows"]}
    dense, small = forms["dense"], forms["4 bits"]
    return (
        f"onnxruntime-web {web['onnxruntime-web']}, Chromium",
        NO_WAY,
        "failed" if "failed" in small else "runs",
        *_ratios(dense, [None, small], "load_ms", "peak_bytes"),
    )


def _ratios(
    dense: Mapping[str, Any], results: list[Mapping[str, Any] | None], *keys: str
) -> Iterator[str]:
    """Of each key: with the library / without it, as parts of the dense model's."""
    for key in keys:
        found = [r for r in results if r is not None and key in r]
        yield " / ".join(f"{r[key] / dense[key]:.1f} x" for r in found)


if __name__ == "__main__":
    print("\n".join(summary()))
