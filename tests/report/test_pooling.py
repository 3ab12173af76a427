"""What report.py may take for one thing: never unlike students, and nothing that is no accuracy."""

import csv
import math

import pytest
import yaml
from conftest import ROOT
from helpers_report import (
    PROXY,
    STUDENT,
    baselines_of,
    curves_of,
    draw,
    drawn_points,
    is_complete,
    rows_of,
    write_answers,
    write_both_arms,
    write_model,
    write_point,
    write_stage_1_and_2,
    write_student_test,
    write_traces,
)
from markupsafe import escape

import report
from ads.report import findings, page
from ads.report.bootstrap import load_draws
from ads.report.compare import compare_arms
from ads.report.curves import by_setting, pooled
from ads.report.doubts import unpaired_lines, warning_lines
from ads.report.experiments import load_experiments
from ads.report.numbers import ONE_SEED
from ads.report.points import collect_points, settings_of
from ads.report.results import NO_SHARE, POOLED, row_name
from ads.report.words import MARK, by_label, finding
from ads.stage import files
from ads.stage.inputs import fingerprint_model
from ads.stage.settings import TrainConfig

LEVELS = (0.82,)


def matches_of(*exp_dirs, levels=LEVELS):
    return compare_accuracies(curves_of(*exp_dirs), levels)


def compare_accuracies(curves, levels=LEVELS):
    matches = compare_arms(curves, levels, load_draws(curves))
    return [match for match in matches if match.price == "accuracy"]


def forced(matches, arm="ADS"):
    (match,) = [m for m in matches if m.answers == "af" and m.arm == arm]
    return match


def warnings_of(*exp_dirs):
    experiments = load_experiments(exp_dirs)
    return warning_lines(experiments, collect_points(experiments))


def edit(path, **stats):
    """A sidecar whose stats are others; None takes a number away."""
    sidecar = files.read_yaml(path)
    for name, value in stats.items():
        *folders, key = name.split("__")
        place = sidecar["stats"]
        for folder in folders:
            place = place[folder]
        place[key] = value
        if value is None:
            del place[key]
    files.write_text(path, yaml.safe_dump(sidecar))


# Students of other recipes


@pytest.mark.parametrize(
    "one,other,labels",
    [
        ({"lr": 5e-4}, {"lr": 1e-4}, {"lr 0.0005", "lr 0.0001"}),
        ({"lora": True}, {"lora": False, "lora_r": 8}, {"lora true", "lora false"}),
        (
            {},
            {"num_epochs": 10, "batch_size": 32},
            {"batch_size 16, num_epochs 3", "batch_size 32, num_epochs 10"},
        ),
        ({}, {"trace_colname": "trace_af"}, {"trace_colname trace", "trace_colname trace_af"}),
        ({}, {"weight_decay": 0.0}, {"weight_decay 0.1", "weight_decay 0"}),
        ({"max_length": 512}, {}, {"max_length 512", "max_length 4096"}),
    ],
)
def test_a_student_made_again_by_another_recipe_is_another_curve(tmp_path, one, other, labels):
    """Accuracies of .60 and .30, of students whose recipes differed, were drawn as one of .45."""
    write_traces(tmp_path, "a", 0.9, 0.9, data_split="gsm8k_train", tau=0.6)
    write_traces(tmp_path, "d", 0.9, 0.9, data_split="gsm8k_test", tau=0.6)
    for name, recipe, share in (("b", one, 0.6), ("again", other, 0.3)):
        write_model(tmp_path, name, "a", **recipe)
        write_student_test(tmp_path, f"test_{name}", name, share, share)
    curves = curves_of(tmp_path)
    assert {
        curve.label.removeprefix("temperature, \N{GREEK SMALL LETTER TAU} = 0.6, ") for curve in curves
    } == labels
    assert sorted(drawn_points(draw(tmp_path))[0]) == [[(0.9, 0.3)], [(0.9, 0.6)]]
    rows, _ = rows_of(tmp_path)
    assert len({row["recipe"] for row in rows}) == 2 and warnings_of(tmp_path) == []


