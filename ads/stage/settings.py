"""Configuration: dataclass defaults <- YAML file <- key=value on the command line, for every script."""

import importlib.util
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path

from ads.arms import DIRECTIONS, SEARCHED, Arm, arm_of
from ads.stage.errors import MissingInputError, UserError
from ads.stage.world import world_size

LEAST_COSINE = 0.9  # below this the rounded perturbation theta +- eps g no longer points along g
DTYPES = ("auto", "float32", "bfloat16", "float16")
GRADIENT_DTYPES = ("float32", "bfloat16")  # of save_grad.py: gradients underflow in float16
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt")
SPLITS = ("train", "holdout", "test")
# A finished stage and a new request for it may differ in these keys: they concern speed alone, or name a
# place whose contents are compared by fingerprint.
NOT_COMPARED = {"compare": False}
AutoInt = typing.NewType("AutoInt", object)  # an int or "auto"
AutoBool = typing.NewType("AutoBool", object)  # a bool or "auto"
PathText = typing.NewType("PathText", str)  # a path, in which ~ is the home folder, or a name on the hub
# of report_to, as transformers knows them; and the modules it imports where they are named otherwise
TRACKERS = ("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "mlflow",
            "neptune", "swanlab", "tensorboard", "trackio", "wandb")  # fmt: skip
TRACKER_MODULES = {
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
    "tensorboard": ("tensorboard", "tensorboardX"),
}


@dataclass(frozen=True)
class GenConfig:
    """gentraces.py: sample a model on the problems of one split, force answers, grade (stages 1, 3, 5, 6)."""

    exp_dir: PathText = field(default="runs/default", metadata=NOT_COMPARED)
    trace_name: str = "traces"
    trace_colname: str = "trace"
    teacher: PathText = field(default="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", metadata=NOT_COMPARED)
    tokenizer: PathText | None = field(default=None, metadata=NOT_COMPARED)
    is_teacher: bool = True
    dtype: str = "auto"
    attn_implementation: str = "auto"
    tau: float = 0.0
    lam: float = 0.0
    eps: float = 0.0
    direction: str = "gradient"
    direction_seed: int | None = None
    top_k: int = 50
    top_p: float = 0.95
    proxy_student: PathText | None = field(default=None, metadata=NOT_COMPARED)
    grad_path: PathText | None = field(default=None, metadata=NOT_COMPARED)
    proxy_dtype: str = "auto"
    one_step: float = 0.0
    one_step_samples: int = 300
    holdout_traces: PathText | None = field(default=None, metadata=NOT_COMPARED)
    num_contrasts: int = 0
    data_split: PathText = "gsm8k_holdout"
    data_dir: PathText | None = field(default=None, metadata=NOT_COMPARED)
    max_samples: int | None = None
    max_length: int = 1024
    max_prompt_length: int = 512
    answer_force: bool = True
    prefill: str | None = None
    few_shot: int = 0
    few_shot_traces: PathText | None = field(default=None, metadata=NOT_COMPARED)
    batch_size: AutoInt = field(default="auto", metadata=NOT_COMPARED)
    cuda_graph: AutoBool = field(default="auto", metadata=NOT_COMPARED)
    seed: int = 42

    @property
    def traces_path(self):
        return Path(self.exp_dir) / "traces" / self.trace_name

    @property
    def parquet_path(self):
        return self.traces_path.with_name(self.trace_name + ".parquet")

    @property
    def contrast_path(self):
        return self.traces_path.with_name(self.trace_name + ".contrast.json")

    @property
    def sidecar_path(self):
        return self.traces_path.with_name(self.trace_name + ".yaml")

    @property
    def parts_dir(self):
        return Path(self.exp_dir) / "parts" / self.trace_name

    @property
    def leftovers(self):
        """Folders that a finished stage no longer needs."""
        return [self.parts_dir]

    @property
    def arm(self) -> Arm:
        """The arm that traces of these settings belong to: what they need is said there."""
        return arm_of(vars(self))

    @property
    def has_delta(self):
        """Whether a proxy adjusts what is sampled: corrupted results need none."""
        return bool(self.arm.inputs)

    @property
    def idle_keys(self):
        """Keys without effect under these settings."""
        without_tau = set() if self.tau else {"top_k", "top_p"}
        without_lam = set() if self.lam else {"direction"}
        without_delta = set() if self.has_delta else {"eps", "proxy_dtype", "num_contrasts"}
        without_seed = set() if self.lam and self.direction == "random" else {"direction_seed"}
        without_step = set() if self.one_step else {"one_step_samples"}
        return without_tau | without_lam | without_delta | without_seed | without_step

    def check(self):
        check_name("trace_name", self.trace_name)
        check_name("trace_colname", self.trace_colname)
        if self.trace_colname in ("id", "problem", "solution", "prompt_ids", "response_ids"):
            raise UserError(f"trace_colname={self.trace_colname!r}: is the name of another column")
        check_seed(self.seed)
        check_split("data_split", self.data_split)
        check_at_least("tau", self.tau, 0)
        check_at_least("eps", self.eps, 0)
        check_at_least("top_k", self.top_k, 0)
        check_at_least("few_shot", self.few_shot, 0)
        if self.batch_size != "auto":
            check_at_least("batch_size", self.batch_size, 1)
        check_at_least("max_prompt_length", self.max_prompt_length, 1)
        check_at_least("max_length", self.max_length, 2)
        check_optional_at_least("max_samples", self.max_samples, 1)
        check_at_least("num_contrasts", self.num_contrasts, 0)
        check_one_of("dtype", self.dtype, DTYPES)
        check_one_of("proxy_dtype", self.proxy_dtype, DTYPES)
        check_one_of("direction", self.direction, DIRECTIONS)
        check_one_of("attn_implementation", self.attn_implementation, ATTENTION[:3])
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must be above 0 and at most 1 (1 switches it off)")
        if self.few_shot and not self.few_shot_traces:
            raise UserError(f"few_shot={self.few_shot}: set few_shot_traces to the traces to show")
        if self.direction_seed is not None:
            check_seed(self.direction_seed, "direction_seed")
        if self.lam:
            self.check_antidistillation()
        check_at_least("one_step", self.one_step, 0)
        check_at_least("one_step_samples", self.one_step_samples, 1)
        if self.one_step:
            check_given(
                "holdout_traces", self.holdout_traces, "the stage 1 traces that one_step is measured on"
            )
            check_given("proxy_student", self.proxy_student, "the model that takes the step of one_step")

    def check_antidistillation(self):
        if not self.is_teacher:
            raise UserError(f"lam={self.lam}: only a teacher is sampled with antidistillation; set lam=0")
        if self.direction == "corrupt":
            if not 0 <= self.lam <= 1:
                raise UserError(f"lam={self.lam}: with direction=corrupt it is the share of results, 0 to 1")
            return
        if not self.grad_path:
            raise UserError(f"lam={self.lam}: needs grad_path, the file that save_grad.py writes")
        if not self.proxy_student:
            raise UserError(f"lam={self.lam}: needs proxy_student, the model whose gradient grad_path holds")


