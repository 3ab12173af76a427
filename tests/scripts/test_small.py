"""pipeline_small.sh as a user runs it, and the teacher that it trains on reference solutions."""

import gzip
import json
import re
import subprocess

import pytest
from conftest import ROOT, byte_tokenizer, run_script, save_folder, tiny_model
from helpers_pipeline import pipeline_environment

from ads.data import word_problems
from ads.data.tables import read_parquet
from ads.stage import files
from ads.stage.ability import is_any, judge

SCRIPT = (ROOT / "pipeline_small.sh").read_text()


def teacher_words(model_folders, exp_dir, *more):
    student = f"student={model_folders['student']}"
    small = ("lora=false", "do_eval=false", "num_epochs=1", "batch_size=4", "max_length=300")
    return [student, "model_name=teacher", f"exp_dir={exp_dir}", "seed=1", *small, *more]


def test_a_model_is_trained_on_the_reference_solutions_of_a_split(model_folders, tmp_path):
    """The sidecar tells which; done it is skipped, and other problems or a changed source are refused."""
    words = teacher_words(model_folders, tmp_path, "solutions=word_problems_pretrain", "max_samples=8")
    run_script("distill.py", *words)
    sidecar = files.read_yaml(tmp_path / "models" / "teacher.yaml")
    assert sidecar["stats"]["n"] == 8 and sidecar["config"]["solutions"] == "word_problems_pretrain"
    assert sidecar["inputs"].keys() == {"student", "tokenizer", "solutions"}
    assert "nothing to do" in run_script("distill.py", *words).stdout
    other = run_script("distill.py", *words, "max_samples=9", check=False)
    assert other.returncode == 2 and "max_samples was 8, now 9" in other.stderr


@pytest.mark.parametrize(
    "words,said",
    (
        (["solutions=word_problems_test"], "must be DATASET_SPLIT with SPLIT one of train, pretrain"),
        (["solutions=gsm9k_train"], "'gsm9k' is neither a known dataset"),
        (["solutions=word_problems_pretrain", "train_traces=x.parquet"], "leave out train_traces=x.parquet"),
        (["solutions=word_problems_pretrain", "max_samples=4", "weights=true"], "no column weight"),
        (["max_samples=8"], "train_traces is not set"),
    ),
)
def test_a_mistake_in_what_to_train_on_is_one_line(model_folders, tmp_path, words, said):
    result = run_script("distill.py", *teacher_words(model_folders, tmp_path, *words), check=False)
    assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1


def test_a_teacher_is_judged_by_its_raw_answers(tmp_path):
    raw = {"accuracy": 0.8, "low": 0.74, "high": 0.85, "num_correct": 160}
    path = tmp_path / "given.yaml"
    files.write_text(path, f"config: {{}}\nstats: {{n: 200, raw: {raw}, af: null}}\nseconds: 1\n")
    told = "0.800 of 200 holdout problems right (95 %: 0.740 to 0.850)"
    assert judge(str(path), "0.8") == f"yes {told}" and judge(str(path), ".81") == f"no {told}"
    assert is_any("0") and is_any("0.0") and not is_any(".1")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models with room for word problems in single bytes."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), byte_tokenizer()
    return {
        role: save_folder(folder / role, tiny_model("llama", 264, seed=seed), tokenizer)
        for seed, role in enumerate(("teacher", "proxy", "student"))
    }


