"""Loss and divergence on a text: what is measured equals a plain computation, however it is cut into pieces."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tersely.calibrate import documents, read_text
from tersely.errors import CheckpointError, DataError, UsageError
from tersely.evaluation import distributions, divergence
from tersely.evaluation.divergence import measure_text
from tersely.evaluation.text_result import Measured, perplexity
from tersely.evaluation.verdict import compare_losses
from tersely.results import Divergence, Estimate
from tersely.runtime import Loaded, load_model, load_tokenizer
from tests.words import WORDS, write_model, write_text, write_tokenizer

SAME = Estimate(0.0, 0.0, 0.0, 0.0)
ALL = Estimate(1.0, 0.0, 1.0, 1.0)


def loaded(folder: Path) -> Loaded:
    return Loaded(folder.name, load_model(folder), load_tokenizer(folder), "cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return loaded(write_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return loaded(write_model(tmp_path_factory.mktemp("other"), seed=1))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return read_text(write_text(tmp_path_factory.mktemp("text") / "text.txt"))


def against(found: Measured) -> Divergence:
    assert found.result.divergence is not None
    return found.result.divergence


def plain(model: Loaded, text: str, context: int) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Loss by transformers alone, one document at a time; log-probabilities and true tokens of all predictions."""
    all_log_p, truth = [], []
    for document in documents(text):
        ids = torch.tensor([model.tokenizer(document)["input_ids"][:context]])
        with torch.inference_mode():
            all_log_p.append(model.network(input_ids=ids).logits[0, :-1].float().log_softmax(-1))
        truth.append(ids[0, 1:])
    log_p, targets = torch.cat(all_log_p), torch.cat(truth)
    return -log_p.gather(1, targets[:, None]).double().mean().item(), log_p, targets


def test_the_loss_equals_a_plain_computation(tiny: Loaded, text: str) -> None:
    expected, _, _ = plain(tiny, text, 24)
    found = measure_text([tiny], text, "text", context=24).result
    assert found.loss.value == pytest.approx(expected, abs=1e-6)
    assert found.perplexity == perplexity(found.loss.value) == pytest.approx(math.exp(expected))
    assert found.documents == found.available == 12
    assert found.tokens == sum(min(5 + 3 * n, 23) for n in range(12))
    assert found.divergence is None


def test_every_number_against_a_base_equals_a_plain_computation(tiny: Loaded, other: Loaded, text: str) -> None:
    found = against(measure_text([tiny, other], text, "text", context=24))
    (mine, p, truth), (base, q, _) = plain(tiny, text, 24), plain(other, text, 24)
    p, q = p.double(), q.double()
    kl = (q.exp() * (q - p)).sum(-1)
    first, base_first = p.argmax(-1), q.argmax(-1)
    overlap = [len(set(a) & set(b)) / 5 for a, b in zip(p.topk(5)[1].tolist(), q.topk(5)[1].tolist(), strict=True)]
    rank = 1 + (p > p.gather(1, base_first[:, None])).sum(-1)
    lost = (base_first == truth) & (first != truth)
    gained = (first == truth) & (base_first != truth)
    expected = {
        "kl": float(kl.mean()),
        "base_loss": base,
        "loss_difference": mine - base,
        "top1_agreement": float((first == base_first).double().mean()),
        "top5_agreement": float(np.mean(overlap)),
        "lost": float(lost.double().mean()),
        "gained": float(gained.double().mean()),
    }
    for name, value in expected.items():
        assert getattr(found, name).value == pytest.approx(value, abs=2e-6), name
    assert found.mean_reciprocal_rank == pytest.approx(float((1 / rank.double()).mean()), abs=1e-9)
    bounds = ((1, 1), (2, 5), (6, 10), (11, 100), (101, math.inf))
    shares = [float(((rank >= low) & (rank <= high)).double().mean()) for low, high in bounds]
    assert list(found.rank.values()) == pytest.approx(shares)
    assert list(found.rank) == ["1", "2-5", "6-10", "11-100", "101-"]
    for share, value in found.kl_quantiles.items():
        assert value == pytest.approx(float(np.quantile(kl.numpy(), float(share))), abs=2e-6)
    assert (found.vocabulary, found.shared, found.outside) == ("full", 32, None)


