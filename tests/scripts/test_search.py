"""search.py: its search on synthetic curves, then as a user runs it; and grid.py on what it writes."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import pyarrow.parquet
import pytest
from conftest import ROOT, run_script

import search
from ads.data import arithmetic
from ads.data.problems import load_problems
from ads.defences import matching
from ads.stage import files
from ads.stage.settings import GenConfig, SearchConfig

CFG = SearchConfig(targets="0.5")
LIMITS = matching.Limits(0.0, 0.01, 1.28)


# The search, on curves


def falling(x):
    """0.9 at 0, half of it at 0.06."""
    return 0.9 / (1 + (x / 0.06) ** 2)


def step(x):
    return 0.9 if x < 0.05 else 0.5


def flat(x):
    return 0.8


def noisy(seed):
    """300 problems that each fail from some x on, and are right or wrong by chance one time in 30."""
    rng = random.Random(seed)
    lasts = [rng.lognormvariate(-3, 1) for _ in range(300)]

    def accuracy(x):
        chance = random.Random(f"{seed} {x}")
        return sum(chance.random() < 0.5 if chance.random() < 1 / 30 else x < last for last in lasts) / 300

    return accuracy


def find(curve, target, pool=None, limits=LIMITS, **settings):
    """(Found, the values that were evaluated)."""
    asked = []
    pool = {} if pool is None else pool

    def evaluate(x):
        asked.append(x)
        return matching.Measured(curve(x), 0.02, 300)

    return matching.find_value("ads", target, limits, replace(CFG, **settings), pool, evaluate), asked


@pytest.mark.parametrize("target", (0.88, 0.85, 0.7, 0.5, 0.3))
def test_a_target_on_a_smooth_curve_is_hit(target):
    found, asked = find(falling, target)
    assert found.outcome == matching.HIT and abs(falling(found.x) - target) <= 0.01
    assert found.measured.value == falling(found.x) and found.x == asked[-1]
    assert len(asked) <= 8 and len(set(asked)) == len(asked)


def test_the_first_steps_double_and_the_next_stay_inside_the_bracket():
    _, asked = find(falling, 0.3, tolerance=0)
    assert asked[:6] == [0, 0.01, 0.02, 0.04, 0.08, 0.16]
    assert all(0.08 < x < 0.16 and x == float(f"{x:.3g}") for x in asked[6:]) and len(asked) == 8


def test_targets_share_what_was_measured():
    pool = {}
    evaluations = [find(falling, target, pool)[1] for target in (0.8, 0.6, 0.4)]
    asked = [x for part in evaluations for x in part]
    assert len(asked) == len(set(asked)) == len(pool)
    assert all(
        len(part) < len(find(falling, t)[1]) for t, part in zip((0.6, 0.4), evaluations[1:], strict=True)
    )
    again, asked = find(falling, 0.6, pool)
    assert asked == [] and again.outcome == matching.HIT


def test_a_target_above_the_curve_costs_one_evaluation():
    found, asked = find(falling, 0.95)
    assert found.outcome == matching.TOO_HIGH and asked == [0] and found.x == 0
    assert find(falling, 0.905)[0].outcome == matching.HIT


def test_a_target_below_the_curve_is_given_up_at_the_last_value():
    found, asked = find(flat, 0.5, limits=matching.Limits(0.6, 1.2, 4.0))
    assert found.outcome == matching.TOO_FAR and asked == [0.6, 1.2, 2.4, 4.0]
    assert found.measured.value == 0.8


def test_a_jump_over_the_target_ends_at_its_nearer_side():
    found, asked = find(step, 0.6, max_evaluations=20)
    assert found.outcome == matching.NEAREST and found.measured.value == 0.5
    left, right = max(x for x in asked if x < 0.05), min(x for x in asked if x >= 0.05)
    assert found.x == right and 0 < right - left <= 0.05 * right


def test_a_search_that_is_cut_short_says_so_and_can_be_gone_on_with():
    pool = {}
    found, asked = find(falling, 0.3, pool, max_evaluations=3)
    assert found.outcome == matching.UNFINISHED and asked == [0, 0.01, 0.02] and found.x == 0.02
    found, more = find(falling, 0.3, pool)
    assert found.outcome == matching.HIT and not set(more) & set(asked)


def rising(x):
    """NLL in nats per token: 0.3 at 0, and without an end."""
    return 0.3 + 5 * x


def dipping(x):
    """NLL of a score that at first makes the likely likelier: 0.1 at 0.1."""
    return 0.3 + 20 * x * (x - 0.2)


DIPPING = [(dipping, target) for target in (0.28, 0.2, 0.13, 0.5, 1.0)]


@pytest.mark.parametrize("curve,target", [*((rising, t) for t in (0.33, 0.5, 0.7, 1.0)), *DIPPING])
def test_a_target_is_hit_whether_nll_rises_or_falls_towards_it(curve, target):
    """With lam of ads NLL rises, with that of poe it may fall at first."""
    found, asked = find(curve, target, match="nll", tolerance=0.02, max_evaluations=12)
    assert found.outcome == matching.HIT and abs(curve(found.x) - target) <= 0.02 + 1e-9
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("target", (0.2, 90.0))
def test_an_nll_on_either_side_is_given_up_at_the_last_value(target):
    found, asked = find(rising, target, match="nll", limits=matching.Limits(0.6, 1.2, 1.5))
    assert found.outcome == matching.TOO_FAR and asked == [0.6, 1.2, 1.5]


def test_targets_on_both_sides_share_what_was_measured():
    pool = {}
    settings = {"match": "nll", "tolerance": 0.02, "max_evaluations": 12}
    high, asked = find(dipping, 0.5, pool, **settings)
    low, more = find(dipping, 0.2, pool, **settings)
    assert high.outcome == low.outcome == matching.HIT and low.x < 0.1 < high.x
    assert not set(more) & set(asked) and len(more) < len(asked)


def test_noise_neither_exceeds_the_budget_nor_passes_for_a_hit():
    outcomes = []
    for seed in range(40):
        curve, pool = noisy(seed), {}
        for target in (0.9, 0.7, 0.5):
            found, asked = find(curve, target, pool)
            assert len(asked) <= 8 and all(0 <= x <= 1.28 for x in asked)
            assert (found.outcome == matching.HIT) == (abs(curve(found.x) - target) <= 0.01 + 1e-9)
            outcomes.append(found.outcome)
    assert set(outcomes) <= {matching.HIT, matching.NEAREST, matching.UNFINISHED}
    assert outcomes.count(matching.HIT) >= 110, outcomes


# The script

GEN = ["max_length=140", "max_prompt_length=115", "answer_force=false", "batch_size=12"]


def words_for(models, folder):
    return ["--", f"teacher={models['teacher']}", f"proxy_student={models['proxy']}",
            f"grad_path={folder}/student_grads.safetensors", "eps=1e-3", *GEN]  # fmt: skip


@pytest.fixture(scope="module")
def experiment(model_folders, tmp_path_factory):
    """(folder with the gradient, data set whose answers are what the teacher says at tau 0.6)."""
    exp_dir, data = tmp_path_factory.mktemp("exp"), tmp_path_factory.mktemp("answers")
    rows = [{"id": f"p{i}", "problem": f"{i}+{i}=?", "solution": "\\boxed{0}"} for i in range(24)]
    write_rows(data, rows)
    stage = [f"exp_dir={exp_dir}", f"teacher={model_folders['teacher']}", f"data_split={data}_train"]
    run_script("gentraces.py", *stage, "trace_name=clean", "tau=0.6", *GEN)
    traces = exp_dir / "traces" / "clean.parquet"
    run_script(
        "save_grad.py", stage[0], f"proxy_student={model_folders['proxy']}", f"holdout_traces={traces}"
    )
    answers = {row["id"]: row["raw_answer"] for row in pyarrow.parquet.read_table(traces).to_pylist()}
    write_rows(
        data, [{**row, "solution": f"\\boxed{{{answers[row['id']]}}}"} for row in rows if answers[row["id"]]]
    )
    return exp_dir, str(data)


def write_rows(folder, rows):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_search(experiment, models, *arguments, check=False, **keywords):
    exp_dir, data = experiment
    own = [f"exp_dir={exp_dir}", f"data_split={data}_train", "rule=raw", *arguments]
    return run_script("search.py", *own, *words_for(models, exp_dir), check=check, **keywords)


# Any accuracy from 0.2 to 0.8 will do for 0.5: that of a random model falls at the first change of settings.
BOTH = ("targets=0.5,0.99", "tolerance=0.3", "lam_start=0.004", "tau_start=0.603")
STAGES = ["search_tau0.603_lam0", "search_tau0.6_lam0", "search_tau0.6_lam0.004"]


@pytest.fixture(scope="module")
def found(experiment, model_folders):
    return run_search(experiment, model_folders, *BOTH, check=True)


def sidecars(exp_dir):
    return {path.stem: path.stat().st_mtime_ns for path in (exp_dir / "search" / "traces").glob("*.yaml")}


def grid_of(path, *more):
    return run_script("grid.py", "--file", str(path), *more).stdout.splitlines()


def test_both_arms_are_searched_and_the_grid_reads_what_was_found(experiment, found):
    exp_dir, data = experiment
    assert sorted(sidecars(exp_dir)) == STAGES and found.stdout.count("run     ") == 3
    assert "not measured again on other problems: max_samples=300 leaves no two of" in found.stdout
    assert [path.stem for path in (exp_dir / "traces").glob("*.yaml")] == ["clean"]  # the report's points
    assert all((exp_dir / "search" / "logs" / f"{name}.log").stat().st_size for name in STAGES)
    assert grid_of(exp_dir / "matched.txt") == ["0.6 0 0", "0.6 0.004 0.001", "0.603 0 0"]
    matches = json.loads(found.stdout.splitlines()[-1])["matches"]
    assert [(m["arm"], m["target"], m["tau"], m["lam"]) for m in matches] == [
        ("ads", 0.99, 0.6, 0.0),
        ("ads", 0.5, 0.6, 0.004),
        ("temperature", 0.99, 0.6, 0.0),
        ("temperature", 0.5, 0.603, 0.0),
    ]
    for match in matches:
        name = f"search_tau{match['tau']:g}_lam{match['lam']:g}"
        sidecar = files.read_yaml(exp_dir / "search" / "traces" / f"{name}.yaml")
        assert sidecar["stats"]["raw"]["accuracy"] == match["accuracy"] and match["outcome"] == "hit"
        assert sidecar["config"]["data_split"] == f"{data}_train" and sidecar["stats"]["n"] == match["n"]
    text = (exp_dir / "matched.txt").read_text()
    assert text.startswith("# search.py exp_dir=") and "# ads, target 0.99: hit, raw accuracy 1.000 (" in text


def test_a_second_search_runs_nothing_and_writes_the_same(experiment, model_folders, found):
    exp_dir, _ = experiment
    before, text = sidecars(exp_dir), (exp_dir / "matched.txt").read_text()
    again = run_search(experiment, model_folders, *BOTH, check=True)
    assert "run     " not in again.stdout and sidecars(exp_dir) == before
    assert again.stdout.splitlines()[-1] == found.stdout.splitlines()[-1]
    assert (exp_dir / "matched.txt").read_text() == text


def test_an_unreachable_target_is_named_and_the_others_are_written(experiment, model_folders, found):
    bounds = ("lam_start=0.004", "lam_max=0.004", "output=low.txt", "arms=ads")
    result = run_search(experiment, model_folders, "targets=0.99,0.1", *bounds)
    assert result.returncode == 1 and "run     " not in result.stdout  # all this was measured for BOTH
    words = "target 0.1: not reachable, not even at the greatest value (best: raw accuracy"
    assert words in result.stdout
    assert "at tau 0.6 lam 0.004); raise lam_max" in result.stdout
    outcomes = [match["outcome"] for match in json.loads(result.stdout.splitlines()[-1])["matches"]]
    assert outcomes == [matching.HIT, matching.TOO_FAR]
    assert grid_of(experiment[0] / "low.txt") == ["0.6 0 0"]


def test_a_stage_done_with_other_settings_is_an_error_that_names_them(experiment, model_folders, found):
    result = run_search(experiment, model_folders, *BOTH, "max_samples=5")
    assert result.returncode == 2 and "max_samples was 300, now 5" in result.stderr
    assert "run     " not in result.stdout


def test_a_control_direction_is_an_arm_with_a_name_and_a_column_of_its_own():
    words = ["grad_path=g", "proxy_student=p", "eps=2e-3"]
    found = matching.Found("random", 0.5, 0.02, matching.Measured(0.5, 0.05, 100), matching.HIT)
    assert search.grid_lines(found, CFG, words)[-1] == "0.6 0.02 0.002 defence=random"
    stage = search.stage_config(search.make_trial("random", 0.02, CFG), CFG, words)
    assert (stage.trace_name, stage.defence) == ("search_tau0.6_lam0.02_random", "random")
    assert search.make_trial("random", 0.0, CFG) == search.make_trial("temperature", 0.6, CFG)


# Arms with words, and what other problems say


@pytest.mark.parametrize(
    "diagnostics,arm,given,start,most",
    (
        ({"lam_of_spread": {"0.1": 0.5, "0.5": 2.5}}, "ads max_kl=1", {}, 2.5, 320.0),
        ({"lam_of_spread": {"0.1": 0.5, "0.5": 2.5}}, "random", {}, 2.5, 320.0),
        ({"lam_of_spread": {"0.1": 0.5, "0.5": 2.5}}, "poe", {}, 0.1, 12.8),
        ({"lam_of_spread": {"0.1": 0.5, "0.5": 2.5}}, "ads", {"lam_start": 0.7}, 0.7, 89.6),
        ({"lam_of_spread": {"0.1": 0.5, "0.5": 2.5}}, "ads", {"lam_max": 2.0}, 2.0, 2.0),
        ({"lam_of_spread": {}}, "ads", {}, 0.01, 1.28),  # a gradient of zeros
        (None, "ads", {}, 0.01, 1.28),  # no diagnostics
    ),
)
def test_an_arm_starts_where_stage_2_suggests(tmp_path, diagnostics, arm, given, start, most):
    gradient = tmp_path / "student_grads.safetensors"
    text = json.dumps({"config": {}, "stats": {}, "diagnostics": diagnostics, "seconds": 1})
    gradient.with_suffix(".yaml").write_text(text)
    cfg, words = replace(CFG, arms=arm, **given), ["proxy_student=p", f"grad_path={gradient}"]
    assert search.limits_of(arm, cfg, words) == matching.Limits(0.0, start, pytest.approx(most))


def test_without_a_gradient_an_arm_starts_at_a_constant():
    assert search.limits_of("ads", CFG, ["proxy_student=p"]).start == 0.01


def test_an_arm_has_words_as_the_grid_does_and_its_points_tell_them():
    """A cap given after -- once capped what was searched, and was lost in the grid's line."""
    cfg = replace(
        CFG, arms="poe, poe max_kl=0.1  plausibility=0.2,random direction_seed=3,temperature top_p=1"
    )
    assert cfg.arm_names[1:3] == ["poe max_kl=0.1 plausibility=0.2", "random direction_seed=3"]
    trials = [search.make_trial(arm, 0.7, cfg) for arm in cfg.arm_names]
    assert [trial.words for trial in trials] == [(), ("max_kl=0.1",), ("direction_seed=3",), ("top_p=1",)]
    assert trials[1].name == "search_tau0.6_lam0.7_poe_max_kl=0.1"
    words = ["grad_path=g", "proxy_student=p", "eps=2e-3"]
    found = [
        matching.Found(arm, 0.5, 0.7, matching.Measured(0.5, 0.05, 100), matching.HIT)
        for arm in cfg.arm_names
    ]
    assert [search.grid_lines(f, cfg, words)[-1] for f in found] == [
        "0.6 0.7 0 defence=poe",
        "0.6 0.7 0 defence=poe max_kl=0.1",
        "0.6 0.7 0.002 defence=random direction_seed=3",
        "0.7 0 0 top_p=1",
    ]
    assert search.make_trial("ads", 1e-9, cfg).name == "search_tau0.6_lam1e-09"
    none = {search.make_trial(arm, 0.0, cfg) for arm in cfg.arm_names[:3]}
    assert none == {search.Trial("0.6", "0", "ads")}, "without lam all arms are one, whatever their caps"


