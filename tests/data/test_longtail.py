"""The long tail: published counts, which images are kept, groups, and refusals."""

import hashlib

import numpy as np
import pytest

from engines.data.longtail import GROUPS, check_groups, class_groups, kept_indices, prepare, profile_counts, profile_weights
from engines.errors import DataError, UsageError
from engines.recipe import DataSection

CIFAR10 = {
    100: [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
    50: [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100],
    10: [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
}


def counts_of(classes: int, per_class: int, **settings: object) -> np.ndarray:
    data = DataSection(**settings)  # type: ignore[arg-type]
    return profile_counts(data, np.full(classes, per_class), [f"c{k}" for k in range(classes)])


@pytest.mark.parametrize(("imbalance", "total"), [(100, 12_406), (50, 13_996), (10, 20_431)])
def test_cifar10_lt_has_the_published_counts(imbalance: int, total: int) -> None:
    counts = counts_of(10, 5000, imbalance=float(imbalance))
    assert counts.tolist() == CIFAR10[imbalance]
    assert counts.sum() == total


@pytest.mark.parametrize(("imbalance", "total", "smallest"), [(100, 10_847, 5), (50, 12_608, 10), (10, 19_573, 50)])
def test_cifar100_lt_has_the_published_counts(imbalance: int, total: int, smallest: int) -> None:
    counts = counts_of(100, 500, imbalance=float(imbalance))
    assert (counts.sum(), counts[0], counts[-1]) == (total, 500, smallest)


@pytest.mark.parametrize(("imbalance", "sizes"), [(100, (35, 35, 30)), (50, (41, 41, 18)), (10, (69, 31, 0))])
def test_cifar100_lt_has_the_published_groups(imbalance: int, sizes: tuple[int, int, int]) -> None:
    data = DataSection(imbalance=float(imbalance))
    groups = class_groups(data, counts_of(100, 500, imbalance=float(imbalance)))
    assert tuple(groups.count(group) for group in GROUPS) == sizes


def test_the_pareto_profile_has_the_shape_of_imagenet_lt() -> None:
    """The published list: 115,846 images, 1280 to 5 a class, 385 / 479 / 136 classes many / medium / few."""
    data = DataSection(profile="pareto", imbalance=256.0, head_count=1280)
    counts = profile_counts(data, np.full(1000, 1300), [str(k) for k in range(1000)])
    assert (counts.max(), counts.min()) == (1280, 5)
    assert (np.diff(counts) <= 0).all()
    assert counts.sum() == pytest.approx(115_846, rel=0.06)
    groups = class_groups(data, counts)
    assert [groups.count(group) for group in GROUPS] == pytest.approx([385, 479, 136], abs=25)


@pytest.mark.parametrize("profile", ["exponential", "pareto"])
def test_weights_fall_from_one_to_the_inverse_imbalance(profile: str) -> None:
    weights = profile_weights(DataSection(profile=profile, imbalance=40.0), 12)  # type: ignore[arg-type]
    assert weights[0] == 1
    assert weights[-1] == pytest.approx(1 / 40, rel=1e-12)
    assert (np.diff(weights) < 0).all()


def test_the_largest_head_is_the_largest_that_every_class_can_give() -> None:
    available = np.array([90, 70, 25, 40, 3])
    names = list("abcde")
    data = DataSection(imbalance=20.0)
    counts = profile_counts(data, available, names)
    assert (counts <= available).all()
    with pytest.raises(DataError):
        profile_counts(DataSection(imbalance=20.0, head_count=int(counts[0]) + 1), available, names)


def test_a_class_that_cannot_give_its_share_is_named_with_the_head_that_fits() -> None:
    with pytest.raises(DataError, match=r"asks for 100 images of class 'a', which has 90") as error:
        profile_counts(DataSection(imbalance=2.0, head_count=100), np.array([90, 90]), ["a", "b"])
    assert "data.head_count=90" in error.value.remedy


def test_a_class_that_would_lose_every_image_is_refused() -> None:
    with pytest.raises(DataError, match=r"class 'b' keeps no image"):
        profile_counts(DataSection(imbalance=100.0), np.array([50, 50]), ["a", "b"])


def test_the_kept_images_are_those_of_the_reference_procedure() -> None:
    """Per class ascending: shuffle its indices with generator seed 0, take the first N_k. Written out on NumPy's global one."""
    labels = np.random.default_rng(3).integers(0, 4, 400)
    counts = np.array([60, 30, 12, 5])
    np.random.seed(0)  # noqa: NPY002 - the convention
    expected = []
    for k in range(4):
        members = np.where(labels == k)[0]
        np.random.shuffle(members)  # noqa: NPY002
        expected.extend(members[: counts[k]].tolist())
    assert kept_indices(labels, counts, 0).tolist() == expected


def test_other_random_draws_do_not_change_what_is_kept() -> None:
    labels, counts = np.repeat(np.arange(3), 50), np.array([40, 20, 5])
    first = kept_indices(labels, counts, 0)
    np.random.seed(7)  # noqa: NPY002 - somebody else's draw
    assert (kept_indices(labels, counts, 0) == first).all()
    assert not np.array_equal(kept_indices(labels, counts, 1), first)


@pytest.mark.parametrize("imbalance", [100.0, 50.0, 10.0])
def test_no_image_is_kept_twice_and_each_class_keeps_its_count(imbalance: float) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(100), 500))
    counts = counts_of(100, 500, imbalance=imbalance)
    kept = kept_indices(labels, counts, 0)
    assert len(set(kept.tolist())) == len(kept) == counts.sum()
    assert (np.bincount(labels[kept]) == counts).all()


