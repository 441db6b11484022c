"""Data files -> the items of a task: plain dicts, by sub-task and split.

What cannot be read as an item is counted and reported, never dropped in silence; a file that is no such file at all
is a DataError.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersely.calibrate import read_text
from tersely.errors import DataError

Item = dict[str, Any]
Splits = Mapping[str, Sequence[Item]]
"""`test`: what is asked; `shots`: examples that stand before each question."""

_SHOTS = 4
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


@dataclass(frozen=True)
class Tokens:
    """What tasks that are cut to a length ask of a model: its tokenizer, and how many positions all models have."""

    tokenizer: Any
    positions: int


@dataclass(frozen=True)
class Items:
    """Of one task. parts: sub-task -> its items, in order; a single one is named "". notes: what could not be read."""

    parts: Mapping[str, Splits]
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Items that can be asked."""
        return sum(len(splits["test"]) for splits in self.parts.values())


Source = Callable[[Sequence[Path], Tokens | None], Items]
"""From the files of a task and what the models allow. Raises DataError: not the files that were expected."""


def blimp(files: Sequence[Path], _tokens: Tokens | None) -> Items:
    """Pairs of sentences that differ in one point of grammar, by phenomenon."""
    parts, bad = {}, 0
    for file in _inside(files[0], "*.jsonl"):
        items = []
        for record in _lines(file):
            pair = [record.get("sentence_good"), record.get("sentence_bad")]
            if all(isinstance(text, str) and text.strip() for text in pair):
                items.append({"choices": pair, "answer": 0})
            else:
                bad += 1
        parts[file.stem] = {"test": items}
    return _items(files[0], parts, bad, "without sentence_good and sentence_bad")


def lambada(files: Sequence[Path], _tokens: Tokens | None) -> Items:
    """Passages without their last word."""
    items, bad = [], 0
    for record in _lines(files[0]):
        text = record.get("text")
        begin, space, word = text.strip().rpartition(" ") if isinstance(text, str) else ("", "", "")
        if begin.strip() and word:
            items.append({"passage": begin, "word": space + word})
        else:
            bad += 1
    return _items(files[0], {"": {"test": items}}, bad, "without a text of two words")


def mmlu(files: Sequence[Path], _tokens: Tokens | None) -> Items:
    """Questions by subject, with the five examples of the subject's dev file."""
    asked, shown = files
    parts, bad = {}, 0
    for file in _inside(asked, "*_test.csv"):
        subject = file.stem.removesuffix("_test")
        dev = shown / f"{subject}_dev.csv"
        if not dev.is_file():
            raise DataError(f"mmlu: {file.name} has no examples beside it; {dev} is expected")
        items, wrong = _mmlu_rows(file, subject)
        shots, _ = _mmlu_rows(dev, subject)
        if len(shots) < 5:
            raise DataError(f"{dev}: {len(shots)} examples can be read of it; 5 are needed")
        parts[subject] = {"test": items, "shots": shots}
        bad += wrong
    return _items(files[0], parts, bad, "that are not a question, four choices and one of A, B, C and D")


def _mmlu_rows(file: Path, subject: str) -> tuple[list[Item], int]:
    items, bad = [], 0
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            for row in csv.reader(lines):
                if len(row) == 6 and row[5].strip() in tuple("ABCD"):
                    question, *choices, letter = (cell.strip() for cell in row)
                    items.append(
                        {
                            "subject": subject.replace("_", " "),
                            "question": question,
                            "options": choices,
                            "answer": "ABCD".index(letter),
                        }
                    )
                else:
                    bad += 1
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read as CSV ({error}); fetch it again") from error
    return items, bad


