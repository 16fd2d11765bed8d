"""A library that hangs or crashes is a finding; versions, disk, memory, threads and runs are judged on both sides of each threshold."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engines import store
from engines.errors import StorageError
from engines.health import doctor
from engines.health.doctor import Outcome, run_probe
from engines.health.findings import Finding, Severity

CRASH = "import os, sys; print('on my way', file=sys.stderr); sys.stderr.flush(); os.kill(os.getpid(), 11)"
TALK = (
    "import os; os.write(1, b'Welcome!\\n'); from engines.health import probes as p; p.PROBES = {'x': lambda found: print('hi')}; p.main()"
)


def only(findings: list[Finding]) -> tuple[str, Severity]:
    """The check and severity of one finding."""
    [found] = findings
    assert (found.remedy == "") == (found.severity == "ok")
    return found.check, found.severity


# ---------------------------------------------------------------------------------------------------------------- probes


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (CRASH, "crashes the process (SIGSEGV): on my way"),
        ("raise SystemExit(3)", "ends its process with code 3 and no word"),
        ("print('no JSON')", "ends its process with code 0 and no word"),
        ("print('{}')", "ends its process with code 0 and no word"),
        ("import no_such_module", "code 1 and no word: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
    ids=["crash", "exit", "no JSON", "other JSON", "exception"],
)
def test_a_probe_that_ends_without_an_answer_is_a_finding(code: str, says: str) -> None:
    [found] = run_probe("torch", 60, code).findings
    assert (found.check, found.severity) == ("torch", "error")
    assert says in found.text
    assert "import torch" in found.remedy
    assert run_probe("openvino", 60, code).findings[0].severity == "warning", "it is not needed"


@pytest.mark.parametrize("code", ["import time; time.sleep(600)", "while True: pass"], ids=["waits", "computes"])
def test_a_probe_that_hangs_is_ended_and_is_a_finding(code: str) -> None:
    [found] = run_probe("onnxruntime", 0.3, code).findings
    assert (found.check, found.severity, found.text) == ("onnxruntime", "error", "hangs: no answer within 0.3 seconds")


def test_a_process_that_computes_gets_more_time_and_one_that_waits_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy:
        pid = 0
        rounds = 0

        def communicate(self, timeout: float) -> tuple[bytes, bytes]:
            self.rounds += 1
            if self.rounds < 3:
                raise doctor.subprocess.TimeoutExpired("probe", timeout)
            return b"done", b""

    used = iter((0.5, 1.0, 1.5))
    monkeypatch.setattr(doctor, "_processor_seconds", lambda pid: next(used))
    assert doctor._wait_for(Busy(), 20.0) == (b"done", b"")  # type: ignore[arg-type]
    monkeypatch.setattr(doctor, "_processor_seconds", lambda pid: 0.0)
    with pytest.raises(doctor.subprocess.TimeoutExpired):
        doctor._wait_for(Busy(), 20.0)  # type: ignore[arg-type]


def test_what_a_library_prints_does_not_reach_the_answer() -> None:
    outcome = run_probe("x", 60, TALK)
    assert outcome == Outcome([], {})


def test_a_file_named_like_a_library_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('a trap')")
    monkeypatch.chdir(tmp_path)
    code = "import importlib.util as u, json; print(json.dumps({'findings': [], 'versions': {'torch': u.find_spec('torch').origin}}))"
    assert "site-packages" in run_probe("torch", 60, code).versions["torch"]


# -------------------------------------------------------------------------------------------------------------- packages


@pytest.mark.parametrize(
    ("wheels", "severity", "says"),
    [
        (["onnxruntime", "onnxruntime-gpu"], "error", "onnxruntime and onnxruntime-gpu are installed side by side"),
        ([], "error", "none is installed"),
        (["onnxruntime"], "ok", "alone"),
    ],
    ids=["both", "neither", "one"],
)
def test_of_the_wheels_of_onnx_runtime_exactly_one_is_right(
    wheels: list[str], severity: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "1.32.0")
    [found] = doctor.check_wheels(wheels)
    assert (found.severity, says in found.text) == (severity, True)
    if severity == "error":
        assert 'pip install "diffrc[cpu]"' in found.remedy


@pytest.mark.parametrize(
    ("versions", "severity", "says"),
    [
        ({}, "ok", ""),
        ({"filelock": "3.20.0"}, "warning", "CVE-2025-68146"),
        ({"filelock": "3.20.1"}, "ok", ""),
        ({"openvino": "2026.3.9"}, "ok", ""),
        ({"openvino": "2026.4.1-22982"}, "note", "opset 21"),
        ({"torch": "2.5.1+cpu"}, "error", "torch 2.5.1+cpu is older than 2.6"),
        ({"torch": "2.6.0"}, "ok", ""),
        ({"openvino": "2024.6"}, "warning", "older than 2025.0"),
    ],
    ids=str,
)
def test_versions_are_compared_by_number(versions: dict[str, str], severity: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda names: {name: versions.get(name, "") for name in names})
    monkeypatch.setattr(doctor, "_requirements", lambda: [("torch", "2.6", False), ("openvino", "2025.0", True)])
    found = doctor.check_packages()
    assert [(one.severity, says in one.text) for one in found] == [(severity, True)]


def test_requirements_are_those_of_diffrcs_own_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.6", 'onnxruntime>=1.21; extra == "cpu"', 'diffrc[cpu]; extra == "demo"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    assert doctor._requirements() == [("torch", "2.6", False), ("onnxruntime", "1.21", True)]


def test_a_cpu_build_of_torch_beside_a_gpu_is_a_warning() -> None:
    assert only(doctor.check_torch_build("none", True)) == ("torch", "warning")
    assert doctor.check_torch_build("none", False) == doctor.check_torch_build("12.8", True) == doctor.check_torch_build("", True) == []


# --------------------------------------------------------------------------------------------------------------- machine


@pytest.mark.parametrize(("free", "severity"), [(10 * 2**30, "ok"), (2**30, "warning"), (2**20, "error")], ids=["much", "little", "none"])
def test_disk_space_is_judged_by_what_a_run_takes(free: int, severity: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(store, "free_bytes", lambda folder: free if folder == tmp_path else 10 * 2**30)
    found = doctor.check_disk(tmp_path)
    assert only(found[:1]) == ("disk", severity)
    assert all(one.severity == "ok" for one in found[1:])
    monkeypatch.setattr(store, "free_bytes", lambda folder: 64 * 2**20)
    assert {(one.check, one.severity) for one in doctor.check_disk(tmp_path)} >= {("disk", "warning"), ("temporary folder", "warning")}


def test_writing_is_tried_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for root in (tmp_path, tmp_path / "runs" / "of" / "mine"):
        assert doctor.check_writing(root)[0].severity in ("ok", "note")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(doctor, "SLOW_COMMIT_SECONDS", -1.0)
    assert only(doctor.check_writing(tmp_path)) == ("writing", "note")

    def refuses(path: Path, data: bytes) -> None:
        raise StorageError(f"cannot write {path}: {os.strerror(errno.EROFS)}", "")

    monkeypatch.setattr(store, "write_bytes", refuses)
    [found] = doctor.check_writing(tmp_path)
    assert (found.severity, found.text) == ("error", f"cannot write into {tmp_path}: Read-only file system")


Files = dict[str, str]
QUOTA, MEMORY, LIMIT, USED = (f"/sys/fs/cgroup/{name}" for name in ("cpu.max", "meminfo", "memory.max", "memory.current"))


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Callable[[Files], None]:
    def given(files: Files) -> None:
        monkeypatch.setattr(doctor, "_text", lambda path: files.get(path, ""))

    return given


def test_memory_is_the_systems_or_what_a_container_leaves(system: Callable[[Files], None]) -> None:
    info = {"/proc/meminfo": "MemTotal: 99999999 kB\nMemAvailable:    8388608 kB\n"}
    system(info)
    assert only(doctor.check_memory()) == ("memory", "ok")
    system(info | {LIMIT: f"{2**30}\n", USED: f"{2**29}\n"})
    [found] = doctor.check_memory()
    assert (found.severity, found.text) == ("warning", "512 MiB free")
    system(info | {LIMIT: "max\n", USED: "1\n"})
    assert only(doctor.check_memory()) == ("memory", "ok")
    system({})
    assert doctor.check_memory() == []


@pytest.mark.parametrize(
    ("omp", "quota", "severity", "says"),
    [
        ("", "max 100000", "ok", "8 of 8"),
        ("", "200000 100000", "warning", "a quota gives the time of 2"),
        ("", "800000 100000", "ok", "8 of 8"),
        ("4", "", "note", "holds training to fewer"),
        ("9", "", "warning", "OMP_NUM_THREADS is 9"),
        ("many", "", "warning", "no number"),
        ("8", "", "ok", "8 of 8"),
    ],
)
def test_threads_that_are_more_than_processors_are_a_warning(
    omp: str, quota: str, severity: str, says: str, system: Callable[[Files], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    system({QUOTA: quota})
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    [found] = doctor.check_threads()
    assert (found.severity, says in found.text) == (severity, True)


# ------------------------------------------------------------------------------------------------------------------ runs


def test_the_latest_run_is_looked_at(tmp_path: Path, made_copy: Path) -> None:
    assert only(doctor.check_runs(tmp_path / "nowhere")) == ("runs", "ok")
    assert only(doctor.check_runs(made_copy.parent)) == ("runs", "ok")
    with store.locked(made_copy):
        [found] = doctor.check_runs(made_copy.parent)
        assert (found.severity, f"process {os.getpid()}" in found.text) == ("note", True)
    store.write_json(made_copy.parent / "latest.json", {"run": "gone"})
    [found] = doctor.check_runs(made_copy.parent)
    assert (found.severity, "gone is not a run folder" in found.text) == ("warning", True)


def test_a_diagnosis_holds_every_probe_and_every_check_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "run_probe", lambda name, seconds: Outcome([Finding(name, "note", "text", "try")], {f"of {name}": "1"}))
    monkeypatch.setattr(doctor, "check_wheels", lambda wheels: [Finding("onnxruntime wheels", "error", "text", "try")])
    found = doctor.diagnose(tmp_path)
    checks = [finding.check for finding in found.findings]
    assert checks[:6] == ["packages", "torch", "onnxruntime", "openvino", "tensorrt", "driver"]
    assert checks[6:8] == ["python", "onnxruntime wheels"]
    assert {"disk", "writing", "threads", "runs"} <= set(checks)
    assert (found.worst, found.versions["of torch"]) == ("error", "1")
    assert found.to_json()["findings"][0] == {"check": "packages", "severity": "note", "text": "text", "remedy": "try"}
