"""Whether synthesized images are what they say: every file held to its text, its place and its manifest line; some remade and compared.

Two kinds of question. Of every image: is the PNG whole, does its text name plan, class, index, seed, versions and the hash of its
pixels, does it lie where it says, does the manifest say the same? Files alone answer these. Of a sample: do the run's networks,
given the plan and the image's name, draw these pixels again? Nothing that was changed consistently by hand survives that.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from engines import recipe as recipes
from engines import store
from engines.backends.base import Kind
from engines.errors import ConflictError, DataError, DiffRCError, Interrupted, UsageError
from engines.interrupt import StopRequest, catch_signals
from engines.progress import Report, silent
from engines.synthesis.examine import Disagreement, Files
from engines.synthesis.maker import Maker
from engines.synthesis.places import Place, places
from engines.synthesis.plan import PLAN_FILE, ImageId
from engines.synthesis.remake import compare, drawn_again, maker_of, other_versions
from engines.synthesis.sheet import pixels_sha256

LEAST_SAMPLE, SAMPLED_SHARE = 16, 0.01  # images that are remade where no number is given

Agreement = Literal["equal", "close"]


@dataclass(frozen=True)
class Verification:
    """What was found in a synthesis folder, or in a part of it.

    Attributes:
        images: PNG files that were examined.
        asked: images that were to be remade.
        equal, close: of the remade ones, those with the same bytes, and those within the tolerance of another machine or engine.
        expected: how the remade images had to agree: "equal" where all else is as it was, "close" otherwise.
        why_close: what is not as it was, "" where nothing is.
        failure: why none was remade, where none could be.
    """

    folder: Path
    plan: str
    images: int
    disagreements: tuple[Disagreement, ...]
    asked: int = 0
    seed: int = 0
    engine: str = ""
    equal: int = 0
    close: int = 0
    expected: Agreement = "equal"
    why_close: str = ""
    failure: DiffRCError | None = None

    @property
    def remade(self) -> int:
        """Images that were drawn again and agree."""
        return self.equal + self.close

    @property
    def sound(self) -> bool:
        """Whether all that could be asked agrees."""
        return not self.disagreements and self.failure is None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "folder": str(self.folder),
            "plan": self.plan,
            "images": self.images,
            "sampled": self.asked,
            "seed": self.seed,
            "engine": self.engine,
            "bit_equal": self.equal,
            "close": self.close,
            "expected": self.expected,
            "why_close": self.why_close,
            "not_remade": self.failure.problem if self.failure else "",
            "sound": self.sound,
            "disagreements": [found._asdict() for found in self.disagreements],
        }


def verify(
    folder: Path,
    run: Path | None = None,
    sample: int | None = None,
    seed: int = 0,
    engine: Kind | None = None,
    report: Report = silent,
    data: Path | None = None,
) -> list[Verification]:
    """Hold synthesized images to what they say of themselves, and remake a random sample of them. Writes nothing.

    On the kind of machine and with the engine and versions that made an image, it must come out bit for bit. Elsewhere, or with
    another `engine`, 99.9 % of its values must come within 1 of 255. In half precision rounding adds up over the steps: on another kind
    of machine such an image is held to the trajectory limit of its engine's export, and to another engine not at all.

    Args:
        folder: a run folder, a synthesis folder, a class's in one, or any folder of synthetic images of the run.
        run: that made the images; default the one that the folder lies in, else the latest.
        sample: images to remake in each synthesis folder; None = 1 %, at least LEAST_SAMPLE; a larger number than there are = all.
        seed: draws the sample.
        engine: that remakes them; None = the one that made them.
        data: where the run's data lie, if elsewhere than its recipe says; read only where images begin from real ones.

    Returns: one for each synthesis folder, in which what disagrees is listed.

    Raises:
        UsageError: no such folder, or no images in it.
        DataError: their plan is damaged, or nowhere to be found.
        ConflictError: another process makes images there.
        Interrupted: a signal came.
    """
    with catch_signals() as stop:
        return [_verified(place, sample, seed, engine, data, report, stop) for place in places(folder, run)]


def _verified(
    place: Place, sample: int | None, seed: int, engine: Kind | None, data: Path | None, report: Report, stop: StopRequest
) -> Verification:
    if (owner := store.holder(place.folder)) and owner.pid != os.getpid():
        raise ConflictError(f"{place.folder} is in use by another diffrc process", "wait until it ends")
    document = store.read_json(place.folder / PLAN_FILE)
    try:
        identity, plan, names = document["identity"], str(document["plan"]), list(document["identity"]["classes"])
    except (KeyError, TypeError):
        raise DataError(f"{place.folder / PLAN_FILE} is no plan", "restore it, or remove the folder to make its images again") from None
    shelf = Files(place, identity, plan, names)
    shelf.examine(report, stop)
    found = Verification(place.folder, plan, shelf.count, tuple(shelf.disagreements), seed=seed)
    if not shelf.count and not found.disagreements:
        raise UsageError(f"{place.images} holds no synthesized images", "diffrc synth --fill makes some")
    if recipes.digest(identity)[:32] != plan:
        damaged = Disagreement(PLAN_FILE, "its identity is not the one that its id was made of")
        return replace(found, disagreements=(damaged, *found.disagreements))
    total = sum(map(len, shelf.records.values()))
    if sample == 0 or not total:
        return found
    count = max(LEAST_SAMPLE, math.ceil(SAMPLED_SHARE * total)) if sample is None else sample
    chosen = shelf.sample(min(count, total), seed)
    found = replace(found, asked=len(chosen))
    try:
        maker, why_close = maker_of(place, document, engine, data)
    except DiffRCError as failure:
        return replace(found, failure=failure)
    return _remake(found, shelf, maker, why_close, chosen, report, stop)


def _remake(
    found: Verification, shelf: Files, maker: Maker, why_close: str, chosen: Sequence[ImageId], report: Report, stop: StopRequest
) -> Verification:
    """Draw the chosen images again and compare."""
    card, export = maker.engine.card, maker.recipe.export
    precisions = {card.precision, maker.plan.identity["engine.precision"]}
    half_db = 0.0 if precisions == {"fp32"} else min(export.bf16_trajectory_psnr_db, export.fp16_trajectory_psnr_db)
    wrong: list[Disagreement] = []
    equal = close = 0
    reasons = [why_close] if why_close else []
    failure: DiffRCError | None = None
    try:
        for drawn, pixels in drawn_again(maker, chosen, report, stop):
            record, name = shelf.record(drawn), shelf.path(drawn).relative_to(shelf.place.root).as_posix()
            if pixels is None:
                wrong.append(Disagreement(name, "remade, it is not finite"))
            elif record.start != maker.start_of(drawn):
                wrong.append(Disagreement(name, f"it says start={record.start}, remade from {maker.start_of(drawn)}"))
            elif pixels_sha256(pixels) == record.pixels_sha256:
                equal += 1
            else:
                other = other_versions(record, maker)
                told, is_close = compare(shelf.pixels(drawn), pixels, half_db)
                if other and other not in reasons:
                    reasons.append(other)
                if is_close and (why_close or other):
                    close += 1
                else:
                    wrong.append(Disagreement(name, f"remade, it differs: {told}"))
    except Interrupted:
        raise
    except DiffRCError as error:
        failure = error
    return replace(
        found,
        engine=f"{card.kind} {card.precision}",
        equal=equal,
        close=close,
        expected="close" if reasons else "equal",
        why_close="; ".join(reasons),
        disagreements=(*found.disagreements, *wrong),
        failure=failure,
    )
