"""The options of `optimize` and `plan`: one entry each, in the one place where they are written.

The command line, configuration files with their schema and template, `Settings`, the signatures
and docstrings of `onnxcomp.optimize` and `onnxcomp.plan`, and the tables of docs/cli.md are all
derived from these entries. To add an option, add an entry here and read it where it acts:
``settings.name`` for one that decides which bytes are written.

Order matters where it is published: that of `ByteOptions` is the order of settings in plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from onnxcomp.passes.config.kinds import (
    Callback,
    Choice,
    Data,
    File,
    Flag,
    Function,
    Names,
    Number,
    Patterns,
    PlanFile,
    Rules,
    Shapes,
    Size,
    Sparsity,
)
from onnxcomp.passes.config.option import Options, option, table
from onnxcomp.passes.config.scheduler import Scheduler
from onnxcomp.passes.config.values import (
    CalibrationMode,
    ExternalData,
    Functions,
    ModeChoice,
    Objective,
    Precision,
    PruneScore,
    Rest,
    Target,
)

if TYPE_CHECKING:
    import os

    from onnxcomp.passes.config.option import Converted
    from onnxcomp.passes.config.rules import Rule

    PathLike = str | os.PathLike[str]

__all__ = ["TARGETS", "ByteOptions", "OptimizeOptions", "PlanLike", "PlanOptions"]

# Ways to say how small the output is to be: one of them replaces another.
TARGETS = ("bits", "ratio", "target_size")

# Told about bytes encoded so far, all of them, and the weight that is next.
Progress = Callable[[int, int, str], None]

# Gets a function that opens sessions of a model, and returns how good it is; higher is better.
Score = Callable[[Callable[..., Any]], float]


class PlanLike(Protocol):
    """What `onnxcomp.plan` returns, an `onnxcomp.Plan`."""

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""


@table
class ByteOptions(Options):
    """Options that decide which bytes are written."""

    method: Converted[str | Sequence[str], tuple[str, ...]] = option(
        "auto", Names(), "method",
        "Codecs to choose from; auto stands for all that make weights smaller.",
        "`onnxcomp codecs` lists them: `hyper`, `int`, `fp16`, `lowrank`, `dense` and others. "
        "Several are joined with +, or repeated; lowrank+hyper, lowrank+int and hyper+lowrank are "
        "codecs of their own.",
        cli=("-m", "--method"),
    )  # fmt: skip
    bits: int | None = option(
        None, Number(whole=True, least=1, metavar="N"), "target",
        "Bits per weight, the same for all; 4 where no target is given.",
        "Which numbers there are depends on the methods. Convolutions that filter a raw input "
        "(sound, images) get up to three more, where it costs little and helps much; a rule "
        "decides otherwise.",
        example="4",
    )  # fmt: skip
    ratio: float | None = option(
        None, Number(above=1, suffix="x", metavar="N"), "target",
        "How many times smaller the file is to be.",
        "Bits are spent where they help most.",
        example="8",
    )  # fmt: skip
    target_size: Converted[int | str | None, int | None] = option(
        None, Size(1), "target", "Largest size of the output: 120MB, or bytes.",
        key="size", example="120MB",
    )  # fmt: skip
    max_error: float | None = option(
        None, Number(above=0), "target",
        "Largest relative L2 error of an output; without a target: as small as it allows.",
        "It is measured at the end. With a target it is a limit.",
        example="0.02",
    )  # fmt: skip
    max_slowdown: float | None = option(
        None, Number(above=0), "target",
        "How many times as long as the original the output may run, as measured.",
        "One thread; 0.5 asks for twice the speed. Plans are made with what products cost on this "
        "machine, which `bench --costs` measures, or the first run that needs it; with a `target` "
        "that is another class of machines, of one of those, and then nothing is measured.",
        example="1.5",
    )  # fmt: skip
    min_size: Converted[int | str, int] = option(
        "16KiB", Size(), "method", "Leave smaller tensors alone.",
        "A plan for a size takes those from 1 KiB on where they would hold a quarter of it.",
    )  # fmt: skip
    mode: ModeChoice = option(
        "auto", Choice(ModeChoice), "method",
        "How uses of weights are served: compute on codes, expand at load, or decode at every run.",
        "`fused` computes on codes, `folded` expands to a dense weight when the session starts, "
        "`decode` expands at every run; `auto` is `fused` for MatMul, Gemm and Gather, `folded` "
        "for the rest.",
    )  # fmt: skip
    include: Converted[str | Sequence[str], tuple[str, ...]] = option(
        (), Patterns(), "method",
        "Touch only weights whose name, or the name of a node that uses them, matches.",
    )  # fmt: skip
    exclude: Converted[str | Sequence[str], tuple[str, ...]] = option(
        (), Patterns(), "method",
        "Leave weights alone whose name, or the name of a node that uses them, matches.",
    )  # fmt: skip
    set_: Converted[str | Rule | Sequence[str | Rule], tuple[Rule, ...]] = option(
        (), Rules(), "method",
        "Settings for the weights that match; the first rule that matches a weight decides.",
        "For example `encoder.*:bits=3`, `head:method=dense` or `.*:op=Conv,bits=5`. Keys are "
        "parameters of the codec (`quality=fast` for hyper, `energy=0.9` for lowrank), "
        "`method`, `mode`, and `op` for weights of one operator.",
        cli=("--set",), key="rules",
        example='\n  - {match: "norm|bias", keep: true}'
        '\n  - {match: "lm_head", method: hyper, params: {bits: 5}}'
        "\n  - {op: Conv, method: int, params: {bits: 8}}",
    )  # fmt: skip
    external_data: ExternalData = option(
        "auto", Choice(ExternalData), "output",
        "Put large tensors into OUT.data; auto: from 64 MiB on.",
    )  # fmt: skip
    freeze_inputs: bool = option(
        False, Flag(), "output",
        "Compress weights that the model also lists as inputs; they can no longer be fed.",
    )  # fmt: skip
    precision: Precision = option(
        "int8", Choice(Precision), "method",
        "Activations in products on codes: rounded to 8 bits per group, or as they are.",
        "`exact` computes them in float32: slower, and equal to the portable form within "
        "rounding. For the method int: MatMulNBits with `accuracy_level` 4, or without one.",
    )  # fmt: skip
    portable: bool = option(
        True, Flag(), "output", "Carry definitions that run without the operator library.",
        on_cli=False,
    )  # fmt: skip
    seed: int = option(
        0, Number(whole=True, least=0, metavar="N"), "run", "Seed of every random choice.",
    )  # fmt: skip
    stock: bool = option(
        False, Flag(), "method",
        "Use only methods whose models need no operator library anywhere.",
        "Those are `int`, `fp16`, `dense` and others that `onnxcomp codecs` lists without library.",
    )  # fmt: skip
    rest: Rest = option(
        "keep", Choice(Rest), "method",
        "Weights that no method makes smaller: as they are, in half precision, or in half "
        "precision where no value changes.",
        "`fp16` takes those whose values allow it, `exact` leaves out zeros, too; excluded weights "
        "stay as they are.",
    )  # fmt: skip
    prune_ratio: float | None = option(
        None, Number(above=0, below=1, metavar="SHARE"), "prune",
        "First take out channels, neurons and heads: this share of the parameters of layers that "
        "can shrink.",
        "With `prune` as the only method the rest stays dense.",
        key="ratio", example="0.2",
    )  # fmt: skip
    target_flops: float | None = option(
        None, Number(above=0, below=1, metavar="SHARE"), "prune",
        "Instead: prune until this share of the model's FLOPs is left.",
        key="flops", example="0.7",
    )  # fmt: skip
    prune_score: PruneScore | None = option(
        None, Choice(PruneScore), "prune",
        "What decides which channels go; obs by default, magnitude without data.",
        key="score", example="obs",
    )  # fmt: skip
    prune_search: int | None = option(
        None, Number(whole=True, least=1, metavar="N"), "prune",
        "Try up to N other ways to divide what goes between the layers, and keep the one whose "
        "outputs lose least on the data.",
        "Each takes as long as the fits of one pruned model.",
        key="search", example="24",
    )  # fmt: skip
    prune_caches: bool | None = option(
        None, Flag(), "prune",
        "Let pruning change the shapes of inputs and outputs that hold a KV cache.",
        key="caches", example="false",
    )  # fmt: skip
    prune_experts: float | None = option(
        None, Number(above=0, metavar="N|SHARE"), "prune",
        "Take so many whole experts, or this share of them, out of each mixture of experts.",
        "Those go that the outputs miss least on the data; without data, those with the least "
        "column of the router. A router and the stacks that its indices pick from are found by "
        "themselves.",
        key="experts", example="2",
    )  # fmt: skip
    prune_layers: int | None = option(
        None, Number(whole=True, least=1, metavar="N"), "prune",
        "Take so many whole residual branches out, such as the attention of a layer.",
        "Those go that the outputs miss least on the data. Branches that fill a cache stay.",
        key="layers", example="2",
    )  # fmt: skip
    detect_sharing: bool = option(
        False, Flag(), "method",
        "Find weights that were trained to share values and then multiplied out, and store them "
        "by those values, bit for bit.",
    )  # fmt: skip
    distill: int = option(
        0, Number(whole=True, least=0, metavar="N"), "method",
        "Train what weights share (method hash) for N steps towards the model's outputs on the "
        "data; needs torch.",
    )  # fmt: skip
    functions: Functions = option(
        "local", Choice(Functions), "output",
        "Definitions of the operators: as model-local functions, or inlined at the nodes.",
        "Engines that refuse such functions (OpenVINO, tract, MNN) run the inlined form, which "
        "the operator library cannot speed up. `inline-unfoldable` keeps other tools from folding "
        "codes to dense weights: they are decoded at every run, slowly and in little memory.",
    )  # fmt: skip
    target: Target = option(
        "any", Choice(Target), "method",
        "Class of machines that the output is to be fast on; it runs on all of them.",
        "`avx2` and `neon` choose tables that processors without AVX-512 run two to three times as "
        "fast, for 3 % more error power at 4 bits and less at 3 (hyper: `table=structured`). `any` "
        "chooses what `avx512` and `cuda` do. `onnxcomp doctor MODEL` says what would suit a "
        "machine.",
        key="machines", example="avx2",
    )  # fmt: skip
    logits_to_keep: int | None = option(
        None, Number(whole=True, least=1, metavar="N"), "output",
        "Decoders: compute and return the logits of the last N positions only.",
        "Generation needs 1, and a prompt takes less time. The logits then have N positions, or as "
        "many as there are. Everything is calibrated and judged with the logits of all positions.",
        example="1",
    )  # fmt: skip
    objective: Objective = option(
        "size", Choice(Objective), "target",
        "What is made small where the other wishes leave a choice: bytes, or the time of a run.",
        "`latency` takes the form of each weight that is expected to be fastest, dense and dynamic "
        "int8 among them, of those that are no less accurate than what it would get otherwise; "
        "with a size, the fastest plan of that size. Expected times are those that "
        "`--max-slowdown` uses.",
    )  # fmt: skip
    sparsity: Converted[str | float | None, str | None] = option(
        None, Sparsity(), "prune",
        "Set this share of each weight of a product to zero, or all but 2 of every 4 elements.",
        "The smallest go. With data those go that matter least to the products, and the others "
        "make up for them. The methods `sparse`, `sparse+int` and `sparse+hyper` store what is "
        "left.",
        example='"2:4"',
    )  # fmt: skip


@table
class PlanOptions(ByteOptions):
    """Options of `onnxcomp.plan`: those that decide about bytes, and inputs to look at."""

    data: Any = option(
        None, Data(), "data",
        "Inputs: an .npz file, a folder of them, name=file.npy, or a text for a language model; "
        "without, they are made up.",
        "A model with one input takes file.npy, too, and a language model text.txt, which it reads "
        "in windows by the tokenizer.json beside it. Python takes arrays as well, see "
        "`runtime.inputs.load_inputs`. They calibrate the codes and check the result; without "
        "them weights are encoded by their values alone.",
        key="path", example="calibration/*.npz",
    )  # fmt: skip
    calibration: CalibrationMode = option(
        "sequential", Choice(CalibrationMode), "data",
        "How data decides about codes: each weight behind the compressed earlier ones, behind the "
        "dense ones, or not at all.",
    )  # fmt: skip


@table
class OptimizeOptions(PlanOptions):
    """Options of `onnxcomp.optimize`: those of a plan, and how the run goes about its work."""

    tune: int = option(
        2, Number(whole=True, least=0, metavar="N"), "data",
        "Tune the scales of codes for the model's outputs in N passes over the data; 0 for none.",
        "It takes memory for the dense model twice and for its activations, and float32 models of "
        "opset 13 or newer; others, and those above 1 GiB, are left as they are.",
    )  # fmt: skip
    shapes: Mapping[str, Sequence[int]] | None = option(
        None, Shapes(), "data", "Shapes of made-up inputs by name.",
        cli=("--shape", "shapes"), example="{input_ids: [1, 128]}",
    )  # fmt: skip
    plan: PlanLike | PathLike | None = option(
        None, PlanFile(), "source",
        "Carry out a plan made by `onnxcomp plan`; its settings are used.",
        in_file=False,
    )  # fmt: skip
    verify: bool = option(
        True, Flag(), "gate", "Run the result and compare it; on by default.",
        cli=("--verify/--no-verify",), key="run",
    )  # fmt: skip
    tolerance: float | None = option(
        None, Number(least=0), "gate", "Largest accepted relative L2 difference of an output.",
        "Without one the loss is reported and not judged. Where it is exceeded, the weights "
        "that cause it become dense again.",
        example="0.05",
    )  # fmt: skip
    evaluate: str | Score | None = option(
        None, Function(), "gate",
        "Your own measure: a Python function that gets a function that opens a session, and "
        "returns a number; higher is better.",
        "It is run on the original and on the result.",
        cli=("--eval", "evaluate"), example="mine.py:accuracy",
    )  # fmt: skip
    max_drop: float = option(
        0.0, Number(least=0), "gate", "How much less than the original's that number may be.",
        example="0.01",
    )  # fmt: skip
    force: bool = option(
        False, Flag(), "gate", "Write the result even when the check fails.", in_file=False,
    )  # fmt: skip
    jobs: int | None = option(
        None, Number(whole=True, least=1, metavar="N"), "run",
        "Threads; all processors by default.", "The bytes do not depend on it.",
        example="2",
    )  # fmt: skip
    cache: PathLike | None = option(
        None, File(folder=True), "run", "Keep encoded weights in this folder.",
        "An interrupted or repeated run encodes nothing twice, with data neither.",
        example="encoded",
    )  # fmt: skip
    scheduler: str | None = option(
        None, Scheduler(), "run",
        "Encode on the workers of a Dask cluster: local:N starts N on this machine, HOST:PORT uses "
        "one that runs.",
        "The bytes do not depend on it. Workers read the model from a folder that all of them see.",
        example="local:4",
    )  # fmt: skip
    dry_run: bool = option(False, Flag(), "run", "Only plan.", in_file=False)
    progress: Progress | None = option(
        None, Callback(), "run",
        "Told of the work before each weight and after the last one: bytes done, all bytes, the "
        "weight that is next.",
        on_cli=False, in_file=False,
    )  # fmt: skip
