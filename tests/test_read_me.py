"""Dense blocks split into experts: what a mixture keeps of its source, what each expert has, where tokens go."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.calibrate import Sequences
from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.compression import compress
from tersely.errors import UsageError
from tersely.export.gguf import write_gguf
from tersely.families import mixtures
from tersely.graph import read_graph
from tersely.methods.encode.rtn import RTN
from tersely.methods.split import Block, ReadMe
from tersely.methods.split.read_me import train_router
from tersely.plan.recipe import Recipe, Step, ToExperts
from tersely.shape import experts
from tersely.shape.run import reshape
from tersely.shape.setup import Setup
from tersely.writer import Writer
from tests.tiny import MLP, forward, inputs, load, tiny

DENSE = tuple(mixtures())
LENGTHS = (9, 7, 9, 12, 5, 9, 11, 8)
CPU = torch.device("cpu")
PLAIN = ReadMe(multiple=1, iterations=20)
DOMAINS = ("tokens", "texts")


def texts(lengths: tuple[int, ...] = LENGTHS) -> Sequences:
    generator = torch.Generator().manual_seed(11)
    return Sequences(
        tuple(torch.randint(3, 60, (n,), generator=generator) for n in lengths), "documents", lengths, "texts"
    )


def split(source: Path, method: ReadMe, folder: Path, *, resume: bool = False) -> Checkpoint:
    """As a job does it: what cannot be is said before anything is written."""
    planned(source, method)
    setup = Setup(texts(), {}, torch.float32, CPU, 0, resume, lambda *_: None)
    with torch.no_grad():
        return reshape(open_checkpoint(source), ToExperts("neurons", method), folder, setup)[0]


def planned(source: Path, method: ReadMe) -> Checkpoint:
    checkpoint = open_checkpoint(source)
    return experts.planned(checkpoint, read_graph(checkpoint), method)


def reconfigured(source: Path, without: tuple[str, ...] = (), **changed: Any) -> Path:
    file = source / "config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k not in without}
    file.write_text(json.dumps(config | changed))
    return source


def block(*, tokens: int = 400, neurons: int = 40, seed: int = 3) -> Block:
    """Random inputs and weights, with activations that are a gate's."""
    drawn = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(tokens, 24, generator=drawn)
    gate_NI, up_NI = torch.randn(2, neurons, 24, generator=drawn) / 5
    down_ON = torch.randn(24, neurons, generator=drawn)
    return Block(
        x_TI,
        lambda x: torch.nn.functional.silu(x @ gate_NI.t()) * (x @ up_NI.t()),
        down_ON,
        None,
        torch.float32,
    )


@pytest.mark.parametrize(("model_type", "top_k"), [*((model_type, 1) for model_type in DENSE), (DENSE[0], 2)])
def test_experts_with_all_neurons_give_the_logits_of_the_dense_model(
    model_type: str, top_k: int, tmp_path: Path
) -> None:
    source = tiny(model_type, tmp_path / "source", tied=True)
    split(source, replace(PLAIN, keep=1.0, top_k=top_k), tmp_path / "out")
    torch.testing.assert_close(forward(tmp_path / "out"), forward(source), atol=2e-5, rtol=1e-5)


def test_what_a_config_leaves_to_transformers_stays_as_it_was_meant(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path / "source", rms_norm_eps=1e-6)
    reconfigured(source, ("rms_norm_eps", "rope_parameters", "head_dim", "hidden_act", "max_position_embeddings"))
    split(source, replace(PLAIN, keep=1.0), tmp_path / "out")
    torch.testing.assert_close(forward(tmp_path / "out"), forward(source), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("model_type", "domains"), [("llama", "texts"), ("qwen3", "tokens")])
