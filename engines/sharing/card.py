"""The data card, README.md: what the data set holds, how its images were made, how far to trust them, what not to do with them.

Its YAML front matter is what the Hugging Face hub reads. Names and figures come from files and data sets: all of them are escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engines import recipe as recipes
from engines import store
from engines.data.names import shorten
from engines.recipe import Recipe
from engines.sharing.balanced import Balanced, Split
from engines.sharing.layouts import COLUMNS, Format

CLASSES_LISTED = 200  # of more classes the card lists the first and last
HUB_SIZES = ((1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"))
TRUST = {  # evaluation/trust.json: what is shown of it, in this order
    "frechet": "Frechet distance",
    "kid": "kernel distance (KID)",
    "precision": "precision, 0 to 1",
    "recall": "recall, 0 to 1",
    "density": "density",
    "coverage": "coverage, 0 to 1",
    "diversity": "diversity within a class; 1 = that of real images",
    "hit_rate": "taken for their class, %",
    "real_or_synthetic": "told from real ones by a linear classifier, %; 50 = not at all",
}
TRUST_IMAGES = 10_000  # beyond, a part of them is judged
_COLUMN_NOTES = {
    "id": "unique: split, kind, label, index",
    "label": "0..K-1",
    "class_name": "the class's name, as the data set spells it",
    "synthetic": "whether a network made the image",
    "group": "many, medium or few: by the real training images of the class",
    "index": "a real image's place in its split; a synthetic one's number within plan and class",
    "seed": "that named the noise of a synthetic image; -1 for a real one",
    "plan": "id of what fixed every pixel of a synthetic image; empty for a real one",
    "weight": "loss weight that DiffRC trains recognizers with",
}


def card(
    balanced: Balanced, splits: Sequence[Split], layout: Format, sizes: Mapping[str, Mapping[str, int]], cleanlab_folds: int = 0
) -> str:
    """The text of README.md, a function of the run and the arguments alone: no date, no path of this machine.

    Args:
        sizes: "num_bytes" and "num_examples" of each split, as `layouts.write` returns them.
        cleanlab_folds: of the cross-validation whose results lie in `cleanlab/`; 0 = there are none.
    """
    parts = [
        "---\n" + "\n".join(_front_matter(balanced, layout, sizes)) + "\n---",
        *_what(balanced, splits),
        *_files(layout, cleanlab_folds),
        *_making(balanced),
        *_trust(balanced),
        *_limits(balanced),
    ]
    return "\n\n".join(parts) + "\n"


def evidence(balanced: Balanced) -> dict[str, Any]:
    """The run's own figures on these very images: "accuracy", "trust", "copies", "yield", each {} or [] where there is none."""
    run = balanced.run
    accuracy = _document(run.evaluation / "accuracy.json", {})
    classes = len(balanced.names)
    if accuracy.get("synthetic_counts") != balanced.train.counts(classes, synthetic=True):
        accuracy = {}  # of other images
    trust = _document(run.evaluation / "trust.json", {})
    made = int(balanced.train.synthetic.sum())
    if made <= TRUST_IMAGES and trust.get("images", made) != made:
        trust = {}
    copies, yields = _document(run.synth / "copies.json", {}), _document(run.synth / "yield.json", [])
    return {"accuracy": accuracy, "trust": trust, "copies": copies, "yield": yields}


def recipe_digest(recipe: Recipe) -> str:
    """sha256 of a recipe without the place of its data, which is this machine's."""
    table = recipe.model_dump(mode="json")
    return recipes.digest(table | {"data": {key: value for key, value in table["data"].items() if key != "path"}})


# --------------------------------------------------------------------------------------------------------- front matter


