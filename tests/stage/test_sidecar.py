"""Files that survive a kill: atomicity, parts, sidecars, locks, fingerprints."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT

from ads.stage import files, fingerprint
from ads.stage.inputs import fingerprint_model, fingerprint_tokenizer
from ads.stage.sidecar import is_finished, made_by_other_code, open_parts, write_sidecar


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(KeyError), files.atomic_path(path) as temporary:
        temporary.write_text("new")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_is_replaced_whole(tmp_path):
    for name in ("one", "two"):
        with files.atomic_folder(tmp_path / "f") as folder:
            (folder / name).touch()
    assert os.listdir(tmp_path) == ["f"] and os.listdir(tmp_path / "f") == ["two"]


def test_a_killed_folder_write_is_cleared_away(tmp_path):
    (tmp_path / ".f.tmp").mkdir()
    (tmp_path / ".f.tmp" / "half").touch()
    with files.atomic_folder(tmp_path / "f") as folder:
        (folder / "whole").touch()
    assert os.listdir(tmp_path / "f") == ["whole"]


def test_parts_of_several_ranks_and_runs_are_read_together(tmp_path):
    files.write_part(tmp_path, 0, [{"id": "a", "x": 1}])
    files.write_part(tmp_path, 1, [{"id": "b", "x": 2}, {"id": "c", "x": "\u2028 \ud83e"}])
    (tmp_path / ".0-0.jsonl.tmp").write_text('{"id": "half')
    assert files.read_parts(tmp_path) == {
        "a": {"id": "a", "x": 1},
        "b": {"id": "b", "x": 2},
        "c": {"id": "c", "x": "\u2028 \ud83e"},
    }
    assert files.read_parts(tmp_path / "nowhere") == {}


def test_sidecar_of_other_settings_is_refused_by_name(tmp_path):
    path = tmp_path / "t.yaml"
    config = {"tau": 0.6, "batch_size": 4, "teacher": None}
    assert not is_finished(path, config, {"data": "abc"})
    write_sidecar(path, config, {"data": "abc"}, {"n": 3}, 1.0)
    assert is_finished(path, config, {"data": "abc"})
    assert is_finished(path, {**config, "batch_size": 8}, {"data": "abc"}, ignore={"batch_size"})
    with pytest.raises(ValueError, match="tau was 0.6, now 0.7"):
        is_finished(path, {**config, "tau": 0.7}, {"data": "abc"})
    with pytest.raises(ValueError, match="data was 'abc', now 'abd'"):
        is_finished(path, config, {"data": "abd"})


def test_sidecar_names_versions_commit_and_command(tmp_path):
    record = write_sidecar(tmp_path / "t.yaml", {}, {}, {"n": 3}, 1.0, perturbation={"cosine": 0.5})
    found = files.read_yaml(tmp_path / "t.yaml")
    assert found == record and found["versions"]["torch"] and found["perturbation"]["cosine"] == 0.5


def test_unfinished_work_of_other_settings_is_refused(tmp_path):
    """A request that failed before its first part must not stand in the way of the corrected one; parts
    must."""
    open_parts(tmp_path, {"tau": 0.6}, {})
    open_parts(tmp_path, {"tau": 0.7}, {})
    files.write_part(tmp_path / "traces", 0, [{"id": "a"}])
    open_parts(tmp_path, {"tau": 0.7}, {})
    with pytest.raises(ValueError, match="tau was 0.7, now 1.0.*delete that folder"):
        open_parts(tmp_path, {"tau": 1.0}, {})
    (tmp_path / "settings.yaml").unlink()
    with pytest.raises(ValueError, match="unfinished work done with other settings"):
        open_parts(tmp_path, {"tau": 0.7}, {})


def test_work_of_other_code_is_not_mixed_and_said(tmp_path, monkeypatch):
    before = fingerprint.fingerprint_code()
    open_parts(tmp_path / "parts", {}, {})
    files.write_part(tmp_path / "parts" / "traces", 0, [{"id": "a"}])
    write_sidecar(tmp_path / "t.yaml", {}, {}, {}, 1.0)
    assert made_by_other_code(tmp_path / "t.yaml") == ""
    for name in ("engine.py", "native.c", "report.py"):
        change = functools.partial(changed_file, name, fingerprint.fingerprint_file)
        with monkeypatch.context() as context:
            context.setattr(fingerprint, "fingerprint_file", change)
            is_stage = name != "report.py"
            assert (fingerprint.fingerprint_code() != before) == is_stage
            assert ("made by other code: commit" in made_by_other_code(tmp_path / "t.yaml")) == is_stage
            with pytest.raises(ValueError, match="code was") if is_stage else contextlib.nullcontext():
                open_parts(tmp_path / "parts", {}, {})
    monkeypatch.setattr("ads.stage.sidecar.versions", lambda: {"torch": "1.0"})
    with pytest.raises(ValueError, match="torch was .*, now '1.0'"):
        open_parts(tmp_path / "parts", {}, {})


def test_code_in_folders_of_the_package_counts_and_names_may_recur(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    files = [tmp_path / "ads" / name for name in ("a/model.py", "b/model.py", "b/deep/kernel.c")]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    for path in files:
        before = fingerprint.fingerprint_code()
        path.write_text("after")
        assert fingerprint.fingerprint_code() != before, path


def changed_file(name, fingerprint_file, path):
    return fingerprint_file(path) + "changed" * (Path(path).name == name)


def test_a_kill_before_the_settings_were_there_leaves_nothing_in_the_way(tmp_path):
    """Their temporary file was once taken for unfinished work of other settings."""
    (tmp_path / ".settings.yaml.tmp").write_text("config: {ta")
    open_parts(tmp_path, {"tau": 0.7}, {})
    assert files.read_yaml(tmp_path / "settings.yaml")["config"] == {"tau": 0.7}


def test_a_second_run_waits_for_the_lock_until_the_first_is_gone(tmp_path, capfd):
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from ads.stage import files\n"
        f"with files.stage_lock({str(tmp_path)!r}, 'x'):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    threading.Timer(0.5, holder.kill).start()
    with files.stage_lock(tmp_path, "x"):
        assert holder.wait() == -signal.SIGKILL
    assert f"waiting for process {holder.pid} on" in capfd.readouterr().out


def test_fingerprint_of_a_large_file_sees_size_and_samples(tmp_path):
    path = tmp_path / "w.safetensors"
    content = bytearray(os.urandom(3 * fingerprint.SAMPLE_BYTES * fingerprint.NUM_SAMPLES))
    path.write_bytes(content)
    first = fingerprint.fingerprint_file(path)
    assert fingerprint.fingerprint_file(path) == first
    path.write_bytes(bytes(len(content)))
    assert fingerprint.fingerprint_file(path) != first
    path.write_bytes(content + b"x")
    assert fingerprint.fingerprint_file(path) != first
    content[-1] ^= 1
    path.write_bytes(content)
    assert fingerprint.fingerprint_file(path) != first


def test_fingerprint_of_a_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = fingerprint_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert fingerprint_model(str(tmp_path)) != first
    for name in ("/no/such/folder", "./x", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="neither a folder nor the name of a model on the hub"):
            fingerprint_model(name)
    with pytest.raises(FileNotFoundError, match="no tokenizer_config.json"):
        fingerprint_tokenizer(str(tmp_path))


def test_fingerprint_of_data_sees_every_byte(tmp_path):
    """One corrected digit in a large data file must not pass as the old file."""
    path = tmp_path / "train.jsonl"
    content = bytearray(b"x" * 3 * fingerprint.SAMPLE_BYTES * fingerprint.NUM_SAMPLES)
    path.write_bytes(content)
    first = fingerprint.fingerprint_file(path)
    content[fingerprint.SAMPLE_BYTES + 7] = ord("y")
    path.write_bytes(content)
    assert fingerprint.fingerprint_file(path) != first


def test_registry_lines_are_appended(tmp_path):
    for i in range(3):
        files.append_jsonl(tmp_path / "metadata" / "r.jsonl", {"i": i})
    lines = (tmp_path / "metadata" / "r.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"i": 0}, {"i": 1}, {"i": 2}]


def test_rows_that_another_machine_wrote_are_waited_for(tmp_path, monkeypatch):
    """Network file systems show them late; without a shared exp_dir they never come, once a KeyError."""
    files.write_part(tmp_path, 0, [{"id": "a"}])
    late = threading.Timer(0.5, files.write_part, (tmp_path, 1, [{"id": "b"}]))
    late.start()
    assert files.read_all_parts(tmp_path, {"a", "b"}, 2).keys() == {"a", "b"}
    monkeypatch.setattr(files, "LATE_SECONDS", 0)
    for num_processes in (2, 1):
        with pytest.raises(ValueError, match="lacks 1 of 3 rows .* such as c: exp_dir must be a folder that"):
            files.read_all_parts(tmp_path, {"a", "b", "c"}, num_processes)


def test_contrasts_that_another_machine_wrote_are_waited_for(tmp_path, monkeypatch):
    """As rows are: each process writes its share of the contrasts, and the main one reads them all."""
    import gentraces
    from ads.delta import effects
    from ads.stage.settings import GenConfig
    from ads.stage.world import World

    assert effects.contrasts  # imported before the clock of what comes late runs
    monkeypatch.setattr(World, "barrier", lambda self: None)  # the other process is this test
    cfg, folder = GenConfig(exp_dir=str(tmp_path), trace_name="t"), tmp_path / "parts" / "t" / "contrasts"
    rows = [{"id": name, "prompt_ids": [1]} for name in "ab"]
    files.write_part(folder, 0, [{"id": "a"}])
    late = threading.Timer(0.5, files.write_part, (folder, 1, [{"id": "b"}]))
    late.start()
    gentraces.save_contrasts(cfg, None, None, rows, World(0, 2, "cpu"))
    assert json.loads(cfg.contrast_path.read_text())["problems"] == [{"id": "a"}, {"id": "b"}]
