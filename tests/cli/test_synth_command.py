"""diffrc export and synth as people call them: what they print, and what they say of each mistake."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import store

Call = Callable[..., Any]  # (code, out, err)


def test_synth_makes_images_and_says_where_they_and_the_contact_sheet_lie(call: Call) -> None:
    done = call("synth", "--class", "Nine", "--n", "3")
    assert done.code == 0, done.err
    assert "contact sheet: runs/digits-lt/synth/sheet.png" in done.out
    assert "nine" in done.out
    assert "runs/digits-lt/synth/nine-0009" in done.out
    assert "onnx" in done.err, "auto says what it chose"
    assert len(list(Path("runs/digits-lt/synth/nine-0009").glob("*.png"))) == 3
    assert Path("runs/digits-lt/synth/sheet.png").exists()
    again = call("synth", "--class", "nine", "--n", "5", "--json")
    told = json.loads(again.out)
    assert (told["made"], told["classes"][0]["kept"]) == (2, 5)


def test_fill_makes_every_tail_class_as_large_as_n_fill(call: Call) -> None:
    done = call("synth", "--fill", "--set", "synth.fill_to=12", "--json", "--out", "filled")
    assert done.code == 0, done.err
    counts = store.open_run(None).classes()["counts"]
    made = {row["class"]: row["kept"] for row in json.loads(done.out)["classes"]}
    assert 0 < json.loads(done.out)["outside_network"] < 1
    names = store.open_run(None).classes()["names"]
    assert made == {name: 12 - n for name, n in zip(names, counts, strict=True) if n < 12}


@pytest.mark.parametrize(("steps", "sampler"), [("2", "ddim"), ("ddim2", "dpmpp_2m"), ("1,2", "ddpm")])
def test_options_reach_the_plan(steps: str, sampler: str, call: Call) -> None:
    done = call(
        *("synth", "--class", "nine", "--n", "1", "--out", "elsewhere", "--steps", steps, "--sampler", sampler),
        *("--guidance-scale", "0.5", "--seed", "7", "--engine", "torch"),
    )
    assert done.code == 0, done.err
    identity = store.read_json(Path("elsewhere/plan.json"))["identity"]
    keys = ("synth.steps", "synth.sampler", "synth.guidance_scale", "synth.seed", "engine.kind")
    assert [identity[key] for key in keys] == [int(steps) if steps.isdigit() else steps, sampler, 0.5, 7, "torch"]
    assert not Path("runs/digits-lt/synth").exists()


def test_images_that_begin_from_real_ones_are_forecast_made_and_made_again(call: Call) -> None:
    words = (
        "synth",
        "--class",
        "nine",
        "--n",
        "6",
        "--set",
        "synth.start=class",
        "--set",
        "synth.strength=0.02",
        "--set",
        "synth.steps=200",
    )
    planned = json.loads(call(*words, "--dry-run", "--json").out)
    assert planned["parts"][0]["missing"] == 6
    assert not Path("runs/digits-lt/synth").exists()
    done = call(*words)
    assert done.code == 0, done.err
    assert "try:     a synth.strength above 0.02" in done.err, "so little noise makes copies, and the remedy says what to change"
    again = call("verify", "runs/digits-lt", "--sample", "6")
    assert again.code == 0, again.err
    assert "6 bit for bit" in again.out


def test_a_selection_that_gives_up_ends_with_code_9_after_everything_is_told_and_in_place(call: Call) -> None:
    words = ("synth", "--class", "nine", "--n", "4", "--confidence", "1.0", "--max-tries", "1.5", "--set", "synth.max_bad=0")
    done = call(*words)
    assert done.code == 9
    assert "0 of 4" in done.out + done.err
    assert "error: fewer images than asked for: nine 0 of 4" in done.err
    assert "--confidence" in done.err.splitlines()[-1]
    assert "unsure" in done.out
    folder = Path("runs/digits-lt/synth")
    assert len(list(folder.glob("nine-0009/rejected/*.png"))) == 6
    told = json.loads(call(*words, "--json").out)
    assert told["short"] == 4
    assert told["classes"][0]["dropped"] == {"distance": 0, "confidence": 6, "both": 0, "novelty": 0}
    assert told["warnings"]
    assert store.read_json_lines(folder / "manifest.jsonl")[0]["dropped"] == "confidence"
    more = call(*words, "--max-tries", "2")
    assert more.code == 9
    assert len(list(folder.glob("nine-0009/rejected/*.png"))) == 8, "more tries go on from there"


def test_the_filters_work_with_guidance_off(call: Call) -> None:
    done = call(*("synth", "--class", "nine", "--n", "2", "--guidance-scale", "0", "--engine", "torch", "--json"), "--confidence", "1e-9")
    assert done.code == 0, done.err
    assert store.read_json_lines(Path("runs/digits-lt/synth/manifest.jsonl"))[0]["confidence"] > 1e-9


def test_copies_are_told_of_and_can_be_left_out(call: Call) -> None:
    done = call("synth", "--class", "nine", "--n", "3", "--json")
    copies = json.loads(done.out)["copies"]["runs/digits-lt/synth"]
    assert copies["pixel"] == {"copies": 0, "images": 3, "share": 0.0}
    assert copies["feature"]["images"] == 3
    assert "copies of training images: 0 of 3 by pixels" in call("synth", "--class", "nine", "--n", "3").out
    assert Path("runs/digits-lt/synth/copies.png").exists()
    left_out = call("synth", "--class", "nine", "--n", "3", "--out", "elsewhere", "--set", "select.copy_ratio=0.0")
    assert "copies" not in left_out.out
    assert not list(Path("elsewhere").glob("copies*"))


@pytest.mark.parametrize(
    ("words", "code", "says", "remedy"),
    [
        (["synth", "--class", "nine", "--n", "0"], 2, "no image", "--n"),
        (["synth", "--class", "nine", "--n", "-5"], 2, "no image", "--n"),
        (["synth", "--class", "nine"], 2, "--n goes with --class", "--n 50"),
        (["synth"], 2, "either --class", "--fill"),
        (["synth", "--fill", "--class", "nine"], 2, "either --class", "--fill"),
        (["synth", "--fill", "--n", "3"], 2, "--n goes with --class", "synth.fill_to"),
        (["synth", "--class", "nien", "--n", "3"], 2, "no class named 'nien'", "nine"),
        (["synth", "--class", "nine", "--n", "3", "--steps", "0"], 2, "synth.steps", "diffrc recipe show"),
        (["synth", "--class", "nine", "--n", "3", "--steps", "5000"], 2, "cannot give 5000", "diffrc recipe show"),
        (["synth", "--class", "nine", "--n", "3", "--steps", "ddim"], 2, "synth.steps: should be a number of steps", "diffrc recipe show"),
        (["synth", "--class", "nine", "--n", "3", "--engine", "vulkan"], 2, "vulkan", "--help"),
        (["synth", "--class", "nine", "--n", "3", "--set", "unet.model_channels=32"], 2, "trained with other settings", "diffrc train"),
        (["synth", "--class", "nine", "--n", "3", "--set", "diffusion.steps=500"], 2, "diffusion.steps = 1000 there", "diffrc train"),
        (["synth", "--class", "nine", "--n", "3", "--run", "nowhere"], 2, "not a run folder", "diffrc train"),
        (["synth", "--class", "nine", "--n", "3", "--out", "a-file"], 5, "is a file", "--out"),
        (["synth", "--class", "nine", "--n", "3", "--out", "a-file/deeper"], 8, "cannot write", "folder that can be written"),
        (["synth", "--class", "nine", "--n", "3", "--out", "photos"], 5, "not empty", "--out"),
        (["export", "--run", "nowhere"], 2, "not a run folder", "diffrc train"),
        (["export", "--engine", "vulkan"], 2, "vulkan", "--help"),
    ],
)
def test_a_mistake_gives_one_line_of_cause_one_of_remedy_and_its_exit_code(
    words: list[str], code: int, says: str, remedy: str, call: Call
) -> None:
    Path("a-file").touch()
    Path("photos").mkdir()
    Path("photos/cat.jpg").touch()
    done = call(*words)
    problem, advice = done.err.splitlines()[-2:]
    assert done.code == code, done.err
    assert problem.startswith("error: ")
    assert says in problem
    assert advice.startswith("try: ")
    assert remedy in advice
    assert "Traceback" not in done.err
    assert not list(Path().rglob("*.tmp"))
    assert not Path("runs/digits-lt/synth").exists()


def test_a_run_that_is_not_exported_or_not_trained_says_what_to_type(call: Call) -> None:
    run = Path("runs/digits-lt")
    shutil.rmtree(run / "engines")
    done = call("synth", "--class", "nine", "--n", "1")
    assert done.code == 4
    assert "diffrc export" in done.err.splitlines()[-1]
    shutil.rmtree(run / "guide")
    done = call("synth", "--class", "nine", "--n", "1", "--engine", "torch")
    assert (done.code, "diffrc train" in done.err.splitlines()[-1]) == (2, True)
    shutil.rmtree(run / "target")
    shutil.rmtree(run / "source")
    done = call("export")
    assert (done.code, "diffrc train" in done.err.splitlines()[-1]) == (2, True)
    assert not (run / "synth").exists()
    assert not list((run / "engines").rglob("*.onnx"))


def test_other_settings_in_the_same_folder_are_refused_naming_them(call: Call) -> None:
    assert call("synth", "--class", "nine", "--n", "1").code == 0
    done = call("synth", "--class", "nine", "--n", "1", "--steps", "3")
    assert done.code == 5
    assert "synth.steps = 4 there, 3 now" in done.err
    assert "--out" in done.err.splitlines()[-1]


def test_a_folder_in_use_is_refused(call: Call) -> None:
    with store.locked(Path("runs/digits-lt/synth")):
        assert call("synth", "--class", "nine", "--n", "1").code == 5


def test_export_says_what_it_measured_and_nothing_of_its_exporter(call: Call) -> None:
    done = call("export")
    assert done.code == 0, done.err
    assert "target.onnx" in done.out or "source.onnx" in done.out
    assert "against torch" in done.out
    assert "torch.onnx" not in done.out + done.err
    told = json.loads(call("export", "--json").out)
    assert told["one_step_error"] <= told["tolerance"]
    assert Path(told["file"]).exists()


def test_the_next_command_is_told_and_is_of_this_run_though_another_is_the_latest(call: Call) -> None:
    ask = ("synth", "--class", "nine", "--n", "2", "--engine", "torch", "--set", "synth.steps=2")
    assert call(*ask).out.splitlines()[-1] == "next: diffrc evaluate"
    store.write_json(Path("runs/latest.json"), {"run": "another"})
    assert call(*ask, "--run", "runs/digits-lt").out.splitlines()[-1] == "next: diffrc evaluate --run runs/digits-lt"
