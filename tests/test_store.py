"""The store: writes that are whole or absent, checkpoints that prove themselves, runs that refuse what is not theirs."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import store
from engines.errors import ConflictError, DataError, NumericsError, StorageError, UsageError
from engines.recipe import Recipe, load
from engines.store import Checkpoint, load_checkpoint, save_checkpoint

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2]), "c": torch.tensor(3.5)}


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"model": {"w": torch.full((3,), float(step))}, "ema": {"w": torch.zeros(3)}}, {"note": "n"})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_write_makes_its_folders_and_leaves_nothing_but_the_file(tmp_path: Path) -> None:
    store.write_bytes(tmp_path / "a" / "b" / "file", b"new")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"new"
    assert names(tmp_path / "a" / "b") == ["file"]


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_crash_before_the_rename_leaves_the_old_bytes(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "file"
    store.write_bytes(file, b"old")
    monkeypatch.setattr(os if at == "fsync" else Path, at, crash)
    with pytest.raises(KeyboardInterrupt):
        store.write_bytes(file, b"new")
    assert file.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_bytes_reach_the_disk_before_they_get_their_name_and_the_name_before_the_call_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        events.append(f"fsync {'folder' if os.path.isdir(f'/proc/self/fd/{descriptor}') else 'file'}")  # noqa: PTH112
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    store.write_bytes(tmp_path / "file", b"x")
    assert events == ["fsync file", "rename", "fsync folder"]


@pytest.mark.parametrize(
    ("code", "remedy"), [(errno.ENOSPC, "free at least 3 bytes"), (errno.EDQUOT, "free at least"), (errno.EIO, "choose")]
)
def test_a_full_or_broken_disk_is_a_storage_error_that_keeps_the_old_file(
    code: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    file = tmp_path / "file"
    store.write_bytes(file, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError) as failure:
            store.write_bytes(file, b"new")
        with pytest.raises(StorageError):
            store.append_json(tmp_path / "lines", {"a": 1})
        with pytest.raises(StorageError):
            save_checkpoint(tmp_path / "stage", checkpoint(1))
    assert failure.value.exit_code == 8
    assert os.strerror(code) in failure.value.problem
    assert remedy in failure.value.remedy
    assert file.read_bytes() == b"old"
    assert load_checkpoint(tmp_path / "stage") is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it likes")
def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="Permission denied"):
            store.write_bytes(tmp_path / "file", b"x")
        with pytest.raises(StorageError), store.locked(tmp_path / "run"):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_a_file_in_the_place_of_a_folder_is_a_storage_error(tmp_path: Path) -> None:
    store.write_bytes(tmp_path / "file", b"x")
    with pytest.raises(StorageError):
        store.write_bytes(tmp_path / "file" / "below", b"x")


def test_json_comes_back_as_it_went_and_damage_is_a_data_error(tmp_path: Path) -> None:
    value = {"é": [1, 2.5, None, True], "path": "a/b"}
    store.write_json(tmp_path / "a.json", value)
    assert store.read_json(tmp_path / "a.json") == value
    for damage in (b"{", b"\xff", b"[" * 100_000):
        store.write_bytes(tmp_path / "b.json", damage)
        with pytest.raises(DataError):
            store.read_json(tmp_path / "b.json")
    with pytest.raises(DataError):
        store.read_json(tmp_path / "absent.json")


def test_a_number_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    for write in (store.write_json, store.append_json):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write(tmp_path / "a", {"x": float("nan")})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NumericsError, match="w is not finite"):
            store.write_tensors(tmp_path / "a", {"w": torch.tensor([1.0, bad])})
        with pytest.raises(NumericsError):
            save_checkpoint(tmp_path / "stage", Checkpoint(1, {"model": {"w": torch.tensor([bad])}}, {}))
    assert names(tmp_path) == []


@pytest.mark.parametrize("torn", [b'{"step": 3', b'{"step": 3}', b"\x00\x00\x00"])
def test_a_torn_last_line_is_left_out_and_dropped_by_the_next(torn: bytes, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    for step in (1, 2):
        store.append_json(file, {"step": step})
    with file.open("ab") as stream:
        stream.write(torn)
    assert store.read_json_lines(file) == [{"step": 1}, {"step": 2}]
    store.append_json(file, {"step": 4})
    assert file.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 4}\n'


def test_lines_damaged_elsewhere_are_a_data_error_and_no_file_is_no_line(tmp_path: Path) -> None:
    assert store.read_json_lines(tmp_path / "absent") == []
    store.write_bytes(tmp_path / "a", b'{"step": 1\n{"step": 2}\n')
    with pytest.raises(DataError) as failure:
        store.read_json_lines(tmp_path / "a")
    assert "changed by hand" in failure.value.remedy
    store.write_json_lines(tmp_path / "a", [{"x": 1}, {"y": 2}])
    assert store.read_json_lines(tmp_path / "a") == [{"x": 1}, {"y": 2}]


def test_tensors_come_back_bit_by_bit_and_damage_is_a_data_error(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    store.write_tensors(file, {**TENSORS, "strided": torch.arange(6.0).view(2, 3).t()}, {"made": "here"})
    read = store.read_tensors(file)
    assert all(torch.equal(read[name], value) for name, value in TENSORS.items())
    assert torch.equal(read["strided"], torch.arange(6.0).view(2, 3).t())
    whole = file.read_bytes()
    for damage in (b"", whole[:5], whole[:-1], b"\xff" * 8 + whole[8:], whole + b"x", b"\x80\x02}q\x00."):
        store.write_bytes(file, damage)
        with pytest.raises(DataError):
            store.read_tensors(file)


def test_who_locks_a_folder_removes_what_killed_writers_left_there_and_nothing_else(tmp_path: Path) -> None:
    left = (".file.123.0123abcd.tmp", ".tmp", ".mine.tmp", "file.tmp")
    for place in (tmp_path, tmp_path / "below", tmp_path / "held by another" / "below"):
        place.mkdir(parents=True, exist_ok=True)
        for name in left:
            (place / name).touch()
    (tmp_path / "held by another" / ".lock").touch()
    with store.locked(tmp_path):
        assert set(names(tmp_path)) >= {".mine.tmp", ".tmp", "file.tmp"}
        assert left[0] not in names(tmp_path)
        assert names(tmp_path / "below") == sorted(left[1:])
        assert names(tmp_path / "held by another" / "below") == sorted(left)


def test_a_disk_too_small_is_refused_before_work_starts_even_where_the_folder_is_not_made_yet(tmp_path: Path) -> None:
    store.require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(StorageError, match="needs about"):
        store.require_space(tmp_path / "not" / "yet", 1 << 60)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_comes_back_and_the_last_two_are_kept(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    assert store.newest_state(tmp_path) is None
    for step in (1, 5, 10):
        save_checkpoint(tmp_path, checkpoint(step))
    assert names(tmp_path) == ["step-000000005", "step-000000010"]
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.state, found.skipped) == (10, {"note": "n"}, ())
    assert found.groups["model"]["w"].tolist() == [10, 10, 10]
    assert store.newest_state(tmp_path) == (10, {"note": "n"})
    (tmp_path / "step-000000010" / "state.json").write_text("{")
    assert store.newest_state(tmp_path) == (5, {"note": "n"})


def test_the_name_of_a_checkpoint_and_that_of_a_new_file_of_lines_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[Path, set[str]]] = []
    monkeypatch.setattr(store, "_fsync_folder", lambda folder: flushed.append((folder, {path.name for path in folder.iterdir()})))
    store.append_json(tmp_path / "metrics.jsonl", {"step": 1})
    assert flushed == [(tmp_path, {"metrics.jsonl"})]
    store.save_checkpoint(tmp_path / "stage", Checkpoint(1, {"model": {"w": torch.ones(2)}}, {}))
    assert flushed[-1] == (tmp_path / "stage", {"step-000000001"})


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"w": torch.zeros(2, 3), "b": torch.zeros(2)}, ""),
        ({"w": torch.zeros(3, 2), "b": torch.zeros(2)}, r"w: \[3, 2\] float32 there, \[2, 3\] float32 here"),
        ({"w": torch.zeros(2, 3, dtype=torch.float16), "b": torch.zeros(2)}, r"w: \[2, 3\] float16 there"),
        ({"w": torch.zeros(2, 3)}, r"b: none there, \[2\] float32 here"),
        ({"w": torch.zeros(2, 3), "b": torch.zeros(2), "c": torch.zeros(1)}, r"c: \[1\] float32 there, none here"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_with_file_and_tensor(tensors: dict[str, torch.Tensor], told: str, tmp_path: Path) -> None:
    like = {"w": torch.ones(2, 3), "b": torch.ones(2)}
    save_checkpoint(tmp_path, Checkpoint(1, {"ema": tensors}, {}))
    found = load_checkpoint(tmp_path)
    assert found is not None
    if not told:
        assert all(torch.equal(value, tensors[name]) for name, value in found.fitting("ema", like).items())
        return
    with pytest.raises(DataError, match=rf"step-000000001/ema\.safetensors does not fit .*{told}") as failure:
        found.fitting("ema", like)
    assert f"remove {tmp_path}" in failure.value.remedy
    with pytest.raises(DataError, match=r"model\.safetensors does not fit.*w: none there"):
        found.fitting("model", like)


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_checkpoint_damaged_in_any_file_gives_way_to_the_one_before_and_is_named(file: str, how: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint(step))
    path = tmp_path / "step-000000002" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(data if how == "flip" else data[:-2])
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.skipped) == (1, ("step-000000002",))


def test_where_every_checkpoint_is_damaged_the_remedy_is_to_train_again(tmp_path: Path) -> None:
    (save_checkpoint(tmp_path, checkpoint(1)) / "state.json").unlink()
    with pytest.raises(DataError, match="step-000000001") as failure:
        load_checkpoint(tmp_path)
    assert failure.value.exit_code == 3
    assert "remove" in failure.value.remedy


def test_a_damaged_newer_checkpoint_never_takes_the_place_of_a_good_one(tmp_path: Path) -> None:
    for step in (2, 4):
        save_checkpoint(tmp_path, checkpoint(step))
    (tmp_path / "step-000000004" / "state.json").unlink()
    save_checkpoint(tmp_path, checkpoint(3))  # training went on from step 2 and was stopped at 3
    assert names(tmp_path) == ["step-000000002", "step-000000003"]


@pytest.mark.parametrize("manifest", ["[]", "{}", "null", '{"state.json": 1}', '{"../../x": {"sha256": "0"}}'])
def test_a_manifest_that_is_none_is_damage(manifest: str, tmp_path: Path) -> None:
    (save_checkpoint(tmp_path, checkpoint(1)) / "MANIFEST.json").write_text(manifest)
    with pytest.raises(DataError):
        load_checkpoint(tmp_path)


def test_a_kill_at_any_write_of_a_checkpoint_leaves_the_one_before_or_the_new_one(tmp_path: Path) -> None:
    # In a process of its own, which forks one child for each opening, fsync, rename and removal there is, and kills it there.
    script = """
