"""Two hundred hostile class names, from the data set to every file, page, table and terminal line: none leaves its place or its quotes."""

from __future__ import annotations

import csv
import html.parser
import importlib.util
import io
import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from diffrc_cli import console
from diffrc_cli.app import main
from engines import store
from engines.data.longtail import LongTail, prepare
from engines.data.names import find_class, slug
from engines.errors import DataError
from engines.evaluation.report import collect, render
from engines.recipe import load
from engines.sharing.layouts import Format, class_folders
from engines.sharing.share import share
from engines.store import RunFolder
from engines.synthesis.plan import Plan
from engines.synthesis.sheet import PairsRow, PairTile, SheetRow, contact_sheet, pairs_sheet, read_images
from engines.synthesis.shelf import Shelf


def _load(name: str) -> Any:
    """A file beside this one; test folders are no packages."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


hostile = _load("hostile_names")
NAMES: list[str] = hostile.hostile_names(200)
RECIPE = """
name = "hostile"
[data]
source = "parquet"
image_size_px = 8
profile = "as-is"
groups = "ranks"
group_sizes = [60, 70, 70]
[unet]
attention_resolutions = []
"""
PLACE = re.compile(r"[a-z0-9_-]+(\.[a-z]+)?")  # what every file and folder of a run is called
Names = list[str]


def images(count: int) -> list[bytes]:
    """Small PNG files, all different."""
    found = []
    for value in range(count):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), [value % 256, value // 256, 7], dtype=np.uint8)).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def data_set(folder: Path, names: Names) -> Path:
    """Tables whose metadata name these classes: three training images of the head's and two of each other, one test image."""
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
    for split, per_class in (("train", [3] * 60 + [2] * (len(names) - 60)), ("test", [1] * len(names))):
        labels = [k for k, count in enumerate(per_class) for _ in range(count)]
        first = 0 if split == "train" else 1000
        table = pa.table({"image": images(first + len(labels))[first:], "label": labels})
        store.write_bytes(folder / "x", b"")
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _no_flush() -> Iterator[None]:
    """That files are flushed before they get their names is shown in test_store; here it would wait for the disk a thousand times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.sync", lambda: None)
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("names")


@pytest.fixture(scope="module")
def tail(root: Path) -> LongTail:
    recipe = load(RECIPE, [f"data.path={json.dumps(str(data_set(root / 'data', NAMES)))}"])
    return prepare(recipe.data, None)


@pytest.fixture(scope="module")
def run(root: Path, tail: LongTail, fill_with_noise: Callable[[RunFolder], None]) -> RunFolder:
    """A run of them, its tail filled with noise: a kept image and a dropped one a class."""
    made = store.create_run(root / "run", load(RECIPE, [f"data.path={json.dumps(str(root / 'data'))}"]))
    made.keep_classes(tail.table())
    fill_with_noise(made)
    return made


def test_there_are_two_hundred_of_them_and_they_are_hostile() -> None:
    assert len(set(NAMES)) == len(NAMES) == 200
    assert sum(not hostile.is_plain(name) for name in NAMES) > 30
    folded = [unicodedata.normalize("NFC", name).casefold() for name in NAMES]
    assert len(set(folded)) <= 190, "some are equal after case folding and normalization"


# ---------------------------------------------------------------------------------------------------------------- paths


def test_the_data_set_has_a_class_for_every_name_and_each_is_found_by_its_own(tail: LongTail) -> None:
    assert list(tail.names) == NAMES
    assert [find_class(name, tail.names) for name in NAMES] == list(range(200))


@pytest.mark.parametrize("first", [0, 9_900, 10**9])
def test_names_and_folders_are_a_bijection_even_where_case_and_accents_do_not_count(first: int) -> None:
    slugs = [slug(name, first + k) for k, name in enumerate(NAMES)]
    assert len({unicodedata.normalize("NFD", s).casefold() for s in slugs}) == 200
    assert [int(s.rsplit("-", 1)[1]) for s in slugs] == list(range(first, first + 200))
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}-\d{4,}", s) for s in slugs)
    folders = class_folders(NAMES)
    assert len({unicodedata.normalize("NFKD", folder).casefold() for folder in folders}) == 200


def test_no_name_reaches_a_path_of_the_run(root: Path, run: RunFolder) -> None:
    assert sorted(path.name for path in root.iterdir()) == ["data", "run"]
    made = [path.relative_to(run.path) for path in run.path.rglob("*")]
    assert len([path for path in made if path.suffix == ".png"]) >= 2 * 140
    assert {part for path in made for part in path.parts if not PLACE.fullmatch(part)} <= {".lock"}
    assert all((run.path / path).resolve().is_relative_to(run.path.resolve()) for path in made)


def test_the_images_of_each_class_come_back_as_its_own(run: RunFolder) -> None:
    _, labels = read_images(run.synth)
    assert sorted(set(labels.tolist())) == list(range(60, 200))
    identity = store.read_json(run.synth / "plan.json")
    shelf = Shelf.open(run.synth, Plan(identity["identity"], identity["versions"]), range(200))
    assert all(record.class_name == NAMES[k] for k, records in shelf.images.items() for record in records.values())
    assert [line["class"] for line in store.read_json_lines(run.synth / "manifest.jsonl") if line["kept"]] == [NAMES[k] for k in labels]
    assert store.read_json(run.path / "classes.json")["names"] == NAMES


def test_the_text_of_an_image_is_plain_ascii_and_says_the_name(run: RunFolder) -> None:
    for k in range(60, 200):
        with Image.open(run.synth / slug(NAMES[k], k) / "000000.png") as image:
            assert isinstance(image, PngImagePlugin.PngImageFile)
            assert all(value.isascii() and value.isprintable() for value in image.text.values())
            assert image.text["class"].encode("ascii").decode("unicode_escape") == NAMES[k]


@pytest.mark.parametrize("layout", ["folder", "parquet"])  # tests/sharing holds all formats to fewer names
def test_no_name_reaches_a_path_of_a_data_set_that_is_shared(layout: Format, root: Path, run: RunFolder, tail: LongTail) -> None:
    before = sorted(path.name for path in root.iterdir())
    out = root / f"shared-{layout}"
    share(run, tail, out, layout)
    assert sorted({path.name for path in root.iterdir()} - {out.name}) == [name for name in before if name != out.name]
    for path in out.rglob("*"):
        assert path.resolve().is_relative_to(out.resolve())
        assert hostile.is_plain(path.name) and path.name.strip(". ") == path.name and not set(path.name) & set('<>:"/\\|?*[]{}$&;`')
    card = next(path for path in out.iterdir() if path.name in ("README.md", "DATASET.md", "CARD.md") or path.suffix == ".md")
    text = card.read_text(encoding="utf-8")
    assert hostile.is_plain(text.replace("\n", "")), "a control or format character stands in the card"
    rows_of_names = [line for line in text.splitlines() if re.match(r"\| \d", line)]  # the front matter is held to YAML by tests/sharing
    assert len(rows_of_names) == 200
    assert not [line for line in rows_of_names if re.search(r"(?<!\\)<[a-zA-Z/!]", line)], "a tag that no backslash takes its meaning from"
    if layout == "folder":
        with (out / "metadata.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert {row["class_name"] for row in rows} == set(NAMES)
        assert len(rows) == sum(path.suffix == ".png" for path in out.rglob("*"))


# ------------------------------------------------------------------------------------------------------------ pictures


def test_sheets_show_any_name() -> None:
    pixels = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    width = {Image.open(io.BytesIO(contact_sheet([SheetRow(name, pixels, pixels)]))).width for name in NAMES}
    assert max(width) < 600, "a long name is shortened"
    pair = PairTile(pixels[0], pixels[0], 0.1, 0.2)
    for name in NAMES[::7]:
        assert pairs_sheet([PairsRow(name, [pair], [])], 0.5).startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------------------------- pages


class Page(html.parser.HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data[:80]}")


def test_the_report_holds_the_same_tags_as_that_of_harmless_names(run: RunFolder, tail: LongTail) -> None:
    parts = collect(run, tail, None)
    text = render(parts)
    page = Page(text)
    control = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
    assert not control.search(text)
    assert not {"script", "iframe", "object", "link", "base", "form", "b>", "img src"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not [value for name, value in page.attributes if name in ("href", "src") and not value.startswith(("#", "data:image/"))]
    harmless = [f"name {k}" for k in range(200)]
    same = render(replace(parts, classes={**parts.classes, "names": harmless}, galleries=[], closest=[]))
    hostile_page = Page(render(replace(parts, galleries=[], closest=[])))
    assert hostile_page.tags == Page(same).tags, "no name makes or breaks a tag"
    shown = [name for name in NAMES if name.strip() and not control.search(name) and len(name) < 40 and name in page.text]
    assert len(shown) > 50


# ------------------------------------------------------------------------------------------------------------ terminals


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


STYLE = re.compile(r"\x1b\[[\d;]*m|\x1b\[\?25[lh]|\x1b\[\d*[ABK]|\x1b\[2K|\r")  # colors; the cursor of progress bars


def drawn(monkeypatch: pytest.MonkeyPatch, columns: int, show: Callable[[], object]) -> str:
    """What is written to a terminal, our own styles taken out; fails where anything else is left that a terminal would obey."""
    out, err = Terminal(), Terminal()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        patch.setenv("COLUMNS", str(columns))
        patch.setenv("TERM", "xterm-256color")
        patch.delenv("NO_COLOR", raising=False)
        show()
    text = STYLE.sub("", out.getvalue() + err.getvalue())
    left = {character for character in text if not character.isprintable() and character != "\n"}
    assert not left, f"{left} reaches the terminal"
    return text


def _progress() -> None:
    with console.progress() as report:
        for name in NAMES[::20]:
            report(name, 1, 2, {name: 1.0})


SHOWN: dict[str, Callable[[], object]] = {
    "say": lambda: [console.say(name) for name in NAMES],
    "note": lambda: [console.note(name) for name in NAMES],
    "prose": lambda: [console.prose(name) for name in NAMES],
    "error": lambda: [console.error(name, name) for name in NAMES],
    "table": lambda: console.table(NAMES[101], NAMES[:3], [(name, 1, name) for name in NAMES]),
    "bars": lambda: console.bars(NAMES[102], [console.Bar(name, k, "few", 1.0) for k, name in enumerate(NAMES)], limit=300),
    "progress": _progress,
}


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("what", SHOWN)
def test_no_name_is_obeyed_by_a_terminal(what: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(monkeypatch, columns, SHOWN[what])
    if what != "progress":
        shown = ("[red]x", "[/red]", "[bold", ":smile:") if what != "bars" else ("[red]x", "[/red]")
        assert all(word in text for word in shown), "markup is shown, not obeyed"


@pytest.mark.parametrize("words", [("data", "classes"), ("data", "show")], ids=" ".join)
def test_commands_show_them_on_a_terminal_in_a_pipe_and_as_json(
    words: tuple[str, ...], root: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--run", str(run.path)) if words[1] == "classes" else ("--recipe", str(run.path / "recipe.toml"))

    def call(*more: str) -> None:
        with pytest.raises(SystemExit) as end:
            main((*words, *options, *more))
        assert end.value.code == 0

    drawn(monkeypatch, 80, call)
    capsys.readouterr()
    call()
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n"))
    call("--json")
    document = capsys.readouterr().out
    assert document.isascii() and document.count("\n") == 1 and document.strip().isprintable()
    found = json.loads(document)
    assert ([row["name"] for row in found] if words[1] == "classes" else found["names"]) == NAMES


def test_a_class_that_is_asked_for_is_told_of_in_one_line(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES[::19]:
        if "\0" in name:  # no command line can hold it
            continue
        with pytest.raises(SystemExit):
            main(("synth", "--run", str(run.path), "--engine", "torch", "--n", "1", f"--class={name}"))
        lines = capsys.readouterr().err.split("\n")
        assert all(line.isprintable() for line in lines)
        assert [line[:6] for line in lines if line.startswith(("error:", "try:"))] == ["error:", "try:  "]


# -------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("words", [("recipe", "validate"), ("recipe", "diff")], ids=" ".join)
def test_the_text_of_a_recipe_is_shown_and_never_obeyed(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values, keys, sections, names of files: of a recipe that is taken and of one that is refused, on a terminal and in a pipe."""
    monkeypatch.chdir(tmp_path)
    hidden = [name for name in NAMES if not hostile.is_plain(name) and "\0" not in name and len(name) < 100] + ["[red]x", "<b>"]
    refused = 0
    for text in hidden[::8]:
        quoted = json.dumps(text).replace("\x7f", "\\u007f")
        for content in (
            f'name = "x"\n[data]\nsource = "folder"\npath = {quoted}\n',
            f"name = {quoted}\n[source]\nlr = {quoted}\n{quoted} = 1\n[{quoted}]\n{quoted} = {quoted}\n",
        ):
            (tmp_path / "recipe.toml").write_text(content, encoding="utf-8")
            options = ("recipe.toml", "digits-lt")[: 1 + (words[1] == "diff")]

            def call(options: tuple[str, ...] = options) -> None:
                with pytest.raises(SystemExit):
                    main((*words, *options))

            drawn(monkeypatch, 80, call)
            capsys.readouterr()
            call()
            captured = capsys.readouterr()
            assert all(line.isprintable() for line in (captured.out + captured.err).split("\n"))
            refused += "error:" in captured.err
    assert refused >= len(hidden[::8])
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"], "nothing is written anywhere"


