"""Options that several commands have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from onnxcomp.cli.prune import PRUNE_OPTIONS
from onnxcomp.cli.values import ratio, rule, shape, size
from onnxcomp.passes.config.presets import PRESETS

__all__ = [
    "EXTERNAL_DATA",
    "FILE",
    "OUTPUT",
    "calibration_option",
    "data_options",
    "input_options",
    "plan_options",
    "prune_options",
    "settings_in_effect",
]

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
        "--preset", type=click.Choice(list(PRESETS)),
        help="Settings with a name; other options win. In brackets: times smaller, and inputs with "
        "another result, of models without --data. " + " ".join(
            f"{name.capitalize()}: {preset.meaning}{preset.measured and f' ({preset.measured})'}."
            for name, preset in PRESETS.items()
        ),
    ),
    click.option("--config", type=FILE, help="Settings from a YAML file; other options win. "
                 "onnxcomp config init writes one."),
    click.option(
        "-m", "--method", multiple=True, default=("auto",), show_default=True,
        help="Codecs to choose from (repeat, or join with +); see onnxcomp codecs.",
    ),
    click.option("--bits", type=click.IntRange(1), help="Bits per weight, the same for all; 4 "
                 "where no target is given."),
    click.option("--ratio", type=ratio, help="How many times smaller the file is to be: 8 or 8x."),
    click.option("--target-size", type=size, help="Largest size of the output: 120MB."),
    click.option(
        "--max-error", type=click.FloatRange(0, min_open=True),
        help="Largest relative error of an output; without a target: as small as it allows.",
    ),
    click.option(
        "--max-slowdown", type=click.FloatRange(0, min_open=True),
        help="How many times as long as MODEL the output may run, as measured.",
    ),
    click.option("--include", metavar="RE", multiple=True, help="Touch only weights that match."),
    click.option("--exclude", metavar="RE", multiple=True, help="Leave weights alone that match."),
    click.option(
        "--set", "set_", type=rule, multiple=True,
        help="Settings for weights that match: 'encoder.*:bits=3', 'head:method=dense' or "
        "'.*:op=Conv,bits=5'.",
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
    click.option(
        "--rest", type=click.Choice(["keep", "fp16", "exact"]), default="keep", show_default=True,
        help="Weights that no method makes smaller: as they are, in half precision, or in half "
        "precision where no value changes.",
    ),
    click.option("--detect-sharing", is_flag=True, help="Store weights whose values repeat in the "
                 "same order by those values; they keep their bits."),
    click.option("--distill", type=click.IntRange(0), default=0, metavar="N", help="Train what "
                 "weights share (--method hash) for N steps towards MODEL's outputs on --data; "
                 "needs torch."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of random choices."),
)  # fmt: skip

_DATA_OPTIONS = (
    click.option(
        "--data", multiple=True, metavar="PATH",
        help="Inputs: an .npz file, a folder of them, or name=file.npy; else they are made up.",
    ),
)  # fmt: skip

_INPUT_OPTIONS = (
    *_DATA_OPTIONS,
    click.option(
        "--shape", "shapes", type=shape, multiple=True, help="Size of one input: ids:1,128."
    ),
)

_CALIBRATION = click.option(
    "--calibration", type=click.Choice(["sequential", "parallel", "off"]), default="sequential",
    show_default=True, help="How --data decides about codes: each weight behind the compressed "
    "earlier ones, behind the dense ones, or not at all.",
)  # fmt: skip


def settings_in_effect(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a command's options, those not given taken from its preset and configuration.

    Rules of the command line come before those of the file: the first match wins.

    Raises:
        UsageError: The configuration is wrong.
    """
    given = dict(values)
    preset, config = given.pop("preset"), given.pop("config")
    if preset is None and config is None:
        return given
    from onnxcomp.passes.config.file import TARGETS, config_options, merged
    from onnxcomp.passes.config.presets import preset_options

    source = click.get_current_context().get_parameter_source
    explicit = {k: v for k, v in given.items() if source(k) is not ParameterSource.DEFAULT}
    stock = bool(explicit.get("stock"))
    if config is None:
        base = preset_options(preset, stock=stock)
    else:
        base = config_options(config, preset=preset, stock=stock)
    rules = (*explicit.get("set_", ()), *base.get("set_", ()))
    chosen = merged(base, explicit) | {"set_": rules}
    known = {name: value for name, value in chosen.items() if name in given}
    return given | dict.fromkeys(TARGETS) | known


def data_options(function: F) -> F:
    """Options that say what a plan may look at besides the weights."""
    return _with(function, (*_DATA_OPTIONS, _CALIBRATION))


def calibration_option(function: F) -> F:
    """The option that says what calibration inputs are used for."""
    return _CALIBRATION(function)


def prune_options(function: F) -> F:
    """Options that say how much is pruned before weights are encoded."""
    return _with(function, PRUNE_OPTIONS)


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
