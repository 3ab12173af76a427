"""Bad inputs: each gives one clear line, exit code 2 and no traceback, as a user sees it from the shell."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, byte_tokenizer, run_script, save_folder, tiny_model
from families import build
from helpers_training import family
from safetensors.torch import load_file, save_file

SMALL = ["max_length=120", "max_prompt_length=115", "batch_size=6", "answer_force=false"]


def write_traces(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def break_models(folder, models):
    """Model folders that are wrong in one way each."""
    tokenizer = byte_tokenizer()
    broken = {"empty_folder": folder / "empty", "cut_model": folder / "cut", "nan_model": folder / "nan"}
    broken["empty_folder"].mkdir()
    shutil.copytree(models["teacher"], broken["cut_model"])
    weights = broken["cut_model"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    sick = tiny_model("qwen2", 272)
    sick.get_output_embeddings().weight.data[5] = float("nan")
    save_folder(broken["nan_model"], sick, tokenizer)
    broken["small_model"] = folder / "small"
    save_folder(broken["small_model"], tiny_model("qwen2", 200), tokenizer)
    broken["few_positions"] = folder / "few_positions"
    save_folder(broken["few_positions"], build("gpt2 of 48 positions"), tokenizer)
    broken["no_template"] = folder / "no_template"
    save_folder(broken["no_template"], tiny_model("qwen2", 272), byte_tokenizer(chat_template=None))
    broken["no_problem_shown"] = folder / "no_problem_shown"
    save_folder(
        broken["no_problem_shown"],
        tiny_model("qwen2", 272),
        byte_tokenizer(chat_template="{{ messages[0].content[:99] }}"),
    )
    broken["other_vocabulary"] = folder / "other_vocabulary"
    save_folder(broken["other_vocabulary"], tiny_model("qwen2", 272), tokenizer)
    broken["unmergeable"], broken["adapter"] = folder / "unmergeable", folder / "adapter"
    save_folder(broken["unmergeable"], family("zamba"), tokenizer)
    shutil.copytree(models["proxy"], broken["adapter"])
    (broken["adapter"] / "adapter_config.json").write_text("{}")
    spec_path = broken["other_vocabulary"] / "tokenizer.json"
    spec = json.loads(spec_path.read_text())
    vocab = spec["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    spec_path.write_text(json.dumps(spec))
    return broken


def break_gradients(folder, gradient):
    """Gradient files that are wrong in one way each."""
    from safetensors import safe_open

    with safe_open(gradient, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(gradient)
    broken = {
        name: folder / f"{name}.safetensors" for name in ("cut_grad", "nan_grad", "zero_grad", "short_grad")
    }
    broken["cut_grad"].write_bytes(Path(gradient).read_bytes()[:-8])
    save_file({k: v * float("nan") for k, v in tensors.items()}, broken["nan_grad"], metadata=metadata)
    save_file({k: v * 0 for k, v in tensors.items()}, broken["zero_grad"], metadata=metadata)
    save_file(dict(list(tensors.items())[1:]), broken["short_grad"], metadata=metadata)
    return broken


def break_data(folder):
    """Datasets and trace files that are wrong in one way each."""
    rows = {
        "no_rows": "",
        "no_column": '{"problem": "1+1"}\n',
        "no_answer": json.dumps({"problem": "1+1", "solution": "Well, that is a long story.\nIt has no end."})
        + "\n",
        "not_json": "1+1=2\n",
    }
    for name, text in rows.items():
        (folder / name).mkdir()
        (folder / name / "test.jsonl").write_text(text)
    (folder / "damaged.parquet").write_bytes(b"PAR1 not really")
    write_traces(folder / "other_columns.parquet", [{"question": "1+1"}])
    write_traces(folder / "long_prompts.parquet", [{"prompt_ids": [5] * 50, "response_ids": [6]}])
    (folder / "bad.yaml").write_text("tau: {")
    with gzip.open(folder / "mmlu_test.jsonl.gz", "wt") as file:
        for answer in (0, 3, -1):
            row = {"question": "x", "choices": list("wxyz"), "answer": answer, "subject": ""}
            file.write(json.dumps(row) + "\n")
    (folder / "a_file").write_text("")
    (folder / "an_exp" / "traces").mkdir(parents=True)
    (folder / "an_exp" / "traces" / "traces.yaml").write_text("config: {tau: 0.0")
    return {name: folder / name for name in (*rows, "a_file", "an_exp")} | {"folder": folder}


@pytest.fixture(scope="module")
def places(model_folders, problem_folder, tmp_path_factory):
    """Every path the table names: good models and data, one finished stage 1 and 2, and broken copies of
    them."""
    exp = tmp_path_factory.mktemp("exp")
    folder = tmp_path_factory.mktemp("broken")
    run_script("gentraces.py", f"exp_dir={exp}", f"teacher={model_folders['teacher']}", "trace_name=holdout",
               f"data_split={problem_folder}_holdout", *SMALL)  # fmt: skip
    run_script("save_grad.py", f"exp_dir={exp}", f"proxy_student={model_folders['proxy']}",
               f"holdout_traces={exp}/traces/holdout.parquet")  # fmt: skip
    gradient = exp / "student_grads.safetensors"
    good = {**model_folders, "sums": problem_folder, "exp": exp, "grad": gradient}
    return {
        **good,
        **break_models(folder, model_folders),
        **break_gradients(folder, gradient),
        **break_data(folder),
    }


GEN = "gentraces.py exp_dir={exp} teacher={teacher} data_split={sums}_test max_length=120 "
ADS = GEN + "tau=0.8 lam=0.1 proxy_student={proxy} grad_path={grad} "
GRAD = "save_grad.py exp_dir={exp}/g proxy_student={proxy} holdout_traces={exp}/traces/holdout.parquet "
TRAIN = "distill.py exp_dir={exp} student={student} do_eval=false train_traces={exp}/traces/holdout.parquet "
TABLE = (
    (GEN + "tua=1", "unknown key 'tua' in the command line; known keys: answer_force"),
    (GEN + "tau=hot", "tau='hot' in the command line: must be a finite number"),
    (GEN + "tau=-1", "tau=-1 in the command line: must be a finite number, at least 0"),
    (GEN + "top_p=0", "top_p=0 in the command line: must be a finite number, above 0 and at most 1"),
    (
        GEN + "max_samples=0",
        "max_samples=0 in the command line: must be a whole number, at least 1",
    ),
    (GEN + "trace_name=a/b", "trace_name='a/b' in the command line: must be a plain file name"),
    (GEN + "lam=0.1", "lam=0.1: needs grad_path"),
    (ADS + "eps=-1", "eps=-1 in the command line: must be a finite number, at least 0"),
    (ADS + "grad_path={exp}/none", "none does not exist: make it with save_grad.py"),
    (ADS + "grad_path={cut_grad}", "cut_grad.safetensors is damaged"),
    (ADS + "grad_path={nan_grad}", "the gradient is not finite: make it with save_grad.py"),
    (ADS + "grad_path={zero_grad}", "the gradient is zero: make it with save_grad.py"),
    (ADS + "grad_path={short_grad}", "does not fit the proxy"),
    (ADS + "grad_path={proxy}/model.safetensors", "holds no proxy gradient"),
    (ADS + "proxy_student={teacher}", "belongs to another proxy"),
    (GRAD + "proxy_student={other_vocabulary}", "teacher and proxy use different vocabularies"),
    (GRAD + "proxy_student={small_model}", "only 200 embedding rows"),
    (GRAD + "proxy_student={nan_model}", "logits of the 'qwen2' model are not finite: check its weights"),
    (GRAD + "tokenizer={small_model}/none", "neither a folder nor the name of a model on the hub"),
    (GRAD + "holdout_traces={exp}/none.parquet", "none.parquet does not exist: make it with gentraces.py"),
    # which is there, but as the dataset's folder: it was once said not to exist
    (GRAD + "holdout_traces={exp}/traces/holdout", "holdout is a folder: give the file beside it, such as"),
    (
        GRAD + "tokenizer={teacher} holdout_traces={folder}/damaged.parquet",
        "damaged.parquet is not a readable parquet file",
    ),
    (
        GRAD + "tokenizer={teacher} holdout_traces={folder}/other_columns.parquet",
        "no column prompt_ids, response_ids (found: question)",
    ),
    (
        GRAD + "tokenizer={teacher} holdout_traces={folder}/long_prompts.parquet max_length=20",
        "no response token within max_length=20",
    ),
    (GRAD + "proxy_student={adapter}", "holds an adapter (adapter_config.json): merge it"),
    (GEN + "tokenizer={other_vocabulary}", "does not belong to model"),
    (GEN + "teacher={small_model}", "only 200 embedding rows: the tokenizer does not belong to this model"),
    (
        GEN + "teacher={few_positions} answer_force=false",
        "rows may come to 120 tokens, but model type 'gpt2' is decoded right only up to 48 "
        "(IndexError: position 119 of a table of 48): lower max_length by 72",
    ),
    (GRAD + "proxy_student={few_positions}", "right only up to 48 (IndexError"),
    (GEN + "teacher={no_template}", "has no chat template: set tokenizer"),
    (GEN + "teacher={no_problem_shown}", "does not show the problem 'Is 3 < 4"),
    (GEN + "teacher={empty_folder}", "is not complete: it has no config.json"),
    (GEN + "teacher=/no/such/model", "neither a folder nor the name of a model on the hub"),
    (GEN + "teacher={cut_model}", "could not be loaded"),
    (GEN + "teacher={nan_model}", "response token 0: the teacher's logits are not finite"),
    (
        GEN + "defence=sideways",
        "defence='sideways' in the command line: must be one of ads, random",
    ),
    (GEN + "num_contrasts=-1", "num_contrasts=-1 in the command line: must be a whole number, at least 0"),
    (GEN + "one_step=-0.1", "one_step=-0.1 in the command line: must be a finite number, at least 0"),
    (GEN + "one_step=0.1 proxy_student={proxy}", "holdout_traces is not set: give the stage 1 traces"),
    (GEN + "one_step=0.1 holdout_traces=x.parquet", "proxy_student is not set: give the model that takes"),
    (
        GEN + "one_step=0.1 proxy_student={proxy} holdout_traces=x.parquet",
        "x.parquet does not exist: make it with gentraces.py",
    ),
    (
        GEN + "one_step=0.1 proxy_student={other_vocabulary} holdout_traces={sums}/test.jsonl",
        "teacher and proxy use different vocabularies",
    ),
    (
        GEN + "data_split=gsm9k_test",
        "'gsm9k' is neither a known dataset (arithmetic, gsm8k, hendrycks_math, mmlu, word_problems) nor a",
    ),
    (GEN + "data_split={sums}_validation", "SPLIT one of train, holdout, test"),
    (GEN + "data_split=gsm8k_test data_dir={sums}", "gsm8k_platinum_test.jsonl.gz does not exist"),
    (GEN + "data_split={no_rows}_test", "holds no problems"),
    (GEN + "data_split={no_rows}_train", "has none of train.jsonl, train.jsonl.gz, train.parquet"),
    (GEN + "data_split={no_column}_test", "line 1: no column solution (found: problem)"),
    (GEN + "data_split={not_json}_test", "test.jsonl, line 1: column 2: Extra data"),
    (GEN + "data_split=mmlu_test data_dir={folder}", "line 3: answer must be the number of the right choice"),
    (GEN + "data_split={no_answer}_test", "1 of 1 problems have no answer, such as no_answer/test/0"),
    (GEN + "max_prompt_length=3", "max_prompt_length=3, max_length=120: every prompt"),
    (GEN + "exp_dir={a_file}/x", "cannot be made"),
    (GEN + "exp_dir={an_exp}", "traces.yaml is not readable YAML"),
    (GEN + "data_split={sums}_holdout trace_name=holdout answer_force=false tau=1", "tau was 0.0, now 1.0"),
    (GEN + "few_shot=2 few_shot_traces={exp}/traces/holdout.parquet", "few_shot=2"),
    ("gentraces.py {folder}/bad.yaml", "bad.yaml is not readable YAML"),
    ("gentraces.py nowhere.yaml", "nowhere.yaml does not exist"),
    (TRAIN + "do_eval=true", "holdout_traces is not set"),
    (TRAIN + "train_traces={folder}/other_columns.parquet", "no column problem, trace, finished"),
    (TRAIN + "student={unmergeable}", "adapters cannot be merged into the weights of a 'zamba' model"),
    (TRAIN + "lr=0", "lr=0 in the command line: must be a finite number, above 0"),
    (TRAIN + "max_length=2", "no trace has a token to train on within max_length=2"),
    (TRAIN + "lr_scheduler_type=zigzag", "lr_scheduler_type='zigzag' in the command line: must be one of"),
    ("report.py {a_file}", "a_file"),
)


@pytest.mark.parametrize("command,words", TABLE, ids=[words[:40] for _, words in TABLE])
def test_bad_input_is_one_line_and_exit_code_2(places, command, words):
    arguments = [word.format_map(places) for word in command.split()]
    result = run_script(*arguments, check=False)
    assert "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1, result.stdout + result.stderr
    assert words in errors[0]


def test_nothing_was_written_for_bad_input(places):
    """Run after the table: the broken requests left no finished stage behind."""
    names = {path.stem for path in (places["exp"] / "traces").glob("*.yaml")}
    assert names == {"holdout"}


def bash(*words, **environment):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment}
    return subprocess.run(
        ["bash", *words], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600
    )


@pytest.mark.parametrize(
    "environment,options,words",
    (
        ({"CUDA_VISIBLE_DEVICES": ""}, (), "run pipeline_demo.sh"),
        ({"NPROC": "two"}, (), "NPROC='two': must be a whole number from 1"),
        ({"NPROC": "1"}, ("--dryrun",), "unknown argument '--dryrun': known are --dry-run and --help"),
    ),
)
def test_pipeline_refuses_in_one_line_before_anything_is_set_up(environment, options, words, tmp_path):
    result = bash("pipeline.sh", *options, EXP_DIR=str(tmp_path / "x"), VIRTUAL_ENV="/nowhere", **environment)
    assert result.returncode == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "arguments", ("--shard 4/4", "--shard x", "--points 0.6,1", "--points a,b,c", "--points=-1,0,0")
)
def test_bad_grid_arguments(arguments):
    result = run_script("grid.py", *arguments.split(), check=False)
    assert result.returncode == 2 and "error: argument" in result.stderr and "Traceback" not in result.stderr


def test_a_bad_grid_stops_the_pipeline(tmp_path):
    result = bash(
        "pipeline.sh", EXP_DIR=str(tmp_path), NPROC="1", SKIP_SETUP="1", GRID_ARGS="--points nonsense"
    )
    assert result.returncode == 2 and "write tau,lam,eps" in result.stderr
