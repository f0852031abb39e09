"""Find the final answer in a text, and see its shape: one value or several, a word, a formula. No algebra here."""

from __future__ import annotations

import re
import unicodedata

_MARKER = r"(?:<\|(?:im_start|im_end|endoftext|end_of_text|eot_id|end)\|>|</s>|<eos>)"
# Searches for formulas restart at every delimiter, so they read only this much (characters) of a text's end.
_REACH = 5000
_LEADING = re.compile(rf"\s*(?:{_MARKER}\s*(?:assistant\b)?\s*)+")
_PHRASE = re.compile(r"(?im)\banswer\b[^.\n:=]{0,60}?(?:\bis\b\s*:?|[:=])|^[ \t*]*A[ \t]*:")
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is consumed with its backslash
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
# What may stand between two boxes (or formulas) that together are one answer.
_FILLER = r"(?:[\s$.,;\\()\[\]*+]|\\q?quad|\\text\{[^{}]{0,40}?\b(?:and|or)?\s*\}|\band\b|\bor\b|for part \([a-z]\))*"
_BETWEEN = re.compile(rf"{_FILLER}(?:[A-Za-z](?:_\{{?\w+\}}?)?\s*=\s*)?")
_FORMULA = re.compile(
    r"\$\$(?P<display>[^$]+)\$\$|\\\[(?P<bracket>.{1,2000}?)\\\]|\\\((?P<paren>.{1,2000}?)\\\)"
    r"|(?<![\\\d])\$(?P<inline>(?:\\\$|[^$\n])+?)(?<!\\)\$(?!\d)",
    re.DOTALL,
)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:[.,]\d+)?|\.\d+)"
_NUMBER = rf"(?<![\w.])[-+]?[$€£]?{_DIGITS}(?:\s?/\s?\d+)?(?:[eE][-+]?\d+\b)?(?:\s?\\?%)?"
_NUMBERS = re.compile(rf"{_NUMBER}(?:\s*(?:,\s*or|,\s*and|\bor\b|\band\b)\s*{_NUMBER})*")
_BARE_WORDS = {
    "and",
    "or",
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "log",
    "ln",
    "exp",
    "mod",
    "pi",
    "sqrt",
    "cm",
    "mm",
    "km",
}
_SEPARATOR = re.compile(r"\\text\{[\s,]*(?:and|or)\s*\}|\\lor\b|\\vee\b|\\q?quad|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_SYMBOLS = {
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\neq ", "±": r"\pm ", "×": r"\times ",
    "·": r"\cdot ", "÷": r"\div ", "°": r"^\circ ", "²": "^2", "³": "^3", "∪": r"\cup ", "∈": r"\in ",
    "√": r"\sqrt ", "!=": r"\neq ", "<=": r"\le ", ">=": r"\ge ", "**": "^", r"\%": "", "%": "", "*": r"\cdot ",
}  # fmt: skip


def plain_text(text: str) -> str:
    r"""Digits of every script, full-width signs, odd minus signs and spaces in their ASCII form; the rest as it is.

    >>> plain_text("４２，\u2212\u0663 ½")
    '42,-3 \\frac{1}{2}'
    """
    if text.isascii():
        return text
    return "".join(character if character.isascii() else _ascii(character) for character in text)


def _ascii(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.digit(character))
    if category in ("Zs", "Zl", "Zp"):
        return " " if category == "Zs" else "\n"
    if character in "\u2212\ufe63\u2010\u2011":
        return "-"
    if 0xFF01 <= ord(character) <= 0xFF5E:
        return chr(ord(character) - 0xFEE0)
    if unicodedata.decomposition(character).startswith("<fraction>"):
        top, _, bottom = unicodedata.normalize("NFKD", character).partition("\u2044")
        return rf"\frac{{{top}}}{{{bottom}}}" if bottom else character
    return character


def final_answer(response: str, prompt: str, anchor: str) -> str:
    r"""The answer that a response commits to, by the rules of :mod:`rlprm.verify.math`; empty if there is none.

    >>> final_answer("We get 6*7. The answer is 42 apples.", "", "any"), final_answer(r"\boxed{5}", "", "boxed")
    ('42', '5')
    >>> final_answer("It is 5 or 6", "", "any"), final_answer("42", "", "boxed")
    ('5 or 6', '')

    Raises:
        ValueError: ``anchor`` is not any, marked or boxed.
    """
    if anchor not in ("any", "marked", "boxed"):
        raise ValueError(f"anchor is {anchor!r}; expected any, marked or boxed")
    text = _own_words(plain_text(response), plain_text(prompt))
    if boxed := last_boxes(text):
        return clean(boxed)
    if anchor == "boxed" or _BOX.search(
        text
    ):  # a box that is never closed was cut off: what it would have said is unknown
        return ""
    if lines := _HASHES.findall(text):
        return clean(lines[-1])
    phrases = list(_PHRASE.finditer(text))
    if phrases:
        tail = text[phrases[-1].end() :].strip(" \t\n*:")
        return _from_sentence(tail[:_REACH])
    if anchor == "marked":
        return ""
    if is_bare(text):
        return clean(_inside_formula(text) if len(text) <= _REACH else text)
    return _last_expression(text[-_REACH:])


