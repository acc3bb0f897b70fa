"""How well a language model predicts a text, and how far it is from another model.

Perplexity, the divergence of Kullback and Leibler to a reference, and how often both find the same
token likeliest. A text is cut into windows that do not overlap; every token of a window is
predicted from those before it in the window. One window is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.runtime.language.decoder import Decoder
from onnxcomp.runtime.language.text import read_tokens
from onnxcomp.runtime.language.windows import CONTEXT
from onnxcomp.runtime.session import open_session
from onnxcomp.runtime.structure import model_bytes

__all__ = ["Divergence", "LanguageScore", "evaluate_lm", "windows_of"]

Array = npt.NDArray[Any]
PathLike = str | os.PathLike[str]

# Told about windows done, all of them, and what is measured so far.
Progress = Callable[[int, int, str], None]

# Rows of logits that are converted at a time: 64 rows of 150,000 entries are 38 MB.
_ROWS = 64

# So many windows are read where nothing else is asked for.
WINDOWS = 40


@dataclasses.dataclass(frozen=True, slots=True)
class LanguageScore:
    """What was measured on a text.

    Attributes:
        tokens: How many predictions were judged.
        windows: How many windows they are from.
        context: Tokens of a window.
        perplexity: ``exp`` of the mean surprise at the text's tokens, in nats.
        reference_perplexity: The same of the reference; None without one, as all that follow.
        kl: Mean divergence of the model's predictions from the reference's, in nats.
        kl_stderr: Its standard error over tokens.
        kl_p99: The divergence that one prediction in a hundred exceeds.
        same_token: Share of predictions whose likeliest token is the reference's.
        model: Path and bytes of the model.
        reference: The same of the reference; None without one.
    """

    tokens: int
    windows: int
    context: int
    perplexity: float
    reference_perplexity: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    kl_p99: float | None = None
    same_token: float | None = None
    model: dict[str, Any] | None = None
    reference: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``onnxcomp eval lm``."""
        return dataclasses.asdict(self)


class Divergence:
    """Adds up what logits say about a text, window by window.

    With logits of a reference beside them, it adds up the divergence as well. Sums are in float64.
    """

    def __init__(self) -> None:
        self._surprise = self._reference_surprise = 0.0
        self._kl: list[Array] = []
        self._same = self._tokens = self._windows = 0

    def add(self, logits: Array, targets: Array, reference: Array | None = None) -> None:
        """Judge the predictions of one window.

        Args:
            logits: Of the model, ``(length, vocabulary)``.
            targets: The tokens that followed, ``(length,)``.
            reference: Of the reference, as `logits`; in all windows or in none.
        """
        self._windows += 1
        self._tokens += len(targets)
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            found, wanted = log_softmax(logits[rows]), targets[rows, None]
            self._surprise -= _picked(found, wanted)
            if reference is not None:
                exact = log_softmax(reference[rows])
                self._reference_surprise -= _picked(exact, wanted)
                terms = np.exp(exact) * (exact - found)
                self._kl.append(terms.sum(-1, dtype=np.float64))
                self._same += int((exact.argmax(-1) == found.argmax(-1)).sum())

    def score(self, context: int) -> LanguageScore:
        """What was found so far, in windows of so many tokens.

        Raises:
            ModelError: The predictions are not numbers.
        """
        count = max(self._tokens, 1)
        if not math.isfinite(self._surprise):
            raise ModelError("the model's logits are not finite", hint="onnxcomp verify shows more")
        plain = LanguageScore(
            self._tokens, self._windows, context, _perplexity(self._surprise / count)
        )
        if not self._kl:
            return plain
        kl = np.concatenate(self._kl)
        if not np.isfinite(kl).all():
            raise ModelError(
                "the divergence is not finite: logits of the reference or the model are not",
                hint="onnxcomp verify shows more",
            )
        return dataclasses.replace(
            plain,
            reference_perplexity=_perplexity(self._reference_surprise / count),
            kl=float(kl.mean()),
            kl_stderr=float(kl.std() / math.sqrt(len(kl))),
            kl_p99=float(np.quantile(kl, 0.99)),
            same_token=self._same / count,
        )


def log_softmax(logits: Array) -> Array:
    """Natural logarithms of probabilities, float32, over the last axis."""
    shifted = logits.astype(np.float32)
    shifted -= shifted.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)
    shifted -= np.log(total).astype(np.float32)
    return shifted


