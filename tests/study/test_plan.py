"""Studies as data: the embedded ones resolve, an arm changes what it says and nothing else, and mistakes are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffrc_cli.recipe import resolve
from diffrc_cli.study import studies
from engines.errors import UsageError
from engines.evaluation.accuracy import COLUMNS
from engines.recipe import differences
from engines.study.plan import Study, is_study, load, read, resolve_arms

FILES = sorted(studies())
KEPT = sorted((Path(__file__).parent.parent.parent / "docs" / "results").glob("*.toml"))
SMALL = """
name = "small"
title = "A small one"
recipe = "digits-lt"
against = ["real"]

[[arms]]
name = "real"
title = "real"
images = "real"

[[arms]]
name = "ours"
title = "ours"
set = ["target.lambda_pair=0.7"]

[[sweeps]]
name = "s"
title = "s"
key = "synth.guidance_scale"
values = [0.2, 1.0]
set = ["synth.scale_rule=fixed"]
"""


def embedded_study(name: str) -> Study:
    return load(studies()[name].read_text(encoding="utf-8"), name)


@pytest.mark.parametrize("name", FILES)
def test_an_embedded_study_is_named_as_its_file_and_every_arm_has_a_valid_recipe(name: str) -> None:
    study = embedded_study(name)
    assert study.name == name
    for arm in resolve_arms(study, resolve):
        assert set(arm.paper) <= set(COLUMNS)


@pytest.mark.parametrize("name", FILES)
def test_the_first_lines_of_a_study_are_a_command_that_names_it_or_its_recipe_and_what_it_costs(name: str) -> None:
    text = studies()[name].read_text(encoding="utf-8")
    command, cost = text.splitlines()[:2]
    assert command.startswith(f"# Command: diffrc study {'digits-lt' if name == 'controls' else name}")
    assert cost.startswith("# Cost: ")


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_study_whose_results_are_kept_can_be_done_again(path: Path) -> None:
    study = read(path)
    assert study.name == path.stem
    assert path.read_text(encoding="utf-8").startswith(f"# Command: diffrc study docs/results/{path.name}")
    assert len(resolve_arms(study, resolve)) == len(study.rows())


def test_the_papers_tables_hold_the_papers_figures() -> None:
    paper = {arm.name: arm.paper for name in ("table1", "table2", "table3") for arm in embedded_study(name).rows()}
    assert paper["cifar10-100-softmax"] == {"all": 70.5}
    assert paper["cifar10-100-diffrc"] == {"all": 82.8}
    assert paper["cifar100-10-diffrc"] == {"all": 65.2}
    assert paper["diffrc-200"] == {"many": 66.4, "medium": 53.4, "few": 35.9, "all": 55.4}
    assert paper["both"] == {"many": 64.3, "medium": 52.1, "few": 32.5, "std": 13.0, "all": 54.1}


def test_an_arm_changes_what_it_sets_and_nothing_else() -> None:
    study = embedded_study("controls")
    for arm in resolve_arms(study, resolve):
        changed = {key for key, _, _ in differences(resolve("digits-lt", study.set), arm.recipe)}
        assert changed <= {change.partition("=")[0] for change in arm.changes}, arm.name


def test_of_the_four_ways_to_make_images_each_differs_from_the_papers_in_what_its_name_says() -> None:
    arms = {arm.name: arm.recipe for arm in resolve_arms(embedded_study("controls"), resolve)}
    assert arms["paper"].target.lambda_pair == 0.5
    assert not arms["paper"].unet.class_cond
    for name in ("plain", "free"):
        assert arms[name].target.lambda_pair == 0.0, "no pair-wise diversity loss"
    assert (arms["plain"].guide.class_prior, arms["plain"].synth.gradient_norm, arms["plain"].synth.step_unit) == (
        False,
        "none",
        "variance",
    )
    assert (arms["free"].unet.class_cond, arms["free"].synth.guidance_scale) == (True, 0.0)
    assert arms["free"].synth.classifier_free_scale > 0


def test_a_sweep_is_an_arm_for_each_value() -> None:
    arms = {arm.name: arm for arm in resolve_arms(load(SMALL), resolve)}
    assert list(arms) == ["real", "ours", "s-0.2", "s-1"]
    assert arms["s-0.2"].recipe.synth.guidance_scale == 0.2
    assert {arm.recipe.synth.scale_rule for name, arm in arms.items() if name.startswith("s-")} == {"fixed"}
    assert [arm.recipe.target.lambda_pair for arm in resolve_arms(embedded_study("fig3"), resolve) if arm.name.startswith("lambda")] == [
        0.1,
        0.3,
        0.5,
        0.7,
        0.9,
    ]


def test_what_a_person_sets_holds_for_every_arm_but_where_the_arm_is_about_it() -> None:
    set_by_hand = ("target.lambda_pair=0.1", "synth.steps=20")
    arms = {arm.name: arm.recipe for arm in resolve_arms(load(SMALL), resolve, overrides=set_by_hand)}
    assert {arm.synth.steps for arm in arms.values()} == {20}
    assert (arms["real"].target.lambda_pair, arms["ours"].target.lambda_pair) == (0.1, 0.7)


def test_a_seed_changes_networks_and_noise_and_nothing_else() -> None:
    arm = resolve_arms(load(SMALL), resolve)[0]
    assert [key for key, _, _ in differences(arm.seeded(0), arm.recipe)] == []
    assert [key for key, _, _ in differences(arm.seeded(3), arm.recipe)] == ["seed", "synth.seed"]


def test_another_recipe_is_refused_where_the_arms_have_their_own() -> None:
    with pytest.raises(UsageError, match="recipes of their own"):
        resolve_arms(embedded_study("table1"), resolve, "digits-lt")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("against = ", "versus = "), "versus"),
        (('against = ["real"]', 'against = ["reel"]'), "'reel', which is no arm"),
        (('name = "ours"', 'name = "real"'), "more than one arm is named 'real'"),
        (('images = "real"', 'images = "unreal"'), "images"),
        (("values = [0.2, 1.0]", "values = [0.2]"), "values"),
        (("[[arms]]", "[[arms"), "not valid TOML"),
    ],
    ids=["key", "against", "twice", "images", "values", "toml"],
)
def test_a_mistake_in_a_study_is_told(change: tuple[str, str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        load(SMALL.replace(*change))


def test_a_file_with_arms_is_a_study_and_one_without_is_a_recipe(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "study.toml").write_text(SMALL)
    (tmp_path / "recipe.toml").write_text('name = "mine"\n')
    assert is_study(tmp_path / "study.toml")
    assert not is_study(tmp_path / "recipe.toml")
    assert read(tmp_path / "study.toml") == load(SMALL)
    with pytest.raises(UsageError, match="cannot read"):
        read(tmp_path / "nothing.toml")
