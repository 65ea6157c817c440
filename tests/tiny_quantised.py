"""Tiny models as quantised checkpoints, written by hand: what published ones have in their files.

One idea: every matrix of a decoder's blocks is rounded to a grid, stored in one of the layouts that
are in use, and written down once more as plain numbers, so that what an engine makes of the layout
can be compared with what the rounded matrices say. No quantising library is needed.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
"""Inputs that share a scale."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Stored = tuple[dict[str, Tensor], Tensor]
"""Tensors of a matrix in the file by the end of their names, and what they stand for."""


def _int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers 0 to 15 [out, in], scales [out, groups], and the matrix that they stand for."""
    groups = weight.unflatten(1, (-1, GROUP))  # [out, groups, GROUP]
    scale = (groups.abs().amax(-1) / 7).half().float()
    number = (groups / scale[..., None]).round().clamp(-8, 7)
    return (number + 8).flatten(1).int(), scale, (number * scale[..., None]).flatten(1)


def _packed(numbers: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """int32 [n, m / 8]: eight numbers in each, the first of `order` lowest."""
    eights = numbers.unflatten(1, (-1, 8))[..., list(order)].long()  # [n, m / 8, 8]
    word = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).int()


def _gptq(weight: Tensor) -> Stored:
    numbers, scale, plain = _int4(weight)
    groups, out = scale.shape[1], scale.shape[0]
    zeros = torch.full((groups, out), 7)  # the layout adds one
    return {
        "qweight": _packed(numbers).T.contiguous(),
        "qzeros": _packed(zeros),
        "scales": scale.T.half().contiguous(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }, plain


def _awq(weight: Tensor) -> Stored:
    numbers, scale, plain = _int4(weight)
    zeros = torch.full((scale.shape[1], scale.shape[0]), 8)
    return {
        "qweight": _packed(numbers.T.contiguous(), AWQ_ORDER),
        "qzeros": _packed(zeros, AWQ_ORDER),
        "scales": scale.T.half().contiguous(),
    }, plain


def _packed_tensors(weight: Tensor) -> Stored:
    numbers, scale, plain = _int4(weight)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": _packed(numbers), "weight_scale": scale, "weight_shape": shape}, plain


def _int8(weight: Tensor) -> Stored:
    scale = weight.abs().amax(1, keepdim=True) / 127
    number = (weight / scale).round()
    return {"weight": number.to(torch.int8), "weight_scale": scale}, number * scale


def _float8(weight: Tensor) -> Stored:
    scale = weight.abs().amax(1, keepdim=True) / 448
    number = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": number, "weight_scale": scale}, number.float() * scale


def _blocks(weight: Tensor) -> Stored:
    """One scale for each block of 128 x 128, which here is the whole matrix or half of it."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scale = torch.empty(rows, columns)
    number = torch.empty_like(weight)
    for row in range(rows):
        for column in range(columns):
            place = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
            scale[row, column] = weight[place].abs().amax() / 448
            number[place] = weight[place] / scale[row, column]
    stored = number.to(torch.float8_e4m3fn)
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    plain = stored.float() * wide[: weight.shape[0], : weight.shape[1]]
    return {"weight": stored, "weight_scale_inv": scale}, plain


def _compressed(form: str, bits: int, kind: str, strategy: str, activations: bool) -> dict:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy}
    weights |= {"dynamic": False, "group_size": GROUP if strategy == "group" else None}
    given = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": "token"}
    scheme = {"targets": ["Linear"], "weights": weights}
    scheme["input_activations"] = given | {"dynamic": True} if activations else None
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme},
    }


LAYOUTS: dict[str, tuple[Callable[[Tensor], Stored], dict]] = {
    "gptq": (
        _gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    ),
    "awq": (
        _awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
    ),
    "fp8": (
        _blocks,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
    "packed": (_packed_tensors, _compressed("pack-quantized", 4, "int", "group", False)),
    "int8": (_int8, _compressed("int-quantized", 8, "int", "channel", True)),
    "float8": (_float8, _compressed("float-quantized", 8, "float", "channel", True)),
}
"""Label -> (how a matrix is stored, `quantization_config`)."""


def save_quantised(source: Path, directory: Path, label: str) -> tuple[Path, Path]:
    """A model's directory in a layout, and the same rounded matrices as a plain model."""
    store, config = LAYOUTS[label]
    made, plain = (Path(shutil.copytree(source, directory / name)) for name in ("model", "plain"))
    stored, rounded = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if ".layers." not in name or not name.endswith("_proj.weight"):
            stored[name] = rounded[name] = weight
            continue
        tensors, rounded[name] = store(weight.float())
        stored |= {f"{name.removesuffix('weight')}{end}": t for end, t in tensors.items()}
    save_file({n: t.contiguous() for n, t in stored.items()}, made / "model.safetensors", PYTORCH)
    save_file({n: t.contiguous() for n, t in rounded.items()}, plain / "model.safetensors", PYTORCH)
    said = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(said | {"quantization_config": config}))
    return made, plain


PYTORCH = {"format": "pt"}
