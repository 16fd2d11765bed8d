"""engines/networks/diffusers_folder.py: the same weights give the same numbers in diffusers, both ways; what does not fit is named."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines import store
from engines.diffusion.schedule import make_schedule
from engines.errors import DataError, UsageError
from engines.networks import diffusers_folder
from engines.networks.diffusers_folder import WEIGHTS, UNet2DConfig, read, write
from engines.networks.unet import Architecture, UNet
from engines.recipe import Recipe, validate

ADM = Architecture(
    image_size_px=16,
    in_channels=3,
    model_channels=32,
    channel_mult=(1, 2, 4),
    num_res_blocks=2,
    attention_resolutions=(8, 4),
    num_head_channels=32,
)
SMALL = replace(ADM, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(16, 8))
DDPM = replace(ADM, resblock_updown=False, use_scale_shift_norm=False, num_res_blocks=1, attention_resolutions=(8,))
NETWORKS = {  # architecture, learned variance, label rows
    "scale-shift, resampling in residual blocks, attention at two levels": (ADM, True, 0),
    "added time embedding, resampling by convolution": (DDPM, False, 0),
    "labels and a null label, q k v in the new order": (replace(ADM, use_new_attention_order=True, attention_resolutions=(8,)), True, 11),
    "one head at every width": (replace(ADM, num_heads=1, resblock_updown=False), False, 0),
    "a level of one and a half widths": (replace(DDPM, model_channels=64, channel_mult=(1, 1.5)), False, 0),
    "one level, one channel": (replace(ADM, channel_mult=(1,), attention_resolutions=(), in_channels=1), True, 4),
}
TOLERANCE = 1e-5  # largest difference in float32, on outputs of a magnitude of 1 to 3


@pytest.fixture(scope="module")
def diffusers() -> Any:
    """The library: its import takes seconds, and its warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("diffusers", reason="diffusers, of the extra `test`, is the independent reference here")
        library.UNet2DModel, library.DDPMPipeline, library.DDPMScheduler  # noqa: B018 (the library imports them when they are asked for)
    library.utils.logging.set_verbosity_error()
    return library


def recipe_of(architecture: Architecture, learn_sigma: bool, **diffusion: Any) -> Recipe:
    """A recipe with the process and the variance; its U-Net is of no account to `write`."""
    guide = {"channel_mult": [1], "attention_resolutions": []}
    unet = {"learn_sigma": learn_sigma, "attention_resolutions": [16]}
    return validate(
        {"name": "any", "data": {"image_size_px": 16}, "unet": unet, "diffusion": diffusion, "guide": guide, "synth": {"steps": 1}}
    )


