"""The paged forward is the plain one in every family, and it measures what passes through the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersely.stream as module
from tersely.calibrate import MicroBatch, Sequences, micro_batches
from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.errors import CheckpointError
from tersely.graph import Graph, read_graph
from tersely.measure import Statistics
from tersely.methods.encode.rtn import RTN
from tersely.stream import SURVEY, Measured, Stop, Value, stream
from tests.plain import arguments, logits_of, write_changed
from tests.tiny import FAMILIES, load, tiny

LENGTHS = (9, 9, 7, 5, 9)
CPU = torch.device("cpu")
Source = tuple[Checkpoint, Graph]

# Experts run one after the other, so that flows cannot wait inside a block with experts.
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3")
MODES = {False: "repeated", True: "suspended"}
WAYS = [
    pytest.param(t, suspend, id=f"{t}-{mode}")
    for t in FAMILIES
    for suspend, mode in MODES.items()
    if not (suspend and t in EXPERTS)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    """The tiny checkpoint of a family, written once."""
    made: dict[str, Source] = {}

    def get(model_type: str) -> Source:
        if model_type not in made:
            checkpoint = open_checkpoint(tiny(model_type, tmp_path_factory.mktemp(model_type)))
            made[model_type] = checkpoint, read_graph(checkpoint)
        return made[model_type]

    return get


GRAM = frozenset({"gram"})


def batches(graph: Graph, *, pad: bool | None = None) -> tuple[MicroBatch, ...]:
    generator = torch.Generator().manual_seed(7)
    ids = tuple(torch.randint(3, 60, (n,), generator=generator) for n in LENGTHS)
    pad = not graph.has_experts and graph.family.auto_class == "CausalLM" if pad is None else pad
    return micro_batches(Sequences(ids, "documents", LENGTHS, ""), tokens=18, pad=pad)


def run(
    source: Source,
    *,
    measured: Mapping[str, Sequence[str]] | None = None,
    surveyed: Mapping[str, Measured] | None = None,
    recorded: Collection[str] = (),
    suspend: bool | None = None,
    dtype: torch.dtype = torch.float32,
    logits: Callable[[Tensor], None] | None = None,
    data: tuple[MicroBatch, ...] | None = None,
) -> Iterator[Stop]:
    checkpoint, graph = source
    return stream(
        checkpoint,
        graph,
        batches(graph) if data is None else data,
        measured={unit: dict.fromkeys(stages, GRAM) for unit, stages in (measured or {}).items()},
        surveyed=surveyed,
        recorded=recorded,
        replaced=lambda _: {},
        dtype=dtype,
        device=CPU,
        suspend=not graph.has_experts if suspend is None else suspend,
        logits=logits,
    )


def survey(graph: Graph) -> dict[str, Measured]:
    return {unit: dict.fromkeys(graph.stages(unit), frozenset({"gram", "absmax"})) for unit in graph.units}


def everything(graph: Graph) -> dict[str, tuple[str, ...]]:
    return {unit: graph.stages(unit) for unit in graph.units} | {"": (graph.head_space,)}


def modules(graph: Graph, unit: str) -> dict[str, str]:
    """Path in memory of every linear layer of a block -> the name of the activations that it reads."""
    return {
        f"{unit}.{name.removesuffix('.weight')}": pieces[0].weight.statistics
        for name, pieces in graph.parameters(unit).items()
        if pieces[0].weight.kind == "linear" and pieces[0].index is None
    }


@torch.no_grad()
def hooked(path: Path, graph: Graph, data: Sequence[MicroBatch]) -> dict[tuple[str, str], Tensor]:
    """(unit, activations) -> all tokens that enter the plain model's layers, padding left out."""
    model: Any = load(path)
    seen: dict[tuple[str, str], list[Tensor]] = {}
    current: list[MicroBatch] = []
    for unit in graph.units:
        first: dict[str, str] = {}
        for name, statistics in modules(graph, unit).items():
            if first.setdefault(statistics, name) != name:
                continue

            def keep(_: nn.Module, args: tuple[Tensor], key: tuple[str, str] = (unit, statistics)) -> None:
                tokens = args[0].reshape(-1, args[0].shape[-1])
                kept = current[-1].keep_BL
                seen.setdefault(key, []).append(tokens if kept is None else tokens[kept.reshape(-1)])

            model.get_submodule(name).register_forward_pre_hook(keep)
    for batch in data:
        current.append(batch)
        model(**arguments(model, batch))
    return {key: torch.cat(parts) for key, parts in seen.items()}


