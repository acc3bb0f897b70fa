"""`onnxcomp eval`: judge a model by what it is used for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcomp.cli.options import FILE
from onnxcomp.cli.progress import progress
from onnxcomp.cli.terminal import Terminal, bytes_text, percent_text, with_terminal

if TYPE_CHECKING:
    from onnxcomp.runtime.language.evaluation import LanguageScore

__all__ = ["command"]


@click.group("eval")
def command() -> None:
    """Judge a model by what it is used for."""


@command.command("lm", short_help="A language model, on a text.")
@click.argument("model", type=FILE)
@click.option(
    "--reference", type=FILE, help="The model to compare with, usually the dense original."
)
@click.option("--text", type=FILE, help="A text that neither model was made with, in UTF-8.")
@click.option("--tokens", type=FILE, help="Instead of it the text's tokens, FILE.npy.")
@click.option(
    "--tokenizer", type=FILE,
    help="The model's tokenizer.json or its folder; else the one beside MODEL or the reference.",
)  # fmt: skip
@click.option(
    "--context", type=click.IntRange(1), default=256, show_default=True,
    help="Tokens of a window; each is predicted from those before it in the window.",
)  # fmt: skip
@click.option(
    "--windows", type=click.IntRange(1), default=40, show_default=True,
    help="How many windows are read at most.",
)  # fmt: skip
@click.option("--portable", is_flag=True, help="Run MODEL without the operator library.")
@click.option("--threads", type=click.IntRange(1), help="Threads of one operator.")
@with_terminal
def lm(
    terminal: Terminal,
    model: Path,
    reference: Path | None,
    portable: bool,
    **settings: Any,
) -> None:
    """Perplexity of a language model on a text and, with --reference, the divergence (KL) of its
    predictions from the reference's and how often both find the same token likeliest.

    Decoders with a KV cache and models without one are read alike. One window is in memory at a
    time.
    """  # noqa: D205 - the summary of a command may be long
    import onnxcomp

    with progress(terminal, "reading", "windows") as show:
        score = onnxcomp.evaluate_lm(
            model, reference, library=False if portable else None, progress=show, **settings
        )
    show_score(terminal, score)


def show_score(terminal: Terminal, score: LanguageScore) -> None:
    """Print one line for each model, and the verdict."""
    columns = ["model", "file", "perplexity", "KL (nats)", "KL, 99 %", "same token"]
    rows: list[tuple[str, ...]] = []
    if score.reference is not None:
        size = bytes_text(score.reference["bytes"])
        perplexity = f"{score.reference_perplexity:.2f}"
        rows.append((score.reference["path"], size, perplexity, "0", "0", percent_text(1.0)))
    assert score.model is not None
    rows.append(
        (
            score.model["path"],
            bytes_text(score.model["bytes"]),
            f"{score.perplexity:.2f}",
            "-" if score.kl is None else f"{score.kl:.4f} ± {score.kl_stderr:.4f}",
            "-" if score.kl_p99 is None else f"{score.kl_p99:.3g}",
            percent_text(score.same_token),
        )
    )
    shown = 3 if score.reference is None else len(columns)
    spare = [name for name in ("KL, 99 %", "file") if name in columns[:shown]]
    terminal.table(columns[:shown], [row[:shown] for row in rows], spare=spare)
    terminal.finish(score.to_json(), verdict(score))


def verdict(score: LanguageScore) -> str:
    """What was found, on one line."""
    where = f"on {score.tokens} tokens"
    if score.kl is None:
        return f"perplexity {score.perplexity:.2f} {where}"
    return (
        f"KL {score.kl:.4f} nats, the same token {percent_text(score.same_token)}, perplexity "
        f"{score.perplexity:.2f} (reference {score.reference_perplexity:.2f}) {where}"
    )
