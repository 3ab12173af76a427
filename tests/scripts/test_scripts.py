"""The scripts as a user runs them: processes, interruption, and what their outputs are good for."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, run_script
from helpers_pipeline import imported
from helpers_scripts import SMALL, ads_arguments, free_port, gentraces, rows_of, save_grad
from safetensors.torch import load_file

import distill
from ads import chat
from ads.attacks import training
from ads.stage import files, fingerprint
from ads.stage.sidecar import read_sidecar


def test_two_processes_give_the_gradient_of_one(model_folders, exp, tmp_path):
    """The reference threw its all-reduce away: the scale of g depended on the number of GPUs."""
    folders = tmp_path / "one", tmp_path / "two"
    for folder, num_processes in zip(folders, (1, 2), strict=True):
        save_grad(model_folders, folder, "grad_rank=0", holdout_of=exp, num_processes=num_processes)
    one, two = (load_file(folder / "student_grads.safetensors") for folder in folders)
    norm = sum(g.square().sum() for g in one.values()).sqrt()
    difference = sum((one[k] - two[k]).square().sum() for k in one).sqrt()
    assert difference / norm < 1e-6
    stats = [files.read_yaml(folder / "student_grads.yaml") for folder in folders]
    for key in ("exact", "split_half"):
        found = [s["diagnostics"][key]["correlation"] for s in stats]
        assert found[0] == pytest.approx(found[1], abs=1e-4), key
    assert stats[0]["stats"]["loss"] == pytest.approx(stats[1]["stats"]["loss"], rel=1e-6)
    assert (stats[0]["world_size"], stats[1]["world_size"]) == (1, 2)
    assert stats[0]["stats"]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_all_processes_say_in_a_line_what_the_main_one_refuses(model_folders, exp):
    """The others once waited for its verdict, and died of its death with a traceback below its line.

    A launcher ends the others once one has left, at times before they have spoken. So each is started by hand
    too: there all must speak.
    """
    words = [f"exp_dir={exp}", f"proxy_student={model_folders['proxy']}", "grad_rank=5"]
    words += [f"holdout_traces={exp}/traces/holdout.parquet"]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environments = [{**ENVIRONMENT, **world, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    command = [sys.executable, ROOT / "save_grad.py", *words]
    processes = [subprocess.Popen(command, env=e, stderr=subprocess.PIPE, text=True) for e in environments]
    found = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    launched = save_grad(model_folders, exp, "grad_rank=5", num_processes=2, check=False)
    assert launched.returncode != 0
    for text in (*found, launched.stderr):
        lines = [line for line in text.splitlines() if "error: " in line]
        assert lines and all("grad_rank was 16, now 5" in line for line in lines)
        assert "[rank1]" not in text
    assert not any("Traceback" in text for text in found)


def test_gradient_batch_size_and_checkpointing_change_nothing(model_folders, exp, tmp_path):
    """Nor do they lose the diagnostics, which the library's own checkpointing once did."""
    folders = tmp_path / "one", tmp_path / "two"
    save_grad(model_folders, folders[0], "grad_rank=0", holdout_of=exp)
    save_grad(
        model_folders,
        folders[1],
        "grad_rank=0",
        "batch_size=5",
        "batch_tokens=300",
        "gradient_checkpointing=true",
        holdout_of=exp,
    )
    one, two = (files.read_yaml(folder / "student_grads.yaml")["diagnostics"] for folder in folders)
    for key in ("exact", "split_half"):
        assert one[key]["correlation"] == pytest.approx(two[key]["correlation"], abs=1e-4), key
    assert one["num_positions"] == two["num_positions"] > 0
    one, two = (load_file(folder / "student_grads.safetensors") for folder in folders)
    for name, g in one.items():
        assert torch.allclose(g, two[name], rtol=1e-4, atol=1e-6 * g.abs().max().item()), name


