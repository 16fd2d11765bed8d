"""diffrc doctor: a line a finding, a remedy under each, and exit code 4 where something keeps diffrc from its work."""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.health import doctor
from engines.health.doctor import Outcome
from engines.health.findings import Finding

Call = Callable[..., Any]  # (code, out, err)
Diffrc = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every probe answers that all is well."""
    monkeypatch.setattr(doctor, "run_probe", lambda name, seconds: Outcome([Finding(name, "ok", "runs")], {name: "1.2"}))


@pytest.mark.usefixtures("healthy")
def test_a_machine_in_order_is_code_0_and_each_finding_a_line(call_in_empty: Call) -> None:
    done = call_in_empty("doctor")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "ok      packages: runs"
    notes = [i for i, line in enumerate(lines) if line.startswith(("note    ", "warning "))]
    assert all(lines[i + 1].startswith("        try: ") for i in notes), "a remedy a finding"
    assert any(line.startswith("versions: python ") for line in lines)
    assert list(Path().iterdir()) == [], "nothing is left behind"


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize("wheels", [["onnxruntime", "onnxruntime-gpu"], []], ids=["both wheels", "neither wheel"])
def test_an_error_is_code_4_with_its_remedy_in_json_too(wheels: list[str], call_in_empty: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "onnxruntime_wheels", lambda: wheels)
    for words in ((), ("--json",)):
        done = call_in_empty("doctor", *words)
        assert done.code == 4
        problem, remedy = done.err.splitlines()
        assert problem.startswith("error: onnxruntime wheels: ")
        assert 'pip install "diffrc[cpu]"' in remedy
    assert json.loads(done.out)["worst"] == "error"


def test_here_every_probe_answers_and_it_takes_less_than_five_seconds_of_two_processors(diffrc: Diffrc) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = diffrc("doctor", "--json")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = json.loads(done.stdout)
    assert done.returncode == (4 if told["worst"] == "error" else 0), done.stderr
    ran = {finding["check"] for finding in told["findings"] if finding["severity"] == "ok"}
    assert {"packages", "torch", "onnxruntime", "onnxruntime wheels", "python", "disk"} <= ran
    assert all(finding["remedy"] for finding in told["findings"] if finding["severity"] != "ok")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 10.0  # of processor time, which two processors do in five: the clock of a busy machine says nothing of ours
