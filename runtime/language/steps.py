"""What one process measures of a decoder when it is told to: prompts, and tokens behind a cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcomp.runtime.language.decoder import Decoder

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["GENERATION", "Times"]

# Wall-clock time of each run, and the processor time of all threads, in seconds.
Times = dict[str, list[float]]

Tokens = npt.NDArray[np.int64]


def time_prompt(
    session: onnxruntime.InferenceSession, length: int, runs: int, vocabulary: int, seed: int
) -> Times:
    """Times of whole prompts.

    Args:
        session: Of a decoder.
        length: Tokens of the prompt.
        runs: How many prompts.
        vocabulary: Tokens are below it.
        seed: Of the tokens.
    """
    decoder = Decoder(session)
    tokens = np.random.default_rng(seed).integers(0, vocabulary, (1, length))

    def run() -> None:
        decoder.reset()
        decoder.step(tokens, keep=bool(decoder.interface.caches))

    return _timed(run, runs)


def time_decoding(
    session: onnxruntime.InferenceSession, context: int, count: int, vocabulary: int, seed: int
) -> Times:
    """Times of single tokens, the first one behind a cache of so many positions.

    What is in the cache does not change the time: it is filled with noise, not with a prompt.

    Args:
        session: Of a decoder with a KV cache.
        context: Positions in the cache.
        count: How many tokens, one after the other.
        vocabulary: Tokens are below it.
        seed: Of the tokens and the cache.

    Raises:
        UsageError: The model has no KV cache.
    """
    decoder = Decoder(session)
    decoder.fill(context, seed)
    tokens = iter(np.random.default_rng(seed).integers(0, vocabulary, (count, 1, 1)))

    return _timed(lambda: decoder.step(next(tokens)), count)


def _timed(run: Callable[[], Any], count: int) -> Times:
    times: Times = {"wall": [], "cpu": []}
    for _ in range(count):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        times["cpu"].append(time.process_time() - cpu)
        times["wall"].append(time.perf_counter() - wall)
    return times


# Command of the measuring process -> what it does with a session and numbers.
GENERATION: Mapping[str, Callable[..., Times]] = {"prompt": time_prompt, "decode": time_decoding}
