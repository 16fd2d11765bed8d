"""Recipes: frozen, typed settings of the whole job, read from TOML; every number of a run lives here.

A field's default is the paper's value, or the field's usual one where the paper is silent. Unknown keys are refused with
the nearest right name, and all mistakes of a file are told at once.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from engines.diffusion.respacing import spaced_timesteps
from engines.errors import UsageError

MISTAKES_TOLD, MISTAKE_CHARACTERS = 40, 400  # of a file that is no recipe there is no end of them
MAX_RECIPE_BYTES = 1 << 20

Count = Annotated[int, Field(ge=1, lt=10**9)]
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


def _steps(value: object) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 10**9:
        return value
    if isinstance(value, str) and re.fullmatch(r"(ddim[1-9]\d{0,8}|[1-9]\d{0,8}(,[1-9]\d{0,8}){1,99})", value):
        return value
    raise ValueError('should be a number of steps from 1, such as 250, or "ddim50", or "10,15,25"')


Steps = Annotated[int | str, PlainValidator(_steps)]


def _multiple(value: object) -> int | float:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 10**9:
        return value
    if isinstance(value, float) and 0 < value < 10**9 and value % 1 == 0.5:
        return value
    raise ValueError("should be a whole number from 1, or a half such as 0.5 or 1.5")


Multiple = Annotated[int | float, PlainValidator(_multiple)]


def _group_size(value: int) -> int:
    if value < 3:
        raise ValueError("should be 3 or more (of two images a row of Eq. 7 has one entry, and the loss is 0 whatever they are)")
    return value


class Section(BaseModel):
    """A table of a recipe: immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DataSection(Section):
    """Which images, and the long tail that is cut out of them (METHOD section 0, LONGTAIL D1-D2)."""

    source: Literal["digits", "cifar10", "cifar100", "parquet", "folder", "list"] = "digits"
    path: Annotated[str, Field(pattern=r"^[^\x00]*$")] = ""  # the data set's folder or archive; `--data` wins
    image_size_px: Count = 32  # images are center-cropped and resized to this square
    image_channels: Literal[1, 3] = 3
    test_per_class: CountOrZero = 50  # images a class held out where the source has no test split of its own
    profile: Literal["exponential", "pareto", "as-is"] = "exponential"
    imbalance: Annotated[float, Field(ge=1, le=10**6, allow_inf_nan=False)] = 100.0  # N_1 / N_K
    pareto_power: Positive = 6.0
    head_count: CountOrZero = 0  # N_1; 0 = as many as every class can give
    profile_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    groups: Literal["counts", "ranks"] = "counts"  # "counts": the 100/20 rule; "ranks": `group_sizes`
    many_above: CountOrZero = 100
    few_below: CountOrZero = 20
    group_sizes: tuple[CountOrZero, CountOrZero, CountOrZero] = (3, 4, 3)  # many, medium, few by rank of N_k
    on_bad_image: Literal["error", "skip"] = "error"  # an image that cannot be read stops the work, or is left out and counted
    quarantine: Annotated[str, Field(pattern=r"^[^\x00]*$")] = ""  # a list of images to leave out, by `diffrc data check --quarantine`


class UNetSection(Section):
    """The ADM U-Net (Dhariwal & Nichol 2021); names are those of the published configurations."""

    model_channels: Count = 128
    channel_mult: Annotated[tuple[Multiple, ...], Field(min_length=1)] = (1, 2, 2, 2)
    num_res_blocks: Count = 2
    attention_resolutions: tuple[Count, ...] = (16,)  # px at which self-attention stands
    num_head_channels: Count = 64
    num_heads: CountOrZero = 0  # as many heads at every width, as some published models have; 0 = num_head_channels decides
    dropout: Fraction = 0.1
    resblock_updown: bool = True  # BigGAN-style up/down residual blocks
    conv_resample: bool = True  # without resblock_updown: convolve at each change of size
    use_scale_shift_norm: bool = True
    use_new_attention_order: bool = False
    learn_sigma: bool = True
    class_cond: bool = False  # the paper's own model is unconditional


