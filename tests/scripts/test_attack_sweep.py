"""A sweep with several attacks: each grid point gets a student of each."""

import pytest
from helpers_pipeline import run_pipeline

from ads.data.tables import read_parquet
from ads.stage import files

POINT = "tau0.8_lam0_eps0"
ONE_POINT = "--points 0.8,0,0"
# The tiny models answer at random, so that no trace is right: two of these find nothing to train on.
SHIPPED = ("mix50", "mask20", "correct", "solo")


THREAT = "threat: {labels: false, clean_traces: 0, queries: 1, models: none}"


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """{name: path}: an attacker of one's own is one file. `wild` fails while it trains."""
    folder, found = tmp_path_factory.mktemp("recipes"), {}
    sections = {
        "words": "gentraces: {prefill: '1'}",
        "wild": "distill: {lr: 1.0e+30, max_grad_norm: 1.0e+30}",
    }
    for name, section in sections.items():
        found[name] = folder / f"{name}.yaml"
        found[name].write_text(f"label: {name}\n{THREAT}\n{section}\n")
    return found


@pytest.fixture(scope="module")
def attacked(model_folders, problem_folder, recipes, tmp_path_factory):
    """(EXP_DIR, what a sweep of one point said, its settings)."""
    exp_dir = tmp_path_factory.mktemp("attacked")
    attacks = " ".join(map(str, ["naive", *recipes.values(), *SHIPPED]))
    settings = {"ATTACKS": attacks, "GRID_ARGS": ONE_POINT}
    return exp_dir, run_pipeline(model_folders, problem_folder, exp_dir, check=False, **settings), settings


def evaluated(exp_dir):
    return {path.stem.removeprefix("eval_student_") for path in exp_dir.glob("traces/eval_student_*.yaml")}


def test_each_attack_has_a_student_and_its_test(attacked, recipes):
    exp_dir, _, _ = attacked
    assert evaluated(exp_dir) == {POINT, f"{POINT}_mix50", f"{POINT}_mask20", f"{POINT}_words"}
    students = {path.name for path in exp_dir.glob("models/student_*") if path.is_dir()}
    ends = ("", "_mix50", "_mask20", "_wild")  # words asks naive's student
    assert students == {f"student_{POINT}{end}" for end in ends}
    configs = {
        name: files.read_yaml(exp_dir / "traces" / f"eval_student_{name}.yaml")["config"]
        for name in evaluated(exp_dir)
    }
    assert {config["attacker"] for config in configs.values()} == {"naive", "mix50", "mask20", "words"}
    assert configs[f"{POINT}_words"]["prefill"] == "1"
    assert {path.stem for path in exp_dir.glob("attacks/*.yaml")} == {"naive", *SHIPPED, *recipes}


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
    for attack in ("correct", "solo"):
        assert (result.stdout + result.stderr).count(f"no row left: attack={attack}: ") == 1


def test_an_attack_that_fails_leaves_the_others(attacked):
    """A rate at which the loss is no number; the attacks after it are made all the same."""
    exp_dir, result, _ = attacked
    assert result.returncode == 1 and "FAILED (1 of 1 points" in result.stderr
    assert "training loss is" in result.stdout + result.stderr
    assert f"{POINT}_mask20" in evaluated(exp_dir)


def test_a_dry_run_shows_the_stages_of_all_attacks(model_folders, problem_folder, recipes, tmp_path):
    attacks = f"naive mix50 resample4 solo {recipes['words']}"
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


def test_samples_of_an_earlier_run_do_for_attacks_that_need_fewer(model_folders, problem_folder, tmp_path):
    """A sweep that went on with resample2 after resample4 was refused at every point."""
    settings = {"ATTACKS": "resample4", "GRID_ARGS": ONE_POINT}
    run_pipeline(model_folders, problem_folder, tmp_path, **settings)
    settings["ATTACKS"] = "resample2"
    result = run_pipeline(model_folders, problem_folder, tmp_path, "--dry-run", **settings)
    assert (
        f"done    samples_{POINT}" in result.stdout and f"to do   attack_{POINT}_resample2" in result.stdout
    )
    assert "refused" not in result.stdout


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
        path.write_text(f"label: wrong\n{THREAT}\n{recipe_text}\n")
    result = run_pipeline(model_folders, problem_folder, tmp_path / "new", check=False, ATTACKS=str(path))
    assert result.returncode == 2 and "run     " not in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "wrong.yaml" in line and (words in line or recipe_text is None)


def test_run_again_runs_what_failed_alone_and_deletes_what_is_evaluated(
    attacked, recipes, model_folders, problem_folder
):
    exp_dir, _, settings = attacked
    again = run_pipeline(model_folders, problem_folder, exp_dir, check=False, **settings)
    ran = [line.split()[1] for line in again.stdout.splitlines() if line.startswith("run ")]
    assert ran == [f"student_{POINT}_wild"] and again.returncode == 1
    assert (
        again.stdout.count("empty   attack_") == 3
    )  # correct again, as wild's failure has all looked at anew
    settings |= {"ATTACKS": settings["ATTACKS"].replace(str(recipes["wild"]), ""), "KEEP_STUDENTS": "0"}
    again = run_pipeline(model_folders, problem_folder, exp_dir, **settings)
    assert "run     " not in again.stdout and not list(exp_dir.glob("models/*/final"))
