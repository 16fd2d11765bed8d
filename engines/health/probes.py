"""What is tried in processes of its own, where a library that hangs or crashes takes nobody with it: each runtime really opened.

A probe imports its library alone, runs a model of one node with it, and prints its findings as one line of JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engines.errors import DiffRCError, first_line
from engines.health.findings import Finding

ABI_WORDS = (
    "numpy.dtype size changed",
    "_ARRAY_API not found",
    "compiled using NumPy 1.x",
    "Numpy is not available",
    "numpy.core.multiarray",
)
ABI_REMEDY = "pip install --force-reinstall {name} numpy, so that both are of one kind"
IMPORTED = {"numpy": "numpy", "pillow": "PIL.Image", "pyarrow": "pyarrow", "safetensors": "safetensors", "onnx": "onnx.checker"}
PRESENT = {"scikit-learn": "sklearn", "onnxscript": "onnxscript", "rich": "rich"}  # required as well; importing them takes seconds

Result = dict[str, Any]  # "findings": list of findings; "versions": by name


class Probed:
    """What a probe gathers."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.versions: dict[str, str] = {}

    def add(self, check: str, severity: Any, text: str, remedy: str = "") -> None:
        """One more finding."""
        self.findings.append(Finding(check, severity, text, remedy))

    def failed(self, check: str, severity: Any, error: BaseException, remedy: str, doing: str = "") -> None:
        """A finding of what was raised; that NumPy is of another kind than a library was built for is told as such."""
        reason = " ".join(str(error).split()) if any(words in str(error) for words in ABI_WORDS) else first_line(error)
        if any(words in str(error) for words in ABI_WORDS):
            self.add("numpy", "error", f"{check} and NumPy do not fit together: {reason[:200]}", ABI_REMEDY.format(name=check))
        else:
            self.add(check, severity, f"{doing or 'cannot be imported'}: {reason}", remedy)


def probe_packages(probed: Probed) -> None:
    """What every command needs beside torch: imported; NumPy's arrays handed to a library that was built against it."""
    for name, module in IMPORTED.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a broken installation raises
            probed.failed(name, "error", error, f"pip install --force-reinstall {name}")
    for name, module in PRESENT.items():
        if importlib.util.find_spec(module) is None:
            probed.add(name, "error", "is not installed", f"pip install {name}")
    if probed.findings:
        return
    import numpy as np
    import pyarrow as pa

    try:
        assert pa.array(np.arange(3)).to_numpy().sum() == 3
    except Exception as error:
        probed.failed("pyarrow", "error", error, "pip install --force-reinstall pyarrow", "cannot read NumPy's arrays")
        return
    probed.add("packages", "ok", f"{', '.join((*IMPORTED, *PRESENT))} are here")


