"""Judges of whole models: how far a compressed form is from the dense model, on real inputs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime
from bench_minilm import embed, make_batches, quality, read_pairs
from inputs import CLASSIFIERS, cifar_feeds, pictures
from llm_texts import calibration_feeds, unspaced
from planner_inputs import real_inputs
from tokenizers import Tokenizer

import onnxcomp
from onnxcomp.passes.calibration.statistics import split_batches
from onnxcomp.passes.verification.detections import DetectionAgreement

__all__ = [
    "TRAINING_PAIRS",
    "DecoderModel",
    "Detector",
    "ImageModel",
    "Judge",
    "LabelledImages",
    "LanguageModel",
    "SentenceModel",
    "SpeechModel",
]

Feeds = Sequence[dict[str, npt.NDArray[Any]]]


class Judge(Protocol):
    """What all judges have.

    Attributes:
        model: The dense model.
        loss: Name of the number that says how far a form is from it.
    """

    model: Path
    loss: str

    def __call__(self, path: Path) -> dict[str, float]:
        """Numbers of one form."""
        ...

    def calibration(self, data: Path) -> Feeds:
        """Inputs to calibrate with; none of them is judged by."""
        ...


Array = npt.NDArray[Any]
CONTEXT, BATCH = 256, 4
SETS = ("books", "shakespeare")
TRAINING_PAIRS = 1500
HELD = 8
CALIBRATION_WINDOWS = 32


def _log_probabilities(session: Any, tokens: Array) -> Iterator[Array]:
    """Natural logarithms of predictions, float32 ``(batch, context, vocabulary)``."""
    for start in range(0, len(tokens), BATCH):
        logits = session.run(None, {"input_ids": tokens[start : start + BATCH]})[0]
        logits = logits.astype(np.float32)
        logits -= logits.max(axis=-1, keepdims=True)
        yield logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


class LanguageModel:
    """Judges forms of the language model by the dense one.

    Windows of 256 tokens, not overlapping; divergence is that of Kullback and Leibler.

    Args:
        model: The dense model.
        folder: Where the token files are.
        windows: Windows of each set.
    """

    loss = "kl"

    def __init__(self, model: Path, folder: Path, windows: int) -> None:
        self.model = model
        self.tokens: dict[str, tuple[Array, Array]] = {}
        for name in SETS:
            ids = np.load(folder / f"eval_{name}.npy").astype(np.int64).reshape(-1)
            count = min(windows, (len(ids) - 1) // CONTEXT)
            shape = (count, CONTEXT)
            used = count * CONTEXT
            self.tokens[name] = ids[:used].reshape(shape), ids[1 : used + 1].reshape(shape)
        session = onnxruntime.InferenceSession(model)
        self.dense = {
            name: np.concatenate(list(_log_probabilities(session, fed)))
            for name, (fed, _) in self.tokens.items()
        }

    def __call__(self, path: Path) -> dict[str, float]:
        """Divergence, agreement and perplexity on each set."""
        session = onnxcomp.InferenceSession(path)
        result: dict[str, float] = {}
        for name, (fed, wanted) in self.tokens.items():
            divergence = surprise = 0.0
            agreeing = 0
            for index, found in enumerate(_log_probabilities(session, fed)):
                part = slice(index * BATCH, index * BATCH + len(found))
                exact, targets = self.dense[name][part], wanted[part]
                divergence += float((np.exp(exact) * (exact - found)).sum(dtype=np.float64))
                agreeing += int((exact.argmax(-1) == found.argmax(-1)).sum())
                picked = np.take_along_axis(found, targets[..., None], -1)
                surprise -= float(picked.sum(dtype=np.float64))
            result[f"{name}_kl"] = divergence / wanted.size
            result[f"{name}_agreement"] = agreeing / wanted.size
            result[f"{name}_perplexity"] = float(np.exp(surprise / wanted.size))
        result["kl"] = float(np.mean([result[f"{name}_kl"] for name in SETS]))
        return result

    def calibration(self, data: Path) -> Feeds:
        """Windows of the training text."""
        tokens = np.load(data / "lm" / "calib.npy").astype(np.int64)
        feeds = split_batches([{"input_ids": tokens}], {"input_ids": ("batch", "tokens")})
        return [dict(feed) for feed in feeds]


class DecoderModel:
    """Judges forms of a decoder with a cache, one window of wikitext after the other.

    Spaces that the corpus puts around punctuation are taken out. Its first half calibrates, its
    second half judges.

    Args:
        folder: Of the model: model.onnx, tokenizer.json and config.json.
        data: Folder of the data.
        windows: Windows to judge by.
    """

    loss = "kl"

    def __init__(self, folder: Path, data: Path, windows: int) -> None:
        self.model = folder / "model.onnx"
        self._config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        file = data / "eval" / "wikitext2" / "valid.txt"
        text = unspaced(file.read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        middle = text.index("\n", len(text) // 2)
        halves = (text[:middle], text[middle:])
        self._seen, held = (np.array(tokenizer.encode(half).ids, np.int64) for half in halves)
        self._windows = held[: windows * CONTEXT].reshape(windows, CONTEXT)

    def __call__(self, path: Path) -> dict[str, float]:
        """Divergence and agreement."""
        dense, form = onnxruntime.InferenceSession(self.model), onnxcomp.InferenceSession(path)
        divergence = agreeing = 0.0
        for window in self._windows:
            fed = calibration_feeds(window[None], self._config)
            logits = [session.run(["logits"], fed)[0][0] for session in (dense, form)]
            exact, found = (part - part.max(axis=-1, keepdims=True) for part in logits)
            exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
            found -= np.log(np.exp(found).sum(axis=-1, keepdims=True))
            divergence += float((np.exp(exact) * (exact - found)).sum(dtype=np.float64))
            agreeing += float((exact.argmax(-1) == found.argmax(-1)).sum())
        count = self._windows.size
        return {"kl": divergence / count, "agreement": agreeing / count}

    def calibration(self, data: Path) -> Feeds:
        """Windows of the other half of the text."""
        tokens = self._seen[: CALIBRATION_WINDOWS * CONTEXT].reshape(-1, CONTEXT)
        fed = calibration_feeds(tokens, self._config)
        return [dict(feed) for feed in split_batches([fed], dict.fromkeys(fed, ("batch",)))]


class SentenceModel:
    """Judges forms of MiniLM by STS-B and by the dense model.

    Args:
        model: The dense model.
        data: Folder of the data.
        every: Take one pair in so many.
        pairs: Training pairs to calibrate with, about.
    """

    loss = "one_minus_cosine"

    def __init__(
        self, model: Path, data: Path, every: int = 1, pairs: int = TRAINING_PAIRS
    ) -> None:
        self.model, self._pairs = model, pairs
        self.tokenizer = Tokenizer.from_file(str(data / "models" / "minilm_tokenizer.json"))
        sentences, scores = read_pairs(data)
        self.scores = scores[::every]
        chosen = sentences[: len(scores)][::every] + sentences[len(scores) :][::every]
        self.batches = make_batches(self.tokenizer, chosen)
        self.dense = embed(onnxruntime.InferenceSession(model), self.batches)

    def __call__(self, path: Path) -> dict[str, float]:
        """Spearman correlation and mean 1 - cosine."""
        found = embed(onnxcomp.InferenceSession(path), self.batches)
        return quality(found, self.dense, self.scores)

    def calibration(self, data: Path) -> Feeds:
        """Training sentences that are not among the evaluated ones."""
        evaluated = set(read_pairs(data)[0])
        file = data / "eval" / "stsb" / "stsb-en-train.csv"
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.reader(lines))
        step = max(1, len(rows) // self._pairs)
        sentences = [text for row in rows[::step] for text in row[:2]]
        unseen = list(dict.fromkeys(text for text in sentences if text not in evaluated))
        return [feed for _, feed in make_batches(self.tokenizer, unseen)]


class ImageModel:
    """Judges forms of an image classifier: one image in `HELD` is kept to calibrate with."""

    loss = "disagreement"

    def __init__(self, model: Path, data: Path, images: int) -> None:
        self.model = model
        every = list(CLASSIFIERS[model.stem](data))[: images * HELD // (HELD - 1)]
        self._kept = [feed for number, (feed, _) in enumerate(every) if number % HELD == 0]
        self._judged = [feed for number, (feed, _) in enumerate(every) if number % HELD]
        self.dense = self._predictions(onnxruntime.InferenceSession(model))

    def _predictions(self, session: Any) -> Array:
        found = [session.run(None, feed)[0].reshape(-1) for feed in self._judged]
        return np.stack(found).astype(np.float64)

    def __call__(self, path: Path) -> dict[str, float]:
        """Share of images with another class than the dense model's, and divergence."""
        found = self._predictions(onnxcomp.InferenceSession(path))
        other = float((found.argmax(1) != self.dense.argmax(1)).mean())
        ratios = np.log(np.maximum(self.dense, 1e-9) / np.maximum(found, 1e-9))
        return {"disagreement": other, "kl": float((self.dense * ratios).sum(1).mean())}

    def calibration(self, data: Path) -> Feeds:
        """The images kept."""
        return self._kept