def test_two_processes_and_other_batches_give_the_same_traces(model_folders, problem_folder, exp, tmp_path):
    holdout = f"holdout_traces={exp}/traces/holdout.parquet"
    more = [*ads_arguments(model_folders, exp), holdout, "one_step=0.1", "num_contrasts=3"]
    gentraces(model_folders, problem_folder, tmp_path, "one", *more, "batch_size=3")
    others = "batch_size=4", "cuda_graph=true"
    gentraces(model_folders, problem_folder, tmp_path, "two", *more, *others, num_processes=2)
    one, two = (files.read_yaml(tmp_path / "traces" / f"{name}.yaml") for name in ("one", "two"))
    assert two["world_size"] == 2 and one["stats"]["one_step"]["change"] != 0
    assert two["stats"]["one_step"] == pytest.approx(one["stats"]["one_step"], abs=3e-6)
    one, two = (
        json.loads((tmp_path / "traces" / f"{name}.contrast.json").read_text()) for name in ("one", "two")
    )
    assert len(one["problems"]) == 3
    for a, b in zip(one["problems"], two["problems"], strict=True):
        assert a["id"] == b["id"]
        for side in ("clean", "defended"):
            texts, others = ([token[0] for token in p[side]["tokens"]] for p in (a, b))
            assert texts and texts == others
            assert (a[side]["finished"], a[side]["is_correct"]) == (
                b[side]["finished"],
                b[side]["is_correct"],
            )
    for one, two in zip(rows_of(tmp_path, "one"), rows_of(tmp_path, "two"), strict=True):
        assert one.pop("teacher_nll") == pytest.approx(two.pop("teacher_nll"), rel=1e-5)
        assert one == two


def test_of_several_samples_one_a_problem_is_stored_beside_a_clean_trace(
    model_folders, problem_folder, exp, tmp_path
):
    more = [*ads_arguments(model_folders, exp), "num_contrasts=3", "num_samples=2", "max_samples=4"]
    gentraces(model_folders, problem_folder, tmp_path, "t", *more)
    found = json.loads((tmp_path / "traces" / "t.contrast.json").read_text())["problems"]
    rows = rows_of(tmp_path, "t")
    assert [problem["id"] for problem in found] == [row["id"] for row in rows[:6:2]]
    assert len(rows) == 8 and rows[1]["id"] == rows[0]["id"] + "#2"


def test_trace_columns(exp, problem_folder):
    rows = rows_of(exp, "holdout")
    assert [r["id"] for r in rows] == [f"{problem_folder.split('/')[-1]}/holdout/{i}" for i in range(12)]
    expected = {"id", "problem", "solution", "prompt_ids", "response_ids", "trace", "finished", "num_tokens",
                "is_raw_correct", "trace_af", "is_af_correct", "teacher_nll"}  # fmt: skip
    assert expected <= set(rows[0])
    for row in rows:
        assert row["num_tokens"] == len(row["response_ids"]) <= 140 - len(row["prompt_ids"])
        assert row["finished"] or len(row["prompt_ids"]) + row["num_tokens"] == 140
        assert row["trace_af"].startswith(row["trace"] + chat.FORCE_TEXT)
    from datasets import load_from_disk

    assert load_from_disk(str(exp / "traces" / "holdout")).to_list() == rows


def test_sidecar_stats_and_perturbation(model_folders, problem_folder, exp):
    more = [*ads_arguments(model_folders, exp), "eps=1e-3"]
    gentraces(model_folders, problem_folder, exp, "ads", *more)
    sidecar = files.read_yaml(exp / "traces" / "ads.yaml")
    assert sidecar["stats"]["n"] == 12 and sidecar["stats"]["raw"]["high"] > 0
    assert sidecar["perturbation"]["cosine"] > 0.99
    assert sidecar["inputs"]["gradient"] == fingerprint.fingerprint_file(exp / "student_grads.safetensors")
    assert not (exp / "parts" / "ads").exists()


def test_trace_colname_names_both_columns(model_folders, problem_folder, exp):
    gentraces(model_folders, problem_folder, exp, "named", "trace_colname=cot", "max_samples=2")
    assert {"cot", "cot_af"} <= set(rows_of(exp, "named")[0])


