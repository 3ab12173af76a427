"""What each stage takes of a GPU's memory, and which keys to set: from config.json alone, no weights, no GPU.

    python bench/memory.py --gpu 80 deepseek-ai/DeepSeek-R1-Distill-Qwen-7B Qwen/Qwen2.5-3B \\
        meta-llama/Llama-3.2-3B gsm8k
    TRAIN_ARGS="lora_r=32" python bench/memory.py --gpu 24 TEACHER PROXY STUDENT hendrycks_math

Models are folders or names of the hub. Rows and prompts are as long as the settings allow (those of
pipeline_math.sh and pipeline_mmlu.sh, where the dataset is theirs; and what GEN_ARGS, HOLDOUT_ARGS,
BASE_ARGS, FEW_SHOT_ARGS, GRAD_ARGS and TRAIN_ARGS hold, as for pipeline.sh), so that a real run takes less.
Of a card of so many GB as many 10^9 bytes are taken to be free, 93 % of what it is sold as. --processes is
how many GPUs share the training. The last three lines are the words for the pipeline.
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils
from ads.attacks import training
from ads.decode import memory_plan
from ads.stage.config import load_config
from ads.stage.settings import GenConfig, GradConfig, TrainConfig

RANK = 16
COLUMNS = ("weights", "gradient", "optimizer", "caches", "activations", "logits")
YAML = {GenConfig: "gen_config.yaml", GradConfig: "grad_config.yaml", TrainConfig: "train_config.yaml"}
# keys that have no default and no part in memory
GIVEN = {
    GenConfig: [],
    GradConfig: ["holdout_traces=-"],
    TrainConfig: ["train_traces=-", "holdout_traces=-"],
}
DEFENDED = ["lam=1", "proxy_student=-", "grad_path=-"]  # of any strength, by ADS
SETTINGS = ("GEN_ARGS", "HOLDOUT_ARGS", "BASE_ARGS", "FEW_SHOT_ARGS", "GRAD_ARGS", "TRAIN_ARGS")
SCRIPTS = {"hendrycks_math": "pipeline_math.sh", "mmlu": "pipeline_mmlu.sh"}


def main(arguments):
    args = parse(arguments)
    free, settings = args.gpu * memory_plan.GB, settings_of(args.dataset)
    teacher, proxy, student = (
        memory_plan.read_sizes(name) for name in (args.teacher, args.proxy, args.student)
    )
    sampling, gen_words = plan_sampling(free, settings, teacher, proxy, student)
    gradient, grad_words = plan_gradient(free, settings, proxy)
    training, train_words = plan_training(free, settings, student, args.processes)
    print(
        f"{args.dataset}, GB on each GPU of {args.gpu} GB; students are trained by {args.processes} of them"
    )
    print(f"teacher {args.teacher}, proxy {args.proxy}, student {args.student}")
    print(*table(free, sampling + gradient + training), sep="\n")
    print(f'GEN_ARGS="{" ".join(gen_words)}"')
    print(f'GRAD_ARGS="{" ".join(grad_words)}"')
    print(f'TRAIN_ARGS="{" ".join(train_words)}"')


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", type=int, default=80, help="GB of the card")
    parser.add_argument("--processes", type=int, default=8, help="GPUs that train a student together")
    parser.add_argument("teacher")
    parser.add_argument("proxy")
    parser.add_argument("student")
    parser.add_argument("dataset")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Row:
    """A line of the table; at_once: rows or tokens on a GPU; parts: see ads/decode/memory_plan.py."""

    stage: str
    at_once: str
    parts: dict


def settings_of(dataset):
    """{name of a setting of pipeline.sh: its words}, those of the dataset's own script first."""
    script = (utils.ROOT / SCRIPTS[dataset]).read_text() if dataset in SCRIPTS else ""
    found = {}
    for name in SETTINGS:
        words = re.search(rf'export {name}="(.*) \$\{{{name}:-\}}"', script)
        found[name] = (words[1].split() if words else []) + os.environ.get(name, "").split()
    return found


def config(cls, *words):
    return load_config(cls, utils.ROOT / YAML[cls], [*GIVEN[cls], *words])


def plan_sampling(free, settings, *models):
    """(rows of the table, words) of gentraces.py."""
    teacher, proxy, student = models
    words = settings["GEN_ARGS"]
    holdout, cfg = config(GenConfig, *words, *settings["HOLDOUT_ARGS"]), config(GenConfig, *words)
    defended = config(GenConfig, *words, *DEFENDED)
    stages = {
        "holdout traces": (holdout, teacher, None),
        "training traces, teacher's test": (defended, teacher, proxy),
        "student's test": (cfg, student, None),
    }
    if settings["FEW_SHOT_ARGS"]:
        asked = [*words, *settings["BASE_ARGS"], *settings["FEW_SHOT_ARGS"], "few_shot_traces=-"]
        stages["undistilled student, few-shot"] = (config(GenConfig, *asked), student, None)
    rows = []
    for stage, (stage_cfg, *pair) in stages.items():
        at_once = slots(free, stage_cfg, *pair)
        parts = memory_plan.decoding(stage_cfg, *pair, at_once, numbers(pair[1]))
        rows.append(Row(stage, f"{at_once} rows of {stage_cfg.max_length}", parts))
    return rows, [] if cfg.batch_size == "auto" else [f"batch_size={cfg.batch_size}"]


