"""OpenAI's published networks: names and shapes derived a second time, and checkpoints that only pretend to be one."""

from __future__ import annotations

import functools
import math
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.errors import DataError, UsageError
from engines.networks import openai
from engines.networks.openai import CLASSIFIERS, CONFIGURATIONS, check_state_dict, read, read_state_dict, shapes
from engines.networks.pretrained import load_into, write
from engines.networks.unet import Architecture, UNet

Shapes = dict[str, tuple[int, ...]]

# parameters and entries of the files that OpenAI published
PUBLISHED = {
    "imagenet-64-cond": (295_904_454, 541),
    "imagenet-128-cond": (421_529_606, 493),
    "imagenet-256-cond": (553_838_086, 567),
    "imagenet-256-uncond": (552_814_086, 566),
    "imagenet-512-cond": (558_997_638, 645),
    "imagenet-64-classifier": (65_438_568, 307),
    "imagenet-128-classifier": (42_568_040, 221),
    "imagenet-256-classifier": (54_096_360, 249),
    "imagenet-512-classifier": (54_448_360, 281),
}
WIDTHS = {  # of each level, in channels, at a base width of 256 (64 px: 192)
    64: [192, 384, 576, 768],
    128: [256, 256, 512, 768, 1024],
    256: [256, 256, 512, 512, 1024, 1024],
    512: [128, 256, 256, 512, 512, 1024, 1024],
}


