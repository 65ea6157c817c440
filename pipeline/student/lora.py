"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) through PEFT.

One idea: adapters go into the model in place and are merged into plain weights at export, so that
nothing else knows about them.
"""

from collections.abc import Callable
from typing import Any

from stillroom.pipeline.config.training import Lora


def adapt(model: Any, lora: Lora | None) -> Callable[[], Any]:
    """Put adapters into a model, in place, and freeze the rest of it.

    Returns:
        A function that merges them and gives the plain model; without `lora` the model as it is.
    """
    if lora is None:
        return lambda: model
    from peft import LoraConfig, get_peft_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    # PEFT takes any number for alpha; its annotation says int.
    alpha: Any = lora.alpha
    config = LoraConfig(
        r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=targets
    )
    return get_peft_model(model, config).merge_and_unload
