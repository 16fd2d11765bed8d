"""`diffrc engine ls | why | rm`: what is there, what synth takes of it and why, and taking it away."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import store

Call = Callable[..., Any]  # (code, out, err)
ENGINES = Path("runs/digits-lt/engines/onnx")


def test_ls_is_a_table_of_80_columns_and_with_json_a_line_an_engine(call: Call) -> None:
    done = call("engine", "ls")
    assert done.code == 0
    header, line, *rest = done.out.splitlines()
    assert header.split() == ["engine", "MiB", "ms/image", "error", "dB", "labels", "state"]
    assert line.startswith("target onnx fp32")
    assert line.endswith("ready")
    assert rest == []
    assert max(map(len, (header, line))) <= 80
    (told,) = map(json.loads, call("engine", "ls", "--json").out.splitlines())
    assert (told["name"], told["state"], told["opset"], told["what"]) == ("target onnx fp32", "ready", 20, "network")


def test_why_names_the_engine_and_what_keeps_each_of_the_others(call: Call) -> None:
    done = call("engine", "why")
    assert done.code == 0
    assert done.out.startswith("synth takes onnx fp32: no other is exported")
    assert "not openvino bf16: not exported" in done.out
    told = json.loads(call("engine", "why", "--engine", "onnx", "--json").out)
    assert told["taken"] == "onnx fp32"
    assert told["others"]["openvino fp32"] == "not asked for: synth.engine is onnx, in auto"
    assert call("engine", "why", "--engine", "torch").out == "synth takes torch: it is named, and needs no export\n"


def test_an_engine_of_another_runtime_version_is_stale_in_the_listing_and_refused_by_synth_which_says_so(call: Call) -> None:
    card = ENGINES / "target.json"
    store.write_text(card, card.read_text(encoding="utf-8").replace('"onnxruntime": "', '"onnxruntime": "0.'))
    done = call("engine", "ls")
    assert "stale: onnxruntime 0." in done.out
    assert "synth takes none: " in call("engine", "why").out
    made = call("synth", "--class", "nine", "--n", "1")
    assert made.code == 4
    assert "onnxruntime 0." in made.err
    assert "diffrc export" in made.err
    assert not Path("runs/digits-lt/synth").exists()
    assert call("engine", "rm", "--stale").out.startswith("removed target onnx fp32\n1 removed, ")
    assert not list(ENGINES.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "which engines?"),
        (("--stale", "--all"), "which engines?"),
        (("--all",), "--all --yes"),
        (("target onnx bf16",), "no engine named 'target onnx bf16'"),
    ],
    ids=["nothing named", "two ways at once", "all without yes", "no such engine"],
)
def test_rm_takes_nothing_away_that_was_not_clearly_named(words: tuple[str, ...], says: str, call: Call) -> None:
    before = sorted(ENGINES.iterdir())
    done = call("engine", "rm", *words)
    assert done.code == 2
    assert says in done.err
    assert sorted(ENGINES.iterdir()) == before


def test_rm_of_all_leaves_a_run_without_engines(call: Call) -> None:
    told = json.loads(call("engine", "rm", "--all", "--yes", "--json").out)
    assert told["removed"] == ["target onnx fp32"]
    assert told["bytes"] > 0
    assert call("engine", "ls").out == "runs/digits-lt has no engines: diffrc export makes them\n"