@pytest.mark.parametrize("again,told,is_hit", ((0.55, "(standard", True), (0.64, "OFF the target", False)))
def test_a_hit_that_other_problems_do_not_confirm_is_flagged(again, told, is_hit):
    """Within the tolerance and two standard errors of the new measurement, here 0.11, chance will do."""
    measured = matching.Measured(0.51, 0.03, 300), matching.Measured(again, 0.05, 100)
    found = matching.Found("poe", 0.5, 0.02, measured[0], matching.HIT, measured[1])
    lines = search.grid_lines(found, CFG, ["proxy_student=p"])
    assert "hit, af accuracy 0.510 (standard error 0.030, 300 problems)" in lines[0]
    assert f"on other problems: {again:.3f} (standard error 0.050, 100 problems)" in lines[1]
    assert told in lines[1] and lines[2] == "0.6 0.02 0 defence=poe"
    described = search.describe(found, CFG)
    assert described["accuracy"] == again and described["n"] == 100 and described["holds"] == is_hit
    assert described["searched"]["value"] == 0.51 and described["outcome"] == "hit"
    alone = replace(found, again=None)
    assert search.describe(alone, CFG)["holds"] is None and search.describe(alone, CFG)["accuracy"] == 0.51
    assert search.grid_lines(alone, CFG, ["proxy_student=p"])[1] == "#   not measured again on other problems"


