"""Recipes from TOML files, presets and the command line's overrides."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from tersely.codecs.activations import ACTIVATIONS
from tersely.errors import UsageError
from tersely.methods import CUTS, DROPS, METHODS, REBASES, SPLITS, TRIMS, TUNES, Method
from tersely.plan.recipe import CUTS as CUT_SETTINGS
from tersely.plan.recipe import DROPS as DROP_SETTINGS
from tersely.plan.recipe import INPUTS, Calibration, Change, Cut, Drop, Recipe, Shape, Step, ToExperts, Trim, Tuning
from tersely.plan.recipe import TRIMS as TRIM_SETTINGS
from tersely.runtime.policy import CachePolicy, policy_from_plain

_M = TypeVar("_M")


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


def _step(raw: Mapping[str, Any], source: str) -> Trim | Shape | Change | Step | Tuning:
    for key in ("where", "method"):
        if not isinstance(raw.get(key), str):
            raise UsageError(f"{source} has no {key!r}: every step needs `where` and `method`")
    encodes, rebases, tunes = {m.name: m for m in METHODS}, {m.name: m for m in REBASES}, {m.name: m for m in TUNES}
    cuts, drops, splits = {m.name: m for m in CUTS}, {m.name: m for m in DROPS}, {m.name: m for m in SPLITS}
    trims = {m.name: m for m in TRIMS}
    methods: dict[str, type[Method]] = {**encodes, **rebases, **tunes, **cuts, **drops, **splits, **trims}
    if raw["method"] not in methods:
        near = difflib.get_close_matches(raw["method"], methods, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"{source}: no method named {raw['method']!r}; {hint}methods are {', '.join(methods)}")
    method = methods[raw["method"]]
    settings = {k: v for k, v in raw.items() if k not in ("where", "method")}
    beside = _beside(raw["method"])
    hints = {**method_fields(method), **beside}
    _known(settings, tuple(hints), f"{source} ({method.name})")
    _typed(settings, hints, f"{source} ({method.name})")
    # 1 and 1.0 are one value: the recipe's hash must not tell them apart.
    values: dict[str, Any] = {k: float(v) if hints[k] is float else v for k, v in settings.items()}
    own = {k: values.pop(k) for k in beside if k in values}
    if raw["method"] in trims:
        return Trim(raw["where"], trims[raw["method"]](**values), **own)
    if raw["method"] in cuts:
        return Cut(raw["where"], cuts[raw["method"]](**values), **own)
    if raw["method"] in drops:
        return Drop(raw["where"], drops[raw["method"]](**values), **own)
    if raw["method"] in splits:
        return ToExperts(raw["where"], splits[raw["method"]](**values))
    if raw["method"] in rebases:
        return Change(raw["where"], rebases[raw["method"]](**values))
    if raw["method"] in tunes:
        return Tuning(raw["where"], tunes[raw["method"]](**values))
    quantizer = own.get("activations", "")
    if quantizer not in ("", *ACTIVATIONS):
        near = difflib.get_close_matches(quantizer, ACTIVATIONS, n=2) or list(ACTIVATIONS)
        raise UsageError(f"{source}: activations = {quantizer!r}; expected {' or '.join(near)}")
    return Step(raw["where"], encodes[raw["method"]](**values), **own)


def _beside(name: str) -> dict[str, Any]:
    """Settings of a step beside its method's, by the method's name."""
    for methods, settings in (
        (METHODS, INPUTS),
        (CUTS, CUT_SETTINGS),
        (DROPS, DROP_SETTINGS),
        (TRIMS, TRIM_SETTINGS),
    ):
        if name in {method.name for method in methods}:
            return dict(settings)
    return {}


def method_fields(method: type[Method]) -> dict[str, Any]:
    """Name -> type of the hyper-parameters of a method."""
    hints = get_type_hints(method)
    return {f.name: hints[f.name] for f in dataclasses.fields(method)}  # type: ignore[arg-type]


def with_settings(method: type[_M], overrides: Sequence[str]) -> _M:
    """A method with `key=value` settings. UsageError names the one that is wrong and those that there are."""
    hints = get_type_hints(method)
    known = {f.name: hints[f.name] for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UsageError(f"--set {override}: expected key=value")
        values[key.strip()] = _value(text.strip())
    _known(values, tuple(known), f"--set ({getattr(method, 'name', method.__name__)})")
    _typed(values, known, "--set")
    return method(**values)


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
        _known({rest[1]: value}, sorted(_settings(raw["steps"][number])), f"--set {text}")
        raw["steps"][number][rest[1]] = value
    elif rest:
        raise UsageError(
            f"--set {text}: expected a setting of the steps (group=64), steps.N.setting, calibration.setting, "
            "cache.setting or seed"
        )
    else:
        settings = [_settings(step) for step in raw["steps"]]
        hit = [step for step, own in zip(raw["steps"], settings, strict=True) if key in own]
        if not hit:
            known = sorted({"seed", *(f"calibration.{name}" for name in raw["calibration"])}.union(*settings))
            near = [f"calibration.{key}"] if key in raw["calibration"] else difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(
                f"--set {text} has no effect: no step of this recipe has {key!r}; {hint}settings are {', '.join(known)}"
            )
        for step in hit:
            step[key] = value


def _settings(step: Mapping[str, Any]) -> set[str]:
    """What can be set in a step, as Recipe.to_dict gives it."""
    return {*step, *_beside(step["method"])} - {"method"}


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
