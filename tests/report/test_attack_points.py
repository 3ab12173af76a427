"""Sweeps with several attackers: which stage belongs to which row, and what curves are drawn through."""

import pytest
from helpers_attacks import (
    RECIPES,
    SWEEP,
    change_sidecar,
    write_attack,
    write_attacked,
    write_recipes,
    write_solo,
    write_sweep,
)
from helpers_report import STUDENT, rows_of, write_both_arms, write_point, write_stage_1_and_2, write_traces

from ads.report import attack_tables, findings, tables
from ads.report.attackers import of_main_attack
from ads.report.doubts import warning_lines
from ads.report.experiments import load_experiments
from ads.report.points import collect_own, collect_points, collect_undistilled
from ads.stage import files
from ads.stage.errors import UserError


def write_one(exp_dir):
    """A point of temperature and one of ADS with a student each, as before there were attacks."""
    write_stage_1_and_2(exp_dir)
    write_point(exp_dir, "1", 0.6, 0.0, (0.90, 0.88), (0.61, 0.58))
    write_point(exp_dir, "2", 0.6, 0.03, (0.70, 0.50), (0.25, 0.20))
    return exp_dir


def by_attack(exp_dir):
    rows, _ = rows_of(exp_dir)
    return {(row.get("attack"), row["lam"]): row for row in rows}


def test_a_student_is_joined_through_what_the_attack_made(tmp_path):
    write_one(tmp_path)
    write_attacked(tmp_path, "2", "mix25", "a2", (0.52, 0.50), RECIPES["mix25"][2])
    write_attacked(tmp_path, "2", "full", "a2", (0.35, 0.33), lora=False)
    rows = by_attack(tmp_path)
    assert list(rows) == [("naive", 0.0), ("naive", 0.03), ("full", 0.03), ("mix25", 0.03)]
    mixed, full = rows["mix25", 0.03], rows["full", 0.03]
    assert (mixed["arm"], mixed["student_raw_accuracy"], mixed["teacher_raw_accuracy"]) == ("ADS", 0.5, 0.5)
    found = {key: value for key, value in mixed.items() if key.startswith("attack.")}
    assert found == {"attack.attack": "mix", "attack.share": 0.25}  # no path, no speed, no seed
    assert mixed["attack_n"] == 5231 and mixed["attack_num_dropped"] == 2242
    assert full["model.lora"] is False and not any(key.startswith("attack.") for key in full)


def test_other_clean_traces_are_another_recipe(tmp_path):
    """25 % of clean traces at tau = 0 and at tau = 1 are two attackers, whatever the files are called."""
    for tau in (0.0, 1.0):
        folder = write_one(tmp_path / str(tau))
        write_traces(folder, "clean", 0.9, 0.9, data_split="gsm8k_train", tau=tau)
        words = {**RECIPES["mix25"][2], "clean_traces": f"{folder}/traces/clean.parquet"}
        write_attacked(folder, "2", "mix25", "a2", (0.52, 0.50), words)
    rows, _ = rows_of(tmp_path / "0.0", tmp_path / "1.0")
    assert len({row["attack.clean_traces"] for row in rows if row.get("attack") == "mix25"}) == 2
    # nor are clean traces that an attack took a grid point of their own
    assert {(row["arm"], row["tau"]) for row in rows} == {("temperature", 0.6), ("ADS", 0.6)}


def test_what_an_attacker_asked_for_is_no_grid_point(tmp_path):
    write_one(tmp_path)
    write_traces(tmp_path, "samples", 0.9, 0.9, data_split="gsm8k_train", tau=0.6)
    change_sidecar(tmp_path / "traces" / "samples.yaml", config={"num_samples": 4})
    assert len(rows_of(tmp_path)[0]) == 2


def test_an_attack_that_left_no_row_is_a_row_without_a_student(tmp_path):
    """Its recipe is known by what it asked for, as no test says its name."""
    write_one(tmp_path)
    write_recipes(tmp_path, ("naive", "correct", "mix25"))
    write_attack(tmp_path, "none", RECIPES["correct"][2], "a2", n=0, more_stats={"reason": "no right answer"})
    found = findings.gather([tmp_path], None)
    row = next(row for row in (point.row for point in found.points) if row.attack == "correct")
    assert (row.student_n, row.arm, row.number("attack_reason")) == (None, "ADS", "no right answer")
    cells = {
        cell.attack: cell for cell in found.attacked.cells if cell.arm == "ADS" and cell.answers == "raw"
    }
    assert cells["correct"].student is None and cells["correct"].note.startswith("no row left")
    assert "seed 42" in cells["correct"].note
    assert (len(found.rows), len(found.points)) == (2, 3)  # points with students of the one attack, all rows


def test_an_attack_on_a_lone_setting_that_left_no_row(tmp_path):
    """Its cell stood at the usual prices, where the table of a defence's own price did not look for it."""
    write_stage_1_and_2(tmp_path)
    write_point(tmp_path, "2", 0.6, 0.03, (0.70, 0.50), (0.25, 0.20))
    write_attack(tmp_path, "none", RECIPES["correct"][2], "a2", n=0, more_stats={"reason": "no right answer"})
    found = findings.gather([tmp_path], None)
    tables_of_text = map(attack_tables.matrix_cells, attack_tables.matrix_tables(found.attacked))
    texts = [line for table in tables_of_text for line in table if line[0] == "correct"]
    assert texts and all(line[1].startswith("no row left (λ 0.03, seed 42)") for line in texts)


