"""A run of the digits, and one whose class names no file system should see."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from engines import store
from engines.data.longtail import prepare
from engines.recipe import load
from engines.sharing.balanced import Balanced, open_balanced
from engines.store import RunFolder

HOSTILE = (
    *("../../x", "/etc/passwd", "con", "a/b", "a_b-0003", "name.", "<b>|[x](y)`*", "two\nlines", "\u202egnp.exe", "Black", "black", "🦢"),
    *('quote " \\ back', "=1+1", "--help", "long" * 3000, "{0}", "", "NUL\0", "plain name", "Schwan", "Чёрный лебедь"),
)
RECIPE = """
name = "hostile"
[data]
source = "parquet"
image_size_px = 8
profile = "as-is"
groups = "ranks"
group_sizes = [7, 8, 7]
[unet]
attention_resolutions = []
"""


@pytest.fixture(scope="session")
def digits(made_run: Path) -> Balanced:
    run = store.open_run(made_run)
    return open_balanced(run, prepare(run.recipe.data, None))


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory, fill_with_noise: Callable[[RunFolder], None]) -> Balanced:
    folder = tmp_path_factory.mktemp("hostile")
    random = np.random.default_rng(1)
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": list(HOSTILE)}}}}
    for split, counts in (("train", [3] + [2] * 21), ("test", [1] * 22)):
        labels = [k for k, count in enumerate(counts) for _ in range(count)]
        images = []
        for _ in labels:
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"image": images, "label": labels}).replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    recipe = load(RECIPE, [f"data.path={json.dumps(str(folder))}"])
    run = store.create_run(tmp_path_factory.mktemp("run") / "hostile", recipe)
    longtail = prepare(recipe.data, None)
    run.keep_classes(longtail.table())
    fill_with_noise(run)
    return open_balanced(run, longtail)


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """That a folder is flushed before it gets its name is shown in test_store; here it would wait for what else the machine writes."""
    monkeypatch.setattr("os.sync", lambda: None)
