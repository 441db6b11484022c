"""A job, checked before any work begins: what will be done, to what, with what, at which cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import torch

from tersely.calibrate import DOCUMENT_SEPARATOR, Sequences, documents, read_text, sequences
from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.codecs import Scheme
from tersely.codecs.low_rank import is_product
from tersely.encoding import Format, stored_bytes
from tersely.errors import CheckpointError, UsageError
from tersely.export import compressed_tensors
from tersely.fisher import fisher_bytes
from tersely.graph import Graph, read_graph
from tersely.plan.assignment import assign, spaces
from tersely.plan.cost import Cost, estimate
from tersely.plan.reading import load_recipe
from tersely.plan.recipe import Recipe, Step, Trim
from tersely.rebase import check_rebase
from tersely.results import Reshaping
from tersely.rotation import places, planned, reader_columns, trial
from tersely.runtime import find_device, load_tokenizer
from tersely.shape.run import planned as reshaped
from tersely.shape.run import work as shape_work
from tersely.vocabulary.counting import Counted, count_texts
from tersely.vocabulary.tokenizer import read_tokenizer
from tersely.vocabulary.trim import Plan, companions_of, plan_trim, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """A checked job: what will be done, to what, with what, at which cost."""

    origin: Checkpoint
    """As it was given."""
    checkpoint: Checkpoint
    """What is encoded: the origin, or what was made of it in another shape or another basis."""
    graph: Graph
    recipe: Recipe
    steps: Mapping[str, Step]
    """Stored name -> what is done to it."""
    calibration: str | None
    data: Sequences | None
    out: Path
    format: Format
    device: torch.device
    dtype: torch.dtype
    """In which the calibration runs."""
    cost: Cost
    trim: Plan | None
    """Of the vocabulary; None where it stays."""
    shapes: tuple[Reshaping, ...] = ()
    """What steps have done that leave a smaller shape."""


def prepare(
    source: str | Path,
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    corpus: Counted | None = None,
    format: Format | Literal["auto"] = "auto",
    device: str = "cpu",
) -> Job:
    """Check everything that can be checked before work begins, and estimate the cost; writes nothing.

    corpus: the tokens of the texts by which a step trims the vocabulary (vocabulary.counting); by default those of
    `calibration`.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    where = find_device(device)
    checkpoint = open_checkpoint(source)
    if "quantization_config" in checkpoint.config:
        method = checkpoint.config["quantization_config"].get("quant_method", "an unnamed method")
        raise CheckpointError(f"{checkpoint.path} is quantized already ({method}); start from the original checkpoint")
    trim = None if recipe.trim is None else _trim(checkpoint, recipe.trim, corpus, calibration)
    shapes = [checkpoint if trim is None else trim.checkpoint]
    for number, step in enumerate(recipe.shapes):
        shapes.append(reshaped(shapes[-1], step, f"step {number + 1} ({step.method.name})"))
    graph = read_graph(shapes[-1])
    free = [change for change in recipe.changes if not change.needs]
    final = planned(shapes[-1], graph, free)
    graph = read_graph(final)
    _check_changes(final, graph, recipe)
    steps = assign(recipe, graph)
    schemes = {n: step.scheme(graph.weight(n).rows, graph.weight(n).columns) for n, step in steps.items()}
    chosen = _format(format, graph, schemes)
    _check_cache(recipe, graph, chosen)
    dtype = _compute_dtype(graph, where)
    data = None
    if recipe.needs:
        if calibration is None:
            raise UsageError(
                "this recipe measures activations: give it text with --calibration FILE (a few hundred "
                "pages like what the model will be used on), or take a data-free preset such as w4a16"
            )
        data = sequences(
            read_text(calibration),
            load_tokenizer(checkpoint.path) if trim is None else _tokenizer(checkpoint, trim),
            context=min(recipe.calibration.context, _positions(checkpoint)),
            samples=recipe.calibration.samples,
            seed=recipe.seed,
            purpose="calibration",
            settings="--set calibration.",
        )
    elif calibration is not None and (corpus is not None or recipe.trim is None or not recipe.trim.counts):
        raise UsageError(
            f"--calibration {calibration} has no effect: no step of this recipe measures anything; leave it out, "
            "or take a recipe that does, such as w4a16-gptq"
        )
    steep = [name for name, step in steps.items() if "fisher" in step.needs or step.average_bits]
    lengths = [len(ids_L) for ids_L in data.ids] if data else []
    cost = estimate(
        graph,
        steps,
        sequences=lengths,
        tunings=recipe.tunings,
        gradients=fisher_bytes(graph, steep, lengths) if data and steep else 0,
        shapes=[
            shape_work(headers, step, lengths, dtype) for headers, step in zip(shapes, recipe.shapes, strict=False)
        ],
        output=_output_bytes(final, graph, schemes, chosen),
        between=sum(2 * headers.nbytes for headers in shapes[trim is None or not (steps or recipe.shapes) :])
        + (final.nbytes if free else 0)
        + (2 * _output_bytes(final, graph, schemes, "tersely") if any(t.whole for t in recipe.tunings) else 0),
        out=Path(out),
        dtype=dtype,
        device=where,
    )
    return Job(
        checkpoint,
        checkpoint,
        graph,
        recipe,
        steps,
        None if calibration is None else Path(calibration).name,
        data,
        Path(out),
        chosen,
        where,
        dtype,
        cost,
        trim,
    )


