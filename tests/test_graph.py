"""What a recipe can select, and in which order the weights of a block run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from tersely.checkpoint import open_checkpoint
from tersely.errors import UsageError
from tersely.families import families
from tersely.graph import Graph, read_graph
from tests import tiny

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.fixture(scope="module")
def graph_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Graph]:
    @cache
    def read(family: str) -> Graph:
        return read_graph(open_checkpoint(tiny.tiny(family, tmp_path_factory.mktemp(family), blocks=3)))

    return read


def paths(graph: Graph, where: str) -> list[str]:
    """Paths that a pattern selects, of one block where it selects the same in all."""
    chosen = graph.select(where)
    per_unit = {unit: [w.path for w in chosen if w.unit == unit] for unit in graph.units}
    assert len({tuple(p) for p in per_unit.values()}) == 1
    return per_unit[graph.units[0]]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("linear", ATTENTION + MLP),
        ("attention", ATTENTION),
        ("mlp", MLP),
        ("mlp.*", MLP),
        ("*.down_proj", ["mlp.down_proj"]),
        ("self_attn.[qk]_proj", ATTENTION[:2]),
        ("linear !mlp", ATTENTION),
        ("!mlp", ATTENTION),
        ("mlp !*.down_proj", MLP[:2]),
        ("*.up_proj | *.o_proj", ["self_attn.o_proj", "mlp.up_proj"]),
        ("*_proj attention !*.[qk]_proj", ["self_attn.v_proj", "self_attn.o_proj"]),
    ],
)
def test_a_pattern_narrows_negates_and_joins(where: str, expected: list[str], graph_of: Callable[[str], Graph]) -> None:
    assert paths(graph_of("llama"), where) == expected


@pytest.mark.parametrize(
    ("where", "blocks"),
    [
        ("blocks 1", {1}),
        ("blocks 0-1", {0, 1}),
        ("mlp blocks 1-2", {1, 2}),
        ("linear !blocks 0", {1, 2}),
        ("!blocks 1", {0, 2}),
        ("blocks 0 | blocks 2", {0, 2}),
        ("model.layers.2.*", {2}),
    ],
)
def test_a_pattern_narrows_to_blocks(where: str, blocks: set[int], graph_of: Callable[[str], Graph]) -> None:
    assert {w.block for w in graph_of("llama").select(where)} == blocks


def test_blocks_count_over_all_stacks(graph_of: Callable[[str], Graph]) -> None:
    graph = graph_of("t5")
    assert len(graph.units) == 6
    assert {w.unit for w in graph.select("blocks 2-3")} == {"encoder.block.2", "decoder.block.0"}


def test_the_head_is_selected_only_by_a_term_that_can_mean_nothing_else(
    graph_of: Callable[[str], Graph],
) -> None:
    graph = graph_of("llama")
    for where in ("head", "lm_head", "lm_head.*", "head !mlp"):
        assert [w.name for w in graph.select(where)] == ["lm_head.weight"]
    for where in ("linear", "*", "*.weight", "!mlp", "linear | mlp"):
        assert all(w.block is not None for w in graph.select(where))
    assert len(graph.select("linear | head")) == len(graph.select("linear")) + 1
    assert graph.head is not None
    assert graph.head.name == "lm_head.weight"


@pytest.mark.parametrize(("family", "router"), [("mixtral", "block_sparse_moe.gate"), ("qwen3_moe", "mlp.gate")])
def test_a_router_is_selected_only_by_a_term_that_can_mean_nothing_else(
    family: str, router: str, graph_of: Callable[[str], Graph]
) -> None:
    graph = graph_of(family)
    folder = router.partition(".")[0]
    assert paths(graph, "router") == paths(graph, router) == [router]
    assert [w.block for w in graph.select("router blocks 1")] == [1]
    for where in ("linear", "*", f"{folder}.*", "!attention", "blocks 0-2"):
        assert router not in paths(graph, where)
    assert paths(graph, f"{folder}.*") == paths(graph, "experts") == paths(graph, "linear !attention")
    assert paths(graph, "experts !*.experts.[123].*")[0].split(".")[2] == "0"
    assert router in paths(graph, "linear | router")


def test_shared_experts_are_mlp_and_routed_ones_are_experts(graph_of: Callable[[str], Graph]) -> None:
    graph = graph_of("deepseek_v3")
    assert graph.has_experts
    shared = {w.path for w in graph.select("mlp !blocks 0")}
    assert shared == {f"mlp.shared_experts.{p}_proj" for p in ("gate", "up", "down")}
    assert {w.expert for w in graph.select("experts")} == set(range(8))


@pytest.mark.parametrize(
    ("family", "where", "said"),
    [
        ("llama", "mlp.donw_proj", "did you mean mlp.down_proj"),
        ("llama", "atention", "did you mean attention"),
        ("llama", "zzz", "paths are lm_head, self_attn.q_proj"),
        ("llama", "experts", "`experts` matches no linear weight"),
        ("llama", "linear !router", "`router` matches no linear weight"),
        ("llama", "blocks 3", "has blocks 0 to 2"),
        ("llama", "blocks 2-1", "has blocks 0 to 2"),
        ("llama", "blocks x", "is not a block range"),
        ("llama", "blocks", "is not a block range"),
        ("llama", "mlp attention", "`mlp attention` selects no weight"),
        ("llama", "linear head", "`linear head` selects no weight"),
        ("llama", "linear !linear", "selects no weight"),
        ("llama", "linear | ", "empty alternative"),
        ("llama", "", "empty alternative"),
        ("gpt2", "head", "its head is tied to the embedding"),
        ("llama", "input_layernorm", "matches no linear weight"),
        ("llama", "model.embed_tokens", "matches no linear weight"),
    ],
)
def test_a_pattern_that_selects_nothing_says_why(
    family: str, where: str, said: str, graph_of: Callable[[str], Graph]
) -> None:
    with pytest.raises(UsageError) as caught:
        graph_of(family).select(where)
    assert f"where = {where!r}" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("family", "stages"),
    [
        ("llama", ["attn_in", "attn", "mlp_in", "mlp"]),
        ("phi3", ["attn_in", "attn", "mlp_in", "mlp"]),
        ("gpt2", ["attn_in", "attn", "mlp_in", "mlp"]),
        ("bert", ["residual@attn", "attn", "residual@mlp", "mlp"]),
        ("mixtral", ["attn_in", "attn", "mlp_in", "expert"]),
        ("t5", ["attn_in", "attn", "cross_in", "memory", "cross_attn", "mlp_in", "mlp"]),
        (
            "deepseek_v3",
            ["attn_in", "q_latent_in", "kv_latent_in", "attn", "mlp_in", "expert", "shared"],
        ),
    ],
)
def test_stages_are_in_the_order_in_which_the_weights_run(
    family: str, stages: list[str], graph_of: Callable[[str], Graph]
) -> None:
    graph = graph_of(family)
    assert list(graph.stages(graph.units[-1])) == stages


def test_weights_of_a_stage_are_q_k_v_then_o_then_gate_up_then_down(graph_of: Callable[[str], Graph]) -> None:
    graph = graph_of("qwen3")
    linear = [w for w in graph.unit("model.layers.1") if w.kind == "linear"]
    assert [w.path for w in linear] == ATTENTION + MLP
    assert [w.statistics for w in linear] == ["attn_in"] * 3 + ["attn"] + ["mlp_in"] * 2 + ["mlp"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_weight_has_a_role_that_fits(family: str, graph_of: Callable[[str], Graph]) -> None:
    graph = graph_of(family)
    for w in graph.weights:
        if w.kind in ("norm", "lookup"):
            assert w.role == ("norm" if w.kind == "norm" else "attention" if w.block is not None else "embedding")
        if w.kind == "linear":
            assert (w.rows, w.columns) == (w.spec.shape if not w.transposed else w.spec.shape[::-1])
            assert (w.role == "expert") == (w.expert is not None)
            if w.block is not None:
                assert w.role in {"attention", "mlp", "expert", "router"}
        if w.kind == "bias" and w.leaf:
            assert w.role == graph.weight(w.name.removesuffix("bias") + "weight").role
        if w.role == "attention":
            assert "mlp" not in w.path
        for space in (*w.reads.spaces, *w.writes.spaces):
            assert space == "_" or graph.size(space), space
    assert {w.role for w in graph.weights} >= {"attention", "embedding", "norm"}
    assert (graph.head is None) == graph.tied
    assert not any(w.role == "other" for w in graph.weights if w.block is not None)


def test_readers_and_writers_follow_from_the_rows(graph_of: Callable[[str], Graph]) -> None:
    graph = graph_of("llama")
    names = {w.path for w in graph.readers("mlp_in")}
    assert names == {"mlp.gate_proj", "mlp.up_proj"}
    assert {w.path for w in graph.writers("residual")} == {
        "model.embed_tokens",
        "self_attn.o_proj",
        "mlp.down_proj",
    }
    assert graph.coordinates["head_in"] == graph.coordinates["attn_in"] == "residual"
    assert graph.size("mlp_in") == tiny.HIDDEN


def test_each_model_type_has_one_plain_table_and_an_auto_class() -> None:
    for model_type, family in families().items():
        assert model_type in family.model_types
        assert not family.when
        assert family.auto_class in {"CausalLM", "MaskedLM", "Seq2SeqLM"}
        assert list(family.memory) == [s for s in family.memory if s in ("", *family.inside)]


def test_transformers_names_are_given_for_what_is_stored_under_others(
    graph_of: Callable[[str], Graph],
) -> None:
    pieces = graph_of("mixtral").parameters("model.layers.2")["mlp.experts.gate_up_proj"]
    assert [(p.index, p.start, p.rows) for p in pieces if p.index == 3] == [
        (3, 0, tiny.MLP),
        (3, tiny.MLP, tiny.MLP),
    ]
    assert "lm_head.weight" in graph_of("gpt_neox").parameters("")
    assert "embed_out.weight" not in graph_of("gpt_neox").parameters("")
    assert graph_of("llama").parameters("model.layers.9") == {}
