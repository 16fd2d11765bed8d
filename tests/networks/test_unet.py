"""The ADM U-Net: names, shapes and sizes of the published state dicts, attention by hand, float32 where it is promised."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.networks.unet import (
    Architecture,
    AttentionBlock,
    AttentionPool,
    Downsample,
    Encoder,
    GroupNorm32,
    UNet,
    Upsample,
    attend,
    timestep_embedding,
)

SMALL = Architecture(
    image_size_px=8,
    in_channels=1,
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_head_channels=8,
)
Shapes = dict[str, tuple[int, ...]]


def shapes_of(network: nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def layer(name: str, *weight: int) -> Shapes:
    return {f"{name}.weight": weight, f"{name}.bias": (weight[0],)}


def residual(name: str, before: int, after: int, emb: int, scale_shift: bool = True) -> Shapes:
    skip = {} if before == after else layer(f"{name}.skip_connection", after, before, 1, 1)
    return (
        norm(f"{name}.in_layers.0", before)
        | layer(f"{name}.in_layers.2", after, before, 3, 3)
        | layer(f"{name}.emb_layers.1", (2 if scale_shift else 1) * after, emb)
        | norm(f"{name}.out_layers.0", after)
        | layer(f"{name}.out_layers.3", after, after, 3, 3)
        | skip
    )


def attention(name: str, channels: int) -> Shapes:
    return (
        norm(f"{name}.norm", channels) | layer(f"{name}.qkv", 3 * channels, channels, 1) | layer(f"{name}.proj_out", channels, channels, 1)
    )


def published_layout(a: Architecture, out_channels: int, classes: int) -> Shapes:
    """Names and shapes of a published ADM state dict, from its description: an independent second writing."""
    widths, emb = [round(a.model_channels * mult) for mult in a.channel_mult], 4 * a.model_channels
    found = layer("time_embed.0", emb, a.model_channels) | layer("time_embed.2", emb, emb)
    found |= {"label_emb.weight": (classes, emb)} if classes else {}
    found |= layer("input_blocks.0.0", widths[0], a.in_channels, 3, 3)
    sizes = [a.image_size_px // 2**level for level in range(len(a.channel_mult))]
    down = [("block", level) for level in range(len(sizes)) for _ in range(a.num_res_blocks)]
    for level in range(len(sizes) - 1, 0, -1):
        down.insert(level * a.num_res_blocks, ("down", level - 1))
    channels, skips = widths[0], [widths[0]]
    for number, (kind, level) in enumerate(down, start=1):
        name, wide = f"input_blocks.{number}", widths[level]
        if kind == "block":
            found |= residual(f"{name}.0", channels, wide, emb, a.use_scale_shift_norm)
            found |= attention(f"{name}.1", wide) if sizes[level] in a.attention_resolutions else {}
        elif a.resblock_updown:
            found |= residual(f"{name}.0", wide, wide, emb, a.use_scale_shift_norm)
        elif a.conv_resample:
            found |= layer(f"{name}.0.op", wide, wide, 3, 3)
        channels = wide
        skips.append(channels)
    found |= residual("middle_block.0", channels, channels, emb, a.use_scale_shift_norm) | attention("middle_block.1", channels)
    found |= residual("middle_block.2", channels, channels, emb, a.use_scale_shift_norm)
    per_level = a.num_res_blocks + 1
    for number, skip in enumerate(reversed(skips)):
        level = len(sizes) - 1 - number // per_level
        name, wide = f"output_blocks.{number}", widths[level]
        found |= residual(f"{name}.0", channels + skip, wide, emb, a.use_scale_shift_norm)
        attends = sizes[level] in a.attention_resolutions
        found |= attention(f"{name}.1", wide) if attends else {}
        if level and number % per_level == a.num_res_blocks:
            up = f"{name}.{2 if attends else 1}"
            if a.resblock_updown:
                found |= residual(up, wide, wide, emb, a.use_scale_shift_norm)
            elif a.conv_resample:
                found |= layer(f"{up}.conv", wide, wide, 3, 3)
        channels = wide
    return found | norm("out.0", channels) | layer("out.2", out_channels, widths[0], 3, 3)


RESAMPLING = [{"resblock_updown": True}, {"resblock_updown": False}, {"resblock_updown": False, "conv_resample": False}]


@pytest.mark.parametrize("resampling", RESAMPLING)
@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("classes", [0, 11])
def test_names_and_shapes_are_those_of_the_published_state_dicts(resampling: dict[str, bool], scale_shift: bool, classes: int) -> None:
    a = replace(SMALL, channel_mult=(0.5, 2, 2), num_res_blocks=2, use_scale_shift_norm=scale_shift, **resampling)
    with torch.device("meta"):
        assert shapes_of(UNet(a, 2, classes)) == published_layout(a, 2, classes)


def test_the_names_of_a_small_network_by_hand() -> None:
    with torch.device("meta"):
        names = {name.rpartition(".")[0] for name in shapes_of(UNet(SMALL, 2))}
    block = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
    attend = ["norm", "qkv", "proj_out"]
    blocks = {
        "input_blocks.1.0": block,
        "input_blocks.2.0": block,
        "input_blocks.3.0": [*block, "skip_connection"],
        "input_blocks.3.1": attend,
        "middle_block.0": block,
        "middle_block.1": attend,
        "middle_block.2": block,
        "output_blocks.0.0": [*block, "skip_connection"],
        "output_blocks.0.1": attend,
        "output_blocks.1.0": [*block, "skip_connection"],
        "output_blocks.1.1": attend,
        "output_blocks.1.2": block,
        "output_blocks.2.0": [*block, "skip_connection"],
        "output_blocks.3.0": [*block, "skip_connection"],
    }
    ends = {"time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"}
    assert names == ends | {f"{name}.{part}" for name, parts in blocks.items() for part in parts}


@pytest.mark.parametrize("resampling", RESAMPLING)
@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_output_has_the_images_shape_and_is_zero_before_training(resampling: dict[str, bool], scale_shift: bool, channels: int) -> None:
    a = replace(SMALL, in_channels=channels, use_scale_shift_norm=scale_shift, **resampling)
    out = UNet(a, 2 * channels)(torch.randn(3, channels, 8, 8), torch.tensor([0, 5, 999]))
    assert torch.equal(out, torch.zeros(3, 2 * channels, 8, 8))


def awake(network: nn.Module, seed: int = 0) -> Any:
    """The network with no weight left at zero, as after training; in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + (1.0 if p.dim() == 1 else 0.0))
    return network.eval()


