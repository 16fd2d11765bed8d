"""diffrc import and diffrc export --diffusers: weights in and out, what is printed to type next, and every refusal."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffrc_cli.app import main
from diffrc_cli.recipe import embedded
from engines import store
from engines.networks.diffusers_folder import WEIGHTS, read
from engines.networks.diffusers_folder import write as write_folder
from engines.networks.pretrained import WeightsCard, describe, load_into, recipe_table, sha256
from engines.networks.unet import Architecture, UNet
from engines.recipe import load, validate
from engines.training.diffusion import build_unet

Captured = pytest.CaptureFixture[str]
SHAPE = Architecture(
    image_size_px=8,
    in_channels=3,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_head_channels=32,
)
WIDE = ("unet.model_channels=32", "unet.num_head_channels=32")  # the tiny run's network, at a width that diffusers can hold
GUIDE = "[guide]\nchannel_mult = [1]\nattention_resolutions = []\n[synth]\nsteps = 1\n"  # any that fits 8 px


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """./butterflies, a pipeline folder of a small U-Net of random weights, as diffusers would have written it."""
    torch.manual_seed(0)
    unet = UNet(SHAPE, 3)
    for value in unet.parameters():
        torch.nn.init.normal_(value)
    recipe = validate(
        tomllib.loads('name = "any"\n[data]\nimage_size_px = 8\n[unet]\nlearn_sigma = false\nattention_resolutions = []\n' + GUIDE)
    )
    write_folder(tmp_path / "butterflies", unet, recipe)
    return Path("butterflies")


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def refused(capsys: Captured, *words: object) -> tuple[int, str, str]:
    """Exit code, cause and remedy of a command that must fail in two lines and write nothing."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    code = run(*words)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line[:6] for line in captured.err.splitlines()] == ["error:", "try:  "]
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    return code, *captured.err.splitlines()


def printed_recipe(out: str) -> str:
    """The lines of TOML that a command printed."""
    lines = out.splitlines()
    first = lines.index("[data]")
    return "\n".join(lines[first : lines.index("", lines.index("[source]"))]) + "\n"


def test_what_import_prints_is_a_recipe_that_starts_from_the_file(folder: Path, capsys: Captured) -> None:
    assert run("import", "diffusers", folder) == 0
    out = capsys.readouterr().out
    file = Path("butterflies.safetensors")
    weights, card = read(folder)
    assert f"{sum(value.numel() for value in weights.values()):,} parameters" in out
    assert sha256(file)[:16] in out
    recipe = load('name = "mine"\n' + printed_recipe(out) + GUIDE)
    assert recipe.source.pretrained == str(file)
    assert recipe.diffusion.noise_schedule == "linear"
    unet = build_unet(recipe, 5)
    assert load_into(unet, file, recipe.diffusion) == []
    assert all(torch.equal(weights[name], value) for name, value in unet.state_dict().items())
    assert describe(file).origin == {"format": "diffusers", "file": "butterflies", "sha256": sha256(folder / "unet" / WEIGHTS)}
    assert card.architecture == SHAPE


def test_import_as_json_says_the_same(folder: Path, capsys: Captured) -> None:
    assert run("import", "diffusers", folder, "--out", "deep/er/x.safetensors", "--json") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err == ""
    assert (found["file"], found["sha256"]) == ("deep/er/x.safetensors", sha256(Path("deep/er/x.safetensors")))
    assert found["recipe"]["source"] == {"pretrained": "deep/er/x.safetensors"}
    assert found["architecture"]["model_channels"] == 32
    assert found["recipe"]["unet"]["channel_mult"] == [1, 2]


def test_a_file_that_is_there_is_kept_unless_forced(folder: Path, capsys: Captured) -> None:
    store.write_text(Path("butterflies.safetensors"), "mine")
    code, cause, remedy = refused(capsys, "import", "diffusers", folder)
    assert (code, "butterflies.safetensors exists already" in cause, "--force" in remedy) == (2, True, True)
    assert run("import", "diffusers", folder, "--force") == 0
    assert describe(Path("butterflies.safetensors")).architecture == SHAPE


