"""Every reader of untrusted bytes, fuzzed: it ends well or in a DiffRCError, soon, and in the memory of the file and a bound.

`DIFFRC_FUZZ_EXAMPLES=200000 python -m pytest tests/hostile/test_fuzz.py -m slow -k parquet` looks longer at one of them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


def _load(name: str) -> Any:
    """A file beside this one; test folders are no packages."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fuzz = _load("fuzz_targets")
FEW = 30
MANY = int(os.environ.get("DIFFRC_FUZZ_EXAMPLES", "10000"))
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

CHANGES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1 << 20), st.integers(0, 1 << 16)), min_size=1, max_size=6)


def memory_kib(what: str) -> int:
    """VmHWM, the peak, or VmRSS, now."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(what))
    return int(line.split()[1])


def look(name: str, examples: int, folder: Path, **how: Any) -> None:
    """Fuzz a reader; fails with the bytes that it could not bear."""
    target = fuzz.TARGETS[name]
    seeds = target.seeds()
    inputs = st.one_of(
        st.tuples(st.integers(0, len(seeds) - 1), CHANGES),
        st.tuples(st.just(-1), st.binary(max_size=64)),
        *([st.tuples(st.just(-1), st.lists(st.sampled_from(target.words), max_size=30).map(b"".join))] if target.words else []),
    )

    @settings(
        max_examples=examples,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        **how,
    )
    @given(inputs)
    def search(chosen: tuple[int, Any]) -> None:
        which, how_spoiled = chosen
        data = how_spoiled if which < 0 else fuzz.spoil(seeds[which], how_spoiled, target.words)
        began, before = time.process_time(), memory_kib("VmRSS")
        if CLEAR.exists():
            CLEAR.write_text("5")  # the peak begins anew
        fuzz.run(target, data, folder)
        assert time.process_time() - began < fuzz.SECONDS, f"too slow for {len(data)} bytes"
        assert memory_kib("VmHWM") - before < (fuzz.MEMORY_BYTES + 4 * len(data)) >> 10, f"too much memory for {len(data)} bytes"

    search()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a target's own."""
    path = tmp_path / "fuzz"
    path.mkdir()
    return path


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_the_files_that_are_spoiled_are_good_ones(name: str, folder: Path) -> None:
    target = fuzz.TARGETS[name]
    for number, seed in enumerate(target.seeds()):
        if name == "engine card":  # of no engine: read, and told so
            continue
        try:
            assert fuzz.run(target, seed, folder), f"seed {number} is refused"
        finally:
            shutil.rmtree(folder)
            folder.mkdir()


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_reader_ends_well_or_in_a_typed_error(name: str, folder: Path) -> None:
    look(name, FEW, folder, derandomize=True, database=None)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_reader_ends_well_or_in_a_typed_error_ten_thousand_times(name: str, folder: Path) -> None:
    look(name, MANY, folder)


def test_the_script_for_atheris_knows_its_targets_or_says_how_to_install_it() -> None:
    script = Path(__file__).with_name("fuzz_atheris.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert done.returncode == 2
    installed = importlib.util.find_spec("atheris") is not None
    assert ("name one of: tar, " if installed else "pip install atheris") in done.stderr
