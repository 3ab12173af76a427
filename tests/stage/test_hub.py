"""What is of the hub, in a cache as huggingface_hub lays it out, without a network."""

import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, run_script, save_folder, tiny_model
from helpers_pipeline import run_pipeline

import gentraces
import save_grad
import utils
from ads.data.problems import fingerprint_data, load_problems
from ads.delta import gradient_file
from ads.stage import files, hub
from ads.stage.inputs import fingerprint_model, fingerprint_tokenizer
from ads.stage.sidecar import is_finished, made_at_unknown_commits, write_sidecar

OLD, NEW = "a" * 40, "b" * 40
NAME = "owner/tiny"


@pytest.fixture
def hub_home(tmp_path, monkeypatch):
    """The folder that HF_HOME names, empty, for this process and those it starts."""
    home = tmp_path / "hf"
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    forget()
    yield home
    forget()


def forget():
    """As a new process is: without what this one has looked up."""
    hub.COMMITS.clear()
    hub.find_snapshot.cache_clear()


def snapshot(hub_home, commit, name=NAME, kind="model"):
    """The folder for a commit's files in the cache of a repository, whose main is then at that commit."""
    repository = hub_home / "hub" / f"{kind}s--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    forget()
    return folder


def add_model(hub_home, commit, seed):
    return save_folder(snapshot(hub_home, commit), tiny_model("qwen2", 272, seed=seed), byte_tokenizer())


def test_fingerprints_hold_the_commit(hub_home):
    """They once were the name alone: where main moved, a finished stage had nothing to do."""
    for commit, seed in ((OLD, 1), (NEW, 2)):
        add_model(hub_home, commit, seed)
        assert fingerprint_model(NAME) == f"hub:{NAME}@{commit}"
        assert fingerprint_tokenizer(NAME) == f"hub:{NAME}@{commit}"
    assert fingerprint_model(f"{NAME}@{OLD}") == f"hub:{NAME}@{OLD}"
    assert fingerprint_model(f"{NAME}@main") == f"hub:{NAME}@{NEW}"


@pytest.mark.parametrize(
    "name", ("owner/none", f"{NAME}@branch", f"{NAME}@{'c' * 40}", "a b/c", "owner/a@b@c")
)
def test_what_the_cache_does_not_have_is_one_line(hub_home, name):
    add_model(hub_home, OLD, 1)
    with pytest.raises(FileNotFoundError, match="is no folder, nor to be had from the hub"):
        fingerprint_model(name)


def test_the_commit_that_is_recorded_is_the_one_that_is_loaded(hub_home):
    """main may move between the two, as another process downloads."""
    add_model(hub_home, OLD, 1)
    assert fingerprint_model(NAME).endswith(OLD)
    folder = hub.find_folder(NAME, "model")
    repository = hub_home / "hub" / "models--owner--tiny"
    (repository / "refs" / "main").write_text(NEW)
    assert hub.locate(NAME, "model") == (NAME, OLD) and hub.find_folder(NAME, "model") == folder


