"""Tiny random models of several architectures, and where optional real data lies."""

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
# tests that run in the background inherit that INT is ignored, and would hand it on to what they start
signal.signal(signal.SIGINT, signal.default_int_handler)
for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)  # of a scheduler's job in which the tests run
OFFLINE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT = {**os.environ, **OFFLINE}  # before a test changes it
# set by pytest, and by what a test imports: torch, ads, utils.quiet_libraries(), distill.py
NO_SETTINGS = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "PYTORCH_ALLOC_CONF"}
NO_SETTINGS |= {"HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY"}
NO_SETTINGS |= {
    "TOKENIZERS_PARALLELISM",
    "ACCELERATE_MIXED_PRECISION",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
}
torch.set_num_threads(1)  # two files run at a time, on perhaps two cores
# Cases of the same kind are the same in each run; `--hypothesis-profile=many` takes more of them.
QUIET = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
settings.register_profile("few", max_examples=25, **QUIET)
settings.register_profile("many", max_examples=250, **QUIET)
settings.load_profile("few")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}


def tiny_config(kind, vocab_size):
    from transformers import AutoConfig

    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "gpt_neox":
        return AutoConfig.for_model(
            kind, vocab_size=vocab_size, intermediate_size=64, rotary_pct=0.5, **SIZES, **special
        )
    if kind == "gpt2":  # learned positions, layer norms, biases, transposed weights
        return AutoConfig.for_model(kind, vocab_size=vocab_size, **SIZES, **special)
    sizes = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
    if kind == "granite":
        sizes |= {"residual_multiplier": 0.3, "logits_scaling": 2.0}
    if kind == "smollm3":
        sizes |= {"no_rope_layers": [1, 0]}
    if kind == "gemma2":  # caps its attention scores too
        caps = {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
        return AutoConfig.for_model(kind, vocab_size=vocab_size, sliding_window=8, **caps, **sizes, **special)
    if kind == "gemma3_text":
        window = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
        return AutoConfig.for_model(
            kind,
            vocab_size=vocab_size,
            query_pre_attn_scalar=8,
            final_logit_softcapping=3.0,
            **window,
            **sizes,
            **special,
        )
    return AutoConfig.for_model(kind, vocab_size=vocab_size, **sizes, **special)


def tiny_model(kind="qwen2", vocab_size=97, seed=0, spread=0.3):
    """A random float32 model whose next-token distributions are far from uniform."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, vocab_size), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=spread)
    return model.eval()


def shared_path(*parts):
    """A file of the optional real data; skips the test where it is not there."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"optional real data is not there: {path}")
    return path


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(
    extra=("<|system|>", "<|user|>", "<|assistant|>"), eos="<|end|>", chat_template=CHAT_TEMPLATE
):
    """A tokenizer of single bytes: ids 0-255 are bytes, then eos, then the extra special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=eos, additional_special_tokens=list(extra)
    )
    fast.chat_template = chat_template
    return fast


def save_folder(folder, model, tokenizer):
    """A model folder as a user has it on disk; returns its path as text."""
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def environment_as_it_was():
    """What a stage in the tests' own process sets (CUDA_VISIBLE_DEVICES, for one) ends with its test.

    With it run_script would start Python for each script of the tests after it: four seconds, not a half.
    """
    before = dict(os.environ)
    yield
    for name in differing(before, os.environ) - NO_SETTINGS:
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]


@pytest.fixture
def without_compiled_code(monkeypatch):
    """As on a machine without a C compiler or AVX-512, and as with ADS_NATIVE=0."""
    monkeypatch.setattr("ads.cpu.build.library", lambda: None)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """{role: folder} of a tiny teacher, proxy and student; the student has another architecture and
    tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer()
    other = byte_tokenizer(extra=("<|user|>", "<|assistant|>", "<|system|>", "<|pad|>"), eos="</s>")
    return {
        "teacher": save_folder(folder / "teacher", tiny_model("qwen2", 272, seed=1), tokenizer),
        "proxy": save_folder(folder / "proxy", tiny_model("qwen2", 264, seed=2), tokenizer),
        "student": save_folder(folder / "student", tiny_model("llama", 264, seed=3), other),
    }


@pytest.fixture(scope="session")
def problem_folder(tmp_path_factory):
    """A data set of one's own: train, holdout and test of small sums."""
    folder = tmp_path_factory.mktemp("sums")
    for split, first in (("train", 10), ("holdout", 40), ("test", 70)):
        rows = [
            {"problem": f"{i}+{i % 7}=?", "solution": f"\\boxed{{{i + i % 7}}}"}
            for i in range(first, first + 12)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def run_script(script, *arguments, num_processes=1, check=True, cwd=None, **more):
    """Run a script as a user does; `more` are variables of the environment. Returns the finished process."""
    environment, words = {**os.environ, **OFFLINE, **more}, [str(ROOT / script), *map(str, arguments)]
    if num_processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
        result = start([*torchrun, *words], environment | {"ACCELERATE_USE_CPU": "true"}, cwd)
    elif differing(environment, ENVIRONMENT) <= NO_SETTINGS:
        result = fork(words, environment, cwd)
    else:  # libraries read some of it when they are imported
        result = start(words, environment, cwd)
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def start(words, environment, cwd):
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=600)


def fork(words, environment, cwd):
    """What start() does, in a tenth of the time."""
    server = warm_python()
    with tempfile.NamedTemporaryFile("r") as stdout, tempfile.NamedTemporaryFile("r") as stderr:
        request = {"command": words, "environment": environment, "folder": str(cwd or Path.cwd())}
        request |= {"stdout": stdout.name, "stderr": stderr.name, "umask": umask()}
        print(json.dumps(request), file=server.stdin, flush=True)
        assert select.select([server.stdout], [], [], 600)[0], f"{words} has not ended after 600 seconds"
        return subprocess.CompletedProcess(words, int(server.stdout.readline()), stdout.read(), stderr.read())


def umask():
    os.umask(found := os.umask(0o077))
    return found


@functools.cache
def warm_python():
    """The one process of warm_python.py; it ends with this one, whose pipe it reads."""
    command = [sys.executable, str(Path(__file__).with_name("warm_python.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, **pipes)


def differing(a, b):
    return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}


@pytest.fixture(scope="module")
def exp(model_folders, problem_folder, tmp_path_factory):
    """Stage 1 and 2 by one process: greedy holdout traces and the proxy's gradient."""
    from helpers_scripts import gentraces, save_grad

    exp_dir = tmp_path_factory.mktemp("exp")
    holdout = [f"data_split={problem_folder}_holdout", "tau=0"]
    gentraces(model_folders, problem_folder, exp_dir, "holdout", *holdout)
    save_grad(model_folders, exp_dir)
    return exp_dir