def test_a_student_of_an_attack_is_not_naive_by_default(tmp_path):
    """attacker=naive is the default of gentraces.py: tested by hand, a student of another attack was drawn
    into the naive one's curves."""
    write_one(tmp_path)
    write_recipes(tmp_path, ("naive", "mix25"))
    write_attacked(tmp_path, "2", "naive", "a2", (0.52, 0.50), RECIPES["mix25"][2])
    assert list(by_attack(tmp_path)) == [("naive", 0.0), ("naive", 0.03), ("mix25", 0.03)]


@pytest.mark.parametrize("changed", ["what the attack wrote", "what it read", "its clean traces"])
def test_a_stage_that_has_changed_since_is_left_out(tmp_path, changed):
    write_one(tmp_path)
    write_traces(tmp_path, "clean", 0.9, 0.9, data_split="gsm8k_train")
    words = {**RECIPES["mix25"][2], "clean_traces": f"{tmp_path}/traces/clean.parquet"}
    write_attacked(tmp_path, "2", "mix25", "a2", (0.52, 0.50), words)
    traces = tmp_path / "traces"
    stages = {
        "what the attack wrote": (tmp_path / "models" / "b2_mix25.yaml", "train_traces", "f2_mix25"),
        "what it read": (traces / "f2_mix25.yaml", "traces", "a2"),
        "its clean traces": (traces / "f2_mix25.yaml", "clean_traces", "clean"),
    }
    reader, key, writer = stages[changed]
    change_sidecar(reader, inputs={key: "before"})
    change_sidecar(traces / f"{writer}.yaml", outputs={f"{writer}.parquet": "before"})
    assert ("mix25", 0.03) in by_attack(tmp_path)
    change_sidecar(traces / f"{writer}.yaml", outputs={f"{writer}.parquet": "now"})
    found = by_attack(tmp_path)
    assert ("naive", 0.03) in found and found.get(("mix25", 0.03), {}).get("student_n") is None
    experiments = load_experiments([tmp_path])
    lines = warning_lines(experiments, collect_points(experiments))
    assert any("models left out, their training traces have changed since" in line for line in lines)


def test_solo_hangs_on_no_point(tmp_path):
    """It was in danger of counting as a way of asking the undistilled student, or as a point at tau = 0."""
    write_one(tmp_path)
    write_solo(tmp_path, 0.12, 42, data_split="gsm8k_test")
    experiments = load_experiments([tmp_path])
    (own,) = collect_own(experiments)
    assert (own.row.attack, own.row.arm, own.row.seed) == ("solo", "undistilled", 42)
    assert own.row.student_n and own.row.columns["attack.attack"] == "solo"
    assert len(collect_points(experiments)) == 2 and len(collect_undistilled(experiments)) == 1
    found = findings.gather([tmp_path], None)
    assert "solo" in tables.to_csv(tables.result_lines([*found.points, *found.own], found.baselines))
    assert findings.terminal_lines(found) and len(tables.asked_cells(found.baselines)) == 2


def test_curves_and_claims_are_those_of_one_attack(tmp_path):
    """With other attackers beside it, all that is said of the naive one stays as it was."""
    (with_all,) = write_sweep(tmp_path / "all", (1,), 50, ("naive", "mix25", "full"), SWEEP[:5])
    (alone,) = write_sweep(tmp_path / "one", (1,), 50, ("naive",), SWEEP[:5])
    found, wanted = (findings.gather([folder], None) for folder in (with_all, alone))
    assert found.matches == wanted.matches and len(wanted.matches) > 3
    *claims, worst = found.claims
    assert claims == wanted.claims and worst.key == "g"  # which is about all attackers
    assert [curve.label for curve in found.curves] == [curve.label for curve in wanted.curves]
    assert tables.point_cells(found.rows) == tables.point_cells(wanted.rows)
    assert wanted.attacked.cells == () and len(found.points) == 3 * len(wanted.points)


def test_without_naive_the_first_attack_there_is(tmp_path):
    (folder,) = write_sweep(tmp_path, (1,), 50, ("correct", "mix25"), SWEEP[:2])
    points = of_main_attack(collect_points(load_experiments([folder])))
    assert {point.row.attack for point in points} == {"correct"}


def test_a_sweep_without_attacks_has_one_new_column(tmp_path):
    found = findings.gather([write_both_arms(tmp_path)], None)
    columns = tables.to_csv(tables.result_lines(found.points, found.baselines)).split("\n")[0].split(",")
    assert [column for column in columns if "attack" in column] == ["attack"]
    assert not found.attacked.lines and not found.own


def test_what_is_no_recipe_is_named(tmp_path):
    write_one(tmp_path)
    files.write_text(tmp_path / "attacks" / "odd.yaml", "threat: none\n")
    with pytest.raises(UserError, match="odd.yaml is not the recipe of an attack"):
        load_experiments([tmp_path])
    files.write_text(tmp_path / "attacks" / "odd.yaml", f"label: {STUDENT}\n")
    assert load_experiments([tmp_path])[0].recipes["odd"].label == STUDENT
