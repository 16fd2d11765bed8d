"""The one training loop of the recognizers: stages of gradient descent on one network, continued bit by bit after an interruption."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engines import store
from engines.errors import DataError, NumericsError
from engines.progress import Report
from engines.recipe import RecognizerSection

Batches = contextlib.AbstractContextManager[Iterator[tuple[Tensor, Tensor]]]  # which images, (B,), and these augmented, (B, C, H, W)

_CHECK_EVERY_STEPS = 50
_NETWORK, _MOMENTUM, _PLACE = "network.", "momentum.", "place"  # names in a checkpoint


@dataclass(frozen=True)
class Stage:
    """Some steps of gradient descent on some parameters of a network."""

    steps: int
    begin: Callable[[], dict[str, float]]
    """makes the network ready; the parameters to be trained, by name, each with the factor of its learning rate"""
    learning_rate: Callable[[int], float]  # of a step, from 0
    batches: Callable[[int], Batches]  # from a step on, to the last; pure functions of the step
    loss: Callable[[int, Tensor, Tensor], Tensor]  # of a step and its batch: a scalar with its graph


def descend(network: nn.Module, stages: Sequence[Stage], section: RecognizerSection, checkpoint: Path | None, report: Report) -> None:
    """Stage after stage of SGD with momentum; where `checkpoint` exists, from there on as if nothing had happened.

    Args:
        checkpoint: written every `section.save_every_steps` and at the end of a stage, where that is not 0. It must be of the same
            stages on the same images: the caller keys it.
        report: hears "recognizer" after every step (and after the file of that step is written), with the loss every 50.

    Raises: NumericsError where the loss is no longer finite, DataError for a checkpoint that does not fit, StorageError.
    """
    kept = store.read_tensors(checkpoint) if checkpoint is not None and checkpoint.exists() else {}
    kept_stage, kept_step = kept.pop(_PLACE).tolist() if _PLACE in kept else (0, 0)
    every, before, total = section.save_every_steps, 0, sum(stage.steps for stage in stages)
    for number, stage in enumerate(stages):
        trained = stage.begin()
        if number >= kept_stage:
            optimizer = _optimizer(network, trained, section)
            if number == kept_stage and checkpoint is not None and kept:
                _restore(network, optimizer, trained, kept, checkpoint)
            first = kept_step if number == kept_stage else 0
            with stage.batches(first) as batches:
                for step, (index, pixels) in enumerate(batches, first):
                    value = _step(stage, step, index, pixels, optimizer)
                    last = step == stage.steps - 1
                    figures = {"loss": _checked(value, step)} if last or step % _CHECK_EVERY_STEPS == 0 else {}
                    if checkpoint is not None and every and (last or (step + 1) % every == 0):
                        store.write_tensors(checkpoint, _state(network, optimizer, trained, number, step + 1))
                    report("recognizer", before + step + 1, total, figures)
        before += stage.steps


def _step(stage: Stage, step: int, index: Tensor, pixels: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    for group in optimizer.param_groups:
        group["lr"] = stage.learning_rate(step) * group["factor"]
    optimizer.zero_grad(set_to_none=True)
    value = stage.loss(step, index, pixels)
    value.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return value.detach()


def _checked(value: Tensor, step: int) -> float:
    loss = float(value)
    if not np.isfinite(loss):
        raise NumericsError(f"the recognizer's loss is {loss} at step {step}", "use a smaller recognizer.lr")
    return loss


def _optimizer(network: nn.Module, trained: dict[str, float], section: RecognizerSection) -> torch.optim.SGD:
    parameters = dict(network.named_parameters())
    groups = [
        {"params": [parameters[name] for name in trained if trained[name] == factor], "factor": factor}
        for factor in dict.fromkeys(trained.values())
    ]
    return torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum, weight_decay=section.weight_decay)


# A checkpoint is one safetensors file: every weight and buffer of the network, the momentum of what is trained, and the place,
# (stage, steps done in it), int64. Learning rate, batch and augmentation follow from the place.


def _state(network: nn.Module, optimizer: torch.optim.SGD, trained: dict[str, float], stage: int, step: int) -> dict[str, Tensor]:
    parameters = dict(network.named_parameters())
    momentum = {name: optimizer.state[parameters[name]].get("momentum_buffer") for name in trained}
    return {
        **{_NETWORK + name: tensor for name, tensor in network.state_dict().items()},
        **{_MOMENTUM + name: buffer for name, buffer in momentum.items() if buffer is not None},
        _PLACE: torch.tensor([stage, step]),
    }


def _restore(network: nn.Module, optimizer: torch.optim.SGD, trained: dict[str, float], kept: dict[str, Tensor], path: Path) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in kept.items() if name.startswith(prefix)}

    parameters = dict(network.named_parameters())
    here = {name: tensor.shape for name, tensor in network.state_dict().items()}
    there, momentum = part(_NETWORK), part(_MOMENTUM)
    if {name: t.shape for name, t in there.items()} != here or any(t.shape != here.get(name) for name, t in momentum.items()):
        raise DataError(f"{path} does not fit the recognizer of this recipe", f"remove {path} to train it from the start")
    network.load_state_dict(there)
    for name in trained:
        if name in momentum:  # in the layout of the weight, so that the arithmetic is the same
            optimizer.state[parameters[name]]["momentum_buffer"] = torch.empty_like(parameters[name]).copy_(momentum[name]).detach()