def run_small(models, exp_dir, *options, **settings):
    environment = pipeline_environment(models, "word_problems", exp_dir, **settings)
    environment = {key: value for key, value in environment.items() if value is not None}
    command = ["bash", str(ROOT / "pipeline_small.sh"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)


PLAIN = {"GEN_ARGS": None, "TRAIN_ARGS": None, "GRID_ARGS": None}


def test_its_help_names_every_setting():
    result = subprocess.run(
        ["bash", str(ROOT / "pipeline_small.sh"), "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0 and "--dry-run" in result.stdout and "set -euo" not in result.stdout
    own = set(re.findall(r'\b([A-Z_]+)="\$\{\1', SCRIPT))
    known = set(re.findall(r'^ *([A-Z_]+)="\$\{', (ROOT / "pipeline.sh").read_text(), re.MULTILINE))
    assert len(own - known) > 5 and [name for name in own - known if name not in result.stdout] == []
    documented = (ROOT / "docs" / "small.md").read_text()
    assert [name for name in own - known if f"`{name}`" not in documented] == []


@pytest.mark.parametrize(
    "machine,asked,dataset,num_points",
    (
        ("cpu", None, "word_problems", 11),
        ("gpu", None, "gsm8k", 20),
        ("gpu", "word_problems", "word_problems", 11),
    ),
)
def test_a_dry_run_plans_every_stage(models, tmp_path, machine, asked, dataset, num_points):
    """Of a teacher that has not been measured too; nothing is written."""
    more = {"MACHINE": machine, "DATASET": asked, **PLAIN}
    if dataset == "gsm8k":  # its problems are of the hub
        source = {"question": "1+1=?", "answer": "2 #### 2"}
        more["DATA_DIR"] = str(tmp_path / "data")
        write_gsm8k(tmp_path / "data", source)
    result = run_small(models, tmp_path / "x", "--dry-run", **more)
    assert result.returncode == 0, result.stdout + result.stderr
    is_trained = dataset == "word_problems"
    assert "to do   given" in result.stdout and ("to do   teacher" in result.stdout) == is_trained
    assert f"data_split={dataset}_holdout" in result.stdout
    assert result.stdout.count("to do   train_tau") == num_points
    trained = str(tmp_path / "x" / "teacher" / "models" / "teacher" / "final")
    assert (f"teacher={trained} " in result.stdout) == is_trained
    assert "then    search: " in result.stdout and not (tmp_path / "x").exists()


def write_gsm8k(folder, row):
    folder.mkdir()
    for name in ("gsm8k_train", "gsm8k_platinum_test"):
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress((json.dumps(row) + "\n").encode() * 10))


def test_attackers_are_planned_at_the_points_of_equal_accuracy(models, tmp_path):
    (tmp_path / "matched.txt").write_text("# ads\n0.6 0.07 0\n# temperature\n1.3 0 0\n")
    result = run_small(models, tmp_path, "--dry-run", **PLAIN, TEACHER_LEAST="0", MATCH="0.7")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "to do   given" not in result.stdout  # any teacher will do
    for attack in ("", "_correct", "_mix25", "_repair"):
        for point in ("tau0.6_lam0.07_eps0", "tau1.3_lam0_eps0"):
            assert f"to do   student_{point}{attack}: " in result.stdout


def test_attackers_are_planned_at_points_that_were_chosen_elsewhere(models, tmp_path):
    """On another seed, for one; nothing is searched for, whatever MATCH says."""
    points = "--points 0.6,0.07,0"
    result = run_small(models, tmp_path / "x", "--dry-run", **PLAIN, TEACHER_LEAST="0", ATTACK_POINTS=points)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "search.py" not in result.stdout
    for attack in ("", "_correct", "_mix25", "_repair"):
        assert f"to do   student_tau0.6_lam0.07_eps0{attack}: " in result.stdout


@pytest.mark.parametrize(
    "settings,said",
    (
        ({"MACHINE": "tpu"}, "MACHINE='tpu': must be gpu or cpu"),
        ({"MACHINE": "gpu", "NPROC": "", "CUDA_VISIBLE_DEVICES": ""}, "MACHINE=gpu: there is none here"),
        ({"TEACHER_LEAST": "80"}, "TEACHER_LEAST='80': must be a share from 0 to 1"),
        ({"MATCH": "seventy"}, "MATCH='seventy': must be a share from 0 to 1, or empty"),
        ({"SEARCH_ARGS": "tolerence=0.1"}, "tolerence"),
        ({"NUM_PROBLEMS": "0"}, "NUM_PROBLEMS='0': must be a whole number from 1"),
        ({"TEACHER_PROBLEMS": "few"}, "TEACHER_PROBLEMS='few': must be a whole number"),
        ({"ATTACKS": "naive corect"}, "ATTACKS: 'corect' is neither one of"),
        ({"EXP_DIR": ""}, "EXP_DIR is empty"),
    ),
)
def test_a_mistake_is_one_line_before_anything_runs(models, tmp_path, settings, said):
    result = run_small(models, tmp_path / "x", **{**PLAIN, **settings})
    assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("setting", ("GRID_ARGS", "ATTACK_POINTS"))
def test_a_wrong_point_is_found_before_anything_runs(models, tmp_path, setting):
    result = run_small(models, tmp_path / "x", **{**PLAIN, setting: "--points 0.6,x,0"})
    assert result.returncode == 2 and result.stderr.endswith("'0.6,x,0': write tau,lam,eps\n")
    assert not (tmp_path / "x").exists()


def test_without_a_hub_it_says_what_to_give(tmp_path):
    """The hub's own words come first."""
    cache = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    none = {"teacher": "", "proxy": "", "student": ""}
    result = run_small(none, tmp_path / "x", "--dry-run", MACHINE="cpu", **PLAIN, **cache)
    error, hint = result.stderr.splitlines()
    assert (
        result.returncode == 2 and "HuggingFaceTB/SmolLM2-135M-Instruct is no folder, nor to be had" in error
    )
    assert "give folders of your own: TEACHER=path STUDENT=path" in hint


@pytest.mark.parametrize("name,is_early", (("TRAIN_ARGS", True), ("TEACHER_ARGS", False)))
def test_settings_of_late_stages_are_checked_before_a_teacher_is_trained(models, tmp_path, name, is_early):
    """Those of the teacher's own training are for that to refuse, once the others have passed."""
    few = {"NUM_PROBLEMS": "2", "TEACHER_PROBLEMS": "2", "GEN_ARGS": "max_length=512 max_prompt_length=500"}
    result = run_small(models, tmp_path / "x", **few, **{name: "num_epochz=1"})
    assert result.returncode == 2 and "teacher given: 0.000 of 2" in result.stdout
    assert "num_epochz" in result.stderr and result.stderr.count("error: ") == 1
    assert ("run     teacher " in result.stdout) != is_early and not (tmp_path / "x" / "traces").exists()


@pytest.mark.slow
def test_it_runs_to_its_end(models, tmp_path):
    """A tiny random teacher is trained, measured again, and refused; where any will do, all stages run. Of
    accuracy 0 no target can be matched, which is said and is exit code 1."""
    few = {
        "NUM_PROBLEMS": "6",
        "TEACHER_PROBLEMS": "6",
        "TEACHER_ARGS": "max_samples=16 num_epochs=1 max_length=512",
        "GEN_ARGS": "max_length=512 max_prompt_length=500",
        "FEW_SHOT_ARGS": "",
        "PREFILL": "",
        "TRAIN_ARGS": "num_epochs=1 lora_r=4 max_length=512",
        "SEARCH_ARGS": "max_samples=4 max_evaluations=2",
        "GRID_ARGS": "--points 0.8,0,0 0.8,0.05,0 0.8,0.5,0,poe 0.8,-0.05,0 0.8,0.5,0,corrupt",
        "TEACHER_DIR": str(tmp_path / "shared teacher"),
    }
    exp_dir = tmp_path / "an experiment"
    for _ in range(2):  # what is done is skipped
        result = run_small(models, exp_dir, **few)
        assert result.returncode == 2, result.stdout + result.stderr
        assert "0.000 of 6 holdout problems right" in result.stdout
        assert "after training, where TEACHER_LEAST=0.8 is wanted" in result.stderr.splitlines()[-1]
    assert "nothing to do" in result.stdout and not (exp_dir / "traces").exists()
    trained = files.read_yaml(tmp_path / "shared teacher" / "models" / "teacher.yaml")
    assert trained["stats"]["n"] == 16 and trained["config"]["lora"] is False
    result = run_small(models, exp_dir, **few, TEACHER_LEAST="0")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "not reachable" in (exp_dir / "matched.txt").read_text()
    assert "--- 5 of 5 points" in result.stdout and (exp_dir / "report" / "report.html").is_file()
    rows = [row["problem"] for row in word_problems.generate("test", seed=1, count=6)]
    table = read_parquet(exp_dir / "traces" / "student_base.parquet")
    assert rows == [row["problem"] for row in table]
