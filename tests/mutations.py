"""`python tests/mutations.py`: takes each flush, rename, lock and check of the store away, one at a time, and runs the tests that guard it.

In a copy of the tree; prints a row of docs/promises.md for each, and ends with 1 where a store that was spoiled passes its tests.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
STORE = "engines/store.py"


class Mutation(NamedTuple):
    """What is taken away: `old` stands once in engines/store.py after `after`."""

    what: str
    after: str
    old: str
    new: str
    tests: tuple[str, ...]


POWER = "tests/faults/test_power_cut.py::test_what_a_command_has_written_when_it_ends_outlasts_a_power_cut"
NAMES = "tests/test_store.py::test_the_name_of_a_checkpoint_and_that_of_a_new_file_of_lines_reach_the_disk"
ORDER = "tests/test_store.py::test_bytes_reach_the_disk_before_they_get_their_name_and_the_name_before_the_call_ends"
MUTATIONS = (
    Mutation(
        "a file is not flushed before it gets its name",
        "def _commit",
        "                os.fsync(file.fileno())\n",
        "",
        (ORDER, f"{POWER}[train]"),
    ),
    Mutation("its folder is not flushed after", "def _commit", "        _fsync_folder(path.parent)\n", "", (ORDER, f"{POWER}[train]")),
    Mutation(
        "a file is written in its place, without a rename",
        "def _commit",
        'temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"',
        "temporary = path\n    path.unlink(missing_ok=True)",
        ("tests/test_store.py::test_a_crash_before_the_rename_leaves_the_old_bytes",),
    ),
    Mutation("a new line is not flushed", "def append_json_lines", "            os.fsync(file.fileno())\n", "", (f"{POWER}[train]",)),
    Mutation(
        "the folder of a first line is not flushed",
        "def append_json_lines",
        "        if new:\n            _fsync_folder(path.parent)\n",
        "",
        (NAMES,),
    ),
    Mutation(
        "the name of a new folder is not flushed",
        "def _make_folder",
        "        _fsync_folder(path.parent)\n",
        "        pass\n",
        (f"{POWER}[train]", f"{POWER}[synth]"),
    ),
    Mutation(
        "a torn last line stays",
        "def append_json_lines",
        'if file.read(1) != b"\\n":',
        "if False:",
        ("tests/test_store.py::test_a_torn_last_line_is_left_out_and_dropped_by_the_next",),
    ),
    Mutation(
        "a folder in the making is not flushed",
        "def building",
        "                os.sync()\n",
        "",
        ("tests/test_store.py::test_a_folder_in_the_making_is_flushed_before_it_gets_its_name", f"{POWER}[data export]"),
    ),
    Mutation(
        "a folder is made in its place, without a rename",
        "class Building",
        "        self.path = path\n",
        '        self.path = path.parent.parent / path.parent.name[1:].removesuffix(".partial")\n',
        ("tests/test_store.py::test_a_folder_whose_making_fails_leaves_what_was_there",),
    ),
    Mutation(
        "a checkpoint's folder is not flushed after its rename",
        "def save_checkpoint",
        "        _fsync_folder(folder)\n",
        "",
        (NAMES,),
    ),
    Mutation(
        "a checkpoint is written in its place, without a rename",
        "def save_checkpoint",
        '    building = folder / f"step-{checkpoint.step:09d}.tmp"\n',
        "    building = final\n",
        ("tests/test_store.py::test_a_kill_at_any_write_of_a_checkpoint_leaves_the_one_before_or_the_new_one",),
    ),
    Mutation(
        "a checkpoint is not compared with its manifest",
        "def load_checkpoint",
        'if any(hashlib.sha256(data[name]).hexdigest() != entry["sha256"] for name, entry in manifest.items()):',
        "if False:",
        ("tests/test_store.py::test_a_checkpoint_damaged_in_any_file_gives_way_to_the_one_before_and_is_named",),
    ),
    Mutation(
        "the checkpoint before is not kept",
        "",
        "CHECKPOINTS_KEPT = 2",
        "CHECKPOINTS_KEPT = 1",
        ("tests/training/test_loop.py::test_a_damaged_checkpoint_gives_way_to_the_one_before_and_the_end_is_the_same_and_says_so",),
    ),
    Mutation(
        "a folder is not locked",
        "def locked",
        "            lock.acquire()\n",
        "            pass\n",
        (
            "tests/test_store.py::test_a_folder_is_held_by_one_process_and_freed_by_its_death",
            "tests/synthesis/test_synthesize.py::test_a_folder_in_use_is_refused",
        ),
    ),
    Mutation(
        "what killed writers left is not removed",
        "def locked",
        "        _remove_temporaries(folder)\n",
        "",
        ("tests/test_store.py::test_who_locks_a_folder_removes_what_killed_writers_left_there_and_nothing_else",),
    ),
    Mutation(
        "a value that is not finite is saved",
        "def _packed",
        "if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):",
        "if False:",
        ("tests/test_store.py::test_a_number_that_is_not_finite_is_never_written",),
    ),
)


def spoiled(text: str, mutation: Mutation) -> str:
    """The store without what a mutation takes away."""
    before, mark, after = text.partition(mutation.after) if mutation.after else ("", "", text)
    assert mark == mutation.after and mutation.old in after, mutation.what
    return before + mark + after.replace(mutation.old, mutation.new, 1)


def passes(tree: Path, tests: tuple[str, ...]) -> bool:
    """Whether all tests pass in a tree. Raises CalledProcessError where one could not be run."""
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = subprocess.run(words, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr)
    return done.returncode == 0


def main() -> int:
    """Exit status: 0 where every mutation is found."""
    found = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "runs", "docs", "*.egg-info", "__pycache__"))
        text = (tree / STORE).read_text(encoding="utf-8")
        every = tuple(dict.fromkeys(test for mutation in MUTATIONS for test in mutation.tests))
        assert passes(tree, every), "the store as it is does not pass"
        for mutation in MUTATIONS:
            (tree / STORE).write_text(spoiled(text, mutation), encoding="utf-8")
            failing = [test for test in mutation.tests if not passes(tree, (test,))]
            found += failing == list(mutation.tests)
            told = ", ".join(f"`{test}`" for test in failing) or "nothing"
            print(f"| {mutation.what} | {told} |", flush=True)
    print(f"{found} of {len(MUTATIONS)} found by every test named for them", file=sys.stderr)
    return int(found < len(MUTATIONS))


if __name__ == "__main__":
    sys.exit(main())