# A survey


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2", "t5"])
def test_a_survey_sees_what_enters_the_layers_of_a_block_and_changes_nothing(
    model_type: str, source: Callable[[str], Source]
) -> None:
    checkpoint, graph = source(model_type)
    plain: list[Tensor] = []
    list(run((checkpoint, graph), logits=plain.append))
    logits: list[Tensor] = []
    seen: dict[tuple[str, str], Tensor] = {}
    for stop in run((checkpoint, graph), surveyed=survey(graph), logits=logits.append):
        if stop.stage == SURVEY:
            for name, statistics in stop.statistics.items():
                assert statistics.absmax_I is not None
                seen[stop.unit, name] = statistics.absmax_I
    assert all(torch.equal(one, other) for one, other in zip(plain, logits, strict=True))
    expected = hooked(checkpoint.path, graph, batches(graph))
    for place, tokens in expected.items():
        torch.testing.assert_close(seen[place], tokens.abs().amax(0))


# The forward


@pytest.mark.parametrize(("model_type", "suspend"), WAYS)
def test_paged_logits_are_those_of_the_plain_forward(
    model_type: str, suspend: bool, source: Callable[[str], Source]
) -> None:
    checkpoint, graph = source(model_type)
    logits: list[Tensor] = []
    # Measuring must not touch the result either.
    measured = everything(graph)
    stops = [
        (s.unit, s.stage) for s in run(source(model_type), measured=measured, suspend=suspend, logits=logits.append)
    ]
    expected = logits_of(checkpoint.path, batches(graph), one_by_one=graph.has_experts)
    assert len(logits) == len(expected) > 1
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, expected, strict=True))
    if graph.has_experts:  # the default groups tokens by expert, which changes the order of sums
        for ours, theirs in zip(logits, logits_of(checkpoint.path, batches(graph)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    inside = [(unit, stage) for unit in graph.units for stage in (*measured[unit], None)]
    assert stops == [*inside, ("", graph.head_space)]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_bfloat16_checkpoint_runs_bit_equal_in_its_own_precision(model_type: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny(model_type, tmp_path, dtype=torch.bfloat16))
    graph = read_graph(checkpoint)
    logits: list[Tensor] = []
    for _ in run((checkpoint, graph), logits=logits.append, dtype=torch.bfloat16):
        pass
    expected = logits_of(tmp_path, batches(graph), one_by_one=graph.has_experts)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, expected, strict=True))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "gemma2", "bert", "t5"])
def test_suspended_and_repeated_runs_give_equal_statistics_and_results(
    model_type: str, source: Callable[[str], Source]
) -> None:
    """While weights are replaced: what is measured in one stage sees the weights of the stages before."""
    _, graph = source(model_type)

    def outcome(suspend: bool) -> tuple[dict[tuple[str, str, str], Statistics], list[Tensor]]:
        logits: list[Tensor] = []
        statistics = {}
        for stop in run(source(model_type), measured=everything(graph), suspend=suspend, logits=logits.append):
            if stop.stage is not None and stop.unit:
                rounded(source(model_type), stop)
            for name, measured in stop.statistics.items():
                statistics[stop.unit, str(stop.stage), name] = measured
        return statistics, logits

    one, other = outcome(True), outcome(False)
    assert one[0].keys() == other[0].keys()
    for key, statistics in one[0].items():
        assert statistics.tokens == other[0][key].tokens
        assert statistics.gram_II is not None
        assert other[0][key].gram_II is not None
        assert torch.equal(statistics.gram_II, other[0][key].gram_II)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def rounded(source: Source, stop: Stop) -> dict[str, Tensor]:
    """Put 3-bit weights into a running stage; as stored, by name."""
    checkpoint, graph = source
    replaced = {}
    for weight in graph.unit(stop.unit):
        if weight.kind == "linear" and weight.stage == stop.stage:
            stored = checkpoint[weight.name]
            value_OI = stored.t() if weight.transposed else stored
            decoded_OI = RTN(bits=3, group=0)(value_OI, Statistics(weight.columns)).decode()
            stop.replace(weight, Value(decoded_OI))
            replaced[weight.name] = (decoded_OI.t() if weight.transposed else decoded_OI).contiguous()
    return replaced


@pytest.mark.parametrize("model_type", FAMILIES)
def test_replaced_weights_are_what_the_rest_of_the_model_sees(
    model_type: str, source: Callable[[str], Source], tmp_path: Path
) -> None:
    checkpoint, graph = source(model_type)
    tensors, logits = dict(checkpoint), list[Tensor]()
    measured = {unit: graph.stages(unit) for unit in graph.units}
    for stop in run(source(model_type), measured=measured, logits=logits.append):
        tensors |= rounded(source(model_type), stop) if stop.stage is not None else {}
    write_changed(checkpoint.path, tmp_path, tensors)
    expected, before = logits_of(tmp_path, batches(graph)), logits_of(checkpoint.path, batches(graph))
    for ours, theirs, source_logits in zip(logits, expected, before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 if graph.has_experts else 0)
        assert not torch.equal(ours, source_logits)


