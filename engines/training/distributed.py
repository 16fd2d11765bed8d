"""Training by several processes: what each one is, and what they tell each other.

Every process holds the whole model and takes its rows of each global batch; gradients are averaged while the backward pass
runs (`DistributedDataParallel`). What ends up in files is written by process 0 alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """One of `size` processes. What a method returns is the same in all of them, so that all take the same decisions."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    control: dist.ProcessGroup | None = None  # of the hosts: what they agree on waits for no GPU

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes, logs, samples and reports."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """This process's rows of a global batch."""
        size, rest = divmod(batch_size, self.size)
        assert not rest, f"{batch_size} images for {self.size} processes"
        return slice(self.rank * size, (self.rank + 1) * size)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as its loss calls it: the backward pass averages its gradients over the processes."""
        if self.size == 1:
            return model
        # Buffers need no broadcast: they follow from gathered figures, in every process alike.
        return DistributedDataParallel(
            model, [self.device] if self.device.type == "cuda" else None, broadcast_buffers=False, gradient_as_bucket_view=True
        )

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
        dist.all_reduce(cell, dist.ReduceOp.MAX, group=self.control)
        return int(cell)

    def told(self, values: Sequence[float]) -> list[float]:
        """The numbers of process 0; the others give as many, which do not count."""
        if self.size == 1:
            return list(values)
        cells = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(cells, 0, group=self.control)
        return [float(cell) for cell in cells]

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.size > 1:
            dist.barrier(group=self.control)


ALONE = World()
