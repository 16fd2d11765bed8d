"""What `diffrc synth` imports before its first step: a second start takes five seconds at most, and imports are most of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

# 1.9 s of a processor at the time of writing, most of it torch's own import; each of these costs from a tenth to a whole second.
NOT_NEEDED = (
    *("onnxscript", "sklearn", "scipy", "pandas", "pyarrow", "diffusers", "torchvision", "matplotlib", "tensorboard", "wandb"),
    *("torch._dynamo", "torch._inductor", "torch.onnx", "openvino", "tensorrt", "networkx"),
)
SCRIPT = f"""
import json, sys, time
from diffrc_cli.app import main
from engines.diffusion import sampler

real = sampler.sample

def first_step(*arguments, **options):
    found = [name for name in {NOT_NEEDED!r} if name in sys.modules]
    print(json.dumps({{"found": found, "seconds": time.process_time()}}))
    sys.stdout.flush()
    return real(*arguments, **options)

sampler.sample = first_step
main()
"""


def test_the_first_step_comes_before_anything_is_imported_that_sampling_does_not_need(exported_run: Path, tmp_path: Path) -> None:
    words = ("synth", "--run", str(exported_run), "--class", "nine", "--n", "1", "--engine", "onnx", "--out", str(tmp_path / "out"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[0])
    print(f"{told['seconds']:.1f} s of a processor to the first step")
    assert told["found"] == []