def test_recipes_of_several_folders_are_told_apart_and_compared_each_by_itself(tmp_path):
    for name, lr, drop in (("a", 5e-4, 0.0), ("b", 1e-4, 0.2)):
        exp_dir = write_both_arms(tmp_path / name)
        for path in exp_dir.glob("models/*.yaml"):
            files.write_text(path, path.read_text().replace("lr: 0.0005", f"lr: {lr}"))
        for path in exp_dir.glob("traces/c[13].yaml"):  # the students of ADS
            edit(path, af__accuracy=files.read_yaml(path)["stats"]["af"]["accuracy"] - drop)
    curves = curves_of(tmp_path / "a", tmp_path / "b")
    assert [(curve.arm, len(curve.points), len(curve.start)) for curve in curves] == [
        *[("temperature", 2, 0)] * 2,
        *[("ADS", 2, 1)] * 2,
    ]
    students = {m.name.split(", ")[-1]: m.student for m in compare_accuracies(curves) if m.answers == "af"}
    assert students == {
        "lr 0.0005)": pytest.approx(0.4557, abs=1e-4),
        "lr 0.0001)": pytest.approx(0.2557, abs=1e-4),
    }


def test_what_is_no_part_of_the_recipe_tells_no_curves_apart(tmp_path):
    """Places, names, seeds, logging, and how a batch is split over devices."""
    write_traces(tmp_path, "a", 0.9, 0.9, data_split="gsm8k_train", tau=0.6)
    write_traces(tmp_path, "d", 0.9, 0.9, data_split="gsm8k_test", tau=0.6)
    speed = {"per_device_batch_size": 8, "gradient_checkpointing": True, "attn_implementation": "eager"}
    other = {
        "do_eval": False,
        "eval_epochs": 1.0,
        "save_epochs": 9.0,
        "report_to": "wandb",
        "keep_checkpoints": True,
    }
    for name, recipe in (("b", {}), ("again", speed | other | {"seed": 7})):
        write_model(tmp_path, name, "a", **recipe)
        write_student_test(tmp_path, f"test_{name}", name, 0.6, 0.6)
    (curve,) = curves_of(tmp_path)
    assert curve.label == "temperature, \N{GREEK SMALL LETTER TAU} = 0.6" and len(curve.points) == 2


def test_every_key_of_the_training_settings_is_part_of_the_recipe_or_left_out_for_a_reason(tmp_path):
    """A key that is added later is part of it, unless somebody says otherwise."""
    write_model(tmp_path, "b", "a")
    path = tmp_path / "models" / "b.yaml"
    sidecar = files.read_yaml(path) | {"path": path}
    left_out = sidecar["config"].keys() - settings_of(sidecar, TrainConfig).keys()
    places = {"solutions", "data_dir", "max_samples"}  # in the place of traces
    places |= {"exp_dir", "model_name", "train_traces", "holdout_traces", "student", "tokenizer"}
    places |= {"report_to", "keep_checkpoints", "save_epochs", "do_eval", "eval_epochs", "seed"}
    assert left_out == places | {"per_device_batch_size", "gradient_checkpointing", "attn_implementation"}


WEIGHTS = ({"student": "01"}, {"student": "45"}, {"inputs": {"teacher": "01"}}, {"inputs": {"teacher": "89"}})


