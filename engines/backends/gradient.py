"""The guide's gradient as an ONNX graph of its own: (x, t, y) -> grad_x log p~(y | x_t) and log p~(. | x_t), Eq. 12; and its gate.

No runtime can differentiate, so the graph holds the backward pass as operators. It is in the *convolution form*: the gradient of a
convolution is a convolution with flipped weights, of a gradient that zeros were inserted into where the stride was 2. (Transposed
convolutions gave silently wrong gradients in OpenVINO.)
"""

from __future__ import annotations

import copy
import hashlib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from engines.backends.base import REMEDY, Precision, package_versions, relative_error, thinned, weights_sha256
from engines.backends.graphs import GraphCard, Runtime, open_graph, read_graph, repeated, write_graph
from engines.backends.keys import EXPORTERS, RUNTIMES
from engines.backends.onnx_file import serialized, to_onnx
from engines.diffusion.guidance import class_gradient
from engines.diffusion.losses import prototype_log_probs
from engines.diffusion.noise import batch_noise, image_key
from engines.errors import EngineError, NumericsError, ParityError, first_line
from engines.networks.guide import Guide
from engines.recipe import ExportSection

INPUTS = ("x", "t", "y")
OUTPUTS = ("gradient", "log_probs")
TRACED_BATCH = 10_007  # a prime that divides no size of a guide
EXAMPLE_BATCH = 7  # of torch.export
SELF_TEST_BATCH = 3

MIN_COMPLEMENT = 1e-2
"""grad log p_y = grad l_y - sum_k p_k grad l_k, which is of the size of 1 - p_y, while its terms are not: what rounding leaves of a sure
guide's gradient is eps / (1 - p_y), in torch as well. So the error allowed grows as MIN_COMPLEMENT / (1 - p_y) where a guide is surer
than that. (A trained guide of the digits: 2.3e-5 at 1 - p_y = 0.004, where others have 3e-6.)"""


class Limits(NamedTuple):
    """How far a gradient and a guided step may be from torch's."""

    cosine: float  # between gradients
    max_error: float  # of a gradient's values, of log p and of a step's figures
    step_error: float  # relative L2 of an image after one step
    trajectory_psnr_db: float
    prefix: str  # of the recipe's keys


class GradientParity(NamedTuple):
    """The worst image of a comparison with torch."""

    cosine: float  # between the gradients
    max_error: float  # the largest difference of a value, as a share of the gradient's largest value
    log_prob_error: float  # the largest difference of log p, as a share of the largest |log p|


class GradientCard(GraphCard):
    """What an exported gradient is: the JSON beside it."""

    kind: Literal["gradient"] = "gradient"
    weights_sha256: str  # of the guide, prototypes and prior included
    cosine: float = math.nan  # the figures of `GradientParity`, not a number until they are measured
    max_error: float = math.nan
    log_prob_error: float = math.nan


