"""Commands in this process: quick, and with their exit code. `diffrc` of the folder above starts a process of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from diffrc_cli.app import main
from engines import store


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Outcome]


@pytest.fixture
def call_in_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """call_in_empty("recipe", "ls") -> exit code, stdout, stderr, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert isinstance(end.value.code, int)
        return Outcome(end.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def call(exported_run: Path, tmp_path: Path, call_in_empty: Call) -> Call:
    """call("synth", "--fill") -> exit code, stdout, stderr, in a folder whose latest run is trained and exported to ONNX Runtime."""
    shutil.copytree(exported_run, tmp_path / "runs" / "digits-lt")
    store.write_json(tmp_path / "runs" / "latest.json", {"run": "digits-lt"})
    return call_in_empty
