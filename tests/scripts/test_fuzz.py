"""Arbitrary input: never a traceback, never a hang, never a control token made of a problem's text.

A few cases of each kind; `bash run_tests.sh tests/scripts/test_fuzz.py --hypothesis-profile=many` runs 2,500.
"""

import contextlib
import io
import json
import shutil
import signal
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from conftest import byte_tokenizer, save_folder, tiny_model
from hypothesis import given
from hypothesis import strategies as st

import distill
import gentraces
import grid
import report
import save_grad
import utils
from ads import chat
from ads.data import grading
from ads.data.examples import load_examples
from ads.stage.config import load_config
from ads.stage.settings import GenConfig, GradConfig, SearchConfig, TrainConfig

STAGES = {gentraces: GenConfig, save_grad: GradConfig, distill: TrainConfig}
CONTROL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<think>", "</think>")
NASTY = (
    "", " ", "\0", "\ud800", "\u202eright to left\u202c", "$(touch pwned)", "`id`", "'", '"', "\n", "-", "--",
    "=1+1", "../..", "nan", "inf", "1e999", "-0", "1_0", "\uff11", "null", "true", "[1]", "{a: b}",
    "!!python/x", "\\boxed{", "\\boxed{\\frac{1}{0}}", "#### ", "x" * 5000, "9" * 400, "{" * 200, *CONTROL,
)  # fmt: skip

texts = st.one_of(st.sampled_from(NASTY), st.text(max_size=30), st.lists(st.sampled_from(NASTY)).map("".join))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)
keys = st.sampled_from(sorted(GenConfig.__dataclass_fields__)) | texts
sidecar_keys = st.sampled_from(["config", "stats", "inputs", "seconds", "outputs"]) | texts
numbers = st.one_of(st.floats().map(str), st.integers().map(str), texts)
points = st.lists(numbers, min_size=1, max_size=5)
problems = st.fixed_dictionaries({"problem": texts, "solution": texts | st.just("#### 1")})
lines = st.one_of(values.map(json.dumps), texts)
ids = st.lists(st.integers(-5, 400) | st.none(), max_size=6)
columns = {
    "problem": texts,
    "trace": texts,
    "finished": st.booleans(),
    "prompt_ids": ids,
    "response_ids": ids,
}
trace_rows = st.fixed_dictionaries({}, optional=columns | {"other": texts}) | st.fixed_dictionaries(columns)
symbols = ("\\boxed{", "}", "1", "/", "\\frac", "x", "^", "{", "=", ",", "\\pi", " ", "(")
maths = st.lists(st.sampled_from(symbols)).map("".join)


def leave(main, *arguments):
    """(exit code, stderr) of a script in this process; anything but an orderly exit is an error."""
    before = sys.argv, {number: signal.getsignal(number) for number in (2, 10, 15)}
    sys.argv, errors = ["script", *arguments], io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            utils.run_script(main)
    except SystemExit as end:
        return end.code or 0, errors.getvalue()
    finally:
        sys.argv = before[0]
        for number, handler in before[1].items():
            signal.signal(number, handler)
    return 0, errors.getvalue()


def check_exit(code, errors, allowed):
    assert code in allowed, (code, errors)
    if code == 2:
        lines = errors.strip().split("\n")
        assert sum(line.startswith("error: ") for line in lines) == 1, errors


def words(config):
    """key=value words, most with keys that exist."""
    keys = st.one_of(st.sampled_from(sorted(config.__dataclass_fields__)), texts)
    pair = st.tuples(keys, scalars.map(str) | texts).map("=".join)
    return st.lists(pair | texts, max_size=4)


@pytest.mark.parametrize("script", STAGES, ids=lambda module: module.__name__)
@given(data=st.data())
def test_any_command_line(script, tmp_path, data):
    arguments = data.draw(words(STAGES[script]))
    code, errors = leave(script.main, "--check", *arguments, f"exp_dir={tmp_path}/e")
    check_exit(code, errors, (0, 2, 3))
    assert not list(tmp_path.iterdir())


@given(st.sampled_from([*STAGES.values(), SearchConfig]), st.dictionaries(keys, values, max_size=4) | texts)
def test_any_yaml(tmp_path, config, content):
    path = tmp_path / "c.yaml"
    write(path, content)
    with contextlib.suppress(ValueError, FileNotFoundError):
        assert isinstance(load_config(config, "unused.yaml", [str(path)]), config)


