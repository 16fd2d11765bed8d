"""The wheel: two import names, the recipes as data of the command line, typed, and licensed."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_its_top_level_is_exactly_the_two_packages(wheel: Path) -> None:
    assert {name.split("/")[0] for name in names(wheel) if ".dist-info/" not in name} == {"diffrc_cli", "engines"}


def test_it_holds_every_recipe_module_and_data_file(wheel: Path) -> None:
    recipes = {f"diffrc_cli/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "recipes").rglob("*.toml")}
    files = {path.relative_to(ROOT).as_posix() for package in ("diffrc_cli", "engines") for path in (ROOT / package).rglob("*.*")}
    files = {name for name in files if "__pycache__" not in name}
    assert recipes
    assert {"diffrc_cli/py.typed", "engines/py.typed", "engines/recipe.py"} <= files
    assert recipes | files <= names(wheel)


def test_it_installs_the_command_and_carries_the_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        scripts = configparser.ConfigParser()
        scripts.read_string(archive.read(info).decode())
        assert dict(scripts["console_scripts"]) == {"diffrc": "diffrc_cli.app:main"}
        metadata = archive.read(info.replace("entry_points.txt", "METADATA")).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in names(wheel))


def test_an_unpacked_wheel_finds_its_recipes_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    command = [sys.executable, "-m", "diffrc_cli", "recipe", "ls", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.count('"name"') == len(list((ROOT / "recipes").glob("*.toml")))