def test_the_error_of_an_accuracy_of_several_samples_is_that_of_its_problems(tmp_path):
    """num_correct counts samples: taken for problems, the search ended in `math domain error`."""
    stage = GenConfig(exp_dir=str(tmp_path), trace_name="t", tau=0.6, num_samples=4)
    stats = {"n": 20, "af": {"accuracy": 0.9, "num_correct": 72}}
    files.write_text(stage.sidecar_path, json.dumps({"stats": stats}))
    measured = search.measure(stage, CFG)
    assert (measured.value, measured.n) == (0.9, 20)
    assert measured.standard_error == pytest.approx((20 / 24 * 4 / 24 / 24) ** 0.5)


@pytest.fixture(scope="module")
def demo_problems(tmp_path_factory):
    """A data set of 60 of the demo's problems, the first of them twice."""
    folder = tmp_path_factory.mktemp("demo")
    rows = [{**row, "level": 1} for row in arithmetic.generate("train", 3, 60)]
    write_rows(folder, [*rows, {**rows[0], "id": "twin"}])
    return f"{folder}_train"


@pytest.mark.parametrize("most,others", ((20, 20), (40, 20), (60, 0), (None, 0)))
def test_other_problems_are_others_of_the_split(demo_problems, most, others):
    """By their text, too: a split may hold a problem twice."""
    cfg = SearchConfig(targets="0.5", data_split=demo_problems, max_samples=most)
    found = search.other_problems(cfg, ["seed=3"])
    texts = {row["problem"] for row in found}
    searched = {row["problem"] for row in load_problems(demo_problems, None, most, seed=3)}
    assert abs(len(found) - others) <= 1 and not texts & searched  # the twins may be both in or out
    assert texts <= {row["problem"] for row in load_problems(demo_problems)}
    assert found == search.other_problems(cfg, ["seed=3"])