def test_without_a_network_a_commit_is_taken_that_is_there_with_its_weights(hub_home, capfd):
    """A look at the hub once left main, in the cache, at a new commit with its config.json alone: where there
    is no network, that was then loaded, though the whole model was there as of yesterday."""
    whole = add_model(hub_home, OLD, 1)
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(Path(whole) / name, snapshot(hub_home, NEW))
    assert fingerprint_model(NAME) == f"hub:{NAME}@{OLD}"
    assert f"{NAME}: at {OLD}, the newest complete commit in the cache" in capfd.readouterr().err
    forget()
    assert fingerprint_tokenizer(NAME) == f"hub:{NAME}@{OLD}"
    shutil.copy(
        Path(whole) / "model.safetensors", snapshot(hub_home, NEW) / "model-00001-of-00002.safetensors"
    )
    (snapshot(hub_home, NEW) / "model.safetensors.index.json").write_text(
        json.dumps(
            {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        )
    )
    assert fingerprint_model(NAME) == f"hub:{NAME}@{OLD}"
    shutil.rmtree(whole)
    forget()
    with pytest.raises(FileNotFoundError, match=f"{NAME} is no folder, nor to be had from the hub"):
        fingerprint_model(NAME)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a look at one model needs; the server has its commit, files and requests.

    Of a gated model it tells, as the hub does, what files there are and at which commit, but gives none.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append(self.path)
        path = self.path.partition("?")[0]
        if path == f"/api/models/{NAME}":
            self.answer(json.dumps({"id": NAME, "sha": self.server.commit}))
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            sizes = {name: len(text) for name, text in self.server.files.items()}
            found = [{"type": "file", "path": n, "size": size, "oid": n} for n, size in sizes.items()]
            self.answer(json.dumps(found))
        elif self.server.is_gated:
            self.answer("", 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        else:
            self.answer("" if path.endswith("/auth-check") else self.server.files[path.rpartition("/")[2]])

    def do_HEAD(self):
        self.do_GET()

    def answer(self, text, status=200, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("ETag", f'"{len(text)}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def online(hub_home, monkeypatch):
    """A server that stands for the hub, with NAME at NEW."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.commit, server.requests, server.is_gated = NEW, [], False
    server.files = {"config.json": "{}", "tokenizer_config.json": "{}", "model.safetensors": "weights"}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def asked(server):
    """How often the server was asked where main is."""
    return sum(path.partition("?")[0] == f"/api/models/{NAME}" for path in server.requests)


def test_a_look_at_the_hub_leaves_the_cache_s_main_where_it_is(hub_home, online):
    add_model(hub_home, OLD, 1)
    assert fingerprint_model(NAME) == fingerprint_tokenizer(NAME) == f"hub:{NAME}@{NEW}"
    assert (hub_home / "hub" / "models--owner--tiny" / "refs" / "main").read_text() == OLD
    found = {path.name for path in (hub_home / "hub" / "models--owner--tiny" / "snapshots" / NEW).iterdir()}
    assert found == {"config.json", "tokenizer_config.json"} and asked(online) == 1


def test_an_experiment_asks_once_for_each_name(hub_home, online, problem_folder, model_folders, tmp_path):
    """Each stage did, and so did each --check: hundreds of times in the dry run of a sweep."""
    models = dict(model_folders, teacher=NAME)
    settings = {"HF_HUB_OFFLINE": "0", "GRID_ARGS": "--points 0.6,0,0"}
    fresh = run_pipeline(models, problem_folder, tmp_path / "new", "--dry-run", **settings)
    assert fresh.stdout.count("to do   ") == 7 and not (tmp_path / "new").exists()
    assert asked(online) == 1
    settings["TRAIN_ARGS"] = "lr=-1"  # all stages are checked, none is run
    for commit, num_asked, said in ((NEW, 2, ""), (OLD, 3, f"{NAME} has moved on the hub from {NEW}")):
        online.commit = commit
        refused = run_pipeline(models, problem_folder, tmp_path, check=False, **settings)
        assert "lr=-1" in refused.stderr and said in refused.stdout
        assert files.read_yaml(tmp_path / "hub.yaml") == {NAME: NEW}
        assert asked(online) == num_asked


GATED = f"error: {NAME} is gated: ask for access on its page of the hub, then `hf auth login` here"


@pytest.mark.parametrize("is_config_cached", (False, True))
def test_a_gated_student_is_refused_before_the_first_stage(
    hub_home, online, problem_folder, model_folders, tmp_path, is_config_cached
):
    """It once showed after hours, as the stages that read the student were taken to wait for another. What
    tells of it may be in the cache, by someone who has access, without the weights."""
    if is_config_cached:
        hub.find_snapshot(NAME, NEW, "model")
        hub.find_snapshot(NAME, NEW, "tokenizer")
    online.is_gated = True
    models = dict(model_folders, student=NAME)
    settings = {"HF_HUB_OFFLINE": "0", "GRID_ARGS": "--points 0.6,0,0"}
    refused = run_pipeline(models, problem_folder, tmp_path / "new", check=False, **settings)
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith(GATED)
    assert "run     " not in refused.stdout and not list((tmp_path / "new" / "logs").iterdir())
    words = [f"exp_dir={tmp_path}/x", f"teacher={NAME}", f"data_split={problem_folder}_test"]
    stage = run_script("gentraces.py", *words, check=False, HF_HUB_OFFLINE="0")
    assert stage.returncode == 2 and stage.stderr.splitlines()[-1].startswith(GATED)


def test_a_gated_model_that_is_in_the_cache_needs_no_access(hub_home, online):
    add_model(hub_home, NEW, 1)
    online.is_gated = True
    assert fingerprint_model(NAME) == fingerprint_tokenizer(NAME) == f"hub:{NAME}@{NEW}"
    assert not any(path.endswith("/auth-check") for path in online.requests)


@pytest.mark.parametrize("name", ("owner/none", "models/none", "/nowhere/none"))
def test_a_model_that_nothing_makes_is_not_waited_for(
    hub_home, problem_folder, model_folders, tmp_path, name
):
    """A misspelt STUDENT once showed after the first two stages."""
    models = dict(model_folders, student=name)
    refused = run_pipeline(models, problem_folder, tmp_path, check=False, GRID_ARGS="--points 0.6,0,0")
    assert refused.returncode == 2 and "run     " not in refused.stdout
    assert refused.stderr.splitlines()[-1].startswith(f"error: {name} is ")


def test_what_has_moved_since_is_said(hub_home, online, tmp_path, capsys):
    files.write_text(tmp_path / "hub.yaml", f"{NAME}: {OLD}")
    hub.print_moved(tmp_path)
    assert (
        f"{NAME} has moved on the hub from {OLD} to {NEW}: this experiment stays" in capsys.readouterr().out
    )
    online.commit = OLD
    hub.print_moved(tmp_path)
    online.shutdown()
    online.server_close()
    hub.print_moved(tmp_path)
    assert capsys.readouterr().out == ""


def test_two_stages_that_begin_as_main_moves_do_not_take_two_commits(hub_home, tmp_path):
    hub.COMMITS[NAME] = OLD
    hub.record_commits(tmp_path)
    hub.COMMITS |= {NAME: NEW, "owner/other": NEW}
    with pytest.raises(
        ValueError, match=f"hub.yaml has just been written by another .*{NAME} was '{OLD}'.*run again"
    ):
        hub.record_commits(tmp_path)
    hub.read_commits(tmp_path)
    assert hub.COMMITS == {NAME: OLD}


def traces(exp_dir, *more):
    arguments = [f"exp_dir={exp_dir}", "answer_force=false", "max_length=125", "max_prompt_length=120"]
    gentraces.main([f"teacher={NAME}", *arguments, "max_samples=2", *more])


def save_gradient(exp_dir, *more):
    arguments = [f"exp_dir={exp_dir}", f"holdout_traces={exp_dir}/traces/holdout.parquet", "num_diagnosed=0"]
    save_grad.main([f"proxy_student={NAME}", *arguments, *more])


def test_stages_after_main_has_moved(hub_home, problem_folder, tmp_path, monkeypatch):
    """A running sweep once failed in all points that were left, as each stage looked by itself."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    data, holdout = f"data_split={problem_folder}_holdout", "trace_name=holdout"
    add_model(hub_home, OLD, 1)
    traces(tmp_path, data, holdout)
    assert files.read_yaml(tmp_path / "hub.yaml") == {NAME: OLD}
    save_gradient(tmp_path)

    add_model(hub_home, NEW, 2)
    with pytest.raises(SystemExit, match="0"):  # nothing to do
        traces(tmp_path, data, holdout, "--check")
    path = tmp_path / "student_grads.safetensors"
    traces(
        tmp_path, data, "trace_name=ads", "lam=0.1", "tau=0.8", f"grad_path={path}", f"proxy_student={NAME}"
    )
    found = files.read_yaml(tmp_path / "traces" / "ads.yaml")["inputs"]
    assert found["teacher"] == found["proxy_student"] == f"hub:{NAME}@{OLD}"


def test_another_commit_than_the_recorded_one_is_refused(hub_home, problem_folder, tmp_path, monkeypatch):
    """A finished stage has not been made with it, a gradient meets no other weights; NAME@COMMIT goes on."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    data = f"data_split={problem_folder}_holdout"
    add_model(hub_home, OLD, 1)
    traces(tmp_path, data)
    add_model(hub_home, NEW, 2)
    (tmp_path / "hub.yaml").unlink()
    wanted = f"was 'hub:{NAME}@{OLD}', now 'hub:{NAME}@{NEW}'.*OWNER/NAME@COMMIT is a model of the hub at"
    with pytest.raises(ValueError, match=wanted):
        traces(tmp_path, data, "--check")
    with pytest.raises(SystemExit, match="0"):
        traces(tmp_path, data, f"teacher={NAME}@{OLD}", "--check")
    path = tmp_path / "g.safetensors"
    made_for = {"proxy_student": NAME, "proxy_fingerprint": f"hub:{NAME}@{OLD}"}
    gradient_file.save(path, {"w": torch.ones(2)}, made_for)
    with pytest.raises(ValueError, match=f"belongs to another proxy .*@{OLD}', now .*@{NEW}'"):
        gradient_file.open_checked(path, fingerprint_model(NAME))


def test_records_without_a_commit_are_taken_for_any_and_said(tmp_path):
    """Experiments made before commits were recorded go on."""
    path, now = tmp_path / "t.yaml", {"teacher": f"hub:{NAME}@{NEW}"}
    write_sidecar(path, {}, {"teacher": f"hub:{NAME}"}, {"n": 3}, 1.0)
    assert is_finished(path, {}, now)
    assert made_at_unknown_commits(path, now) == " (at which commit of the hub was not recorded: teacher)"
    with pytest.raises(ValueError, match="teacher was 'hub:owner/tiny', now 'hub:owner/other@b"):
        is_finished(path, {}, {"teacher": f"hub:owner/other@{NEW}"})
    write_sidecar(path, {}, now, {"n": 3}, 1.0)
    assert made_at_unknown_commits(path, now) == ""


def test_a_gradient_without_a_commit_too(tmp_path, capsys):
    path = tmp_path / "g.safetensors"
    gradient_file.save(
        path, {"w": torch.ones(2)}, {"proxy_student": NAME, "proxy_fingerprint": f"hub:{NAME}"}
    )
    gradient_file.open_checked(path, f"hub:{NAME}@{NEW}")
    assert f"at which commit of hub:{NAME} was not recorded" in capsys.readouterr().out
    with pytest.raises(ValueError, match="belongs to another proxy"):
        gradient_file.open_checked(path, f"hub:owner/other@{NEW}")


def add_dataset(hub_home, commit, num_rows):
    """What `datasets` leaves of a dataset that it has prepared, and the hub's own cache of it."""
    from datasets import DatasetInfo, Features, SplitDict, SplitInfo, Value
    from datasets.arrow_writer import ArrowWriter

    (snapshot(hub_home, commit, "openai/gsm8k", "dataset") / "README.md").touch()
    folder = hub_home / "datasets" / "openai___gsm8k" / "main" / "0.0.0" / commit
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


def test_datasets_are_loaded_at_the_commit_that_is_recorded(hub_home, monkeypatch):
    """Without a network `datasets` takes whatever it prepared last."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", hub_home / "datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("DATA_DIR", raising=False)
    add_dataset(hub_home, OLD, 10)
    assert fingerprint_data("gsm8k_train") == f"hub:openai/gsm8k@{OLD}"
    assert len(load_problems("gsm8k_train")) == 7
    prepared = add_dataset(hub_home, NEW, 20)
    assert fingerprint_data("gsm8k_train") == f"hub:openai/gsm8k@{NEW}"
    assert len(load_problems("gsm8k_train")) == 14
    shutil.rmtree(prepared)
    with pytest.raises(ValueError, match=f"openai/gsm8k is at commit {NEW}, but .*{OLD}.* is cached"):
        load_problems("gsm8k_train")
    with pytest.raises(FileNotFoundError, match="cais/mmlu is no folder.*set data_dir to local copies"):
        fingerprint_data("mmlu_test")


def test_processes_with_other_inputs_are_told_so(tmp_path):
    """Nodes whose caches are of different days would make parts of one stage with different models."""
    code = (
        "from ads.stage.world import start_world\n"
        "world = start_world()\n"
        "world.check_same({'teacher': 'x'})\n"
        "world.check_same({'teacher': f'hub:a/b@{world.rank}'})\n"
    )
    (tmp_path / "ranks.py").write_text(f"import sys; sys.path.insert(0, {str(utils.ROOT)!r})\n{code}")
    result = run_script(str(tmp_path / "ranks.py"), num_processes=2, check=False)
    assert result.returncode != 0
    assert (
        "process 1 has other inputs than process 0: teacher was 'hub:a/b@0', now 'hub:a/b@1'" in result.stderr
    )
