"""Samplers: on Gaussian data, whose exact denoiser is known, they draw the data; single steps are Eq. 13 by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engines.diffusion.guidance import classifier_free, prototype_guidance
from engines.diffusion.sampler import Push, Sampler, StepLog, Stepped, dpmpp_2m_step, sample
from engines.diffusion.schedule import Schedule, at_timesteps, make_schedule, respace

TRAINING = make_schedule("linear", 1000)
MEAN, VARIANCE = 0.3, 0.2
SHAPE = (2, 1, 2, 2)


def gaussian_denoiser(schedule: Schedule, learned: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact eps of data N(MEAN, VARIANCE I); with `learned` also the values that make Sigma the exact reverse variance."""
    place = {int(t): j for j, t in enumerate(schedule.timesteps)}

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        j = place[int(t[0])]
        abar = float(schedule.alphas_cumprod[j])
        gain = math.sqrt(abar) * VARIANCE / (abar * VARIANCE + 1 - abar)
        x0 = MEAN + gain * (x - math.sqrt(abar) * MEAN)
        eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        if not learned:
            return eps
        left = VARIANCE * (1 - abar) / (abar * VARIANCE + 1 - abar)  # Var(x_0 | x_t)
        low, high = float(schedule.posterior_log_variance_clipped[j]), math.log(float(schedule.betas[j]))
        true = math.log(float(schedule.posterior_variance[j]) + float(schedule.posterior_mean_coef1[j]) ** 2 * left)
        value = 2 * (true - low) / (high - low) - 1 if j else 0.0
        return torch.cat([eps, torch.full_like(eps, value)], dim=1)

    return denoise