def test_the_counts_rule_is_strict_on_both_sides() -> None:
    assert class_groups(DataSection(), np.array([101, 100, 20, 19])) == ("many", "medium", "medium", "few")


def test_ranks_go_by_size_and_break_ties_by_label() -> None:
    data = DataSection(groups="ranks", group_sizes=(1, 2, 1))
    assert class_groups(data, np.array([5, 9, 9, 7])) == ("few", "many", "medium", "medium")


def test_group_sizes_that_do_not_add_up_are_refused_with_sizes_that_do() -> None:
    with pytest.raises(UsageError, match="add up to 10, but there are 100 classes") as error:
        class_groups(DataSection(groups="ranks"), np.arange(100, 0, -1))
    assert "group_sizes=[30,40,30]" in error.value.remedy


@pytest.mark.parametrize(("groups", "missing"), [(("many", "medium"), "few"), (("medium", "few"), "many")])
def test_training_without_head_or_tail_is_refused(groups: tuple[str, ...], missing: str) -> None:
    with pytest.raises(DataError, match=f"no class counts as {missing}") as error:
        check_groups(groups, np.array([50, 40]))  # type: ignore[arg-type]
    assert "data.groups=ranks" in error.value.remedy


def test_prepare_refuses_an_empty_group_only_for_training() -> None:
    data = DataSection(image_size_px=8, image_channels=1, imbalance=2.0)
    with pytest.raises(DataError, match="no class counts as few"):
        prepare(data, None)
    assert prepare(data, None, for_training=False).groups.count("few") == 0


def test_the_digits_become_a_long_tail_with_a_balanced_test_set() -> None:
    tail = prepare(DataSection(image_size_px=8, image_channels=1, imbalance=20.0, groups="ranks"), None)
    assert np.bincount(tail.test.labels).tolist() == [50] * 10
    assert (np.bincount(tail.train.labels) == tail.counts).all()
    assert len(tail.pool) == 1797 - 500
    assert tail.names[9] == "nine"
    assert tail.classes_of("few").tolist() == [7, 8, 9]
    assert tail.classes_of("many", "few").tolist() == [0, 1, 2, 7, 8, 9]
    assert tail.table()["counts"] == tail.counts.tolist()


def test_the_hash_is_of_the_kept_indices_in_order() -> None:
    data = DataSection(image_size_px=8, image_channels=1, imbalance=20.0, groups="ranks")
    tail = prepare(data, None)
    kept = kept_indices(tail.pool.labels, tail.counts, 0)
    assert tail.kept_sha256 == hashlib.sha256(kept.astype("<i8").tobytes()).hexdigest()
    assert (tail.train.pixels(np.arange(5)) == tail.pool.pixels(kept[:5])).all()


def test_as_is_keeps_everything_in_order() -> None:
    tail = prepare(DataSection(image_size_px=8, image_channels=1, profile="as-is"), None, for_training=False)
    assert (tail.train.labels == tail.pool.labels).all()
    assert len(tail.train) == 1297
