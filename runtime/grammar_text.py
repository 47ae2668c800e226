"""GBNF, read to find out whether llama.cpp may see it: what its parser and matcher would answer with an abort, a crash or no end.

A grammar is lines `name ::= alternatives`, of "literals", [classes], `.`, (groups) and names of rules, repeated by `*`, `+`, `?` and
{m,n}; names are letters, digits and hyphens, and answers begin at `root` (grammars/README.md of llama.cpp). Groups become rules here,
and repetitions are written out, as there. Facts from llama-grammar.cpp of llama.cpp, which

- parses groups by recursion: 20,000 in each other overflow the stack;
- repeats {5,2} almost 2**64 times, and writes a literal out as often as it is repeated;
- lets a token stand in a <token>'s place of which a part was read as characters before, and throws when it comes.

What is wrong without harm is refused here too: llama.cpp prints what it is and says only that something is. What a grammar leads to
while tokens are chosen is for `edgeq.runtime.grammar_ways` to check.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from edgeq.errors import UsageError
from edgeq.runtime.grammar_ways import Chars, Rules, Sequence, check_ambiguity, check_beginnings

MAX_BYTES = 1 << 20
MAX_NESTING = 2500  # groups in groups
MAX_REPEATS = 2000  # llama.cpp's own; a larger upper bound means none to it
MAX_ELEMENTS = 200_000  # repetitions written out

_LAST = 0x10FFFF
_TOKEN = re.compile(
    r"""(?P<space>[ \t]+|\#[^\r\n]*)
    |(?P<newline>\r\n|\r|\n)
    |(?P<literal>"(?:[^"\\]|\\.)*")
    |(?P<class>\[(?:[^\]\\]|\\.)*\])
    |(?P<token>!?<)
    |(?P<name>[A-Za-z0-9-]+)
    |(?P<defined>::=)
    |(?P<repeat>[*+?]|\{[ \t]*(?P<least>[0-9]+)[ \t]*(?P<comma>,[ \t]*(?P<most>[0-9]*)[ \t]*)?\})
    |(?P<bar>\|)|(?P<open>\()|(?P<close>\))|(?P<any>\.)""",
    re.VERBOSE,
)
_KINDS = ("space", "newline", "literal", "class", "token", "name", "defined", "repeat", "bar", "open", "close", "any")
_CHAR = re.compile(r'\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\([tnr\\"\[\]-])|([^\\])', re.DOTALL)
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n"}


@lru_cache(maxsize=64)
def check_text(text: str) -> None:
    """Refuse what llama.cpp must not see. Raises UsageError that names the line or the rule."""
    if "\0" in text or not text.strip():
        raise UsageError("the grammar is empty or has a zero byte. Give GBNF with a rule named root.")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as err:
        raise UsageError("the grammar has half a surrogate pair, which is no character. Write the whole character.") from err
    if size > MAX_BYTES:
        raise UsageError(f"the grammar has {size:,} bytes; at most {MAX_BYTES:,} are read. Use a smaller one.")
    rules = _Reader(text).read()
    if "root" not in rules:
        raise UsageError("the grammar has no rule named root, where answers begin.")
    for element in (element for sequences in rules.values() for sequence in sequences for element in sequence):
        if isinstance(element, str) and element not in rules:
            raise UsageError(f"the grammar uses the rule {element!r} and does not define it.")
    check_beginnings(rules)
    check_ambiguity(rules)


@dataclass
class _Open:
    """A rule or group that is being read. start: where what a repetition repeats begins; weight: llama.cpp's count of rules in that."""

    name: str
    line: int
    n_symbols: int
    sequences: list[Sequence] = field(default_factory=lambda: [[]])
    start: int = 0
    weight: int = 1