class DiffusionSection(Section):
    """The forward process, Eqs. 1-3."""

    steps: Count = 1000  # T
    noise_schedule: Literal["linear", "cosine"] = "linear"
    vlb_weight: NonNegative = 0.001  # weight of L_vlb beside L_base when learn_sigma
    timestep_sampler: Literal["uniform", "stratified", "loss-second-moment"] = "uniform"  # how source and target draw t


class StageSection(Section):
    """What the three training stages share."""

    train_steps: Count = 100_000
    batch_size: Count = 64  # images of a step, over all processes and micro-batches
    accumulate: Count = 1  # micro-batches that a step is split into, each with a backward pass of its own
    workers: CountOrZero = 1  # threads that draw the coming batches; they change nothing but the speed
    lr: Positive = 2e-4
    weight_decay: NonNegative = 0.0
    warmup_steps: CountOrZero = 5_000
    lr_decay: Literal["none", "cosine"] = "none"
    ema_decay: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.9999
    grad_clip: Positive = 1.0
    horizontal_flip: bool = True
    shift_px: CountOrZero = 0  # random translation of up to this many pixels, border repeated
    precision: Literal["fp32", "bf16"] = "bf16"  # autocast; weights, EMA and losses stay fp32
    log_every_steps: Count = 50
    save_every_steps: Count = 2_500
    max_nonfinite_steps: Count = 10  # skipped steps in a row before training stops

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        return self


class DiffusionStageSection(StageSection):
    """What the two stages that train a diffusion model share."""

    sample_every_steps: CountOrZero = 5_000  # grid of samples as PNG; 0 = never


class SourceSection(DiffusionStageSection):
    """Stage 1, Eq. 5: the source model."""

    pretrained: Annotated[str, Field(pattern=r"^[^\x00]*$")] = ""  # a safetensors file of `diffrc import` to start from
    train_steps: Annotated[int, Field(ge=0, lt=10**9)] = 100_000  # 0 = the pre-trained weights as they are
    train_on: Literal["head", "all"] = "head"
    class_sampling: Literal["natural", "balanced", "sqrt"] = "natural"
    label_dropout: Fraction = 0.1  # share of null labels when class_cond (classifier-free guidance)


class TargetSection(DiffusionStageSection):
    """Stage 2, Eqs. 7-10: adaptation to the tail. `batch_size` is `groups x group_size`."""

    train_steps: Count = 20_000
    warmup_steps: CountOrZero = 500
    group_size: Annotated[int, AfterValidator(_group_size), Field(le=1024)] = 4  # M
    adapt_on: Literal["medium+few", "all"] = "medium+few"  # classes over which L_base runs
    class_sampling: Literal["natural", "balanced", "sqrt"] = "balanced"  # which class the next group of M comes from
    gamma: NonNegative = 0.1  # Eq. 8
    lambda_pair: NonNegative = 0.5  # Eq. 10
    pair_direction: Literal["tar||sou", "sou||tar"] = "tar||sou"  # Eq. 9 as printed
    pair_temperature: Positive = 1.0  # on both rows
    pair_reduction: Literal["batch_mean", "sum"] = "batch_mean"
    shared_timestep: bool = False  # one t for a whole group
    label_dropout: Fraction = 0.1
    holdout_fraction: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0  # of each adapted class, kept out of this stage
    holdout_every_steps: Count = 500  # between evaluations of the held-out loss
    patience: CountOrZero = 0  # evaluations without a new best before the stage ends with the best weights; 0 = never

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.batch_size % self.accumulate == 0 and self.batch_size // self.accumulate % self.group_size:
            parts = f"batch_size {self.batch_size}" + (f" / accumulate {self.accumulate}" if self.accumulate > 1 else "")
            raise ValueError(f"{parts} is not a multiple of group_size {self.group_size}")
        if self.patience and not self.holdout_fraction:
            raise ValueError("patience needs a holdout_fraction above 0")
        return self


