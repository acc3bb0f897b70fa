"""Real inputs of the models in the data folder, prepared as their authors did."""

from __future__ import annotations

import gzip
import io
import json
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = [
    "CLASSIFIERS",
    "REAL",
    "Array",
    "Batches",
    "Feed",
    "cifar_feeds",
    "file_bytes",
    "frames_of",
    "speech",
    "speech_frames",
]

Array = npt.NDArray[Any]
Feed = dict[str, Array]
Batches = Iterator[tuple[Feed, Array | None]]

CIFAR_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
CIFAR_STD = np.array([0.229, 0.224, 0.225], np.float32)
CAFFE_MEAN = np.array([104, 117, 123], np.float32)


def imagenet(data: Path) -> Iterator[tuple[Array, int]]:
    """Centre crops ``(224, 224, 3)`` uint8 and class numbers from the file names."""
    for path in sorted((data / "eval" / "imagenet500").glob("*.jpg")):
        image = Image.open(path).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)))
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        yield np.asarray(image.crop((left, top, left + 224, top + 224))), int(path.name[:4])


def mobilenet(data: Path) -> Batches:
    """Pixels in [-1, 1]; class 0 is the background."""
    for image, label in imagenet(data):
        pixels = (image.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)
        yield {"input": pixels[None]}, np.array([label + 1])


def squeezenet(data: Path) -> Batches:
    """Blue first, minus the mean, float16."""
    for image, label in imagenet(data):
        pixels = (image[:, :, ::-1].astype(np.float32) - CAFFE_MEAN).transpose(2, 0, 1)
        yield {"data_0": pixels[None].astype(np.float16)}, np.array([label])


def cifar(data: Path, count: int = 2000, part: str = "test") -> Iterator[tuple[Array, Array]]:
    """Batches of 100 images ``(n, 32, 32, 3)`` uint8 of the test or training set, with labels."""
    with np.load(data / "eval" / "cifar10" / f"cifar10_{part}_jpegbytes.npz") as file:
        blob, offsets, labels = file["blob"].tobytes(), file["offsets"], file["labels"]
    # The test file is sorted by class: take images from all of it.
    chosen = range(0, len(labels), len(labels) // count)
    for start in range(0, count, 100):
        images = [
            np.asarray(Image.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]])).convert("RGB"))
            for i in chosen[start : start + 100]
        ]
        yield np.stack(images), labels[list(chosen[start : start + 100])]


def cifar_feeds(data: Path, part: str, count: int = 10_000) -> Batches:
    """Images with the mean and deviation of the training recipe."""
    for images, labels in cifar(data, count, part):
        pixels = (images.astype(np.float32) / 255 - CIFAR_MEAN) / CIFAR_STD
        yield {"input": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))}, labels


def resnet20(data: Path) -> Batches:
    """Test images of all classes."""
    yield from cifar_feeds(data, "test", 2000)


def winml(data: Path) -> Batches:
    """Pixels in [-1, 1], as the tutorial trains it."""
    for images, labels in cifar(data):
        pixels = images.astype(np.float32) / 127.5 - 1
        yield {"modelInput": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))}, labels


def mnist(data: Path, count: int = 2000) -> Batches:
    """Raw pixels, 0 to 255."""
    folder = data / "eval" / "mnist"
    images = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    pixels = np.frombuffer(images, np.uint8).reshape(-1, 1, 1, 28, 28).astype(np.float32)
    for number in range(count):
        yield {"Input3": pixels[number]}, np.array([labels[number]])


def file_bytes(content: bytes) -> Array:
    """What magika reads of a file ``(1, 2048)``: first and last 1,024 bytes, padded with 256.

    White space at both ends is stripped before.
    """
    first, last = content[:4096].lstrip()[:1024], content[-4096:].rstrip()[-1024:]
    tokens = np.full((1, 2048), 256, np.int32)
    tokens[0, : len(first)] = np.frombuffer(first, np.uint8)
    tokens[0, 2048 - len(last) :] = np.frombuffer(last, np.uint8)
    return tokens


def magika(data: Path) -> Batches:
    """The files that its authors test with."""
    folder = data / "eval" / "magika"
    kinds = json.loads((folder / "config.min.json").read_text())["target_labels_space"]
    for path in sorted(file for file in (folder / "basic").rglob("*") if file.is_file()):
        content = path.read_bytes()
        if len(content) < 8:  # decided by rule, not by the model
            continue
        yield {"bytes": file_bytes(content)}, np.array([kinds.index(path.parent.name)])


