"""Which training timesteps a sampler visits: evenly spaced, at whole strides ("ddim50"), or so many in each section ("10,15,25")."""

from __future__ import annotations

from itertools import accumulate


def spaced_timesteps(total: int, steps: int | str) -> list[int]:
    """Increasing timesteps out of 0..total-1, in the notations of the published samplers.

        250          250 of them, evenly spaced, the first and the last included
        "ddim50"     0, k, 2k, ...: 50 of them at a whole stride k (Song et al. 2021)
        "10,15,25"   `total` in three equal sections, the first ones longer by one where it does not divide; so many evenly in each

    Two places differ from the published code. A single step of a section is its last one, there its first: for the whole range it is
    the one whose x_t is the noise that sampling starts from. And a place midway between two timesteps goes to the even one, there to
    where the rounding errors of summed strides have carried it: 500 or 499 as the middle of 21 out of 1000; 25, 50, 100, 250 agree.

    Raises ValueError where a section cannot give so many timesteps, or where no whole stride gives that many.
    """
    if isinstance(steps, str) and steps.startswith("ddim"):
        count = int(steps.removeprefix("ddim"))
        stride = next((k for k in range(1, total + 1) if len(range(0, total, k)) == count), None)
        if stride is None:
            raise ValueError(f"no whole stride through {total} timesteps gives {count} of them")
        return list(range(0, total, stride))
    counts = [steps] if isinstance(steps, int) else [int(part) for part in steps.split(",")]
    sizes = [total // len(counts) + (section < total % len(counts)) for section in range(len(counts))]
    for count, size in zip(counts, sizes, strict=True):
        if not 1 <= count <= size:
            whole = f"{total} timesteps" if len(counts) == 1 else f"a section of {size} timesteps"
            raise ValueError(f"{whole} cannot give {count}")
    starts = [0, *accumulate(sizes)][:-1]
    return [start + place for start, size, count in zip(starts, sizes, counts, strict=True) for place in _even(size, count)]


def _even(size: int, count: int) -> list[int]:
    return [round(i * (size - 1) / (count - 1)) for i in range(count)] if count > 1 else [size - 1]