class GuideSection(StageSection):
    """Stage 3, Eqs. 11-12: the prototype guide, the encoder half of a small ADM U-Net."""

    train_steps: Count = 20_000
    warmup_steps: CountOrZero = 500
    weight_decay: NonNegative = 0.05
    model_channels: Count = 64
    channel_mult: Annotated[tuple[Multiple, ...], Field(min_length=1)] = (1, 2, 2)
    num_res_blocks: Count = 1
    attention_resolutions: tuple[Count, ...] = (8,)
    num_head_channels: Count = 64
    dropout: Fraction = 0.1
    embedding_dim: Count = 128
    tau: Positive = 0.07  # Eq. 12
    prototype_momentum: Fraction = 0.999  # m, Eq. 11
    class_prior: bool = True  # the pi_k of Eq. 12
    init_from: Literal["scratch", "target"] = "scratch"  # "target": the encoder half starts with the target model's weights
    class_sampling: Literal["natural", "balanced", "sqrt"] = "sqrt"


class ExportSection(Section):
    """Torch -> ONNX -> engine, and how far an engine may be from torch."""

    opset: Annotated[int, Field(ge=18, le=23)] = 20
    max_batch: Count = 64
    one_step_tolerance: Positive = 1e-5  # relative L2 of one evaluation against torch, in float32
    trajectory_psnr_db: Positive = 40.0  # of the worst image after 50 steps, against torch
    label_agreement: Fraction = 0.99  # least share of those images that keep their label, by a recognizer or the guide
    bf16_one_step_tolerance: Positive = 2e-2  # the same three for engines that compute in bf16
    bf16_trajectory_psnr_db: Positive = 30.0
    bf16_label_agreement: Fraction = 0.97  # in fp16 as well
    fp16_one_step_tolerance: Positive = 5e-3  # and in fp16
    fp16_trajectory_psnr_db: Positive = 30.0
    gpu_one_step_tolerance: Positive = 1e-4  # in place of the first on a GPU in float32: its sums take another order
    gradient_cosine: Fraction = 0.9999  # between the guide's exported gradient and torch's, the worst image
    gradient_max_error: Positive = 1e-4  # of a value of the gradient, as a share of the largest; also of log p and of a step's figures
    bf16_gradient_cosine: Fraction = 0.99  # the same two for engines that compute in bf16
    bf16_gradient_max_error: Positive = 0.15


class SynthSection(Section):
    """Guided sampling, Eq. 13, and how many images are made."""

    model: Literal["target", "source"] = "target"
    engine: Literal["onnx", "openvino", "tensorrt", "torch", "auto"] = "auto"  # "auto": the fastest that is exported and can run here
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the engine; "auto": any that is exported; of torch: float32
    device: Literal["auto", "cpu", "cuda"] = "auto"  # "auto": the GPU where torch sees one and the engine's runtime can use it
    compile: bool = False  # the torch engine by torch.compile, with CUDA graphs on a GPU; held to eager float32 at every start
    sampler: Literal["ddpm", "ddim", "dpmpp_2m"] = "ddpm"
    steps: Steps = 250  # of `diffusion.steps`: evenly spaced; "ddim50": at whole strides from 0; "10,15,25": so many in each third of t
    eta: Fraction = 0.0  # ddim
    batch_size: Count = 32  # the engine's fixed compute batch; smaller rests are padded
    guidance_scale: NonNegative = 0.2  # s_0
    guidance_scale_max: Positive = 1.0
    scale_rule: Literal["entropy", "fixed"] = "entropy"
    gradient_norm: Literal["rms", "linf", "l2", "none"] = "rms"
    step_unit: Literal["sigma", "variance"] = "sigma"
    direction: Literal["toward", "away"] = "toward"
    guidance_interval: tuple[CountOrZero, CountOrZero] = (0, 10**9)  # training timesteps t, both ends included
    classifier_free_scale: NonNegative = 0.0  # w in (1 + w) eps(y) - w eps(); 0 = one evaluation a step
    fused: bool = True  # one graph a guided step where it is exported and passed its gate, else the network with torch's guide
    clip_denoised: bool = True
    start: Literal["noise", "class", "head", "any"] = "noise"  # or a real training image, noised: of the class itself, a head class, any
    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.5  # share of diffusion.steps that such an image is noised by
    fill_to: CountOrZero = 0  # N_fill; 0 = the largest class
    max_bad: CountOrZero = 10  # images with values that are not finite, none of them written, before synthesis stops
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class SelectSection(Section):
    """Which synthesized images are kept: d <= distance_band * d_f, and others (METHOD section 5)."""

    distance_band: NonNegative = 0.0  # 0 = keep everything
    novelty_band: tuple[NonNegative, NonNegative] = (0.0, 0.0)  # of the nearest real one: see `synthesis.select`; [0, 0] = keep everything
    confidence: Fraction = 0.0  # the least p~(y | x_0) of the guide; 0 = keep everything
    max_tries: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)] = 4.0  # times the images asked for
    copy_ratio: Fraction = 1 / 3  # a copy: its nearest real image is at most so far away, beside the second nearest
    copy_share: Fraction = 0.01  # of the images of a class that may be copies before a warning is given