def language_model(data: Path, windows: int = 40) -> Batches:
    """Windows of 256 tokens of held-out books; the labels are the next tokens."""
    tokens = np.load(data / "lm" / "eval_books.npy").astype(np.int64)
    for start in range(0, windows * 256, 256):
        yield {"input_ids": tokens[None, start : start + 256]}, tokens[start + 1 : start + 257]


CLASSIFIERS: dict[str, Callable[[Path], Batches]] = {
    "mobilenetv2_224_tf2ptq_fp32": mobilenet,
    "squeezenet_fp16": squeezenet,
    "resnet20_cifar10": resnet20,
    "winml_cifar_classifier": winml,
    "mnist_cntk": mnist,
    "magika_standard_v3_3": magika,
    "tinyllama_ref": language_model,
}


def pictures(data: Path, height: int, width: int, count: int = 8) -> Iterator[Array]:
    """Photographs resized to ``(1, 3, height, width)`` float32, red first, 0 to 255."""
    paths = sorted((data / "eval" / "imagenet500").glob("*.jpg"))
    for path in paths[:: len(paths) // count][:count]:
        image = Image.open(path).convert("RGB").resize((width, height))
        yield np.ascontiguousarray(np.asarray(image, np.float32).transpose(2, 0, 1)[None])


def scaled(
    name: str, size: tuple[int, int], mean: Any, std: Any, *, blue_first: bool = False
) -> Callable[[Path], Iterator[Feed]]:
    """Feeds of photographs: ``(pixels - mean) / std``."""

    def feeds(data: Path) -> Iterator[Feed]:
        for image in pictures(data, *size):
            pixels = image[:, ::-1] if blue_first else image
            shift, scale = (np.asarray(v, np.float32).reshape(-1, 1, 1) for v in (mean, std))
            yield {name: np.ascontiguousarray((pixels - shift) / scale)}

    return feeds


def luma(data: Path) -> Iterator[Feed]:
    """Brightness, 0 to 1."""
    weights = np.array([0.299, 0.587, 0.114], np.float32).reshape(3, 1, 1)
    for image in pictures(data, 224, 224):
        yield {"input": (image * weights).sum(1, keepdims=True) / 255}


def text_bytes(data: Path) -> Iterator[Feed]:
    """Windows of 200 bytes of English text."""
    text = (data / "eval" / "tinyshakespeare").glob("*.txt")
    content = np.frombuffer(next(text).read_bytes(), np.uint8)
    for start in range(0, 8 * 5000, 5000):
        yield {"input": content[None, start : start + 200]}


def speech(data: Path) -> Array:
    """A minute of speech at 16 kHz ``(samples,)`` float32, -1 to 1."""
    with wave.open(str(data / "eval" / "silero" / "test.wav")) as file:
        raw = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    return raw.astype(np.float32) / 32768


def frames_of(sound: Array) -> Iterator[Array]:
    """Frames of 512 samples, with the 64 samples before them ``(1, 576)``."""
    samples = np.concatenate([np.zeros(64, np.float32), sound])
    for start in range(0, len(sound) - 511, 512):
        yield samples[None, start : start + 576]


def speech_frames(data: Path) -> Iterator[Array]:
    """Frames of the recording."""
    yield from frames_of(speech(data))


IMAGENET_MEAN, IMAGENET_STD = 255 * CIFAR_MEAN, 255 * CIFAR_STD

# Inputs of models that are no classifiers; outputs are compared as they are.
REAL: dict[str, Callable[[Path], Iterator[Feed]]] = {
    "yolox_nano": scaled("images", (416, 416), 0, 1, blue_first=True),
    "fastestdet": scaled("input.1", (352, 352), 0, 255, blue_first=True),
    "ppocrv3_det": scaled("x", (320, 320), IMAGENET_MEAN, IMAGENET_STD),
    "ultraface_rfb320": scaled("input", (240, 320), 127, 128),
    "openseeface_lm0": scaled("input", (224, 224), IMAGENET_MEAN, IMAGENET_STD),
    "openseeface_mnv3_det": scaled("input", (224, 224), IMAGENET_MEAN, IMAGENET_STD),
    "style_candy": scaled("inputImage", (720, 720), 0, 1),
    "super_resolution": luma,
    "nnsplit_en_lstm": text_bytes,
    "tract_byte_bidi_lstm": text_bytes,
}