def plan(px: int, base: int, blocks: int) -> tuple[list[tuple[int, int, bool]], list[tuple[int, int, int, bool, bool]]]:
    """The residual blocks of the published networks as rows of numbers, from the rules of Dhariwal & Nichol's appendix.

    Returns: encoder blocks (channels in, channels out, attends), where a block that halves the image keeps its width and never
    attends; decoder blocks (channels from below, from the skip, out, attends, doubles).
    """
    widths = [width * base // (192 if px == 64 else 256) for width in WIDTHS[px]]
    encoder, skips, now = [], [widths[0]], widths[0]
    for level, width in enumerate(widths):
        for _ in range(blocks):
            encoder.append((now, width, px >> level in (32, 16, 8)))
            skips.append(width)
            now = width
        if width is not widths[-1] or level < len(widths) - 1:
            encoder.append((now, now, False))
            skips.append(now)
    decoder = []
    for level in range(len(widths) - 1, -1, -1):
        for turn in range(blocks + 1):
            doubles = turn == blocks and level > 0
            decoder.append((now, skips.pop(), widths[level], px >> level in (32, 16, 8), doubles))
            now = widths[level]
    assert not skips
    return encoder, decoder


def affine(table: Shapes, name: str, *shape: int) -> None:
    table[f"{name}.weight"], table[f"{name}.bias"] = shape, shape[:1]


def residual(table: Shapes, name: str, before: int, after: int, emb: int) -> None:
    affine(table, f"{name}.in_layers.0", before)
    affine(table, f"{name}.in_layers.2", after, before, 3, 3)
    affine(table, f"{name}.emb_layers.1", 2 * after, emb)
    affine(table, f"{name}.out_layers.0", after)
    affine(table, f"{name}.out_layers.3", after, after, 3, 3)
    if before != after:
        affine(table, f"{name}.skip_connection", after, before, 1, 1)


def attention(table: Shapes, name: str, channels: int) -> None:
    affine(table, f"{name}.norm", channels)
    affine(table, f"{name}.qkv", 3 * channels, channels, 1)
    affine(table, f"{name}.proj_out", channels, channels, 1)


def derived(name: str) -> Shapes:
    """Names and shapes of a published file, from its description, without the network that is under test."""
    px = int(name.split("-")[1])
    classifier = name.endswith("classifier")
    base = 128 if classifier else 192 if px == 64 else 256
    encoder, decoder = plan(px, base, {True: 4 if px == 64 else 2, False: 3 if px == 64 else 2}[classifier])
    table: Shapes = {}
    affine(table, "time_embed.0", 4 * base, base)
    affine(table, "time_embed.2", 4 * base, 4 * base)
    affine(table, "input_blocks.0.0", encoder[0][0], 3, 3, 3)
    for number, (before, after, attends) in enumerate(encoder, start=1):
        residual(table, f"input_blocks.{number}.0", before, after, 4 * base)
        if attends:
            attention(table, f"input_blocks.{number}.1", after)
    deepest = encoder[-1][1]
    residual(table, "middle_block.0", deepest, deepest, 4 * base)
    attention(table, "middle_block.1", deepest)
    residual(table, "middle_block.2", deepest, deepest, 4 * base)
    if classifier:
        affine(table, "out.0", deepest)
        table["out.2.positional_embedding"] = (deepest, 1 + 8 * 8)
        affine(table, "out.2.qkv_proj", 3 * deepest, deepest, 1)
        affine(table, "out.2.c_proj", 1000, deepest, 1)
        return table
    for number, (below, skip, after, attends, doubles) in enumerate(decoder):
        residual(table, f"output_blocks.{number}.0", below + skip, after, 4 * base)
        if attends:
            attention(table, f"output_blocks.{number}.1", after)
        if doubles:
            residual(table, f"output_blocks.{number}.{1 + attends}", after, after, 4 * base)
    affine(table, "out.0", decoder[-1][2])
    affine(table, "out.2", 6, decoder[-1][2], 3, 3)
    if name.endswith("-cond"):
        table["label_emb.weight"] = (1000, 4 * base)
    return table


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    found = shapes(name)
    assert found == derived(name)
    assert (sum(math.prod(shape) for shape in found.values()), len(found)) == PUBLISHED[name]


def test_every_configuration_is_among_the_published_ones() -> None:
    assert [*CONFIGURATIONS, *CLASSIFIERS] == list(PUBLISHED)


def test_heads_are_64_wide_but_for_the_128_px_model_which_has_four_everywhere() -> None:
    for name, found in (CONFIGURATIONS | CLASSIFIERS).items():
        widths = {found.architecture.width(level) for level in range(1, len(found.architecture.channel_mult))}
        heads = {width: found.architecture.heads(width) for width in widths}
        assert heads == {width: 4 if name == "imagenet-128-cond" else width // 64 for width in widths}


def test_only_the_64_px_networks_know_the_cosine_schedule_and_only_that_model_the_new_order_and_dropout() -> None:
    for name, found in (CONFIGURATIONS | CLASSIFIERS).items():
        a = found.architecture
        assert found.noise_schedule == ("cosine" if "-64-" in name else "linear")
        assert (a.use_new_attention_order, a.dropout) == ((True, 0.1) if name == "imagenet-64-cond" else (False, 0.0))
        assert a.resblock_updown
        assert a.use_scale_shift_norm


# a stand-in small enough to be written to a file
SMALL = Architecture(8, 3, 32, (1, 2), 1, (4,), 32)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(CONFIGURATIONS, "small-cond", openai.Configuration(SMALL, 5))
    monkeypatch.setitem(CONFIGURATIONS, "small-uncond", openai.Configuration(SMALL, 0))
    return "small-cond"


def weights(classes: int = 5) -> OrderedDict[str, Tensor]:
    torch.manual_seed(0)
    return OrderedDict((name, torch.randn_like(value)) for name, value in UNet(SMALL, 6, classes).state_dict().items())


def saved(path: Path, value: object, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)  # noqa: TID251 (what others wrote)
    return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path, legacy: bool, dtype: torch.dtype) -> None:
    state = OrderedDict((name, value.to(dtype)) for name, value in weights().items())
    state["out.2.bias"] = torch.nn.Parameter(state["out.2.bias"])  # as the moving averages of a training loop are
    found = read_state_dict(saved(tmp_path / "model.pt", state, legacy))
    assert list(found) == list(state)
    assert all(torch.equal(found[name], value) and found[name].dtype == dtype for name, value in state.items())
    assert not any(value.requires_grad for value in found.values())


def test_the_state_dict_of_a_module_is_read_with_the_versions_that_torch_hides_in_it(tmp_path: Path) -> None:
    state = UNet(SMALL, 6).state_dict()
    assert hasattr(state, "_metadata")
    assert list(read_state_dict(saved(tmp_path / "model.pt", state))) == list(state)


def test_a_published_model_becomes_a_file_that_a_conditional_recipe_starts_from(tmp_path: Path, small: str) -> None:
    state, card = read(saved(tmp_path / "model.pt", weights()), small)
    assert (card.classes, card.null_label, card.diffusion_steps, card.origin["config"]) == (5, False, 1000, small)
    write(tmp_path / "model.safetensors", state, card)
    ours = UNet(SMALL, 6, classes=5 + 1)
    load_into(ours, tmp_path / "model.safetensors")
    rows = ours.state_dict()["label_emb.weight"]
    assert torch.equal(rows[:5], weights()["label_emb.weight"])
    torch.testing.assert_close(rows[5], weights()["label_emb.weight"].mean(0))  # the null label


def test_what_does_not_fit_is_told_at_once_and_the_configuration_that_does_is_named(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_state_dict(weights(), small)
    with pytest.raises(DataError, match=r"not the weights of small-cond: 1 missing \(label_emb.weight\)$") as caught:
        check_state_dict(weights(classes=0), small)
    assert caught.value.remedy == "--config small-uncond: that one fits"
    monkeypatch.setitem(CLASSIFIERS, "small-classifier", openai.Classifier(SMALL))
    with pytest.raises(DataError) as caught:
        check_state_dict(CLASSIFIERS["small-classifier"].build().state_dict(), small)
    assert caught.value.remedy == "they are those of small-classifier"
    state = weights()
    del state["out.0.bias"], state["out.0.weight"]
    state |= {"extra": torch.zeros(1), "out.2.bias": torch.zeros(3)}
    with pytest.raises(DataError) as caught:
        check_state_dict(state, small)
    wanted = "2 missing (out.0.weight, out.0.bias); 1 unexpected (extra); 1 of another shape (out.2.bias (3,), not (6,))"
    assert caught.value.problem.endswith(wanted)
    assert caught.value.remedy.startswith("none of imagenet-64-cond, ")


def test_an_unknown_name_is_answered_with_the_nearest_and_a_classifier_is_no_source_model(tmp_path: Path) -> None:
    for call in (lambda name: check_state_dict({}, name), lambda name: read(tmp_path / "absent.pt", name)):
        with pytest.raises(UsageError) as caught:
            call("imagenet-256-uncod")
        assert caught.value.remedy == "--config imagenet-256-uncond"
    with pytest.raises(UsageError, match="imagenet-64-classifier is a classifier"):
        read(tmp_path / "absent.pt", "imagenet-64-classifier")


class Calls:
    """Pickled, a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def archive(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in {"data.pkl": data, "version": b"3\n", "byteorder": b"little", **members}.items():
            file.writestr(f"archive/{name}", content)
    return path


def nested(depth: int, key: bool) -> bytes:
    """A dictionary that holds a tuple in a tuple in a tuple ..., as a key or as a value."""
    deep = b")" + b"\x85" * depth
    return b"\x80\x02}" + (deep + b"K\x01" if key else b"K\x01" + deep) + b"s."


def tensor(size: bytes, storage: bytes) -> bytes:
    """The pickle of {"x": a float32 tensor} whose size and whose storage's length are given as opcodes."""
    call = b"ctorch._utils\n_rebuild_tensor_v2\n"
    persistent = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + storage + b"tQ"
    return b"\x80\x02}X\x01\x00\x00\x00x" + call + b"(" + persistent + b"K\x00(" + size + b"t(K\x01t\x89ccollections\nOrderedDict\n)RtRs."


ONE, HUGE = b"K\x01", b"\x8a\x06" + (1 << 44).to_bytes(6, "little")
GOOD = b"\x00\x00\x80\x3f"


def test_the_handmade_pickle_is_a_good_one_with_honest_numbers(tmp_path: Path) -> None:
    path = archive(tmp_path / "model.pt", tensor(ONE, ONE), **{"data/0": GOOD})
    assert read_state_dict(path)["x"].tolist() == [1.0]


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["value", "whole", "key"])
@pytest.mark.parametrize("kind", ["system", "eval", "partial"])
def test_nothing_that_a_checkpoint_holds_is_run(tmp_path: Path, kind: str, where: str, legacy: bool, protocol: int) -> None:
    canary = tmp_path / "canary"
    touch = f"open({str(canary)!r}, 'w')"
    bomb = {
        "system": Calls(os.system, f"touch {canary}"),
        "eval": Calls(eval, touch),
        "partial": Calls(functools.partial, eval, touch),
    }[kind]
    value: Any = {"value": {"x": bomb}, "whole": bomb, "key": {bomb: 1}}[where]
    data = pickle.dumps(value, protocol)
    if legacy:
        head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}))
        path = tmp_path / "model.pt"
        path.write_bytes(head + data + pickle.dumps([], 2))
    else:
        path = archive(tmp_path / "model.pt", data)
    with pytest.raises(DataError, match=r"reading it would call .*nothing was run$"):
        read_state_dict(path)
    assert not canary.exists()


