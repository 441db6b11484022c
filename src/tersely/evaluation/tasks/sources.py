"""Data files -> the items of a task: plain dicts, by sub-task and split.

What cannot be read as an item is counted and reported, never dropped in silence; a file that is no such file at all
is a DataError.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tersely.errors import DataError
from tersely.evaluation.tasks.items import Item, Items, Splits, Tokens

_SHOTS = 4


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
