"""engines/networks/pretrained.py: what a recipe's U-Net takes from a file of weights, what is settled, what is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import store
from engines.errors import DataError, UsageError
from engines.networks.pretrained import METADATA_KEY, WeightsCard, describe, load_into, recipe_table, sha256, toml_value, write
from engines.networks.unet import Architecture, UNet
from engines.recipe import DiffusionSection, load
from engines.training.diffusion import architecture

TINY = Architecture(
    image_size_px=8,
    in_channels=1,
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_head_channels=16,
)


def saved(path: Path, shape: Architecture = TINY, classes: int = 0, null_label: bool = False, **card: Any) -> dict[str, Tensor]:
    """A file of random weights: an unconditional network with a learned variance unless said otherwise."""
    torch.manual_seed(1)
    out_channels = card.pop("out_channels", 2 * shape.in_channels)
    unet = UNet(shape, out_channels, classes + null_label)
    with torch.no_grad():
        for value in unet.parameters():
            value.normal_()
    weights = dict(unet.state_dict())
    write(path, weights, WeightsCard(architecture=shape, out_channels=out_channels, classes=classes, null_label=null_label, **card))
    return weights


def refusal(unet: UNet, path: Path, diffusion: DiffusionSection | None = None) -> str:
    """The problem, and that no weight was touched."""
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with pytest.raises((UsageError, DataError)) as error:
        load_into(unet, path, diffusion)
    assert all(torch.equal(before[name], value) for name, value in unet.state_dict().items())
    assert error.value.remedy
    assert "\n" not in error.value.problem
    return error.value.problem


def test_the_same_network_takes_every_weight_and_says_nothing(tmp_path: Path) -> None:
    weights = saved(tmp_path / "a.safetensors")
    unet = UNet(TINY, 2)
    assert load_into(unet, tmp_path / "a.safetensors") == []
    assert all(torch.equal(weights[name], value) for name, value in unet.state_dict().items())


def test_a_card_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    saved(path, classes=3, null_label=True, noise_schedule="cosine", diffusion_steps=1000, origin={"format": "x", "sha256": "0"})
    card = describe(path)
    assert (card.architecture, card.classes, card.label_rows, card.learn_sigma) == (TINY, 3, 4, True)
    assert (card.noise_schedule, card.diffusion_steps, card.origin) == ("cosine", 1000, {"format": "x", "sha256": "0"})
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_dropout_may_differ_and_the_recipes_counts(tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors", replace(TINY, dropout=0.3))
    unet = UNet(TINY, 2)
    assert load_into(unet, tmp_path / "a.safetensors") == []
    assert {module.p for module in unet.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"model_channels": 32}, "unet.model_channels = 32 in the file, 16 in the recipe"),
        ({"channel_mult": (1, 3)}, "unet.channel_mult = [1, 3] in the file, [1, 2] in the recipe"),
        ({"num_res_blocks": 2}, "unet.num_res_blocks = 2 in the file, 1 in the recipe"),
        ({"attention_resolutions": (8, 4)}, "unet.attention_resolutions = [8, 4] in the file, [4] in the recipe"),
        ({"num_head_channels": 8}, "unet.num_head_channels = 8 in the file, 16 in the recipe"),
        ({"num_heads": 1}, "unet.num_heads = 1 in the file, 0 in the recipe"),
        ({"resblock_updown": False}, "unet.resblock_updown = false in the file, true in the recipe"),
        ({"use_scale_shift_norm": False}, "unet.use_scale_shift_norm = false in the file, true in the recipe"),
        ({"use_new_attention_order": True}, "unet.use_new_attention_order = true in the file, false in the recipe"),
        ({"in_channels": 3}, "data.image_channels = 3 in the file, 1 in the recipe"),
        ({"image_size_px": 16}, "unet.attention_resolutions = [] in the file, [4] in the recipe"),
    ],
)
def test_another_network_is_refused_by_the_recipes_key_and_both_values(theirs: dict[str, Any], words: str, tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors", replace(TINY, **theirs))
    assert words in refusal(UNet(TINY, 2), tmp_path / "a.safetensors")


def test_all_keys_that_differ_are_told_at_once(tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors", replace(TINY, model_channels=32, num_res_blocks=2), classes=3, noise_schedule="cosine")
    problem = refusal(UNet(TINY, 1), tmp_path / "a.safetensors", DiffusionSection())
    for words in (
        "unet.model_channels = 32",
        "unet.num_res_blocks = 2",
        "unet.learn_sigma = true in the file, false in the recipe",
        "unet.class_cond = true in the file, false in the recipe",
        'diffusion.noise_schedule = "cosine" in the file, "linear" in the recipe',
    ):
        assert words in problem


def test_settings_that_make_the_same_network_are_no_difference(tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors", replace(TINY, num_heads=2, attention_resolutions=(4, 4), conv_resample=False))
    assert load_into(UNet(TINY, 2), tmp_path / "a.safetensors") == [], "32 channels are two heads of 16; residual blocks resample"


def test_another_image_size_with_attention_on_the_same_level_is_taken_and_noted(tmp_path: Path) -> None:
    weights = saved(tmp_path / "a.safetensors", replace(TINY, image_size_px=32, attention_resolutions=(16,)))
    unet = UNet(TINY, 2)
    assert load_into(unet, tmp_path / "a.safetensors") == ["the pre-trained weights are for images of 32 px, the recipe has 8 px"]
    assert all(torch.equal(weights[name], value) for name, value in unet.state_dict().items())


def test_a_network_without_labels_starts_a_labeled_one_as_it_is(tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors")
    labeled, plain = UNet(TINY, 2, classes=4).eval(), UNet(TINY, 2).eval()
    (note,) = load_into(labeled, tmp_path / "a.safetensors")
    assert "no labels: the label table starts with zeros" in note
    load_into(plain, tmp_path / "a.safetensors")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    with torch.no_grad():
        assert torch.equal(labeled(x, t, torch.tensor([0, 3])), plain(x, t))


def test_a_missing_null_label_becomes_the_mean_of_the_classes(tmp_path: Path) -> None:
    rows = saved(tmp_path / "a.safetensors", classes=3)["label_emb.weight"]
    unet = UNet(TINY, 2, classes=4)
    (note,) = load_into(unet, tmp_path / "a.safetensors")
    assert "null label" in note
    assert torch.equal(unet.label_emb.weight[:3], rows)
    assert torch.allclose(unet.label_emb.weight[3], rows.mean(0))


def test_labels_with_a_null_label_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = saved(tmp_path / "a.safetensors", classes=3, null_label=True)["label_emb.weight"]
    unet = UNet(TINY, 2, classes=4)
    assert load_into(unet, tmp_path / "a.safetensors") == []
    assert torch.equal(unet.label_emb.weight, rows)


@pytest.mark.parametrize(("classes", "null_label"), [(5, False), (5, True), (4, False)])
def test_labels_of_other_classes_start_as_the_mean_of_theirs(classes: int, null_label: bool, tmp_path: Path) -> None:
    rows = saved(tmp_path / "a.safetensors", classes=classes, null_label=null_label)["label_emb.weight"][:classes]
    unet = UNet(TINY, 2, classes=4)  # three and the null label: four rows in the file are four classes, not these
    (note,) = load_into(unet, tmp_path / "a.safetensors")
    assert f"know {classes} classes, the recipe 3" in note
    assert torch.allclose(unet.label_emb.weight, rows.mean(0).expand(4, -1))


def test_a_process_that_the_file_does_not_know_is_taken_from_the_recipe_and_noted(tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors")
    (note,) = load_into(UNet(TINY, 2), tmp_path / "a.safetensors", DiffusionSection())
    assert "do not say which noise schedule" in note
    saved(tmp_path / "b.safetensors", noise_schedule="linear", diffusion_steps=1000)
    assert load_into(UNet(TINY, 2), tmp_path / "b.safetensors", DiffusionSection()) == []
    assert "diffusion.steps = 1000 in the file, 50 in the recipe" in refusal(
        UNet(TINY, 2), tmp_path / "b.safetensors", DiffusionSection(steps=50)
    )


# ------------------------------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize(
    "damage", ["missing", "folder", "empty", "truncated", "torch", "other", "card", "sizes", "future", "parameter", "shape"]
)
def test_a_file_that_cannot_be_used_is_refused_with_a_remedy(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    weights = saved(path)
    card = describe(path)
    if damage in ("missing", "folder"):
        path.unlink()
        if damage == "folder":
            path.mkdir()
    elif damage in ("empty", "truncated", "torch"):
        store.write_bytes(path, {"empty": b"", "truncated": path.read_bytes()[:-1000], "torch": b"PK\x03\x04" + b"0" * 64}[damage])
    else:
        text = card.model_dump_json()
        info = {"card": "{}", "sizes": text.replace("16", "0"), "future": json.dumps({**json.loads(text), "gates": 3})}.get(damage, text)
        if damage == "parameter":
            del weights["out.2.bias"]
        elif damage == "shape":
            weights["out.2.bias"] = torch.zeros(3)
        store.write_tensors(path, weights, {} if damage == "other" else {METADATA_KEY: info})
    problem = refusal(UNet(TINY, 2), path)
    words = {
        "torch": "is a torch checkpoint",
        "other": "was not written by diffrc import",
        "sizes": "no sizes of a network",
        "future": "gates",
        "shape": "out.2.bias",
    }
    assert words.get(damage, str(path)) in problem


def test_values_that_are_not_finite_are_neither_written_nor_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    weights = saved(path)
    raw = path.read_bytes()
    store.write_bytes(path, raw[:-4] + b"\x00\x00\xc0\x7f")  # the last value becomes a NaN
    with pytest.raises(DataError, match="not finite"):
        load_into(UNet(TINY, 2), path)
    weights["out.2.bias"].fill_(float("inf"))
    with pytest.raises(DataError, match=r"out\.2\.bias"):
        write(tmp_path / "b.safetensors", weights, WeightsCard(architecture=TINY, out_channels=2, classes=0))
    assert not (tmp_path / "b.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("shape", "classes"),
    [
        (replace(TINY, channel_mult=(1.0, 2.0)), 0),
        (replace(TINY, num_heads=2, image_size_px=64, attention_resolutions=(32,), in_channels=3), 3),
        (replace(TINY, resblock_updown=False, conv_resample=False, use_new_attention_order=True), 0),
    ],
)
def test_a_recipe_with_the_keys_of_a_file_has_its_network(shape: Architecture, classes: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    saved(path, shape, classes, noise_schedule="cosine", diffusion_steps=500)
    sections = recipe_table(describe(path)) | {"guide": {"channel_mult": [1], "attention_resolutions": []}}
    text = "".join(
        f"[{name}]\n" + "".join(f"{key} = {toml_value(value)}\n" for key, value in keys.items()) for name, keys in sections.items()
    )
    recipe = load('name = "mine"\n' + text)
    assert (recipe.diffusion.noise_schedule, recipe.diffusion.steps) == ("cosine", 500)
    unet = UNet(architecture(recipe, recipe.unet), 2 * recipe.data.image_channels, 4 if recipe.unet.class_cond else 0)
    notes = load_into(unet, path, recipe.diffusion)
    assert len(notes) == bool(classes), "the null label"


def test_a_network_that_no_recipe_describes_is_refused() -> None:
    with pytest.raises(UsageError, match="image_channels"):
        recipe_table(WeightsCard(architecture=replace(TINY, in_channels=4), out_channels=4, classes=0))
