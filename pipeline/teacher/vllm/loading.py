"""What runs in vLLM's workers while a model is loaded: a measurement of what the checkpoint gave.

One idea: before the weights are read every parameter is filled with one NaN of an odd bit pattern,
and where those bits still are afterwards nothing was written (a NaN of the checkpoint's own has
others, and is found when the model is asked). vLLM's own list of loaded names leaves out every
linear layer, and a fused parameter may be loaded in part; this sees both, whatever the names.
Parameters of quantised layers are left alone: many of them have meaningful defaults. Loaded through
`worker_extension_cls`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from stillroom.cache_schemas.errors import TeacherError
from stillroom.pipeline.teacher.checkpoint import refuse_lacking

PIECE = 1 << 22
"""Elements looked at together; bounds what looking takes beside the model."""
UNWRITTEN = {
    torch.float32: (torch.int32, 0x7FED_ADED),
    torch.bfloat16: (torch.int16, 0x7FED),
    torch.float16: (torch.int16, 0x7FED),
}
"""dtype -> integers of its size, and the bits of a NaN that no arithmetic makes."""


class WorkerExtension:
    """vLLM mixes this into its worker class; importing the module has done the work."""


_their_load_model = BaseModelLoader.load_model


def _load_model(self, vllm_config, model_config, *args, **kwargs):
    """`BaseModelLoader.load_model` of any loader that reads files through `load_weights`."""
    self.load_weights = _measured(self.load_weights)
    return _their_load_model(self, vllm_config, model_config, *args, **kwargs)


def _measured(load_weights: Callable[..., None]) -> Callable[..., None]:
    def measured(model: Any, model_config: Any) -> None:
        marked = dict(_plain_parameters(model))
        for parameter in marked.values():
            kind, bits = UNWRITTEN[parameter.dtype]
            parameter.data.view(kind).fill_(bits)
        load_weights(model, model_config)
        now = dict(model.named_parameters())
        lacking = [name for name in marked if name in now and _is_unwritten(now[name].data)]
        refuse_lacking(lacking, model_config.model, type(model).__name__, TeacherError)

    return measured


def _plain_parameters(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters that only a checkpoint can give a value."""
    for prefix, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None and not type(method).__name__.startswith("Unquantized"):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.dtype in UNWRITTEN and parameter.device.type != "meta":
                yield name, parameter


def _is_unwritten(values: torch.Tensor) -> bool:
    """Whether the bits are still anywhere in a parameter."""
    if values.dtype not in UNWRITTEN:
        return False
    kind, bits = UNWRITTEN[values.dtype]
    return any(bool((piece == bits).any()) for piece in values.view(kind).flatten().split(PIECE))


loader: Any = BaseModelLoader
loader.load_model = _load_model
