"""Guided steps beside a network: exported for its builds, kept while they fit, timed, and taken where they are the faster way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engines import store
from engines.backends import fused, gradient, guided
from engines.backends.base import read_engine, weights_sha256, write_engine
from engines.backends.choice import BUILDS, Build
from engines.backends.fused import FusedCard, read_fused
from engines.backends.gradient import read_gradient
from engines.backends.guided import GuidedBuild, choose, export_guided, is_wanted, published
from engines.backends.keys import export_digest
from engines.errors import EngineError, ParityError
from engines.recipe import Recipe, load

ONNX = Build("onnx", "fp32")
RECIPE = """
name = "test"
[data]
image_size_px = 8
image_channels = 1
[unet]
channel_mult = [1]
class_cond = true
attention_resolutions = [8]
[guide]
channel_mult = [1]
attention_resolutions = [8]
[diffusion]
steps = 50
noise_schedule = "cosine"
[export]
max_batch = 8
[synth]
steps = 5
batch_size = 2
"""


class Job(NamedTuple):
    """Two networks, one of them exported, and the gradient's bytes, so that nothing is traced twice."""

    network: Path
    unet: Any
    guide: Any

    def export(self, recipe: Recipe, build: Build = ONNX) -> FusedCard:
        return export_guided(self.network, self.unet, self.guide, recipe, build)

    def choose(self, recipe: Recipe, made_with: str | None = None, build: Build = ONNX, **others: str) -> guided.Way:
        shas = {"weights": weights_sha256(self.unet), "guide": weights_sha256(self.guide)} | others
        return choose(self.network, build, recipe, shas["weights"], shas["guide"], made_with, "diffrc export")


def recipe_of(*overrides: str) -> Recipe:
    return load(RECIPE, overrides)


def export_network(exported: Any, path: Path, recipe: Recipe, build: Build = ONNX) -> None:
    """The network of all tests under another name, as if a run's export had made it with this recipe."""
    file = read_engine(exported.path)
    kind: dict[str, Any] = {"kind": build.kind, "precision": build.precision, "recipe_sha256": export_digest(recipe)}
    if build.precision == "bf16":
        kind["tolerance"] = 0.1
    versions = {name: version for name, version in file.card.versions.items() if "runtime" not in name or build.kind == "onnx"}
    write_engine(path, file.data, file.card.model_copy(update={**kind, "versions": versions}))