def test_weights_without_a_scheduler_leave_the_process_to_the_recipe_and_it_is_said(folder: Path, capsys: Captured) -> None:
    (folder / "scheduler" / "scheduler_config.json").unlink()
    assert run("import", "diffusers", folder / "unet", "--out", "x.safetensors") == 0
    captured = capsys.readouterr()
    assert "diffusion.noise_schedule" in captured.err
    assert "[diffusion]" not in captured.out


def test_refusals_of_import_diffusers(folder: Path, capsys: Captured) -> None:
    config = folder / "unet" / "config.json"
    for words, expected, cause, remedy in (
        (("nowhere",), 3, "nowhere is no folder of a UNet2DModel", "config.json"),
        ((folder, "--out", "x.pt"), 2, "x.pt does not end in .safetensors", "--out x.safetensors"),
        ((folder, "--out", "butterflies"), 2, "butterflies does not end in .safetensors", "--out"),
        ((), 2, "missing argument 'DIR'", "diffrc import diffusers --help"),
    ):
        code, told, advice = refused(capsys, "import", "diffusers", *words)
        assert (code, cause in told, remedy in advice) == (expected, True, True), told
    store.write_json(config, {**store.read_json(config), "freq_shift": 1, "norm_eps": 1e-6})
    code, told, _ = refused(capsys, "import", "diffusers", folder)
    assert code == 3
    assert "freq_shift = 1, not 0; norm_eps = 1e-06, not 1e-05" in told


def test_a_network_of_four_channels_is_refused_because_no_recipe_has_them(tmp_path: Path, capsys: Captured) -> None:
    recipe = validate(
        tomllib.loads('name = "any"\n[data]\nimage_size_px = 8\n[unet]\nlearn_sigma = false\nattention_resolutions = []\n' + GUIDE)
    )
    write_folder(tmp_path / "latent", UNet(replace(SHAPE, in_channels=4), 4), recipe)
    code, cause, _ = refused(capsys, "import", "diffusers", "latent")
    assert code == 2
    assert "image_channels" in cause


# ------------------------------------------------------------------------------------------------------------------ openai

TINY = replace(SHAPE, attention_resolutions=(8, 4), use_new_attention_order=True)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> UNet:
    """./published.pt, a checkpoint in half precision as torch writes them, of a configuration named tiny."""
    from engines.networks import openai

    monkeypatch.setitem(openai.CONFIGURATIONS, "tiny", openai.Configuration(TINY, 7, "cosine"))
    unet = openai.CONFIGURATIONS["tiny"].build()
    for value in unet.parameters():
        torch.nn.init.normal_(value)
    torch.save(dict(unet.half().state_dict()), "published.pt")  # noqa: TID251 (what others have published)
    return unet.float()


def test_a_published_checkpoint_becomes_the_start_of_a_recipe(published: UNet, capsys: Captured) -> None:
    assert run("import", "openai", "published.pt", "--config", "tiny") == 0
    out = capsys.readouterr().out
    assert "7 classes" in out
    recipe = load('name = "mine"\n' + printed_recipe(out) + GUIDE)
    unet = build_unet(recipe, 7)
    (note,) = load_into(unet, Path("tiny.safetensors"), recipe.diffusion)
    assert "null label" in note
    for name, value in published.state_dict().items():
        assert torch.equal(unet.state_dict()[name][: len(value)], value)
    assert describe(Path("tiny.safetensors")).origin == {
        "format": "openai",
        "config": "tiny",
        "file": "published.pt",
        "sha256": sha256(Path("published.pt")),
    }


