"""Long tails: how many images each class keeps (exponential, Pareto), which ones, and the many/medium/few groups.

Exponential, the CIFAR-LT convention (Cao et al. 2019):   n_i = int(n_max * IF^(-i / (K - 1))),  i = label 0..K-1
Pareto, the shape of ImageNet-LT (Liu et al. 2019):       n_i = int(n_max * w_i),  see `profile_weights`
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from engines.data.images import ImageSet, Indices
from engines.data.sources import load
from engines.data.splits import by_class
from engines.errors import DataError, UsageError
from engines.recipe import DataSection

Group = Literal["many", "medium", "few"]
GROUPS: tuple[Group, ...] = ("many", "medium", "few")


@dataclass(frozen=True)
class LongTail:
    """A long-tailed training set, its balanced or given test set, and what it was cut from."""

    train: ImageSet
    test: ImageSet
    pool: ImageSet  # the training split before the profile cut it: for oracles only
    counts: Indices  # (K,) N_k
    groups: tuple[Group, ...]  # (K)
    kept_sha256: str  # of the kept images' indices in the pool, int64 little-endian, in order; and of the names left out of it
    left_out: ImageSet | None = None  # what the profile cut off the pool, to choose settings on; None = nothing

    @property
    def names(self) -> tuple[str, ...]:
        """(K) class names."""
        return self.train.names

    def classes_of(self, *groups: str) -> Indices:
        """Labels of the classes in any of these groups, ascending: `classes_of("medium", "few")`."""
        assert set(groups) <= set(GROUPS), groups
        return np.flatnonzero([group in groups for group in self.groups])

    @property
    def imbalance(self) -> float:
        """N_k of the largest class over that of the smallest."""
        return float(self.counts.max() / self.counts.min())

    def table(self) -> dict[str, Any]:
        """The class table of a run, as JSON values: names, counts and groups in label order, and the kept images' hash."""
        return {
            "names": list(self.names),
            "counts": self.counts.tolist(),
            "groups": list(self.groups),
            "kept_sha256": self.kept_sha256,
        }

    def summary(self) -> dict[str, Any]:
        """The class table with totals, as JSON values. Reads no image."""
        members = {group: self.classes_of(group) for group in GROUPS}
        return {
            "images": len(self.train),
            "test_images": len(self.test),
            "skipped_images": self.pool.skipped + self.test.skipped,
            "quarantined_images": len(self.pool.left_out) + len(self.test.left_out),
            "imbalance": self.imbalance,
            "group_sizes": {g: {"classes": len(k), "images": int(self.counts[k].sum())} for g, k in members.items()},
            **self.table(),
        }


def prepare(data: DataSection, path: Path | None, *, for_training: bool = True) -> LongTail:
    """Load a source and cut the recipe's long tail out of its training split. Decodes no image yet.

    Args:
        data: source, profile and groups.
        path: where the data set lies; without it `data.path` counts.
        for_training: also demand that the groups can be trained on (`check_groups`).

    Raises:
        DataError: from `load`, `profile_counts` or `check_groups`.
        UsageError: from `class_groups`.
    """
    pool, test = load(data, path)
    available = np.bincount(pool.labels, minlength=len(pool.names))
    counts = profile_counts(data, available, pool.names)
    kept = kept_indices(pool.labels, counts, data.profile_seed) if data.profile != "as-is" else np.arange(len(pool), dtype=np.int64)
    groups = class_groups(data, counts)
    if for_training:
        check_groups(groups, counts)
    left_out = np.setdiff1d(np.arange(len(pool), dtype=np.int64), kept)
    names_out = "\0".join((*pool.left_out, "", *test.left_out)) if pool.left_out or test.left_out else ""
    kept_sha256 = hashlib.sha256(kept.astype("<i8").tobytes() + names_out.encode()).hexdigest()
    return LongTail(pool.subset(kept), test, pool, counts, groups, kept_sha256, pool.subset(left_out) if len(left_out) else None)