class _Reader:
    """Keeps the groups that are open on a stack of its own: a grammar of many groups is no reason to recurse."""

    def __init__(self, text: str) -> None:
        self.text, self.line = text, 1
        self.rules: Rules = {}
        self.open: list[_Open] = []
        self._names: set[str] = set()
        self._n_made = self._n_elements = 0

    def read(self) -> Rules:
        awaited: str | None = None  # the name that a ::= has to follow
        fresh = False  # nothing but space has come since ::= or |, so the line may end
        for kind, match in self._matches():
            if awaited is not None:
                if kind != "defined":
                    raise self._unexpected(match, f"::= after the name {awaited!r}")
                self.open.append(_Open(awaited, self.line, 0))
                awaited, fresh = None, True
            elif kind == "newline":
                if len(self.open) == 1 and not fresh:
                    self._close()
            elif self.open:
                self._take(kind, match)
                fresh = kind == "bar"
            elif kind == "name":
                awaited = match.group()
                self._names.add(awaited)
            else:
                raise self._unexpected(match, "the name of a rule")
        if awaited is not None:
            raise self._error(f"::= is missing after the name {awaited!r}.")
        if len(self.open) > 1:
            raise self._error(f"the group that begins in line {self.open[-1].line} is not closed. Write a ).")
        if self.open:
            self._close()
        return self.rules

    def _matches(self) -> Iterator[tuple[str, re.Match[str]]]:
        at = 0
        while at < len(self.text):
            match = _TOKEN.match(self.text, at)
            if match is None:
                rest = self.text[at : at + 20].splitlines()[0]
                raise self._error(
                    f"{rest!r} is not understood. Names are letters, digits and hyphens; "
                    'texts stand in "", classes in [], counts in {m,n}.'
                )
            kind = next(name for name in _KINDS if match[name] is not None)
            if kind != "space":
                yield kind, match
            self.line += len(re.findall(r"\r\n|\r|\n", match.group()))
            at = match.end()

    def _take(self, kind: str, match: re.Match[str]) -> None:
        """A token of the rule that is being read."""
        here = self.open[-1]
        if kind == "repeat":
            self._repeat(here, match)
        elif kind == "bar":
            here.sequences.append([])
            here.start = 0
        elif kind == "open":
            if len(self.open) > MAX_NESTING:
                raise self._error(f"groups are nested more than {MAX_NESTING} deep.")
            n_symbols = self._n_symbols
            self.open.append(_Open(self._made(), self.line, n_symbols))
        elif kind == "close":
            if len(self.open) == 1:
                raise self._unexpected(match, "a group that it closes")
            self._close()
            self._add([here.name], weight=self._n_symbols - here.n_symbols)
        elif kind == "name":
            self._names.add(match.group())
            self._add([match.group()])
        elif kind == "any":
            self._add([((0, _LAST),)])
        elif kind == "literal":
            self._add([((code, code),) for code, _ in self._codes(match)])
        elif kind == "class":
            self._add(_class(self._codes(match)))
        elif kind == "token":
            raise self._error('tokens (<...>) are not taken: llama.cpp ends the process on some. Write their characters in "".')
        else:
            raise self._unexpected(match, "a new line before the name of the next rule")

    def _codes(self, match: re.Match[str]) -> list[tuple[int, bool]]:
        """Code points of a text or class, and whether each is a character with a meaning of its own."""
        codes, body, at = [], match.group()[1:-1], 0
        while at < len(body):
            found = _CHAR.match(body, at)
            if found is None:
                raise self._error(
                    f"{match.group()[:40]} has an escape that GBNF has not. It has " r"\n \r \t \\ \" \[ \] \- \xHH \uHHHH \UHHHHHHHH."
                )
            *hexes, escaped, plain = found.groups()
            number = next(filter(None, hexes), None)
            code = int(number, 16) if number else ord(plain or _ESCAPES.get(escaped, escaped))
            if code > _LAST:
                raise self._error(f"{found.group()} is no character: the last one is \\U{_LAST:08X}.")
            codes.append((code, plain is not None))
            at = found.end()
        return codes

    def _add(self, elements: Iterable[str | Chars], weight: int = 1) -> None:
        here = self.open[-1]
        sequence = here.sequences[-1]
        here.start, here.weight = len(sequence), weight
        sequence += elements
        self._count(len(sequence) - here.start)

    def _repeat(self, here: _Open, match: re.Match[str]) -> None:
        sequence = here.sequences[-1]
        repeated = sequence[here.start :]
        if not repeated:
            raise self._unexpected(match, "something before it to repeat")
        least, most = _bounds(match)
        total = most or least or 1
        if least > MAX_REPEATS or here.weight * total > MAX_REPEATS:
            raise self._error(f"{match.group()[:40]} repeats too often: more than {MAX_REPEATS} times the groups in it. Lower the counts.")
        if most is not None and most < least:
            raise self._error(f"{match.group()} is no count to repeat by: its second number is less than its first.")
        here.weight *= total
        n_optional = 1 if most is None else most - least
        self._count(len(repeated) * least + (len(repeated) + 3) * n_optional)
        sequence[here.start :] = repeated * least
        optional: Sequence = []
        for _ in range(n_optional):
            name = self._made()
            self.rules[name] = [repeated + ([name] if most is None else optional), []]
            optional = [name]
        sequence += optional

    @property
    def _n_symbols(self) -> int:
        return len(self._names) + self._n_made

    def _made(self) -> str:
        """A name for a group or repetition: no name in a grammar has an underscore."""
        self._n_made += 1
        return f"{self.open[0].name}_{self._n_made}"

    def _close(self) -> None:
        rule = self.open.pop()
        self.rules[rule.name] = rule.sequences
        self._count(len(rule.sequences))

    def _count(self, n_elements: int) -> None:
        self._n_elements += n_elements
        if self._n_elements > MAX_ELEMENTS:
            raise self._error(f"more than {MAX_ELEMENTS:,} elements up to here, with repetitions written out. Lower the counts.")

    def _error(self, message: str) -> UsageError:
        return UsageError(f"line {self.line} of the grammar: {message}")

    def _unexpected(self, match: re.Match[str], wanted: str) -> UsageError:
        return self._error(f"{match.group()[:40]!r} stands where {wanted} is expected.")


def _bounds(match: re.Match[str]) -> tuple[int, int | None]:
    """Fewest and most repetitions; None is without end, as more than MAX_REPEATS are. Digits are cut where all are as bad."""
    if match["least"] is None:
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[match.group()]
    least = int(match["least"].lstrip("0")[:5] or 0)
    if match["comma"] is None:
        return least, least
    most = int(match["most"].lstrip("0")[:5] or 0) if match["most"] else None
    return least, None if most is None or most > MAX_REPEATS else most


def _class(codes: list[tuple[int, bool]]) -> Sequence:
    """The characters of a class: none, or one element."""
    negated = codes[:1] == [(ord("^"), True)]
    codes = codes[negated:]
    ranges: list[tuple[int, int]] = []
    at = 0
    while at < len(codes):
        is_range = codes[at + 1 : at + 2] == [(ord("-"), True)] and at + 2 < len(codes)
        ranges.append((codes[at][0], codes[at + 2 if is_range else at][0]))
        at += 3 if is_range else 1
    if not ranges:
        return []
    if not negated:
        return [tuple(ranges)]
    gaps, first = [], 0
    for low, high in sorted(pair for pair in ranges if pair[0] <= pair[1]):
        gaps.append((first, low - 1))
        first = max(first, high + 1)
    return [tuple(gap for gap in (*gaps, (first, _LAST)) if gap[0] <= gap[1])]