def _trim(checkpoint: Checkpoint, step: Trim, corpus: Counted | None, calibration: str | Path | None) -> Plan:
    """Which tokens stay."""
    vocabulary = read_tokenizer(checkpoint)
    if not step.counts:
        if corpus is not None:
            raise UsageError(f"a corpus has no effect: {step.method.name} counts no tokens; leave it out")
    elif corpus is None:
        if calibration is None:
            raise UsageError(
                f"{step.method.name} counts the tokens of a text: give it texts like what the model will be used on "
                "with --corpus FILE ..., the more the better"
            )
        text = read_text(calibration)
        corpus = count_texts(tokenizer_of(vocabulary), documents(text) if DOCUMENT_SEPARATOR in text else [text])
    made = plan_trim(checkpoint, vocabulary, step, corpus)
    if step.drop and (count := len(_tokenizer(checkpoint, made))) != made.facts.rows_after:
        raise UsageError(
            f"drop: transformers gives this tokenizer {count} tokens where {made.facts.rows_after} are left: its class "
            "adds some of those that were dropped; leave them in"
        )
    return made


def _tokenizer(checkpoint: Checkpoint, trim: Plan) -> PreTrainedTokenizerBase:
    """That of the trimmed model, which is not written yet."""
    with TemporaryDirectory() as folder:
        for name, content in companions_of(checkpoint, trim.trimmed).items():
            (Path(folder) / name).write_bytes(content.read_bytes() if isinstance(content, Path) else content)
        return load_tokenizer(folder)


def _check_cache(recipe: Recipe, graph: Graph, format: Format) -> None:
    """UsageError for a cache that the model, or the format, cannot have."""
    if recipe.cache is None:
        return
    if graph.family.auto_class != "CausalLM":
        raise UsageError(f"[cache]: a {graph.model_type} model writes no text from a cache of its own; leave it out")
    if head := graph.sizes.get("v", 0) // graph.sizes.get("kv_heads", 1):
        recipe.cache.check(head)
    if recipe.cache.standard and format == "compressed-tensors":
        compressed_tensors.cache_scales(graph)


def _check_changes(checkpoint: Checkpoint, graph: Graph, recipe: Recipe) -> None:
    """UsageError for a change of basis that would change what the model computes."""
    for change in recipe.changes:
        for space in spaces(change, graph):
            try:
                change.method.check(reader_columns(graph, space))
            except UsageError as error:
                raise UsageError(f"{error} ({space})") from error
            for unit, expert in places(graph, space, change):
                basis = trial(change, graph, space)
                check_rebase(graph, checkpoint, space, basis, unit=unit, expert=expert)


def _format(asked: str, graph: Graph, schemes: Mapping[str, Scheme]) -> Format:
    """The format that was asked for, if it can say what will be done; "auto": the standard one, else tersely's own."""
    if asked == "tersely":
        return "tersely"
    if asked == "dense":
        for name, scheme in schemes.items():
            if scheme.activations or scheme.hadamard:
                what = f"activations={scheme.activations!r}" if scheme.activations else f"hadamard={scheme.hadamard}"
                raise UsageError(f"{name}: {what} is work for when the model runs, which --format dense cannot say")
            if is_product(scheme.parts):
                raise UsageError(
                    f"{name}: --format dense stores the product of the factors, which takes as much as the weight; use "
                    "--format tersely, which keeps the factors (`tersely export --to hf` writes the product)"
                )
        return "dense"
    if asked not in ("auto", "compressed-tensors"):
        raise UsageError(f"format={asked!r}: expected 'auto', 'compressed-tensors', 'tersely' or 'dense'")
    if asked == "auto" and all(scheme.ordinary for scheme in schemes.values()):
        return "dense"
    try:
        compressed_tensors.check(graph, schemes)
    except UsageError:
        if asked == "auto":
            return "tersely"
        raise
    return "compressed-tensors"


def _output_bytes(checkpoint: Checkpoint, graph: Graph, schemes: Mapping[str, Scheme], format: Format) -> int:
    total = sum(checkpoint.spec(n).nbytes for n in checkpoint)
    weights = [(graph.weight(n), scheme) for n, scheme in schemes.items()]
    return total - sum(w.spec.nbytes - stored_bytes(w, scheme, format) for w, scheme in weights)


def _compute_dtype(graph: Graph, device: torch.device) -> torch.dtype:
    """The checkpoint's own dtype; float32 instead of float16 on a CPU, which has no fast half precision."""
    stored = next((w.spec.dtype for w in graph.weights if w.kind == "linear"), torch.float32)
    if not stored.is_floating_point or stored.itemsize < 2 or (stored == torch.float16 and device.type == "cpu"):
        return torch.float32
    return stored


def _positions(checkpoint: Checkpoint) -> int:
    """The longest sequence that the model takes, as far as its config says."""
    stated = (checkpoint.config.get(key) for key in ("max_position_embeddings", "n_positions"))
    return min((n for n in stated if isinstance(n, int) and n > 1), default=1 << 30)
