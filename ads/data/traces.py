"""A trace dataset: what it depends on, the columns of its rows, its statistics, the files it is kept in."""

import math
import statistics
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ads import chat
from ads.data import grading
from ads.data.problems import fingerprint_data, folder_file
from ads.data.prompts import Row
from ads.data.text import has_loop
from ads.stage import files
from ads.stage.fingerprint import fingerprint_file
from ads.stage.inputs import fingerprint_existing, fingerprint_model, fingerprint_tokenizer
from ads.stage.settings import AttackConfig, GenConfig


def fingerprint_inputs(cfg: GenConfig) -> dict[str, str]:
    """What the traces depend on besides the settings.

    All that is loaded for a setting is decided by the names here: the proxy, its gradient, other traces.
    """
    one_step = ("proxy_student", "holdout_traces") if cfg.one_step else ()
    few_shot = ("few_shot_traces",) if cfg.few_shot or cfg.prefill == "auto" else ()
    needed = dict.fromkeys((*cfg.arm.inputs, *one_step, *few_shot))
    return {
        "teacher": fingerprint_model(cfg.teacher),
        "tokenizer": fingerprint_tokenizer(cfg.tokenizer or cfg.teacher),
        "data": fingerprint_data(cfg.data_split, cfg.data_dir),
        **{name: fingerprint_needed(cfg, name) for name in needed},
    }


def fingerprint_needed(cfg: GenConfig, name: str) -> str:
    if name == "proxy_student":
        return fingerprint_model(cfg.proxy_student or "")
    if name == "published":
        return fingerprint_file(folder_file(Path(cfg.published or ""), cfg.data_split.rpartition("_")[2]))
    key, maker = ("grad_path", "save_grad.py") if name == "gradient" else (name, "gentraces.py")
    return fingerprint_existing(getattr(cfg, key), f"make it with {maker}")


def grade(
    cfg: GenConfig, tokenizer: Any, eos: Collection[int], rows: dict[str, Row], completion: Any
) -> dict[str, Any]:
    """The columns that a finished response, and the answer it was made to state, add to its row."""
    row = rows[completion.id]
    solution = row.problem["solution"]
    trace = chat.response_text(tokenizer, row.opening + completion.ids, eos)
    raw = grading.grade(trace, solution)
    columns = {
        "id": row.id,
        "response_ids": completion.ids,
        "trace": trace,
        "finished": completion.finished,
        "num_tokens": len(completion.ids),
        "raw_answer": raw.answer,
        "is_raw_correct": raw.correct,
        "raw_timed_out": raw.timed_out,
        "teacher_nll": -completion.log_prob / len(completion.ids),
    }
    if cfg.has_proxy:
        # four digits: the last ones hang on how rows were batched
        kl, lam, num_capped = (float(f"{total / len(completion.ids):.4g}") for total in completion.price)
        columns |= {"kl": kl, "lam": lam, "capped": num_capped}
    if not cfg.answer_force:
        return columns
    continuation = chat.response_text(tokenizer, completion.forced_ids, eos)
    forced = grading.grade_forced(continuation, solution)
    return columns | {
        "trace_af": trace + chat.decode_next(tokenizer, completion.given_ids) + continuation,
        "af_answer": forced.answer,
        "is_af_correct": forced.correct,
        "af_timed_out": forced.timed_out,
    }


def columns_of(cfg: GenConfig, row: Row) -> dict[str, Any]:
    """The row of the table."""
    always = {"prompt_ids": row.prompt_ids, "trace_af": None, "is_af_correct": None}
    columns = {**row.problem, **always, **(row.sampled or {})}
    columns[cfg.trace_colname] = columns.pop("trace")
    columns[f"{cfg.trace_colname}_af"] = columns.pop("trace_af")
    return columns


def save_traces(cfg: GenConfig | AttackConfig, table: list[dict[str, Any]]) -> None:
    """The dataset folder and the parquet file beside it."""
    from datasets import Dataset

    dataset = Dataset.from_list(table)
    with files.atomic_folder(cfg.traces_path) as folder:
        dataset.save_to_disk(str(folder))
    with files.atomic_path(cfg.parquet_path) as path:
        dataset.to_parquet(str(path))


