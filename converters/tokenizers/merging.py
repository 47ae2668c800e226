"""Merges by rank and merges by score: one order of merging, told in two ways.

The `tokenizers` library merges the pair of neighbours that comes first in a list of pairs. llama.cpp's sentencepiece tokenizer knows
no pairs: it merges the two neighbours whose joined spelling is the token of the highest score. Ties go to the leftmost in both.

From rank to score. Call a token *whole* when merging its own spelling, alone, ends in this one token. Merges inside a stretch of text
that no merge has crossed run as they would alone, so a whole token is always made from the same last pair, and a token that is not
whole is never made. Hence, if every token that can be made scores by the rank of its last pair, both ways merge the same neighbours
in the same order - unless two neighbours that stay apart happen to spell a token that is not whole. Such tokens are looked for.

From score to rank. Every way to split a token into two tokens is a pair, ordered by score. Tokens that tie would be merged leftmost
first by score but by rank one after the other; that can be told in ranks only for runs of one character (Llama's runs of spaces),
which grow from the left when longer ones come first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

from edgeq.errors import TokenizerError

Pair = tuple[str, str]


def token_scores(pairs: Sequence[Pair]) -> dict[str, float]:
    """Score of every token that a pair makes: minus the rank of the pair that makes it last when it is merged alone."""
    ranks_of: defaultdict[str, list[int]] = defaultdict(list)
    for rank, (left, right) in enumerate(pairs):
        ranks_of[left + right].append(rank)
    ranks: dict[Pair, int] = {}
    scores = {}
    for token, found in ranks_of.items():
        rank = found[0]
        if found[-1] - rank >= len(found):  # pairs of other tokens come in between, so it matters which pair is the last
            if not ranks:
                ranks = {pair: i for i, pair in enumerate(pairs)}
            rank = _last_rank(token, ranks, default=rank)
        scores[token] = -float(rank)
    return scores


def _last_rank(token: str, ranks: Mapping[Pair, int], default: int) -> int:
    """Rank of the last merge when a token is merged alone; default when that does not end in one token."""
    parts, last = list(token), default
    while len(parts) > 1:
        found = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not found:
            return default
        last, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return last


def ranked_pairs(scores: Mapping[str, float], *, ordinary: Collection[str], never_made: Collection[str] = (), where: str) -> list[Pair]:
    """Pairs in the order in which merging by score takes them.

    scores: by token, all tokens. ordinary: those among which a tie would matter; special ones may tie, for their spellings do not overlap.
    never_made: tokens that are found in a text before anything merges. Raises TokenizerError naming `where` when ordinary tokens tie
    that cannot be told apart by rank.
    """
    splits = {
        token: [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in scores and token[i:] in scores]
        for token in scores
        if token not in never_made
    }
    made = [token for token, pairs in splits.items() if pairs]
    _check_ties([token for token in made if token in ordinary], scores, where)
    made.sort(key=lambda token: (-scores[token], -len(token)))
    return [pair for token in made for pair in splits[token]]


def _check_ties(tokens: Iterable[str], scores: Mapping[str, float], where: str) -> None:
    by_score: dict[float, str] = {}
    for token in tokens:
        other = by_score.setdefault(scores[token], token)
        if other != token and (set(other) != set(token) or len(set(token)) > 1):
            raise TokenizerError(
                f"{where}: tokens {other!r} and {token!r} have the same score, so their merges have no order. The file was converted "
                "without the model's scores; convert it again, or use the Hugging Face folder it was made from."
            )