def test_a_mixture_computes_what_the_dense_model_does_with_the_other_neurons_silent(
    model_type: str, domains: Any, tmp_path: Path
) -> None:
    source = tiny(model_type, tmp_path / "source")
    made = split(source, replace(PLAIN, domains=domains, refit=False), tmp_path / "out")
    dense: Any = load(source)
    for unit in read_graph(made).units:
        mlp = dense.get_submodule(unit).mlp
        own = {w.expert: w for w in read_graph(made).unit(unit) if w.role == "expert" and w.leaf == "weight"}
        router = next(w for w in read_graph(made).unit(unit) if w.role == "router")
        kept_EN = torch.stack([held(mlp.down_proj.weight, made[own[e].name]) for e in range(PLAIN.experts)])
        assert kept_EN.sum(1).tolist() == [PLAIN.width(MLP)] * PLAIN.experts
        silence(mlp, made[router.name], kept_EN)
    with torch.no_grad():
        logits = dense(**inputs(model_type)).logits
    torch.testing.assert_close(forward(tmp_path / "out"), logits, atol=1e-5, rtol=1e-5)


def held(down_ON: Tensor, own_OK: Tensor) -> Tensor:
    """Which columns of a weight another one has, (N,), 0 or 1."""
    same_NK = (down_ON.t()[:, None] == own_OK.t()[None]).all(2)
    kept_N: Tensor = same_NK.any(1)
    return kept_N.float()


def silence(mlp: Any, router_EI: Tensor, kept_EN: Tensor) -> None:
    """Let a dense MLP run with the neurons of one expert for each token."""
    plain = mlp.forward

    def forward(x: Tensor) -> Tensor:
        chosen = (x @ router_EI.t()).argmax(-1)
        hook = mlp.down_proj.register_forward_pre_hook(lambda _module, given: given[0] * kept_EN[chosen])
        try:
            y: Tensor = plain(x)
        finally:
            hook.remove()
        return y

    mlp.forward = forward


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.77])
@pytest.mark.parametrize("multiple", [1, 8])
def test_every_expert_has_exactly_its_share_of_neurons(keep: float, multiple: int) -> None:
    made = replace(PLAIN, keep=keep, multiple=multiple)(given := block())
    wanted = round(keep * 40) // multiple * multiple
    assert made.kept_EK.shape == (4, wanted)
    assert all(len(kept_K) == wanted and bool((kept_K.diff() > 0).all()) for kept_K in made.kept_EK)
    assert made.down_EOK.shape == (4, len(given.down_ON), wanted)
    assert made.share_E.sum() == 1


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_refitted_expert_is_nearer_to_the_block_on_its_tokens(top_k: int) -> None:
    given = block()
    plain, refitted = (replace(PLAIN, top_k=top_k, refit=refit)(given) for refit in (False, True))
    assert torch.equal(plain.kept_EK, refitted.kept_EK)
    a_TN = given.neurons(given.x_TI)
    chosen_Tk = (given.x_TI @ plain.router_EI.t()).topk(top_k).indices
    for expert, kept_K in enumerate(plain.kept_EK):
        own_TN = a_TN[(chosen_Tk == expert).any(1)]
        wanted, x_TK = own_TN @ given.down_ON.t(), own_TN[:, kept_K]
        assert torch.equal(plain.down_EOK[expert], given.down_ON[:, kept_K])
        before = (x_TK @ plain.down_EOK[expert].t() - wanted).norm()
        assert (x_TK @ refitted.down_EOK[expert].t() - wanted).norm() < before


