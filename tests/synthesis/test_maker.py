"""An image is a function of plan, class and index, whatever it is made beside."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engines import store
from engines.data.batches import to_pixels
from engines.diffusion.noise import batch_noise, image_key
from engines.diffusion.schedule import make_schedule, respace
from engines.synthesis.maker import Maker, denoiser, open_maker
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
