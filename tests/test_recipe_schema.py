"""engines/recipe.py: what a recipe accepts, how it refuses, and that it survives being written and read."""

from __future__ import annotations

import contextlib
import math
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from engines.errors import UsageError
from engines.recipe import MAX_RECIPE_BYTES, Recipe, Section, differences, digest, load, read, to_toml

# Keys that hang together: the generated recipes leave them at their defaults.
STRUCTURE = {
    "architecture",
    "cutout_px",
    "image_size_px",
    "channel_mult",
    "model_channels",
    "attention_resolutions",
    "num_head_channels",
    "batch_size",
    "group_size",
    "max_batch",
    "steps",
    "guidance_interval",
    "many_above",
    "few_below",
    "classifier_free_scale",
    "compile",
    "accumulate",
    "guidance_scale",
    "guidance_scale_max",
    "holdout_fraction",
    "init_from",
    "novelty_band",
    "num_heads",
    "patience",
    "strength",
    "train_steps",
    "use_scale_shift_norm",
}


def sections() -> dict[str, type[Section]]:
    return {name: field.annotation for name, field in Recipe.model_fields.items() if isinstance(field.annotation, type(Section))}


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """(section.key, field) of every key."""
    for section, model in sections().items():
        for name, field in model.model_fields.items():
            yield f"{section}.{name}", field


def bounds(metadata: list[Any]) -> tuple[float, float]:
    """The closed interval of a number."""
    low, high = -math.inf, math.inf
    for limit in metadata:
        low = max(low, getattr(limit, "ge", -math.inf), getattr(limit, "gt", -math.inf))
        high = min(high, getattr(limit, "le", math.inf), getattr(limit, "lt", math.inf))
    return low, high


def values_of(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Valid values of a field."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        inner = [item for field in arguments[1:] for item in (field.metadata if isinstance(field, FieldInfo) else [field])]
        return values_of(arguments[0], [*metadata, *inner])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is ...:
        return st.lists(values_of(arguments[0], []), min_size=1, max_size=4, unique=typing.get_origin(arguments[0]) is Literal).map(tuple)
    if origin is tuple:
        return st.tuples(*(values_of(argument, []) for argument in arguments))
    low, high = bounds(metadata)
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        open_ended = any(hasattr(limit, "lt") for limit in metadata)
        return st.integers(int(low), int(high) - open_ended)
    if annotation is float:
        return st.floats(max(low, -1e300), min(high, 1e300), exclude_min=any(hasattr(m, "gt") for m in metadata), exclude_max=high == 1 and
                         any(hasattr(m, "lt") for m in metadata))  # fmt: skip
    assert annotation is str
    return st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe's table with any of its independent keys set."""
    table: dict[str, Any] = {
        "name": draw(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)),
        "seed": draw(st.integers(0, 2**63 - 1)),
    }
    for section, model in sections().items():
        free = {name: field for name, field in model.model_fields.items() if name not in STRUCTURE}
        for name in draw(st.sets(st.sampled_from(sorted(free)))):
            table.setdefault(section, {})[name] = draw(values_of(free[name].annotation, free[name].metadata))
    return table


@settings(max_examples=100, deadline=None)
@given(tables())
@example({"name": "x", "data": {"path": 'a"b\\c\x7f\n\t\x1b\u2028é'}})
def test_what_is_written_as_toml_is_read_back_equal(table: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(table)
    again = load(to_toml(recipe))
    assert again == recipe
    assert digest(again) == digest(recipe)
    assert differences(recipe, again) == []


@settings(max_examples=40, deadline=None)
@given(tables(), tables())
def test_digests_are_equal_exactly_when_no_key_differs(a: dict[str, Any], b: dict[str, Any]) -> None:
    left, right = Recipe.model_validate(a), Recipe.model_validate(b)
    assert (digest(left) == digest(right)) == (differences(left, right) == [])


def test_a_difference_names_the_key_and_both_values() -> None:
    a, b = load('name = "a"'), load('name = "a"', ["unet.channel_mult=[1, 2]", "synth.seed=7"])
    assert differences(a, b) == [("unet.channel_mult", [1, 2, 2, 2], [1, 2]), ("synth.seed", 0, 7)]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200), st.lists(st.text(max_size=40), max_size=3))