def compute_stats(cfg: GenConfig, table: list[dict[str, Any]]) -> dict[str, Any]:
    """What the report needs of a trace dataset; n is the number of problems."""
    lengths = sorted(row["num_tokens"] for row in table)
    return {
        "n": len(table) // cfg.num_samples,
        "raw": accuracy(table, "is_raw_correct", cfg.num_samples),
        "af": accuracy(table, "is_af_correct", cfg.num_samples) if cfg.answer_force else None,
        **(samples_stats(cfg, table) if cfg.num_samples > 1 else {}),
        "finished": round(statistics.fmean(row["finished"] for row in table), 4),
        "loops": round(statistics.fmean(has_loop(row[cfg.trace_colname]) for row in table), 4),
        "num_tokens": {f"p{q}": lengths[(len(lengths) - 1) * q // 100] for q in (10, 50, 90, 100)},
        "teacher_nll": round(statistics.fmean(row["teacher_nll"] for row in table), 5),
        "num_grader_timeouts": sum(row["raw_timed_out"] + row.get("af_timed_out", 0) for row in table),
        **(price(table) if cfg.has_proxy else {}),
    }


def price(table: list[dict[str, Any]]) -> dict[str, float]:
    """Of a defence, per token: KL(q || p) in nats, the mean of lam_t, the share where a cap lowers it."""
    num_tokens = sum(row["num_tokens"] for row in table)
    sums = {key: sum(row[key] * row["num_tokens"] for row in table) for key in ("kl", "lam", "capped")}
    return {key: round(total / num_tokens, 5) for key, total in sums.items()}


def accuracy(table: list[dict[str, Any]], column: str, num_samples: int) -> dict[str, Any]:
    """Share of correct rows, which is the mean over problems of theirs, with a 95 % Wilson interval.

    The interval is that of one answer a problem, so that it is never too narrow: samples of one problem are
    not independent, and their mean varies from problem to problem by no more than a single answer does. Where
    problems are alike it is up to sqrt(num_samples) times as wide as need be.
    """
    num_correct = sum(row[column] for row in table)
    bounds = wilson_interval(num_correct / num_samples, len(table) // num_samples)
    numbers = dict(zip(("accuracy", "low", "high"), (num_correct / len(table), *bounds), strict=True))
    return {key: round(number, 4) for key, number in numbers.items()} | {"num_correct": num_correct}


def samples_stats(cfg: GenConfig, table: list[dict[str, Any]]) -> dict[str, Any]:
    """What there is to say of several samples a problem."""
    found: dict[str, dict[int, float]] = {}
    for answers in ("raw", "af") if cfg.answer_force else ("raw",):
        num_correct = Counter[str]()
        for row in table:
            num_correct[row["problem_id"]] += row[f"is_{answers}_correct"]
        counts = num_correct.values()
        found[answers] = {k: round(pass_at(k, cfg.num_samples, counts), 4) for k in (1, cfg.num_samples)}
    return {"num_traces": len(table), "pass_at": found}


def pass_at(k: int, num_samples: int, num_correct: Collection[int]) -> float:
    """pass@k: the chance that of k samples of a problem, out of num_samples, one is correct; of problems with
    so many correct ones, the mean.

    The unbiased estimator of Chen et al. (2021, arXiv 2107.03374), 1 - C(n - c, k) / C(n, k).
    """
    subsets = math.comb(num_samples, k)
    return statistics.fmean(1 - math.comb(num_samples - c, k) / subsets for c in num_correct)


def wilson_interval(num_correct: float, num_total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion, as (low, high)."""
    if not num_total:
        return 0.0, 1.0
    share, z = num_correct / num_total, statistics.NormalDist().inv_cdf(0.975)
    centre = share + z**2 / (2 * num_total)
    half = z * math.sqrt(share * (1 - share) / num_total + z**2 / (4 * num_total**2))
    low, high = ((centre + sign * half) / (1 + z**2 / num_total) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)
