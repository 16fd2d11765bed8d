"""`make bench`: seconds of guided sampling for the latest run (or the one named), by engine. Trains and writes nothing.

Each engine makes the same batches of images, turn by turn, after one that is not timed; the spread is printed with the median,
and the ratio is to torch on the same batch. The time includes noise and guidance, which no engine takes over.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch

from diffrc_cli import console
from engines import store
from engines.backends.base import Engine
from engines.backends.export import onnx_path
from engines.backends.ort_engine import OrtEngine
from engines.backends.torch_engine import TorchEngine
from engines.diffusion.guidance import prototype_guidance
from engines.diffusion.noise import batch_noise, image_key
from engines.diffusion.sampler import sample
from engines.diffusion.schedule import make_schedule, respace
from engines.errors import DiffRCError
from engines.networks.guide import Guide
from engines.recipe import Recipe
from engines.training.stages import load_guide, load_unet

REPEATS = 5


def seconds(engine: Engine, guide: Guide | None, classes: int, recipe: Recipe) -> float:
    """Wall-clock seconds of one batch of the recipe's size, steps and sampler; without a guide, unguided."""
    settings = recipe.synth
    y = torch.arange(settings.batch_size) % classes
    keys = [image_key(settings.seed, int(k), i) for i, k in enumerate(y)]
    schedule = respace(make_schedule(recipe.diffusion.noise_schedule, recipe.diffusion.steps), settings.steps)
    shape = (recipe.data.image_channels, recipe.data.image_size_px, recipe.data.image_size_px)
    guidance = prototype_guidance(guide.log_probs, y, settings.guidance_scale, settings.guidance_scale_max) if guide else None
    labels = y if engine.card.classes else None
    began = time.perf_counter()
    sample(lambda x, t: engine(x, t, labels), schedule, lambda step: batch_noise(keys, step, shape), guidance, settings.sampler)
    return time.perf_counter() - began


def main(run: Path | None) -> None:
    folder = store.open_run(run)
    recipe, guide = folder.recipe, load_guide(folder)
    engines: dict[str, Engine] = {
        "torch": TorchEngine(load_unet(folder), recipe.diffusion.steps, recipe.export.max_batch),
        "onnx": OrtEngine.load(onnx_path(folder, "target")),
    }
    arms = [(name, guided) for name in engines for guided in (True, False)]
    times: dict[tuple[str, bool], list[float]] = {arm: [] for arm in arms}
    with console.progress() as report:
        for turn in range(REPEATS + 1):
            report("bench", turn, REPEATS + 1, {})
            for name, guided in arms:
                taken = seconds(engines[name], guide if guided else None, len(guide.prototypes), recipe)
                times[name, guided] += [taken] if turn else []
        report("bench", REPEATS + 1, REPEATS + 1, {})
    rows = []
    for (name, guided), spent in times.items():
        median, reference = statistics.median(spent), statistics.median(times["torch", guided])
        spread = f"{min(spent):.3g} to {max(spent):.3g}"
        rows.append(
            (
                name,
                "yes" if guided else "no",
                f"{median:.3g}",
                spread,
                f"{recipe.synth.batch_size / median:.3g}",
                f"{reference / median:.2f}",
            )
        )
    environment = store.environment()
    console.say(
        f"{folder.path}: {recipe.synth.batch_size} images of {recipe.data.image_size_px} px, {recipe.synth.steps} steps, n = {REPEATS}"
    )
    console.say(f"{environment['cpus']} CPUs, {torch.get_num_threads()} threads, torch {environment['packages']['torch']}, CPU, float32")
    console.table("", ("engine", "guided", "median s", "from to s", "images/s", "torch = 1"), rows)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    except DiffRCError as failure:
        console.error(failure.problem, failure.remedy)
        sys.exit(failure.exit_code)
