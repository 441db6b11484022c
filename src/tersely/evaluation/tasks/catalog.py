"""The tasks that come with tersely: what they are called, and where their data lie.

How each is asked stands in the task file of its name beside this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tersely.errors import DataError
from tersely.evaluation.tasks import sources, stretches
from tersely.evaluation.tasks.items import Items, Source, Tokens
from tersely.evaluation.tasks.scores import Kind, TaskInfo


@dataclass(frozen=True)
class Own:
    """A task of tersely's own.

    files: what it reads, from the data folder; of each, the first that exists of the alternatives. metric: the one
    that counts among those of the task file. chance: what guessing gives, where the items do not say it.
    """

    name: str
    title: str
    group: str
    metric: str
    kind: Kind
    read: Source
    files: tuple[tuple[str, ...], ...]
    chance: float | None = None

    @property
    def where(self) -> str:
        """The places of its files, from the data folder."""
        return ", ".join(" or ".join(alternatives) for alternatives in self.files)

    def find(self, data: Path) -> tuple[Path, ...]:
        """Its files. Raises DataError: one is not there."""
        found = []
        for alternatives in self.files:
            place = next((data / name for name in alternatives if (data / name).exists()), None)
            if place is None:
                raise DataError(
                    f"{self.name}: {' or '.join(str(data / name) for name in alternatives)} is not there; "
                    "put the data in that place, or name the folder that has them (--data DIR)"
                )
            found.append(place)
        return tuple(found)

    def info(self, data: Path | None) -> TaskInfo:
        """As an entry of a listing. Data that cannot be read count as not found."""
        count = None
        try:
            if data is not None:
                count = self.items(data, None).count
        except DataError:
            data = None
        return TaskInfo(self.name, self.title, self.group, self.metric, count or None, data is not None, self.where)

    def items(self, data: Path, tokens: Tokens | None) -> Items:
        """Read its data. Raises DataError: missing, or not in the form that is expected."""
        try:
            return self.read(self.find(data), tokens)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.name}: {self.where} in {data} does not have the form that is expected "
                f"({type(error).__name__}: {error}); fetch it again"
            ) from error


def _choices(name: str, title: str, file: str) -> Own:
    return Own(name, title, "commonsense", "acc", "right", sources.questions, ((f"commonsense/{file}.json",),))


OWN = (
    Own("blimp", "BLiMP: which sentence is grammatical", "grammar", "acc", "right", sources.blimp, (("blimp",),)),
    Own(
        "lambada",
        "LAMBADA: the last word of a passage",
        "language",
        "acc",
        "right",
        sources.lambada,
        (("lambada/test.jsonl",),),
        chance=0.0,
    ),
    Own(
        "mmlu", "MMLU: exams in 57 subjects", "knowledge", "acc", "right", sources.mmlu, (("mmlu/test",), ("mmlu/dev",))
    ),
    _choices("arc_easy", "ARC Easy: school science", "ARC-Easy"),
    _choices("arc_challenge", "ARC Challenge: harder school science", "ARC-Challenge"),
    _choices("piqa", "PIQA: how things are done", "piqa"),
    _choices("openbookqa", "OpenBookQA: elementary facts applied", "openbookqa"),
    Own(
        "boolq",
        "BoolQ without its passages: yes or no",
        "knowledge",
        "acc",
        "right",
        sources.boolq,
        (("commonsense/boolq.json",),),
    ),
    Own(
        "winogrande",
        "WinoGrande: whom a sentence means",
        "commonsense",
        "acc",
        "right",
        sources.winogrande,
        (("commonsense/winogrande.json",),),
    ),
    _choices("social_iqa", "Social IQa: what people do and feel", "social_i_qa"),
    Own(
        "gsm8k",
        "GSM8K: school mathematics in words",
        "arithmetic",
        "exact_match",
        "right",
        sources.gsm8k,
        (("gsm8k/test.jsonl",), ("gsm8k/train.jsonl",)),
        chance=0.0,
    ),
    Own(
        "svamp",
        "SVAMP: short arithmetic problems",
        "arithmetic",
        "exact_match",
        "right",
        sources.problems,
        (("commonsense/SVAMP.json",),),
        chance=0.0,
    ),
    Own(
        "multiarith",
        "MultiArith: arithmetic in several steps",
        "arithmetic",
        "exact_match",
        "right",
        sources.problems,
        (("commonsense/MultiArith.json",),),
        chance=0.0,
    ),
    Own(
        "xquad",
        "XQuAD: answers that stand in a paragraph, in ten languages",
        "reading",
        "f1",
        "score",
        sources.xquad,
        (("xquad",),),
        chance=0.0,
    ),
    Own(
        "retrieval",
        "In-context retrieval: questions with open and closed book",
        "reading",
        "f1",
        "score",
        sources.retrieval,
        (("xquad/xquad.en.json",),),
        chance=0.0,
    ),
    Own(
        "summarization",
        "In-context summarization of news",
        "reading",
        "rougeL",
        "score",
        sources.summaries,
        (("spec-prompts/sum/question.jsonl",),),
        chance=0.0,
    ),
    Own(
        "needle",
        "Needle in a haystack, by length",
        "long context",
        "acc",
        "right",
        stretches.needle,
        (("needle/haystack.txt", "books/valid.txt"),),
    ),
    Own(
        "memorization",
        "Min-K% Prob: is training text told from other text",
        "memorization",
        "auc",
        "auc",
        stretches.windows,
        (("memorization/members.txt", "books/train.txt"), ("memorization/others.txt", "books/valid.txt")),
        chance=0.5,
    ),
)
"""In the order in which they are listed."""