def profile_weights(data: DataSection, classes: int) -> npt.NDArray[np.float64]:
    """(K,) w_i = n_i / n_max of each class in label order, from 1 down to 1 / IF.

    exponential:  w_i = (1 / IF)^(i / (K - 1))
    pareto:       w_i = l_i + (1 - l_i) / IF,   l_i = L(i) / L(0),   L(i) = ((i + 1) / K)^(-1/power) - 1
                  L are the quantiles of a Pareto (type II) distribution of that power, largest first. With power 6 and
                  1280..5 images of 1,000 classes this gives ImageNet-LT's shape (its list was drawn at random; where
                  the list is at hand, use it).
    """
    label = np.arange(classes, dtype=np.float64)
    if data.profile == "exponential":
        return np.asarray(np.power(1 / data.imbalance, label / (classes - 1)))
    quantile = np.power((label + 1) / classes, -1 / data.pareto_power) - 1
    share = quantile / quantile[0]  # 1 .. 0
    return np.asarray(share + (1 - share) / data.imbalance)  # this order is exact at both ends


def profile_counts(data: DataSection, available: Indices, names: Sequence[str]) -> Indices:
    """(K,) N_k that the profile asks of each class.

    Args:
        available: (K,) images of each class in the training split.
        names: (K) for messages.

    Raises:
        DataError: a class has fewer images than its N_k, or its N_k is 0.
    """
    if data.profile == "as-is":
        return available.astype(np.int64)
    weights = profile_weights(data, len(available))
    head = data.head_count or _largest_head(weights, available)
    counts = (head * weights).astype(np.int64)  # truncates
    short = np.flatnonzero(counts > available)
    if len(short):
        k = int(short[0])
        raise DataError(
            f"the long tail asks for {counts[k]} images of class {names[k]!r}, which has {available[k]}",
            f"--set data.head_count={_largest_head(weights, available)} is the most this data set can give",
        )
    if counts.min() < 1:
        k = int(counts.argmin())
        raise DataError(
            f"at imbalance {data.imbalance:g} with {head} images in the largest class, class {names[k]!r} keeps no image",
            f"--set data.imbalance={max(1, head // 2)} or less, or a larger data.head_count",
        )
    return counts


def kept_indices(labels: Indices, counts: Indices, seed: int) -> Indices:
    """(sum N_k,) indices of the kept images: per class in ascending order, its indices shuffled, the first N_k.

    The generator is `RandomState(seed)` of our own: the convention seeds NumPy's global one, whose subset then depends on
    whoever else drew from it. No image is kept twice.
    """
    rng = np.random.RandomState(seed)
    kept: list[Indices] = []
    for members, count in zip(by_class(labels, len(counts)), counts, strict=True):
        rng.shuffle(members)
        kept.append(members[:count])
    return np.concatenate(kept)


def class_groups(data: DataSection, counts: Indices) -> tuple[Group, ...]:
    """(K) group of each class.

    "counts": many where N_k > many_above, few where N_k < few_below, else medium (100 and 20 in the literature).
    "ranks":  classes by N_k, largest first and equal ones by label, fill `group_sizes` (many, medium, few).

    Raises UsageError where group_sizes do not add up to the number of classes.
    """
    if data.groups == "counts":
        return tuple("many" if n > data.many_above else "few" if n < data.few_below else "medium" for n in counts)
    if sum(data.group_sizes) != len(counts):
        raise UsageError(
            f"data.group_sizes {list(data.group_sizes)} add up to {sum(data.group_sizes)}, but there are {len(counts)} classes",
            f"for example: --set data.group_sizes={_thirds(len(counts))}",
        )
    by_rank = [group for group, size in zip(GROUPS, data.group_sizes, strict=True) for _ in range(size)]
    rank = np.argsort(np.argsort(-counts, kind="stable"), kind="stable")
    return tuple(by_rank[r] for r in rank)


def check_groups(groups: Sequence[Group], counts: Indices) -> None:
    """Demand a head to learn from and a tail to adapt to. Raises DataError where many or few is empty."""
    for group in ("many", "few"):
        if group not in groups:
            raise DataError(
                f"no class counts as {group}: the classes have {counts.min()} to {counts.max()} images",
                f"group them by rank: --set data.groups=ranks --set data.group_sizes={_thirds(len(counts))}",
            )


def _largest_head(weights: npt.NDArray[np.float64], available: Indices) -> int:
    """The largest n_max for which int(n_max * w_i) <= available_i in every class."""
    head = int(np.min(np.ceil((available + 1) / weights)))
    while ((head * weights).astype(np.int64) > available).any():
        head -= 1
    return head


def _thirds(classes: int) -> str:
    """Top 3, middle 4, bottom 3 of ten classes, in proportion."""
    many = few = max(1, round(classes * 0.3))
    return f"[{many},{max(0, classes - many - few)},{few}]"
