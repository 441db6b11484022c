"""Laws of trimming: in every family, what a model computes for the tokens that stay is what it was.

Shapes: V rows of the embedding, K rows that stay.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.families import families
from tersely.graph import read_graph
from tersely.methods.trim import Frequency
from tersely.plan.recipe import Trim
from tersely.vocabulary.counting import Counted
from tersely.vocabulary.tokenizer import read_tokenizer
from tersely.vocabulary.trim import Plan, plan_trim, tables_of, trimmed_checkpoint
from tests import tiny
from tests.tokens import write_tokenizer

ROWS = 40


def source(model_type: str, folder: Path, **config: Any) -> Checkpoint:
    return open_checkpoint(write_tokenizer(tiny.tiny(model_type, folder, **config)))


def planned(checkpoint: Checkpoint, rows: int = ROWS) -> Plan:
    vocabulary = read_tokenizer(checkpoint)
    counts_V = np.random.default_rng(1).integers(1, 100, len(vocabulary.ids))
    counts_V[vocabulary.unknown] = 0
    return plan_trim(checkpoint, vocabulary, Trim("tokens", Frequency(), rows=rows, multiple=1), Counted(counts_V))


def logits(path: Path, ids_L: Tensor) -> Tensor:
    model: Any = tiny.load(path)
    # Products of experts are written for 32 bits at most.
    model = model if read_graph(open_checkpoint(path)).has_experts else model.double()
    more = {"decoder_input_ids": ids_L[None]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(input_ids=ids_L[None], **more).logits[0]
    return found


@pytest.mark.parametrize("model_type", list(families()))
def test_the_tokens_that_stay_have_the_logits_that_they_had(model_type: str, tmp_path: Path) -> None:
    checkpoint = source(model_type, tmp_path / "model")
    plan = planned(checkpoint)
    made = trimmed_checkpoint(checkpoint, plan, tmp_path / "trimmed", {}, resume=False)
    kept_K = plan.trimmed.kept_old_ids_K
    assert len(kept_K) == ROWS == read_graph(made).sizes["tokens"]
    assert {name: made.spec(name).shape for name in made} == {
        name: plan.checkpoint.spec(name).shape for name in plan.checkpoint
    }
    draw = torch.Generator().manual_seed(0)
    new_L = torch.randint(0, ROWS, (9,), generator=draw)
    before, after = logits(checkpoint.path, kept_K[new_L]), logits(made.path, new_L)
    torch.testing.assert_close(after, before[:, kept_K], atol=1e-6, rtol=1e-6)
    # What is said is the exact relation: the loss falls by the mass of the tokens that went.
    gone = torch.log_softmax(before, -1)[:, kept_K].logsumexp(-1)
    torch.testing.assert_close(
        torch.log_softmax(after, -1) + gone[:, None], torch.log_softmax(before, -1)[:, kept_K], atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embedding_and_head_lose_the_same_rows_be_they_one_or_two(tied: bool, tmp_path: Path) -> None:
    checkpoint = source("llama", tmp_path / "model", tied=tied)
    plan = planned(checkpoint)
    made = trimmed_checkpoint(checkpoint, plan, tmp_path / "trimmed", {}, resume=False)
    tables = [w.name for w in tables_of(read_graph(checkpoint))]
    assert len(tables) == 2 - tied
    for name in checkpoint:
        expected = checkpoint[name][plan.trimmed.kept_old_ids_K] if name in tables else checkpoint[name]
        assert torch.equal(made[name], expected)


def test_with_all_tokens_only_rows_without_one_go(tmp_path: Path) -> None:
    checkpoint = source("llama", tmp_path / "model")
    vocabulary = read_tokenizer(checkpoint)
    plan = planned(checkpoint, len(vocabulary.ids))
    assert plan.trimmed.kept_old_ids_K.tolist() == list(range(len(vocabulary.ids)))
    made = trimmed_checkpoint(checkpoint, plan, tmp_path / "trimmed", {}, resume=False)
    old = json.loads((checkpoint.path / "tokenizer.json").read_text())
    assert json.loads((made.path / "tokenizer.json").read_text()) == old
    again = planned(made, len(vocabulary.ids))
    assert again.checkpoint.config == made.config
    assert again.facts.rows_before == again.facts.rows_after
