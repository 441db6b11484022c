"""Tasks: the harness's numbers, the same items for every model, nothing fetched, nothing dropped in silence."""

from __future__ import annotations

import copy
import csv
import json
import math
import random
import socket
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from tersely.errors import CheckpointError, DataError, UsageError
from tersely.evaluation.tasks import (
    TaskScores,
    budget,
    check_tasks,
    grading,
    harness,
    records,
    run_tasks,
    running,
    task_names,
)
from tersely.evaluation.tasks.answers import Answers
from tersely.evaluation.tasks.catalog import OWN
from tersely.evaluation.tasks.harness import Prepared
from tersely.evaluation.tasks.items import Tokens
from tersely.runtime import Loaded, load_model, load_tokenizer

from .tiny import tiny
from .tokens import WORDS, write_tokenizer

POSITIONS = 512
NAMES = [own.name for own in OWN]
CHOICE = ("arc_easy", "arc_challenge", "piqa", "openbookqa", "social_iqa")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: object, **_settings: object) -> None:
        raise AssertionError(f"the network was asked for {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# Made-up data in the layouts that the tasks read.


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def instruction(question: str, choices: list[str], answer: int, label: str = "answer") -> dict[str, str]:
    stated = " ".join(f"{label.capitalize()}{i}: {choice}" for i, choice in enumerate(choices, 1))
    names = "/".join(f"{label}{i}" for i in range(1, len(choices) + 1))
    return {
        "instruction": f"Please choose the correct answer to the question: {question}\n\n{stated}\n\n"
        f"Answer format: {names}",
        "answer": f"{label}{answer + 1}",
    }


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")


def write_lines(file: Path, records: list[Any]) -> None:
    write(file, "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n")


def write_data(folder: Path) -> Path:
    draw = random.Random(0)
    for part in ("agreement", "islands", "irregular_forms"):
        pairs = [{"sentence_good": words(draw, 5), "sentence_bad": words(draw, 5)} for _ in range(8)]
        write_lines(folder / "blimp" / f"{part}.jsonl", pairs)
    write_lines(folder / "lambada/test.jsonl", [{"text": words(draw, 12)} for _ in range(9)])
    for split, rows in (("test", 6), ("dev", 5)):
        for subject in ("old_trees", "small_dogs"):
            file = folder / "mmlu" / split / f"{subject}_{split}.csv"
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w", encoding="utf-8", newline="") as out:
                for _ in range(rows):
                    csv.writer(out).writerow([words(draw, 4), *draw.sample(WORDS, 4), draw.choice("ABCD")])
    files = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "social_iqa": "social_i_qa"}
    for name in CHOICE:
        counts = [2 if name == "piqa" else 3 + i % 2 for i in range(9)]
        label = "solution" if name == "piqa" else "answer"
        records = [
            instruction(words(draw, 6) + "?", [words(draw, 2) for _ in range(n)], draw.randrange(n), label)
            for n in counts
        ]
        write(folder / "commonsense" / f"{files.get(name, name)}.json", json.dumps(records))
    asked = "Please answer the following question with true or false, question: {}?\n\nAnswer format: true/false"
    yes = [{"instruction": asked.format(words(draw, 5)), "answer": draw.choice(["true", "false"])} for _ in range(9)]
    write(folder / "commonsense/boolq.json", json.dumps(yes))
    gaps = [
        instruction(f"{words(draw, 3)} _ {words(draw, 2)}.", draw.sample(WORDS, 2), i % 2, "option") for i in range(9)
    ]
    write(folder / "commonsense/winogrande.json", json.dumps(gaps))
    for name in ("SVAMP", "MultiArith"):
        sums = [{"instruction": f"{words(draw, 4)} {i} and 2?", "answer": f"{i + 2}.0"} for i in range(9)]
        write(folder / f"commonsense/{name}.json", json.dumps(sums))
    solved = [
        {"question": words(draw, 5), "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"} for i in range(9)
    ]
    for split in ("test", "train"):
        write_lines(folder / f"gsm8k/{split}.jsonl", solved)
    for language in ("en", "zh"):
        asked_of = [{"question": words(draw, 3) + "?", "answers": [{"text": words(draw, 2)}]} for _ in range(5)]
        paragraphs = [{"context": words(draw, 15), "qas": asked_of}]
        write(folder / f"xquad/xquad.{language}.json", json.dumps({"data": [{"paragraphs": paragraphs}]}))
    news = [{"turns": [f"Summarize: {words(draw, 30)}"], "reference": [words(draw, 6)]} for _ in range(7)]
    write_lines(folder / "spec-prompts/sum/question.jsonl", news)
    for name, size in (("train", 9000), ("valid", 9000)):
        write(folder / f"books/{name}.txt", words(draw, size))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def loaded(folder: Path, name: str) -> Loaded:
    return Loaded(name, load_model(folder, dtype=torch.float32), load_tokenizer(folder), "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Loaded]:
    made = []
    for seed in (0, 1):
        folder = tiny(
            "llama", tmp_path_factory.mktemp(f"model{seed}"), seed=seed, blocks=1, max_position_embeddings=POSITIONS
        )
        made.append(loaded(write_tokenizer(folder), f"model {seed}"))
    return made


@pytest.fixture(scope="module")
def everything(models: list[Loaded], data: Path) -> dict[str, TaskScores]:
    scores, _ = run_tasks(models, NAMES, data=data, limit=6)
    return {each.name: each for each in scores}


def reader(model: Loaded, answers: dict[str, bytes] | None = None, tokens: int = 4096) -> Answers:
    return Answers(
        model, tokens_per_batch=tokens, answers={} if answers is None else answers, seed=0, errors=sys.stderr
    )


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


# The tasks that come with tersely.


def test_every_task_has_a_task_file_and_every_task_file_a_task() -> None:
    files = {path.stem for path in Path(harness.__file__).parent.glob("*.yaml")}
    assert files == set(NAMES)
    assert len(NAMES) == len(set(NAMES))


def test_every_task_is_on_the_page_about_tasks() -> None:
    page = Path(__file__).parents[1].joinpath("docs", "tasks.md").read_text("utf-8")
    assert not [name for name in NAMES if f"`{name}`" not in page]


@pytest.mark.parametrize("name", NAMES)
def test_a_task_scores_every_model_on_the_same_items(everything: dict[str, TaskScores], name: str) -> None:
    scores = everything[name]
    items = len(scores.parts)
    assert items == min(6, scores.available)
    assert [len(each) for each in scores.scores] == [items, items]
    assert len(scores.sha256) == 64
    assert len(scores.harness) == 2
    assert scores.higher_is_better
    if scores.kind == "right":
        assert {score for each in scores.scores for score in each} <= {0.0, 1.0}
        assert scores.chance is not None
        for own, theirs in zip(scores.scores, scores.harness, strict=True):
            assert theirs[f"{scores.metric},none"] == pytest.approx(sum(own) / items)
    if scores.kind == "auc":
        assert scores.labels is not None
        assert sum(scores.labels) == items // 2


@pytest.mark.parametrize("name", [*CHOICE, "blimp", "mmlu", "boolq", "winogrande", "needle"])
def test_the_probabilities_of_choices_lead_to_the_scores(everything: dict[str, TaskScores], name: str) -> None:
    scores = everything[name]
    assert scores.choices is not None
    assert scores.answers is not None
    for right, chosen in zip(scores.scores, scores.choices, strict=True):
        for score, shares, answer in zip(right, chosen, scores.answers, strict=True):
            assert sum(shares) == pytest.approx(1.0)
            assert score == float(shares.index(max(shares)) == answer)
    chances = [1 / len(shares) for shares in scores.choices[0]]
    assert scores.chance == pytest.approx(sum(chances) / len(chances))


@pytest.mark.parametrize("name", ["lambada", "gsm8k", "xquad", "summarization", "memorization"])
def test_a_task_without_choices_has_no_probabilities_of_choices(everything: dict[str, TaskScores], name: str) -> None:
    assert everything[name].choices is None
    assert everything[name].answers is None


def test_sub_tasks_are_parts(everything: dict[str, TaskScores]) -> None:
    assert set(everything["blimp"].parts) == {"agreement", "irregular_forms", "islands"}
    assert set(everything["mmlu"].parts) == {"old_trees", "small_dogs"}
    assert set(everything["xquad"].parts) == {"en", "zh"}
    assert set(everything["retrieval"].parts) == {"open book", "closed book"}
    assert set(everything["needle"].parts) <= {"128 tokens", "256 tokens", "512 tokens"}
    assert set(everything["piqa"].parts) == set(everything["memorization"].parts) == {""}


def test_the_listing_says_what_is_there_and_where_the_rest_belongs(data: Path, tmp_path: Path) -> None:
    there = {info.name: info for info in task_names(data)}
    assert list(there) == NAMES
    assert all(info.found for info in there.values())
    assert there["blimp"].items == 24
    assert there["svamp"].items == 5  # four of nine are the examples
    assert there["needle"].items is None
    for folder in (tmp_path, None):
        for info in task_names(folder):
            assert (info.found, info.items) == (False, None)
            assert info.where


# The harness's numbers.


def simple(task: Prepared, chosen: Mapping[str, list[int]], model: Loaded) -> dict[str, Any]:
    """What the harness gives with its own model class."""
    with harness.silence():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        own: Any = HFLM(pretrained=model.network, tokenizer=model.tokenizer, batch_size=3)
        results: dict[str, Any] = simple_evaluate(
            own,
            tasks=[task.tasks[name] for name in chosen],
            samples=dict(chosen),
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
    return results


@pytest.mark.parametrize("name", ["blimp", "lambada", "mmlu", "piqa", "winogrande", "svamp", "retrieval"])
def test_our_answers_are_those_of_the_harness_own_model_class(models: list[Loaded], data: Path, name: str) -> None:
    model = replace(models[0], tokenizer=copy.deepcopy(models[0].tokenizer))  # the harness gives it a padding token
    task = harness.prepare(name, data, Tokens(model.tokenizer, POSITIONS))
    asked = budget.Asked(task, running._order(task, 3), 5, count=5)
    ours = records.samples(task, running._harness_run(asked, reader(model, tokens=256)))
    theirs = records.samples(task, simple(task, running._chosen(asked), model))
    assert len(ours) == len(theirs) == 5
    for (_, one), (_, other) in zip(ours, theirs, strict=True):
        assert one["arguments"] == other["arguments"]
        for mine, own in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            if isinstance(mine, str):
                assert mine == own
            else:
                assert mine[0] == pytest.approx(own[0], abs=1e-4)
                assert mine[1] == own[1]
        for metric in set(one["metrics"]) - {"perplexity"}:
            assert one[metric] == other[metric]


def test_long_texts_run_in_windows_as_the_harness_has_them(models: list[Loaded]) -> None:
    model = replace(models[0], tokenizer=copy.deepcopy(models[0].tokenizer))
    draw = random.Random(5)
    texts = [words(draw, 3), words(draw, 700), "cat"]
    with harness.silence():
        from lm_eval.models.huggingface import HFLM

        own: Any = HFLM(pretrained=model.network, tokenizer=model.tokenizer, batch_size=1)
        expected = own.loglikelihood_rolling(requests(*[(text,) for text in texts]))
    assert reader(model).loglikelihood_rolling(requests(*[(text,) for text in texts])) == pytest.approx(
        expected, rel=1e-6, abs=1e-4
    )


def test_a_shared_beginning_runs_once_and_changes_nothing(models: list[Loaded]) -> None:
    draw = random.Random(2)
    begin = words(draw, 60)
    pairs = [(f"{begin} {words(draw, 3)}", f" {word}") for word in WORDS[:12]] + [("the cat", " sat on"), ("", "red")]
    shared, alone = reader(models[0]), reader(models[0])
    alone.likelihoods.shares = False
    seen: list[int] = []
    with models[0].network.register_forward_pre_hook(
        lambda _module, _args, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    ):
        together = shared.loglikelihood(requests(*pairs))
        tokens = sum(seen)
        seen.clear()
        apart = alone.loglikelihood(requests(*pairs))
    assert shared.likelihoods.shares is True
    assert tokens < sum(seen) / 3
    for (one, greedy), (other, as_well) in zip(together, apart, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
        assert greedy == as_well


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mamba", {"state_size": 4}),
        (
            "lfm2",
            {"num_attention_heads": 2, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
        ),
    ],
)
def test_a_state_that_is_not_keys_and_values_is_not_shared(
    kind: str, settings: dict[str, Any], models: list[Loaded]
) -> None:
    network = models[0].network
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=network.config.vocab_size, hidden_size=32, num_hidden_layers=2, **settings
    )
    torch.manual_seed(0)
    made: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    own = reader(replace(models[0], network=made.eval()))
    draw = random.Random(2)
    begin = words(draw, 60)
    pairs = [(f"{begin} {words(draw, 3)}", f" {word}") for word in WORDS[:12]]
    together = own.loglikelihood(requests(*pairs))
    assert own.likelihoods.shares is False
    for (one, _), pair in zip(together, pairs, strict=True):
        ((other, _),) = own.loglikelihood(requests(pair))
        assert one == pytest.approx(other, abs=1e-4)


def test_a_micro_batch_holds_no_more_tokens_than_allowed(models: list[Loaded]) -> None:
    draw = random.Random(4)
    pairs = [(words(draw, draw.randrange(1, 25)), " " + words(draw, draw.randrange(1, 4))) for _ in range(40)]
    sizes: list[int] = []
    with models[0].network.register_forward_pre_hook(
        lambda _module, _args, given: sizes.append(given["input_ids"].numel()), with_kwargs=True
    ):
        reader(models[0], tokens=128).loglikelihood(requests(*pairs))
    assert len(sizes) > 1
    assert max(sizes) <= 128


# Which items.


def test_a_larger_sample_contains_the_smaller_and_is_spread_over_the_parts(models: list[Loaded], data: Path) -> None:
    task = harness.prepare("blimp", data, Tokens(models[0].tokenizer, POSITIONS))
    order = running._order(task, 0)
    assert len(order) == len(set(order)) == 24
    for count in range(3, 24, 3):
        found = [name for name, _ in order[:count]]
        assert {found.count(name) for name in task.tasks} == {count // 3}
    assert running._order(task, 1) != order == running._order(task, 0)


def test_other_items_have_another_name_and_the_same_items_the_same(models: list[Loaded], data: Path) -> None:
    first, again, other = (run_tasks(models[:1], ["blimp"], data=data, limit=4, seed=seed)[0][0] for seed in (0, 0, 1))
    assert first == again
    assert first.sha256 != other.sha256


def test_a_model_answers_as_itself(models: list[Loaded], data: Path) -> None:
    (scores,), _ = run_tasks([models[0], models[0]], ["arc_easy"], data=data)
    assert scores.scores[0] == scores.scores[1]
    assert scores.choices is not None
    assert scores.choices[0] == scores.choices[1]


def test_the_answers_that_were_kept_are_not_asked_for_again(models: list[Loaded], data: Path) -> None:
    class Killed(dict[str, bytes]):
        """Takes so many answers, then the process is gone."""

        room = 7

        def update(self, made: Mapping[str, bytes]) -> None:  # type: ignore[override]
            if len(self) + len(made) > self.room:
                raise KeyboardInterrupt
            super().update(made)

    def run(answers: list[dict[str, bytes]]) -> tuple[list[TaskScores], int]:
        rows: list[int] = []
        with models[0].network.register_forward_pre_hook(
            lambda _module, _args, given: rows.append(len(given["input_ids"])), with_kwargs=True
        ):
            scores, _ = run_tasks(
                models[:1], ["piqa", "svamp"], data=data, limit=5, answers=answers, tokens_per_batch=64
            )
        return scores, sum(rows)

    whole, rows = run([{}])
    kept = Killed()
    with pytest.raises(KeyboardInterrupt):
        run([kept])
    assert kept
    resumed = dict(kept)
    again, fewer = run([resumed])
    assert fewer <= rows - len(kept)
    assert [replace(each, choices=None) for each in again] == [replace(each, choices=None) for each in whole]
    assert run([resumed]) == (again, 0)
    assert all(isinstance(json.loads(value), list) for value in resumed.values())


def test_an_answer_that_is_damaged_is_asked_for_again(models: list[Loaded]) -> None:
    answers: dict[str, bytes] = {}
    (first,) = reader(models[0], answers).loglikelihood(requests(("the cat", " sat")))
    answers.update(dict.fromkeys(answers, b"\x00"))
    assert reader(models[0], answers).loglikelihood(requests(("the cat", " sat"))) == [first]


# Time.


def test_a_budget_that_is_ample_asks_everything(models: list[Loaded], data: Path) -> None:
    scores, notes = run_tasks(models[:1], ["blimp", "piqa"], data=data, budget=1e6)
    assert [len(each.parts) for each in scores] == [24, 9]
    assert not notes


def test_a_budget_that_is_spent_asks_a_pilot_and_says_so(models: list[Loaded], data: Path) -> None:
    shares: list[float] = []
    scores, notes = run_tasks(
        models[:1], ["blimp", "piqa"], data=data, budget=1e-6, progress=lambda _what, share: shares.append(share)
    )
    assert [len(each.parts) for each in scores] == [2, 2]
    assert notes == [
        "blimp: 2 of 24 items, as many as the time allowed",
        "piqa: 2 of 9 items, as many as the time allowed",
    ]
    assert set(shares) == {1.0}


def timed(most: int, rate: float, count: int = 2) -> budget.Asked:
    task = Prepared("x", "x", "x", "acc", "right", None, {}, {}, {}, {})
    return budget.Asked(task, [], most, count=count, rate=rate)


def test_all_tasks_get_the_same_time_and_what_one_cannot_use_goes_to_the_others() -> None:
    small, one, other = timed(12, 1.0), timed(10_000, 0.5), timed(10_000, 1.0)
    given = budget.shares([small, one, other], 210.0)
    assert given == pytest.approx([10.0, 100.0, 100.0], rel=1e-3)
    assert budget.shares([small, one], 1e9) == pytest.approx([small.time(12), one.time(10_000)])


def test_every_task_gets_its_fewest_items_before_any_gets_more() -> None:
    slow, quick = timed(1000, 10.0), timed(100_000, 0.01)
    given = budget.shares([slow, quick], 300.0)
    assert given[0] == pytest.approx(18 * 10.0, rel=1e-3)
    assert sum(given) == pytest.approx(300.0, rel=1e-3)
    assert budget.shares([slow, slow], 100.0) == pytest.approx([50.0, 50.0], rel=1e-3)


def test_progress_never_falls_and_ends_at_one(models: list[Loaded], data: Path) -> None:
    shares: list[float] = []
    run_tasks(models, ["blimp", "lambada"], data=data, limit=4, progress=lambda _what, share: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


# What cannot be asked.


def test_an_unknown_task_is_answered_with_the_nearest_names(data: Path) -> None:
    with pytest.raises(UsageError, match=r"no task is called 'piqaa'; the nearest names are piqa"):
        check_tasks(["blimp", "piqaa"], data)
    with pytest.raises(UsageError, match="hellaswag"):
        check_tasks(["hellaswagg"], data)


def test_without_the_harness_the_message_says_how_to_get_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r"pip install 'tersely\[tasks\]'"):
        check_tasks(["blimp"], data)
    assert all(info.found for info in task_names(data))


@pytest.mark.parametrize("name", NAMES)
def test_missing_data_are_named_with_their_place(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: .*{tmp_path}.* is not there.*--data DIR"):
        check_tasks([name], tmp_path)
    with pytest.raises(DataError, match=f"{name}: its data are .*--data DIR"):
        check_tasks([name], None)
    with pytest.raises(DataError, match="no such folder"):
        check_tasks([name], tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "file", "text"),
    [
        ("piqa", "commonsense/piqa.json", "[{"),
        ("piqa", "commonsense/piqa.json", '{"a": 1}'),
        ("piqa", "commonsense/piqa.json", '[{"instruction": "Please choose"}]'),
        ("lambada", "lambada/test.jsonl", '{"text": "one two"}\nnot JSON\n'),
        ("lambada", "lambada/test.jsonl", "[1]\n"),
        ("blimp", "blimp/agreement.txt", "nothing"),
        (
            "retrieval",
            "xquad/xquad.en.json",
            '{"data": [{"paragraphs": [{"qas": [{"question": "x", "answers": [1]}]}]}]}',
        ),
        ("svamp", "commonsense/SVAMP.json", '[{"instruction": "one and one?", "answer": "2.0"}]'),
    ],
)
def test_data_of_another_form_are_refused(tmp_path: Path, name: str, file: str, text: str) -> None:
    write(tmp_path / file, text)
    with pytest.raises(DataError, match=Path(file).parts[0]):
        check_tasks([name], tmp_path)


def test_a_task_that_is_named_twice_is_refused(data: Path) -> None:
    with pytest.raises(UsageError, match="piqa: named twice"):
        check_tasks(["piqa", "blimp", "piqa"], data)


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"budget": -1.0}, {"tokens_per_batch": 0}, {"answers": []}])
def test_bad_numbers_are_refused(models: list[Loaded], data: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        run_tasks(models, ["piqa"], data=data, **wrong)


def test_items_that_cannot_be_read_are_counted_not_hidden(models: list[Loaded], tmp_path: Path) -> None:
    good = instruction("the cat?", ["sat", "ran"], 0)
    bad = [
        {**good, "answer": "answer3"},
        {**good, "instruction": good["instruction"].replace("Answer2:", "Answer 2")},
        {**good, "instruction": "the cat?"},
        {"output": "x"},
        instruction("the cat?", ["sat", ""], 0),
        instruction("Answer1: the cat?", ["sat", "ran"], 0),
    ]
    write(tmp_path / "commonsense/piqa.json", json.dumps([good, *bad, good]))
    (scores,), notes = run_tasks(models[:1], ["piqa"], data=tmp_path)
    assert scores.available == 2
    assert notes == ["piqa: 6 records whose question, choices and answer are not in their places were left out"]


def test_prompts_that_do_not_fit_are_counted(models: list[Loaded], data: Path, tmp_path: Path) -> None:
    folder = write_tokenizer(tiny("llama", tmp_path / "short", blocks=1, max_position_embeddings=48))
    short = loaded(folder, "short")
    _, notes = run_tasks([short, models[0]], ["mmlu", "retrieval"], data=data, limit=6)
    assert "mmlu: 6 of 6 prompts do not fit the 48 positions of short and lost their beginning" in notes
    assert "retrieval: short wrote at most 24 tokens, half of its positions" in notes
    assert not any(models[0].name in note for note in notes)


def test_a_tokenizer_of_another_model_is_noticed(models: list[Loaded], data: Path, tmp_path: Path) -> None:
    small = load_model(tiny("llama", tmp_path, blocks=1, vocab=24), dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"small: the tokenizer gives id \d+, but the model has 24 tokens"):
        run_tasks([replace(models[0], network=small, name="small")], ["lambada"], data=data, limit=2)


def test_a_model_that_gives_nan_is_named(models: list[Loaded], data: Path, tmp_path: Path) -> None:
    broken = load_model(tiny("llama", tmp_path, blocks=1), dtype=torch.float32)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    with pytest.raises(CheckpointError, match="broken: gives NaN"):
        run_tasks([replace(models[0], network=broken, name="broken")], ["piqa"], data=data, limit=2)


def test_nothing_is_said_but_by_the_caller(
    models: list[Loaded], data: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    run_tasks(models[:1], ["blimp", "lambada", "svamp", "memorization"], data=data, limit=2)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


# Task files of the user's own, and the harness's.

MINE = """
task: mine
dataset_path: json
dataset_kwargs:
  data_files: {test: asked.jsonl}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: c
doc_to_target: a
metric_list: [{metric: acc}]
metadata: {version: 1, title: Mine, group: cats}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    write_lines(tmp_path / "asked.jsonl", [{"q": "the cat", "c": ["sat", "ran", "came"], "a": i % 3} for i in range(7)])
    write(tmp_path / "mine.yaml", MINE)
    return tmp_path / "mine.yaml"


def test_a_task_file_of_the_users_own_is_asked(models: list[Loaded], mine: Path) -> None:
    (scores,), notes = run_tasks(models, [str(mine)], data=None, limit=5)
    assert (scores.name, scores.title, scores.group, scores.metric) == ("mine", "Mine", "cats", "acc")
    assert (scores.kind, scores.available, len(scores.parts)) == ("right", 7, 5)
    assert scores.chance == pytest.approx(1 / 3)
    assert scores.harness[0]["acc,none"] == pytest.approx(sum(scores.scores[0]) / 5)
    assert not notes


def test_scores_of_other_kinds_become_numbers_of_items(models: list[Loaded], mine: Path) -> None:
    text = MINE.replace("multiple_choice", "loglikelihood_rolling").replace(
        "doc_to_target: a", 'doc_to_target: "{{q}} sat"'
    )
    write(mine, text.replace("doc_to_choice: c\n", "").replace("metric: acc", "metric: word_perplexity"))
    (scores,), _ = run_tasks(models[:1], [str(mine)], data=None)
    assert (scores.kind, scores.metric, scores.higher_is_better) == ("score", "word_perplexity", False)
    mean = sum(scores.scores[0]) / 7
    assert math.exp(mean) == pytest.approx(scores.harness[0]["word_perplexity,none"])


def test_the_data_of_a_task_file_must_be_there(mine: Path) -> None:
    (mine.parent / "asked.jsonl").unlink()
    with pytest.raises(DataError, match=r"mine: its data file 'asked\.jsonl' is not there"):
        check_tasks([str(mine)], None)
    with pytest.raises(UsageError, match="no such task file"):
        check_tasks([str(mine.with_name("other.yaml"))], None)


def test_a_task_file_that_the_harness_cannot_read_is_refused(mine: Path) -> None:
    write(mine, MINE.replace("doc_to_text:", "doc_to_question:"))
    with pytest.raises(UsageError, match="the harness cannot make this task"):
        check_tasks([str(mine)], None)
    write(mine, MINE.replace("metric: acc", "metric: somewhere"))
    with pytest.raises(UsageError, match="needs the metric 'somewhere', which the harness would download"):
        check_tasks([str(mine)], None)


def test_the_harness_own_task_takes_a_copy_of_its_data(models: list[Loaded], tmp_path: Path) -> None:
    choices = {"text": ["sat", "ran"], "label": ["A", "B"]}
    rows = [
        {"question": f"the cat {word}", "choices": choices, "answerKey": "AB"[i % 2]} for i, word in enumerate(WORDS)
    ]
    for split in ("train", "validation", "test"):
        write_lines(tmp_path / f"allenai/ai2_arc/ARC-Easy/{split}.jsonl", rows)
    (scores,), _ = run_tasks(models[:1], ["harness:arc_easy"], data=tmp_path, limit=6)
    assert (scores.name, scores.metric, scores.available) == ("harness:arc_easy", "acc", len(WORDS))
    assert scores.harness[0]["acc,none"] == pytest.approx(sum(scores.scores[0]) / 6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hellaswag", r"hellaswag: its data, the dataset \S+/hellaswag, are not at hand: put a copy"),
        ("harness:blimp", r"the dataset nyu-mll/blimp \(\w+\), are not at hand"),
    ],
)
def test_the_harness_own_task_without_its_data_says_where_to_put_them(data: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_tasks([name], data)


def test_the_harness_tasks_that_run_code_are_refused_before_it_runs(data: Path) -> None:
    with pytest.raises(UsageError, match="humaneval runs code that the model writes"):
        check_tasks(["humaneval"], data)
    with pytest.raises(UsageError, match="squadv2 fetches its data by code of its own"):
        check_tasks(["squadv2"], data)


# Probes.


def test_a_needle_stands_once_in_its_haystack_at_its_depth_and_no_other_choice_does(
    models: list[Loaded], data: Path
) -> None:
    tokenizer = models[0].tokenizer
    own = next(own for own in OWN if own.name == "needle")
    items = own.items(data, Tokens(tokenizer, 600))
    assert list(items.parts) == ["256 tokens", "512 tokens"]  # its frame alone has more than 128 of these tokens
    for part, splits in items.parts.items():
        places = []
        for item in splits["test"]:
            for i, word in enumerate(item["choices"]):
                assert item["haystack"].count(word) == int(i == item["answer"])
            whole = f"{item['haystack']}\n\n{item['question']} {item['choices'][item['answer']]}"
            assert len(tokenizer(whole)["input_ids"]) <= int(part.split()[0])
            places.append(item["haystack"].index("The secret word") / len(item["haystack"]))
        assert places[:20] == [0.0] * 20
        assert min(places[20:]) > 0.05
        assert max(places) > 0.4


def test_a_model_that_learned_a_text_by_heart_is_found_out(tmp_path: Path) -> None:
    draw = random.Random(11)
    learned = [words(draw, 12) for _ in range(8)]
    folder = write_tokenizer(tiny("llama", tmp_path / "model", blocks=1, max_position_embeddings=POSITIONS))
    model = loaded(folder, "by heart")
    texts = [*learned, *(words(draw, 12) for _ in range(8))]
    ids = [torch.tensor(model.tokenizer(text)["input_ids"])[:24][None] for text in learned]
    optimizer = torch.optim.Adam(model.network.parameters(), lr=1e-2)
    for _ in range(12):
        for row_BL in ids:
            optimizer.zero_grad()
            model.network(input_ids=row_BL, labels=row_BL).loss.backward()
            optimizer.step()
    model.network.eval()
    found = reader(model).token_logprobs(requests(*[(text, 24) for text in texts]))
    assert all(len(each) == 23 for each in found)
    scored = [grading.min_k({"member": i < 8}, [each])["auc"] for i, each in enumerate(found)]
    assert grading.area(scored) > 0.95
    for text, each in zip(texts, found, strict=True):
        whole = [math.fsum(each) / len(each)]
        assert min(each) <= grading.min_k({"member": 0}, [each])["auc"][1] <= whole[0], text


# Grading.


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("2+2=4\n#### 4", True),
        ("#### 5, not 4", False),
        ("The answer is 4.", True),
        ("The answer is $4.00. Then 7.", True),
        ("First 3, then 4", True),
        ("4, or maybe 5", False),
        ("1,004", False),
        ("none", False),
        ("", False),
    ],
)
def test_the_number_of_an_answer_is_found(text: str, right: bool) -> None:
    assert grading.number({"number": 4.0}, [text]) == {"exact_match": float(right)}
    assert grading.number({"number": 1004}, ["so 1,004"]) == {"exact_match": 1.0}


def test_answers_are_compared_by_words_and_without_spaces_by_characters() -> None:
    item = {"answers": ["the Red Cat", "cats"], "language": "en"}
    assert grading.answer(item, [" Red cat!"]) == {"f1": 1.0, "exact_match": 1.0}
    assert grading.answer(item, ["a red dog"])["f1"] == pytest.approx(0.5)
    assert grading.answer(item, [""]) == {"f1": 0.0, "exact_match": 0.0}
    chinese = {"answers": ["公元前"], "language": "zh"}
    assert grading.answer(chinese, ["公元后"])["f1"] == pytest.approx(2 / 3)


def test_a_summary_that_copies_is_grounded_and_one_that_says_the_same_is_alike() -> None:
    item = {"article": "The cat sat on the mat and saw one red bird.", "reference": "A cat saw a bird."}
    copied = grading.summary(item, ["The cat sat on the mat."])
    assert copied["grounded"] == 1.0
    assert grading.summary(item, ["A dog flew home."])["grounded"] == 0.0
    assert grading.summary(item, [item["reference"]])["rougeL"] == 1.0
    assert grading.summary(item, [""]) == {"rougeL": 0.0, "grounded": 0.0}
    assert grading.rouge_l("a b c d", "a x c y") == pytest.approx(0.5) == grading.rouge_l("a x c y", "a b c d")


def test_the_area_is_the_share_of_pairs_in_the_right_order() -> None:
    draw = random.Random(1)
    scored = [(draw.randrange(2), float(draw.randrange(6))) for _ in range(40)]
    pairs = [(a, b) for label, a in scored if label for other, b in scored if not other]
    share = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    assert grading.area(scored) == pytest.approx(share)


# Real data, real models.


@pytest.fixture(scope="module")
def real(request: pytest.FixtureRequest) -> tuple[Path, list[Loaded]]:
    assets: Path = request.getfixturevalue("assets")
    folders = [assets / "models" / name for name in ("stories-3m", "house-llama")]
    return assets / "data", [loaded(folder, folder.name) for folder in folders]


def test_every_record_of_the_real_data_is_read(real: tuple[Path, list[Loaded]]) -> None:
    counts = {
        "blimp": 13400,
        "lambada": 5153,
        "mmlu": 14042,
        "arc_easy": 2376,
        "arc_challenge": 1172,
        "piqa": 1838,
        "openbookqa": 500,
        "boolq": 3270,
        "winogrande": 1267,
        "social_iqa": 1954,
        "gsm8k": 1319,
        "svamp": 996,
        "multiarith": 596,
        "xquad": 11900,
    }
    found = {info.name: info.items for info in task_names(real[0])}
    assert {name: found[name] for name in counts} == counts


def test_trained_models_know_more_grammar_than_chance_and_what_they_were_trained_on(
    real: tuple[Path, list[Loaded]],
) -> None:
    folder, both = real
    (grammar,), _ = run_tasks(both, ["blimp"], data=folder, limit=201)
    for scores in grammar.scores:
        assert sum(scores) / 201 > 0.53
    (memory,), _ = run_tasks(both, ["memorization"], data=folder, limit=160)
    stories, house = (each["auc,none"] for each in memory.harness)  # what one has not seen is no easier to the other
    assert house > stories