@pytest.mark.parametrize(
    "where,one,other,wanted",
    [
        ("model", {"inputs": WEIGHTS[0]}, {"inputs": WEIGHTS[1]}, ["student files 01", "student files 45"]),
        ("test", {}, {"tau": 0.6}, ["student test tau 0", "student test tau 0.6"]),
        ("test", {}, {"max_length": 99}, ["student test max_length 1024", "student test max_length 99"]),
        ("train", {}, {"max_samples": 600}, ["traces max_samples 600", "traces max_samples null"]),
        ("train", {}, {"data_split": "a_train"}, [f"traces data_split {x}_train" for x in ("a", "gsm8k")]),
        ("both", WEIGHTS[2], WEIGHTS[3], ["traces teacher files 01", "traces teacher files 89"]),
        ("both", {}, {"max_length": 99}, ["traces max_length 1024", "traces max_length 99"]),
        ("both", {"lam": 1.0}, {"lam": 1.0, "inputs": {"proxy_student": "89"}}, None),
    ],
)  # fmt: skip
def test_whatever_else_makes_students_unlike_tells_curves_apart(tmp_path, where, one, other, wanted):
    """Two folders that differ in the settings of one stage, or in the weights behind one name."""
    for name, more in (("x", one), ("y", other)):
        exp_dir, stages = tmp_path / name, {stage: {} for stage in ("model", "test", "train", "teacher")}
        for stage in ("train", "teacher") if where == "both" else (where,):
            stages[stage] = more
        lam = {"grad_path": "g", "proxy_student": PROXY} if more.get("lam") else {}
        inputs = {"proxy_student": "01"} if lam else {}
        sampled = {"tau": 0.6, "data_split": "gsm8k_train", "inputs": inputs, **lam}
        write_traces(exp_dir, "a", 0.9, 0.9, **sampled | stages["train"])
        write_traces(exp_dir, "d", 0.9, 0.9, **sampled | {"data_split": "gsm8k_test"} | stages["teacher"])
        write_model(exp_dir, "b", "a", **stages["model"])
        write_student_test(exp_dir, "c", "b", 0.6, 0.6, **stages["test"])
        edit(exp_dir / "models" / "b.yaml", holdout_loss=len(name + str(more)))  # no copies of each other
    curves = curves_of(tmp_path / "x", tmp_path / "y")
    assert len(curves) == 2
    if wanted:
        assert sorted(curve.label.split(", ")[-1] for curve in curves) == wanted


def test_undistilled_students_of_two_seeds_with_equal_numbers_are_two(tmp_path):
    """Their rows did not hold the seed, so the second was dropped as a copy: the mean was wrong."""
    base = {"is_teacher": False, "teacher": STUDENT, "data_split": "gsm8k_test"}
    for seed, share in ((1, 0.02), (2, 0.02), (3, 0.05)):
        write_traces(tmp_path, f"base{seed}", share, share, seed=seed, **base)
    baselines = baselines_of(load_experiments([tmp_path]))
    assert [row.seed for row in baselines] == [1, 2, 3]
    ((label, rows),) = by_label(baselines, "af").items()
    assert label == "undistilled student, 0-shot" and pooled(rows, "student", "af")[0] == pytest.approx(0.03)


def test_undistilled_students_that_are_unlike_are_two_lines(tmp_path):
    base = {"is_teacher": False, "teacher": STUDENT, "data_split": "gsm8k_test"}
    write_traces(tmp_path, "short", 0.1, 0.1, max_length=99, **base)
    write_traces(tmp_path, "long", 0.3, 0.3, **base)
    groups = by_label(baselines_of(load_experiments([tmp_path])), "af")
    assert sorted(groups) == [f"undistilled student, 0-shot, student test max_length {n}" for n in (1024, 99)]


def test_arms_whose_students_are_unlike_are_not_compared_and_the_reason_is_said(tmp_path):
    exp_dir = write_both_arms(tmp_path / "x")
    for name in ("b2", "b4"):  # of temperature
        path = exp_dir / "models" / f"{name}.yaml"
        files.write_text(path, path.read_text().replace("lr: 0.0005", "lr: 0.001"))
    assert matches_of(exp_dir) == []
    (line,) = unpaired_lines(curves_of(exp_dir))
    assert line.startswith("WARNING: not compared, no temperature curve shares the settings: ADS, ")
    assert line.endswith(", lr 0.0005")
    found = finding(curves_of(exp_dir), [])
    assert found == "The temperature and the ADS curve differ in lr: nothing is compared."


