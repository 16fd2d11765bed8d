"""Completion: scripts for three shells, and the names that only a run, a recipe folder or the schema knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from diffrc_cli.app import main
from engines import store

SHELLS = ["bash", "zsh", "fish"]


@pytest.fixture
def completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], list[str]]:
    """completed("diffrc synth --class n") -> what bash is offered for the last word, in a folder with a run of three classes."""
    store.write_json(tmp_path / "runs" / "mine" / "classes.json", {"names": ["nine", "Black swan", "bell\x07"], "counts": [3, 2, 1]})
    store.write_text(tmp_path / "runs" / "mine" / "recipe.toml", "")
    store.write_json(tmp_path / "runs" / "latest.json", {"run": "mine"})
    monkeypatch.chdir(tmp_path)

    def complete(line: str) -> list[str]:
        monkeypatch.setenv("_DIFFRC_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - (not line.endswith(" "))))
        with pytest.raises(SystemExit) as end:
            main(())
        assert end.value.code == 0
        return capsys.readouterr().out.split()

    return complete


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("diffrc synth --class ", ["nine", "Black_swan"]),
        ("diffrc synth --class bla", ["black_swan"]),
        ("diffrc synth --run runs/mine --class n", ["nine"]),
        ("diffrc synth --run runs/none --class n", []),
        ("diffrc bench quality --class n", ["nine"]),
        ("diffrc train dig", ["digits-lt"]),
        ("diffrc recipe show cifar100-lt-5", ["cifar100-lt-50"]),
        ("diffrc data show --recipe fold", ["folder"]),
        ("diffrc study tab", ["table1", "table2", "table3"]),
        ("diffrc train --set synth.samp", ["synth.sampler="]),
        ("diffrc evaluate --run runs/", ["runs/mine"]),
        ("diffrc eval", ["evaluate"]),
        ("diffrc synth --guid", ["--guidance-scale"]),
    ],
)
def test_a_name_that_was_begun_is_completed(line: str, offered: list[str], completed: Callable[[str], list[str]]) -> None:
    assert completed(line) == offered


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_gets_its_script(shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_DIFFRC_COMPLETE", f"source_{shell}")
    with pytest.raises(SystemExit):
        main(())
    script = capsys.readouterr().out
    words = {"bash": "complete -o default -F _diffrc_completion diffrc", "zsh": "#compdef diffrc", "fish": "complete --command diffrc"}
    assert words[shell] in script
    assert f"complete_{shell}" in script