@example("a = " + "[" * 3000, [])
@example("a = " + "9" * 5000, [])
@example("", ["name=" + "[" * 3000, "a..b=1", "=", "seed=" + "9" * 5000])
@example("data = 3", ["data.path=x"])
@example("[[data]]", ["data.path=x"])
@example("", ["name=\udc80"])
def test_any_text_is_a_recipe_or_a_usage_error(text: str, overrides: list[str]) -> None:
    with contextlib.suppress(UsageError):
        assert isinstance(load(text, overrides), Recipe)


NUMBERS = [(key, field) for key, field in fields() if field.annotation in (int, float)]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "-1e-9", "1" + "0" * 400, '"3"', "true"])
def test_no_number_of_a_recipe_takes_a_value_out_of_range_or_of_another_type(value: str) -> None:
    for key, _ in NUMBERS:
        with pytest.raises(UsageError) as failure:
            load('name = "x"', [f"{key}={value}"])
        assert key in failure.value.problem


def test_a_float_is_no_count() -> None:
    for key in (key for key, field in NUMBERS if field.annotation is int):
        with pytest.raises(UsageError, match=key):
            load('name = "x"', [f"{key}=8.0"])


@pytest.mark.parametrize("value", ["1", '"true"', "True", "yes"])
def test_only_true_and_false_are_booleans(value: str) -> None:
    with pytest.raises(UsageError, match=r"unet\.learn_sigma"):
        load('name = "x"', [f"unet.learn_sigma={value}"])


@pytest.mark.parametrize("steps", [0, -1, 10**9, 10**30])
def test_no_stage_trains_for_zero_or_a_billion_steps(steps: int) -> None:
    for stage in ("source", "target", "guide", "recognizer"):
        with pytest.raises(UsageError, match=f"{stage}.train_steps"):
            load('name = "x"', [f"{stage}.train_steps={steps}"])


@pytest.mark.parametrize("name", ["", "A", "../x", "a/b", "a b", "-x", "x" * 65, "x\n", "\\u0000"])
def test_a_name_is_a_plain_folder_name(name: str) -> None:
    with pytest.raises(UsageError):
        load(f'name = "{name}"'.replace("\n", "\\n"))


def test_all_mistakes_of_a_file_and_of_the_overrides_are_told_at_once() -> None:
    text = 'name = "x"\nsorce = 1\n[data]\nimbalance = "big"\n[target]\nbatch_size = 10\n[unet]\nfoo = 1\n'
    with pytest.raises(UsageError) as failure:
        load(text, ["nonsense", "seed.x=1", "synth.steps=-1"], origin="my.toml")
    problem = failure.value.problem
    assert problem.startswith("7 mistakes in my.toml: ")
    for part in (
        "'nonsense'",
        "seed",
        "'sorce' (did you mean 'source'?)",
        "data.imbalance",
        "batch_size 10 is not",
        "unet.foo",
        "synth.steps",
    ):
        assert part in problem, part