NLL = ("match=nll", "targets=0.03", "tolerance=0.02", "arms=poe max_kl=0.1", "tau=1", "lam_start=0.5")


def run_nll(problems, exp_dir):
    models = ROOT / "demo" / "models"
    settings = ["max_length=200", "max_prompt_length=100", "batch_size=24", "top_k=0", "top_p=1"]
    words = ["--", f"teacher={models / 'teacher'}", f"proxy_student={models / 'proxy'}", *settings]
    own = [f"exp_dir={exp_dir}", f"data_split={problems}", "max_samples=24", *NLL]
    return run_script("search.py", *own, *words, "answer_force=false", check=False)


def test_a_capped_arm_is_matched_by_nll_and_measured_again(demo_problems, tmp_path):
    """PoE lowers NLL; its hit is measured on problems that were not searched on, and once."""
    first = run_nll(demo_problems, tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    (match,) = json.loads(first.stdout.splitlines()[-1])["matches"]
    names = [
        "search_tau1_lam0",
        "search_tau1_lam0.5_poe_max_kl=0.1",
        "search_tau1_lam0.5_poe_max_kl=0.1_fresh",
    ]
    assert sorted(sidecars(tmp_path)) == names and first.stdout.count("run     ") == 3
    tables = [
        pyarrow.parquet.read_table(tmp_path / "search" / "traces" / f"{name}.parquet").to_pylist()
        for name in names
    ]
    searched, other = ({row["problem"] for row in table} for table in tables[1:])
    assert len(searched) == len(other) == 24 and not searched & other
    for key, table in zip(("searched", "again"), tables[1:], strict=True):
        nlls = [row["teacher_nll"] for row in table]
        assert match[key]["value"] == pytest.approx(statistics.fmean(nlls), abs=1e-5)
        assert match[key]["standard_error"] == pytest.approx(statistics.stdev(nlls) / 24**0.5)
    assert match["nll"] == match["again"]["value"] and match["arm"] == "poe max_kl=0.1" and match["n"] == 24
    assert files.read_yaml(tmp_path / "search" / "traces" / f"{names[2]}.yaml")["config"]["max_kl"] == 0.1
    text = (tmp_path / "matched.txt").read_text()
    for key in ("searched", "again"):
        assert f"{match[key]['value']:.3f} (standard error {match[key]['standard_error']:.3f}" in text
    assert grid_of(tmp_path / "matched.txt") == ["1 0.5 0 defence=poe max_kl=0.1"]
    # from another name of the folder, whose contents are the same
    (link := tmp_path.with_name(f"{tmp_path.name}-link")).symlink_to(tmp_path)
    again = run_nll(demo_problems, link)
    assert again.returncode == 0 and "run     " not in again.stdout, again.stdout + again.stderr
    assert sorted(sidecars(tmp_path)) == names


# Failure and interruption: the launcher is a shell script


def launch_of(folder, script):
    path = folder / "launch.sh"
    path.write_text(script)
    return ["targets=0.9", "arms=temperature", "tau=0.3", f"launch=bash {path}"]


@pytest.mark.parametrize("script,status", (("exit 7", 7), ("kill -INT $$", 130), ("kill -KILL $$", 137)))
def test_a_failing_stage_ends_the_search_with_its_exit_code(
    experiment, model_folders, tmp_path, script, status
):
    arguments = launch_of(tmp_path, f"echo the reason; {script}")
    result = run_search(experiment, model_folders, *arguments, f"output={status}.txt")
    log = experiment[0] / "search" / "logs" / "search_tau0.3_lam0.log"
    assert result.returncode == status and "the reason" in log.read_text()
    assert result.stderr == f"error: search_tau0.3_lam0 ended with exit code {status}: see {log}\n"
    assert not (experiment[0] / f"{status}.txt").exists()


@pytest.mark.parametrize("number,status", ((signal.SIGINT, 130), (signal.SIGTERM, 143)))
def test_an_interrupted_search_stops_its_stage(experiment, model_folders, tmp_path, number, status):
    """The signal goes to the search alone, as from `kill`; a terminal's Ctrl-C reaches both."""
    exp_dir, data = experiment
    pid = tmp_path / "pid"
    arguments = launch_of(tmp_path, f"echo $$ > {pid}.tmp; mv {pid}.tmp {pid}; exec sleep 60")
    own = [f"exp_dir={exp_dir}", f"data_split={data}_train", "rule=raw", *arguments]
    command = [sys.executable, str(ROOT / "search.py"), *own, *words_for(model_folders, exp_dir)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while not pid.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=300) == status
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


# Bad input

OWN = "targets=0.9 exp_dir={exp} data_split={data}_train rule=raw "
BAD = (
    ("exp_dir={exp} --", "targets is not set: give the accuracies to hit"),
    (OWN + "targets=90 --", "targets=90: must be shares between 0 and 1"),
    (OWN + "targets=0 --", "targets=0: must be shares between 0 and 1"),
    (OWN + "targets=1.2,0.5 --", "targets=1.2,0.5: must be shares between 0 and 1"),
    (OWN + "targets=0.9,,0.8 --", "targets='0.9,,0.8' in the command line: must be numbers, such as 0.9"),
    (OWN + "targets=-1 --", "targets=-1 in the command line: must be numbers, such as 0.9"),
    (OWN + "match=nll targets=0.5,0 --", "targets=0.5,0: must be nats per token, above 0"),
    (OWN + "match=kl --", "match='kl' in the command line: must be one of accuracy, nll"),
    (
        OWN + "arms=ads,heat --",
        "arms='ads,heat' in the command line: must be one of ads, random, permuted, poe",
    ),
    (OWN + "rule=strict --", "rule='strict' in the command line: must be one of af, raw"),
    (OWN + "data_split={data}_test --", "settings chosen on test problems spoil the test"),
    (OWN + "lam_start=0 --", "lam_start=0 in the command line: must be a finite number, above 0"),
    (OWN + "lam_start=3 lam_max=1.28 --", "lam_max=1.28: must be at least lam_start=3.0"),
    (OWN + "tau=2 --", "tau_start=1.2: must be above tau=2.0"),
    (
        OWN + "max_evaluations=0 --",
        "max_evaluations=0 in the command line: must be a whole number, at least 1",
    ),
    (OWN + "output=../x --", "output='../x' in the command line: must be a plain file name"),
    (OWN + "teacher={teacher}", "unknown key 'teacher' in the command line; known keys: arms"),
    (OWN + "-- tau=1", "'tau=1' after --: the search sets tau"),
    (OWN + "-- --exp_dir=x", "'--exp_dir=x' after --: the search sets exp_dir"),
    (OWN + "-- max_kl=0.1", "'max_kl=0.1' after --: it is part of an arm, such as arms='poe max_kl=...'"),
    (OWN + "arms=poe_max_kl=0.1 --", "in the command line: must be one of ads, random"),
    (OWN + "-- tua=1", "unknown key 'tua' in the command line; known keys: answer_force"),
    (OWN + "--", "lam=0.01: needs grad_path"),
    (OWN + "-- teacher={teacher} proxy_student={proxy} grad_path=none", "none does not exist: make it"),
    (OWN + "rule=af arms=temperature -- answer_force=false", "rule=af: needs answer_force=true"),
    (OWN + "launch=no_such_launcher --", "there is no command 'no_such_launcher'"),
    (OWN + "exp_dir={data}/train.jsonl arms=temperature -- teacher={teacher}", "cannot be made"),
)


@pytest.mark.parametrize("command,words", BAD, ids=[words[:40] for _, words in BAD])
def test_bad_input_is_one_line_before_anything_runs(experiment, model_folders, tmp_path, command, words):
    places = {**model_folders, "exp": tmp_path / "new", "data": experiment[1]}
    result = run_script("search.py", *(word.format_map(places) for word in command.split()), check=False)
    assert result.returncode == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ") and words in result.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arm,words",
    (
        ("poe seed=3", "arms='poe seed=3': seed is no key of gentraces.py that an arm may set"),
        ("poe max_samples=3", "max_samples is no key of gentraces.py that an arm may set"),
        ("poe defence=ads", "defence is no key of gentraces.py that an arm may set"),
        ("poe max_kl=-1", "max_kl=-1 in arms: must be"),
        (
            "poe prefill=a/b",
            "search_tau0.6_lam0.1_poe_prefill=a/b' in the command line: must be a plain file name",
        ),
        ("poe max_kl", "arms='poe max_kl' in the command line: must be one of ads"),
        ("corrupt", "arms='corrupt' in the command line: must be one of ads"),
    ),
)
def test_a_bad_word_of_an_arm_is_one_line(tmp_path, arm, words):
    own = [f"exp_dir={tmp_path / 'new'}", "targets=0.9", f"arms={arm}", "rule=raw", "--", "proxy_student=p"]
    result = run_script("search.py", *own, check=False)
    assert result.returncode == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert words in result.stderr and not (tmp_path / "new").exists()


