"""How much memory a process may still take, by all that limits it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from onnxcomp.errors import UsageError
from onnxcomp.runtime.memory import available_memory

GB = 1 << 30


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": f"MemAvailable: {8 * GB // 1024} kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def unified(
    folder: str, limit: str, taken: int, cached: int = 0, high: str = "max"
) -> dict[str, str]:
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.high": f"{high}\n",
        f"{folder}/memory.current": f"{taken}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {cached}\n",
    }


GROUPS = "sys/fs/cgroup"
CASES = {
    "no groups": ({}, 8 * GB),
    "no limit": (
        {"proc/self/cgroup": "0::/a\n", **unified(f"{GROUPS}/a", "max", GB)}, 8 * GB,
    ),
    "cached files can go": (
        {"proc/self/cgroup": "0::/a\n", **unified(f"{GROUPS}/a", str(3 * GB), 2 * GB, GB)}, 2 * GB,
    ),
    "the soft limit": (
        {"proc/self/cgroup": "0::/a\n", **unified(f"{GROUPS}/a", "max", GB, high=str(4 * GB))},
        3 * GB,
    ),
    "the group around it": (
        {
            "proc/self/cgroup": "0::/a/b\n", **unified(f"{GROUPS}/a", str(2 * GB), GB // 2),
            **unified(f"{GROUPS}/a/b", str(5 * GB), GB // 2),
        },
        3 * GB // 2,
    ),
    "a container": (
        {"proc/self/cgroup": "0::/host/path\n", **unified(GROUPS, str(GB), GB // 4)}, 3 * GB // 4,
    ),
    "more is taken than allowed": (
        {"proc/self/cgroup": "0::/\n", **unified(GROUPS, str(GB), 2 * GB)}, 0,
    ),
    "the first version": (
        {
            "proc/self/cgroup": "3:cpu:/x\n2:memory:/a\n",
            f"{GROUPS}/memory/a/memory.limit_in_bytes": str(2 * GB),
            f"{GROUPS}/memory/a/memory.usage_in_bytes": str(GB),
            f"{GROUPS}/memory/a/memory.stat": f"total_inactive_file {GB // 2}\n",
        },
        3 * GB // 2,
    ),
    "the first version without a limit": (
        {
            "proc/self/cgroup": "2:memory:/\n",
            f"{GROUPS}/memory/memory.limit_in_bytes": "9223372036854771712",
            f"{GROUPS}/memory/memory.usage_in_bytes": str(GB),
        },
        8 * GB,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_least_of_all_limits_counts(
    case: tuple[dict[str, str], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONNXCOMP_MEMORY", raising=False)
    files, wanted = case
    assert available_memory(system(tmp_path, files)) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"), [("2GB", 2 * 10**9), ("1.5 mb", 1_500_000), ("700", 700), ("64k", 64_000)]
)
def test_a_limit_can_be_given(
    text: str, wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXCOMP_MEMORY", text)
    assert available_memory(system(tmp_path, {})) == wanted


@pytest.mark.parametrize("text", ["much", "-1", "1.2.3", "2 TBB", "GB"])
def test_a_limit_must_be_a_size(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXCOMP_MEMORY", text)
    with pytest.raises(UsageError, match="ONNXCOMP_MEMORY"):
        available_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="address spaces are limited on Linux alone")
def test_what_is_left_of_the_address_space_counts() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))\n"
        "from onnxcomp.runtime.memory import available_memory\n"
        "print(available_memory())"
    )
    words = [sys.executable, "-c", code]
    run = subprocess.run(words, capture_output=True, text=True, check=True)
    assert 0 < int(run.stdout) < 1 << 31
