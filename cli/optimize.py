"""`onnxcomp optimize`: write a smaller model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcomp.cli.options import (
    FILE,
    OUTPUT,
    SectionedCommand,
    SectionedOption,
    settings_in_effect,
    table_options,
)
from onnxcomp.cli.progress import progress
from onnxcomp.cli.prune import prune_text, show_division, show_pruned
from onnxcomp.cli.terminal import Terminal, bytes_text, with_terminal
from onnxcomp.cli.verdicts import (
    code_remarks,
    gain_lines,
    judged_text,
    remarks_of,
    speed_lines,
    warnings_of,
)
from onnxcomp.passes.config.options import OptimizeOptions

if TYPE_CHECKING:
    from onnxcomp.passes.driver.api import Result
    from onnxcomp.passes.report.report import Report

__all__ = ["command"]

# A target that is left unused by more than this part is remarked on.
_NEAR = 0.01


@click.command("optimize", cls=SectionedCommand)
@click.argument("model", type=FILE)
@click.option(
    "-o", "--output", cls=SectionedOption, section="output", type=OUTPUT, metavar="OUT",
    help="The new model.",
)  # fmt: skip
@table_options(OptimizeOptions)
@click.option(
    "--report", cls=SectionedOption, section="output", type=OUTPUT, metavar="report.html",
    help="Write the result as a page here, too.",
)  # fmt: skip
@with_terminal
def command(
    terminal: Terminal,
    model: Path,
    output: Path | None,
    report: Path | None,
    **settings: Any,
) -> None:
    """Write a smaller model with the same inputs and outputs.

    The result is run with and without the operator library and compared with the original; the
    loss is reported. Without --bits, --ratio or --target-size every weight gets 4 bits.
    """
    import onnxcomp

    options = settings_in_effect(settings)
    with progress(terminal, "encoding") as show:
        try:
            result = onnxcomp.optimize(model, output, progress=show, **options)
            failure = None
        except (onnxcomp.TargetMissedError, onnxcomp.RejectedError) as error:
            result, failure = error.result, error
    if report is not None:
        from onnxcomp.passes.report.page import write_page

        write_page(result.report.to_json(), report)
    show_result(terminal, result)
    lines = [*first_lines(result), verdict(result), *last_lines(result)]
    terminal.finish(result.report.to_json(), "\n".join(lines))
    if failure is not None:
        click.echo(f"error: {failure.message}\nhint: {failure.hint}", err=True)
        raise click.exceptions.Exit(failure.exit_code)


def show_result(terminal: Terminal, result: Result) -> None:
    """Print what became of each weight and how close the outputs are."""
    from onnxcomp.cli.tables import show_sites
    from onnxcomp.cli.verify import show_verification

    show_division(terminal, result.plan.division)
    if result.report.prune is not None:
        show_pruned(terminal, result.report.prune)
    show_sites(terminal, result.report.sites, {choice.site: choice for choice in result.plan})
    if result.verify is not None:
        made_up = result.report.config["data"] is None
        show_verification(terminal, result.verify.to_json(), made_up=made_up)
    report = result.report
    if terminal.verbose:
        stages = ", ".join(f"{name} {spent:.2f} s" for name, spent in report.seconds.items())
        terminal.say(f"{stages}; peak memory {bytes_text(report.peak_rss_bytes)}")


def verdict(result: Result) -> str:
    """One line: bytes before and after, coverage, and what was checked."""
    report = result.report
    parts = [
        f"{bytes_text(report.input.bytes)} -> {bytes_text(report.output.bytes)}"
        f" ({report.ratio:.2f}x)",
        covered_text(report),
        *prune_text(report.prune),
        *target_text(report),
        "dry run: nothing written" if result.path is None else f"{result.path}",
    ]
    if result.path is not None:
        parts.append(
            judged_text(
                report.verify,
                made_up=report.config["data"] is None,
                evaluated=report.evaluation is not None,
            )
        )
    return ", ".join(parts)


def first_lines(result: Result) -> list[str]:
    """What is good to know before the verdict."""
    from onnxcomp.runtime.machine import current_isa, look, target_of

    report = result.report
    lines = remarks_of(report.verify, judged=report.evaluation is not None)
    if result.path is not None:
        lines += code_remarks(report.to_json(), target_of(current_isa(look())))
    return lines


def last_lines(result: Result) -> list[str]:
    """What must not be missed: a large loss, and a target that was not met."""
    from onnxcomp.passes.report.form import INLINED

    report, lines = result.report, warnings_of(result.report.verify)
    if result.path is not None:
        lines += speed_lines(report.to_json())
        lines += gain_lines(report.to_json())
    if report.config["functions"] != "local" and result.path is not None:
        lines.append(f"note: {INLINED}")
    if report.target is not None and not report.target["met"]:
        size, wanted = bytes_text(report.output.bytes), bytes_text(report.target["bytes"])
        lines.append(f"target MISSED: {size}, {wanted} were asked for")
    return lines


def covered_text(report: Report) -> str:
    """How much of the weights is compressed, or that nothing is left to do."""
    from onnxcomp.passes.analysis.weight_sites import COMPRESSED_PART

    before = any(site.reason.startswith(COMPRESSED_PART) for site in report.sites)
    if before and not any(site.compressed for site in report.sites):
        return "already compressed"
    return f"{100 * report.coverage:.1f} % of weight bytes compressed"


def target_text(report: Report) -> list[str]:
    """Whether the target was met; nothing where there was none."""
    if report.target is None:
        return []
    wanted = report.target["bytes"]
    verdict = f"target {bytes_text(wanted)} {'met' if report.target['met'] else 'MISSED'}"
    under = 1 - report.output.bytes / max(1, wanted)
    if under <= _NEAR:
        return [verdict]
    return [verdict, f"{100 * under:.1f} % under it, no better plan was found in between"]