def test_a_teacher_s_test_of_another_teacher_or_gradient_is_another_point(tmp_path):
    settings = {"tau": 0.6, "lam": 0.03, "grad_path": "g", "proxy_student": PROXY}
    write_traces(tmp_path, "a", 0.9, 0.9, data_split="gsm8k_train", inputs={"gradient": "01"}, **settings)
    write_traces(tmp_path, "d", 0.8, 0.8, data_split="gsm8k_test", inputs={"gradient": "23"}, **settings)
    write_traces(
        tmp_path,
        "e",
        0.8,
        0.8,
        data_split="gsm8k_test",
        teacher="owner/other",
        inputs={"gradient": "01"},
        **settings,
    )
    rows, _ = rows_of(tmp_path)
    assert [("train_n" in row, "teacher_n" in row) for row in rows].count((True, True)) == 0 and len(
        rows
    ) == 3


# Commits of the hub

NO_COMMIT, OLD, NEW = (f"hub:owner/teacher-7B{commit}" for commit in ("", f"@{'a' * 40}", f"@{'b' * 40}"))
UNRECORDED = "of the hub at commits not recorded, taken for one and the same: hub:owner/teacher-7B"


def write_points_of(exp_dir, *made_from):
    """Two temperature and two ADS points; made_from: the teacher in the traces and in the test of each."""
    settings = ((0.6, 0.0, 0.9, 0.8), (1.4, 0.0, 0.7, 0.6), (0.6, 0.01, 0.88, 0.5), (0.6, 0.03, 0.72, 0.2))
    for i, ((tau, lam, forced, student), teachers) in enumerate(zip(settings, made_from, strict=True)):
        write_point(exp_dir, str(i), tau, lam, (forced, forced), (student, student))
        for stage, teacher in zip("ad", teachers, strict=True):
            path = exp_dir / "traces" / f"{stage}{i}.yaml"
            sidecar = files.read_yaml(path)
            sidecar["inputs"]["teacher"] = teacher
            files.write_text(path, yaml.safe_dump(sidecar))


@pytest.mark.parametrize(
    "made_from,wanted",
    [
        ([(NO_COMMIT, NO_COMMIT)] * 4, [UNRECORDED]),
        ([(OLD, OLD)] * 4, []),
        ([(NO_COMMIT, OLD)] * 4, [UNRECORDED]),
        ([(NO_COMMIT, NO_COMMIT)] * 2 + [(NO_COMMIT, OLD), (OLD, OLD)], [UNRECORDED]),
    ],
    ids=["old", "new", "a point begun before and finished after", "some points before, some after"],
)
def test_an_experiment_begun_before_commits_were_recorded_is_one(tmp_path, made_from, wanted):
    """Stages took the two fingerprints for the same, the report did not: traces and the teacher's test were
    two points that lacked a stage each, and arms from before and after were not compared."""
    write_points_of(tmp_path, *made_from)
    rows, _ = rows_of(tmp_path)
    assert len(rows) == 4 and all(map(is_complete, rows))
    assert [curve.arm for curve in curves_of(tmp_path)] == ["temperature", "ADS"]
    assert forced(matches_of(tmp_path)).difference > 0.2
    assert warnings_of(tmp_path) == [f"WARNING: {line}" for line in wanted]


def test_folders_with_and_without_commits_are_reported_as_one(tmp_path):
    write_points_of(tmp_path / "x", *[(NO_COMMIT, NO_COMMIT)] * 4)
    write_points_of(tmp_path / "y", *[(OLD, OLD)] * 4)
    assert len(curves_of(tmp_path / "x", tmp_path / "y")) == 2


def test_two_recorded_commits_are_two_curves_and_a_name_with_its_commit_is_the_plain_one(tmp_path):
    """Who goes on with NAME@COMMIT, as an error proposes, still has one teacher in the table."""
    write_points_of(tmp_path, *[(OLD, OLD)] * 2, *[(NEW, NEW)] * 2)
    labels = [curve.label.split(", ")[-1] for curve in curves_of(tmp_path)]
    assert labels == [f"traces teacher files {OLD}", f"traces teacher files {NEW}"]
    write_points_of(tmp_path, *[(OLD, OLD)] * 4)
    for name in ("a2", "d2", "a3", "d3"):
        path = tmp_path / "traces" / f"{name}.yaml"
        plain, pinned = "teacher: owner/teacher-7B\n", f"teacher: {OLD.removeprefix('hub:')}\n"
        assert plain in path.read_text()
        files.write_text(path, path.read_text().replace(plain, pinned))
    assert {row["teacher"] for row in rows_of(tmp_path)[0]} == {"owner/teacher-7B"}
    assert forced(matches_of(tmp_path)).difference > 0.2


