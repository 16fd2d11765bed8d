"""What is written for the keys of accuracy.json and study.json: variants and ways of training."""

from __future__ import annotations

from collections.abc import Mapping

from engines.evaluation.accuracy import TITLES
from engines.recipe import METHOD_TITLES

_TITLES: Mapping[str, str] = {**{str(method): title for method, title in METHOD_TITLES.items()}, **TITLES}


def title_of(key: str) -> str:
    """Words for a variant or a method of training; of a key that no title is known of, the key itself with spaces."""
    return _TITLES.get(key, str(key).replace("_", " "))


def heading_of(key: str) -> str:
    """`title_of` as a heading begins; cRT stays cRT."""
    title = title_of(key)
    return title if title[1:2].isupper() else title[:1].upper() + title[1:]
