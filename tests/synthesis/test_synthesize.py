"""A folder survives whatever happens to its writer, and the same command continues it."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines import store
from engines.data.batches import to_tensor
from engines.data.longtail import prepare
from engines.errors import ConflictError, EngineError, Interrupted, NumericsError, UsageError
from engines.interrupt import StopRequest
from engines.synthesis import maker as makers
from engines.synthesis import plan as plans
from engines.synthesis import synthesize as synthesis
from engines.synthesis.maker import Maker
from engines.synthesis.plan import ImageId
from engines.synthesis.select import Band, Figures, look
from engines.synthesis.sheet import decode_png, read_images
from engines.synthesis.synthesize import make_folder, synthesize

ROOT = Path(__file__).parent.parent.parent
HOSTILE = [
    *("../../x", "/etc/x", "con", "a/b", "dot.", "x" * 10_000, "nul\0", "\u202ertl"),
    *("🦢", "Swan", "swan", "--help", "{0}", "[red]x", "", " ", "\n"),
]
WANTED = {0: 3, 2: 6}


NOT_IMAGES = (".lock", "sheet.png", "guidance.json", "yield.json")  # what was asked for, and how it came about, is theirs


def images_of(folder: Path) -> dict[str, str]:
    """Every PNG of a folder, its sheet left out, and the manifest, by sha256."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_IMAGES]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def silent_log(_: object) -> None:
    pass


# ---------------------------------------------------------------------------------------------------- what a folder holds