def random_unet(architecture: Architecture, learn_sigma: bool, classes: int, seed: int = 0) -> UNet:
    """In evaluation mode; no weight is zero, as the last layer of each block is at first."""
    unet = UNet(architecture, architecture.in_channels * (2 if learn_sigma else 1), classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in unet.named_parameters():
            around = 1.0 if value.ndim == 1 and name.endswith("weight") else 0.0  # the gains of norms
            value.copy_(around + 0.04 * torch.randn(value.shape, generator=generator))
    return unet.eval()


def written(folder: Path, name: str = "scale-shift, resampling in residual blocks, attention at two levels") -> UNet:
    """One of the networks, in a folder."""
    architecture, learn_sigma, classes = NETWORKS[name]
    unet = random_unet(architecture, learn_sigma, classes)
    write(folder, unet, recipe_of(architecture, learn_sigma))
    return unet


def example(architecture: Architecture, classes: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, t, y) with t from one end to the other, and the null label among y."""
    size = (4, architecture.in_channels, architecture.image_size_px, architecture.image_size_px)
    x = torch.randn(size, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, classes - 2, classes - 1]) if classes else None


def same_network(weights: dict[str, Tensor], card: Any) -> UNet:
    unet = UNet(card.architecture, card.out_channels, card.label_rows).eval()
    unet.load_state_dict(weights)
    return unet


def largest_difference(ours: UNet, theirs: Any) -> float:
    x, t, y = example(ours.architecture, ours.classes)
    with torch.no_grad():
        a, b = ours(x, t, y), theirs(x, t, class_labels=y).sample
    assert 0.5 < float(a.abs().max()) < 10, "numbers worth comparing"
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_our_weights_give_our_numbers_in_diffusers(name: str, diffusers: Any, tmp_path: Path) -> None:
    unet = written(tmp_path / "out", name)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "out", subfolder="unet", low_cpu_mem_usage=False).eval()
    difference = largest_difference(unet, theirs)
    assert difference < TOLERANCE


THEIRS: dict[str, dict[str, Any]] = {
    "the library's training example": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 32, 64),
    },
    "sines first": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 64),
        "flip_sin_to_cos": False,
        "attention_head_dim": None,
    },
    "ADM": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "block_out_channels": (32, 64, 64),
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attn_norm_num_groups": 32,
        "attention_head_dim": 16,
        "num_class_embeds": 5,
        "out_channels": 6,
        "layers_per_block": 1,
    },
}


@pytest.mark.parametrize("name", THEIRS)
def test_a_network_of_diffusers_gives_its_numbers_in_ours_and_goes_back_bit_for_bit(name: str, diffusers: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(sample_size=16, **THEIRS[name]).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    weights, card = read(tmp_path / "theirs")
    ours = same_network(weights, card)
    difference = largest_difference(ours, theirs)
    assert difference < TOLERANCE
    assert card.noise_schedule is None, "a model without a scheduler says nothing of its noise"
    if THEIRS[name].get("flip_sin_to_cos", True):
        write(tmp_path / "back", ours, recipe_of(card.architecture, card.learn_sigma))
        back = store.read_tensors(tmp_path / "back" / "unet" / WEIGHTS)
        assert back.keys() == theirs.state_dict().keys()
        assert all(torch.equal(back[key], value) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_ours_comes_back_from_its_folder_bit_for_bit(name: str, tmp_path: Path) -> None:
    unet = written(tmp_path / "out", name)
    weights, card = read(tmp_path / "out")
    back = same_network(weights, card)
    x, t, y = example(unet.architecture, unet.classes)
    with torch.no_grad():
        assert torch.equal(back(x, t, y), unet(x, t, y))
    assert (card.label_rows, bool(card.null_label)) == (unet.classes, bool(unet.classes))
    assert (card.noise_schedule, card.diffusion_steps) == ("linear", 1000)
    if not unet.architecture.use_new_attention_order:  # which imports do not use
        assert all(torch.equal(weights[key], value) for key, value in unet.state_dict().items())
    assert read(tmp_path / "out" / "unet")[1].architecture == card.architecture, "the model's own folder is as good"


def test_ddpm_pipeline_loads_the_folder_and_samples(diffusers: Any, tmp_path: Path) -> None:
    written(tmp_path / "out")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert images.shape == (2, 16, 16, 3)
    assert pipeline.scheduler.config.variance_type == "learned_range"


@pytest.mark.parametrize(("kind", "steps"), [("linear", 1000), ("linear", 100), ("linear", 10), ("cosine", 1000), ("cosine", 50)])
def test_the_scheduler_in_the_folder_has_our_betas(kind: str, steps: int, diffusers: Any, tmp_path: Path) -> None:
    unet = random_unet(DDPM, False, 0)
    write(tmp_path, unet, recipe_of(DDPM, False, noise_schedule=kind, steps=steps))
    scheduler = diffusers.DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    ours = make_schedule("linear" if kind == "linear" else "cosine", steps)
    assert torch.allclose(scheduler.betas, ours.betas, rtol=1e-5, atol=1e-8)
    assert scheduler.config.variance_type == "fixed_small"
    assert read(tmp_path)[1].noise_schedule == kind


def test_a_labeled_network_is_no_ddpm_pipeline(tmp_path: Path) -> None:
    written(tmp_path, "labels and a null label, q k v in the new order")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scheduler", "unet"]


def test_attention_under_its_names_of_old_is_read(tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / "unet" / WEIGHTS
    of_old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = store.read_tensors(path)
    for new, old in of_old.items():
        tensors = {key.replace(f".{new}.", f".{old}."): value for key, value in tensors.items()}
    before, _ = read(tmp_path)
    store.write_tensors(path, tensors)
    after, _ = read(tmp_path)
    assert all(torch.equal(after[key], value) for key, value in before.items())


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the smallest network with every kind of block. To be read only."""
    folder = tmp_path_factory.mktemp("small") / "small"
    write(folder, random_unet(SMALL, True, 0), recipe_of(SMALL, True))
    return folder


@pytest.fixture
def folder(small: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return Path(shutil.copytree(small, tmp_path / "small"))


def change(path: Path, **keys: Any) -> None:
    store.write_json(path, {**store.read_json(path), **keys})


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as error:
        read(folder)
    assert error.value.remedy
    assert "\n" not in error.value.problem
    return error.value.problem


CONFIG_KEYS: dict[str, Any] = {
    "center_input_sample": True,
    "time_embedding_type": "fourier",
    "time_embedding_dim": 64,
    "freq_shift": 1,
    "mid_block_type": None,
    "mid_block_scale_factor": 2,
    "act_fn": "gelu",
    "norm_num_groups": 16,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-6,
    "add_attention": False,
    "class_embed_type": "timestep",
    "out_channels": 4,
    "attention_head_dim": 24,
    "sample_size": None,
    "block_out_channels": [32, 48],
    "down_block_types": ["SkipDownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    "downsample_type": "conv",
    "upsample_type": "fir",
    "resnet_time_scale_shift": "ada_group",
    "a_key_of_tomorrow": 1,
}


@pytest.mark.parametrize("key", CONFIG_KEYS)
def test_a_config_that_our_network_cannot_hold_is_refused_by_the_name_of_its_key(key: str, folder: Path) -> None:
    change(folder / "unet" / "config.json", **{key: CONFIG_KEYS[key]})
    assert key in refusal(folder)


def test_all_keys_in_the_way_are_told_at_once(folder: Path) -> None:
    blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    convolve = {"downsample_type": "conv", "upsample_type": "conv"}
    change(folder / "unet" / "config.json", freq_shift=1, downsample_padding=0, norm_eps=1e-6, **blocks, **convolve)
    change(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    problem = refusal(folder)
    for words in (
        "freq_shift = 1, not 0",
        "downsample_padding = 0, not 1",
        "norm_eps = 1e-06, not 1e-05",
        "prediction_type = v_prediction",
    ):
        assert words in problem


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"beta_schedule": "scaled_linear"}, "beta_schedule = scaled_linear"),
        ({"beta_end": 0.012}, "beta_schedule = linear from 0.0001 to 0.012"),
        ({"trained_betas": [0.1] * 1000}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"variance_type": "learned"}, "variance_type"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps"),
    ],
)
def test_a_process_that_is_not_ours_is_refused(keys: dict[str, Any], words: str, folder: Path) -> None:
    change(folder / "scheduler" / "scheduler_config.json", **keys)
    assert words in refusal(folder)


