"""Traces that no sampling here defended: made elsewhere, in files, or cut out of the teacher's own.

A folder of traces made elsewhere has train.jsonl and test.jsonl (or .jsonl.gz, .parquet) with `problem` and
`trace`, and `answer` where the problem is not one of the data set's.
"""

import re
from pathlib import Path

from ads.data import grading
from ads.data.problems import folder_file
from ads.data.tables import Row, check_row, read_rows
from ads.stage.errors import UserError
from ads.stage.world import print0


def read_published(folder: str, split: str, problems: list[Row]) -> list[Row]:
    """The problems of a split that have a trace in the folder, with it as `published`.

    They are known by their text. Others of the folder are problems of their own where they have an answer.
    """
    path, known = folder_file(Path(folder), split), {row["problem"].strip(): row for row in problems}
    found: dict[str, Row] = {}
    for i, row in enumerate(read_rows(path, check_published)):
        problem = known.get(row["problem"].strip())
        if problem is None:
            if not row.get("answer"):
                raise UserError(
                    f"{path}, row {i}: the problem is not one of the data split's and has no answer to grade "
                    "against: add a column answer, or name the data split that it is of"
                )
            solution = f"\\boxed{{{row['answer']}}}"
            problem = {"id": f"{path.stem}/{i}", "problem": row["problem"], "solution": solution}
        if problem["id"] in found:
            raise UserError(f"{path}, row {i}: a second trace of a problem: give one for each")
        found[problem["id"]] = {**problem, "published": row["trace"]}
    if not found:
        raise UserError(f"{path} holds no trace")
    if missing := len(problems) - sum(row["id"] in found for row in problems):
        print0(f"{path} has no trace of {missing} of the split's {len(problems)} problems")
    return list(found.values())


def check_published(row: Row) -> None:
    check_row(row, ("problem", "trace"))
    for name in ("problem", "trace", "answer"):
        if not isinstance(row.get(name) or "", str):
            raise UserError(f"{name} must be text, but is {ascii(row[name])[:50]}")


def answer_only(text: str, solution: str) -> str:
    """The answer that a trace states, and no reasoning."""
    answer = grading.grade(text, solution).answer
    return "" if answer is None else f"\\boxed{{{answer}}}"


def truncated(text: str, solution: str) -> str:
    """The first half of a trace, to a whole word, and the answer that it states."""
    words = re.findall(r"\s*\S+", text)
    half = "".join(words[: len(words) // 2])
    return "\n\n".join(filter(None, (half, answer_only(text, solution))))
