"""(question, response) texts for supervised fine-tuning."""

from __future__ import annotations

from rlprm.data.datasets import json_records
from rlprm.errors import DataError


def jsonl(*, path: str, question: str, response: str) -> list[tuple[str, str]]:
    """The two named columns of a JSON-lines file.

    Raises:
        DataError: no such file, a line that is no JSON object, a missing column or a value that is no text.
    """
    pairs = []
    for where, record in json_records(path):
        for column in (question, response):
            if not isinstance(record.get(column), str):
                raise DataError(
                    f"{where}: column {column!r} holds {record.get(column)!r:.40}; expected a text (columns: "
                    f"{', '.join(record)})"
                )
        pairs.append((record[question], record[response]))
    return pairs
