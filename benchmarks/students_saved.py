"""Is what was trained what is saved? Small random students of many architectures, six ways each.

`python -m benchmarks.students_saved --json` makes every student, trains it for 20 steps from one
cache with a held-out loss after the last, exports it, and reads the same texts with the exported
directory under plain transformers, one text at a time without packing or cache. A cell ends in one
of three verdicts: `equal` (the losses differ by at most 1e-5), `refused` (before the first step,
with the reason), or `wrong`. Finished cells are kept, so the command goes on where it was stopped.

One idea: the second loss shares no code with the first but transformers' own.
"""

import argparse
import json
import re
import shutil
import traceback
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import stillroom.pipeline  # noqa: F401  (see pipeline.cpu_wheels)
from benchmarks import needs
from benchmarks.cache_trial import publish
from stillroom.cache_schemas.errors import StillroomError
from stillroom.pipeline import config
from stillroom.pipeline.record import Example, content_id
from stillroom.pipeline.training.checkpoint import write_durably
from stillroom.pipeline.training.metrics import read_metrics
from tests import memory_cache, student_architectures, tiny_models

MADE = ("config", "prune_layers", "prune_width", "lora", "lora_embed", "lora_head")
VOCAB, STEPS, LENGTH, ROWS = 300, 20, 32, 4
LARGEST = 1e-5
"""Nats between the two losses, both in fp32."""
KEEP = (0, 2, 3)
"""Blocks that stay: of more than one kind where an architecture has several, with a gap."""
MEASURED = "heldout/2.cross_entropy"


def main() -> None:
    """Run the cells that are missing, and report all that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--work", type=Path, default=Path("runs/students_saved"))
    parser.add_argument(
        "--architectures", nargs="+", default=[*student_architectures.ARCHITECTURES]
    )
    parser.add_argument("--made", nargs="+", choices=MADE, default=MADE)
    parser.add_argument("--again", action="store_true", help="forget the cells that are kept")
    parser.add_argument("--table", action="store_true", help="print the page's table instead")
    arguments = parser.parse_args()
    world = World(arguments.work)
    if arguments.again:
        shutil.rmtree(world.cells, ignore_errors=True)
    rows = [world.cell(a, made) for a in arguments.architectures for made in arguments.made]
    if arguments.table:
        print(table(rows))
    else:
        publish("students_saved", {"rows": rows}, arguments.json)


@dataclass(frozen=True)
class World:
    """The cache, the models and the finished cells under one directory."""

    work: Path

    @property
    def cells(self) -> Path:
        """Finished cells, one file each."""
        return self.work / "cells"

    def cell(self, architecture: str, made: str) -> dict[str, Any]:
        """One row of the result, run now unless it is kept."""
        path = self.cells / f"{architecture}-{made}.json"
        if not path.exists():
            found = self._run(architecture, made)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps(found, indent=1) + "\n")
        return json.loads(path.read_text())

    @cached_property
    def teacher(self) -> Path:
        """The one teacher of all students: a small Llama."""
        at = self.work / "teacher"
        if not (at / "config.json").exists():
            tiny_models.save_llama(at, num_layers=2, hidden_size=32, vocab_size=VOCAB)
        return at

    @cached_property
    def caches(self) -> dict[str, Path]:
        """Training texts of many lengths, and held-out ones that fill whole rows."""
        texts = {"train": memory_cache.examples(24, 0, LENGTH, VOCAB), "heldout": heldout()}
        for name, examples in texts.items():
            if not (self.work / name / "manifest.json").exists():
                shutil.rmtree(self.work / name, ignore_errors=True)
                memory_cache.captured(self.teacher, examples).write(self.work / name)
        return {name: self.work / name for name in texts}

    def _run(self, architecture: str, made: str) -> dict[str, Any]:
        directory = self.work / "run"
        shutil.rmtree(directory, ignore_errors=True)
        row: dict[str, Any] = {"architecture": architecture, "made": made}
        row |= dict.fromkeys(("in_training", "reloaded", "difference"))
        try:
            return row | self._trained(architecture, made, directory)
        except StillroomError as error:
            early = not read_metrics(directory)
            return row | {"verdict": "refused" if early else "wrong", "reason": str(error)}
        except Exception as error:  # a traceback is a verdict here
            where = traceback.format_exception(error)[-2].strip().splitlines()[0]
            reason = f"{type(error).__name__}: {error} ({where})"
            return row | {"verdict": "wrong", "reason": reason}
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _trained(self, architecture: str, made: str, directory: Path) -> dict[str, Any]:
        from stillroom.pipeline.training.trainer import train

        source = self._source(architecture)
        result = train(config.parse(self._document(source, made, directory), "students_saved"))
        (line,) = [line for line in read_metrics(directory) if MEASURED in line]
        reloaded = plain_loss(result.student)
        difference = abs(line[MEASURED] - reloaded)
        return {
            "in_training": line[MEASURED],
            "reloaded": reloaded,
            "difference": difference,
            "verdict": "equal" if difference <= LARGEST else "wrong",
            "reason": "",
        }

    def _source(self, architecture: str) -> Path:
        at = self.work / "models" / architecture
        if not (at / "config.json").exists():
            shutil.rmtree(at, ignore_errors=True)
            tokenizer = self.work / "tokenizer"
            if not tokenizer.exists():
                tiny_models.save_tokenizer(tokenizer, VOCAB)
            student_architectures.save_model(architecture, at, tokenizer, VOCAB)
        return at

    def _document(self, source: Path, made: str, directory: Path) -> dict[str, Any]:
        facts = _facts(source)
        lora = {"lora": "all-linear", "lora_embed": [facts["embeddings"]]}
        lora["lora_head"] = [facts["head"]]
        train: dict[str, Any] = {
            "cache": str(self.caches["train"]),
            "heldout_cache": str(self.caches["heldout"]),
            "steps": STEPS,
            "evaluate_every": STEPS,
            "sequence_length": LENGTH,
            "batch_tokens": ROWS * LENGTH,
            "learning_rate": 3e-3,
            "workers": 0,
            "attention": facts["attention"],
        }
        student: dict[str, Any] = {"init": made, "model": str(source)}
        if made in lora:
            train["lora"] = {"rank": 4, "targets": lora[made]}
            student["init"] = "model"
        elif made == "prune_layers":
            student["keep_layers"] = KEEP
        return {
            "name": made,
            "directory": str(directory),
            "teacher": {"model": str(self.teacher), "dtype": "float32"},
            "student": student,
            "objective": [{"name": "forward_kl"}, {"name": "cross_entropy", "weight": 0.1}],
            "train": train,
        }


def heldout() -> list[Example]:
    """Eight texts of the length of a row, so that a measurement counts each of them once."""
    random = np.random.default_rng(1)
    found = []
    for number in range(2 * ROWS):
        tokens = random.integers(4, VOCAB, LENGTH).astype(np.int32)
        mask = np.arange(LENGTH) >= LENGTH // 3
        found.append(Example(content_id(tokens, mask), f"held out {number}", "x", tokens, mask))
    return found


def plain_loss(directory: str) -> float:
    """Cross-entropy on the held-out texts by transformers alone, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    losses = []
    for text in heldout():
        ids = torch.as_tensor(text.token_ids, dtype=torch.long)
        with torch.no_grad():
            logits = model(ids[None], use_cache=False).logits[0, :-1]
        chosen = torch.as_tensor(text.loss_mask[1:])
        losses.append(torch.nn.functional.cross_entropy(logits[chosen], ids[1:][chosen]))
    return float(torch.stack(losses).mean())


