"""An image is a function of plan, class and index, whatever it is made beside."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engines import store
from engines.backends.fused import FusedCard, FusedEngine, Reference, reference_step, rules_of
from engines.data.batches import to_pixels
from engines.diffusion.noise import batch_noise, image_key
from engines.diffusion.sampler import Stepped
from engines.diffusion.schedule import make_schedule, respace
from engines.synthesis.maker import Maker, _WhenAsked, denoiser, open_maker
from engines.synthesis.plan import ImageId


def silent_log(_: object) -> None:
    pass


@pytest.fixture(scope="module")
def onnx_maker(exported_run: Path) -> Maker:
    return open_maker(store.open_run(exported_run, ("synth.batch_size=5", "synth.steps=3", "synth.engine=onnx")), "target")


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_an_image_is_bit_identical_whatever_else_is_in_its_batch(runtime: str, request: pytest.FixtureRequest) -> None:
    maker: Maker = request.getfixturevalue(f"{runtime}_maker")
    everyone = [ImageId(k, i) for k in range(3) for i in range(10)]
    alone = {image: maker.draw([image], silent_log)[0].pixels for image in everyone}
    rng = np.random.default_rng(0)
    for _ in range(6):
        batch: dict[int, ImageId] = {}
        for at in rng.permutation(len(everyone))[: rng.integers(2, 12)]:
            batch[everyone[at].row(5)] = everyone[at]
        drawn = maker.draw(list(batch.values()), silent_log)
        assert {d.image for d in drawn} == set(batch.values())
        for one in drawn:
            assert np.array_equal(one.pixels, alone[one.image])  # type: ignore[arg-type]
    distinct = {pixels.tobytes() for pixels in alone.values() if pixels is not None}
    assert len(distinct) == len(everyone)


@pytest.mark.parametrize(
    "override",
    [
        "synth.sampler=ddim",
        "synth.sampler=dpmpp_2m",
        "synth.steps=ddim4",
        "synth.guidance_scale=0.0",
        "synth.classifier_free_scale=1.0",
        "synth.seed=3",
    ],
)
def test_every_setting_of_the_sampler_reaches_the_pixels(override: str, torch_maker: Maker, make_maker: Any) -> None:
    other = make_maker(override).draw([ImageId(1, 0)], silent_log)[0].pixels
    assert not np.array_equal(other, torch_maker.draw([ImageId(1, 0)], silent_log)[0].pixels)


def test_a_batch_is_always_full_and_holds_what_was_asked(torch_maker: Maker) -> None:
    sizes: list[int] = []

    class Spy:
        card = torch_maker.engine.card

        def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            sizes.append(len(x))
            return torch_maker.engine(x, t, y)

    replace(torch_maker, engine=Spy()).draw([ImageId(0, 1)], silent_log)
    assert sizes == [5, 5, 5]


class Whole:
    """Guided steps as one graph would make them, by the sampler's own formulas, in the order of their timesteps."""

    def __init__(self, maker: Maker) -> None:
        assert maker.guide is not None
        rules = rules_of(maker.recipe.synth)
        self.card = FusedCard.model_construct(rules=rules, labeled=True, file_sha256="of the step")
        self.reference = Reference(maker.engine, maker.guide.log_probs, maker.schedule)
        self.asked: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, *others: Tensor) -> Stepped:
        self.asked.append(int(t[0]))
        return reference_step(self.reference, self.card, x, t, *others)

    bind = FusedEngine.bind


@pytest.mark.parametrize(
    "overrides",
    [
        ("synth.guidance_scale=0.5", "synth.guidance_scale_max=0.9"),
        ("synth.sampler=ddim", "synth.eta=0.5", "synth.steps=5"),
        ("synth.guidance_interval=[5, 12]", "synth.steps=6"),
    ],
)
def test_whole_steps_are_asked_where_guidance_acts_with_the_recipes_scales_and_the_images_are_the_same(
    overrides: tuple[str, ...], make_maker: Any
) -> None:
    maker: Maker = make_maker(*overrides)
    step = Whole(maker)
    images = [ImageId(2, 0), ImageId(2, 1)]
    expected, found = maker.draw(images, silent_log), replace(maker, fused=step).draw(images, silent_log)  # type: ignore[arg-type]
    first, last = maker.recipe.synth.guidance_interval
    assert step.asked == [t for t in reversed(maker.schedule.timesteps.tolist()) if first <= t <= last]
    for one, other in zip(expected, found, strict=True):
        assert one.pixels is not None
        assert other.pixels is not None
        assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1


def test_an_engine_that_is_loaded_when_it_is_asked_is_loaded_once(torch_maker: Maker) -> None:
    loads: list[int] = []

    def load() -> Any:
        loads.append(1)
        return torch_maker.engine

    engine = _WhenAsked(torch_maker.engine.card, load)
    assert engine.card == torch_maker.engine.card
    assert not loads
    x, t, y = torch.zeros(5, 1, 8, 8), torch.full((5,), 3), torch.arange(5) % 3
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: engine(x, t, y), range(4)))
    assert len(loads) == 1
    assert all(torch.equal(out, torch_maker.engine(x, t, y)) for out in found)


def test_the_last_step_of_one_is_the_engines_own_prediction(make_maker: Any) -> None:
    """With one step, no guidance and DDIM, the image is x_0 of Eq. 6 from the image's own noise: worked out by hand."""
    maker: Maker = make_maker("synth.steps=1", "synth.sampler=ddim", "synth.guidance_scale=0.0", "diffusion.noise_schedule=cosine")
    image = ImageId(2, 4)
    keys = [image_key(0, 2, 4)] * 5
    x = batch_noise(keys, 0, (1, 8, 8))
    schedule = respace(make_schedule("cosine", 20), 1)
    abar = schedule.alphas_cumprod[0]
    eps = maker.engine(x, schedule.timesteps.expand(5).clone(), torch.full((5,), 2))[:, :1]
    x0 = ((x - (1 - abar).sqrt() * eps) / abar.sqrt()).clamp(-1, 1)
    (drawn,) = maker.draw([image], silent_log)
    assert drawn.pixels is not None
    assert np.abs(to_pixels(x0)[0].astype(int) - drawn.pixels).max() <= 1


def test_classifier_free_guidance_is_its_formula(make_maker: Any) -> None:
    card = make_maker().engine.card

    class Labels:
        """eps = label, variance values = 10 + label."""

        def __init__(self) -> None:
            self.card = card

        def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            assert y is not None
            return torch.cat([torch.zeros_like(x), torch.full_like(x, 10)], 1) + y.view(-1, 1, 1, 1)

    y, x, t = torch.tensor([0, 2]), torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    out = denoiser(Labels(), y, 0.5)(x, t)
    assert out[:, 0].flatten(1).unique(dim=1).flatten().tolist() == [1.5 * 0 - 0.5 * 3, 1.5 * 2 - 0.5 * 3]  # the null label is 3
    assert out[:, 1].flatten(1).unique(dim=1).flatten().tolist() == [10, 12]
    assert torch.equal(denoiser(Labels(), y, 0.0)(x, t), Labels()(x, t, y))
