"""The last line of a judge's reply: how it is asked for and how it is read, from one description of its form.

Reading is strict. A verdict counts only on the last line, under the marker of its own question and with exactly the
entries that were asked for; whatever else a judge says is a reply without a verdict, and so no vote at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OVERALL = "overall"
_DECORATION = "*`_"  # what chat models put around a line
_END_PUNCTUATION = ".!"


@dataclass(frozen=True, slots=True)
class Words:
    """One of several words.

    >>> Words({"right": 1.0, "wrong": 0.0}).value("Right")
    1.0
    """

    worth: Mapping[str, float]

    @property
    def shown(self) -> str:
        """How the prompt names the possible answers."""
        return "|".join(self.worth)

    @property
    def pattern(self) -> str:
        """A regular expression without groups of whatever could be read."""
        return "[A-Za-z]+"

    def value(self, word: str) -> float | None:
        """In [0, 1]; None: not an answer to what was asked."""
        return self.worth.get(word.casefold())


@dataclass(frozen=True, slots=True)
class Points:
    """A whole number from ``low`` to ``high``, worth ``(s - low) / (high - low)``.

    >>> Points(1, 7).value("4"), Points(0, 5).value("4"), Points(1, 7).value("8")
    (0.5, 0.8, None)
    """

    low: int
    high: int

    @property
    def shown(self) -> str:
        return f"{self.low}-{self.high}"

    @property
    def pattern(self) -> str:
        return r"[0-9]{1,4}"

    def value(self, word: str) -> float | None:
        points = int(word)
        return (points - self.low) / (self.high - self.low) if self.low <= points <= self.high else None


@dataclass(frozen=True, slots=True)
class Share:
    """A decimal number from 0 to 1.

    >>> Share().value("0.25"), Share().value("1.5")
    (0.25, None)
    """

    @property
    def shown(self) -> str:
        return "0.00-1.00"

    @property
    def pattern(self) -> str:
        return r"[0-9]{1,4}(?:\.[0-9]{1,12})?"

    def value(self, word: str) -> float | None:
        share = float(word)
        return share if share <= 1 else None


Values = Words | Points | Share  # what an entry may say, and what it is worth

RIGHT_OR_WRONG = Words({"right": 1.0, "wrong": 0.0})
YES_OR_NO = Words({"yes": 1.0, "no": 0.0})


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The line that a reply must end with: one entry for each of ``steps`` steps (0: a single one for everything) and,
    with ``overall``, one more for the whole.

    >>> form = Form(values=RIGHT_OR_WRONG, steps=2, overall=True)
    >>> form.line("3fa9")
    'verdict 3fa9: 1=<right|wrong> 2=<right|wrong> overall=<right|wrong>'
    >>> form.read("3fa9", "Step 2 drops a sign.\\nverdict 3fa9: 1=right 2=wrong overall=wrong")
    (1.0, 0.0, 0.0)
    >>> form.read("3fa9", "verdict 3fa9: 1=right overall=wrong") is None
    True
    """

    values: Values
    steps: int
    overall: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the entries; a single one has none."""
        numbered = tuple(str(number + 1) for number in range(self.steps))
        return (*numbered, OVERALL) if self.overall else numbered or ("",)

    def line(self, marker: str) -> str:
        """The line as the prompt shows it."""
        return self._line(marker, [f"<{self.values.shown}>"] * len(self.names))

    def filled(self, marker: str, words: Sequence[str]) -> str:
        """The line as a judge writes it."""
        assert len(words) == len(self.names)
        return self._line(marker, words)

    def read(self, marker: str, reply: str) -> tuple[float, ...] | None:
        """The value of each entry; None: the reply does not end with this line."""
        matched = self._matched(marker, reply)
        if matched is None:
            return None
        values = [self.values.value(word) for word in matched.groups()]
        return None if any(value is None for value in values) else tuple(value for value in values if value is not None)

    def span(self, marker: str, reply: str) -> tuple[int, int] | None:
        """Where in the reply the word of a single entry stands; None where :meth:`read` finds nothing.

        >>> Form(values=YES_OR_NO, steps=0, overall=False).span("3fa9", "Fine.\\nverdict 3fa9: yes\\n")
        (20, 23)
        """
        assert self.names == ("",), "only a single entry has one place"
        matched = self._matched(marker, reply)
        return None if matched is None or self.read(marker, reply) is None else matched.span(1)

    def _line(self, marker: str, words: Sequence[str]) -> str:
        entries = [f"{name}={word}" if name else word for name, word in zip(self.names, words, strict=True)]
        return f"verdict {marker}: {' '.join(entries)}"

    def _matched(self, marker: str, reply: str) -> re.Match[str] | None:
        """The match of the last line, in the coordinates of the reply."""
        text = reply.rstrip()
        begin = max(text.rfind("\n"), text.rfind("\r")) + 1
        end = len(text)
        while begin < end and text[begin] in _DECORATION + " \t":
            begin += 1
        while begin < end and text[end - 1] in _DECORATION + _END_PUNCTUATION:
            end -= 1
        entry = rf"({self.values.pattern})"
        entries = r"[\s,;]+".join(rf"{name}\s*=\s*{entry}" if name else entry for name in self.names)
        line = re.compile(rf"verdict\s+{re.escape(marker)}\s*:\s*{entries}", re.IGNORECASE)
        return line.fullmatch(text, begin, end)


def form_of(line: str) -> tuple[str, Form] | None:
    """The marker and form that :meth:`Form.line` wrote: what a judge that is a program reads.

    >>> marker, form = form_of("verdict 3fa9: 1=<0-5> 2=<0-5>")
    >>> marker, form.values, form.names
    ('3fa9', Points(low=0, high=5), ('1', '2'))
    """
    matched = re.fullmatch(r"verdict (\S+): (\S+(?: \S+)*)", line)
    if matched is None:
        return None
    entries = [re.fullmatch(r"(?:(\w+)=)?<([^<>]+)>", entry) for entry in matched[2].split(" ")]
    if any(entry is None for entry in entries):
        return None
    names = [entry[1] for entry in entries if entry is not None]
    shown = next(entry[2] for entry in entries if entry is not None)
    steps = sum(name is not None and name != OVERALL for name in names)
    return matched[1], Form(values=_values_shown(shown), steps=steps, overall=OVERALL in names)


def _values_shown(shown: str) -> Values:
    for values in (RIGHT_OR_WRONG, YES_OR_NO, Share()):
        if shown == values.shown:
            return values
    low, _, high = shown.partition("-")
    return Points(int(low), int(high))
