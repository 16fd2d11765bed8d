"""diffrc verify: what it prints, the names of what disagrees, and its exit codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import store

Call = Callable[..., Any]  # (code, out, err)
RUN = Path("runs/digits-lt")
SYNTH = ("synth", "--class", "nine", "--n", "3", "--engine", "onnx")


def test_images_are_made_again_bit_for_bit_and_the_seed_of_the_sample_is_told(call: Call) -> None:
    assert call(*SYNTH).code == 0
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    done = call("verify", str(RUN), "--sample", "2", "--seed", "7")
    assert done.code == 0, done.err
    checked, remade = done.out.splitlines()
    plan = store.read_json(RUN / "synth/plan.json")["plan"]
    assert checked == f"runs/digits-lt/synth: 3 images of plan {plan[:8]} checked; every file agrees"
    assert remade == "2 images made again with onnx fp32 (--seed 7): 2 bit for bit"
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == before, "nothing is written"
    told = json.loads(call("verify", str(RUN), "--all", "--json").out)
    assert [(part["sampled"], part["bit_equal"], part["sound"]) for part in told] == [(3, 3, True)]
    other = call("verify", str(RUN / "synth"), "--engine", "torch", "--json")
    assert other.code == 0
    [part] = json.loads(other.out)
    assert (part["bit_equal"] + part["close"], part["expected"], part["engine"]) == (3, "close", "torch fp32")
    assert part["why_close"] == "made with onnx fp32, remade with torch fp32"


def test_without_a_folder_the_latest_run_is_verified(call: Call) -> None:
    assert call(*SYNTH).code == 0
    store.write_json(Path("runs/latest.json"), {"run": "digits-lt"})
    done = call("verify", "--sample", "0")
    assert done.code == 0, done.err
    assert done.out.startswith("runs/digits-lt/synth: 3 images of plan ")
    Path("runs/latest.json").unlink()
    assert "error: there is no run in ./runs" in call("verify").err


def test_what_disagrees_is_named_and_the_code_is_6(call: Call) -> None:
    assert call(*SYNTH).code == 0
    path = RUN / "synth/nine-0009/000001.png"
    path.write_bytes(path.read_bytes()[:-1])
    done = call("verify", str(RUN), "--sample", "0")
    assert done.code == 6
    assert "  nine-0009/000001.png: is damaged or not a synthesized image: it is cut off" in done.out.splitlines()
    assert done.err.splitlines()[-2] == "error: 1 file disagrees: runs/digits-lt/synth/nine-0009/000001.png"
    assert "makes them again" in done.err
    told = json.loads(call("verify", str(RUN), "--sample", "0", "--json").out)
    assert [found["file"] for found in told[0]["disagreements"]] == ["nine-0009/000001.png"]
    assert call(*SYNTH).code == 0
    assert call("verify", str(RUN), "--sample", "0").code == 0, "the same synth command mends it"


def gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("lost", "code", "says"),
    [
        ("synth/plan.json", 2, "no synthesized images"),
        ("engines/onnx/target.onnx", 4, "is not exported"),
        ("target", 2, "not trained"),
        ("recipe.toml", 2, "there is no run"),
    ],
    ids=["plan", "engine", "weights", "recipe"],
)
def test_what_is_gone_has_its_documented_code(lost: str, code: int, says: str, call: Call) -> None:
    assert call(*SYNTH).code == 0
    gone(RUN / lost)
    store.write_json(Path("runs/latest.json"), {"run": "digits-lt"})
    if lost == "recipe.toml":
        gone(Path("runs/latest.json"))
    done = call("verify", str(RUN if lost != "recipe.toml" else RUN / "synth"), "--json")
    assert (done.code, says in done.err) == (code, True), done.err


def test_a_plan_that_cannot_be_read_is_code_3_and_images_of_other_settings_code_5(call: Call) -> None:
    assert call(*SYNTH).code == 0
    plan = (RUN / "synth/plan.json").read_text(encoding="utf-8")
    (RUN / "synth/plan.json").write_text("{", encoding="utf-8")
    assert call("verify", str(RUN)).code == 3
    (RUN / "synth/plan.json").write_text(plan, encoding="utf-8")
    classes = store.read_json(RUN / "classes.json")
    store.write_json(RUN / "classes.json", classes | {"names": [*classes["names"][:9], "a nine"]})
    done = call("verify", str(RUN))
    assert done.code == 5
    assert "classes" in done.err


@pytest.mark.parametrize("words", [("--all", "--sample", "3"), ("--sample", "-1"), ("--engine", "abacus")], ids=" ".join)
def test_a_wrong_call_is_code_2(words: tuple[str, ...], call_in_empty: Call) -> None:
    Path("some").mkdir()
    assert call_in_empty("verify", "some", *words).code == 2


def test_a_folder_without_images_says_what_to_name(call_in_empty: Call) -> None:
    Path("some").mkdir()
    done = call_in_empty("verify", "some")
    assert (done.code, "error: some holds no images that diffrc synth made" in done.err) == (2, True)
    assert call_in_empty("verify", "nowhere").code == 2
