"""The Inception-v3 of FID: published counts, the quirks that set it apart, its way of resizing, its file. The weights are random."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engines import store
from engines.errors import DataError
from engines.networks import inception
from engines.networks.inception import METADATA_KEY, Conv, Inception, InceptionCard, features, load, read, resize, shapes, write

LEARNED = ("weight", "bias")


@pytest.fixture(scope="module")
def network() -> Inception:
    """Random weights that keep the signal's size; the same whoever asks."""
    network = Inception().eval()
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith("conv.weight"):
            value.normal_(0, math.sqrt(2 / value[0].numel()), generator=generator)
        elif name.endswith(("running_mean", "bias")):
            value.normal_(0, 0.1, generator=generator)
    return network


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Inception:
    """Two layers in place of the network, for what is about files alone: the real one has 95 MB."""
    monkeypatch.setattr(inception, "_STEM", (Conv("Conv2d_1a_3x3", 4, (3, 3), 2),))
    monkeypatch.setattr(inception, "_BLOCKS", {"Mixed_7c": ((Conv("branch1x1", 6),), ("maximum", Conv("branch_pool", 2)))})
    monkeypatch.setattr(inception, "FEATURES", 8)
    return Inception().eval()


@pytest.fixture
def published(small: Inception, tmp_path: Path) -> Path:
    """A file such as the published one, of random weights."""
    path = tmp_path / inception.PUBLISHED_FILE
    last = {"fc.weight": torch.zeros(1008, 8), "fc.bias": torch.zeros(1008)}
    counters = {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}
    torch.save({**small.state_dict(), **last, **counters}, path)  # noqa: TID251 (what others have published)
    return path


def test_it_has_the_published_number_of_parameters() -> None:
    """torchvision: 27,161,264 with 1,000 classes and an auxiliary classifier of 3,326,696; Keras, without gammas: 23,817,352 learned."""
    found = shapes()
    learned = {name: math.prod(shape) for name, shape in found.items() if name.endswith(LEARNED)}
    outputs = 2049 * 1000
    assert sum(learned.values()) - 2049 * inception.OUTPUTS + outputs == 27_161_264 - 3_326_696
    gammas = sum(math.prod(shape) for name, shape in found.items() if name.endswith("bn.weight"))
    assert sum(learned.values()) - 2049 * inception.OUTPUTS + outputs - gammas == 23_817_352
    assert len(found) == 94 * 5 + 2


def test_its_weights_have_the_published_names() -> None:
    found = shapes()
    assert found["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert found["Mixed_5b.branch_pool.conv.weight"] == (32, 192, 1, 1)
    assert found["Mixed_6b.branch7x7dbl_2.conv.weight"] == (128, 128, 7, 1)
    assert found["Mixed_7a.branch7x7x3_4.conv.weight"] == (192, 192, 3, 3)
    assert found["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)
    assert found["fc.weight"] == (1008, 2048)


def test_an_image_shrinks_from_299_pixels_to_8_and_gray_counts_as_three_equal_channels(network: Inception) -> None:
    """Szegedy et al. 2015, Table 1."""
    sizes: dict[str, tuple[int, ...]] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: sizes.__setitem__(name, tuple(out.shape[1:])))
        for name, module in network.named_children()
    ]
    gray = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
    found = features(network, gray)
    for hook in hooks:
        hook.remove()
    assert (found.shape, found.dtype) == ((1, 2048), np.float32)
    assert sizes["Conv2d_2a_3x3"] == (32, 147, 147)
    assert sizes["Conv2d_4a_3x3"] == (192, 71, 71)
    assert sizes["Mixed_5b"] == (256, 35, 35)
    assert sizes["Mixed_5d"] == (288, 35, 35)
    assert sizes["Mixed_6e"] == (768, 17, 17)
    assert sizes["Mixed_7a"] == (1280, 8, 8)
    assert sizes["Mixed_7c"] == (2048, 8, 8)
    assert np.array_equal(found, features(network, gray.repeat(3, axis=3)))
    assert features(network, gray[:0]).shape == (0, 2048)