def test_a_finished_stage_is_skipped_at_once(model_folders, problem_folder, exp):
    """Before torch is imported."""
    arguments = [f"data_split={problem_folder}_holdout", "tau=0", "batch_size=2"]
    report = {"PYTHONPROFILEIMPORTTIME": "1"}
    again = gentraces(model_folders, problem_folder, exp, "holdout", *arguments, **report)
    assert "nothing to do" in again.stdout
    assert imported(again.stderr, "yaml") and not imported(again.stderr, "torch")
    checked = gentraces(model_folders, problem_folder, exp, "holdout", *arguments, "--check")
    assert checked.stdout == ""  # the exit code says it


def kill_when(path_pattern, folder, script, *arguments, delay=0.0):
    """Start a script and SIGKILL it `delay` seconds after a file matches; returns whether it was still
    running."""
    command = [sys.executable, str(ROOT / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    while process.poll() is None and not list(folder.glob(path_pattern)):
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def test_killed_sampling_goes_on_where_it_was(model_folders, problem_folder, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    gentraces(model_folders, problem_folder, whole, "t", "batch_size=2")
    arguments = [
        f"exp_dir={cut}",
        f"teacher={model_folders['teacher']}",
        "trace_name=t",
        *SMALL,
        "batch_size=2",
    ]
    arguments.append(f"data_split={problem_folder}_train")
    assert kill_when("parts/t/traces/*.jsonl", cut, "gentraces.py", *arguments)
    assert not (cut / "traces" / "t.yaml").exists()
    kept = files.read_parts(cut / "parts" / "t" / "traces")
    assert 0 < len(kept) < 12
    resumed = run_script("gentraces.py", *arguments)
    assert f"{len(kept)} of 12 rows are there from an earlier run" in resumed.stdout
    assert rows_of(whole, "t") == rows_of(cut, "t")


def be_interrupted(*_):
    raise KeyboardInterrupt


def test_sampling_does_not_go_on_with_other_prompts(model_folders, problem_folder, tmp_path, monkeypatch):
    """A template that printed the day gave a resumed stage two kinds of prompts."""
    script = importlib.import_module("gentraces")
    arguments = [f"exp_dir={tmp_path}", f"teacher={model_folders['teacher']}", "trace_name=t", *SMALL,
                 f"data_split={problem_folder}_train", "max_samples=3"]  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "columns_of", be_interrupted)
        script.main(arguments)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="unfinished work.*: prompts was '"):
        patch.setattr(chat, "SYSTEM_PROMPT", "Think.")
        script.main(arguments)
    script.main(arguments)
    assert len(rows_of(tmp_path, "t")) == 3


def test_training_does_not_go_on_with_other_sequences(model_folders, exp, tmp_path, monkeypatch):
    arguments = distill_arguments(model_folders, tmp_path, exp)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "make_trainer", be_interrupted)
        distill.main(arguments)
    (tmp_path / "models" / "student" / "checkpoint-3").mkdir()
    monkeypatch.setattr(chat, "SYSTEM_PROMPT", "Think.")
    with pytest.raises(ValueError, match="unfinished work.*: sequences was '"):
        distill.main(arguments)


def distill_arguments(models, exp_dir, traces_of):
    return [
        f"exp_dir={exp_dir}",
        f"student={models['student']}",
        f"train_traces={traces_of}/traces/holdout.parquet",
        f"holdout_traces={traces_of}/traces/holdout.parquet",
        "lora_r=4", "batch_size=4", "num_epochs=4", "eval_epochs=1", "save_epochs=1", "lr=1e-2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def student(model_folders, exp):
    """A student distilled in one go."""
    run_script("distill.py", *distill_arguments(model_folders, exp, exp))
    return exp / "models" / "student"


@pytest.mark.parametrize("lora", ("true", "false"))
def test_students_of_16_bits_are_kept(lora, model_folders, exp, tmp_path):
    """Each was once taken for another model than the one trained, after the whole training.

    Merged and saved students are compared with it by their logits, and accelerate's wrapper called those of
    its 16-bit passes float32.
    """
    arguments = distill_arguments(model_folders, tmp_path, exp)
    more = ["dtype=bfloat16", f"lora={lora}", "num_epochs=1", "do_eval=false", "lr=1e-3"]
    run_script("distill.py", *arguments, *more)
    assert read_sidecar(tmp_path / "models" / "student.yaml")["resolved_dtype"] == "bfloat16"
    weights = load_file(tmp_path / "models" / "student" / "final" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}


def test_distilled_student_learned_and_is_an_ordinary_model(student, model_folders):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sidecar = files.read_yaml(student.with_suffix(".yaml"))
    assert sidecar["stats"]["holdout_loss"] < sidecar["stats"]["holdout_loss_start"] - 0.2
    assert [step for step, _ in sidecar["losses"]["holdout"]] == [0, 3, 6, 9, 12]
    model = AutoModelForCausalLM.from_pretrained(student / "final")
    tokenizer = AutoTokenizer.from_pretrained(student / "final")
    assert tokenizer.chat_template and model.config.model_type == "llama"
    assert tokenizer.eos_token_id in chat.eos_ids(tokenizer, model)
    ids = torch.tensor([chat.prompt_ids(tokenizer, "1+1=?")])
    assert model.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1]
    assert not list(student.glob("checkpoint-*"))
    start = load_file(f"{model_folders['student']}/model.safetensors")
    end = load_file(student / "final" / "model.safetensors")
    assert start.keys() == end.keys() and any(not torch.equal(start[k], end[k]) for k in start)


