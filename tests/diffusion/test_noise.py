"""Noise by name: the same whatever the batch, independent between names, normal, and the same on every machine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy import stats

from engines.diffusion.noise import batch_noise, image_key, image_noise

SHAPE = (3, 8, 8)


def test_an_images_noise_does_not_depend_on_its_batch_or_its_place_in_it() -> None:
    keys = [image_key(0, 3, i) for i in range(7)]
    together = batch_noise(keys, 5, SHAPE)
    assert torch.equal(together, torch.stack([torch.from_numpy(image_noise(key, 5, SHAPE)) for key in keys]))
    for size in (1, 2, 3):
        parts = torch.cat([batch_noise(keys[i : i + size], 5, SHAPE) for i in range(0, 7, size)])
        assert torch.equal(parts, together)
    assert torch.equal(batch_noise(keys[::-1], 5, SHAPE).flip(0), together)


def test_seed_class_index_and_step_each_name_other_noise() -> None:
    names = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 23, 4), (12, 3, 4), (1, 2, 34)]
    assert len({image_key(*name) for name in names}) == len(names)
    drawn = [image_noise(image_key(*name), step, (4096,)) for name in names for step in (0, 1, 2)]
    correlation = np.corrcoef(np.stack(drawn)) - np.eye(len(drawn))
    assert np.abs(correlation).max() < 5 / np.sqrt(4096)


def test_steps_do_not_overlap_however_much_a_step_draws() -> None:
    key = image_key(0, 0, 0)
    long = image_noise(key, 0, (1 << 16,))
    for step in (1, 2, 249):
        assert not np.isin(image_noise(key, step, (16,)), long).all()
    assert np.array_equal(image_noise(key, 0, (16,)), long[:16])


def test_the_noise_is_standard_normal() -> None:
    values = batch_noise([image_key(7, 1, i) for i in range(200)], 1, SHAPE).flatten().double().numpy()
    assert stats.kstest(values, "norm").pvalue > 0.01
    across = batch_noise([image_key(7, 1, i) for i in range(2000)], 1, (1, 1, 1)).flatten().double().numpy()  # first value of each image
    assert stats.kstest(across, "norm").pvalue > 0.01


def test_a_key_is_128_bits_of_blake2b_and_its_noise_is_numpys_philox() -> None:
    key = image_key(0, 0, 0)
    assert key == 0xEC41578C0065DEB9A889B6CA2F9C892A
    raw = np.random.Philox(key=key, counter=3 << 64).random_raw(2)
    assert raw.tolist() == [8962488654538983593, 772595302213522672]
    np.testing.assert_allclose(image_noise(key, 3, (4,)), [0.32362366, -1.341425, 1.3484489, -0.052176565], rtol=1e-6)


def test_threads_draw_side_by_side_what_each_would_alone_and_nothing_is_left_of_an_earlier_draw() -> None:
    keys = [image_key(0, 0, i) for i in range(70)]
    image_noise(keys[0], 3, (5,))  # an odd number of values: half a buffer is left over
    expected = [np.random.Generator(np.random.Philox(key=key, counter=2 << 64)).standard_normal((257,), dtype=np.float32) for key in keys]
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda key: image_noise(key, 2, (257,)), keys * 8))
        together = batch_noise(keys, 2, (1, 1, 257), pool.map)
    assert all(np.array_equal(found, expected[i % 70]) for i, found in enumerate(drawn))
    assert np.array_equal(together[:, 0, 0], np.stack(expected))
