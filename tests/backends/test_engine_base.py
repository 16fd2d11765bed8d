"""Hashes, errors and the torch engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from engines.backends.base import SELF_TEST_VALUES, check_input, example_input, relative_error, thinned, weights_sha256
from engines.backends.torch_engine import TorchEngine


def test_the_hash_of_weights_changes_with_any_value_and_with_a_name() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = weights_sha256(network)
    assert weights_sha256(network) == before
    for tensor in network.state_dict().values():
        flat = tensor.view(-1)
        old = flat[-1].clone()
        flat[-1] += 1
        assert weights_sha256(network) != before
        flat[-1] = old
    assert weights_sha256(network) == before
    assert weights_sha256(nn.ModuleDict({"a": network[0], "b": network[1]})) != before


def test_the_relative_error_is_the_quotient_of_lengths() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")
    assert not relative_error(torch.tensor([float("nan")]), torch.ones(1)) <= 1


def test_thinning_keeps_both_ends_and_every_value_of_a_small_output() -> None:
    assert torch.equal(thinned(torch.arange(10.0)), torch.arange(10.0))
    many = thinned(torch.arange(10_000.0))
    assert len(many) == SELF_TEST_VALUES
    assert (many[0], many[-1]) == (0, 9999)


def test_the_torch_engine_is_the_network_itself(make_unet: Any) -> None:
    unet = make_unet()
    engine = TorchEngine(unet, 50, 8)
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([0, 20, 49]), torch.tensor([0, 1, 3])
    with torch.no_grad():
        assert torch.equal(engine(x, t, y), unet(x, t, y))
    assert not engine(x, t, y).requires_grad
    assert (engine.card.kind, engine.card.classes, engine.card.out_channels, engine.card.shape) == ("torch", 4, 2, (1, 8, 8))


def test_a_network_in_training_mode_is_no_engine(make_unet: Any) -> None:
    with pytest.raises(AssertionError, match="dropout"):
        TorchEngine(make_unet().train(), 50, 8)


def test_no_value_is_read_from_a_device_that_would_have_to_be_waited_for(make_unet: Any) -> None:
    card = TorchEngine(make_unet(), 50, 8).card
    x, t, y = example_input(card, 2, 3)
    assert y is not None
    check_input(card, x.to("meta"), t.to("meta"), y.to("meta"))  # a tensor without values: reading one raises
    with pytest.raises(AssertionError):
        check_input(card, x.to("meta"), t[:1].to("meta"), y.to("meta"))
    with pytest.raises(AssertionError):
        check_input(card, x, t + 50, y)