def _picked(values: Array, places: Array) -> float:
    return float(np.take_along_axis(values, places, -1).sum(dtype=np.float64))


def _perplexity(surprise: float) -> float:
    """``exp(surprise)``, infinite where no float holds it."""
    return math.exp(surprise) if surprise < 700 else math.inf


def windows_of(tokens: Array, context: int, most: int | None) -> Iterator[tuple[Array, Array]]:
    """Windows of a text: tokens ``(context,)``, and those that follow each.

    A text shorter than a window is one, and what is left behind the last whole window is left out.

    Args:
        tokens: All tokens ``(count,)``.
        context: Tokens of a window.
        most: How many windows at most; None for all.
    """
    context = min(context, len(tokens) - 1)
    count = (len(tokens) - 1) // context
    for index in range(count if most is None else min(count, most)):
        start = index * context
        yield tokens[start : start + context], tokens[start + 1 : start + context + 1]


def evaluate_lm(
    model: PathLike,
    reference: PathLike | None = None,
    *,
    text: PathLike | None = None,
    tokens: PathLike | Array | None = None,
    tokenizer: PathLike | None = None,
    context: int = CONTEXT,
    windows: int | None = WINDOWS,
    library: bool | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> LanguageScore:
    """How well a language model predicts a text, and how far it is from a reference.

    Models with a KV cache and without one are run alike: a window is one pass over an empty cache.

    Args:
        model: The model to judge, compressed or not.
        reference: The model to compare with, usually the dense original; None for perplexity alone.
        text: A file of text; it is read by the tokenizer.
        tokens: Instead of it the text's tokens: a file ``.npy``, or whole numbers.
        tokenizer: ``tokenizer.json`` or its folder; None for the one beside the model or the
            reference.
        context: Tokens of a window.
        windows: How many windows at most; None for all that the text has.
        library: Whether the operator library is used; None for where the model needs it.
        threads: Threads of one operator; None for ONNX Runtime's choice.
        progress: Called after every window: how many are done, how many there are, what was found.

    Raises:
        UsageError: The text, the tokens or a number make no sense, or a model keeps the logits of
            some positions only.
        ModelError: A model is no decoder, or cannot be loaded or run.
        RuntimeMissingError: ONNX Runtime, the operator library or tokenizers is missing.
    """
    if context < 1 or (windows is not None and windows < 1):
        raise UsageError(f"{windows} windows of {context} tokens are no text")
    models = [model] if reference is None else [model, reference]
    chosen = list(
        windows_of(
            read_tokens(models, text=text, tokens=tokens, tokenizer=tokenizer), context, windows
        )
    )
    decoder = Decoder(open_session(model, library=library, threads=threads))
    exact = None if reference is None else Decoder(open_session(reference, threads=threads))
    found = Divergence()
    for done, (fed, wanted) in enumerate(chosen):
        if progress is not None and done:
            progress(done, len(chosen), _so_far(found, len(fed)))
        compared = None if exact is None else _predictions(exact, fed, reference)
        found.add(_predictions(decoder, fed, model), wanted, compared)
    if progress is not None:
        progress(len(chosen), len(chosen), "")
    return dataclasses.replace(
        found.score(len(chosen[0][0])),
        model=_described(model),
        reference=None if reference is None else _described(reference),
    )


def _so_far(found: Divergence, context: int) -> str:
    """What a progress bar says."""
    score = found.score(context)
    kl = "" if score.kl is None else f"KL {score.kl:.4f}, "
    return f"{kl}perplexity {score.perplexity:.2f}"


def _predictions(decoder: Decoder, tokens: Array, model: PathLike | None) -> Array:
    """Logits after each token of a window, ``(length, vocabulary)``."""
    logits = decoder.logits(tokens[None])
    if logits.shape[:2] != (1, len(tokens)):
        raise UsageError(
            f"{model} gives logits {list(logits.shape)} for {len(tokens)} tokens: it keeps those "
            "of the last positions only",
            hint="judge a twin that was made without --logits-to-keep; it has the same weights",
        )
    found: Array = logits[0]
    return found


def _described(model: PathLike) -> dict[str, Any]:
    return {"path": str(Path(model)), "bytes": model_bytes(model)}
