"""Torch modules become small ONNX models that compute what the module does."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxcomp
from onnxcomp.models import export

torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[torch]'")
nn = torch.nn
pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning:torch.*", "ignore::Warning:onnxscript.*"),
    pytest.mark.usefixtures("one_thread_and_seed"),
]

EXPORTERS = ("dynamo", "torchscript")
Case = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 160), nn.Linear(160, 48)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Any) -> Any:
        return self.fc2(self.drop(torch.relu(self.fc1(x))))


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.head = nn.Linear(64, 100)

    def forward(self, x: Any) -> Any:
        hidden = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(hidden.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(48, 64, batch_first=True)

    def forward(self, x: Any, state: Any) -> Any:
        return self.lstm(x, state)


class Tied(nn.Module):
    """A transformer of one layer whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(200, 64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.head = nn.Linear(64, 200, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Any, *, mask: Any = None) -> Any:
        x = self.embed(ids)
        x = x + self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return {"logits": self.head(x), "pooled": (x.mean(1), x.amax(1))}


CASES: dict[str, Callable[[], tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    "perceptron": lambda: (Perceptron(), (torch.randn(3, 64),), {}),
    "pictures": lambda: (Pictures(), (torch.randn(2, 3, 16, 16),), {}),
    "recurrent": lambda: (
        Recurrent(),
        (torch.randn(2, 5, 48), (torch.randn(1, 2, 64), torch.randn(1, 2, 64))),
        {},
    ),
    "tied": lambda: (
        Tied(),
        (torch.randint(0, 200, (2, 7)),),
        {"mask": torch.zeros(2, 7, dtype=torch.bool)},
    ),
}


@pytest.fixture
def case(request: pytest.FixtureRequest) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Module, arguments and keyword arguments of the named case."""
    return CASES[request.param]()


@pytest.fixture
def perceptron() -> Any:
    return Perceptron()


def names(values: Any) -> list[str]:
    return [value.name for value in values]


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("case", ["perceptron", "pictures", "recurrent", "tied"], indirect=True)
def test_modules_are_exported_compressed_and_compared(
    case: Case, exporter: str, tmp_path: Path
) -> None:
    module, args, kwargs = case
    path = tmp_path / "small.onnx"
    result = export(
        module, args, path, kwargs=kwargs, exporter=exporter, bits=5, min_size="4KiB",
        dense=tmp_path / "dense.onnx",
    )  # fmt: skip
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dense.onnx", "small.onnx"]
    assert result.path == path and result.exporter == exporter
    assert result.report.input.path is None and result.report.coverage == 1
    assert result.verify is not None and result.verify.passed
    check = result.torch
    assert check is not None and check.samples == 1
    model = onnx.load(path)
    assert list(check.exported) == list(check.written) == names(model.graph.output)
    assert all(found.rel_l2 <= check.tolerance < 1e-3 for found in check.exported.values())
    assert all(1e-3 < found.rel_l2 < 0.1 for found in check.written.values())


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("case", ["tied"], indirect=True)
def test_without_options_the_model_is_written_as_it_is(
    case: Case, exporter: str, tmp_path: Path
) -> None:
    module, args, kwargs = case
    path = tmp_path / "tied.onnx"
    other = {name: torch.flip(tensor, (0,)) for name, tensor in {"ids": args[0], **kwargs}.items()}
    result = export(module, args, path, kwargs=kwargs, exporter=exporter, checks=[other])
    model = onnx.load(path)
    assert names(model.graph.input) == ["ids", "mask"]
    assert names(model.graph.output) == ["logits", "pooled_0", "pooled_1"]
    tables = [tensor for tensor in model.graph.initializer if sorted(tensor.dims) == [64, 200]]
    assert len(tables) == 1, "the tied weight is stored once"
    assert tables[0].name in ("embed.weight", "head.weight")
    assert not model.functions and result.report.coverage == 0
    assert result.torch is not None and result.torch.samples == 2
    assert result.torch.written["logits"].rel_l2 <= result.torch.tolerance
    assert result.report.config["data"] == "the example inputs"


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_free_dimensions_have_the_names_given(
    perceptron: Any, exporter: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    x, other = torch.randn(3, 5, 64), torch.randn(1, 2, 64)
    shapes = {"x": {0: "batch", 1: "length"}}
    result = export(
        perceptron, x, path, exporter=exporter, dynamic_shapes=shapes, checks=[other], bits=6,
        min_size=4096,
    )  # fmt: skip
    assert result.torch is not None and result.torch.samples == 2
    graph = onnx.load(path).graph
    for value, last in ((graph.input[0], 64), (graph.output[0], 48)):
        dims = value.type.tensor_type.shape.dim
        assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", "length", last]


def test_the_module_keeps_its_modes_gradients_and_the_generators_theirs(
    perceptron: Any, tmp_path: Path
) -> None:
    perceptron.train()
    perceptron.fc1.eval()
    before = torch.get_rng_state()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    export(perceptron, x, tmp_path / "m.onnx", exporter="torchscript")
    assert torch.equal(before, torch.get_rng_state())
    assert perceptron.training and perceptron.drop.training and not perceptron.fc1.training
    assert all(weight.requires_grad and weight.grad is None for weight in perceptron.parameters())
    assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions(perceptron: Any, dtype: str, tmp_path: Path) -> None:
    kind = getattr(torch, dtype)
    x = torch.randn(3, 64).to(kind)
    path = tmp_path / "m.onnx"
    if dtype == "bfloat16":  # ONNX Runtime multiplies it on a GPU only
        with pytest.raises(onnxcomp.errors.ModelError, match="ONNX Runtime cannot"):
            export(perceptron.to(kind), x, path, exporter="torchscript", bits=5, min_size=4096)
        result = export(
            perceptron, x, path, exporter="torchscript", bits=5, min_size=4096, verify=False
        )
        assert result.torch is None and result.report.coverage == 1
        return
    result = export(perceptron.to(kind), x, path, exporter="torchscript", bits=5, min_size=4096)
    assert result.torch is not None
    assert result.torch.exported["output"].rel_l2 <= result.torch.tolerance
    assert result.report.coverage == 1


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.yes, self.no = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Any) -> Any:
        return torch.cond(x.sum() > 0, lambda v: self.yes(v), lambda v: self.no(v), (x,))


class Steps(nn.Module):  # without types: torch would read them when it compiles the module
    """Control flow that depends on values: scripting sees it, tracing does not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.fc(x) if bool(x.sum() > 0) else torch.relu(x)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_control_flow_stays(exporter: str, tmp_path: Path) -> None:
    x = torch.ones(2, 64)
    module = Branches() if exporter == "dynamo" else torch.jit.script(Steps())
    result = export(
        module, x, tmp_path / "m.onnx", exporter=exporter, checks=[-x], bits=5, min_size=4096
    )
    assert "If" in {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert result.torch is not None and result.torch.samples == 2
    assert result.report.coverage == 1


def test_a_graph_that_does_not_follow_the_module_is_refused(tmp_path: Path) -> None:
    x = torch.ones(2, 64)
    with pytest.raises(onnxcomp.errors.VerifyError, match="'output': relative difference"):
        export(Steps(), x, tmp_path / "m.onnx", exporter="torchscript", checks=[-x])
    assert not list(tmp_path.iterdir())


def test_what_torch_says_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Without other inputs to compare on, a branch that tracing lost is told, and no more."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(Steps(), torch.ones(2, 64), tmp_path / "m.onnx", exporter="torchscript")
    assert capfd.readouterr() == ("", "")
    (record,) = [r for r in caplog.records if r.name.startswith("onnxcomp.models")]
    assert "tracing took 1 values of Steps for constants" in record.getMessage()


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_names_of_parameters_stay_and_traces_of_torch_go(exporter: str, tmp_path: Path) -> None:
    module, args, kwargs = CASES["tied"]()
    dense = tmp_path / "dense.onnx"
    given = {"mask": kwargs["mask"], "ids": args[0]}  # not in the order of the parameters
    export(module, (), tmp_path / "m.onnx", kwargs=given, exporter=exporter, dense=dense)
    model = onnx.load(dense)
    assert names(model.graph.input) == ["ids", "mask"]
    named = {tensor.name for tensor in model.graph.initializer}
    assert {"embed.weight", "up.weight", "down.weight", "attention.out_proj.weight"} <= named
    assert not [prop.key for node in model.graph.node for prop in node.metadata_props]


def test_free_axes_of_unknown_parameters_are_an_error(perceptron: Any, tmp_path: Path) -> None:
    with pytest.raises(onnxcomp.errors.UsageError, match="names 'y', which the module") as caught:
        export(perceptron, torch.ones(2, 64), tmp_path / "m.onnx", dynamic_shapes={"y": {0: "n"}})
    assert caught.value.hint == "known: x"


def test_a_difference_can_be_accepted(perceptron: Any, tmp_path: Path) -> None:
    """A module that adds noise never computes the same twice."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = perceptron

        def forward(self, x: Any) -> Any:
            return self.inner(x) + torch.randn(48)

    x, path = torch.randn(3, 64), tmp_path / "m.onnx"
    with pytest.raises(onnxcomp.errors.VerifyError, match="relative difference") as caught:
        export(Noisy(), x, path, exporter="torchscript")
    assert "module_tolerance" in caught.value.hint
    result = export(Noisy(), x, path, exporter="torchscript", module_tolerance=100.0)
    assert result.torch is not None and 0.1 < result.torch.exported["output"].rel_l2 < 100


def test_errors_say_what_to_do(perceptron: Any, tmp_path: Path) -> None:
    x, path = torch.ones(2, 64), tmp_path / "m.onnx"
    usage, model = onnxcomp.errors.UsageError, onnxcomp.errors.ModelError
    with pytest.raises(usage, match="exporter 'dynamos' is unknown") as caught:
        export(perceptron, x, path, exporter="dynamos")
    assert "'dynamo'" in caught.value.hint
    with pytest.raises(usage, match=r"Perceptron\.forward does not take"):
        export(perceptron, (x, x), path)
    with pytest.raises(usage, match="2 names for 1 tensors"):
        export(perceptron, x, path, input_names=["a", "b"])
    with pytest.raises(usage, match=r"folder .* does not exist"):
        export(perceptron, x, tmp_path / "absent" / "m.onnx")
    with pytest.raises(usage, match="given twice"):
        export(perceptron, x, path, dense=path)
    with pytest.raises(model, match="cannot export Steps with dynamo") as caught:
        export(Steps(), x, path)
    assert "torchscript" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_a_missed_target_is_an_error_with_the_comparison(perceptron: Any, tmp_path: Path) -> None:
    x = torch.ones(2, 64)
    with pytest.raises(onnxcomp.TargetMissedError) as caught:
        export(perceptron, x, tmp_path / "m.onnx", exporter="torchscript", ratio=90)
    result: Any = caught.value.result
    assert result.torch.written["output"].rel_l2 > 0
    assert result.report.input.path is None


def test_weights_outside_the_file(perceptron: Any, tmp_path: Path) -> None:
    x, path = torch.ones(2, 64), tmp_path / "m.onnx"
    export(perceptron, x, path, exporter="torchscript", external_data="always", input_names=["in"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    session = onnxcomp.InferenceSession(path)
    out = session.run(None, {"in": x.numpy()})[0]
    with torch.no_grad():
        wanted = perceptron.eval()(x).numpy()
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def program() -> Any:
    from onnx import checker

    module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(module, (torch.ones(2, 64),), dynamo=True, verbose=False)
    checker.check_model(made.model_proto)
    return made


@pytest.mark.parametrize("kind", ["program", "proto", "ir", "graphsurgeon", "path"])
def test_optimize_takes_what_torch_gives(program: Any, kind: str, tmp_path: Path) -> None:
    source = {
        "program": lambda: program,
        "proto": lambda: program.model_proto,
        "ir": lambda: program.model,
        "graphsurgeon": lambda: onnxcomp.to_gs(program.model),
        "path": lambda: program.save(tmp_path / "in.onnx") or tmp_path / "in.onnx",
    }[kind]()
    result = onnxcomp.optimize(source, tmp_path / "out.onnx", bits=4, min_size=4096)
    assert result.verify is not None and result.verify.passed
    assert result.report.coverage == 1
    before = {node.op_type for node in program.model_proto.graph.node}
    assert before == {"Gemm", "Relu"}, "the program is as it was"


@pytest.mark.parametrize(
    ("page", "made"),
    [
        ("README.md", "encoder.onnx"),
        ("docs/pytorch.md", "encoder.onnx"),
        ("docs/pytorch.md", "decoder.onnx"),
    ],
)
def test_the_example_of_a_page_runs(
    page: str, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```py\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (program,) = [block for block in blocks if made in block]
    if "transformers" in program:
        pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, page, "exec"), {})
    assert (tmp_path / made).is_file()
