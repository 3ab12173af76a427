"""attack.py as a user runs it, on traces of the demo's models."""

import math
import re
import shutil
import signal
import subprocess
import sys

import pyarrow.parquet
import pytest
from conftest import ENVIRONMENT, OFFLINE, ROOT, run_script
from helpers_pipeline import wait_until
from helpers_scripts import rows_of

from ads.data.tables import read_parquet
from ads.data.text import num_equations
from ads.stage import files

MODELS = ROOT / "demo" / "models"
STUDENT = f"student={MODELS / 'student'}"
SMALL = ["max_length=200", "max_prompt_length=100", "batch_size=40", "top_k=0", "answer_force=false"]
NUM = 40


def gentraces(exp_dir, name, *words):
    given = [f"exp_dir={exp_dir}", f"trace_name={name}", f"teacher={MODELS / 'teacher'}", *SMALL]
    run_script("gentraces.py", *given, f"max_samples={NUM}", *words)


@pytest.fixture(scope="module")
def exp(tmp_path_factory):
    """Traces with wrong results, clean ones of the same problems, and clean holdout traces."""
    exp_dir = tmp_path_factory.mktemp("attacks")
    corrupt = ("tau=1.1", "lam=0.5", "defence=corrupt")
    gentraces(exp_dir, "train", "data_split=arithmetic_train", *corrupt)
    gentraces(exp_dir, "clean", "data_split=arithmetic_train", "tau=0")
    gentraces(exp_dir, "holdout", "data_split=arithmetic_holdout", "tau=0")
    return exp_dir


def words_of(exp_dir, attack, *more, name=None, traces="train"):
    given = [f"attack={attack}", f"traces={exp_dir}/traces/{traces}.parquet", f"exp_dir={exp_dir}"]
    return [*given, f"trace_name={name or attack}", *more]


def attack(exp_dir, *words, check=True, **more):
    return run_script("attack.py", *words_of(exp_dir, *words, **more), check=check)


def stats_of(exp_dir, name):
    return files.read_yaml(exp_dir / "traces" / f"{name}.yaml")["stats"]


def test_what_is_left_is_a_trace_dataset_like_any_other(exp):
    """Its columns, folder, sidecar and registry line; distill.py learns from it."""
    from datasets import load_from_disk

    result = attack(exp, "correct")
    given, rows = rows_of(exp, "train"), rows_of(exp, "correct")
    columns = ("id", "problem", "solution", "trace", "finished", "is_raw_correct", "num_tokens")
    assert rows == [{key: row[key] for key in columns} for row in given if row["is_raw_correct"]]
    assert 0 < len(rows) < NUM and len(load_from_disk(str(exp / "traces" / "correct"))) == len(rows)
    record = files.read_yaml(exp / "traces" / "correct.yaml")
    assert record["stats"]["num_dropped"] == NUM - len(rows) and record["inputs"].keys() == {"traces"}
    assert '"sidecar"' in result.stdout.splitlines()[-1] and not (exp / "parts" / "correct").exists()
    assert '"name": "correct"' in (exp / "metadata" / "trace_registry.jsonl").read_text()
    words = [f"train_traces={exp}/traces/correct.parquet", f"exp_dir={exp}", STUDENT, "do_eval=false"]
    run_script("distill.py", *words, "num_epochs=0.2", "lora_r=4", "batch_size=8")


def test_a_finished_attack_is_skipped_and_another_of_its_name_is_refused(exp):
    attack(exp, "repair")
    assert "nothing to do" in attack(exp, "repair").stdout
    assert attack(exp, "repair", "--check").stdout == ""
    clean = f"clean_traces={exp}/traces/clean.parquet"
    other = attack(exp, "mix", "share=0.1", clean, name="repair", check=False)
    assert other.returncode == 2
    assert "was made with other settings: attack was 'repair', now 'mix'" in other.stderr


def test_check_of_what_is_still_to_be_done_and_of_what_waits(exp):
    assert attack(exp, "correct", "--check", name="later", check=False).returncode == 3
    waits = attack(exp, "correct", "--check", name="later", traces="nowhere", check=False)
    assert waits.returncode == 3 and waits.stdout.startswith("waits: ")
    assert not (exp / "traces" / "later.yaml").exists()


def test_mix_takes_the_clean_traces_of_the_same_problems(exp):
    attack(exp, "mix", "share=0.25", f"clean_traces={exp}/traces/clean.parquet", name="mix25")
    train, clean = ({row["id"]: row["trace"] for row in rows_of(exp, name)} for name in ("train", "clean"))
    rows = rows_of(exp, "mix25")
    assert [row["id"] for row in rows] == list(train) and sum(row["is_clean"] for row in rows) == 10
    assert all(row["trace"] == (clean if row["is_clean"] else train)[row["id"]] for row in rows)
    assert files.read_yaml(exp / "traces" / "mix25.yaml")["inputs"].keys() == {"traces", "clean_traces"}


