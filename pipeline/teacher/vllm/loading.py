"""What runs in vLLM's workers while a model is loaded: a measurement of what the checkpoint gave.

One idea: before the weights are read every parameter is filled with NaN, and what is NaN afterwards
was never written. vLLM's own list of loaded names leaves out every linear layer, and a fused
parameter may be loaded in part; this sees both, whatever the names. Parameters of quantised layers
are left alone: many of them have meaningful defaults. Loaded through `worker_extension_cls`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from stillroom.cache_schemas.errors import TeacherError
from stillroom.pipeline.teacher.checkpoint import refuse_lacking

PIECE = 1 << 22
"""Elements looked at together; bounds what looking takes beside the model."""


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
            parameter.data.fill_(torch.nan)
        try:
            load_weights(model, model_config)
        except Exception:
            _check(model, marked, model_config)  # says more than a list of some names
            raise
        _check(model, marked, model_config)

    return measured


def _check(model: Any, marked: dict[str, Any], model_config: Any) -> None:
    now = dict(model.named_parameters())
    lacking = [name for name in marked if name in now and _holds_nan(now[name].data)]
    refuse_lacking(lacking, model_config.model, type(model).__name__, TeacherError)


def _plain_parameters(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters that only a checkpoint can give a value."""
    for prefix, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None and not type(method).__name__.startswith("Unquantized"):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.is_floating_point() and parameter.device.type != "meta":
                yield name, parameter


def _holds_nan(values: torch.Tensor) -> bool:
    return any(bool(piece.isnan().any()) for piece in values.flatten().split(PIECE))


loader: Any = BaseModelLoader
loader.load_model = _load_model
