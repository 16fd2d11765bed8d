"""The prototype guide: unit features, unit prototypes, log-probabilities that can be followed back to the image."""

from __future__ import annotations

import pytest
import torch

from diffrc_cli.recipe import embedded
from engines.networks.guide import Guide
from engines.networks.unet import Architecture, UNet, parameter_count
from engines.recipe import load
from engines.training.diffusion import architecture, build_unet

SMALL = Architecture(
    image_size_px=8,
    in_channels=1,
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_head_channels=8,
)
COUNTS = torch.tensor([60, 30, 10])


def guide(class_prior: bool = True) -> Guide:
    torch.manual_seed(0)
    made = Guide(SMALL, COUNTS, embedding_dim=12, class_prior=class_prior)
    made.prototypes.copy_(torch.nn.functional.normalize(torch.randn(3, 12), dim=1))
    return made.eval()


def test_features_and_prototypes_lie_on_the_unit_sphere() -> None:
    f = guide()(torch.randn(5, 1, 8, 8), torch.arange(5) * 200)
    assert f.shape == (5, 12)
    torch.testing.assert_close(f.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(Guide(SMALL, COUNTS, 12).prototypes.norm(dim=1), torch.ones(3))


def test_features_are_unit_and_log_probabilities_float32_under_autocast() -> None:
    model, x, t = guide(), torch.randn(5, 1, 8, 8), torch.arange(5) * 200
    with torch.autocast("cpu", torch.bfloat16):
        f, log_p = model(x, t), model.log_probs(x, t)
    assert f.dtype == log_p.dtype == torch.float32
    torch.testing.assert_close(f.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(5))


def test_the_gradient_of_log_p_by_the_image_is_finite_and_not_zero_at_every_t() -> None:
    x, t = torch.randn(4, 1, 8, 8).requires_grad_(), torch.tensor([0, 100, 500, 999])
    (gradient,) = torch.autograd.grad(guide().log_probs(x, t)[:, 1].sum(), x)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).norm(dim=1) > 1e-6).all()


def test_the_gradient_is_the_slope_of_log_p() -> None:
    model, t = guide(), torch.tensor([300])
    x = torch.randn(1, 1, 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_probs(x, t)[0, 1], x)
    step = 0.02 * gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (float(model.log_probs(x + sign * step, t)[0, 1]) for sign in (1, -1))
    assert (ahead - behind) / 0.04 == pytest.approx(float(gradient.norm()), rel=2e-2)


def test_at_equal_cosines_the_prior_decides_and_without_it_every_class_counts_alike() -> None:
    for class_prior, wanted in ((True, COUNTS / 100), (False, torch.full((3,), 1 / 3))):
        model = guide(class_prior)
        model.prototypes.copy_(model.prototypes[:1].expand(3, -1).clone())
        p = model.log_probs(torch.randn(2, 1, 8, 8), torch.tensor([0, 9])).exp()
        torch.testing.assert_close(p, wanted.expand(2, 3).contiguous(), rtol=1e-4, atol=1e-6)


def test_a_lower_tau_makes_the_guide_surer() -> None:
    x, t = torch.randn(6, 1, 8, 8), torch.zeros(6, dtype=torch.int64)
    soft, hard = guide(class_prior=False), guide(class_prior=False)
    soft.tau, hard.tau = 1.0, 0.01
    assert (hard.log_probs(x, t).amax(1) > soft.log_probs(x, t).amax(1)).all()


def test_prototypes_are_saved_but_not_trained() -> None:
    model = guide()
    assert {"prototypes", "log_prior"} <= set(model.state_dict())
    assert not {"prototypes", "log_prior"} & {name for name, _ in model.named_parameters()}


def test_the_encoder_is_the_unets_first_half_by_name_and_shape() -> None:
    with torch.device("meta"):
        unet, encoder = UNet(SMALL, 1).state_dict(), Guide(SMALL, COUNTS, 12).encoder.state_dict()
    shared = {name: tuple(value.shape) for name, value in encoder.items() if not name.startswith("out.")}
    first_half = {name: tuple(v.shape) for name, v in unet.items() if name.split(".")[0] in ("time_embed", "input_blocks", "middle_block")}
    assert shared == first_half


@pytest.mark.parametrize("name", embedded())
def test_the_networks_of_every_embedded_recipe_can_be_built(name: str) -> None:
    recipe = load(embedded()[name].read_text(encoding="utf-8"))
    with torch.device("meta"):
        unet = build_unet(recipe, classes=10)
        small = Guide(architecture(recipe, recipe.guide), torch.ones(10, device="cpu"), recipe.guide.embedding_dim)
    assert parameter_count(unet) > 10_000
    if recipe.data.image_size_px == 32:
        assert 1e6 < parameter_count(small) < 3e6
