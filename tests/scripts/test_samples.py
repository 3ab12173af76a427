"""Several samples a problem, and what else an attacker asks of gentraces.py."""

import dataclasses
import statistics

import pyarrow.parquet
import pytest
from conftest import ROOT, run_script
from helpers_scripts import rows_of

from ads.data.prompts import few_shot_examples
from ads.data.text import has_loop
from ads.report.bootstrap import read_answers
from ads.stage import files
from ads.stage.settings import GenConfig
from ads.stage.sidecar import read_sidecar

DEMO = [f"teacher={ROOT / 'demo' / 'models' / 'teacher'}", "max_samples=6", "max_length=200", "seed=1"]
SAMPLED = [*DEMO, "data_split=arithmetic_test", "tau=1.4", "answer_force=false"]


def demo_traces(exp_dir, name, *more, **keywords):
    run_script("gentraces.py", f"exp_dir={exp_dir}", f"trace_name={name}", *SAMPLED, *more, **keywords)
    return rows_of(exp_dir, name)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Six of the demo's problems, four samples each."""
    folder = tmp_path_factory.mktemp("samples")
    demo_traces(folder, "four", "num_samples=4", "batch_size=5")
    return folder


def test_samples_differ_and_the_first_is_what_a_run_without_the_key_gives(samples):
    rows, one = rows_of(samples, "four"), demo_traces(samples, "one")
    names = [row["id"] for row in one]
    wanted = [(name + suffix, name) for name in names for suffix in ("", "#2", "#3", "#4")]
    assert [(row["id"], row["problem_id"]) for row in rows] == wanted
    assert all("problem_id" not in row for row in one)
    for found, alone in zip(rows[::4], one, strict=True):
        assert found.pop("teacher_nll") == pytest.approx(alone.pop("teacher_nll"), rel=1e-5)
        assert found == {**alone, "problem_id": alone["id"]}
    for k, name in enumerate(names):
        own = rows[4 * k : 4 * k + 4]
        assert len({row["problem"] for row in own}) == 1 and {row["problem_id"] for row in own} == {name}
    assert len({tuple(row["response_ids"]) for row in rows}) > 18, "of 24 sampled"


def test_samples_do_not_depend_on_batches_or_processes(samples):
    demo_traces(samples, "two", "num_samples=4", "batch_size=24", num_processes=2)
    for one, two in zip(rows_of(samples, "four"), rows_of(samples, "two"), strict=True):
        assert one.pop("teacher_nll") == pytest.approx(two.pop("teacher_nll"), rel=1e-5)
        assert one == two


def test_numbers_of_samples_are_of_problems(samples):
    """Accuracy is the mean over problems; pass@4 counts the problems with a right sample."""
    rows, stats = rows_of(samples, "four"), files.read_yaml(samples / "traces" / "four.yaml")["stats"]
    by_problem = [[row["is_raw_correct"] for row in rows[k : k + 4]] for k in range(0, 24, 4)]
    shares = [sum(correct) / 4 for correct in by_problem]
    assert (stats["n"], stats["num_traces"], stats["af"]) == (6, 24, None)
    assert stats["raw"]["accuracy"] == round(statistics.fmean(shares), 4) == stats["pass_at"]["raw"][1]
    assert stats["pass_at"] == {
        "raw": {1: stats["raw"]["accuracy"], 4: round(sum(map(any, by_problem)) / 6, 4)}
    }
    assert 0 < stats["raw"]["accuracy"] < stats["pass_at"]["raw"][4]
    assert stats["loops"] == round(statistics.fmean(has_loop(row["trace"]) for row in rows), 4)
    assert "num_traces" not in (read_sidecar(samples / "traces" / "one.yaml"))["stats"]
    stage = {**read_sidecar(samples / "traces" / "four.yaml"), "path": samples / "traces" / "four.yaml"}
    tests, problem = read_answers(stage)  # which the report resamples by problem
    assert problem == "" and list(tests) == ["raw"]
    assert tests["raw"] == dict(zip([row["id"] for row in rows[::4]], shares, strict=True))


