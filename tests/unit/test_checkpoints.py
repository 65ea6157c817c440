"""Weights that a checkpoint lacks, adapters that do not fit, code and kernels that are not run:
each is refused under transformers, whoever loads."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stillroom.cache_schemas.errors import ConfigError, PlanMismatch, StudentError, TeacherError
from stillroom.pipeline.config import Capture, Teacher
from stillroom.pipeline.config.training import Student
from stillroom.pipeline.config.vision import Encoder
from stillroom.pipeline.encoders.frozen import open_encoder
from stillroom.pipeline.evaluation.held_out import measure
from stillroom.pipeline.record import Example, content_id
from stillroom.pipeline.student.llava_parts import assemble
from stillroom.pipeline.student.model import initial_student, load, load_teacher
from stillroom.pipeline.student.teacher_head import keep_teacher_head, read_teacher_head
from stillroom.pipeline.teacher.facts import teacher_facts
from stillroom.pipeline.teacher.opening import open_engine
from stillroom.pipeline.teacher.reference.engine import load_model, read_names
from tests import tiny_encoders, tiny_models
from tests.tiny_quantised import LAYOUTS, save_quantised

ROOT = Path(__file__).parents[2]


def without(model: Path, directory: Path, pattern: str, **more: torch.Tensor) -> Path:
    """A copy of a model whose checkpoint lacks what a pattern names, and has something beyond."""
    made = Path(shutil.copytree(model, directory))
    path = made / "model.safetensors"
    kept = {name: w for name, w in load_file(path).items() if not re.search(pattern, name)}
    save_file(kept | more, path, {"format": "pt"})
    return made


LACKING = {
    "blocks": (r"layers\.[12]\.", "not in the checkpoint, first model.layers.1.input_layernorm"),
    "one matrix": (r"layers\.1\.mlp\.up_proj", "1 weights of LlamaForCausalLM"),
    "embeddings and head": ("embed_tokens", "not in the checkpoint"),
}


@pytest.mark.parametrize("kind", LACKING)
def test_a_checkpoint_that_lacks_weights_is_refused_whoever_loads(kind, tiny_llama, tmp_path):
    pattern, message = LACKING[kind]
    broken = without(tiny_llama, tmp_path / "broken", pattern)
    teacher = Teacher(model=str(broken))
    for loads in (load_model, read_names, lambda t: open_engine("reference", t, Capture())):
        with pytest.raises(TeacherError, match=message):
            loads(teacher)
    for loads in (load, lambda d: assemble(d, d)):
        if kind == "blocks":
            with pytest.raises(StudentError):
                loads(broken)
    for init in ("prune_layers", "model"):
        settings = Student(init=init, model=str(broken))
        with pytest.raises(StudentError, match=message):
            initial_student(settings, Teacher(model=str(tiny_llama)), tmp_path / "student")


def test_a_head_of_its_own_is_not_made_up(tiny_qwen3, tmp_path):
    broken = without(tiny_qwen3, tmp_path / "broken", "lm_head")
    teacher = Teacher(model=str(broken))
    facts = teacher_facts(teacher)
    with pytest.raises(TeacherError, match=r"first lm_head\.weight"):
        keep_teacher_head(teacher, facts, tmp_path / "head.safetensors")
    with pytest.raises(TeacherError, match=r"first lm_head\.weight"):
        load_model(teacher)


def test_tied_heads_are_no_false_alarm_and_what_is_beyond_is_named_once(
    tiny_llama, tmp_path, recwarn
):
    assert "lm_head.weight" not in load_file(tiny_llama / "model.safetensors")
    load_model(Teacher(model=str(tiny_llama)))
    assert not recwarn.list
    beyond = {"old.head": torch.zeros(2), "old.scale": torch.zeros(1)}
    more = without(tiny_llama, tmp_path / "more", "nothing", **beyond)
    load_model(Teacher(model=str(more)))
    (said,) = [str(warning.message) for warning in recwarn.list]
    assert "no place for 2 tensors of the checkpoint: old.head, old.scale" in said


def test_an_encoder_that_lacks_weights_is_refused(tmp_path):
    whole = tiny_encoders.save("dinov2", tmp_path / "whole")
    broken = without(whole, tmp_path / "broken", r"layer\.1\.")
    with pytest.raises(TeacherError, match="not in the checkpoint"):
        open_encoder(Encoder(name="dino", kind="dinov2", model=str(broken)))


IDS = np.arange(5, 45, dtype=np.int32)
EXAMPLE = Example(content_id(IDS, IDS > 0), "document", "test", IDS, IDS > 0)


def logits_of(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor(IDS, dtype=torch.long)[None]).logits[0]


@pytest.fixture(scope="module")
def adapter(tiny_llama, tmp_path_factory):
    return tiny_models.save_adapter(tmp_path_factory.mktemp("adapter") / "lora", tiny_llama)


def test_the_reference_engine_speaks_through_the_adapter(tiny_llama, adapter):
    from peft import PeftModel

    plain = load(tiny_llama)
    base = logits_of(plain).log_softmax(-1)[:-1]
    wanted = logits_of(PeftModel.from_pretrained(plain, adapter)).log_softmax(-1)[:-1]
    targets = torch.tensor(IDS[1:], dtype=torch.long)[:, None]
    engine = open_engine(
        "reference", Teacher(model=str(tiny_llama), adapter=str(adapter)), Capture(k=4)
    )
    (record,) = engine.score([EXAMPLE])
    found = torch.tensor(record.signals["token_logprob"])
    assert (found - wanted.gather(1, targets)[:, 0]).abs().max() < 1e-5
    assert (found - base.gather(1, targets)[:, 0]).abs().max() > 0.1


def test_students_are_cut_from_the_teacher_with_its_adapter(tiny_llama, adapter, tmp_path):
    teacher = Teacher(model=str(tiny_llama), adapter=str(adapter))
    whole = initial_student(Student(keep_every=1), teacher, tmp_path / "student")
    difference = (logits_of(load(whole)) - logits_of(load_model(teacher))).abs().max()
    assert difference < 1e-3
    assert type(load_teacher(teacher)) is type(load(tiny_llama))


def test_a_kept_head_belongs_to_model_and_adapter(tiny_llama, tmp_path):
    lora = tiny_models.save_adapter(tmp_path / "lora", tiny_llama, modules_to_save=["lm_head"])
    path, teacher = tmp_path / "head.safetensors", Teacher(model=str(tiny_llama), adapter=str(lora))
    keep_teacher_head(teacher, teacher_facts(teacher), path)
    assert read_teacher_head(path).weight.shape == (768, 64)
    with pytest.raises(PlanMismatch, match="is another teacher: adapter: found a table"):
        keep_teacher_head(None, teacher_facts(Teacher(model=str(tiny_llama))), path)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_one_of_two_tied_matrices_is_adapted(target, tiny_llama, tmp_path):
    lora = tiny_models.save_adapter(tmp_path / "lora", tiny_llama, targets=(target, "q_proj"))
    teacher = Teacher(model=str(tiny_llama), adapter=str(lora))
    student = load(initial_student(Student(keep_every=1), teacher, tmp_path / "student"))
    assert (logits_of(student) - logits_of(load_model(teacher))).abs().max() < 1e-3
    (record,) = open_engine("reference", teacher, Capture(k=4)).score([EXAMPLE])
    found = measure(teacher, {}, [EXAMPLE])["teacher"].perplexity
    assert found == pytest.approx(np.exp(-record.signals["token_logprob"].mean()), rel=1e-4)


def test_students_are_cut_from_the_teacher_with_its_overrides(tiny_llama, tmp_path):
    arguments = {"hf_overrides": {"rope_parameters": {"rope_theta": 50.0}}, "max_model_len": 64}
    teacher = Teacher(model=str(tiny_llama), engine_args=arguments)
    whole = load(initial_student(Student(keep_every=1), teacher, tmp_path / "student"))
    assert whole.config.rope_parameters["rope_theta"] == 50.0
    difference = (logits_of(whole) - logits_of(load_model(teacher))).abs().max()
    assert difference < 1e-3
    assert read_names(teacher).config.rope_parameters["rope_theta"] == 50.0
    wrong = {"hf_overrides": {"num_hidden_layers": "many"}}
    with pytest.raises(ConfigError, match=r"LlamaConfig does not take these"):
        load_model(Teacher(model=str(tiny_llama), engine_args=wrong))


def change_adapter(adapter: Path, directory: Path, change) -> Path:
    made = Path(shutil.copytree(adapter, directory))
    path = made / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    return made


def test_adapters_that_do_not_fit_are_refused(tiny_llama, tiny_qwen3, adapter, tmp_path):
    def lacking(weights):
        return {n: w for n, w in weights.items() if "layers.1." not in n}

    def elsewhere(weights):
        return {n.replace("layers.2.", "layers.7."): w for n, w in weights.items()}

    cases = {
        "nowhere": (tiny_llama, tmp_path / "nowhere", "no adapter_config.json"),
        "lacking": (tiny_llama, change_adapter(adapter, tmp_path / "a", lacking), "are lacking"),
        "elsewhere": (tiny_llama, change_adapter(adapter, tmp_path / "b", elsewhere), "no place"),
        "another model": (tiny_qwen3, adapter, "no place|cannot apply|lacking"),
    }
    for model, directory, message in cases.values():
        teacher = Teacher(model=str(model), adapter=str(directory))
        for loads in (load_model, read_names):
            with pytest.raises(TeacherError, match=message):
                loads(teacher)


def test_an_adapter_in_the_place_of_a_model_is_refused(tiny_llama, adapter, tmp_path):
    both = Path(shutil.copytree(tiny_llama, tmp_path / "both"))
    shutil.copytree(adapter, both, dirs_exist_ok=True)
    for directory in (adapter, both):
        with pytest.raises(TeacherError, match=r"its directory as \[teacher\] adapter"):
            teacher_facts(Teacher(model=str(directory)))


def test_an_adapter_of_prompts_is_refused(tiny_llama, tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    settings = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(load(tiny_llama), settings).save_pretrained(tmp_path / "prompts")
    with pytest.raises(TeacherError, match="tokens of its own into every prompt"):
        load_model(Teacher(model=str(tiny_llama), adapter=str(tmp_path / "prompts")))


def test_the_tower_of_an_adapted_teacher_is_not_read(tiny_llama, adapter):
    teacher = Teacher(model=str(tiny_llama), adapter=str(adapter))
    with pytest.raises(ConfigError, match="teacher with an adapter"):
        open_encoder(Encoder(name="tower", kind="teacher_tower"), teacher)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
open({mark!r}, "w").close()
class OwnConfig(LlamaConfig):
    model_type = "own-llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_tower_is_not_read_as_another_than_it_is_run(tmp_path):
    model = str(tiny_encoders.save("teacher_tower", tmp_path / "model"))
    tower, changed = Encoder(name="tower", kind="teacher_tower"), {"layer_norm_eps": 0.5}
    teacher = Teacher(model=model, engine_args={"hf_overrides": {"vision_config": changed}})
    with pytest.raises(ConfigError, match="read without hf_overrides"):
        open_encoder(tower, teacher)
    changed = {"hf_overrides": {"text_config": {"rms_norm_eps": 1e-3}}}
    open_encoder(tower, Teacher(model=model, engine_args=changed))


@pytest.fixture
def own_code(tiny_llama, tmp_path, monkeypatch):
    """A model that only its own Python file describes, and the mark that the file leaves."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    model = Path(shutil.copytree(tiny_llama, tmp_path / "own"))
    (model / "own.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own-llama", "architectures": ["OwnModel"], "auto_map": names}
    (model / "config.json").write_text(json.dumps(config))
    return model, tmp_path / "mark"