def _front_matter(balanced: Balanced, layout: Format, sizes: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    images = sum(size["num_examples"] for size in sizes.values())
    yield "license: unknown  # yours to fill in: the terms of the real images hold for them and may hold for what was made from them"
    yield f"pretty_name: {yaml_string(balanced.run.recipe.name + ', balanced by DiffRC')}"
    yield from ("task_categories:", "- image-classification", "tags:", "- synthetic", "- long-tailed", "- diffusion", "- diffrc")
    yield from ("size_categories:", f"- {next((name for limit, name in HUB_SIZES if images < limit), 'n>10M')}")
    if layout == "parquet":  # the loader of image folders takes its columns from metadata.jsonl alone
        total = sum(size["num_bytes"] for size in sizes.values())
        yield from ("dataset_info:", "  features:", *_yaml_features(balanced.names), "  splits:")
        for name, size in sizes.items():
            yield from (f"  - name: {name}", f"    num_bytes: {size['num_bytes']}", f"    num_examples: {size['num_examples']}")
        yield from (f"  download_size: {total}", f"  dataset_size: {total}")
    places = {"imagefolder": "{}/**", "parquet": "data/{}-*", "webdataset": "{}-*.tar"}
    if layout in places:
        yield from ("configs:", "- config_name: default", "  data_files:")
        for name in sizes:
            yield from (f"  - split: {name}", f"    path: {places[layout].format(name)}")


def _yaml_features(names: Sequence[str]) -> Iterator[str]:
    yield from ("  - name: image", "    dtype: image")
    for column, kind in COLUMNS.items():
        yield f"  - name: {column}"
        if column == "label":
            yield from ("    dtype:", "      class_label:", "        names:")
            yield from (f"          '{k}': {yaml_string(name)}" for k, name in enumerate(names))
        else:
            yield f"    dtype: {kind}"


def yaml_string(text: str) -> str:
    """A double-quoted YAML scalar on one line that means exactly this text."""
    plain = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in plain)


# -------------------------------------------------------------------------------------------------------------- the text


def _what(balanced: Balanced, splits: Sequence[Split]) -> Iterator[str]:
    names, train = balanced.names, balanced.train
    classes = len(names)
    real, made = train.counts(classes, synthetic=False), train.counts(classes, synthetic=True)
    test = next((split.counts(classes, synthetic=False) for split in splits if split.name == "test"), None)
    shape = balanced.longtail.train.frame
    yield f"# {_text(balanced.run.recipe.name)}, balanced by DiffRC"
    yield (
        f"A long-tailed training set of {sum(real):,} real images in {classes} classes and {sum(made):,} synthetic images that fill its "
        f"tail{f', with {sum(test):,} real test images' if test else ''}. Every image is a PNG of {shape.size_px} x {shape.size_px} px, "
        f"{'gray' if shape.channels == 1 else 'RGB'}: the real ones as the pixels that the networks were trained on, not as their "
        "original files, the synthetic ones as the bytes that were made."
    )
    yield "**Synthetic images are marked**: `synthetic` is true in every row, file names say so, and so does the PNG's text `synthetic`."
    yield "## Classes"
    groups = balanced.longtail.groups
    columns = ["label", "class", "group", "real", "synthetic", "train", *(["test"] if test else [])]
    rows = [[k, _name(names[k]), groups[k], real[k], made[k], real[k] + made[k], *([test[k]] if test else [])] for k in range(classes)]
    if classes > CLASSES_LISTED:
        half = CLASSES_LISTED // 2
        rows = [*rows[:half], ["...", f"{classes - 2 * half} more", *[""] * (len(columns) - 2)], *rows[-half:]]
    rows.append(["", "**all**", "", sum(real), sum(made), sum(real) + sum(made), *([sum(test)] if test else [])])
    yield _table(columns, rows)
    members = {group: [k for k in range(classes) if groups[k] == group] for group in ("many", "medium", "few")}
    counted = [[group, len(of), sum(real[k] for k in of), sum(made[k] for k in of)] for group, of in members.items()]
    yield _table(["group", "classes", "real", "synthetic"], counted)


def _files(layout: Format, cleanlab_folds: int) -> Iterator[str]:
    yield "## Files"
    yield {
        "folder": "`train/<class>/real-*.png` and `synthetic-*.png`, `test/<class>/real-*.png`, and a row for each in `metadata.csv`. "
        "Names that not every file system takes were replaced: `classes.json` has each class's label, exact name and folder. Loaders that "
        "number folders in sorted order give a class its `folder_index`, not its `label`.",
        "imagefolder": "`train/<class>/real-*.png` and `synthetic-*.png`, `test/<class>/real-*.png`, with a `metadata.jsonl` in each "
        "split. `classes.json` has each class's label, exact name and folder.",
        "parquet": "`data/<split>-*.parquet` with the images inside, shuffled. The class names are in the schema.",
        "webdataset": "`<split>-*.tar`, shuffled, with `<id>.png`, `<id>.cls` (the label) and `<id>.json` of every image. "
        "`<split>-index.json` lists the tars with images, bytes and sha256, and the class names.",
    }[layout]
    yield "```python\n" + reading(layout, ".") + "\n```"
    yield _table(["column", "type", "what"], [[f"`{column}`", kind, _COLUMN_NOTES[column]] for column, kind in COLUMNS.items()])
    if cleanlab_folds:
        yield (
            f"`cleanlab/`: `pred_probs.npy`, `features.npy`, `labels.npy` and `ids.json` of the training split, row by row in its order. "
            f"The probabilities are out of sample: {cleanlab_folds} recognizers were each trained on the real images outside their fold, "
            f"and each image, real or synthetic, was judged by one that had not seen it. The features are those of a recognizer that was "
            "trained on all real images."
        )


