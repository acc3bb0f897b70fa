"""The result of a run as one HTML page: no requests, no framework, light and dark.

Names in models are untrusted. They reach the page in one JSON block, in which no character can end
the block, and the script makes text of them, never markup. A content security policy lets nothing
run but that script, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from onnxcomp.errors import UsageError

__all__ = ["page", "write_page"]

_FOLDER = Path(__file__).parent
_SCRIPTS = ("elements.js", "charts.js", "table.js", "page.js")

# What the page reads of a result; docs/result.schema.json has all of it.
_NEEDED_OF_SITES: Mapping[str, type] = {
    "name": str,
    "shape": list,
    "uses": list,
    "method": str,
    "params": dict,
    "bytes_before": int,
    "bytes_after": int,
}
_NEEDED: Mapping[str, type | tuple[type, ...]] = {
    "input": dict,
    "output": dict,
    "ratio": (int, float),
    "coverage": (int, float),
    "sites": list,
    "seconds": dict,
    "versions": dict,
    "config": dict,
}


def page(
    result: Mapping[str, Any],
    *,
    frontier: Sequence[Mapping[str, Any]] = (),
    bench: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page of one run.

    Args:
        result: The JSON object of ``onnxcomp optimize``, as `Report.to_json` gives it.
        frontier: Points of ``onnxcomp plan --frontier --json``.
        bench: Models of ``onnxcomp bench --json``, the original first.

    Raises:
        UsageError: `result` is something else.
    """
    _check(result)
    script = "\n".join(_text(name) for name in _SCRIPTS)
    style = _text("page.css")
    parts = {
        "TITLE": html.escape(_title(result)),
        "STYLE": style,
        "STYLE_HASH": _digest(style),
        "SCRIPT": script,
        "SCRIPT_HASH": _digest(script),
        "DATA": _data({**result, "frontier": list(frontier), "bench": list(bench)}),
    }
    return re.sub(r"@([A-Z_]+)@", lambda match: parts[match[1]], _text("page.html"))


def write_page(result: Mapping[str, Any], path: str | os.PathLike[str], **extra: Any) -> None:
    """Write `page` to a file.

    Raises:
        UsageError: `result` is not a result of optimize.
    """
    Path(path).write_text(page(result, **extra), encoding="utf-8")


def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _title(result: Mapping[str, Any]) -> str:
    path = result["output"].get("path") or result["input"].get("path") or "a model"
    return f"{PureWindowsPath(str(path)).name}: onnxcomp"  # takes both kinds of slashes


def _check(result: Mapping[str, Any]) -> None:
    _check_keys(result, _NEEDED)
    for name in ("input", "output"):
        _check_keys(result[name], {"bytes": int})
    for site in result["sites"]:
        _check_keys(site, _NEEDED_OF_SITES)


def _check_keys(values: Any, needed: Mapping[str, Any]) -> None:
    for key, kind in needed.items():
        if not isinstance(values, Mapping) or not isinstance(values.get(key), kind):
            raise UsageError(
                f"this is not the result of optimize: {key!r} is missing or wrong",
                hint="write one with onnxcomp optimize MODEL -o OUT --json > result.json",
            )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _data(values: Mapping[str, Any]) -> str:
    """JSON in which no character means anything to HTML."""
    text = json.dumps(_finite(values), separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
