"""Two processes train what one process trains with two micro-batches; they stop, fail and speak as one."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrc_cli.recipe import embedded
from engines import store
from engines.errors import EngineError, UsageError
from engines.recipe import Recipe, load, to_toml
from engines.training.distributed import ALONE, World, joined, started_processes

ROOT = Path(__file__).parent.parent.parent
STAGES = ("source", "target", "guide")
TOLERANCE = 1e-6  # of the largest value of a tensor; measured: 0, for gloo adds two halves in the order in which one process does

# One process imports torch and forks those of each case, so that ten of them cost one import. A case is its name, its folder, the
# number of processes, and overrides of the recipe.
SCRIPT = """
import os, shutil, signal, socket, sys
from dataclasses import replace
from pathlib import Path
import torch
from engines.data.longtail import prepare
from engines.errors import DataError, DiffRCError
from engines.recipe import load
from engines.training.diffusion import build_unet
from engines.training.distributed import joined
from engines.training.guide import build_guide, guide_stage, warm_start
from engines.training.loop import train
from engines.training.source import source_stage
from engines.training.target import target_stage

root, text, CPU = Path(sys.argv[1]), Path(sys.argv[2]).read_text(), torch.device("cpu")
data = prepare(load(text).data, None)
TWO_PARTS = [f"{stage}.accumulate=2" for stage in ("source", "target", "guide")]

def spoiled(stage, rank, case):
    calls = []

    def draw(step, *rest):
        if rank == 1 and case == "fails" and step == 2:
            raise DataError("a broken image", "mend it")
        if rank == 1 and case == "dies" and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and case == "stops" and step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return stage.draw(step, *rest)

    def loss(forward, batch):
        value, figures = stage.loss(forward, batch)
        calls.append(1)
        bad = (case, rank, len(calls)) in (("nan2", 1, 2), ("nan1", 0, 4))  # the second step, in one of its two parts
        return value * (float("nan") if bad else 1.0), figures

    return replace(stage, draw=draw, loss=loss)

def train_all(folder, case, recipe, world):
    report = lambda what, done, total, figures: print(what, done, flush=True)
    torch.manual_seed(world.rank)  # the first process's weights are those of all
    source, target, guide = build_unet(recipe, 10), build_unet(recipe, 10), build_guide(recipe, data.counts)
    train(spoiled(source_stage(recipe, data, source, CPU), world.rank, case), folder / "source", recipe.seed, CPU, report, world)
    if case not in ("one", "two"):
        return
    target.load_state_dict(source.state_dict())
    train(target_stage(recipe, data, source, target, CPU), folder / "target", recipe.seed, CPU, report, world)
    warm_start(guide, recipe, data, CPU)
    train(guide_stage(recipe, data, guide, CPU), folder / "guide", recipe.seed, CPU, report, world)

def process(folder, case, recipe):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(root / f"{case}-{name}-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT), number)
    try:
        with joined() as world:
            train_all(folder, case, recipe, world)
        return 0
    except DiffRCError as failure:
        print("error:", failure.problem, file=sys.stderr)
        return failure.exit_code
    except SystemExit as end:
        return end.code

os.environ["MASTER_ADDR"] = "127.0.0.1"
for case, folder, size, overrides in (
    ("one", "one", 1, TWO_PARTS),
    ("two", "two", 2, []),
    ("nan1", "nan1", 1, TWO_PARTS),
    ("nan2", "nan2", 2, []),
    ("stops", "stops", 2, []),
    ("goes-on", "stops", 2, []),
    ("goes-on-alone", "alone", 1, TWO_PARTS),
    ("fails", "fails", 2, []),
    ("dies", "dies", 2, []),
):
    recipe, folder = load(text, overrides), root / folder
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(size))
    pids = []
    for rank in range(size):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        pid = os.fork()
        if pid == 0:
            code = process(folder, case, recipe)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    (root / f"{case}-codes").write_text(" ".join(map(str, codes)))
    if case == "stops":
        shutil.copytree(folder, root / "alone")
"""


@dataclass(frozen=True)
class Case:
    """What a case's processes left behind."""

    root: Path
    name: str
    folder: str = ""

    @property
    def codes(self) -> list[int]:
        return [int(code) for code in (self.root / f"{self.name}-codes").read_text().split()]

    def said(self, name: str, rank: int) -> str:
        return (self.root / f"{self.name}-{name}-{rank}").read_text()

    def checkpoint(self, stage: str) -> store.Checkpoint:
        found = store.load_checkpoint(self.root / (self.folder or self.name) / stage)
        assert found is not None
        return found

    def tensors(self, stage: str) -> dict[str, Tensor]:
        return {f"{group}.{name}": value for group, tensors in self.checkpoint(stage).groups.items() for name, value in tensors.items()}

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        lines = store.read_json_lines(self.root / (self.folder or self.name) / stage / "metrics.jsonl")
        return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


