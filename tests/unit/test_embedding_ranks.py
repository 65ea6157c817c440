"""The embedding objective on ranks of which one has no image, or which do not all measure."""

from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.config.training import Train
from stillroom.pipeline.objectives import embedding
from stillroom.pipeline.training.parallel import Parallel
from tests.ranks import leave
from tests.unit.test_embedding_objective import (
    DEPTH,
    GEN,
    directory,
    distiller,
    make_batch,
    objective,
    run,
)

__all__ = ["directory"]


def _trains_on_rank(rank, folder, directory):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    module = distiller(directory, objective(DEPTH), objective(GEN, weight=0.25))
    batch = make_batch() if rank == 0 else without_images()
    value = module(batch, module.weigh(batch, 0.0)[0])
    value.sum().backward()
    gradients = {name: p.grad for name, p in module.projectors.named_parameters()}
    torch.save((value.detach(), gradients), f"{folder}/{rank}.pt")
    leave()


def without_images():
    """The batch as text, with other words where its images stood."""
    batch = make_batch()
    return replace(
        batch, images=None, input_ids=batch.input_ids.masked_fill(batch.input_ids == 3, 5)
    )


def test_a_rank_without_images_answers_the_others_and_adds_nothing(tmp_path, directory):
    """Both ranks end; each weight of the predictors of the one without has a gradient of zero."""
    spawn(_trains_on_rank, (str(tmp_path), str(directory)), nprocs=2)
    (value, gradients), (nothing, zeros) = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    module, batch = (
        distiller(directory, objective(DEPTH), objective(GEN, weight=0.25)),
        make_batch(),
    )
    wanted = module(batch, module.weigh(batch, 0.0)[0])
    wanted.sum().backward()
    torch.testing.assert_close(value, wanted.detach(), rtol=0, atol=0)
    assert nothing.tolist() == [0.0, 0.0]
    for name, parameter in module.projectors.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-12, atol=1e-14)
        assert zeros[name] is not None, name
        assert not zeros[name].any(), name


def test_a_process_that_measures_alone_asks_nobody(directory, monkeypatch):
    """As the main one does when it checks the export, while the other ranks wait."""
    module, batch = distiller(directory, objective(DEPTH)), make_batch()
    expected = run(module, batch)

    def asked(_):
        raise AssertionError("nobody answers")

    monkeypatch.setattr(embedding, "gather", asked)
    with module.judged_by(module.terms, alone=True):
        assert torch.equal(run(module, batch), expected)
    with pytest.raises(AssertionError, match="nobody answers"):
        run(module, batch)


def test_fsdp_refuses_the_temperature(directory):
    module = distiller(directory, objective(DEPTH))
    two = Parallel(0, 2, torch.device("cpu"))
    with pytest.raises(StudentError, match=r"scale' is a single number.*Set parallel = 'ddp'"):
        two.wrap(module, Train(parallel="fsdp"))