def test_a_model_does_not_diverge_from_itself(tiny: Loaded, text: str) -> None:
    found = against(measure_text([tiny, tiny], text, "text"))
    assert found.kl == found.loss_difference == found.lost == found.gained == SAME
    assert found.top1_agreement == found.top5_agreement == ALL
    assert (found.rank["1"], found.mean_reciprocal_rank, found.kl_quantiles["1"]) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("tokens", [1, 30, 10_000])
def test_batching_and_chunking_do_not_move_the_result(
    tiny: Loaded, other: Loaded, text: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure_text([tiny, other], text, "text")
    monkeypatch.setattr(distributions, "CHUNK_BYTES_CPU", 4 * 32 * 7)
    found = measure_text([tiny, other], text, "text", tokens_per_batch=tokens)
    assert found.result.loss.value == pytest.approx(expected.result.loss.value, rel=1e-6)
    assert found.result.loss.stderr == pytest.approx(expected.result.loss.stderr, rel=1e-5)
    assert against(found).kl.value == pytest.approx(against(expected).kl.value, rel=1e-5)
    assert found.result.sha256 == expected.result.sha256


@pytest.mark.parametrize("columns", [3, 32, 521, 1024, 4096, 6000])
def test_the_five_most_likely_tokens_are_found_in_any_width(columns: int) -> None:
    values = torch.randn(50, columns, generator=torch.Generator().manual_seed(columns))
    assert torch.equal(distributions.top(values), values.topk(min(5, columns), dim=-1).indices)


@pytest.mark.parametrize("shift", [0.0, 200.0, -200.0, 3000.0])
def test_logits_beyond_what_an_exponential_can_hold_give_the_same_distribution(shift: float) -> None:
    """The shift changes no probability; beyond 60 another way is taken."""
    draw = torch.Generator().manual_seed(3)
    base, model = torch.randn(20, 700, generator=draw) * 4, torch.randn(20, 700, generator=draw) * 4
    truth = torch.arange(20)
    space = distributions.workspace(700, torch.device("cpu"), 2)
    found = distributions.compare([model + shift, base + shift], [truth, truth], [None, None], space)
    log_p, log_q = model.double().log_softmax(-1), base.double().log_softmax(-1)
    tolerance = 1e-4 * max(1.0, abs(shift) / 100)
    assert torch.allclose(found[0].double(), -log_p[truth, truth], atol=tolerance)
    assert torch.allclose(found[2].double(), (log_q.exp() * (log_q - log_p)).sum(-1), atol=tolerance)


@pytest.mark.parametrize("bins", ["by_position", "by_frequency"])
def test_the_bins_hold_every_token_once_and_sum_to_the_whole(tiny: Loaded, other: Loaded, text: str, bins: str) -> None:
    found = measure_text([tiny, other], text, "text").result
    parts = getattr(found, bins)
    assert sum(part.tokens for part in parts) == found.tokens
    for name in ("loss", "kl"):
        whole = found.loss.value if name == "loss" else found.divergence and found.divergence.kl.value
        assert sum(getattr(part, name).value * part.tokens for part in parts) / found.tokens == pytest.approx(whole)
    assert all(part.last == 2 * part.first - 1 for part in parts)
    assert [part.first for part in parts] == sorted({part.first for part in parts})


def test_positions_and_frequencies_are_what_they_say(tiny: Loaded) -> None:
    words = "the cat sat the cat the"
    found = measure_text([tiny], words, "words", context=16).result
    assert [(part.first, part.tokens) for part in found.by_position] == [(1, 1), (2, 2), (4, 3)]
    assert [(part.first, part.tokens) for part in found.by_frequency] == [(1, 1), (2, 5)]


def widened(source: Path, folder: Path, rows: list[int], words: list[str]) -> Path:
    """The model with other rows of its vocabulary: of -1 nothing is known."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = tensors[name]
        new = torch.zeros(len(rows), old.shape[1])
        for place, row in enumerate(rows):
            new[place] = old[row] if row >= 0 else 0.1
        tensors[name] = new
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": len(rows)}))
    write_tokenizer(folder, words)
    return folder


def test_a_trimmed_vocabulary_is_compared_over_the_tokens_that_both_have(tmp_path: Path) -> None:
    """Words are dropped and the others change places: the shared distribution is the same, so KL is 0."""
    whole = write_model(tmp_path / "whole")
    kept = [word for word in WORDS if word not in ("bird", "fly")][::-1]
    place = {word: 3 + n for n, word in enumerate(WORDS)}
    trimmed = widened(whole, tmp_path / "trimmed", [0, 1, 2, *(place[word] for word in kept)], kept)
    text = "the cat sat on a mat\n<|endoftext|>\none red bird\n<|endoftext|>\nold trees saw the night\n<|endoftext|>\n"
    models = [loaded(trimmed), loaded(whole)]
    measured = measure_text(models, text, "text")
    found = against(measured)
    # "bird" is unknown to the trimmed one: <unk> is a token of both, but the documents are not cut alike.
    assert (found.vocabulary, found.shared, found.documents, measured.result.documents) == (
        "shared",
        3 + len(kept),
        2,
        3,
    )
    assert found.kl.value == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == ALL
    _, log_q, _ = plain(models[1], text, 64)
    dropped = [place["bird"], place["fly"], *range(3 + len(WORDS), 32)]
    lengths = [len(models[1].tokenizer(d)["input_ids"]) - 1 for d in documents(text)]
    rows = [i for i in range(sum(lengths)) if not lengths[0] <= i < lengths[0] + lengths[1]]
    assert found.outside is not None
    assert found.outside.value == pytest.approx(log_q[rows][:, dropped].exp().sum(-1).mean().item(), abs=1e-5)
    assert any("2 of 3 documents alike" in note for note in measured.notes)
    assert measured.unit == "bits"
    assert len(measured.sizes) == 3
    assert measured.result.whole is None
    assert any("vocabularies differ" in note for note in measured.notes)


def test_padding_of_the_embedding_does_not_hide_a_model_from_its_base(tmp_path: Path, text: str) -> None:
    whole = write_model(tmp_path / "whole")
    padded = widened(whole, tmp_path / "padded", [*range(32), *[-1] * 8], WORDS)
    found = against(measure_text([loaded(padded), loaded(whole)], text, "text"))
    assert (found.vocabulary, found.shared) == ("shared", 3 + len(WORDS))
    assert found.kl.value == pytest.approx(0, abs=1e-6)


def test_tokenizers_that_cut_everything_differently_cannot_be_compared(tiny: Loaded, text: str, tmp_path: Path) -> None:
    write_model(tmp_path)
    write_tokenizer(tmp_path, [f"x{word}" for word in WORDS])
    with pytest.raises(DataError, match=r"tokenizers of .* give a text of documents"):
        measure_text([loaded(tmp_path), tiny], text.replace("<|endoftext|>", " "), "text")


def test_documents_that_are_cut_otherwise_are_compared_by_the_byte(tiny: Loaded, text: str, tmp_path: Path) -> None:
    write_model(tmp_path, seed=1)
    tokens = [f"x{word}" for word in WORDS]
    write_tokenizer(tmp_path, tokens)
    both = text + "<|endoftext|>" + " ".join(tokens)
    found = measure_text([loaded(tmp_path), tiny], both, "text")
    assert found.result.divergence is None
    assert found.unit == "bits"
    alone = [measure_text([model], both, "text") for model in (loaded(tmp_path), tiny)]
    assert found.result == alone[0].result
    for place, (nats, nbytes) in enumerate(alone[0].own.values()):
        own, size = alone[1].own[place]
        assert found.totals[place] == pytest.approx(nats / math.log(2))
        assert found.sizes[place] == nbytes
        assert found.base_totals[place] / nbytes == pytest.approx(own / math.log(2) / size)
    verdict = compare_losses("loss", found.totals, found.base_totals, found.sizes, unit="bits")
    assert verdict.base.value == pytest.approx(sum(found.base_totals) / sum(found.sizes))


def test_samples_are_at_most_so_many(tiny: Loaded, text: str) -> None:
    assert measure_text([tiny], text, "text", samples=5).result.documents == 5
    assert measure_text([tiny], text, "text", samples=500).result == measure_text([tiny], text, "text").result


def test_a_context_beyond_the_positions_is_refused(tiny: Loaded, text: str) -> None:
    with pytest.raises(UsageError, match="64 positions"):
        measure_text([tiny], text, "text", context=65)


def test_a_model_that_gives_nan_is_an_error(tiny: Loaded, text: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "nan")
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.full((32,), math.nan)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for models in ([loaded(folder)], [loaded(folder), tiny], [tiny, loaded(folder)]):
        with pytest.raises(CheckpointError, match="nan: the model gives NaN"):
            measure_text(models, text, "text")


def test_what_is_measured_is_not_measured_again(
    tiny: Loaded, other: Loaded, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure_text([tiny, other], text, "text", tokens_per_batch=40)
    kept: dict[str, bytes] = {}
    real, runs = divergence._measure, 0

    def killed(*arguments: Any) -> torch.Tensor:
        nonlocal runs
        runs += 1
        if runs == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(divergence, "_measure", killed)
    with pytest.raises(KeyboardInterrupt):
        measure_text([tiny, other], text, "text", tokens_per_batch=40, unfinished=kept)
    again = measure_text([tiny, other], text, "text", tokens_per_batch=40, unfinished=kept)
    assert again == expected or (again.result, again.totals) == (expected.result, expected.totals)
    assert runs == len(kept) + 1  # one was lost, none was run twice


def test_a_budget_takes_documents_by_chance_and_says_so(
    tiny: Loaded, other: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that stands still but for forwards, of 1 s a sequence."""
    now = 0.0
    real = divergence._measure

    def slow(models: Any, batch: Any, *rest: Any) -> torch.Tensor:
        nonlocal now
        now += len(batch.index)
        return real(models, batch, *rest)

    text = "\n<|endoftext|>\n".join(" ".join((WORDS[n % 9 :] + WORDS)[:10]) for n in range(24))
    monkeypatch.setattr(divergence, "_measure", slow)
    monkeypatch.setattr(divergence, "_PILOT_TOKENS", 30)
    monkeypatch.setattr("time.monotonic", lambda: now)
    found = measure_text([tiny, other], text, "text", budget=10.0, seed=1)
    assert (found.result.available, found.result.documents, now) == (24, 9, 9.0)
    assert len(found.sizes) == 9
    assert any("9 of 24 documents of text fitted into the time" in note for note in found.notes)
    assert measure_text([tiny, other], text, "text").result.sha256 != found.result.sha256
    kept = {"text count": b"9"}
    assert measure_text([tiny, other], text, "text", budget=0.1, seed=1, unfinished=kept).result == found.result


def test_stories_3m_has_its_published_loss(assets: Path) -> None:
    model, content = loaded(assets / "models/stories-3m"), read_text(f"{assets}/data/tinystories/sample.txt[-200:]")
    found = measure_text([model], content, "stories", context=512).result
    assert found.loss.value == pytest.approx(1.2486, abs=1e-4)
    assert found.loss.value == pytest.approx(plain(model, content, 512)[0], abs=1e-6)
    assert (found.documents, found.tokens, found.kind) == (200, 65212, "documents")


def test_a_house_model_is_measured_on_windows(assets: Path) -> None:
    content = read_text(assets / "data/books/valid.txt")
    found = measure_text([loaded(assets / "models/house-llama")], content, "books", context=256, samples=50).result
    assert (found.kind, found.documents, found.tokens) == ("windows", 50, 50 * 255)
    assert found.loss.value == pytest.approx(4.341, abs=4 * found.loss.stderr)