def test_torchs_own_reader_would_run_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "_inspect", lambda path, zipped: None)  # the second line of defense, alone
    canary = tmp_path / "canary"
    path = archive(tmp_path / "model.pt", pickle.dumps({"x": Calls(os.system, f"touch {canary}")}, 2))
    with pytest.raises(DataError, match="no checkpoint of torch"):
        read_state_dict(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (nested(200_000, key=True), "no such long description"),
        (nested(200_000, key=False), "no such long description"),
        (nested(19_000, key=True), "a key is an object of type tuple"),
        (nested(19_000, key=False), "a key is an object of type int"),
        (b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".", "no weights by name but an object of type list"),
        (b"\x80\x02" + b"N0" * 150_000 + b"}.", "no such long description"),
        (tensor(HUGE, ONE), "is damaged"),
        (tensor(HUGE, HUGE), "is damaged"),
        (tensor(b"K\x7fK\x7f\x86", HUGE), "is damaged"),
        (b"\x80\x02X\xff\xff\xff\x7fx.", "is damaged"),
        (b"\x80\x02}", "is damaged"),
        (b"", "is damaged"),
        (pickle.dumps({}, 2), "no weights by name but an empty dictionary"),
        (pickle.dumps([1], 2), "no weights by name but an object of type list"),
        (pickle.dumps(7, 2), "no weights by name but an object of type int"),
        (pickle.dumps({"epoch": 3}, 2), "'epoch' is an object of type int"),
        (pickle.dumps({"model": {"x": 1}}, 2), "'model' is an object of type dict"),
        (pickle.dumps({3: "x"}, 2), "a key is an object of type int"),
    ],
)
def test_a_pickle_that_is_no_state_dict_is_refused_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_state_dict(archive(tmp_path / "model.pt", data, **{"data/0": GOOD}))
    assert "\n" not in caught.value.problem + caught.value.remedy