def reading(layout: Format, place: str) -> str:
    """The lines that read the data set elsewhere; `place` is its folder."""
    at = place.rstrip("/") or "/"
    return {
        "folder": f"from torchvision.datasets import ImageFolder\n\ntrain = ImageFolder({at + '/train'!r})",
        "imagefolder": "import json\n\nfrom datasets import ClassLabel, load_dataset\n\n"
        f"names = [entry['name'] for entry in json.load(open({at + '/classes.json'!r}))['classes']]\n"
        f"train = load_dataset({at!r}, split='train').cast_column('label', ClassLabel(names=names))",
        "parquet": f"from datasets import load_dataset\n\ntrain = load_dataset({at!r}, split='train')",
        "webdataset": "from glob import glob\n\nimport webdataset\n\n"
        f"shards = sorted(glob({at + '/train-*.tar'!r}))\n"
        "train = webdataset.WebDataset(shards, shardshuffle=False).decode('pil')",
    }[layout]


def _making(balanced: Balanced) -> Iterator[str]:
    recipe, plan = balanced.run.recipe, balanced.plan
    identity: Mapping[str, Any] = plan["identity"]
    yield "## How the images were made"
    began = "started from weights that were trained elsewhere and " if recipe.source.pretrained else ""
    others = "" if recipe.source.pretrained else " No other data and no other model took part."
    yield (
        f"By DiffRC: a diffusion model {began}was trained on the real images, adapted to the tail, and sampled under the guidance of a "
        f"classifier of noisy images that was trained on the same real images.{others}"
    )
    device = identity.get("engine.device", "cpu")
    rows = [
        ["data source", _text(recipe.data.source)],
        ["recipe", f"{_text(recipe.name)}, sha256 `{recipe_digest(recipe)}`"],
        ["kept real images", f"sha256 `{balanced.longtail.kept_sha256}` of their indices"],
        ["plan", f"`{_text(str(plan['plan']))}`, which fixes every pixel"],
        ["seed", identity.get("synth.seed", "")],
        ["model", f"{identity.get('model', '')}, weights sha256 `{identity.get('weights_sha256', '')}`"],
        ["guide", f"weights sha256 `{identity.get('guide_sha256') or 'none'}`"],
        ["engine", f"{identity.get('engine.kind', '')} {identity.get('engine.precision', '')} on {device}"],
        ["sampler", f"{identity.get('synth.sampler', '')}, {identity.get('synth.steps', '')} steps"],
        *([["begun from", _begun_from(identity)]] if "synth.start" in identity else []),
        ["guidance scale", identity.get("synth.guidance_scale", "")],
        ["versions", _text(", ".join(f"{name} {version}" for name, version in sorted(plan.get("versions", {}).items())))],
    ]
    yield _table(["what", ""], rows)
    yield from _selection(balanced)


def _begun_from(identity: Mapping[str, Any]) -> str:
    images = {"class": "its class", "head": "the head classes"}.get(str(identity["synth.start"]), "any class")
    return f"a real training image of {images}, noised to {identity.get('synth.strength', '')} of the diffusion's steps"


def _selection(balanced: Balanced) -> Iterator[str]:
    found = evidence(balanced)
    select = balanced.run.recipe.select
    yields: Sequence[Mapping[str, Any]] = found["yield"]
    kept, made = (sum(int(row.get(key) or 0) for row in yields) for key in ("kept", "made"))
    near, far = select.novelty_band
    rules = [
        *([f"at most {select.distance_band:g} class widths from the mean of the real images"] if select.distance_band else []),
        *([f"{near:g} to {far:g} times as far from the nearest real one as these from each other"] if far else []),
        *([f"at least {select.confidence:g} of the guide's probability on their class"] if select.confidence else []),
    ]
    if not rules:
        yield "No selection: every image that was made is here."
    else:
        share = f": {kept:,} of {made:,} images ({100 * kept / made:.1f} %)" if made else ""
        yield f"Selection by the guide's features kept images with {' and '.join(rules)}{share}."
        rows = [[_name(str(row["class"])), row["made"], row["kept"], _percent(row.get("yield"))] for row in yields if row.get("made")]
        if rows and len(rows) <= CLASSES_LISTED:
            yield _table(["class", "made", "kept", "yield"], rows)
    if copies := found["copies"].get("generated"):
        usual = found["copies"].get("real", {})
        told = [
            f"{found_in['copies']:,} of {found_in['images']:,} by {space}s (real ones of each other: {_percent(usual[space]['share'])})"
            for space, found_in in copies.items()
            if space in usual
        ]
        yield f"Copies of training images: {', '.join(told)}."


