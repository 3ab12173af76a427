"""A trace dataset: what it depends on, the columns of its rows, its statistics, the files it is kept in."""

import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ads import chat
from ads.data import grading
from ads.data.problems import fingerprint_data, folder_file
from ads.data.prompts import Row
from ads.stage import files
from ads.stage.fingerprint import fingerprint_file
from ads.stage.inputs import fingerprint_existing, fingerprint_model, fingerprint_tokenizer
from ads.stage.settings import AttackConfig, GenConfig


def fingerprint_inputs(cfg: GenConfig) -> dict[str, str]:
    """What the traces depend on besides the settings.

    All that is loaded for a setting is decided by the names here: the proxy, its gradient, other traces.
    """
    one_step = ("proxy_student", "holdout_traces") if cfg.one_step else ()
    few_shot = ("few_shot_traces",) if cfg.few_shot else ()
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
    """What the report needs of a trace dataset."""
    lengths = sorted(row["num_tokens"] for row in table)
    return {
        "n": len(table),
        "raw": accuracy(table, "is_raw_correct"),
        "af": accuracy(table, "is_af_correct") if cfg.answer_force else None,
        "finished": round(statistics.fmean(row["finished"] for row in table), 4),
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


def accuracy(table: list[dict[str, Any]], column: str) -> dict[str, Any]:
    """Share of correct rows with its 95 % Wilson interval."""
    num_correct = sum(row[column] for row in table)
    share, bounds = num_correct / len(table), wilson_interval(num_correct, len(table))
    numbers = dict(zip(("accuracy", "low", "high"), (share, *bounds), strict=True))
    return {key: round(number, 4) for key, number in numbers.items()} | {"num_correct": num_correct}


def wilson_interval(num_correct: int, num_total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion, as (low, high)."""
    from scipy import stats  # half a second

    if not num_total:
        return 0.0, 1.0
    interval = stats.binomtest(num_correct, num_total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