def probe_torch(probed: Probed) -> None:
    """PyTorch: a product and a NumPy array on the CPU, an addition on every GPU; the CUDA it was built for."""
    import importlib

    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        probed.failed("torch", "error", error, 'pip install --force-reinstall torch, as "Get started" of pytorch.org says for this system')
        return
    probed.versions["torch"] = str(torch.__version__)
    try:
        import numpy as np

        assert float(torch.from_numpy(np.ones(2, dtype=np.float32)) @ torch.ones(2)) == 2.0
    except Exception as error:
        probed.failed("torch", "error", error, "pip install --force-reinstall torch numpy", "cannot compute on the CPU")
        return
    threads = torch.get_num_threads()
    built = torch.version.cuda
    probed.versions["CUDA of torch"] = str(built or "none")
    probed.add("torch", "ok", f"{torch.__version__} computes on the CPU with {threads} {'thread' if threads == 1 else 'threads'}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if built and torch.cuda.is_available() else 0
    if built and not count:
        reason = first_line(said[0].message) if said and isinstance(said[0].message, Warning) else "it finds none"
        probed.add("torch", "warning", f"is built for CUDA {built} and cannot use a GPU: {reason[:300]}", NO_GPU)
    for index in range(count):
        name = torch.cuda.get_device_name(index)
        try:
            assert float((torch.ones(1, device=f"cuda:{index}") + 1).cpu()) == 2.0
        except Exception as error:  # "no kernel image", out of memory, a lost GPU
            remedy = "nvidia-smi shows its state; a torch built for this GPU is on pytorch.org"
            probed.failed("torch", "error", error, remedy, f"cannot compute on GPU {index}, {name}")
            continue
        free, total = (value / 2**30 for value in torch.cuda.mem_get_info(index))
        probed.add("torch", "ok", f"computes on GPU {index}, {name} (CUDA {built}, {free:.0f} of {total:.0f} GiB free)")


NO_GPU = "nvidia-smi shows whether the driver works; without a GPU, --device cpu says so and torch's CPU wheel is a tenth of the size"


WITHOUT_GPU = 'pip uninstall onnxruntime-gpu, then pip install "diffrc[cpu]": there is no GPU here'


def probe_onnxruntime(probed: Probed, gpu_here: bool | None = None) -> None:
    """ONNX Runtime on the CPU, and each GPU provider that it lists, really started.

    Args:
        gpu_here: whether the system has an NVIDIA GPU; None = ask it.
    """
    from engines.backends.runtimes import OUTPUT, one_node_model

    try:
        runtime = importlib.import_module("onnxruntime")
    except Exception as error:
        probed.failed("onnxruntime", "error", error, 'pip install "diffrc[cpu]"; on a CUDA machine "diffrc[gpu]"')
        return
    probed.versions["onnxruntime"] = str(getattr(runtime, "__version__", "unknown"))
    listed = list(runtime.get_available_providers())
    try:
        import numpy as np

        session = runtime.InferenceSession(one_node_model(), runtime.SessionOptions(), providers=["CPUExecutionProvider"])
        assert float(session.run([OUTPUT], {"x": np.ones(1, dtype=np.float32)})[0][0]) == 2.0
        probed.add("onnxruntime", "ok", f"{probed.versions['onnxruntime']} runs on CPUExecutionProvider")
    except Exception as error:
        probed.failed("onnxruntime", "error", error, 'pip install --force-reinstall "diffrc[cpu]"', "cannot run on CPUExecutionProvider")
        return
    here = has_gpu() if gpu_here is None else gpu_here
    if "CUDAExecutionProvider" not in listed:
        if here:
            remedy = 'pip uninstall onnxruntime, then pip install "diffrc[gpu]"'
            probed.add("onnxruntime", "warning", "there is an NVIDIA GPU, and this build has no CUDAExecutionProvider", remedy)
        return
    from engines.backends import ort_engine  # brings torch, whose CUDA libraries the provider needs

    for provider in (ort_engine.CUDA, ort_engine.TENSORRT):
        if provider not in listed:
            continue
        try:
            ort_engine.require_runtime(provider)
            probed.add("onnxruntime", "ok", f"runs on {provider}")
        except DiffRCError as error:
            grave = ("error" if here else "warning") if provider == ort_engine.CUDA else "note"  # nothing here asks for the other
            remedy = (
                error.remedy if here or provider != ort_engine.CUDA else 'without a GPU: pip uninstall onnxruntime-gpu, then "diffrc[cpu]"'
            )
            probed.add("onnxruntime", grave, error.problem, remedy)


def probe_openvino(probed: Probed) -> None:
    """OpenVINO on the CPU, and whether it has bf16 there."""
    from engines.backends.runtimes import one_node_model

    if importlib.util.find_spec("openvino") is None:
        probed.add("openvino", "note", "is not installed", 'pip install "diffrc[openvino]", on most CPUs the fastest engine')
        return
    from engines.backends.runtimes import import_openvino

    remedy = 'pip install --force-reinstall openvino; "diffrc export --engine onnx" runs without it'
    try:
        openvino = import_openvino()
        import numpy as np

        probed.versions["openvino"] = str(openvino.__version__)
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(one_node_model(), b""), "CPU")
        assert float(next(iter(compiled(np.ones((1,), dtype=np.float32)).values()))[0]) == 2.0
        able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except Exception as error:
        probed.failed("openvino", "warning", error, remedy, "cannot run on the CPU")
        return
    bf16 = "fp32 and bf16" if "BF16" in able else "fp32; this CPU has no bf16"
    probed.add("openvino", "ok", f"{probed.versions['openvino'].partition('-')[0]} runs on the CPU in {bf16}")