def test_what_was_made_from_something_that_has_changed_since_is_left_out_and_said(tmp_path):
    exp_dir = write_both_arms(tmp_path / "x")
    for path, key, other, output in (
        (exp_dir / "models" / "b1.yaml", "train_traces", exp_dir / "traces" / "a1.yaml", "a1.parquet"),
        (exp_dir / "traces" / "c2.yaml", "teacher", exp_dir / "models" / "b2.yaml", "b2/final"),
    ):
        reader, writer = files.read_yaml(path), files.read_yaml(other)
        reader["inputs"][key], writer["outputs"] = "0123", {output: "4567"}
        files.write_text(path, yaml.safe_dump(reader))
        files.write_text(other, yaml.safe_dump(writer))
    rows, _ = rows_of(exp_dir)
    assert [is_complete(row) for row in rows] == [True, False, True, False]
    assert warnings_of(exp_dir) == [
        "WARNING: models left out, their training traces have changed since: b1",
        "WARNING: student tests left out, the models have changed since: b2",
    ]


def test_traces_of_another_gradient_than_the_one_described_are_named(tmp_path):
    write_stage_1_and_2(tmp_path)
    path = tmp_path / "student_grads.yaml"
    files.write_text(
        path, path.read_text().replace("outputs: {}", "outputs: {student_grads.safetensors: '01'}")
    )
    for name, gradient in (("a", "01"), ("b", "23")):
        more = {"grad_path": "g", "proxy_student": PROXY, "inputs": {"gradient": gradient}}
        write_traces(tmp_path, name, 0.7, 0.6, lam=0.02, data_split="gsm8k_train", **more)
    assert warnings_of(tmp_path) == [
        "WARNING: traces of another gradient than the one that student_grads describes: b"
    ]


# Points that are there twice, and accuracies that are none


def write_copy_of_ads(exp_dir, student=0.29, **more):
    """The ADS point at lam .03 again, with another result."""
    write_model(exp_dir, "again", "a1", **more)
    write_student_test(exp_dir, "e", "again", student, student, parquet=True)


def test_points_measured_twice_are_pooled_named_and_flagged(tmp_path, capsys):
    """The last of them won: with students of .25 and .29 the curve ended at .29."""
    exp_dir = write_both_arms(tmp_path / "x", parquet=True)
    write_copy_of_ads(exp_dir)
    (ads,) = [curve for curve in curves_of(exp_dir) if curve.arm == "ADS"]
    assert [point.row.share("student", "af") for point in ads.points] == [0.49, pytest.approx(0.27)]
    match = forced(matches_of(exp_dir))
    weight = (0.84 - 0.82) / (0.84 - 0.70)
    assert match.student == pytest.approx(0.49 + weight * (0.27 - 0.49))
    assert match.low < match.difference < match.high
    flag = f"ADS {POOLED}: \N{GREEK SMALL LETTER LAMDA} 0.03"
    assert flag in match.flags
    report.main([str(exp_dir), "--at", "0.82"])
    output = capsys.readouterr().out
    (point,) = [point for point in ads.points if point.copies]
    assert f"WARNING: {POOLED}: {row_name(point.row)} (2 times)" in output
    for name in ("report.md", "report.html", "comparisons.csv"):
        text = (exp_dir / "report" / name).read_text()
        assert flag in text, name
        assert MARK in text or name == "comparisons.csv"
    with (exp_dir / "report" / "results.csv").open(newline="") as file:
        flags = [
            (row["student_af_accuracy"], row["flags"]) for row in csv.DictReader(file) if row["lam"] == "0.03"
        ]
    assert sorted(flags) == [("0.25", POOLED), ("0.29", POOLED)]