@pytest.fixture(scope="module")
def whole(torch_maker: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WANTED, made without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "synth"
    make_folder(folder, torch_maker, WANTED)
    return folder


def test_a_job_leaves_the_images_asked_for_their_manifest_a_sheet_and_the_guidance_figures(whole: Path) -> None:
    images = sorted(path.relative_to(whole).as_posix() for path in whole.glob("*/*.png"))
    assert images == [f"two-0002/{i:06d}.png" for i in range(6)] + [f"zero-0000/{i:06d}.png" for i in range(3)]
    lines = store.read_json_lines(whole / "manifest.jsonl")
    assert [(line["class"], line["index"]) for line in lines] == [("zero", i) for i in range(3)] + [("two", i) for i in range(6)]
    assert all(line["kept"] and (whole / line["file"]).is_file() for line in lines)
    assert (whole / "sheet.png").stat().st_size > 0
    guidance = json.loads((whole / "guidance.json").read_text())
    assert guidance["t"] == [19, 10, 0]
    assert guidance["batches"] >= 2
    assert all(0.2 <= scale <= 1.0 for scale in guidance["scale"])
    assert all(value > 0 for value in guidance["guidance_to_noise"][:-1])


def test_reading_back_gives_what_was_made(whole: Path, torch_maker: Maker) -> None:
    pixels, labels = read_images(whole)
    assert labels.tolist() == [0] * 3 + [2] * 6
    for row, image in enumerate([ImageId(0, i) for i in range(3)] + [ImageId(2, i) for i in range(6)]):
        assert np.array_equal(pixels[row], torch_maker.draw([image], silent_log)[0].pixels)  # type: ignore[arg-type]


def test_the_same_command_again_makes_nothing(whole: Path, torch_maker: Maker) -> None:
    before = images_of(whole)
    result = make_folder(whole, torch_maker, WANTED)
    assert result.made == 0
    assert images_of(whole) == before


def test_more_images_add_to_what_is_there_and_fewer_take_nothing_away(whole: Path, torch_maker: Maker, tmp_path: Path) -> None:
    folder = tmp_path / "synth"
    make_folder(folder, torch_maker, {2: 2})
    make_folder(folder, torch_maker, {0: 3})
    result = make_folder(folder, torch_maker, WANTED)
    assert {c.name: c.made for c in result.classes} == {"zero": 0, "two": 4}
    assert images_of(folder) == images_of(whole)
    result = make_folder(folder, torch_maker, {2: 1})
    assert (result.classes[0].kept, result.made) == (6, 0)
    assert images_of(folder) == images_of(whole)


@pytest.mark.parametrize("workers", [1, 3])
def test_neither_workers_nor_threads_change_a_byte(workers: int, whole: Path, torch_maker: Maker, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        make_folder(tmp_path / "synth", torch_maker, WANTED, workers=workers)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert images_of(tmp_path / "synth") == images_of(whole)


def test_another_plan_in_the_same_folder_is_refused_and_changes_nothing(whole: Path, make_maker: Any) -> None:
    before = images_of(whole)
    with pytest.raises(ConflictError, match=r"synth\.seed"):
        make_folder(whole, make_maker("synth.seed=9"), WANTED)
    assert images_of(whole) == before


def test_a_job_that_was_stopped_before_its_first_image_leaves_its_folder_free_for_other_settings(
    torch_maker: Maker, make_maker: Any, tmp_path: Path
) -> None:
    stop = StopRequest()
    stop.signal_number = signal.SIGINT
    with pytest.raises(Interrupted):
        make_folder(tmp_path, torch_maker, WANTED, stop=stop)
    other = make_maker("synth.seed=9")
    assert plans.read_plan(tmp_path)["plan"] != other.plan.id
    make_folder(tmp_path, other, {2: 1})
    assert plans.read_plan(tmp_path)["plan"] == other.plan.id
    with pytest.raises(ConflictError, match=r"synth\.seed"):
        make_folder(tmp_path, torch_maker, {2: 1})


def test_a_folder_in_use_is_refused(torch_maker: Maker, tmp_path: Path) -> None:
    with store.locked(tmp_path / "synth"), pytest.raises(ConflictError, match="in use"):
        make_folder(tmp_path / "synth", torch_maker, WANTED)


def test_damaged_missing_and_foreign_images_are_made_again_and_the_manifest_is_rebuilt(
    whole: Path, torch_maker: Maker, make_maker: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "synth"
    make_folder(folder, torch_maker, WANTED)
    make_folder(tmp_path / "other", make_maker("synth.seed=9"), {2: 6})
    two = folder / "two-0002"
    (two / "000000.png").write_bytes((two / "000000.png").read_bytes()[:-20])
    (two / "000001.png").unlink()
    (two / "000002.png").write_bytes((tmp_path / "other" / "two-0002" / "000002.png").read_bytes())
    (two / "000003.png").write_bytes((two / "000004.png").read_bytes())
    (two / "000009.png").write_bytes(b"beyond those asked for, and damaged")
    (folder / "manifest.jsonl").write_text('{"torn": ')
    result = make_folder(folder, torch_maker, WANTED)
    assert result.made == 4
    assert images_of(folder) == images_of(whole)


@pytest.mark.parametrize("hold", ["class folder", "rejected folder"])
def test_a_class_folder_that_leads_elsewhere_is_refused(hold: str, torch_maker: Maker, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "synth", tmp_path / "elsewhere"
    make_folder(folder, torch_maker, {0: 1})
    elsewhere.mkdir()
    link = folder / "two-0002"
    if hold == "rejected folder":
        link.mkdir()
        link = link / "rejected"
    link.symlink_to(elsewhere)
    with pytest.raises(ConflictError, match="symbolic link"):
        make_folder(folder, torch_maker, WANTED)
    assert not any(elsewhere.iterdir())


def test_hostile_class_names_never_leave_the_folder(make_maker: Any, tmp_path: Path) -> None:
    for start in range(0, len(HOSTILE) - 2, 3):
        names = HOSTILE[start : start + 3]
        maker = make_maker(names=names)
        folder = tmp_path / "in" / str(start)
        make_folder(folder, maker, {0: 1, 1: 1, 2: 1})
        assert len(list(folder.glob("*/000000.png"))) == 3, "no two names share a folder"
        assert [line["class"] for line in store.read_json_lines(folder / "manifest.jsonl")] == names
        assert len(read_images(folder)[0]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# ----------------------------------------------------------------------------------------------------- what may go wrong


class Killed(BaseException):
    """Stands for the end of the process."""


def dies_at(monkeypatch: pytest.MonkeyPatch, write: int, torn: bool) -> None:
    """The process ends at its k-th write, before it, or leaving a half-written temporary file or half of the new lines."""
    count = 0

    def counted(real: Callable[..., None]) -> Callable[..., None]:
        def wrapper(path: Path, value: Any) -> None:
            nonlocal count
            count += 1
            if count < write:
                real(path, value)
                return
            if torn and count == write:
                path.parent.mkdir(parents=True, exist_ok=True)
                if real is append:
                    lines = "".join(json.dumps(line) + "\n" for line in value)
                    with path.open("a") as file:
                        file.write(lines[: len(lines) * 2 // 3])
                else:
                    (path.parent / f".{path.name}.123.0a1b2c3d.tmp").write_bytes(b"half")
            raise Killed

        return wrapper

    append = store.append_json_lines
    for real in (store.write_bytes, store.write_json_lines, append):
        monkeypatch.setattr(store, real.__name__, counted(real))


@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_any_write_the_same_command_gives_the_same_bytes(
    torn: bool, whole: Path, torch_maker: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {0: 2, 2: 3}
    expected: dict[str, str] | None = None
    points = 0
    for write in range(1, 1000):
        folder = tmp_path / str(write) / "synth"
        with monkeypatch.context() as patch:
            dies_at(patch, write, torn)
            try:
                make_folder(folder, torch_maker, wanted)
            except Killed:
                points += 1
            else:
                break
        make_folder(folder, torch_maker, wanted)
        expected = expected or images_of(folder)
        assert images_of(folder) == expected, f"killed at write {write}"
        assert not list(folder.rglob("*.tmp"))
        assert len(read_images(folder)[0]) == 5
    assert points >= 12, "plan, manifest, figures, five images, their lines, the manifest again, the yield and the sheet"


def test_a_stop_request_commits_what_is_finished_and_the_same_command_continues(whole: Path, torch_maker: Maker, tmp_path: Path) -> None:
    folder, stop = tmp_path / "synth", StopRequest()

    def after_the_first_batch(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        if list(folder.glob("*/*.png")):
            stop.signal_number = signal.SIGTERM

    with pytest.raises(Interrupted, match="of 30 images") as failure:
        make_folder(folder, torch_maker, {2: 30}, report=after_the_first_batch, stop=stop)
    assert failure.value.signal_number == signal.SIGTERM
    there = len(list(folder.glob("*/*.png")))
    assert 1 <= there < 30
    assert f"{there} of 30 images" in failure.value.problem
    assert len(store.read_json_lines(folder / "manifest.jsonl")) == there
    make_folder(folder, torch_maker, {2: 6})
    make_folder(folder, torch_maker, WANTED)
    for name, digest in images_of(whole).items():
        assert images_of(folder)[name] == digest or name == "manifest.jsonl"


def test_a_batch_that_would_outlast_the_grace_is_given_up(torch_maker: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(synthesis, "REPORT_SECONDS", 0.01)
    stop, calls = StopRequest(), 0

    class Slow:
        card = torch_maker.engine.card

        def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            nonlocal calls
            calls += 1
            stop.signal_number = signal.SIGINT
            time.sleep(0.2)
            return torch_maker.engine(x, t, y)

    with pytest.raises(Interrupted, match="0 of 9 images"):
        make_folder(tmp_path / "synth", replace(torch_maker, engine=Slow()), WANTED, stop=stop)
    assert calls < 3
    assert not list((tmp_path / "synth").glob("*/*.png"))


class FailsInItsTurn:
    """An engine that raises at its k-th evaluation and ever after."""

    def __init__(self, engine: Any, calls: int, failure: Exception) -> None:
        self.card, self.engine, self.calls, self.failure = engine.card, engine, calls, failure

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise self.failure
        out: Tensor = self.engine(x, t, y)
        return out


FAILURES = {
    "its runtime failed": EngineError("the runtime failed", "--engine torch"),
    "the GPU was lost": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "the GPU is full": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("failure", FAILURES)
def test_an_engine_that_fails_in_a_batch_stops_the_job_and_the_same_command_continues(
    failure: str, workers: int, whole: Path, torch_maker: Maker, tmp_path: Path
) -> None:
    folder, steps = tmp_path / "synth", 3
    broken = FailsInItsTurn(torch_maker.engine, (1 + workers) * steps + 1, FAILURES[failure])
    with pytest.raises(EngineError) as stopped:
        make_folder(folder, replace(torch_maker, engine=broken), {2: 60}, workers=workers)
    assert stopped.value.exit_code == 4
    there = sorted(folder.glob("*/*.png"))
    assert 5 <= len(there) <= 5 * (1 + workers), "what was drawn before is written"
    assert len(store.read_json_lines(folder / "manifest.jsonl")) == len(there)
    assert not list(folder.rglob("*.tmp"))
    before = {path: path.stat().st_mtime_ns for path in there}
    result = make_folder(folder, torch_maker, {2: 20})
    assert result.made == 20 - len(there)
    assert {path: path.stat().st_mtime_ns for path in there} == before
    for name, digest in images_of(whole).items():
        assert "two" not in name or images_of(folder)[name] == digest


class OneRowBad:
    """An engine that returns NaN for one row of every batch."""

    def __init__(self, engine: Any, row: int) -> None:
        self.card = engine.card
        self.engine = engine
        self.row = row

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        out: Tensor = self.engine(x, t, y)
        out[self.row] = float("nan")
        return out


def test_an_image_that_is_not_finite_is_not_written_but_replaced_and_counted(whole: Path, torch_maker: Maker, tmp_path: Path) -> None:
    bad_row = ImageId(2, 1).row(5)
    maker = replace(torch_maker, engine=OneRowBad(torch_maker.engine, bad_row))
    result = make_folder(tmp_path / "synth", maker, {2: 6})
    written = sorted(int(path.stem) for path in (tmp_path / "synth" / "two-0002").glob("*.png"))
    assert written == [0, 2, 3, 4, 5, 7], "1 and 6 fall on the bad row"
    assert result.not_finite == 2
    assert result.classes[0].kept == 6
    good = images_of(whole)
    for name, digest in images_of(tmp_path / "synth").items():
        assert name not in good or name == "manifest.jsonl" or name == "plan.json" or digest == good[name], "its neighbors are as ever"


def test_too_many_images_that_are_not_finite_end_the_job(make_maker: Any, tmp_path: Path) -> None:
    maker = make_maker("synth.max_bad=2")
    with pytest.raises(NumericsError) as failure:
        make_folder(tmp_path / "synth", replace(maker, engine=OneRowBad(maker.engine, slice(None))), {2: 6})  # type: ignore[arg-type]
    assert failure.value.exit_code == 7
    assert not list((tmp_path / "synth").glob("*/*.png"))


FEATURES: dict[tuple[int, int], Tensor] = {}


def feature_of(maker: Maker, class_id: int, index: int) -> Tensor:
    """What the guide sees in an image, drawn once: these tests' settings change the plan, not the pixels."""
    if (class_id, index) not in FEATURES:
        seen = maker.draw([ImageId(class_id, index)], silent_log)[0].seen
        assert seen is not None
        FEATURES[class_id, index] = seen[0]
    return FEATURES[class_id, index]


def pretend(monkeypatch: pytest.MonkeyPatch, maker: Maker, figures: Mapping[int, Figures]) -> None:
    """Let the guide find these figures in the images of class 2, by index."""
    known = {tuple(feature_of(maker, 2, index).tolist()): figure for index, figure in figures.items()}
    monkeypatch.setattr(synthesis, "_bands", lambda *_: {2: Band(torch.zeros(8), 1.0, torch.zeros(1, 8), 0.0)})
    monkeypatch.setattr(synthesis, "measure", lambda feature, *_: known[tuple(feature.tolist())])


FAR, UNSURE, BOTH, GOOD = Figures(2.0, 1.0, 0.9), Figures(0.5, 1.0, 0.1), Figures(2.0, 1.0, 0.1), Figures(0.5, 1.0, 0.9)
EVERY_THIRD_IS_BAD = {i: GOOD if i % 3 else (FAR, UNSURE, BOTH, FAR)[i // 3] for i in range(12)}


@pytest.fixture
def choosy(make_maker: Any, monkeypatch: pytest.MonkeyPatch) -> Maker:
    maker: Maker = make_maker("select.distance_band=1.0", "select.confidence=0.5", "select.max_tries=3.0")
    pretend(monkeypatch, maker, EVERY_THIRD_IS_BAD)
    return maker


def test_the_selection_makes_dropped_images_again_with_the_next_index_and_resumes_alike(choosy: Maker, tmp_path: Path) -> None:
    result = make_folder(tmp_path / "a", choosy, {2: 4})
    names = sorted(path.relative_to(tmp_path / "a" / "two-0002").as_posix() for path in (tmp_path / "a").rglob("0*.png"))
    assert names == ["000001.png", "000002.png", "000004.png", "000005.png", "rejected/000000.png", "rejected/000003.png"]
    assert (result.classes[0].kept, result.classes[0].rejected, result.classes[0].made) == (4, 2, 6)
    assert len(read_images(tmp_path / "a")[0]) == 4
    make_folder(tmp_path / "b", choosy, {2: 1})
    make_folder(tmp_path / "b", choosy, {2: 4})
    assert images_of(tmp_path / "b") == images_of(tmp_path / "a")


def test_the_manifest_says_why_an_image_was_dropped_with_its_figures(choosy: Maker, tmp_path: Path) -> None:
    make_folder(tmp_path / "synth", choosy, {2: 6})
    lines = store.read_json_lines(tmp_path / "synth" / "manifest.jsonl")
    told = {line["index"]: (line["kept"], line["dropped"], line["distance"], line["reach"], line["confidence"]) for line in lines}
    assert told[0] == (False, "distance", 2.0, 1.0, 0.9)
    assert told[3] == (False, "confidence", 0.5, 1.0, 0.1)
    assert told[6] == (False, "both", 2.0, 1.0, 0.1)
    assert told[1] == (True, None, 0.5, 1.0, 0.9)


def test_the_novelty_band_is_measured_kept_to_and_told(run_copy: Path) -> None:
    settings = ("select.novelty_band=[0.5, 20]", "select.max_tries=20", "synth.engine=torch")
    run = store.open_run(run_copy, settings)
    (result,) = synthesize(run, {6: 3}, originals=prepare(run.recipe.data, None))
    lines = store.read_json_lines(result.folder / "manifest.jsonl")
    assert result.classes[0].kept == 3
    assert all(line["kept"] == (0.5 <= line["novelty"] <= 20) for line in lines)
    assert {line["dropped"] for line in lines} <= {None, "novelty"}
    assert store.read_json(result.folder / "plan.json")["identity"]["select.novelty_band"] == [0.5, 20.0]


@given(figures=st.lists(st.sampled_from([FAR, UNSURE, BOTH, GOOD]), min_size=9, max_size=9), asked=st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_yields_add_up(figures: list[Figures], asked: int, make_maker: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("yield") / "synth"
    maker: Maker = make_maker("select.distance_band=1.0", "select.confidence=0.5", "select.max_tries=2.0")
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, maker, dict(enumerate(figures)))
        (row,) = make_folder(folder, maker, {2: asked}).classes
    tries = 2 * asked
    made = next((i for i in range(asked, tries) if figures[:i].count(GOOD) == asked), tries)
    tried = figures[:made]
    assert (row.made, row.kept, row.rejected) == (made, tried.count(GOOD), made - tried.count(GOOD))
    assert row.short == asked - row.kept
    assert row.dropped == {"distance": tried.count(FAR), "confidence": tried.count(UNSURE), "both": tried.count(BOTH), "novelty": 0}
    assert row.share == pytest.approx(row.kept / made)
    assert json.loads((folder / "yield.json").read_text()) == [row.to_json() | {"folder": "two-0002"}]
    assert [line["kept"] for line in store.read_json_lines(folder / "manifest.jsonl")] == [figure == GOOD for figure in tried]


def test_a_selection_that_gives_up_after_its_tries_says_so_and_more_tries_go_on_from_there(
    make_maker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filters = ("select.confidence=0.5", "synth.max_bad=0")
    maker: Maker = make_maker(*filters, "select.max_tries=1.0")
    pretend(monkeypatch, maker, EVERY_THIRD_IS_BAD)
    result = make_folder(tmp_path / "synth", maker, {2: 6})
    assert (result.classes[0].kept, result.classes[0].rejected, result.classes[0].short) == (5, 1, 1), "only 3: the band is off"
    assert result.warnings == ("two: 5 of 6 images; the selection kept 5 of 6 made",)
    more = make_folder(tmp_path / "synth", make_maker(*filters, "select.max_tries=4.0"), {2: 6})
    assert (more.classes[0].kept, more.classes[0].made, more.classes[0].short, more.warnings) == (6, 2, 0, ())


@pytest.mark.parametrize("override", ["select.confidence=0.999", "select.distance_band=1e-6"])
def test_any_filter_that_is_on_makes_dropped_images_again(
    override: str, make_maker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random guide is sure of nothing, and far from everything."""
    monkeypatch.setattr(synthesis, "_bands", lambda *_: {2: Band(torch.zeros(8), 1e-3, torch.zeros(1, 8), 0.0)})
    result = make_folder(tmp_path / "synth", make_maker(override, "select.max_tries=2.0", "synth.max_bad=0"), {2: 3})
    assert (result.classes[0].kept, result.classes[0].rejected) == (0, 6)


def test_the_figures_can_be_found_again_from_the_file(make_maker: Any, tmp_path: Path) -> None:
    maker: Maker = make_maker("select.confidence=0.001")
    make_folder(tmp_path, maker, {1: 3})
    assert maker.guide is not None
    for line in store.read_json_lines(tmp_path / "manifest.jsonl"):
        pixels, record = decode_png((tmp_path / line["file"]).read_bytes(), "one", "")
        seen = look(maker.guide, to_tensor(np.stack([pixels])))
        assert record.figures.confidence == pytest.approx(seen.log_probs[0, 1].exp().item(), rel=1e-4)
        assert line["distance"] is None, "the band is off"


@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_any_write_a_selection_continues_with_the_same_reasons(
    torn: bool, choosy: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "whole", choosy, {2: 5})
    expected = images_of(tmp_path / "whole")
    points = 0
    for write in range(1, 1000):
        folder = tmp_path / str(write)
        with monkeypatch.context() as patch:
            dies_at(patch, write, torn)
            try:
                make_folder(folder, choosy, {2: 5})
            except Killed:
                points += 1
            else:
                break
        make_folder(folder, choosy, {2: 5})
        assert images_of(folder) == expected, f"killed at write {write}"
    assert points > 15


def test_a_kill_loses_the_guidance_figures_of_no_image(torch_maker: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for write in range(1, 1000):
        folder = tmp_path / str(write)
        with monkeypatch.context() as patch:
            dies_at(patch, write, torn=False)
            try:
                make_folder(folder, torch_maker, {2: 12})
            except Killed:
                pass
            else:
                break
        if there := len(list(folder.glob("*/*.png"))):
            batches = store.read_json(folder / "guidance.json")["batches"]
            assert 5 * (batches - 1) <= there <= 5 * batches
    assert store.read_json(folder / "guidance.json")["batches"] == 3


# ----------------------------------------------------------------------------------------------------------- a whole run


@pytest.fixture
def run_copy(exported_run: Path, tmp_path: Path) -> Path:

    path = tmp_path / "runs" / "digits-lt"
    shutil.copytree(exported_run, path)
    return path


def test_a_run_that_is_not_exported_is_refused_and_torch_needs_no_export(tiny_copy: Path) -> None:
    with pytest.raises(EngineError, match="not exported") as failure:
        synthesize(store.open_run(tiny_copy), {9: 1})
    assert "diffrc export" in failure.value.remedy
    assert not (tiny_copy / "synth").exists()
    (result,) = synthesize(store.open_run(tiny_copy, ("synth.engine=torch",)), {9: 1})
    assert (result.engine, result.made) == ("torch", 1)


def test_without_a_guide_images_are_made_and_compared_by_pixels_and_a_filter_says_what_it_needs(tiny_copy: Path) -> None:
    shutil.rmtree(tiny_copy / "guide")
    settings = ("synth.engine=torch", "synth.guidance_scale=0.0")
    run = store.open_run(tiny_copy, settings)
    (result,) = synthesize(run, {9: 2}, originals=prepare(run.recipe.data, None))
    assert result.copies is not None
    assert list(result.copies.usual) == ["pixel"]
    for filter_on in ("select.confidence=0.5", "select.distance_band=2.0"):
        with pytest.raises(UsageError, match="guide") as failure:
            synthesize(store.open_run(tiny_copy, (*settings, filter_on)), {9: 2}, out=tiny_copy / "other")
        assert "diffrc train" in failure.value.remedy


def test_an_engine_of_other_weights_is_stale(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(makers, "weights_sha256", lambda _: "of later weights")
    with pytest.raises(EngineError, match="other weights"):
        synthesize(store.open_run(run_copy), {9: 1})


def test_a_batch_larger_than_the_engine_was_checked_for_is_refused(run_copy: Path) -> None:
    with pytest.raises(EngineError, match="checked up to batch 8"):
        synthesize(store.open_run(run_copy, ("export.max_batch=64", "synth.batch_size=16")), {9: 1})


def test_other_originals_than_those_of_the_training_are_refused(run_copy: Path) -> None:
    run = store.open_run(run_copy)
    other = prepare(run.recipe.data.model_copy(update={"profile_seed": 7}), None)
    with pytest.raises(ConflictError, match="other images"):
        synthesize(run, {9: 1}, originals=other)


def test_a_head_class_is_refused_unless_the_source_was_exported(run_copy: Path) -> None:
    target = ("synth.model=target",)
    run = store.open_run(run_copy, target)
    with pytest.raises(UsageError, match="head class"):
        synthesize(run, {0: 1})
    run = store.open_run(run_copy, (*target, "synth.engine=torch"))
    (tail, head) = synthesize(run, {9: 1, 0: 1})
    assert (head.model, head.folder.name) == ("source", "synth-source")
    assert (tail.model, tail.folder.name) == ("target", "synth")
