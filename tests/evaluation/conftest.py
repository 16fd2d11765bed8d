"""What the tests of the pages share: the parts of a report and the document of a study, whole and with hostile names."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.evaluation.report import Parts
from engines.evaluation.report.tiles import Closest, Gallery, PairTiles, Tile, encoded

HOSTILE = '<script>alert("1")</script>'
METHODS = ("cross_entropy", "balanced_softmax")
VARIANTS = ("real", "replay", "replay_as_synthetic", "synthetic")
COLUMNS = ("many", "medium", "few", "all", "std")


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def table(names: tuple[str, ...], methods: tuple[str, ...] = METHODS, few: float = 90.0) -> dict[str, Any]:
    """A document as accuracy.json holds it."""
    figures = {c: {"mean": few if c == "few" else 50.0, "spread": 1.0, "n": 3} for c in (*COLUMNS, "ece")}
    interval = {"difference": 4.0, "low": 1.0, "high": 7.0}
    rows = [{"variant": v, "method": m, "figures": figures, "per_class": [50.0] * len(names)} for m in methods for v in VARIANTS]
    comparisons = [
        {
            "method": m,
            "variant": "synthetic",
            "against": v,
            "interval": interval,
            "outcome": "helps",
            "per_class": [None, *[interval] * (len(names) - 1)] if v == "real" else [],
        }
        for m in methods
        for v in VARIANTS[:3]
    ]
    document = {
        "verdict": "Synthesis helps: it does.",
        "names": names,
        "groups": ("many", *("medium",) * (len(names) - 2), "few"),
        "counts": list(range(2 * len(names), len(names), -1)),
        "synthetic_counts": [0, *[3] * (len(names) - 1)],
        "test_images": 30,
        "test_images_in_train": 0,
        "seeds": 3,
        "column": "few",
        "rows": rows,
        "comparisons": comparisons,
        "purity": {"overall": 97.5, "per_class": [None, *[97.5] * (len(names) - 1)], "oracle_accuracy": 99.0, "oracle_images": 100},
    }
    return dict(json.loads(json.dumps(document)))


def copies(name: str) -> dict[str, Any]:
    """A document as copies.json holds it."""
    share = {"images": 40, "copies": 3, "share": 0.075}
    few = {"images": 40, "copies": 1, "share": 0.025}
    found = {**share, "real": few, "warns": True, "closest": []}
    totals = {"generated": {"pixel": share, "feature": share}, "real": {"pixel": few, "feature": few}}
    classes = [{"class": name, "pixel": found, "feature": found}, {"class": "of one image", "pixel": found}]
    return {"copy_ratio": 1 / 3, **totals, "classes": classes, "warnings": [f"{name}: 7.5% of 40 images are copies"]}


def trust(name: str) -> dict[str, Any]:
    """A document as trust.json holds it."""
    spread = {"value": 71.5, "low": 66.0, "high": 77.0}
    return {
        "extractor": {"name": f"recognizer {HOSTILE}", "digest": "ab" * 32, "is_fid": False},
        "images": 748,
        "reference": 500,
        "reference_set": "test",
        "frechet": {"value": 1.834, "low": 1.71, "high": 1.99, "floor": 0.412, "floor_spread": 0.031},
        "kid": {"value": -0.0123, "low": -0.0191, "high": 0.0155},
        "precision": 0.87,
        "recall": 0.62,
        "density": 1.12,
        "coverage": 0.81,
        "diversity": 0.88,
        "hit_rate": 94.7,
        "hit_rate_real": 96.1,
        "real_or_synthetic": spread,
        "per_class": [{"class_id": 2, "name": name, "images": 80, "hit_rate": 91.0, "diversity": None, "coverage": 0.5, "copies": 2}],
        "neighbors": {"coverage": 5},
    }


def full(names: tuple[str, ...] = ("cat", "dog", HOSTILE), methods: tuple[str, ...] = METHODS) -> Parts:
    """Every part of a report."""
    evaluated = table(names, methods)
    tile = Tile(encoded(np.zeros((8, 8, 1), np.uint8)))
    dropped = Tile(tile.source, "distance")
    pair = PairTiles(Tile(tile.source, "0.21", True), tile)
    guided = {
        "images": 300,
        "t": [0, 333, 666, 999],
        "accuracy": [0.9, 0.8, 0.5, 0.1],
        "confidence": [0.92, 0.7, 0.6, 0.4],
        "ece": [0.021, 0.1, 0.1, 0.3],
        "nll": [0.31, 0.6, 1.2, 2.3],
        "bins": [[[0.92, 0.9, 1.0]]] * 4,
    }
    return Parts(
        name="demo",
        recipe_toml=f'name = "{HOSTILE}"',
        classes={"names": list(names), "counts": evaluated["counts"], "groups": evaluated["groups"], "kept_sha256": "cd" * 32},
        table=evaluated,
        trust=trust(names[-1]),
        metrics={
            "source": [{"step": s, "loss": 1 / s} for s in range(1, 40)],
            "guide": [{"step": s, "loss": 1.0, "l_pc": 1.0} for s in (1, 2, 3)],
        },
        guide={"train": {"t": [0, 500, 999], "accuracy": [0.9, 0.6, 0.3]}, "test": guided},
        made=dict.fromkeys(range(1, len(names)), (4, 3)),
        dropped={k: {"distance": 1} for k in range(1, len(names))},
        galleries=[
            Gallery(
                2,
                8,
                [tile] * 5,
                [tile] * 12,
                [dropped],
            ),
            Gallery(1, 96, [], [tile], []),
        ],
        galleries_left_out=max(0, len(names) - 3),
        sheets=[(HOSTILE, png())],
        copies=copies(names[-1]),
        closest=[Closest(names[-1], 8, {"pixel": [pair, pair], "feature": [pair]})],
        pairs=png(),
        cost={"train.source": 61.0, "synth": 5.0, "evaluate": 30.0, HOSTILE: 1.0},
        environment={"cpus": 2, "device": "cpu", "python": "3.11.7", "packages": {"torch": HOSTILE}},
        plan={"plan": "ef" * 16, "identity": {"weights_sha256": "12" * 32}, "versions": {"diffrc": "0.1.0"}},
        recipe_sha256="34" * 32,
        embedded="digits-lt",
        changes=[("synth.steps", 50, 20), ("data.path", "", f"my photos {HOSTILE}"), ("unet.channel_mult", [1, 2], [1, 2, 4])],
    )


def study() -> dict[str, Any]:
    """A document as study.json holds it."""

    def arm(name: str, few: float, paper: dict[str, float] | None = None, **more: Any) -> dict[str, Any]:
        figures = {c: {"mean": few if c == "few" else 50.0, "spread": 1.5, "n": 5} for c in COLUMNS}
        difference = {"difference": few - 80, "low": few - 83, "high": few - 77, "outcome": "ties"}
        against = {} if name == "real" else {"real": difference}
        rows = [{"method": m, "figures": figures, "against": against} for m in METHODS]
        return {"name": name, "title": f"arm {name}", "changes": [], "images": None, "seconds": {}, "paper": paper, "rows": rows, **more}

    sheet = base64.b64encode(png()).decode()
    return {
        "version": 1,
        "name": "table3",
        "title": f"What each part does {HOSTILE}",
        "recipe": "digits-lt",
        "recipe_toml": f'name = "{HOSTILE}"',
        "hardware": "2 CPU cores",
        "versions": {"torch": "2.13.0", "diffrc": HOSTILE},
        "seeds": 5,
        "test": "held-out",
        "column": "few",
        "methods": list(METHODS),
        "arms": [
            arm("real", 80.0),
            arm("no-pair", 81.0, {"all": 80.1}, changes=["target.lambda_pair=0"], images=748, seconds={"train.source": 61.0, "synth": 5}),
            arm(
                HOSTILE,
                84.0,
                {"all": 82.8, "few": 71.3},
                changes=[f"data.path={HOSTILE}", "synth.steps=50"],
                images=748,
                seconds={"synth": 700.0},
                fidelity=trust("nine"),
                sheet_png=sheet,
            ),
            arm("damaged", 70.0, sheet_png="no base64 \N{HYPHEN BULLET}", fidelity=None),
        ],
        "curves": [
            {
                "title": f"Accuracy against lambda {HOSTILE}",
                "x_label": "lambda",
                "points": [
                    {"x": 0.0, "mean": 80.0, "spread": 1.0, "paper": 79.0},
                    {"x": 0.1, "mean": 83.0, "spread": 2.0, "paper": None},
                    {"x": 1.0, "mean": 82.0, "spread": 0.5, "paper": 82.8},
                ],
            }
        ],
        "notes": [f"the paper has {HOSTILE} images"],
        "command": f"diffrc study table3 --recipe '{HOSTILE}'",
    }


@pytest.fixture(scope="session")
def full_parts() -> Callable[..., Parts]:
    """full_parts(names, methods) -> the parts of a report, all of them."""
    return full


@pytest.fixture(scope="session")
def study_document() -> Callable[[], dict[str, Any]]:
    """study_document() -> a study.json, all of it."""
    return study


@pytest.fixture(scope="session")
def hostile() -> str:
    """What stands wherever a user's text may stand."""
    return HOSTILE