@dataclass(frozen=True)
class GradConfig:
    """save_grad.py: the proxy's mean gradient over holdout traces (stage 2)."""

    exp_dir: PathText = field(default="runs/default", metadata=NOT_COMPARED)
    proxy_student: PathText = field(default="Qwen/Qwen2.5-3B", metadata=NOT_COMPARED)
    tokenizer: PathText | None = field(default=None, metadata=NOT_COMPARED)
    holdout_traces: PathText | None = field(default=None, metadata=NOT_COMPARED)
    max_samples: int | None = None
    max_length: int = 4096
    dtype: str = "float32"
    attn_implementation: str = "auto"
    gradient_checkpointing: bool = field(default=False, metadata=NOT_COMPARED)
    batch_size: int = field(default=8, metadata=NOT_COMPARED)
    batch_tokens: int = field(default=2048, metadata=NOT_COMPARED)
    grad_rank: int = 16
    num_diagnosed: int = field(default=4, metadata=NOT_COMPARED)
    eps: float = field(default=0.0, metadata=NOT_COMPARED)
    proxy_dtype: str = field(default="auto", metadata=NOT_COMPARED)
    seed: int = 42

    @property
    def grad_path(self):
        return Path(self.exp_dir) / "student_grads.safetensors"

    @property
    def sidecar_path(self):
        return Path(self.exp_dir) / "student_grads.yaml"

    leftovers = ()
    idle_keys = frozenset()

    def check(self):
        check_given("holdout_traces", self.holdout_traces, "the stage 1 traces, EXP_DIR/traces/NAME.parquet")
        check_seed(self.seed)
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("batch_tokens", self.batch_tokens, 1)
        check_at_least("grad_rank", self.grad_rank, 0)
        check_at_least("num_diagnosed", self.num_diagnosed, 0)
        check_at_least("eps", self.eps, 0)
        check_at_least("max_length", self.max_length, 2)
        check_optional_at_least("max_samples", self.max_samples, 1)
        check_one_of("dtype", self.dtype, GRADIENT_DTYPES)
        check_one_of("proxy_dtype", self.proxy_dtype, DTYPES)
        check_one_of("attn_implementation", self.attn_implementation, ATTENTION[:3])