def questions(files: Sequence[Path], _tokens: Tokens | None) -> Items:
    """Questions with choices that stand in the text of an instruction.

    The form: `Please ...: QUESTION`, then each choice behind its label (`Answer1:`, `Solution1:`), then
    `Answer format: answer1/answer2`; the answer is one of these names.
    """
    items, bad = [], 0
    for record in _records(files[0]):
        read = _instruction(record)
        if read is None:
            bad += 1
        else:
            question, choices, answer = read
            items.append({"question": question, "choices": choices, "answer": answer})
    return _items(files[0], {"": {"test": items}}, bad, "whose question, choices and answer are not in their places")


def winogrande(files: Sequence[Path], _tokens: Tokens | None) -> Items:
    """Sentences with a gap: the choices are their beginnings with each option in the gap, `ending` is what follows."""
    items, bad = [], 0
    for record in _records(files[0]):
        read = _instruction(record)
        if read is None or read[0].count("_") != 1 or not read[0].partition("_")[2].strip():
            bad += 1
            continue
        sentence, options, answer = read
        begin, _, ending = sentence.partition("_")
        items.append({"choices": [begin + option for option in options], "ending": ending.strip(), "answer": answer})
    return _items(files[0], {"": {"test": items}}, bad, "without one gap, its options and its answer")


def boolq(files: Sequence[Path], _tokens: Tokens | None) -> Items:
    """Questions to be answered by yes or no; the data has them without the passages that they were asked about."""
    form = re.compile(r"(?s)Please answer [^:]*question: *(?P<question>.+?)\?*\s+Answer format: true/false\s*")
    items, bad = [], 0
    for record in _records(files[0]):
        read = form.fullmatch(str(record.get("instruction")))
        if read is None or record.get("answer") not in ("true", "false"):
            bad += 1
        else:
            question = read["question"].strip()
            items.append(
                {"question": f"{question[:1].upper()}{question[1:]}?", "answer": int(record["answer"] == "true")}
            )
    return _items(files[0], {"": {"test": items}}, bad, "that are no question with true or false for an answer")


def _instruction(record: Item) -> tuple[str, list[str], int] | None:
    text, answer = record.get("instruction"), record.get("answer")
    if not isinstance(text, str) or not text.startswith("Please "):
        return None
    body, found, form = text.rpartition("Answer format:")
    labels = form.strip().split("/")
    question, places = body.partition(": ")[2], []
    for label in labels:
        marker = f"{label.capitalize()}:"
        if not found or not label or question.count(marker) != 1:
            return None
        places.append((question.index(marker), len(marker)))
    if len(labels) < 2 or answer not in labels or places != sorted(places):
        return None
    ends = [place for place, _ in places[1:]] + [len(question)]
    choices = [question[place + length : end].strip() for (place, length), end in zip(places, ends, strict=True)]
    asked = question[: places[0][0]].strip()
    return (asked, choices, labels.index(answer)) if asked and all(choices) else None


def gsm8k(files: Sequence[Path], _tokens: Tokens | None) -> Items:
    """School problems, with worked examples from the train file."""
    splits: dict[str, list[Item]] = {}
    bad = 0
    for split, file in zip(("test", "shots"), files, strict=True):
        splits[split] = []
        for record in _lines(file):
            question, answer = record.get("question"), record.get("answer")
            value = _number(answer.rpartition("####")[2]) if isinstance(answer, str) else None
            if not isinstance(question, str) or value is None or not isinstance(answer, str):
                bad += 1
                continue
            worked = re.sub(r"<<[^<>]*>>", "", answer)
            splits[split].append({"question": question.strip(), "solution": worked, "number": value})
            if split == "shots" and len(splits[split]) == 5:
                break
    if len(splits["shots"]) < 5:
        raise DataError(f"{files[1]}: {len(splits['shots'])} worked examples can be read of it; 5 are needed")
    return _items(files[0], {"": splits}, bad, "without a question and an answer that ends in #### and a number")


