"""A full disk and kill -9 in the verbs that make caches from caches; the counts of the promise are
`benchmarks.cache_interruptions`."""

import pytest

from tests import verb_trials as trials
from tests.cache_trials import contents


@pytest.mark.parametrize("verb", ["push", "pull", "merge", "subset", "reshard"])
@pytest.mark.parametrize("trial", [trials.filled, trials.killed])
def test_an_interrupted_verb_ends_well_when_run_again(original, tmp_path, verb, trial):
    command = trials.verbs(original, [original, original])[verb]
    (tmp_path / "whole").mkdir()
    total = trials.operations(command(tmp_path / "whole"))
    expected = contents(tmp_path / "whole" / "new")
    for share in (0.1, 0.5, 0.95):
        place = tmp_path / str(share)
        place.mkdir()
        trial(command(place), int(share * total))
        trials.ended_well(command(place), place, expected)