@dataclass(frozen=True)
class TrainConfig:
    """distill.py: fine-tune a student on traces (stage 4)."""

    exp_dir: PathText = field(default="runs/default", metadata=NOT_COMPARED)
    model_name: str = "student"
    train_traces: PathText | None = field(default=None, metadata=NOT_COMPARED)
    holdout_traces: PathText | None = field(default=None, metadata=NOT_COMPARED)
    trace_colname: str = "trace"
    max_length: int = 4096
    do_eval: bool = True
    eval_epochs: float | None = field(default=None, metadata=NOT_COMPARED)
    save_epochs: float = field(default=0.5, metadata=NOT_COMPARED)
    student: PathText = field(default="meta-llama/Llama-3.2-3B", metadata=NOT_COMPARED)
    tokenizer: PathText | None = field(default=None, metadata=NOT_COMPARED)
    checkpoint: PathText | None = None
    dtype: str = "auto"
    attn_implementation: str = "auto"
    lora: bool = True
    lora_r: int = 128
    lora_alpha: int = 128
    lora_dropout: float = 0.0
    lr: float = 5e-4
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    warmup: float = 0.03
    lr_scheduler_type: str = "cosine"
    batch_size: int = 16
    per_device_batch_size: AutoInt = field(default="auto", metadata=NOT_COMPARED)
    gradient_checkpointing: bool = field(default=False, metadata=NOT_COMPARED)
    num_epochs: float = 3.0
    keep_checkpoints: bool = field(default=False, metadata=NOT_COMPARED)
    report_to: str = field(default="none", metadata=NOT_COMPARED)
    seed: int = 42

    @property
    def model_path(self):
        return Path(self.exp_dir) / "models" / self.model_name

    @property
    def sidecar_path(self):
        return self.model_path.with_name(self.model_name + ".yaml")

    @property
    def leftovers(self):
        """Folders that a finished stage no longer needs."""
        return [] if self.keep_checkpoints else sorted(self.model_path.glob("checkpoint-*"))

    @property
    def idle_keys(self):
        """Keys without effect under these settings."""
        without_lora = set() if self.lora else {"lora_r", "lora_alpha", "lora_dropout"}
        return without_lora | (set() if self.do_eval else {"eval_epochs"})

    def check(self):
        check_name("model_name", self.model_name)
        check_seed(self.seed)
        check_given("train_traces", self.train_traces, "the stage 3 traces, EXP_DIR/traces/NAME.parquet")
        if self.checkpoint and not (Path(self.checkpoint) / "trainer_state.json").is_file():
            raise MissingInputError(f"checkpoint {self.checkpoint} is no complete trainer checkpoint")
        if self.do_eval:
            check_given("holdout_traces", self.holdout_traces, "the stage 1 traces (or do_eval=false)")
        for key in ("num_epochs", "save_epochs", "lr", "max_grad_norm"):
            check_above(key, getattr(self, key), 0)
        if self.eval_epochs is not None:
            check_above("eval_epochs", self.eval_epochs, 0)
        for key in ("batch_size", "lora_r", "lora_alpha"):
            check_at_least(key, getattr(self, key), 1)
        if self.per_device_batch_size != "auto":
            check_at_least("per_device_batch_size", self.per_device_batch_size, 1)
        num_processes = world_size()
        if self.batch_size % num_processes:
            raise UserError(
                f"batch_size={self.batch_size}: must be a multiple of the {num_processes} processes"
            )
        check_at_least("weight_decay", self.weight_decay, 0)
        check_at_least("max_length", self.max_length, 2)
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout={self.lora_dropout}: must be at least 0 and below 1")
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup={self.warmup}: the share of steps to warm up in, at least 0 and below 1")
        check_trackers("report_to", self.report_to)
        check_one_of("lr_scheduler_type", self.lr_scheduler_type, SCHEDULERS)
        check_one_of("dtype", self.dtype, DTYPES)
        check_one_of("attn_implementation", self.attn_implementation, ATTENTION)