# -------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("name", "reason"), [("half \ud800 a pair", "no text that a file can hold"), ("x" * 70_000, "70,000 characters")])
def test_a_name_that_no_file_can_hold_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    names = [name, *NAMES[1:]]
    data = load(RECIPE, [f"data.path={json.dumps(str(data_set(tmp_path, names)))}"]).data
    with pytest.raises(DataError, match=reason) as error:
        prepare(data, None)
    assert len(error.value.problem) < 500
    error.value.problem.encode("ascii", "backslashreplace")


def test_a_folder_whose_name_is_no_utf_8_is_a_data_set_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = os.fsencode(tmp_path) + b"/\xff\xfe"
    for k in range(2):
        os.makedirs(place + b"/class%d" % k)  # noqa: PTH103 - bytes
        for value, content in enumerate(images(3)):
            Path(os.fsdecode(place + b"/class%d/\x80%d.png" % (k, value))).write_bytes(content)
    recipe = tmp_path / "folder.toml"
    settings = 'source = "folder"\nimage_size_px = 8\ntest_per_class = 1\nprofile = "as-is"'
    recipe.write_text(f'name = "x"\n[data]\n{settings}\n[unet]\nattention_resolutions = []\n', encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(("data", "show", "--recipe", str(recipe), "--data", os.fsdecode(place)))
    captured = capsys.readouterr()
    assert end.value.code == 0, captured.err
    assert "class0" in captured.out