def test_merged_student_has_the_holdout_loss_of_training(student, exp, model_folders):
    """What is evaluated in stage 5 is what was trained in stage 4: same prompt, same weights."""
    from ads.data.examples import load_examples
    from ads.loading import load_model
    from ads.stage.settings import TrainConfig

    cfg = TrainConfig(student=str(student / "final"))
    tokenizer = chat.load_tokenizer(str(student / "final"))
    model = load_model(str(student / "final"), "float32", "cpu")
    examples, _ = load_examples(cfg, tokenizer, exp / "traces" / "holdout.parquet")
    losses = []
    for example in examples:
        with torch.no_grad():
            losses.append(model(**{k: torch.tensor([ids]) for k, ids in example.items()}).loss.item())
    sidecar = files.read_yaml(student.with_suffix(".yaml"))
    assert sum(losses) / len(losses) == pytest.approx(sidecar["stats"]["holdout_loss"], rel=1e-4)


def test_killed_distillation_resumes_from_its_checkpoint(student, model_folders, exp, tmp_path):
    arguments = distill_arguments(model_folders, tmp_path, exp)
    state = "models/student/checkpoint-6/trainer_state.json"
    assert kill_when(state, tmp_path, "distill.py", *arguments, delay=0.15)
    newest = training.newest_checkpoint(tmp_path / "models" / "student")  # 6, or 9 where this ran slowly
    cut = tmp_path / "models" / "student" / f"checkpoint-{int(newest.rsplit('-', 1)[1]) + 3}"
    cut.mkdir(exist_ok=True)  # as if the kill had cut this one short
    resumed = run_script("distill.py", *arguments)
    assert f"resuming from {newest}\n" in resumed.stdout
    ours, whole = (
        load_file(folder / "final" / "model.safetensors")
        for folder in (tmp_path / "models" / "student", student)
    )
    for name, weight in whole.items():
        assert torch.allclose(weight, ours[name], atol=1e-6), name


