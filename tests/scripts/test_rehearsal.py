"""Dress rehearsal of the paper's set-up: real tokenizers, real row counts, real problems, tiny random
weights.

bash run_tests.sh -m slow tests/scripts/test_rehearsal.py
"""

import pytest
from conftest import save_folder, shared_path, tiny_model
from helpers_pipeline import run_pipeline

from ads import chat
from ads.stage import files

POINTS = ("tau0.6_lam0_eps0", "tau0.6_lam0.03_eps1e-3")
ROWS = {"teacher": 152_064, "proxy": 151_936, "student": 128_256}
KINDS = {"teacher": "qwen2", "proxy": "qwen2", "student": "llama"}
TOKENIZERS = {
    "teacher": "deepseek-r1-distill-qwen-7b",
    "proxy": "qwen2.5-base",
    "student": "llama-3.2-instruct",
}


@pytest.fixture(scope="module")
def paper_models(tmp_path_factory):
    """{role: folder} with the paper's tokenizers and embedding rows."""
    folder = tmp_path_factory.mktemp("paper")
    made = {}
    for seed, role in enumerate(ROWS):
        tokenizer = chat.load_tokenizer(str(shared_path("tokenizers", TOKENIZERS[role])))
        made[role] = save_folder(
            folder / role, tiny_model(KINDS[role], ROWS[role], seed=seed, spread=0.1), tokenizer
        )
    return made


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The real files; MMLU's training part from the partial file."""
    folder = tmp_path_factory.mktemp("data")
    for path in shared_path("data").glob("*.jsonl.gz"):
        (folder / path.name.replace("_partial", "")).symlink_to(path)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", (1, 2))
@pytest.mark.parametrize(
    "script,dataset",
    (("pipeline.sh", "gsm8k"), ("pipeline_math.sh", "hendrycks_math"), ("pipeline_mmlu.sh", "mmlu")),
)
def test_all_stages_on_real_problems(paper_models, data_dir, tmp_path, script, dataset, num_processes):
    small = "max_samples=8 batch_size=3 max_length=420 max_prompt_length=400"
    result = run_pipeline(
        paper_models, dataset, tmp_path, script=script, DATA_DIR=data_dir, NPROC=str(num_processes),
        GEN_ARGS=small, HOLDOUT_ARGS=small, TRAIN_ARGS="num_epochs=1 lora_r=4 batch_size=4",
        OMP_NUM_THREADS="1",
        GRID_ARGS="--points 0.6,0,0 0.6,0.03,1e-3",
    )  # fmt: skip
    assert "2 of 2 points complete" in result.stdout
    for name in (
        "holdout",
        "student_base",
        *(f"{s}_{p}" for p in POINTS for s in ("train", "eval_student", "eval_teacher")),
    ):
        sidecar = files.read_yaml(tmp_path / "traces" / f"{name}.yaml")
        stats = sidecar["stats"]
        assert stats["n"] + stats["num_prompts_too_long"] + stats["num_without_answer"] == 8
        assert sidecar["world_size"] == num_processes
        assert sidecar["config"]["data_split"].startswith(dataset)
    ads = files.read_yaml(tmp_path / "traces" / f"train_{POINTS[1]}.yaml")
    assert [i for i, _, _ in ads["ids_without_delta"]] == list(range(151_643, 151_650))
    assert ads["perturbation"]["cosine"] > 0.99
