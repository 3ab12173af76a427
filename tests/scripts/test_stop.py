"""What a signal to a pipeline stops: all that it started, at whatever moment the signal comes."""

import functools
import os
import signal
import subprocess

import pytest
from conftest import ROOT
from helpers_pipeline import MOST_SECONDS, has_ended, pipeline_environment, wait_until


@pytest.mark.parametrize(
    "script,number,code",
    (
        ("pipeline.sh", signal.SIGINT, 130),
        ("pipeline.sh", signal.SIGTERM, 143),
        ("pipeline.sh", signal.SIGUSR1, 143),
        ("pipeline_demo.sh", signal.SIGINT, 130),
        ("pipeline_demo.sh", signal.SIGTERM, 143),
        ("pipeline_small.sh", signal.SIGTERM, 143),
    ),
)
def test_an_interrupted_pipeline_stops_with_all_it_started(
    model_folders, problem_folder, tmp_path, script, number, code
):
    """Ctrl-C reaches the whole process group, a scheduler's signal perhaps only the script."""
    environment = pipeline_environment(model_folders, problem_folder, tmp_path, JOBS="2", MACHINE="cpu")
    command = ["bash", str(ROOT / script)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **quiet)
    wait_until(lambda: any(tmp_path.rglob("locks/traces-*.lock")))
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(timeout=MOST_SECONDS) == code
    wait_until(functools.partial(has_ended, tmp_path))


@pytest.mark.parametrize("moment", ('local writer="$!"', '"${command[@]}"', "exec 8>&-"))
def test_a_signal_at_any_moment_of_a_stage_s_start_stops_it(model_folders, problem_folder, tmp_path, moment):
    """While it held its own pipe to the log, it once waited for the log's writer, and that for the pipe.

    The shell is told to send itself the signal right before the command of that moment.
    """
    send = """set -o functrace
trap '[[ "$BASH_COMMAND" != "$MOMENT"* ]] || { trap - DEBUG; kill -TERM "$BASHPID"; }' DEBUG
"""
    (tmp_path / "send.sh").write_text(send)
    settings = {"BASH_ENV": str(tmp_path / "send.sh"), "MOMENT": moment}
    environment = pipeline_environment(model_folders, problem_folder, tmp_path / "x", **settings)
    assert "\n  " + moment in (ROOT / "pipeline.sh").read_text()
    command = ["bash", str(ROOT / "pipeline.sh")]
    result = subprocess.run(command, env=environment, capture_output=True, timeout=MOST_SECONDS)
    assert result.returncode == 143
    assert (tmp_path / "x" / "logs" / "shared.log").exists() and has_ended(tmp_path / "x")