@dataclass(frozen=True)
class SearchConfig:
    """search.py: find the lam and tau at which the teacher's accuracy hits targets."""

    exp_dir: PathText = "runs/default"
    output: str = "matched.txt"
    targets: str | None = None
    arms: str = "ads,temperature"
    rule: str = "af"
    tolerance: float = 0.01
    max_evaluations: int = 8
    tau: float = 0.6
    lam_start: float = 0.01
    lam_max: float = 1.28
    tau_start: float = 1.2
    tau_max: float = 4.8
    data_split: PathText = "gsm8k_train"
    max_samples: int | None = 300
    launch: str | None = None

    @property
    def target_values(self):
        """The targets, highest first."""
        return sorted({float(text) for text in self.targets.split(",")}, reverse=True)

    @property
    def arm_names(self):
        return list(dict.fromkeys(self.arms.split(",")))

    @property
    def output_path(self):
        return Path(self.exp_dir) / self.output

    def check(self):
        check_name("output", self.output)
        check_given("targets", self.targets, "the accuracies to hit, such as targets=0.9,0.8,0.7")
        check_shares("targets", self.targets)
        for arm in self.arms.split(","):
            check_one_of("arms", arm, SEARCHED)
        check_one_of("rule", self.rule, ("af", "raw"))
        check_at_least("tolerance", self.tolerance, 0)
        check_at_least("max_evaluations", self.max_evaluations, 1)
        check_optional_at_least("max_samples", self.max_samples, 1)
        check_at_least("tau", self.tau, 0)
        check_above("lam_start", self.lam_start, 0)
        check_at_least("lam_max", self.lam_max, self.lam_start)
        if "temperature" in self.arm_names:
            check_above("tau_start", self.tau_start, self.tau)
            check_at_least("tau_max", self.tau_max, self.tau_start)
        check_split("data_split", self.data_split)
        if self.data_split.endswith("_test"):
            raise UserError(
                f"data_split={self.data_split!r}: settings chosen on test problems spoil the test; take train"
            )


def check_trackers(key, value):
    """none, all (that are installed), or trackers that are installed, parted by commas."""
    for name in () if value in ("none", "all") else value.split(","):
        check_one_of(key, name, ("none", "all", *TRACKERS) if name == value else TRACKERS)
        modules = TRACKER_MODULES.get(name, (name,))
        if not any(map(importlib.util.find_spec, modules)):
            remedy = f"pip install {modules[0]}, or report_to=none"
            raise UserError(f"{key}={value!r}: {modules[0]} is not installed: {remedy}")


def check_shares(key, value):
    try:
        are_shares = all(0 < float(text) < 1 for text in value.split(","))
    except ValueError:
        are_shares = False
    if not are_shares:
        raise UserError(f"{key}={value!r}: must be shares between 0 and 1, such as 0.9,0.8,0.7")


def check_given(key, value, meaning):
    if not value:
        raise UserError(f"{key} is not set: give {meaning}")


def check_name(key, value):
    """A name becomes a file name, so it may not leave its folder."""
    if not value or value.startswith((".", "-")) or any(c in value for c in "/\\\0\n"):
        raise UserError(f"{key}={value!r}: must be a plain file name (no '/', no leading '.' or '-')")


def check_seed(seed, key="seed"):
    if not 0 <= seed < 2**32:
        raise UserError(f"{key}={seed}: must be at least 0 and below 2^32")


def check_split(key, value):
    dataset, _, split = value.rpartition("_")
    if not dataset or split not in SPLITS:
        raise UserError(f"{key}={value!r}: must be DATASET_SPLIT with SPLIT one of {', '.join(SPLITS)}")


def check_at_least(key, value, least):
    if not value >= least:
        raise UserError(f"{key}={value}: must be at least {least}")


def check_optional_at_least(key, value, least):
    if value is not None:
        check_at_least(key, value, least)


def check_above(key, value, bound):
    if not value > bound:
        raise UserError(f"{key}={value}: must be above {bound}")


def check_one_of(key, value, allowed):
    if value not in allowed:
        raise UserError(f"{key}={value!r}: must be one of {', '.join(allowed)}")


def expand_home(key, text):
    """A path with its leading ~ or ~user replaced, as shells do where it stands unquoted."""
    if not text.strip():
        raise UserError(f"{key}={text!r}: is empty; give a path or a name")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UserError(f"{key}={text!r}: has no such home folder; write ./{text} for what is named so")
    return expanded
