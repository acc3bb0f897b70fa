"""The page of a result: one file, no requests, and names of models are only ever text."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import onnxcomp
from onnxcomp.errors import UsageError
from onnxcomp.passes.report.page import page, write_page

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "&lt;b&gt; \u2028 \"quotes\" 'and' `ticks` ${document.title='owned'}",
    "javascript:document.title='owned'",
    "@DATA@ @SCRIPT@ \\u003c",
)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of a real run."""
    from onnxcomp.models.character_kinds import model_path

    folder = tmp_path_factory.mktemp("page")
    options: dict[str, Any] = {"ratio": 6, "exclude": "hidden"}
    return onnxcomp.optimize(model_path(), folder / "small.onnx", **options).report.to_json()


@pytest.fixture
def hostile(result: dict[str, Any]) -> dict[str, Any]:
    """The same with names that want to be markup."""
    changed: dict[str, Any] = json.loads(json.dumps(result))
    for site, name in zip(changed["sites"], HOSTILE, strict=False):
        site.update(name=name, reason=name, note=name, uses=[name])
    changed["sites"][0]["method"] = HOSTILE[1]
    changed["output"]["path"] = f"/tmp/{HOSTILE[1]}"
    changed["verify"]["outputs"] = {HOSTILE[0]: changed["verify"]["outputs"]["logits"]}
    changed["config"]["data"] = HOSTILE[0]
    return changed


