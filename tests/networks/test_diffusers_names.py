"""engines/networks/diffusers_names.py: every parameter has a name there, and the way back loses nothing."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.networks.diffusers_names import current_name, from_diffusers, to_diffusers
from engines.networks.unet import Architecture, UNet


@settings(max_examples=30, deadline=None)
@given(
    mults=st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3),
    attends=st.sets(st.sampled_from([8, 4, 2])),
    blocks=st.integers(1, 2),
    heads=st.sampled_from([0, 1, 2]),
    updown=st.booleans(),
    convolve=st.booleans(),
    scale_shift=st.booleans(),
    new_order=st.booleans(),
    classes=st.sampled_from([0, 3]),
    cosine_first=st.booleans(),
)
def test_every_parameter_goes_there_and_comes_back_bit_for_bit(
    mults: list[int],
    attends: set[int],
    blocks: int,
    heads: int,
    updown: bool,
    convolve: bool,
    scale_shift: bool,
    new_order: bool,
    classes: int,
    cosine_first: bool,
) -> None:
    a = Architecture(8, 1, 8, tuple(mults), blocks, tuple(attends), 4, 0.0, updown, scale_shift, new_order, heads, convolve)
    weights = dict(UNet(a, 2, classes).state_dict())
    theirs = to_diffusers(weights, a)
    attentions = sum(name.endswith(".qkv.weight") for name in weights)
    assert len(theirs) == len(weights) + 4 * attentions, "q, k and v are modules of their own there"
    assert sum(value.numel() for value in theirs.values()) == sum(value.numel() for value in weights.values())
    back = from_diffusers(theirs, a, cosine_first)
    assert back.keys() == weights.keys()
    moved = set() if cosine_first else {"time_embed.0.weight"}
    assert all(torch.equal(back[name], value) for name, value in weights.items() if name not in moved)


def test_only_attentions_have_names_of_old() -> None:
    assert current_name("mid_block.attentions.0.proj_attn.bias") == "mid_block.attentions.0.to_out.0.bias"
    assert current_name("mid_block.attentions.0.to_q.weight") == "mid_block.attentions.0.to_q.weight"
    assert current_name("conv_in.weight") == "conv_in.weight"
