"""The settings of each stage: one frozen dataclass a script, each key with its type, default and bounds.

`ads.stage.config.load_config` fills them from YAML and the command line. Bounds that concern one key stand
beside it; what keys require of each other, of files and of the machine is in `check`, which runs last.
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ads.arms import DELTA, TEXTS, Arm, arm_of
from ads.stage import layout
from ads.stage.errors import MissingInputError, UserError
from ads.stage.fields import (
    STRICT,
    TRACKER_MODULES,
    Attention,
    Defence,
    Dtype,
    FileName,
    Flag,
    PathText,
    RowsAtOnce,
    Scheduler,
    SearchedArms,
    Seed,
    Solutions,
    SplitName,
    Targets,
    Trackers,
    not_compared,
)
from ads.stage.world import world_size

LEAST_COSINE = 0.9  # below this the rounded perturbation theta +- eps g no longer points along g


def find_path(kind: str, name_key: str, config: Any) -> Path:
    return layout.path_of(kind, config.exp_dir, getattr(config, name_key))


def stage_path(kind: str, name_key: str = "exp_dir") -> property:
    """The property of a config that is a path of `kind` in its EXP_DIR; NAME is what `name_key` holds."""
    return property(functools.partial(find_path, kind, name_key))


@dataclass(frozen=True, config=STRICT)
class GenConfig:
    """gentraces.py: sample a model on the problems of one split, force answers, grade (stages 1, 3, 5, 6)."""

    exp_dir: PathText = not_compared("runs/default")
    trace_name: FileName = "traces"
    trace_colname: FileName = "trace"
    teacher: PathText = not_compared("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
    tokenizer: PathText | None = not_compared(None)
    is_teacher: Flag = True
    dtype: Dtype = "auto"
    attn_implementation: Attention = "auto"
    tau: float = Field(default=0.0, ge=0)
    lam: float = 0.0
    eps: float = Field(default=0.0, ge=0)
    defence: Defence = "ads"
    direction_seed: Seed | None = None
    plausibility: float = Field(default=0.1, gt=0, le=1)
    max_kl: float | None = Field(default=None, gt=0)
    keep_top1: Flag = False
    published: PathText | None = not_compared(None)
    top_k: int = Field(default=50, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    proxy_student: PathText | None = not_compared(None)
    grad_path: PathText | None = not_compared(None)
    proxy_dtype: Dtype = "auto"
    one_step: float = Field(default=0.0, ge=0)
    one_step_samples: int = Field(default=300, ge=1)
    holdout_traces: PathText | None = not_compared(None)
    num_contrasts: int = Field(default=0, ge=0)
    data_split: SplitName = "gsm8k_holdout"
    data_dir: PathText | None = not_compared(None)
    max_samples: int | None = Field(default=None, ge=1)
    max_length: int = Field(default=1024, ge=2)
    max_prompt_length: int = Field(default=512, ge=1)
    answer_force: Flag = True
    num_samples: int = Field(default=1, ge=1)
    prefill: str | None = None
    few_shot: int = Field(default=0, ge=0)
    few_shot_traces: PathText | None = not_compared(None)
    attacker: FileName = "naive"
    batch_size: RowsAtOnce = not_compared("auto")
    cuda_graph: Flag | Literal["auto"] = not_compared("auto")
    seed: Seed = 42

    traces_path = stage_path("traces", "trace_name")
    parquet_path = stage_path("traces_table", "trace_name")
    contrast_path = stage_path("contrasts", "trace_name")
    sidecar_path = stage_path("traces_sidecar", "trace_name")
    parts_dir = stage_path("parts", "trace_name")

    @property
    def leftovers(self) -> list[Path]:
        """Folders that a finished stage no longer needs."""
        return [self.parts_dir]

    @property
    def arm(self) -> Arm:
        """The arm that traces of these settings belong to: what they need is said there."""
        return arm_of(vars(self))

    @property
    def has_proxy(self) -> bool:
        """Whether a proxy adjusts what is sampled: corrupted results need none."""
        return "proxy_student" in self.arm.inputs

    @property
    def has_delta(self) -> bool:
        """Whether what adjusts it is a derivative along the gradient."""
        return self.arm.inputs == DELTA

    @property
    def idle_keys(self) -> set[str]:
        """Keys without effect under these settings."""
        without_tau = set() if self.tau else {"top_k", "top_p"}
        without_lam = set() if self.lam or self.defence in TEXTS else {"defence"}
        without_proxy = set() if self.has_proxy else {"proxy_dtype", "max_kl", "keep_top1"}
        without_defence = set() if self.arm.defence else {"num_contrasts"}
        without_delta = set() if self.has_delta else {"eps"}
        without_seed = set() if self.lam and self.defence == "random" else {"direction_seed"}
        without_set = set() if self.lam and self.defence == "contrastive" else {"plausibility"}
        without_step = set() if self.one_step else {"one_step_samples"}
        without_student = {"attacker"} if self.is_teacher else set()
        of_lam = without_lam | without_proxy | without_delta | without_seed | without_set
        return without_tau | of_lam | without_defence | without_step | without_student

    def check(self) -> None:
        if self.trace_colname in ("id", "problem", "solution", "prompt_ids", "response_ids"):
            raise UserError(f"trace_colname={self.trace_colname!r}: is the name of another column")
        if self.few_shot and not self.few_shot_traces:
            raise UserError(f"few_shot={self.few_shot}: set few_shot_traces to the traces to show")
        if self.prefill == "auto" and not self.few_shot_traces:
            raise UserError("prefill=auto: set few_shot_traces to the traces whose first word to take")
        if self.num_samples > 1:
            self.check_samples()
        if self.defence in TEXTS and self.lam:
            raise UserError(f"lam={self.lam}: defence={self.defence} has no strength; set lam=0")
        if self.defence in TEXTS and self.prefill:
            raise UserError(f"prefill={self.prefill!r}: defence={self.defence} publishes whole texts")
        if self.defence == "external":
            check_given(self, "published", "the folder of the traces made elsewhere")
        if self.lam:
            self.check_defence()
        if self.one_step:
            check_given(self, "holdout_traces", "the stage 1 traces that one_step is measured on")
            check_given(self, "proxy_student", "the model that takes the step of one_step")

    def check_samples(self) -> None:
        asked = f"num_samples={self.num_samples}"
        if self.tau == 0 or self.top_k == 1:
            cause = "tau=0" if self.tau == 0 else "top_k=1"
            raise UserError(f"{asked}: with {cause} all samples of a problem are the same; raise it")
        if self.defence == "external":
            raise UserError(f"{asked}: defence=external publishes one text a problem")
        if self.trace_colname == "problem_id":
            raise UserError(f"{asked}: trace_colname='problem_id' is the name of another column")

    def check_defence(self) -> None:
        if not self.is_teacher:
            raise UserError(f"lam={self.lam}: only a teacher is defended; set lam=0")
        if self.defence == "corrupt" and not 0 <= self.lam <= 1:
            raise UserError(f"lam={self.lam}: with defence=corrupt it is the share of results, 0 to 1")
        if self.defence == "corrupt" and (self.max_kl or self.keep_top1):
            raise UserError("defence=corrupt: has no score to cap; leave out max_kl and keep_top1")
        if "gradient" in self.arm.inputs and not self.grad_path:
            raise UserError(f"lam={self.lam}: needs grad_path, the file that save_grad.py writes")
        if self.has_proxy and not self.proxy_student:
            raise UserError(f"lam={self.lam}: needs proxy_student, a model with the teacher's tokenizer")


@dataclass(frozen=True, config=STRICT)
class GradConfig:
    """save_grad.py: the proxy's mean gradient over holdout traces (stage 2)."""

    exp_dir: PathText = not_compared("runs/default")
    proxy_student: PathText = not_compared("Qwen/Qwen2.5-3B")
    tokenizer: PathText | None = not_compared(None)
    holdout_traces: PathText | None = not_compared(None)
    max_samples: int | None = Field(default=None, ge=1)
    max_length: int = Field(default=4096, ge=2)
    dtype: Literal["float32", "bfloat16"] = "float32"  # gradients underflow in float16
    attn_implementation: Attention = "auto"
    gradient_checkpointing: Flag = not_compared(False)
    batch_size: int = not_compared(8, ge=1)
    batch_tokens: int = not_compared(2048, ge=1)
    grad_rank: int = Field(default=16, ge=0)
    num_diagnosed: int = not_compared(4, ge=0)
    eps: float = not_compared(0.0, ge=0)
    proxy_dtype: Dtype = not_compared("auto")
    seed: Seed = 42

    grad_path = stage_path("gradient")
    sidecar_path = stage_path("gradient_sidecar")
    leftovers = ()
    idle_keys = frozenset[str]()

    def check(self) -> None:
        check_given(self, "holdout_traces", "the stage 1 traces, EXP_DIR/traces/NAME.parquet")


