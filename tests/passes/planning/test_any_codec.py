"""The planner knows no codec by name: one with settings that are no bits, and measured errors."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.errors import CompressionError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.dense import DenseCodec
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import TensorLayout
from onnxcomp.passes.config.methods import method_names, split_methods
from onnxcomp.passes.config.policy import Policy
from onnxcomp.passes.config.rules import Rule, parse_rule
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.planning.error_model import Estimates
from onnxcomp.passes.planning.search_space import CandidateSet, candidate_set, equal_plans, uniform
from onnxcomp.passes.planning.size_fitting import fit
from onnxcomp.passes.transforms.canonicalize import Canonicalize
from onnxcomp.passes.transforms.pass_manager import Context, run_passes
from onnxcomp.passes.weight import Array, Stats, Use, WeightSite


@dataclasses.dataclass(frozen=True, slots=True)
class RankParams(Params):
    """Settings: the rank of two factors."""

    rank: int = 8


class RankCodec(DenseCodec):
    """Stands for two factors; only what planning asks for."""

    name: ClassVar[str] = "rank+dense"
    params_type: ClassVar[type[Params]] = RankParams
    automatic: ClassVar[bool] = True

    def check(self, params: Params) -> None:
        assert isinstance(params, RankParams)

    def candidates(self, site: WeightSite) -> Sequence[Any]:
        return [RankParams(rank) for rank in (64, 32, 16, 8)]

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        raise NotImplementedError

    def size(self, site: WeightSite, params: Params) -> int:
        assert isinstance(params, RankParams)
        return 4 * params.rank * (site.rows + site.length)

    def predict(self, site: WeightSite, params: Params) -> float:
        return 1.0

    def measure(
        self,
        site: WeightSite,
        weight: Array,
        params: Sequence[Params],
        stats: Stats | None = None,
    ) -> list[float]:
        power = np.square(np.linalg.svd(weight, compute_uv=False))
        ranks = [p.rank for p in params if isinstance(p, RankParams)]
        return [float(np.sqrt(power[rank:].sum() / power.sum())) for rank in ranks]


def offered(
    site: WeightSite, methods: Sequence[str], rule: Rule | None = None, **known: Any
) -> CandidateSet:
    """What there is to choose from for a weight, by some methods and a rule."""
    settings = Settings(method=tuple(methods), set_=() if rule is None else (rule,))
    return candidate_set(site, Policy.of(settings, [site.name]), **known)


def site(name: str = "w") -> WeightSite:
    use = Use(f"{name}.node", "MatMul", 1, "matmul")
    return WeightSite(name, (512, 256), "float32", (use,), "", 256, 512, True)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    CODECS["rank+dense"] = RankCodec()
    yield
    del CODECS["rank+dense"]


@pytest.fixture
def model() -> ir.Model:
    """Two weights: one of rank 12, and noise."""
    rng = np.random.default_rng(0)
    low = rng.standard_normal((512, 12)) @ rng.standard_normal((12, 256))
    arrays = {"w": low, "noise": rng.standard_normal((512, 256))}
    graph = ir.Graph((), (), nodes=(), opset_imports={"": 17})
    for name, array in arrays.items():
        tensor = ir.Tensor(array.astype(np.float32), name=name)
        graph.register_initializer(ir.Value(name=name, const_value=tensor))
    return ir.Model(graph, ir_version=8)


def test_errors_of_a_measured_codec_come_from_the_weight(model: ir.Model) -> None:
    assert CODECS["rank+dense"].measure is not None
    estimator = Estimates(model)
    found = offered(site(), ["rank+dense"], estimator=estimator)
    assert {c.params.rank: c.error < 1e-5 for c in found.options} == {  # type: ignore[attr-defined]
        64: True,
        32: True,
        16: True,
        8: False,
    }
    choice = Choice.of(found.options[1])
    assert choice.settle(site(), estimator).error == choice.error
    assert choice.settle(site()).error == 1.0


def test_bits_stand_for_bytes_where_settings_are_not_counted_in_bits(model: ir.Model) -> None:
    options = offered(site(), ["rank+dense"], estimator=Estimates(model))
    for bits, rank in ((6, 32), (3, 16), (1, 8)):
        assert uniform(options, bits).params == RankParams(rank)
    both = offered(site(), ["hyper", "rank+dense"], estimator=Estimates(model))
    assert uniform(both, 3).codec == "hyper"
    assert uniform(both, 8).codec == "rank+dense"


def test_a_weight_that_a_measured_codec_would_spoil_gets_more_bytes_or_stays(
    model: ir.Model,
) -> None:
    estimator = Estimates(model)
    noise = offered(site("noise"), ["rank+dense"], estimator=estimator)
    kept = uniform(noise, 4)
    assert kept.codec == "dense"
    assert "4 bits per weight lose 0.1;" in kept.reason
    low = offered(site(), ["rank+dense"], estimator=estimator)
    smaller = low.with_options(c for c in low.options if c.params.rank in (64, 8))  # type: ignore[attr-defined]
    assert uniform(smaller, 3).params == RankParams(64)
    asked = Policy(("rank+dense",), params={"rank": 8})
    fixed = candidate_set(site("noise"), asked, estimator=estimator)
    assert uniform(fixed, 4).params == RankParams(8)


def test_equal_plans_cover_every_codec() -> None:
    plans = list(equal_plans([offered(site(name), ["hyper", "rank+dense"]) for name in "ab"]))
    assert {plan[0].codec for plan in plans} == {"hyper", "rank+dense"}
    assert all(plan[0].params == plan[1].params for plan in plans)


def test_a_plan_mixes_codecs_where_each_is_best(model: ir.Model) -> None:
    estimator = Estimates(model)
    sets = [
        offered(site(name), ["hyper", "rank+dense"], estimator=estimator) for name in ("w", "noise")
    ]
    picks, total = fit(sets, 160_000, lambda picks: sum(c.bytes for c in picks))
    assert [pick.codec for pick in picks] == ["rank+dense", "hyper"]
    assert 0.95 * 160_000 < total <= 160_000


def test_a_rule_speaks_to_the_codecs_that_have_its_parameters() -> None:
    options = offered(site(), ["hyper", "rank+dense"], parse_rule("w:rank=32"))
    assert {c.codec for c in options.options} == {"rank+dense"}


def test_a_name_with_a_plus_is_one_codec() -> None:
    assert split_methods("rank+dense") == ("rank+dense",)
    assert split_methods("hyper+dense") == ("hyper", "dense")
    assert parse_rule("w:method=rank+dense").methods == ("rank+dense",)
    assert method_names("auto", CODECS)[-1] == "rank+dense"


def test_a_pass_waits_for_those_it_requires(model: ir.Model) -> None:
    class Late(Canonicalize):
        name: ClassVar[str] = "late"
        requires: ClassVar[tuple[str, ...]] = ("canonicalize",)

    context = Context(Settings())
    assert list(run_passes(model, context, (Canonicalize(), Late()))) == ["canonicalize", "late"]
    with pytest.raises(CompressionError, match="'late' must come after 'canonicalize'"):
        run_passes(model, context, (Late(), Canonicalize()))
