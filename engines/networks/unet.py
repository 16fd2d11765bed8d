"""The ADM U-Net (Dhariwal & Nichol 2021), parameter names as in the published state dicts, and its encoder half.

Group norm, softmax and time embedding are computed in float32 whatever the autocast, and whatever the weights were cast to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Convolution = TypeVar("Convolution", nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Architecture:
    """The shape of a U-Net or of its encoder half; names are those of the published configurations.

    Each level halves the one before, so the image can be halved len(channel_mult) - 1 times, and is channel_mult times model_channels
    wide, a whole number. The middle block, at the smallest size, always attends.
    """

    image_size_px: int
    in_channels: int
    model_channels: int
    channel_mult: tuple[int | float, ...]  # 0.5 occurs: the 512 px models begin with half their width
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]  # px
    num_head_channels: int = 64
    dropout: float = 0.0
    resblock_updown: bool = True
    use_scale_shift_norm: bool = True
    use_new_attention_order: bool = False
    num_heads: int = 0  # as many heads at every width; 0 = num_head_channels decides
    conv_resample: bool = True  # without resblock_updown: convolve at each change of size

    def width(self, level: int) -> int:
        """Channels of a level."""
        return int(self.channel_mult[level] * self.model_channels)

    def heads(self, channels: int) -> int:
        """Attention heads of a block of so many channels."""
        if self.num_heads:
            assert channels % self.num_heads == 0, f"{channels} channels cannot be split in {self.num_heads} heads"
            return self.num_heads
        assert channels % self.num_head_channels == 0, f"{channels} channels cannot be split in heads of {self.num_head_channels}"
        return channels // self.num_head_channels


class UNet(nn.Module):
    """eps and, where out_channels is twice in_channels, variance values, of a noised image.

    Args:
        out_channels: C, or 2C for a learned variance.
        classes: rows of the label embedding, 0 = unconditional. Row K is the null label where classes = K + 1.
    """

    def __init__(self, architecture: Architecture, out_channels: int, classes: int = 0) -> None:
        super().__init__()
        a = architecture
        self.architecture = a
        width = a.model_channels
        self.time_embed = _time_embedding_layers(width)
        if classes:
            self.label_emb = nn.Embedding(classes, 4 * width)
        self.classes = classes
        self.input_blocks, skips, channels = _encoder_blocks(a)
        self.middle_block = _middle_block(a, channels)
        self.output_blocks = nn.ModuleList()
        size = a.image_size_px // 2 ** (len(a.channel_mult) - 1)
        for level in reversed(range(len(a.channel_mult))):
            for i in range(a.num_res_blocks + 1):
                layers: list[nn.Module] = [ResBlock(channels + skips.pop(), a.width(level), 4 * width, a)]
                channels = a.width(level)
                if size in a.attention_resolutions:
                    layers.append(AttentionBlock(channels, a))
                if level and i == a.num_res_blocks:
                    size *= 2
                    layers.append(ResBlock(channels, channels, 4 * width, a, resample="up") if a.resblock_updown else Upsample(channels, a))
                self.output_blocks.append(Layers(layers))
        self.out = nn.Sequential(_norm(channels), nn.SiLU(), _zeroed(nn.Conv2d(channels, out_channels, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), t (B,) training timesteps, y (B,) labels -> (B, out_channels, H, W) float32."""
        return self.denoise(x, self.embed_time(t), y)

    def embed_time(self, t: Tensor) -> Tensor:
        """(B,) timesteps -> (B, 4 model_channels) float32."""
        return _embed_time(self.time_embed, t, self.architecture.model_channels)

    def denoise(self, x: Tensor, emb: Tensor, y: Tensor | None = None) -> Tensor:
        """`forward` after the time embedding: emb (B, 4 model_channels)."""
        assert (y is not None) == bool(self.classes), "labels go with a conditional network, and only with one"
        if y is not None:
            emb = emb + self.label_emb(y)
        x, emb = _as_weights(self.input_blocks, x, emb)
        skips = []
        h = x
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        out: Tensor = self.out(h)
        return out.float()


