"""`onnxcomp bench`: load time, latency, memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from onnxcomp.cli.options import FILE, input_options, option_of
from onnxcomp.cli.terminal import Terminal, bytes_text, with_terminal
from onnxcomp.passes.config.kinds import Number

__all__ = ["command", "milliseconds_text", "show_bench"]


def seconds(text: str | float) -> float:
    """A time for each model, finite and above 0."""
    return Number(above=0.0).read(str(text), "--seconds")  # type: ignore[no-any-return]


@click.command("bench")
@click.argument("models", type=FILE, nargs=-1)
@input_options
@click.option("--threads", type=click.IntRange(1), help="Threads of one operator.")
@click.option(
    "--portable", is_flag=True, help="Measure compressed models without the library, too."
)
@click.option(
    "--costs", is_flag=True,
    help="Measure what products cost on this machine, for --max-slowdown; needs no model.",
)  # fmt: skip
@click.option(
    "--rivals", is_flag=True,
    help="Compare the first model, a dense one, with what else it could be: integers of ONNX "
    "Runtime, and codes of 4, 3 and 2 bits for this machine, made for the occasion.",
)  # fmt: skip
@click.option(
    "--generate", is_flag=True,
    help="Measure tokens per second of decoders: a prompt, and decoding with the KV cache.",
)  # fmt: skip
@click.option(
    "--prompt", type=click.IntRange(1), default=128, show_default=True,
    help="With --generate: tokens of the prompt.",
)  # fmt: skip
@click.option(
    "--context", "contexts", type=click.IntRange(1), multiple=True, default=(64, 512),
    show_default=True, help="With --generate: positions in the cache when decoding begins.",
)  # fmt: skip
@click.option(
    "--seconds", type=seconds, default=2.0, show_default=True, help="Time for each model and task."
)
@option_of("seed", help="Seed of made-up inputs.")
@with_terminal
def command(
    terminal: Terminal,
    models: tuple[Path, ...],
    data: tuple[str, ...],
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    costs: bool,
    rivals: bool,
    generate: bool,
    prompt: int,
    contexts: tuple[int, ...],
    **settings: Any,
) -> None:
    """Measure models on the same inputs, each in a process of its own, taking turns.

    Times on a machine that does other things are only comparable within one run.
    """
    from onnxcomp.runtime.bench import bench

    if costs:
        show_costs(terminal)
        return
    if not models:
        raise click.UsageError("name at least one model, or give --costs")
    if generate and rivals:
        raise click.UsageError("--generate and --rivals are two kinds of tables: give one of them")
    refuse_without_memory(models, portable=settings["portable"])
    if generate:
        if data or shapes:
            raise click.UsageError("--generate makes up its tokens: leave out --data and --shape")
        show_generation(terminal, models, prompt=prompt, contexts=contexts, **settings)
        return
    if rivals:
        settings |= {"data": data or None, "shapes": dict(shapes)}
        document = bench_rivals(terminal, models, settings)
    else:
        document = bench(models, data=data or None, shapes=dict(shapes), **settings)
    show_bench(terminal, document["models"])
    terminal.finish(document, bench_verdict(document["models"]))


def refuse_without_memory(models: Sequence[Path], *, portable: bool) -> None:
    """Refuse models whose sessions do not fit into memory side by side.

    Raises:
        UsageError: They do not, with the figures.
    """
    from onnxcomp.errors import UsageError
    from onnxcomp.passes.lowering.session_memory import held_bytes
    from onnxcomp.runtime.bench import forms_of
    from onnxcomp.runtime.memory import available_memory

    available = available_memory()
    forms = [(path, form != "portable") for path in models for form in forms_of(path, portable)]
    needed = held_bytes(forms)
    if available is not None and needed > available:
        raise UsageError(
            f"{len(forms)} {'session' if len(forms) == 1 else 'sessions side by side'} need about "
            f"{bytes_text(needed)} of memory, and {bytes_text(available)} are available",
            hint="measure one model at a time, without --portable; verify compares models that "
            "do not fit",
        )


def bench_rivals(
    terminal: Terminal, models: tuple[Path, ...], settings: dict[str, Any]
) -> dict[str, Any]:
    """Measure models together with other forms of the first one."""
    from onnxcomp.passes.driver.rivals import make_rivals
    from onnxcomp.runtime.bench import bench
    from onnxcomp.runtime.inputs import load_inputs, synthesize_inputs

    if settings["data"]:
        feeds = load_inputs(settings["data"], models[0])
    else:
        feeds = synthesize_inputs(models[0], shapes=settings["shapes"], seed=settings["seed"])
    with tempfile.TemporaryDirectory() as folder:
        made = make_rivals(models[0], Path(folder), feeds=feeds)
        names = {str(rival.path): rival.name for rival in made if rival.path is not None}
        document = bench([*models, *names], **settings | {"data": feeds, "shapes": None})
    for model in document["models"]:
        model["path"] = names.get(model["path"], model["path"])
    left_out = [{"name": r.name, "reason": r.reason} for r in made if r.path is None]
    for rival in left_out:
        terminal.say(f"left out: {rival['name']}: {rival['reason']}")
    return {**document, "left_out": left_out}


def show_costs(terminal: Terminal) -> None:
    """Measure this machine, keep the numbers, and print what some products take."""
    from onnxcomp.passes.latency.cost_table import costs_path, measure_costs

    def told(key: str, done: int, total: int) -> None:
        if not terminal.quiet:
            click.echo(f"measuring {key}, {done} of {total}", err=True)

    table = measure_costs(told)
    points = ((1, 384, 384), (1, 1024, 1024), (16, 1024, 1024), (128, 1024, 1024))
    rows = [
        (key, *(milliseconds_text(1e3 * (table.seconds(key, *point) or 0.0)) for point in points))
        for key in table.coefficients
    ]
    columns = ("weights", *(f"{m} x {length} x {rows}" for m, rows, length in points))
    terminal.table(columns, rows)
    path = costs_path()
    terminal.finish({"path": str(path), **table.to_json()}, f"kept in {path}")


def show_generation(terminal: Terminal, models: Sequence[Path], **settings: Any) -> None:
    """Measure decoders, and print a line for each model and form."""
    from onnxcomp.runtime.language.speed import bench_generation

    document = bench_generation(models, **settings)
    measured = document["models"]
    sizes = [task["context"] for task in max((m["decode"] for m in measured), key=len)]
    columns = ("model", "form", "file", "load", f"prompt of {settings['prompt']}")
    rows = [
        (
            str(model["path"]),
            model["form"],
            bytes_text(model["file_bytes"]),
            milliseconds_text(model["load_ms"]),
            speed_text(model["prompt"]),
            *map(speed_text, model["decode"] or [None] * len(sizes)),
            bytes_text(model["rss_bytes"]),
        )
        for model in measured
    ]
    contexts = (f"decode at {size}" for size in sizes)
    terminal.table((*columns, *contexts, "memory"), rows, left=2, spare=("load", "file"))
    terminal.finish(document, generation_verdict(measured))


def speed_text(task: Mapping[str, float] | None) -> str:
    """Tokens per second; a dash where nothing was measured."""
    return "-" if task is None else f"{task['tokens_per_second']:.3g} tokens/s"


def generation_verdict(models: Sequence[Mapping[str, Any]]) -> str:
    """How fast the models write, the others relative to the first one.

    Where one has no KV cache, they are compared by what all can do: the prompt.
    """
    decoding = all(model["decode"] for model in models)
    tasks = [model["decode"][0] if decoding else model["prompt"] for model in models]
    if len(models) == 1:
        return speed_text(tasks[0])
    parts = [
        f"{model['path']} ({model['form']}) "
        f"{task['tokens_per_second'] / tasks[0]['tokens_per_second']:.2f}x"
        for model, task in zip(models[1:], tasks[1:], strict=True)
    ]
    what = "decoding" if decoding else "the prompt"
    return f"speed of {what} relative to {models[0]['path']}: {', '.join(parts)}"


def show_bench(terminal: Terminal, models: Sequence[Mapping[str, Any]]) -> None:
    """Print one line for each model and form."""
    columns = ("model", "form", "file", "load", "median", "p10", "p90", "memory")
    rows = [
        (
            str(model["path"]),
            model["form"],
            bytes_text(model["file_bytes"]),
            *(
                milliseconds_text(model[key])
                for key in ("load_ms", "median_ms", "p10_ms", "p90_ms")
            ),
            bytes_text(model["rss_bytes"]),
        )
        for model in models
    ]
    terminal.table(columns, rows, left=2, spare=("p10", "p90", "file", "load"))


def bench_verdict(models: Sequence[Mapping[str, Any]]) -> str:
    """How fast the others are, relative to the first model."""
    first = models[0]
    if len(models) == 1:
        return f"{milliseconds_text(first['median_ms'])} a run"
    parts = [
        f"{model['path']} ({model['form']}) {first['median_ms'] / model['median_ms']:.2f}x"
        for model in models[1:]
    ]
    return f"speed relative to {first['path']}: {', '.join(parts)}"


def milliseconds_text(value: float) -> str:
    """A time for people."""
    return f"{value:.1f} ms" if value >= 100 else f"{value:.3g} ms"
