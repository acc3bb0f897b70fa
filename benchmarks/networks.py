"""Networks and data of the benchmarks that train."""

from __future__ import annotations

import dataclasses
import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

__all__ = [
    "FULL",
    "NETWORKS",
    "Recipe",
    "SmallLM",
    "SmallViT",
    "Split",
    "cifar10",
    "digits",
    "mnist",
    "perceptron",
    "resnet20",
    "shakespeare",
    "small_perceptron",
    "small_vgg",
    "vgg11",
]

# Different characters of the text that `shakespeare` reads.
CHARACTERS = 65

# CIFAR-10 mean and standard deviation, as torchvision's recipes have them.
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and labels, for training and for judging."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def _idx(path: Path) -> np.ndarray[Any, Any]:
    content = gzip.decompress(path.read_bytes())
    dims = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(content[3])]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(dims)).reshape(dims)


def mnist(folder: Path, count: int) -> Split:
    """The 10,000 images of MNIST's test set: 8,000 to train on, 2,000 to judge by."""
    pixels = _idx(folder / "mnist" / "t10k-images-idx3-ubyte.gz").astype(np.float32) / 255
    labels = torch.from_numpy(_idx(folder / "mnist" / "t10k-labels-idx1-ubyte.gz").astype(np.int64))
    images = torch.from_numpy((pixels - 0.1307) / 0.3081)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order, None], labels[order]
    count = min(count, 8000)
    return Split(images[:count], labels[:count], images[8000:], labels[8000:])


def digits(folder: Path, count: int) -> Split:
    """The same in 8 x 8 pixels, means of 3 x 3 without the margin."""
    full = mnist(folder, count)
    shrunk = (functional.avg_pool2d(x[..., 2:26, 2:26], 3) for x in (full.images, full.test_images))
    images, test_images = shrunk
    return Split(images, full.labels, test_images, full.test_labels)