Method = Literal[
    "cross_entropy",
    "balanced_softmax",
    "logit_adjustment",
    "class_balanced",
    "ldam_drw",
    "mixup",
    "remix",
    "crt",
    "lws",
    "tau_norm",
    "mislas",
]
METHODS: tuple[Method, ...] = get_args(Method)
METHOD_TITLES: dict[str, str] = {
    "cross_entropy": "cross-entropy",
    "balanced_softmax": "balanced softmax",
    "logit_adjustment": "logit adjustment",
    "class_balanced": "class-balanced weights",
    "ldam_drw": "LDAM-DRW",
    "mixup": "mixup",
    "remix": "Remix",
    "crt": "cRT",
    "lws": "LWS",
    "tau_norm": "tau-normalization",
    "mislas": "MiSLAS",
}


def _methods(value: tuple[Method, ...]) -> tuple[Method, ...]:
    if not value or len(set(value)) < len(value):
        raise ValueError("should name at least one method, and none twice")
    return value


class RecognizerSection(Section):
    """The recognizer that says whether synthesis helps (METHOD section 5, LONGTAIL C and D3)."""

    architecture: Literal["resnet32", "resnet8", "resnet50", "resnext50"] = "resnet32"  # the last two from 64 px
    train_steps: Count = 19_600
    batch_size: Count = 128
    lr: Positive = 0.1
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 2e-4
    warmup_steps: CountOrZero = 500
    schedule: Literal["cosine", "step"] = "step"
    milestones: tuple[Fraction, ...] = (0.8, 0.9)  # of train_steps, for "step"
    decay: Fraction = 0.01
    horizontal_flip: bool = True
    crop: Literal["pad", "resized"] = "pad"  # "pad": padded with black, cut back at random; "resized": a random part at full size
    crop_padding_px: CountOrZero = 4  # for "pad"
    crop_min_area: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.08  # for "resized": the least share of the image
    color_jitter: Fraction = 0.0  # brightness, contrast, saturation times 1 - this to 1 + this, in random order; 0 = none
    policy: Literal["none", "autoaugment-cifar10", "autoaugment-imagenet", "randaugment"] = "none"  # of operations on an image
    randaugment_ops: Annotated[int, Field(ge=1, le=14)] = 2  # operations one after another, of the fourteen
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9  # of each; 0 = the image as it is, 30 = the end of its range
    cutout_px: CountOrZero = 0  # side of a gray square put anywhere, part of it perhaps outside; 0 = none
    cutout_holes: Annotated[int, Field(ge=1, le=64)] = 1  # such squares an image
    workers: CountOrZero = 1  # threads that augment the coming batches; they change nothing but the speed
    precision: Literal["fp32", "bf16"] = "fp32"
    synthetic_weight: Fraction = 0.3  # loss weight of a synthetic image beside 1 of a real one
    synthetic_prior: bool = True  # the real counts' log-prior on the logits of real images only
    real_only_fraction: Fraction = 0.0  # last share of the steps on real images alone
    seeds: Count = 3
    methods: Annotated[tuple[Method, ...], AfterValidator(_methods)] = ("cross_entropy", "balanced_softmax")  # that `evaluate` trains
    save_every_steps: CountOrZero = 0  # a checkpoint, from which an interrupted training goes on; 0 = none
    logit_adjustment_tau: Positive = 1.0  # tau log pi on the logits; 1 = balanced softmax
    class_balanced_beta: BelowOne = 0.9999  # weights (1 - beta) / (1 - beta^N_k)
    ldam_max_margin: NonNegative = 0.5  # margin of the rarest class, in cosines
    ldam_scale: Positive = 30.0  # s of the logits s cos(w_k, f)
    ldam_drw_from: Fraction = 0.8  # share of train_steps after which classes are weighted: epoch 160 of 200
    ldam_drw_beta: BelowOne = 0.9999  # their weights, as class_balanced_beta
    mixup_alpha: Positive = 1.0  # lam ~ Beta(alpha, alpha); for mixup, remix and mislas
    remix_kappa: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 3.0  # N_i / N_j from which the rarer class may take the label
    remix_tau: Fraction = 0.5  # and only where the other image's share is below this
    # crt, lws and mislas: steps on the classifier, as a share of train_steps and after them, from lr by cosine to 0; 10 epochs after 200
    second_stage_fraction: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.05
    tau_norm_holdout: Fraction = 0.1  # of each class's real images, not trained on, that choose tau
    mislas_smoothing_head: Fraction = 0.3  # eps_1; 0.4 for CIFAR-100-LT
    mislas_smoothing_tail: Fraction = 0.0  # eps_K; 0.1 for CIFAR-100-LT
    mislas_classifier_lr: Fraction = 0.5  # of lr, for the classifier; its scales have all of it. 0.2 for CIFAR-100-LT
    mislas_shift_batch_norm: bool = False  # means and variances taken anew from the balanced draws; true for CIFAR-100-LT