@pytest.fixture(scope="module")
def made_job(exported: Any, exported_gradient: Any, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A network with its guided steps. To be read only."""
    job = Job(tmp_path_factory.mktemp("guided") / "onnx" / "target.onnx", exported.unet, exported_gradient.guide)
    export_network(exported, job.network, recipe_of())
    with pytest.MonkeyPatch.context() as patch:
        bytes_of = gradient.gradient_bytes
        patch.setattr(gradient, "gradient_bytes", lambda *given: bytes_of(*given[:-1], given[-1] or exported_gradient.data))
        job.export(recipe_of())
    return job


@pytest.fixture
def job(made_job: Job, tmp_path: Path) -> Job:
    """A copy that a test may change."""
    for file in made_job.network.parent.iterdir():
        store.write_bytes(tmp_path / "onnx" / file.name, file.read_bytes())
    return made_job._replace(network=tmp_path / "onnx" / "target.onnx")


def files(job: Job) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in job.network.parent.iterdir()}


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nothing is exported or held to torch."""
    for name in ("fused_bytes", "held", "export_gradient", "timed"):
        monkeypatch.setattr(guided, name, lambda *_: pytest.fail("it was made anew"))


def test_export_makes_the_gradient_and_the_step_each_with_its_card_and_times_both_ways(made_job: Job) -> None:
    assert set(files(made_job)) == {
        "target.onnx",
        "target.json",
        "guide.onnx",
        "guide.json",
        "target.guided-ddpm.onnx",
        "target.guided-ddpm.json",
    }
    _, card = read_fused(made_job.network.with_name("target.guided-ddpm.onnx"))
    _, gradient_card = read_gradient(made_job.network.with_name("guide.onnx"))
    network = read_engine(made_job.network).card
    assert (card.weights_sha256, card.guide_sha256) == (network.weights_sha256, gradient_card.weights_sha256)
    assert card.guide_sha256 == weights_sha256(made_job.guide)
    assert (card.recipe_sha256, card.opset, card.max_batch) == (network.recipe_sha256, network.opset, 8)
    assert card.measured_batch == 2
    assert card.ms_per_image > 0 < card.apart_ms_per_image
    assert card == published(made_job.network, recipe_of(), ONNX)


def test_what_still_fits_is_kept(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch)
    before = files(job)
    for recipe in (recipe_of(), recipe_of("synth.guidance_scale=0.7", "synth.seed=3", "synth.steps=9")):
        job.export(recipe)
    assert files(job) == before


@pytest.mark.parametrize("override", ["synth.sampler=ddim", "synth.batch_size=3"])
def test_another_rule_or_batch_is_exported_anew_and_the_gradient_kept(override: str, job: Job) -> None:
    before, recipe = files(job), recipe_of(override)
    card = job.export(recipe)
    after = files(job)
    assert card.rules == fused.rules_of(recipe.synth)
    assert {name for name in before if name.startswith("guide") and before[name] != after[name]} == set()
    assert set(after) - set(before) == ({"target.guided-ddim.onnx", "target.guided-ddim.json"} if "ddim" in override else set())
    assert job.choose(recipe).why.startswith(("one graph", "torch's guide, "))


def test_another_guide_or_damage_makes_it_anew(job: Job, make_guide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch)
    other = make_guide(channel_mult=(1,))
    other.prototypes.neg_()
    with pytest.raises(pytest.fail.Exception):
        job._replace(guide=other).export(recipe_of())
    step = job.network.with_name("target.guided-ddpm.onnx")
    store.write_bytes(step, step.read_bytes() + b" ")
    with pytest.raises(pytest.fail.Exception):
        job.export(recipe_of())


@pytest.mark.parametrize(("wrong", "named"), [("gradient", "guide.onnx"), ("step", "target.guided-ddpm.onnx")])
def test_what_disagrees_with_torch_is_not_published_and_the_rest_stays(
    wrong: str, named: str, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = gradient if wrong == "gradient" else fused
    for name in ("guide", "target.guided-ddpm") if wrong == "gradient" else ("target.guided-ddpm",):
        job.network.with_name(f"{name}.json").unlink()
    before, right = files(job), module.open_graph
    data = before[named]
    monkeypatch.setattr(guided, "_made", lambda *_: data)
    monkeypatch.setattr(module, "_self_test", lambda *_: None)
    monkeypatch.setattr(module, "open_graph", lambda *given: lambda feed: tuple(1.01 * out for out in right(*given)(feed)))
    with pytest.raises(ParityError, match=f"{named} on onnx fp32 disagrees with torch") as failure:
        job.export(recipe_of())
    assert failure.value.exit_code == 6
    assert "--set synth.fused=false" in failure.value.remedy
    assert files(job) == before


def test_steps_are_wanted_for_the_builds_of_a_cpu_where_a_step_is_one_evaluation_and_one_gradient() -> None:
    assert [build for build in BUILDS if is_wanted(recipe_of(), build)] == [ONNX, Build("openvino", "fp32"), Build("openvino", "bf16")]
    for override in ("synth.fused=false", "synth.sampler=dpmpp_2m", "synth.guidance_scale=0.0", "synth.classifier_free_scale=1.0"):
        assert not is_wanted(recipe_of(override), ONNX)


# ------------------------------------------------------------------------------------------------------------ the choice


def with_speeds(job: Job, ms: float, apart_ms: float) -> str:
    data, card = read_fused(job.network.with_name("target.guided-ddpm.onnx"))
    card = card.model_copy(update={"ms_per_image": ms, "apart_ms_per_image": apart_ms})
    guided.write_graph(job.network.with_name("target.guided-ddpm.onnx"), data, card)
    return card.file_sha256


def test_the_faster_way_is_taken_and_told(job: Job) -> None:
    sha256 = with_speeds(job, 1.3, 2.1)
    way = job.choose(recipe_of())
    assert way.why == "one graph, 1.3 ms an image against 2.1 with torch's guide"
    assert way.file is not None
    assert way.file[1].file_sha256 == sha256
    with_speeds(job, 2.1, 1.3)
    assert job.choose(recipe_of()) == (None, "torch's guide, 1.3 ms an image against 2.1 in one graph")
    with_speeds(job, 2.0, 2.1)  # within the noise of a measurement
    assert job.choose(recipe_of()).file is None


def test_images_are_continued_as_they_were_begun(job: Job) -> None:
    sha256 = with_speeds(job, 2.1, 1.3)
    assert job.choose(recipe_of(), sha256).file is not None
    with_speeds(job, 1.3, 2.1)
    assert job.choose(recipe_of(), "") == (None, "torch's guide (the images there were made with it)")
    assert job.choose(recipe_of(), "another file").file is not None  # the plan will tell that it is another


@pytest.mark.parametrize(
    ("override", "others", "told"),
    [
        ("synth.direction=away", {}, "rules"),
        ("synth.batch_size=9", {}, "largest batch 8 then, at least 9 now"),
        ("export.gradient_cosine=0.99", {}, "recipe"),
        ("synth.seed=1", {"weights": "other"}, "weights"),
        ("synth.seed=1", {"guide": "other"}, "guide's weights"),
    ],
)
def test_a_step_that_does_not_fit_is_left_and_the_reason_told(override: str, others: dict[str, str], told: str, job: Job) -> None:
    overrides = (override, "export.max_batch=9") if "batch_size" in override else (override,)
    way = job.choose(recipe_of(*overrides), **others)
    assert way.file is None
    assert way.why.startswith("torch's guide; target.guided-ddpm.onnx does not fit")
    assert told in way.why


def test_nothing_is_told_where_there_is_no_choice_and_a_missing_step_is_named(job: Job) -> None:
    for override in ("synth.fused=false", "synth.sampler=dpmpp_2m"):
        assert job.choose(recipe_of(override)) == (None, "")
    assert job.choose(recipe_of(), build=Build("onnx", "fp16")) == (None, "")
    missing = job.choose(recipe_of("synth.sampler=ddim"))
    assert missing.file is None
    assert "target.guided-ddim.onnx, a whole step in one graph, is not exported: diffrc export" in missing.why
    assert "cannot read" in job.choose(recipe_of(), build=Build("openvino", "fp32")).why


def test_ways_are_timed_a_batch_a_processor_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(guided, "TIMED_TURNS", 3)
    at_once, most, lock = [0], [0], threading.Lock()

    def way(seconds: float) -> Callable[[], None]:
        def work() -> None:
            with lock:
                at_once[0] += 1
                most[0] = max(most[0], at_once[0])
            time.sleep(seconds)
            with lock:
                at_once[0] -= 1

        return work

    slow, fast = guided.ms_side_by_side((way(0.08), way(0.01)), batch=4)
    assert most[0] == 3
    assert slow > fast
    assert slow >= 80 / 12


@pytest.mark.slow
@pytest.mark.parametrize("build", guided.BUILDS[1:], ids=str)
def test_openvinos_builds_share_the_files_and_have_cards_of_their_own(build: GuidedBuild, job: Job, exported: Any) -> None:
    from engines.backends import choice

    try:
        choice.require(Build(*build))
    except EngineError as error:
        pytest.skip(error.problem)
    loose = ("export.bf16_one_step_tolerance=0.1", "export.bf16_trajectory_psnr_db=1.0", "export.trajectory_psnr_db=30.0")
    recipe, before = recipe_of(*loose), files(job)  # limits are those of trained networks
    export_network(exported, job.network, recipe, Build(*build))
    export_network(exported, job.network, recipe)
    job.export(recipe)
    card = job.export(recipe, Build(*build))
    after = files(job)
    suffix = f"openvino-{build.precision}.json"
    assert set(after) - set(before) == {f"{name}.{suffix}" for name in ("target", "guide", "target.guided-ddpm")}
    assert [name for name in after if name.endswith(".onnx")] == [name for name in before if name.endswith(".onnx")]
    assert (card.runtime, card.precision) == build