def gold_answer(gold: str) -> str:
    r"""The answer inside a gold field: bare, ``#### 42``, ``\boxed{42}`` or text with formulas.

    >>> gold_answer("2+2=4\n#### 4"), gold_answer(r"so $\boxed{\frac12}$"), gold_answer("$1$ and $2$")
    ('4', '\\frac12', '1, 2')
    """
    text = plain_text(gold)
    if boxed := last_boxes(text, unclosed=True):
        return clean(boxed)
    if lines := _HASHES.findall(text):
        return clean(lines[-1])
    if formulas := _last_run([(m.start(), m.end(), _content(m)) for m in _FORMULA.finditer(text)], text):
        return clean(formulas)
    return clean(text)


def last_boxes(text: str, unclosed: bool = False) -> str:
    r"""Content of the last ``\boxed{}``, or of the last few joined by "and", "or" or a comma; else empty."""
    closing = _closing_braces(text)
    spans = []
    for match in _BOX.finditer(text):
        end = closing.get(match.end(), len(text) if unclosed else -1)
        if end >= 0:
            spans.append((match.start(), min(end + 1, len(text)), text[match.end() + 1 : end]))
    # Of nested boxes the innermost holds the answer.
    starts = [start for start, _, _ in spans[1:]] + [len(text)]
    innermost = [span for span, following in zip(spans, starts[: len(spans)], strict=True) if following >= span[1]]
    return _last_run(innermost, text)


def _last_run(spans: list[tuple[int, int, str]], text: str) -> str:
    """Join the last span with those before it, as long as only filler stands between them."""
    if not spans:
        return ""
    run = [spans[-1]]
    for span in reversed(spans[:-1]):
        if not _BETWEEN.fullmatch(text[span[1] : run[0][0]][:200]):
            break
        run.insert(0, span)
    return ", ".join(dict.fromkeys(content for _, _, content in run))  # the same answer twice is one answer


def _closing_braces(text: str) -> dict[int, int]:
    """Index of each opening brace to that of the brace that closes it, in one pass."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


def _own_words(response: str, prompt: str) -> str:
    """The part of a response that is the model's own answer: no echo, no markers, no thinking."""
    text = _LEADING.sub("", response, count=1) if _LEADING.match(response) else response
    text = re.split(_MARKER, text, maxsplit=1)[0]
    if prompt.strip() and text.strip().startswith(prompt.strip()):
        text = text.strip()[len(prompt.strip()) :]
    return text.rpartition("</think>")[2]


def _from_sentence(tail: str) -> str:
    """The answer in what follows "the answer is"."""
    line = tail if tail.startswith((r"\[", "$$", r"\begin")) else tail.partition("\n")[0]
    sentence = re.split(r"\.(?:\s|$)|\bI hope\b", line, maxsplit=1)[0].strip(" *\"'")
    if is_bare(sentence):
        return clean(_inside_formula(sentence))
    if re.search(r"\d\D*\bor\b\D*\d", sentence):
        parts = [_last_expression(part) for part in re.split(r"\bor\b", sentence)]
        return " or ".join(part for part in parts if part)
    opening = _FORMULA.match(sentence) or _NUMBERS.match(sentence)
    if opening is not None:
        return clean(_last_run(_formulas(sentence), sentence) if opening.re is _FORMULA else opening.group(0))
    return _last_expression(sentence) or (clean(sentence) if len(sentence) <= 40 else "")


def _last_expression(text: str) -> str:
    """The last formula (or run of formulas) or number of a prose text, whichever ends later."""
    formulas = _formulas(text)
    numbers = [match for match in _NUMBERS.finditer(text) if not any(a <= match.start() < b for a, b, _ in formulas)]
    if formulas and (not numbers or formulas[-1][1] > numbers[-1].end()):
        return clean(_last_run(formulas, text))
    return clean(numbers[-1].group(0)) if numbers else ""


def _formulas(text: str) -> list[tuple[int, int, str]]:
    return [(match.start(), match.end(), _content(match)) for match in _FORMULA.finditer(text)]


def _content(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None)


def _inside_formula(text: str) -> str:
    return _last_run(_formulas(text), text) or text


