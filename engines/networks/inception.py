"""The Inception-v3 whose features FID is defined by, that of 2015-12-05: its structure, a reader of the published file, its features.

FID (Heusel et al. 2017) is a Frechet distance in the features of one TensorFlow graph. Any other network, any other way of resizing
gives other numbers. This one differs from the Inception-v3 of its paper (Szegedy et al. 2015) and of torchvision:

- an average pool at the border divides by the pixels that are there, not by nine;
- the last block pools by the maximum where every other block averages;
- 1008 outputs, of which nothing is used here: the features are the 2,048 means before them;
- images are resized to 299 px by the graph itself, bilinearly from the pixels at i W / 299, without smoothing, and scaled by
  (x - 128) / 128.

pytorch-fid, whose port of the weights is read here, resizes by torch's interpolation instead, which lies up to half a pixel beside
that, and scales by 2 x / 255 - 1; its figures differ a little. torch-fidelity and EDM do as the graph does.

What has been checked against torch-fidelity 0.4.0, once, outside the tests: the names and shapes of all 472 weights, and with random
weights the features of images of 299 px, equal bit by bit, and of 32 px, to 2e-7 of the largest. The tests hold the number of
parameters to two published counts. What has not been checked: the published weights were not at hand, so no FID of ours was ever
compared with one of another program.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines import store
from engines.errors import DataError
from engines.networks.openai import read_state_dict
from engines.networks.pretrained import sha256

PUBLISHED_FILE = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED_SHA256 = "6726825d"  # its beginning, all of it that is published: in the file's name, where torch.hub looks for it
FEATURES = 2048
OUTPUTS = 1008  # of the layer behind the features
SIZE_PX = 299
BATCH = 32
METADATA_KEY = "diffrc.inception"  # of the safetensors header: the card as JSON
REMEDY = f"download {PUBLISHED_FILE} again from the releases of github.com/mseitzer/pytorch-fid"

Shapes = dict[str, tuple[int, ...]]

# ------------------------------------------------------------------------------------------------------------- structure


class Conv(NamedTuple):
    """A convolution without bias, its batch norm and a ReLU; padded so that the size stays, unless it strides."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1  # 2 = unpadded
    padded: bool = True


Steps = Sequence["Conv | tuple[Conv, Conv] | str"]  # one after another; a pair side by side; a pool by its name

_STEM: Steps = (
    Conv("Conv2d_1a_3x3", 32, (3, 3), 2),
    Conv("Conv2d_2a_3x3", 32, (3, 3), padded=False),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    "shrink",
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), padded=False),
    "shrink",
)


def _a(pooled: int) -> tuple[Steps, ...]:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3))),
        ("average", Conv("branch_pool", pooled)),
    )


_B: tuple[Steps, ...] = (
    (Conv("branch3x3", 384, (3, 3), 2),),
    (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3), 2)),
    ("shrink",),
)


def _c(narrow: int) -> tuple[Steps, ...]:
    double = ((1, 1), (7, 1), (1, 7), (7, 1), (1, 7))
    widths = (narrow, narrow, narrow, narrow, 192)
    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", narrow), Conv("branch7x7_2", narrow, (1, 7)), Conv("branch7x7_3", 192, (7, 1))),
        tuple(Conv(f"branch7x7dbl_{i}", width, kernel) for i, (width, kernel) in enumerate(zip(widths, double, strict=True), 1)),
        ("average", Conv("branch_pool", 192)),
    )


_D: tuple[Steps, ...] = (
    (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2)),
    (
        Conv("branch7x7x3_1", 192),
        Conv("branch7x7x3_2", 192, (1, 7)),
        Conv("branch7x7x3_3", 192, (7, 1)),
        Conv("branch7x7x3_4", 192, (3, 3), 2),
    ),
    ("shrink",),
)


def _e(pool: str) -> tuple[Steps, ...]:
    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), (Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1)))),
        (
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, (3, 3)),
            (Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1))),
        ),
        (pool, Conv("branch_pool", 192)),
    )


_BLOCKS: dict[str, tuple[Steps, ...]] = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": _B,
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _D,
    "Mixed_7b": _e("average"),
    "Mixed_7c": _e("maximum"),  # thought to be a slip of that graph; it is what every published FID was measured with
}

# --------------------------------------------------------------------------------------------------------------- network


class _Norm(nn.Module):
    """Batch norm by the statistics of the training, which this network is never in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=1e-3)


class _ConvNorm(nn.Module):
    def __init__(self, channels: int, conv: Conv) -> None:
        super().__init__()
        padding = (conv.kernel[0] // 2, conv.kernel[1] // 2) if conv.padded and conv.stride == 1 else 0
        self.conv = nn.Conv2d(channels, conv.channels, conv.kernel, conv.stride, padding, bias=False)
        self.bn = _Norm(conv.channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _add(module: nn.Module, channels: int, path: Steps) -> int:
    """Give a module the convolutions of a path, by their published names; `channels` in, returns those out."""
    for step in path:
        if not isinstance(step, str):
            convs = (step,) if isinstance(step, Conv) else step
            for conv in convs:
                module.add_module(conv.name, _ConvNorm(channels, conv))
            channels = sum(conv.channels for conv in convs)
    return channels


def _walk(module: nn.Module, x: Tensor, path: Steps) -> Tensor:
    for step in path:
        if isinstance(step, str):
            x = _pool(x, step)
        elif isinstance(step, Conv):
            x = module.get_submodule(step.name)(x)
        else:
            x = torch.cat([module.get_submodule(conv.name)(x) for conv in step], 1)
    return x


class _Mixed(nn.Module):
    """Paths side by side, joined channel by channel."""

    def __init__(self, channels: int, paths: Sequence[Steps]) -> None:
        super().__init__()
        self.paths = paths
        self.channels = sum(_add(self, channels, path) for path in paths)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([_walk(self, x, path) for path in self.paths], 1)


def _pool(x: Tensor, how: str) -> Tensor:
    if how == "average":
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return F.max_pool2d(x, 3, stride=1, padding=1) if how == "maximum" else F.max_pool2d(x, 3, stride=2)


class Inception(nn.Module):
    """(B, 3, H, W) of 0..255, of any size -> (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        channels = _add(self, 3, _STEM)
        for name, paths in _BLOCKS.items():
            block = _Mixed(channels, paths)
            self.add_module(name, block)
            channels = block.channels
        assert channels == FEATURES
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = _walk(self, (resize(x) - 128) / 128, _STEM)  # (B, 192, 35, 35)
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)  # (B, 288, 35, 35) ... (B, 768, 17, 17) ... (B, 2048, 8, 8)
        return x.mean((2, 3))


