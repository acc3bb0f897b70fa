"""ddddocr: a reader of captchas."""

from __future__ import annotations

import io
import random
import string
from typing import Any

from harness import measure


def captchas(part: str, count: int) -> list[tuple[bytes, str]]:
    """Four letters or figures, turned a little, with lines across: PNG, and the text."""
    from PIL import Image, ImageDraw, ImageFont

    rng = random.Random(part)
    made = []
    font = ImageFont.load_default(40)
    letters = sorted(set(string.digits + string.ascii_lowercase) - set("0o1li"))
    for _ in range(count):
        text = "".join(rng.choices(letters, k=4))
        image = Image.new("RGB", (170, 64), (250, 250, 245))
        for place, letter in enumerate(text):
            tile = Image.new("RGBA", (48, 60))
            colour = tuple(rng.randint(0, 110) for _ in range(3))
            ImageDraw.Draw(tile).text((8, 4), letter, fill=colour, font=font)
            tile = tile.rotate(rng.uniform(-30, 30))
            image.paste(tile, (6 + 38 * place, rng.randint(-2, 6)), tile)
        draw = ImageDraw.Draw(image)
        for _ in range(6):
            ends = [(rng.randint(0, 170), rng.randint(0, 64)) for _ in range(2)]
            draw.line(ends, fill=tuple(rng.randint(90, 190) for _ in range(3)), width=1)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        made.append((buffer.getvalue(), text))
    return made


def load() -> Any:
    import ddddocr

    return ddddocr.DdddOcr(show_ad=False, beta=True)


def work(engine: Any, part: str) -> dict[str, Any]:
    """What it reads."""
    images = captchas(part, 32 if part == "calibration" else 200)
    answers = [engine.classification(content).lower() for content, _ in images]
    right = sum(answer == text for answer, (_, text) in zip(answers, images, strict=True))
    return {"answers": answers, "right": right / len(images)}


if __name__ == "__main__":
    measure(load, work)
