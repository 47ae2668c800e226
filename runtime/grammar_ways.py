"""In how many ways the rules of a grammar can begin, and read the same text.

llama.cpp follows all ways at once, with a stack for each of what is still to come: it compares every new one with the others, and tries
every token of the vocabulary on each, branching again at every character of it. Facts from llama-grammar.cpp, which

- looks for left recursion by recursion, once for every path that leads to a rule: a chain of 100,000 rules overflows the stack, thirty
  rules of two alternatives each are a billion visits;
- does so without knowing that `a ::= e` can be empty when `e ::= ""` is: what it then misses grows a stack for ever, or leaves none
  where a rule is nothing but itself, which ends the process;
- doubles its stacks with every character of an answer by `root ::= "(" root ")" | "(" root "]"`;
- reads ("#" | "#"){40} in 2**40 ways in a token of 40 such characters.
"""

from __future__ import annotations

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

from edgeq.errors import UsageError

Chars = tuple[tuple[int, int], ...]  # first and last code points
Sequence = list[str | Chars]  # names of rules, and characters
Rules = dict[str, list[Sequence]]  # alternatives

MAX_DEPTH = 2500  # rules that begin with a rule that begins with a rule ...
MAX_WAYS = 10_000  # to begin a rule; every one is tried on every token of the vocabulary
MAX_STACKS = 20_000
MAX_READINGS = 1_000_000_000  # of a token; two for each of 24 characters are less
_TEXT = 256  # characters that are read
_TOKEN = 24  # in a token that is not one mark again and again
_EFFORT = 400_000  # stacks that are looked at, some seconds


def check_beginnings(rules: Rules) -> None:
    """Walk all that can stand first in a rule: it must come to an end, not too deep and not after too many ways."""
    empty = _can_be_empty(rules)
    firsts = {name: [list(_firsts(sequence, empty)) for sequence in sequences] for name, sequences in rules.items()}
    # `*` of what can be empty leads to itself and to nothing that is remembered: llama.cpp sees that it was there.
    graph = {name: {first for found in lists for first in found if "_" not in name or first != name} for name, lists in firsts.items()}
    ways: dict[str, int] = {}
    depth: dict[str, int] = {}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as err:
        cycle = " -> ".join(dict.fromkeys(_rule(name) for name in err.args[1][:20]))
        raise UsageError(f"the rule {cycle} of the grammar can begin with itself (left recursion). Write it as a repetition.") from err
    for name in order:
        depth[name] = 1 + max((depth[first] for first in graph[name]), default=0)
        ways[name] = sum(1 + sum(ways.get(first, 0) for first in found) for found in firsts[name])
        if ways[name] > MAX_WAYS:
            raise UsageError(f"the rule {_rule(name)} of the grammar can begin in more than {MAX_WAYS:,} ways. Use fewer alternatives.")
        if depth[name] > MAX_DEPTH:
            raise UsageError(f"the rule {_rule(name)} of the grammar begins with a chain of more than {MAX_DEPTH:,} rules. Use fewer.")


def _can_be_empty(rules: Rules) -> set[str]:
    """Each sequence counts the elements that are not known to be empty yet."""
    users: dict[str, list[tuple[str, int]]] = {name: [] for name in rules}
    waits: dict[tuple[str, int], int] = {}
    for name, sequences in rules.items():
        for i, sequence in enumerate(sequences):
            waits[name, i] = len(sequence)
            for element in sequence:
                if isinstance(element, str):
                    users[element].append((name, i))
    todo = [name for (name, _), n in waits.items() if not n]
    empty: set[str] = set()
    while todo:
        name = todo.pop()
        if name in empty:
            continue
        empty.add(name)
        for user in users[name]:
            waits[user] -= 1
            if not waits[user]:
                todo.append(user[0])
    return empty


def _firsts(sequence: Sequence, empty: set[str]) -> Iterator[str]:
    """Rules that can stand first in a sequence."""
    for element in sequence:
        if isinstance(element, str):
            yield element
        if element not in empty:
            return


