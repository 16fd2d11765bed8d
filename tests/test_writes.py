"""Every write of a file goes through engines/store.py, whose writes survive a kill."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STORE = ROOT / "engines" / "store.py"
FILES = sorted(path for package in ("diffrc_cli", "engines") for path in (ROOT / package).rglob("*.py") if path != STORE)
WRITERS = {
    "write_text",
    "write_bytes",
    "touch",
    "tofile",
    "savez",
    "savez_compressed",
    "save_file",
    "dump",
    "symlink_to",
    "hardlink_to",
} | {
    "rename",
    "rmtree",
    "copyfile",
    "copytree",
    "write_table",
    "imsave",
    "savefig",
    "save_model",
}
FUNCTIONS = {"save_file", "rmtree", "copyfile", "copytree"}  # writers that are imported by their bare name


def writes(source: str) -> list[str]:
    """`line: call` for every call that writes or renames a file, or removes a folder, without the store."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [f"{call.lineno}: {ast.unparse(call)[:80]}" for call in calls if is_write(call)]


def is_write(call: ast.Call) -> bool:
    target = call.func
    name = target.attr if isinstance(target, ast.Attribute) else target.id if isinstance(target, ast.Name) else ""
    owner = ast.unparse(target.value) if isinstance(target, ast.Attribute) else ""
    if owner == "store":
        return False
    if name == "open" and owner == "os":
        flags = ast.unparse(call.args[1])
        return any(flag in flags for flag in ("O_WRONLY", "O_RDWR", "O_CREAT")) and ast.unparse(call.args[0]) != "os.devnull"
    if name in ("open", "fdopen", "ZipFile"):
        if owner[:1].isupper() and owner != "Path":  # a class's own `open`
            return False
        # The mode is the second argument of open(file, mode), the first of path.open(mode).
        position = 0 if name == "open" and owner and owner not in ("io", "tarfile", "gzip", "bz2", "lzma", "codecs") else 1
        given = next((k.value for k in call.keywords if k.arg == "mode"), call.args[position] if len(call.args) > position else None)
        return given is not None and not (
            isinstance(given, ast.Constant) and isinstance(given.value, str) and not set(given.value) & set("wax+")
        )
    if name in ("save", "ParquetWriter"):  # an image or a table may be encoded to memory
        return not (call.args and ast.unparse(call.args[0]) in ("buffer", "stream"))
    return name in WRITERS and bool(owner or name in FUNCTIONS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_but_the_store_writes_files(path: Path) -> None:
    assert writes(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "open('x', 'w')",
        "open('x', mode='ab')",
        "open('x', mode)",
        "path.open('r+')",
        "path.write_text('x')",
        "(a / b).write_bytes(b'')",
        "image.save(path)",
        "np.savez(path, a=a)",
        "json.dump(x, file)",
        "os.open(path, os.O_CREAT)",
        "os.rename(a, b)",
        "shutil.rmtree(a)",
        "zipfile.ZipFile(path, 'w')",
        "pq.ParquetWriter(path, schema)",
    ],
)
def test_a_write_of_any_kind_is_found(line: str) -> None:
    assert writes(line)


@pytest.mark.parametrize(
    "line",
    ["open('x')", "open('x', 'rb')", "path.open()", "path.open('rb')", "tarfile.open(fileobj=f, mode='r|')", "store.write_text(p, t)"],
)
def test_reading_is_no_write(line: str) -> None:
    assert writes(line) == []
