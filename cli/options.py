"""Options that several commands have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from onnxcomp.cli.values import ratio, rule, shape, size

__all__ = ["EXTERNAL_DATA", "FILE", "OUTPUT", "input_options", "plan_options"]

F = TypeVar("F", bound=Callable[..., Any])

# Whether a file exists is for the library to say: its error has the exit code of a bad model.
FILE = click.Path(path_type=Path)
OUTPUT = click.Path(path_type=Path, dir_okay=False)

EXTERNAL_DATA = click.option(
    "--external-data",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Put tensors into OUT.data; auto: from 64 MiB on.",
)

_PLAN_OPTIONS = (
    click.option(
        "-m", "--method", multiple=True, default=("auto",), show_default=True,
        help="Codecs to choose from (repeat, or join with +); see onnxcomp codecs.",
    ),
    click.option("--bits", type=click.IntRange(1), help="Bits per weight, the same for all; 4 "
                 "where no target is given."),
    click.option("--ratio", type=ratio, help="How many times smaller the file is to be: 8 or 8x."),
    click.option("--target-size", type=size, help="Largest size of the output: 120MB."),
    click.option("--include", metavar="RE", multiple=True, help="Touch only weights that match."),
    click.option("--exclude", metavar="RE", multiple=True, help="Leave weights alone that match."),
    click.option(
        "--set", "set_", type=rule, multiple=True,
        help="Settings for weights that match: 'encoder.*:bits=3' or 'head:method=dense'.",
    ),
    click.option(
        "--min-size", type=size, default="16KiB", show_default=True,
        help="Leave smaller tensors alone.",
    ),
    click.option(
        "--mode", type=click.Choice(["auto", "fused", "folded", "decode"]), default="auto",
        show_default=True, help="Compute on codes, expand at load, or decode at every run.",
    ),
    click.option(
        "--precision", type=click.Choice(["int8", "exact"]), default="int8", show_default=True,
        help="Activations in products on codes: rounded to 8 bits per group, or as they are.",
    ),
    EXTERNAL_DATA,
    click.option("--freeze-inputs", is_flag=True, help="Compress weights that the model also lists "
                 "as inputs; they can no longer be fed."),
    click.option("--stock", is_flag=True, help="Only methods whose models need no operator library "
                 "anywhere; onnxcomp codecs says which."),
    click.option("--rest", type=click.Choice(["keep", "fp16"]), default="keep", show_default=True,
                 help="Weights that no method makes smaller: as they are, or in half precision."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of random choices."),
)  # fmt: skip

_INPUT_OPTIONS = (
    click.option(
        "--data", multiple=True, metavar="PATH",
        help="Inputs: an .npz file, a folder of them, or name=file.npy; else they are made up.",
    ),
    click.option(
        "--shape", "shapes", type=shape, multiple=True, help="Size of one input: ids:1,128."
    ),
)  # fmt: skip


def plan_options(function: F) -> F:
    """Options that decide which bytes are written."""
    return _with(function, _PLAN_OPTIONS)


def input_options(function: F) -> F:
    """Options that say what a model is run on."""
    return _with(function, _INPUT_OPTIONS)


def _with(function: F, options: tuple[Callable[[F], F], ...]) -> F:
    for option in reversed(options):
        function = option(function)
    return function
