"""What is of the hub, in a cache as huggingface_hub lays it out, without a network."""

import shutil

import pytest
import torch
from conftest import byte_tokenizer, run_script, save_folder, tiny_model

import utils
from ads import gradient, store

OLD, NEW = "a" * 40, "b" * 40
NAME = "owner/tiny"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder that HF_HOME names, empty, for this process and those it starts."""
    home = tmp_path / "hf"
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    store.find_snapshot.cache_clear()
    yield home
    store.find_snapshot.cache_clear()


def snapshot(hub, commit, name=NAME, kind="model"):
    """The folder for a commit's files in the cache of a repository, whose main is then at that commit."""
    repository = hub / "hub" / f"{kind}s--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    store.find_snapshot.cache_clear()
    return folder


def add_model(hub, commit, seed):
    return save_folder(snapshot(hub, commit), tiny_model("qwen2", 272, seed=seed), byte_tokenizer())


def test_fingerprints_hold_the_commit(hub):
    """They once were the name alone: where main moved, a finished stage had nothing to do."""
    for commit, seed in ((OLD, 1), (NEW, 2)):
        add_model(hub, commit, seed)
        assert store.fingerprint_model(NAME) == f"hub:{NAME}@{commit}"
        assert store.fingerprint_tokenizer(NAME) == f"hub:{NAME}@{commit}"
    assert store.fingerprint_model(f"{NAME}@{OLD}") == f"hub:{NAME}@{OLD}"
    assert store.fingerprint_model(f"{NAME}@main") == f"hub:{NAME}@{NEW}"


@pytest.mark.parametrize(
    "name", ("owner/none", f"{NAME}@branch", f"{NAME}@{'c' * 40}", "a b/c", "owner/a@b@c")
)
def test_what_the_cache_does_not_have_is_one_line(hub, name):
    add_model(hub, OLD, 1)
    with pytest.raises(FileNotFoundError, match="is no folder, nor to be had from the hub"):
        store.fingerprint_model(name)


def test_the_commit_that_is_recorded_is_the_one_that_is_loaded(hub):
    """main may move between the two, as another process downloads."""
    add_model(hub, OLD, 1)
    assert store.fingerprint_model(NAME).endswith(OLD)
    commits = store.find_snapshot(NAME, "model")
    repository = hub / "hub" / "models--owner--tiny"
    (repository / "refs" / "main").write_text(NEW)
    assert store.locate(NAME, "model") == (NAME, OLD) and store.find_snapshot(NAME, "model") == commits


def traces(exp_dir, *more, **keywords):
    arguments = [f"exp_dir={exp_dir}", "answer_force=false", "max_length=125", "max_prompt_length=120"]
    return run_script("gentraces.py", f"teacher={NAME}", *arguments, "max_samples=4", *more, **keywords)


def save_grad(exp_dir, *more, **keywords):
    arguments = [f"exp_dir={exp_dir}", f"holdout_traces={exp_dir}/traces/holdout.parquet", "num_diagnosed=0"]
    return run_script("save_grad.py", f"proxy_student={NAME}", *arguments, *more, **keywords)


def test_stages_after_main_has_moved(hub, problem_folder, tmp_path):
    """A finished stage is refused, a gradient meets no other proxy's weights, and NAME@COMMIT goes on."""
    data, holdout = f"data_split={problem_folder}_holdout", "trace_name=holdout"
    add_model(hub, OLD, 1)
    traces(tmp_path, data, holdout)
    save_grad(tmp_path)
    assert "nothing to do\n" in traces(tmp_path, data, holdout, "--check").stdout

    add_model(hub, NEW, 2)
    for result in (
        traces(tmp_path, data, holdout, "--check", check=False),
        save_grad(tmp_path, "--check", check=False),
    ):
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert f"was 'hub:{NAME}@{OLD}', now 'hub:{NAME}@{NEW}'" in result.stderr
        assert "OWNER/NAME@COMMIT is a model of the hub at an earlier commit" in result.stderr
    path = tmp_path / "student_grads.safetensors"
    with pytest.raises(ValueError, match=f"belongs to another proxy .*@{OLD}', now .*@{NEW}'"):
        gradient.open_checked(path, store.fingerprint_model(NAME))

    more = ["trace_name=ads", "lam=0.1", "tau=0.8", f"grad_path={path}", f"proxy_student={NAME}@{OLD}"]
    traces(tmp_path, data, *more)
    found = store.read_yaml(tmp_path / "traces" / "ads.yaml")["inputs"]
    assert (found["teacher"], found["proxy_student"]) == (f"hub:{NAME}@{NEW}", f"hub:{NAME}@{OLD}")
    pinned = traces(tmp_path, data, holdout, f"teacher={NAME}@{OLD}", "--check")
    assert "nothing to do\n" in pinned.stdout


