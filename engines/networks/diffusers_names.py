"""A U-Net's parameters under the names of diffusers' `UNet2DModel`, and back: a map of modules, and two ways to lay out q, k and v."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from engines.networks.unet import Architecture

RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}  # and qkv, which is three modules there
OF_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # an attention's names before diffusers 0.17


def to_diffusers(weights: Mapping[str, Tensor], a: Architecture) -> dict[str, Tensor]:
    """Weights under their names. Attention is a 1x1 convolution here and a linear layer there."""
    theirs = {}
    for ours, name in _modules(a):
        for part in ("weight", "bias"):
            value = weights.get(f"{ours}.{part}")
            if value is None:  # no skip convolution, no label table; a table has no bias
                continue
            if ours.endswith(".proj_out"):
                value = value.flatten(1) if part == "weight" else value
            if not ours.endswith(".qkv"):
                theirs[f"{name}.{part}"] = value
                continue
            rows = value.flatten(1) if part == "weight" else value
            for letter, piece in zip("qkv", _split_qkv(rows, a), strict=True):
                theirs[f"{name}.to_{letter}.{part}"] = piece.contiguous()
    return theirs


def from_diffusers(theirs: Mapping[str, Tensor], a: Architecture, cosine_first: bool) -> dict[str, Tensor]:
    """Weights under our names: the inverse of `to_diffusers`. Where sines come first there, the columns that meet them move."""
    weights = {}
    for ours, name in _modules(a):
        for part in ("weight", "bias"):
            if ours.endswith(".qkv"):
                value = _join_qkv([theirs[f"{name}.to_{letter}.{part}"] for letter in "qkv"], a)
            elif f"{name}.{part}" in theirs:
                value = theirs[f"{name}.{part}"]
            else:
                continue
            convolution = part == "weight" and ours.endswith((".qkv", ".proj_out"))
            weights[f"{ours}.{part}"] = value.unsqueeze(-1) if convolution else value
    if not cosine_first:
        half = a.model_channels // 2
        first = weights["time_embed.0.weight"]
        weights["time_embed.0.weight"] = torch.cat([first[:, half : 2 * half], first[:, :half], first[:, 2 * half :]], dim=1)
    return weights


def _modules(a: Architecture) -> Iterator[tuple[str, str]]:
    """(our name, theirs) of every module with parameters; a label table or a skip convolution that is not there among them."""
    yield from (("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"))
    yield from (("label_emb", "class_embedding"), ("input_blocks.0.0", "conv_in"))
    levels, size, block = len(a.channel_mult), a.image_size_px, 1
    attends = [size // 2**level in a.attention_resolutions for level in range(levels)]
    for level in range(levels):
        theirs = f"down_blocks.{level}"
        for i in range(a.num_res_blocks):
            yield from _stage(f"input_blocks.{block}", f"{theirs}.resnets.{i}", f"{theirs}.attentions.{i}" if attends[level] else "")
            block += 1
        if level < levels - 1:
            yield from _resampler(f"input_blocks.{block}.0", f"{theirs}.downsamplers.0", a, "op")
            block += 1
    yield from _stage("middle_block", "mid_block.resnets.0", "mid_block.attentions.0")
    yield from _residual("middle_block.2", "mid_block.resnets.1")
    block = 0
    for level in reversed(range(levels)):
        theirs = f"up_blocks.{levels - 1 - level}"
        for i in range(a.num_res_blocks + 1):
            yield from _stage(f"output_blocks.{block}", f"{theirs}.resnets.{i}", f"{theirs}.attentions.{i}" if attends[level] else "")
            if level and i == a.num_res_blocks:
                yield from _resampler(f"output_blocks.{block}.{2 if attends[level] else 1}", f"{theirs}.upsamplers.0", a, "conv")
            block += 1
    yield from (("out.0", "conv_norm_out"), ("out.2", "conv_out"))


def _stage(ours: str, residual: str, attention: str) -> Iterator[tuple[str, str]]:
    """A residual block, and the attention behind it where there is one."""
    yield from _residual(f"{ours}.0", residual)
    if attention:
        yield from ((f"{ours}.1.{name}", f"{attention}.{other}") for name, other in ATTENTION.items())
        yield f"{ours}.1.qkv", attention


def _residual(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{ours}.{name}", f"{theirs}.{other}") for name, other in RESIDUAL.items())


def _resampler(ours: str, theirs: str, a: Architecture, convolution: str) -> Iterator[tuple[str, str]]:
    if a.resblock_updown:
        yield from _residual(ours, theirs)
    else:
        yield f"{ours}.{convolution}", f"{theirs}.conv"


def _split_qkv(rows: Tensor, a: Architecture) -> Sequence[Tensor]:
    """q, k, v, each of all heads, from the rows of ours: (3C, ...) -> 3 of (C, ...)."""
    if a.use_new_attention_order:
        return rows.chunk(3)
    heads = a.num_heads or len(rows) // 3 // a.num_head_channels
    return [part.flatten(0, 1) for part in rows.reshape(heads, 3, -1, *rows.shape[1:]).unbind(1)]


def _join_qkv(parts: Sequence[Tensor], a: Architecture) -> Tensor:
    """The inverse of `_split_qkv`."""
    if a.use_new_attention_order:
        return torch.cat(list(parts))
    heads = a.num_heads or len(parts[0]) // a.num_head_channels
    return torch.stack([part.reshape(heads, -1, *part.shape[1:]) for part in parts], 1).flatten(0, 2)


def current_name(name: str) -> str:
    """A parameter's name as diffusers has it now."""
    head, _, part = name.rpartition(".")
    module, _, last = head.rpartition(".")
    return f"{module}.{OF_OLD[last]}.{part}" if ".attentions." in module + "." and last in OF_OLD else name