def test_worked_examples_are_of_different_problems(samples):
    """The first right traces of a table with several samples a problem may be of one problem."""
    right = [row for row in rows_of(samples, "four") if row["finished"] and row["is_raw_correct"]]
    problems = list({row["problem"]: None for row in right})
    assert right[0]["problem"] == right[1]["problem"], "else this tells nothing"
    cfg = GenConfig(few_shot=2, few_shot_traces=f"{samples}/traces/four.parquet")
    shown = few_shot_examples(cfg)
    assert [problem for problem, _ in shown] == problems[:2] and shown[0][1] == right[0]["trace"].strip()
    with pytest.raises(ValueError, match=f"finished traces of {len(problems)} problems: lower few_shot"):
        few_shot_examples(dataclasses.replace(cfg, few_shot=24))


def test_auto_prefill_is_the_word_that_right_traces_begin_with(samples, tmp_path):
    """Few of them may begin otherwise; wrong and cut ones, and think blocks, do not count."""
    table = f"few_shot_traces={samples}/traces/four.parquet"
    student = [*DEMO[1:], f"teacher={ROOT / 'demo' / 'models' / 'student'}", "is_teacher=false",
               "data_split=arithmetic_test", "answer_force=false", f"exp_dir={tmp_path}"]  # fmt: skip
    found = run_script("gentraces.py", *student, table, "prefill=auto", "trace_name=auto")
    run_script("gentraces.py", *student, "prefill=start", "trace_name=given")
    assert "prefill=auto: 'start', as " in found.stdout
    assert rows_of(tmp_path, "auto") == rows_of(tmp_path, "given")
    record = files.read_yaml(tmp_path / "traces" / "auto.yaml")
    assert record["resolved_prefill"] == "start" and record["config"]["prefill"] == "auto"
    assert (
        record["inputs"]["few_shot_traces"]
        == files.read_yaml(samples / "traces" / "four.yaml")["outputs"]["four.parquet"]
    )
    rows = [
        {"problem": "p", "finished": finished, "is_raw_correct": right, "trace": trace}
        for finished, right, trace in (
            (True, False, "wrong a"), (True, False, "wrong b"), (False, True, "wrong c"),
            (True, True, "<think>wrong</think>\n take 1"), (True, True, "<think>x</think>"),
        )
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    more = [f"few_shot_traces={tmp_path}/rows.parquet", "prefill=auto", "trace_name=few"]
    assert "prefill=auto: 'take', as 1 of 1 correct" in run_script("gentraces.py", *student, *more).stdout
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:3]), tmp_path / "none.parquet")
    more = [f"few_shot_traces={tmp_path}/none.parquet", "prefill=auto", "trace_name=none"]
    refused = run_script("gentraces.py", *student, *more, check=False)
    assert refused.returncode == 2 and "none.parquet has no correct, finished trace" in refused.stderr
    assert "give the words" in refused.stderr


@pytest.mark.parametrize(
    "rows,words",
    (
        ([{"id": "a"}, {"id": "a#2"}], "has ids that end in # and a number"),
        ([{"problem_id": "a"}], "has a column problem_id of its own"),
    ),
)
def test_names_of_samples_that_are_taken_are_refused(rows, words, tmp_path):
    lines = [f'{{"problem": "1+1=?", "solution": "2", {str(row)[1:-1]}}}\n'.replace("'", '"') for row in rows]
    (tmp_path / "test.jsonl").write_text("".join(lines))
    more = [f"exp_dir={tmp_path}/x", f"data_split={tmp_path}_test", "num_samples=2"]
    found = run_script("gentraces.py", *SAMPLED, *more, check=False)
    assert found.returncode == 2 and words in found.stderr


def test_stages_from_before_these_keys_count_as_done(samples, tmp_path):
    """Without num_samples, attacker, mask_share and weights in their records."""
    words = [f"exp_dir={samples}", "trace_name=one", *SAMPLED]
    path = samples / "traces" / "one.yaml"
    if not path.is_file():
        run_script("gentraces.py", *words)
    record = files.read_yaml(path)
    for key in ("num_samples", "attacker"):
        del record["config"][key]
    files.write_text(path, files.yaml.safe_dump(record, sort_keys=False))
    again = run_script("gentraces.py", *words)
    assert "nothing to do" in again.stdout
    refused = run_script("gentraces.py", *words, "num_samples=2", check=False)
    assert "num_samples was 1, now 2" in refused.stderr
    refused = run_script("gentraces.py", *words, "is_teacher=false", "attacker=full", check=False)
    assert "attacker was 'naive', now 'full'" in refused.stderr
    assert "nothing to do" in run_script("gentraces.py", *words, "attacker=full").stdout  # a teacher has none
