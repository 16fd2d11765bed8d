"""Files that survive a kill: atomic writes, checkpoints with a manifest, run folders, locks. Nothing else in DiffRC writes.

Commit of a file: temporary file in the same folder, flush, fsync, rename, fsync of the folder. A reader sees the old bytes
or the new ones, never a mixture. Tensors are safetensors, everything else is JSON or TOML; there is no pickle.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import filelock
import safetensors

from engines import recipe as recipes
from engines.errors import ConflictError, DataError, NumericsError, StorageError, UsageError
from engines.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor  # imported where tensors are read or written: what asks a folder's JSON alone does not wait for it

DEFAULT_ROOT = Path("runs")
CHECKPOINTS_KEPT = 2
LOCK_FILE = ".lock"
LOCKS = Path("/proc/locks")
_TEMPORARY = re.compile(r"^\..*\.\d+\.[0-9a-f]{8}\.tmp$")

# ---------------------------------------------------------------------------------------------------------------- files


def write_bytes(path: Path, data: bytes) -> None:
    """Commit `data` under `path`, whole or not at all; parent folders are made. Raises StorageError."""
    _commit(path, (data,), len(data))


def _commit(path: Path, parts: Iterable[bytes], size_bytes: int) -> None:
    temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    with _storage_errors(path, size_bytes):
        _make_folder(path.parent)
        try:
            with temporary.open("xb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Commit UTF-8 text. Raises StorageError."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Commit a JSON document, indented for readers. Raises StorageError."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """A JSON document. Raises DataError where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or a number of thousands of digits
        raise DataError(f"cannot read {path}: {error}", "remake it with the command that wrote it, or restore the file") from None


def read_object(path: Path, **kinds: type) -> dict[str, Any]:
    """A JSON object that has these keys, each of its type. Raises DataError where it is missing, damaged or another."""
    found = read_json(path)
    wrong = [key for key, kind in kinds.items() if not isinstance(found, dict) or not isinstance(found.get(key), kind)]
    if wrong or not isinstance(found, dict):
        what = f"{wrong[0]!r} is missing or no {kinds[wrong[0]].__name__}" if wrong and isinstance(found, dict) else "it is no object"
        raise DataError(f"{path} is damaged: {what}", "remake it with the command that wrote it, or restore the file")
    return found


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a JSON document is a number to reckon with: finite, and not of hundreds of digits."""
    return isinstance(value, int | float) and -1e300 < value < 1e300


def append_json(path: Path, value: Mapping[str, Any]) -> None:
    """Add one JSON line; a last line torn by an earlier kill is dropped first. Raises StorageError."""
    append_json_lines(path, (value,))


def append_json_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Add JSON lines at the cost of one: a kill loses all of them, or some from the end. Raises StorageError."""
    lines = b"".join(_json_line(value) for value in values)
    with _storage_errors(path, len(lines)):
        _make_folder(path.parent)
        new = not path.exists()
        with path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        if new:
            _fsync_folder(path.parent)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file, [] where it does not exist; a torn last line is left out. Raises DataError."""
    if not path.exists():
        return []
    try:
        found = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        if not all(isinstance(value, dict) for value in found):
            raise ValueError("a line is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}", "the file was changed by hand; restore it or remove its folder") from None
    return found


def write_json_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Commit a whole JSON-lines file anew, in the memory of a line. Raises StorageError."""
    _commit(path, map(_json_line, values), path.stat().st_size if path.exists() else 0)  # about as long as the one before


def _json_line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, str] | None = None) -> None:
    """Commit tensors as safetensors. Raises NumericsError for a value that is not finite, StorageError."""
    write_bytes(path, _packed(path, tensors, info))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU. Raises DataError where it is missing or damaged."""
    from safetensors.torch import load as tensors_from_bytes

    try:
        if path.exists() and not path.is_file():  # a pipe would keep us waiting
            raise OSError("it is not a file")
        return tensors_from_bytes(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"cannot read {path}: {error}", "train again, or restore the file") from None


def is_temporary(path: Path) -> bool:
    """Whether a file is what a killed writer left behind."""
    return _TEMPORARY.match(path.name) is not None


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse before work starts where the disk cannot hold its result. Raises StorageError."""
    free = free_bytes(folder)
    if free < needed_bytes:
        need, have = needed_bytes / 2**20, free / 2**20
        raise StorageError(
            f"{folder} needs about {need:,.0f} MiB, the disk has {have:,.0f} MiB", "free some space or choose another folder"
        )


