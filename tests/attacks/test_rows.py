"""What each attack does to rows, by its effect on a few of them."""

import functools
import math
import random

import pytest

from ads.attacks.rows import ATTACKS, attack_of, count, samples_by_problem
from ads.stage.settings import AttackConfig

BOXED = "\\boxed{5}"


def made(number, trace=BOXED, right=True, finished=True, **more):
    problem = {"id": f"p/{number}", "problem": f"{number} + 1 = ?", "solution": BOXED}
    flags = {"finished": finished, "is_raw_correct": right}
    return {**problem, **flags, "trace": trace, "num_tokens": 10, **more}


def look_up(numbers, what, rows):
    return {row["id"]: numbers[row["id"]] for row in rows}


def run(attack, tables, measured=(), **settings):
    """(rows, statistics) of an attack; measured: what the student would say of rows, by id."""
    tables = tables if isinstance(tables, dict) else {"traces": tables}
    cfg = AttackConfig(attack=attack, traces="t", samples="s", clean_traces="c", **settings)
    found = attack_of(cfg).make(cfg, tables, functools.partial(look_up, dict(measured)))
    return found[0], count(cfg, tables, found)


def ids(rows):
    return [row["id"] for row in rows]


def test_correct_keeps_the_rows_whose_answer_is_right():
    rows, stats = run("correct", [made(1), made(2, right=False), made(3)])
    assert ids(rows) == ["p/1", "p/3"]
    assert stats == {
        "n": 2,
        "num_published": 3,
        "num_dropped": 1,
        "tokens": 20,
        "tokens_read": 30,
    }


def test_fluent_drops_by_three_filters_and_counts_each():
    texts = {1: "so on and so on it goes now as it went then " * 4, 2: "\u7b54\u6848 \u662f 5", 3: "fine"}
    rows = [made(i, texts.get(i, "good")) for i in range(20)]
    nll = {row["id"]: 1.0 for row in rows} | {"p/2": 9.0, "p/7": 8.0}
    kept, stats = run("fluent", rows, nll, share=0.1)
    assert ids(kept) == [f"p/{i}" for i in range(20) if i not in (1, 2, 7)]
    assert [stats[k] for k in ("num_loops", "num_foreign", "num_unlikely", "num_dropped")] == [1, 1, 2, 3]
    assert all(row["student_nll"] == 1.0 for row in kept)


def test_of_equally_unlikely_traces_the_first_are_dropped():
    rows = [made(i) for i in range(10)]
    kept, _ = run("fluent", rows, dict.fromkeys(ids(rows), 1.0), share=0.2)
    assert ids(kept) == [f"p/{i}" for i in range(2, 10)]


def test_a_trace_without_a_token_to_train_on_goes_first():
    rows = [made(i) for i in range(10)]
    kept, _ = run("fluent", rows, dict.fromkeys(ids(rows), 7.0) | {"p/6": math.inf}, share=0.1)
    assert "p/6" not in ids(kept) and len(kept) == 9


def sample(number, k, **more):
    name = f"p/{number}" + (f"#{k}" if k > 1 else "")
    return made(number, f"sample {k}", **more) | {"id": name, "problem_id": f"p/{number}"}


SAMPLES = [
    *(sample(1, k, right=k != 3) for k in (1, 2, 3, 4)),
    *(sample(2, k, right=k == 4) for k in (1, 2, 3, 4)),
    *(sample(3, k) for k in (1, 2, 3, 4)),
]
NLL = {row["id"]: 1.0 for row in SAMPLES} | {"p/1": 2.0, "p/1#3": 0.1, "p/1#4": 0.5}


def test_resample_takes_the_likeliest_right_sample():
    tables = {"traces": [made(1), made(2), made(3)], "samples": random.Random(0).sample(SAMPLES, 12)}
    rows, stats = run("resample", tables, NLL, num_samples=4)
    assert {row["id"]: row["sample_id"] for row in rows} == {"p/1": "p/1#4", "p/2": "p/2#4", "p/3": "p/3"}
    assert rows[0]["trace"] == "sample 4" and rows[0]["student_nll"] == 0.5
    assert (stats["num_dropped"], stats["tokens"], stats["tokens_read"]) == (0, 30, 120)


def test_fewer_samples_are_the_first_ones_and_a_problem_without_a_right_one_is_dropped():
    tables = {"traces": [made(1), made(2), made(3)], "samples": SAMPLES}
    rows, stats = run("resample", tables, NLL, num_samples=2)
    assert {row["id"]: row["sample_id"] for row in rows} == {"p/1": "p/1#2", "p/3": "p/3"}
    assert (stats["num_without_right"], stats["num_dropped"], stats["tokens_read"]) == (1, 1, 60)


def test_too_few_samples_are_refused():
    cfg = AttackConfig(attack="resample", traces="t", samples="s.parquet", num_samples=5)
    with pytest.raises(ValueError, match="num_samples=5: s.parquet has 4 traces of problem p/1; make"):
        samples_by_problem(cfg, {"traces": [made(1)], "samples": SAMPLES})


def replaced(share, rows, clean, **more):
    found, stats = run("mix", {"traces": rows, "clean_traces": clean}, share=share, **more)
    assert ids(found) == ids(rows)
    names = {row["id"] for row in found if row["trace"] == "clean"}
    assert names == {row["id"] for row in found if row["is_clean"]} and len(names) == stats["num_replaced"]
    return names, stats