def _trust(balanced: Balanced) -> Iterator[str]:
    found = evidence(balanced)
    accuracy, trust = found["accuracy"], found["trust"]
    yield "## How far to trust them"
    if not accuracy and not trust:
        yield "Not measured when this was written: `diffrc evaluate` says whether a recognizer gets better by them."
        return
    if accuracy:
        yield _text(str(accuracy.get("verdict", "")))
        columns = [column for column in ("many", "medium", "few", "all") if column in accuracy["rows"][0]["figures"]]
        rows = [
            [_text(f"{row['variant']}".replace("_", " ")), _text(str(row.get("method", row.get("loss", ""))).replace("_", " "))]
            + [_figure(row["figures"][column]) for column in columns]
            for row in accuracy["rows"]
        ]
        yield f"Top-1 % on {accuracy['test_images']:,} real test images, {accuracy['seeds']} seeds, mean ± sample deviation:"
        yield _table(["trained on", "method", *columns], rows)
    rows = [[title, _figure(trust[key])] for key, title in TRUST.items() if trust.get(key) is not None]
    if rows:
        judge = trust.get("extractor", {})
        judged = f", in the features of {_text(str(judge['name']))}" if judge.get("name") else ""
        against = {"test": "real test images", "train": "real training images"}.get(str(trust.get("reference_set")), "real images")
        if rows[0][0] == TRUST["frechet"] and judge.get("is_fid"):
            rows[0][0] = "FID"
        if isinstance(trust.get("frechet"), Mapping) and isinstance(floor := trust["frechet"].get("floor"), int | float):
            rows[0][1] += f"; as many real images would score {floor:.4g}"
        if isinstance(usual := trust.get("hit_rate_real"), int | float):
            rows = [[title, f"{value}; {usual:.4g} of the real ones" if title == TRUST["hit_rate"] else value] for title, value in rows]
        yield f"Beside {against}{judged}, with 95 % intervals:"
        yield _table(["figure", ""], rows)


def _limits(balanced: Balanced) -> Iterator[str]:
    real = len(balanced.longtail.train)
    yield "## Use"
    yield "Training image classifiers on a long tail, together with the real images; research on synthetic data."
    yield "\n".join(
        [
            f"* **Synthetic images are made from the {real:,} real ones**: they hold no knowledge of a class beyond them, and repeat "
            "what is wrong or missing in them. A class of few real images has synthetic ones that look alike.",
            "* **Do not test on them**, and do not choose a setting by them: accuracy on synthetic images says nothing of real ones. "
            "Validation and test images must be real; split the real images before you mix.",
            "* Their labels are what was asked for, not what an expert saw: some show another class.",
            "* Do not take them for evidence of the world: not for medical, legal or statistical findings about what they show.",
            "* Give them a smaller weight than real ones (`weight`) or filter them, where a plain union hurts.",
            "* Images of people and personal data in the real set are in this one too, and may be recognizable in synthetic ones.",
        ]
    )
    yield "## License"
    yield (
        "Not stated: **you who publish this fill it in**, here and in the first lines. The terms of the real images hold for "
        "them, and may hold for images that were made from them."
    )


# -------------------------------------------------------------------------------------------------------------- helpers


def _document(path: Path, empty: Any) -> Any:
    """A JSON document, or `empty` where there is none, or one of another kind."""
    found = store.read_json(path) if path.exists() else empty
    return found if isinstance(found, type(empty)) else empty


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *([f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: str) -> str:
    """One line of Markdown that shows this text and does nothing: no HTML, no link, no table cell, no control character."""
    visible = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return re.sub(r"([\\`*_\[\]<>|~&$#!])", r"\\\1", visible)


def _name(name: str) -> str:
    return _text(shorten(name))


def _percent(share: Any) -> str:
    return f"{100 * share:.1f} %" if isinstance(share, int | float) else "-"


def _figure(value: Any) -> str:
    """A number, or {"mean" or "value", "spread" or "low" and "high"}."""
    if isinstance(value, Mapping):
        middle = next((value[key] for key in ("mean", "value", "difference") if isinstance(value.get(key), int | float)), None)
        if middle is None:
            return "-"
        if value.get("low") is not None and value.get("high") is not None:
            return f"{middle:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
        return f"{middle:.1f} ± {value['spread']:.1f}" if value.get("spread") is not None and value.get("n", 1) > 1 else f"{middle:.4g}"
    return f"{value:.4g}" if isinstance(value, int | float) else _text(str(value))