def test_a_search_among_several_processes_is_refused(experiment, model_folders):
    result = run_search(experiment, model_folders, "targets=0.9", WORLD_SIZE="2")
    assert result.returncode == 2 and "search.py is one process" in result.stderr


# grid.py

POINTS = "# found\n\n0.6 0 0\n  0.6 0.03 1e-3  \n# again\n0.6 0 0\n0.6 0.03 1e-3 random\n"


def test_grid_of_a_file(tmp_path):
    (tmp_path / "points.txt").write_text(POINTS)
    points = ["0.6 0 0", "0.6 0.03 1e-3", "0.6 0.03 1e-3 defence=random"]
    assert grid_of(tmp_path / "points.txt") == points
    assert grid_of(tmp_path / "points.txt", "--shard", "1/2") == points[1:2]


def test_a_point_may_name_a_defence_and_any_other_key():
    """The fourth and fifth word were once the direction and its seed."""
    points = [
        "0.6,0.03,1e-3,permuted",
        "0.6,0.03,1e-3,random,7",
        "0.6,0,0",
        "0.6,1,0,defence=poe,max_kl=0.08,top_p=1",
    ]
    assert run_script("grid.py", "--points", *points).stdout.splitlines() == [
        "0.6 0.03 1e-3 defence=permuted",
        "0.6 0.03 1e-3 defence=random direction_seed=7",
        "0.6 0 0",
        "0.6 1 0 defence=poe max_kl=0.08 top_p=1",
    ]


