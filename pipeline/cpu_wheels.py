"""Lets transformers and vLLM be imported beside a CPU build of torch.

vLLM for CPU asks for torch's CPU build and for any torchvision, torchaudio and torchcodec; what
pip finds for those are CUDA builds, whose compiled operators do not load beside it:
- `import torchvision` dies with "operator torchvision::nms does not exist". Naming its two missing
  operators is enough for the pure-Python transforms, which is all that is used of it here.
- `import torchaudio` dies on libc10_cuda.so, `import torchcodec` on libnvrtc. Nothing here needs
  audio: they are marked as absent, which is how Python says that an installed package must not be
  imported.

One idea: compare build tags, and act only where they disagree; matching builds are left alone.
The operators themselves stay unusable, and calling them says so.
"""

import importlib.abc
import sys
from importlib.metadata import PackageNotFoundError, version

SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def install() -> None:
    """Make mismatched wheels harmless in this process; imports nothing heavy, may be repeated."""
    for audio in ("torchaudio", "torchcodec"):
        if audio not in sys.modules and mismatched(audio):
            sys.modules[audio] = None  # type: ignore[assignment]
    waiting = any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path)
    if not waiting and "torchvision" not in sys.modules and mismatched("torchvision"):
        sys.meta_path.insert(0, _BeforeTorchvision())


def name_operators() -> None:
    """Define the schemas of torchvision's operators that nobody has defined yet."""
    import torch

    for name, schema in SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing itself; runs `name_operators` when torchvision is first looked for."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            name_operators()


def mismatched(package: str) -> bool:
    """Whether torch is a CPU build and the package is not."""
    try:
        return version("torch").endswith("+cpu") and not version(package).endswith("+cpu")
    except PackageNotFoundError:
        return False
