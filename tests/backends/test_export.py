"""The parity gate: what agrees with torch is published, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from engines import store
from engines.backends import export, gate, onnx_file
from engines.backends.base import EngineCard, card_path, example_input, read_engine, relative_error
from engines.backends.ort_engine import OrtEngine
from engines.backends.torch_engine import TorchEngine
from engines.errors import EngineError, NumericsError, ParityError, StorageError

OUTPUT_CONVOLUTION = "unet.out.2.weight"


def test_an_exported_network_gives_torchs_numbers_at_any_batch_and_timestep(exported: Any) -> None:
    engine, reference = OrtEngine.load(exported.path, threads=1), TorchEngine(exported.unet, 50, 8)
    generator = torch.Generator().manual_seed(1)
    for batch in (1, 3, 5, 8):
        x = torch.randn(batch, 1, 8, 8, generator=generator)
        t = torch.randint(0, 50, (batch,), generator=generator)
        y = torch.randint(0, 4, (batch,), generator=generator)
        assert relative_error(engine(x, t, y), reference(x, t, y)) < 1e-5


def test_the_card_tells_what_was_measured_and_belongs_to_the_file(exported: Any) -> None:
    card = read_engine(exported.path).card
    assert card == exported.card
    assert card.file_sha256 == hashlib.sha256(exported.path.read_bytes()).hexdigest()
    assert 0 < card.one_step_error <= exported.settings.one_step_tolerance
    assert card.trajectory_psnr_db >= exported.settings.trajectory_psnr_db
    assert (card.kind, card.opset, card.timesteps, card.classes, card.out_channels) == ("onnx", 20, 50, 4, 2)
    assert {"torch", "onnx", "onnxruntime"} <= set(card.versions)


def test_the_file_is_one_piece_of_standard_operators_with_its_provenance_and_no_path_of_this_machine(exported: Any) -> None:
    data = exported.path.read_bytes()
    model = onnx.load_model_from_string(data)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties == {
        "diffrc.recipe_sha256": "of the recipe",
        "diffrc.weights_sha256": exported.card.weights_sha256,
        "diffrc.timesteps": "50",
    }
    assert str(Path(export.__file__).parent.parent).encode() not in data
    assert str(Path(torch.__file__).parent).encode() not in data
    assert {path.name for path in exported.path.parent.iterdir()} == {"target.onnx", "target.json"}
    (table,) = (tensor for tensor in model.graph.initializer if tuple(tensor.dims) == (50, 64))
    embedded = exported.unet.embed_time(torch.arange(50)).detach().numpy()
    assert np.array_equal(numpy_helper.to_array(table), embedded), "the time embedding is a float32 table"


def _perturb(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return values + (1e-2 * rng.standard_normal(values.shape)).astype(values.dtype)


def _swap_channels(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return values[::-1].copy()


def _double_t(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return values[np.minimum(2 * np.arange(len(values)), len(values) - 1)]


def _shift_by_one(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.roll(values, 1, axis=0)


def _last_row_wrong(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    wrong = values.copy()
    wrong[-1] = wrong[0]
    return wrong


def _not_a_number(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.full_like(values, np.nan)


def altered(data: bytes, of_tensor: Callable[[Any], bool], change: Callable[..., np.ndarray]) -> bytes:
    """The model with one of its weights changed."""
    model = onnx.load_model_from_string(data)
    (tensor,) = (t for t in model.graph.initializer if of_tensor(t))
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor), np.random.default_rng(0)), tensor.name))
    return model.SerializeToString()


WRONG = {
    "weights off by 1e-2": (lambda t: t.name == OUTPUT_CONVOLUTION, _perturb),
    "output channels swapped": (lambda t: t.name == OUTPUT_CONVOLUTION, _swap_channels),
    "t doubled": (lambda t: tuple(t.dims) == (50, 64), _double_t),
    "t off by one": (lambda t: tuple(t.dims) == (50, 64), _shift_by_one),
    "the last t alone wrong": (lambda t: tuple(t.dims) == (50, 64), _last_row_wrong),
    "labels off by one": (lambda t: tuple(t.dims) == (4, 64), _shift_by_one),
    "not a number": (lambda t: t.name == OUTPUT_CONVOLUTION, _not_a_number),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_network_that_disagrees_with_torch_is_not_published(
    wrong: str, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = altered(exported.path.read_bytes(), *WRONG[wrong])
    monkeypatch.setattr(export, "onnx_bytes", lambda *_: bad)
    with pytest.raises(ParityError) as failure:
        export.export_onnx(exported.unet, exported.schedule, tmp_path / "engines" / "target.onnx", exported.settings)
    assert failure.value.exit_code == 6
    assert not any(tmp_path.iterdir())


def test_each_half_of_the_gate_closes_without_the_other(exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One evaluation may agree where a trajectory does not, and the other way round."""
    data = exported.path.read_bytes()
    monkeypatch.setattr(export, "onnx_bytes", lambda *_: data)
    nan = float("nan")
    psnr = [torch.tensor([90.0, value]) for value in (39.9, nan)]
    for check, value in (("one_step_error", 1.0), ("one_step_error", nan), ("psnr_db", psnr[0]), ("psnr_db", psnr[1])):
        with monkeypatch.context() as patch:
            patch.setattr(gate, check, lambda *_, value=value: value)
            with pytest.raises(ParityError, match="nothing was written"):
                export.export_onnx(exported.unet, exported.schedule, tmp_path / "target.onnx", exported.settings)
    assert not any(tmp_path.iterdir())


