"""The torch side says what is missing where torch is not installed."""

import subprocess
import sys
import textwrap


def test_export_without_torch_is_one_clear_error() -> None:
    program = """
        import sys
        sys.modules["torch"] = None
        import onnxcomp.models
        from onnxcomp.errors import RuntimeMissingError
        from onnxcomp.models import export
        try:
            export(object(), (), "m.onnx")
        except RuntimeMissingError as error:
            print(error.hint)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "pip install 'onnxcomp[torch]'"
