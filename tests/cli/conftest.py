"""The command line as a user runs it: a process of its own, in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

Diffrc = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def diffrc(tmp_path: Path) -> Diffrc:
    """diffrc("recipe", "ls", COLUMNS="40") -> the finished process, its output as text. It starts in tmp_path."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM", "LC_ALL")}
        return subprocess.run(
            [sys.executable, "-m", "diffrc_cli", *arguments],
            cwd=tmp_path,
            env={**clean, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            encoding="utf-8",
            timeout=120,
            stdin=subprocess.DEVNULL,
        )

    return run
