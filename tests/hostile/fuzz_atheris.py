"""The targets of `fuzz_targets.py` under atheris, whose inputs follow the branches of the Python code that they reach.

    pip install atheris
    python tests/hostile/fuzz_atheris.py pickle -max_total_time=3600

The first word names the target (none: they are listed), the rest goes to libFuzzer. Seeds and what was found lie in a folder of the
system's temporary one, which is told; the same command goes on from there.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]


def main(words: list[str]) -> int:
    """The exit code of a call with these words."""
    try:
        import atheris
    except ImportError:
        print("atheris is not installed: pip install atheris (it has wheels for CPython on Linux, and takes nothing else)", file=sys.stderr)
        return 2
    with atheris.instrument_imports(include=["engines"]):
        import fuzz_targets as fuzz

    if not words or words[0] not in fuzz.TARGETS:
        print(f"name one of: {', '.join(fuzz.TARGETS)}", file=sys.stderr)
        return 2
    target = fuzz.TARGETS[words[0]]
    place = Path(tempfile.gettempdir()) / "diffrc-fuzz" / target.name.replace(" ", "-")
    for number, seed in enumerate(target.seeds()):
        fuzz.put(place / "corpus", f"seed-{number}", seed)
    spelled = ["".join(map("\\x{:02x}".format, word[:64])) for word in target.words]
    fuzz.put(place, "words.dict", "".join(f'"{word}"\n' for word in spelled).encode())
    folder = place / "work"
    folder.mkdir(exist_ok=True)
    print(f"corpus, and what breaks the reader: {place}", file=sys.stderr)
    limits = [f"-rss_limit_mb={1024 + (fuzz.MEMORY_BYTES >> 20)}", f"-timeout={int(fuzz.SECONDS)}", f"-dict={place / 'words.dict'}"]
    found = f"-artifact_prefix={place}/found-"
    atheris.Setup([sys.argv[0], str(place / "corpus"), found, *limits, *words[1:]], lambda data: fuzz.run(target, data, folder) and None)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