def test_code_of_a_directory_is_run_only_when_it_is_trusted(own_code, tiny_llama):
    model, mark = own_code
    for loads in (load_model, teacher_facts):
        with pytest.raises(TeacherError, match="trust_remote_code = true"):
            loads(Teacher(model=str(model)))
    with pytest.raises(StudentError, match="code of its own directory"):
        load(model)
    assert not mark.exists()
    teacher = Teacher(model=str(model), trust_remote_code=True)
    found = logits_of(load_model(teacher))
    assert mark.exists()
    assert torch.equal(found, logits_of(load_model(Teacher(model=str(tiny_llama)))))
    assert len(teacher_facts(teacher)["code_sha256"]) == 64


def test_every_automatic_class_is_told_whether_to_trust():
    found = 0
    for room in ("pipeline", "stages"):
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text()
            for call in re.finditer(r"Auto[A-Z]\w+\.from_pretrained\(", text):
                found += 1
                said = text[call.start() : call.start() + 160]
                assert "trust_remote_code" in said or "**source" in said, path
    assert found > 8


QUANTISED = {
    "gptq": {"bits": 4, "group_size": 128, "desc_act": False},
    "awq": {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp8": {"activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "of_tomorrow": {},
    "compressed-tensors": {"format": "pack-quantized", "config_groups": {"0": "broken"}},
}


def quantised_copy(model: Path, directory: Path, method: str) -> Path:
    made = Path(shutil.copytree(model, directory))
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method} | QUANTISED[method]
    (made / "config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_directory_that_cannot_run_here_is_one_message(method, tiny_llama, tmp_path):
    model = quantised_copy(tiny_llama, tmp_path / "model", method)
    with pytest.raises(TeacherError) as refused:
        open_engine("reference", Teacher(model=str(model)), Capture())
    message = str(refused.value)
    assert message.count("\n") == 0
    assert f"is quantised ({method})" in message or "not in the checkpoint" in message


@pytest.mark.parametrize("label", LAYOUTS)
def test_a_real_quantised_checkpoint_is_what_it_says_or_is_refused(label, tiny_llama, tmp_path):
    """Its rounded matrices, to what rounding inputs costs where the layout does that too."""
    made, plain = save_quantised(tiny_llama, tmp_path, label)
    assert teacher_facts(Teacher(model=str(made))) != teacher_facts(Teacher(model=str(plain)))
    method, refusal = LAYOUTS[label][1]["quant_method"], ""
    try:
        (said,) = open_engine("reference", Teacher(model=str(made)), Capture(k=8)).score([EXAMPLE])
    except TeacherError as error:
        refusal = str(error)
    if refusal:
        assert refusal.count("\n") == 0
        assert f"is quantised ({method}), and transformers" in refusal
        return
    (truth,) = open_engine("reference", Teacher(model=str(plain)), Capture(k=8)).score([EXAMPLE])
    rounds_inputs = label in ("int8", "float8")
    gap = np.abs(said.signals["token_logprob"] - truth.signals["token_logprob"]).max()
    assert gap < (1.0 if rounds_inputs else 1e-3)


def test_weights_are_turned_back_into_plain_ones_where_that_is_asked_for(tiny_llama, tmp_path):
    made, plain = save_quantised(tiny_llama, tmp_path, "fp8")
    config = json.loads((made / "config.json").read_text())
    teacher = Teacher(model=str(made), dtype="float32")
    with pytest.raises(TeacherError, match='"dequantize": true'):
        open_engine("reference", teacher, Capture(k=8))
    config["quantization_config"]["dequantize"] = True
    (made / "config.json").write_text(json.dumps(config))
    (said,) = open_engine("reference", teacher, Capture(k=8)).score([EXAMPLE])
    (truth,) = open_engine("reference", Teacher(model=str(plain)), Capture(k=8)).score([EXAMPLE])
    assert np.abs(said.signals["token_logprob"] - truth.signals["token_logprob"]).max() < 0.05


def test_scales_that_a_config_forgets_are_not_left_out_in_silence(tiny_llama, tmp_path):
    made, _ = save_quantised(tiny_llama, tmp_path, "int8")
    config = json.loads((made / "config.json").read_text())
    del config["quantization_config"]
    (made / "config.json").write_text(json.dumps(config))
    for loads, error in ((load_model, TeacherError), (read_names, TeacherError)):
        with pytest.raises(error, match=r"proj\.weight is stored as I8, and config\.json says"):
            loads(Teacher(model=str(made)))
    with pytest.raises(StudentError, match="says nothing of quantisation"):
        load(made)


def test_nothing_is_unpickled(tiny_llama, tmp_path):
    made = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    torch.save(load_file(made / "model.safetensors"), made / "pytorch_model.bin")
    load_model(Teacher(model=str(made)))  # beside safetensors it is not looked at
    (made / "model.safetensors").unlink()
    for loads in (load_model, teacher_facts):
        with pytest.raises(TeacherError, match=r"as a pickle \(pytorch_model\.bin\), and nothing"):
            loads(Teacher(model=str(made)))
    with pytest.raises(StudentError, match="nothing is unpickled"):
        load(made)
    adapter = tiny_models.save_adapter(tmp_path / "adapter", tiny_llama)
    torch.save({}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(TeacherError, match="nothing is unpickled"):
        load_model(Teacher(model=str(tiny_llama), adapter=str(adapter)))


@pytest.mark.parametrize("said", [{"": "bfloat16"}, "float8_e4m3fn", "int8"])
def test_a_dtype_that_no_model_runs_in_is_refused(said, tiny_llama, tmp_path):
    made = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"dtype": said}))
    with pytest.raises(TeacherError, match=r"\[teacher\] dtype"):
        load_model(Teacher(model=str(made)))
    load_model(Teacher(model=str(made), dtype="bfloat16"))


@pytest.mark.parametrize(
    "content", [b"", b"x" * 99, b"version https://git-lfs", b"\2" + b"\0" * 7 + b"[]"]
)
def test_a_file_that_is_no_safetensors_is_one_message(content, tiny_llama, tmp_path):
    made = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (made / "model.safetensors").write_bytes(content)
    with pytest.raises(TeacherError, match="is not safetensors"):
        load_model(Teacher(model=str(made)))
