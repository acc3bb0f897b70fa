"""Runs a client's own pipeline once, in the client's environment, and prints what came of it.

Nothing of onnxcomp is imported here.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["MARK", "data_folder", "measure", "part_of", "rendered", "words_read"]

MARK = "RESULT "

_TEXT = """
amount annual balance before between capital carried charge company condition contract cost
customer date delivery discount due each during equal every figure final first general given
holder important income interest invoice issue item large later letter limit line market month
number offer office order other owner part payment period person place please point price
product quality quarter rate reason receipt record report required rest result return right
safety sale second section service share signed small stock street supply table tax terms
third today total under until use value volume water week weight whole window within work year
"""
_WORDS = _TEXT.split()


def status_bytes(key: str) -> int:
    """A number of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    return 0


def measure(load: Callable[[], Any], work: Callable[[Any, str], Mapping[str, Any]]) -> None:
    """Print the result of a pipeline on one part of its inputs, as one line of JSON.

    Args:
        load: Opens the pipeline.
        work: Runs it on a part, ``calibration`` or ``test``; gives ``answers``, a list, and
            ``right``, the share of them that are true, where that is known.
    """
    part = sys.argv[1]
    before = status_bytes("VmRSS")
    start = time.process_time()
    pipeline = load()
    seconds = time.process_time() - start
    loaded = status_bytes("VmRSS")
    peak = status_bytes("VmHWM")
    start = time.process_time()
    result = dict(work(pipeline, part))
    facts = {
        "load_s": seconds,
        "load_bytes": loaded - before,
        "load_peak_bytes": peak - before,
        "run_s": time.process_time() - start,
        "rss_bytes": status_bytes("VmRSS"),
    }
    print(MARK + json.dumps({**facts, **result}), flush=True)


def part_of(items: list[Any], part: str, calibration: int) -> list[Any]:
    """The first items are for calibration, the others for the test."""
    return items[:calibration] if part == "calibration" else items[calibration:]


def data_folder() -> Path:
    """The folder of real data."""
    return Path(os.environ["ONNXCOMP_DATA"])


def rendered(part: str, count: int, *, height: int) -> Iterator[tuple[Any, list[str]]]:
    """Pages with lines of words, black on a light ground with noise: image, and words.

    Args:
        part: ``calibration`` or ``test``; they have no page in common.
        count: How many pages.
        height: Of letters, in pixels; pages have from 3/4 to 4/3 of it.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    rng = random.Random(part)
    for _ in range(count):
        size = int(height * rng.uniform(0.75, 1.33))
        font = ImageFont.load_default(size)
        lines = [rng.sample(_WORDS, 4) for _ in range(5)]
        image = Image.new("L", (30 * height, 12 * height), 245)
        draw = ImageDraw.Draw(image)
        for number, words in enumerate(lines):
            place = (rng.randint(5, 40), 10 + int(number * 2.2 * height))
            draw.text(place, " ".join(words), fill=rng.randint(0, 90), font=font)
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 6, (image.height, image.width))
        page = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
        yield np.repeat(page[:, :, None], 3, 2), [word for words in lines for word in words]


def words_read(
    read: Callable[[Any], Sequence[str]], pages: Iterable[tuple[Any, list[str]]]
) -> dict[str, Any]:
    """What a reader of text finds: a word of the page, or nothing, and the share found.

    Args:
        read: Gives the lines of a page; blanks in them are ignored, since readers drop some.
        pages: As `rendered` makes them.
    """
    answers, right = [], []
    for page, words in pages:
        text = "".join(read(page)).replace(" ", "")
        right += [word in text for word in words]
        answers += [word if word in text else "" for word in words]
    return {"answers": answers, "right": sum(right) / len(right)}