def seeded(shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    return lambda step: torch.randn(shape, generator=torch.Generator().manual_seed(step))


def test_ddpm_with_the_exact_variance_draws_gaussian_data_even_in_ten_steps() -> None:
    schedule = respace(TRAINING, 10)
    x = sample(gaussian_denoiser(schedule, learned=True), schedule, seeded((40_000, 1, 1, 2)), clip_denoised=False).flatten(1).double()
    error = math.sqrt(VARIANCE / len(x))
    assert x.mean(0).sub(MEAN).abs().max() < 4 * error
    covariance = torch.cov(x.t())
    assert covariance.diagonal().sub(VARIANCE).abs().max() < 4 * VARIANCE * math.sqrt(2 / len(x))
    assert abs(float(covariance[0, 1])) < 4 * VARIANCE / math.sqrt(len(x))


def test_ddim_carries_noise_to_gaussian_data_by_the_exact_flow() -> None:
    # The probability flow of N(m, v I) is affine: x_0 = m + sqrt(v) x_T but for what is left of m and v at T.
    start = torch.linspace(-3, 3, 9).view(9, 1, 1, 1)
    x = sample(gaussian_denoiser(TRAINING, learned=False), TRAINING, lambda _: start, sampler="ddim", clip_denoised=False)
    torch.testing.assert_close(x, MEAN + math.sqrt(VARIANCE) * start, rtol=1e-2, atol=1e-2)


def step_once(schedule: Schedule, output: Tensor, push: Tensor | None = None, **options: object) -> Tensor:
    """x after the first of two steps, from x_T = noise(0): what the second evaluation is given."""
    seen: list[Tensor] = []

    def denoise(x: Tensor, _t: Tensor) -> Tensor:
        seen.append(x.clone())
        return output

    def guidance(_x: Tensor, t: Tensor) -> Push | None:
        return Push(push, torch.zeros(2), torch.ones(2)) if push is not None and int(t[0]) else None

    sample(denoise, schedule, seeded(SHAPE), guidance, **options)  # type: ignore[arg-type]
    return seen[1]


def hand(t_before: int, t: int) -> dict[str, float]:
    """The quantities of Eq. 13 in float64 for a step from t to t_before."""
    abars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    abar, before = abars[t], abars[t_before]
    beta = 1 - abar / before
    return {"abar": abar, "before": before, "beta": beta, "variance": beta * (1 - before) / (1 - abar)}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("unit", ["sigma", "variance"])
@pytest.mark.parametrize("value", [None, -1.0, 0.0, 1.0])
def test_a_ddpm_step_is_equation_13_by_hand(clip: bool, unit: Literal["sigma", "variance"], value: float | None) -> None:
    schedule, q = at_timesteps(TRAINING, [100, 400, 700]), hand(400, 700)
    eps, push = seeded(SHAPE)(11), 0.2 * seeded(SHAPE)(12)
    output = eps if value is None else torch.cat([eps, torch.full_like(eps, value)], dim=1)
    share = 0.0 if value is None else (value + 1) / 2
    variance = q["beta"] ** share * q["variance"] ** (1 - share)
    x, z = seeded(SHAPE)(0).double(), seeded(SHAPE)(1).double()
    x0 = (x - math.sqrt(1 - q["abar"]) * eps.double()) / math.sqrt(q["abar"])
    x0 = x0.clamp(-1, 1) if clip else x0
    mean = math.sqrt(q["before"]) * q["beta"] / (1 - q["abar"]) * x0 + math.sqrt(1 - q["beta"]) * (1 - q["before"]) / (1 - q["abar"]) * x
    step = math.sqrt(variance) if unit == "sigma" else variance
    wanted = mean + math.sqrt(variance) * z + step * push.double()
    result = step_once(schedule, output, push, step_unit=unit, clip_denoised=clip)
    torch.testing.assert_close(result.double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_ddim_step_is_songs_with_the_guided_eps() -> None:
    schedule, q = at_timesteps(TRAINING, [100, 400, 700]), hand(400, 700)
    eps, push = seeded(SHAPE)(11), 0.2 * seeded(SHAPE)(12)
    guided = eps.double() - math.sqrt(1 - q["abar"]) * push.double()
    x = seeded(SHAPE)(0).double()
    x0 = (x - math.sqrt(1 - q["abar"]) * guided) / math.sqrt(q["abar"])
    wanted = math.sqrt(q["before"]) * x0 + math.sqrt(1 - q["before"]) * guided
    result = step_once(schedule, eps, push, sampler="ddim", clip_denoised=False)
    torch.testing.assert_close(result.double(), wanted, rtol=1e-4, atol=1e-4)


def test_ddim_of_eta_1_is_the_ddpm_step_with_the_posteriors_variance() -> None:
    schedule, eps = at_timesteps(TRAINING, [100, 400, 700]), seeded(SHAPE)(11)
    for clip in (False, True):
        ddim = step_once(schedule, eps, sampler="ddim", eta=1.0, clip_denoised=clip)
        torch.testing.assert_close(ddim, step_once(schedule, eps, clip_denoised=clip), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_the_deterministic_samplers_draw_no_noise_after_the_first(sampler: Sampler) -> None:
    def noise(step: int) -> Tensor:
        assert step == 0
        return seeded(SHAPE)(0)

    schedule = respace(TRAINING, 5)
    first, second = (sample(gaussian_denoiser(schedule, learned=False), schedule, noise, sampler=sampler) for _ in range(2))
    assert torch.equal(first, second)


def test_a_dpm_solver_step_is_lus_by_hand_with_the_guided_eps() -> None:
    # x' = (sigma'/sigma) x - alpha' (exp(-h) - 1) D,  D = (1 + 1/(2r)) x0 - 1/(2r) x0_before,  r = h_before / h
    q_before, q, q_after = hand(400, 700), hand(100, 400), hand(0, 100)
    lam = [0.5 * math.log(p["abar"] / (1 - p["abar"])) for p in (q_before, q, q_after)]
    h_before, h = lam[1] - lam[0], lam[2] - lam[1]
    x, x0, x0_before = (seeded(SHAPE)(seed).double() for seed in (1, 2, 3))
    r = h_before / h
    d = (1 + 1 / (2 * r)) * x0 - x0_before / (2 * r)
    sigma, sigma_after, alpha_after = math.sqrt(1 - q["abar"]), math.sqrt(1 - q_after["abar"]), math.sqrt(q_after["abar"])
    wanted = sigma_after / sigma * x - alpha_after * (math.exp(-h) - 1) * d
    schedule = at_timesteps(TRAINING, [100, 400, 700])
    result = dpmpp_2m_step(schedule, x.float(), torch.tensor([1, 1]), x0.float(), x0_before.float())
    torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_first_and_the_last_step_of_dpm_solver_are_ddims() -> None:
    eps, push = seeded(SHAPE)(11), 0.2 * seeded(SHAPE)(12)
    for schedule in (at_timesteps(TRAINING, [100, 400, 700]), at_timesteps(TRAINING, [300, 900])):
        ddim, solver = (step_once(schedule, eps, push, sampler=name, clip_denoised=False) for name in ("ddim", "dpmpp_2m"))
        torch.testing.assert_close(solver, ddim)
    short = at_timesteps(TRAINING, [300, 900])  # two steps: the first and the last
    ends = [sample(lambda x, _: 0.3 * x, short, seeded(SHAPE), sampler=name) for name in ("ddim", "dpmpp_2m")]  # type: ignore[arg-type]
    torch.testing.assert_close(ends[1], ends[0])


def test_samplers_other_than_ddpm_take_eps_alone_of_a_network_that_gives_variance_values_too() -> None:
    schedule = respace(TRAINING, 5)
    for sampler in ("ddim", "dpmpp_2m"):
        with_values, without = (
            sample(gaussian_denoiser(schedule, learned), schedule, seeded(SHAPE), sampler=sampler)  # type: ignore[arg-type]
            for learned in (True, False)
        )
        torch.testing.assert_close(with_values, without)


def test_the_last_ddpm_step_adds_no_noise_and_returns_the_guided_x0() -> None:
    schedule = at_timesteps(TRAINING, [300, 600])
    asked: list[int] = []

    def noise(step: int) -> Tensor:
        asked.append(step)
        return seeded(SHAPE)(step)

    def last_push(_x: Tensor, t: Tensor) -> Push | None:
        return Push(torch.ones(SHAPE), torch.zeros(2), torch.ones(2)) if int(t[0]) == 300 else None

    plain = sample(lambda x, _: 0.1 * x, schedule, noise, clip_denoised=False)
    assert asked == [0, 1]
    pushed = sample(lambda x, _: 0.1 * x, schedule, noise, last_push, clip_denoised=False)
    sigma = float(schedule.posterior_variance[1].sqrt())
    torch.testing.assert_close(pushed - plain, torch.full(SHAPE, sigma))


def test_engine_and_guide_see_training_timesteps_from_last_to_first() -> None:
    engine_saw, guide_saw = [], []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        assert t.shape == (2,)
        engine_saw.append(int(t[0]))
        return torch.zeros_like(x)

    def guidance(_x: Tensor, t: Tensor) -> None:
        guide_saw.append(int(t[0]))

    sample(denoise, respace(TRAINING, 4), seeded(SHAPE), guidance)
    assert engine_saw == guide_saw == [999, 666, 333, 0]


@pytest.mark.parametrize("interval", [(0, 0), (333, 666), (334, 10**9), (700, 900)])
def test_guidance_acts_in_its_interval_ends_included_and_elsewhere_nothing_of_it_is_asked(interval: tuple[int, int]) -> None:
    schedule, inside = respace(TRAINING, 4), [t for t in (999, 666, 333, 0) if interval[0] <= t <= interval[1]]
    guide_saw, step_saw, guided_saw, plain_saw = [], [], [], []

    def guidance(_x: Tensor, t: Tensor) -> None:
        guide_saw.append(int(t[0]))

    def guided_step(x: Tensor, j: Tensor, _z: Tensor) -> Stepped:
        step_saw.append(int(schedule.timesteps[j[0]]))
        return Stepped(x, *(torch.zeros(2),) * 3)

    def seen_by(saw: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
        def denoise(x: Tensor, t: Tensor) -> Tensor:
            saw.append(int(t[0]))
            return 0.1 * x

        return denoise

    sample(seen_by(guided_saw), schedule, seeded(SHAPE), guidance, interval=interval, plain=seen_by(plain_saw))
    assert guide_saw == guided_saw == inside
    assert plain_saw == [t for t in (999, 666, 333, 0) if t not in inside]
    sample(seen_by([]), schedule, seeded(SHAPE), guidance, guided_step=guided_step, interval=interval)
    assert step_saw == inside


class NoValueIsRead(TorchDispatchMode):
    """Refuses what would wait for a device: the value of a tensor as a number of Python's, or a shape that depends on values."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal"), name
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("free_scale", [0.0, 1.0])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_no_step_waits_for_the_device(sampler: Sampler, free_scale: float) -> None:
    """With guidance, in an interval, with a log: the scalars of the log are read after the last step."""
    schedule, lines = respace(TRAINING, 4), list[StepLog]()
    guidance = prototype_guidance(lambda x, _t: torch.log_softmax(x.flatten(1), 1), torch.tensor([1, 0]))
    denoise = classifier_free(lambda x, _t: torch.cat([x, x], 1), lambda x, _t: torch.cat([-x, x], 1), free_scale, 1)
    with NoValueIsRead():
        sample(denoise, schedule, seeded(SHAPE), guidance, sampler, eta=0.5, log=lines.append, interval=(300, 900))
    assert [float(line.scale) > 0 for line in lines] == [False, True, True, False]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_images_are_in_range_where_clipped_and_an_image_does_not_depend_on_its_batch(sampler: Sampler) -> None:
    schedule, noise = respace(TRAINING, 6), seeded((4, 1, 2, 2))
    together = sample(lambda x, _: 0.1 * x, schedule, noise, sampler=sampler)
    assert together.abs().max() <= 1
    assert together.dtype == torch.float32
    for i in range(4):

        def own(step: int, i: int = i) -> Tensor:
            return noise(step)[i : i + 1]

        torch.testing.assert_close(sample(lambda x, _: 0.1 * x, schedule, own, sampler=sampler), together[i : i + 1])


def test_guidance_toward_a_class_of_gaussian_data_brings_more_of_it() -> None:
    # One class is the data's upper tail: p(1 | x) = sigmoid(8 (mean(x) - 0.3)).
    def log_probs(x: Tensor, _t: Tensor) -> Tensor:
        logit = 8 * (x.mean((1, 2, 3)) - MEAN)
        return torch.nn.functional.logsigmoid(torch.stack([-logit, logit], dim=1))

    schedule, share = respace(TRAINING, 25), {}
    for direction in ("toward", "away"):
        guidance = prototype_guidance(log_probs, torch.ones(500, dtype=torch.int64), direction=direction)  # type: ignore[arg-type]
        x = sample(gaussian_denoiser(schedule, learned=True), schedule, seeded((500, 1, 2, 2)), guidance)
        share[direction] = float((x.mean((1, 2, 3)) > MEAN).float().mean())
    assert share["toward"] > 0.9
    assert share["away"] < 0.1


def test_the_log_tells_the_ratio_of_guidance_to_noise_as_both_enter_the_step() -> None:
    schedule, lines = at_timesteps(TRAINING, [100, 400]), list[StepLog]()
    push = Push(torch.full(SHAPE, 0.2), torch.tensor([-1.0, -3.0]), torch.tensor([0.2, 0.4]))
    sample(lambda x, _: x, schedule, seeded(SHAPE), lambda _x, t: push if int(t[0]) == 400 else None, log=lines.append)
    noise = seeded(SHAPE)(1).flatten(1).norm(dim=1)
    assert [line.t for line in lines] == [400, 100]
    assert lines[0].guidance_to_noise == pytest.approx(float((0.4 / noise).mean()), rel=1e-4)  # ||0.2 over 4 values|| = 0.4
    assert (lines[0].scale, lines[0].log_prob) == pytest.approx((0.3, -2.0))
    assert lines[1] == StepLog(100, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_the_ratio_of_the_deterministic_samplers_is_to_the_eps_that_guidance_is_subtracted_from(sampler: Sampler) -> None:
    schedule, lines = at_timesteps(TRAINING, [100, 400]), list[StepLog]()
    push = Push(torch.full(SHAPE, 0.2), torch.tensor([-1.0, -3.0]), torch.tensor([0.2, 0.4]))
    eps = seeded(SHAPE)(5)
    sample(lambda _x, _t: eps, schedule, seeded(SHAPE), lambda _x, _t: push, sampler=sampler, log=lines.append)
    for line, q in zip(lines, (hand(100, 400), hand(0, 100)), strict=True):
        wanted = (math.sqrt(1 - q["abar"]) * 0.4 / eps.flatten(1).norm(dim=1)).mean()
        assert float(line.guidance_to_noise) == pytest.approx(float(wanted), rel=1e-4)


def test_guidance_that_is_on_at_the_last_step_is_logged_as_0_of_no_noise() -> None:
    lines = list[StepLog]()
    push = Push(torch.full(SHAPE, 0.2), torch.tensor([-1.0, -3.0]), torch.tensor([0.2, 0.4]))
    sample(lambda x, _: x, at_timesteps(TRAINING, [100, 400]), seeded(SHAPE), lambda _x, _t: push, log=lines.append)
    assert [float(line.guidance_to_noise) > 0 for line in lines] == [True, False]
    assert float(lines[1].scale) == pytest.approx(0.3)
