"""Configuration: precedence, casting, refusals, and that the YAML files say what the dataclasses say."""

import dataclasses
import importlib.util

import pytest
from conftest import ROOT

from ads.stage.config import load_config, make_config
from ads.stage.errors import UserError
from ads.stage.fields import TRACKERS
from ads.stage.settings import AttackConfig, GenConfig, GradConfig, SearchConfig, TrainConfig

FILES = {
    "gen_config.yaml": GenConfig,
    "grad_config.yaml": GradConfig,
    "attack_config.yaml": AttackConfig,
    "train_config.yaml": TrainConfig,
    "search_config.yaml": SearchConfig,
}
NEEDED = {
    GenConfig: [],
    GradConfig: ["holdout_traces=h"],
    AttackConfig: ["traces=t"],
    TrainConfig: ["train_traces=t", "holdout_traces=h"],
    SearchConfig: ["targets=0.9,0.8"],
}


@pytest.mark.parametrize("name", FILES)
def test_yaml_files_hold_every_key_at_its_default(name):
    cls = FILES[name]
    loaded = load_config(cls, ROOT / name, NEEDED[cls])
    given = dict(pair.split("=") for pair in NEEDED[cls])
    assert dataclasses.asdict(loaded) == {**dataclasses.asdict(cls()), **given}
    keys = {line.split(":")[0] for line in (ROOT / name).read_text().splitlines() if line[:1].isalpha()}
    assert keys == {f.name for f in dataclasses.fields(cls)}


def load(*arguments, yaml="gen_config.yaml"):
    return load_config(FILES[yaml], ROOT / yaml, arguments)


def test_precedence_and_grammar(tmp_path):
    other = tmp_path / "mine.yaml"
    other.write_text("tau: 0.5\nmax_samples: 7\n")
    cfg = load(str(other), "--tau=0.7", "tokenizer=x=y")
    assert (cfg.tau, cfg.max_samples, cfg.tokenizer, cfg.top_k) == (0.7, 7, "x=y", 50)


@pytest.mark.parametrize(
    "text,key,value",
    (
        ("eps=5e-4", "eps", 5e-4),
        ("tau=1", "tau", 1.0),
        ("max_samples=null", "max_samples", None),
        ("max_samples=12", "max_samples", 12),
        ("answer_force=False", "answer_force", False),
        ("exp_dir=a dir", "exp_dir", "a dir"),
        ("data_split=hendrycks_math_test", "data_split", "hendrycks_math_test"),
    ),
)
def test_command_line_values_are_cast_by_type(text, key, value):
    found = getattr(load(text), key)
    assert found == value and type(found) is type(value)


def test_yaml_floats_without_a_dot_are_numbers(tmp_path):
    """PyYAML reads 5e-4 as text."""
    path = tmp_path / "t.yaml"
    path.write_text("lr: 5e-4\ntrain_traces: t\nholdout_traces: h\n")
    assert load_config(TrainConfig, path, []).lr == 5e-4


