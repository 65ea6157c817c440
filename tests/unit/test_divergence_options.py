"""A run file refuses, where it is read, the mixtures that the kernels refuse at the first step."""

import pytest
from pydantic import ValidationError

from stillroom.pipeline.kernels.argument_checks import check_objective
from stillroom.pipeline.kernels.divergences import Objective
from stillroom.pipeline.objectives.divergence import DivergenceOptions
from stillroom.pipeline.objectives.reconstruction import FullVocabularyOptions


@pytest.mark.parametrize("table", [DivergenceOptions, FullVocabularyOptions])
@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_mixture_of_one_alone_is_refused_by_both(table, name, share):
    with pytest.raises(ValueError, match=f"{name}: found"):
        check_objective(Objective(**{name: share}), None, None)
    with pytest.raises(ValidationError, match=f"{name}\n  Input should be (greater|less) than"):
        table(**{name: share})
