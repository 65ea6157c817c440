"""Training from a cache inside `transformers.Trainer` and what is built on it.

One idea: the trainer keeps its loop, its ranks and its checkpoints; of a step it is told one
number, already divided by what the whole step holds over all microbatches and ranks. The student
runs without its head, inside the forward pass of whatever wraps it, so DDP and FSDP see it.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.doors.adoption import adopt
from stillroom.pipeline.doors.beside import SideWeights, check_signed, sign
from stillroom.pipeline.doors.cached import CachedBatch, CachedDataset, Objectives
from stillroom.pipeline.doors.collator import (
    COUNTS,
    DISTILL,
    CachedCollator,
    HeldOutBatches,
    dataset_of,
)
from stillroom.pipeline.doors.fit import COLUMNS, check_dataset, check_kept, order_of
from stillroom.pipeline.doors.heldout_sets import held_out_sets, heldout_batches
from stillroom.pipeline.doors.redirection import through
from stillroom.pipeline.doors.settings import (
    check_arguments,
    check_evaluated,
    check_trainer,
    check_whole,
    keep_loss_whole,
)
from stillroom.pipeline.doors.shown import Shown
from stillroom.pipeline.objectives.weighting import UnitWeights, scales
from stillroom.pipeline.training.parallel import let_go

if TYPE_CHECKING:
    from transformers import Trainer as Host
else:
    Host = object  # the trainer stands behind, in whoever mixes this in


class CachedDistillationMixin(Host):
    """Stands before a Trainer: `class Mine(CachedDistillationMixin, Trainer)`.

    Args:
        model: the student, as the trainer takes it.
        args: the trainer's.
        cache: directory or URL of a sealed cache, or an opened one; or a list of several (see
            `CachedDataset`).
        objectives: lines of the `[[objective]]` table: names, or tables as in the TOML.
        caches: further caches of the same examples, by the names that objectives use.
        eval_cache: held-out cache, or several by name; measured as `stillroom train` does.
        kernel: as `[train] kernel`.
        local_copy: directory that keeps what was read of caches behind a URL.
        corpus: directory of the prepared corpus; where the pictures of image-text caches are.
        teacher: directory or hub id of the cache's teacher, for objectives that read its head.
        train_dataset: rows with a column `example`, the number of their record in the cache, to
            train on some of it or in an order of one's own; None takes every example.
        more: what else the trainer takes.

    Raises:
        StillroomError: cache, student, data set and trainer do not fit.
    """

    loss_is_scaled_for_ga = True

    unasked: tuple[str, ...] = ()
    """Methods of the trainer behind that are known not to be asked (see `settings.UNASKED`)."""

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        cache: Any,
        objectives: Objectives = ("forward_kl",),
        caches: Mapping[str, Any] | None = None,
        eval_cache: Any = None,
        kernel: str = "auto",
        local_copy: str = "",
        corpus: str = "",
        teacher: str = "",
        train_dataset: Any = None,
        **more: Any,
    ):
        check_trainer(type(self), CachedDistillationMixin)
        check_arguments(args, more)
        self.data = data = CachedDataset(cache, objectives, caches or {}, local_copy, corpus=corpus)
        if train_dataset is not None:
            check_dataset(train_dataset, data)
        self.held_out = held_out_sets(eval_cache, data)
        check_evaluated(args, self.held_out)
        evaluated = {name: dataset_of(one.dataset) for name, one in self.held_out.items()}
        super().__init__(
            model=model,
            args=args,
            data_collator=CachedCollator(data),
            train_dataset=dataset_of(data) if train_dataset is None else train_dataset,
            eval_dataset=evaluated.get("", evaluated) or None,
            **more,
        )
        self._adopt(kernel, teacher)

    def _adopt(self, kernel: str, teacher: str) -> None:
        """Look at what the trainer has made of all that, and put the objectives beside it."""
        me: Any = self
        check_arguments(me.args, {}, me)
        check_dataset(me.train_dataset, self.data)
        check_kept(me, CachedCollator)
        self._order = order_of(me.train_dataset)
        keep_loss_whole(me)
        self.distiller = adopt(self, kernel, teacher)
        self._beside = SideWeights(self.distiller.projectors, me)
        self._shown = Shown(self.distiller)
        me.add_callback(self._shown.begin_anew())

    # ---- one step ----

    def get_batch_samples(self, epoch_iterator, num_batches: int, device) -> tuple[list, Any]:
        """The step's microbatches, each weighed by what the whole step holds."""
        me: Any = self
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, count
        done = self._progress()
        weighed = [self.distiller.weigh(one[DISTILL].host, done) for one in samples]
        totals = self._add_up(torch.stack([own for _, own in weighed]).sum(dim=0))
        factors = scales(self.distiller.terms, totals, done, me.accelerator.num_processes)
        self._shown.steps += 1
        for one, (weights, _) in zip(samples, weighed, strict=True):
            given = UnitWeights(weights).times(factors)
            one[DISTILL] = replace(one[DISTILL], weights=given)
        return samples, count

    def compute_loss(
        self, model, inputs, return_outputs: bool = False, num_items_in_batch=None
    ) -> Any:
        """This microbatch's part of the step's loss; there are no logits to return."""
        batch: Any = inputs[DISTILL]
        if batch.weights is None:
            raise StudentError(
                "a batch came that no step has counted",
                where=type(self).__name__,
                remedy="Do not override get_batch_samples without calling it, and call evaluate() "
                "for held-out caches.",
            )
        values = self._values(model, batch, batch.weights)
        self._shown.add(values, self._progress())
        self._told = values.sum()
        if not torch.isfinite(self._told):
            raise StudentError(
                f"the loss is not finite ({self._told.item():g})",
                where=f"examples {', '.join(batch.host.example_ids)}",
                remedy="Go on from the last checkpoint with a lower learning_rate, or look at "
                "these texts.",
            )
        return (self._told, {"loss": self._told}) if return_outputs else self._told

    def training_step(self, *given: Any, **more: Any) -> torch.Tensor:
        """The trainer's own, held to the loss that it was given."""
        found = super().training_step(*given, **more)
        if not torch.equal(found, self._told.detach()):
            raise StudentError(
                f"the trainer made {float(found):g} of a loss of {self._told.item():g}",
                expected="the loss as it is: the division by accumulation steps is in it",
                where=type(self).__name__,
                remedy=self._way_back(),
            )
        return found

    def _way_back(self) -> str:
        if type(self).compute_loss is not CachedDistillationMixin.compute_loss:
            return (
                "Have compute_loss return what super() returns; what else is to be learned is a "
                "line of objectives."
            )
        return "Install versions that were tried: pip install 'stillroom[hf]'."

    def _values(self, model, batch: CachedBatch, weights) -> torch.Tensor:
        """float [objectives]; computed inside the forward pass of what wraps the student."""
        me: Any = self
        done = self._progress() if me.model.training else 1.0

        def inside(moved: CachedBatch) -> torch.Tensor:
            check_whole(self.distiller.model.get_output_embeddings().weight)
            with me.accelerator.autocast():
                return self.distiller(moved.batch, weights, done)

        return through(model, me.accelerator.unwrap_model(model), inside, batch.to(me.args.device))

    def _progress(self) -> float:
        state = self.state
        return min(state.global_step / max(state.max_steps - 1, 1), 1.0)

    def _add_up(self, own: torch.Tensor) -> torch.Tensor:
        """Sum of a CPU tensor over all ranks."""
        me: Any = self
        return me.accelerator.reduce(own.to(me.args.device), reduction="sum").cpu()

    # ---- what is logged ----

    def log(self, logs: dict[str, float], *more: Any, **named: Any) -> None:
        """The trainer's own, with every objective apart."""
        me: Any = self
        if "loss" in logs:
            logs |= self._shown.take(self._add_up, me.accelerator.num_processes)
        super().log(logs, *more, **named)

    # ---- held-out caches ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batches of a held-out cache, by its name."""
        own = eval_dataset is None or eval_dataset is self.eval_dataset
        name = "" if own else eval_dataset
        if not isinstance(name, str) or name not in self.held_out:
            raise StudentError(
                "only held-out caches are measured",
                where="evaluate",
                remedy="Give eval_cache when the trainer is made.",
            )
        return heldout_batches(self.held_out[name], self)

    def evaluation_loop(self, dataloader: Any, *given: Any, **more: Any) -> Any:
        """The trainer's own, with means over all units of all ranks."""
        if not isinstance(dataloader, HeldOutBatches):
            raise StudentError(
                "predict() asks for logits, which are never made",
                where=type(self).__name__,
                remedy="Use evaluate() with eval_cache, or `stillroom evaluate`.",
            )
        terms = dataloader.heldout.terms
        self._measured = torch.zeros(2, len(terms), dtype=torch.float64)
        with self.distiller.judged_by(terms):
            batches: Any = dataloader
            output = super().evaluation_loop(batches, *given, **more)
        values, totals = self._add_up(self._measured)
        means = (values / totals.clamp_min(1e-30)).tolist()
        prefix = more.get("metric_key_prefix", "eval")
        loss = sum(term.weight(1.0) * mean for term, mean in zip(terms, means))
        metrics: Any = output.metrics
        metrics[f"{prefix}_loss"] = loss
        metrics.update({f"{prefix}_{t.label}": m for t, m in zip(terms, means)})
        return output

    def prediction_step(self, model, inputs: Any, prediction_loss_only, ignore_keys=None) -> tuple:
        """Adds one held-out batch to the sums; there is nothing to gather."""
        batch, counts = inputs[DISTILL], inputs[COUNTS]
        with torch.no_grad():
            weights, own = self.distiller.weigh(batch.host, 1.0)
            given = UnitWeights([weight * counts for weight in weights])
            values = self._values(model, batch, given)
        let_go(model)
        self._measured += torch.stack([values.double().cpu(), own * counts])
        return None, None, None

    # ---- checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        me: Any = self
        with self._beside.apart():
            super()._save(output_dir, self._beside.without(state_dict))
        if me.args.should_save:
            self._beside.save(Path(output_dir or str(me.args.output_dir)))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trainer's own, with what the student was trained from beside it."""
        super().save_model(output_dir, _internal_call)
        me: Any = self
        if me.args.should_save:
            sign(Path(output_dir or str(me.args.output_dir)), self.data, self._order)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        directory = Path(resume_from_checkpoint)
        me: Any = self
        order = "" if me.args.ignore_data_skip else self._order
        check_signed(directory, self.data, order)
        with self._beside.apart():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._beside.load(directory)

    def _load_best_model(self) -> None:
        with self._beside.apart():
            super()._load_best_model()
        self._beside.load(Path(str(self.state.best_model_checkpoint)))

    # ---- data ----

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [*COLUMNS, str(self.args.length_column_name)]