def _facts(source: Path) -> dict[str, str]:
    """Names of a model's embeddings and head, and the attention that transformers gives it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    return {
        "embeddings": names[id(model.get_input_embeddings())],
        "head": names[id(model.get_output_embeddings())],
        "attention": model.config._attn_implementation or "eager",
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: architectures down, ways across; refusals by number, with their reasons below."""
    made = [name for name in MADE if any(row["made"] == name for row in rows)]
    reasons: dict[str, int] = {}
    lines = [["architecture", *(f"`{name}`" for name in made)], ["---"] * (len(made) + 1)]
    for architecture in dict.fromkeys(row["architecture"] for row in rows):
        own = {row["made"]: row for row in rows if row["architecture"] == architecture}
        lines.append([architecture, *(_shown(own[name], reasons) for name in made)])
    notes = "".join(f"\n{number}. {text}" for text, number in reasons.items())
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + notes


def _shown(row: dict[str, Any], reasons: dict[str, int]) -> str:
    if row["verdict"] == "equal":
        return f"{row['difference']:.0e}" if row["difference"] else "0"
    reason = row["reason"].removeprefix("[student]: ").split("; expected")[0].split(". ")[0]
    reason = re.sub(r"'?[A-Z]\w*[a-z]\w*'? (attends|cannot be pruned|object has)", r"\1", reason)
    if row["verdict"] == "wrong":
        return f"**wrong**: {reason or row['difference']}"
    return f"refused ({reasons.setdefault(reason, len(reasons) + 1)})"


if __name__ == "__main__":
    needs.run(main)
