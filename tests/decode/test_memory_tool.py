"""bench/memory.py: what it plans fits, and is what the pages show."""

import importlib.util
import sys

import pytest
from conftest import ROOT
from helpers_sizes import PAPER, SMALL, SMALLEST, paper_config, paper_sizes

from ads.decode import memory_plan

# what pipeline_small.sh sets for 24 GB
OF_SMALL = {
    "GEN_ARGS": "max_length=768 max_prompt_length=384",
    "FEW_SHOT_ARGS": "few_shot=4 max_prompt_length=1664 max_length=2048",
}
# page, the line before which its table stands, GB of the card, GPUs, models, dataset, settings
PLANNED = (
    ("memory.md", "## The paper's models on 80 GB", 80, 8, PAPER, "gsm8k", {}),
    ("memory.md", "MATH (`pipeline_math.sh`), stages that differ:", 80, 8, PAPER, "hendrycks_math", {}),
    ("memory.md", "## One card of 24 GB", 24, 1, SMALL, "hendrycks_math", {}),
    ("small.md", "## Memory on 24 GB", 24, 1, SMALLEST, "gsm8k", OF_SMALL),
)


@pytest.fixture(scope="module")
def bench():
    """bench/memory.py as a module."""
    spec = importlib.util.spec_from_file_location("bench_memory", ROOT / "bench" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dataset", ("gsm8k", "hendrycks_math", "mmlu"))
def test_the_paper_s_models_fit_80_gb_in_every_stage_by_the_default_keys(bench, dataset, monkeypatch):
    for name in bench.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    settings, free = bench.settings_of(dataset), 79 * memory_plan.GB
    teacher, proxy, student = map(paper_sizes, PAPER)
    for num_processes in (1, 8, 16):
        plans = [
            bench.plan_sampling(free, settings, teacher, proxy, student),
            bench.plan_gradient(free, settings, proxy),
            bench.plan_training(free, settings, student, num_processes),
        ]
        for rows, words in plans:
            assert words == []
            assert all(memory_plan.peak(row.parts) <= free for row in rows)
        num_slots = [int(row.at_once.split()[0]) for row in plans[0][0]]
        assert min(num_slots) >= 128


def test_small_models_fit_24_gb(bench):
    free = 24 * memory_plan.GB
    rows = rows_of(bench, free, 1, SMALL, "hendrycks_math")
    assert all(memory_plan.peak(row.parts) <= free for row in rows)


def rows_of(bench, free, num_processes, models, dataset):
    """Of the tool's table."""
    settings = bench.settings_of(dataset)
    teacher, proxy, student = map(paper_sizes, models)
    return [
        *bench.plan_sampling(free, settings, teacher, proxy, student)[0],
        *bench.plan_gradient(free, settings, proxy)[0],
        *bench.plan_training(free, settings, student, num_processes)[0],
    ]


def test_settings_of_the_pipelines_are_read_from_their_scripts(bench, monkeypatch):
    monkeypatch.setenv("GEN_ARGS", "max_length=99")
    assert bench.settings_of("gsm8k")["GEN_ARGS"] == ["max_length=99"]
    math = bench.settings_of("hendrycks_math")["GEN_ARGS"]
    assert math[0] == "max_samples=2880" and "max_length=2048" in math and math[-1] == "max_length=99"
    assert "max_length=1024" in bench.settings_of("mmlu")["HOLDOUT_ARGS"]


def test_the_tool_prints_a_table_and_the_words_for_the_pipeline(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRAIN_ARGS", "batch_size=32")
    for name in PAPER:
        paper_config(name).save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in PAPER]
    bench.main(["--gpu", "48", *folders, "gsm8k"])
    lines = capsys.readouterr().out.splitlines()
    stages = [line.split("  ")[0] for line in lines[3:-3]]
    assert stages[0] == "holdout traces" and "distillation" in stages
    gradient_line = next(line for line in lines if line.startswith("gradient of the proxy"))
    assert gradient_line.split()[-1] == "47.4" and "2,048 tokens" in gradient_line
    assert lines[-3:] == ['GEN_ARGS=""', 'GRAD_ARGS=""', 'TRAIN_ARGS="batch_size=32"']
    bench.main(["--gpu", "24", *folders, "gsm8k"])
    assert "too much: take smaller models or a larger GPU" in capsys.readouterr().out


@pytest.mark.parametrize(("page", "before", "gpu", "processes", "models", "dataset", "given"), PLANNED)
def test_tables_on_the_pages_are_what_the_tool_plans(
    bench, monkeypatch, page, before, gpu, processes, models, dataset, given
):
    """Those of ADS lost their derivatives once, as the tool asked for no strength, and no page told."""
    for name in bench.SETTINGS:
        monkeypatch.setenv(name, given.get(name, ""))
    free = gpu * memory_plan.GB
    rows = rows_of(bench, free, processes, models, dataset)
    planned = {line[:32].strip(): line[32:].split() for line in list(bench.table(free, rows))[1:]}
    shown = table_after(before, (ROOT / "docs" / page).read_text())
    assert "training traces, teacher's test" in shown
    assert ("undistilled student, few-shot" in shown) == ("FEW_SHOT_ARGS" in given)
    for stage, cells in shown.items():
        assert cells == planned[stage]


def test_what_small_md_plans_is_what_pipeline_small_sh_sets():
    script = (ROOT / "pipeline_small.sh").read_text()
    assert all(words in script for words in OF_SMALL.values())


def table_after(line, page):
    """{first cell: words of the others} of the next table, where "-" stands for an empty cell."""
    rows = page.split(f"\n{line}\n", 1)[1].split("\n| stage", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {stage.split(", MATH")[0]: " ".join(c or "-" for c in more).split() for stage, *more in cells}
