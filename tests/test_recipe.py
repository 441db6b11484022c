"""Recipes: TOML and the dataclass are one thing, and nothing in them is without effect."""

from __future__ import annotations

import dataclasses
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersely.checkpoint import open_checkpoint
from tersely.codecs.activations import ACTIVATIONS
from tersely.errors import UsageError
from tersely.graph import Graph, read_graph
from tersely.methods import METHODS, REBASES, TUNES
from tersely.methods.encode.gptq import GPTQ
from tersely.methods.encode.rtn import RTN
from tersely.plan.assignment import assign
from tersely.plan.reading import load_recipe, method_fields, presets, recipe_from_toml
from tersely.plan.recipe import Calibration, Change, Recipe, Step, Tuning
from tests.tiny import tiny

AnyMethod = Any
"""A method of whatever stage."""
KINDS: tuple[tuple[Any, Any], ...] = (
    *((Step, m) for m in METHODS),
    *((Change, m) for m in REBASES),
    *((Tuning, m) for m in TUNES),
)


def others(hint: Any, before: Any) -> list[Any]:
    """Values that a setting could have beside the one it has, most of them allowed."""
    if get_origin(hint) is Literal:
        return [v for v in get_args(hint) if v != before]
    if hint is bool:
        return [not before]
    if hint is str:
        return [v for v in ("2:4", "1:4", "") if v != before]
    if hint is int:
        return [v for v in (before + 1, before * 2, before - 1, before // 2, 16, 4, 1) if v != before]
    return [v for v in (before / 2, before * 1.5, 0.25, 0.001, 1.0) if v != before]


def changed(method: AnyMethod, name: str, values: list[Any]) -> AnyMethod | None:
    """The method with the first of the values that it allows."""
    for value in values:
        with suppress(UsageError):
            return dataclasses.replace(method, **{name: value})
    return None


@st.composite
def methods(draw: st.DrawFn, kind: Any) -> AnyMethod:
    made = draw(st.sampled_from([m for k, m in KINDS if k is kind]))()
    for name, hint in method_fields(type(made)).items():
        if draw(st.booleans()):
            values = draw(st.permutations(others(hint, getattr(made, name))))
            made = changed(made, name, list(values)) or made
    return made


words = st.text(st.characters(codec="utf-8"), max_size=20)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    changes = draw(st.lists(st.builds(Change, where=words, method=methods(Change)), max_size=2))
    inputs: dict[str, st.SearchStrategy[Any]] = {
        "activations": st.sampled_from(["", *ACTIVATIONS]),
        "hadamard": st.sampled_from([0, 16]),
    }
    encodes = draw(st.lists(st.builds(Step, where=words, method=methods(Step), **inputs), min_size=1, max_size=3))
    tunings = draw(st.lists(st.builds(Tuning, where=words, method=methods(Tuning)), max_size=1))
    steps: tuple[Step | Change | Tuning, ...] = (*changes, *encodes, *tunings)
    seed = draw(st.integers(-(2**40), 2**40))
    if not any(step.needs for step in steps):
        return Recipe(steps, seed=seed)
    counts = st.builds(Calibration, samples=st.integers(1, 10**6), context=st.integers(2, 10**6))
    return Recipe(steps, draw(counts), seed)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return read_graph(open_checkpoint(tiny("llama", tmp_path_factory.mktemp("llama"))))


def refused(text: str, *named: str) -> None:
    """The TOML text is refused, and the message names these things and the source."""
    with pytest.raises(UsageError) as caught:
        recipe_from_toml(text, "mine.toml")
    for part in ("mine.toml", *named):
        assert part in str(caught.value)


STEP = '[[steps]]\nwhere = "linear"\nmethod = "rtn"\n'
MEASURED = '[[steps]]\nwhere = "linear"\nmethod = "gptq"\n'


# TOML and the dataclass


@settings(deadline=None, max_examples=100)
@given(recipe=recipes())
def test_a_recipe_is_read_back_from_its_toml_as_it_was(recipe: Recipe) -> None:
    text = recipe.to_toml()
    read = recipe_from_toml(text)
    assert read == recipe
    assert read.to_toml() == text
    assert read.hash == recipe.hash
    assert tomllib.loads(text) == recipe.to_dict()


@pytest.mark.parametrize(("kind", "method"), KINDS, ids=lambda value: value.__name__)
def test_every_field_of_a_method_is_a_key_of_a_step_and_changes_the_hash(kind: Any, method: AnyMethod) -> None:
    def recipe(made: AnyMethod) -> Recipe:
        encode = () if kind is Step else (Step("linear", RTN()),)
        return Recipe((*encode, kind("linear", made)) if kind is Tuning else (kind("linear", made), *encode))

    base = recipe(method())
    step = next(each for each in base.to_dict()["steps"] if each["method"] == method.name)
    assert list(step) == ["where", "method", *method_fields(method)]
    for name, hint in method_fields(method).items():
        other = changed(method(), name, others(hint, getattr(method(), name)))
        assert other is not None, f"no other {name} is allowed"
        assert recipe(other).hash != base.hash
        assert recipe(other) != base


def test_what_inputs_go_through_is_a_key_of_every_step_that_encodes() -> None:
    step = Step("linear", GPTQ(), "int8", 16, 3.5)
    (plain,) = Recipe((step,)).to_dict()["steps"]
    assert (plain["activations"], plain["hadamard"], plain["average_bits"]) == ("int8", 16, 3.5)
    for wrong, said in (
        ('activations = "int9"', "int8"),
        ("hadamard = true", "hadamard"),
        ("average_bits = 9", "1 to 8"),
    ):
        with pytest.raises(UsageError, match=said):
            recipe_from_toml(MEASURED + wrong)


def test_the_hash_does_not_depend_on_how_the_toml_is_written() -> None:
    plain = recipe_from_toml(MEASURED + "damping = 1\n")
    assert recipe_from_toml("# mine\nseed = 0\n" + MEASURED + "damping = 1.0\nbits   = 4").hash == plain.hash
    assert recipe_from_toml("seed = 1\n" + MEASURED + "damping = 1.0").hash != plain.hash


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_read_back_and_say_what_they_do(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe_from_toml(recipe.to_toml()) == recipe
    assert presets()[name].startswith("# ")
    assert bool(recipe.needs) == ("calibration" in recipe.to_dict())


def test_the_presets_of_the_documentation_exist() -> None:
    assert {"w8a16", "w4a16", "w4a16-gptq", "w3a16-gptq"} <= set(presets())


def test_a_recipe_of_the_user_is_a_toml_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(load_recipe("w4a16-gptq").to_toml(), "utf-8")
    assert load_recipe(file) == load_recipe("w4a16-gptq")
    assert load_recipe(str(file), ["bits=3"]) == load_recipe("w4a16-gptq", ["bits=3"])


def test_what_is_left_out_has_its_default() -> None:
    assert recipe_from_toml(MEASURED) == Recipe((Step("linear", GPTQ()),), Calibration(), 0)


# Overrides


def test_an_override_sets_a_field_in_every_step_that_has_it() -> None:
    recipe = Recipe((Step("attention", RTN(bits=8)), Step("mlp", GPTQ(bits=4))))
    assert recipe.needs == {"gram"}
    file_free = load_recipe("w4a16-gptq", ["group=64", "symmetric=false", "clip=none", "damping=0.1"])
    assert file_free.steps[0].method == GPTQ(group=64, symmetric=False, clip="none", damping=0.1)


def test_overrides_reach_one_step_the_calibration_and_the_seed(tmp_path: Path) -> None:
    file = tmp_path / "two.toml"
    file.write_text(Recipe((Step("attention", RTN(bits=8)), Step("mlp", GPTQ(bits=4)))).to_toml(), "utf-8")
    overrides = [
        "steps.1.bits=3",
        "calibration.samples=5",
        "seed=7",
        "group=16",
        "steps.0.where=attention | head",
    ]
    assert load_recipe(file, overrides) == Recipe(
        (Step("attention | head", RTN(bits=8, group=16)), Step("mlp", GPTQ(bits=3, group=16))),
        Calibration(samples=5),
        7,
    )


def test_overrides_say_what_steps_round_inputs_to_and_how_many_bits_they_have_on_average() -> None:
    every = load_recipe("w4a16-gptq", ["activations=int8", "hadamard=64", "average_bits=4.5"])
    one = load_recipe("w4a16-gptq", ["steps.0.activations=int8", "steps.0.hadamard=64", "steps.0.average_bits=4.5"])
    assert one == every
    (step,) = every.steps
    assert isinstance(step, Step)
    assert (step.activations, step.hadamard, step.average_bits) == ("int8", 64, 4.5)
    with pytest.raises(UsageError, match="no setting named 'activations'"):
        load_recipe("w8a8", ["steps.0.activations=int8"])  # a change of basis


@pytest.mark.parametrize(
    ("preset", "override", "named"),
    [
        ("w4a16", "damping=0.1", ["damping", "no effect"]),
        ("w4a16", "calibration.samples=3", ["calibration.samples=3", "no effect"]),
        ("w4a16", "grop=64", ["grop", "did you mean group?"]),
        ("w4a16-gptq", "samples=64", ["samples", "did you mean calibration.samples?"]),
        ("w4a16", "method=gptq", ["method", "no effect"]),
        ("w4a16", "group", ["key=value"]),
        ("w4a16", "=3", ["key=value"]),
        ("w4a16", "group=many", ["group", "'many'", "int"]),
        ("w4a16", "group=6.5", ["group", "6.5", "int"]),
        ("w4a16", "symmetric=1", ["symmetric", "bool"]),
        ("w4a16", "group=true", ["group", "True", "int"]),
        ("w4a16", "clip=l2", ["clip", "'none' or 'mse'"]),
        ("w4a16", "bits=1", ["bits=1", "2 to 8"]),
        ("w4a16", "seed=x", ["seed", "'x'", "int"]),
        ("w4a16", "steps.1.bits=3", ["steps 0 to 0"]),
        ("w4a16", "steps.0.bit=3", ["'bit'", "did you mean 'bits'?"]),
        ("w4a16", "steps.bits=3", ["steps.N.setting"]),
        ("w4a16", "model.bits=3", ["steps.N.setting"]),
        ("w4a16-gptq", "calibration.sample=3", ["'sample'", "did you mean 'samples'?"]),
        ("w4a16-gptq", "calibration.samples=0", ["samples=0"]),
        ("w4a16-gptq", "calibration.context=1", ["context=1"]),
        ("w4a16-gptq", "damping=0", ["damping=0"]),
        ("w4a16-gptq", "damping=nan", ["damping=nan"]),
        ("w4a16-gptq", "minimum_tokens=nan", ["minimum_tokens=nan"]),
    ],
)
def test_an_override_that_cannot_be_taken_is_refused(preset: str, override: str, named: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(preset, [override])
    for part in named:
        assert part in str(caught.value)


# Errors


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("steps = [", ["not TOML"]),
        ("", ["[[steps]]"]),
        ("steps = []", ["[[steps]]"]),
        ("steps = 3", ["[[steps]]"]),
        ("steps = [1]", ["[[steps]]"]),
        (STEP + "[[stepps]]", ["'stepps'", "did you mean 'steps'?"]),
        ("sed = 1\n" + STEP, ["'sed'", "did you mean 'seed'?"]),
        ("seed = 1.5\n" + STEP, ["seed", "1.5", "int"]),
        ("seed = true\n" + STEP, ["seed", "True", "int"]),
        ("calibration = 3\n" + STEP, ["calibration", "a table"]),
        ("[calibration]\nsample = 3\n" + MEASURED, ["[calibration]", "'sample'", "'samples'"]),
        ("[calibration]\nsamples = 3.0\n" + MEASURED, ["[calibration]", "samples", "3.0", "int"]),
        ("[calibration]\nsamples = 128\n" + STEP, ["[calibration] has no effect"]),
        ('[[steps]]\nmethod = "rtn"', ["step 1", "'where'"]),
        (STEP + '[[steps]]\nwhere = "mlp"', ["step 2", "'method'"]),
        ('[[steps]]\nwhere = 3\nmethod = "rtn"', ["step 1", "'where'"]),
        ('[[steps]]\nwhere = "mlp"\nmethod = "gtpq"', ["'gtpq'", "did you mean 'gptq'?", "rtn"]),
        (STEP + "bit = 4", ["step 1 (rtn)", "'bit'", "did you mean 'bits'?"]),
        (STEP + "damping = 0.1", ["step 1 (rtn)", "'damping'", "bits, group, symmetric, clip"]),
        (STEP + 'bits = "4"', ["step 1 (rtn)", "bits", "'4'", "int"]),
        (STEP + "bits = true", ["bits", "True", "int"]),
        (STEP + "symmetric = 1", ["symmetric", "bool"]),
        (STEP + 'clip = "l2"', ["clip", "'none' or 'mse'"]),
        (STEP + "clip = []", ["clip", "'none' or 'mse'"]),
        (MEASURED + "damping = true", ["damping", "True", "float"]),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_by_what_is_wrong(text: str, named: list[str]) -> None:
    refused(text, *named)


def test_a_recipe_without_steps_or_with_a_calibration_that_nothing_uses_cannot_be_made() -> None:
    with pytest.raises(UsageError, match="at least one step"):
        Recipe(())
    with pytest.raises(UsageError, match="no effect"):
        Recipe((Step("linear", RTN()),), Calibration(samples=3))


def test_an_unknown_preset_is_refused_with_the_nearest_and_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'w4a16-gpt'.*did you mean w4a16-gptq.*w8a16.*\.toml"):
        load_recipe("w4a16-gpt")
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path / "absent.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path / "bytes.toml")


# Recipes and weights


def test_the_last_step_that_selects_a_weight_takes_it(llama: Graph) -> None:
    recipe = Recipe((Step("linear", RTN(group=16)), Step("attention", RTN(bits=8, group=16))))
    chosen = assign(recipe, llama)
    assert len(chosen) == 14
    for name, step in chosen.items():
        assert step.method == RTN(bits=8 if "self_attn" in name else 4, group=16)


def test_a_pattern_that_selects_nothing_is_refused_by_name(llama: Graph) -> None:
    for where, named in (("mlp.up", "mlp.up"), ("experts", "experts"), ("blocks 2-3", "blocks 0 to 1")):
        with pytest.raises(UsageError, match=named):
            assign(Recipe((Step(where, RTN(group=16)),)), llama)


def test_a_step_of_which_later_ones_leave_nothing_is_refused_by_number(llama: Graph) -> None:
    recipe = Recipe((Step("mlp", RTN(bits=8, group=16)), Step("linear", RTN(group=16))))
    with pytest.raises(UsageError, match=r"step 1 \(where = 'mlp'\) has no effect"):
        assign(recipe, llama)


def test_a_group_that_does_not_divide_a_width_is_refused_with_the_weight(llama: Graph) -> None:
    recipe = Recipe((Step("linear", RTN(group=64)),))
    with pytest.raises(UsageError, match=r"group=64 does not divide 96; use .*32.*\(mlp.down_proj, block 0\)"):
        assign(recipe, llama)