@torch.no_grad()
def outputs(path: Path, graph: Graph, data: Sequence[MicroBatch]) -> dict[str, list[Tensor]]:
    """Unit -> what the plain model's block gives, by micro-batch."""
    model: Any = load(path)
    seen: dict[str, list[Tensor]] = {unit: [] for unit in graph.units}
    for unit in graph.units:

        def keep(_: nn.Module, __: Any, output: Any, unit: str = unit) -> None:
            seen[unit].append(output[0] if isinstance(output, tuple) else output)

        model.get_submodule(unit).register_forward_hook(keep)
    for batch in data:
        model(**arguments(model, batch))
    return seen


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_block_should_give_is_what_it_gives_in_the_source_whatever_was_replaced_before(
    model_type: str, source: Callable[[str], Source]
) -> None:
    checkpoint, graph = source(model_type)
    data = batches(graph)
    expected = outputs(checkpoint.path, graph, data)
    tuned = 0
    measured = {unit: graph.stages(unit) for unit in graph.units}
    for stop in run((checkpoint, graph), measured=measured, recorded=graph.units):
        if stop.recorded is not None:
            tuned += 1
            assert len(stop.recorded.inputs) == len(stop.recorded.targets) == len(data)
            ran = [stop.recorded.forward({}, arguments) for arguments in stop.recorded.inputs]
            for given, target, own in zip(ran, stop.recorded.targets, expected[stop.unit], strict=True):
                assert not torch.equal(given, target)
                if not stop.unit.startswith("decoder") or model_type != "t5":  # which reads the other's last block
                    torch.testing.assert_close(target, own, rtol=0, atol=2e-6 if graph.has_experts else 0)
        elif stop.stage is not None:
            rounded(source(model_type), stop)
    assert tuned == len(graph.units)


# Memory