def check_ambiguity(rules: Rules) -> None:
    """Raises UsageError naming a rule that can read some text in too many ways, or before which the effort was spent.

    From every rule on a text is read that takes, each time, the character that most ways take: a text with more may be missed. Ways that
    come to the same stack are counted apart within a token, or a run of one mark or space, and together beyond it. The rules must have
    passed `check_beginnings`.
    """
    stacks = _Stacks(rules)
    for name in reversed(rules):  # what holds others stands after them
        if _needs_no_start(name, rules[name], stacks.begun):
            continue
        ways = dict.fromkeys(stacks.beginnings(name), 1)
        seen: set[frozenset[int]] = set()
        before, began = -1, 0
        for at in range(_TEXT):
            if len(ways) > MAX_STACKS or sum(ways.values()) > MAX_READINGS or stacks.looked_at > _EFFORT:
                raise UsageError(
                    f"the rule {_rule(name)} of the grammar can read the same text in too many ways, or is too large to tell. "
                    "Let alternatives begin with different characters, and do not repeat repetitions."
                )
            char = _commonest([(stacks.top(stack), n) for stack, n in ways.items()])
            if at - began >= _TOKEN and (char != before or chr(char).isalnum()):
                began, ways = at, dict.fromkeys(ways, 1)
                state = frozenset(ways)
                if state in seen:
                    break
                seen.add(state)
            ways = stacks.read(ways, char)
            if not ways and stacks.looked_at <= _EFFORT:
                break
            before = char


def _needs_no_start(name: str, sequences: list[Sequence], begun: set[str]) -> bool:
    """Whether it was read from where others use it: without alternatives, or as a link of {m,n}, which ends in nothing or the next."""
    is_link = "_" in name and not sequences[-1] and name not in sequences[0]
    return is_link or (len(sequences) == 1 and name in begun)


class _Stacks:
    """What is still to be read, as llama.cpp keeps it: a stack of places in sequences. Each is a number here, and 0 has nothing left."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.looked_at = 0
        self.begun: set[str] = set()  # rules of which the first character was read
        self._numbers: dict[tuple[str, int, int, int], int] = {}
        self._stacks: list[tuple[str, int, int, int]] = [("", 0, 0, 0)]  # rule, its sequence, place in that, the stack below
        self._known: dict[int, list[int]] = {}

    def beginnings(self, name: str) -> list[int]:
        """Stacks with characters on top."""
        return list(dict.fromkeys(stack for i in range(len(self.rules[name])) for stack in self._expanded(self._stack(name, i, 0, 0))))

    def read(self, ways: dict[int, int], char: int) -> dict[int, int]:
        """Stacks after a character, and in how many ways each is come to."""
        after: dict[int, int] = {}
        self.looked_at += len(ways)
        for stack, n in ways.items():
            if self.looked_at > _EFFORT:
                break
            if any(low <= char <= high for low, high in self.top(stack)):
                name, i, at, below = self._stacks[stack]
                if not at:
                    self.begun.add(name)
                if self._stacks[below][2] == 1:
                    self.begun.add(self._stacks[below][0])
                for found in self._expanded(self._stack(name, i, at + 1, below)):
                    after[found] = after.get(found, 0) + n
        return after

    def top(self, stack: int) -> Chars:
        name, i, at, _ = self._stacks[stack]
        top = self.rules[name][i][at]
        assert not isinstance(top, str)
        return top

    def _stack(self, name: str, i: int, at: int, below: int) -> int:
        if at == len(self.rules[name][i]):
            return below
        key = (name, i, at, below)
        if key not in self._numbers:
            self._numbers[key] = len(self._stacks)
            self._stacks.append(key)
        return self._numbers[key]

    def _expanded(self, stack: int) -> list[int]:
        """What a stack with a rule on top comes to."""
        if stack not in self._known:
            todo, seen, out = [stack], set(), []
            while todo:
                one = todo.pop()
                if not one or one in seen:
                    continue
                seen.add(one)
                name, i, at, below = self._stacks[one]
                top = self.rules[name][i][at]
                if isinstance(top, str):
                    rest = self._stack(name, i, at + 1, below)
                    todo += (self._stack(top, j, 0, rest) for j in range(len(self.rules[top])))
                else:
                    out.append(one)
            self.looked_at += len(seen)
            self._known[stack] = out
        return self._known[stack]


def _commonest(sets: list[tuple[Chars, int]]) -> int:
    """The character in the most sets, by their weights."""
    ranges = [(low, high + 1, n) for chars, n in sets for low, high in chars if low <= high]
    steps = sorted([*((low, -n) for low, _, n in ranges), *((end, n) for _, end, n in ranges)])
    best, most, now = 0, 0, 0
    for code, weight in steps:
        now -= weight
        if now > most:
            best, most = code, now
    return best


def _rule(name: str) -> str:
    """The rule of a grammar that a rule made here is in."""
    return repr(name.partition("_")[0])
