"""`diffrc data show` and `diffrc data classes`."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffrc_cli.app import main
from engines import store
from engines.recipe import load

CI = ["--recipe", "digits-lt"]


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(["data", *words])
    captured = capsys.readouterr()
    assert exit_.value.code == code, captured.err
    return captured.out, captured.err


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_show_prints_counts_bars_groups_sizes_and_hash(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "show", *CI)
    assert "images a class: [125, 87, 61, 42, 29, 20, 14, 10, 7, 5], imbalance 25" in out
    assert "nine" in out
    assert "image sizes: 8x8 (400) -> 8 px" in out
    assert "kept images: sha256 " in out
    assert err == ""


def test_show_as_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    table: dict[str, Any] = json.loads(run(capsys, "show", *CI, "--json")[0])
    assert table["images"] == sum(table["counts"]) == 400
    assert table["group_sizes"]["few"] == {"classes": 3, "images": 22}
    assert table["sizes"] == {"8x8": 400}


def test_show_says_what_training_would_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "show", *CI, "--set", "data.groups=counts", "--set", "data.many_above=500")
    assert "400 training images" in out
    assert "no class counts as many" in err
    assert "--set data.groups=ranks" in err


def test_a_missing_data_set_exits_3_with_cause_and_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "show", "--recipe", "cifar10-lt-100", "--data", "nowhere", code=3)
    assert out == ""
    assert err.splitlines()[0] == "error: the data set nowhere does not exist"
    assert err.splitlines()[1].startswith("try:   --data DIR")


def test_classes_are_listed_by_id(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(run(capsys, "classes", *CI, "--json")[0])
    assert rows[9] == {"id": 9, "name": "nine", "images": 5, "group": "few"}
    assert "nine" in run(capsys, "classes", *CI)[0]


def test_classes_without_options_are_those_of_the_latest_run(capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = store.create_run(Path("runs/x"), load('name = "x"'))
    run_folder.keep_classes({"names": ["swan", "goose"], "counts": [9, 1], "groups": ["many", "few"], "kept_sha256": "0"})
    out, err = run(capsys, "classes")
    assert "goose" in out
    assert "runs/x" in err
    assert "nine" in run(capsys, "classes", *CI)[0]


def test_a_thousand_classes_stay_readable(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = [f"{k}/{i}.png {k}" for k in range(1000) for i in range(1 + 30 * (k < 10) + 200 * (k < 2))]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    (tmp_path / "test.txt").write_text("0/test.png 0")
    from PIL import Image

    for k in range(1000):
        (tmp_path / str(k)).mkdir()
    for name in ("0/test.png", *(line.split()[0] for line in lines)):
        Image.new("L", (1, 1)).save(tmp_path / name)
    out, _ = run(capsys, "show", "--recipe", "imagenet-lt-64", "--data", str(tmp_path))
    assert len(out.splitlines()) < 60
    assert "980 more" in out
