"""A family table proves itself: change a basis on the stored tensors, reload, and the logits do not move."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tersely.bases import Basis, Diagonal, Index, Orthogonal
from tersely.checkpoint import open_checkpoint
from tersely.errors import CheckpointError, UsageError
from tersely.families import families
from tersely.graph import Graph, Piece, read_graph
from tersely.rebase import fold_norms, rebase
from tests import tiny

FILE = "model.safetensors"
EXACT = 1e-5  # of the largest logit, in float32

# Forms of a family that differ in their table rows, as (model_type, overrides).
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in tiny.FAMILIES},
    "qwen2 tied": ("qwen2", {"tied": True}),
    "qwen3_moe with a dense block": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "deepseek_v3 without a query latent": ("deepseek_v3", {"q_lora_rank": None}),
    "gpt2 untied": ("gpt2", {"tied": False}),
    "gpt_neox sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "bert untied": ("bert", {"tied": False}),
    "t5 gated": ("t5", {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 3}),
    "opt post-norm": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt post-norm untied": (
        "opt",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 32, "tied": False},
    ),
    "stablelm parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": False}),
}
form = pytest.mark.parametrize("form", FORMS)

# What only act(...) weights write: no scale folds.
UNGATED = {"gpt2", "opt", "gpt_neox", "bert", "t5", "starcoder2"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def make(name: str) -> Path:
        model_type, overrides = FORMS[name]
        return tiny.tiny(model_type, tmp_path_factory.mktemp("tiny") / name.replace(" ", "_"), **overrides)

    return make


@cache
def reference(path: Path) -> Tensor:
    return tiny.forward(path)


def shift(path: Path, changed: Mapping[str, Tensor], folder: Path) -> float:
    """How far the logits move when tensors are replaced, as a share of the largest logit."""
    shutil.copytree(path, folder, dirs_exist_ok=True)
    stored = load_file(folder / FILE)
    assert set(changed) <= set(stored)
    save_file({**stored, **changed}, folder / FILE, metadata={"format": "pt"})
    before, after = reference(path), tiny.forward(folder)
    return float((after - before).abs().max() / before.abs().max())


def places(graph: Graph, space: str, *, alone: bool) -> list[dict[str, Any]]:
    """Every (unit, expert) in which a space has a basis of its own; `alone`: not with those that share it."""
    mixed = next((set(pair) for pair in graph.family.mixes.items() if space in pair), None)
    own = graph.coordinates[space]
    group = mixed or ({space} if alone else {s for s, c in graph.coordinates.items() if c == own})
    touching = [w for w in graph.weights if group & {*w.reads.spaces, *w.writes.spaces}]
    if any(w.block is None for w in touching) or graph.head_space in group:
        return [{}]
    found: dict[str, set[int | None]] = {}
    for w in touching:
        found.setdefault(w.unit, set()).add(w.expert)
    return [
        {"unit": unit, "expert": expert}
        for unit, experts in found.items()
        for expert in ([None] if None in experts else experts)
    ]


def everywhere(
    graph: Graph, tensors: Mapping[str, Tensor], space: str, basis: Callable[[int], Basis], *, alone: bool
) -> dict[str, Tensor]:
    """Rebase a space in all blocks and experts, each with a basis of its own."""
    changed: dict[str, Tensor] = {}
    for place in places(graph, space, alone=alone):
        changed |= rebase(graph, {**tensors, **changed}, space, basis(width(graph, space)), **place)
    return changed


def width(graph: Graph, space: str) -> int:
    """Coordinates of a space; of one head where attention mixes it."""
    if any(space in pair for pair in graph.family.mixes.items()):
        size = graph.size(next(v for pair in graph.family.mixes.items() if space in pair for v in pair[1:]))
        assert size
        return size // graph.sizes["kv_heads"]
    return graph.size(space) or 4


def permutation(n: int) -> Basis:
    return Index(torch.randperm(n))


def scaling(n: int) -> Basis:
    return Diagonal((torch.rand(n) + 0.5) * torch.where(torch.rand(n) < 0.3, -1.0, 1.0))


def rotation(n: int) -> Basis:
    return Orthogonal(torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0])


def mean_keeping_rotation(n: int) -> Basis:
    """Random, but the all-ones direction stays."""
    first = torch.linalg.qr(torch.cat([torch.ones(n, 1), torch.randn(n, n - 1)], 1).double())[0]
    turn = torch.eye(n, dtype=torch.float64)
    turn[1:, 1:] = torch.linalg.qr(torch.randn(n - 1, n - 1, dtype=torch.float64))[0]
    return Orthogonal(first @ turn @ first.T)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        yield


@form
def test_every_stored_tensor_is_claimed_once_and_none_is_missing(form: str, made: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(made(form))
    graph = read_graph(checkpoint)
    assert sorted(w.name for w in graph.weights) == sorted(checkpoint)
    assert graph.extra == ()
    for weight in graph.weights:
        assert graph.weight(weight.name) is weight
        assert weight in graph.unit(weight.unit)


@form
def test_a_removed_tensor_is_named(form: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    path = made(form)
    stored = load_file(path / FILE)
    graph = read_graph(open_checkpoint(path))
    shutil.copytree(path, tmp_path / "copy")
    for name in stored:
        if name == "cls.predictions.decoder.bias":
            continue  # a copy of cls.predictions.bias
        if ".experts." in name and not name.startswith(graph.units[-1]):
            continue  # one block shows it
        save_file({k: v for k, v in stored.items() if k != name}, tmp_path / "copy" / FILE, {"format": "pt"})
        with pytest.raises(CheckpointError, match=re.escape(name) + "( or .*)? is missing"):
            read_graph(open_checkpoint(tmp_path / "copy"))


@form
def test_permuting_a_space_leaves_the_logits(form: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    path = made(form)
    graph, tensors = read_graph(open_checkpoint(path)), load_file(path / FILE)
    permuted, seen, refused = set(), set(), {}
    for space in graph.coordinates:
        if graph.coordinates[space] in seen or space == "tokens":
            continue
        seen.add(graph.coordinates[space])
        try:
            changed = everywhere(graph, tensors, space, permutation, alone=False)
        except UsageError as error:
            refused[space] = str(error)
            continue
        assert changed
        for name, new in changed.items():
            assert new.dtype == tensors[name].dtype
            assert new.shape == tensors[name].shape
            assert not torch.equal(new, tensors[name]), name
        assert shift(path, changed, tmp_path / space) < EXACT, space
        permuted.add(space)
    for space, reason in refused.items():
        assert re.match(rf"{space}: (no weight reads it|\w+ are given)", reason), reason
    wanted = {"residual", "v"}
    wanted |= {"expert"} if graph.has_experts else {"mlp"}
    wanted |= {"cross_v"} & set(graph.coordinates) | {"kv_latent", "shared"} & set(graph.coordinates)
    own = {graph.coordinates[s] for s in permuted}
    assert {graph.coordinates[s] for s in wanted} <= own


@form
def test_a_permutation_of_a_single_head_moves_the_logits_unless_all_that_share_it_follow(
    form: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    path = made(form)
    graph, tensors = read_graph(open_checkpoint(path)), load_file(path / FILE)
    heads, head = graph.sizes["kv_heads"], width(graph, "v")
    index = torch.stack([torch.randperm(head) + h * head for h in range(heads)]).reshape(-1)
    changed = rebase(graph, tensors, "v", Index(index), unit=graph.units[-1])
    assert shift(path, changed, tmp_path / "each") < EXACT
    writers_only = {k: v for k, v in changed.items() if "v" in graph.weight(k).writes.spaces}
    assert writers_only != changed
    assert shift(path, writers_only, tmp_path / "half") > 1e-2
    with pytest.raises(UsageError, match=r"each of its .* heads must keep"):
        rebase(graph, tensors, "v", Index(index.flip(0)), unit=graph.units[-1])


@form
def test_scaling_a_foldable_space_leaves_the_logits_and_others_refuse(
    form: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    path = made(form)
    graph, tensors = read_graph(open_checkpoint(path)), load_file(path / FILE)
    scaled, refused = set(), {}
    for space in graph.coordinates:
        try:
            changed = everywhere(graph, tensors, space, scaling, alone=True)
        except UsageError as error:
            refused[space] = str(error)
            continue
        assert changed
        assert shift(path, changed, tmp_path / space) < EXACT, space
        scaled.add(space)
    assert {"v", "attn"} <= scaled
    assert all(reason.startswith(f"{space}: ") for space, reason in refused.items())
    assert "a norm does not let a scale pass" in refused["residual"]
    if form.split()[0] in UNGATED and form != "t5 gated":
        assert "only act(...) weights write it" in refused["mlp"]
    elif "mlp" in graph.coordinates and any("mlp" in w.writes.spaces for w in graph.weights):
        assert "mlp" in scaled
    assert "expert" in scaled or not graph.has_experts
    assert scaled >= {"attn_in", "mlp_in"} & set(graph.coordinates)
    assert (graph.head_space in refused) == (graph.tied or form == "opt post-norm")
    if graph.tied:
        assert "tied" in refused[graph.head_space]


ROTATABLE = {"llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "mixtral", "qwen3_moe", "granite", "smollm3"} | {
    "deepseek_v3"
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rotating_the_residual_leaves_the_logits_where_it_is_legal(family: str, tmp_path: Path) -> None:
    # T5 has no untied form in transformers 5 but by storing a head that differs.
    path = tiny.tiny(family, tmp_path / "source", tied=None if family == "t5" else False)
    if family == "t5":
        stored = load_file(path / FILE)
        save_file({**stored, "lm_head.weight": torch.randn_like(stored["shared.weight"])}, path / FILE)
    graph, tensors = read_graph(open_checkpoint(path)), load_file(path / FILE)
    folded = tensors | fold_norms(graph, tensors)
    size = width(graph, "residual")
    if family in ROTATABLE | {"t5"}:
        with pytest.raises(UsageError, match=r"residual: the gain of .* is not folded into its readers"):
            rebase(graph, tensors, "residual", rotation(size))
        changed = rebase(graph, folded, "residual", rotation(size))
        assert shift(path, folded, tmp_path / "folded") < EXACT
        assert shift(path, folded | changed, tmp_path / "rotated") < EXACT
    elif family in {"gemma2", "gemma3_text", "olmo2", "bert"}:
        with pytest.raises(UsageError, match=r"residual: .*orm.weight writes residual directly"):
            rebase(graph, folded, "residual", rotation(size))
    else:
        with pytest.raises(UsageError, match=r"residual: .* is a LayerNorm and subtracts the mean"):
            rebase(graph, folded, "residual", rotation(size))
        changed = rebase(graph, folded, "residual", mean_keeping_rotation(size))
        assert shift(path, folded, tmp_path / "folded") < EXACT
        assert shift(path, folded | changed, tmp_path / "rotated") < EXACT


@form
def test_rotating_within_heads_leaves_the_logits_and_gated_spaces_refuse(
    form: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    path = made(form)
    graph, tensors = read_graph(open_checkpoint(path)), load_file(path / FILE)
    changed = everywhere(graph, tensors, "attn", rotation, alone=True)
    for latent in {"q_latent", "kv_latent"} & set(graph.coordinates):
        if places(graph, latent, alone=False):
            changed |= fold_norms(graph, tensors | changed, latent)
            changed |= everywhere(graph, tensors | changed, latent, rotation, alone=False)
    assert shift(path, changed, tmp_path / "rotated") < EXACT
    for space in {"mlp", "expert", "shared"} & set(graph.coordinates):
        for place in places(graph, space, alone=False):
            with pytest.raises(UsageError, match=f"{space}: a non-linearity after"):
                rebase(graph, tensors, space, rotation(width(graph, space)), **place)


def test_a_tied_head_takes_no_gain(made: Callable[[str], Path]) -> None:
    path = made("smollm3")
    graph, tensors = read_graph(open_checkpoint(path)), load_file(path / FILE)
    with pytest.raises(UsageError, match=r"head_in: the gain of model.norm.weight cannot go into the head"):
        fold_norms(graph, tensors)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_reordering_the_vocabulary_reorders_the_logits(
    family: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    path = made(family)
    graph, tensors = read_graph(open_checkpoint(path)), load_file(path / FILE)
    order = torch.cat([torch.arange(60), torch.tensor([63, 61, 60, 62])])  # ids in use stay
    changed = rebase(graph, tensors, "tokens", Index(order))
    shutil.copytree(path, tmp_path / "copy")
    save_file(tensors | changed, tmp_path / "copy" / FILE, metadata={"format": "pt"})
    torch.testing.assert_close(tiny.forward(tmp_path / "copy"), reference(path)[..., order])


def test_dropping_coordinates_leaves_a_model_of_that_width(made: Callable[[str], Path], tmp_path: Path) -> None:
    path = made("phi3")
    graph, tensors = read_graph(open_checkpoint(path)), load_file(path / FILE)
    mlp = everywhere(graph, tensors, "mlp", lambda n: Index(torch.randperm(n)[:64]), alone=True)
    wide = everywhere(graph, tensors | mlp, "residual", lambda n: Index(torch.randperm(n)[:32]), alone=False)
    shutil.copytree(path, tmp_path / "copy")
    save_file(tensors | mlp | wide, tmp_path / "copy" / FILE, metadata={"format": "pt"})
    write_config(tmp_path / "copy", intermediate_size=64, hidden_size=32, head_dim=16)
    assert read_graph(open_checkpoint(tmp_path / "copy")).size("mlp") == 64
    assert all(t.shape != tensors[n].shape for n, t in wide.items())


def test_the_wrong_table_moves_the_logits(made: Callable[[str], Path], tmp_path: Path) -> None:
    path = made("gemma2")
    shutil.copytree(path, tmp_path / "as_llama")
    stored = load_file(path / FILE)
    # Llama's table has no rows for two of Gemma's norms: leave them out, as a tool that guesses would.
    known = {n: t for n, t in stored.items() if "feedforward" not in n}
    save_file(known, tmp_path / "as_llama" / FILE, metadata={"format": "pt"})
    write_config(tmp_path / "as_llama", model_type="llama", tie_word_embeddings=True)
    graph = read_graph(open_checkpoint(tmp_path / "as_llama"))
    for space in ("attn_in", "mlp_in"):
        changed = everywhere(graph, stored, space, scaling, alone=True)
        assert shift(path, changed, tmp_path / space) > 1e-2


class Inputs(TorchFunctionMode):
    """Records what each matrix is multiplied with, by the address of the matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, list[Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear:
            self.seen.setdefault(args[1].data_ptr(), []).append(args[0].reshape(-1, args[0].shape[-1]))
        elif func is torch.addmm:
            self.seen.setdefault(args[2].data_ptr(), []).append(args[1])
        return func(*args, **(kwargs or {}))


def filled(pieces: tuple[Piece, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    """The parameter in memory that stored tensors fill."""
    if pieces[0].index is None and len(pieces) == 1:
        return tensors[pieces[0].weight.name]
    rows = max(p.start + p.rows for p in pieces)
    rest = tensors[pieces[0].weight.name].shape[1:]
    slots = 1 if pieces[0].index is None else 1 + max(p.index or 0 for p in pieces)
    result = torch.full((slots, rows, *rest), torch.nan)
    for piece in pieces:
        result[piece.index or 0, piece.start : piece.start + piece.rows] = tensors[piece.weight.name]
    return result if pieces[0].index is not None else result[0]


@form
def test_every_parameter_in_memory_is_filled_by_what_the_table_says(form: str, made: Callable[[str], Path]) -> None:
    path = made(form)
    graph, tensors = read_graph(open_checkpoint(path)), load_file(path / FILE)
    memory = tiny.load(path).state_dict(keep_vars=True)
    named: dict[str, tuple[Piece, ...]] = dict(graph.parameters(""))
    for unit in graph.units:
        named |= {f"{unit}.{name}": pieces for name, pieces in graph.parameters(unit).items()}
    used = [piece.weight.name for pieces in named.values() for piece in pieces]
    assert sorted(used) == sorted(tensors)
    loaded = {t.data_ptr() for t in memory.values()}
    for name, pieces in named.items():
        assert torch.equal(filled(pieces, tensors), memory[name].detach()), name
        loaded.discard(memory[name].data_ptr())
    assert not loaded, [n for n, t in memory.items() if t.data_ptr() in loaded]


@form
@torch.no_grad()
def test_weights_share_statistics_if_and_only_if_they_multiply_the_same_activations(
    form: str, made: Callable[[str], Path]
) -> None:
    path = made(form)
    graph = read_graph(open_checkpoint(path))
    model: Any = tiny.load(path)
    model.set_experts_implementation("eager")
    parameters = model.state_dict(keep_vars=True)
    with Inputs() as inputs:
        model(**tiny.inputs(model.config.model_type))
    for unit in ("", *graph.units):
        groups: dict[str, list[Tensor]] = {}
        for name, pieces in graph.parameters(unit).items():
            parameter = parameters[f"{unit}.{name}" if unit else name]
            for piece in pieces:
                if piece.weight.kind != "linear":
                    continue
                slot = parameter if piece.index is None else parameter[piece.index]
                seen = inputs.seen.get(slot.data_ptr())
                if seen is None and piece.weight.expert is not None:
                    continue  # no token went to this expert
                assert seen is not None, name
                assert len(seen) == 1, name
                groups.setdefault(piece.weight.statistics, []).append(seen[0])
        for statistics, shared in groups.items():
            assert all(torch.equal(shared[0], other) for other in shared[1:]), (unit, statistics)
            for other, theirs in groups.items():
                if other != statistics and theirs[0].shape == shared[0].shape:
                    assert not torch.equal(shared[0], theirs[0]), (unit, statistics, other)
        assert set(graph.stages(unit)) >= {s.partition(" of expert ")[0] for s in groups}


def write_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def refusal(path: Path, folder: Path, **changes: Any) -> str:
    """What read_graph says of a checkpoint whose config is changed."""
    shutil.copytree(path, folder)
    write_config(folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        read_graph(open_checkpoint(folder))
    shutil.rmtree(folder)
    return str(caught.value)


def test_an_unknown_family_is_an_error_that_lists_the_known(made: Callable[[str], Path], tmp_path: Path) -> None:
    said = refusal(made("llama"), tmp_path / "x", model_type="lama")
    for known in (*families(), "nearest: llama", "no family table for model_type 'lama'"):
        assert known in said
    assert set(families()) == set(tiny.FAMILIES)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_config_that_contradicts_the_tensors_is_an_error(
    family: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    path = made(family)
    config = open_checkpoint(path).config
    wrong = {
        key: value
        for key, value in config.items()
        if key
        in {"vocab_size", "intermediate_size", "moe_intermediate_size", "n_inner", "ffn_dim", "d_ff"}
        | {"hidden_size", "n_embd", "d_model", "num_local_experts", "num_experts", "n_routed_experts"}
    }
    assert len(wrong) >= 3
    for key, value in wrong.items():
        if key == "intermediate_size" and family == "qwen3_moe":
            continue  # of dense blocks, and it has none
        for other in (value * 2, value // 2):
            said = refusal(path, tmp_path / "x", **{key: other})
            counted = r"is missing.*|is stored.*" if "experts" in key else r"has shape \[[\d, ]+\], but .* \d+ for .*"
            assert re.search(rf"\.\w+ ({counted}){key} = {other}", said), said
    key = next(k for k in ("num_hidden_layers", "num_layers", "n_layer") if k in config)
    for other in (1, 3):
        if (family, other) != ("deepseek_v3", 1):  # the second would be one for multi-token prediction
            assert f"{key} = {other}" in refusal(path, tmp_path / "x", **{key: other})


def test_blocks_for_multi_token_prediction_are_carried_over(made: Callable[[str], Path], tmp_path: Path) -> None:
    path = made("deepseek_v3")
    shutil.copytree(path, tmp_path / "x")
    stored = load_file(path / FILE)
    beyond = {
        name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in stored.items() if "layers.1." in name
    } | {"model.layers.2.enorm.weight": torch.ones(64), "model.layers.2.eh_proj.weight": torch.ones(64, 128)}
    save_file(stored | beyond, tmp_path / "x" / FILE, metadata={"format": "pt"})
    graph = read_graph(open_checkpoint(tmp_path / "x"))
    assert sorted(graph.extra) == sorted(beyond)
    assert graph.units == ("model.layers.0", "model.layers.1")
    said = refusal(tmp_path / "x", tmp_path / "y", num_nextn_predict_layers=0, num_mtp_layers=0)
    assert re.search(r"layers\.2\..* is stored, but the config says 2 blocks", said)


# How checkpoints on the hub differ from what transformers 5 writes: renamed, added.
HUB: dict[str, tuple[str, Callable[[str], str], dict[str, Tensor]]] = {
    "gpt2": (
        "gpt2",
        lambda name: name.removeprefix("transformer."),
        {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)},
    ),
    "bert-base-uncased": (
        "bert",
        lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
        {
            "bert.pooler.dense.weight": torch.ones(64, 64),
            "bert.pooler.dense.bias": torch.ones(64),
            "cls.seq_relationship.weight": torch.ones(2, 64),
            "cls.seq_relationship.bias": torch.ones(2),
            "bert.embeddings.position_ids": torch.arange(64)[None],
        },
    ),
    "BertModel": ("bert", lambda name: name.removeprefix("bert."), {}),
    "t5-small": (
        "t5",
        lambda name: name,
        {
            "encoder.embed_tokens.weight": torch.ones(64, 64),
            "decoder.embed_tokens.weight": torch.ones(64, 64),
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(32, 4),
        },
    ),
    "pythia": (
        "gpt_neox",
        lambda name: name,
        {
            "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64),
            "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
        },
    ),
    "llama-2": ("llama", lambda n: n, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    "opt": ("opt", lambda name: name.removeprefix("model."), {}),
}


@pytest.mark.parametrize("hub", HUB)
def test_the_forms_that_the_hub_stores_are_read(hub: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    family, rename, added = HUB[hub]
    plain = read_graph(open_checkpoint(made(family)))
    shutil.copytree(made(family), tmp_path / "x")
    stored = {rename(n): t for n, t in load_file(tmp_path / "x" / FILE).items()}
    save_file(stored | added, tmp_path / "x" / FILE, metadata={"format": "pt"})
    graph = read_graph(open_checkpoint(tmp_path / "x"))
    assert {*(w.name for w in graph.weights), *graph.extra} == set(stored) | set(added)
    assert graph.units == plain.units
    assert {w.parameter for w in plain.weights} <= {w.parameter for w in graph.weights}
    assert graph.tied == plain.tied
    names = {w.name: w.parameter for w in graph.weights if w.unit == plain.units[-1]}
    assert list(names.values()) == [w.parameter for w in plain.unit(plain.units[-1])]


def test_two_names_of_one_parameter_are_an_error(made: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(made("bert"), tmp_path / "x")
    stored = load_file(tmp_path / "x" / FILE)
    stored["bert.embeddings.LayerNorm.gamma"] = stored["bert.embeddings.LayerNorm.weight"].clone()
    save_file(stored, tmp_path / "x" / FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="two names of one parameter"):
        read_graph(open_checkpoint(tmp_path / "x"))