@pytest.mark.parametrize(
    ("model_type", "suspend"),
    [("llama", True), ("llama", False), ("mixtral", False), ("t5", True), ("t5", False)],
)
def test_the_parameters_of_one_block_are_in_memory_at_a_time(
    model_type: str, suspend: bool, source: Callable[[str], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    own = module.build

    def build(*args: Any) -> Any:
        built.append(own(*args))
        return built[-1]

    monkeypatch.setattr("tersely.stream.paged.build", build)
    _, graph = source(model_type)

    def real() -> set[str]:
        (model,) = built
        return {name for name, p in model.named_parameters() if not p.is_meta}

    inside = tuple(f"{unit}." for unit in graph.units)
    for stop in run(source(model_type), measured=everything(graph), suspend=suspend):
        if stop.unit:
            block = {f"{stop.unit}.{name}" for name in graph.parameters(stop.unit)}
            assert {name for name in real() if name.startswith(inside)} == block
    assert not {name for name in real() if name.startswith(inside)}
    large = {w.name for w in graph.unit("") if w.kind in ("lookup", "linear") and w.role in ("embedding", "head")}
    assert not large & real()


# Statistics


@pytest.mark.parametrize("model_type", FAMILIES)
def test_statistics_are_the_gram_matrices_of_what_enters_the_layers_of_the_plain_model(
    model_type: str, source: Callable[[str], Source]
) -> None:
    checkpoint, graph = source(model_type)
    data = batches(graph)
    expected = hooked(checkpoint.path, graph, data)
    tokens = sum(LENGTHS)
    found: set[tuple[str, str]] = set()
    for stop in run(source(model_type), measured=everything(graph)):
        for name, statistics in stop.statistics.items():
            key = (stop.unit, name)
            if key not in expected:
                assert stop.unit == "" or "of expert" in name
                continue
            found.add(key)
            x = expected[key].double()
            assert statistics.gram_II is not None
            assert statistics.tokens == len(x) == tokens
            torch.testing.assert_close(statistics.gram_II.double(), x.t() @ x, rtol=1e-4, atol=1e-4)
    assert found == expected.keys()


@pytest.mark.parametrize("model_type", EXPERTS)
def test_every_expert_has_statistics_of_the_tokens_that_were_routed_to_it(
    model_type: str, source: Callable[[str], Source]
) -> None:
    checkpoint, graph = source(model_type)
    per_token = checkpoint.config["num_experts_per_tok"]
    sparse = 0
    for stop in run(source(model_type), measured=everything(graph)):
        experts = {n: s for n, s in stop.statistics.items() if "of expert" in n}
        if not experts:
            continue
        sparse += 1
        assert sum(s.tokens for s in experts.values()) == per_token * sum(LENGTHS)
        if stop.stage in stop.statistics:  # what enters the experts is also what the router reads
            whole = stop.statistics[str(stop.stage)].gram_II
            parts = torch.stack([s.gram_II for s in experts.values() if s.gram_II is not None])
            assert whole is not None
            torch.testing.assert_close(parts.sum(0), per_token * whole, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(parts[0], parts[1])
    assert sparse >= 2


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2"])
def test_padding_enters_no_statistic(model_type: str, source: Callable[[str], Source]) -> None:
    _, graph = source(model_type)
    padded, alone = batches(graph, pad=True), batches(graph, pad=False)
    assert any(b.keep_BL is not None for b in padded)
    assert all(b.keep_BL is None for b in alone)
    runs = [
        {
            (stop.unit, name): statistics
            for stop in run(source(model_type), measured=everything(graph), data=data)
            for name, statistics in stop.statistics.items()
        }
        for data in (padded, alone)
    ]
    assert runs[0].keys() == runs[1].keys()
    for key, statistics in runs[0].items():
        assert statistics.tokens == runs[1][key].tokens == sum(LENGTHS)
        torch.testing.assert_close(statistics.gram_II, runs[1][key].gram_II, rtol=1e-4, atol=1e-4)


def test_sums_are_float32_when_the_model_is_bfloat16(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("llama", tmp_path, dtype=torch.bfloat16))
    graph = read_graph(checkpoint)
    expected = hooked(tmp_path, graph, batches(graph))
    checked = 0
    for stop in run((checkpoint, graph), measured=everything(graph), dtype=torch.bfloat16):
        for name, statistics in stop.statistics.items():
            assert statistics.gram_II is not None
            assert statistics.gram_II.dtype == torch.float32
            if (stop.unit, name) in expected:
                x = expected[stop.unit, name]
                assert x.dtype == torch.bfloat16
                own = x.double().t() @ x.double()
                # In bfloat16 the sums would be off by 4e-3.
                assert float((statistics.gram_II - own).norm() / own.norm()) < 1e-6
                checked += 1
    assert checked == len(expected)


# What goes wrong


def fail(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("inside a flow")


def modes() -> tuple[int, bool]:
    """What a flow could leave behind in PyTorch: function modes, and gradients switched off."""
    return torch._C._len_torch_function_stack(), torch.is_grad_enabled()


@pytest.mark.parametrize("suspend", [True, False], ids=["suspended", "repeated"])
@pytest.mark.parametrize("place", ["self_attn", "mlp.down_proj"])
def test_an_error_inside_a_flow_reaches_the_caller_and_leaves_no_mode(
    place: str, suspend: bool, source: Callable[[str], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = module.build

    def build(*args: Any) -> Any:
        model = own(*args)
        model.get_submodule(f"model.layers.1.{place}").forward = fail
        return model

    monkeypatch.setattr("tersely.stream.paged.build", build)
    _, graph = source("llama")
    before = modes()
    seen = []
    with pytest.raises(ZeroDivisionError, match="inside a flow"):
        seen += [stop.unit for stop in run(source("llama"), measured=everything(graph), suspend=suspend)]
    assert modes() == before


@pytest.mark.parametrize("suspend", [True, False], ids=["suspended", "repeated"])
@pytest.mark.parametrize("stops", [1, 3, 6])
def test_a_run_that_is_left_early_leaves_no_mode(stops: int, suspend: bool, source: Callable[[str], Source]) -> None:
    _, graph = source("llama")
    before = modes()
    running = run(source("llama"), measured=everything(graph), suspend=suspend)
    for _ in range(stops):
        next(running)
    running.close()  # type: ignore[attr-defined]
    assert modes() == before


def test_a_tensor_of_another_shape_than_the_model_s_is_refused(tmp_path: Path) -> None:
    """Where the table has no size to compare with, transformers' own model has one."""
    checkpoint = open_checkpoint(tiny("llama", tmp_path))
    graph = read_graph(checkpoint)
    weight = next(w for w in graph.weights if w.path == "mlp.down_proj")
    before = modes()
    running = stream(
        checkpoint,
        graph,
        batches(graph),
        measured={},
        replaced=lambda _: {weight.name: Value(torch.zeros(3, 3))},
        dtype=torch.float32,
        device=CPU,
        suspend=True,
    )
    with pytest.raises(CheckpointError, match=rf"{weight.name}.*\[3, 3\].*\[64, 96\]"):
        list(running)
    assert modes() == before
