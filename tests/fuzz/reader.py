"""Coverage-guided fuzzing of the reader and the rewriter, with atheris (pip install atheris).

    python tests/fuzz/reader.py [--seconds S] [--seed N] [--keep FOLDER]

Starts from the models of `models.py` and keeps those mutations that reach new lines of the package.
A quarter of them change bytes as libFuzzer likes, the others change the message as `models.py`
does. Only errors of onnxcomp may come out, and nothing may take longer than ten seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["onnxcomp"]):
    from onnxcomp.passes.driver import compile  # noqa: F401

import models

from onnxcomp.errors import CompressionError


class Reader:
    """Runs the steps of a compilation on what it is given.

    Attributes:
        cases: How many inputs were run.
        refused: How many of them ended in an error of onnxcomp.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "model.onnx"
        self._figures = os.open(folder / "figures", os.O_CREAT | os.O_WRONLY)
        self.cases = self.refused = 0

    def __call__(self, data: bytes) -> None:
        """Run one input; anything but an error of onnxcomp ends the whole run."""
        self._path.write_bytes(data)
        self.cases += 1
        signal.setitimer(signal.ITIMER_PROF, models.HANG)
        try:
            models.WORK[self.cases % len(models.WORK)](self._path)
        except CompressionError as error:
            self.refused += 1
            if not error.message or type(error) is CompressionError:
                raise AssertionError(f"an error without a class: {error!r}") from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        # libFuzzer ends the process as it likes: what is known is written down at once.
        os.pwrite(self._figures, f"{self.cases} {self.refused}".encode(), 0)


def mutated(data: bytes, max_size: int, seed: int) -> bytes:
    """Bytes or fields of a message changed."""
    rng = random.Random(seed)
    if rng.random() < 0.25:
        return bytes(atheris.Mutate(data, max_size))
    with contextlib.suppress(Exception):  # no message any more: protobuf has many ways to say so
        return models.case(data, rng)[:max_size]
    return models.mutate_bytes(data, rng)[:max_size]


def fuzz(folder: Path, seconds: int, seed: int, keep: Path) -> None:
    """Fuzz in this process, which libFuzzer ends."""
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)  # a case that hangs: its traceback, the end
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (models.MEMORY, models.MEMORY))
    # The alarm of libFuzzer does not go well with Python: `Reader` looks after the time itself.
    options = {"max_total_time": seconds, "seed": seed, "timeout": 0}
    options |= {"rss_limit_mb": 0, "max_len": 1 << 16, "verbosity": 0, "mutate_depth": 2}
    line = [f"-{key}={value}" for key, value in options.items()]
    line += [f"-artifact_prefix={keep.resolve()}{os.sep}", str(folder / "corpus")]
    atheris.Setup([sys.argv[0], *line], Reader(folder), custom_mutator=mutated)
    atheris.Fuzz()


def main() -> int:
    """Fuzz in a child process and print the figures as JSON; 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path())
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder is not None:
        fuzz(given.folder, given.seconds, given.seed, given.keep)
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        corpus = folder / "corpus"
        corpus.mkdir()
        for index, data in enumerate(models.sources(folder)):
            (corpus / f"{index}.onnx").write_bytes(data)
        child = subprocess.run(
            [sys.executable, *sys.argv, "--folder", name], stdout=sys.stderr, check=False
        )
        cases, refused = map(int, (folder / "figures").read_text().split())
        figures = {"cases": cases, "refused": refused, "corpus": len(list(corpus.iterdir()))}
        print(json.dumps({**figures, "failed": child.returncode}))
    return 1 if child.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
