"""A sweep with several attacks: each grid point gets a student of each."""

import shutil
from pathlib import Path

import pytest
from helpers_pipeline import run_pipeline

from ads.data.tables import read_parquet
from ads.stage import files

POINT = "tau0.8_lam0_eps0"
ONE_POINT = "--points 0.8,0,0"
# The tiny models answer at random, so that no trace is right: two of these find nothing to train on.
SHIPPED = ("naive", "mix50", "mask20", "correct", "solo")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """An attacker of one's own is one file."""
    path = tmp_path_factory.mktemp("recipes") / "words.yaml"
    threat = "{labels: false, clean_traces: 0, queries: 1, models: none}"
    path.write_text(f"label: begins with a digit\nthreat: {threat}\ngentraces: {{prefill: '1'}}\n")
    return path


@pytest.fixture(scope="module")
def attacked(model_folders, problem_folder, recipe, tmp_path_factory):
    """(EXP_DIR, what a sweep of one point said, the attacks)."""
    exp_dir, attacks = tmp_path_factory.mktemp("attacked"), " ".join([*SHIPPED, str(recipe)])
    result = run_pipeline(model_folders, problem_folder, exp_dir, ATTACKS=attacks, GRID_ARGS=ONE_POINT)
    return exp_dir, result, attacks


def evaluated(exp_dir):
    return {path.stem.removeprefix("eval_student_") for path in exp_dir.glob("traces/eval_student_*.yaml")}


def test_each_attack_has_a_student_and_its_test(attacked):
    exp_dir, _, _ = attacked
    assert evaluated(exp_dir) == {POINT, f"{POINT}_mix50", f"{POINT}_mask20", f"{POINT}_words"}
    students = {path.name for path in exp_dir.glob("models/student_*") if path.is_dir()}
    assert students == {f"student_{POINT}{end}" for end in ("", "_mix50", "_mask20")}, (
        "words asks naive's student"
    )
    configs = {
        name: files.read_yaml(exp_dir / "traces" / f"eval_student_{name}.yaml")["config"]
        for name in evaluated(exp_dir)
    }
    assert {config["attacker"] for config in configs.values()} == {"naive", "mix50", "mask20", "words"}
    assert configs[f"{POINT}_words"]["prefill"] == "1"
    assert {path.stem for path in exp_dir.glob("attacks/*.yaml")} == {*SHIPPED, "words"}


def test_mixed_traces_are_the_published_and_the_clean_ones(attacked):
    exp_dir, _, _ = attacked
    clean, published, mixed = (
        [row["trace"] for row in read_parquet(exp_dir / "traces" / f"{name}.parquet")]
        for name in ("train_clean", f"train_{POINT}", f"attack_{POINT}_mix50")
    )
    replaced = [i for i, trace in enumerate(mixed) if trace != published[i]]
    assert len(replaced) == len(mixed) // 2 and all(mixed[i] == clean[i] for i in replaced)


def test_an_attack_without_a_row_is_said_and_no_failure(attacked):
    _, result, _ = attacked
    assert result.stderr.count("no row left: attack=correct: ") == 1
    assert result.stderr.count("no row left: attack=solo: ") == 1
    assert "FAILED" not in result.stderr


def test_run_again_skips_everything(attacked, model_folders, problem_folder):
    exp_dir, _, attacks = attacked
    again = run_pipeline(model_folders, problem_folder, exp_dir, ATTACKS=attacks, GRID_ARGS=ONE_POINT)
    assert "run     " not in again.stdout
    assert again.stdout.count("empty   attack_") == 4  # solo and correct, as settings are checked first


def test_a_dry_run_shows_the_stages_of_all_attacks(model_folders, problem_folder, recipe, tmp_path):
    attacks = f"naive mix50 resample4 solo {recipe}"
    settings = {"ATTACKS": attacks, "GRID_ARGS": "--points 0.8,0,0 0,0,0"}
    result = run_pipeline(model_folders, problem_folder, tmp_path / "new", "--dry-run", **settings)
    stages = [line.split()[2].rstrip(":") for line in result.stdout.splitlines() if line.startswith("to do")]
    shared = ["holdout", "student_grads", "student_base", "train_clean", "train_own"]
    of_solo = ["attack_solo", "student_solo", "eval_student_solo"]
    assert stages[:8] == shared + of_solo
    of_point = ["train", "samples", "eval_teacher", "student", "eval_student"]
    assert stages[8:13] == [f"{stage}_{POINT}" for stage in of_point]
    for attack in ("mix50", "resample4"):
        assert f"attack_{POINT}_{attack}" in stages
    assert "samples_tau0_lam0_eps0" not in stages, "greedy traces have no second sample"
    assert "empty   attack_tau0_lam0_eps0_resample4" in result.stdout
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("recipe_text", "words"),
    [
        ("distill: {lr: -1}", "lr=-1"),
        ("distil: {lr: 1e-4}", "distil"),
        ("attack: {attack: none_such}", "none_such"),
        ("gentraces: {tua: 1}", "tua"),
        (None, "no such attack"),
    ],
)
def test_a_wrong_recipe_is_one_line_before_anything_runs(
    model_folders, problem_folder, tmp_path, recipe_text, words
):
    path = tmp_path / "wrong.yaml"
    if recipe_text is not None:
        threat = "threat: {labels: false, clean_traces: 0, queries: 1, models: none}"
        path.write_text(f"label: wrong\n{threat}\n{recipe_text}\n")
    result = run_pipeline(model_folders, problem_folder, tmp_path / "new", check=False, ATTACKS=str(path))
    assert result.returncode == 2 and "run     " not in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "wrong.yaml" in line and (words in line or recipe_text is None)


def test_an_attack_that_fails_leaves_the_others(attacked, model_folders, problem_folder, recipe, tmp_path):
    """A rate at which the loss is no number fails while it trains; the attack after it is made all the same."""
    exp_dir = Path(shutil.copytree(attacked[0], tmp_path / "copy"))
    wild = recipe.with_name("wild.yaml")
    wild.write_text(recipe.read_text().partition("gentraces")[0] + "distill: {lr: 1e30, max_grad_norm: 1e30}\n")
    settings = {"ATTACKS": f"{wild} mask10", "GRID_ARGS": ONE_POINT}
    result = run_pipeline(model_folders, problem_folder, exp_dir, check=False, **settings)
    assert result.returncode == 1 and f"FAILED (1 of 1 points" in result.stderr
    assert "training loss is" in result.stderr + result.stdout
    assert f"{POINT}_mask10" in evaluated(exp_dir) and f"{POINT}_wild" not in evaluated(exp_dir)


def test_students_of_attacks_are_deleted_on_request(attacked, model_folders, problem_folder, tmp_path):
    exp_dir = Path(shutil.copytree(attacked[0], tmp_path / "copy"))
    settings = {"ATTACKS": attacked[2], "GRID_ARGS": ONE_POINT, "KEEP_STUDENTS": "0"}
    for _ in range(2):
        again = run_pipeline(model_folders, problem_folder, exp_dir, **settings)
        assert "run     " not in again.stdout and not list(exp_dir.glob("models/*/final"))