def test_a_checkpoint_that_a_kill_cut_short_is_not_resumed_from(tmp_path):
    """Under load a kill once hit the writing of trainer_state.json, and resuming raised for ever."""
    for step, text in ((3, '{"global_step": 3}'), (6, '{"global_step": 6'), (9, "")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert training.newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


@pytest.mark.parametrize("has_lora", [False, True])
def test_training_with_two_processes_is_that_with_one(model_folders, exp, tmp_path, has_lora):
    """With two processes the last step of an epoch once took sequences from its beginning, and the holdout
    loss was that of all tokens.

    Here that step has 2 sequences of 10, so that most micro-batches have none.
    """
    sidecars, weights = [], []
    for num_processes in (1, 2):
        folder = tmp_path / str(num_processes)
        arguments = distill_arguments(model_folders, folder, exp)
        more = [f"lora={str(has_lora).lower()}", "batch_size=10", "num_epochs=1", "lr=1e-3"]
        run_script("distill.py", *arguments, *more, num_processes=num_processes)
        sidecars.append(files.read_yaml(folder / "models" / "student.yaml"))
        weights.append(load_file(folder / "models" / "student" / "final" / "model.safetensors"))
    one, two = sidecars
    assert (one["world_size"], two["world_size"], two["stats"]["num_steps"]) == (1, 2, 2)
    for curve in ("train", "holdout"):
        found, wanted = ([loss for _, loss in s["losses"][curve]] for s in (two, one))
        assert found == pytest.approx(wanted, rel=1e-6)
    start = load_file(f"{model_folders['student']}/model.safetensors")
    trained = [k for k in start if not has_lora or k.endswith("_proj.weight")]
    assert trained and all(not torch.equal(start[k], weights[1][k]) for k in trained), (
        "every weight is trained"
    )
    assert all(torch.allclose(weights[0][k], weights[1][k], atol=1e-5) for k in start)


def test_undistilled_student_with_worked_examples(model_folders, exp, tmp_path, problem_folder):
    """few_shot shows correct, finished holdout traces; here one is made correct by hand, as tiny models never
    are."""
    rows = rows_of(exp, "holdout")
    for row in rows[:2]:
        row.update(finished=True, is_raw_correct=True, trace="<think>long</think>\nIt is \\boxed{5}.")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "shown.parquet")
    result = run_script(
        "gentraces.py", f"exp_dir={tmp_path}", f"teacher={model_folders['student']}", "is_teacher=false",
        f"data_split={problem_folder}_test", "few_shot=2", f"few_shot_traces={tmp_path}/shown.parquet",
        "max_prompt_length=400", "max_length=410", "max_samples=3",
    )  # fmt: skip
    assert result.stdout.count("It is \\boxed{5}.") == 2 and "<think>" not in result.stdout
    assert json.loads(result.stdout.splitlines()[-1])["n"] == 3


def test_a_prefilled_response_goes_on_from_its_opening(tmp_path):
    """Made to begin as it would anyway, the demo's teacher writes the same. What was given was not sampled,
    but is graded."""
    teacher = f"teacher={ROOT / 'demo' / 'models' / 'teacher'}"
    common = [f"exp_dir={tmp_path}", teacher, "data_split=arithmetic_test", "max_samples=12"]
    run_script("gentraces.py", *common, "trace_name=free")
    run_script("gentraces.py", *common, "trace_name=given", "prefill=start with")
    kept = "trace", "trace_af", "is_raw_correct", "is_af_correct", "finished"
    for free, given in zip(rows_of(tmp_path, "free"), rows_of(tmp_path, "given"), strict=True):
        assert {key: free[key] for key in kept} == {key: given[key] for key in kept}
        assert given["prompt_ids"] == free["prompt_ids"] + free["response_ids"][:2]
        assert given["response_ids"] == free["response_ids"][2:]
        assert given["num_tokens"] == free["num_tokens"] - 2 == len(given["response_ids"])
    most = len(free["prompt_ids"]) + len(
        free["response_ids"]
    )  # room for the opening of the last, and a few more
    opening = "prefill=" + free["trace"].rpartition(" .")[0]
    run_script("gentraces.py", *common, "trace_name=all", opening, f"max_length={most}")
    last = rows_of(tmp_path, "all")[-1]
    assert last["is_raw_correct"] and last["num_tokens"] <= 2 and last["trace"].startswith(opening[8:])


def test_a_prefill_may_not_end_the_response(model_folders, problem_folder, tmp_path):
    more = [f"data_split={problem_folder}_test", "prefill=so<|end|>"]
    found = gentraces(model_folders, problem_folder, tmp_path, "x", *more, check=False)
    assert found.returncode == 2 and "holds the token that ends a response" in found.stderr, found.stderr