def test_an_expanded_tensor_that_claims_more_than_its_storage_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt", {"x": torch.zeros(1).expand(1 << 40)})
    assert path.stat().st_size < 4096
    with pytest.raises(DataError, match="claims more values than the file holds"):
        read_state_dict(path)


@pytest.mark.parametrize("value", [torch.zeros(3, dtype=torch.int64), torch.eye(3).to_sparse(), torch.zeros(3, dtype=torch.float64)])
def test_tensors_that_no_published_file_holds_are_refused(tmp_path: Path, value: Tensor) -> None:
    with pytest.raises(DataError, match="reading it would call torch"):
        read_state_dict(saved(tmp_path / "model.pt", {"x": value}))


def test_a_whole_module_is_refused_by_the_name_of_its_class(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"reading it would call torch\.nn\.modules\.linear\.Linear; nothing was run"):
        read_state_dict(saved(tmp_path / "model.pt", torch.nn.Linear(2, 2)))


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = archive(tmp_path / "model.pt", bytes(64 << 20), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DataError, match="compressed, which a checkpoint never is"):
        read_state_dict(path)


def test_what_is_not_there_or_not_a_file_is_said_so(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "absent.pt", tmp_path, tmp_path / "pipe.pt"):
        with pytest.raises(DataError, match="cannot read"):
            read_state_dict(path)
    for number, content in enumerate((b"", b"PK\x03\x04", b"# text\n" * 100, bytes(1000), b"\x80\x02.", struct.pack("<Q", 2) + b"{}")):
        (tmp_path / f"{number}.pt").write_bytes(content)
        with pytest.raises(DataError, match="is no checkpoint of torch, or is damaged"):
            read_state_dict(tmp_path / f"{number}.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_cut_short_anywhere_is_refused(tmp_path: Path, legacy: bool) -> None:
    whole = saved(tmp_path / "whole.pt", {"x": torch.arange(1000.0), "y": torch.ones(3)}, legacy).read_bytes()
    cut = tmp_path / "cut.pt"
    for size in (1, 3, 30, 100, 400, 1000, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(DataError):
            read_state_dict(cut)


def test_a_damaged_byte_is_found_by_its_checksum_or_does_not_matter(tmp_path: Path) -> None:
    state = {"x": torch.arange(100.0), "y": torch.ones(3)}
    whole = saved(tmp_path / "whole.pt", state).read_bytes()
    damaged, refused, draw = tmp_path / "damaged.pt", 0, random.Random(0)
    for _ in range(150):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        damaged.write_bytes(content)
        try:
            found = read_state_dict(damaged)
        except DataError:
            refused += 1
        else:  # padding, dates and other fields that say nothing of the weights
            assert found.keys() == state.keys()
            assert all(torch.equal(found[name], value) for name, value in state.items())
    assert refused > 20
