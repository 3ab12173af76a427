"""Traces made elsewhere, and texts cut out of the teacher's own, on the demo's models."""

import json
import re

import pytest
from conftest import ROOT, run_script
from helpers_scripts import rows_of

from ads import chat
from ads.data.prompts import make_rows
from ads.data.published import answer_only, truncated
from ads.decode.cached_model import CachedModel
from ads.decode.rows import Request
from ads.delta.arm_models import load_models
from ads.stage import files
from ads.stage.inputs import fingerprint_model
from ads.stage.settings import GenConfig
from gentraces import decode_rows

MODELS = ROOT / "demo" / "models"
SMALL = ["max_samples=40", "max_length=200", "max_prompt_length=100", "batch_size=40", "tau=1.0", "top_k=0"]


def gentraces(exp_dir, name, *words, **keywords):
    given = [f"exp_dir={exp_dir}", f"trace_name={name}", f"teacher={MODELS / 'teacher'}", *SMALL]
    if not any(word.startswith("data_split") for word in words):
        given.append("data_split=arithmetic_test")
    return run_script("gentraces.py", *given, *words, **keywords)


def stats_of(exp_dir, name):
    return files.read_yaml(exp_dir / "traces" / f"{name}.yaml")["stats"]


@pytest.fixture(scope="module")
def exp(tmp_path_factory):
    exp_dir = tmp_path_factory.mktemp("published")
    gentraces(exp_dir, "native")
    return exp_dir


def publish(folder, rows, split="test"):
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"published={folder}"


def test_our_own_traces_read_back_are_the_native_arm(exp, tmp_path):
    """Texts, ids, grades, NLL and forced answers; with the same random numbers or without any."""
    native = rows_of(exp, "native")
    given = publish(
        tmp_path / "own", [{"problem": r["problem"], "trace": r["trace"]} for r in native if r["finished"]]
    )
    gentraces(exp, "back", "defence=external", given, "tau=0")
    back = {row["id"]: row for row in rows_of(exp, "back")}
    assert len(back) == sum(row["finished"] for row in native) > 20
    for row in filter(lambda row: row["finished"], native):
        ours = back[row["id"]]
        for key in (
            "problem",
            "solution",
            "trace",
            "response_ids",
            "is_raw_correct",
            "finished",
            "trace_af",
            "is_af_correct",
        ):
            assert ours[key] == row[key], key
        assert ours["teacher_nll"] == pytest.approx(row["teacher_nll"], abs=1e-4)
    found = stats_of(exp, "back")
    assert found["n"] == len(back) and found["raw"]["num_correct"] == sum(
        r["is_raw_correct"] for r in back.values()
    )


TRAIN = [
    "lora=false",
    "lr=3e-3",
    "num_epochs=2",
    "do_eval=false",
    "batch_size=20",
    "per_device_batch_size=20",
]
STUDENT_TEST = ["is_teacher=false", "tau=0", "answer_force=false"]


def student_of(exp_dir, name, *traces):
    """What a student learns from an arm: (statistics of its training traces, its weights, its test)."""
    gentraces(exp_dir, name, "data_split=arithmetic_train", "max_samples=100", "answer_force=false", *traces)
    given = [f"exp_dir={exp_dir}", f"model_name={name}", f"student={MODELS / 'student'}"]
    run_script("distill.py", *given, f"train_traces={exp_dir}/traces/{name}.parquet", *TRAIN)
    student = exp_dir / "models" / name / "final"
    # the last word counts: here the model that is sampled is the student
    gentraces(exp_dir, f"test_{name}", *STUDENT_TEST, f"teacher={student}")
    return stats_of(exp_dir, name), fingerprint_model(str(student)), rows_of(exp_dir, f"test_{name}")


@pytest.mark.slow
def test_100_of_our_own_traces_read_back_teach_the_same_student(tmp_path):
    """Exported with their answers, as anybody would, and read back as an arm: the same weights, and the same
    answers of the student. Problems that are not of the split are known by their answer alone."""
    native = student_of(tmp_path, "native", "tau=0.4")
    rows = rows_of(tmp_path, "native")
    assert len(rows) == 100 and all(row["finished"] for row in rows)
    answers = [re.search(r"boxed\{ (\d+) \}", row["solution"])[1] for row in rows]
    exported = [
        {"problem": row["problem"], "trace": row["trace"], "answer": answer}
        for row, answer in zip(rows, answers, strict=True)
    ]
    given = publish(tmp_path / "own", exported, "train")
    for name, seed in (("back", 42), ("elsewhere", 43)):  # another seed makes other problems
        words = "tau=0", "defence=external", given, f"seed={seed}"
        stats, weights, tested = student_of(tmp_path, name, *words)
        assert weights == native[1] and tested == native[2]
        for key in ("n", "raw", "finished", "num_tokens"):
            assert stats[key] == native[0][key], key
        assert stats["teacher_nll"] == pytest.approx(native[0]["teacher_nll"], abs=1e-5)
    untaught = fingerprint_model(str(MODELS / "student"))
    assert native[1] != untaught and 0 < native[0]["raw"]["num_correct"] <= 100