class Recipe(Section):
    """Every setting of a run. Build one with `load`, never by hand in a command."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataSection = DataSection()
    unet: UNetSection = UNetSection()
    diffusion: DiffusionSection = DiffusionSection()
    source: SourceSection = SourceSection()
    target: TargetSection = TargetSection()
    guide: GuideSection = GuideSection()
    export: ExportSection = ExportSection()
    synth: SynthSection = SynthSection()
    select: SelectSection = SelectSection()
    recognizer: RecognizerSection = RecognizerSection()

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        mistakes = [*_network_mistakes("unet", self.unet, self.data), *_network_mistakes("guide", self.guide, self.data)]
        try:
            if not self.sampling_timesteps():
                mistakes.append(f"synth.strength {self.synth.strength:g} leaves no step of synth.steps {self.synth.steps}")
        except ValueError as error:
            mistakes.append(f"synth.steps {self.synth.steps}: {error} (diffusion.steps)")
        if self.synth.scale_rule == "entropy" and self.synth.guidance_scale > self.synth.guidance_scale_max:
            scale = f"synth.guidance_scale {self.synth.guidance_scale:g}"
            mistakes.append(f"{scale} exceeds synth.guidance_scale_max {self.synth.guidance_scale_max:g}, the cap of the entropy rule")
        if not self.source.train_steps and not self.source.pretrained:
            mistakes.append("source.train_steps = 0 needs source.pretrained")
        if self.guide.init_from == "target":
            keys = ("model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_head_channels")
            other = [key for key in keys if getattr(self.guide, key) != getattr(self.unet, key)]
            mistakes += [f'guide.init_from = "target" needs guide.{key} = {getattr(self.unet, key)}, as unet.{key}' for key in other]
            fixed = {"num_heads": 0, "resblock_updown": True, "use_scale_shift_norm": True, "use_new_attention_order": False}
            for key, needed in fixed.items():
                if getattr(self.unet, key) != needed:
                    mistakes.append(f'guide.init_from = "target" needs unet.{key} = {str(needed).lower()}: a guide has no such option')
        if self.synth.batch_size > self.export.max_batch:
            mistakes.append(f"synth.batch_size {self.synth.batch_size} exceeds export.max_batch {self.export.max_batch}")
        if self.synth.classifier_free_scale and not self.unet.class_cond:
            mistakes.append("synth.classifier_free_scale needs unet.class_cond = true")
        if self.synth.compile and self.synth.engine != "torch":
            mistakes.append('synth.compile needs synth.engine = "torch"')
        mistakes += _recognizer_mistakes(self.recognizer, self.data)
        least, most = self.select.novelty_band
        if least > most:
            mistakes.append(f"select.novelty_band [{least:g}, {most:g}] is empty")
        first, last = self.synth.guidance_interval
        if first > last:
            mistakes.append(f"synth.guidance_interval [{first}, {last}] is empty")
        if self.data.few_below > self.data.many_above + 1:
            mistakes.append(f"data.few_below {self.data.few_below} overlaps data.many_above {self.data.many_above}")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def sampling_timesteps(self) -> list[int]:
        """Training timesteps t at which synthesis evaluates the network, ascending: those of `synth.steps`, from noise or up to t0."""
        spaced = spaced_timesteps(self.diffusion.steps, self.synth.steps)
        return spaced if self.synth.start == "noise" else [t for t in spaced if t < self.synth.strength * self.diffusion.steps]


def _network_mistakes(section: str, network: UNetSection | GuideSection, data: DataSection) -> list[str]:
    """Levels that cannot be halved, attention at sizes that do not occur, channels that do not split into heads."""
    levels = len(network.channel_mult)
    if data.image_size_px % 2 ** (levels - 1):
        return [f"data.image_size_px {data.image_size_px} cannot be halved {levels - 1} times ({section}.channel_mult)"]
    sizes = [data.image_size_px // 2**level for level in range(levels)]
    mistakes = [
        f"{section}.attention_resolutions {size} is no level of {section}.channel_mult at data.image_size_px {data.image_size_px}: {sizes}"
        for size in network.attention_resolutions
        if size not in sizes
    ]
    for level, (size, mult) in enumerate(zip(sizes, network.channel_mult, strict=True)):
        attends = size in network.attention_resolutions or level == levels - 1  # the middle block, of the last width, always does
        width, heads = int(mult * network.model_channels), network.num_heads if isinstance(network, UNetSection) else 0
        if width != mult * network.model_channels:
            mistakes.append(f"{section}.model_channels {network.model_channels} times {mult} is no whole number ({section}.channel_mult)")
        key, divisor = ("num_heads", heads) if heads else ("num_head_channels", network.num_head_channels)
        if attends and width % divisor:
            mistakes.append(f"{section}.{key} {divisor} does not divide the {width} channels at {size} px")
        if isinstance(network, UNetSection) and not network.use_scale_shift_norm and width <= math.gcd(32, width):
            mistakes.append(
                f"{section}.use_scale_shift_norm = false needs more than {width} channels at {size} px: "
                "a group norm of one channel a group takes the time embedding out again"
            )
    return mistakes


def _recognizer_mistakes(recognizer: RecognizerSection, data: DataSection) -> list[str]:
    """A network whose stem is too coarse for the images, a hole that can swallow one whole."""
    mistakes = []
    if recognizer.architecture in ("resnet50", "resnext50") and data.image_size_px < 64:
        mistakes.append(
            f'recognizer.architecture "{recognizer.architecture}" needs data.image_size_px 64 or more, not {data.image_size_px}: it halves '
            'an image five times, and at 32 px its last stage would convolve single pixels, and "resnet32" is made for these'
        )
    if recognizer.cutout_px >= data.image_size_px:
        mistakes.append(f"recognizer.cutout_px {recognizer.cutout_px} is not smaller than data.image_size_px {data.image_size_px}")
    return mistakes


def load(text: str, overrides: Sequence[str] = (), origin: str = "recipe") -> Recipe:
    """Parse, override and validate a recipe.

    Args:
        text: TOML.
        overrides: `section.key=value` items, as given to `--set`; a value is TOML, or else a bare string.
        origin: what the text is called in messages.

    Raises:
        UsageError: with every mistake of the file and of the overrides at once.
    """
    if len(text.encode()) > MAX_RECIPE_BYTES:
        raise UsageError(f"{origin} is larger than 1 MiB", "a recipe is a page of TOML: diffrc recipe show digits-lt")
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, or a number of thousands of digits; arrays nested by hundreds
        raise UsageError(f"{origin} is not valid TOML: {error}", "diffrc recipe show digits-lt shows one that is") from None
    return validate(table, origin, [mistake for item in overrides if (mistake := _override(table, item))])


def validate(table: Mapping[str, Any], origin: str = "recipe", mistakes: Sequence[str] = ()) -> Recipe:
    """Check a parsed table against the schema. Raises UsageError with all mistakes at once, `mistakes` already known first."""
    found = list(mistakes)
    try:  # JSON mode is strict about numbers and strings, yet reads TOML's arrays as tuples
        recipe = Recipe.model_validate_json(json.dumps(table, default=str))
        if not found:
            return recipe
    except ValidationError as error:
        found += sorted({part for e in error.errors(include_url=False) for part in _mistake(dict(e)).split("; ")})
    count = "1 mistake" if len(found) == 1 else f"{len(found)} mistakes"
    told = "; ".join(mistake[:MISTAKE_CHARACTERS] for mistake in found[:MISTAKES_TOLD])
    more = f"; and {len(found) - MISTAKES_TOLD:,} more" if len(found) > MISTAKES_TOLD else ""
    raise UsageError(f"{count} in {origin}: {told}{more}", "diffrc recipe show NAME lists every key and its value")


def digest(section: BaseModel | Mapping[str, Any]) -> str:
    """sha256 of a recipe or section: equal exactly when every value is."""
    table = section.model_dump(mode="json") if isinstance(section, BaseModel) else section
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def differences(a: Recipe, b: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, value in a, value in b) for every key in which two recipes differ, in the schema's order."""
    left, right = dict(_flatten(a)), dict(_flatten(b))
    return [(key, left[key], right[key]) for key in left if left[key] != right[key]]


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML, every key written out; `load` reads it back to an equal recipe."""
    lines: list[str] = []
    for key, value in recipe.model_dump(mode="json").items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]", *(f"{name} = {_toml_value(v)}" for name, v in value.items())]
        else:
            lines.append(f"{key} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def read(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """`load` a file. Raises UsageError where it cannot be read as UTF-8 text."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_RECIPE_BYTES + 1).decode()  # bounded: the file may be a device; `load` refuses the excess
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the recipe {path}: {error}", "diffrc recipe ls lists the embedded recipes") from None
    return load(text, overrides, origin=str(path))