@pytest.mark.parametrize("resampling", RESAMPLING)
@pytest.mark.parametrize("scale_shift", [True, False])
def test_a_trained_network_depends_on_image_time_and_every_weight(resampling: dict[str, bool], scale_shift: bool) -> None:
    a = replace(SMALL, model_channels=24, use_scale_shift_norm=scale_shift, **resampling)  # 3 channels a group of the norm:
    network = awake(UNet(a, 2))  # with one, the norm would take an added time embedding out again
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    out = network(x, t)
    assert not torch.allclose(out, network(x, t + 50), atol=1e-3)
    torch.testing.assert_close(network(x.flip(0), t.flip(0)), out.flip(0), rtol=1e-3, atol=1e-3)  # image by image
    out.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_labels_go_with_a_conditional_network_and_row_k_is_the_null_label() -> None:
    network = awake(UNet(SMALL, 1, classes=4))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    outs = [network(x, t, torch.full((2,), k)) for k in range(4)]
    assert not any(torch.allclose(outs[i], outs[3]) for i in range(3))
    with torch.no_grad():
        network.label_emb.weight[3] = 0
    without = awake(UNet(SMALL, 1))
    without.load_state_dict({name: value for name, value in network.state_dict().items() if not name.startswith("label")})
    torch.testing.assert_close(network(x, t, torch.full((2,), 3)), without(x, t))
    for model, y in ((network, None), (without, torch.zeros(2, dtype=torch.int64))):
        with pytest.raises(AssertionError, match="labels go with a conditional network"):
            model(x, t, y)