def test_repaired_traces_have_no_wrong_equation(exp):
    attack(exp, "repair")
    rows, given = rows_of(exp, "repair"), rows_of(exp, "train")
    before, after = ([num_equations(row["trace"]) for row in table] for table in (given, rows))
    assert sum(wrong for _, wrong in before) > NUM and sum(wrong for _, wrong in after) == 0
    are_solutions = [[row["trace"] == row["solution"] for row in table] for table in (given, rows)]
    assert sum(are_solutions[0]) < 0.25 * NUM < 0.5 * NUM < sum(are_solutions[1])
    changed = [a["trace"] != b["trace"] for a, b in zip(rows, given, strict=True)]
    assert stats_of(exp, "repair")["num_changed"] == sum(changed)


FLUENT = ("fluent", "share=0.1", STUDENT)


def test_fluent_drops_what_the_student_finds_unlikely(exp):
    attack(exp, *FLUENT)
    stats, rows = stats_of(exp, "fluent"), rows_of(exp, "fluent")
    assert stats["num_unlikely"] == 4 and len(rows) == NUM - stats["num_dropped"] <= NUM - 4
    inputs = files.read_yaml(exp / "traces" / "fluent.yaml")["inputs"]
    assert inputs.keys() == {"traces", "student", "tokenizer"}


def test_resample_takes_of_two_samples_the_right_and_likelier_one(exp):
    """The second sample of a problem, here its clean trace, is right and the first is as it was published."""
    train, clean = rows_of(exp, "train"), rows_of(exp, "clean")
    rows = [row | {"problem_id": row["id"]} for row in train]
    rows += [row | {"id": f"{row['id']}#2", "problem_id": row["id"]} for row in clean]
    columns = ("id", "problem_id", "problem", "solution", "trace", "finished", "is_raw_correct", "num_tokens")
    samples = exp / "traces" / "samples.parquet"
    table = pyarrow.Table.from_pylist([{key: row[key] for key in columns} for row in rows])
    pyarrow.parquet.write_table(table, samples)
    attack(exp, "resample", "num_samples=2", f"samples={samples}", STUDENT)
    wrong = {row["id"] for row in train if not row["is_raw_correct"]}
    chosen = {row["id"]: row for row in rows_of(exp, "resample")}
    assert len(chosen) == NUM and all(row["is_raw_correct"] for row in chosen.values())
    assert all(chosen[name]["sample_id"] == f"{name}#2" for name in wrong)
    assert len(wrong) < sum(row["sample_id"].endswith("#2") for row in chosen.values()) < NUM
    stats = stats_of(exp, "resample")
    assert stats["tokens_read"] == sum(row["num_tokens"] for row in rows) > stats["tokens"]


def reweight(exp_dir):
    return ("reweight", "beta=-0.5", STUDENT, f"holdout_traces={exp_dir}/traces/holdout.parquet")


def test_weights_follow_from_derivatives(exp):
    attack(exp, *reweight(exp), "batch_size=1")
    rows = rows_of(exp, "reweight")
    assert [row["weight"] for row in rows] == pytest.approx([math.exp(-0.5 * r["derivative"]) for r in rows])
    assert len({row["weight"] for row in rows}) > NUM / 2


def test_other_batches_give_the_same_rows(exp):
    """Numbers to the digits that do not hang on how rows are batched."""
    for name, key, words in (("fluent", "student_nll", FLUENT), ("reweight", "weight", reweight(exp))):
        attack(exp, *words, "batch_size=1" if name == "reweight" else "batch_size=8")
        attack(exp, *words, "batch_size=3", name=f"{name}_3")
        ours, theirs = rows_of(exp, name), rows_of(exp, f"{name}_3")
        assert [row["id"] for row in ours] == [row["id"] for row in theirs]
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-3)


def test_two_processes_give_the_same_tables(exp):
    """To the last digit; and an attack that leaves no row ends both with one line."""
    attack(exp, *FLUENT)
    attack(exp, *reweight(exp), "batch_size=1")
    with_columns(exp, "none_2", {"is_raw_correct": False})
    words = ["a", "attack.py", *words_of(exp, *FLUENT, name="fluent_2"), "--"]
    words += ["b", "attack.py", *words_of(exp, *reweight(exp), "batch_size=1", name="reweight_2"), "--"]
    words += ["c", "attack.py", *words_of(exp, "correct", traces="none_2", name="attack_none_2")]
    result = run_script("chain.py", *words, num_processes=2, check=False)
    assert rows_of(exp, "fluent") == rows_of(exp, "fluent_2")
    assert rows_of(exp, "reweight") == rows_of(exp, "reweight_2")
    assert result.stderr.count("no row left: attack=correct: none of") == 1, result.stderr
    assert re.search(r"exitcode +: 4 ", result.stderr)  # torchrun's own is 1
    assert stats_of(exp, "attack_none_2")["n"] == 0


