"""`onnxcomp plan`: what optimize would do."""

from __future__ import annotations

from collections.abc import Sequence
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
from onnxcomp.cli.terminal import Terminal, bytes_text, percent_text, with_terminal
from onnxcomp.passes.config.options import PlanOptions

if TYPE_CHECKING:
    from onnxcomp.passes.planning.pareto import FrontierPoint
    from onnxcomp.passes.planning.plan import Plan

__all__ = ["command", "plan_verdict", "show_frontier"]


@click.command("plan", cls=SectionedCommand)
@click.argument("model", type=FILE)
@table_options(PlanOptions)
@click.option(
    "-o", "--output", cls=SectionedOption, section="run", type=OUTPUT, metavar="PLAN.json",
    help="Write the plan here: readable, editable JSON.",
)  # fmt: skip
@click.option(
    "--frontier", cls=SectionedOption, section="run", is_flag=True,
    help="Size against expected error, over the whole range of sizes.",
)  # fmt: skip
@with_terminal
def command(
    terminal: Terminal,
    model: Path,
    output: Path | None,
    frontier: bool,
    **settings: Any,
) -> None:
    """Show what optimize would do with these settings: every weight, exact bytes, no work.

    Pruning is done in memory, because the bytes depend on what is left.

    A plan written with -o can be edited and is carried out by: onnxcomp optimize MODEL -o OUT
    --plan plan.json
    """
    import onnxcomp
    from onnxcomp.cli.tables import show_sites
    from onnxcomp.passes.driver.run_report import planned_sites

    settings = settings_in_effect(settings)
    if frontier:
        with progress(terminal, "planning"):
            points = onnxcomp.frontier(model, **settings)
        show_frontier(terminal, points)
        return
    with progress(terminal, "planning"):
        plan = onnxcomp.plan(model, **settings)
    if output is not None:
        plan.save(output)
    show_division(terminal, plan.division)
    if plan.pruned is not None:
        show_pruned(terminal, plan.pruned.to_json())
    show_sites(terminal, planned_sites(plan), {choice.site: choice for choice in plan})
    terminal.finish(plan.to_json(), plan_verdict(plan))
    if not plan.met:
        raise click.exceptions.Exit(onnxcomp.errors.BudgetError.exit_code)


def show_frontier(terminal: Terminal, points: Sequence[FrontierPoint]) -> None:
    """Print and draw size against expected error."""
    from onnxcomp.cli.plots import scatter

    known = all(point.error is not None for point in points)
    rows = [
        (
            point.setting or "mixed",
            bytes_text(point.bytes),
            f"{point.ratio:.2f}x",
            percent_text(point.error),
            percent_text(point.weight_error),
        )
        for point in points
    ]
    terminal.table(("settings", "bytes", "ratio", "output error", "weight error"), rows)
    drawn = [
        (point.bytes, (point.error if known else None) or point.weight_error, mark)
        for mark, wanted in (("o", True), ("*", False))
        for point in points
        if bool(point.setting) == wanted
    ]
    ends = (bytes_text(points[0].bytes), bytes_text(points[-1].bytes)) if points else ("", "")
    for line in scatter(drawn, labels=ends):
        terminal.say(line)
    axis = "outputs" if known else "weights"
    verdict = f"* mixed settings, o equal settings; expected relative error of the {axis}"
    terminal.finish({"frontier": [point.to_json() for point in points]}, verdict)


def plan_verdict(plan: Plan) -> str:
    """One line: bytes before and after, and whether the target is met."""
    size = plan.bytes or 0
    text = f"{bytes_text(plan.source.bytes)} -> {bytes_text(size)} ({plan.ratio or 0:.2f}x)"
    if plan.portable_load_bytes:
        text += f", {bytes_text(plan.portable_load_bytes)} of memory to load without the library"
    if plan.error is not None:
        text += f", expected error {100 * plan.error:.2f} %"
    if plan.loss_interval is not None:
        low, high = plan.loss_interval
        text += f", expected loss {plan.loss:.3g} ({low:.3g} to {high:.3g})"
    text = ", ".join([text, *prune_text(None if plan.pruned is None else plan.pruned.to_json())])
    wanted = plan.budget.bytes
    if wanted is None:
        return text
    if size <= wanted:
        return f"{text}, target {bytes_text(wanted)}: met, {100 * (1 - size / wanted):.2f} % under"
    return f"{text}, target {bytes_text(wanted)}: MISSED by {100 * (size / wanted - 1):.2f} %"