def test_a_copy_whose_accuracy_is_none_is_not_pooled(tmp_path):
    exp_dir = write_both_arms(tmp_path / "x")
    write_copy_of_ads(exp_dir)
    for value in (math.nan, 8.4):
        edit(exp_dir / "traces" / "e.yaml", af__accuracy=value)
        (ads,) = [curve for curve in curves_of(exp_dir) if curve.arm == "ADS"]
        assert [point.row.share("student", "af") for point in ads.points] == [0.49, 0.25]
        assert f"ADS {NO_SHARE}: \N{GREEK SMALL LETTER LAMDA} 0.03" in forced(matches_of(exp_dir)).flags


def test_a_teacher_tested_twice_is_pooled_too(tmp_path):
    exp_dir = write_both_arms(tmp_path / "x")
    write_traces(exp_dir, "d9", 0.86, 0.86, tau=1.4, data_split="gsm8k_test")
    (temperature, _) = curves_of(exp_dir)
    assert [point.row.share("teacher", "af") for point in temperature.points] == [0.9, pytest.approx(0.83)]
    assert [len(point.copies) for point in temperature.points] == [0, 2]


def test_copies_count_as_one_seed(tmp_path):
    """A seed that was run twice weighed twice in means, intervals and the number of seeds."""
    for seed, student in ((1, 0.4), (2, 0.6)):
        write_point(tmp_path / "x", str(seed), 0.6, 0.0, (0.9, 0.9), (student, student), seed=seed)
    write_model(tmp_path / "x", "again", "a2", seed=2)
    write_student_test(tmp_path / "x", "e", "again", 0.7, 0.7)
    (curve,) = curves_of(tmp_path / "x")
    (rows,) = by_setting(curve.points).values()
    assert len(rows) == 2 and pooled(rows, "student", "af")[0] == pytest.approx((0.4 + 0.65) / 2)


@pytest.mark.parametrize(
    "who,stage,stats,wanted",
    [
        ("teacher", "d", {"af__accuracy": math.nan}, "forced nan"),
        ("student", "c", {"af__accuracy": math.nan}, "forced nan"),
        ("student", "c", {"af__accuracy": math.inf}, "forced inf"),
        ("student", "c", {"af__accuracy": 8.4}, "forced 8.4"),
        ("student", "c", {"af__accuracy": "high"}, "forced high"),
        ("teacher", "d", {"af__accuracy": None}, "forced missing"),
        ("teacher", "d", {"n": 0}, "forced 0.7"),
    ],
)
def test_an_accuracy_that_is_none_is_named_and_its_neighbours_count(tmp_path, who, stage, stats, wanted):
    """A NaN sorted to the end of the curve, and levels beside it were "not reached by both"."""
    exp_dir = write_both_arms(tmp_path / "x")
    write_point(exp_dir, "5", 0.6, 0.02, (0.7, 0.6), (0.7, 0.3))
    edit(exp_dir / "traces" / f"{stage}5.yaml", **stats)
    match = forced(matches_of(exp_dir))
    assert match.student == pytest.approx(0.49 - (0.84 - 0.82) / (0.84 - 0.70) * (0.49 - 0.25))
    assert match.flags[-1] == f"ADS {NO_SHARE}: \N{GREEK SMALL LETTER LAMDA} 0.02"
    name = "ADS, \N{GREEK SMALL LETTER TAU} 0.6, \N{GREEK SMALL LETTER LAMDA} 0.02, seed 42"
    (line,) = warnings_of(exp_dir)
    assert line.startswith(f"WARNING: {NO_SHARE}: ") and f"{name} ({who} {wanted})" in line


