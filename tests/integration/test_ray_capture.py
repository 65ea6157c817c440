"""Capture over a real local Ray cluster of two nodes, one of them killed mid-run."""

import contextlib
import os
from functools import partial

import pytest

from stillroom.cache_schemas.errors import CacheIncomplete, ConfigError, PlanMismatch
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.capture.candidates import capture_candidates
from stillroom.pipeline.capture.cluster import Place, capture_on_ray, gpus_per_engine, places
from stillroom.pipeline.capture.images import capture_images
from stillroom.pipeline.capture.items import capture_items
from stillroom.pipeline.capture.job import capture
from stillroom.pipeline.capture.node import Problem
from stillroom.pipeline.config import Capture, Prepare, Run, Source, Teacher
from stillroom.pipeline.corpus.preparing import prepare
from stillroom.pipeline.teacher.protocol import RejectedExample
from tests import small_interactions, tiny_encoders
from tests.memory_cache import examples
from tests.pictures import file, picture

SHARDS = 40


def run_in(directory, teacher, documents=30) -> Run:
    source = Source(name="help", kind="pydoc_topics", limit=documents)
    settings = Prepare(source=(source,), window=64, heldout=0.0)
    corpus = prepare(settings, str(teacher), directory / "corpus")
    per_shard = -(-len(corpus.split("train")) // SHARDS)
    table = Capture(k=8, hidden_layers=(1, "final"), examples_per_shard=per_shard)
    made = Teacher(model=str(teacher), dtype="float32")
    return Run(name="run", directory=str(directory), prepare=settings, teacher=made, capture=table)


@contextlib.contextmanager
def two_nodes():
    """A Ray cluster of two one-processor nodes on the loopback interface.

    Ray takes 127.0.0.1 for this machine's outward address; the rest of 127/8 it takes as it is.
    """
    import ray
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "node_ip_address": "127.0.0.2"}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    second = cluster.add_node(**node)
    ray.init(address=cluster.address, _node_ip_address="127.0.0.2", log_to_driver=False)
    try:
        yield cluster, second
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_killed_mid_run_changes_nothing_about_the_seal(tiny_llama, tmp_path):
    alone = run_in(tmp_path / "alone", tiny_llama)
    capture(alone, engine="reference")
    spread = run_in(tmp_path / "spread", tiny_llama)
    seen = []
    with two_nodes() as (cluster, second):

        def kill_when_both_have_worked(now):
            seen.append(now)
            logs = list((tmp_path / "spread").glob("capture.*.jsonl"))
            if len(logs) == 2 and second in cluster.list_all_nodes():
                cluster.remove_node(second, allow_graceful=False)

        capture_on_ray(spread, engine="reference", on_progress=kill_when_both_have_worked)
        assert second not in cluster.list_all_nodes()
        _pictures_too(tmp_path)  # on the node that is left
        _items_too(tmp_path, tiny_llama)
    sealed = [
        (tmp_path / name / "cache" / "manifest.json").read_bytes() for name in ("alone", "spread")
    ]
    assert sealed[0] == sealed[1]
    cache = TeacherCache.open(str(tmp_path / "spread" / "cache"))
    assert len(cache) == len(TeacherCache.open(str(tmp_path / "alone" / "cache")))
    assert seen[-1].total_shards == cache.plan.num_shards
    assert all(one.doing.endswith("go elsewhere") for one in seen if one.doing)
    again = capture_on_ray(spread, engine="reference")
    assert again == cache.manifest


def _pictures_too(root):
    """Vision targets seal the same on Ray as in one process."""
    model = tiny_encoders.save("dinov2", root / "encoder")
    table = {"name": "dino", "kind": "dinov2", "model": str(model), "size": 56}
    shown = [[file(picture(seed))] for seed in range(5)]
    seals = []
    for name, score in (("one", capture_images), ("ray", partial(capture_on_ray, about="images"))):
        tiny_encoders.save_corpus(root / name / "corpus", shown, heldout=1)
        vision = {"encoder": [table], "images_per_shard": 2}
        score(Run(name="pictures", directory=str(root / name), vision=vision))
        seals.append((root / name / "vision" / "manifest.json").read_bytes())
    assert seals[0] == seals[1]


def _items_too(root, teacher):
    """So do item embeddings, and lists after histories."""
    films = small_interactions.save(root / "films", users=8)
    source = small_interactions.source(films)
    for name in ("items-alone", "items-ray"):
        run = Run.model_validate(
            {
                "name": "films",
                "directory": str(root / name),
                "prepare": {"source": [source], "window": 128},
                "teacher": {"model": str(teacher), "dtype": "float32"},
                "items": {"items_per_shard": 6},
                "candidates": {"k": 3, "written_tokens": 4, "histories_per_shard": 9},
            }
        )
        prepare(run.prepare, str(teacher), run.path("corpus"))
        for about, score in (("items", capture_items), ("candidates", capture_candidates)):
            if name == "items-ray":
                score = partial(capture_on_ray, about=about)
            score(run, engine="reference")
    for about in ("items", "candidates"):
        seals = [root / name / about / "manifest.json" for name in ("items-alone", "items-ray")]
        assert seals[0].read_bytes() == seals[1].read_bytes()


def test_what_a_worker_cannot_do_reaches_the_driver_as_it_was_said(tiny_llama, tmp_path):
    run = run_in(tmp_path / "run", tiny_llama, documents=2)
    capture(run, engine="reference")
    other = run.model_copy(update={"capture": run.capture.model_copy(update={"k": 9})})
    with pytest.raises(PlanMismatch):
        capture_on_ray(other, engine="reference")
    (example,) = examples(1)
    error = RejectedExample(example, "NaN at position 3", remedy="Check the weights.")
    again = Problem.of(error).error()
    assert str(again) == str(error)
    assert Problem.of(CacheIncomplete("x")).error().exit_code == CacheIncomplete.exit_code


def node(name, alive=True, **resources):
    return {"NodeID": name, "Alive": alive, "Resources": resources}


def test_an_engine_takes_a_whole_node_where_there_are_no_accelerators():
    nodes = [node("a", CPU=8.0), node("b", CPU=4.0), node("c", alive=False, CPU=4.0)]
    assert places(nodes, 1) == {Place("a", 0): {"num_cpus": 8.0}, Place("b", 0): {"num_cpus": 4.0}}


def test_as_many_engines_as_accelerators_allow_and_none_on_nodes_without():
    nodes = [node("head", CPU=8.0), node("a", CPU=64.0, GPU=8.0), node("b", CPU=64.0, GPU=4.0)]
    teacher = Teacher(
        model="m", engine_args={"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    )
    need = gpus_per_engine(teacher, "vllm")
    assert need == 4
    assert set(places(nodes, need)) == {Place("a", 0), Place("a", 1), Place("b", 0)}
    assert all(resources["num_gpus"] == 4 for resources in places(nodes, need).values())


def test_an_engine_larger_than_every_node_is_refused():
    with pytest.raises(ConfigError, match="needs 16 accelerators and no node has more than 8"):
        places([node("a", CPU=64.0, GPU=8.0)], 16)