@given(st.lists(points.map(",".join), min_size=1, max_size=3), st.lists(points.map(" ".join)))
def test_any_grid_point(tmp_path, given_points, lines):
    path = tmp_path / "points"
    write(path, "\n".join(lines))
    for arguments in (["--points", *given_points], ["--file", str(path)]):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
            try:
                grid.main(arguments)
            except SystemExit as end:
                assert end.code == 2 or any(text.startswith("-h") for text in given_points)
                continue
        for line in output.getvalue().splitlines():
            assert 3 <= len(line.split()) <= 4 and float(line.split()[0]) >= 0


@pytest.fixture(scope="module")
def small_teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    return save_folder(folder, tiny_model("qwen2", 272, seed=1), byte_tokenizer())


@given(
    st.lists(problems.map(json.dumps), max_size=3) | st.lists(problems.map(json.dumps) | lines, max_size=4)
)
def test_any_dataset(small_teacher, tmp_path, content):
    """Through the whole of gentraces.py, with room for few tokens."""
    data, exp_dir = tmp_path / "data", tmp_path / "exp"
    data.mkdir(exist_ok=True)
    write(data / "test.jsonl", "\n".join(content))
    shutil.rmtree(exp_dir, ignore_errors=True)
    limits = ["max_length=400", "max_prompt_length=395", "max_samples=2", "answer_force=false"]
    arguments = [f"exp_dir={exp_dir}", f"data_split={data}_test", f"teacher={small_teacher}", *limits]
    code, errors = leave(gentraces.main, *arguments)
    check_exit(code, errors, (0, 2))
    assert (exp_dir / "traces" / "traces.yaml").exists() == (code == 0)


@given(texts)
def test_any_problem_keeps_its_text_and_makes_no_control_token(problem):
    tokenizer = byte_tokenizer()
    control = [tokenizer.convert_tokens_to_ids(text) for text in CONTROL[:4]]
    plain, problem = chat.prompt_ids(tokenizer, "x"), problem.encode("utf-8", "ignore").decode()
    ids = chat.prompt_ids(tokenizer, problem)
    assert [ids.count(i) for i in control] == [plain.count(i) for i in control]
    before, after = tokenizer.decode(plain).rsplit("x", 1)
    assert tokenizer.decode(ids) == before + problem + after


@given(st.lists(trace_rows, min_size=1, max_size=3))
def test_any_trace_file(small_teacher, tmp_path, rows):
    path = tmp_path / "t.parquet"
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    except (pyarrow.ArrowException, UnicodeError):  # no such file can exist
        return
    proxy = [f"proxy_student={small_teacher}", f"tokenizer={small_teacher}", f"holdout_traces={path}"]
    shutil.rmtree(tmp_path / "e", ignore_errors=True)
    code, errors = leave(save_grad.main, f"exp_dir={tmp_path}/e", "num_diagnosed=0", "max_length=50", *proxy)
    check_exit(code, errors, (0, 2))
    cfg = TrainConfig(train_traces=str(path), max_length=50)
    with contextlib.suppress(ValueError):
        examples, _ = load_examples(cfg, byte_tokenizer(), path)
        assert all(len(e["input_ids"]) == len(e["labels"]) <= 50 for e in examples)


@given(texts | maths, texts | maths.map("#### {}".format))
def test_any_answer(response, solution):
    for graded in (grading.grade, grading.grade_forced):
        with contextlib.suppress(ValueError, RuntimeError):  # no answer; a reference that cannot be compared
            assert graded(response, solution).correct in (True, False)


@given(st.dictionaries(sidecar_keys, values, max_size=4) | texts)
def test_any_sidecar(tmp_path, content):
    (tmp_path / "traces").mkdir(exist_ok=True)
    write(tmp_path / "traces" / "train_x.yaml", content)
    code, errors = leave(report.main, str(tmp_path))
    check_exit(code, errors, (0, 2))


def write(path, content):
    """Text, or something as YAML; what is no UTF-8 too."""
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def test_nothing_was_run_by_a_shell():
    assert not Path("pwned").exists()
