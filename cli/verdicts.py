"""The last lines of a command: what was judged, and what a user must not miss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from onnxcomp.cli.terminal import percent_text

__all__ = [
    "code_remarks",
    "gain_lines",
    "judged_text",
    "remarks_of",
    "speed_lines",
    "warnings_of",
]

# Relative L2 difference of an output from which on a result is hardly of use: -6 dB of noise.
FAR = 0.5

# The difference from which on answers are seen to change (classes, boxes, words: docs/clients.md);
# it is remarked where nobody said what is accepted.
_NOTABLE = 0.1

# The share of detections that are found again below which the same is said.
_FOUND = 0.98

# Classes that change: the share of labels from which on it is said, and the part of those that the
# model itself expects to be wrong. A language model is in doubt about every other token, and near
# ties between tokens fall differently at no loss of perplexity. One label alone may be chance.
_CHANGED, _OF_DOUBT, _LEAST_CHANGED = 0.01, 1 / 8, 2

# The known loss from which on outputs that come out in another size are not taken for near ties.
_TIES = 0.01

# What int8 activations add from which on it is remarked: eight times what they add to one product.
_INT8 = 0.064


# Times as long as the original from which on a result is called slow, by runs as short as those of
# the verification.
_SLOW = 1.25

# The share of a file from which on saving it is worth a loss that nobody has asked for.
_GAIN = 0.05


def gain_lines(report: Mapping[str, Any]) -> Iterable[str]:
    """That a result is hardly smaller than the original, and why most of it stays as it was.

    Args:
        report: JSON of a run.
    """
    before, after = (report[end]["bytes"] for end in ("input", "output"))
    changed = [site for site in report["sites"] if site["method"] != "dense"]
    asked = report["target"] is not None or report["prune"] is not None
    if asked or not changed or after <= (1 - _GAIN) * before:
        return
    reasons: Counter[str] = Counter()
    for site in report["sites"]:
        if site["method"] == "dense":
            reasons[site["reason"]] += site["bytes_before"]
    most = "".join(f" ({reason})" for reason, _ in reasons.most_common(1) if reason)
    saved = max(0.0, 100 * (1 - after / before))
    yield (
        f"note: {saved:.1f} % of the file is saved, as most weights stay as they are{most}: "
        "the original loses nothing"
    )


def speed_lines(report: Mapping[str, Any]) -> Iterable[str]:
    """What makes a result faster that was slower than the original.

    Args:
        report: JSON of a run.
    """
    factor = (report["verify"] or {}).get("slowdown") or 0.0
    if factor > _SLOW and report["config"].get("max_slowdown") is None:
        yield (
            f"warning: it ran {factor:.1f} times as long as the original on these inputs: "
            "--max-slowdown 1 takes int8 or dense weights where codes are slow"
        )


def code_remarks(report: Mapping[str, Any], machine: str | None) -> Iterable[str]:
    """That other codes suit this machine better, said before the verdict.

    Weights that are dense while they run, as those of convolutions, gain nothing from other codes:
    where most are, nothing is said.

    Args:
        report: JSON of a run.
        machine: The class of this machine, a value of the option `target`; None where no kernel is
            fast.
    """
    named = report["config"].get("target", "any") != "any"
    multiplied, folded = (
        sum(site["bytes_before"] for site in report["sites"] if chosen(site))
        for chosen in (_multiplied, lambda site: site["mode"] == "folded")
    )
    if machine in ("avx2", "neon") and not named and multiplied > folded:
        yield f"note: other codes run up to 2.5 times as fast on this processor: --target {machine}"


def _multiplied(site: Mapping[str, Any]) -> bool:
    """Whether a weight has codes of which there are several kinds, and is multiplied by them."""
    bits, params = site["params"].get("bits", 0), site["params"]
    usual = params.get("table", "winding") == "winding" and params.get("state_bits") == 7
    multiplied = bool({"MatMul", "Gemm"} & set(site["uses"])) and site["mode"] != "folded"
    return site["method"] == "hyper" and 2 <= bits <= 4 and usual and multiplied


def judged_text(verify: Mapping[str, Any] | None, *, made_up: bool, evaluated: bool = False) -> str:
    """Whether the loss was judged, and by what it was not.

    Args:
        verify: JSON of the verification; None where it did not run.
        made_up: Whether its inputs were made up.
        evaluated: Whether the user's own measure judged.
    """
    if verify is None:
        return "not verified"
    if not verify["passed"]:
        return "FAILED verification"
    if evaluated or verify.get("tolerance") is not None:
        return "verified"
    return "runs; loss not judged" + (" (inputs made up)" if made_up else "")


def warnings_of(verify: Mapping[str, Any] | None) -> list[str]:
    """What a user must not miss, one line each; the worst comes last."""
    if verify is None:
        return []
    return [*_int8_lines(verify), *_resized_lines(verify), *_far_lines(verify)]


def remarks_of(verify: Mapping[str, Any] | None, *, judged: bool = False) -> list[str]:
    """Losses that nobody judged and that change answers, said before the verdict.

    Args:
        verify: JSON of the verification; None where it did not run.
        judged: Whether the user's own measure judged.
    """
    if verify is None or judged or verify.get("tolerance") is not None:
        return []
    advice = "judge them by --eval, give real inputs by --data, or use more bits"
    detections = verify.get("detections")
    if detections and detections["reference"] and detections["share"] < _FOUND:
        return [f"warning: {detections_text(detections)}: {advice}"]
    changed = "" if detections and detections["reference"] else _changed_classes(verify)
    if changed:
        return [f"warning: {changed}: {advice}"]
    error, differs = _farthest(verify)
    if not _NOTABLE < error <= FAR:
        return []
    return [f"warning: {differs}, and answers may change: {advice}"]


def _changed_classes(verify: Mapping[str, Any]) -> str:
    """A sentence about the output whose classes change most, beyond what its doubt explains."""
    found = []
    for outputs in (verify["outputs"], verify.get("before_decisions", {})):
        for name, metrics in outputs.items():
            count = metrics.get("labels", 0)
            changed = round(count * (1 - metrics.get("label_agreement", 1.0)))
            limit = max(_CHANGED, _OF_DOUBT * metrics.get("label_doubt", 0.0))
            if changed >= _LEAST_CHANGED and changed > limit * count:
                found.append((changed / count, changed, count, name))
    if not found:
        return ""
    _, changed, count, name = max(found)
    return f"{changed} of {count} classes of output {name!r} are others than the original's"


def _int8_lines(verify: Mapping[str, Any]) -> Iterable[str]:
    added = max(_differences(verify.get("int8", {}).get("outputs", {})), default=0.0)
    if added > _INT8:
        yield (
            f"warning: activations rounded to int8 change an output by {100 * added:.1f} %: "
            "--precision exact leaves them as they are"
        )


def _resized_lines(verify: Mapping[str, Any]) -> Iterable[str]:
    """Floats whose size depends on values and is another: nothing says how far they are."""
    if (verify.get("detections") or {}).get("reference"):
        return
    known = [error for error, _, _ in _errors(verify)]
    if max(known, default=1.0) <= _TIES:
        return
    for name, metrics in verify["outputs"].items():
        if count := metrics.get("resized_floats", 0):
            yield (
                f"warning: output {name!r} has another size on {count} of {verify['samples']} "
                f"inputs ({metrics['resized']}), and its loss there is not known: "
                "try the result before you use it"
            )


def _far_lines(verify: Mapping[str, Any]) -> Iterable[str]:
    error, differs = _farthest(verify)
    if error > FAR:
        yield f"warning: {differs}: use more bits, a smaller ratio or --data"


def _farthest(verify: Mapping[str, Any]) -> tuple[float, str]:
    """The largest error, of an output or a slice, and a sentence about it."""
    error, name, where = max(_errors(verify), default=(0.0, "", ""))
    part = f" ({where})" if where else ""
    return error, f"output {name!r}{part} differs by {100 * error:.0f} % from the original's"


def _errors(verify: Mapping[str, Any]) -> list[tuple[float, str, str]]:
    """Error, name and slice of all floats that were compared, those before decisions included."""
    return [*_worst(verify["outputs"]), *_worst(verify.get("before_decisions", {}))]


def _worst(outputs: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[float, str, str]]:
    """Error, name and slice of each output of floats."""
    for name, metrics in outputs.items():
        if metrics.get("agreement") is not None or metrics.get("resized"):
            continue
        error, worst = metrics["rel_l2"], metrics.get("worst_slice")
        if error is None:
            continue
        if worst is not None and worst["rel_l2"] > max(error, _NOTABLE):
            yield worst["rel_l2"], name, slice_text(worst)
        else:
            yield error, name, ""


def _differences(outputs: Mapping[str, Mapping[str, Any]]) -> list[float]:
    return [
        metrics["rel_l2"]
        for metrics in outputs.values()
        if metrics["rel_l2"] is not None and metrics.get("agreement") is None
    ]


def slice_text(worst: Mapping[str, Any] | None) -> str:
    """A slice in words: ``axis 1: 4-83``."""
    if worst is None:
        return "-"
    first, last, count = worst["indices"][0], worst["indices"][-1], len(worst["indices"])
    axis = f"axis {worst['axis']}: "
    if count == 1:
        return f"{axis}{first}"
    dense = count == last - first + 1
    return f"{axis}{first}-{last}" if dense else f"{axis}{count} of {first}-{last}"


def detections_text(found: Mapping[str, Any] | None) -> str:
    """How many detections are found again; empty where the model is no detector."""
    if found is None or not found["reference"]:
        return ""
    again = f"{found['found']} of {found['reference']} detections found again"
    added = f", {found['added']} others" if found["added"] else ""
    return f"{again} ({percent_text(found['share'])} at IoU {found['iou']:g}){added}"