def test_mistakes_across_keys_are_told_at_once_too() -> None:
    with pytest.raises(UsageError) as failure:
        load('name = "x"', ["synth.steps=2000", "synth.batch_size=65", "synth.classifier_free_scale=1", "synth.guidance_interval=[5, 4]"])
    assert all(key in failure.value.problem for key in ("synth.steps", "synth.batch_size", "classifier_free_scale", "guidance_interval"))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.image_size_px=30"], "cannot be halved 3 times"),
        (["unet.attention_resolutions=[7]"], "unet.attention_resolutions 7"),
        (["unet.num_head_channels=48"], "does not divide the 256 channels"),
        (["guide.num_head_channels=128", "guide.attention_resolutions=[32]"], "does not divide the 64 channels at 32 px"),
        (["data.few_below=102"], "data.few_below 102 overlaps"),
        (["target.batch_size=62"], "batch_size 62 is not a multiple of group_size 4"),
        (["target.group_size=2"], "target.group_size: should be 3 or more (of two images a row of Eq. 7 has one entry"),
        (["source.accumulate=3"], "batch_size 64 is not a multiple of accumulate 3"),
        (["target.accumulate=32"], "batch_size 64 / accumulate 32 is not a multiple of group_size 4"),
        (["target.patience=3"], "patience needs a holdout_fraction"),
        (["unet.num_heads=3"], "unet.num_heads 3 does not divide the 256 channels"),
        (["unet.model_channels=32", "unet.num_head_channels=32", "unet.use_scale_shift_norm=false"], "takes the time embedding out again"),
        (["guide.init_from=target"], "needs guide.model_channels = 128"),
        (["guide.init_from=target", "unet.use_new_attention_order=true"], "needs unet.use_new_attention_order = false"),
        (["synth.guidance_scale=1.5"], "exceeds synth.guidance_scale_max 1"),
        (["synth.steps=10,501"], "a section of 500 timesteps cannot give 501"),
        (["synth.steps=ddim999"], "no whole stride through 1000 timesteps gives 999"),
    ],
)
def test_a_network_or_batch_that_cannot_be_built_is_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(UsageError) as failure:
        load('name = "x"', overrides)
    assert told in failure.value.problem


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("source.train_step", "'train_steps'"),
        ("synth.guidence_scale", "'guidance_scale'"),
        ("recogniser", "'recognizer'"),
        ("tau", "'guide.tau'"),
        ("source.steps", "'source.train_steps' or 'diffusion.steps' or 'synth.steps'"),
    ],
)
def test_an_unknown_key_names_the_right_one(key: str, meant: str) -> None:
    with pytest.raises(UsageError) as failure:
        load('name = "x"', [f"{key}=1"])
    assert f"unknown key {key!r} (did you mean {meant}?)" in failure.value.problem


@pytest.mark.parametrize(
    ("item", "section", "key", "value"),
    [
        ("source.lr=1e-4", "source", "lr", 1e-4),
        ("data.path=/a path/with=signs", "data", "path", "/a path/with=signs"),
        ("data.path=", "data", "path", ""),
        ('data.path="5"', "data", "path", "5"),
        ("target.pair_direction=sou||tar", "target", "pair_direction", "sou||tar"),
        (" unet.channel_mult = [1, 2]", "unet", "channel_mult", (1, 2)),
        ("data.path=a\nseed = 3", "data", "path", "a\nseed = 3"),
    ],
)
def test_an_override_is_a_toml_value_or_else_the_string_itself(item: str, section: str, key: str, value: Any) -> None:
    recipe = load('name = "x"', [item])
    assert getattr(getattr(recipe, section), key) == value
    assert recipe.seed == 0


def test_a_value_is_not_smuggled_past_its_line() -> None:
    with pytest.raises(UsageError, match="seed"):
        load('name = "x"', ["seed=1\nname = 'y'"])


def test_the_last_override_of_a_key_wins() -> None:
    assert load('name = "x"', ["seed=1", "seed=2"]).seed == 2


def test_a_recipe_cannot_be_changed() -> None:
    recipe = load('name = "x"')
    for change in (lambda: setattr(recipe, "seed", 1), lambda: setattr(recipe.data, "path", "y")):
        with pytest.raises(ValidationError):
            change()


def huge(path: Path) -> Path:
    path.write_bytes(b"#" * (MAX_RECIPE_BYTES + 1))
    return path


@pytest.mark.parametrize(
    "make",
    [
        huge,
        lambda path: path / "missing.toml",
        lambda path: path.parent,
        lambda path: Path("/dev/zero"),
        lambda path: path.write_bytes(b'name = "\xff"') and path,
        lambda path: path.write_bytes(b"name = ") and path,
    ],
    ids=["huge", "missing", "a folder", "endless", "not UTF-8", "not TOML"],
)
def test_a_file_that_is_no_recipe_is_a_usage_error(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as failure:
        read(make(tmp_path / "recipe.toml"))
    assert failure.value.exit_code == 2


def test_every_key_has_a_default_so_that_a_recipe_is_its_differences() -> None:
    required = [key for key, field in fields() if field.is_required()]
    assert required == []
    assert isinstance(load('name = "x"'), Recipe)


def test_every_section_forbids_unknown_keys_and_converts_nothing() -> None:
    for model in (Recipe, *sections().values()):
        assert isinstance(model, type)
        assert not isinstance(model, types.GenericAlias)
        assert model.model_config["extra"] == "forbid"
        assert model.model_config["strict"]
        assert model.model_config["frozen"]