@pytest.mark.parametrize(
    "text,words",
    (
        ("0.6 0 0\n\n0.6 0.03\n", "points.txt, line 3: '0.6,0.03': write tau,lam,eps"),
        ("0.6 x 0\n", "points.txt, line 1: '0.6,x,0': write tau,lam,eps"),
        ("0.6 0 inf\n", "points.txt, line 1: '0.6,0,inf': tau and eps must be at least 0, all three finite"),
        (
            "0.6 1 1e-3 uphill\n",
            "line 1: '0.6,1,1e-3,uphill': defence='uphill' in the grid: must be one of ads, random",
        ),
        ("0.6 1 1e-3 max_kl=-1\n", "line 1: '0.6,1,1e-3,max_kl=-1': max_kl=-1 in the grid: must be"),
        ("0.6 1 1e-3 foo=1\n", "line 1: '0.6,1,1e-3,foo=1': foo is no key of gentraces.py to be swept"),
        ("0.6 1 1e-3 seed=1\n", "line 1: '0.6,1,1e-3,seed=1': seed is no key of gentraces.py to be swept"),
        ("0.6 1 0 num_samples=4\n", "num_samples is no key of gentraces.py to be swept"),
        ("0.6 1 0 attacker=full\n", "attacker is no key of gentraces.py to be swept"),
        ("0.6 1 1e-3 prefill=a/b\n", "prefill=a/b becomes part of a file name: no blank, no slash"),
        ("0.6 1 1e-3 random -5\n", "line 1: '0.6,1,1e-3,random,-5': direction_seed=-5 in the grid: must be"),
        ("0.6 1 1e-3 random 5 6\n", "line 1: '0.6,1,1e-3,random,5,6': 6 is no key of gentraces.py"),
        ("# nothing was reachable\n", "points.txt: holds no point"),
        (None, "points.txt: cannot be read"),
    ),
)
def test_bad_grid_files(tmp_path, text, words):
    """A file without a point must not mean the default grid."""
    if text is not None:
        (tmp_path / "points.txt").write_text(text)
    result = run_script("grid.py", "--file", str(tmp_path / "points.txt"), check=False)
    assert result.returncode == 2 and result.stdout == "" and "error: argument --file" in result.stderr
    assert words in result.stderr and "Traceback" not in result.stderr
