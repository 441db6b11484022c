"""Which tokens stay whatever a text holds, and which may go though they were added."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tersely.errors import UsageError
from tersely.vocabulary.tokenizer import Vocabulary


def mandatory(vocabulary: Vocabulary, counts: list[int], minimum_count: int) -> set[int]:
    """Ids that stay: of what files name, adds, or is needed to write any text in the letters of what was counted."""
    found = {*vocabulary.added_ids, *vocabulary.named, *vocabulary.atoms}
    if not vocabulary.writes_all:
        used = (i for i, count in enumerate(counts) if count >= minimum_count and i not in vocabulary.added_ids)
        bare = ((vocabulary.tokens[i] or "").removeprefix(vocabulary.prefix) for i in used)
        found |= vocabulary.forms({one for token in bare for one in token.removesuffix(vocabulary.suffix)})
    return found


def sentinel(vocabulary: Vocabulary, counts: list[int], kept: set[int], dropped: set[int]) -> list[int]:
    """Of a unigram model, the piece with the lowest score that costs least; none where one stays anyway."""
    if not vocabulary.scores:
        return []
    lowest = min(vocabulary.scores)
    pieces = [i for i, score in enumerate(vocabulary.scores) if score == lowest]
    if kept.intersection(pieces):
        return []
    pieces = [i for i in pieces if i not in dropped]
    if not pieces:
        raise UsageError("drop: the only pieces with the lowest score cannot all go: unknown text is reckoned from it")
    return [max(pieces, key=lambda i: (counts[i], -i))]


def asked(vocabulary: Vocabulary, keep: Sequence[str]) -> set[int]:
    """The ids of these tokens. UsageError: one that does not exist."""
    unknown = [token for token in keep if token not in vocabulary.ids]
    if unknown:
        raise UsageError(
            f"keep: {unknown[0]!r} is no token; write tokens as the tokenizer does, such as "
            f"{', '.join(repr(token) for token in list(vocabulary.ids)[-3:])}"
        )
    return {vocabulary.ids[token] for token in keep}


def dropped(vocabulary: Vocabulary, drop: Sequence[str]) -> set[int]:
    """The ids of the added tokens that these patterns fit. UsageError: none does, or a file names one."""
    found: set[int] = set()
    added = {str(vocabulary.tokens[i]): i for i in sorted(vocabulary.added_ids)}
    for pattern in drop:
        fitting = re.compile(re.escape(pattern).replace(r"\*", ".*"), re.DOTALL)
        ids = [i for token, i in added.items() if fitting.fullmatch(token)]
        if not ids:
            raise UsageError(f"drop: {pattern!r} is no added token; there are {', '.join(list(added)[:5]) or 'none'}")
        for i in ids:
            if i in vocabulary.named:
                raise UsageError(
                    f"drop: {vocabulary.tokens[i]!r} cannot go: {vocabulary.named[i][0]} names it; take it out there"
                )
        found.update(ids)
    return found
