"""The matrix of attackers against defences, shares of the gap, what students are made of, threat cards."""

import csv

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from helpers_attacks import RECIPES, SWEEP, change_sidecar, write_attacked, write_recipes, write_sweep
from helpers_report import run, write_point, write_stage_1_and_2
from scipy import stats

import report
from ads.report import attack_tables, findings, page, plots, tables
from ads.report.attacked import SPENT
from ads.report.worst import WORST
from ads.stage import files

POINTS = ((0.4, 0.0, 0.90), (1.0, 0.0, 0.70), (0.4, 8.0, 0.80), (0.4, 14.0, 0.60))
NAIVE = (0.90, 0.86, 0.60, 0.30)  # students of these points
MIXED = (0.90, 0.88, 0.80, 0.60)


def write_small(exp_dir, seed=42, lower=0.0, n=200, **more):
    """Two points an arm and two attackers, students' accuracies lower by so much; base .10."""
    write_stage_1_and_2(exp_dir, (None, 0.10), n=n)
    test = {"n": n, "answer_force": False, "data_split": "gsm8k_test", **more}
    for i, (tau, lam, teacher) in enumerate(POINTS):
        write_point(
            exp_dir, str(i), tau, lam, (None, teacher), (None, NAIVE[i] - lower), seed=seed, n=n,
            answer_force=False, **more,
        )  # fmt: skip
        shares = (None, MIXED[i] - lower)
        write_attacked(exp_dir, str(i), "mix25", f"a{i}", shares, RECIPES["mix25"][2], seed=seed, **test)
    write_recipes(exp_dir, ("naive", "mix25"))
    return exp_dir


def cells_of(found, arm, level, price="accuracy"):
    cells = [c for c in found.attacked.cells if (c.arm, c.price, c.level) == (arm, price, level)]
    return {cell.attack: cell for cell in cells}


def test_cells_are_read_off_at_the_same_teacher_accuracy(tmp_path):
    """By hand: of ADS, which starts at (.9, .9), a teacher accuracy of .85 lies halfway to (.8, .6)."""
    folders = [
        write_small(tmp_path / str(seed), seed, lower) for seed, lower in ((1, 0.0), (2, 0.02), (3, 0.07))
    ]
    found = findings.gather(folders, (0.85, 0.7, 0.5))
    cells = cells_of(found, "ADS", 0.85)
    shares = np.array([0.75, 0.73, 0.68])
    assert cells["naive"].student == pytest.approx(shares.mean())
    low, high = stats.t.interval(0.95, 2, shares.mean(), stats.sem(shares))
    assert (cells["naive"].low, cells["naive"].high) == pytest.approx((low, high))
    assert cells["mix25"].student == pytest.approx(shares.mean() + 0.1) and cells["naive"].num_seeds == 3
    # (S - .1) / (S_clean - .1) in each seed, S_clean the naive student at tau = 0.4
    gaps = (shares - 0.1) / (np.array([0.9, 0.88, 0.83]) - 0.1)
    assert cells["naive"].gap == pytest.approx(gaps.mean())
    low, high = stats.t.interval(0.95, 2, gaps.mean(), stats.sem(gaps))
    assert (cells["naive"].gap_low, cells["naive"].gap_high) == pytest.approx((low, high))
    assert cells_of(found, "temperature", 0.7)["naive"].student == pytest.approx(0.83)
    assert {cell.note for cell in cells_of(found, "ADS", 0.5).values()} == {"not reached"}
    assert cells["naive"].flags == ()
    (flag,) = cells_of(found, "temperature", 0.85)["naive"].flags  # .9 and .7 are far apart
    assert flag == "is read across more than 10 points of teacher accuracy: τ 0.4 to τ 1"
    assert "temperature at its lowest, τ 0.4" in attack_tables.gap_sentence(found.attacked)