def planted(texts: int, tokens: int) -> tuple[Block, Tensor]:
    """Four kinds of tokens, each with a direction of its own and eight neurons that only they set off, beside eight
    that all do; of each text and each token its kind."""
    drawn = torch.Generator().manual_seed(5)
    kind_T = torch.arange(texts).repeat_interleave(tokens // texts) % 4
    x_TI = 6 * torch.nn.functional.one_hot(kind_T, 16).float() + torch.rand(len(kind_T), 16, generator=drawn) / 4
    gate_NI = torch.zeros(40, 16)
    for neuron in range(32):
        gate_NI[neuron, neuron // 8] = 1
    gate_NI[32:, :4] = 1
    return Block(x_TI, lambda x: (x @ gate_NI.t() - 2).relu(), torch.rand(8, 40), None, torch.float32), kind_T


@pytest.mark.parametrize("domains", DOMAINS)
def test_planted_neurons_of_a_domain_are_in_its_expert_and_its_tokens_go_there(domains: Any) -> None:
    given, kind_T = planted(20, 400)
    method = replace(PLAIN, keep=0.4, domains=domains)
    if method.by_text:
        activity_SN = torch.stack([given.neurons(x).mean(0) for x in torch.split(given.x_TI, 20)])
        group_S = method.group([activity_SN, activity_SN], seed=1)
        means = [activity_SN[group_S == expert].mean(0) for expert in range(4)]
        given = replace(given, activity_EN=torch.stack(means))
    made = method(given)
    expert_of = {int(kept_K[0]) // 8: expert for expert, kept_K in enumerate(made.kept_EK)}
    assert sorted(expert_of) == [0, 1, 2, 3]
    for kind, expert in expert_of.items():
        assert made.kept_EK[expert].tolist() == [*range(8 * kind, 8 * kind + 8), *range(32, 40)]
    chosen_T = (given.x_TI @ made.router_EI.t()).argmax(1)
    assert chosen_T.tolist() == [expert_of[int(kind)] for kind in kind_T]
    assert made.share_E.tolist() == [0.25] * 4


def test_a_router_is_trained_to_the_minimum_of_its_loss() -> None:
    drawn = torch.Generator().manual_seed(2)
    x_TI = torch.randn(300, 6, generator=drawn) * torch.tensor([9.0, 1, 1, 0.1, 1, 1])
    truth_EI = torch.randn(3, 6, generator=drawn)
    target_TE = (x_TI @ truth_EI.t()).softmax(1)
    found_EI = train_router(x_TI, target_TE, 200)
    given_TE = (x_TI @ found_EI.t()).softmax(1)
    assert (given_TE - target_TE).abs().mean() < 0.01


def test_domains_of_texts_are_the_same_for_the_same_seed_and_of_equal_texts_there_are_none() -> None:
    activity_SN = torch.rand(12, 30, generator=torch.Generator().manual_seed(4))
    assert torch.equal(PLAIN.group([activity_SN], 7), PLAIN.group([activity_SN], 7))
    assert sorted(set(PLAIN.group([activity_SN], 7).tolist())) == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="too much alike for so many domains; use fewer"):
        PLAIN.group([torch.ones(12, 30)], 7)
    with pytest.raises(UsageError, match="experts=4 need as many texts at least, and the calibration has 3"):
        PLAIN.group([activity_SN[:3]], 7)


@pytest.mark.parametrize("model_type", DENSE)
def test_what_is_planned_is_what_is_written(model_type: str, tmp_path: Path) -> None:
    source = tiny(model_type, tmp_path / "source", dtype=torch.bfloat16)
    made, headers = split(source, PLAIN, tmp_path / "out"), planned(source, PLAIN)
    assert made.config == headers.config
    assert {n: (made.spec(n).shape, made.spec(n).dtype) for n in made} == {
        n: (headers.spec(n).shape, headers.spec(n).dtype) for n in headers
    }
    assert made.spec(next(iter(made))).dtype == torch.bfloat16


def test_parameters_in_all_and_for_a_token_are_those_of_the_formula(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path / "source", tied=False)
    method = ReadMe(experts=5, keep=0.5, top_k=2, multiple=16)
    before = numbers(open_checkpoint(source), top_k=1)
    mixture = planned(source, method)
    hidden, blocks, width = 64, 2, MLP // 2
    assert numbers(mixture, top_k=5) - before == blocks * (3 * hidden * (5 * width - MLP) + 5 * hidden)
    assert numbers(mixture, top_k=2) - before == blocks * (3 * hidden * (2 * width - MLP) + 5 * hidden)


def numbers(checkpoint: Checkpoint, *, top_k: int) -> int:
    """Parameters that a token meets."""
    weights = [w for w in read_graph(checkpoint).weights if w.expert is None or w.expert < top_k]
    return sum(w.spec.nbytes // w.spec.dtype.itemsize for w in weights)


def test_where_a_token_goes_depends_on_nothing_after_it(tmp_path: Path) -> None:
    split(tiny("llama", tmp_path / "source"), PLAIN, tmp_path / "out")
    model: Any = load(tmp_path / "out")
    ids = inputs("llama")["input_ids"]
    other = ids.clone()
    other[:, 5:] = 9
    with torch.no_grad():
        both = [model(input_ids=each, output_router_logits=True).router_logits for each in (ids, other)]
    for one, another in zip(*both, strict=True):
        torch.testing.assert_close(one.view(*ids.shape, -1)[:, :5], another.view(*ids.shape, -1)[:, :5])


@pytest.mark.parametrize("domains", DOMAINS)
def test_a_split_that_was_interrupted_goes_on_to_the_same_bytes(
    domains: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, source = replace(PLAIN, domains=domains), tiny("llama", tmp_path / "source", blocks=3)
    whole = split(source, method, tmp_path / "whole")
    put = Writer.put

    def stopping(self: Writer, unit: str, *rest: Any) -> None:
        if unit == "block-00001":
            raise KeyboardInterrupt
        put(self, unit, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "put", stopping)
        with pytest.raises(KeyboardInterrupt):
            split(source, method, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert split(source, method, tmp_path / "out", resume=True).sha256() == whole.sha256()


@pytest.mark.parametrize(
    ("made", "method", "message"),
    [
        (lambda path: tiny("mixtral", path), PLAIN, "a mixtral model has experts already"),
        (lambda path: tiny("qwen2", path), PLAIN, "no stock mixture has the blocks of a qwen2 model; those of llama, "),
        (lambda path: tiny("llama", path, attention_bias=True), PLAIN, "mixtral models have no attention_bias = True"),
        (lambda path: tiny("llama", path), replace(PLAIN, keep=0.001), "no neuron is left of a block's 96; keep at"),
        (lambda path: tiny("llama", path), replace(PLAIN, multiple=128), "multiple=128: no neuron is left"),
    ],
)
def test_what_cannot_be_split_is_an_error_before_anything_is_written(
    made: Callable[[Path], Path], method: ReadMe, message: str, tmp_path: Path
) -> None:
    source = made(tmp_path / "source")
    with pytest.raises(UsageError, match=message):
        planned(source, method)
    with pytest.raises(UsageError, match=message):
        split(source, method, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 1}, "experts=1: expected 2 or more"),
        ({"top_k": 5}, "top_k=5: there are 4 experts"),
        ({"keep": 1.5}, "keep=1.5: expected a share"),
        ({"domains": "topics"}, "expected 'tokens' or 'texts'"),
        ({"ridge": 0.0}, "both are expected above 0"),
    ],
)
def test_settings_that_cannot_be_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ReadMe(**settings)


def test_a_mixture_is_quantized_like_any_other(tmp_path: Path) -> None:
    made = split(tiny("llama", tmp_path / "source"), replace(PLAIN, multiple=16), tmp_path / "out")
    compress(made.path, Recipe((Step("linear", RTN(bits=8, group=16)),)), tmp_path / "small", format="dense")
    apart = (forward(tmp_path / "small") - forward(made.path)).norm(dim=-1)
    assert 0 < apart.median() < 0.05 * forward(made.path).norm(dim=-1).median()


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_mixture_runs_in_llama_cpp(model_type: str, tmp_path: Path, llama: Any) -> None:
    split(tiny(model_type, tmp_path / "source"), replace(PLAIN, multiple=32), tmp_path / "out")
    write_gguf(tmp_path / "out", tmp_path / "out.gguf")
    with llama(tmp_path / "out.gguf") as model:
        theirs = torch.stack([model.logits(row) for row in inputs(model_type)["input_ids"].tolist()])
    ours = forward(tmp_path / "out")
    # Of the typical token: where two experts are about equal, another may be taken.
    assert ((theirs - ours).norm(dim=-1) / ours.norm(dim=-1)).median() < 1e-4