@pytest.fixture(scope="module")
def cases(tiny_settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all cases, run once, on a recipe in which everything that could tell processes apart takes part."""
    root = tmp_path_factory.mktemp("processes")
    settings = [
        *tiny_settings,
        *(f"{stage}.{key}" for stage in STAGES for key in ("precision=fp32", "workers=1", "shift_px=1", "lr=0.001")),
        "unet.dropout=0.3",
        "guide.dropout=0.3",
        "diffusion.timestep_sampler=loss-second-moment",
        "target.holdout_fraction=0.3",
        "target.holdout_every_steps=1",
        "target.patience=3",
        "target.pair_reduction=sum",
    ]
    store.write_text(root / "recipe.toml", to_toml(load(embedded()["digits-lt"].read_text(encoding="utf-8"), settings)))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root), str(root / "recipe.toml")], capture_output=True, text=True, timeout=200, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return root


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        reach = float(theirs[name].double().abs().max())
        assert float((value.double() - theirs[name].double()).abs().max()) <= TOLERANCE * reach, name


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_end_as_one_with_two_micro_batches(stage: str, cases: Path) -> None:
    one, two = Case(cases, "one"), Case(cases, "two")
    assert (one.codes, two.codes) == ([0], [0, 0])
    assert_alike(two.tensors(stage), one.tensors(stage))
    assert len(one.metrics(stage)) == 4
    for ours, theirs in zip(two.metrics(stage), one.metrics(stage), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_the_first_process_alone_reports(cases: Path) -> None:
    case = Case(cases, "two")
    assert case.said("out", 0).splitlines() == [f"{stage} {step}" for stage in STAGES for step in range(1, 5)]
    assert case.said("out", 1) == ""


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_skips_the_step_of_all(cases: Path) -> None:
    one, two = Case(cases, "nan1"), Case(cases, "nan2")
    assert (one.codes, two.codes) == ([0], [0, 0])
    assert [line["skipped_steps"] for line in two.metrics("source")] == [0, 1, 1, 1]
    assert_alike(two.tensors("source"), one.tensors("source"))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step_that_is_saved(cases: Path) -> None:
    case = Case(cases, "stops")
    assert case.codes[0] == 130
    told = "".join(case.said("err", rank) for rank in (0, 1))
    (step,) = re.findall(r"stopped by SIGTERM: source is saved at step (\d) of 4", told)
    assert 1 <= int(step) < 4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "folder", "codes"), [("goes-on", "stops", [0, 0]), ("goes-on-alone", "alone", [0])])
def test_a_stopped_run_goes_on_to_the_same_end_by_two_processes_or_by_one(name: str, folder: str, codes: list[int], cases: Path) -> None:
    case, whole = Case(cases, name, folder), Case(cases, "two")
    assert case.codes == codes
    assert_alike(case.tensors("source"), whole.tensors("source"))
    assert [line["step"] for line in case.metrics("source")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_and_is_told_once(cases: Path) -> None:
    case = Case(cases, "fails")
    assert case.codes == [1, 3]
    assert (case.said("err", 0), case.said("err", 1)) == ("", "error: a broken image\n")


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_with_one_line(cases: Path) -> None:
    case = Case(cases, "dies")
    assert case.codes == [EngineError.exit_code, -9]
    assert case.said("err", 0) == "error: another process of this training is gone\n"


def recipe(*overrides: str) -> Recipe:
    return load(embedded()["digits-lt"].read_text(encoding="utf-8"), ("target.batch_size=24", "target.group_size=4", *overrides))


def test_a_batch_that_cannot_be_cut_is_refused_with_a_size_that_can() -> None:
    for world in (ALONE, World(1, 2), World(2, 3)):
        assert [world.rows(24).start, world.rows(24).stop] == [24 // world.size * world.rank, 24 // world.size * (world.rank + 1)]
    World(0, 3).require_fits(recipe("source.batch_size=24", "guide.batch_size=24"))
    with pytest.raises(UsageError, match=r"source.batch_size 25 has no 4 equal parts: 2 processes, source.accumulate 2") as refusal:
        World(0, 2).require_fits(recipe("source.batch_size=26", "source.accumulate=2").model_copy(update={"source": odd()}))
    assert "source.batch_size=28" in refusal.value.remedy
    with pytest.raises(UsageError, match=r"target.batch_size 24 has no 4 equal parts of whole groups of 4") as refusal:
        World(0, 4).require_fits(recipe("source.batch_size=24"))
    assert refusal.value.remedy.startswith("--set target.batch_size=32")
    with pytest.raises(UsageError, match=r"source.batch_size 24 has no 16 equal parts") as refusal:
        World(0, 2).require_fits(recipe("source.batch_size=24", "source.accumulate=8"))
    assert refusal.value.remedy.startswith("--set source.accumulate=6, or --set source.batch_size=32"), "first what changes no batch"


def odd() -> Any:
    return recipe().source.model_copy(update={"batch_size": 25, "accumulate": 2})


def test_without_torchrun_a_process_is_alone_and_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # of another launcher: torchrun gives a rank too
    monkeypatch.delenv("RANK", raising=False)
    assert started_processes() == 1
    with joined() as world:
        assert world is ALONE
    assert not torch.distributed.is_initialized()


def test_processes_do_not_share_a_gpu() -> None:
    assert World(1, 2).on(torch.device("cpu")).device == torch.device("cpu")
    with pytest.raises(UsageError, match="2 processes cannot share cuda:0"):
        World(1, 2).on(torch.device("cuda:0"))
    if torch.cuda.device_count() < 9:
        with pytest.raises(EngineError, match=rf"process 9 of this machine finds {torch.cuda.device_count()} GPUs"):
            World(8, 9).on(torch.device("cuda"))
