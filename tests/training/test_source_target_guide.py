"""What each stage trains on what: frozen source, Eq. 9's classes, dropped labels, prototypes that only Eq. 11 moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffrc_cli.recipe import embedded
from engines import store
from engines.data.batches import ALL, Batch, by_class, channels_first, class_batch, class_probabilities
from engines.data.decode import Frame
from engines.data.images import ArrayReader, ImageSet, Shelf
from engines.data.longtail import LongTail
from engines.diffusion.losses import variational_loss
from engines.diffusion.schedule import make_schedule
from engines.recipe import Recipe, load
from engines.training import target as target_module
from engines.training.diffusion import NoisedBatch, build_unet, diffusion_loss, draw, noised, training_schedule, visible_labels
from engines.training.distributed import ALONE
from engines.training.guide import build_guide, early_momentum, guide_stage, take_encoder, warm_start
from engines.training.holdout import held_out_loss, split
from engines.training.loop import Figures, Stage, train
from engines.training.source import masked_counts, source_stage
from engines.training.target import target_stage
from engines.training.trainer import Trainer

CPU = torch.device("cpu")
COUNTS = np.array([12, 6, 5, 3])
GROUPS = ("many", "medium", "few", "few")


def tail(groups: tuple[str, ...] = GROUPS) -> LongTail:
    """Four classes of 8 px, each gray in its own way."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), COUNTS)
    pixels = (rng.integers(0, 40, (len(labels), 8, 8, 1)) + 60 * labels[:, None, None, None]).astype(np.uint8)
    images = ImageSet(labels, ("a", "b", "c", "d"), Shelf(ArrayReader(pixels, "test"), Frame(8, 1)))
    return LongTail(images, images, images, COUNTS, groups, "0")  # type: ignore[arg-type]


@pytest.fixture
def recipe(tiny_settings: tuple[str, ...]) -> Recipe:
    return load(embedded()["digits-lt"].read_text(encoding="utf-8"), tiny_settings)


def changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def awake(network: Any) -> Any:
    """Without the zeroed layers, whose output no image changes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return network


def first_loss(stage: Stage) -> tuple[Tensor, Figures]:
    return stage.loss(stage.model, stage.draw(0))


# --------------------------------------------------------------------------------------------------------- what is shared


def fields(batch: Batch, *names: str) -> list[Tensor]:
    return [getattr(batch, name) for name in names or ("pixels", "y", "u", "noise", "unlabeled")]


def test_a_batch_is_named_by_seed_stage_and_step_and_noised_by_equation_2(recipe: Recipe) -> None:
    schedule, indices = make_schedule("cosine", 1000), np.array([0, 13, 25, 25])
    batch = draw(tail().train, indices, recipe.source, 0, "source", 3)
    t = torch.tensor([0, 10, 500, 999])
    at, abar = noised(schedule, batch, t), schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(at.x, abar.sqrt() * batch.x0 + (1 - abar).sqrt() * batch.noise)
    assert batch.y.tolist() == [0, 1, 3, 3]
    assert not torch.equal(batch.noise[2], batch.noise[3])  # the same image comes under other noise
    again = draw(tail().train, indices, recipe.source, 0, "source", 3)
    assert all(torch.equal(a, b) for a, b in zip(fields(batch), fields(again), strict=True))
    for seed, stage, step in ((1, "source", 3), (0, "target", 3), (0, "source", 4)):
        assert not torch.equal(draw(tail().train, indices, recipe.source, seed, stage, step).noise, batch.noise)


def test_the_rows_of_a_rank_and_the_parts_of_a_batch_are_those_of_the_whole(recipe: Recipe) -> None:
    section = recipe.source.model_copy(update={"horizontal_flip": True, "shift_px": 2})
    images, indices = tail().train, np.arange(12)
    whole = draw(images, indices, section, 0, "source", 3, label_dropout=0.5)
    rows = draw(images, indices, section, 0, "source", 3, slice(4, 8), label_dropout=0.5)
    assert (whole.parts, rows.parts, rows.part(1, 2).parts) == (1, 3, 6)
    for all_of_it, some, part in zip(fields(whole), fields(rows), fields(rows.part(1, 2)), strict=True):
        assert torch.equal(all_of_it[4:8], some)
        assert torch.equal(all_of_it[6:8], part)


def test_one_u_is_drawn_for_each_image_uniformly_or_once_a_group(recipe: Recipe) -> None:
    many = draw(tail().train, np.zeros(2000, dtype=np.int64), recipe.source, 0, "source", 0).u
    assert torch.bincount((many * 10).long(), minlength=10).sub(200).abs().max() < 60
    grouped = draw(tail().train, np.zeros(12, dtype=np.int64), recipe.source, 0, "source", 0, group_size=4).u.view(3, 4)
    assert (grouped == grouped[:, :1]).all()
    assert len(grouped[:, 0].unique()) > 1


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_labels_are_hidden_in_their_share_by_the_null_label(share: float, recipe: Recipe) -> None:
    batch = draw(tail().train, np.arange(4000) % 26, recipe.source, 0, "source", 0, label_dropout=share)
    y = visible_labels(batch, 4)
    assert torch.equal(y, torch.where(batch.unlabeled, 4, batch.y))
    assert float((y == 4).float().mean()) == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)


def test_the_loss_is_equation_3_plus_t_times_the_weighted_variational_term() -> None:
    schedule = make_schedule("linear", 1000)
    x0, noise, output = torch.rand(3, 1, 4, 4) * 2 - 1, torch.randn(3, 1, 4, 4), torch.randn(3, 2, 4, 4)
    j = torch.tensor([1, 300, 900])
    abar = schedule.alphas_cumprod[j].view(-1, 1, 1, 1)
    batch = NoisedBatch(x0, torch.zeros(3), j, noise, abar.sqrt() * x0 + (1 - abar).sqrt() * noise)
    base = (noise - output[:, :1]).square().mean()
    vlb = 1000 * variational_loss(schedule, x0, batch.x, j, output[:, :1], output[:, 1:]).mean()
    total, figures = diffusion_loss(schedule, batch, output, vlb_weight=0.001)
    torch.testing.assert_close(total, base + 0.001 * vlb)
    torch.testing.assert_close(torch.stack([figures["l_base"], figures["l_vlb"]]), torch.stack([base, vlb]))
    plain, figures = diffusion_loss(schedule, batch, output[:, :1], vlb_weight=0.001)
    assert set(figures) == {"l_base", "losses", "t"}
    torch.testing.assert_close(plain, base)
    torch.testing.assert_close(figures["losses"], (noise - output[:, :1]).square().mean((1, 2, 3)))


def test_a_timestep_samplers_weight_weighs_the_loss_and_not_what_it_learns_from() -> None:
    schedule, j, weight = make_schedule("linear", 1000), torch.tensor([1, 300, 900]), torch.tensor([0.5, 2.0, 0.0])
    x0, noise, output = torch.rand(3, 1, 4, 4) * 2 - 1, torch.randn(3, 1, 4, 4), torch.randn(3, 2, 4, 4)
    batch = NoisedBatch(x0, torch.zeros(3), j, noise, torch.randn(3, 1, 4, 4))
    total, figures = diffusion_loss(schedule, batch, output, 0.001, weight)
    unweighted = diffusion_loss(schedule, batch, output, 0.001)[1]["losses"]
    torch.testing.assert_close(total, (weight * unweighted).mean())
    assert torch.equal(figures["losses"], unweighted)
    assert torch.equal(figures["t"], j)


# ------------------------------------------------------------------------------------------------------------------ source


@pytest.mark.parametrize(("train_on", "wanted"), [("head", {0}), ("all", {0, 1, 2, 3})])
def test_the_source_sees_the_head_or_all_classes_as_the_recipe_says(
    train_on: str, wanted: set[int], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engines.training import source as source_module

    seen: set[int] = set()

    def watched(images: ImageSet, indices: Any, *rest: Any, **more: Any) -> Batch:
        seen.update(images.labels[indices].tolist())
        return draw(images, indices, *rest, **more)

    monkeypatch.setattr(source_module, "draw", watched)
    recipe = changed(recipe, "source", train_on=train_on)
    stage = source_stage(recipe, tail(), build_unet(recipe, 4), CPU)
    for step in range(20):
        stage.draw(step)
    assert seen == wanted


def test_masked_counts_keep_the_given_classes_alone() -> None:
    assert masked_counts(tail(), np.array([1, 3])).tolist() == [0, 6, 0, 3]


def test_a_conditional_model_is_given_labels_and_the_null_label_in_their_share(recipe: Recipe) -> None:
    recipe = changed(changed(recipe, "unet", class_cond=True), "source", label_dropout=0.5, train_on="all", batch_size=64)
    unet = build_unet(recipe, 4)
    assert unet.label_emb.weight.shape[0] == 5
    given: list[Tensor] = []
    unet.register_forward_pre_hook(lambda _m, inputs: given.append(inputs[2]))
    stage = source_stage(recipe, tail(), unet, CPU)
    for step in range(3):
        stage.loss(stage.model, stage.draw(step))
    assert set(torch.cat(given).tolist()) == {0, 1, 2, 3, 4}
    assert 0.35 < float((torch.cat(given) == 4).float().mean()) < 0.65


# ------------------------------------------------------------------------------------------------------------------ target


def two_models(recipe: Recipe) -> tuple[Any, Any]:
    torch.manual_seed(0)
    source, unet = awake(build_unet(recipe, 4)), build_unet(recipe, 4)
    unet.load_state_dict(source.state_dict())
    return source, unet


def test_the_source_is_frozen_gets_no_gradient_and_stays_equal(recipe: Recipe, tmp_path: Any) -> None:
    source, unet = two_models(recipe)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    stage = target_stage(recipe, tail(), source, unet, CPU)
    train(stage, tmp_path, 0, CPU)
    assert not source.training
    assert all(p.grad is None and not p.requires_grad for p in source.parameters())
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_both_models_are_given_the_same_images_and_timesteps_in_groups_of_one_tail_class(recipe: Recipe) -> None:
    source, unet = two_models(recipe)
    given: dict[str, list[Tensor]] = {"source": [], "target": []}
    source.register_forward_pre_hook(lambda _m, inputs: given["source"].extend(inputs[:2]))
    unet.register_forward_pre_hook(lambda _m, inputs: given["target"].extend(inputs[:2]))
    first_loss(target_stage(recipe, tail(), source, unet, CPU))
    assert all(torch.equal(a, b) for a, b in zip(given["source"], given["target"], strict=True))
    assert len(given["source"][1].unique()) > 2  # t is drawn per image


@pytest.mark.parametrize(("train_on", "knows"), [("head", False), ("all", True)])
def test_the_source_is_asked_for_no_label_that_it_never_saw(train_on: str, knows: bool, recipe: Recipe) -> None:
    recipe = changed(changed(changed(recipe, "unet", class_cond=True), "source", train_on=train_on), "target", label_dropout=0.0)
    frozen, unet = two_models(recipe)
    given: list[Tensor] = []
    frozen.register_forward_pre_hook(lambda _m, inputs: given.append(inputs[2]))
    stage = target_stage(recipe, tail(), frozen, unet, CPU)
    stage.loss(stage.model, batch := stage.draw(0))
    assert given[0].tolist() == (batch.y.tolist() if knows else [4] * len(batch))


def test_equation_10_is_l_base_plus_lambda_l_pair(recipe: Recipe) -> None:
    totals = {}
    for weight in (0.0, 0.5, 2.0):
        source, unet = two_models(recipe)
        unet.eval()
        stage = target_stage(changed(recipe, "target", lambda_pair=weight), tail(), source, unet, CPU)
        total, figures = first_loss(stage)
        totals[weight] = float(total.detach())
        assert ("l_pair" in figures) == (weight > 0)
    l_pair = float(figures["l_pair"])
    assert l_pair > 0
    assert totals[0.5] - totals[0.0] == pytest.approx(0.5 * l_pair, rel=1e-3)
    assert totals[2.0] - totals[0.0] == pytest.approx(2 * l_pair, rel=1e-3)


def test_equation_9_counts_no_head_class_and_is_a_mean_over_the_batch_or_a_sum(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    counts_given: list[Tensor] = []

    def one_each(_source: Tensor, _target: Tensor, counts: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
        counts_given.append(counts)
        return torch.ones(len(counts)), torch.zeros(len(counts)), torch.zeros(len(counts))

    monkeypatch.setattr(target_module, "pair_diversity_loss", one_each)
    source, unet = two_models(recipe)
    for reduction in ("batch_mean", "sum"):
        counts_given.clear()
        settings = changed(recipe, "target", adapt_on="all", batch_size=32, pair_reduction=reduction)
        stage = target_stage(settings, tail(), source, unet, CPU)
        l_pair = float(first_loss(stage)[1]["l_pair"])
        assert set(counts_given[0].tolist()) == set(COUNTS.tolist())  # N_k of each group's class, eight groups of four images
        of_tail = int((counts_given[0] != COUNTS[0]).sum())
        assert l_pair == pytest.approx(of_tail / (32 if reduction == "batch_mean" else 1))
    only_head = target_stage(settings, tail(groups=("many",) * 4), source, unet, CPU)
    _, figures = first_loss(only_head)
    assert float(figures["l_pair"]) == 0


def test_the_adapted_classes_are_medium_and_few_unless_the_recipe_says_all(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    def watched(images: ImageSet, indices: Any, *rest: Any) -> Batch:
        runs = images.labels[indices].reshape(-1, recipe.target.group_size)
        assert (runs == runs[:, :1]).all()
        seen.update(runs[:, 0].tolist())
        return draw(images, indices, *rest)

    monkeypatch.setattr(target_module, "draw", watched)
    source, unet = two_models(recipe)
    for adapt_on, wanted in (("medium+few", {1, 2, 3}), ("all", {0, 1, 2, 3})):
        seen.clear()
        stage = target_stage(changed(recipe, "target", adapt_on=adapt_on), tail(), source, unet, CPU)
        for step in range(15):
            stage.draw(step)
        assert seen == wanted


@pytest.mark.parametrize("reduction", ["batch_mean", "sum"])
def test_the_mean_loss_of_a_batchs_parts_is_the_loss_of_the_batch(reduction: str, recipe: Recipe) -> None:
    recipe = changed(recipe, "target", batch_size=32, lambda_pair=2.0, pair_reduction=reduction, adapt_on="all", precision="fp32")
    source, unet = two_models(recipe)
    stage = target_stage(recipe, tail(), source, unet.eval(), CPU)
    batch = stage.draw(0)
    whole, figures = stage.loss(unet, batch)
    for n in (2, 4, 8):
        parts = [stage.loss(unet, batch.part(i, n)) for i in range(n)]
        torch.testing.assert_close(torch.stack([loss for loss, _ in parts]).mean(), whole)
        torch.testing.assert_close(torch.stack([f["l_pair"] for _, f in parts]).mean(), figures["l_pair"])
        assert torch.equal(torch.cat([f["t"] for _, f in parts]), figures["t"])


def test_a_source_that_never_saw_a_label_is_given_the_null_label_for_it(recipe: Recipe) -> None:
    recipe = changed(changed(recipe, "unet", class_cond=True), "target", label_dropout=0.0, adapt_on="all", batch_size=32)
    source, unet = two_models(recipe)
    given: dict[str, Tensor] = {}
    source.register_forward_pre_hook(lambda _m, inputs: given.update(source=inputs[2]))
    unet.register_forward_pre_hook(lambda _m, inputs: given.update(target=inputs[2]))
    first_loss(target_stage(recipe, tail(), source, unet, CPU))
    assert set(given["target"].tolist()) == {0, 1, 2, 3}
    assert torch.equal(given["source"], torch.where(given["target"] == 0, 0, 4))


# ------------------------------------------------------------------------------------------------------------------- guide


def test_a_warm_prototype_is_its_classs_mean_feature_of_unit_length(recipe: Recipe) -> None:
    data, guide = tail(), build_guide(recipe, COUNTS)
    warm_start(guide, recipe, data, CPU)
    schedule = training_schedule(recipe, CPU)
    for k, members in enumerate(by_class(data.train.labels, 4)):
        batch = draw(data.train, members, recipe.guide, recipe.seed, "guide/warm-start", k)
        at = noised(schedule, batch, (batch.u * 1000).long())
        with torch.no_grad():
            mean = guide(at.x, at.j).double().mean(0)
        torch.testing.assert_close(guide.prototypes[k].double(), mean / mean.norm(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_prototypes_move_by_equation_11_alone_with_the_features_of_before_the_step(parts: int, recipe: Recipe, tmp_path: Any) -> None:
    recipe = changed(recipe, "guide", dropout=0.0, accumulate=parts)
    data, guide = tail(), build_guide(recipe, COUNTS)
    warm_start(guide, recipe, data, CPU)
    c = guide.prototypes.double().numpy().copy()
    seen: list[Tensor] = []
    guide.register_forward_hook(lambda _m, _i, out: seen.append(out.detach().double()))
    train(guide_stage(recipe, data, guide, CPU), tmp_path, recipe.seed, CPU)
    members, probabilities = by_class(data.train.labels, 4), class_probabilities(COUNTS, recipe.guide.class_sampling)
    assert len(seen) == parts * recipe.guide.train_steps
    for step in range(recipe.guide.train_steps):
        features = torch.cat(seen[parts * step : parts * (step + 1)])  # once a step, with all of the batch in its order
        m = early_momentum(recipe.guide.prototype_momentum, step)
        labels = data.train.labels[class_batch(members, probabilities, recipe.guide.batch_size, recipe.seed, step, "guide")]
        for f, k in zip(features.numpy(), labels, strict=True):
            c[k] = m * c[k] + (1 - m) * f
        c /= np.linalg.norm(c, axis=1, keepdims=True)
    np.testing.assert_allclose(guide.prototypes, c, rtol=1e-3, atol=1e-5)  # the EMA's too: prototypes are not averaged twice
    torch.testing.assert_close(guide.prototypes.norm(dim=1), torch.ones(4))


def test_the_momentum_of_equation_11_is_m_once_the_first_steps_are_over() -> None:
    assert early_momentum(0.999, 0) == 0.1
    assert early_momentum(0.999, 90) == 0.91
    assert early_momentum(0.999, 10_000) == 0.999
    assert early_momentum(0.0, 10_000) == 0.0


def test_the_log_prior_is_that_of_the_training_set(recipe: Recipe) -> None:
    np.testing.assert_allclose(build_guide(recipe, COUNTS).log_prior.exp(), COUNTS / COUNTS.sum(), rtol=1e-5)
    flat = build_guide(changed(recipe, "guide", class_prior=False), COUNTS)
    np.testing.assert_allclose(flat.log_prior.exp(), [0.25] * 4, rtol=1e-5)


def test_a_guide_that_starts_from_the_target_has_its_encoder_half_and_its_own_head(recipe: Recipe) -> None:
    same = {key: getattr(recipe.unet, key) for key in ("model_channels", "channel_mult", "num_res_blocks", "attention_resolutions")}
    unet, guide = build_unet(recipe, 4), build_guide(changed(recipe, "guide", **same), COUNTS)
    head = {name: value.clone() for name, value in guide.encoder.state_dict().items() if name.startswith("out.")}
    taken = take_encoder(guide, unet)
    ours, theirs = guide.encoder.state_dict(), unet.state_dict()
    assert taken == len(ours) - len(head)
    for name, value in ours.items():
        assert torch.equal(value, head[name] if name in head else theirs[name]), name
    assert take_encoder(build_guide(changed(recipe, "guide", **{**same, "model_channels": 32}), COUNTS), unet) == 0


# ------------------------------------------------------------------------------------------------ held-out images, and resuming


def held_out_recipe(recipe: Recipe) -> Recipe:
    return changed(recipe, "target", holdout_fraction=0.3, holdout_every_steps=1, patience=2, adapt_on="medium+few")


def test_held_out_images_are_in_no_batch_of_the_target_and_the_head_gives_none(recipe: Recipe) -> None:
    recipe, data = held_out_recipe(recipe), tail()
    source, unet = two_models(recipe)
    held = split(data.train.labels, data.classes_of("medium", "few"), 0.3, recipe.seed)
    assert len(held)
    assert 0 not in data.train.labels[held]
    stage = target_stage(recipe, data, source, unet, CPU)
    seen = torch.cat([stage.draw(step).pixels for step in range(60)]).flatten(1).unique(dim=0)
    for index in range(12, len(data.train)):  # of the tail; without flips and shifts an image is known by its pixels
        image = channels_first(data.train.pixels(np.array([index]))).flatten(1)
        assert bool((seen == image).all(1).any()) == (index not in held)


def test_the_target_is_judged_by_the_held_out_loss_of_the_model_it_is_given(recipe: Recipe) -> None:
    recipe, data = held_out_recipe(recipe), tail()
    source, unet = two_models(recipe)
    stage = target_stage(recipe, data, source, unet, CPU)
    assert (stage.held_out_every_steps, stage.patience) == (1, 2)
    assert stage.held_out
    held = split(data.train.labels, data.classes_of("medium", "few"), 0.3, recipe.seed)
    for model in (unet, awake(build_unet(recipe, 4))):
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.target.precision == "bf16"):
            wanted = held_out_loss(
                model, data.train, held, data.groups, training_schedule(recipe, CPU), recipe.seed, conditional=recipe.unet.class_cond
            )
        assert dict(stage.held_out(model)) == wanted
    assert target_stage(changed(recipe, "target", holdout_fraction=0.0, patience=0), data, source, unet, CPU).held_out is None


class Reads(TorchDispatchMode):
    """Counts values read back from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__.split(".")[0] in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select"):
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", ["source", "target", "guide"])
def test_a_stage_with_every_option_resumes_bit_equal_from_any_step_with_other_workers(name: str, recipe: Recipe, tmp_path: Path) -> None:
    recipe = held_out_recipe(changed(recipe, "diffusion", timestep_sampler="loss-second-moment", steps=20))
    recipe = changed(recipe, name, accumulate=2, horizontal_flip=True, shift_px=1, save_every_steps=1)
    recipe = changed(changed(recipe, "unet", dropout=0.2, class_cond=True), "guide", dropout=0.2)

    def stage(workers: int, die_at: int = -1) -> Stage:
        made = changed(recipe, name, workers=workers)
        source, unet = two_models(made)  # sets the seed
        guide = build_guide(made, COUNTS)
        warm_start(guide, made, tail(), CPU)
        whole = {
            "source": lambda: source_stage(made, tail(), unet, CPU),
            "target": lambda: target_stage(made, tail(), source, unet, CPU),
            "guide": lambda: guide_stage(made, tail(), guide, CPU),
        }[name]()

        def draw(step: int, rows: slice = ALL) -> Batch:
            if step == die_at:
                raise Killed
            return whole.draw(step, rows)

        return replace(whole, draw=draw)

    train(stage(0), tmp_path / "whole", recipe.seed, CPU)
    for step in range(1, 4):
        run = tmp_path / str(step)
        with pytest.raises(Killed):
            train(stage(2, die_at=step), run, recipe.seed, CPU)
        train(stage(1), run, recipe.seed, CPU)
        a, b = store.load_checkpoint(tmp_path / "whole"), store.load_checkpoint(run)
        assert a
        assert b
        assert set(a.groups) == {"model", "ema", "optimizer"} | {"source": {"state"}, "target": {"state", "best"}, "guide": set()}[name]
        assert a.state == b.state
        for group, tensors in a.groups.items():
            assert all(torch.equal(value, b.groups[group][key]) for key, value in tensors.items()), (step, group)