def test_a_network_that_is_not_finite_is_told_apart_from_a_wrong_export(make_unet: Any, exported: Any, tmp_path: Path) -> None:
    unet = make_unet()
    with torch.no_grad():
        unet.out[2].weight.fill_(float("nan"))
    with pytest.raises(NumericsError):
        export.export_onnx(unet, exported.schedule, tmp_path / "target.onnx", exported.settings)
    assert not any(tmp_path.iterdir())


def test_an_exporter_that_fails_is_an_engine_error_with_its_reason(exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator\nand a page more")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(EngineError, match=r"no such operator$"):
        export.export_onnx(exported.unet, exported.schedule, tmp_path / "target.onnx", exported.settings)


def test_killed_between_the_file_and_its_card_nothing_loads(exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, path = exported.path.read_bytes(), tmp_path / "target.onnx"
    monkeypatch.setattr(export, "onnx_bytes", lambda *_: data)

    def full(*_: object) -> None:
        raise StorageError("disk full", "free some")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_text", full)
        with pytest.raises(StorageError):
            export.export_onnx(exported.unet, exported.schedule, path, exported.settings)
    with pytest.raises(EngineError):
        OrtEngine.load(path)
    export.export_onnx(exported.unet, exported.schedule, path, exported.settings)
    OrtEngine.load(path)


def test_the_psnr_of_a_known_error_is_its_closed_form(exported: Any) -> None:
    class Constant:
        """eps = x / sqrt(1 - abar): predicts x0 = 0 at every t, so that the images are exactly `offset`."""

        def __init__(self, offset: float) -> None:
            self.card: EngineCard = exported.card
            self.offset = offset

        def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            abar = exported.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
            return (x - abar.sqrt() * self.offset) / (1 - abar).sqrt()

    off, black = (gate.trajectory(Constant(offset), exported.schedule, 4) for offset in (0.02, 0.0))
    assert gate.psnr_db(off, black).tolist() == pytest.approx([40.0] * 4, abs=0.01)  # 10 log10(2^2 / 0.02^2)
    assert gate.psnr_db(black, black).tolist() == [gate.MAX_PSNR_DB] * 4


def test_one_evaluation_is_checked_at_small_middle_and_large_t_and_at_batches_one_two_and_the_largest(exported: Any) -> None:
    seen: list[tuple[int, int]] = []

    class Spy:
        card = exported.card

        def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            seen.append((len(x), int(t[0])))
            return x

    assert gate.one_step_error(Spy(), Spy()) == 0
    assert set(seen) == {(batch, t) for batch in (1, 2, 8) for t in (0, 25, 49)}


def test_the_exporter_says_nothing_on_the_terminal_and_restores_logging(capfd: pytest.CaptureFixture[str]) -> None:
    import logging
    import warnings

    with onnx_file.quiet():
        print("obtaining the graph")
        warnings.warn("for developers", stacklevel=1)
        logging.getLogger("torch.onnx").warning("torchvision is not installed")
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET


def test_example_inputs_are_fixed_and_within_the_contract(exported: Any) -> None:
    first, again = example_input(exported.card, 8, 49), example_input(exported.card, 8, 49)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert int(first[1][0]) == 49
    assert int(first[1].max()) < 50


def test_a_run_exports_once_and_again_only_when_something_changed(
    exported_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import shutil

    path = tmp_path / "run"
    shutil.copytree(exported_run, path)
    monkeypatch.setattr(export, "export_onnx", lambda *_: pytest.fail("exported again"))
    run = store.open_run(path)
    (card,) = export.export_run(run)
    assert card == read_engine(export.onnx_path(run, run.recipe.synth.model)).card

    def made_anew(*_: object) -> EngineCard:
        raise EngineError("made anew", "")

    monkeypatch.setattr(export, "export_onnx", made_anew)
    with pytest.raises(EngineError, match="made anew"):
        export.export_run(store.open_run(path, ("export.opset=21",)))
    card_path(export.onnx_path(run, run.recipe.synth.model)).unlink()
    with pytest.raises(EngineError, match="made anew"):
        export.export_run(run)


def test_an_unconditional_network_exports_too(make_unet: Any, exported: Any, tmp_path: Path) -> None:
    card = export.export_onnx(make_unet(classes=0), exported.schedule, tmp_path / "target.onnx", exported.settings)
    assert card.classes == 0
    assert [value.name for value in onnx.load(tmp_path / "target.onnx").graph.input] == ["x", "t"]
