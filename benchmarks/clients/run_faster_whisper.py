"""The voice detector of faster-whisper (Silero), on a minute of speech with music and noise."""

from __future__ import annotations

import wave
from typing import Any

from harness import data_folder, measure

RATE = 16000


def load() -> Any:
    from faster_whisper.vad import get_vad_model

    return get_vad_model()


def work(model: Any, part: str) -> dict[str, Any]:
    """For every 32 ms whether somebody speaks."""
    import numpy as np

    with wave.open(str(data_folder() / "eval" / "silero" / "test.wav")) as file:
        audio = np.frombuffer(file.readframes(file.getnframes()), np.int16) / np.float32(32768)
    audio = audio[: 20 * RATE] if part == "calibration" else audio[20 * RATE :]
    audio = audio[: len(audio) // 512 * 512]
    speech = np.asarray(model(audio.astype(np.float32))).reshape(-1)
    return {"answers": [bool(value > 0.5) for value in speech]}


if __name__ == "__main__":
    measure(load, work)
