"""Several ranks take the same steps as one: gloo on the CPU, DDP and FSDP2, judged in float64."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import load_file

from stillroom.pipeline.training.metrics import read_metrics
from stillroom.pipeline.training.trainer import Interrupted, train
from tests import memory_cache
from tests.in_float64 import assert_same_losses, assert_same_weights, in_float64
from tests.integration.test_training import make_run

CHILD = """
import json, sys
from stillroom.pipeline.training.trainer import Interrupted, train
from stillroom.stages.__main__ import leave_group
from tests.in_float64 import in_float64
from tests.integration.test_training import make_run

directory, teacher, changes, stop_after = json.loads(sys.argv[1])
asked = iter(range(1000))
try:
    with in_float64():
        train(make_run(directory, teacher, **changes), stop=lambda: next(asked) >= stop_after)
except Interrupted as error:
    leave_group(error.exit_code)
leave_group(0)
"""


# Bits depend on the number of threads, so children use as many as this process.
THREADS = {"OMP_NUM_THREADS": str(torch.get_num_threads())}


@pytest.fixture(scope="module", autouse=True)
def judged_in_float64():
    with in_float64():
        yield


@pytest.fixture(scope="module")
def teacher(deep_llama):
    return deep_llama


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher):
    captured = memory_cache.captured(teacher, memory_cache.examples(40), hidden_layers=("final",))
    return str(captured.write(tmp_path_factory.mktemp("cache") / "cache"))


@contextmanager
def meeting_place():
    """Names that tell ranks where to meet: a store that is open already, as torchrun's agent keeps
    one. A port that was only looked for may be another's when the first rank comes to open it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    del store  # it serves while it lives