def test_a_whole_report_with_numbers_that_are_none_says_so_and_is_written(tmp_path, capsys):
    exp_dir = write_both_arms(tmp_path / "x")
    write_point(exp_dir, "5", 0.6, 0.02, (0.7, 0.6), (0.7, 0.3), more_stats={"teacher_nll": math.nan})
    edit(exp_dir / "traces" / "d5.yaml", af__accuracy=math.nan, raw__accuracy=math.nan)
    edit(exp_dir / "traces" / "base.yaml", af__accuracy=math.nan, finished=math.nan)
    numbers = [
        v for panel in drawn_points(draw(exp_dir)) for curve in panel for point in curve for v in point
    ]
    assert numbers and all(map(math.isfinite, numbers))
    report.main([str(exp_dir), "--at", "0.82"])
    output = capsys.readouterr().out
    assert f"WARNING: {NO_SHARE}: " in output and "finished share below 0.9: base nan" in output
    html = (exp_dir / "report" / "report.html").read_text()
    assert f"ADS {NO_SHARE}" in html and "points less (no interval" in html and MARK in html


# What an interval stands on


def test_an_interval_says_what_it_stands_on_wherever_it_is(tmp_path, capsys):
    for seed, share in ((1, 0.25), (2, 0.22), (3, 0.29)):
        exp_dir = tmp_path / f"s{seed}"
        write_stage_1_and_2(exp_dir)
        write_point(exp_dir, "1", 0.6, 0.03, (0.78, 0.78), (share, share), seed=seed, parquet=True)
        write_point(exp_dir, "2", 1.4, 0.0, (0.76, 0.76), (0.55, 0.55), seed=seed, parquet=True)
        write_point(exp_dir, "3", 0.6, 0.0, (0.84, 0.84), (0.60, 0.60), seed=seed, parquet=True)
    exp_dirs = [str(tmp_path / f"s{seed}") for seed in (1, 2, 3)]
    for folders, kind in ((exp_dirs, "t interval over 3 seeds"), (exp_dirs[:1], ONE_SEED)):
        report.main([*folders, "--at", "0.8"])
        output = capsys.readouterr().out
        folder = tmp_path / "s1" / "report"
        finding = next(line for line in output.splitlines() if line.startswith("At a teacher"))
        assert finding.endswith(f"] ({kind}).")
        lines = [line for line in output.splitlines() if line.startswith(("forced, teacher", "raw, teacher"))]
        assert lines and all(f"] ({kind})" in line for line in lines)
        assert "By raw answers, at a teacher accuracy of 80 %" in output
        assert output.count(f"({kind})") == len(lines) + 3  # and finding (twice: JSON), second finding
        text = (folder / "report.md").read_text()
        assert text.count(f"({kind})") == len(lines) + 2
        markup = (folder / "report.html").read_text()
        shown = str(escape(kind))
        assert markup.count(f"({shown})") == 2 and markup.count(f">{shown}</span>") == len(lines)
        with (folder / "comparisons.csv").open(newline="") as file:
            kinds = {row["interval"] for row in csv.DictReader(file)}
        assert kinds == {kind if len(folders) > 1 else f"problem bootstrap, {kind}"}
        with (folder / "results.csv").open(newline="") as file:
            assert {row["interval"] for row in csv.DictReader(file)} == {f"Wilson, {ONE_SEED}"}


def test_intervals_over_seeds_need_no_answers_and_one_seed_s_does(tmp_path):
    for seed in (1, 2):
        write_point(tmp_path, f"1{seed}", 0.6, 0.03, (0.80, 0.8), (0.2 + 0.02 * seed, 0.3), seed=seed)
        write_point(tmp_path, f"2{seed}", 1.4, 0.0, (0.75, 0.7), (0.5, 0.5), seed=seed)
        write_point(tmp_path, f"3{seed}", 0.6, 0.0, (0.84, 0.9), (0.6, 0.6), seed=seed)
    match = forced(matches_of(tmp_path, levels=(0.82,)))
    assert match.num_seeds == 2 and match.low < match.difference < match.high