class Encoder(nn.Module):
    """The encoder half of the U-Net, time-conditioned, pooled over positions.

    Args:
        pool: "average" and a linear layer, as in our guide, or "attention", as in the published noisy classifiers.
    """

    def __init__(self, architecture: Architecture, out_features: int, pool: Literal["average", "attention"] = "average") -> None:
        super().__init__()
        self.architecture = architecture
        self.time_embed = _time_embedding_layers(architecture.model_channels)
        self.input_blocks, _, channels = _encoder_blocks(architecture)
        self.middle_block = _middle_block(architecture, channels)
        last: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, out_features)]
        if pool == "attention":
            size = architecture.image_size_px // 2 ** (len(architecture.channel_mult) - 1)
            last = [AttentionPool(channels, size * size, architecture.heads(channels), out_features)]
        self.out = nn.Sequential(_norm(channels), nn.SiLU(), *last)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, C, H, W), t (B,) training timesteps -> (B, out_features) float32."""
        return self.encode(x, self.embed_time(t))

    def embed_time(self, t: Tensor) -> Tensor:
        """(B,) timesteps -> (B, 4 model_channels) float32."""
        return _embed_time(self.time_embed, t, self.architecture.model_channels)

    def encode(self, x: Tensor, emb: Tensor) -> Tensor:
        """`forward` after the time embedding: emb (B, 4 model_channels)."""
        h, emb = _as_weights(self.input_blocks, x, emb)
        for block in self.input_blocks:
            h = block(h, emb)
        out: Tensor = self.out(self.middle_block(h, emb))
        return out.float()


def timestep_embedding(t: Tensor, channels: int, max_period: float = 10_000.0) -> Tensor:
    """(B,) -> (B, channels) float32: cosines, then sines, of t at frequencies max_period^(-i / half)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, channels % 2))


class Layers(nn.ModuleList):
    """A sequence whose residual blocks also take the time embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class ResBlock(nn.Module):
    """norm, SiLU, conv, twice, around a skip; the time embedding scales and shifts the second norm (or is added before it)."""

    def __init__(self, channels: int, out_channels: int, emb_channels: int, a: Architecture, resample: str = "") -> None:
        super().__init__()
        self.scale_shift = a.use_scale_shift_norm
        self.in_layers = nn.Sequential(_norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.resample = {"": nn.Identity(), "up": nn.Upsample(scale_factor=2, mode="nearest"), "down": nn.AvgPool2d(2)}[resample]
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, (2 if self.scale_shift else 1) * out_channels))
        self.out_layers = nn.Sequential(
            _norm(out_channels), nn.SiLU(), nn.Dropout(a.dropout), _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, convolution = self.in_layers
        h = convolution(self.resample(activation(norm(x))))
        x = self.resample(x)
        e = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        out: Tensor = self.skip_connection(x) + h
        return out


class AttentionBlock(nn.Module):
    """Self-attention over positions with a residual; both published orders of q, k, v are supported."""

    def __init__(self, channels: int, a: Architecture) -> None:
        super().__init__()
        self.heads = a.heads(channels)
        self.attend = attend
        self.new_order = a.use_new_attention_order
        self.norm = _norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        qkv = _pointwise(self.qkv, self.norm(x.flatten(2)).mT)  # (B, L, 3C)
        mixed = self.attend(*_split_heads(qkv, self.heads, self.new_order))  # (B, heads, L, C/heads)
        out: Tensor = x + _pointwise(self.proj_out, _join_heads(mixed)).mT.reshape(x.shape)
        return out


class AttentionPool(nn.Module):
    """The mean of all positions asks, the mean and every position answer: (B, C, H, W) -> (B, out_features)."""

    def __init__(self, channels: int, positions: int, heads: int, out_features: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, 1 + positions) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)  # (B, C, L)
        tokens = torch.cat([tokens.mean(dim=2, keepdim=True), tokens], dim=2) + self.positional_embedding  # (B, C, 1 + L)
        q, k, v = _split_heads(_pointwise(self.qkv_proj, tokens.mT), self.heads, new_order=True)
        pooled = attend(q[:, :, :1], k, v)  # (B, heads, 1, C/heads)
        return _pointwise(self.c_proj, _join_heads(pooled)).squeeze(1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: q (B, heads, M, D), k and v (B, heads, L, D) -> (B, heads, M, D); the softmax is float32's.

    On a GPU the fused kernel, which computes its softmax in float32 too, keeps the M x L weights out of memory. On a CPU these
    lines are as fast or faster, and they export to plain operators at every opset.
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    scale = q.shape[-1] ** -0.25  # on both sides: keeps half precision in range
    weights = ((q * scale) @ (k * scale).mT).float().softmax(dim=-1)  # (B, heads, M, L)
    mixed: Tensor = weights.to(v.dtype) @ v
    return mixed


class Downsample(nn.Module):
    """Where resblock_updown is off: a strided convolution, or the mean of 2 x 2 where conv_resample is off too."""

    def __init__(self, channels: int, a: Architecture) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if a.conv_resample else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class Upsample(nn.Module):
    """Where resblock_updown is off: nearest neighbor, then a convolution unless conv_resample is off too."""

    def __init__(self, channels: int, a: Architecture) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if a.conv_resample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return out


class GroupNorm32(nn.GroupNorm):
    """Group norm computed in float32 (or better), returned in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.bfloat16, torch.float16):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        if x.is_cpu and x.is_contiguous():  # this kernel reads half precision and computes in float32; for channels_last it is slow
            return F.group_norm(x, self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def _norm(channels: int) -> GroupNorm32:
    return GroupNorm32(math.gcd(32, channels), channels)


def _zeroed(module: Convolution) -> Convolution:
    nn.init.zeros_(module.weight)
    assert module.bias is not None
    nn.init.zeros_(module.bias)
    return module


def _time_embedding_layers(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))