@pytest.mark.parametrize(
    "arguments,words",
    (
        (["tua=0.6"], "unknown key 'tua' in the command line; known keys: answer_force"),
        (["tau=warm"], "tau='warm' in the command line: must be a finite number"),
        (["tau=nan"], "must be a finite number"),
        (["tau=-0.1"], "tau=-0.1 in the command line: must be a finite number, at least 0"),
        (["batch_size=2.5"], "must be a whole number"),
        (["batch_size=0"], "must be a whole number, at least 1, or auto"),
        (["cuda_graph=maybe"], "cuda_graph='maybe' in the command line: must be true or false, or auto"),
        (["answer_force=maybe"], "must be true or false"),
        (["answer_force=1"], "must be true or false"),
        (["seed=null"], "must be a whole number"),
        (["top_p=0"], "above 0 and at most 1"),
        (["top_p=1.01"], "above 0 and at most 1"),
        (["top_k=-1"], "must be a whole number, at least 0"),
        (["dtype=float8"], "must be one of auto, float32, bfloat16, float16"),
        (["attn_implementation=flash_attention_2"], "must be one of auto, sdpa, eager"),
        (["data_split=gsm8k"], "must be DATASET_SPLIT with SPLIT one of train, holdout, test"),
        (["data_split=gsm8k_dev"], "must be DATASET_SPLIT"),
        (["trace_name=../x"], "must be a plain file name"),
        (["lam=0.1"], "needs grad_path"),
        (["lam=0.1", "grad_path=g"], "needs proxy_student"),
        (
            ["lam=0.1", "grad_path=g", "proxy_student=p", "eps=-1"],
            "eps=-1 in the command line: must be a finite number, at least 0",
        ),
        (["lam=0.1", "grad_path=g", "proxy_student=p", "is_teacher=false"], "only a teacher"),
        (["few_shot=2"], "set few_shot_traces"),
        (["prefill=auto"], "prefill=auto: set few_shot_traces"),
        (["num_samples=0"], "num_samples=0 in the command line: must be a whole number, at least 1"),
        (["num_samples=4"], "num_samples=4: with tau=0 all samples of a problem are the same"),
        (["num_samples=4", "tau=1", "top_k=1"], "num_samples=4: with top_k=1 all samples"),
        (["num_samples=4", "tau=1", "defence=external", "published=x"], "publishes one text a problem"),
        (["num_samples=4", "tau=1", "trace_colname=problem_id"], "is the name of another column"),
        (["attacker=a/b"], "attacker='a/b' in the command line: must be a plain file name"),
        (
            ["direction_seed=-1"],
            "direction_seed=-1 in the command line: must be a whole number",
        ),
        (["lam=1.5", "defence=corrupt"], "lam=1.5: with defence=corrupt it is the share"),
        (["lam=-0.1", "defence=corrupt"], "lam=-0.1: with defence=corrupt"),
        (["lam=0.5", "defence=corrupt", "is_teacher=false"], "only a teacher"),
        (["tau"], "write key=value"),
        (["exp_dir="], "exp_dir='': is empty"),
        (["teacher="], "teacher='': is empty"),
        (
            ["grad_path=~no-such-user/g"],
            "'~no-such-user/g': has no such home folder; write ./~no-such-user/g",
        ),
        (["~no-such-user/x.yaml"], "'~no-such-user/x.yaml': has no such home folder"),
    ),
)
def test_bad_values_are_one_line_errors(arguments, words):
    with pytest.raises(UserError) as error:
        load(*arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text,words",
    (
        ("tau: [1]", "tau=[1] in bad.yaml: must be a finite number"),
        ("tau: true", "tau=True in bad.yaml: must be a finite number"),
        ("tau: -1", "tau=-1 in bad.yaml: must be a finite number, at least 0"),
        ("top_k: 5.0", "top_k=5.0 in bad.yaml: must be a whole number, at least 0"),
        ("answer_force: 1", "answer_force=1 in bad.yaml: must be true or false"),
        ("defence: [ads]", "defence=['ads'] in bad.yaml: must be one of ads, random"),
        ("teacher: 7", "teacher=7 in bad.yaml: must be text"),
        ("- a", "should hold `key: value` lines"),
        ("tau: {", "bad.yaml is not readable YAML"),
        ("!!python/object/apply:os.system ['true']", "bad.yaml is not readable YAML"),
    ),
)
def test_bad_yaml_is_a_one_line_error(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load(str(path))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_values_of_an_old_sidecar_are_checked_and_the_file_named():
    """The report makes settings of what a sidecar holds; a key whose values have changed is no traceback."""
    with pytest.raises(UserError, match="dtype='float8' in old.yaml: must be one of auto, float32"):
        make_config(GenConfig, {"dtype": "float8", "tau": 0}, {"dtype": "old.yaml", "tau": "old.yaml"})


PATHS = {"exp_dir", "data_dir", "data_split", "teacher", "tokenizer", "proxy_student", "student", "grad_path"}
PATHS |= {"holdout_traces", "few_shot_traces", "train_traces", "checkpoint"}


def test_every_path_knows_the_home_folder(tmp_path, monkeypatch):
    """From the command line and from YAML; other text keeps its ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c_train").mkdir()
    (tmp_path / "c_train" / "trainer_state.json").touch()
    (tmp_path / "x.yaml").write_text("exp_dir: ~/from_yaml\ntrace_name: ~x\n")
    assert load("~/x.yaml").exp_dir == f"{tmp_path}/from_yaml" and load("~/x.yaml").trace_name == "~x"
    for name, cls in FILES.items():
        keys = [field.name for field in dataclasses.fields(cls) if field.name in PATHS]
        cfg = load(*NEEDED[cls], *(f"{key}=~/c_train" for key in keys), yaml=name)
        assert keys and {getattr(cfg, key) for key in keys} == {f"{tmp_path}/c_train"}
        others = [field.name for field in dataclasses.fields(cls) if field.name.endswith(("_dir", "_path"))]
        assert set(others) <= set(keys)


def test_a_tracker_that_is_not_there_is_refused(tmp_path, monkeypatch):
    """The trainer once said so in a traceback, with the student loaded."""
    (tmp_path / "trackio.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for value in ("none", "all", "trackio"):
        assert load(*NEEDED[TrainConfig], f"report_to={value}", yaml="train_config.yaml").report_to == value
    missing = [name for name in ("comet_ml", "clearml", "dvclive") if not importlib.util.find_spec(name)]
    with pytest.raises(UserError, match=f"{missing[0]} is not installed: pip install {missing[0]}, or rep"):
        load(*NEEDED[TrainConfig], f"report_to=trackio,{missing[0]}", yaml="train_config.yaml")
    for value in ("wand", "none,trackio", "trackio,", ""):
        with pytest.raises(UserError, match="report_to=.*must be none, all or one of azure_ml"):
            load(*NEEDED[TrainConfig], f"report_to={value}", yaml="train_config.yaml")


@pytest.mark.slow
def test_trackers_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(TRACKERS) <= set(INTEGRATION_TO_CALLBACK)


def test_missing_yaml_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere.yaml does not exist"):
        load("nowhere.yaml")


def test_a_config_is_never_written_to():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().tau = 1.0