class Elements(html.parser.HTMLParser):
    """Elements with their attributes, and the text of each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self._open, []).append(data)


def parsed(text: str) -> Elements:
    elements = Elements()
    elements.feed(text)
    elements.close()
    return elements


def test_the_page_is_one_file_without_requests(result: dict[str, Any]) -> None:
    text = page(result)
    assert set(re.findall(r"[a-z]+://[^\"'\s;)]*", text)) <= {"http://www.w3.org/2000/svg"}
    elements = parsed(text)
    tags = [tag for tag, _ in elements.found]
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(tags)
    assert not any({"src", "href"} & set(attributes) for _, attributes in elements.found)
    assert "url(" not in text and "@import" not in text
    for word in ("fetch(", "XMLHttpRequest", "innerHTML", "outerHTML", "eval(", "document.write"):
        assert word not in text
    assert len(text) < 200_000


def test_the_data_survive_and_the_policy_names_script_and_style(result: dict[str, Any]) -> None:
    elements = parsed(page(result))
    data, script = elements.text["script"]
    assert json.loads(data) == {**result, "frontier": [], "bench": []}
    policy = next(a["content"] for _, a in elements.found if a.get("http-equiv")) or ""
    for name, text in (("script", script), ("style", elements.text["style"][0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_hostile_names_stay_data(hostile: dict[str, Any]) -> None:
    elements = parsed(page(hostile))
    assert [tag for tag, _ in elements.found].count("script") == 2
    assert "img" not in [tag for tag, _ in elements.found]
    data = json.loads(elements.text["script"][0])
    assert [site["name"] for site in data["sites"][: len(HOSTILE)]] == list(HOSTILE)
    assert "onnxcomp" in elements.text["title"][0]


def test_numbers_json_cannot_hold_become_null(result: dict[str, Any]) -> None:
    sites = [{**result["sites"][0], "weight_error": float("inf")}]
    data = parsed(page({**result, "sites": sites})).text["script"][0]
    assert json.loads(data)["sites"][0]["weight_error"] is None


def test_a_damaged_site_is_refused(result: dict[str, Any]) -> None:
    for change in ({"shape": 3}, {"name": None}, {"bytes_after": "x"}):
        with pytest.raises(UsageError, match=next(iter(change))):
            page({**result, "sites": [{**result["sites"][0], **change}]})


@pytest.mark.parametrize("wrong", [{}, [], {"sites": 3}, {"error": {"kind": "UsageError"}}])
def test_something_else_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="not the result of optimize"):
        page(wrong)


def test_the_command_adds_frontier_and_bench(result: dict[str, Any], tmp_path: Path) -> None:
    from click.testing import CliRunner

    from onnxcomp.cli import main

    points = [{"setting": "", "bytes": 100, "ratio": 2.0, "error": 0.1, "weight_error": 0.1}]
    models = [{"path": "a.onnx", "median_ms": 1.0, "rss_bytes": 10}]
    for name, value in (("r", result), ("f", {"frontier": points}), ("b", {"models": models})):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    r, f, b = (str(tmp_path / f"{name}.json") for name in "rfb")
    out = tmp_path / "r.html"
    words = ["report", r, "--html", str(out), "--bench", b, "--frontier", f, "--json"]
    answer = CliRunner().invoke(main, words)
    assert answer.exit_code == 0
    assert json.loads(answer.stdout) == {"path": str(out), "bytes": out.stat().st_size}
    data = json.loads(parsed(out.read_text()).text["script"][0])
    assert data["frontier"] == points and data["bench"] == models
    answer = CliRunner().invoke(main, ["report", r, "--html", str(out), "--bench", f])
    assert answer.exit_code == 2 and "no list 'models'" in answer.stderr
    answer = CliRunner().invoke(main, ["report", b, "--html", str(out)])
    assert answer.exit_code == 2 and "not the result" in answer.stderr


def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip("no Chromium to render the page in")
    return found


def rendered(path: Path, width: int) -> tuple[str, list[str]]:
    """The document after its script has run, and what the browser complains about."""
    done = subprocess.run(
        [
            browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={path.parent / 'profile'}", "--enable-logging=stderr",
            f"--window-size={width},2000", "--virtual-time-budget=3000", "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("which", ["result", "hostile"])
def test_a_browser_draws_it_without_complaint(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    values = request.getfixturevalue(which)
    points = [
        {"setting": setting, "bytes": size, "ratio": 1e6 / size, "error": error}
        for setting, size, error in (("", 10**5, 0.2), ("", 10**6, 0.01), ("x 4", 2 * 10**5, 0.2))
    ]
    models = [{"path": "a", "form": "model", "median_ms": 2.0, "rss_bytes": 10**8}] * 2
    write_page(values, tmp_path / "r.html", frontier=points, bench=models)
    document, complaints = rendered(tmp_path / "r.html", 800)
    assert complaints == []
    elements = parsed(document)
    tags = [tag for tag, _ in elements.found]
    assert tags.count("tr") >= len(values["sites"]) and "img" not in tags
    assert tags.count("circle") > 3 and tags.count("rect") > 2 * 10
    assert "owned" not in "".join(elements.text["title"][:1]).replace(HOSTILE[1], "")
    words = " ".join(elements.text["h2"])
    for heading in ("Size", "Ratio against error", "What could be had", "Latency", "Every tensor"):
        assert heading in words
    if which == "hostile":
        assert "".join(elements.text["td"]).count(HOSTILE[0]) >= 1


def test_low_rank_weights_bring_their_spectra(tmp_path: Path) -> None:
    from onnxcomp.models.character_kinds import model_path
    from onnxcomp.passes.report.report import Report

    done = onnxcomp.optimize(
        model_path(), tmp_path / "low.onnx", set_="val_2|hidden:method=lowrank,rank=24"
    )
    values = done.report.to_json()
    spectra = {site["name"]: site["spectrum"] for site in values["sites"] if site["spectrum"]}
    assert sorted(spectra) == ["hidden.weight", "val_2"]
    for points in spectra.values():
        assert points[0] == [1, 1.0] and points[-1][0] > 100
        assert [v for _, v in points] == sorted((v for _, v in points), reverse=True)
    assert Report.from_json(values).to_json() == values
    write_page(values, tmp_path / "r.html")
    document, complaints = rendered(tmp_path / "r.html", 800)
    assert complaints == [] and "Spectra" in " ".join(parsed(document).text["h2"])


CLICKS = """{
const names = () => [...document.querySelectorAll("table.sites td.name")]
  .map((cell) => cell.firstChild.textContent);
const head = (name) => [...document.querySelectorAll("table.sites th button")]
  .find((button) => button.textContent === name);
const found = { all: names() };
head("before").click(); found.largest = names();
head("before").click(); found.smallest = names();
const input = document.querySelector("input"), select = document.querySelector("select");
input.value = "GATHER table_word"; input.dispatchEvent(new Event("input")); found.none = names();
input.value = "gather"; input.dispatchEvent(new Event("input")); found.gather = names();
input.value = ""; input.dispatchEvent(new Event("input"));
select.value = "dense"; select.dispatchEvent(new Event("change")); found.dense = names();
document.body.replaceChildren(JSON.stringify(found));
}"""


def test_the_table_sorts_searches_and_filters(result: dict[str, Any], tmp_path: Path) -> None:
    text = re.sub(r"<meta http-equiv[^>]*>", "", page(result))  # our clicks are no part of it
    path = tmp_path / "clicked.html"
    path.write_text(text.replace("</body>", f"<script>{CLICKS}</script></body>"))
    document, complaints = rendered(path, 1200)
    assert complaints == []
    found = json.loads("".join(parsed(document).text["body"]))
    sites = result["sites"]
    sizes = {site["name"]: site["bytes_before"] for site in sites}
    assert found["all"] == [site["name"] for site in sites]
    assert [sizes[n] for n in found["largest"]] == sorted(sizes.values(), reverse=True)
    assert [sizes[n] for n in found["smallest"]] == sorted(sizes.values())
    assert found["none"] == []
    wanted = {site["name"] for site in sites if "Gather" in site["uses"]}
    assert set(found["gather"]) == wanted and wanted
    assert set(found["dense"]) == {site["name"] for site in sites if site["method"] == "dense"}


def test_what_was_pruned_has_its_place(tmp_path: Path) -> None:
    from onnxcomp.models.character_kinds import model_path

    done = onnxcomp.optimize(model_path(), tmp_path / "p.onnx", method="dense", prune_ratio=0.2)
    write_page(done.report.to_json(), tmp_path / "r.html")
    document, complaints = rendered(tmp_path / "r.html", 800)
    assert complaints == [] and "Pruned" in " ".join(parsed(document).text["h2"])
    assert "graph and what was pruned" in document
