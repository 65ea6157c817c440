"""The vision demo's tables: differences are paired by seed."""

from stillroom.stages.demos.vision_findings import findings


def arm(*accuracies):
    seeds = {
        str(seed): {"accuracy": a, "probes": {"dino": {"1": a, "2": 1.0}}, "seconds": 1.0}
        for seed, a in enumerate(accuracies)
    }
    return {"seeds": seeds}


RESULTS = {
    "teacher_accuracy": 0.9,
    "blind_accuracy": {"majority": 0.3, "question": 0.6},
    "test_pictures": 2,
    "test_questions": 20,
    "arms": {"none": arm(0.2, 0.4, 0.6), "logits": arm(0.3, 0.5)},
}


def test_means_errors_and_paired_gains():
    lines = findings(RESULTS).splitlines()
    assert "Teacher 0.900" in lines[0]
    assert "| `none` | 3 | 0.400 ± 0.115 | +0.000 ± 0.000 |" in lines
    assert "| `logits` | 2 | 0.400 ± 0.100 | +0.100 ± 0.000 |" in lines
    assert "| `logits` | 0.400 ± 0.100 | 1.000 ± 0.000 | +0.050 ± 0.000 |" in lines


def test_without_a_baseline_there_is_no_gain():
    only = RESULTS | {"arms": {"joint": arm(0.5)}}
    assert "| `joint` | 1 | 0.500 |  |" in findings(only).splitlines()
