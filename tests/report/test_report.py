"""report.py on folders of sidecars, as gentraces.py, save_grad.py and distill.py write them."""

import csv
import dataclasses
import html
import json
import re
import shutil
import subprocess
import sys

import pytest
from helpers_report import (
    PROXY,
    ROOT,
    STUDENT,
    N,
    accuracy,
    curves_of,
    draw,
    drawn_points,
    is_complete,
    rows_of,
    run,
    write_answers,
    write_both_arms,
    write_model,
    write_point,
    write_stage_1_and_2,
    write_student_test,
    write_traces,
)

import report
from ads.data.traces import wilson_interval
from ads.report import plots, results, tables
from ads.report.curves import by_setting
from ads.report.doubts import warning_lines
from ads.report.experiments import load_experiments
from ads.report.numbers import show_number, show_percent, show_setting, show_signed
from ads.report.results import read_row
from ads.stage import files, fingerprint


def table_lines(output):
    """{(arm, tau, lam): the rest of the line} of the printed table."""
    pattern = r"^ *(temperature|ADS) +(\S+) +(\S+) +(.*)$"
    return {found.groups()[:3]: found[4] for found in re.finditer(pattern, output, re.MULTILINE)}


def csv_rows(exp_dir):
    with (exp_dir / "report" / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# As a user runs it


def test_a_finished_experiment_as_a_user_runs_it(tmp_path):
    exp_dir = write_both_arms(tmp_path / "x")
    code, output, errors = run(exp_dir)
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    assert lines[0].startswith("4 of 4 points complete; data gsm8k_test, teacher owner/teacher-7B, student")
    table = table_lines(output)
    assert list(table) == [
        ("temperature", "0.6", "0"),
        ("temperature", "1.4", "0"),
        ("ADS", "0.6", "0.015"),
        ("ADS", "0.6", "0.03"),
    ]
    cells = ["1200", ".840 [.818, .860]", ".700 [.673, .725]", ".490 [.462, .518]", ".410 [.383, .438]"]
    assert table["ADS", "0.6", "0.015"].split() == " ".join([*cells, ".975 .975 .312 214 .457 .810"]).split()
    assert max(len(line) for line in lines[1:7]) <= 150
    undistilled = next(line for line in lines if line.startswith("undistilled"))
    assert "forced .310 [.284, .337], raw .250 [.226, .275], few_shot 4, n 1200" in undistilled
    gradient = next(line for line in lines if line.startswith("gradient of"))
    assert gradient.startswith("gradient of owner/proxy-1B: n 2242, loss .412 nats/token, ||g|| 7.412; corr")
    assert "WARNING" not in output
    path = exp_dir / "report" / "report.md"
    assert lines[-3] == f"report: {path}"
    result = json.loads(lines[-1])
    finding = result.pop("finding")
    page = path.with_suffix(".html")
    assert result == {"report": str(path), "page": str(page), "num_points": 4, "num_complete": 4}
    assert finding in lines and finding in path.read_text()
    names = {file.name for file in path.parent.iterdir()}
    drawn = {
        f"{name}.{kind}" for name in ("tradeoff", "knobs", "traces", "losses") for kind in ("png", "svg")
    }
    assert names == {"report.md", "report.html", "results.csv", "comparisons.csv", "claims.csv", *drawn}


def test_a_folder_that_is_not_there_and_one_without_sidecars(tmp_path):
    (tmp_path / "empty" / "traces").mkdir(parents=True)
    for name, wanted in (("none", "none is not a folder"), ("empty", "no stage has finished in")):
        code, output, errors = run(tmp_path / name)
        assert (code, output, errors.count("\n")) == (2, "", 1)
        assert errors.startswith("error: ") and wanted in errors
    assert not (tmp_path / "empty" / "report").exists()


@pytest.mark.parametrize(
    "text,wanted",
    [
        ("hello: there\n", "traces/b.yaml is not a sidecar"),
        ("{", "traces/b.yaml is not readable YAML"),
        ("config: {}\nstats: {}\ninputs: [1]\n", "traces/b.yaml is not a sidecar"),
        ("config: {exp_dir: x}\nstats: {}\n", "traces/b.yaml: config has no teacher, is_teacher, data_split"),
    ],
)
def test_a_file_that_is_no_sidecar_is_named(tmp_path, text, wanted):
    write_traces(tmp_path, "a", 0.9, 0.9, data_split="gsm8k_train")
    files.write_text(tmp_path / "traces" / "b.yaml", text)
    code, output, errors = run(tmp_path)
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: ") and wanted in errors


def test_no_folder_named_prints_usage():
    code, _, errors = run()
    assert code == 2 and "EXP_DIR" in errors


def test_import_loads_neither_torch_nor_matplotlib():
    check = "import sys, report; print([m for m in ('torch', 'matplotlib', 'pyarrow') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


# Files


def test_csv_has_every_number_and_the_baseline(tmp_path):
    exp_dir = write_both_arms(tmp_path / "x")
    report.main([str(exp_dir)])
    rows = csv_rows(exp_dir)
    assert [row["arm"] for row in rows] == ["temperature", "temperature", "ADS", "ADS", "undistilled"]
    wanted = {"tau": "0.6", "lam": "0.03", "eps": "0.0", "seed": "42", "student_seed": "42", "top_k": "50"}
    wanted |= {"teacher_n": "1200", "teacher_af_accuracy": "0.7", "teacher_raw_num_correct": "600"}
    wanted |= {"student_af_accuracy": "0.25", "student_raw_accuracy": "0.2", "student_few_shot": "0"}
    wanted |= {"train_teacher_nll": "0.31234", "train_num_tokens_p90": "430", "model_holdout_loss": "0.4567"}
    wanted |= {"train_perturbation_cosine": "0.9995", "data": "gsm8k_test", "student": STUDENT}
    assert {key: rows[3][key] for key in wanted} == wanted
    assert rows[0]["eps"] == "" and rows[0]["train_perturbation_cosine"] == ""
    baseline = [rows[-1][key] for key in ("student_af_accuracy", "student_few_shot", "tau")]
    assert baseline == ["0.31", "4", ""]


def test_markdown_has_the_table_the_command_and_what_made_it(tmp_path):
    exp_dir = write_both_arms(tmp_path / "x y")
    report.main([str(exp_dir)])
    text = (exp_dir / "report" / "report.md").read_text()
    assert "| ADS | 0.6 | 0.03 | 1200 | .700 [.673, .725] | .500 [.472, .528] | .250 [.226, .275] |" in text
    assert f"\n    python report.py '{exp_dir}'\n" in text
    num_sidecars = 3 + 4 * 4
    hours = ((2 + 4 * 3) * 360 + 4 * 720 + 60) / 3600
    assert f"from {num_sidecars} stages that took {hours:.1f} hours: commit" in text
    assert f"numpy {fingerprint.versions()['numpy']}" in text


def test_a_second_run_writes_the_same_bytes(tmp_path):
    exp_dir = write_both_arms(tmp_path / "x")
    run(exp_dir)
    before = {file.name: file.read_bytes() for file in (exp_dir / "report").iterdir()}
    run(exp_dir)
    assert {file.name: file.read_bytes() for file in (exp_dir / "report").iterdir()} == before


def test_svg_keeps_its_text(tmp_path):
    exp_dir = write_both_arms(tmp_path / "x")
    write_point(exp_dir, "5", 0.6, 0.06, (0.5, 0.3), (0.1, 0.1), stages=3)  # not drawn, so not in the label
    report.main([str(exp_dir)])
    svg = (exp_dir / "report" / "tradeoff.svg").read_text(encoding="utf-8")
    for text in (
        "undistilled student, 4-shot",
        "temperature, \u03c4 = 0.6 to 1.4",
        "ADS, \u03c4 = 0.6, \u03bb = 0.015 to 0.03",
        "gsm8k_test: n = 1200 problems, 95 % intervals, this seed's problems only",
        "teacher accuracy",
    ):
        assert f">{text}</text>" in svg, text
    assert "<dc:date>" not in svg
    assert (exp_dir / "report" / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


def test_hostile_names_are_only_text(tmp_path, capsys):
    """No spreadsheet may run them, no Markdown render them, no terminal obey them, no plot parse them."""
    exp_dir = tmp_path / "x"
    write_stage_1_and_2(exp_dir)
    write_point(exp_dir, "1", 0.6, 0.0, (0.9, 0.9), (0.6, 0.6), teacher="=cmd()")
    write_point(exp_dir, "2", 0.6, -0.35, (0.8, 0.8), (0.5, 0.5), teacher="@$x|<b>`\x1b[31m$\\frac")
    report.main([str(exp_dir)])
    rows = csv_rows(exp_dir)
    assert [row["teacher"] for row in rows] == ["'=cmd()", "'@$x|<b>`[31m$\\frac", ""]
    assert rows[1]["lam"] == "-0.35"
    assert "\x1b" not in capsys.readouterr().out
    text = (exp_dir / "report" / "report.md").read_text()
    assert "@$x\\|&lt;b&gt;'[31m" in text and "<b>" not in text
    svg = (exp_dir / "report" / "tradeoff.svg").read_text(encoding="utf-8")
    assert "teacher @$x|&lt;b&gt;`[31m$\\frac" in svg


def test_the_declared_columns_are_those_of_the_file(tmp_path):
    """Tables, plots and comparisons read columns by these names; one that no stage writes stays empty."""
    one_step = {"n": 300, "change": 0.0089}
    exp_dir = write_both_arms(tmp_path / "x", more_stats={"one_step": one_step})
    report.main([str(exp_dir)])
    columns = set(csv_rows(exp_dir)[0])
    always = {number.column for number in results.NUMBERS if number.is_always}
    declared = always | {p.column for p in results.PRICES.values()} | {results.ONE_STEP, results.SPEED}
    assert declared - {""} <= columns
    named = {field.name for field in dataclasses.fields(results.ResultRow)} - {"columns"}
    assert named <= columns
    row = read_row(rows_of(exp_dir)[0][-1])
    assert row.accuracy("teacher", "raw") == results.Accuracy(0.5, 0.4718, 0.5282, N)


def test_a_number_that_is_text_is_left_out_of_the_means(tmp_path):
    """The page of settings took the mean of it: the whole report ended in a traceback."""
    exp_dir = write_both_arms(tmp_path / "x")
    path = exp_dir / "traces" / "c2.yaml"
    sidecar = files.read_yaml(path)
    sidecar["stats"]["af"]["accuracy"] = "high"
    files.write_text(path, json.dumps(sidecar))
    report.main([str(exp_dir)])
    assert "student forced high" in (exp_dir / "report" / "report.html").read_text()


def test_numbers_are_shown_in_one_way():
    assert [show_number(v) for v in (0.8382, -0.02, 1.0, 214, None)] == [".838", "-.020", "1.000", "214", "-"]
    # what rounds to nothing is 0; it was -.000, and -0.0000
    assert [show_number(v) for v in (-0.00000449, -0.0, 0.0, -0.0006)] == [".000", ".000", ".000", "-.001"]
    assert [show_signed(v) for v in (-0.00000449, 0.00000449, -0.01)] == ["0.0000", "0.0000", "-0.0100"]
    assert (show_percent(-0.0), show_setting(-0.0), tables.defuse(-0.0)) == ("0 %", "0", 0.0)
    assert str(tables.defuse(-0.0)) == "0.0"
    # of two digits it was 1e+02 %
    assert [show_percent(v, 2) for v in (0.999, 1.0, 0.084, None)] == ["100 %", "100 %", "8.4 %", "-"]


# What belongs together


def test_a_moved_experiment_gives_the_same_numbers(tmp_path):
    exp_dir = write_both_arms(tmp_path / "old" / "x")
    rows = rows_of(exp_dir)
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(exp_dir, moved)
    shutil.rmtree(tmp_path / "old")
    assert rows_of(moved) == rows
    assert len(rows[0]) == 4 and len(rows[1]) == 1


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_that_are_missing_leave_dashes(tmp_path, capsys, stages):
    exp_dir = tmp_path / "x"
    write_point(exp_dir, "1", 0.6, 0.03, (0.7, 0.5), (0.25, 0.2), stages)
    report.main([str(exp_dir)])
    output = capsys.readouterr().out
    assert "undistilled student: -" in output and "gradient: -" in output
    cells = re.split(r" {2,}", table_lines(output)["ADS", "0.6", "0.03"])
    n, *accuracies = cells[:5]
    teacher, student = [".700 [.673, .725]", ".500 [.472, .528]"], [".250 [.226, .275]", ".200 [.178, .224]"]
    assert n == ("-" if stages < 3 else "1200")
    assert accuracies == (teacher if stages == 4 else ["-"] * 2) + (student if stages >= 3 else ["-"] * 2)
    assert cells[-2:] == ["-" if stages < 2 else ".457", ".810"] and cells[-4] == ".312"
    assert json.loads(output.splitlines()[-1])["num_complete"] == (stages == 4)
    assert (exp_dir / "report" / "tradeoff.png").is_file()


def test_a_teacher_test_alone_is_a_point(tmp_path):
    write_traces(tmp_path, "t", 0.8, 0.7, tau=1.2, data_split="gsm8k_test")
    ((row,), baselines) = rows_of(tmp_path)
    assert (row["tau"], row["teacher_af_accuracy"], "student_n" in row) == (1.2, 0.8, False)
    assert baselines == []


def test_only_holdout_traces_are_no_point(tmp_path, capsys):
    write_traces(tmp_path, "clean", 0.9, 0.9, data_split="gsm8k_holdout")
    report.main([str(tmp_path)])
    output = capsys.readouterr().out
    assert output.startswith("no grid point has finished a stage\n")
    assert json.loads(output.splitlines()[-1])["num_points"] == 0


def test_without_lam_eps_is_no_setting(tmp_path):
    """The grid gives temperature points eps 0, whoever runs one stage by hand leaves the default."""
    write_traces(tmp_path, "a", 0.9, 0.9, data_split="gsm8k_train", tau=0.6, eps=0.0)
    write_traces(tmp_path, "b", 0.8, 0.8, data_split="gsm8k_test", tau=0.6, eps=1e-3)
    ((row,), _) = rows_of(tmp_path)
    assert (row["train_af_accuracy"], row["teacher_af_accuracy"], row["eps"]) == (0.9, 0.8, None)


@pytest.mark.parametrize("other", [{"eps": 1e-2}, {"lam": 0.031}, {"seed": 1}, {"top_p": 1.0}, {"tau": 0.7}])
def test_a_teacher_test_with_other_settings_is_another_point(tmp_path, other):
    settings = {"tau": 0.6, "lam": 0.03, "eps": 1e-3, "grad_path": "g", "proxy_student": PROXY}
    write_traces(tmp_path, "a", 0.9, 0.9, data_split="gsm8k_train", **settings)
    write_traces(tmp_path, "b", 0.8, 0.8, data_split="gsm8k_test", **settings | other)
    points, _ = rows_of(tmp_path)
    assert [("train_n" in row, "teacher_n" in row) for row in points].count((True, True)) == 0
    assert len(points) == 2


def test_tests_on_different_data_are_not_compared(tmp_path):
    write_point(tmp_path, "1", 0.6, 0.0, (0.9, 0.9), (0.6, 0.6))
    write_student_test(tmp_path, "transfer", "b1", 0.3, 0.3, n=77)
    sidecar = tmp_path / "traces" / "transfer.yaml"
    files.write_text(sidecar, sidecar.read_text().replace("gsm8k_test", "/data/mmlu_test"))
    points, _ = rows_of(tmp_path)
    found = {(row["data"], row["student_n"], row.get("teacher_n")) for row in points}
    assert found == {("gsm8k_test", N, N), ("mmlu_test", 77, None)}


def test_two_students_of_one_grid_point_are_two_rows_and_one_setting(tmp_path):
    write_point(tmp_path, "1", 0.6, 0.0, (0.9, 0.9), (0.6, 0.6))
    write_model(tmp_path, "again", "a1", seed=7)
    write_student_test(tmp_path, "e", "again", 0.5, 0.5)
    points, _ = rows_of(tmp_path)
    assert [(row["student_seed"], row["student_af_accuracy"]) for row in points] == [(7, 0.5), (42, 0.6)]
    assert [row["teacher_af_accuracy"] for row in points] == [0.9, 0.9]
    (curve,) = curves_of(tmp_path)
    assert list(by_setting(curve.points)) == [(0.6, 0)] and len(curve.points) == 2


def test_a_distilled_student_whose_model_is_gone_is_no_baseline(tmp_path, capsys):
    """Its accuracy would be drawn as the undistilled student's."""
    exp_dir = write_both_arms(tmp_path / "x")
    (exp_dir / "models" / "b2.yaml").unlink()
    points, baselines = rows_of(exp_dir)
    assert [row["student_af_accuracy"] for row in baselines] == [0.31]
    assert sum("student_n" in row for row in points) == 3
    report.main([str(exp_dir)])
    wanted = "WARNING: student tests left out, the sidecars of the models are not here: b2\n"
    assert wanted in capsys.readouterr().out


def test_an_undistilled_student_may_lie_in_a_folder_called_final(tmp_path):
    exp_dir = write_both_arms(tmp_path / "x")
    for share, teacher in (
        (0.1, "/hub/models/own/final"),
        (0.2, "/hub/b1/final"),
        (0.3, "/hub/models/b1/base"),
    ):
        write_traces(
            exp_dir, f"s{share}", share, share, is_teacher=False, teacher=teacher, data_split="gsm8k_test"
        )
    assert sorted(row["student_af_accuracy"] for row in rows_of(exp_dir)[1]) == [0.1, 0.2, 0.3, 0.31]


def test_several_folders_keep_seeds_apart_and_drop_copies(tmp_path):
    first, second, copy = write_both_arms(tmp_path / "a"), tmp_path / "b", tmp_path / "c"
    write_stage_1_and_2(second)
    write_point(second, "1", 0.6, 0.03, (0.72, 0.52), (0.27, 0.22), seed=43)
    write_traces(second, "d2", 0.8, 0.75, tau=1.4, data_split="gsm8k_test", seed=44)
    shutil.copytree(first, copy)
    for sidecar in (copy / "traces").iterdir():  # the same run on a slower machine
        sidecar.write_text(sidecar.read_text().replace("1234.5", "7.5"))
    report.main([str(first), str(second), str(copy)])
    rows = csv_rows(first)
    assert not (second / "report").exists()
    assert [row["seed"] for row in rows] == ["42", "42", "44", "42", "42", "43", "42"]
    assert [row["teacher_af_accuracy"] for row in rows if row["lam"] == "0.03"] == ["0.7", "0.72"]
    seeds = [[point.row.seed for point in curve.points] for curve in curves_of(first, second, copy)]
    assert seeds == [[42, 42], [42, 42, 43]]


def test_the_same_point_with_other_numbers_is_kept(tmp_path):
    for name, student in (("a", 0.6), ("b", 0.61)):
        write_point(tmp_path / name, "1", 0.6, 0.0, (0.9, 0.9), (student, 0.5))
    points, _ = rows_of(tmp_path / "a", tmp_path / "b")
    assert [row["student_af_accuracy"] for row in points] == [0.6, 0.61]


# Plots and warnings


def test_figure_shows_every_complete_point_with_its_intervals(tmp_path):
    exp_dir = write_both_arms(tmp_path / "x")
    figure = draw(exp_dir)
    drawn = drawn_points(figure)  # a panel in accuracy and one in NLL for each rule
    nll = 0.31234
    assert drawn[1] == [[(nll, 0.61), (nll, 0.55)], [(nll, 0.49), (nll, 0.25)]]
    assert drawn[::2] == [
        [[(0.90, 0.61), (0.80, 0.55)], [(0.84, 0.49), (0.70, 0.25)]],
        [[(0.88, 0.58), (0.75, 0.50)], [(0.70, 0.41), (0.50, 0.20)]],
    ]
    line = figure.axes[0].lines[2]  # of ADS: it begins at the same tau without Delta
    assert list(zip(*line.get_data(), strict=True)) == [(0.70, 0.25), (0.84, 0.49), (0.90, 0.61)]
    ads = figure.axes[0].containers[1]
    across, up = (bars.get_segments()[1] for bars in ads.lines[2])
    low, high = wilson_interval(300, N)
    assert across[:, 1] == pytest.approx(0.25) and up[:, 1] == pytest.approx([low, high], abs=1e-4)
    grey = plots.COLOURS["undistilled"]
    lines = [line for axis in figure.axes for line in axis.lines if line.get_color() == grey]
    assert [line.get_ydata()[0] for line in lines] == [0.31, 0.31, 0.25, 0.25]


def test_several_tau_of_ads_are_several_curves(tmp_path):
    for i, (tau, lam) in enumerate([(0.6, 0.01), (0.9, 0.02), (0.6, 0.03), (0.9, 0.01)]):
        write_point(tmp_path, str(i), tau, lam, (0.8 - lam, 0.5), (0.5 - lam, 0.2))
    assert [(row["tau"], row["lam"]) for row in rows_of(tmp_path)[0]] == [
        (0.6, 0.01),
        (0.6, 0.03),
        (0.9, 0.01),
        (0.9, 0.02),
    ]
    figure = draw(tmp_path)
    assert [[x for x, _ in curve] for curve in drawn_points(figure)[0]] == [
        pytest.approx([0.79, 0.77]),
        pytest.approx([0.79, 0.78]),
    ]
    first, second = figure.axes[0].lines[0], figure.axes[0].lines[2]
    assert first.get_color() == second.get_color() and first.get_linestyle() != second.get_linestyle()


def test_without_answer_forcing_only_raw_is_shown(tmp_path, capsys):
    write_stage_1_and_2(tmp_path, baseline=(None, 0.2))
    write_point(tmp_path, "1", 0.6, 0.03, (None, 0.5), (None, 0.2))
    report.main([str(tmp_path)])
    output = capsys.readouterr().out
    cells = re.split(r" {2,}", table_lines(output)["ADS", "0.6", "0.03"])
    assert cells[1:3] == [".500 [.472, .528]", ".200 [.178, .224]"]
    assert "on gsm8k_test: raw .200" in output and "forced -" not in output
    assert "student forced" not in output and "student raw" in output
    assert drawn_points(draw(tmp_path)) == [[[(0.5, 0.2)]], [[(0.31234, 0.2)]]]


@pytest.mark.parametrize(
    "stats,perturbation,wanted",
    [
        ({"finished": 0.61}, None, "finished share below 0.9: d1 .610, a1 .610"),
        (
            {"num_grader_timeouts": 3},
            None,
            "answers counted as wrong, the grader timed out: d1 3, a1 3",
        ),
        (
            {"num_prompts_too_long": 2},
            None,
            "problems left out, prompts too long: d1 2, a1 2",
        ),
        ({}, {"cosine": 0.55}, "theta +- eps g lost to rounding, cosine below 0.9: d1 .550, a1 .550"),
    ],
)
def test_doubtful_numbers_are_said(tmp_path, capsys, stats, perturbation, wanted):
    write_point(
        tmp_path, "1", 0.6, 0.03, (0.7, 0.5), (0.25, 0.2), more_stats=stats, perturbation=perturbation
    )
    report.main([str(tmp_path)])
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert warnings == [f"WARNING: {wanted}"]
    for name in ("report.md", "report.html"):
        assert html.escape(wanted) in (tmp_path / "report" / name).read_text()


def test_one_warning_names_the_worst_few(tmp_path):
    for i in range(7):
        write_traces(tmp_path, f"t{i}", 0.5, 0.5, tau=i / 10, more_stats={"finished": 0.8 - i / 10})
    (line,) = warning_lines(load_experiments([tmp_path]))
    assert line.endswith("0.9: t6 .200, t5 .300, t4 .400, t3 .500 and 3 more")


def test_a_model_whose_traces_are_gone_is_left_out_and_said(tmp_path):
    exp_dir = write_both_arms(tmp_path / "x")
    (exp_dir / "traces" / "a2.yaml").unlink()
    points, baselines = rows_of(exp_dir)
    assert [row["tau"] for row in points if "model_n" in row] == [0.6, 0.6, 0.6]
    assert len(baselines) == 1
    (line,) = warning_lines(load_experiments([exp_dir]))
    assert line == "WARNING: models left out, the sidecars of their training traces are not here: b2"


# Arms, equal teacher accuracy, new inputs


@pytest.mark.parametrize(
    "lam,direction,arm",
    [
        (0.0, "random", "temperature"),
        (0.03, "gradient", "ADS"),
        (-0.03, "gradient", "negative lambda"),
        (-0.03, "random", "random direction"),
        (0.03, "permuted", "permuted"),
        (0.03, None, "ADS"),
    ],
)
def test_arm_of_a_point(tmp_path, lam, direction, arm):
    """Without lam the direction plays no part; sidecars older than the controls do not name one."""
    more = {"direction": direction} if direction else {}
    write_point(tmp_path, "1", 0.6, lam, (0.7, 0.5), (0.25, 0.2), **more)
    if direction is None:
        for path in tmp_path.glob("traces/*.yaml"):
            files.write_text(path, path.read_text().replace("  defence: ads\n", ""))
    ((row,), _) = rows_of(tmp_path)
    assert row["arm"] == arm and is_complete(row)


@pytest.mark.parametrize(
    "lam,direction,arm", ((0.03, "gradient", "ADS"), (0.5, "corrupt", "corrupted results"))
)
def test_sidecars_from_when_defences_were_directions_are_read(tmp_path, lam, direction, arm):
    write_point(tmp_path, "1", 0.6, lam, (0.7, 0.5), (0.25, 0.2), direction=direction)
    for path in tmp_path.glob("traces/*.yaml"):
        lines = [
            line for line in path.read_text().splitlines() if "keep_top1" not in line and "max_kl" not in line
        ]
        text = "\n".join(lines).replace("  defence: ads", "  direction: gradient")
        files.write_text(path, text.replace("  defence: corrupt", "  direction: corrupt") + "\n")
    ((row,), _) = rows_of(tmp_path)
    assert row["arm"] == arm and is_complete(row)


def test_points_that_differ_in_a_cap_or_a_text_are_not_joined_crosswise(tmp_path):
    """Training traces of one cap once met the teacher's tests of all others."""
    write_stage_1_and_2(tmp_path)
    write_point(tmp_path, "1", 0.6, 0.03, (0.7, 0.5), (0.25, 0.2))
    write_point(tmp_path, "2", 0.6, 0.03, (0.8, 0.6), (0.35, 0.3), max_kl=0.1)
    write_point(tmp_path, "3", 0.6, 0.03, (0.9, 0.7), (0.45, 0.4), keep_top1=True)
    write_point(tmp_path, "4", 0.6, 0.0, (0.95, 0.9), (0.6, 0.6))
    write_point(tmp_path, "5", 0.6, 0.0, (0.96, 0.9), (0.1, 0.1), defence="answer_only")
    found = sorted((row["teacher_af_accuracy"], row["student_af_accuracy"]) for row in rows_of(tmp_path)[0])
    assert found == [(0.7, 0.25), (0.8, 0.35), (0.9, 0.45), (0.95, 0.6), (0.96, 0.1)]
    starts = [point.row.arm for curve in curves_of(tmp_path) for point in curve.start]
    assert starts == ["temperature"] * 3, "a text published at lam = 0 is no start of a curve"


def test_a_teacher_test_in_another_direction_is_another_point(tmp_path):
    settings = {"tau": 0.6, "lam": 0.03, "grad_path": "g", "proxy_student": PROXY}
    write_traces(tmp_path, "a", 0.9, 0.9, data_split="gsm8k_train", **settings)
    write_traces(tmp_path, "b", 0.8, 0.8, data_split="gsm8k_test", direction="random", **settings)
    assert sorted(row["arm"] for row in rows_of(tmp_path)[0]) == ["ADS", "random direction"]


def matched_lines(output):
    pattern = r"^(forced|raw), teacher (\S+): temperature (\S+), (.+?) (\S+?)(?:, difference (\S+) (.*))?$"
    return [found.groups() for found in re.finditer(pattern, output, re.MULTILINE)]


def test_arms_are_compared_at_equal_teacher_accuracy(tmp_path):
    """By hand at .82: temperature .90 to .80 gives .61 to .55, ADS .84 to .70 gives .49 to .25."""
    exp_dir = write_both_arms(tmp_path / "x", parquet=True)
    code, output, errors = run(exp_dir, "--at", "0.82,0.6")
    assert (code, errors) == (0, "")
    forced, unreached, *_ = matched_lines(output)
    student = 0.49 - (0.84 - 0.82) / (0.84 - 0.70) * (0.49 - 0.25)
    wanted = ("forced", ".820", ".562", "ADS", f"{student:.3f}"[1:], f"{0.562 - student:.3f}")
    assert forced[:6] == wanted
    low, high = map(float, re.match(r"\[(\S+), (\S+)\] \(this seed's problems only\)", forced[6]).groups())
    assert low < 0.562 - student < high and 0.01 < high - low < 0.2
    assert unreached[:3] == ("forced", ".600", "-") and "not reached by both" in output
    finding = json.loads(output.splitlines()[-1])["finding"]
    assert "82 % (forced answers)" in finding and "to 56 %, ADS traces to 46 %: 11 points less [" in finding
    assert finding in (exp_dir / "report" / "report.md").read_text()


def test_without_answers_there_is_no_interval_and_a_reason(tmp_path):
    exp_dir = write_both_arms(tmp_path / "x")
    _, output, _ = run(exp_dir, "--at", "0.82")
    assert "difference 0.106 (no interval: traces/d4.parquet is not there; 1 seed)" in output
    write_answers(
        exp_dir / "traces" / "d4.parquet", {"n": 9, "raw": accuracy(0.9, 9), "af": accuracy(0.9, 9)}
    )
    assert "d4.parquet does not hold the answers that its sidecar counts" in run(exp_dir, "--at", "0.82")[1]


def test_an_arm_of_one_setting_is_compared_at_its_own_cost(tmp_path):
    exp_dir = write_both_arms(tmp_path / "x", parquet=True)
    write_point(exp_dir, "9", 0.3, 5.0, (0.85, 0.8), (0.5, 0.5), direction="random", parquet=True)
    (line,) = [m for m in matched_lines(run(exp_dir)[1]) if m[:1] == ("forced",) and "random" in m[3]]
    assert line[1:6] == (".850", ".580", "random direction", ".500", "0.080")
    write_point(exp_dir, "8", 0.3, 0.0, (0.99, 0.99), (0.7, 0.7), parquet=True)  # where its curve starts
    again = [m for m in matched_lines(run(exp_dir)[1]) if m[:1] == ("forced",) and "random" in m[3]]
    assert [m[1:6] for m in again] == [line[1:6]]


@pytest.mark.parametrize(
    "stages,wanted",
    [(3, "No point of temperature or ADS is complete yet"), (4, "No point of temperature is complete yet")],
)
def test_finding_says_when_there_is_nothing_to_compare(tmp_path, stages, wanted):
    write_point(tmp_path, "1", 0.6, 0.03, (0.7, 0.5), (0.25, 0.2), stages)
    assert json.loads(run(tmp_path)[1].splitlines()[-1])["finding"].startswith(wanted)


@pytest.mark.parametrize("at", ["", "75", "0.8,x", "0.8,", "1.0", "nan"])
def test_a_level_that_is_no_share_is_an_error(tmp_path, at):
    code, _, errors = run(write_both_arms(tmp_path / "x"), "--at", at)
    assert code == 2 and errors.startswith("error: --at") and "0.85,0.75" in errors


def test_out_names_the_folder(tmp_path):
    exp_dir, folder = write_both_arms(tmp_path / "x"), tmp_path / "elsewhere" / "r"
    code, _, errors = run(exp_dir, "--out", folder)
    assert (code, errors, (exp_dir / "report").exists()) == (0, "", False)
    assert {"report.html", "report.md", "results.csv"} <= {path.name for path in folder.iterdir()}


def test_one_step_is_a_column_only_when_it_was_measured(tmp_path, capsys):
    exp_dir = write_both_arms(tmp_path / "x")
    report.main([str(exp_dir)])
    assert " step" not in capsys.readouterr().out.splitlines()[1]
    one_step = {"n": 300, "step_length": 0.1, "loss_before": 0.6, "loss_after": 0.6089, "change": 0.0089}
    write_point(exp_dir, "1", 0.6, 0.03, (0.7, 0.5), (0.25, 0.2), more_stats={"one_step": one_step})
    report.main([str(exp_dir)])
    output = capsys.readouterr().out
    assert output.splitlines()[1].endswith("  step  ms/token")
    assert table_lines(output)["ADS", "0.6", "0.03"].split()[-2] == "+0.0089"
    assert table_lines(output)["ADS", "0.6", "0.015"].split()[-2] == "-"
    assert [row["train_one_step_change"] for row in csv_rows(exp_dir)] == ["", "", "", "0.0089", ""]
    assert "One step of the proxy" in (exp_dir / "report" / "report.html").read_text()


def test_seeds_of_an_undistilled_student_are_one_line(tmp_path):
    write_both_arms(tmp_path)
    base = {"is_teacher": False, "teacher": STUDENT, "data_split": "gsm8k_test", "few_shot": 4}
    write_traces(tmp_path, "base2", 0.35, 0.27, few_shot_traces="clean.parquet", seed=43, **base)
    grey = plots.COLOURS["undistilled"]
    lines = [line for line in draw(tmp_path).axes[0].lines if line.get_color() == grey]
    assert [line.get_ydata()[0] for line in lines] == [pytest.approx(0.33)]


def test_an_unknown_direction_is_an_error_that_names_it(tmp_path):
    write_point(tmp_path, "1", 0.6, 0.03, (0.7, 0.5), (0.25, 0.2), direction="random")
    for path in tmp_path.glob("traces/*.yaml"):
        path.write_text(path.read_text().replace("defence: random", "defence: <b>sideways"))
    code, _, errors = run(tmp_path)
    assert code == 2 and "defence='<b>sideways': must be one of ads, random" in errors


def test_agreement_of_delta_is_shown_and_warned_of(tmp_path):
    exp_dir = write_both_arms(tmp_path / "x")
    run(exp_dir)
    shown = (exp_dir / "report" / "report.md").read_text()
    assert "correlation with the exact Delta: exact, rank 16 .999, central, eps 0.001 .592" in shown
    assert "Delta a poor one" not in shown
    page = (exp_dir / "report" / "report.html").read_text()
    assert "<td>central, eps 0.001</td><td>0.5917</td>" in page and "std of Delta 53.42 nats" in page
    sidecar = files.read_yaml(exp_dir / "student_grads.yaml")
    sidecar["config"]["eps"] = 0.001
    files.write_text(exp_dir / "student_grads.yaml", json.dumps(sidecar))
    run(exp_dir)
    warning = "WARNING: Delta a poor one, correlation with the exact one below 0.99: student_grads .592"
    assert warning in (exp_dir / "report" / "report.md").read_text()
