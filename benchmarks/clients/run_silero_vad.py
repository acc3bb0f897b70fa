"""The voice detector silero-vad by its own package, on a minute of speech with music and noise."""

from __future__ import annotations

import wave
from typing import Any

from harness import data_folder, measure

RATE = 16000


def load() -> Any:
    from silero_vad import load_silero_vad

    return load_silero_vad(onnx=True)


def work(model: Any, part: str) -> dict[str, Any]:
    """For every 32 ms whether somebody speaks."""
    import numpy as np
    import torch

    with wave.open(str(data_folder() / "eval" / "silero" / "test.wav")) as file:
        audio = np.frombuffer(file.readframes(file.getnframes()), np.int16) / np.float32(32768)
    audio = audio[: 20 * RATE] if part == "calibration" else audio[20 * RATE :]
    audio = torch.from_numpy(audio[: len(audio) // 512 * 512].astype(np.float32))
    model.reset_states()
    return {"answers": [bool(model(frame, RATE).item() > 0.5) for frame in audio.split(512)]}


if __name__ == "__main__":
    measure(load, work)