def test_import_openai_as_json_names_the_recipes_keys(published: UNet, capsys: Captured) -> None:
    assert run("import", "openai", "published.pt", "--config", "tiny", "--out", "x.safetensors", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sum(value.numel() for value in published.parameters())
    assert found["recipe"]["unet"]["use_new_attention_order"]
    assert found["recipe"]["diffusion"] == {"noise_schedule": "cosine", "steps": 1000}


class Bomb:
    """An object whose unpickling would write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("canary"),)


@pytest.mark.usefixtures("published")
def test_refusals_of_import_openai(capsys: Captured) -> None:
    store.write_text(Path("taken.safetensors"), "mine")
    store.write_bytes(Path("half.pt"), Path("published.pt").read_bytes()[:-5000])
    torch.save({"out.2.weight": Bomb()}, "bomb.pt")  # noqa: TID251 (what others may have published)
    for words, expected, cause, remedy in (
        (("published.pt",), 2, "missing option '--config'", "diffrc import openai --help"),
        (("published.pt", "--config", "imagenet-256"), 2, "imagenet-256", "--config imagenet-256-"),
        (("published.pt", "--config", "imagenet-64-classifier"), 2, "is a classifier", "imagenet-256-uncond"),
        (("published.pt", "--config", "imagenet-64-cond"), 3, "not the weights of imagenet-64-cond", "--config tiny"),
        (("nowhere.pt", "--config", "tiny"), 3, "nowhere.pt", "download"),
        (("half.pt", "--config", "tiny"), 3, "half.pt", "download"),
        (("bomb.pt", "--config", "tiny"), 3, "nothing was run", "download"),
        (("published.pt", "--config", "tiny", "--out", "taken.safetensors"), 2, "taken.safetensors exists already", "--force"),
    ):
        code, told, advice = refused(capsys, "import", "openai", *words)
        assert (code, cause in told, remedy in advice) == (expected, True, True), (told, advice)
    assert not Path("canary").exists()


def test_every_published_network_can_be_the_source_of_a_recipe() -> None:
    from engines.networks.openai import CONFIGURATIONS

    for configuration in CONFIGURATIONS.values():
        card = WeightsCard(architecture=configuration.architecture, out_channels=6, classes=configuration.classes)
        assert recipe_table(card)["unet"]["model_channels"] in (192, 256)


# --------------------------------------------------------------------------------------------------------------- inception


@pytest.fixture
def inception_file(monkeypatch: pytest.MonkeyPatch) -> Path:
    """./inception.pth, such as the published one, of a network of two layers."""
    from engines.networks import inception

    monkeypatch.setattr(inception, "_STEM", (inception.Conv("Conv2d_1a_3x3", 4, (3, 3), 2),))
    monkeypatch.setattr(inception, "_BLOCKS", {"Mixed_7c": ((inception.Conv("branch1x1", 8),),)})
    monkeypatch.setattr(inception, "FEATURES", 8)
    last = {"fc.weight": torch.zeros(1008, 8), "fc.bias": torch.zeros(1008)}
    torch.save({**inception.Inception().state_dict(), **last}, "inception.pth")  # noqa: TID251 (what others have published)
    return Path("inception.pth")


def test_an_inception_file_is_imported_and_only_the_published_one_is_called_fid(
    inception_file: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engines.networks import inception

    assert run("import", "inception", inception_file) == 0
    captured = capsys.readouterr()
    assert "diffrc evaluate --features inception-2015-12-05.safetensors" in captured.out
    assert "no FID" in captured.err
    monkeypatch.setattr(inception, "PUBLISHED_SHA256", sha256(inception_file)[:8])
    assert run("import", "inception", inception_file, "--out", "i.safetensors", "--json") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err == ""
    assert found["is_fid"]
    assert found["origin"] == {"file": "inception.pth", "sha256": sha256(inception_file)}
    assert inception.load(Path("i.safetensors"))[1].is_fid


@pytest.mark.usefixtures("inception_file")
def test_refusals_of_import_inception(capsys: Captured) -> None:
    torch.save({"out.2.weight": Bomb()}, "bomb.pth")  # noqa: TID251 (what others may have published)
    torch.save({"out.2.weight": torch.zeros(2)}, "other.pth")  # noqa: TID251 (what others have published)
    for name, expected, cause in (
        ("nowhere.pth", 3, "cannot read"),
        ("bomb.pth", 3, "nothing was run"),
        ("other.pth", 3, "is not the Inception-v3 of FID"),
    ):
        code, told, advice = refused(capsys, "import", "inception", name)
        assert (code, cause in told, "pytorch-fid" in advice) == (expected, True, True), (told, advice)
    assert not Path("canary").exists()


# ------------------------------------------------------------------------------------------------------- export --diffusers


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch, tiny_settings: tuple[str, ...]) -> Callable[..., dict[str, UNet]]:
    """wide(labels="false") makes ./runs/digits-lt of a recipe that fits diffusers, and says that its U-Nets are trained: random ones."""

    def make(labels: str = "true") -> dict[str, UNet]:
        text, settings = embedded()["digits-lt"].read_text(encoding="utf-8"), (*tiny_settings, *WIDE, f"unet.class_cond={labels}")
        run = store.create_run(Path("runs/digits-lt"), load(text, settings))
        networks = {model: build_unet(run.recipe, 10).eval() for model in ("source", "target")}
        for value in (value for network in networks.values() for value in network.parameters()):
            torch.nn.init.normal_(value)
        monkeypatch.setattr("engines.training.stages.load_unet", lambda _run, model: networks[model])
        return networks

    return make


Wide = Callable[..., dict[str, UNet]]


@pytest.mark.parametrize("labels", ["true", "false"])
def test_an_exported_folder_comes_back_with_every_weight(labels: str, wide: Wide, capsys: Captured) -> None:
    target = wide(labels)["target"]
    assert run("export", "--diffusers", "out") == 0
    out = capsys.readouterr().out
    assert ("subfolder='unet'" in out) == (labels == "true"), "what to type in Python"
    weights, card = read(Path("out"))
    assert all(torch.equal(weights[name], value) for name, value in target.state_dict().items())
    assert (card.classes, card.noise_schedule) == (10 if labels == "true" else 0, "cosine")


def test_export_takes_the_model_that_is_named_and_tells_the_files_as_json(wide: Wide, capsys: Captured) -> None:
    source = wide()["source"]
    assert run("export", "--diffusers", "out", "--model", "source", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "source"
    assert all(Path(file).is_file() for file in found["files"])
    assert torch.equal(read(Path("out"))[0]["input_blocks.0.0.weight"], source.state_dict()["input_blocks.0.0.weight"])


def test_a_full_folder_is_written_to_with_force_and_keeps_what_else_is_there(wide: Wide, capsys: Captured) -> None:
    wide()
    store.write_text(Path("full/mine.txt"), "mine")
    store.write_text(Path("file"), "mine")
    for words, cause, remedy in (
        (("--diffusers", "full"), "full is not empty", "--force"),
        (("--diffusers", "file"), "file is a file", "--diffusers DIR"),
        (("--force",), "--force goes with --diffusers", "diffrc export"),
    ):
        code, told, advice = refused(capsys, "export", *words)
        assert (code, cause in told, remedy in advice) == (2, True, True), told
    assert run("export", "--diffusers", "full", "--force") == 0
    assert Path("full/mine.txt").read_text() == "mine"
    assert read(Path("full"))[1].classes == 10


def test_a_network_that_diffusers_cannot_hold_is_refused_by_the_recipes_key(tiny_copy: Path, capsys: Captured) -> None:
    code, cause, remedy = refused(capsys, "export", "--run", tiny_copy, "--diffusers", "out")
    assert code == 2
    assert "unet.model_channels = 16 makes widths of [16], no multiples of 32" in cause
    assert "without --diffusers" in remedy


def test_neither_way_imports_diffusers(folder: Path, wide: Wide, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # an import would fail
    wide()
    assert run("import", "diffusers", folder) == 0
    assert run("export", "--diffusers", "out") == 0
