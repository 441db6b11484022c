"""Items that are cut from a text, by tokens: haystacks that hide a needle, and windows."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tersely.calibrate import read_text
from tersely.errors import DataError
from tersely.evaluation.tasks.items import Item, Items, Splits, Tokens

_VALUES = (
    "amber",
    "anchor",
    "basket",
    "candle",
    "copper",
    "dragon",
    "feather",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "lemon",
    "marble",
    "mirror",
    "needle",
    "orchid",
    "pepper",
    "pillow",
    "rabbit",
    "ribbon",
    "saddle",
    "silver",
    "spider",
    "thunder",
    "tiger",
    "velvet",
    "violin",
    "walnut",
)
_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_NEEDLES = 20
"""For each length and depth."""
_SHORTEST, _LONGEST = 128, 8192
_HAY = 4_000_000
"""Characters of a text that haystacks are cut from."""
_JOINTS = 8
"""Tokens that the joints of text, needle and question may cost."""
_CHARACTERS_A_TOKEN = 8
"""More than most texts have, on average."""
_WINDOWS, _WINDOW = 500, 128
_SEED = 20  # of the data that are made: they stay the same whichever items are drawn


def needle(files: Sequence[Path], tokens: Tokens | None) -> Items:
    """One sentence with a secret word, at some depth of a stretch of a text, and the question for the word.

    Lengths are powers of two of tokens, from 128 to what the models have positions for, at most 8192; depths are 0 to 1
    in quarters; twenty items for each. The stretch has none of the words that are the choices.
    Without `tokens` nothing is made: the text is only looked at.
    """
    text = read_text(files[0])[:_HAY]
    if tokens is None:
        return Items({"": {"test": ()}})
    lengths = [n for n in (2**k for k in range(7, 14)) if _SHORTEST <= n <= min(tokens.positions, _LONGEST)]
    if not lengths:
        if tokens.positions < 48:
            raise DataError(f"needle: {tokens.positions} positions hold no haystack; leave this task out")
        lengths = [tokens.positions]
    spans = _spans(tokens.tokenizer, text)
    draw = random.Random(_SEED)
    parts: dict[str, Splits] = {}
    short = []
    for length in lengths:
        made = [
            _haystack(text, spans, tokens.tokenizer, length, depth, draw) for depth in _DEPTHS for _ in range(_NEEDLES)
        ]
        items = [item for item in made if item is not None]
        if items:
            parts[f"{length} tokens"] = {"test": items}
        else:
            short.append(length)
    if not parts:
        raise DataError(f"{files[0]}: no haystack of {lengths[-1]} tokens can be cut from it; give a longer text")
    notes = [f"{n} tokens: too few for the question, or too many for {files[0].name}" for n in short]
    if tokens.positions >= 2 * _LONGEST:
        notes.append(f"haystacks end at {_LONGEST} tokens; the models have {tokens.positions} positions")
    return Items(parts, tuple(notes))


def _haystack(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: Any, length: int, depth: float, draw: random.Random
) -> Item | None:
    values = draw.sample(_VALUES, 4)
    answer = draw.randrange(4)
    hidden = f"The secret word of the old harbour is {values[answer]}."
    question = "Question: What is the secret word of the old harbour?\nAnswer: The secret word of the old harbour is"
    room = length - len(_spans(tokenizer, f"{hidden}\n\n{question} {values[answer]}")) - _JOINTS
    if room < 8 or len(spans) < room:
        return None
    first = draw.randrange(len(spans) - room + 1)
    pieces = re.findall(r"\S+\s*", text[spans[first][0] : spans[first + room - 1][1]])[1:-1]
    pieces = [piece for piece in pieces if not any(value in piece.lower() for value in values)]
    place = round(depth * len(pieces))
    before, after = "".join(pieces[:place]).rstrip(), "".join(pieces[place:]).rstrip()
    body = "\n".join(piece for piece in (before, hidden, after) if piece)
    return {"haystack": body, "question": question, "choices": values, "answer": answer}


def windows(files: Sequence[Path], tokens: Tokens | None) -> Items:
    """Stretches of equal length of two texts, evenly spaced: what the model may have seen, and what it has not."""
    texts = [read_text(file) for file in files]
    if tokens is None:
        return Items({"members": {"test": ()}, "others": {"test": ()}})
    length = min(_WINDOW, tokens.positions)
    parts: dict[str, Splits] = {}
    for part, file, text in zip(("members", "others"), files, texts, strict=True):
        items = [
            {"text": stretch, "tokens": length, "member": int(part == "members")}
            for stretch in _stretches(text, tokens.tokenizer, length)
        ]
        if len(items) < 2:
            raise DataError(f"{file}: {len(items)} stretches of {length} tokens in it; give a longer text")
        parts[part] = {"test": items}
    return Items(parts)


def _stretches(text: str, tokenizer: Any, length: int) -> Iterable[str]:
    """Of one token more than asked for: where the last one ends is not certain when the text goes on."""
    reach = _CHARACTERS_A_TOKEN * length
    count = max(1, min(_WINDOWS, len(text) // reach))
    for i in range(count):
        begin = i * len(text) // count
        if begin:
            begin = text.find(" ", begin) + 1
        piece = text[begin : begin + reach].lstrip()
        spans = _spans(tokenizer, piece)
        if len(spans) > length:
            yield piece[: spans[length][1]]


def _spans(tokenizer: Any, text: str) -> Sequence[tuple[int, int]]:
    """First character, and the one behind the last, of every token."""
    spans: Sequence[tuple[int, int]] = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return spans