def test_seeds_that_do_not_reach_a_level_are_counted(tmp_path):
    for seed, teacher in ((1, 0.70), (2, 0.75), (3, 0.80)):
        write_point(tmp_path, f"1{seed}", 0.6, 0.03, (teacher, 0.5), (0.25 + 0.01 * seed, 0.2), seed=seed)
        write_point(tmp_path, f"2{seed}", 1.4, 0.0, (0.7, 0.6), (0.5, 0.5), seed=seed)
        write_point(tmp_path, f"3{seed}", 0.6, 0.0, (0.78, 0.9), (0.6, 0.6), seed=seed)
    match = forced(matches_of(tmp_path, levels=(0.76,)))
    assert match.num_seeds == 2
    assert match.flags[0] == "2 of 3 seeds reach this teacher accuracy on both curves"


def test_seeds_of_the_students_alone_are_no_seeds_of_the_experiment(tmp_path):
    """They share traces and teachers: an interval over them knows nothing of how those differ."""
    exp_dir = write_both_arms(tmp_path / "x")
    for i, share in enumerate((0.25, 0.55, 0.49, 0.61), start=1):
        write_model(exp_dir, f"other{i}", f"a{i}", seed=7)
        write_student_test(exp_dir, f"test{i}", f"other{i}", share + 0.01 * i, 0.2)
    match = forced(matches_of(exp_dir))
    assert match.num_seeds == 2 and match.flags[0] == "students of 2 seeds, traces of 1"


# What is said of the demo


def test_what_is_known_of_the_demo_is_said_of_it_alone(tmp_path):
    """By the models' fingerprints: data of that kind, or models in a folder of that name, make no demo."""
    notes = (ROOT / "demo" / "notes.txt").read_text().splitlines()
    shipped = fingerprint_model(str(ROOT / "demo" / "models" / "student"))
    for name, fingerprint in (("demo", shipped), ("other", "0123")):
        exp_dir = tmp_path / name
        base = {"is_teacher": False, "teacher": "demo/models/student", "data_split": "arithmetic_test"}
        write_traces(exp_dir, "base", 0.03, 0.03, inputs={"teacher": fingerprint}, **base)
        report.main([str(exp_dir)])
        text = (exp_dir / "report" / "report.html").read_text()
        assert [str(escape(note)) in text for note in notes] == [name == "demo"] * len(notes)
        assert (str(escape(page.ONE_ATTACK)) in text) == (name == "other")


def test_answers_behind_copies_are_read(tmp_path):
    exp_dir = write_both_arms(tmp_path / "x", parquet=True)
    write_copy_of_ads(exp_dir)
    (exp_dir / "traces" / "e.parquet").unlink()
    assert "traces/e.parquet is not there" in forced(matches_of(exp_dir)).note
    write_answers(exp_dir / "traces" / "e.parquet", files.read_yaml(exp_dir / "traces" / "e.yaml")["stats"])
    assert forced(matches_of(exp_dir)).low is not None


def test_a_model_that_lies_elsewhere_is_the_same(tmp_path):
    """Seeds on several machines: by its files it is, whatever its folders are called."""
    folders = [write_both_arms(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    place_models(folders[0], "/machine/a", student_files="01")
    for student_files, num_students in (("01", 1), ("23", 2)):
        place_models(folders[1], "/machine/b", student_files)
        found = findings.gather(folders, None)
        assert {row.teacher for row in found.tested} == {"a/teacher"}
        students = {row.student for row in found.tested}
        assert len(students) == num_students and {row.student for row in found.baselines} == students
        assert len(found.curves) == 2 * num_students


def place_models(exp_dir, place, student_files):
    """As if teacher and student had lain in folders there."""
    for path in (*exp_dir.glob("models/*.yaml"), *exp_dir.glob("traces/*.yaml")):
        record = files.read_yaml(path)
        config, inputs = record["config"], record["inputs"]
        if path.parent.name == "models":
            config["student"], inputs["student"] = f"{place}/student", student_files
        elif path.stem == "base":
            config["teacher"], inputs["teacher"] = f"{place}/student", student_files
        elif config["is_teacher"]:
            config["teacher"], inputs["teacher"] = f"{place}/teacher", "45"
        path.write_text(yaml.safe_dump(record, sort_keys=False))
