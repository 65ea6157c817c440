"""Whether a trainer and its settings lead to a right loss, found before the first step.

One idea: a setting that a trainer would take and not follow, a way of sharing a batch that would
count it wrongly and a version that hands over less are each refused by name, with what to set.
"""

import inspect
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from stillroom.cache_schemas.errors import ConfigError

LEAST = {"transformers": (5, 16), "trl": (1, 16)}
"""Versions before which the losses were not compared with those of `stillroom train`."""

TRIED = "transformers 5.16 to 5.24 and TRL 1.16"


UNASKED = ("compute_loss", "prediction_step", "get_eval_dataloader")
"""Methods that a cache answers by itself, without asking the trainer behind it."""


def check_trainer(kind: Any, mixed: type) -> None:
    """Refuse a version of a trainer that does not hand over what a right loss needs.

    Args:
        kind: class of the trainer.
        mixed: what stands before the host trainer among its ancestors.

    Raises:
        ConfigError: naming what it lacks, or has and would never be asked for.
    """
    _check_heard(kind, mixed)
    from transformers import Trainer

    for name in {one.__module__.partition(".")[0] for one in kind.__mro__} & LEAST.keys():
        _check_version(name)
    wanted = {
        "compute_loss": "num_items_in_batch",
        "get_batch_samples": "num_batches",
        "training_step": "num_items_in_batch",
        "evaluation_loop": "metric_key_prefix",
        "prediction_step": "prediction_loss_only",
        "_save": "state_dict",
        "_load_from_checkpoint": "resume_from_checkpoint",
    }
    lacks = [
        f"{name}(..., {argument})"
        for name, argument in wanted.items()
        if argument not in inspect.signature(getattr(Trainer, name, check_trainer)).parameters
    ]
    if lacks or not issubclass(kind, Trainer):
        import transformers

        raise ConfigError(
            f"this trainer has no {lacks[0] if lacks else 'transformers.Trainer in it'}",
            expected=TRIED,
            where=f"transformers {transformers.__version__}",
            remedy="Install a version that was tried: pip install 'stillroom[hf]'.",
        )


def _check_heard(kind: Any, mixed: type) -> None:
    """Refuse a trainer with methods of its own that would be passed over in silence."""
    behind = kind.__mro__[kind.__mro__.index(mixed) + 1 :]
    own = [one for one in behind if one.__module__.partition(".")[0] not in LEAST]
    for one in own:
        for name in (n for n in UNASKED if n in vars(one) and n not in kind.unasked):
            raise ConfigError(
                f"{one.__name__} has a {name} of its own, which a cache would never ask",
                where=kind.__name__,
                remedy="Name what is to be learned in objectives and what is to be measured in "
                f"eval_cache, and leave {name} out; or set unasked = ('{name}',) in "
                f"{kind.__name__}, where nothing of it is missed.",
            )


def _check_version(name: str) -> None:
    found, least = version(name), LEAST[name]
    numbers = [int("".join(c for c in part if c.isdigit()) or 0) for part in found.split(".")[:2]]
    if tuple(numbers) < least:
        raise ConfigError(
            f"{name} {found}",
            expected=f"{name} {'.'.join(map(str, least))} or later ({TRIED} were tried)",
            where="the trainer",
            remedy="pip install 'stillroom[hf]'.",
        )


def keep_loss_whole(trainer: Any) -> None:
    """Have a trainer take the loss as it comes, undivided by accumulation steps.

    The mixin says so by `loss_is_scaled_for_ga`, which transformers before 5.19 do not read: they
    leave alone what a `compute_loss_func` gave, and ours is in the place of one.
    """
    from transformers import Trainer

    if not hasattr(Trainer, "loss_is_scaled_for_ga"):
        trainer.compute_loss_func = trainer.compute_loss


OURS = {
    "data_collator": "The collator is the cache's.",
    "eval_dataset": "Name the held-out cache as eval_cache.",
    "compute_loss_func": "Name what is to be learned in objectives.",
    "compute_metrics": "There are no logits to measure; use `stillroom evaluate`.",
    "preprocess_logits_for_metrics": "There are no logits to measure; use `stillroom evaluate`.",
    "formatting_func": "The tokens are the cache's.",
    "model_init": "Give the model itself: it is measured before the first step.",
}
"""Arguments of trainers that a cache leaves no room for, and what to do instead."""