def test_a_text_is_cut_down_before_all_are_sampled(monkeypatch):
    """No row was once kept before the last had been sampled: a kill cost hours, and so did the next one."""
    settings = {"tau": 1.0, "max_samples": 12, "max_length": 200, "answer_force": False}
    teacher = str(MODELS / "teacher")
    cfg = GenConfig(teacher=teacher, defence="truncated", data_split="arithmetic_test", **settings)
    tokenizer, prompts, prefill = chat.load_tokenizer(teacher), [], CachedModel.prefill
    models, _ = load_models(cfg, tokenizer, None, "cpu")
    rows = {row.id: row for row in make_rows(cfg, tokenizer, "")[0]}
    requests = [Request(row.id, row.prompt_ids, 60) for row in rows.values()]
    monkeypatch.setattr(
        CachedModel, "prefill", lambda self, ids, slots: prompts.extend(ids) or prefill(self, ids, slots)
    )
    found = decode_rows(cfg, models, tokenizer, rows, None, 2, requests)
    next(found)
    assert len(prompts) == 8 + 1, "four batches to sample, and the first text to read"
    assert len(list(found)) == 11


def test_problems_of_one_s_own_are_graded_by_their_answer(exp, tmp_path):
    rows = [
        {"problem": "What is 2 + 3 ?", "trace": "the answer is \\boxed{ 5 } .", "answer": "5"},
        {"problem": "What is 2 + 4 ?", "trace": "the answer is \\boxed{ 5 } .", "answer": "6"},
    ]
    gentraces(exp, "mine", "defence=external", publish(tmp_path / "mine", rows), "answer_force=false")
    assert [row["is_raw_correct"] for row in rows_of(exp, "mine")] == [True, False]


@pytest.mark.parametrize(
    "rows,words,error",
    (
        (
            [{"problem": "?", "trace": "x"}],
            [],
            "row 0: the problem is not one of the data split's and has no answer",
        ),
        ([{"problem": "?", "answer": "1"}], [], "line 1: no column trace"),
        ([{"problem": "?", "trace": 5, "answer": "1"}], [], "line 1: trace must be text, but is 5"),
        ([], [], "holds no trace"),
        (
            [{"problem": "?", "trace": "x", "answer": "1"}],
            ["lam=0.5"],
            "defence=external has no strength; set lam=0",
        ),
        (
            [{"problem": "?", "trace": "x", "answer": "1"}],
            ["prefill=so"],
            "publishes whole texts",
        ),
    ),
)
def test_what_cannot_be_published_is_one_line(tmp_path, rows, words, error):
    result = gentraces(
        tmp_path, "x", "defence=external", publish(tmp_path / "bad", rows), *words, check=False
    )
    assert result.returncode == 2 and error in result.stderr and "Traceback" not in result.stderr
    assert "loading" not in result.stdout


def test_texts_are_cut_down():
    trace = "start with 3 . double : 3 * 2 = 6 . the answer is \\boxed{ 6 } ."
    assert answer_only(trace, "#### 6") == "\\boxed{6}"
    assert truncated(trace, "#### 6") == "start with 3 . double : 3 * 2\n\n\\boxed{6}"
    assert answer_only("I do not know", "#### 6") == ""


@pytest.mark.parametrize("defence", ("answer_only", "truncated"))
def test_the_teacher_s_own_traces_are_cut_down(exp, defence):
    """Of the same random numbers: the same answers, in fewer tokens."""
    gentraces(exp, defence, f"defence={defence}", "answer_force=false", "num_contrasts=3")
    native = {row["id"]: row for row in rows_of(exp, "native")}
    rows = rows_of(exp, defence)
    assert len(rows) == len(native)
    for row in rows:
        whole = native[row["id"]]
        assert row["num_tokens"] < whole["num_tokens"]
        if whole["is_raw_correct"]:
            assert row["raw_answer"] == whole["raw_answer"] and row["is_raw_correct"]
    assert sum(row["is_raw_correct"] for row in rows) >= 20
    for problem in json.loads((exp / "traces" / f"{defence}.contrast.json").read_text())["problems"]:
        clean, cut = (
            "".join(token[0] for token in problem[side]["tokens"]) for side in ("clean", "defended")
        )
        assert clean == native[problem["id"]]["trace"] + " <eos>" and len(cut) < len(clean)


def test_corrupted_results_are_stored_beside_what_the_teacher_writes(exp):
    """Stages without a proxy stored no contrasts, so nobody could read what a corruption did."""
    words = "defence=corrupt", "lam=1", "answer_force=false", "num_contrasts=3"
    gentraces(exp, "corrupted", *words)
    native = {row["id"]: row for row in rows_of(exp, "native")}
    for problem in json.loads((exp / "traces" / "corrupted.contrast.json").read_text())["problems"]:
        clean, corrupted = (problem[side]["tokens"] for side in ("clean", "defended"))
        assert "".join(token[0] for token in clean) == native[problem["id"]]["trace"] + " <eos>"
        first = next(k for k, pair in enumerate(zip(clean, corrupted, strict=False)) if pair[0] != pair[1])
        assert problem["clean"]["replaced"] == [] and problem["defended"]["replaced"][0] == first
