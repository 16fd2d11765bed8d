"""What runs on this machine and why the rest does not: probes in processes of their own, and what files and the system tell."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import engines
from engines import store
from engines.backends.runtimes import onnxruntime_wheels
from engines.errors import DiffRCError, StorageError
from engines.health import status
from engines.health.findings import Finding, Severity, from_json, worst
from engines.health.probes import PROBES, has_gpu

PROBE_SECONDS = 20.0  # a library that is not ready by then hangs
MOST_ROUNDS, COMPUTES_SHARE = 4, 0.005  # see `_wait_for`
NEEDED = ("packages", "torch", "onnxruntime")  # probes without which the three commands do not work
OLDEST_PYTHON = (3, 11)
GIB = 2**30
LITTLE_DISK, NO_DISK = 2 * GIB, 64 * 2**20  # bytes: a small run with its checkpoints; one checkpoint of a tiny network
LITTLE_SHM, LITTLE_TEMP, LITTLE_MEMORY = 64 * 2**20 + 1, 256 * 2**20, 1 * GIB  # the first is what Docker gives unless it is asked
SLOW_COMMIT_SECONDS = 0.05  # of a small file: network disks; an image is a file
FREE = "free some space"
PROBE = "from engines.health.probes import main; main()"
VERSIONED = (*("diffrc", "torch", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt"), "pillow", "scikit-learn")


class KnownBad(NamedTuple):
    """Versions of a package that are known to be trouble; wrong numbers of an engine are not here: its gate meets them."""

    package: str
    first: str  # the first bad version; "" = from the beginning
    good: str  # the first good one again; "" = none is known
    severity: Severity
    why: str
    remedy: str


KNOWN_BAD = (
    KnownBad(
        "filelock", "", "3.20.1", "warning", "a lock file can be made to empty another file (CVE-2025-68146)", "pip install -U filelock"
    ),
    KnownBad(
        "openvino",
        "2026.4",
        "",
        "note",
        "compiling a network exported at opset 21 or later ends the process",
        "leave export.opset at 20, its default: diffrc refuses what would crash",
    ),
)


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found, in the order of the checks; versions by name, "" for what is not installed."""

    findings: tuple[Finding, ...]
    versions: Mapping[str, str]
    seconds: float

    @property
    def worst(self) -> Severity:
        """The gravest severity."""
        return worst(list(self.findings))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = [finding._asdict() for finding in self.findings]
        return {"worst": self.worst, "seconds": round(self.seconds, 2), "versions": dict(self.versions), "findings": found}


def diagnose(root: Path = store.DEFAULT_ROOT, seconds: float = PROBE_SECONDS) -> Diagnosis:
    """Look at this machine, and at the runs in a folder. What is written is one file for a moment, to see whether it can be.

    Args:
        root: the folder of runs, which need not exist.
        seconds: that a probe may take.
    """
    began = time.perf_counter()
    with ThreadPoolExecutor(len(PROBES), "probe") as pool:
        probes = {name: pool.submit(run_probe, name, seconds) for name in PROBES}
        here = [*check_python(), *check_wheels(onnxruntime_wheels()), *check_packages(), *check_disk(root), *check_writing(root)]
        here += [*check_memory(), *check_threads(), *check_runs(root)]
        found = {name: future.result() for name, future in probes.items()}
    versions = {"python": platform.python_version(), "system": platform.platform()} | _installed(VERSIONED)
    for probed in found.values():
        versions |= probed.versions
    tried = [finding for probed in found.values() for finding in probed.findings]
    build = check_torch_build(versions.get("CUDA of torch", ""), has_gpu())
    return Diagnosis((*tried, *build, *here), versions, time.perf_counter() - began)


# -------------------------------------------------------------------------------------------------------------- probes


class Outcome(NamedTuple):
    """What a probe's process told."""

    findings: list[Finding]
    versions: dict[str, str]


def run_probe(name: str, seconds: float = PROBE_SECONDS, code: str = PROBE) -> Outcome:
    """Run a probe in a process of its own; one that crashes, hangs or says nothing is a finding too.

    Args:
        code: that the process runs, with the probe's name as its argument.
    """
    grave: Severity = "error" if name in NEEDED else "warning"
    house = str(Path(engines.__file__).parent.parent)
    paths = os.pathsep.join(filter(None, (house, os.environ.get("PYTHONPATH", ""))))
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code, name],  # -P: a file torch.py in this folder is not torch
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = _wait_for(process, seconds)
    except subprocess.TimeoutExpired:
        remedy = f"try it alone: {Path(sys.executable).name} -X faulthandler -c 'import {_module(name)}'; a reboot frees a GPU that hangs"
        return Outcome([Finding(name, grave, f"hangs: no answer within {seconds:g} seconds", remedy)], {})
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    try:
        told = json.loads(out.decode(errors="replace").strip().splitlines()[-1])
        findings = [from_json(value) for value in told["findings"]]
        return Outcome(findings, {str(key): str(value) for key, value in told["versions"].items()})
    except (ValueError, IndexError, KeyError, TypeError, AttributeError):
        lines = [line.strip() for line in err.decode(errors="replace").splitlines() if line.strip()]
        last = f": {lines[-1][:200]}" if lines else ""
        alone = f"{Path(sys.executable).name} -X faulthandler -c 'import {_module(name)}'"
        remedy = f"pip install --force-reinstall {_module(name)}; {alone} shows where"
        return Outcome([Finding(name, grave, f"{_ending(process.returncode)}{last}", remedy)], {})