def test_one_seed_has_the_interval_of_its_problems(tmp_path):
    found = findings.gather([write_small(tmp_path, parquet=True)], (0.8,))
    cell = cells_of(found, "ADS", 0.8)["naive"]
    assert cell.student == pytest.approx(0.6, abs=0.003)
    assert (
        0.45 < cell.low < 0.56 and 0.64 < cell.high < 0.75
    )  # of 200 problems +- .068, read at a price that varies
    assert cell.gap_low < cell.gap < cell.gap_high
    line = tables.reading_line(cell)
    assert (line["rule"], line["interval"]) == ("raw", "problem bootstrap, this seed's problems only")
    without = findings.gather([write_small(tmp_path / "none")], (0.8,))
    cell = cells_of(without, "ADS", 0.8)["naive"]
    assert cell.low is None and "is not there" in cell.note


def test_a_gap_needs_an_undistilled_student_and_something_to_learn(tmp_path):
    folder = write_small(tmp_path)
    change_sidecar(
        folder / "traces" / "base.yaml", stats={"raw": {"accuracy": 0.85, "low": 0.8, "high": 0.9}}
    )
    cells = cells_of(findings.gather([folder], (0.8,)), "ADS", 0.8)
    assert cells["naive"].student and cells["naive"].gap is None and cells["naive"].gap_note
    (folder / "traces" / "base.yaml").unlink()
    assert cells_of(findings.gather([folder], (0.8,)), "ADS", 0.8)["naive"].gap is None


def test_a_defence_of_one_setting_is_read_at_its_own_price(tmp_path):
    folder = write_small(tmp_path)
    write_point(
        folder, "9", 0.4, 0.0, (None, 0.9), (None, 0.2), n=200, answer_force=False, defence="answer_only"
    )
    found = findings.gather([folder], (0.8, 0.7))
    cells = [cell for cell in found.attacked.cells if cell.arm == "answer only" and cell.price == "accuracy"]
    naive = [cell for cell in cells if cell.attack == "naive"]
    assert [(cell.is_own, cell.level, cell.student) for cell in naive] == [(True, 0.9, 0.2)]
    tables = attack_tables.matrix_tables(found.attacked)
    texts = {table.level: attack_tables.matrix_cells(table) for table in tables if table.price == "accuracy"}
    for level in (0.8, 0.7):  # in the table of each price
        line = next(line for line in texts[level] if line[0].startswith("naive"))
        assert line[-1].startswith(".200, at 90 %")


def test_a_point_alone_has_a_table_at_each_price(tmp_path):
    """Both tables had one title, so that the second took the first's place; and a sentence told of a gap that
    ended nowhere."""
    folder = write_small(tmp_path)
    for stage in ("traces/a", "traces/c", "traces/d", "models/b"):
        for i in (0, 1, 3):
            (folder / f"{stage}{i}.yaml").unlink()
            if stage in ("traces/c", "models/b"):
                (folder / f"{stage}{i}_mix25.yaml").unlink()
    found = findings.gather([folder], None)
    captions = [caption for caption in findings.small_tables(found) if caption.startswith("Students by raw")]
    assert ["own teacher accuracy" in captions[0], "own teacher NLL" in captions[1]] == [True, True]
    assert attack_tables.gap_sentence(found.attacked) == ""


def test_attackers_of_one_name_and_two_recipes_are_told_apart(tmp_path):
    """Two recipes are never pooled: students of mix25 trained at two rates are two rows."""
    for name, lr in (("a", 5e-4), ("b", 1e-4)):
        folder = write_small(tmp_path / name)
        for path in (folder / "models").glob("*_mix25.yaml"):
            change_sidecar(path, config={"lr": lr})
    found = findings.gather([tmp_path / "a", tmp_path / "b"], None)
    labels = [attacker.label for attacker in found.attacked.attackers]
    assert labels[0] == "naive: as published"
    assert labels[1:] == ["mix25: a quarter clean, lr 0.0005", "mix25: a quarter clean, lr 0.0001"]


def write_test_table(path, finished, right):
    table = {"id": [f"gsm8k/test/{i}" for i in range(len(right))], "finished": finished}
    table |= {"is_raw_correct": right, "is_af_correct": [None] * len(right)}
    pyarrow.parquet.write_table(pyarrow.table(table), path)