def test_a_scheduler_without_betas_is_refused(folder: Path) -> None:
    store.write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "CMStochasticIterativeScheduler", "sigma_max": 80.0})
    assert "CMStochasticIterativeScheduler" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot read"),
        ("[1]", "not UNet2DModel"),
        ('{"_class_name": "UNet2DConditionModel"}', "UNet2DConditionModel"),
        ('{"_class_name": "UNet2DModel", "layers_per_block": 1000000000}', "layers_per_block"),
        ('{"_class_name": "UNet2DModel", "block_out_channels": "many", "in_channels": -1}', "in_channels"),
    ],
)
def test_a_damaged_or_foreign_config_is_refused(text: str, words: str, folder: Path) -> None:
    store.write_text(folder / "unet" / "config.json", text)
    assert words in refusal(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(sorted(UNet2DConfig.model_fields)),
    value=st.none() | st.booleans() | st.integers(-4, 40) | st.floats() | st.text(max_size=4) | st.lists(st.integers(-1, 64), max_size=3),
)
def test_whatever_a_key_holds_the_folder_is_read_or_refused(key: str, value: Any, folder: Path) -> None:
    path = folder / "unet" / "config.json"
    config = path.read_bytes()
    store.write_text(path, json.dumps({**json.loads(config), key: value}))
    try:
        read(folder)
    except DataError as error:
        assert error.remedy
    finally:
        store.write_bytes(path, config)


def test_weights_that_are_not_safetensors_are_refused_with_the_way_to_make_them(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(DataError, match=r"diffusion_pytorch_model\.bin") as error:
        read(folder)
    assert "save_pretrained" in error.value.remedy


def test_weights_that_are_missing_truncated_or_of_another_network_are_refused(folder: Path) -> None:
    assert "config.json" in refusal(folder.parent)
    path = folder / "unet" / WEIGHTS
    whole = path.read_bytes()
    store.write_bytes(path, whole[: len(whole) // 2])
    assert "cannot read" in refusal(folder)
    store.write_bytes(path, whole)
    change(folder / "unet" / "config.json", layers_per_block=2)
    assert "does not fit" in refusal(folder)
    path.unlink()
    assert "has no diffusion_pytorch_model.safetensors" in refusal(folder)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        (replace(ADM, channel_mult=(2, 2)), "unet.channel_mult begins with 2"),
        (replace(ADM, num_heads=2), "unet.num_heads = 2"),
        (replace(ADM, resblock_updown=False, conv_resample=False), "unet.conv_resample = false"),
        (replace(ADM, model_channels=16, num_head_channels=16), r"unet.model_channels = 16 makes widths of \[16\]"),
        (replace(ADM, channel_mult=(1, 1.5, 2), num_head_channels=16), r"unet.model_channels = 32 makes widths of \[48\]"),
    ],
)
def test_what_diffusers_cannot_hold_is_refused_by_the_recipes_key_and_nothing_is_written(
    architecture: Architecture, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words) as error:
        write(tmp_path / "out", UNet(architecture, 3), recipe_of(architecture, False))
    assert "UNet2DModel" in error.value.problem
    assert not (tmp_path / "out").exists()


def test_heads_of_one_width_fit_although_they_are_counted(tmp_path: Path) -> None:
    architecture = replace(ADM, channel_mult=(1, 2, 2), num_heads=2)
    unet = random_unet(architecture, False, 0)
    write(tmp_path, unet, recipe_of(architecture, False))
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["attention_head_dim"] == 32


def test_the_folder_is_read_without_diffusers() -> None:
    assert "import diffusers" not in Path(diffusers_folder.__file__).read_text(encoding="utf-8")
