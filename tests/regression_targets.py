"""Accuracies that our baselines must reach on CIFAR-10-LT at imbalance 100 (LONGTAIL A1 and C). Run by hand; goes on where it stopped.

    python tests/regression_targets.py --data DIR --method balanced_softmax --epochs 200 --out FILE.json

The field's setting: ResNet-32, SGD at batch 128, lr 0.1, weight decay 2e-4; of 200 epochs 5 of warm-up and steps by 0.01 after 160 and 180,
crop 4 and flip. With other `--epochs` these are the same shares of the length, and no target is due. Beside FILE.json lies its checkpoint;
`--stage-one` takes another run's, of a method with the same first stage (cRT after cross-entropy), and trains the second stage alone.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from engines import recipe, store
from engines.data.longtail import LongTail, prepare
from engines.evaluation.accuracy import class_accuracy, group_accuracy
from engines.evaluation.synthetic import all_pixels
from engines.recipe import Method, RecognizerSection
from engines.training.recognizer import predict, real_images, train_recognizer

EPOCHS = 200
TARGETS: dict[Method, tuple[float, float]] = {  # top-1 %, and how far from it is well (the parquet files are JPEG-compressed)
    "cross_entropy": (70.4, 2.0),
    "balanced_softmax": (77.5, 2.0),
    "ldam_drw": (77.7, 2.0),
    "crt": (75.0, 2.5),
}
SAVE_EVERY_EPOCHS = 1


def section(images: int, epochs: float, precision: str) -> RecognizerSection:
    """The field's setting, its schedule stretched or shrunk to so many epochs."""
    epoch = images / 128
    return RecognizerSection(
        train_steps=round(epochs * epoch),
        warmup_steps=round(epochs / EPOCHS * 5 * epoch),
        save_every_steps=round(SAVE_EVERY_EPOCHS * epoch),
        precision=precision,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--method", choices=get_args(Method), required=True)
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage-one", type=Path, help="checkpoint of a finished run with the same first stage")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    recipes = Path(__file__).parent.parent / "recipes"
    longtail = prepare(recipe.load((recipes / "cifar10-lt-100.toml").read_text()).data, arguments.data)
    chosen = section(len(longtail.train), arguments.epochs, arguments.precision)
    checkpoint = arguments.out.with_suffix(".safetensors")
    if arguments.stage_one and not checkpoint.exists():
        shutil.copyfile(arguments.stage_one, checkpoint)

    began = time.perf_counter()
    first, losses = [], [float("nan")]

    def report(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        first[:] = first or [done - 1]
        losses[:] = [figures.get("loss", losses[0])]
        if done % chosen.save_every_steps == 0 or done == total:
            rate = (done - first[0]) * chosen.batch_size / (time.perf_counter() - began)
            print(
                f"{arguments.method}: step {done:,} of {total:,}, {rate:.0f} images/s, loss {losses[0]:.3f}",
                flush=True,
            )

    images = real_images(all_pixels(longtail.train), longtail.train.labels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = train_recognizer(images, len(longtail.names), chosen, arguments.method, arguments.seed, device, report, checkpoint)
    store.write_json(arguments.out, result(model, longtail, chosen, arguments, time.perf_counter() - began))


def result(model: Any, longtail: LongTail, chosen: RecognizerSection, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Accuracy by group and class, and the target where the length is the field's."""
    labels = longtail.test.labels
    per_class = class_accuracy(predict(model, all_pixels(longtail.test)), labels, len(longtail.names))
    figures = group_accuracy(per_class, longtail.groups)
    target, within = TARGETS.get(arguments.method, (None, None))
    due = target is not None and arguments.epochs == EPOCHS
    print(arguments.method, {name: round(value, 2) for name, value in figures.items()}, f"target {target} within {within}" if due else "")
    return {
        "method": arguments.method,
        "epochs": arguments.epochs,
        "seed": arguments.seed,
        "figures": figures,
        "per_class": per_class.tolist(),
        "groups": list(longtail.groups),
        "counts": longtail.counts.tolist(),
        "target": target if due else None,
        "reached": abs(figures["all"] - target) <= within if due and target is not None and within is not None else None,
        "seconds_of_this_call": seconds,
        "torch": torch.__version__,
        "recognizer": chosen.model_dump(mode="json"),
    }


if __name__ == "__main__":
    main()
