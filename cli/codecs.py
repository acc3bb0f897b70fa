"""`onnxcomp codecs`: the ways to store a weight."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import click

from onnxcomp.cli.terminal import Terminal, percent_text, with_terminal

if TYPE_CHECKING:
    from onnxcomp.passes.codecs.params import Params
    from onnxcomp.passes.codecs.protocol import Codec
    from onnxcomp.passes.weight import WeightSite

__all__ = ["command"]


@click.command("codecs")
@click.argument("name", required=False)
@with_terminal
def command(terminal: Terminal, name: str | None) -> None:
    """List the ways to store a weight; with NAME, its parameters and what they cost.

    Sizes and errors are those of a 1024 x 1024 float32 weight with normally distributed values;
    half of them are zero for codecs that leave out zeros.
    """
    from onnxcomp.errors import UsageError
    from onnxcomp.passes.codecs import CODECS
    from onnxcomp.passes.suggest import suggest

    if name is not None and name not in CODECS:
        raise UsageError(f"no codec named '{name}'", hint=suggest(name, CODECS))
    chosen = list(CODECS.values()) if name is None else [CODECS[name]]
    entries = [describe(codec) for codec in chosen]
    if name is None:
        rows = [(e["name"], "no" if e["stock"] else "yes", e["summary"]) for e in entries]
        terminal.table(("codec", "library", "what it stores"), rows, left=3)
        verdict = "onnxcomp codecs NAME shows parameters, sizes and errors."
    else:
        show(terminal, entries[0])
        verdict = f"Use it with: onnxcomp optimize MODEL -o OUT --method {name}"
    terminal.finish({"codecs": entries}, verdict)


def show(terminal: Terminal, entry: dict[str, Any]) -> None:
    """Print one codec's parameters and settings."""
    terminal.say(f"{entry['name']}: {entry['summary']}")
    rows = [(p["name"], p["type"], str(p["default"]), p["meaning"]) for p in entry["params"]]
    if rows:
        terminal.table(("parameter", "type", "default", "meaning"), rows, left=4)
    if entry["qualities"]:
        terminal.table(("quality", "what it stands for"), list(entry["qualities"].items()), left=2)
    if entry["goals"]:
        terminal.table(
            ("instead of a rank", "what it asks for"), list(entry["goals"].items()), left=2
        )
    terminal.table(
        ("settings", "bits per weight", "ratio", "expected error"),
        [
            (
                settings_text(setting["params"]),
                f"{setting['bits_per_weight']:.3f}",
                f"{32 / setting['bits_per_weight']:.2f}x",
                percent_text(setting["expected_error"]),
            )
            for setting in entry["settings"]
        ],
    )


def describe(codec: Codec) -> dict[str, Any]:
    """Everything `codecs` prints about one codec."""
    site = sample_site()
    return {
        "name": codec.name,
        "summary": codec.summary,
        "stock": codec.stock,
        "params": parameters(codec.params_type),
        "qualities": dict(codec.qualities.names) if codec.qualities else {},
        "goals": dict(codec.ranks.names) if codec.ranks else {},
        "settings": [
            {
                "params": params.to_json(),
                "bits_per_weight": 8 * _size(codec, site, params) / site.size,
                "expected_error": codec.predict(site, params),
            }
            for params in codec.candidates(site)
        ],
    }


def _size(codec: Codec, site: WeightSite, params: Params) -> int:
    """Bytes of a weight, and of the basis that it has alone here."""
    size = codec.size(site, params)
    if codec.bases is not None:
        size += sum(tensor.nbytes for tensor in codec.shared(site, params).values())
    return size


def sample_site() -> WeightSite:
    """A plain float32 weight of 1024 x 1024, for codecs of zeros half of them."""
    from onnxcomp.passes.weight import Use, WeightSite

    return WeightSite(
        name="weight",
        shape=(1024, 1024),
        dtype="float32",
        uses=(Use("node", "MatMul", 1, "matmul"),),
        scope="",
        rows=1024,
        length=1024,
        transposed=True,
        kept=512 * 1024,
    )


def parameters(params_type: type[Params]) -> list[dict[str, Any]]:
    """Names, types, defaults and meanings, the last from the ``Attributes:`` of the docstring."""
    defaults = params_type()
    return [
        {
            "name": field.name,
            "type": type(getattr(defaults, field.name)).__name__,
            "default": getattr(defaults, field.name),
            "meaning": attribute_text(params_type.__doc__ or "", field.name),
        }
        for field in dataclasses.fields(params_type)
    ]


def attribute_text(docstring: str, name: str) -> str:
    """The text of one attribute in a Google-style docstring; empty where there is none."""
    match = re.search(rf"^\s+{name}:\s*(.*(?:\n\s{{9,}}\S.*)*)", docstring, re.MULTILINE)
    return " ".join(match[1].split()) if match else ""


def settings_text(params: dict[str, Any]) -> str:
    """Parameters on one line: ``bits=4 states=7``."""
    return " ".join(f"{key}={value}" for key, value in params.items()) or "-"
