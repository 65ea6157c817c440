"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) through PEFT.

One idea: adapters go into the model in place, and the head's is part of the matrix that the
objectives read, so that nothing else knows about them; at the end they are merged into plain
weights, or written as the adapter that PEFT knows. Training and loading are elsewhere.
"""

import warnings
from typing import Any
from weakref import WeakSet

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from stillroom.cache_schemas.errors import ConfigError, StudentError, TeacherError, first_line
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.config.training import Lora
from stillroom.pipeline.teacher.reference.head import measured_form

SHAKE = 0.05
"""Standard deviation of what is added to weights to see what they do."""


class AdaptedHead(LoraLinear):
    """A head whose `weight` is the matrix that it multiplies with, adapter included.

    Objectives multiply hidden states with the head's weight themselves. The adapter's dropout,
    which is on hidden states, is not theirs to apply and is left out.
    """

    @property
    def weight(self) -> torch.Tensor:
        """[V, D]."""
        found: Any = self.get_base_layer().weight
        for name in self.active_adapters:
            if name in self.lora_A and not self.merged:
                found = found + self.get_delta_weight(name).to(found.dtype)
        return found


def adapt(model: Any, lora: Lora) -> PeftModel:
    """Put adapters into a model, in place, and freeze the rest of it.

    Raises:
        ConfigError: a target or module that the model does not have; those it has are named.
    """
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    if not isinstance(targets, str):
        _check_names(targets, _adaptable(model), "targets")
    _check_names(lora.modules_to_save, _with_weights(model), "modules_to_save")
    # PEFT takes any number for alpha; its annotation says int.
    alpha: Any = lora.alpha
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=list(lora.modules_to_save) or None,
    )
    try:
        with warnings.catch_warnings():
            # Of adapters on a tied matrix; `merged` unties it, and every export is proved.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            adapted = get_peft_model(model, config)
    except NoMatchingPeftModuleError:  # the names are there, so another key has taken them
        raise ConfigError(
            "every target is inside modules_to_save, which are trained whole",
            expected="a module that is left for adapters",
            where="[train.lora] targets, modules_to_save",
            remedy="Take it out of modules_to_save, or name further targets; to train it whole and "
            "nothing else, leave [train.lora] out and freeze the rest ([train] freeze).",
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"PEFT refuses: {first_line(error)}",
            where="[train.lora]",
            remedy="Name other targets.",
        ) from None
    read_with_adapter(model)
    return adapted


def read_with_adapter(model: Any) -> None:
    """Make the head's weight the matrix that it multiplies with, whoever put an adapter there."""
    head = model.get_output_embeddings()
    if isinstance(head, LoraLinear):
        head.__class__ = AdaptedHead


_SOUND: WeakSet[nn.Module] = WeakSet()
"""Heads that were found to be their weight."""


def check_adapted_head(model: Any) -> None:
    """Refuse adapters that make the head multiply with another matrix than its weight: they would
    neither be trained nor heard. Found by moving every trainable weight and measuring the head,
    once for each head.

    Args:
        model: with adapters in it; its weights are the same afterwards.

    Raises:
        StudentError: naming the head's kind.
    """
    if model.get_output_embeddings() in _SOUND:
        return
    moved = [(one, one.data) for one in model.parameters() if one.requires_grad]
    random = torch.Generator().manual_seed(0)
    try:
        for one, data in moved:  # a graph that waits for its backward pass keeps the old ones
            one.data = data + SHAKE * torch.randn(data.shape, generator=random).to(data)
        measured_form(model)
        _SOUND.add(model.get_output_embeddings())
    except TeacherError as error:
        head = type(model.get_output_embeddings()).__name__
        raise StudentError(
            f"what PEFT has made of the head ({head}) is no matrix that a loss can read: "
            f"{error.found}",
            expected="LoRA without use_dora, lora_bias or trainable_token_indices on the head",
            where=type(model).__name__,
            remedy="Leave the head (and what is tied to it) out of target_modules, or train it "
            "whole with modules_to_save.",
        ) from None
    finally:
        for one, data in moved:
            one.data = data


def merged(adapted: Any) -> Any:
    """The plain model with its adapters added to its weights.

    Where embeddings and head share a matrix and one of them was adapted, they share it no more.
    """
    model = adapted.get_base_model()
    if _adapts_a_tied_matrix(model):
        _untie(model)
    return adapted.merge_and_unload()


def _adapts_a_tied_matrix(model: Any) -> bool:
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    changed = any(isinstance(end, BaseTunerLayer | ModulesToSaveWrapper) for end in ends)
    return changed and bool(_ties(model))


def _ties(model: Any) -> list[Any]:
    """Configs that say that embeddings and head are one matrix."""
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    return [c for c in configs if getattr(c, "tie_word_embeddings", False)]


def _untie(model: Any) -> None:
    head: Any = model.get_output_embeddings()
    if not isinstance(head, ModulesToSaveWrapper):  # that one is a copy already
        plain: Any = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        plain.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
    for config in _ties(model):
        config.tie_word_embeddings = False


def _adaptable(model: Any) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    kinds = nn.Linear | nn.Embedding | Conv1D
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _with_weights(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if list(module.parameters())]


def _check_names(wanted: list[str] | tuple[str, ...], names: list[str], key: str) -> None:
    ends = sorted({name.rsplit(".", 1)[-1] for name in names if name} - set("0123456789"))
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ConfigError(
                f"'{target}' fits no module of the student",
                expected=f"one of {', '.join(ends)}",
                where=f"[train.lora] {key}",
                remedy=nearest(target, ends),
            )
