"""Libraries around the Hugging Face hub, each in an environment of its own, on `package hf`.

    python benchmarks/bench_hub.py [--only optimum ...] [--home FOLDER]

Makes a folder as the hub has them from MiniLM (ONNXCOMP_MINILM, and minilm_tokenizer.json below
ONNXCOMP_DATA), compresses it to 4 bits, packages it, and runs the snippets of the package's README
as they stand. Vectors are compared with those of a session of our own: `difference` is the largest
1 - cosine. Python's libraries run with the operator library, too, through `onnxcomp exec`. What
cannot be installed is a row with the reason. `--home` keeps the environments.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from environments import InstallError, installed, installed_by_npm, own_variables, version_of
from onnx import TensorProto, helper
from results import write_results

import onnxcomp

SENTENCES = ["A small model", "A compressed network"]
PYTHON = {
    "sentence-transformers": ["torch", "sentence-transformers", "optimum-onnx[onnxruntime]"],
    "optimum": ["torch", "optimum-onnx[onnxruntime]"],
    "fastembed": ["fastembed"],
}
NODE = "transformers.js"
# What is said after a snippet: the vectors as JSON, pooled where the library leaves that to others.
TAILS = {
    "sentence-transformers": "import json; print(json.dumps(vectors.tolist()))",
    "optimum": "import json; print(json.dumps(outputs.last_hidden_state.mean(1).tolist()))",
    "fastembed": "import json; print(json.dumps([v.tolist() for v in vectors]))",
    NODE: "console.log(JSON.stringify(vectors.tolist()));",
}


def original(folder: Path) -> Path:
    """A folder as the hub has it, with the model's last hidden state as output."""
    model = onnx.load(os.environ["ONNXCOMP_MINILM"])
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    last = helper.make_node("Identity", [norms[-1].output[0]], ["last_hidden_state"])
    del model.graph.output[:]
    model.graph.node.append(last)
    shape = ["B", "T", 384]
    model.graph.output.append(
        helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, shape)
    )
    (folder / "onnx").mkdir(parents=True)
    onnx.save(model, folder / "onnx" / "model.onnx")
    tokenizer = Path(os.environ["ONNXCOMP_DATA"], "models", "minilm_tokenizer.json")
    files: dict[str, Any] = {
        "tokenizer.json": json.loads(tokenizer.read_text(encoding="utf-8")),
        "tokenizer_config.json": {
            "tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 256,
            "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]",
            "sep_token": "[SEP]", "mask_token": "[MASK]",
            "model_input_names": ["input_ids", "attention_mask"],
        },
        "special_tokens_map.json": {
            "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]",
            "sep_token": "[SEP]", "mask_token": "[MASK]",
        },
        "config.json": {
            "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 384,
            "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536,
            "vocab_size": 30522, "max_position_embeddings": 512, "pad_token_id": 0,
        },
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling",
             "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize",
             "type": "sentence_transformers.models.Normalize"},
        ],
        "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": 384, "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def snippets(readme: str) -> dict[str, str]:
    """Code blocks of a page by the heading before them."""
    found = re.findall(r"## (.+?)\n\n```(?:python|js)\n(.*?)```", readme, re.DOTALL)
    return dict(found)


def reference(model: Path, tokenizer: Path) -> np.ndarray:
    """Vectors (sentences, size) by a session of our own and the tokenizer alone."""
    from tokenizers import Tokenizer

    reader = Tokenizer.from_file(str(tokenizer))
    reader.no_padding()
    session = onnxcomp.InferenceSession(model)
    vectors = []
    for sentence in SENTENCES:
        ids = np.array([reader.encode(sentence).ids], np.int64)
        (states,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        vectors.append(states[0].mean(0))
    return np.array(vectors)


def difference(answer: str, wanted: np.ndarray) -> float:
    """Largest 1 - cosine of the vectors in the last line that a program printed."""
    found = np.array(json.loads(answer.strip().splitlines()[-1]), np.float64)
    right = wanted[: len(found)]
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(right, axis=1)
    return float((1 - (found * right).sum(1) / norms).max())


def run(command: list[str], folder: Path, wanted: np.ndarray) -> dict[str, Any]:
    """Run a program in the package and compare what it says."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        command, cwd=folder, env={**own_variables(), **offline}, capture_output=True, text=True
    )
    if done.returncode != 0:
        return {"failed": " ".join(done.stderr.strip().splitlines()[-2:])[-400:]}
    return {"difference": difference(done.stdout, wanted)}


def through_exec(command: list[str]) -> list[str]:
    """The command with the operator library in every session."""
    code = (
        f"import sys; sys.path[:0] = {sys.path[1:]!r}; "
        "from onnxcomp.cli import main; sys.argv[0] = 'onnxcomp'; main()"
    )
    return [sys.executable, "-c", code, "exec", "--", *command]


def in_python(name: str, code: str, home: Path, folder: Path, wanted: np.ndarray) -> dict[str, Any]:
    """One library of Python, without the operator library and with it."""
    python = installed(home / name, PYTHON[name])
    program = folder.parent / f"snippet_{name}.py"
    program.write_text(f"{code}\n{TAILS[name]}\n", encoding="utf-8")
    package = PYTHON[name][-1].split("[")[0] if name == "optimum" else name
    command = [str(python), str(program)]
    portable, library = (run(c, folder, wanted) for c in (command, through_exec(command)))
    version = version_of(python, package)
    return {"version": version, "portable": portable, "with_library": library}


def in_node(code: str, home: Path, folder: Path, wanted: np.ndarray) -> dict[str, Any]:
    """transformers.js, which has no way to the operator library."""
    place = home / "node"
    version = installed_by_npm(place, "@huggingface/transformers")
    program = place / "snippet.mjs"
    program.write_text(f"{code}\n{TAILS[NODE]}\n", encoding="utf-8")
    return {"version": version, "portable": run(["node", str(program)], folder, wanted)}


def main() -> None:
    """Run all and write the JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", choices=sorted(TAILS), action="append")
    parser.add_argument("--home", type=Path, default=Path("build/hub"))
    options = parser.parse_args()
    home, rows = options.home.resolve(), []
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = original(work / "MiniLM")
        onnxcomp.optimize(source / "onnx" / "model.onnx", work / "q4.onnx", bits=4, verify=False)
        made = onnxcomp.package(
            work / "q4.onnx", work / "packaged", "hf", like=source, variant="q4"
        )
        folder = made.path.resolve()
        wanted = reference(folder / "onnx" / "model_q4.onnx", folder / "tokenizer.json")
        codes = snippets((folder / "README.md").read_text(encoding="utf-8"))
        for library in options.only or TAILS:
            try:
                if library == NODE:
                    row = in_node(codes[library], home, folder, wanted)
                else:
                    row = in_python(library, codes[library], home, folder, wanted)
            except InstallError as error:
                row = {"failed": str(error)}
            rows.append({"library": library, **row})
            print(json.dumps(rows[-1]), flush=True)
    if not options.only:
        print(write_results("hub", {"rows": rows}))


if __name__ == "__main__":
    main()
