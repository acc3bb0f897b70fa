"""Memory of several sessions on one file: how many copies of the weights there are.

    python benchmarks/bench_sessions.py [--model FILE ...] [--count 8]

Each row is a set-up with one session and with `--count` of them, each after one run: in one process
of Python, in as many processes, in one process in C++, and in one process in C++ with an instance
for each thread as Triton's ONNX Runtime backend has them. Needs Linux and, for C++, a compiler.

PSS shares out each page among those that map it: it is what the machine has less because of them.
RSS counts a page again for each mapping. `codes` are the pages of the file with the weights alone.
The models are MiniLM in ONNXCOMP_MINILM at 4 bits, with its weights beside the file and inside,
and those of --model.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from results import write_results

import onnxcomp
from onnxcomp.ops import library_path
from onnxcomp.runtime.structure import data_files

HERE = Path(__file__).parent
MIB = 1 << 20

# Set-ups: name, program, processes or sessions in one, words for the program.
SETUPS = (
    ("Python, one process", "python", False, ""),
    ("Python, one process, share_weights", "python", False, "share"),
    ("Python, processes", "python", True, ""),
    ("C++, one process", "cpp", False, ""),
    ("C++, one process, AddInitializer", "cpp", False, "share"),
    ("C++, an instance for each thread (Triton)", "cpp", False, "threads"),
    ("C++, processes", "cpp", True, ""),
)


def build_program(folder: Path) -> Path | None:
    """Compile sessions.cc against the library in ONNX Runtime's wheel; None without either."""
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    if not found:
        return None
    (folder / "libonnxruntime.so.1").symlink_to(found[0])
    program = folder / "sessions"
    words = ["g++", "-O2", "-std=c++17", "-Wall", "-Wextra", str(HERE / "sessions.cc")]
    words += ["-o", str(program), f"-L{folder}", "-l:libonnxruntime.so.1"]
    words += [f"-Wl,-rpath,{folder}", "-pthread"]
    try:
        subprocess.run(words, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no rows in C++: {error}", file=sys.stderr)
        return None
    return program


def memory(process: int, name: str) -> dict[str, int]:
    """RSS and PSS of a process in bytes, and those of mappings of the file `name`."""
    total = dict.fromkeys(("rss", "pss", "codes_rss", "codes_pss"), 0)
    ours = False
    for line in Path(f"/proc/{process}/smaps").read_text(encoding="utf-8").splitlines():
        word, *rest = line.split()
        if not word.endswith(":"):
            ours = line.endswith(name)
        elif word in ("Rss:", "Pss:"):
            size = int(rest[0]) * 1024
            total[word[:-1].lower()] += size
            total[f"codes_{word[:-1].lower()}"] += size * ours
    return total


def start(command: list[str]) -> subprocess.Popen[str]:
    """Start a program that says `ready` when its sessions have run, and waits for its end."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        sys.exit(f"failed: {' '.join(command)}")
    return process


def measure(command: list[str], count: int, apart: bool, data: str) -> dict[str, int]:
    """Memory of `count` sessions, summed over processes where they are `apart`."""
    each = [str(1 if apart else count)]
    running = [start([*command, *each]) for _ in range(count if apart else 1)]
    found = [memory(process.pid, data) for process in running]
    for process in running:
        process.communicate("\n")
    return {key: sum(one[key] for one in found) for key in found[0]}


def rows(model: Path, count: int, program: Path | None) -> list[dict[str, Any]]:
    """All set-ups on one model."""
    library, made = str(library_path()), []
    (data,) = data_files(model) or (model.name,)
    for name, kind, apart, words in SETUPS:
        if (kind == "cpp" and program is None) or (words == "share" and data == model.name):
            continue
        command = [sys.executable, str(HERE / "session_worker.py")]
        command = [str(program)] if kind == "cpp" else command
        if kind == "cpp" and words == "share":
            words = str(write_list(model, program))
        command += [str(model), library, words or "plain"]
        one, many = (measure(command, n, apart, data) for n in (1, count))
        row = {"model": model.stem, "setup": name, "count": count, "one": one, "many": many}
        made.append(row)
        print(f"{model.stem:20} {name:45} {text(one)} -> {text(many)}", flush=True)
    return made


def write_list(model: Path, program: Path | None) -> Path:
    """Where the tensors of the data file lie, for the program in C++."""
    assert program is not None
    lines = [str(model.parent / data_files(model)[0])]
    for tensor in onnx.load(model, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            words = (tensor.name, tensor.data_type, place["offset"], place["length"])
            lines.append(" ".join(map(str, (*words, len(tensor.dims), *tensor.dims))))
    path = program.with_name("weights.txt")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def text(found: dict[str, int]) -> str:
    """Sizes in MB."""
    return " ".join(f"{key} {size / MIB:6.1f}" for key, size in found.items())


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", type=Path, action="append", metavar="FILE")
    parser.add_argument("--count", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        models = list(options.model or [])
        if "ONNXCOMP_MINILM" in os.environ:
            for name, external in (("MiniLM", "always"), ("MiniLM, one file", "never")):
                models.append(folder / f"{name}.onnx")
                onnxcomp.optimize(
                    os.environ["ONNXCOMP_MINILM"], models[-1], bits=4, external_data=external,
                    verify=False,
                )  # fmt: skip
        program = build_program(folder)
        found = [row for model in models for row in rows(model, options.count, program)]
    print(write_results("sessions", {"rows": found}))


if __name__ == "__main__":
    main()
