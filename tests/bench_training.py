"""`make bench`: a training step of two U-Nets, by our loop and a plain one, beside diffusers' UNet2DModel. Writes nothing.

    python tests/bench_training.py [--tiny] [--repeats N] [--shape small] [--busy]

Both loops train on the same images at the same batch size. Ours is the one of `diffrc train`: batches, both terms of the loss, clipping,
AdamW, EMA, its checks; the plain one is what a script of thirty lines does: noise, mean squared error, AdamW. All arms of a shape and
precision take one step a turn, turn by turn, after one turn that is not timed, so that a busy moment of the machine meets all of them;
ratios are taken within a turn. `--tiny` shrinks the networks and the batch, to see that it runs. `--busy`, for a machine that
others work on, counts processor seconds of one thread instead of the clock's: good for ratios, not for images a second.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from diffrc_cli import console
from engines import store
from engines.data.longtail import LongTail, prepare
from engines.diffusion.schedule import q_sample
from engines.networks.unet import Architecture, UNet
from engines.recipe import Recipe, load
from engines.training.diffusion import training_schedule
from engines.training.distributed import ALONE
from engines.training.loop import Stage
from engines.training.source import source_stage
from engines.training.target import target_stage
from engines.training.trainer import Trainer

CPU = torch.device("cpu")
GEMM_SIZE = 4096
SHAPES = {  # 32 px, two residual blocks a level, resampling by convolution, scale-shift norm
    "small": {"model_channels": 64, "channel_mult": (1, 1.5, 2), "attention_resolutions": (16, 8), "num_head_channels": 32},
    "cifar": {"model_channels": 128, "channel_mult": (1, 2, 2, 2), "attention_resolutions": (16,), "num_head_channels": 64},
}
TINY = {"model_channels": 32, "channel_mult": (1, 2), "attention_resolutions": (16,), "num_head_channels": 32}

TARGET = "ours, target stage"
RATIOS = (  # what, and the two arms (loop, network) whose seconds are divided
    ("speed of our network over diffusers', plain loop", ("plain", "diffusers"), ("plain", "ours")),
    ("speed of our network over diffusers', our loop", ("ours", "diffusers"), ("ours", "ours")),
    ("speed of our loop over the plain one, our network", ("plain", "ours"), ("ours", "ours")),
    ("speed of all that is ours over diffusers' network in the plain loop", ("plain", "diffusers"), ("ours", "ours")),
    ("seconds of a step of the target stage over one of the source stage", (TARGET, "ours"), ("ours", "ours")),
)


@dataclass(frozen=True)
class Arm:
    """One way to take a training step."""

    loop: str
    network: str
    step: Callable[[int], None]


class Diffusers(nn.Module):
    """UNet2DModel of the same widths, blocks and attention, called as ours."""

    classes = 0

    def __init__(self, a: Architecture, out_channels: int) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from diffusers import UNet2DModel
        widths = [int(mult * a.model_channels) for mult in a.channel_mult]
        attends = [a.image_size_px // 2**level in a.attention_resolutions for level in range(len(widths))]
        self.unet: Any = UNet2DModel(
            sample_size=a.image_size_px,
            in_channels=a.in_channels,
            out_channels=out_channels,
            block_out_channels=widths,
            layers_per_block=a.num_res_blocks,
            down_block_types=["AttnDownBlock2D" if yes else "DownBlock2D" for yes in attends],
            up_block_types=["AttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)],
            attention_head_dim=a.num_head_channels,
            attn_norm_num_groups=32,
            resnet_time_scale_shift="scale_shift",
            dropout=a.dropout,
        )

    def forward(self, x: Tensor, t: Tensor, _y: Tensor | None = None) -> Tensor:
        output: Tensor = self.unet(x, t).sample
        return output


def recipe_of(precision: str, batch_size: int) -> Recipe:
    """Everything but the network, which is built here: no recipe has diffusers'."""
    stages = [f"{stage}.{key}" for stage in ("source", "target") for key in (f"batch_size={batch_size}", f"precision={precision}")]
    return load('name = "bench"\n[data]\nimage_size_px = 32\nhead_count = 100\nimbalance = 10.0\ngroups = "ranks"\n', stages)


def arms_of(shape: dict[str, Any], precision: str, batch_size: int, data: LongTail) -> list[Arm]:
    """The two loops with the two networks, and our target stage."""
    recipe = recipe_of(precision, batch_size)
    a = Architecture(32, 3, num_res_blocks=2, dropout=0.1, resblock_updown=False, **shape)
    torch.manual_seed(0)
    networks: dict[str, Any] = {"ours": UNet(a, 6), "diffusers": Diffusers(a, 6)}
    counts = [sum(p.numel() for p in network.parameters()) for network in networks.values()]
    assert counts[0] == counts[1], f"two networks of one shape: {counts}"
    arms = []
    for name, network in networks.items():
        arms.append(our_loop("ours", name, source_stage(recipe, data, copy.deepcopy(network), CPU)))
        arms.append(Arm("plain", name, plain_loop(recipe, data, copy.deepcopy(network))))
    ours = networks["ours"]
    return [*arms, our_loop(TARGET, "ours", target_stage(recipe, data, copy.deepcopy(ours), copy.deepcopy(ours), CPU))]


