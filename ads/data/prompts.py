"""From the problems of a split to rows with prompts that a model can be sampled on."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from ads import chat
from ads.data import grading
from ads.data.problems import load_problems
from ads.data.published import read_published
from ads.data.tables import check_traces, read_parquet
from ads.stage.errors import UserError
from ads.stage.settings import GenConfig
from ads.stage.world import print0


@dataclass(eq=False)
class Row:
    """A problem on its way to a row of the table: first with its prompt, then with what was sampled."""

    problem: dict[str, Any]  # id, problem, solution and the dataset's other columns
    prompt_ids: list[int]  # what the model reads; they end in the opening
    opening: list[int]  # what the response is made to begin with: graded, but not sampled
    published: str | None = None  # a trace made elsewhere
    sampled: dict[str, Any] | None = None  # the columns of its completion and their grades (traces.grade)

    @property
    def id(self) -> str:
        return self.problem["id"]


def make_rows(cfg: GenConfig, tokenizer: Any, prefill: str) -> tuple[list[Row], dict[str, int]]:
    """The rows of a split in the order of its problems, and how many problems were left out for what.

    prefill: what each response is made to begin with (choose_prefill).
    """
    found = load_problems(cfg.data_split, cfg.data_dir, cfg.max_samples, cfg.seed)
    if cfg.defence == "external":
        found = read_published(cfg.published or "", cfg.data_split.rpartition("_")[2], found)
    problems = leave_out_unanswered(found)
    examples, opening = few_shot_examples(cfg), opening_ids(tokenizer, prefill)
    rows = [
        Row(
            p, chat.prompt_ids(tokenizer, p["problem"], examples) + opening, opening, p.pop("published", None)
        )
        for p in problems
    ]
    kept = leave_out_long(cfg, rows)
    return repeated(cfg, kept), {
        "num_without_answer": len(found) - len(problems),
        "num_prompts_too_long": len(problems) - len(kept),
    }


def leave_out_unanswered(problems: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The problems that have an answer to grade against: their own solution, graded as a response, is right.

    2 of MATH's 7,500 solutions end in an empty box; a line of prose may not say which number is the answer.
    """
    kept, reasons = [], {}
    for problem in problems:
        try:
            grading.check_solution(problem["solution"])
            kept.append(problem)
        except ValueError as error:
            reasons[problem["id"]] = error
    if reasons:
        problem_id, reason = next(iter(reasons.items()))
        summary = f"{len(reasons)} of {len(problems)} problems have no answer, such as {problem_id}: {reason}"
        if not kept:
            raise UserError(summary)
        print0(f"left out: {summary}")
    return kept


def leave_out_long(cfg: GenConfig, rows: list[Row]) -> list[Row]:
    """The rows whose prompt is not too long and leaves room to respond; UserError if there are none."""
    longest = min(cfg.max_prompt_length, cfg.max_length - 1)
    kept = [row for row in rows if len(row.prompt_ids) <= longest]
    if not kept:
        shortest = min(len(row.prompt_ids) for row in rows)
        raise UserError(
            f"max_prompt_length={cfg.max_prompt_length}, max_length={cfg.max_length}: every prompt of "
            f"{cfg.data_split} is too long, the shortest has {shortest} tokens"
        )
    if num_left_out := len(rows) - len(kept):
        print0(f"left out {num_left_out} of {len(rows)} problems: prompts above {longest} tokens")
    return kept


def repeated(cfg: GenConfig, rows: list[Row]) -> list[Row]:
    """num_samples rows of each problem, one after another; UserError where names are taken already.

    The first keeps the problem's id, and with it its random numbers: it is what a run of one sample has.
    """
    if cfg.num_samples == 1:
        return rows
    if "problem_id" in rows[0].problem:
        raise UserError(
            f"num_samples={cfg.num_samples}: {cfg.data_split} has a column problem_id of its own; rename it"
        )
    found = {
        sample_id: replace(row, problem={**row.problem, "id": sample_id, "problem_id": row.id})
        for row in rows
        for sample_id in (row.id, *(f"{row.id}#{k}" for k in range(2, cfg.num_samples + 1)))
    }
    if len(found) < cfg.num_samples * len(rows):
        raise UserError(
            f"num_samples={cfg.num_samples}: {cfg.data_split} has ids that end in # and a number, as those "
            "of further samples do; rename them"
        )
    return list(found.values())


def opening_ids(tokenizer: Any, prefill: str) -> list[int]:
    """The ids of what each response is made to begin with."""
    ids = chat.encode_next(tokenizer, prefill)
    if tokenizer.eos_token_id in ids:
        raise UserError(f"prefill={prefill!r}: holds the token that ends a response; leave it out")
    return ids


def choose_prefill(cfg: GenConfig) -> str:
    """cfg.prefill; of "auto" the word that most of the correct, finished few_shot_traces begin with.

    A think block does not count. Of words that are as frequent, it is the one that occurs first.
    """
    if cfg.prefill != "auto":
        return cfg.prefill or ""
    shown = [after_thinking(row[cfg.trace_colname]) for row in correct_traces(cfg)]
    words = [text.split(maxsplit=1)[0] for text in shown if text]
    if not words:
        raise UserError(
            f"prefill=auto: {cfg.few_shot_traces} has no correct, finished trace of any words: give the "
            "words, or take an abler teacher for these traces (in pipeline.sh an empty PREFILL leaves this "
            "out)"
        )
    word, num_times = Counter(words).most_common(1)[0]
    print0(f"prefill=auto: {word!r}, as {num_times} of {len(words)} correct, finished traces begin")
    return word


def few_shot_examples(cfg: GenConfig) -> list[tuple[str, str]]:
    """(problem, worked solution) of the first correct, finished traces: what follows their think block."""
    if not cfg.few_shot:
        return []
    by_problem: dict[Any, dict[str, Any]] = {}
    for i, row in enumerate(correct_traces(cfg)):
        by_problem.setdefault(row.get("problem_id") or i, row)  # of several samples the first
    rows = list(by_problem.values())
    if len(rows) < cfg.few_shot:
        raise UserError(
            f"few_shot={cfg.few_shot}: {cfg.few_shot_traces} has correct, finished traces of {len(rows)} "
            "problems: lower few_shot, or take an abler teacher for these traces (in pipeline.sh an empty "
            "FEW_SHOT_ARGS leaves this out)"
        )
    return [(row["problem"], after_thinking(row[cfg.trace_colname])) for row in rows[: cfg.few_shot]]


def correct_traces(cfg: GenConfig) -> list[dict[str, Any]]:
    """The rows of few_shot_traces that are finished and right."""
    path = cfg.few_shot_traces or ""
    rows = read_parquet(path)
    check_traces(path, rows, text=("problem", cfg.trace_colname), flags=("finished", "is_raw_correct"))
    return [row for row in rows if row["finished"] and row["is_raw_correct"]]


def after_thinking(trace: str) -> str:
    return trace.split("</think>")[-1].strip()