def _wait_for(process: subprocess.Popen[bytes], seconds: float) -> tuple[bytes, bytes]:
    """What a process wrote. It has so many seconds, and again as many while it still computes: on a busy machine it is slow, no more.

    Raises subprocess.TimeoutExpired, at the latest after MOST_ROUNDS times the seconds.
    """
    used = 0.0
    for _ in range(MOST_ROUNDS - 1):
        try:
            return process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            now = _processor_seconds(process.pid)
            if now - used < COMPUTES_SHARE * seconds:
                raise
            used = now
    return process.communicate(timeout=seconds)


def _processor_seconds(pid: int) -> float:
    """That a process has computed so far; 0 where the system does not tell."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if len(fields) > 12 else 0.0


def _ending(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"crashes the process ({signal.Signals(-code).name})"
    return f"ends its process with code {code} and no word"


def _module(name: str) -> str:
    return {"packages": "numpy", "driver": "torch"}.get(name, name)


# ------------------------------------------------------------------------------------------------------------ packages


def check_python() -> list[Finding]:
    """The interpreter."""
    told = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return [Finding("python", "error", f"{told}; {oldest} or newer is needed", f"make an environment of Python {oldest}")]
    return [Finding("python", "ok", told)]


def check_wheels(wheels: Sequence[str]) -> list[Finding]:
    """Exactly one wheel of ONNX Runtime: none exports nothing, two hide each other."""
    if len(wheels) > 1:
        remedy = f'pip uninstall {" ".join(wheels)}, then pip install "diffrc[cpu]", or "diffrc[gpu]" on a CUDA machine'
        told = f"{' and '.join(wheels)} are installed side by side: they are one module, and hide each other"
        return [Finding("onnxruntime wheels", "error", told, remedy)]
    if not wheels:
        remedy = 'pip install "diffrc[cpu]", or "diffrc[gpu]" on a CUDA machine'
        return [Finding("onnxruntime wheels", "error", "none is installed: export and synth cannot run", remedy)]
    return [Finding("onnxruntime wheels", "ok", f"{wheels[0]} {metadata.version(wheels[0])} alone")]


def check_packages() -> list[Finding]:
    """Versions older than DiffRC asks for, and those that are known to be trouble."""
    found = []
    for package, least, extra in _requirements():
        here = _installed([package])[package]
        if here and _numbers(here) < _numbers(least):
            grave: Severity = "warning" if extra else "error"
            found.append(Finding("versions", grave, f"{package} {here} is older than {least}", f'pip install "{package}>={least}"'))
    for bad in KNOWN_BAD:
        here = _installed([bad.package])[bad.package]
        if here and _numbers(bad.first) <= _numbers(here) and not (bad.good and _numbers(here) >= _numbers(bad.good)):
            found.append(Finding("versions", bad.severity, f"{bad.package} {here}: {bad.why}", bad.remedy))
    return found or [Finding("versions", "ok", "none is too old, none is known to be trouble")]


def check_torch_build(cuda: str, gpu_here: bool) -> list[Finding]:
    """A CPU build of torch on a machine with a GPU. `cuda`: that torch was built for, "none", or "" where it is not known."""
    if gpu_here and cuda == "none":
        remedy = 'install a CUDA build of torch, as "Get started" of pytorch.org says for this system'
        return [Finding("torch", "warning", "is a build for CPUs alone, and there is an NVIDIA GPU here", remedy)]
    return []


def _requirements() -> list[tuple[str, str, bool]]:
    """(package, least version, whether an extra asks for it) of DiffRC's own metadata; [] where it is not installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        parsed = [(re.match(r"([A-Za-z0-9._-]+)>=([0-9.]+)", line), "extra ==" in line) for line in metadata.requires("diffrc") or ()]
        return [(match[1], match[2], extra) for match, extra in parsed if match]
    return []