def probe_tensorrt(probed: Probed, gpu_here: bool | None = None) -> None:
    """TensorRT: imported, and a plan of one node built, where it is installed."""
    here = has_gpu() if gpu_here is None else gpu_here
    if importlib.util.find_spec("tensorrt") is None:
        if here:
            probed.add("tensorrt", "note", "is not installed", 'pip install "diffrc[tensorrt]", on most NVIDIA GPUs the fastest engine')
        else:
            probed.add("tensorrt", "note", "is not installed, and needs an NVIDIA GPU", "nothing to do without one")
        return
    from engines.backends import trt_engine
    from engines.backends.runtimes import one_node_model

    try:
        trt = trt_engine.require_tensorrt()
        probed.versions["tensorrt"] = str(trt.__version__)
        trt_engine.CudaDevice()
        log = trt_engine._logger(trt)
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse(one_node_model()) or builder.build_serialized_network(network, builder.create_builder_config()) is None:
            raise RuntimeError(f"it cannot build a plan of one node: {log.last()}")
    except DiffRCError as error:
        probed.add("tensorrt", "warning" if here else "note", error.problem, error.remedy)
        return
    except Exception as error:
        probed.failed("tensorrt", "warning", error, trt_engine.INSTALL, "does not run")
        return
    probed.add("tensorrt", "ok", f"{trt.__version__} builds plans on {trt_engine.CudaDevice().gpu.name}")


def probe_driver(probed: Probed) -> None:
    """The NVIDIA driver, by the management library that comes with it, which knows GPUs before any CUDA is installed."""
    if not has_gpu():
        probed.versions["driver"] = "none"
        probed.add("driver", "note", "there is no NVIDIA GPU, or no driver of one", "nothing to do: everything runs on a CPU, slower")
        return
    remedy = "nvidia-smi tells more; a GPU that is lost needs the machine to restart"
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        failed = library.nvmlInit_v2()
        if failed:
            probed.add("driver", "error", f"the NVIDIA driver does not answer (NVML code {failed})", remedy)
            return
        count, version, cuda = ctypes.c_uint(), ctypes.create_string_buffer(96), ctypes.c_int()
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        library.nvmlSystemGetDriverVersion(version, len(version))
        library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
        library.nvmlShutdown()
    except (OSError, AttributeError) as error:
        probed.add("driver", "warning", f"its version cannot be read: {error}", "install the driver's libnvidia-ml")
        return
    told = version.value.decode("ascii", "replace")
    probed.versions |= {"driver": told, "CUDA of the driver": f"{cuda.value // 1000}.{cuda.value % 1000 // 10}"}
    gpus = "1 GPU" if count.value == 1 else f"{count.value} GPUs"
    probed.add("driver", "ok", f"NVIDIA {told} with {gpus}, up to CUDA {probed.versions['CUDA of the driver']}")


def has_gpu() -> bool:
    """Whether the system shows an NVIDIA GPU: its device file, the driver's own, or WSL's. No library is loaded."""
    return any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/dxg")) or any(Path("/dev").glob("nvidia[0-9]*"))


PROBES: dict[str, Callable[[Probed], None]] = {  # in the order in which findings are told
    "packages": probe_packages,
    "torch": probe_torch,
    "onnxruntime": probe_onnxruntime,
    "openvino": probe_openvino,
    "tensorrt": probe_tensorrt,
    "driver": probe_driver,
}


def probe(name: str) -> Result:
    """The findings and versions of one probe, as plain JSON values."""
    probed = Probed()
    PROBES[name](probed)
    return {"findings": [list(found) for found in probed.findings], "versions": probed.versions}


def main() -> None:
    """What a process of its own does: `probe` the name it is given, and print one line. What libraries print goes to stderr."""
    with _own_stdout() as outlet:
        result = probe(sys.argv[1])
        os.write(outlet, json.dumps(result).encode() + b"\n")
    os._exit(0)  # what a library does when it is taken down is nobody's concern here, and may crash


@contextlib.contextmanager
def _own_stdout() -> Iterator[int]:
    """A descriptor of stdout that no library knows; theirs is stderr."""
    outlet = os.dup(1)
    os.dup2(2, 1)
    yield outlet
