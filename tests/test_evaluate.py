"""A whole evaluation: what it puts together, what it refuses, and that a killed one goes on."""

from __future__ import annotations

import html
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tersely.errors import CheckpointError, DataError, OutputError, UsageError
from tersely.evaluation import divergence, evaluator
from tersely.evaluation.dossiers import dossier, merged, write_report
from tersely.evaluation.evaluator import evaluate
from tersely.evaluation.store import Store
from tersely.evaluation.tasks import TaskScores
from tersely.results import Evaluation
from tersely.runtime import Loaded, load_model, load_tokenizer, write
from tests.words import write_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def noisy(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with noise in every weight."""
    folder = tmp_path_factory.mktemp("noisy") / "noisy"
    shutil.copytree(base, folder)
    draw = torch.Generator().manual_seed(5)
    tensors = {
        name: tensor + 0.3 * tensor.std() * torch.randn(tensor.shape, generator=draw) if tensor.ndim > 1 else tensor
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def text(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the base writes itself, so that it predicts it better than a model with noise."""
    model = Loaded("base", load_model(base), load_tokenizer(base), "cpu")
    written = [write(model, "the cat", max_new_tokens=30, temperature=1.0, seed=seed)[1] for seed in range(16)]
    file = tmp_path_factory.mktemp("text") / "held-out.txt"
    file.write_text("\n<|endoftext|>\n".join(f"the cat {document}" for document in written))
    return file


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs.sqlite")


def scores(model: Sequence[float], base: Sequence[float], name: str = "quiz", **changes: Any) -> TaskScores:
    made = TaskScores(
        name=name,
        title="A quiz",
        group="knowledge",
        metric="acc",
        higher_is_better=True,
        chance=0.5,
        kind="right",
        available=100,
        sha256="a" * 64,
        parts=tuple("north" if n % 2 else "south" for n in range(len(model))),
        scores=(tuple(model), tuple(base)),
        labels=None,
        choices=(((0.9, 0.1),) * len(model),) * 2,
        answers=tuple(0 if n % 2 else 1 for n in range(len(model))),
        harness=({"acc,none": 0.5, "acc_stderr,none": math.nan},) * 2,
    )
    return replace(made, **changes)


@pytest.fixture
def quiz(monkeypatch: pytest.MonkeyPatch) -> list[TaskScores]:
    """Instead of real tasks, these scores."""
    given: list[TaskScores] = []
    monkeypatch.setattr(evaluator, "check_tasks", lambda *_: None)
    monkeypatch.setattr(evaluator, "run_tasks", lambda *_, **__: (given, ["a note of the tasks"]))
    return given


def test_noise_is_found_to_be_worse_and_said_in_a_sentence(noisy: Path, base: Path, text: Path) -> None:
    found = evaluate(noisy, text, against=base)
    (loss,) = found.comparisons
    assert found.text is not None
    assert found.text.divergence is not None
    assert loss.name == "loss on held-out.txt"
    assert (loss.outcome, loss.difference) == ("worse", found.text.divergence.loss_difference)
    assert loss.p_adjusted == loss.p < 0.05
    assert "worse by" in found.verdict
    assert found.base is not None
    assert (found.model.dtype, found.model.parameters) == ("float32", found.base.parameters)
    assert found.model.fingerprint != found.base.fingerprint


def test_a_model_against_itself_loses_nothing_and_says_so(base: Path, text: Path) -> None:
    found = evaluate(base, text, against=base, writing=1)
    (loss,) = found.comparisons
    assert loss.outcome == "no difference shown"
    assert "on all 16 documents" in loss.sentence
    assert found.samples[0].model == found.samples[0].base


def test_an_evaluation_repeats_and_survives_json(noisy: Path, base: Path, text: Path) -> None:
    found = evaluate(noisy, text, against=base)
    assert evaluate(noisy, text, against=base) == found
    assert Evaluation.from_json(found.to_json()) == found
    one = evaluate(noisy, f"{text}[:1]", writing=0)
    assert one.text is not None
    assert one.text.loss.stderr == math.inf
    assert json.loads(one.to_json())["text"]["loss"]["stderr"] is None
    assert Evaluation.from_json(one.to_json()) == one
    for wrong in ('{"model": "m"}', "[]", "{"):
        with pytest.raises(DataError, match="not the JSON of a Evaluation"):
            Evaluation.from_json(wrong)


def test_samples_continue_documents_of_the_text(noisy: Path, base: Path, text: Path) -> None:
    found = evaluate(noisy, text, against=base, writing=2).samples
    contents = text.read_text().split("\n<|endoftext|>\n")
    assert [content.startswith(each.prompt) for content, each in zip(contents, found, strict=False)] == [True, True]
    assert all(0 <= each.repetition < 1 and each.base is not None for each in found)
    assert evaluate(noisy, text, writing=0).samples == ()


def test_repetition_is_the_share_of_four_tokens_that_stood_before() -> None:
    assert evaluator._repetition([1, 2, 3]) == 0
    assert evaluator._repetition([1, 2, 3, 4, 5, 6]) == 0
    assert evaluator._repetition([7] * 13) == pytest.approx(0.9)


def test_task_scores_become_results_and_comparisons(noisy: Path, base: Path, quiz: list[TaskScores]) -> None:
    better, worse = [1.0] * 40, [1.0] * 20 + [0.0] * 20
    quiz += [
        scores(worse, better),
        scores(better, better, "alike"),
        scores([0.1 * n for n in range(40)], [0.1 * n + 0.5 for n in range(40)], "graded", kind="score"),
        scores(worse, worse, "told", kind="auc", labels=(True,) * 20 + (False,) * 20, choices=None, answers=None),
    ]
    found = evaluate(noisy, against=base, tasks=["quiz"])
    quizzed, _, graded, told = found.tasks
    assert (quizzed.value.value, quizzed.base and quizzed.base.value) == (0.5, 1.0)
    assert (quizzed.lost, quizzed.gained, quizzed.items, quizzed.available) == (20, 0, 40, 100)
    assert [(part.name, part.items, part.value.value) for part in quizzed.parts] == [
        ("south", 20, 0.5),
        ("north", 20, 0.5),
    ]
    assert quizzed.calibration is not None
    assert quizzed.calibration.error.value == pytest.approx(0.4)
    assert quizzed.harness == {"acc,none": 0.5}
    assert (graded.lost, told.value.value, told.calibration) == (None, 1.0, None)
    outcomes = {each.name: each.outcome for each in found.comparisons}
    assert outcomes["knowledge (quiz)"] == "worse"
    assert outcomes["knowledge (alike)"] == outcomes["knowledge (told)"] == "no difference shown"
    assert outcomes["knowledge (graded)"] == "worse"
    assert all(each.p_adjusted >= each.p for each in found.comparisons)
    assert "a note of the tasks" in found.notes
    assert (found.text, found.samples) == (None, ())


def test_without_a_base_nothing_is_compared(noisy: Path, text: Path, quiz: list[TaskScores]) -> None:
    quiz.append(replace(scores([1.0, 0.0], []), scores=((1.0, 0.0),), choices=None, harness=({},)))
    found = evaluate(noisy, text, tasks=["quiz"])
    assert (found.base, found.comparisons, found.verdict) == (None, (), "")
    assert (found.tasks[0].base, found.tasks[0].lost) == (None, None)
    assert found.samples[0].base is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": None}, "nothing to evaluate on"),
        ({"budget": 0.0}, "budget=0.0: expected more than 0"),
        ({"samples": -1}, "samples=-1"),
        ({"writing": -1}, "writing=-1"),
        ({"tasks": ["blymp"]}, "blimp"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_model_is_loaded(
    base: Path, text: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(evaluator, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match=message):
        evaluate(base, **{"text": text, **arguments})


def test_a_model_without_a_tokenizer_and_texts_without_tokens_are_refused(base: Path, tmp_path: Path) -> None:
    bare, empty, short = tmp_path / "bare", tmp_path / "empty.txt", tmp_path / "short.txt"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    empty.write_text(" \n<|endoftext|>\n ")
    short.write_text("<|endoftext|>\n\n<|endoftext|>x")
    with pytest.raises(CheckpointError, match="copy the tokenizer's files in"):
        evaluate(bare, short)
    with pytest.raises(DataError, match="holds no text"):
        evaluate(base, empty)


def test_only_causal_models_are_evaluated(text: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=32, intermediate_size=32, **sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(UsageError, match="this one is masked"):
        evaluate(tmp_path / "bert", text)


KILLED = """
import sys, tersely
from tersely.evaluation import divergence
real, count = divergence._measure, 0
def measure(*arguments):
    global count
    count += 1
    open(sys.argv[5], "a").write("x")
    if count == 4:
        import time; time.sleep(60)
    return real(*arguments)
divergence._measure = measure
with tersely.Store(sys.argv[4]) as store:
    tersely.evaluate(sys.argv[1], sys.argv[2], against=sys.argv[3], tokens_per_batch=64, writing=0, store=store)
"""


def test_a_killed_evaluation_goes_on_where_it_was(
    noisy: Path, base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate(noisy, text, against=base, tokens_per_batch=64, writing=0)
    file, seen = tmp_path / "runs.sqlite", tmp_path / "seen"
    command = [sys.executable, "-c", KILLED, *map(str, (noisy, text, base, file, seen))]
    process = subprocess.Popen(command)
    while not (seen.exists() and len(seen.read_text()) == 4):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    real, runs = divergence._measure, 0

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return real(*arguments)

    monkeypatch.setattr(divergence, "_measure", counted)
    with Store(file) as store:
        assert store.runs() == ()
        found = evaluate(noisy, text, against=base, tokens_per_batch=64, store=store, writing=0)
        (run,) = store.runs()
    again, runs = runs, 0
    evaluate(noisy, text, against=base, tokens_per_batch=64, writing=0)
    assert found == expected == run.result
    assert again == runs - 3


def test_a_finished_evaluation_leaves_nothing_unfinished(noisy: Path, base: Path, text: Path, store: Store) -> None:
    with store:
        evaluate(noisy, text, against=base, store=store, writing=0)
        first = store.runs()[0].result
        evaluate(noisy, text, against=base, store=store, writing=0)
        assert [run.result for run in store.runs()] == [first, first]


def test_of_several_evaluations_the_newest_answer_to_each_question_counts(
    noisy: Path, base: Path, text: Path, quiz: list[TaskScores], tmp_path: Path, store: Store
) -> None:
    other = write_model(tmp_path / "other", seed=9)
    worse, better = [1.0] * 20 + [0.0] * 20, [1.0] * 40
    with store:
        quiz[:] = [scores(worse, better), scores(worse, better, "second")]
        evaluate(noisy, against=base, tasks=["quiz"], store=store)
        quiz[:] = [scores(better, better)]
        evaluate(noisy, text, against=base, tasks=["quiz"], store=store, writing=0)
        older = evaluate(noisy, f"{text}[:9]", against=other, store=store, writing=0)
        newest = evaluate(noisy, f"{text}[:12]", against=base, store=store, writing=0)
        known = dossier(noisy, store).evaluation
    assert known is not None
    assert known.text == newest.text
    assert {task.name: task.value.value for task in known.tasks} == {"quiz": 1.0, "second": 0.5}
    names = [each.name for each in known.comparisons]
    assert sorted(names) == ["knowledge (quiz)", "knowledge (second)", "loss on held-out.txt[:12]"]
    assert known.base == newest.base != older.base
    second = next(each for each in known.comparisons if each.name == "knowledge (second)")
    assert second.p_adjusted > second.p
    assert merged([]) is None


def test_the_report_is_written_whole_and_replaces_nothing_unasked(
    noisy: Path, base: Path, text: Path, tmp_path: Path, store: Store
) -> None:
    page = tmp_path / "page.html"
    with store:
        found = evaluate(noisy, text, against=base, store=store, writing=0)
        assert write_report([noisy, base], store, out=page) == (page, tmp_path / "page.json")
        with pytest.raises(OutputError, match=r"page\.html exists"):
            write_report([noisy], store, out=page)
        write_report([noisy], store, out=page, overwrite=True)
        with pytest.raises(OutputError, match="HTML"):
            write_report([noisy], store, out=tmp_path / "page.txt")
        with pytest.raises(CheckpointError, match="no such model"):
            write_report([tmp_path / "none"], store, out=tmp_path / "none.html")
    assert found.verdict in html.unescape(page.read_text("utf-8"))
    assert json.loads((tmp_path / "page.json").read_text("utf-8"))
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix in (".html", ".json", ".tmp")) == [
        "page.html",
        "page.json",
    ]


def test_a_budget_is_divided_and_said(noisy: Path, base: Path, text: Path) -> None:
    found = evaluate(noisy, text, against=base, budget=120.0)
    assert found.budget == 120.0
    assert found.text is not None
    assert found.text.documents == 16
    assert found.seconds < 120


def test_real_tasks_and_a_real_text_come_together(assets: Path) -> None:
    model = assets / "models" / "demo"
    found = evaluate(
        model,
        f"{assets}/data/tinystories/sample.txt[-4:]",
        against=model,
        tasks=["blimp"],
        data=assets / "data",
        samples=4,
        writing=0,
    )
    assert [each.outcome for each in found.comparisons] == ["no difference shown"] * 2
    assert (found.tasks[0].lost, found.tasks[0].gained) == (0, 0)