import os, signal, sys
from pathlib import Path
import torch
from engines.store import Checkpoint, load_checkpoint, save_checkpoint

root = Path(sys.argv[1])
os.fsync = lambda _: None  # a kill, unlike a power cut, loses nothing that was written; the test is faster without

def checkpoint(step):
    return Checkpoint(step, {"model": {"w": torch.full((3,), float(step))}}, {})

def killed_at(call, folder):
    calls = 0
    def counted(event, _arguments=()):
        nonlocal calls
        calls += event.startswith(("fsync", "open", "os.", "shutil."))
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
    os.fsync = lambda _: counted("fsync")
    sys.addaudithook(counted)
    save_checkpoint(folder, checkpoint(3))

steps, call, status = [], 0, 9
while status == 9:
    call += 1
    folder = root / str(call)
    for step in (1, 2):
        save_checkpoint(folder, checkpoint(step))
    pid = os.fork()
    if pid == 0:
        killed_at(call, folder)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    found = load_checkpoint(folder)
    assert not found.skipped and float(found.groups["model"]["w"][0]) == found.step
    steps.append(found.step)
    save_checkpoint(folder, checkpoint(3))
    assert sorted(p.name for p in folder.iterdir()) == ["step-000000002", "step-000000003"], list(folder.iterdir())