def free_bytes(folder: Path) -> int:
    """What the disk can take on which a folder lies, or will lie."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


def free_place(folder: Path, name: str) -> Path:
    """`folder/name`, or `folder/name-2` and so on where that is taken."""
    places = (folder / (name if n == 1 else f"{name}-{n}") for n in itertools.count(1))
    return next(place for place in places if not place.exists())


def move_folder(source: Path, destination: Path) -> None:
    """Give a folder another place on the same disk, in one step: killed at any moment, it is at the one or at the other.

    The destination must be free; its parent is made. Raises StorageError.
    """
    assert not destination.exists(), destination
    with _storage_errors(destination, 0):
        _make_folder(destination.parent)
        source.rename(destination)
        _fsync_folder(destination.parent)
        _fsync_folder(source.parent)


class Building:
    """A folder in the making: what is written into it is seen under its own name only when all of it is on the disk."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self.files = 0
        self.bytes = 0
        self._size_bytes = size_bytes

    def write(self, name: str, parts: Iterable[bytes]) -> None:
        """Write `parts`, one after another, to a new file: `name` is relative, with "/" between folders. Raises StorageError.

        In the memory of a part. Not flushed to the disk: `building` does that once for all files, which of many small ones takes a
        twentieth of the time.
        """
        path = self.path / name
        assert path.resolve().is_relative_to(self.path.resolve()), name
        written = 0
        with _storage_errors(path, max(0, self._size_bytes - self.bytes)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                for part in parts:
                    written += file.write(part)
        self.files += 1
        self.bytes += written


@contextlib.contextmanager
def building(folder: Path, size_bytes: int, *, replace: bool = False) -> Iterator[Building]:
    """Make a folder whole or not at all, beside its place in `.<name>.partial/`, which is removed whatever comes.

    Killed at any moment, the folder is as before or complete, or (where it replaces one) away; the same call then makes it.

    Args:
        folder: where it goes when the block ends without an exception; free, or an empty folder, unless `replace`.
        size_bytes: about what will be written, for the message of a full disk.
        replace: what is there is removed, after the new one is complete.

    Raises: ConflictError where another process is building the same folder, StorageError.
    """
    partial = folder.parent / f".{folder.name}.partial"
    with locked(partial):
        with _storage_errors(folder, size_bytes):
            for name in ("new", "old"):  # of a killed call
                if (partial / name).exists():
                    shutil.rmtree(partial / name)
            (partial / "new").mkdir()
        try:
            yield Building(partial / "new", size_bytes)
            with _storage_errors(folder, size_bytes):
                os.sync()
                if folder.exists() and replace:
                    folder.replace(partial / "old")
                elif folder.exists():
                    folder.rmdir()
                try:
                    (partial / "new").replace(folder)
                except OSError:
                    if (partial / "old").exists():
                        (partial / "old").replace(folder)
                    raise
                for changed in (partial, folder.parent):  # by a name each
                    _fsync_folder(changed)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _storage_errors(path: Path, size_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = f"free at least {size_bytes:,} bytes and run the same command again" if full else "choose a folder that can be written"
        raise StorageError(f"cannot write {path}: {error.strerror or error}", remedy) from error


def _make_folder(folder: Path) -> None:
    """With its parents; a folder's name lies in the folder above, so that one is flushed too."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _fsync_folder(path.parent)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _packed(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, str] | None) -> bytes:
    import torch
    from safetensors.torch import save as tensors_to_bytes

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericsError(f"{path.name}: {name} is not finite", "train again from the last checkpoint with a smaller lr")
    return tensors_to_bytes({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, dict(info or {}))


# ---------------------------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """A training stage at the end of a step: named groups of tensors and a JSON state; `skipped` names damaged newer ones."""

    step: int
    groups: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    skipped: tuple[str, ...] = ()
    path: Path | None = None  # where it was read from

    def fitting(self, group: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A group that has exactly the names, shapes and types of `like`. Raises DataError naming its file and what differs."""
        found = dict(self.groups.get(group, {}))
        wrong = [name for name in dict.fromkeys((*like, *found)) if _form(found.get(name)) != _form(like.get(name))]
        if not wrong:
            return found
        told = "; ".join(f"{name}: {_form(found.get(name))} there, {_form(like.get(name))} here" for name in wrong[:3])
        more = f"; and {len(wrong) - 3:,} more" if len(wrong) > 3 else ""
        file = f"{self.path}/{group}.safetensors" if self.path else f"the checkpoint's {group}"
        remedy = f"restore the file, or remove {self.path.parent} to train this stage again" if self.path else "train again"
        raise DataError(f"{file} does not fit the network of this recipe ({told}{more})", remedy)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Commit `folder/step-<n>/` with one safetensors file a group that holds any, state.json, and a manifest of sha256 written last.

    The folder gets its name only when everything in it is on the disk; then all but it and the one before are removed: older
    ones, half-built ones of a killed run, and newer ones, which were damaged, since training went on from before them.
    Raises NumericsError for a value that is not finite, StorageError.
    """
    final = folder / f"step-{checkpoint.step:09d}"
    building = folder / f"step-{checkpoint.step:09d}.tmp"
    groups = {name: group for name, group in checkpoint.groups.items() if group}  # safetensors cannot read back a file of no tensors
    files = {f"{name}.safetensors": _packed(final / name, group, None) for name, group in groups.items()}
    files["state.json"] = json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=1, allow_nan=False).encode()
    manifest = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()}
    with _storage_errors(final, sum(len(data) for data in files.values())):
        shutil.rmtree(building, ignore_errors=True)
        for name, data in files.items():
            write_bytes(building / name, data)
        write_json(building / "MANIFEST.json", manifest)
        if final.exists():  # the same step, written by a run that was killed before it said so
            shutil.rmtree(final)
        building.replace(final)
        _fsync_folder(folder)
    kept = [path for path in _checkpoint_folders(folder) if path.name <= final.name][:CHECKPOINTS_KEPT]
    for path in folder.glob("step-*"):
        if re.fullmatch(r"step-\d{9}(\.tmp)?", path.name) and path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    return final


def newest_state(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """Step and state of the newest checkpoint whose state.json can be read, not verified, without its tensors; None where there is none."""
    for path in _checkpoint_folders(folder):
        try:
            state = json.loads((path / "state.json").read_bytes())
            return int(state.pop("step")), state
        except (
            OSError,
            KeyError,
            TypeError,
            AttributeError,
            ValueError,
            RecursionError,
        ):  # damaged: `load_checkpoint` passes over it as well, and says so
            continue
    return None


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose every file matches its manifest, or None. Raises DataError where all are damaged."""
    from safetensors.torch import load as tensors_from_bytes

    skipped: list[str] = []
    for path in _checkpoint_folders(folder):
        try:
            manifest = read_json(path / "MANIFEST.json")
            if not all(Path(name).name == name and (path / name).is_file() for name in manifest):  # it could name a device, or any file
                raise DataError(f"{path} names files that are not in it", "restore it")
            data = {name: (path / name).read_bytes() for name in manifest}
            if any(hashlib.sha256(data[name]).hexdigest() != entry["sha256"] for name, entry in manifest.items()):
                raise DataError(f"{path} does not match its manifest", "restore it")
            state = json.loads(data.pop("state.json"))
            groups = {Path(name).stem: tensors_from_bytes(raw) for name, raw in data.items()}
            return Checkpoint(int(state.pop("step")), groups, state, tuple(skipped), path)
        except (DataError, OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError, safetensors.SafetensorError):
            skipped.append(path.name)
    if skipped:
        raise DataError(f"every checkpoint in {folder} is damaged ({', '.join(skipped)})", f"remove {folder} to train this stage again")
    return None


def _form(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _checkpoint_folders(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{9}", p.name)), reverse=True)


# ----------------------------------------------------------------------------------------------------------- run folder

STAGES = ("source", "target", "guide")
STALE = "stale"  # folder of a run
_TRAINING_SECTIONS = ("seed", "data", "unet", "diffusion", "source", "target", "guide")
_MAY_DIFFER = {"data.path", "data.on_bad_image", "data.quarantine"}  # where a data set lies is not what it is


@dataclass(frozen=True)
class RunFolder:
    """A folder that explains itself: resolved recipe, class table, environment, and every artifact at its place."""

    path: Path
    recipe: Recipe

    def stage(self, name: str) -> Path:
        """Folder of a training stage: "source", "target" or "guide"."""
        return self.path / name

    @property
    def engines(self) -> Path:
        return self.path / "engines"

    @property
    def synth(self) -> Path:
        return self.path / "synth"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def stale(self) -> Path:
        """Where what was made with other settings is kept until they come back."""
        return self.path / STALE

    @property
    def report(self) -> Path:
        return self.path / "report" / "index.html"

    def classes(self) -> dict[str, Any]:
        """The class table of training: {"names": [...], "counts": [...], "groups": [...], "kept_sha256": "..."}. Raises UsageError."""
        if not (self.path / "classes.json").exists():
            raise UsageError(f"{self.path} has not been trained yet", f"diffrc train --run {self.path}")
        table = read_object(self.path / "classes.json", names=list, counts=list, groups=list, kept_sha256=str)
        kinds = (("names", str), ("counts", int), ("groups", str))
        if len({len(table[key]) for key, _ in kinds}) != 1 or any(
            not isinstance(value, kind) for key, kind in kinds for value in table[key]
        ):
            raise DataError(f"{self.path / 'classes.json'} is damaged: it is no table of classes", "restore the file")
        return table

    def keep_classes(self, table: Mapping[str, Any]) -> None:
        """Store the class table, or check that it is the one of before. Raises ConflictError for another data set."""
        if (self.path / "classes.json").exists():
            before = self.classes()
            changed = [key for key in ("names", "counts", "kept_sha256") if before[key] != table[key]]
            if changed:
                raise ConflictError(
                    f"{self.path} was trained on other data ({', '.join(changed)} differ)", "choose a new folder with --run"
                )
        else:
            write_json(self.path / "classes.json", dict(table))

    def add_cost(self, what: str, seconds: float) -> None:
        """Add wall-clock seconds to what this run has cost: a line of cost.jsonl, so that two commands at once both count."""
        append_json(self.path / "cost.jsonl", {"what": what, "seconds": round(seconds, 2)})

    def cost(self) -> dict[str, float]:
        """Wall-clock seconds that this run has cost, by stage, in the order in which they first came. Raises DataError."""
        path, total = self.path / "cost.jsonl", dict[str, float]()
        for line in read_json_lines(path):
            what, seconds = line.get("what"), line.get("seconds")
            if not (isinstance(what, str) and is_number(seconds)):
                raise DataError(f"{path} is damaged: a line has no stage or no seconds", "remove the file; it counts the hours anew")
            total[what] = round(total.get(what, 0.0) + seconds, 2)
        return total


def create_run(path: Path, recipe: Recipe) -> RunFolder:
    """Make a run folder, or open the one that holds a run on the same data; the stored recipe follows.

    What was trained with other settings is stale from then on: `engines.training.reuse` sets it aside before training.
    Raises ConflictError as `stored_recipe`, StorageError.
    """
    before = stored_recipe(path, recipe)
    if before != recipe:
        write_text(path / "recipe.toml", recipes.to_toml(recipe))
    write_json(path / "environment.json", environment())
    if path.absolute().parent == DEFAULT_ROOT.absolute():  # elsewhere the parent is not ours, and `open_run` does not look there
        for left in DEFAULT_ROOT.glob(".latest.json.*.tmp"):  # nobody locks the root: what is young may be another's write
            if is_temporary(left) and left.stat().st_mtime < time.time() - 60:
                left.unlink(missing_ok=True)
        write_json(DEFAULT_ROOT / "latest.json", {"run": path.name})
    return RunFolder(path, recipe)


def stored_recipe(path: Path, recipe: Recipe) -> Recipe | None:
    """The recipe of the run in a folder, None where there is no run yet. Writes nothing, so it may be asked before the folder is locked.

    Raises ConflictError naming the keys in which its data differ from `recipe`'s, or where the folder holds other things.
    Stages whose checkpoints do not say what they were made of (older ones) are held to every key of training.
    """
    stored = path / "recipe.toml"
    if stored.exists():
        before = recipes.read(stored)
        older = any("made_of" not in found[1] for stage in STAGES if (found := newest_state(path / stage)))
        changed = _changes(before, recipe, _TRAINING_SECTIONS if older else ("data",))
        if changed:
            raise ConflictError(f"{path} holds another run ({'; '.join(changed[:4])})", "choose a new folder with --run")
        return before
    if path.is_dir() and any(p.name != LOCK_FILE and not is_temporary(p) for p in path.iterdir()):
        raise ConflictError(f"{path} is not empty and holds no run", "choose another folder with --run")
    return None


def open_run(path: Path | None, overrides: tuple[str, ...] = (), root: Path = DEFAULT_ROOT) -> RunFolder:
    """An existing run; None = the latest one in `root`.

    Raises UsageError where there is none, or where overrides would change what it was trained with.
    """
    if path is None:
        if not (root / "latest.json").exists():
            raise UsageError(f"there is no run in ./{root}", "diffrc train")
        name = read_object(root / "latest.json", run=str)["run"]
        if Path(name).name != name:  # the place of a run is beside the file that names it
            raise DataError(f"{root / 'latest.json'} is damaged: {name[:80]!r} is no folder's name", "--run names the run")
        path = root / name
    if not (path / "recipe.toml").exists():
        raise UsageError(f"{path} is not a run folder", "diffrc train makes one; --run names it")
    recipe = recipes.read(path / "recipe.toml", overrides)
    if overrides and (changed := _changes(recipes.read(path / "recipe.toml"), recipe, _TRAINING_SECTIONS)):
        raise UsageError(
            f"{path} was trained with other settings ({'; '.join(changed[:4])})", f"diffrc train --run {path} --set ... trains with these"
        )
    return RunFolder(path, recipe)


def _changes(before: Recipe, now: Recipe, sections: Sequence[str]) -> list[str]:
    """The settings of some sections in which two recipes differ, for messages."""
    return [
        f"{key} = {old} there, {new} now"
        for key, old, new in recipes.differences(before, now)
        if key.split(".")[0] in sections and key not in _MAY_DIFFER
    ]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, and remove what killed writers left in it and below, as far as no other lock reaches.

    The lock dies with its owner. Raises ConflictError where another process has it, StorageError.
    """
    with _storage_errors(folder, 0):
        _make_folder(folder)
        lock = filelock.FileLock(folder / LOCK_FILE, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise ConflictError(f"{folder} is in use by another diffrc process", "wait until it ends, or choose another folder") from None
    try:
        _remove_temporaries(folder)
        yield
    finally:
        lock.release()


def _remove_temporaries(folder: Path) -> None:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not Path(place, name, LOCK_FILE).exists()]
        for name in files:
            if _TEMPORARY.match(name):
                Path(place, name).unlink(missing_ok=True)


class Holder(NamedTuple):
    """The process that holds a folder."""

    pid: int | None  # None where the system does not tell
    command: str  # "" where it does not tell


def holder(folder: Path) -> Holder | None:
    """Which process has a folder locked, None where none has. Takes no lock and writes nothing, so it disturbs nobody.

    Where the system has no table of locks it is asked with a lock of its own, for a moment.
    """
    try:
        status = (folder / LOCK_FILE).stat()
    except OSError:
        return None
    if not LOCKS.is_file():
        try:
            with filelock.FileLock(folder / LOCK_FILE, timeout=0):
                return None
        except filelock.Timeout:
            return Holder(None, "")
        except OSError:
            return None
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in LOCKS.read_text(encoding="ascii").splitlines():  # "1: FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF"
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5] == place:
            pid = int(words[4])
            return Holder(pid if pid > 0 else None, _command_of(pid))
    return None


def _command_of(pid: int) -> str:
    """What a process was started with, "" where that cannot be read."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    return " ".join(word for word in words if word)


def environment() -> dict[str, Any]:
    """What the numbers of a run depend on beside its recipe: versions, processor, threads."""
    import torch

    packages = ("torch", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "pillow", "scikit-learn")
    versions = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": versions,
    }