def slots(free, cfg, teacher, proxy):
    """Rows decoded at once; those of batch_size: auto as gentraces.py will choose them."""
    if cfg.batch_size != "auto":
        return cfg.batch_size
    none, one = (memory_plan.decoding(cfg, teacher, proxy, n, numbers(proxy)) for n in (0, 1))
    size = one["caches"] + one["logits"]
    return memory_plan.num_slots(free - none["weights"] - none["gradient"], size, "cuda")


def numbers(proxy):
    """In the gradient's file."""
    return proxy.factors(RANK) if proxy else 0


def plan_gradient(free, settings, proxy):
    """(rows, words) of save_grad.py: the first settings by which it fits, else those that take least."""
    longest = config(GenConfig, *settings["GEN_ARGS"], *settings["HOLDOUT_ARGS"]).max_length
    for words in (
        [],
        [f"batch_tokens={longest}"],
        ["gradient_checkpointing=true", f"batch_tokens={longest}"],
    ):
        cfg = config(GradConfig, *words, *settings["GRAD_ARGS"])
        num_tokens = max(cfg.batch_tokens, min(longest, cfg.max_length))
        parts = memory_plan.gradient(cfg, proxy, num_tokens, num_tokens)
        if memory_plan.peak(parts) <= free:
            break
    rows = [Row("gradient of the proxy", f"{num_tokens:,} tokens", parts)]
    judged = diagnostics(cfg, proxy, longest)
    if cfg.num_diagnosed and memory_plan.peak(judged) <= free:
        rows.append(Row("diagnostics of Delta", f"{longest:,} tokens", judged))
    elif cfg.num_diagnosed:
        words = [*words, "num_diagnosed=0"]
    return rows, [*settings["GRAD_ARGS"], *words]


def diagnostics(cfg, proxy, num_tokens):
    """What stage 2 takes to judge Delta on traces of up to num_tokens, cfg being the GradConfig.

    The proxy is there again in the dtype that samples. The most beside is its largest matrix moved along g,
    or the scores of a trace in dual numbers, which are all made.
    """
    largest = max(rows * columns for rows, columns in proxy.matrices)
    return {
        "weights": (memory_plan.FLOAT + memory_plan.itemsize(cfg.proxy_dtype)) * proxy.parameters,
        "gradient": memory_plan.FLOAT * proxy.parameters,
        "activations": memory_plan.FLOAT * max(4 * largest, 9 * proxy.H * num_tokens**2),
        "logits": 4 * memory_plan.FLOAT * cfg.num_diagnosed * memory_plan.NUM_POSITIONS * proxy.V,
    }


def plan_training(free, settings, student, num_processes):
    """(rows, words) of distill.py, likewise."""
    for words in ([], ["gradient_checkpointing=true"]):
        cfg = config(TrainConfig, *words, *settings["TRAIN_ARGS"])
        longest = min(cfg.max_length, config(GenConfig, *settings["GEN_ARGS"]).max_length)
        none, one = (
            memory_plan.distillation(cfg, student, n * longest, n * longest, num_processes) for n in (0, 1)
        )
        most = cfg.per_device_batch_size
        if most == "auto":
            left = training.SHARE_OF_FREE_MEMORY * (free - memory_plan.peak(none))
            most = max(
                1,
                min(
                    training.DEVICE_TOKENS // longest,
                    int(left / (memory_plan.peak(one) - memory_plan.peak(none))),
                ),
            )
        num_rows = training.per_device_batch(cfg.batch_size, most, num_processes)
        num_tokens = num_rows * longest
        parts = memory_plan.distillation(cfg, student, num_tokens, num_tokens, num_processes)
        if memory_plan.peak(parts) <= free:
            break
    rows = [Row("distillation", f"{num_rows} of {longest:,} tokens", parts)]
    if cfg.lora:
        rows.append(Row("adapters tried out", "-", memory_plan.trying_adapters(cfg, student)))
    return rows, [*settings["TRAIN_ARGS"], *words]


def table(free, rows):
    yield f"{'':32}{'at once':>18}" + "".join(f"{name:>12}" for name in (*COLUMNS, "peak"))
    for row in rows:
        parts = [
            f"{row.parts[name] / memory_plan.GB:.1f}" if row.parts.get(name) else "-" for name in COLUMNS
        ]
        parts.append(f"{memory_plan.peak(row.parts) / memory_plan.GB:.1f}")
        note = (
            "" if memory_plan.peak(row.parts) <= free else "  too much: take smaller models or a larger GPU"
        )
        yield f"{row.stage:32}{row.at_once:>18}" + "".join(f"{cell:>12}" for cell in parts) + note


if __name__ == "__main__":
    utils.run_script(main)