def _override(table: dict[str, Any], item: str) -> str:
    """Set one key of the table; what is wrong with the item, or nothing."""
    key, equals, raw = item.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        return f"--set {item!r} is not of the form section.key=value (for example source.train_steps=200)"
    node = table
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            return f"--set {item!r}: {part!r} is a value, not a section"
    node[path[-1]] = _parsed(raw)
    return ""


def _parsed(raw: str) -> Any:
    """A TOML value, or else the string as it is: `--set data.path=/photos` needs no quotes."""
    try:
        table = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return raw.strip()
    return table["value"] if len(table) == 1 else raw.strip()


def _mistake(error: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"] if not isinstance(part, int))
    if error["type"] == "extra_forbidden":
        section = Recipe.model_fields.get(str(error["loc"][0])) if len(error["loc"]) > 1 else None
        model = section.annotation if section else Recipe
        fields: Iterable[str] = getattr(model, "model_fields", {})
        return f"unknown key {where!r}{_suggestion(where, fields)}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = "" if isinstance(error.get("input"), dict) else f", not {json.dumps(error.get('input'), default=str)[:80]}"
    return f"{where}: {message}{given}" if where else message


def _suggestion(where: str, fields: Iterable[str]) -> str:
    """The sections that hold the key, after what its own section holds that is much like it; else the nearest key of its own section."""
    section, _, key = where.rpartition(".")
    homes = [name for name, field in Recipe.model_fields.items() if key in getattr(field.annotation, "model_fields", {})]
    own = difflib.get_close_matches(key, list(fields), n=1, cutoff=0.6 if homes else 0.5)
    near = [f"{section}.{name}" for name in own if section] + [f"{home}.{key}" for home in homes] if homes else own
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def _flatten(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    for key, value in recipe.model_dump(mode="json").items():
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", v) for name, v in value.items())
        else:
            yield key, value


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's strings, numbers, booleans are TOML's but for DEL
