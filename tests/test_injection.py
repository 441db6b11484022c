"""A chat model with new tokens: whose block, whose row, and what lies between two tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.errors import CheckpointError, UsageError
from tersely.vocabulary.injection import ElChat, inject, linear, slerp
from tests.tiny import load, tiny

SPECIAL = (0, 1, 7)
shares = st.floats(0, 1, allow_subnormal=False)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mix", [linear, slerp])
def test_either_end_is_one_of_the_tensors(mix: Any) -> None:
    one, other = drawn(0, 4, 5), drawn(1, 4, 5)
    assert torch.equal(mix(one, other, 0.0), one)
    assert torch.equal(mix(one, other, 1.0), other)


@settings(deadline=None)
@given(share=shares, seed=st.integers(0, 20))
def test_an_arc_is_the_same_from_either_end(share: float, seed: int) -> None:
    one, other = drawn(seed, 3, 4), drawn(seed + 100, 3, 4)
    torch.testing.assert_close(slerp(one, other, share), slerp(other, one, 1 - share), rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(share=shares, seed=st.integers(0, 20))
def test_an_arc_between_tensors_of_one_length_keeps_it_and_turns_evenly(share: float, seed: int) -> None:
    one, other = (own / own.norm() for own in (drawn(seed, 6, 4), drawn(seed + 100, 6, 4)))
    between = slerp(one, other, share)
    assert abs(float(between.norm()) - 1) < 1e-4
    whole = torch.acos((one * other).sum().double())
    assert abs(float(torch.acos((one * between).sum().double().clamp(-1, 1)) - share * whole)) < 1e-3


def test_parallel_and_empty_tensors_are_mixed_in_a_line() -> None:
    one = drawn(0, 3, 3)
    assert torch.equal(slerp(one, 2 * one, 0.25), linear(one, 2 * one, 0.25))
    assert torch.equal(slerp(one, torch.zeros(3, 3), 0.25), 0.75 * one)
    assert torch.equal(slerp(one, -one, 0.5), torch.zeros(3, 3))


@pytest.fixture(scope="module", params=[("qwen2", True), ("qwen2", False), ("gpt2", True), ("gemma2", None)], ids=str)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint]:
    """A chat model of 64 tokens, and another of 70 in its place."""
    family, tied = request.param
    folder = tmp_path_factory.mktemp("models")
    chat = tiny(family, folder / "chat", blocks=6, tied=tied)
    adapted = tiny(family, folder / "adapted", blocks=6, vocab=70, seed=1, tied=tied, dtype=torch.bfloat16)
    return open_checkpoint(chat), open_checkpoint(adapted)


def injected(chat: Checkpoint, adapted: Checkpoint, **given: Any) -> dict[str, Tensor]:
    return {name: value for _, own in inject(chat, adapted, SPECIAL, ElChat(**given)) for name, value in own.items()}


def block_of(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def by_token(checkpoint: Checkpoint, name: str) -> bool:
    return checkpoint.spec(name).shape[0] == 70


def test_every_tensor_comes_once_in_the_dtype_and_shape_of_the_adapted_model(models: Any) -> None:
    chat, adapted = models
    units = [unit for unit, _ in inject(chat, adapted, SPECIAL, ElChat())]
    assert len(units) == len(set(units)) == 7
    assert units[-1] == ""
    found = injected(chat, adapted)
    assert found.keys() == set(adapted)
    assert all((value.shape, value.dtype) == (adapted.spec(n).shape, torch.bfloat16) for n, value in found.items())


@pytest.mark.parametrize("arc", [True, False])
def test_the_middle_is_the_chat_models_and_the_ends_are_mixed(models: Any, arc: bool) -> None:
    chat, adapted = models
    mix, expected_shares = slerp if arc else linear, {0: 0.3, 1: 0.5, 4: 0.5, 5: 0.3}
    for name, value in injected(chat, adapted, slerp=arc).items():
        block = block_of(name)
        if block in expected_shares:
            wanted = mix(adapted[name].float(), chat[name].float(), expected_shares[block]).bfloat16()
        elif by_token(adapted, name):
            wanted = adapted[name].clone()
            wanted[list(SPECIAL)] = chat[name][list(SPECIAL)].bfloat16()
        else:
            wanted = chat[name].bfloat16()
        assert torch.equal(value, wanted), name


def test_all_of_the_chat_model_and_its_rows_is_the_chat_model(models: Any) -> None:
    chat, _ = models
    found = {
        name: value
        for _, own in inject(chat, chat, range(64), ElChat(outer=1.0, inner=1.0))
        for name, value in own.items()
    }
    assert all(torch.equal(value, chat[name]) for name, value in found.items())


def test_none_of_the_chat_model_leaves_the_ends_of_the_adapted_one(models: Any) -> None:
    chat, adapted = models
    found = injected(chat, adapted, outer=0.0, inner=0.0)
    ends = [name for name in found if block_of(name) in (0, 1, 4, 5)]
    assert ends
    assert all(torch.equal(found[name], adapted[name]) for name in ends)


def test_what_comes_out_runs(models: Any, tmp_path: Path) -> None:
    chat, adapted = models
    for file in adapted.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(injected(chat, adapted), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model: Any = load(tmp_path)
    with torch.no_grad():
        assert bool(model(torch.tensor([[3, 65, 69]])).logits.isfinite().all())


@pytest.mark.parametrize("special", [(), (64,), (-1, 3)])
def test_special_tokens_that_the_chat_model_lacks_are_refused(models: Any, special: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="special tokens"):
        list(inject(models[0], models[1], special, ElChat()))


@pytest.mark.parametrize("given_shares", [{"outer": -0.1}, {"inner": 1.5}, {"outer": float("nan")}])
def test_shares_outside_of_0_to_1_are_refused(given_shares: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected 0 to 1"):
        ElChat(**given_shares)


def test_models_that_are_not_one_are_refused(tmp_path: Path) -> None:
    chat = open_checkpoint(tiny("llama", tmp_path / "chat", blocks=4))
    for other, error, message in (
        ({"blocks": 5}, CheckpointError, "only one has"),
        ({"blocks": 4, "intermediate_size": 64}, CheckpointError, "96"),
        ({"blocks": 4, "tied": True}, CheckpointError, "lm_head"),
    ):
        adapted = open_checkpoint(tiny("llama", tmp_path / str(other), **other))  # type: ignore[arg-type]
        with pytest.raises(error, match=message):
            list(inject(chat, adapted, SPECIAL, ElChat()))
    short = open_checkpoint(tiny("llama", tmp_path / "short", blocks=3))
    with pytest.raises(UsageError, match="four"):
        list(inject(short, short, SPECIAL, ElChat()))
    two = open_checkpoint(tiny("t5", tmp_path / "t5", blocks=4))
    with pytest.raises(UsageError, match="more than one list"):
        list(inject(two, two, SPECIAL, ElChat()))


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    chat = open_checkpoint(tiny("llama", tmp_path / "chat", blocks=4))
    folder = tiny("llama", tmp_path / "adapted", blocks=4)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        list(inject(chat, open_checkpoint(folder), SPECIAL, ElChat()))
