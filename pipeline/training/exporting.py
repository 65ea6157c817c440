"""The trained student's way out, and the proof that it is what was trained.

One idea: one batch of held-out text is measured twice, with the student as it is in training and
with the directory that plain transformers loads again; the two losses agree, or nothing is put in
place. A student with adapters rehearses this before its first step, when a refusal costs nothing.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillroom.cache_schemas.errors import ConfigError, StudentError
from stillroom.cache_schemas.extras import extra_package
from stillroom.pipeline.config.training import Lora, Train
from stillroom.pipeline.data.batch import DistillBatch
from stillroom.pipeline.objectives.combine import Distiller
from stillroom.pipeline.objectives.weighting import Term
from stillroom.pipeline.student.loading import load
from stillroom.pipeline.student.sameness import check_saved, expected_of
from stillroom.pipeline.student.saving import export

TOLERANCE = 1e-5
"""Largest difference of the two losses, or share of a loss above 1: fp32 sums in another order."""
MODEL = "model."
"""What the distiller puts before the names of the student's weights."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What an export is checked on.

    Attributes:
        batches: of held-out text, or of training text where there is none.
        terms: the objectives with the facts of the caches that the batches are of.
    """

    batches: Sequence[DistillBatch]
    terms: Sequence[Term]


@dataclass(frozen=True, slots=True)
class Losses:
    """The run's objectives on one batch, weighted and added up, three times.

    Attributes:
        in_training: of the student as it was trained.
        saved: of its weights as they are written, in memory: adapters merged, values rounded.
        reloaded: of the directory, loaded by transformers.
    """

    in_training: float
    saved: float
    reloaded: float


def adapted(model: Any, settings: Train) -> Any:
    """The model as it is trained: with adapters where `[train.lora]` is set.

    Raises:
        ConfigError: PEFT is not installed, or a target does not exist.
    """
    if settings.lora is None:
        return model
    extra_package("peft", "lora", "[train.lora]")
    from stillroom.pipeline.student.lora import adapt

    return adapt(model, settings.lora)


def form_of(settings: Train) -> dict[str, str]:
    """What an export is beside its weights' values, for a receipt."""
    form = settings.lora.export if settings.lora else "merged"
    return {"form": form, "dtype": settings.export_dtype}


def rehearse(initial: Path, settings: Train) -> None:
    """Write a student with random adapters, load it again, and compare; for `[train.lora]`.

    Raises:
        ConfigError: what would be written would not be what was trained.
    """
    if settings.lora is None:
        return
    model = load(initial)
    wrapped = adapted(model, settings)
    _shake(model)
    trial = initial.with_name("student-rehearsal")
    try:
        expected = expected_of(model)
        leaving = _leaving(wrapped, settings, initial)
        export(leaving, trial, initial, {}, check=lambda saved: check_saved(saved, expected))
    except StudentError as error:
        raise ConfigError(
            f"adapters on these targets cannot be exported as '{settings.lora.export}': "
            f"{error.found}",
            where="[train.lora]",
            remedy=_way_out(settings.lora),
        ) from None
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _way_out(lora: Lora) -> str:
    if lora.export == "adapter":
        return "Set export = 'merged'."
    if lora.targets != "all-linear" or lora.modules_to_save:
        return "Set targets = 'all-linear' and no modules_to_save."
    return "Name the targets, such as targets = ['q_proj', 'v_proj']; some layer is no plain one."


