"""TensorRT: a plan is built, checked, published, loaded and run by its API's rules, and one that does not fit is never loaded."""

from __future__ import annotations

import ast
import ctypes
import hashlib
import importlib.util
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from engines.backends import choice, trt_engine
from engines.backends.base import EngineCard, EngineFile, Precision, card_path, example_input, read_engine, relative_error, thinned
from engines.backends.export import file_opset
from engines.backends.gate import one_step_error, psnr_db, trajectory
from engines.backends.torch_engine import TorchEngine
from engines.backends.trt_engine import Batches, CudaDevice, Gpu, PlanCard, TrtEngine, build_plan, make_plan, read_plan, wanted
from engines.errors import DataError, DiffRCError, EngineError, ParityError

TOLERANCE = 1e-5
BATCHES = Batches(1, 4, 8)
MIB = 2**20


def _load_fake() -> Any:
    """The file beside this one; test folders are no packages."""
    spec = importlib.util.spec_from_file_location("fake_tensorrt", Path(__file__).with_name("fake_tensorrt.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fake = _load_fake()


@pytest.fixture
def machine() -> Any:
    return fake.Machine()


@pytest.fixture(scope="module")
def onnx_file(exported: Any) -> EngineFile:
    return read_engine(exported.path)


@pytest.fixture(scope="module")
def gate(exported: Any) -> Callable[[EngineCard, TrtEngine], EngineCard]:
    """The parity gate of the export: errors of one step and of a short trajectory."""
    reference = TorchEngine(exported.unet, len(exported.schedule), exported.settings.max_batch)

    def check(card: EngineCard, engine: TrtEngine) -> EngineCard:
        error = one_step_error(engine, reference)
        psnr = float(psnr_db(*(trajectory(runner, exported.schedule, 4) for runner in (engine, reference))).min())
        if not (error <= card.tolerance and psnr >= 40):
            raise ParityError(f"relative error {error:.2g}, {psnr:.1f} dB", "report it")
        return card.model_copy(update={"one_step_error": error, "trajectory_psnr_db": psnr})

    return check


@pytest.fixture(scope="module")
def published(onnx_file: EngineFile, gate: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a plan that passed the gate. To be read only."""
    folder = tmp_path_factory.mktemp("plans") / "tensorrt"
    make_plan(onnx_file, folder / "target.plan", BATCHES, gate, TOLERANCE, 256 * MIB, fake.Machine())
    return folder


@pytest.fixture
def plan(published: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(published, tmp_path / "tensorrt")) / "target.plan"


def _let_pass(card: EngineCard, engine: TrtEngine) -> EngineCard:
    return card


# ------------------------------------------------------------------------------------------------------------------ use


@pytest.mark.parametrize("batch", [1, 2, 7, 8])
def test_a_plan_gives_torchs_numbers_at_every_batch_of_its_profile(
    batch: int, plan: Path, exported: Any, onnx_file: EngineFile, machine: Any
) -> None:
    engine = TrtEngine.load(plan, onnx_file.card, BATCHES, machine)
    x, t, y = example_input(engine.card, batch, 0)
    reference = TorchEngine(exported.unet, len(exported.schedule), 8)
    for _ in range(3):  # warm-up and capture, then replays
        found = engine(x, t, y)
        assert relative_error(found, reference(x, t, y)) < TOLERANCE
        x = x.flip(0) * 0.5
    assert found.shape == (batch, 2, 8, 8)


def test_a_network_without_labels_has_no_y(onnx_file: EngineFile, machine: Any, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["t"], ["tf"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["tf", "axes"], ["column"]),
        helper.make_node("Mul", ["x", "column"], ["product"]),
        helper.make_node("Concat", ["x", "product"], ["out"], axis=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8])
    t = helper.make_tensor_value_info("t", TensorProto.INT64, ["batch"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 2, 8, 8])
    graph = helper.make_graph(nodes, "g", [x, t], [out], [helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3])])
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([x, x * t.view(-1, 1, 1, 1)], 1)

    card = onnx_file.card.model_copy(update={"classes": 0, "file_sha256": hashlib.sha256(data).hexdigest()})
    card = card.model_copy(update={"self_test": tuple(thinned(network(*example_input(card, 3, 0)[:2])).tolist())})
    make_plan(EngineFile(data, card), tmp_path / "p" / "u.plan", BATCHES, _let_pass, TOLERANCE, device=machine)
    engine = TrtEngine.load(tmp_path / "p" / "u.plan", card, BATCHES, machine)
    image, step, _ = example_input(engine.card, 5, 0)
    assert relative_error(engine(image, step), network(image, step)) < TOLERANCE


@pytest.mark.parametrize("batch", [0, 9])
def test_a_batch_outside_of_the_profile_meets_an_assertion(batch: int, plan: Path, onnx_file: EngineFile, machine: Any) -> None:
    engine = TrtEngine.load(plan, onnx_file.card, BATCHES, machine)
    x, t, y = example_input(engine.card, 9, 0)
    assert y is not None
    with pytest.raises((AssertionError, RuntimeError)):
        engine(x[:batch], t[:batch], y[:batch])


def test_each_call_gives_a_tensor_of_its_own(plan: Path, onnx_file: EngineFile, machine: Any) -> None:
    engine = TrtEngine.load(plan, onnx_file.card, BATCHES, machine)
    x, t, y = example_input(engine.card, 2, 0)
    first = engine(x, t, y)
    kept = first.clone()
    engine(x, t, y).zero_()
    engine(x + 1, t, y)
    assert torch.equal(first, kept)


def test_each_batch_size_is_captured_once_and_replayed(plan: Path, onnx_file: EngineFile, machine: Any) -> None:
    engine = TrtEngine.load(plan, onnx_file.card, BATCHES, machine)
    captures, contexts = machine.captures, machine.contexts
    for batch in (4, 1, 4, 1, 2, 4):  # 4, the usual one, is captured when the engine is loaded
        engine(*example_input(engine.card, batch, 0))
    assert (machine.captures - captures, machine.contexts - contexts) == (2, 2)


def test_a_graph_replays_after_other_batches_have_run(plan: Path, onnx_file: EngineFile, machine: Any) -> None:
    engine = TrtEngine.load(plan, onnx_file.card, BATCHES, machine)
    first = engine(*example_input(engine.card, 3, 0))
    engine(*example_input(engine.card, 8, 7))
    assert torch.equal(engine(*example_input(engine.card, 3, 0)), first)


def test_threads_that_call_it_side_by_side_get_their_own_numbers(plan: Path, onnx_file: EngineFile, machine: Any) -> None:
    engine = TrtEngine.load(plan, onnx_file.card, BATCHES, machine)
    jobs = [example_input(engine.card, 1 + n % 4, n) for n in range(24)]
    alone = [engine(*job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: engine(*job), jobs))
    assert all(torch.equal(found, expected) for found, expected in zip(together, alone, strict=True))


def test_no_memory_for_a_batch_is_an_error_with_a_remedy(plan: Path, onnx_file: EngineFile) -> None:
    with pytest.raises(EngineError, match="too little memory") as failure:
        TrtEngine.load(plan, onnx_file.card, BATCHES, fake.Full())
    assert failure.value.exit_code == 4


# ---------------------------------------------------------------------------------------------------------- what is kept


def test_the_card_tells_all_that_the_plan_depends_on(plan: Path, onnx_file: EngineFile, machine: Any) -> None:
    card = PlanCard.model_validate_json(card_path(plan).read_bytes())
    assert card.build == wanted(onnx_file.card, BATCHES, machine)
    assert (card.engine.kind, card.engine.max_batch, card.build.precision) == ("tensorrt", 8, "fp32")
    assert card.workspace_bytes == 256 * MIB
    assert 0 < card.engine.one_step_error <= TOLERANCE
    assert (card.build.tensorrt, card.engine.device) == (machine.version, machine.gpu.name)


def test_the_plan_is_pure_and_lies_in_a_folder_of_ours(plan: Path) -> None:
    assert plan.read_bytes().startswith(fake.MAGIC)
    assert plan.parent.stat().st_mode & 0o777 == 0o700
    assert sorted(path.suffix for path in plan.parent.iterdir()) == [".cache", ".json", ".plan"]


def test_a_plan_that_fits_is_not_built_again(plan: Path, onnx_file: EngineFile, machine: Any) -> None:
    _, card = read_plan(plan, wanted(onnx_file.card, BATCHES, machine))
    assert card == PlanCard.model_validate_json(card_path(plan).read_bytes())


CHANGES: dict[str, Any] = {
    "onnx_sha256": "0" * 64,
    "tensorrt": "11.4.0.107",
    "gpu": "NVIDIA H100",
    "compute_capability": "9.1",
    "driver": "580.65.07",
    "precision": "bf16",
    "batches": [1, 4, 7],
    "flags": ["editable_timing_cache", "strongly_typed"],
}


def test_every_field_of_the_key_has_its_test(machine: Any, onnx_file: EngineFile) -> None:
    assert set(CHANGES) == set(wanted(onnx_file.card, BATCHES, machine).model_dump())


@pytest.mark.parametrize("field", CHANGES)
def test_a_plan_of_which_one_field_differs_is_never_loaded(field: str, plan: Path, onnx_file: EngineFile, machine: Any) -> None:
    card = json.loads(card_path(plan).read_text())
    card["build"][field] = CHANGES[field]
    card_path(plan).write_text(json.dumps(card))
    seen = machine.deserialized
    with pytest.raises(EngineError, match=field) as failure:
        TrtEngine.load(plan, onnx_file.card, BATCHES, machine)
    assert failure.value.exit_code == 4
    assert machine.deserialized == seen


@pytest.mark.parametrize(
    "other",
    [
        fake.Machine(version="11.4.0.107"),
        fake.Machine(gpu=Gpu("NVIDIA H100", "9.0", "580.65.06")),
        fake.Machine(gpu=Gpu("NVIDIA H200", "10.0", "580.65.06")),
        fake.Machine(gpu=Gpu("NVIDIA H200", "9.0", "580.82.07")),
    ],
    ids=["version", "gpu", "capability", "driver"],
)
def test_a_plan_is_never_loaded_on_another_machine(other: Any, plan: Path, onnx_file: EngineFile) -> None:
    with pytest.raises(EngineError, match="built for something else"):
        TrtEngine.load(plan, onnx_file.card, BATCHES, other)
    assert other.deserialized == 0


def test_a_plan_of_another_export_or_profile_is_never_loaded(plan: Path, onnx_file: EngineFile, machine: Any) -> None:
    seen = machine.deserialized
    for network, batches in (
        (onnx_file.card.model_copy(update={"file_sha256": "1" * 64}), BATCHES),
        (onnx_file.card.model_copy(update={"precision": "fp16"}), BATCHES),
        (onnx_file.card, Batches(1, 5, 8)),
        (onnx_file.card, Batches(2, 4, 8)),
    ):
        with pytest.raises(EngineError, match="built for something else"):
            TrtEngine.load(plan, network, batches, machine)
    assert machine.deserialized == seen


def _truncated(plan: Path) -> None:
    plan.write_bytes(plan.read_bytes()[:-1])


def _empty(plan: Path) -> None:
    plan.write_bytes(b"")


def _flipped(plan: Path) -> None:
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)


def _foreign(plan: Path) -> None:
    plan.write_bytes(b"\x7fELF" + os.urandom(4096))


def _without_card(plan: Path) -> None:
    card_path(plan).unlink()


def _without_plan(plan: Path) -> None:
    plan.unlink()


def _no_card_of_ours(plan: Path) -> None:
    card_path(plan).write_text("{}")


def _a_card_of_more(plan: Path) -> None:
    card_path(plan).write_text(json.dumps(json.loads(card_path(plan).read_text()) | {"trust": True}))


def _a_contradicting_card(plan: Path) -> None:
    card = json.loads(card_path(plan).read_text())
    card["engine"]["max_batch"] = 64
    card_path(plan).write_text(json.dumps(card))


def _link(plan: Path) -> None:
    elsewhere = plan.parent.parent / "elsewhere.plan"
    elsewhere.write_bytes(plan.read_bytes())
    plan.unlink()
    plan.symlink_to(elsewhere)


def _link_of_the_folder(plan: Path) -> None:
    elsewhere = plan.parent.with_name("elsewhere")
    plan.parent.rename(elsewhere)
    plan.parent.symlink_to(elsewhere)


def _open_to_all(plan: Path) -> None:
    plan.parent.chmod(0o777)


def _open_to_the_group(plan: Path) -> None:
    plan.parent.chmod(0o770)


@pytest.mark.parametrize(
    "spoil",
    [
        *(_truncated, _empty, _flipped, _foreign, _without_card, _without_plan, _no_card_of_ours, _a_card_of_more),
        *(_a_contradicting_card, _link, _link_of_the_folder, _open_to_all, _open_to_the_group),
    ],
)
def test_tensorrt_never_sees_a_plan_that_is_damaged_or_not_ours(
    spoil: Callable[[Path], None], plan: Path, onnx_file: EngineFile, machine: Any
) -> None:
    spoil(plan)
    seen = machine.deserialized
    with pytest.raises(EngineError) as failure:
        TrtEngine.load(plan, onnx_file.card, BATCHES, machine)
    assert failure.value.exit_code == 4
    assert machine.deserialized == seen


def test_tensorrt_never_sees_a_plan_of_another_owner(
    plan: Path, onnx_file: EngineFile, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = wanted(onnx_file.card, BATCHES, machine)
    monkeypatch.setattr(os, "geteuid", lambda: plan.stat().st_uid + 1)
    with pytest.raises(EngineError, match="plans are code"):
        read_plan(plan, expected)


def test_a_plan_with_other_tensors_than_its_card_says_is_refused(plan: Path, onnx_file: EngineFile, machine: Any) -> None:
    data, card = read_plan(plan, wanted(onnx_file.card, BATCHES, machine))
    for update in ({"image_size_px": 16}, {"out_channels": 1}, {"classes": 0}):
        other = card.model_copy(update={"engine": card.engine.model_copy(update=update)})
        with pytest.raises(EngineError, match="other inputs or outputs"):
            TrtEngine(data, other, "target.plan", machine)
    build = card.build.model_copy(update={"batches": Batches(1, 4, 7)})
    with pytest.raises(EngineError, match="other batches"):
        TrtEngine(data, card.model_copy(update={"build": build}), "target.plan", machine)


def test_a_plan_that_tensorrt_itself_refuses_is_an_error_with_its_words(plan: Path, onnx_file: EngineFile, machine: Any) -> None:
    data, card = read_plan(plan, wanted(onnx_file.card, BATCHES, machine))
    with pytest.raises(EngineError, match="not compatible"):
        TrtEngine(data, card, "target.plan", fake.Machine(version="12.0"))


# -------------------------------------------------------------------------------------------------------------- builder


def test_a_builder_without_memory_gets_half_the_workspace_and_the_same_batches(onnx_file: EngineFile, tmp_path: Path) -> None:
    machine = fake.Machine(free_bytes=200 * MIB)
    card = make_plan(onnx_file, tmp_path / "p" / "a.plan", BATCHES, _let_pass, TOLERANCE, 1024 * MIB, machine)
    assert machine.workspaces == [1024 * MIB, 512 * MIB, 256 * MIB, 128 * MIB]
    assert card.workspace_bytes == 128 * MIB
    assert card.build.batches == BATCHES


@pytest.mark.parametrize(
    "words", ["Error Code 2: OutOfMemory (no further information)", "Cuda Runtime (out of memory)", "could not be allocated"]
)
def test_the_ladder_ends_in_an_error_and_leaves_nothing(words: str, onnx_file: EngineFile, tmp_path: Path) -> None:
    machine = fake.Machine(free_bytes=0)
    machine.words_of_failure = words
    with pytest.raises(EngineError, match=r"too little memory to build target\.plan for batches up to 8") as failure:
        make_plan(onnx_file, tmp_path / "p" / "target.plan", BATCHES, _let_pass, TOLERANCE, 256 * MIB, machine)
    assert failure.value.exit_code == 4
    assert "--batch" in failure.value.remedy
    assert machine.workspaces == [256 * MIB, 128 * MIB, 64 * MIB]
    assert list((tmp_path / "p").iterdir()) == []


def test_a_builder_that_fails_for_another_reason_is_not_asked_again(onnx_file: EngineFile) -> None:
    machine = fake.Machine(free_bytes=0)
    machine.words_of_failure = "Error Code 4: Internal Error"
    with pytest.raises(EngineError, match="Could not find any implementation"):
        build_plan(machine.trt, onnx_file, "target.plan", BATCHES, 256 * MIB)
    assert machine.workspaces == [256 * MIB]


def test_the_timing_cache_of_one_build_serves_the_next(onnx_file: EngineFile, machine: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_plan(onnx_file, tmp_path / "p" / f"{name}.plan", BATCHES, _let_pass, TOLERANCE, device=machine)
    assert machine.timing_caches == [b"", fake._timings(machine)]


def test_a_timing_cache_that_is_damaged_or_of_another_machine_is_left_alone(onnx_file: EngineFile, machine: Any, tmp_path: Path) -> None:
    path = tmp_path / "p" / "a.plan"
    make_plan(onnx_file, path, BATCHES, _let_pass, TOLERANCE, device=machine)
    (cache,) = path.parent.glob("*.cache")
    cache.write_bytes(cache.read_bytes()[:-1])
    make_plan(onnx_file, path, BATCHES, _let_pass, TOLERANCE, device=machine)
    assert machine.timing_caches == [b"", b""]
    other = fake.Machine(version="11.5.0.1")
    make_plan(onnx_file, path, BATCHES, _let_pass, TOLERANCE, device=other)
    assert other.timing_caches == [b""]
    built = build_plan(machine.trt, onnx_file, "a.plan", BATCHES, 256 * MIB, b"timings of another TensorRT")
    assert built.timing_cache == fake._timings(machine)


def test_a_network_that_tensorrt_cannot_read_is_an_error_with_its_words(onnx_file: EngineFile, machine: Any) -> None:
    model = onnx.load_model_from_string(onnx_file.data)
    model.graph.node.add(op_type="Loop")
    with pytest.raises(EngineError, match="operator: Loop"):
        build_plan(machine.trt, EngineFile(model.SerializeToString(), onnx_file.card), "target.plan", BATCHES, 256 * MIB)


def test_a_file_that_is_no_network_of_ours_does_not_reach_the_parser(onnx_file: EngineFile, machine: Any) -> None:
    with pytest.raises(DataError):
        build_plan(machine.trt, EngineFile(b"\xff" * 64, onnx_file.card), "target.plan", BATCHES, 256 * MIB)
    assert machine.workspaces == []


# ------------------------------------------------------------------------------------------------------ parity, fail-closed


def _noise(value: np.ndarray) -> np.ndarray:
    return value + np.float32(1e-2) * np.random.default_rng(0).standard_normal(value.shape, dtype=np.float32)


def _swapped_channels(value: np.ndarray) -> np.ndarray:
    return value[:, ::-1].copy()


def _a_nan(value: np.ndarray) -> np.ndarray:
    value = value.copy()
    value[-1, 0, 0, 0] = np.nan
    return value


def _one_later(value: np.ndarray) -> np.ndarray:
    return np.minimum(value + 1, 49)


def _wrong_in_large_batches(value: np.ndarray) -> np.ndarray:
    return value * np.float32(1.01) if len(value) == 8 else value


SABOTAGE = {
    "noise": ("out", _noise),
    "channels": ("out", _swapped_channels),
    "nan": ("out", _a_nan),
    "t": ("t", _one_later),
    "batch": ("out", _wrong_in_large_batches),
}


@pytest.mark.parametrize("fault", SABOTAGE)
def test_wrong_numbers_are_never_published(fault: str, onnx_file: EngineFile, gate: Any, machine: Any, tmp_path: Path) -> None:
    name, spoil = SABOTAGE[fault]
    machine.spoil[name] = spoil
    with pytest.raises(ParityError) as failure:
        make_plan(onnx_file, tmp_path / "p" / "target.plan", BATCHES, gate, TOLERANCE, device=machine)
    assert failure.value.exit_code == 6
    assert list((tmp_path / "p").iterdir()) == []


@pytest.mark.parametrize("fault", ["noise", "channels", "t"])
def test_wrong_numbers_fail_the_self_test_of_every_load(fault: str, plan: Path, onnx_file: EngineFile, machine: Any) -> None:
    name, spoil = SABOTAGE[fault]
    machine.spoil[name] = spoil
    with pytest.raises(ParityError):
        TrtEngine.load(plan, onnx_file.card, BATCHES, machine)


def test_tf32_is_off_and_would_be_noticed(onnx_file: EngineFile, gate: Any, machine: Any, plan: Path, tmp_path: Path) -> None:
    assert json.loads(plan.read_bytes().split(b"\n")[1])["tf32"] is False

    class Config(fake.IBuilderConfig):
        def clear_flag(self, flag: Any) -> None:
            pass

    class Builder(fake.Builder):
        def create_builder_config(self) -> Any:
            return Config(machine)

    machine.trt.Builder = lambda logger: Builder(machine, logger)
    with pytest.raises(ParityError):
        make_plan(onnx_file, tmp_path / "p" / "t.plan", BATCHES, gate, TOLERANCE, device=machine)


def test_killed_between_plan_and_card_nothing_is_loaded(
    plan: Path, onnx_file: EngineFile, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trt_engine.store, "write_text", killed)
    batches = Batches(1, 2, 8)
    with pytest.raises(KeyboardInterrupt):
        make_plan(onnx_file, plan, batches, _let_pass, TOLERANCE, device=machine)
    seen = machine.deserialized
    for wish in (BATCHES, batches):  # the old card is there, with the new plan
        with pytest.raises(EngineError):
            TrtEngine.load(plan, onnx_file.card, wish, machine)
    assert machine.deserialized == seen


# -------------------------------------------------------------------------------------------------------- the fake's rules


def test_the_fake_notices_memory_that_was_freed(machine: Any) -> None:
    block = machine.empty((4,), torch.float32)
    address = block.data_ptr()
    assert machine.at(address, 16) is block
    del block
    with pytest.raises(AssertionError, match="living memory"):
        machine.at(address, 16)


def _freed(engine: TrtEngine) -> None:
    engine._lanes[4].buffers["out"] = torch.zeros(4, 2, 8, 8)


def _freed_scratch(engine: TrtEngine) -> None:
    engine._scratch = torch.zeros(1)


def _context_changed(engine: TrtEngine) -> None:
    assert engine._lanes[4].context.set_input_shape("t", (3,))


@pytest.mark.parametrize("fault", [_freed, _freed_scratch, _context_changed])
def test_the_fake_notices_a_graph_whose_ground_has_gone(
    fault: Callable[[TrtEngine], None], plan: Path, onnx_file: EngineFile, machine: Any
) -> None:
    engine = TrtEngine.load(plan, onnx_file.card, BATCHES, machine)
    x, t, y = example_input(engine.card, 4, 0)
    fault(engine)
    with pytest.raises(AssertionError):
        engine(x, t, y)


def test_the_fake_refuses_shapes_outside_of_the_profile_and_other_streams(plan: Path, onnx_file: EngineFile, machine: Any) -> None:
    engine = TrtEngine.load(plan, onnx_file.card, BATCHES, machine)
    context = engine._lanes[4].context
    assert not context.set_input_shape("x", (9, 1, 8, 8))
    assert not context.set_input_shape("out", (1, 2, 8, 8))
    assert not context.set_tensor_address("z", 0)
    with pytest.raises(AssertionError, match="default"):
        context.execute_async_v3(0)


# ------------------------------------------------------------------------------------------------------- what is missing


def test_without_tensorrt_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, onnx_file: EngineFile, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for ask in (
        CudaDevice,
        lambda: make_plan(onnx_file, tmp_path / "p" / "a.plan", BATCHES, _let_pass, TOLERANCE),
        lambda: TrtEngine.load(tmp_path / "p" / "a.plan", onnx_file.card, BATCHES),
    ):
        with pytest.raises(EngineError, match="TensorRT cannot be imported") as failure:
            ask()
        assert 'pip install "diffrc[tensorrt]"' in failure.value.remedy
        assert failure.value.exit_code == 4
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("version", ["8.6.1", "9.3.0.post12.dev1", "10.2.0", "", "unknown"])
def test_an_old_tensorrt_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
    with pytest.raises(EngineError, match=r"10\.3 or newer"):
        trt_engine.require_tensorrt()


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1.11", "11.4.0.106", "12.0"])
def test_a_newer_tensorrt_is_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    assert trt_engine.require_tensorrt() is module


def test_with_tensorrt_and_without_a_gpu_the_error_says_so(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", machine.trt)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="needs an NVIDIA GPU"):
        CudaDevice()


def test_without_a_driver_its_version_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(EngineError, match="libnvidia-ml"):
        trt_engine.driver_version()


def test_the_driver_says_its_version_through_the_management_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(text: Any, size: int) -> int:
        text.value = b"580.65.06"
        return 0 if size > 9 else 7

    calls: list[str] = []
    library = SimpleNamespace(
        nvmlInit_v2=lambda: 0, nvmlSystemGetDriverVersion=version, nvmlShutdown=lambda: calls.append("shut down") or 0
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert trt_engine.driver_version() == "580.65.06"
    assert calls == ["shut down"]
    library.nvmlInit_v2 = lambda: 9  # the driver is not loaded
    with pytest.raises(EngineError, match="does not tell"):
        trt_engine.driver_version()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_cuda_device_orders_copies_and_replays_a_graph(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", machine.trt)
    device = CudaDevice()
    assert device.stream
    assert all(device.gpu)
    source, target = device.empty((4,), torch.float32), device.empty((4,), torch.float32)
    run = device.capture(lambda: device.copy(target, source))
    for value in (1.0, 2.0):
        with device.ordered():
            device.copy(source, torch.full((4,), value))
            run()
        assert torch.equal(target.cpu(), torch.full((4,), value))


# ------------------------------------------------------------------------------------------------------ the real bindings


def _names_of_the_library() -> set[str]:
    """Every name that the engine takes from TensorRT: `trt.<Class>.<member>`, and the methods of its objects."""
    tree = ast.parse(Path(trt_engine.__file__).read_text(encoding="utf-8"))
    objects = {"trt", "builder", "network", "parser", "config", "profile", "cache", "earlier", "empty", "engine", "context", "runtime"}
    objects |= {"self._engine", "self._runtime", "self._trt", "trt_types"}
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and any(
            ast.unparse(node.value) == name or ast.unparse(node.value).startswith(f"{name}.") for name in objects
        ):
            names |= {node.attr}
    return names - {"__version__", "__init__", "shapes", "shape", "precision", "max_batch", "out_channels", "classes", "file_sha256"}


def test_names_of_tensorrt_11_are_those_that_the_engine_and_the_fake_use() -> None:
    spec = importlib.util.find_spec("tensorrt_bindings")  # importing it needs a GPU machine's libraries
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip('no tensorrt_bindings here: pip install --no-deps "tensorrt-cu12-bindings>=11"')
    (folder,) = spec.submodule_search_locations
    library = Path(folder, "tensorrt.so").read_bytes()
    of_the_fake = {name for thing in fake.API for name in (thing.__name__, *_public(thing))}
    words = {
        name for name in _names_of_the_library() | of_the_fake if f"{name}\0".encode() not in library
    }  # a name may be the tail of a longer one
    assert words == set()


def _public(thing: Any) -> set[str]:
    if issubclass(thing, fake.enum.Enum):
        return set(thing.__members__)
    return {name for name, value in vars(thing).items() if not name.startswith("_") and (callable(value) or isinstance(value, property))}


rtx_says = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # it keeps no timing cache, and says so; TensorRT has one


@rtx_says
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_real_parser_and_builder_take_our_networks(precision: Precision, rtx: Any, exported: Any, onnx_of: Any) -> None:
    build = choice.Build("tensorrt", precision)
    card = exported.card.model_copy(update={"precision": precision, "opset": file_opset(exported.settings, build)})
    file = EngineFile(onnx_of(build), card)
    built = build_plan(rtx, file, "target.plan", BATCHES, 256 * MIB)
    assert len(built.plan) > 100_000
    assert built.workspace_bytes == 256 * MIB
    if precision == "fp32":
        again = build_plan(rtx, file, "target.plan", BATCHES, 256 * MIB, built.timing_cache)
        assert len(again.plan) > 100_000
        build_plan(rtx, file, "target.plan", BATCHES, 256 * MIB, b"no timing cache")


@rtx_says
def test_a_real_parser_and_builder_take_the_guides_gradient(rtx: Any, exported_gradient: Any) -> None:
    log = trt_engine._logger(rtx)
    builder = rtx.Builder(log)
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.OnnxParser(network, log)
    assert parser.parse(exported_gradient.data), [parser.get_error(index).desc() for index in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for index in range(network.num_inputs):
        sizes = tuple(network.get_input(index).shape)[1:]
        profile.set_shape(network.get_input(index).name, *((batch, *sizes) for batch in BATCHES))
    assert config.add_optimization_profile(profile) == 0
    assert builder.build_serialized_network(network, config) is not None, log.errors


@rtx_says
def test_a_real_parser_says_what_it_cannot_read(rtx: Any, onnx_file: EngineFile) -> None:
    model = onnx.load_model_from_string(onnx_file.data)
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(EngineError, match="TensorRT cannot read target"):
        build_plan(rtx, EngineFile(model.SerializeToString(), onnx_file.card), "target.onnx", BATCHES, 256 * MIB)


@rtx_says
def test_a_real_builder_refuses_a_profile_that_is_none(rtx: Any, onnx_file: EngineFile) -> None:
    with pytest.raises((EngineError, RuntimeError)):
        build_plan(rtx, onnx_file, "target.onnx", Batches(8, 4, 1), 256 * MIB)


@rtx_says
def test_a_real_runtime_without_a_gpu_gives_its_words(rtx: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    log = trt_engine._logger(rtx)
    assert rtx.Runtime(log).deserialize_cuda_engine(b"no plan") is None
    assert log.errors


@pytest.mark.parametrize("thing", fake.API, ids=lambda thing: thing.__name__)
def test_the_fake_offers_nothing_that_the_real_bindings_lack(thing: Any, rtx: Any) -> None:
    real = getattr(rtx.bindings, thing.__name__)
    own = {"ready", "model", "shapes", "data"}  # what the fake keeps for itself
    assert {name for name in _public(thing) - own if not hasattr(real, name)} == set()
    for name in _public(thing) - own:
        method, text = vars(thing)[name], getattr(real, name).__doc__ or ""
        if inspect.isfunction(method) and name != "log":
            parameters = list(inspect.signature(method).parameters)[1:]
            assert any(all(f"{parameter}:" in line for parameter in parameters) for line in text.splitlines()), (name, parameters, text)


def test_a_failure_is_always_one_of_ours(plan: Path, onnx_file: EngineFile) -> None:
    """Whatever a plan's file and card hold, the answer is an engine or a DiffRCError."""
    machine = fake.Machine()
    rng = np.random.default_rng(0)
    for _ in range(40):
        target = (plan, card_path(plan))[int(rng.integers(2))]
        data = bytearray(target.read_bytes())
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        before = target.read_bytes()
        target.write_bytes(data)
        try:
            read_plan(plan, wanted(onnx_file.card, BATCHES, machine))
        except DiffRCError as error:
            assert error.exit_code == 4
        finally:
            target.write_bytes(before)


def test_the_output_is_where_the_input_is(plan: Path, onnx_file: EngineFile, machine: Any) -> None:
    engine = TrtEngine.load(plan, onnx_file.card, BATCHES, machine)
    x, t, y = example_input(engine.card, 1, 0)
    out: Tensor = engine(x, t, y)
    assert out.device == x.device
    assert out.dtype == torch.float32