def of_those_there(x: torch.Tensor) -> torch.Tensor:
    """Means of 3 by 3 pixels that leave out what is not there."""
    sums, counts = (F.avg_pool2d(F.pad(y, (1, 1, 1, 1)), 3, stride=1) for y in (x, torch.ones_like(x)))
    return sums / counts


def largest(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-torch.inf), 3, stride=1)


@pytest.mark.parametrize(("name", "pool"), [("Mixed_5b", of_those_there), ("Mixed_7b", of_those_there), ("Mixed_7c", largest)])
def test_an_average_at_the_border_is_of_the_pixels_that_are_there_and_the_last_block_takes_the_maximum(
    network: Inception, name: str, pool: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    block = network.get_submodule(name)
    channels = shapes()[f"{name}.branch1x1.conv.weight"][1]
    x = torch.randn(1, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = block.get_submodule("branch_pool")(pool(x))
        torch.testing.assert_close(block(x)[:, -expected.shape[1] :], expected)


def test_resizing_takes_output_i_from_i_times_w_over_the_size() -> None:
    x = torch.tensor([[[[0.0, 10.0], [20.0, 50.0]]]])
    found = resize(x, 4)[0, 0]  # at 0, 0.5, 1, 1.5; beyond the last pixel is that pixel
    assert found.tolist() == [[0, 5, 10, 10], [10, 20, 30, 30], [20, 35, 50, 50], [20, 35, 50, 50]]
    assert torch.equal(resize(x, 2), x)


def test_a_published_file_comes_back_with_every_weight_and_its_digest(small: Inception, published: Path, tmp_path: Path) -> None:
    weights, card = read(published)
    assert card == InceptionCard(inception.PUBLISHED_FILE, inception.sha256(published))
    write(tmp_path / "i.safetensors", weights, card)
    again, found = load(tmp_path / "i.safetensors")
    assert found == card
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in small.state_dict().items())
    assert not any(value.requires_grad for value in again.parameters())


def test_only_the_digest_of_the_published_file_makes_it_fid(published: Path) -> None:
    _, card = read(published)
    assert not card.is_fid
    assert "not the published weights" in card.name
    assert InceptionCard("any.pth", inception.PUBLISHED_SHA256 + "0" * 56).is_fid


def test_other_weights_are_refused_with_what_to_download(published: Path, tmp_path: Path) -> None:
    state = torch.load(published, weights_only=True)  # noqa: TID251 (this test's own)
    other = tmp_path / "other.pth"
    for change, told in (
        ({"fc.bias": torch.zeros(1000)}, "1 of its weights differ .fc.bias"),
        ({"AuxLogits.fc.bias": torch.zeros(1000)}, "1 of its weights differ .AuxLogits"),
        ({"Mixed_7c.branch1x1.bn.bias": torch.full((6,), torch.nan)}, "not finite"),
    ):
        torch.save({**state, **change}, other)  # noqa: TID251 (what others have published)
        with pytest.raises(DataError, match=told) as refused:
            read(other)
        assert "pytorch-fid" in refused.value.remedy
    with pytest.raises(DataError, match="cannot read") as refused:
        read(tmp_path / "nowhere.pth")
    assert "pytorch-fid" in refused.value.remedy


def test_a_file_that_is_none_of_ours_is_told(published: Path, tmp_path: Path) -> None:
    path = tmp_path / "i.safetensors"
    with pytest.raises(DataError, match="cannot read"):
        load(path)
    with pytest.raises(DataError, match="torch checkpoint"):
        load(published)
    store.write_tensors(path, {"a": torch.zeros(1)})
    with pytest.raises(DataError, match="not written by diffrc import inception"):
        load(path)
    store.write_tensors(path, {"a": torch.zeros(1)}, {METADATA_KEY: json.dumps({"file": "a", "sha256": "b"})})
    with pytest.raises(DataError, match="damaged"):
        load(path)
    store.write_bytes(path, b"short")
    with pytest.raises(DataError, match="damaged"):
        load(path)
