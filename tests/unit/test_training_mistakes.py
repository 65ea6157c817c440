"""What [student], [[objective]] and [train] must not say is refused where the file is read."""

import pytest

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.config import Run, parse
from stillroom.pipeline.config.training import BELONGS_TO, Student

LINE = {"name": "forward_kl"}


def read(**tables) -> Run:
    return parse({"name": "run", "directory": "run"} | tables, "run.toml")


def objective(**keys):
    return {"objective": [LINE | keys]}


def train(**keys):
    return {"train": keys}


SEEDS = (-1, 2**63)
REFUSED = [
    (objective(weight=-1), r"'objective.0.weight'.*greater than or equal to 0 \(found -1\)"),
    (objective(final_weight=-1), r"'objective.0.final_weight'.*equal to 0 \(found -1\)"),
    (objective(source_weights={"web": -0.5}), r"source_weights.web'.*equal to 0 \(found -0.5\)"),
    (objective(weight=1e300), r"weight'.*less than or equal to 1000000 \(found 1e\+300\)"),
    (objective(weight=1e-300), r"weight': expected 0, or 1e-12 and more \(found 1e-300\)"),
    (objective(weight=0), r"every \[\[objective\]\] has weight 0.*Set one, such as weight = 1"),
    (objective(weight=0, final_weight=0), "expected one with a weight .*above 0"),
    (train(weight_decay=-0.1), r"train.weight_decay'.*equal to 0 \(found -0.1\)"),
    (train(lora={"alpha": 0}), r"train.lora.alpha'.*greater than 0 \(found 0\)"),
    (train(betas=[0.9, 1.0]), r"train.betas.1'.*less than 1 \(found 1.0\)"),
    (train(betas=[-0.1, 0.9]), r"train.betas.0'.*equal to 0 \(found -0.1\)"),
    *((train(seed=seed), rf"train.seed'.*\(found {seed}\)") for seed in SEEDS),
    *(({"student": {"seed": seed}}, rf"student.seed'.*\(found {seed}\)") for seed in SEEDS),
    (train(lora={"targets": "q_proj"}),
     r"'train.lora.targets': expected a list of names as in \[\"q_proj\"\], or \"all-linear\" "
     r"\(found 'q_proj'\)"),
    (train(lora={"targets": ["q_proj", 1]}), "'train.lora.targets': expected a list of names"),
    (train(betas=[0.9]), r"'train.betas': expected more than 1 values"),
    (train(freeze="lm_head"), r"'train.freeze': expected a list .*\(found 'lm_head'\)"),
    (train(images="cache"), r"'train.images': expected a table \(found 'cache'\)"),
    (train(cache=3), r"'train.cache': expected text in quotes \(found 3\)"),
    (train(steps=True), r"'train.steps': expected a number.*\(found True\)"),
    (train(steps="10"), r"'train.steps': expected a number, without quotes.*\(found '10'\)"),
    (train(learning_rate="1e-3"), r"'train.learning_rate': expected a number.*'1e-3'"),
    (train(betas=["0.9", 0.9]), r"'train.betas.0': expected a number.*'0.9'"),
    (train(lora={"rank": "8"}), r"'train.lora.rank': expected a number.*'8'"),
    (objective(weight="1"), r"'objective.0.weight': expected a number.*'1'"),
    (objective(final_weight=True), r"'objective.0.final_weight': expected a number.*True"),
    (objective(source_weights={"web": "2"}), "source_weights.web': expected a number.*'2'"),
]  # fmt: skip


@pytest.mark.parametrize(("tables", "message"), REFUSED, ids=lambda given: str(given)[:60])
def test_a_mistake_is_refused_where_it_is_read(tables, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(**tables)
    assert "run.toml" in str(caught.value)


@pytest.mark.parametrize(
    "tables",
    [
        train(sequence_length=4096, batch_tokens=4096),
        {"objective": [LINE | {"weight": 0}, LINE]},
        objective(weight=0, final_weight=1),
        objective(weight=1e-12, final_weight=1_000_000, source_weights={"web": 0}),
        train(weight_decay=0, betas=[0, 0.999], seed=2**63 - 1, lora={"alpha": 1}),
        train(lora={"targets": ["q_proj"]}),
        train(lora={"targets": "all-linear"}),
        train(steps=10.0, learning_rate=1),
    ],
    ids=lambda given: str(given)[:60],
)
def test_what_the_remedies_say_is_read(tables):
    assert read(**read(**tables).model_dump(mode="json")) == read(**tables)


ASKED = {
    "keep_every": 2,
    "keep_layers": (0, 1),
    "leave_out": 1,
    "leave_out_tokens": 64,
    "keep_intermediate": 0.25,
    "keep_heads": 0.5,
    "vision_model": "tower",
    "vision_layer": -1,
}


@pytest.mark.parametrize("init", ["prune_layers", "prune_width", "config", "model", "parts"])
@pytest.mark.parametrize("key", BELONGS_TO)
def test_a_key_of_another_init_is_refused(key, init):
    tables = {"student": {"init": init, key: ASKED[key]}}
    if init == BELONGS_TO[key]:
        assert getattr(read(**tables).student, key) == ASKED[key]
        return
    message = rf"{key} = .* is of init = '{BELONGS_TO[key]}', and init is '{init}'"
    with pytest.raises(ConfigError, match=message):
        read(**tables)
    # A resolved run names every key.
    tables["student"][key] = Student.model_fields[key].default
    assert read(**tables).student.init == init