print(steps)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)
    assert len(steps) > 10
    assert steps == sorted(steps)
    assert {steps[0], steps[-1]} == {2, 3}


# ----------------------------------------------------------------------------------------------------------- run folder


def recipe(*overrides: str) -> Recipe:
    return load('name = "test"', overrides)


def test_a_run_folder_holds_its_recipe_and_is_the_latest_of_the_default_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = store.create_run(store.DEFAULT_ROOT / "test", recipe("source.lr=0.5"))
    assert store.open_run(None) == run
    assert store.open_run(run.path, ("synth.steps=7",)).recipe.synth.steps == 7
    assert store.read_json(run.path / "environment.json")["packages"]["torch"] == torch.__version__


def test_a_run_elsewhere_leaves_its_parent_folder_alone(tmp_path: Path) -> None:
    store.write_json(tmp_path / "latest.json", {"mine": 1})
    store.create_run(tmp_path / "run", recipe())
    assert store.read_json(tmp_path / "latest.json") == {"mine": 1}


def test_other_data_are_refused_by_key_and_every_other_setting_is_taken_over(tmp_path: Path) -> None:
    store.create_run(tmp_path, recipe())
    with pytest.raises(ConflictError, match=r"data\.imbalance = 100\.0 there, 50\.0 now") as failure:
        store.create_run(tmp_path, recipe("data.imbalance=50.0"))
    assert failure.value.exit_code == 5
    store.create_run(tmp_path, recipe("synth.steps=7", "data.path=/elsewhere", "source.lr=0.5"))
    assert store.open_run(tmp_path).recipe == recipe("synth.steps=7", "data.path=/elsewhere", "source.lr=0.5")
    with pytest.raises(UsageError, match=r"source\.lr = 0\.5 there, 0\.25 now") as refused:  # commands that do not train
        store.open_run(tmp_path, ("source.lr=0.25",))
    assert refused.value.remedy == f"diffrc train --run {tmp_path} --set ... trains with these"


