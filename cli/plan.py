"""`onnxcomp plan`: what optimize would do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcomp.cli.options import FILE, OUTPUT, plan_options, settings_in_effect
from onnxcomp.cli.terminal import Terminal, bytes_text, with_terminal

if TYPE_CHECKING:
    from onnxcomp.passes.plan import Plan

__all__ = ["command", "plan_verdict"]


@click.command("plan")
@click.argument("model", type=FILE)
@plan_options
@click.option("-o", "--output", type=OUTPUT, help="Write the plan here: readable, editable JSON.")
@with_terminal
def command(terminal: Terminal, model: Path, output: Path | None, **settings: Any) -> None:
    """Show what optimize would do with these settings: every weight, exact bytes, no work.

    A plan written with -o can be edited and is carried out by: onnxcomp optimize MODEL -o OUT
    --plan plan.json
    """
    import onnxcomp
    from onnxcomp.cli.tables import show_sites
    from onnxcomp.passes.produce import planned_sites

    plan = onnxcomp.plan(model, **settings_in_effect(settings))
    if output is not None:
        plan.save(output)
    errors = {choice.site: choice.error for choice in plan if choice.error is not None}
    show_sites(terminal, planned_sites(plan), errors)
    terminal.finish(plan.to_json(), plan_verdict(plan))
    if not plan.met:
        raise click.exceptions.Exit(onnxcomp.errors.BudgetError.exit_code)


def plan_verdict(plan: Plan) -> str:
    """One line: bytes before and after, and whether the target is met."""
    size = plan.bytes or 0
    text = f"{bytes_text(plan.source.bytes)} -> {bytes_text(size)} ({plan.ratio or 0:.2f}x)"
    if plan.portable_load_bytes:
        text += f", {bytes_text(plan.portable_load_bytes)} of memory to load without the library"
    wanted = plan.budget.bytes
    if wanted is None:
        return text
    if plan.met:
        return f"{text}, target {bytes_text(wanted)}: met, {100 * (1 - size / wanted):.2f} % under"
    return f"{text}, target {bytes_text(wanted)}: MISSED by {100 * (size / wanted - 1):.2f} %"