def problems(files: Sequence[Path], _tokens: Tokens | None) -> Items:
    """Short arithmetic problems; the first four are the examples and are not asked."""
    items, bad = [], 0
    for record in _records(files[0]):
        question, value = record.get("instruction"), _number(str(record.get("answer")))
        if isinstance(question, str) and question.strip() and value is not None:
            items.append({"question": question.strip(), "solution": f"The answer is {value:.15g}.", "number": value})
        else:
            bad += 1
    if len(items) <= _SHOTS:
        raise DataError(f"{files[0]}: {len(items)} problems can be read of it; more than {_SHOTS} are needed")
    return _items(
        files[0], {"": {"test": items[_SHOTS:], "shots": items[:_SHOTS]}}, bad, "without a question and a number"
    )


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", "").replace("$", "").strip())
    except ValueError:
        return None


def xquad(files: Sequence[Path], _tokens: Tokens | None) -> Items:
    """Questions on a paragraph, by language."""
    parts, bad = {}, 0
    for file in _inside(files[0], "xquad.*.json"):
        language = file.name.split(".")[1]
        items, wrong = _squad(file, language)
        parts[language] = {"test": items}
        bad += wrong
    return _items(files[0], parts, bad, "without a question and an answer")


def retrieval(files: Sequence[Path], _tokens: Tokens | None) -> Items:
    """The same English questions with the paragraph (open book) and without it (closed book)."""
    items, bad = _squad(files[0], "en")
    closed = [{**item, "context": ""} for item in items]
    return _items(
        files[0],
        {"open book": {"test": items}, "closed book": {"test": closed}},
        bad,
        "without a question and an answer",
    )


def _squad(file: Path, language: str) -> tuple[list[Item], int]:
    data = _json(file)
    paragraphs = [
        paragraph
        for article in (data.get("data") if isinstance(data, dict) else None) or ()
        for paragraph in article["paragraphs"]
    ]
    items, bad = [], 0
    for paragraph in paragraphs:
        for asked in paragraph.get("qas", ()):
            answers = [a["text"] for a in asked.get("answers", ()) if a.get("text", "").strip()]
            if asked.get("question", "").strip() and answers:
                items.append(
                    {
                        "context": paragraph["context"].strip(),
                        "question": asked["question"].strip(),
                        "answers": answers,
                        "language": language,
                    }
                )
            else:
                bad += 1
    return items, bad


def summaries(files: Sequence[Path], _tokens: Tokens | None) -> Items:
    """News with the summary that its readers got."""
    items, bad = [], 0
    for record in _lines(files[0]):
        turns, reference = record.get("turns") or [""], record.get("reference") or [""]
        article = str(turns[0]).removeprefix("Summarize:").strip()
        if article and str(reference[0]).strip():
            items.append({"article": article, "reference": str(reference[0]).strip()})
        else:
            bad += 1
    return _items(files[0], {"": {"test": items}}, bad, "without a text and a reference")


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


def _items(place: Path, parts: Mapping[str, Splits], bad: int, what: str) -> Items:
    made = Items(parts, (f"{bad} records {what} were left out",) if bad else ())
    if not made.count:
        raise DataError(f"{place}: no items can be read of it; it has {bad} records {what}")
    return made


def _inside(folder: Path, pattern: str) -> list[Path]:
    files = sorted(folder.glob(pattern))
    if not files:
        raise DataError(f"{folder}: no {pattern} in it")
    return files


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error}); fetch it again") from error


def _json(file: Path) -> Any:
    try:
        return json.loads(_read(file))
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); fetch it again") from error


def _records(file: Path) -> list[Item]:
    data = _json(file)
    if not isinstance(data, list) or not all(isinstance(record, dict) for record in data):
        raise DataError(f"{file}: expected a JSON list of objects; fetch it again")
    return data


def _lines(file: Path) -> Iterable[Item]:
    for number, line in enumerate(_read(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}: line {number} is not JSON ({error}); fetch it again") from error
        if not isinstance(record, dict):
            raise DataError(f"{file}: line {number} is not a JSON object; fetch it again")
        yield record