def test_where_a_checkpoint_does_not_say_what_it_was_made_of_every_training_key_must_agree(tmp_path: Path) -> None:
    store.create_run(tmp_path, recipe())
    save_checkpoint(tmp_path / "source", Checkpoint(1, {}, {"stage": "source"}))  # as they were before
    with pytest.raises(ConflictError, match=r"guide\.tau = 0\.07 there, 0\.1 now"):
        store.create_run(tmp_path, recipe("guide.tau=0.1"))
    assert store.open_run(tmp_path).recipe == recipe()
    save_checkpoint(tmp_path / "source", Checkpoint(2, {}, {"made_of": {}}))
    assert store.create_run(tmp_path, recipe("guide.tau=0.1")).recipe.guide.tau == 0.1


def test_a_folder_moves_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_text(tmp_path / "a" / "file", "mine")
    store.move_folder(tmp_path / "a", tmp_path / "b" / "c")
    assert (tmp_path / "b" / "c" / "file").read_text() == "mine"
    assert names(tmp_path) == ["b"]

    def fails(*_: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(StorageError, match="Permission denied"):
        store.move_folder(tmp_path / "b", tmp_path / "d")
    assert names(tmp_path) == ["b"]


def test_a_folder_in_the_making_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    monkeypatch.setattr(os, "sync", lambda: seen.append(("sync", (tmp_path / "out").exists())))
    with store.building(tmp_path / "out", 0) as building:
        building.write("a/b", [b"one", b"", b"two"])
        building.write("c", iter([b"3"]))
        assert (building.files, building.bytes) == (2, 7)
        assert not (tmp_path / "out").exists()
    assert seen == [("sync", False)]
    assert (tmp_path / "out" / "a" / "b").read_bytes() == b"onetwo"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_whose_making_fails_leaves_what_was_there(replace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    if replace:
        store.write_bytes(out / "old", b"old")

    replace_path = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EIO, "no")
        return replace_path(self, target)

    with pytest.raises(ZeroDivisionError), store.building(out, 0, replace=replace) as building:
        building.write("new", [bytes(1 // 0)])
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(StorageError), store.building(out, 0, replace=replace) as building:
        building.write("file", [b"x"])
    monkeypatch.undo()
    assert names(tmp_path) == (["out"] if replace else [])
    assert not replace or names(out) == ["old"]
    with store.building(out, 0, replace=replace) as building:
        building.write("file", [b"x"])
    assert names(out) == ["file"]


def test_one_process_at_a_time_makes_a_folder_and_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    def full() -> Iterator[bytes]:
        yield b"x"
        raise OSError(errno.ENOSPC, "No space left on device")

    with store.building(tmp_path / "out", 10), pytest.raises(ConflictError), store.building(tmp_path / "out", 10):
        raise AssertionError
    (tmp_path / "out").rmdir()
    with pytest.raises(StorageError, match="No space left") as told, store.building(tmp_path / "out", 10) as building:
        building.write("file", full())
    assert "free at least 10 bytes" in told.value.remedy
    assert names(tmp_path) == []


def test_a_folder_where_nothing_but_a_killed_first_write_lies_becomes_a_run(tmp_path: Path) -> None:
    (tmp_path / ".recipe.toml.123.0123abcd.tmp").touch()
    with store.locked(tmp_path):
        store.create_run(tmp_path, load('name = "a"'))
    assert names(tmp_path) == [".lock", "environment.json", "recipe.toml"]


def test_a_folder_of_other_files_is_not_taken_for_a_run(tmp_path: Path) -> None:
    store.write_text(tmp_path / "thesis.tex", "mine")
    with pytest.raises(ConflictError, match="not empty and holds no run"):
        store.create_run(tmp_path, recipe())
    with pytest.raises(UsageError, match="is not a run folder"):
        store.open_run(tmp_path)
    with pytest.raises(UsageError, match="there is no run"):
        store.open_run(None, root=tmp_path / "runs")


TABLE: dict[str, Any] = {"names": ["a", "b"], "counts": [5, 1], "groups": ["many", "few"], "kept_sha256": "0"}


@pytest.mark.parametrize("key", ["names", "counts", "kept_sha256"])
def test_other_data_are_refused_and_the_same_are_not(key: str, tmp_path: Path) -> None:
    run = store.create_run(tmp_path, recipe())
    with pytest.raises(UsageError, match="has not been trained"):
        run.classes()
    run.keep_classes(TABLE)
    run.keep_classes(TABLE)
    with pytest.raises(ConflictError, match=rf"trained on other data \({key} differ\)"):
        run.keep_classes({**TABLE, key: ["other"]})
    assert run.classes() == TABLE


def test_costs_add_up_by_stage(tmp_path: Path) -> None:
    run = store.create_run(tmp_path, recipe())
    for what, seconds in (("train.source", 1.25), ("synth", 2.0), ("train.source", 0.5)):
        run.add_cost(what, seconds)
    assert run.cost() == {"train.source": 1.75, "synth": 2.0}


def test_a_folder_is_held_by_one_process_and_freed_by_its_death(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from engines import store

with store.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConflictError, match="in use by another") as failure, store.locked(tmp_path):
            pass
        assert failure.value.exit_code == 5
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    for _ in range(2):
        with store.locked(tmp_path):
            pass


def test_who_holds_a_folder_is_told_without_taking_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.holder(tmp_path) is None
    with store.locked(tmp_path):
        found = store.holder(tmp_path)
        assert found and found.pid in (os.getpid(), None)
        monkeypatch.setattr(store, "LOCKS", tmp_path / "no such table")  # as on systems that have none
        assert store.holder(tmp_path) == store.Holder(None, "")
    assert store.holder(tmp_path) is None
