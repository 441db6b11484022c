"""A recipe says what is done to which weights; TOML and the dataclass map to each other exactly.

    seed = 0

    [calibration]
    samples = 128
    context = 2048

    [cache]                 # keys and values of past tokens; left out: as they come
    method = "kivi"

    [[steps]]
    where  = "linear"
    method = "gptq"
    bits   = 4
    group  = 128

A weight that several steps select takes the last of them. Steps that choose another basis (smooth, awq, rotate) come
first; their `where` names spaces: `residual`, `mlp`, or `normed` for all that lie behind a norm in a block. A step that
ends with no weight or space, a key that does not exist and a value of another type are errors: nothing in a recipe is
without effect.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tersely.codecs import Scheme
from tersely.codecs.activations import ACTIVATIONS
from tersely.errors import UsageError
from tersely.graph import Graph
from tersely.hadamard import check_order
from tersely.methods import METHODS, REBASES, TUNES, Encode, Method, Rebase, TuneBlock, TuneModel
from tersely.methods.tune import SignRound
from tersely.runtime.policy import CachePolicy, policy_from_plain, policy_to_plain

_INPUTS = {"activations": str, "hadamard": int, "average_bits": float}
"""Settings of every step that encodes, whatever its method."""
_LOSSES = frozenset({"text"})


@dataclass(frozen=True)
class Calibration:
    """How much text is measured: `samples` sequences of at most `context` tokens."""

    samples: int = 128
    context: int = 2048

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"calibration.samples={self.samples}: at least 1 is expected")
        if self.context < 2:
            raise UsageError(f"calibration.context={self.context}: at least 2 tokens are expected")


@dataclass(frozen=True)
class Step:
    """One method on the weights that a `where` pattern selects (patterns: Graph.select)."""

    where: str
    method: Encode
    activations: str = ""
    """What their inputs are rounded to when the model runs (ACTIVATIONS); "": they are not."""
    hadamard: int = 0
    """Their inputs are multiplied by a Hadamard matrix of this order when the model runs, run by run, and the weight by
    its inverse before it is encoded; 0: they are not."""
    average_bits: float = 0.0
    """Mean bits of the weights that the step selects: the method's `bits` are then chosen for each by its importance;
    0: all have the same."""

    def __post_init__(self) -> None:
        if self.average_bits and not hasattr(self.method, "bits"):
            raise UsageError(f"average_bits={self.average_bits}: {self.method.name} has no bits to choose")
        if self.average_bits and not 1 <= self.average_bits <= 8:
            raise UsageError(f"average_bits={self.average_bits}: expected 1 to 8, or 0 for the same bits everywhere")

    def with_bits(self, bits: int) -> Step:
        """The same step with other bits, for weights that were given these."""
        method: Any = self.method
        return dataclasses.replace(self, method=dataclasses.replace(method, bits=bits), average_bits=0.0)

    @property
    def needs(self) -> frozenset[str]:
        """What must be measured on calibration text."""
        rounding = ACTIVATIONS[self.activations].needs if self.activations else frozenset()
        return self.method.needs | rounding | (_LOSSES if self.average_bits else frozenset())

    def scheme(self, rows: int, columns: int) -> Scheme:
        """How a weight of this shape will be stored, the largest where the method decides by the values."""
        step = self.with_bits(math.ceil(self.average_bits)) if self.average_bits else self
        return Scheme(tuple(step.method.forms(rows, columns)), self.activations, self.hadamard)


@dataclass(frozen=True)
class Change:
    """One change of basis, of the spaces that a `where` pattern selects (patterns: `spaces`)."""

    where: str
    method: Rebase

    @property
    def needs(self) -> frozenset[str]:
        """What must be measured on calibration text."""
        return self.method.needs


@dataclass(frozen=True)
class Tuning:
    """One method that tunes what was encoded, on the weights that a `where` pattern selects."""

    where: str
    method: TuneModel | TuneBlock

    @property
    def needs(self) -> frozenset[str]:
        """What must be measured on calibration text."""
        return frozenset({"text"})

    @property
    def whole(self) -> bool:
        """Whether the model is tuned as a whole, not block by block."""
        return not isinstance(self.method, SignRound)


@dataclass(frozen=True)
class Recipe:
    """Steps in order; what they are calibrated on; the seed of every choice made by chance."""

    steps: tuple[Step | Change | Tuning, ...]
    calibration: Calibration = field(default_factory=Calibration)
    seed: int = 0
    cache: CachePolicy | None = None
    """How keys and values of past tokens are kept when the model runs; None: as they come."""

    def __post_init__(self) -> None:
        if not self.encodes:
            raise UsageError("a recipe needs at least one step that encodes weights")
        kinds = [(Change, Step, Tuning).index(type(step)) for step in self.steps]
        if kinds != sorted(kinds):
            raise UsageError(
                "steps that change the basis (smooth, awq, rotate ...) come before those that encode, and steps that "
                "tune (distill, pv, signround) after them"
            )
        if not self.needs and self.calibration != Calibration():
            raise UsageError("calibration has no effect: no step of this recipe measures anything; leave it out")

    @property
    def changes(self) -> tuple[Change, ...]:
        return tuple(step for step in self.steps if isinstance(step, Change))

    @property
    def encodes(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if isinstance(step, Step))

    @property
    def tunings(self) -> tuple[Tuning, ...]:
        return tuple(step for step in self.steps if isinstance(step, Tuning))

    @property
    def needs(self) -> frozenset[str]:
        """What must be measured on calibration text; empty for data-free recipes."""
        return frozenset(need for step in self.steps for need in step.needs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every default written out."""
        steps = [
            {
                "where": s.where,
                "method": s.method.name,
                **({k: v for k in _INPUTS if (v := getattr(s, k, None))}),
                **dataclasses.asdict(s.method),  # type: ignore[call-overload]
            }
            for s in self.steps
        ]
        calibration = {"calibration": dataclasses.asdict(self.calibration)} if self.needs else {}
        cache = {} if self.cache is None else {"cache": policy_to_plain(self.cache)}
        return {"seed": self.seed, **calibration, **cache, "steps": steps}

    def to_toml(self) -> str:
        """The TOML text that `recipe_from_toml` reads back as an equal recipe."""
        plain = self.to_dict()
        lines = [f"seed = {self.seed}"]
        for table in ("calibration", "cache"):
            if table in plain:
                lines += ["", f"[{table}]", *(f"{k} = {_toml(v)}" for k, v in plain[table].items())]
        for step in plain["steps"]:
            lines += ["", "[[steps]]", *(f"{k} = {_toml(v)}" for k, v in step.items())]
        return "\n".join(lines) + "\n"

    @property
    def hash(self) -> str:
        """Names the recipe: the first 16 hex digits of the SHA-256 of its plain values."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def recipe_from_toml(text: str, source: str = "recipe") -> Recipe:
    """Read a recipe; UsageError names the key that is wrong and those that exist."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source} is not TOML: {error}") from error
    _known(raw, ("seed", "calibration", "cache", "steps"), source)
    calibration = raw.get("calibration", {})
    _typed({"calibration": calibration}, {"calibration": dict}, source)
    hints = {"samples": int, "context": int}
    _known(calibration, tuple(hints), f"{source}, [calibration]")
    _typed(calibration, hints, f"{source}, [calibration]")
    _typed(raw, {"seed": int}, source)
    steps = raw.get("steps")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, dict) for s in steps):
        raise UsageError(f"{source} has no [[steps]]: at least one, with `where` and `method`, is expected")
    read = tuple(_step(s, f"{source}, step {i + 1}") for i, s in enumerate(steps))
    if calibration and not any(step.needs for step in read):
        raise UsageError(f"{source}: [calibration] has no effect: no step measures anything; remove it")
    return Recipe(read, Calibration(**calibration), raw.get("seed", 0), _cache(raw, source))


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A preset by name or a TOML file by path, with `key=value` overrides.

    `group=64` sets the field in every step that has it, `steps.1.bits=8` in the second one only,
    `calibration.samples=64` and `seed=1` what their names say. UsageError for an override without effect.
    """
    recipe = _find(str(name))
    raw = recipe.to_dict()
    raw.setdefault("calibration", {})
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"--set {override}: expected key=value, such as --set group=64")
        value = _value(text.strip())
        _override(raw, key, value, override)
    if not raw["calibration"]:
        del raw["calibration"]
    return _from_plain(raw, str(name))


def presets() -> Mapping[str, str]:
    """Name -> TOML text of every preset in the package."""
    folder = resources.files("tersely.plan") / "presets"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {f.name.removesuffix(".toml"): f.read_text("utf-8") for f in files}


def assign(recipe: Recipe, graph: Graph) -> dict[str, Step]:
    """Stored name -> step, for every weight that one selects; checked against the weights' shapes.

    UsageError for a pattern that selects nothing, a step of which nothing is left, and a width that a method
    cannot take, with the weight named.
    """
    chosen: dict[str, Step] = {}
    for step in recipe.encodes:
        for weight in graph.select(step.where):
            chosen[weight.name] = step
    for number, each in enumerate(recipe.steps):
        if isinstance(each, Step) and not any(each is step for step in chosen.values()):
            raise UsageError(
                f"step {number + 1} (where = {each.where!r}) has no effect: later steps select all of its "
                "weights; remove it, or put it after them"
            )
    for name, step in chosen.items():
        weight = graph.weight(name)
        try:
            step.method.check(weight.columns)
            check_order(step.hadamard, weight.columns)
            if step.activations and weight.columns % (group := ACTIVATIONS[step.activations].group):
                name = step.activations
                raise UsageError(f"activations={name!r}: {weight.columns} inputs are no multiple of {group}")
        except UsageError as error:
            place = f"{weight.path}, block {weight.block}" if weight.block is not None else weight.path
            raise UsageError(f"{error} ({place})") from error
    _check_inputs(graph, chosen)
    for name, step in chosen.items():
        if "fisher" in step.needs and (step.hadamard or any(change.needs for change in recipe.changes)):
            raise UsageError(
                f"{step.method.name} measures gradients in the basis of the source: leave out hadamard, smooth and awq "
                f"({name}; rotate may stay)"
            )
    for tuning in recipe.tunings:
        if missing := [w.name for w in graph.select(tuning.where) if w.name not in chosen]:
            raise UsageError(
                f"{tuning.method.name} (where = {tuning.where!r}) tunes what is encoded, and {missing[0]} is not; "
                "select only weights that an earlier step encodes"
            )
        if any(step.hadamard for step in chosen.values()) or any(change.needs for change in recipe.changes):
            raise UsageError(
                f"{tuning.method.name} tunes weights in the basis of the source: leave out hadamard, smooth and awq "
                "before it (rotate may stay)"
            )
    return chosen


def _check_inputs(graph: Graph, chosen: Mapping[str, Step]) -> None:
    """UsageError where weights that meet the same inputs ask for different things to happen to them."""
    nothing = ("", 0)
    for unit in graph.units:
        asked = {
            w.name: (step.activations, step.hadamard) if (step := chosen.get(w.name)) else nothing
            for w in graph.unit(unit)
            if w.kind == "linear"
        }
        shared: dict[str, list[str]] = {}
        for weight in graph.unit(unit):
            if weight.kind == "linear":
                shared.setdefault(weight.statistics, []).append(weight.name)
        fused: dict[tuple[str, int | None], list[str]] = {}
        for parameter, pieces in graph.parameters(unit).items():
            for piece in pieces:
                if piece.weight.kind == "linear":
                    fused.setdefault((parameter, piece.index), []).append(piece.weight.name)
        for names in shared.values():
            if len({asked[name][1] for name in names}) > 1:
                raise UsageError(f"hadamard differs among {', '.join(names)}, which share their inputs; set it for all")
        for names in fused.values():
            if len({asked[name] for name in names}) > 1:
                raise UsageError(
                    f"activations or hadamard differ among {', '.join(names)}, which transformers holds as one; set "
                    "them for all"
                )


def spaces(change: Change, graph: Graph) -> tuple[str, ...]:
    """The spaces that a change of basis is applied to, in the order of the model.

    `|` joins names and globs of spaces; `normed` is every space of a block that a norm writes. UsageError for a term
    that matches none.
    """
    known = list(dict.fromkeys(s for w in graph.weights if w.kind == "linear" for s in w.reads.spaces))
    normed = {w.writes.spaces[0] for w in graph.weights if w.kind == "norm" and w.block is not None} & set(known)
    known += [s for s in graph.coordinates if s not in known]
    chosen: set[str] = set()
    for term in change.where.split("|"):
        name = term.strip()
        found = normed if name == "normed" else {s for s in known if fnmatch.fnmatchcase(s, name)}
        if not found:
            near = difflib.get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"its spaces are {', '.join(known)}, or `normed`"
            raise UsageError(f"where = {change.where!r}: no space of this model is named {name!r}; {hint}")
        chosen |= found
    return tuple(s for s in known if s in chosen)


def _find(name: str) -> Recipe:
    known = presets()
    if name in known:
        return recipe_from_toml(known[name], name)
    path = Path(name)
    if path.suffix != ".toml":
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(
            f"no recipe named {name!r}: {hint}presets are {', '.join(known)}; a recipe of your own is a file "
            "that ends in .toml"
        )
    try:
        return recipe_from_toml(path.read_text("utf-8"), name)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe {name} cannot be read: {error}") from error


def _from_plain(raw: Mapping[str, Any], source: str) -> Recipe:
    steps = tuple(_step(s, f"{source}, step {i + 1}") for i, s in enumerate(raw["steps"]))
    _typed(raw, {"seed": int}, source)
    calibration = raw.get("calibration", {})
    hints = {"samples": int, "context": int}
    _typed(calibration, hints, f"{source}, [calibration]")
    return Recipe(steps, Calibration(**calibration), raw["seed"], _cache(raw, source))


def _cache(raw: Mapping[str, Any], source: str) -> CachePolicy | None:
    plain = raw.get("cache")
    _typed({"cache": plain or {}}, {"cache": dict}, source)
    try:
        return None if plain is None else policy_from_plain(plain)
    except UsageError as error:
        raise UsageError(f"{source}, [cache]: {error}") from error


def _step(raw: Mapping[str, Any], source: str) -> Step | Change | Tuning:
    for key in ("where", "method"):
        if not isinstance(raw.get(key), str):
            raise UsageError(f"{source} has no {key!r}: every step needs `where` and `method`")
    encodes, rebases, tunes = {m.name: m for m in METHODS}, {m.name: m for m in REBASES}, {m.name: m for m in TUNES}
    methods: dict[str, type[Method]] = {**encodes, **rebases, **tunes}
    if raw["method"] not in methods:
        near = difflib.get_close_matches(raw["method"], methods, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"{source}: no method named {raw['method']!r}; {hint}methods are {', '.join(methods)}")
    method = methods[raw["method"]]
    settings = {k: v for k, v in raw.items() if k not in ("where", "method")}
    hints = {**method_fields(method), **(_INPUTS if raw["method"] in encodes else {})}
    _known(settings, tuple(hints), f"{source} ({method.name})")
    _typed(settings, hints, f"{source} ({method.name})")
    # 1 and 1.0 are one value: the recipe's hash must not tell them apart.
    values: dict[str, Any] = {k: float(v) if hints[k] is float else v for k, v in settings.items()}
    if raw["method"] in rebases:
        return Change(raw["where"], rebases[raw["method"]](**values))
    if raw["method"] in tunes:
        return Tuning(raw["where"], tunes[raw["method"]](**values))
    quantizer, order = values.pop("activations", ""), values.pop("hadamard", 0)
    average = values.pop("average_bits", 0.0)
    if quantizer not in ("", *ACTIVATIONS):
        near = difflib.get_close_matches(quantizer, ACTIVATIONS, n=2) or list(ACTIVATIONS)
        raise UsageError(f"{source}: activations = {quantizer!r}; expected {' or '.join(near)}")
    return Step(raw["where"], encodes[raw["method"]](**values), quantizer, order, float(average))


def method_fields(method: type[Method]) -> dict[str, Any]:
    """Name -> type of the hyper-parameters of a method."""
    hints = get_type_hints(method)
    return {f.name: hints[f.name] for f in dataclasses.fields(method)}  # type: ignore[arg-type]


def _override(raw: dict[str, Any], key: str, value: Any, text: str) -> None:
    first, *rest = key.split(".")
    if first == "seed" and not rest:
        raw["seed"] = value
    elif first == "calibration" and len(rest) == 1:
        if not raw["calibration"]:
            raise UsageError(f"--set {text} has no effect: no step of this recipe measures anything")
        _known({rest[0]: value}, tuple(raw["calibration"]), f"--set {text}")
        raw["calibration"][rest[0]] = value
    elif first == "cache" and len(rest) == 1:
        raw.setdefault("cache", {})[rest[0]] = value
    elif first == "steps" and len(rest) == 2 and rest[0].isdigit():
        number = int(rest[0])
        if number >= len(raw["steps"]):
            raise UsageError(f"--set {text}: the recipe has steps 0 to {len(raw['steps']) - 1}")
        _known({rest[1]: value}, tuple(raw["steps"][number]), f"--set {text}")
        raw["steps"][number][rest[1]] = value
    elif rest:
        raise UsageError(
            f"--set {text}: expected a setting of the steps (group=64), steps.N.setting, calibration.setting, "
            "cache.setting or seed"
        )
    else:
        hit = [s for s in raw["steps"] if key in s and key != "method"]
        if not hit:
            known = sorted({k for s in raw["steps"] for k in s if k != "method"} | {"seed"})
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(
                f"--set {text} has no effect: no step of this recipe has {key!r}; {hint}settings are {', '.join(known)}"
            )
        for step in hit:
            step[key] = value


def _known(given: Mapping[str, Any], known: Sequence[str], source: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UsageError(f"{source}: no setting named {key!r}; {hint}settings are {', '.join(known)}")


def _typed(given: Mapping[str, Any], hints: Mapping[str, Any], source: str) -> None:
    for key, value in given.items():
        hint = hints.get(key)
        if hint is None:
            continue
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                raise UsageError(f"{source}: {key} = {value!r}; expected {' or '.join(map(repr, get_args(hint)))}")
            continue
        fits = isinstance(value, hint) or (hint is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and hint is not bool):
            raise UsageError(f"{source}: {key} = {value!r}; expected {'a table' if hint is dict else hint.__name__}")


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    # JSON's strings are TOML's, but for one control character that JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)