class LabelledImages:
    """Judges forms of ResNet20 by the labels of the test images; training images calibrate.

    Args:
        model: The dense model.
        data: Folder of the data.
        images: Training images to calibrate with.
    """

    loss = "accuracy_drop"

    def __init__(self, model: Path, data: Path, images: int = 1000) -> None:
        self.model, self._images = model, images
        found = list(cifar_feeds(data, "test"))
        self._feeds = [feed for feed, _ in found]
        self._labels = np.concatenate([labels for _, labels in found])
        self._dense = self._classes(onnxruntime.InferenceSession(model))

    def _classes(self, session: Any) -> Array:
        return np.concatenate([session.run(None, feed)[0].argmax(1) for feed in self._feeds])

    def __call__(self, path: Path) -> dict[str, float]:
        """Points of accuracy that are lost, and share of images with the dense model's class."""
        found = self._classes(onnxcomp.InferenceSession(path))
        dense, own = (100 * float((c == self._labels).mean()) for c in (self._dense, found))
        agreement = float((found == self._dense).mean())
        return {"accuracy": own, "accuracy_drop": dense - own, "agreement": agreement}

    def calibration(self, data: Path) -> Feeds:
        """Training images, which are stored in a random order."""
        return [feed for feed, _ in cifar_feeds(data, "train", self._images)]


