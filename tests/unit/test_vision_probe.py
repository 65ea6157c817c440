"""Probes find what is in the states, and nothing where the targets belong to other pictures."""

import torch

from stillroom.pipeline.evaluation.probe import ProbeData, probe


def data(count: int, seed: int) -> ProbeData:
    """Layer 1 holds noise; layer 2 holds the target, mixed, at one of its positions."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, 16, generator=torch.Generator().manual_seed(9))
    targets = torch.randn(count, 1, 6, generator=generator)
    noise = torch.randn(count, 3, 16, generator=generator)
    informed = noise.clone() * 0.1
    informed[:, 1] += (targets @ mixing)[:, 0]
    return ProbeData({1: noise, 2: informed}, targets)


def test_a_probe_finds_the_target_in_the_layer_that_holds_it():
    found = probe(data(256, 0), data(64, 1), steps=150)
    assert found[2] > 0.6
    assert abs(found[1]) < 0.3


def test_permuted_targets_do_not_help():
    train = data(256, 0)
    permuted = ProbeData({2: train.states[2]}, train.targets.roll(1, 0))
    found = probe(permuted, ProbeData({2: data(64, 1).states[2]}, data(64, 1).targets), steps=150)
    assert abs(found[2]) < 0.3


def test_what_all_targets_share_counts_for_nothing():
    train, test = data(256, 0), data(64, 1)
    shared = 50.0
    found, moved = (
        probe(
            ProbeData({2: train.states[2]}, train.targets + offset),
            ProbeData({2: test.states[2]}, test.targets + offset),
            steps=60,
        )[2]
        for offset in (0.0, shared)
    )
    assert abs(found - moved) < 1e-3


def test_the_same_seed_gives_the_same_probe():
    train, test = data(64, 0), data(16, 1)
    first, again, other = (probe(train, test, steps=3, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
