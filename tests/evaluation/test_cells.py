"""Cells: what changes their digest and what does not, and that an interrupted one goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.evaluation.cells import Cell, cell_digest, run_cells
from engines.progress import Report, silent
from engines.recipe import METHODS, Method, RecognizerSection
from engines.training.recognizer import TrainingImages, real_images, train_recognizer

NO_BYTES = np.zeros(0, np.uint8)


def images(extra: bool = False) -> TrainingImages:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    real = real_images(pixels, np.arange(12) % 3)
    return real.add(pixels[:3], np.arange(3), 0.5) if extra else real


def digest(method: Method, extra: bool = False, **changes: Any) -> str:
    return cell_digest(images(extra), RecognizerSection(**changes), method, 0, NO_BYTES)


READ_BY: dict[str, tuple[Any, set[Method]]] = {  # key: another value, and the methods whose training it changes
    "logit_adjustment_tau": (1.5, {"logit_adjustment"}),
    "class_balanced_beta": (0.9, {"class_balanced"}),
    "ldam_max_margin": (0.4, {"ldam_drw"}),
    "ldam_scale": (10.0, {"ldam_drw"}),
    "ldam_drw_from": (0.7, {"ldam_drw"}),
    "ldam_drw_beta": (0.9, {"ldam_drw"}),
    "mixup_alpha": (0.2, {"mixup", "remix", "mislas"}),
    "remix_kappa": (2.0, {"remix"}),
    "remix_tau": (0.4, {"remix"}),
    "second_stage_fraction": (0.1, {"crt", "lws", "mislas"}),
    "tau_norm_holdout": (0.2, {"tau_norm"}),
    "mislas_smoothing_head": (0.4, {"mislas"}),
    "mislas_smoothing_tail": (0.1, {"mislas"}),
    "mislas_classifier_lr": (0.2, {"mislas"}),
    "mislas_shift_batch_norm": (True, {"mislas"}),
    "synthetic_prior": (False, {"balanced_softmax", "logit_adjustment", "class_balanced", "ldam_drw", "remix", "mislas"}),
    "real_only_fraction": (0.5, set(METHODS)),
    "cutout_px": (4, set(METHODS)),
    "lr": (0.2, set(METHODS)),
    "crop_min_area": (0.5, set()),
    "cutout_holes": (2, set()),
    "randaugment_ops": (3, set()),
    "seeds": (5, set()),
    "workers": (3, set()),
    "save_every_steps": (7, set()),
    "methods": (("cross_entropy",), set()),
}


@pytest.mark.parametrize("key", READ_BY)
def test_a_cell_is_kept_when_a_key_changes_that_its_method_does_not_read(key: str) -> None:
    value, readers = READ_BY[key]
    changed = {method for method in METHODS if digest(method, extra=True) != digest(method, extra=True, **{key: value})}
    assert changed == readers


def test_without_extra_images_their_keys_change_nothing() -> None:
    assert digest("balanced_softmax") == digest("balanced_softmax", synthetic_prior=False, real_only_fraction=0.5)


def test_what_depends_on_a_switch_counts_where_it_is_on() -> None:
    assert digest("mixup", cutout_px=4) != digest("mixup", cutout_px=4, cutout_holes=2)
    assert digest("mixup", crop="resized") != digest("mixup", crop="resized", crop_min_area=0.5)
    assert digest("mixup", policy="randaugment") != digest("mixup", policy="randaugment", randaugment_ops=3)


def test_an_interrupted_cell_goes_on_from_its_checkpoint_and_leaves_none(tmp_path: Path) -> None:
    section = RecognizerSection(architecture="resnet8", train_steps=12, batch_size=4, warmup_steps=1, save_every_steps=4)
    heard: list[int] = []

    def cell(fails_at: int) -> Cell:
        def make(hear: Report) -> dict[str, Any]:
            def report(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
                heard.append(done)
                if done == fails_at:
                    raise RuntimeError("interrupted")

            model = train_recognizer(images(), 3, section, "cross_entropy", 0, None, report, made.checkpoint)
            return {"sum": float(model.classifier.weight.detach().sum())}

        made = Cell(tmp_path / "real.json", cell_digest(images(), section, "cross_entropy", 0, NO_BYTES), make)
        return made

    with pytest.raises(RuntimeError):
        run_cells([cell(fails_at=9)], torch.device("cpu"), silent)
    assert [path.name for path in tmp_path.iterdir()] == [cell(0).checkpoint.name]
    heard.clear()
    [result] = run_cells([cell(fails_at=0)], torch.device("cpu"), silent)
    assert heard == [9, 10, 11, 12]
    assert [path.name for path in tmp_path.iterdir()] == ["real.json"]
    assert result["sum"] == float(train_recognizer(images(), 3, section, "cross_entropy", 0).classifier.weight.detach().sum())
