"""The last step of a run that keeps the logits of some positions only.

Everything before it sees the logits of all positions: calibration and the gates learn most from
them. The model is then written once more with `keep_last_logits`, and must give what it gave.
"""

from __future__ import annotations

import functools
from pathlib import Path

from onnxcomp.errors import VerifyError
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import Saved, load, save
from onnxcomp.passes.lowering.last_logits import keep_last_logits, logits_of
from onnxcomp.passes.verification.numerics import fidelity_tolerance, metrics

__all__ = ["with_last_logits"]

# Terms of the sums that the two forms take, at most: the width of a decoder.
_WIDTH = 1 << 16


def with_last_logits(saved: Saved, settings: Settings, *, verify: bool) -> Saved:
    """Write a model again so that it returns the logits of its last positions.

    Args:
        saved: The model.
        settings: Say how many positions, and where tensors go.
        verify: Whether both are run, and compared.

    Raises:
        VerifyError: The two differ by more than rounding.
    """
    count = settings.logits_to_keep
    if count is None:
        return saved
    model = load(saved.files[0])
    name = logits_of(model).name
    keep_last_logits(model, count)
    folder = saved.files[0].parent / "last_logits"
    folder.mkdir()
    made = save(model, folder / saved.files[0].name, external_data=settings.external_data)
    if verify:
        _compare(saved.files[0], made.files[0], str(name), count)
    return made


def _compare(whole: Path, last: Path, name: str, count: int) -> None:
    """Run both on the same input."""
    from onnxcomp.runtime.evaluate import run_session
    from onnxcomp.runtime.inputs import synthesize_inputs
    from onnxcomp.runtime.session import open_session

    session = open_session(whole)
    (feed,) = synthesize_inputs(whole, trial=functools.partial(run_session, session))
    wanted = run_session(session, feed)[name][:, -count:]
    found = run_session(open_session(last), feed)[name]
    difference = metrics(wanted, found, name)
    if difference.problem or difference.rel_l2 > fidelity_tolerance(1, _WIDTH):
        raise VerifyError(
            f"the logits of the last {count} positions differ from those of all by "
            f"{difference.problem or format(difference.rel_l2, '.3g')}",
            hint="optimize without --logits-to-keep, and report this model",
        )