def launch(ranks, directory, teacher, stop_after=1000, **changes) -> int:
    """Train in `ranks` processes as torchrun would start them; returns their exit code."""
    argument = json.dumps([str(directory), str(teacher), changes, stop_after])
    children = []
    with meeting_place() as place:
        for rank in range(ranks):
            names = {"WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": rank}
            told = {name: str(value) for name, value in names.items()} | place
            children.append(
                subprocess.Popen(
                    [sys.executable, "-c", CHILD, argument],
                    env=os.environ | told | THREADS,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        errors = [child.communicate()[1] for child in children]
    codes = {child.returncode for child in children}
    assert len(codes) == 1, errors
    assert codes <= {0, 3}, errors
    return codes.pop()


def losses(directory) -> list[float]:
    return [line["loss"] for line in read_metrics(directory)]


def weights(directory) -> dict[str, np.ndarray]:
    return load_file(directory / "student" / "model.safetensors")


def assert_same_training(one, other):
    assert_same_losses(losses(one), losses(other))
    assert_same_weights(weights(one), weights(other))


OBJECTIVES = [
    {"name": "forward_kl", "options": {"ce_weight": 0.1}},
    {"name": "hidden", "weight": 0.5, "reduction": "sample"},
]
COMMON = {"objective": OBJECTIVES, "learning_rate": 1e-3, "steps": 4, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, teacher, cache):
    """One rank, two microbatches."""
    directory = tmp_path_factory.mktemp("alone")
    train(make_run(directory, teacher, cache=cache, batch_tokens=96, accumulate=2, **COMMON))
    return directory


def test_one_big_batch_is_two_microbatches(tmp_path, teacher, cache, alone):
    train(make_run(tmp_path, teacher, cache=cache, batch_tokens=192, accumulate=1, **COMMON))
    assert_same_training(tmp_path, alone)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_are_two_microbatches(tmp_path, teacher, cache, alone, kind):
    changes = {"batch_tokens": 96, "accumulate": 2, "parallel": kind} | COMMON
    launch(2, tmp_path, teacher, cache=cache, **changes)
    assert_same_training(tmp_path, alone)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_train_an_adapter_on_the_head(tmp_path, teacher, cache, kind):
    lora = {"rank": 4, "targets": ["lm_head"]}
    changes = {"cache": cache, "batch_tokens": 96, "accumulate": 2, "lora": lora} | COMMON
    changes |= {"objective": OBJECTIVES[:1], "learning_rate": 1e-2}
    train(make_run(tmp_path / "one", teacher, **changes))
    launch(2, tmp_path / "two", teacher, parallel=kind, **changes)
    assert_same_training(tmp_path / "two", tmp_path / "one")
    before = load_file(tmp_path / "two" / "student-initial" / "model.safetensors")
    head = weights(tmp_path / "two")["lm_head.weight"]
    assert np.abs(head - before["model.embed_tokens.weight"]).max() > 1e-4


def test_sharded_bf16_is_taught_what_ddp_is(tmp_path, teacher, cache):
    """FSDP leaves the teacher as it is cached: in bf16 the first loss would be off by 1.6e-3.

    What may differ is the student: FSDP gathers its weights in bf16 where autocast casts them, and
    rounds the residual stream between blocks, 2^-9 of each state at random; in the mean over the
    rows of this batch 2e-4 to 6e-4, by the matrix products of the machine.
    """
    changes = {"cache": cache, "batch_tokens": 96, "accumulate": 2, "precision": "bfloat16"}
    changes |= {"objective": [{"name": "forward_kl"}], "steps": 1}
    for kind in ("ddp", "fsdp"):
        launch(2, tmp_path / kind, teacher, parallel=kind, **changes)
    (plain,), (sharded,) = losses(tmp_path / "ddp"), losses(tmp_path / "fsdp")
    assert sharded == pytest.approx(plain, rel=1e-3)


def test_sharding_sees_the_teacher_as_it_is(tmp_path, teacher, cache):
    """Nothing that goes into the sharded student is another dtype when it arrives."""
    argument = json.dumps([str(tmp_path), str(teacher), {"cache": cache}, 1])
    with meeting_place() as place:
        run = subprocess.run(
            [sys.executable, "-c", FSDP_INPUTS, argument],
            env=os.environ | place | THREADS,
            capture_output=True,
            text=True,
        )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["torch.float32", "torch.float32", "UnitWeights"]


FSDP_INPUTS = """
import json, sys
import torch.distributed as dist
from stillroom.pipeline.data.packing import Position
from stillroom.pipeline.training.parallel import Parallel
from stillroom.pipeline.training.setup import Setup
from stillroom.stages.__main__ import leave_group
from tests.integration.test_training import make_run

dist.init_process_group("gloo", rank=0, world_size=1)
Parallel.check_kind = lambda *_: None  # a group of one shards too, and shows what goes in
directory, teacher, changes, _ = json.loads(sys.argv[1])
run = make_run(directory, teacher, parallel="fsdp", precision="bfloat16", **changes)
setup = Setup(run, run.train, Parallel.start())
setup.build()
own = setup.distiller.forward
def look(batch, weights, progress):
    print(batch.teachers[""].signals["topk_logprobs"].dtype, next(iter(weights)).dtype)
    print(type(weights).__name__)
    sys.stdout.flush()
    leave_group(0)
setup.distiller.forward = look
batches, _ = next(setup.loader.steps(Position(), 1))
setup.stepper.step(0, batches, False)
"""


def test_a_run_goes_on_with_other_ranks(tmp_path, teacher, cache, alone):
    changes = {"cache": cache, "batch_tokens": 96, "accumulate": 2} | COMMON
    assert launch(2, tmp_path, teacher, stop_after=1, parallel="fsdp", **changes) == 3
    asked = iter(range(1000))
    with pytest.raises(Interrupted, match="stopped after step 3"):
        train(make_run(tmp_path, teacher, **changes), stop=lambda: next(asked) >= 2)
    assert launch(2, tmp_path, teacher, parallel="ddp", async_checkpoint=True, **changes) == 0
    assert_same_training(tmp_path, alone)


@pytest.mark.slow
def test_measuring_leaves_sharded_training_as_it_is(tmp_path, teacher, cache):
    """A measurement gathers weights and, with an average, puts others in their place for a while:
    what is checkpointed right after it, and trained on, is the optimiser's own."""
    held = memory_cache.captured(
        teacher, memory_cache.examples(5, seed=8), hidden_layers=("final",)
    )
    changes = COMMON | {"cache": cache, "batch_tokens": 96, "accumulate": 2, "ema": 0.9}
    changes |= {"heldout_cache": str(held.write(tmp_path / "held")), "checkpoint_every": 1}
    train(make_run(tmp_path / "alone", teacher, evaluate_every=1, **changes))
    sharded = changes | {"parallel": "fsdp", "evaluate_every": 1}
    assert launch(2, tmp_path / "run", teacher, stop_after=2, **sharded) == 3
    assert launch(2, tmp_path / "run", teacher, **sharded) == 0
    assert_same_training(tmp_path / "run", tmp_path / "alone")


def test_sigterm_makes_a_checkpoint_and_exits_with_3(tmp_path, teacher, cache, alone):
    run = make_run(tmp_path, teacher, cache=cache, batch_tokens=96, accumulate=2, **COMMON)
    document = run.model_dump(mode="json", exclude_none=True)
    (tmp_path / "run.toml").write_text(_toml(document))
    command = [sys.executable, "-u", "-c", SIGTERM_CHILD, str(tmp_path / "run.toml")]
    child = subprocess.Popen(
        command,
        env=os.environ | THREADS,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "1\n"
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate()
    assert child.returncode == 3, errors
    assert "Traceback" not in errors
    assert "Run the same command again" in errors
    assert list(tmp_path.glob("checkpoints/step-*/state.json"))
    train(run)
    assert losses(tmp_path) == losses(alone)


SIGTERM_CHILD = """
import os, signal, sys
from stillroom.pipeline.training.stepping import Stepper
from stillroom.stages import __main__ as console
from tests.in_float64 import in_float64

# The first step waits for the signal: the test decides when it comes, not the machine's speed.
first = Stepper.step
def step(self, number, batches, stop):
    done = first(self, number, batches, stop)
    if number == 0:
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell)  # not pause(): the signal may come before it
        print(1, flush=True)
        os.read(told, 1)
    return done
Stepper.step = step
sys.argv = ["stillroom", "train", sys.argv[1]]
with in_float64():
    console.main()
"""


def _toml(document: dict) -> str:
    """TOML of plain nested tables."""
    lines, tables = [], []
    for key, value in document.items():
        if isinstance(value, dict):
            tables.append(f"[{key}]\n{_body(value)}")
        elif isinstance(value, list):
            tables += [f"[[{key}]]\n{_body(item)}" for item in value]
        else:
            lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _body(table: dict) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in table.items())


def _value(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_value(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)