UNHEARD = {
    "label_smoothing_factor": (0, 0.0, None),
    "torch_compile": (False, None),
    "deepspeed": (None, ""),
    "loss_type": (None, "nll", "chunked_nll"),
    "packing": (None, False),
    "padding_free": (None, False),
    "eval_packing": (None, False),
    "completion_only_loss": (None,),
    "assistant_only_loss": (None, False),
    "sample_packing": (None, False),
}
"""Settings that would change nothing or go wrong, and the values that ask for nothing."""

MASKED = (
    "Leave it out: learned are the tokens under the cache's loss mask; an objective's mask = 'all' "
    "takes every row that the cache holds."
)
INSTEAD = {
    "label_smoothing_factor": "Leave it out: the teacher's own distribution is what is learned.",
    "torch_compile": "Compile the blocks before: `for block in model.model.layers: "
    "block.compile()`.",
    "deepspeed": "Use DDP or FSDP.",
    "loss_type": "Leave it out: objectives say what is learned.",
    "packing": "Leave it out: the collator packs where the student keeps examples apart.",
    "padding_free": "Leave it out: the collator lays rows end to end where attention allows it.",
    "eval_packing": "Leave it out: the collator packs where the student keeps examples apart.",
    "completion_only_loss": MASKED,
    "assistant_only_loss": MASKED,
    "sample_packing": "Set it false: the collator packs where the student keeps examples apart.",
}


def check_arguments(args: Any, more: Mapping[str, Any], trainer: Any = None) -> None:
    """Refuse settings that a trainer would take and not follow.

    Args:
        args: the trainer's arguments; None for its defaults.
        more: what else the trainer was given.
        trainer: the same once it is made; None before.

    Raises:
        ConfigError: naming the setting and what to do instead.
    """
    for name, remedy in OURS.items():
        if more.get(name) is not None:
            raise ConfigError(f"{name} beside a cache", where="the trainer", remedy=remedy)
    for name, nothing in UNHEARD.items():
        if getattr(args, name, nothing[0]) not in nothing:
            raise ConfigError(
                f"{name} = {getattr(args, name)!r}",
                where="the trainer's arguments",
                remedy=INSTEAD[name],
            )
    if trainer is not None:
        _check_ranks(trainer)


def check_evaluated(args: Any, held_out: Mapping[str, Any]) -> None:
    """Refuse an evaluation of nothing.

    Raises:
        ConfigError: naming what to give.
    """
    asked = getattr(args, "eval_strategy", "no")
    if not held_out and getattr(asked, "value", asked) != "no":
        raise ConfigError(
            f"eval_strategy = {getattr(asked, 'value', asked)!r} without a held-out cache",
            where="the trainer's arguments",
            remedy="Give eval_cache, or leave eval_strategy out.",
        )


def _check_ranks(trainer: Any) -> None:
    """Refuse ways of sharing a batch that would count it wrongly."""
    told = getattr(trainer.accelerator, "parallelism_config", None)
    shared = [n for n in ("tp", "cp", "sp") if told is not None and getattr(told, f"{n}_size") > 1]
    if trainer.args.n_gpu > 1 or trainer.is_deepspeed_enabled or shared:
        found = f"{shared[0]}_size above 1" if shared else "nn.DataParallel or DeepSpeed"
        raise ConfigError(
            found,
            expected="DDP or FSDP, a process for each device",
            where="the trainer",
            remedy="Start with accelerate launch or torchrun, or make one device visible.",
        )
    if trainer.accelerator.num_processes > 1 and trainer.accelerator.dispatch_batches:
        raise ConfigError(
            "dispatch_batches with several ranks",
            expected="batches that each rank makes for itself",
            where="accelerator_config",
            remedy="Leave dispatch_batches out: teacher's answers are no part of what it sends.",
        )
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ConfigError(
            "FSDP of version 1",
            expected="FSDP2",
            where="the trainer",
            remedy="Set fsdp_config = {'version': 2} in the arguments, or fsdp_version: 2 in "
            "accelerate's file.",
        )


def check_whole(head: Any) -> None:
    """Refuse a head that another wrapper than the whole model's has sharded.

    Args:
        head: its matrix, as it is inside the forward pass of what wraps the student.

    Raises:
        ConfigError: only a part of it is here.
    """
    if hasattr(head, "full_tensor"):
        raise ConfigError(
            "FSDP shards the LM head apart from the model",
            where="the trainer",
            remedy="Set fsdp_config's auto_wrap_policy = 'TRANSFORMER_BASED_WRAP' with the blocks "
            "alone as transformer_layer_cls_to_wrap.",
        )