@dataclass
class Export:
    """One trained student on its way out, in one process.

    Attributes:
        initial: HF directory that training began from.
        settings: the [train] table.
        weights: trained weights by their name in the distiller, whole.
        make: puts a model into a distiller of this run.
        proof: what the losses are measured on.
        device: where batches are measured.
    """

    initial: Path
    settings: Train
    weights: Mapping[str, torch.Tensor]
    make: Callable[[Any], Distiller]
    proof: Proof
    device: torch.device

    def write(self, directory: Path, facts: dict, live: Distiller | None) -> Losses:
        """Export the student and check it.

        Args:
            directory: where it goes.
            facts: for the directory's receipt.
            live: the distiller that was trained; None where it does not hold `weights` as they are
                (shards, averages), and one that is made anew is measured in its place.

        Raises:
            StudentError: what is written does not give the loss that training gives.
        """
        model = load(self.initial, self.settings.attention)
        wrapped = adapted(model, self.settings)
        self._fill(model, MODEL)
        in_training = self._loss(live) if live else self._loss_of(model)
        leaving = _leaving(wrapped, self.settings, self.initial)
        saved = self._as_written(leaving, in_training)
        reloaded: list[float] = []

        def check(written: Path) -> None:
            reloaded.append(self._loss_of(load(written, self.settings.attention)))
            self._agree("the student, loaded again by transformers,", saved, reloaded[0])

        export(leaving, directory, self.initial, facts, self._task_tokens(leaving), check)
        return Losses(in_training, saved, reloaded[0])

    def _as_written(self, leaving: Any, in_training: float) -> float:
        """Loss of what leaves, after its weights were given the type that they are written in."""
        plain, dtype = _plain(leaving), getattr(torch, self.settings.export_dtype)
        self._agree(
            "the student in the form that it is written in", in_training, self._loss_of(plain)
        )
        _round(leaving, dtype)
        _check_range(leaving, self.settings.export_dtype)
        saved = self._loss_of(plain)
        _narrow(leaving, dtype)
        return saved

    def _distiller(self, model: Any) -> Distiller:
        made = self.make(model).to(self.device)
        self._fill(made, "")
        return made

    def _loss_of(self, model: Any) -> float:
        """Of a model that is on the device only for as long as it is measured."""
        loss = self._loss(self._distiller(model))
        model.to("cpu")
        return loss

    def _task_tokens(self, leaving: Any) -> torch.Tensor | None:
        found = self._distiller(_plain(leaving)).task_tokens.embeddings()
        leaving.to("cpu")
        return None if found is None else found.detach().cpu()

    @torch.no_grad()
    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Put trained weights where they belong; those of the student only under its prefix."""
        named = dict(module.named_parameters())
        for name, tensor in self.weights.items():
            if name.startswith(MODEL) == bool(prefix):
                named[name.removeprefix(prefix)].copy_(tensor)

    @torch.no_grad()
    def _loss(self, distiller: Distiller) -> float:
        distiller.eval()
        sums = []
        # The main process exports; the other ranks wait.
        with (
            distiller.judged_by(self.proof.terms, alone=True),
            _arithmetic(self.device, self.settings),
        ):
            for batch in self.proof.batches:
                weights, totals = distiller.weigh(batch, 1.0)
                values = distiller(batch.to(self.device), weights)
                sums.append(torch.stack([values.double().cpu(), totals]))
        values, totals = torch.stack(sums).sum(dim=0)
        means = (values / totals.clamp_min(1e-30)).tolist()
        return sum(term.weight(1.0) * mean for term, mean in zip(self.proof.terms, means))

    def _agree(self, what: str, wanted: float, found: float) -> None:
        if abs(found - wanted) <= TOLERANCE * max(1.0, abs(wanted)):
            return
        raise StudentError(
            f"{what} has a loss of {found:.6f} on a batch of held-out text",
            expected=f"{wanted:.6f}, as in training",
            where=str(self.initial.parent),
            remedy="Nothing was put in place and the last checkpoint is kept; this is a fault of "
            "stillroom or of transformers with this architecture, so please report it.",
        )


def _check_range(leaving: Any, dtype: str) -> None:
    """Refuse weights that are not numbers any more in the type that they are written in."""
    for name, weight in _written(leaving):
        if not weight.isfinite().all():
            raise StudentError(
                f"{name} has values that {dtype} cannot hold",
                expected=f"at most {torch.finfo(getattr(torch, dtype)).max:g}",
                where="[train] export_dtype",
                remedy="Set export_dtype = 'bfloat16' (or 'float32') and run the same command "
                "again; nothing is trained anew.",
            )


def _arithmetic(device: torch.device, settings: Train) -> Any:
    """fp32; flash attention has none and keeps what it was trained in."""
    if not settings.attention.startswith("flash_attention") or settings.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _leaving(wrapped: Any, settings: Train, initial: Path) -> Any:
    """What is written: a plain model, or a PEFT model that names the student it belongs to."""
    if settings.lora is None:
        return wrapped
    if settings.lora.export == "adapter":
        for config in wrapped.peft_config.values():
            config.base_model_name_or_path = str(initial.resolve())
        return wrapped
    from stillroom.pipeline.student.lora import merged

    return merged(wrapped)


def _plain(leaving: Any) -> Any:
    """The model of transformers that leaves, or in which the adapter is that does."""
    return leaving.get_base_model() if _is_adapter(leaving) else leaving


def _is_adapter(leaving: Any) -> bool:
    return hasattr(leaving, "get_base_model")


@torch.no_grad()
def _shake(model: nn.Module) -> None:
    """Adapters begin as zeros, which any export would get right."""
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.02 * torch.randn(parameter.shape, generator=random)


@torch.no_grad()
def _round(leaving: Any, dtype: torch.dtype) -> None:
    """Values that a narrower type has, in fp32."""
    for _, tensor in _written(leaving):
        tensor.copy_(tensor.to(dtype))


def _narrow(leaving: Any, dtype: torch.dtype) -> None:
    for _, tensor in _written(leaving):
        tensor.data = tensor.data.to(dtype)


def _written(leaving: Any) -> list[tuple[str, torch.Tensor]]:
    """Floating-point tensors that an export writes, by name: of a PEFT model those of its
    adapter."""
    if _is_adapter(leaving):
        return [(name, p) for name, p in leaving.named_parameters() if p.requires_grad]
    names = leaving.state_dict().keys()
    every = [*leaving.named_parameters(), *leaving.named_buffers()]
    return [(name, t) for name, t in every if name in names and t.is_floating_point()]