def test_corrupted_results_need_no_proxy_and_random_directions_have_seeds(
    model_folders, problem_folder, exp, tmp_path
):
    """A direction's seed makes another direction; without one it is the run's own seed."""
    gentraces(model_folders, problem_folder, tmp_path, "corrupt", "lam=0.5", "defence=corrupt")
    record = files.read_yaml(tmp_path / "traces" / "corrupt.yaml")
    assert "proxy_student" not in record["inputs"] and record["config"]["lam"] == 0.5
    random = [*ads_arguments(model_folders, exp), "defence=random"]
    for name, more in (("own", []), ("named", ["direction_seed=42"]), ("other", ["direction_seed=43"])):
        gentraces(model_folders, problem_folder, tmp_path, name, *random, "lam=2", *more)
    own, named, other = (rows_of(tmp_path, name) for name in ("own", "named", "other"))
    assert own == named and [r["response_ids"] for r in own] != [r["response_ids"] for r in other]


def test_problems_without_an_answer_are_left_out_and_counted(model_folders, tmp_path):
    """Two of MATH's solutions end in an empty box; they must not stop a run of thousands."""
    rows = [{"problem": "1+1", "solution": "\\boxed{2}"}, {"problem": "why?", "solution": "Thus \\boxed{}"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        f"exp_dir={tmp_path}/x",
        f"teacher={model_folders['teacher']}",
        f"data_split={tmp_path}_test",
        *SMALL,
    ]
    result = run_script("gentraces.py", *arguments)
    assert "left out: 1 of 2 problems have no answer" in result.stdout
    stats = json.loads(result.stdout.splitlines()[-1])
    assert (stats["n"], stats["num_without_answer"], stats["num_prompts_too_long"]) == (1, 1, 0)


def test_one_line_solutions_are_read_as_a_reader_does_or_left_out(model_folders, tmp_path):
    """'0 + 2 = 2 #### 2' on one line was its own reference: right answers were graded 0.0, without a word."""
    solutions = ["0 + 2 = 2 #### 2", "The answer is 3.", "2 + 2 = 4, so 4 apples.", "4 apples after 2 days."]
    rows = [{"problem": f"{i} + 2", "solution": solution} for i, solution in enumerate(solutions)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"exp_dir={tmp_path}/x", f"teacher={model_folders['teacher']}", *SMALL]
    result = run_script("gentraces.py", *arguments, f"data_split={tmp_path}_test")
    reason = "several numbers, none of them stated as the answer, in solution '4 apples after 2 days.'"
    assert "left out: 1 of 4 problems have no answer" in result.stdout and reason in result.stdout
    stats = json.loads(result.stdout.splitlines()[-1])
    assert (stats["n"], stats["num_without_answer"]) == (3, 1)


def test_two_runs_of_one_stage_make_it_once(model_folders, problem_folder, tmp_path):
    """Shards of a sweep share the first stages: one makes them, the other waits and finds them done."""
    arguments = [f"exp_dir={tmp_path}", f"teacher={model_folders['teacher']}", "trace_name=t", *SMALL]
    command = [sys.executable, str(ROOT / "gentraces.py"), *arguments, f"data_split={problem_folder}_test"]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    runs = [subprocess.Popen(command, env=environment, **quiet) for _ in range(2)]
    outputs = sorted(run.communicate(timeout=600)[0].count("loading") for run in runs)
    assert [run.returncode for run in runs] == [0, 0]
    assert outputs == [0, 1]
    assert len((tmp_path / "metadata" / "trace_registry.jsonl").read_text().splitlines()) == 1


def test_a_diverged_student_is_an_error(model_folders, exp, tmp_path):
    """The trainer's own filter would hide a loss that is not finite."""
    arguments = [a for a in distill_arguments(model_folders, tmp_path, exp) if not a.startswith("lr")]
    result = run_script("distill.py", *arguments, "lr=1e30", "max_grad_norm=1e30", check=False)
    assert result.returncode == 2 and "lower lr=1e+30" in result.stderr, result.stderr
    assert not (tmp_path / "models" / "student.yaml").exists()


def test_what_a_kill_left_beside_a_finished_stage_is_cleared(model_folders, problem_folder, exp):
    """Else a stage that is redone on purpose would be put together from old parts."""
    files.write_part(exp / "parts" / "holdout" / "traces", 0, [{"id": "old"}])
    again = gentraces(
        model_folders, problem_folder, exp, "holdout", f"data_split={problem_folder}_holdout", "tau=0"
    )
    assert "nothing to do" in again.stdout and not (exp / "parts" / "holdout").exists()