def test_what_students_are_made_of_and_what_is_spent(tmp_path):
    folder = write_small(tmp_path, n=10)
    right = [True] * 3 + [False] * 7  # as NAIVE says of the last point
    write_test_table(folder / "traces" / "c3.parquet", [True] * 2 + [False] * 4 + [True] * 4, right)
    pass_at = {"raw": {1: 0.3, 8: 0.55}}
    change_sidecar(folder / "traces" / "c3.yaml", stats={"finished": 0.6, "loops": 0.4, "pass_at": pass_at})
    pyarrow.parquet.write_table(
        pyarrow.table({"num_tokens": [100, 150, 250]}), folder / "traces" / "a3.parquet"
    )
    found = findings.gather([folder], None)
    lines = {(line["attack"], line["lam"]): line for line in found.attacked.lines}
    line = lines["naive", 14.0]
    assert line["finished"] * line["right_of_finished"] + line["right_unfinished"] == pytest.approx(0.3)
    assert (line["right_of_finished"], line["right_unfinished"], line["loops"]) == pytest.approx(
        (2 / 6, 0.1, 0.4)
    )
    assert (line["pass_at_1_raw"], line["pass_at_8_raw"]) == (0.3, 0.55)
    assert [line[key] for key in SPENT] == [500, 500, 500, 360, 720]
    mixed = lines["mix25", 14.0]
    tokens = [mixed[f"{what}_tokens"] for what in ("published", "read", "trained")]
    assert (tokens, mixed["attacker_seconds"]) == ([500, 300 * 5231, 200 * 5231], 750)
    assert [mixed[key] for key in ("labels", "clean_traces", "queries", "models")] == [False, 0.25, 1, "none"]
    header, *cells = attack_tables.made_of_cells(found.attacked)
    assert header[-2:] == ["pass at 1 raw", "pass at 8 raw"] and len(cells) == 8
    card = next(line for line in attack_tables.card_cells(found.attacked) if line[0].startswith("mix25"))
    assert card[1:5] == ["no", "25 %", "1", "none"]


def test_as_a_user_runs_it(tmp_path):
    """All files of a sweep with attackers: text in the page's cells, lines in the CSV files."""
    folders = write_sweep(tmp_path, (1, 2), 50, ("naive", "mix25", "solo"), SWEEP[:5])
    record = {
        "label": "<script>alert(1)</script>|`x`",
        "threat": {"labels": "<b>"},
        "attack": RECIPES["mix25"][2],
    }
    for folder in folders:
        files.write_text(folder / "attacks" / "mix25.yaml", yaml.safe_dump(record))
    code, output, errors = run(*folders)
    assert (code, errors) == (0, "") and "Without any published trace, solo" in output
    written = folders[0] / "report"
    with (written / "matrix.csv").open(encoding="utf-8", newline="") as file:
        matrix = list(csv.DictReader(file))
    assert {line["attack"] for line in matrix} == {WORST, "naive", "mix25"}
    with (written / "attackers.csv").open(encoding="utf-8", newline="") as file:
        attackers = list(csv.DictReader(file))
    assert {line["attack"] for line in attackers} == {WORST, "naive", "mix25", "solo"}
    assert all(int(line["seeds"]) == 2 for line in attackers)
    assert {"worst.png", "worst.svg"} <= {path.name for path in written.iterdir()}
    text = (written / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text and "&lt;b&gt;" in text
    number = next(line for line in matrix if line["attack"] == "naive" and line["student"])["student"]
    assert f"<strong>{float(number):.3f}".replace("0.", ".", 1) in text
    markdown = (written / "report.md").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in markdown and "![worst](worst.png)" in markdown


def test_the_frontier_is_drawn_through_the_worst_students(tmp_path):
    found = findings.gather([write_small(tmp_path, parquet=True)], None)
    panels = plots.worst_panels(found.attacked, found.baselines)["worst"]
    assert [panel.title for panel in panels] == [
        "Worst student: raw answers",
        "Worst student: raw answers, price in NLL",
    ]
    figure = report.figures.compose(panels[:1], "")
    (line,) = [line for line in figure.axes[0].get_lines() if str(line.get_label()).startswith("ADS")]
    assert sorted(line.get_ydata())[:2] == pytest.approx(
        [0.6, 0.8], abs=0.02
    )  # its start at temperature is above
    assert not plots.worst_panels(type(found.attacked)(), [])
    assert "stroke-dasharray" in page.legend([], [], [{"attacker": "solo"}])[0]["key"]
