"""A trace dataset: a row for each problem, its statistics, the files it is kept in."""

import statistics

from ads import chat
from ads.data import grading
from ads.stage import files


def trace_row(cfg, tokenizer, eos, opening, completion, solutions):
    """What a finished response, and the answer it was made to state, add to their problem.

    The opening is part of its text, but was not sampled.
    """
    trace = chat.response_text(tokenizer, opening + completion.ids, eos)
    solution = solutions[completion.id]
    grade = grading.grade(trace, solution)
    row = {
        "id": completion.id,
        "response_ids": completion.ids,
        "trace": trace,
        "finished": completion.finished,
        "num_tokens": len(completion.ids),
        "raw_answer": grade.answer,
        "is_raw_correct": grade.correct,
        "raw_timed_out": grade.timed_out,
        "teacher_nll": -completion.log_prob / len(completion.ids),
    }
    if not cfg.answer_force:
        return row
    continuation = chat.response_text(tokenizer, completion.forced_ids, eos)
    grade = grading.grade_forced(continuation, solution)
    return row | {
        "trace_af": trace + chat.decode_next(tokenizer, completion.given_ids) + continuation,
        "af_answer": grade.answer,
        "is_af_correct": grade.correct,
        "af_timed_out": grade.timed_out,
    }


def assemble(cfg, problems, prompts, rows):
    """The dataset's rows, in the order of the problems."""
    by_id = {p["id"]: p for p in problems}
    table = []
    for i, ids in prompts.items():
        row = {**by_id[i], "prompt_ids": ids, "trace_af": None, "is_af_correct": None, **rows[i]}
        row[cfg.trace_colname] = row.pop("trace")
        row[f"{cfg.trace_colname}_af"] = row.pop("trace_af")
        table.append(row)
    return table


def save_traces(cfg, rows):
    """The dataset folder and the parquet file beside it."""
    from datasets import Dataset

    dataset = Dataset.from_list(rows)
    with files.atomic_folder(cfg.traces_path) as folder:
        dataset.save_to_disk(str(folder))
    with files.atomic_path(cfg.parquet_path) as path:
        dataset.to_parquet(str(path))


def compute_stats(cfg, rows):
    """What the report needs of a trace dataset."""
    lengths = sorted(row["num_tokens"] for row in rows)
    timed_out = sum(row["raw_timed_out"] + row.get("af_timed_out", 0) for row in rows)
    return {
        "n": len(rows),
        "raw": accuracy(rows, "is_raw_correct"),
        "af": accuracy(rows, "is_af_correct") if cfg.answer_force else None,
        "finished": round(statistics.fmean(row["finished"] for row in rows), 4),
        "num_tokens": {f"p{q}": lengths[(len(lengths) - 1) * q // 100] for q in (10, 50, 90, 100)},
        "teacher_nll": round(statistics.fmean(row["teacher_nll"] for row in rows), 5),
        "num_grader_timeouts": timed_out,
    }


def accuracy(rows, column):
    """Share of correct rows with its 95 % Wilson interval."""
    num_correct = sum(row[column] for row in rows)
    low, high = wilson_interval(num_correct, len(rows))
    return {
        "accuracy": round(num_correct / len(rows), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "num_correct": num_correct,
    }


def wilson_interval(num_correct: int, num_total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion, as (low, high)."""
    from scipy import stats  # half a second

    if not num_total:
        return 0.0, 1.0
    interval = stats.binomtest(num_correct, num_total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