def _embed_time(layers: nn.Sequential, t: Tensor, width: int) -> Tensor:
    first, _, second = layers
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    with torch.autocast(t.device.type, enabled=False):
        hidden = F.linear(timestep_embedding(t, width), first.weight.float(), first.bias.float())
        return F.linear(F.silu(hidden), second.weight.float(), second.bias.float())


def _as_weights(module: nn.Module, *tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype of a module's weights, which differs where a network was cast to half precision as a whole."""
    dtype = next(module.parameters()).dtype
    return [tensor.to(dtype) for tensor in tensors]


def _pointwise(convolution: nn.Conv1d, tokens: Tensor) -> Tensor:
    """A convolution of width 1, its weights shaped as published, on (B, L, C): a matrix product."""
    return F.linear(tokens, convolution.weight.squeeze(-1), convolution.bias)


def _split_heads(qkv: Tensor, heads: int, new_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, 3C) -> q, k, v, each (B, heads, L, C/heads)."""
    batch, length, channels = qkv.shape
    if new_order:  # q, k, v, each of all heads
        q, k, v = qkv.reshape(batch, length, 3, heads, channels // (3 * heads)).permute(2, 0, 3, 1, 4)
    else:  # head by head, each its own q, k, v
        q, k, v = qkv.reshape(batch, length, heads, 3, channels // (3 * heads)).permute(3, 0, 2, 1, 4)
    return q, k, v


def _join_heads(x: Tensor) -> Tensor:
    """(B, heads, L, D) -> (B, L, heads D)."""
    return x.transpose(1, 2).flatten(2)


def _encoder_blocks(a: Architecture) -> tuple[nn.ModuleList, list[int], int]:
    """Input blocks, the channels of each one's output, and the channels of the last."""
    emb, channels, size = 4 * a.model_channels, a.width(0), a.image_size_px
    blocks = nn.ModuleList([Layers([nn.Conv2d(a.in_channels, channels, 3, padding=1)])])
    skips = [channels]
    for level in range(len(a.channel_mult)):
        for _ in range(a.num_res_blocks):
            layers: list[nn.Module] = [ResBlock(channels, a.width(level), emb, a)]
            channels = a.width(level)
            if size in a.attention_resolutions:
                layers.append(AttentionBlock(channels, a))
            blocks.append(Layers(layers))
            skips.append(channels)
        if level < len(a.channel_mult) - 1:
            size //= 2
            down = ResBlock(channels, channels, emb, a, resample="down") if a.resblock_updown else Downsample(channels, a)
            blocks.append(Layers([down]))
            skips.append(channels)
    return blocks, skips, channels


def _middle_block(a: Architecture, channels: int) -> Layers:
    emb = 4 * a.model_channels
    return Layers([ResBlock(channels, channels, emb, a), AttentionBlock(channels, a), ResBlock(channels, channels, emb, a)])


def parameter_count(module: nn.Module) -> int:
    """Trained values in a network."""
    return sum(p.numel() for p in module.parameters())
