"""The ADM U-Net (Dhariwal & Nichol 2021), parameter names as in the published state dicts, and its encoder half.

Group norm, softmax and time embedding are computed in float32 whatever the autocast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """The shape of a U-Net or of its encoder half; names are those of the published configurations."""

    image_size_px: int
    in_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]  # px
    num_head_channels: int = 64
    dropout: float = 0.0
    resblock_updown: bool = True
    use_scale_shift_norm: bool = True
    use_new_attention_order: bool = False
    num_heads: int = 0  # as many heads at every width; 0 = num_head_channels decides
    conv_resample: bool = True  # without resblock_updown: convolve at each change of size


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
        for level, mult in reversed(list(enumerate(a.channel_mult))):
            for i in range(a.num_res_blocks + 1):
                layers: list[nn.Module] = [ResBlock(channels + skips.pop(), mult * width, 4 * width, a)]
                channels = mult * width
                if size in a.attention_resolutions:
                    layers.append(AttentionBlock(channels, a))
                if level and i == a.num_res_blocks:
                    size *= 2
                    layers.append(ResBlock(channels, channels, 4 * width, a, resample="up") if a.resblock_updown else Upsample(channels))
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
    """The encoder half of the U-Net, time-conditioned, average-pooled: (B, C, H, W), (B,) -> (B, out_features) float32."""

    def __init__(self, architecture: Architecture, out_features: int) -> None:
        super().__init__()
        self.architecture = architecture
        self.time_embed = _time_embedding_layers(architecture.model_channels)
        self.input_blocks, _, channels = _encoder_blocks(architecture)
        self.middle_block = _middle_block(architecture, channels)
        self.out = nn.Sequential(_norm(channels), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, out_features))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = _embed_time(self.time_embed, t, self.architecture.model_channels)
        h = x
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
        assert channels % a.num_head_channels == 0, f"{channels} channels cannot be split in heads of {a.num_head_channels}"
        self.heads = channels // a.num_head_channels
        self.new_order = a.use_new_attention_order
        self.norm = _norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        flat = x.flatten(2)  # (B, C, L)
        length, head = height * width, channels // self.heads
        qkv = self.qkv(self.norm(flat))  # (B, 3C, L)
        if self.new_order:  # q, k, v, each of all heads
            q, k, v = qkv.view(batch, 3, self.heads, head, length).unbind(1)  # (B, heads, C/heads, L)
        else:  # head by head, each its own q, k, v
            q, k, v = qkv.view(batch, self.heads, 3, head, length).unbind(2)
        scale = head**-0.25  # on both sides: keeps half precision in range
        weights = ((q * scale).transpose(2, 3) @ (k * scale)).float().softmax(dim=-1)  # (B, heads, L, L)
        mixed = v @ weights.to(v.dtype).transpose(2, 3)  # (B, heads, C/heads, L)
        out: Tensor = x + self.proj_out(mixed.reshape(batch, channels, length)).view_as(x)
        return out


class Downsample(nn.Module):
    """Strided convolution, where resblock_updown is off."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class Upsample(nn.Module):
    """Nearest neighbor, then a convolution, where resblock_updown is off."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return out


class GroupNorm32(nn.GroupNorm):
    """Group norm computed in float32, returned in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = super().forward(x.float()).to(x.dtype)
        return out


def _norm(channels: int) -> GroupNorm32:
    return GroupNorm32(math.gcd(32, channels), channels)


def _zeroed(module: nn.Conv1d | nn.Conv2d) -> nn.Conv1d | nn.Conv2d:
    nn.init.zeros_(module.weight)
    assert module.bias is not None
    nn.init.zeros_(module.bias)
    return module


def _time_embedding_layers(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))


def _embed_time(layers: nn.Sequential, t: Tensor, width: int) -> Tensor:
    with torch.autocast(t.device.type, enabled=False):
        out: Tensor = layers(timestep_embedding(t, width))
    return out


def _encoder_blocks(a: Architecture) -> tuple[nn.ModuleList, list[int], int]:
    """Input blocks, the channels of each one's output, and the channels of the last."""
    width, channels, size = a.model_channels, a.model_channels * a.channel_mult[0], a.image_size_px
    blocks = nn.ModuleList([Layers([nn.Conv2d(a.in_channels, channels, 3, padding=1)])])
    skips = [channels]
    for level, mult in enumerate(a.channel_mult):
        for _ in range(a.num_res_blocks):
            layers: list[nn.Module] = [ResBlock(channels, mult * width, 4 * width, a)]
            channels = mult * width
            if size in a.attention_resolutions:
                layers.append(AttentionBlock(channels, a))
            blocks.append(Layers(layers))
            skips.append(channels)
        if level < len(a.channel_mult) - 1:
            size //= 2
            down = ResBlock(channels, channels, 4 * width, a, resample="down") if a.resblock_updown else Downsample(channels)
            blocks.append(Layers([down]))
            skips.append(channels)
    return blocks, skips, channels


def _middle_block(a: Architecture, channels: int) -> Layers:
    emb = 4 * a.model_channels
    return Layers([ResBlock(channels, channels, emb, a), AttentionBlock(channels, a), ResBlock(channels, channels, emb, a)])


def parameter_count(module: nn.Module) -> int:
    """Trained values in a network."""
    return sum(p.numel() for p in module.parameters())