@dataclass(frozen=True, config=STRICT)
class AttackConfig:
    """attack.py: from published traces to what an attacker trains on."""

    exp_dir: PathText = not_compared("runs/default")
    attack: FileName = "correct"
    traces: PathText | None = not_compared(None)
    trace_name: FileName = "attack"
    trace_colname: FileName = "trace"
    clean_traces: PathText | None = not_compared(None)
    samples: PathText | None = not_compared(None)
    holdout_traces: PathText | None = not_compared(None)
    student: PathText | None = not_compared(None)
    tokenizer: PathText | None = not_compared(None)
    share: float | None = Field(default=None, ge=0, le=1)
    num_samples: int | None = Field(default=None, ge=2)
    beta: float | None = None
    max_length: int = Field(default=4096, ge=2)
    dtype: Dtype = "auto"
    attn_implementation: Attention = "auto"
    batch_size: int = not_compared(8, ge=1)
    batch_tokens: int = not_compared(2048, ge=1)
    seed: Seed = 42

    traces_path = stage_path("traces", "trace_name")
    parquet_path = stage_path("traces_table", "trace_name")
    sidecar_path = stage_path("traces_sidecar", "trace_name")
    parts_dir = stage_path("parts", "trace_name")
    idle_keys = frozenset[str]()

    @property
    def leftovers(self) -> list[Path]:
        """Folders that a finished stage no longer needs."""
        return [self.parts_dir]

    def check(self) -> None:
        check_given(self, "traces", "the traces that are published, EXP_DIR/traces/NAME.parquet")


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """distill.py: fine-tune a student on traces (stage 4)."""

    exp_dir: PathText = not_compared("runs/default")
    model_name: FileName = "student"
    train_traces: PathText | None = not_compared(None)
    solutions: Solutions | None = None
    data_dir: PathText | None = not_compared(None)
    max_samples: int | None = Field(default=None, ge=1)
    holdout_traces: PathText | None = not_compared(None)
    trace_colname: str = "trace"
    max_length: int = Field(default=4096, ge=2)
    do_eval: Flag = True
    eval_epochs: float | None = not_compared(None, gt=0)
    save_epochs: float = not_compared(0.5, gt=0)
    student: PathText = not_compared("meta-llama/Llama-3.2-3B")
    tokenizer: PathText | None = not_compared(None)
    checkpoint: PathText | None = None
    dtype: Dtype = "auto"
    attn_implementation: Attention | Literal["flash_attention_2"] = "auto"
    lora: Flag = True
    lora_r: int = Field(default=128, ge=1)
    lora_alpha: int = Field(default=128, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lr: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    warmup: float = Field(default=0.03, ge=0, lt=1)  # share of the steps
    lr_scheduler_type: Scheduler = "cosine"
    batch_size: int = Field(default=16, ge=1)
    per_device_batch_size: RowsAtOnce = not_compared("auto")
    gradient_checkpointing: Flag = not_compared(False)
    num_epochs: float = Field(default=3.0, gt=0)
    mask_share: float = Field(default=0.0, ge=0, lt=1)
    weights: Flag = False
    keep_checkpoints: Flag = not_compared(False)
    report_to: Trackers = not_compared("none")
    seed: Seed = 42

    model_path = stage_path("model", "model_name")
    mask_path = stage_path("mask", "model_name")
    student_path = stage_path("student", "model_name")
    sidecar_path = stage_path("model_sidecar", "model_name")

    @property
    def leftovers(self) -> list[Path]:
        """Folders that a finished stage no longer needs."""
        return [] if self.keep_checkpoints else layout.checkpoints(self.model_path)

    @property
    def idle_keys(self) -> set[str]:
        """Keys without effect under these settings."""
        without_lora = set() if self.lora else {"lora_r", "lora_alpha", "lora_dropout"}
        without_solutions = set() if self.solutions else {"solutions", "data_dir", "max_samples"}
        return without_lora | without_solutions | (set() if self.do_eval else {"eval_epochs"})

    def check(self) -> None:
        if not self.solutions:
            check_given(self, "train_traces", "the stage 3 traces, EXP_DIR/traces/NAME.parquet")
        elif self.train_traces:
            raise UserError(f"solutions={self.solutions}: leave out train_traces={self.train_traces}")
        if self.do_eval:
            check_given(self, "holdout_traces", "the stage 1 traces (or do_eval=false)")
        if self.checkpoint and not (Path(self.checkpoint) / "trainer_state.json").is_file():
            raise MissingInputError(f"checkpoint {self.checkpoint} is no complete trainer checkpoint")
        if self.batch_size % world_size():
            raise UserError(
                f"batch_size={self.batch_size}: must be a multiple of the {world_size()} processes"
            )
        check_installed("report_to", self.report_to)


@dataclass(frozen=True, config=STRICT)
class SearchConfig:
    """search.py: find the lam and tau at which the teacher's accuracy, or its traces' NLL, hits targets."""

    exp_dir: PathText = "runs/default"
    output: FileName = "matched.txt"
    match: Literal["accuracy", "nll"] = "accuracy"
    targets: Targets | None = None
    arms: SearchedArms = "ads,temperature"
    rule: Literal["af", "raw"] = "af"
    tolerance: float = Field(default=0.01, ge=0)
    max_evaluations: int = Field(default=8, ge=1)
    tau: float = Field(default=0.6, ge=0)
    lam_start: float | None = Field(default=None, gt=0)
    lam_max: float | None = Field(default=None, gt=0)
    tau_start: float = 1.2
    tau_max: float = 4.8
    data_split: SplitName = "gsm8k_train"
    max_samples: int | None = Field(default=300, ge=1)
    launch: str | None = None

    @property
    def target_values(self) -> list[float]:
        """The targets, highest first."""
        return sorted({float(text) for text in (self.targets or "").split(",")}, reverse=True)

    @property
    def arm_names(self) -> list[str]:
        """The arms, each with its words."""
        return list(dict.fromkeys(" ".join(arm.split()) for arm in self.arms.split(",")))

    @property
    def quantity(self) -> str:
        """What is matched, in words."""
        return f"{self.rule} accuracy" if self.match == "accuracy" else "NLL per token"

    @property
    def output_path(self) -> Path:
        return Path(self.exp_dir) / self.output

    def check(self) -> None:
        check_given(self, "targets", "the accuracies to hit, such as targets=0.9,0.8,0.7")
        self.check_targets()
        check_order(self, "lam_start", "lam_max")
        if any(arm.split()[0] == "temperature" for arm in self.arm_names):
            if self.tau_start <= self.tau:
                raise UserError(f"tau_start={self.tau_start}: must be above tau={self.tau}")
            check_order(self, "tau_start", "tau_max")
        if self.data_split.endswith("_test"):
            raise UserError(
                f"data_split={self.data_split!r}: settings chosen on test problems spoil the test; take train"
            )

    def check_targets(self) -> None:
        above = 1.0 if self.match == "accuracy" else float("inf")
        if not all(0 < target < above for target in self.target_values):
            shares = "shares between 0 and 1, such as 0.9,0.8,0.7 (match=nll takes nats per token)"
            allowed = shares if self.match == "accuracy" else "nats per token, above 0"
            raise UserError(f"targets={self.targets}: must be {allowed}")


def check_given(config: Any, key: str, meaning: str) -> None:
    if not getattr(config, key):
        raise UserError(f"{key} is not set: give {meaning}")


def check_order(config: Any, low: str, high: str) -> None:
    least, found = getattr(config, low), getattr(config, high)
    if None not in (least, found) and found < least:
        raise UserError(f"{high}={found}: must be at least {low}={least}")


def check_installed(key: str, trackers: str) -> None:
    for name in () if trackers in ("none", "all") else trackers.split(","):
        modules = TRACKER_MODULES.get(name, (name,))
        if not any(map(importlib.util.find_spec, modules)):
            remedy = f"pip install {modules[0]}, or report_to=none"
            raise UserError(f"{key}={trackers!r}: {modules[0]} is not installed: {remedy}")