def resize(x: Tensor, size_px: int = SIZE_PX) -> Tensor:
    """Bilinear as in TensorFlow 1: output i lies at input i W / size, beyond the last pixel is that pixel: (B, C, H, W) -> (B, C, S, S)."""
    rows, columns = (_weights(side, size_px).to(x) for side in x.shape[2:])
    return rows @ x @ columns.T


def _weights(side: int, size: int) -> Tensor:
    """What each output takes of each input along one side: (size, side)."""
    at = torch.arange(size, dtype=torch.float64) * (side / size)
    below = at.floor().long()
    weights = torch.zeros(size, side, dtype=torch.float64)
    weights.scatter_add_(1, below[:, None], (1 - (at - below))[:, None])
    weights.scatter_add_(1, (below + 1).clamp(max=side - 1)[:, None], (at - below)[:, None])
    return weights


def shapes() -> Shapes:
    """Names and shapes of the published weights, from the network built without memory; the counters of batches, of no use, left out."""
    with torch.device("meta"):
        network = Inception()
    return {name: tuple(value.shape) for name, value in network.state_dict().items()} | {
        "fc.weight": (OUTPUTS, FEATURES),
        "fc.bias": (OUTPUTS,),
    }


# ----------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class InceptionCard:
    """Where the weights of a file came from."""

    file: str
    sha256: str  # of that file

    @property
    def is_fid(self) -> bool:
        """Whether these are the weights that FID is defined by: a Frechet distance in any others must not be called so."""
        return self.sha256.startswith(PUBLISHED_SHA256)

    @property
    def name(self) -> str:
        return "Inception-v3 of 2015-12-05" if self.is_fid else f"Inception-v3 ({self.file}, not the published weights)"


def read(path: Path) -> tuple[dict[str, Tensor], InceptionCard]:
    """The weights of the published file, checked, without the last layer. Nothing that the file holds is run.

    Raises DataError where it is no such file: missing, damaged, or of other names, shapes or values that are not finite.
    """
    try:
        state = read_state_dict(path, also={"torch LongStorage"})  # of the counters of batches
    except DataError as error:
        raise DataError(error.problem, REMEDY) from None
    state = {name: value for name, value in state.items() if not name.endswith(".num_batches_tracked")}
    found, expected = {name: tuple(value.shape) for name, value in state.items()}, shapes()
    if found != expected:
        wrong = sorted(name for name in found | expected if found.get(name) != expected.get(name))
        raise DataError(f"{path} is not the Inception-v3 of FID: {len(wrong):,} of its weights differ ({wrong[0][:80]})", REMEDY)
    if bad := next((name for name, value in state.items() if not bool(torch.isfinite(value).all())), None):
        raise DataError(f"{path} is damaged: {bad} holds values that are not finite", REMEDY)
    weights = {name: value.float() for name, value in state.items() if not name.startswith("fc.")}
    return weights, InceptionCard(path.name, sha256(path))


def write(path: Path, weights: Mapping[str, Tensor], card: InceptionCard) -> None:
    """Commit weights of `read` as safetensors, the card in the header. Raises StorageError."""
    store.require_space(path.parent, 4 * sum(value.numel() for value in weights.values()))
    store.write_tensors(path, weights, {METADATA_KEY: json.dumps({"file": card.file, "sha256": card.sha256})})


def load(path: Path, device: torch.device | None = None) -> tuple[Inception, InceptionCard]:
    """The network of a file that `write` made. Raises DataError where it is none or damaged."""
    again = f"diffrc import inception {PUBLISHED_FILE} makes it"
    try:
        with path.open("rb") as raw:
            if raw.read(4) == b"PK\x03\x04":
                raise DataError(f"{path} is a torch checkpoint", f"diffrc import inception {path} makes a safetensors file of it")
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
        if text is None:
            raise DataError(f"{path} was not written by diffrc import inception", again)
        with torch.device("meta"):
            network = Inception()
        network.load_state_dict(store.read_tensors(path), assign=True)
        card = InceptionCard(**json.loads(text))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", again) from None
    except (safetensors.SafetensorError, RuntimeError, ValueError, TypeError):
        raise DataError(f"{path} is damaged", again) from None
    return network.eval().to(device or torch.device("cpu")), card


@torch.inference_mode()
def features(network: Inception, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The features of images (N, H, W, C) uint8, gray ones as three equal channels: (N, 2048) float32."""
    device = next(network.parameters()).device
    parts = [np.zeros((0, FEATURES), np.float32)]
    for start in range(0, len(pixels), BATCH):
        x = torch.from_numpy(np.ascontiguousarray(pixels[start : start + BATCH].transpose(0, 3, 1, 2))).to(device)
        parts.append(network(x.float().expand(-1, 3, -1, -1)).cpu().numpy())
    return np.concatenate(parts)
