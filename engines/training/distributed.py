"""Training by several processes: what each one is, and what they tell each other.

`torchrun --nproc-per-node 2 -m -- diffrc_cli train ...` starts them (without the `--`, torchrun takes `--run` and `--log` for
abbreviations of its own options). Every process holds the whole model and takes its rows of each
global batch; gradients are averaged while the backward pass runs (`DistributedDataParallel`). Files are written by process 0 alone.
Two processes end bit for bit as one with two micro-batches; in which order the gradients of more are added is the library's affair.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engines.errors import DiffRCError, EngineError, UsageError
from engines.recipe import Recipe, TargetSection

PATIENCE = timedelta(hours=1)  # with process 0 while it alone samples, judges and saves
CPU = torch.device("cpu")
_LOST = re.compile(r"closed by peer|reset by peer|broken pipe|connection refused|timed out|remote process|socket", re.IGNORECASE)


@dataclass(frozen=True)
class World:
    """One of `size` processes. What a method returns is the same in all of them, so that all take the same decisions.

    Tensors meet where they are: those of a GPU by NCCL, those of a CPU, which wait for no GPU, by gloo.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes, logs, samples and reports."""
        return self.rank == 0

    def on(self, device: torch.device) -> World:
        """This process on a device; of "cuda" on the GPU that is its own.

        Raises UsageError for one GPU that all should share, EngineError where there are fewer GPUs than processes.
        """
        if self.size == 1 or device.type != "cuda":
            return replace(self, device=device)
        if device != torch.device(device.type):
            raise UsageError(f"{self.size} processes cannot share {device}", "--device cuda gives each process its own GPU")
        own, there = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
        if own >= there:
            raise EngineError(
                f"process {own + 1} of this machine finds {there} GPUs", f"torchrun --nproc-per-node {there}, or --device cpu"
            )
        torch.cuda.set_device(own)
        return replace(self, device=torch.device("cuda", own))

    def require_fits(self, recipe: Recipe) -> None:
        """Raise UsageError where a batch cannot be cut into equal parts, of whole groups in the target stage."""
        for name in ("source", "target", "guide"):
            section = getattr(recipe, name)
            parts = self.size * section.accumulate
            unit = section.group_size if isinstance(section, TargetSection) else 1
            if section.batch_size % (parts * unit):
                of_groups = f" of whole groups of {unit}" if unit > 1 else ""
                size = -(-section.batch_size // (parts * unit)) * parts * unit
                fewer = [n for n in range(section.accumulate - 1, 0, -1) if section.batch_size % (self.size * n * unit) == 0]
                same_batch = f"--set {name}.accumulate={fewer[0]}, or " if fewer else ""
                raise UsageError(
                    f"{name}.batch_size {section.batch_size} has no {parts} equal parts{of_groups}: "
                    f"{self.size} processes, {name}.accumulate {section.accumulate}",
                    f"{same_batch}--set {name}.batch_size={size}, or another --nproc-per-node",
                )

    def rows(self, batch_size: int) -> slice:
        """This process's rows of a global batch."""
        size, rest = divmod(batch_size, self.size)
        assert not rest, f"{batch_size} images for {self.size} processes"
        return slice(self.rank * size, (self.rank + 1) * size)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as its loss calls it: the backward pass averages its gradients over the processes."""
        if self.size == 1:
            return model
        own = [self.device] if self.device.type == "cuda" else None
        # Once alike, buffers stay alike: they follow from gathered figures. The option that says so was renamed in torch 2.13.
        names = inspect.signature(DistributedDataParallel).parameters
        options: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
        return DistributedDataParallel(model, own, gradient_as_bucket_view=True, **options)

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the tensors of process 0, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def unsynchronized(self, forward: nn.Module) -> AbstractContextManager[None]:
        """Block whose backward pass keeps its gradients to itself, for all micro-batches of a step but the last."""
        return forward.no_sync() if isinstance(forward, DistributedDataParallel) else contextlib.nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes, elementwise."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def gathered(self, rows: Tensor) -> Tensor:
        """(B / size, ...) of each process -> (B, ...), in the order of the global batch."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def largest(self, value: int) -> int:
        """The largest of an integer of every process."""
        if self.size == 1:
            return value
        cell = torch.tensor(value)
        dist.all_reduce(cell, dist.ReduceOp.MAX)
        return int(cell)

    def told(self, values: Sequence[float]) -> list[float]:
        """The numbers of process 0; the others give as many, which do not count."""
        if self.size == 1:
            return list(values)
        cells = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(cells, 0)
        return [float(cell) for cell in cells]

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.largest(0)


ALONE = World()


def started_processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """The processes that torchrun started, this one among them; without torchrun this one alone.

    Where one fails, all end, and the first to fail alone says why: the others leave with SystemExit.
    """
    if started_processes() == 1:
        yield ALONE
        return
    from torch.distributed.rendezvous import rendezvous  # reads MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE

    meeting, rank, size = next(iter(rendezvous("env://")))
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=meeting, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield World(rank, size)
    except BaseException as failure:
        if meeting.add("failures", 1) > 1:
            raise SystemExit(failure.exit_code if isinstance(failure, DiffRCError) else 1) from None
        if isinstance(failure, RuntimeError) and _LOST.search(str(failure)):
            raise EngineError(
                "another process of this training is gone", "the same command continues from the last checkpoint"
            ) from failure
        raise
    gc.collect()  # a wrapped model lies in a reference cycle; alive when the interpreter ends, its threads abort the process now and then
    dist.destroy_process_group()
