"""recipes/*.toml: each loads, says in its first lines what it costs and gave, and holds the figures of its source."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from diffrc_cli.recipe import HEADER_KEYS, embedded, header_of
from engines.networks.openai import CONFIGURATIONS
from engines.recipe import Recipe, differences, load
from engines.training.diffusion import architecture

FILES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))
CIFAR_LT = {  # data set, imbalance -> images, as published with the data sets
    ("cifar10", 100): 12_406,
    ("cifar10", 50): 13_996,
    ("cifar10", 10): 20_431,
    ("cifar100", 100): 10_847,
    ("cifar100", 50): 12_608,
    ("cifar100", 10): 19_573,
}
FAST = ("cifar10-lt-100",)  # recipes with a neighbor of few steps
STRONG = ("cifar10-lt-100", "cifar100-lt-100")  # and with one of strongly augmented recognizers


def recipe_of(name: str) -> Recipe:
    return load(embedded()[name].read_text(encoding="utf-8"))


def test_the_recipes_of_the_project_are_all_there() -> None:
    cifar = {f"{data}-lt-{imbalance}" for data, imbalance in CIFAR_LT}
    neighbors = {f"{name}-fast" for name in FAST} | {f"{name}-strong" for name in STRONG}
    assert set(embedded()) == {"digits-lt", "imagenet-lt-64", "imagenet-lt-256", "folder"} | cifar | neighbors


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_named_as_its_file(path: Path) -> None:
    assert load(path.read_text(encoding="utf-8"), origin=path.name).name == path.stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_first_lines_say_the_command_the_cost_and_what_was_measured(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert [line[1:].partition(":")[0].strip() for line in text.splitlines()[:3]] == list(HEADER_KEYS)
    header = header_of(text)
    assert re.match(rf"diffrc run {re.escape(path.stem)}( |$)", header["Command"])
    assert header["Cost"]
    assert header["Measured"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_sets_no_key_twice_and_leaves_no_section_empty(path: Path) -> None:
    table = tomllib.loads(path.read_text(encoding="utf-8"))  # TOML itself refuses a key set twice
    assert [key for key, value in table.items() if value == {}] == []


@pytest.mark.parametrize(("data", "imbalance"), CIFAR_LT)
def test_a_cifar_recipe_states_the_images_that_its_profile_keeps(data: str, imbalance: int) -> None:
    name = f"{data}-lt-{imbalance}"
    recipe = recipe_of(name)
    classes, largest = (10, 5000) if data == "cifar10" else (100, 500)
    counts = [int(largest * recipe.data.imbalance ** (-i / (classes - 1))) for i in range(classes)]
    assert (recipe.data.source, recipe.data.imbalance) == (data, imbalance)
    assert sum(counts) == CIFAR_LT[data, imbalance]
    assert f"{sum(counts):,} training images, {counts[0]} to {counts[-1]} a class" in embedded()[name].read_text(encoding="utf-8")


@pytest.mark.parametrize(("data", "imbalance"), CIFAR_LT)
def test_no_group_of_a_cifar_recipe_is_empty(data: str, imbalance: int) -> None:
    settings = recipe_of(f"{data}-lt-{imbalance}").data
    classes, largest = (10, 5000) if data == "cifar10" else (100, 500)
    counts = [int(largest * imbalance ** (-i / (classes - 1))) for i in range(classes)]
    if settings.groups == "ranks":
        assert sum(settings.group_sizes) == classes
        assert min(settings.group_sizes) > 0
    else:
        many = sum(n > settings.many_above for n in counts)
        few = sum(n < settings.few_below for n in counts)
        assert min(many, few, classes - many - few) > 0


@pytest.mark.parametrize("name", [f"{data}-lt-{imbalance}" for data, imbalance in CIFAR_LT] + ["imagenet-lt-64", "imagenet-lt-256"])
def test_the_papers_values_are_the_papers(name: str) -> None:
    recipe = recipe_of(name)
    assert (recipe.target.gamma, recipe.target.lambda_pair) == (0.1, 0.5)
    assert (recipe.guide.tau, recipe.guide.prototype_momentum, recipe.guide.embedding_dim) == (0.07, 0.999, 128)
    assert (recipe.diffusion.steps, recipe.synth.steps, recipe.synth.sampler, recipe.synth.guidance_scale) == (1000, 250, "ddpm", 0.2)
    assert not recipe.unet.class_cond
    assert recipe.recognizer.batch_size == (256 if name.startswith("cifar") else 512)
    assert recipe.recognizer.momentum == 0.9


LITERATURE = {  # of long-tailed diffusion on CIFAR (CBDM's settings)
    "unet": {"model_channels": 128, "channel_mult": (1, 2, 2, 2), "num_res_blocks": 2, "attention_resolutions": (16,), "dropout": 0.1},
    "diffusion": {"steps": 1000, "noise_schedule": "linear"},
    "source": {"lr": 2e-4, "weight_decay": 0.0, "warmup_steps": 5000, "ema_decay": 0.9999, "grad_clip": 1.0, "horizontal_flip": True}
    | {"batch_size": 64, "train_steps": 300_000, "lr_decay": "none"},
}


@pytest.mark.parametrize(("data", "imbalance"), CIFAR_LT)
def test_a_cifar_recipe_trains_its_source_as_the_long_tail_literature_does(data: str, imbalance: int) -> None:
    recipe = recipe_of(f"{data}-lt-{imbalance}")
    for section, values in LITERATURE.items():
        assert {key: getattr(getattr(recipe, section), key) for key in values} == values


@pytest.mark.parametrize("name", FAST)
def test_a_fast_recipe_is_its_neighbor_with_another_sampler_steps_and_scale(name: str) -> None:
    usual, fast = recipe_of(name), recipe_of(f"{name}-fast")
    differing = {key for key, _, _ in differences(usual, fast)}
    assert {"name", "synth.sampler", "synth.steps"} <= differing <= {"name", "synth.sampler", "synth.steps", "synth.guidance_scale"}
    assert fast.synth.steps in range(10, 51)
    assert fast.synth.sampler == "dpmpp_2m"


@pytest.mark.parametrize("name", STRONG)
def test_a_strong_recipe_is_its_neighbor_with_other_recognizers_of_200_epochs(name: str) -> None:
    usual, strong = recipe_of(name), recipe_of(f"{name}-strong")
    differing = {key for key, _, _ in differences(usual, strong)} - {"name"}
    assert differing and all(key.startswith("recognizer.") for key in differing)
    images = CIFAR_LT[("cifar10" if name.startswith("cifar10-") else "cifar100"), 100]
    settings = strong.recognizer
    assert settings.train_steps == 200 * images // settings.batch_size
    assert settings.warmup_steps == 5 * images // settings.batch_size
    assert (settings.policy, settings.cutout_px, settings.weight_decay) == ("autoaugment-cifar10", 16, 5e-4)


@pytest.mark.parametrize("name", ["imagenet-lt-64", "imagenet-lt-256"])
def test_the_recognizers_of_imagenet_lt_are_the_papers(name: str) -> None:
    settings = recipe_of(name).recognizer
    assert settings.train_steps == 90 * 115_846 // 512  # 90 epochs
    assert f"200 are {200 * 115_846 // 512}" in embedded()[name].read_text(encoding="utf-8")
    assert (settings.architecture, settings.batch_size, settings.lr, settings.weight_decay) == ("resnext50", 512, 0.2, 5e-4)
    assert (settings.schedule, settings.warmup_steps, settings.color_jitter) == ("cosine", 0, 0.4)


@pytest.mark.parametrize("name", [path.stem for path in FILES if not path.stem.startswith("digits-lt")])
def test_adaptation_stops_on_held_out_images_and_what_is_out_of_distribution_is_not_kept(name: str) -> None:
    recipe = recipe_of(name)
    assert recipe.target.holdout_fraction == 0.1
    assert 0 < recipe.target.patience * recipe.target.holdout_every_steps < recipe.target.train_steps
    assert recipe.select.distance_band == 2.0
    assert recipe.select.max_tries > 1


PUBLISHED = {  # the flags of the published ImageNet models, the labels of the 64 px one left out
    "imagenet-lt-64": {"model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3, "dropout": 0.1}
    | {"use_new_attention_order": True},
    "imagenet-lt-256": {"model_channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2, "dropout": 0.0}
    | {"use_new_attention_order": False},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_imagenet_recipe_has_the_published_network(name: str) -> None:
    recipe = recipe_of(name)
    shared = {"attention_resolutions": (32, 16, 8), "num_head_channels": 64, "num_heads": 0, "resblock_updown": True}
    values = PUBLISHED[name] | shared | {"use_scale_shift_norm": True, "learn_sigma": True}
    assert {key: getattr(recipe.unet, key) for key in values} == values
    assert recipe.diffusion.noise_schedule == {64: "cosine", 256: "linear"}[recipe.data.image_size_px]


@pytest.mark.parametrize(("name", "configuration"), [("imagenet-lt-64", "imagenet-64-cond"), ("imagenet-lt-256", "imagenet-256-uncond")])
def test_the_settings_that_a_comment_names_take_the_published_weights(name: str, configuration: str) -> None:
    text = embedded()[name].read_text(encoding="utf-8")
    settings = re.findall(r"--set (\S+)", text.partition("[source]")[2])
    recipe = load(text, settings)
    published = CONFIGURATIONS[configuration]
    assert f"--config {configuration}\n" in text
    assert recipe.source.pretrained == f"{configuration}.safetensors"
    assert recipe.source.train_steps == 0
    assert architecture(recipe, recipe.unet) == published.architecture
    assert recipe.unet.class_cond == bool(published.classes)
    assert recipe.diffusion.noise_schedule == published.noise_schedule


def test_a_mirrored_digit_is_never_trained_on() -> None:
    recipe = recipe_of("digits-lt")
    assert not any(stage.horizontal_flip for stage in (recipe.source, recipe.target, recipe.guide, recipe.recognizer))