def our_loop(loop: str, network: str, stage: Stage) -> Arm:
    trainer = Trainer(stage, 0, CPU, ALONE)

    def step(n: int) -> None:
        trainer.step(n, stage.draw(n))

    return Arm(loop, network, step)


def plain_loop(recipe: Recipe, data: LongTail, network: nn.Module) -> Callable[[int], None]:
    schedule, batch_size = training_schedule(recipe, CPU), recipe.source.batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-4)
    images = torch.from_numpy(data.train.pixels(torch.arange(len(data.train)).numpy())).permute(0, 3, 1, 2) / 127.5 - 1  # (N, C, H, W)
    network.train()

    def step(_: int) -> None:
        x0 = images[torch.randint(len(images), (batch_size,))]
        t, noise = torch.randint(len(schedule), (batch_size,)), torch.randn_like(x0)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.source.precision == "bf16"):
            eps = network(q_sample(schedule, x0, t, noise), t)[:, :3]
        nn.functional.mse_loss(eps.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def gemm(precision: str, size: int) -> Callable[[int], None]:
    a = torch.randn(size, size, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)

    def step(_: int) -> None:
        a @ a

    return step


def operations_of(shape: dict[str, Any], batch_size: int) -> float:
    """Floating-point operations of a step of our network: forward and backward."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        unet = UNet(Architecture(32, 3, num_res_blocks=2, resblock_updown=False, **shape), 6)
        unet(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64)).sum().backward()
    return float(counter.get_total_flops()) * batch_size


def seconds(step: Callable[[int], None], n: int, clock: Callable[[], float]) -> float:
    began = clock()
    step(n)
    return clock() - began


def bench(
    name: str, shape: dict[str, Any], precision: str, batch_size: int, size: int, data: LongTail, repeats: int, clock: Callable[[], float]
) -> None:
    """Time all arms of a shape and precision, and print their table and ratios."""
    arms = arms_of(shape, precision, batch_size, data)
    steps = [*(arm.step for arm in arms), gemm(precision, size)]
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(repeats + 1):
        for step, taken in zip(steps, times, strict=True):
            spent = seconds(step, turn, clock)
            taken += [spent] if turn else []
    spent_by = {(arm.loop, arm.network): taken for arm, taken in zip(arms, times, strict=False)}
    operations = operations_of(shape, batch_size)
    product = 2 * size**3 / statistics.median(times[-1])  # operations a second
    rows = []
    for (loop, network), taken in spent_by.items():
        rates = [batch_size / t for t in taken]
        share = f"{operations / statistics.median(taken) / product:.0%}" if loop != TARGET else "-"
        rows.append((loop, network, f"{statistics.median(rates):.3g}", f"{min(rates):.3g} to {max(rates):.3g}", share))
    title = f"{name}, {precision}, batch {batch_size}, n = {repeats}: {operations / batch_size / 1e9:.3g} GFLOP a training image"
    console.table(
        f"{title}; a {size} x {size} matrix product runs at {product / 1e9:.0f} GFLOP/s",
        ("loop", "network", "images/s", "from to", "of that"),
        rows,
    )
    for what, over, under in RATIOS:
        console.say(f"{what}: {ratio_of(spent_by[over], spent_by[under])}")
    console.say()


def ratio_of(a: list[float], b: list[float]) -> str:
    """Median over the turns of the seconds of a over those of b, and its range."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main(words: list[str]) -> None:
    tiny = "--tiny" in words
    repeats = int(words[words.index("--repeats") + 1]) if "--repeats" in words else 1 if tiny else 7
    clock = time.perf_counter
    if "--busy" in words:
        torch.set_num_threads(1)
        clock = time.process_time
    environment = store.environment()
    console.say(f"{environment['cpus']} CPUs, {torch.get_num_threads()} threads, torch {environment['packages']['torch']}, CPU")
    data = prepare(recipe_of("fp32", 8).data, None)
    chosen = [words[words.index("--shape") + 1]] if "--shape" in words else list(SHAPES)
    for name, shape in {"tiny": TINY}.items() if tiny else {name: SHAPES[name] for name in chosen}.items():
        for precision in ("fp32", "bf16"):
            bench(name, shape, precision, 8 if tiny else 32, 256 if tiny else GEMM_SIZE, data, repeats, clock)


if __name__ == "__main__":
    main(sys.argv[1:])
