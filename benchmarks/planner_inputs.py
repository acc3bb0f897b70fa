"""Real inputs of the planner's benchmark, in two halves: one to plan on, one to judge by."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from inputs import CLASSIFIERS, Array, Feed, cifar_feeds, file_bytes, frames_of, speech

__all__ = ["MODELS", "real_inputs", "write_halves"]

# Inputs of texts in each half, and samples in one input.
_COUNT, _BATCH = 24, 8

# Files of one suffix.
_FILES = 24

MODELS = (
    "resnet20_cifar10",
    "squeezenet_fp16",
    "magika_standard_v3_3",
    "silero_vad",
    "tinyllama_ref",
    "minilm_l6_v2_embed",
    "mobilenetv2_224_tf2ptq_fp32",
)


def _recordings(data: Path) -> list[Array]:
    """The recording, quieter, and with noise of 20 and 10 dB below it, white and brown."""
    sound = speech(data)
    rng = np.random.default_rng(0)
    white = rng.standard_normal(len(sound))
    brown = np.cumsum(rng.standard_normal(len(sound)))
    brown -= np.convolve(brown, np.full(1600, 1 / 1600), "same")  # no drift below 10 Hz
    loudness = np.sqrt(np.mean(sound.astype(np.float64) ** 2))
    found = [sound, sound / 4]
    for noise, decibels in ((white, 20), (white, 10), (brown, 20), (brown, 10)):
        scale = loudness * 10 ** (-decibels / 20) / np.sqrt(np.mean(noise**2))
        found.append((sound + scale * noise).astype(np.float32))
    return found


def _speech(data: Path, model: Path) -> list[Feed]:
    """Frames of recordings, with the state that the original has there, in batches."""
    session = onnxruntime.InferenceSession(model)
    rate = np.array(16000)
    frames, states = [], []
    for sound in _recordings(data):
        state = np.zeros((2, 1, 128), np.float32)
        for frame in frames_of(sound):
            frames.append(frame)
            states.append(state)
            _, state = session.run(None, {"input": frame, "state": state, "sr": rate})
    starts = range(0, len(frames), _BATCH)
    return [
        {
            "input": np.concatenate(frames[start : start + _BATCH]),
            "state": np.concatenate(states[start : start + _BATCH], axis=1),
            "sr": rate,
        }
        for start in starts
    ]


def _files(data: Path, model: Path) -> list[Feed]:
    """Files that magika's authors test with, and files of this system, of every suffix some.

    A few files make up most of what is lost, so many are needed.
    """
    del model
    by_suffix: dict[str, list[Path]] = {}
    for root in (Path(sys.base_prefix) / "lib", Path("/usr/share"), Path(sys.prefix)):
        for path in sorted(root.rglob("*.*")):
            if path.is_file() and not path.is_symlink() and path.stat().st_size >= 8:
                by_suffix.setdefault(path.suffix, []).append(path)
    rows = [feed["bytes"] for feed, _ in CLASSIFIERS["magika_standard_v3_3"](data)]
    for paths in by_suffix.values():
        chosen = paths[:: max(1, len(paths) // _FILES)][:_FILES]
        rows += [file_bytes(path.read_bytes()) for path in chosen]
    order = np.random.default_rng(0).permutation(len(rows))
    return [
        {"bytes": np.concatenate([rows[i] for i in order[start : start + _BATCH]])}
        for start in range(0, len(rows), _BATCH)
    ]


def _sentences(data: Path, model: Path) -> list[Feed]:
    """Sentences of the development set, some in each input."""
    from bench_minilm import make_batches, read_pairs  # reads words with a package of its own
    from tokenizers import Tokenizer

    del model
    tokenizer = Tokenizer.from_file(str(data / "models" / "minilm_tokenizer.json"))
    first, _ = read_pairs(data)
    return [feed for _, feed in make_batches(tokenizer, first[: 16 * 2 * _COUNT])][: 2 * _COUNT]


def _text(data: Path, model: Path) -> list[Feed]:
    """Windows of the training text and of a text that was held out, in turns."""
    (name,) = (value.name for value in onnxruntime.InferenceSession(model).get_inputs())
    training = np.load(data / "lm" / "calib.npy")[:_COUNT, :128]
    held_out = np.load(data / "lm" / "eval_books.npy")[: _COUNT * 128].reshape(_COUNT, 128)
    rows = [row for pair in zip(training, held_out, strict=True) for row in pair]
    return [{name: row[None].astype(np.int64)} for row in rows]


def _images(data: Path, model: Path) -> list[Feed]:
    """All test images of CIFAR-10, whose file is sorted by class, in mixed order."""
    del model
    pixels = np.concatenate([feed["input"] for feed, _ in cifar_feeds(data, "test")])
    pixels = pixels[np.random.default_rng(0).permutation(len(pixels))]
    return [{"input": pixels[start : start + _BATCH]} for start in range(0, len(pixels), _BATCH)]


def _classified(data: Path, model: Path) -> list[Feed]:
    """All inputs of a classifier: a tenth of them make up most of what it loses."""
    return [
        {key: array[start : start + _BATCH] for key, array in feed.items()}
        for feed, _ in CLASSIFIERS[model.stem](data)
        for start in range(0, len(next(iter(feed.values()))), _BATCH)
    ]


def real_inputs(model: Path, data: Path) -> list[Feed]:
    """Real inputs of a model: tens of texts, hundreds of pictures, thousands of files."""
    special: dict[str, Any] = {
        "resnet20_cifar10": _images,
        "silero_vad": _speech,
        "magika_standard_v3_3": _files,
        "minilm_l6_v2_embed": _sentences,
        "tinyllama_ref": _text,
    }
    feeds = special.get(model.stem, _classified)(data, model)
    return [
        {key: array[:_BATCH] if array.ndim else array for key, array in feed.items()}
        for feed in feeds
    ]


def write_halves(model: Path, data: Path, folder: Path) -> tuple[Path, Path]:
    """Folders with the even and the odd inputs as .npz files."""
    halves = (folder / "plan", folder / "judge")
    for half in halves:
        half.mkdir(parents=True, exist_ok=True)
    for number, feed in enumerate(real_inputs(model, data)):
        np.savez(halves[number % 2] / f"{number:03d}.npz", **feed)  # type: ignore[arg-type]
    return halves
