"""Reading JSON lines and parquet, with one line on what is wrong in them."""

import codecs
import functools
import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ads.stage.errors import MissingInputError, UserError

Row = dict[str, Any]
Names = tuple[str, ...]
Check = Callable[[Row], object]  # raises ValueError with what is wrong


def read_rows(path: Path, check: Check) -> list[Row]:
    """The rows of a .parquet, .jsonl or .jsonl.gz file; ValueError naming the first that check refuses."""
    if path.suffix != ".parquet":
        return read_lines(path, check)
    rows = read_parquet(path)
    check_each(path, rows, check)
    return rows


def read_lines(path: Path, check: Check) -> list[Row]:
    """The JSON objects of a .jsonl or .jsonl.gz file; ValueError naming the first line that will not do.

    check(object) raises one of what it finds. As `datasets` does, it passes over a byte order mark and empty
    lines.
    """
    rows = []
    for number, line in enumerate(read_bytes(path).removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(parse_object(line))
            check(rows[-1])
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
    return rows


def read_bytes(path: Path) -> bytes:
    """What a file holds, unpacked if its name ends in .gz; ValueError when it is damaged."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a readable gzip file: {error}") from error


def parse_object(line: bytes) -> Row:
    """The JSON object in a line of bytes; ValueError saying what is wrong, with the column where one is."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=unique_keys)
        if b"\\ud" in line.lower():  # half a surrogate pair, which JSON can write, is no character
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        raise UserError(f"column {column}: {line[error.start]:#04x} is not UTF-8") from error
    except UnicodeEncodeError as error:
        raise UserError("\\ud800 to \\udfff stand for a character in pairs only") from error
    except json.JSONDecodeError as error:
        raise UserError(f"column {error.colno}: {error.msg} (one JSON object a line)") from error
    except RecursionError as error:
        raise UserError("nested too deeply") from error
    if not isinstance(row, dict):
        raise UserError("not a JSON object (one a line)")
    return row


def unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    """The dict of a JSON object's pairs; ValueError when a key is there twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"key {ascii(twice)} is given twice")
    return row


def read_parquet(path: str | Path) -> list[Row]:
    """The rows of a parquet file as dicts; ValueError when it is damaged."""
    return read_table(path).to_pylist()


def read_columns(path: str | Path, columns: Names) -> dict[str, list[Any]]:
    """{name: values} of some columns of a parquet file; ValueError when it is damaged or lacks one."""
    table = read_table(path, list(columns))
    if missing := [name for name in columns if name not in table.column_names]:
        raise UserError(f"{path}: no column {', '.join(missing)}")
    return table.to_pydict()


def read_table(path: str | Path, columns: list[str] | None = None) -> Any:
    """The pyarrow table that a parquet file holds."""
    import pyarrow
    import pyarrow.parquet

    if not Path(path).is_file():
        raise MissingInputError(f"{path} does not exist")
    try:
        return pyarrow.parquet.read_table(path, columns=columns)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a readable parquet file: {reason}") from error


def check_each(path: str | Path, rows: list[Row], check: Check) -> None:
    """ValueError naming the first row of which check(row) raises one."""
    for i, row in enumerate(rows):
        try:
            check(row)
        except ValueError as error:
            raise UserError(f"{path}, row {i}: {error}") from error


def check_row(row: Row, columns: Names) -> None:
    if missing := [name for name in columns if name not in row]:
        raise UserError(f"no column {', '.join(missing)} (found: {', '.join(row)})")


def check_traces(
    path: str | Path,
    rows: list[Row],
    ids: Names = (),
    text: Names = (),
    flags: Names = (),
    counts: Names = (),
) -> None:
    """ValueError naming the first row whose columns do not hold token ids, text, bools, counts as named."""
    check_each(path, rows, functools.partial(check_trace, ids=ids, text=text, flags=flags, counts=counts))


def check_trace(row: Row, ids: Names, text: Names, flags: Names, counts: Names) -> None:
    check_row(row, (*ids, *text, *flags, *counts))
    wrong = [(name, "holds no token ids") for name in ids if not are_ids(row[name])]
    wrong += [(name, "holds no text") for name in text if not isinstance(row[name], str)]
    wrong += [(name, "is neither true nor false") for name in flags if not isinstance(row[name], bool)]
    wrong += [(name, "is no count") for name in counts if not is_count(row[name])]
    for name, reason in wrong:
        raise UserError(f"{name} {reason} (but {ascii(row[name])[:50]})")


def are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(is_count(i) for i in value)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
