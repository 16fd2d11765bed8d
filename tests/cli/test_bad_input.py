"""Bad input, end to end: exit code, one line of cause, one of remedy, no traceback, and not a file or folder left behind.

Mistakes of `diffrc synth` and `export` (n = 0, unknown class, a run without an export, folders of images) are in
test_synth_command.py, wrong calls in test_app.py, each way in which a source can be damaged in tests/data.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from diffrc_cli.app import main
from engines import store
from engines.recipe import load

Place = Callable[[], None]
FOLDER = ("folder", "--set", "data.groups=ranks", "--set", "data.group_sizes=[1,0,1]", "--set", "data.test_per_class=1")


def nothing() -> None:
    """An empty folder."""


def photos(count: int = 4) -> None:
    """./photos: `count` images of a cat, four of a dog."""
    for name, images in (("cat", count), ("dog", 4)):
        Path("photos", name).mkdir(parents=True)
        for i in range(images):
            Image.effect_noise((20, 16), 9.0 + i).save(Path("photos", name, f"{i}.png"))


def one_image() -> None:
    photos(1)


def truncated() -> None:
    photos()
    for path in Path("photos/cat").iterdir():  # whichever of them is kept for training
        store.write_bytes(path, path.read_bytes()[:60])


def truncated_test() -> None:
    photos()
    Path("photos").rename("train")
    Path("photos").mkdir()
    Path("train").rename("photos/train")
    shutil.copytree("photos/train", "photos/test")
    store.write_bytes(Path("photos/test/dog/3.png"), Path("photos/test/dog/3.png").read_bytes()[:60])


def zero_bytes() -> None:
    photos()
    for path in Path("photos/cat").iterdir():
        store.write_bytes(path, b"")


def flat() -> None:
    photos()
    for path in Path("photos/cat").iterdir():
        path.rename(f"photos/{path.name}")
    shutil.rmtree("photos/cat")
    shutil.rmtree("photos/dog")


def wrong_recipe() -> None:
    store.write_text(Path("diffrc.toml"), '[source]\nlrr = 1e-4\ntrain_steps = "many"\n')


def no_toml() -> None:
    store.write_text(Path("diffrc.toml"), "[source\n")


def a_file() -> None:
    Path("a-file").touch()


def read_only() -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere; the rows below a file and below /proc cover it")
    Path("read-only").mkdir(mode=0o500)


def proc() -> None:
    if not Path("/proc/version").exists():
        pytest.skip("this system has no /proc")


def untrained() -> None:
    store.create_run(Path("runs/digits-lt"), load('name = "digits-lt"'))


MISTAKES: list[tuple[Place, tuple[str, ...], int, str, str]] = [
    # what is there, the command, exit code, cause, remedy
    (nothing, ("train", "cifar10-lt-100", "--data", "nowhere"), 3, "nowhere does not exist", "--data DIR"),
    (nothing, ("run", "cifar10-lt-100", "--data", "nowhere"), 3, "nowhere does not exist", "--data DIR"),
    (nothing, ("train", "cifar10-lt-100"), 3, "where the images lie", "--data DIR"),
    (photos, ("train", "cifar10-lt-100", "--data", "photos"), 3, "photos holds no cifar10", "the archive"),
    (photos, ("run", "imagenet-lt-64", "--data", "photos"), 3, "needs one training list", "--data"),
    (flat, ("train", *FOLDER, "--data", "photos"), 3, "holds no class folders", "DIR/CLASS/*.jpg"),
    (a_file, ("train", *FOLDER, "--data", "a-file"), 3, "a-file is a file", "DIR/CLASS/*.jpg"),
    (truncated, ("train", *FOLDER, "--data", "photos"), 3, "photos/cat/", "data.on_bad_image=skip"),
    (truncated, ("run", *FOLDER, "--data", "photos"), 3, "photos/cat/", "data.on_bad_image=skip"),
    (truncated_test, ("run", *FOLDER, "--data", "photos"), 3, "photos/test/dog/3.png", "data.on_bad_image=skip"),
    (zero_bytes, ("train", *FOLDER, "--data", "photos"), 3, "photos/cat/", "data.on_bad_image=skip"),
    (zero_bytes, ("run", *FOLDER, "--data", "photos"), 3, "photos/cat/", "data.on_bad_image=skip"),
    (one_image, ("train", *FOLDER, "--data", "photos"), 3, "class 'cat' has 1 image", "add images of it"),
    (photos, ("run", *FOLDER, "--data", "photos", "--set", "data.test_per_class=0"), 3, "no test images", "data.test_per_class=10"),
    (nothing, ("run", "digit-lt"), 2, "no recipe named 'digit-lt'", "digits-lt"),
    (nothing, ("run", "missing.toml"), 2, "no recipe file missing.toml", "diffrc recipe ls"),
    (nothing, ("run", "--set", "source.lrr=1e-4"), 2, "unknown key 'source.lrr' (did you mean 'lr'?)", "diffrc recipe show"),
    (nothing, ("train", "--set", "source.lr=fast"), 2, "source.lr", "diffrc recipe show"),
    (nothing, ("train", "--set", "source.train_steps=0"), 2, "source.train_steps", "diffrc recipe show"),
    (nothing, ("run", "--set", "synth.fill_to=-1"), 2, "synth.fill_to", "diffrc recipe show"),
    (nothing, ("train", "--set", "source.lr"), 2, "section.key=value", "diffrc recipe show"),
    (wrong_recipe, ("train",), 2, "3 mistakes in diffrc.toml", "diffrc recipe show"),
    (no_toml, ("run",), 2, "diffrc.toml is not valid TOML", "diffrc recipe show"),
    (a_file, ("train", "--run", "a-file/run"), 8, "cannot write a-file/run", "folder that can be written"),
    (a_file, ("run", "--run", "a-file"), 8, "cannot write a-file", "folder that can be written"),
    (proc, ("train", "--run", "/proc/diffrc/run"), 8, "cannot write /proc/diffrc/run", "folder that can be written"),
    (read_only, ("train", "--run", "read-only/run"), 8, "cannot write read-only/run", "folder that can be written"),
    (photos, ("train", "--run", "photos"), 5, "photos is not empty and holds no run", "--run"),
    (nothing, ("export",), 2, "no run in ./runs", "diffrc train"),
    (nothing, ("synth", "--class", "nine", "--n", "1"), 2, "no run in ./runs", "diffrc train"),
    (nothing, ("evaluate",), 2, "no run in ./runs", "diffrc train"),
    (nothing, ("report",), 2, "no run in ./runs", "diffrc train"),
    (untrained, ("export",), 2, "has not been trained yet", "diffrc train"),
    (untrained, ("synth", "--fill"), 2, "has not been trained yet", "diffrc train"),
    (untrained, ("evaluate",), 2, "has not been trained yet", "diffrc train"),
]


def tree() -> dict[str, str]:
    """Every path below the working folder, with what it holds."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "a folder" for path in Path().rglob("*")}


def refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, cause and remedy of a call that must fail, after the checks that every failure has to pass."""
    before = tree()
    with pytest.raises(SystemExit) as end:
        main(words)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert [line[:6] for line in lines if line.startswith(("error:", "try:"))] == ["error:", "try:  "], captured.err
    assert lines[-2].startswith("error:"), "the cause and the remedy are the last two lines"
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert tree() == before, "nothing is written"
    assert isinstance(end.value.code, int)
    return end.value.code, lines[-2], lines[-1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder; and what is not refused must not train for an hour."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("engines.training.stages.train_run", lambda *_: pytest.fail("it was not refused: training began"))


@pytest.mark.parametrize(("place", "words", "code", "cause", "remedy"), MISTAKES, ids=lambda value: getattr(value, "__name__", None))
def test_a_mistake_is_told_in_two_lines_with_its_exit_code_and_writes_nothing(
    place: Place, words: tuple[str, ...], code: int, cause: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place()
    found, told, advice = refused(words, capsys)
    assert (found, told) == (code, told)
    assert cause in told
    assert remedy in advice


@pytest.mark.parametrize("words", [("train",), ("run",), ("evaluate",), ("report",)], ids=" ".join)
def test_a_run_folder_in_use_is_refused(
    words: tuple[str, ...], tiny_copy: Path, tiny_settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_copy.relative_to(Path.cwd())
    with ExitStack() as holder:
        holder.enter_context(store.locked(run))
        code, cause, remedy = refused((*words, "--run", str(run)), capsys)
    assert code == 5
    assert f"{run} is in use by another diffrc process" in cause
    assert "wait until it ends" in remedy


def test_a_run_without_onnx_runtime_is_refused_before_it_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, cause, remedy = refused(("run",), capsys)
    assert code == 4
    assert "ONNX Runtime cannot be imported" in cause
    assert 'pip install "diffrc[cpu]"' in remedy