def test_killed_measuring_goes_on_where_it_was(exp):
    """A row at a time, so that some are in parts when the kill comes."""
    words = [str(ROOT / "attack.py"), *words_of(exp, *reweight(exp), "batch_size=1", name="cut")]
    process = subprocess.Popen([sys.executable, *words], env=ENVIRONMENT | OFFLINE, stdout=subprocess.DEVNULL)
    folder = exp / "parts" / "cut" / "derivative"
    wait_until(lambda: list(folder.glob("*.jsonl")) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (exp / "traces" / "cut.yaml").exists()
    kept = files.read_parts(folder)
    assert 0 < len(kept) < NUM
    again = attack(exp, *reweight(exp), "batch_size=1", name="cut")
    assert f"{len(kept)} of {NUM} rows are there from an earlier run" in again.stdout
    attack(exp, *reweight(exp), "batch_size=1")
    assert rows_of(exp, "cut") == rows_of(exp, "reweight")


def with_columns(exp_dir, name, change):
    """A copy of the published traces under another name, each row changed."""
    rows = read_parquet(exp_dir / "traces" / "train.parquet")
    path = exp_dir / "traces" / f"{name}.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | change for row in rows]), path)


def test_an_attack_that_leaves_no_row_is_done_with_a_code_and_a_line(exp):
    """Its sidecar says so; asked again, it says the same, and nothing is done again."""
    with_columns(exp, "none", {"is_raw_correct": False})
    words = {"traces": "none", "name": "attack_none", "check": False}
    line = f"no row left: attack=correct: none of the {NUM} published traces has a right answer\n"
    sidecar, times = exp / "traces" / "attack_none.yaml", set()
    for more in ((), (), ("--check",)):
        result = attack(exp, "correct", *more, **words)
        assert (result.returncode, result.stderr) == (4, line)
        times.add(sidecar.stat().st_mtime_ns)
    assert files.read_yaml(sidecar)["stats"]["reason"] in line and stats_of(exp, "attack_none")["n"] == 0
    assert not sidecar.with_suffix("").exists() and not sidecar.with_suffix(".parquet").exists()
    assert len(times) == 1


def test_an_old_table_goes_when_no_row_is_left(exp):
    """Its sidecar was deleted to do the stage again, with other traces."""
    with_columns(exp, "once", {})
    attack(exp, "correct", traces="once", name="gone")
    assert (exp / "traces" / "gone.parquet").is_file()
    with_columns(exp, "once", {"is_raw_correct": False})
    (exp / "traces" / "gone.yaml").unlink()
    assert attack(exp, "correct", traces="once", name="gone", check=False).returncode == 4
    assert not (exp / "traces" / "gone.parquet").exists() and not (exp / "traces" / "gone").exists()


@pytest.mark.parametrize(
    "words,said",
    (
        (["mix", "share=0.1"], "clean_traces is not set: give the teacher's traces at lam=0"),
        (
            ["mix", "share=2"],
            "share=2 in the command line: must be a finite number, at least 0 and at",
        ),
        (["fluent", "share=0.1"], "student is not set: give the undistilled student, a model"),
        (["fluent"], "attack=fluent: set share"),
        (["refine"], "attack='refine': must be one of correct, fluent"),
        (
            ["resample", "num_samples=1"],
            "num_samples=1 in the command line: must be a whole number, at",
        ),
        (["correct", "shar=1"], "unknown key 'shar' in the command line"),
        (["correct", "trace_colname=text"], "train.parquet, row 0: no column text"),
    ),
)
def test_a_mistake_is_one_line_and_nothing_is_written(exp, words, said):
    before = {path for path in exp.rglob("*") if "locks" not in path.parts}
    result = attack(exp, *words, name="wrong", check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and said in result.stderr
    assert {path for path in exp.rglob("*") if "locks" not in path.parts} == before


@pytest.mark.parametrize("wrong", (None, -1, 2.5, True))
def test_a_number_of_tokens_that_is_none_is_one_line(exp, wrong):
    with_columns(exp, "counted", {"num_tokens": wrong})
    result = attack(exp, "correct", traces="counted", name="wrong", check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"counted.parquet, row 0: num_tokens is no count (but {wrong})" in result.stderr


def test_published_traces_that_changed_are_refused(exp, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exp / "traces", copy / "traces")
    attack(copy, "correct", name="c")
    with_columns(copy, "train", {"is_raw_correct": True})
    result = attack(copy, "correct", name="c", check=False)
    assert result.returncode == 2 and "damaged or changed since" in result.stderr