class GradientEngine:
    """An exported gradient, called as `prototype_guidance` calls one. Threads may call it side by side.

    Args:
        data, card: of an exported file; `read_gradient` gives them.
        threads: of one evaluation; 0 = all that this process may use.
        batch: the batch size that will be asked for, which is what the load-time test runs; 0 = that test's own.

    Raises:
        DataError: the file is not a graph of this kind.
        EngineError: the card's runtime is not here or cannot load it.
        ParityError: its numbers are not those of the card.
    """

    def __init__(self, data: bytes, card: GradientCard, origin: str, threads: int = 0, batch: int = 0) -> None:
        self.card = card
        self._graph = open_graph(data, INPUTS, OUTPUTS, card.opset, origin, card.runtime, threads, card.precision)
        _self_test(self, origin, batch)

    @classmethod
    def load(cls, path: Path, runtime: Runtime = "onnx", precision: Precision = "fp32", threads: int = 0, batch: int = 0) -> GradientEngine:
        """The engine of a file with a card beside it. Raises EngineError where they do not belong together, and as above."""
        return cls(*read_gradient(path, runtime, precision), str(path), threads, batch)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) float32, t and y (B,) int64, B <= max_batch -> the gradient (B, C, H, W) and log p (B, K), float32."""
        card, batch = self.card, len(x)
        assert x.shape[1:] == card.shape and x.dtype == torch.float32, f"{tuple(x.shape)} {x.dtype} for {card.shape}"
        assert 1 <= batch <= card.max_batch, f"batch {batch}, at most {card.max_batch}"
        for value, limit in ((t, card.timesteps), (y, card.classes)):
            assert value.shape == (batch,) and value.dtype == torch.int64 and int(value.min()) >= 0 and int(value.max()) < limit
        gradient, log_probs = self._graph({"x": x, "t": t, "y": y})
        return gradient, log_probs


def limits_of(settings: ExportSection, precision: Precision) -> Limits:
    """The recipe's limits for a precision.

    Measured on trained guides of the digits: float32, cosine 1 - 3e-12 and errors of 4e-6 in both runtimes (2e-5 where 1 - p_y is
    0.004); bf16, cosine 0.9995, errors of 0.05 of the gradient and 0.02 of log p.
    """
    prefix = "bf16_" if precision == "bf16" else ""
    cosine, max_error, step_error, psnr_db = (
        getattr(settings, prefix + key) for key in ("gradient_cosine", "gradient_max_error", "one_step_tolerance", "trajectory_psnr_db")
    )
    return Limits(cosine, max_error, step_error, psnr_db, prefix)


def export_gradient(
    guide: Guide,
    timesteps: int,
    path: Path,
    settings: ExportSection,
    runtime: Runtime = "onnx",
    precision: Precision = "fp32",
    recipe_sha256: str = "",
    batch: int = 0,
    data: bytes = b"",
) -> GradientCard:
    """Write `path` and the card for one runtime, if and only if that runtime gives torch's gradients.

    Args:
        guide: in evaluation mode, float32, on the CPU.
        timesteps: T of the training process.
        path: `<name>.onnx`, which all runtimes share.
        recipe_sha256: goes into the card.
        batch: the batch size of synthesis, which is checked beside others; 0 = the largest.
        data: the file where it was made before, for another runtime; empty = made now.

    Raises:
        ParityError: a number disagrees, in this precision or before that in float32; nothing is written.
        NumericsError: the guide itself gives values that are not finite.
        EngineError: the exporter or the runtime failed.
        StorageError: the file cannot be written.
    """
    data, card = gradient_bytes(guide, timesteps, settings, runtime, precision, recipe_sha256, data)
    for name, twin in _first_float32(card, settings, path.name):
        parity = gradient_parity(GradientEngine(data, twin, name, batch=batch), guide, batch)
        refuse_disagreement(parity, name, limits_of(settings, twin.precision))
    card = card.model_copy(update=parity._asdict())
    write_graph(path, data, card)
    return card


def _first_float32(card: GradientCard, settings: ExportSection, name: str) -> list[tuple[str, GradientCard]]:
    """What is held to torch: in a lower precision, whose rounding hides small errors, the same file in float32 before it."""
    names = [(f"{name} on {card.runtime} {card.precision}", card)]
    if card.precision == "fp32":
        return names
    twin = card.model_copy(update={"precision": "fp32", "tolerance": limits_of(settings, "fp32").max_error})
    return [(f"{name} on {card.runtime} fp32", twin), *names]


def gradient_bytes(
    guide: Guide,
    timesteps: int,
    settings: ExportSection,
    runtime: Runtime = "onnx",
    precision: Precision = "fp32",
    recipe_sha256: str = "",
    data: bytes = b"",
) -> tuple[bytes, GradientCard]:
    """The graph, and a card whose parity is not measured yet. Raises NumericsError, EngineError. See `export_gradient`."""
    architecture = guide.encoder.architecture
    assert precision != "fp16"
    card = GradientCard(
        runtime=runtime,
        precision=precision,
        recipe_sha256=recipe_sha256,
        weights_sha256=weights_sha256(guide),
        file_sha256="",
        image_size_px=architecture.image_size_px,
        image_channels=architecture.in_channels,
        classes=len(guide.prototypes),
        timesteps=timesteps,
        max_batch=settings.max_batch,
        opset=settings.opset,
        versions=package_versions((*EXPORTERS, *RUNTIMES[runtime])),
        tolerance=limits_of(settings, precision).max_error,
        self_test=(),
    )
    x, t, y = example(card, SELF_TEST_BATCH, 0)
    values = torch.cat(_thinned_pair(class_gradient(guide.log_probs, x, t, y)))
    if not bool(torch.isfinite(values).all()):
        raise NumericsError("the trained guide gives values that are not finite", "train the guide again with a smaller lr")
    if not data:
        inputs = dict(zip(INPUTS, example(card, EXAMPLE_BATCH, 0), strict=True))
        model = to_onnx(gradient_module(guide, timesteps), inputs, OUTPUTS, settings.opset)
        provenance = {"recipe_sha256": recipe_sha256, "guide_sha256": card.weights_sha256, "timesteps": str(timesteps)}
        data = serialized(model, provenance)
    return data, card.model_copy(update={"file_sha256": hashlib.sha256(data).hexdigest(), "self_test": tuple(values.tolist())})


def read_gradient(path: Path, runtime: Runtime = "onnx", precision: Precision = "fp32") -> tuple[bytes, GradientCard]:
    """A file that is what its card says. Raises EngineError where one is missing or they do not belong together."""
    return read_graph(path, GradientCard, runtime, precision, "a gradient")


def gradient_parity(engine: GradientEngine, guide: Guide, batch: int = 0) -> GradientParity:
    """The worst image over small, middle and large t and batches of 1, 2, `batch` and the largest, half noise and half quiet.

    NaN anywhere gives NaN, which no threshold admits.
    """
    card = engine.card
    cosine, max_error, log_prob_error = [], [], []
    for size in sorted({1, min(2, card.max_batch), batch or card.max_batch, card.max_batch}):
        for first_t in (0, card.timesteps // 2, card.timesteps - 1):
            x, t, y = example(card, size, first_t)
            found, found_log_p = engine(x, t, y)
            expected, log_p = class_gradient(guide.log_probs, x, t, y)
            cosine.append(F.cosine_similarity(found.double().flatten(1), expected.double().flatten(1)))  # (B,)
            largest = expected.abs().flatten(1).amax(1).clamp(min=torch.finfo(torch.float32).tiny)
            complement = -torch.expm1(log_p.gather(1, y[:, None]).squeeze(1).double())  # 1 - p_y
            sure = (MIN_COMPLEMENT / complement.clamp(min=1e-7)).clamp(min=1)
            max_error.append((found - expected).abs().flatten(1).amax(1) / largest / sure)
            log_prob_error.append((found_log_p - log_p).abs().amax(1) / log_p.abs().amax(1).clamp(min=1))
    return GradientParity(float(torch.cat(cosine).min()), float(torch.cat(max_error).max()), float(torch.cat(log_prob_error).max()))


def refuse_disagreement(parity: GradientParity, name: str, limits: Limits) -> None:
    """Raise ParityError, with the numbers, where a gradient lies outside the gate."""
    if not (parity.cosine >= limits.cosine and all(error <= limits.max_error for error in parity[1:])):  # also where one is not a number
        raise ParityError(
            f"{name} disagrees with torch's gradient: cosine {parity.cosine:.6f}, at least {limits.cosine:g} asked for; "
            f"error {parity.max_error:.2g}, of log p {parity.log_prob_error:.2g}, {limits.max_error:.2g} allowed; nothing was written",
            f"report it, or loosen export.{limits.prefix}gradient_cosine or export.{limits.prefix}gradient_max_error; "
            "--set synth.fused=false does without",
        )


def example(card: GradientCard, batch: int, first_t: int) -> tuple[Tensor, Tensor, Tensor]:
    """A fixed input: every other image noise, the rest a tenth of it; timesteps spread from `first_t` on, classes in turn."""
    x = batch_noise([image_key(0, 2, i) for i in range(batch)], 0, card.shape)
    x[1::2] *= 0.1
    t = (first_t + torch.arange(batch) * max(1, card.timesteps // 7)) % card.timesteps
    return x, t, torch.arange(batch) % card.classes


def gradient_module(guide: Guide, timesteps: int) -> nn.Module:
    """(x, t, y) -> (gradient, log p) with the backward pass written out, for torch.export; the time embedding is looked up.

    Raises EngineError where torch cannot trace the guide.
    """
    guide = copy.deepcopy(guide).eval().requires_grad_(False)  # with gradients of their own the weights could not be constants
    architecture = guide.encoder.architecture
    size = architecture.image_size_px
    table = guide.encoder.embed_time(torch.arange(timesteps))  # (T, E)
    inputs = (
        torch.empty(TRACED_BATCH, architecture.in_channels, size, size),
        torch.empty(TRACED_BATCH, table.shape[1]),
        torch.empty(TRACED_BATCH, dtype=torch.int64),
    )
    # Fake tensors have shapes and no values. The weights, real among them, become constants of the graph.
    trace = make_fx(_with_gradient(guide), DECOMPOSITIONS, tracing_mode="fake", _allow_non_fake_inputs=True)
    try:
        return _Lookup(_turned_beforehand(_batch_opened(trace(*inputs))), table)
    except Exception as error:  # the tracer raises whatever an operator does
        raise EngineError(f"torch cannot trace the guide's gradient: {first_line(error)}", "the guide runs in torch") from error


def _batch_opened(traced: GraphModule) -> GraphModule:
    """A graph that was traced at TRACED_BATCH, for any batch: whatever size is a multiple of that prime is so many times the batch.

    (Tracing with symbols for sizes does the same in ten times the time.)
    """
    graph = traced.graph
    x = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(next(node for node in reversed(graph.nodes) if node.op == "placeholder")):
        batch = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
    for node in list(graph.nodes):
        if node is batch or node.op != "call_function":
            continue
        with graph.inserting_before(node):

            def opened(value: Any) -> Any:
                if type(value) is not int or not value or value % TRACED_BATCH:
                    return value
                times = value // TRACED_BATCH
                return batch if times == 1 else graph.call_function(operator.mul, (batch, times))

            node.args, node.kwargs = map_aggregate(node.args, opened), map_aggregate(node.kwargs, opened)
    graph.lint()
    traced.recompile()
    return traced


def _turned_beforehand(traced: GraphModule) -> GraphModule:
    """A graph that transposes no weights: where it did, it holds them transposed.

    The gradient of a product has its weights transposed. OpenVINO 2026.4 packs a constant that two products share once, without
    asking which way round they read it, unless its shape tells: with square weights (attention's) the gradient's cosine was 0.71 in
    float32, and log p right. (Weights of up to 8192 values torch's exporter transposes itself: small guides never showed it.)
    """
    graph = traced.graph
    for number, node in enumerate(list(graph.nodes)):
        weights = _weights(traced, node.args[0]) if node.target == torch.ops.aten.t.default else None
        if weights is not None:
            traced.register_buffer(f"turned_{number}", weights.t().contiguous())
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(f"turned_{number}"))
    graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _weights(traced: GraphModule, node: Any) -> Tensor | None:
    """The value of a node that is a constant, or one without its sizes of 1, as those of 1x1 convolutions are; else None."""
    if node.op == "get_attr":
        value: Tensor = getattr(traced, node.target)
        return value
    if node.target == torch.ops.aten.squeeze.dim and (weights := _weights(traced, node.args[0])) is not None:
        return weights.squeeze(node.args[1])
    return None


class _Lookup(nn.Module):
    """What is exported: the traced graph with its time embedding as a float32 table, whose sines lower precision would spoil."""

    table: Tensor

    def __init__(self, traced: nn.Module, table: Tensor) -> None:
        super().__init__()
        self.traced = traced
        self.register_buffer("table", table)
        self.eval()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        gradient, log_probs = self.traced(x, F.embedding(t, self.table), y)
        return gradient, log_probs


def _with_gradient(guide: Guide) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`class_gradient` after the time embedding, as a function that torch can trace."""
    classes = torch.arange(len(guide.prototypes))

    def run(x: Tensor, emb: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        asked = y[:, None] == classes  # (B, K)

        def chosen(x: Tensor) -> tuple[Tensor, Tensor]:
            features = F.normalize(guide.encoder.encode(x, emb), dim=-1)
            log_probs = prototype_log_probs(features, guide.prototypes, guide.log_prior, guide.tau)
            return torch.where(asked, log_probs, 0.0).sum(), log_probs

        with _PlainOperators():
            gradient, log_probs = torch.func.grad(chosen, has_aux=True)(x)
        return gradient, log_probs

    return run


class _PlainOperators(TorchFunctionMode):
    """Functions whose backward pass torch would trace to operators that ONNX has not, or that fix the batch, from simple ones."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return PLAIN.get(func, func)(*args, **(kwargs or {}))


def _group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    h = x.reshape(x.shape[0], num_groups, -1)
    h = h - h.mean(2, keepdim=True)
    h = h * torch.rsqrt((h * h).mean(2, keepdim=True) + eps)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    return h.reshape(x.shape) * weight.view(shape) + bias.view(shape)


def _silu(x: Tensor, inplace: bool = False) -> Tensor:
    return x * torch.sigmoid(x)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x @ weight.t() if bias is None else x @ weight.t() + bias


def _normalize(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    assert p == 2.0
    return x / (x * x).sum(dim, keepdim=True).sqrt().clamp(min=eps)


PLAIN: dict[Any, Callable[..., Tensor]] = {F.group_norm: _group_norm, F.silu: _silu, F.linear: _linear, F.normalize: _normalize}


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, None, None]:
    """The gradient of a convolution's input, as a convolution with the weights flipped and their channels swapped."""
    kernel = weight.shape[-1]
    assert list(output_mask) == [True, False, False] and not transposed and groups == 1 and set(dilation) == {1}
    assert set(stride) == {1} or (set(stride) == {2} and x.shape[-1] == 2 * grad.shape[-1]), "strides of 1, or of 2 on even sizes"
    if stride[0] == 2:
        grad = _zeros_between(_zeros_between(grad, 3), 2)
    flipped = weight.flip((2, 3)).transpose(0, 1)
    left = [kernel - 1 - p for p in padding]
    found: Tensor = torch.ops.aten.convolution.default(grad, flipped, None, [1, 1], left, [1, 1], False, [0, 0], 1)
    return found, None, None


def _zeros_between(grad: Tensor, dim: int) -> Tensor:
    """A zero after each value along a dimension of (B, C, H, W)."""
    shape = list(grad.shape)
    shape[dim] *= 2
    return torch.stack([grad, torch.zeros_like(grad)], dim + 1).reshape(shape)


def _avg_pool2d_backward(grad: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], *others: Any) -> Tensor:
    """The gradient of the mean of 2 x 2 goes to each of the four, a quarter to each."""
    assert list(kernel_size) == [2, 2] and list(stride) in ([], [2, 2])
    B, C, H, W = grad.shape
    return (0.25 * grad)[:, :, :, None, :, None].expand(B, C, H, 2, W, 2).reshape(B, C, 2 * H, 2 * W)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.convolution_backward.default: _convolution_backward,
    torch.ops.aten.avg_pool2d_backward.default: _avg_pool2d_backward,
}


def _self_test(engine: GradientEngine, origin: str, batch: int = 0) -> None:
    """Compare with what torch gave, in batches of `batch`. Raises ParityError."""
    card = engine.card
    parts = repeated(example(card, SELF_TEST_BATCH, 0), SELF_TEST_BATCH, min(batch or SELF_TEST_BATCH, card.max_batch))
    pairs = [engine(*part) for part in parts]
    gradient, log_probs = (torch.cat(outputs) for outputs in zip(*pairs, strict=True))
    found = _thinned_pair((gradient[:SELF_TEST_BATCH], log_probs[:SELF_TEST_BATCH]))
    values = torch.tensor(card.self_test, dtype=torch.float32)
    sound = len(values) == sum(map(len, found)) and bool(gradient.isfinite().all()) and bool(log_probs.isfinite().all())
    expected = values[: len(found[0])], values[len(found[0]) :]
    error = max(relative_error(f, e) for f, e in zip(found, expected, strict=True)) if sound else math.inf
    if not error <= card.self_test_limit:
        raise ParityError(
            f"{origin} disagrees with torch's gradient: relative error {error:.2g}, {card.self_test_limit:.2g} allowed", REMEDY
        )


def _thinned_pair(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Values of a gradient, as shares of each image's largest, and of log p."""
    gradient, log_probs = pair
    size = gradient.abs().amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return thinned(gradient / size), thinned(log_probs)