def test_a_step_of_each_stage_reads_nothing_back(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a CPU, and there alone, one_hot reads its argument back to check it.
    monkeypatch.setattr(F, "one_hot", lambda labels, count: (labels[:, None] == torch.arange(count)).long())
    recipe = changed(changed(recipe, "diffusion", timestep_sampler="loss-second-moment", steps=20), "unet", class_cond=True)
    source, unet = two_models(recipe)
    made = (
        source_stage(recipe, tail(), unet, CPU),
        target_stage(recipe, tail(), source, unet, CPU),
        guide_stage(recipe, tail(), build_guide(recipe, COUNTS), CPU),
    )
    for stage in made:
        trainer, batches = Trainer(stage, 0, CPU, ALONE), [stage.draw(step) for step in range(2)]
        with Reads() as reads:
            for step, batch in enumerate(batches):
                trainer.step(step, batch)
        assert reads.seen == [], stage.name


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="waiting for a GPU can be seen on a GPU alone")
def test_a_step_on_a_gpu_waits_for_nothing(recipe: Recipe) -> None:
    device = torch.device("cuda", 0)
    recipe = changed(changed(recipe, "diffusion", timestep_sampler="loss-second-moment", steps=20), "unet", class_cond=True)
    source, unet = two_models(recipe)
    made = (
        source_stage(recipe, tail(), unet, device),
        target_stage(recipe, tail(), source, unet, device),
        guide_stage(recipe, tail(), build_guide(recipe, COUNTS), device),
    )
    for stage in made:
        trainer, batches = Trainer(stage, 0, device, ALONE), [stage.draw(step).pinned() for step in range(3)]
        trainer.step(0, batches[0])
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in (1, 2):
                trainer.step(step, batches[step])
        finally:
            torch.cuda.set_sync_debug_mode("default")
