"""The worst student, chosen on half of the problems: it has to be no luckier than the attacker is good."""

import numpy as np
from helpers_attacks import SWEEP, write_sweep

from ads.report import findings
from ads.report.worst import WORST, cross_fit, half_of

ATTACKS = ("naive", "mix25", "resample4")
IDS = [f"arithmetic/test/{i}" for i in range(600)]


def draw_students(rng, shares):
    """Answers of students whose true accuracies these are, to problems of one difficulty."""
    return [dict(zip(IDS, (rng.random(len(IDS)) < share).tolist(), strict=True)) for share in shares]


def mean(test):
    return sum(test.values()) / len(test)


def test_the_worst_of_equal_students_is_not_better_than_they_are():
    """17 attackers of true accuracy .6: the best test result lies 1.8 standard errors above it, the
    cross-fitted one on it."""
    rng = np.random.default_rng(0)
    tests = [draw_students(rng, [0.6] * 17) for _ in range(300)]
    error = np.sqrt(0.6 * 0.4 / len(IDS))  # of one test
    best = np.mean([max(map(mean, students)) for students in tests]) - 0.6
    crossed = np.mean([mean(cross_fit(students)[0]) for students in tests]) - 0.6
    assert best > 1.5 * error
    assert abs(crossed) < 0.25 * error  # 300 of them: a standard error of it is .06


def test_a_better_attacker_is_found():
    rng = np.random.default_rng(1)
    tests = [cross_fit(draw_students(rng, [0.5, 0.62, 0.4])) for _ in range(50)]
    assert np.mean([chosen == (1, 1) for _, chosen in tests]) > 0.9
    assert abs(np.mean([mean(worst) for worst, _ in tests]) - 0.62) < 0.01


def test_each_half_is_answered_by_who_is_best_on_the_other():
    first, second = ([problem for problem in IDS if half_of(problem) == half] for half in (0, 1))
    assert abs(len(first) - len(second)) < 80  # by the id alone, near enough to halves
    a = {problem: problem in first for problem in IDS}  # all of the first half, none of the second
    b = {problem: problem in second[:10] for problem in IDS}
    worst, chosen = cross_fit([a, b])
    assert chosen == (0, 1)
    # the first half's best answers the second half, and there gets none right; and so does the other
    assert sum(worst.values()) == 0 and worst.keys() == a.keys()


def test_only_problems_that_all_were_tested_on_count():
    rng = np.random.default_rng(2)
    a, b = draw_students(rng, [0.5, 0.5])
    shorter = {problem: b[problem] for problem in IDS[:100]}
    worst, _ = cross_fit([a, shorter])
    assert set(worst) == set(IDS[:100])
    lone = next(problem for problem in IDS if half_of(problem) == 0)
    assert cross_fit([{lone: True}, {lone: False}]) == ({}, ())  # nothing to report it on


def test_the_headline_names_the_worst_student(tmp_path):
    folders = write_sweep(tmp_path, (1, 2), 200, ATTACKS, SWEEP[:5])
    found = findings.gather(folders, (0.75,))
    best = next(m for m in found.attacked.matches if (m.arm, m.price) == ("ADS", "accuracy"))
    text = findings.headline(found)
    assert text.startswith("At a teacher accuracy of 75 % (raw answers), the best of 3 attackers brings")
    assert f"{100 * best.student:.0f} % with ADS traces" in text and "t interval over 2 seeds" in text
    assert findings.sentences(found)[0] == text
    assert any(line.startswith("The attack naive alone: at a teacher") for line in findings.sentences(found))
    # it is no worse a student than the naive one, and no better than the best on the same problems
    cells = [c for c in found.attacked.cells if (c.arm, c.price, c.level) == ("ADS", "accuracy", 0.75)]
    shares = {cell.attack: cell.student for cell in cells}
    assert shares.pop(WORST) == best.student
    assert shares["naive"] < best.student <= max(shares.values()) + 0.02


def test_it_is_said_where_attackers_are_missing(tmp_path):
    """In the middle of a sweep. The best of three attackers gets more than the best of two: temperature with
    one and ADS with sixteen made a headline by which ADS helps the attacker."""
    (folder,) = write_sweep(tmp_path, (1,), 50, ATTACKS, SWEEP[:4])
    found = findings.gather([folder], None)
    assert not any("chosen without" in note for note in found.notes)
    assert len(found.attacked.choices) == 4 and "best of 3 attackers" in findings.headline(found)
    (folder / "traces" / "c3_resample4.yaml").unlink()
    found = findings.gather([folder], None)
    (note,) = [note for note in found.notes if "chosen without" in note]
    assert note.endswith("no student of: resample4 (ADS, τ 0.4, λ 8, seed 1)")
    assert "best of 2 attackers" in findings.headline(found)
    chosen = {name for choice in found.attacked.choices for name in choice.attacks["raw"]}
    assert chosen <= {"naive", "mix25"} and len(found.attacked.choices) == 4
    for name in ATTACKS[1:]:  # of a point that is copied as it is alone there is no worst student
        (folder / "traces" / f"c3_{name}.yaml").unlink(missing_ok=True)
    found = findings.gather([folder], None)
    assert len(found.attacked.choices) == 3 and not any("chosen without" in note for note in found.notes)


def test_one_attack_and_own_answers_have_no_worst_student(tmp_path):
    (folder,) = write_sweep(tmp_path, (1,), 50, ("naive", "solo"), SWEEP[:4])
    found = findings.gather([folder], None)
    assert not found.attacked.choices and not found.attacked.curves and found.attacked.own_lines
    assert findings.headline(found).startswith("At a teacher accuracy of 85 % (raw answers), temperature")
    assert any(line.startswith("Without any published trace") for line in findings.sentences(found))
    assert {cell.attack for cell in found.attacked.cells} == {"naive"}


def test_a_worst_student_needs_the_answers(tmp_path):
    (folder,) = write_sweep(tmp_path, seeds=(1,), num_problems=50, attacks=("naive", "mix25"))
    for path in (folder / "traces").glob("c*.parquet"):
        path.unlink()
    found = findings.gather([folder], None)
    assert not found.attacked.choices and not found.attacked.matches
    assert any("no worst student" in note for note in found.notes)
    assert findings.headline(found).startswith("At a teacher accuracy of 75 % (raw answers), temperature")
    notes = {cell.note for cell in found.attacked.cells if cell.attack == "naive"}
    assert any("is not there" in note for note in notes)  # nor is there an interval of one seed