def is_bare(text: str) -> bool:
    r"""Is the text one expression (or word) and no prose?

    >>> is_bare(r"\frac{1}{2}"), is_bare("x^2 + 2x"), is_bare("Evelyn"), is_bare("there are 12")
    (True, True, True, False)
    """
    stripped = text.strip()
    if not stripped or "\n\n" in stripped:
        return False
    if not re.search(r"\s", stripped):
        return re.fullmatch(r"[A-Za-z]+\d[A-Za-z\d]*", stripped) is None  # an identifier such as XDY2K holds no number
    letters = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", " ", _WRAPPED.sub(" ", stripped)))
    return all(word.lower() in _BARE_WORDS for word in letters)


def clean(answer: str) -> str:
    r"""Strip what wraps an answer but is not part of it: dollar signs, emphasis, quotes, a full stop, an approximation.

    >>> clean(r" $x = 5$. "), clean("**12**,"), clean(r"\frac{\sqrt3}{3} \approx 0.577")
    ('x = 5', '12', '\\frac{\\sqrt3}{3}')
    """
    if len(answer) > _REACH:
        return answer  # nobody compares it
    text = re.sub(r"\\(?:displaystyle|Large|large|bf)\b", "", answer.strip())
    before = re.split(r"\\approx|≈", text, maxsplit=1)[0].strip()
    text = before or text
    previous = None
    while text != previous:
        previous = text
        text = text.strip(" \t\n\r*\"'`~") if not text.endswith("'") else text.strip(' \t\n\r*"`~')
        text = re.sub(r"(?:(?<!\\right)[.,;:]|\\[,;!]?)$", "", text)
        if not text.startswith(r"\$"):
            text = re.sub(r"^\$(?!\d)|(?<!\\)\$$", "", text)
        text = re.sub(r"^\\\(|\\\)$|^\\\[|\\\]$", "", text)
    return text.replace(r"\ ", " ")


def values(answer: str) -> list[str]:
    r"""The values an answer lists at its top level.

    >>> values("5 or 6"), values(r"\{1, 2\}"), values("(1, 2)"), values(r"3 \text{ and } 4")
    (['5', '6'], ['1', '2'], ['(1, 2)'], ['3', '4'])
    """
    text = answer.strip()
    if text.startswith(r"\{") and text.endswith(r"\}"):
        text = text[2:-2]
    text = _SEPARATOR.sub(",", text.replace("{,}", "").replace(r"\left", "").replace(r"\right", ""))
    parts, depth = [""], 0
    for index, character in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character in ",;" and depth <= 0 and not (index and text[index - 1] == "\\"):
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def is_several(answer: str) -> bool:
    r"""May a right answer show more than one value: a list, tuple, interval, set, plus-minus or matrix?"""
    if len(values(answer)) > 1 or re.search(r"\\pm|\\mp|\\cup|\\in\b|\\begin|\\\{", answer):
        return True
    return answer.replace(r"\left", "").lstrip().startswith(("(", "[")) and "," in answer


def word(answer: str) -> str:
    r"""The words of an answer that is a word, ready to be compared; empty for anything else.

    >>> word(r"\text{Evelyn}"), word("(C)"), word("x^2")
    ('evelyn', 'C', '')
    """
    text = _WRAPPED.sub(r"\1", answer).strip(" ().[]{}\t\n")
    if not re.fullmatch(r"[^\W\d_]+(?:[\s'-]+[^\W\d_]+)*'?", text):
        return ""
    return " ".join(text.casefold().split()) if len(text) > 1 else text


def is_prose(answer: str) -> bool:
    """Is a word certainly a word and not a product of variables?"""
    return _WRAPPED.search(answer) is not None or re.search(r"[^\W\d_]{4,}", answer) is not None


def depth(answer: str) -> int:
    """Deepest nesting of brackets.

    >>> depth("((1))"), depth("{1}{2}")
    (2, 1)
    """
    level = deepest = 0
    for character in answer:
        level += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        deepest = max(deepest, level)
    return deepest


def squeeze(answer: str) -> str:
    """An answer without what only changes its looks."""
    return re.sub(r"\s+|\\left|\\right|\\[,;!]|(?<=\\)[dtc](?=frac)", "", answer)


def for_parser(answer: str) -> str:
    r"""LaTeX that the parser reads in full: unicode signs and ``\mathrm{e}`` make it stop halfway, without a word."""
    text = re.sub(r"\\\\(?=(?:frac|dfrac|left|right|text|sqrt|le|ge|pi|cdot|times|infty|in|cup)\b)", r"\\", answer)
    text = re.sub(r"\\(?:mathrm|textrm|text|operatorname)\{\s*([A-Za-z])\s*\}", r" \1 ", text)
    text = re.sub(r"(?<=[\d}])\s*\\(?:text|mathrm|textrm|mbox)\{[^{}]*\}(?:\^\{?\d\}?)?$", "", text)
    text = _SEPARATOR.sub(", ", text)
    text = re.sub(r",(?:\s*,)+", ",", text)
    text = re.sub(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", text)
    for sign, latex in _SYMBOLS.items():
        text = text.replace(sign, latex)
    return text.strip()