class SpeechModel:
    """Judges forms of Silero by the frames of a recording, each with the original's state.

    Every other batch of frames calibrates.

    Args:
        model: The dense model.
        data: Folder of the data.
    """

    loss = "kl"

    def __init__(self, model: Path, data: Path) -> None:
        self.model = model
        feeds = real_inputs(model, data)
        self._kept, self._judged = feeds[::2], feeds[1::2]
        self._dense = self._chances(onnxruntime.InferenceSession(model))

    def _chances(self, session: Any) -> Array:
        found = [session.run(None, feed)[0].reshape(-1) for feed in self._judged]
        return np.clip(np.concatenate(found).astype(np.float64), 1e-6, 1 - 1e-6)

    def __call__(self, path: Path) -> dict[str, float]:
        """Divergence of the chances of speech, and share of frames with another decision."""
        dense, found = self._dense, self._chances(onnxcomp.InferenceSession(path))
        divergence = dense * np.log(dense / found) + (1 - dense) * np.log((1 - dense) / (1 - found))
        other = float(((dense > 0.5) != (found > 0.5)).mean())
        return {"kl": float(divergence.mean()), "disagreement": other}

    def calibration(self, data: Path) -> Feeds:
        """The batches kept."""
        return self._kept


class Detector:
    """Judges forms of YOLOX-Nano by the dense model's detections on photographs.

    Args:
        model: The dense model.
        data: Folder of the data.
        images: Photographs to judge by; as many others as for a classifier calibrate.
    """

    loss = "missed"

    def __init__(self, model: Path, data: Path, images: int) -> None:
        self.model = model
        every = [
            {"images": np.ascontiguousarray(image[:, ::-1])}
            for image in pictures(data, 416, 416, images * HELD // (HELD - 1))
        ]
        self._kept = every[::HELD]
        self._judged = [feed for number, feed in enumerate(every) if number % HELD]
        self._dense = self._outputs(onnxruntime.InferenceSession(model))

    def _outputs(self, session: Any) -> list[Array]:
        return [np.asarray(session.run(None, feed)[0]) for feed in self._judged]

    def __call__(self, path: Path) -> dict[str, float]:
        """Shares of detections that are not found again, and of those that are new."""
        agreement = DetectionAgreement()
        pairs = zip(self._dense, self._outputs(onnxcomp.InferenceSession(path)), strict=True)
        for dense, found in pairs:
            agreement.add({"output": dense}, {"output": found})
        seen = agreement.result()
        if seen is None:
            raise SystemExit(f"{self.model.name}: nothing is detected")
        missed, added = seen.reference - seen.found, seen.added
        return {
            "detections": seen.reference,
            "missed": missed / seen.reference,
            "added": added / seen.reference,
        }

    def calibration(self, data: Path) -> Feeds:
        """The photographs kept."""
        return self._kept