def test_the_two_attention_orders_agree_once_the_rows_of_qkv_are_permuted() -> None:
    channels, heads = 32, 4
    a = replace(SMALL, num_head_channels=channels // heads)
    old, new = awake(AttentionBlock(channels, a)), AttentionBlock(channels, replace(a, use_new_attention_order=True)).eval()
    state = old.state_dict()
    for part in ("weight", "bias"):
        rows = state[f"qkv.{part}"]
        state[f"qkv.{part}"] = rows.view(heads, 3, channels // heads, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)
    new.load_state_dict(state)
    x = torch.randn(2, channels, 4, 4)
    torch.testing.assert_close(old(x), new(x), rtol=1e-4, atol=1e-4)


def test_attention_is_softmax_of_qk_over_root_d_times_v_head_by_head() -> None:
    channels, heads = 32, 4
    block = awake(AttentionBlock(channels, replace(SMALL, num_head_channels=channels // heads, use_new_attention_order=True)))
    x = torch.randn(2, channels, 3, 3)
    normed = F.group_norm(x, 32, block.norm.weight, block.norm.bias).flatten(2)
    q, k, v = (torch.einsum("oc,bcl->bol", block.qkv.weight[:, :, 0], normed) + block.qkv.bias[:, None]).view(2, 3, heads, 8, 9).unbind(1)
    mixed = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT.reshape(2, channels, 9)
    wanted = x.flatten(2) + torch.einsum("oc,bcl->bol", block.proj_out.weight[:, :, 0], mixed) + block.proj_out.bias[:, None]
    torch.testing.assert_close(block(x).flatten(2), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("queries", [1, 9])
def test_attending_by_hand_is_what_the_fused_kernel_of_a_gpu_computes(queries: int) -> None:
    q, k, v = torch.randn(2, 3, queries, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_a_number_of_heads_holds_at_every_width() -> None:
    for channels in (16, 32, 64):
        by_number, by_size = replace(SMALL, num_heads=4), replace(SMALL, num_head_channels=channels // 4)
        x, one, other = torch.randn(2, channels, 4, 4), AttentionBlock(channels, by_number), AttentionBlock(channels, by_size)
        awake(other).load_state_dict(awake(one).state_dict())
        assert torch.equal(one(x), other(x))


def test_attention_pooling_is_what_the_mean_attends_to() -> None:
    channels, heads, positions = 16, 2, 9
    pool = awake(AttentionPool(channels, positions, heads, out_features=5))
    x = torch.randn(3, channels, 3, 3)
    tokens = torch.cat([x.mean((2, 3))[:, :, None], x.flatten(2)], dim=2) + pool.positional_embedding  # (B, C, 1 + L)
    wanted, _ = F.multi_head_attention_forward(  # torch's own, all queries answered, in its order of tokens
        *[tokens.permute(2, 0, 1)] * 3, channels, heads, pool.qkv_proj.weight[:, :, 0], pool.qkv_proj.bias, None, None, False, 0.0,
        pool.c_proj.weight[:, :, 0], pool.c_proj.bias,
    )  # fmt: skip
    torch.testing.assert_close(pool(x), wanted[0], rtol=1e-4, atol=1e-4)


def test_an_encoder_is_the_unets_first_half_with_a_pool_of_either_kind() -> None:
    with torch.device("meta"):
        unet, average, attention_pool = shapes_of(UNet(SMALL, 2)), shapes_of(Encoder(SMALL, 7)), shapes_of(Encoder(SMALL, 7, "attention"))
    half = {name: shape for name, shape in unet.items() if not name.startswith(("output_blocks", "out."))} | norm("out.0", 32)
    assert average == half | {"out.4.weight": (7, 32), "out.4.bias": (7,)}
    pool = layer("out.2.qkv_proj", 96, 32, 1) | layer("out.2.c_proj", 7, 32, 1) | {"out.2.positional_embedding": (32, 1 + 4 * 4)}
    assert attention_pool == half | pool
    for kind in ("average", "attention"):
        logits = awake(Encoder(SMALL, 7, kind))(torch.randn(2, 1, 8, 8), torch.tensor([3, 700]))
        assert logits.shape == (2, 7)


def test_sizes_change_by_convolution_or_by_the_mean_of_four_and_the_nearest_neighbor() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    plain = replace(SMALL, resblock_updown=False, conv_resample=False)
    halved = Downsample(1, plain)(x)
    assert halved.tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    assert Upsample(1, plain)(halved)[0, 0, :2].tolist() == [[2.5, 2.5, 4.5, 4.5]] * 2
    down, up = awake(Downsample(1, SMALL)), awake(Upsample(1, SMALL))
    torch.testing.assert_close(down(x), F.conv2d(F.pad(x, (1, 1, 1, 1)), down.op.weight, down.op.bias, stride=2))
    torch.testing.assert_close(up(x), F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), up.conv.weight, up.conv.bias, padding=1))


def test_a_network_without_its_zeroed_layers_passes_images_through_attention_unchanged() -> None:
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(AttentionBlock(16, SMALL)(x), x)


def test_the_time_embedding_is_cosines_then_sines_of_falling_frequency() -> None:
    t = np.array([0, 1, 250, 999])
    angles = t[:, None] * 10_000.0 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(timestep_embedding(torch.from_numpy(t), 16), np.hstack([np.cos(angles), np.sin(angles)]), atol=1e-4)
    assert timestep_embedding(torch.tensor([5]), 17)[0, -1] == 0


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_group_norm_is_computed_in_float32_and_returned_as_it_came(
    autocast: bool, weights: torch.dtype, memory: torch.memory_format
) -> None:
    x = (30 + torch.randn(2, 64, 8, 8)).bfloat16().contiguous(memory_format=memory).requires_grad_()
    norm = awake(GroupNorm32(16, 64)).to(weights)
    pull = torch.randn(2, 64, 8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = norm(x)
    out.backward(pull)
    assert (out.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    exact = x.detach().double().requires_grad_()
    wanted = F.group_norm(exact, 16, norm.weight.double(), norm.bias.double(), norm.eps)
    wanted.backward(pull.double())
    torch.testing.assert_close(out.double(), wanted, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("scale_shift", [True, False])
def test_a_network_whose_weights_were_cast_to_bfloat16_keeps_norm_softmax_and_time_in_float32(
    classes: int, scale_shift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = awake(UNet(replace(SMALL, use_scale_shift_norm=scale_shift), 2, classes)).bfloat16()
    rounded = awake(UNet(replace(SMALL, use_scale_shift_norm=scale_shift), 2, classes))
    rounded.load_state_dict(network.state_dict())  # the same weights, in float32
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 2]) if classes else None
    dtypes = watch_softmax(monkeypatch)
    out = network(x, t, y)
    assert set(dtypes) == {torch.float32}
    assert torch.equal(network.embed_time(t), rounded.embed_time(t))
    assert out.dtype == network.embed_time(t).dtype == torch.float32
    wanted = rounded(x, t, y).detach()
    assert float((out - wanted).detach().norm() / wanted.norm()) < 0.05
    classifier = awake(Encoder(SMALL, 7, "attention")).bfloat16()
    assert classifier(x, t).dtype == torch.float32


def test_memory_format_changes_nothing_but_the_speed() -> None:
    network, x, t = awake(UNet(SMALL, 2)), torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    out = network(x, t)
    network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(x.contiguous(memory_format=torch.channels_last), t), out, rtol=1e-3, atol=1e-3)


def watch_softmax(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes that softmax will be computed in."""
    softmax, seen = Tensor.softmax, []

    def watched(self: Tensor, dim: int) -> Tensor:
        seen.append(self.dtype)
        return softmax(self, dim)

    monkeypatch.setattr(Tensor, "softmax", watched)
    return seen


def test_softmax_and_time_embedding_are_float32_under_autocast_and_so_is_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x, t = awake(UNet(SMALL, 2)), torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    seen = watch_softmax(monkeypatch)
    convolutions: list[torch.dtype] = []
    network.input_blocks[1][0].in_layers[2].register_forward_hook(lambda _m, _i, out: convolutions.append(out.dtype))
    emb, out = network.embed_time(t), network(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        half_emb, half = network.embed_time(t), network(x, t)
    assert torch.equal(half_emb, emb)
    assert half_emb.dtype == half.dtype == torch.float32
    assert convolutions == [torch.float32, torch.bfloat16]  # the rest does run in bf16
    assert set(seen) == {torch.float32}
    assert float((half - out).detach().norm() / out.detach().norm()) < 0.05


def test_dropout_acts_in_training_only_and_by_torchs_generator() -> None:
    network, x, t = awake(UNet(replace(SMALL, dropout=0.5), 1)), torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(network(x, t))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_channels_that_do_not_split_into_heads_are_refused() -> None:
    with pytest.raises(AssertionError, match="16 channels cannot be split in heads of 64"):
        AttentionBlock(16, replace(SMALL, num_head_channels=64))
    with pytest.raises(AssertionError, match="16 channels cannot be split in 3 heads"):
        AttentionBlock(16, replace(SMALL, num_heads=3))


def test_group_norm_has_32_groups_or_as_many_as_divide_the_channels() -> None:
    for channels in (8, 48, 64, 192):
        network = AttentionBlock(channels, replace(SMALL, num_head_channels=8))
        assert network.norm.num_groups == math.gcd(32, channels)
