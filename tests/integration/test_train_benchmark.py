"""The benchmark of training speed still runs: every arm steps on the same cache and text.

One idea: as with the benchmark of doors, what it asks of the product is asked here each time; its
seconds mean nothing here.
"""

import pytest

from benchmarks import train


@pytest.mark.slow
def test_every_arm_takes_its_steps(tiny_llama, tmp_path):
    run = train.make_run(str(tiny_llama), tmp_path, rows=1, precision="float32")
    found = train.measure(run, rounds=1)
    assert found["tokens_per_step"] == train.WINDOW
    assert all(found[f"{arm}_tok_s"] > 0 for arm in train.ARMS)
    assert found["peak_bytes"].keys() == set(train.ARMS)
    assert 0 <= found["data_wait_share"] < 1
