"""A long job needs no more memory than a short one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent

JOB = """
import json, resource, sys
from pathlib import Path
import numpy as np, torch
from engines.backends.torch_engine import TorchEngine
from engines.data.images import ArrayReader, Frame, ImageSet, Shelf
from engines.data.longtail import LongTail
from engines.networks.guide import Guide
from engines.networks.unet import Architecture, UNet
from engines.recipe import load
from engines.synthesis.maker import Maker
from engines.synthesis.plan import make_plan
from engines.synthesis.synthesize import make_folder

folder, count = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
names, real = ("cat", "dog", "swan"), [60, 20, 9]
small = ("data.image_size_px=8", "unet.channel_mult=[1]", "unet.attention_resolutions=[]", "unet.class_cond=true")
settings = ("guide.channel_mult=[1]", "guide.attention_resolutions=[]", "diffusion.steps=20", "synth.steps=2", "synth.batch_size=64")
recipe = load('name = "test"', (*small, *settings))
architecture = Architecture(8, 3, 8, (1,), 1, (), num_head_channels=8)
guide = Guide(architecture, torch.tensor(real), embedding_dim=8).eval().requires_grad_(False)
engine = TorchEngine(UNet(architecture, 6, 4).eval(), 20, 64)
plan = make_plan(recipe, {"names": names, "kept_sha256": "of the data"}, "target", engine.card, "of the guide", {})
labels = np.repeat(np.arange(3), real)
pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
images = ImageSet(labels, names, Shelf(ArrayReader(pixels, "the set"), Frame(8, 3)))
originals = LongTail(images, images, images, np.array(real), ("many", "medium", "few"), "of the data")
wanted = {1: count // 2, 2: count - count // 2}
result = make_folder(folder, Maker(recipe, plan, "target", engine, guide), wanted, originals, workers=2, guide=guide)
print(json.dumps({"made": result.made, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def job(folder: Path, count: int) -> Any:
    """A job of so many 8 px images, sheet and search for copies included, in a process of its own: images made, and its peak in KiB."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", JOB, str(folder), str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_4_000_images_need_the_memory_of_200_and_so_does_continuing_them(tmp_path: Path) -> None:
    few, many = job(tmp_path / "few", 200), job(tmp_path / "many", 4000)
    assert (few["made"], many["made"]) == (200, 4000)
    print(few, many)
    assert many["peak"] <= 1.05 * few["peak"]
    again = job(tmp_path / "many", 4001)
    print(again)
    assert again["made"] == 1
    assert again["peak"] <= 1.05 * few["peak"]