def _installed(packages: Sequence[str]) -> dict[str, str]:
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = ""
    return versions


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13): whole numbers up to the first thing that is none, without zeros at the end."""
    numbers = [int(part) for part in re.findall(r"\d+", re.split(r"[^0-9.]", version)[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


# ------------------------------------------------------------------------------------------------------------- machine


def check_disk(root: Path) -> list[Finding]:
    """Space for runs, shared memory for processes that train together, the temporary folder."""
    found = [
        _space("disk", store.free_bytes(root), f"free for {root}", LITTLE_DISK, NO_DISK, "free some space, or --run DIR on another disk")
    ]
    shared = Path("/dev/shm")
    if shared.is_dir():
        remedy = "docker run --shm-size=1g, or mount a larger one; one process needs none"
        found.append(_space("shared memory", store.free_bytes(shared), f"free in {shared}", LITTLE_SHM, 0, remedy))
    temporary = Path(tempfile.gettempdir())
    if not os.access(temporary, os.W_OK):
        found.append(Finding("temporary folder", "error", f"{temporary} cannot be written", "TMPDIR=DIR names another one"))
    else:
        told = f"free in {temporary}"
        found.append(
            _space("temporary folder", store.free_bytes(temporary), told, LITTLE_TEMP, 0, "free some space, or TMPDIR=DIR names another")
        )
    return found


def _space(check: str, free: int, what: str, little: int, none: int, remedy: str) -> Finding:
    told = f"{free / GIB:,.1f} GiB {what}" if free >= GIB else f"{free / 2**20:,.0f} MiB {what}"
    grave: Severity = "error" if free < none else "warning" if free < little else "ok"
    return Finding(check, grave, told, "" if grave == "ok" else remedy)


def check_writing(root: Path) -> list[Finding]:
    """Whether a file can be committed where runs lie, or will lie; how long it takes."""
    place = next(path for path in (root.absolute(), *root.absolute().parents) if path.is_dir())
    file = place / f".diffrc-doctor-{os.getpid()}"
    began = time.perf_counter()
    try:
        store.write_bytes(file, b"x" * 4096)
    except StorageError as error:
        return [
            Finding("writing", "error", error.problem.replace(str(file), f"into {place}"), "--run DIR names a folder that can be written")
        ]
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    seconds = time.perf_counter() - began
    told = f"{root} {'can be written' if place == root.absolute() else 'can be made'}; a file takes {1000 * seconds:.0f} ms"
    if seconds > SLOW_COMMIT_SECONDS:
        return [Finding("writing", "note", told, "a local disk is faster: each image is a file, flushed to the disk; --run DIR names one")]
    return [Finding("writing", "ok", told)]


def check_memory() -> list[Finding]:
    """Memory that is left: the system's, or less where this process is held to less."""
    text = _text("/proc/meminfo")
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    if not match:
        return []
    free = int(match[1]) * 1024
    limit, used = (_text(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        free = min(free, int(limit) - int(used))
    return [_space("memory", max(0, free), "free", LITTLE_MEMORY, 0, "end other programs, or --set source.batch_size=N with a smaller N")]


def check_threads() -> list[Finding]:
    """Processors that this process may use, by the system, by a container's quota, and by OMP_NUM_THREADS."""
    there = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    told = f"{usable} of {there} processors may be used"
    quota, _, period = _text("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit() and int(quota) / int(period) < usable - 0.5:
        share = int(quota) / int(period)
        remedy = f"OMP_NUM_THREADS={max(1, round(share))}, so that threads do not wait for each other"
        return [Finding("threads", "warning", f"{told}, and a quota gives the time of {share:g}", remedy)]
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked and not asked.isdigit():
        return [Finding("threads", "warning", f"OMP_NUM_THREADS is {asked[:20]!r}, no number", "unset OMP_NUM_THREADS")]
    if asked and int(asked) > usable:
        return [Finding("threads", "warning", f"{told}, and OMP_NUM_THREADS is {asked}", "unset OMP_NUM_THREADS")]
    if asked and int(asked) < usable:
        return [Finding("threads", "note", f"{told}; OMP_NUM_THREADS={asked} holds training to fewer", "unset OMP_NUM_THREADS to use all")]
    return [Finding("threads", "ok", told)]


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


# ---------------------------------------------------------------------------------------------------------------- runs


def check_runs(root: Path) -> list[Finding]:
    """The latest run: whether it is there, whether its engines may be loaded, who is at work in it."""
    if not (root / "latest.json").exists():
        return [Finding("runs", "ok", f"none in {root} yet")]
    try:
        run = store.open_run(None, root=root)
        found = status.look(run.path)
    except DiffRCError as error:
        return [Finding("runs", "warning", error.problem, error.remedy)]
    again = f"diffrc export --run {run.path}"
    findings = [
        Finding("runs", "warning", f"{run.path}: the engine {entry.name} is stale: {entry.reason}", again)
        for entry in found.engines
        if not entry.fits
    ]
    findings += [
        Finding(
            "runs", "note", f"{run.path / lock.folder} is in use by {lock.told}", "wait until it ends; diffrc status shows how far it is"
        )
        for lock in found.locks
    ]
    return findings or [Finding("runs", "ok", f"{run.path}: next {found.next_command or 'nothing'}")]