def test_mix_replaces_exactly_a_share_and_a_larger_one_includes_it():
    rows, clean = [made(i, "ads") for i in range(40)], [made(i, "clean", num_tokens=7) for i in range(40)]
    shares = [replaced(share, rows, clean)[0] for share in (0.1, 0.25, 0.5, 1.0)]
    assert list(map(len, shares)) == [4, 10, 20, 40]
    assert all(less < more for less, more in zip(shares, shares[1:], strict=False))
    assert replaced(0.25, rows[::-1], clean)[0] == shares[1]  # by id, not by place
    assert replaced(0.25, rows, clean, seed=43)[0] != shares[1]
    assert replaced(0.25, rows, clean)[1]["tokens_read"] == 40 * 10 + 10 * 7


def test_rows_without_a_clean_trace_are_said_and_stay_as_published(capsys):
    rows = [made(i, "ads") for i in range(20)]
    clean = [made(i, "clean") for i in range(0, 20, 2)]
    names, stats = replaced(0.5, rows, clean)
    assert stats["num_without_clean"] == 10 - len(names) > 0
    assert f"has no trace of {10 - len(names)} of 10 rows drawn" in capsys.readouterr().out


def test_repair_counts_and_grades_again():
    right, wrong = "2 + 3 = 5 . \\boxed{5}", "2 + 3 = 6 . \\boxed{6}"
    given = [made(1, right), made(2, wrong, right=False), made(3, "2 + 2 = 5 . 1 + 1 = 3")]
    rows, stats = run("repair", given)
    assert [row["trace"] for row in rows] == [right, right, "2 + 2 = 4 . 1 + 1 = 2"]
    assert [row["is_raw_correct"] for row in rows] == [True, True, False]
    assert [row["num_repaired"] for row in rows] == [0, 1, 2]
    assert (stats["num_changed"], stats["num_equations"], stats["num_dropped"]) == (2, 3, 0)


def test_answer_only_keeps_the_answer_that_is_stated():
    given = [made(1, "so it is \\boxed{6}", right=False, finished=False), made(2, "I do not know"), made(3)]
    rows, stats = run("answer_only", given)
    assert [(row["trace"], row["is_raw_correct"], row["finished"]) for row in rows] == [
        ("\\boxed{6}", False, True),
        (BOXED, True, True),
    ]
    assert (stats["num_changed"], stats["num_dropped"]) == (2, 1)


def test_solo_keeps_each_right_text_once():
    own = [sample(1, 1), sample(1, 2), sample(1, 3, right=False), sample(2, 1)]
    own[1]["trace"] = own[0]["trace"]
    rows, stats = run("solo", own)
    assert ids(rows) == ["p/1", "p/2"] and stats["num_repeated"] == 1


def test_solo_repair_keeps_each_text_that_is_right_once_it_is_repaired():
    own = [sample(1, 1), sample(1, 2, right=False), sample(2, 1, right=False), sample(2, 2, right=False)]
    texts = [
        f"{equation} . \\boxed{{ {equation[-1]} }}"
        for equation in ("2 + 3 = 5", "2 + 3 = 6", "1 * 5 = 4", "2 * 4 = 6")
    ]
    for row, text in zip(own, texts, strict=True):
        row["trace"] = text
    rows, stats = run("solo_repair", own)
    assert [(row["id"], row["trace"]) for row in rows] == [
        ("p/1", texts[0]),
        ("p/2", "1 * 5 = 5 . \\boxed{ 5 }"),
    ]
    assert (stats["num_equations"], stats["num_repeated"]) == (3, 1)
    rows, stats = run("solo_repair", own[3:])
    assert rows == [] and "none of the student's 1 own traces has a right answer" in stats["reason"]


@pytest.mark.parametrize("beta", (0.5, -0.5))
def test_reweight_is_exponential_and_clipped(beta):
    given = dict(zip(("p/1", "p/2", "p/3", "p/4"), (0.0, 2.0, -30.0, 11.0), strict=True))
    rows, _ = run("reweight", [made(i) for i in (1, 2, 3, 4)], given, beta=beta)
    wanted = [1.0, math.exp(2 * beta), math.exp(-10 * beta), math.exp(10 * beta)]
    assert [row["weight"] for row in rows] == pytest.approx(wanted)
    assert [row["derivative"] for row in rows] == list(given.values())


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_that_leaves_no_row_says_why(attack):
    keys = {"share": 1.0, "num_samples": 2, "beta": 1.0}
    settings = {key: keys[key] for key in ATTACKS[attack].keys}
    _, stats = run(attack, {"traces": [], "samples": [], "clean_traces": []}, **settings)
    assert stats["n"] == 0 and stats["reason"].startswith(f"attack={attack}: none of the ")


@pytest.mark.parametrize(
    "settings,words",
    (
        ({"attack": "corect"}, "attack='corect': must be one of correct, fluent, resample"),
        ({"attack": "mix"}, "attack=mix: set share, the share of the rows"),
        ({"attack": "correct", "share": 0.1}, "share=0.1: attack=correct has no use for it; leave it out"),
        ({"attack": "reweight"}, "attack=reweight: set beta"),
        ({"attack": "fluent", "share": 0.1, "num_samples": 2}, "num_samples=2: attack=fluent has no use"),
    ),
)
def test_settings_that_do_not_fit_the_attack_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        attack_of(AttackConfig(traces="t", **settings))