def test_records_without_a_commit_are_taken_for_any_and_said(tmp_path):
    """Experiments made before commits were recorded go on."""
    path, now = tmp_path / "t.yaml", {"teacher": f"hub:{NAME}@{NEW}"}
    store.write_sidecar(path, {}, {"teacher": f"hub:{NAME}"}, {"n": 3}, 1.0)
    assert store.is_finished(path, {}, now)
    assert (
        store.made_at_unknown_commits(path, now) == " (at which commit of the hub was not recorded: teacher)"
    )
    with pytest.raises(ValueError, match="teacher was 'hub:owner/tiny', now 'hub:owner/other@b"):
        store.is_finished(path, {}, {"teacher": f"hub:owner/other@{NEW}"})
    store.write_sidecar(path, {}, now, {"n": 3}, 1.0)
    assert store.made_at_unknown_commits(path, now) == ""


def test_a_gradient_without_a_commit_too(tmp_path, capsys):
    path = tmp_path / "g.safetensors"
    gradient.save(path, {"w": torch.ones(2)}, {"proxy_student": NAME, "proxy_fingerprint": f"hub:{NAME}"})
    gradient.open_checked(path, f"hub:{NAME}@{NEW}")
    assert f"at which commit of hub:{NAME} was not recorded" in capsys.readouterr().out
    with pytest.raises(ValueError, match="belongs to another proxy"):
        gradient.open_checked(path, f"hub:owner/other@{NEW}")


def add_dataset(hub, commit, num_rows):
    """What `datasets` leaves of a dataset that it has prepared, and the hub's own cache of it."""
    from datasets import DatasetInfo, Features, SplitDict, SplitInfo, Value
    from datasets.arrow_writer import ArrowWriter

    (snapshot(hub, commit, "openai/gsm8k", "dataset") / "README.md").touch()
    folder = hub / "datasets" / "openai___gsm8k" / "main" / "0.0.0" / commit
    folder.mkdir(parents=True)
    features = Features({"question": Value("string"), "answer": Value("string")})
    with ArrowWriter(path=str(folder / "gsm8k-train.arrow"), features=features) as writer:
        for i in range(num_rows):
            writer.write({"question": f"{i}+1", "answer": f"#### {i + 1}"})
        count, size = writer.finalize()
    splits = SplitDict({"train": SplitInfo("train", size, count, dataset_name="gsm8k")})
    info = DatasetInfo(features=features, config_name="main", version="0.0.0", splits=splits)
    info.write_to_directory(str(folder))
    return folder


def test_datasets_are_loaded_at_the_commit_that_is_recorded(hub, monkeypatch):
    """Without a network `datasets` takes whatever it prepared last."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", hub / "datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("DATA_DIR", raising=False)
    add_dataset(hub, OLD, 10)
    assert utils.fingerprint_data("gsm8k_train") == f"hub:openai/gsm8k@{OLD}"
    assert len(utils.load_problems("gsm8k_train")) == 7
    prepared = add_dataset(hub, NEW, 20)
    assert utils.fingerprint_data("gsm8k_train") == f"hub:openai/gsm8k@{NEW}"
    assert len(utils.load_problems("gsm8k_train")) == 14
    shutil.rmtree(prepared)
    with pytest.raises(ValueError, match=f"openai/gsm8k is at commit {NEW}, but .*{OLD}.* is cached"):
        utils.load_problems("gsm8k_train")
    with pytest.raises(FileNotFoundError, match="cais/mmlu is no folder.*set data_dir to local copies"):
        utils.fingerprint_data("mmlu_test")


def test_processes_with_other_inputs_are_told_so(tmp_path):
    """Nodes whose caches are of different days would make parts of one stage with different models."""
    code = (
        "import utils; from ads import store\n"
        "world = utils.start_world()\n"
        "world.check_same({'teacher': 'x'})\n"
        "world.check_same({'teacher': f'hub:a/b@{world.rank}'})\n"
    )
    (tmp_path / "ranks.py").write_text(f"import sys; sys.path.insert(0, {str(utils.ROOT)!r})\n{code}")
    result = run_script(str(tmp_path / "ranks.py"), num_processes=2, check=False)
    assert result.returncode != 0
    assert (
        "process 1 has other inputs than process 0: teacher was 'hub:a/b@0', now 'hub:a/b@1'" in result.stderr
    )
