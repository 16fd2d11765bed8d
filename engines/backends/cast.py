"""Mixed precision, cast in torch before export: a U-Net whose products run in half precision and whose delicate parts stay float32.

A runtime that takes precision from the graph (TensorRT 11 knows no other way) then runs what is written there. Convolutions, linear
layers and the two products of attention take half-precision operands, and what they give each other is kept in half precision.
Group norms, softmaxes, time and label embedding and the output convolution compute in float32; x and the output are float32.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.backends.base import Precision
from engines.networks.unet import AttentionBlock, GroupNorm32, UNet

BF16_OPSET = 22  # the first at which ONNX has a convolution in bf16
DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def cast_unet(unet: UNet, precision: Precision) -> UNet:
    """A copy that computes in "bf16" or "fp16" where that is safe; "fp32" is the network itself.

    Weights that half precision cannot hold become infinite: the parity gate is what refuses such a network.
    """
    if precision == "fp32":
        return unet
    cast = copy.deepcopy(unet)
    for part in (cast.input_blocks, cast.middle_block, cast.output_blocks):
        part.to(DTYPES[precision])
    for module in list(cast.modules()):
        if isinstance(module, AttentionBlock):
            module.attend = attend_exactly
        for name, child in module.named_children():
            if isinstance(child, GroupNorm32):
                setattr(module, name, _Norm(child))
    cast.out = nn.Sequential(_ToFloat(), *cast.out)
    return cast


def rounded_unet(unet: UNet, precision: Precision) -> UNet:
    """A float32 copy with the weights of `cast_unet`: what the cast network would give if nothing but its weights were rounded."""
    return cast_unet(unet, precision).float()


def widened(data: bytes) -> bytes:
    """An ONNX file with float32 in place of every half-precision type: `rounded_unet`'s graph, node by node that of the cast file.

    Rounding hides what is small; this file has none, so that what is wrong in the graph shows.
    """
    import onnx
    from onnx import TensorProto, numpy_helper

    half = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    model = onnx.load_model_from_string(data)

    def widen(tensor: Any) -> None:
        if tensor.data_type in half:
            values = numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    for tensor in model.graph.initializer:
        widen(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            assert not attribute.g.node and not attribute.graphs, "no graphs inside graphs"
            widen(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in half:
                attribute.i = TensorProto.FLOAT
    widened_data: bytes = model.SerializeToString(deterministic=True)
    return widened_data


def attend_exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`engines.networks.unet.attend` without a constant that half precision would round: on both sides a power of two, which keeps
    the products in range as well, and what is left of the scale in float32.
    """
    size = q.shape[-1]
    power = 2.0 ** round(-math.log2(size) / 4)
    weights = (((q * power) @ (k * power).mT).float() * (size**-0.5 / power**2)).softmax(dim=-1)  # (B, heads, M, L)
    mixed: Tensor = weights.to(v.dtype) @ v
    return mixed


class _Norm(nn.Module):
    """A group norm in float32 between casts that are written out, so that they are in the graph."""

    def __init__(self, norm: GroupNorm32) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = (nn.Parameter(value.detach().float(), requires_grad=False) for value in (norm.weight, norm.bias))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.groups, self.weight, self.bias, self.eps).to(x.dtype)


class _ToFloat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()