def _jpegs(path: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Some images, drawn at random: a file may be sorted by class."""
    from PIL import Image

    with np.load(path) as data:
        blob, offsets, labels = data["blob"], data["offsets"], data["labels"]
    chosen = np.random.default_rng(0).permutation(len(labels))[:count]
    files = (blob[offsets[i] : offsets[i + 1]].tobytes() for i in chosen)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(f)).convert("RGB")) for f in files])
    images = (pixels.astype(np.float32) / 255 - np.float32(_MEAN)) / np.float32(_STD)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(
        labels[chosen].astype(np.int64)
    )


def cifar10(folder: Path, count: int) -> Split:
    """Up to 20,000 training images and 3,000 of the test set, from JPEG copies."""
    train = _jpegs(folder / "cifar10" / "cifar10_train_jpegbytes.npz", min(count, 20000))
    return Split(*train, *_jpegs(folder / "cifar10" / "cifar10_test_jpegbytes.npz", 3000))


def shakespeare(folder: Path, count: int, context: int = 64) -> Split:
    """Windows of a text, and for each place of them the character that comes next.

    The last tenth of the text is judged by, up to 1,000 windows that do not overlap.
    """
    text = (folder / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    known = {character: number for number, character in enumerate(sorted(set(text)))}
    assert len(known) == CHARACTERS
    numbers = torch.tensor([known[character] for character in text])
    cut = len(numbers) * 9 // 10
    starts = torch.randint(
        0, cut - context - 1, (count,), generator=torch.Generator().manual_seed(0)
    )
    ends = torch.arange(cut, len(numbers) - context - 1, context)[:1000]
    places = torch.arange(context)
    train, test = starts[:, None] + places, ends[:, None] + places
    return Split(numbers[train], numbers[train + 1], numbers[test], numbers[test + 1])


def perceptron() -> nn.Module:
    """784 - 256 - 256 - 10."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def small_perceptron(width: float = 1.0) -> nn.Module:
    """64 - 256 - 256 - 10, for `digits`."""
    hidden = max(1, round(256 * width))
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


def _block(channels: int, out: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(out), nn.ReLU()]


def small_cnn() -> nn.Module:
    """Four 3 x 3 convolutions with batch norm, 24 to 96 channels, and a classifier."""
    return nn.Sequential(
        *_block(3, 24, 2),
        *_block(24, 48, 1),
        *_block(48, 96, 2),
        *_block(96, 96, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


class _Encoder(nn.Module):
    """Attention and MLP, both after a norm."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.read, self.write = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        split = self.read(self.norms[0](x)).reshape(batch, tokens, 3, self.heads, -1)
        parts = split.permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.write(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class SmallViT(nn.Module):
    """8 x 8 patches (four pixels of overlap), width 64, three layers of four heads."""

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=4, padding=2)
        self.places = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.layers = nn.Sequential(*(_Encoder(width, 4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of classes."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        scores: torch.Tensor = self.head(self.norm(self.layers(x)).mean(1))
        return scores


class SmallLM(nn.Module):
    """Predicts the next character; a table of characters is the head, too."""

    def __init__(
        self, width: int = 64, layers: int = 3, characters: int = CHARACTERS, context: int = 64
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(characters, width)
        nn.init.normal_(self.table.weight, std=0.02)
        self.places = nn.Parameter(0.02 * torch.randn(1, context, width))
        self.layers = nn.Sequential(*(_Encoder(width, 4, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of what comes next, for each place."""
        x = self.norm(self.layers(self.table(x) + self.places))
        return functional.linear(x, self.table.weight)


class _Residual(nn.Module):
    """The block of ResNet20, with a 1 x 1 convolution where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        first, second = _block(channels, out, stride), _block(out, out, 1)[:2]
        self.body = nn.Sequential(*first, *second)
        same = stride == 1 and channels == out
        self.skip = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.body(x) + self.skip(x))


def resnet20(width: float = 1.0, stride: int = 1) -> nn.Module:
    """ResNet20 of He et al. for CIFAR-10.

    Args:
        width: Factor of the numbers of channels.
        stride: Of the first convolution; 2 takes a quarter of the work.
    """
    a, b, c = (max(1, round(width * channels)) for channels in (16, 32, 64))
    widths = [(a, a, 1)] * 3 + [(a, b, 2)] + [(b, b, 1)] * 2 + [(b, c, 2)]
    blocks = [_Residual(*sizes) for sizes in [*widths, (c, c, 1), (c, c, 1)]]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10)]
    return nn.Sequential(*_block(3, a, stride), *blocks, *head)


def small_vgg(width: float = 1.0) -> nn.Module:
    """Five 3 x 3 convolutions, 16 to 128 channels: five million multiplications an image."""
    layers: list[nn.Module] = []
    channels = 3
    for out, stride in ((16, 2), (32, 2), (64, 1), (128, 2), (128, 1)):
        scaled = max(1, round(width * out))
        layers += _block(channels, scaled, stride)
        channels = scaled
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def vgg11(width: float = 1.0) -> nn.Module:
    """VGG11 with batch norm and one linear layer, as used for CIFAR-10."""
    layers: list[nn.Module] = []
    channels = 3
    for out in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        scaled = max(1, round(width * out))
        layers += _block(channels, scaled, 1) if out else [nn.MaxPool2d(2)]
        channels = scaled if out else channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 10))


def vgg16() -> nn.Module:
    """VGG16 with batch norm and one linear layer, as used for CIFAR-10."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        layers += _block(channels, width, 1) if width else [nn.MaxPool2d(2)]
        channels = width or channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        build: Makes it.
        data: Reads its images.
        epochs: Passes over the training images.
        rate: Highest learning rate of one cycle of Adam, or of SGD with momentum.
        decay: Weight decay (L2) of all weights that `lorita` may factor.
        crops: Whether images are shifted and mirrored.
        sgd: Whether SGD with momentum 0.9 is used.
    """

    build: Callable[[], nn.Module]
    data: Callable[[Path, int], Split]
    epochs: int
    rate: float
    decay: float
    crops: bool = True
    sgd: bool = False


NETWORKS = {
    "mnist-mlp": Recipe(perceptron, mnist, 25, 2e-3, 1e-3, crops=False),
    "cifar10-cnn": Recipe(small_cnn, cifar10, 7, 4e-3, 5e-4),
    "cifar10-vit": Recipe(SmallViT, cifar10, 8, 2e-3, 3e-4),
}
FULL = {
    "cifar10-resnet20": Recipe(resnet20, cifar10, 300, 0.01, 1e-3, sgd=True),
    "cifar10-vgg16": Recipe(vgg16, cifar10, 300, 0.01, 1e-3, sgd=True),
}
