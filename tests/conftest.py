"""Fixtures that every test may use: tiny teachers as HF directories, and a calm environment."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models gain nothing from threads, and lose much where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("NO_COLOR", "1")

import pytest
from hypothesis import settings

import stillroom.pipeline  # noqa: F401  (see pipeline.cpu_wheels)
from tests import tiny_models

# The same examples every time, however slow the machine; new ones: --hypothesis-profile=default.
settings.load_profile("ci")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """HF directory: Llama shape, 3 blocks, width 64, vocabulary 768, chat template with generation
    blocks."""
    return tiny_models.save_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory):
    """HF directory: Qwen3 shape, 2 blocks, tokenizer of 768 under a head of 800 (padded)."""
    return tiny_models.save_qwen3(tmp_path_factory.mktemp("models") / "tiny-qwen3")


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_llama):
    """The tokenizer object of `tiny_llama`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="session")
def deep_llama(tmp_path_factory):
    """HF directory: as `tiny_llama`, of 6 blocks, for students with some of them."""
    return tiny_models.save_llama(tmp_path_factory.mktemp("models") / "deep-llama", num_layers=6)


@pytest.fixture(scope="session")
def plan():
    """Of ten made-up examples in four shards, with the states of one layer."""
    from tests.synthetic_records import make_plan

    return make_plan(hidden_layers=[2])


@pytest.fixture(scope="session")
def original(tmp_path_factory, plan):
    """Directory of the sealed cache of `plan`, to be copied before it is changed."""
    from tests.synthetic_records import write_cache

    return write_cache(tmp_path_factory.mktemp("original") / "cache", plan)


@pytest.fixture(scope="session")
def english():
    """200,000 characters of real English."""
    return tiny_models.english()
