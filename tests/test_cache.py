"""Rounded keys and values, by the invariants (a) to (f) of their card, in transformers' own models and generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tersely.errors import CheckpointError, UsageError
from tersely.runtime import generate, load_model, load_tokenizer
from tersely.runtime.cache import (
    FP8Cache,
    FP8Layer,
    KIVICache,
    KIVILayer,
    forward_with_cache,
    make_cache,
    round_groups,
)
from tersely.runtime.policy import CONFIG_KEY, FP8, KIVI, CachePolicy, policy_from_plain, policy_to_plain, stored_policy
from tests.tiny import tiny
from tests.words import write_model

GROUP, RESIDUAL = 8, 16
SMALL = KIVI(bits=4, group=GROUP, residual=RESIDUAL)
POLICIES: list[CachePolicy] = [SMALL, KIVI(2, GROUP, RESIDUAL, rotate=True), FP8()]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(tiny("llama", tmp_path_factory.mktemp("llama")))


def texts(length: int, batch: int = 2) -> Tensor:
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(1))


def states(tokens: int, *, batch: int = 2, seed: int = 0, outliers: float = 1.0) -> tuple[Tensor, Tensor]:
    """Keys and values (B, 3, T, 16); two channels of the keys are larger."""
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn((batch, 3, tokens, 16), generator=draw) for _ in range(2))
    keys[..., [3, 11]] *= outliers
    return keys, values


def filled(layer: KIVILayer | FP8Layer, keys: Tensor, values: Tensor, piece: int | None = None) -> Any:
    """The layer after all tokens have come, `piece` at a time."""
    step = piece or keys.shape[-2]
    for a in range(0, keys.shape[-2], step):
        layer.update(keys[..., a : a + step, :], values[..., a : a + step, :])
    return layer


def seen(layer: Any) -> tuple[Tensor, Tensor]:
    """What the next token would see of the past."""
    nothing = layer.keys.new_zeros((*layer.keys.shape[:2], 0, layer.keys.shape[-1]), dtype=layer.dtype)
    found: tuple[Tensor, Tensor] = layer.update(nothing, nothing)
    return found


def stepped(network: Any, ids_BL: Tensor, cache: Any, piece: int) -> Tensor:
    with torch.no_grad():
        pieces = torch.split(ids_BL, piece, dim=1)
        return torch.cat([network(input_ids=ids, past_key_values=cache).logits for ids in pieces], dim=1)


def test_a_fewer_tokens_than_the_residual_are_kept_as_they_are(llama: Any) -> None:
    """(a)"""
    ids_BL = texts(RESIDUAL - 1)
    cache = make_cache(llama.config, SMALL)
    assert torch.equal(stepped(llama, ids_BL, cache, 4), stepped(llama, ids_BL, DynamicCache(config=llama.config), 4))
    layers: list[Any] = cache.layers
    assert all(layer.rounded_keys is None and layer.rounded_values is None for layer in layers)
    stepped(llama, texts(1), cache, 1)
    assert all(layer.rounded_keys is not None and layer.rounded_values is None for layer in layers)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_b_what_is_kept_does_not_depend_on_how_the_tokens_came(bits: int, rotate: bool) -> None:
    """(b)"""
    policy = KIVI(bits, GROUP, RESIDUAL, rotate)
    layers = [filled(KIVILayer(policy), *states(53), piece) for piece in (None, 1, 7)]
    for layer in layers[1:]:
        for name in ("keys", "values"):
            assert torch.equal(getattr(layer, name), getattr(layers[0], name))
            ours, first = getattr(layer, f"rounded_{name}"), getattr(layers[0], f"rounded_{name}")
            assert torch.equal(ours.codes, first.codes)
            assert torch.equal(ours.scale_G, first.scale_G)
            assert torch.equal(ours.low_G, first.low_G)


@pytest.mark.parametrize("tokens", [5, 16, 17, 40, 48])
def test_c_keys_are_rounded_a_residual_at_a_time_and_the_last_values_stay(tokens: int) -> None:
    """(c)"""
    keys, values = states(tokens)
    layer = filled(KIVILayer(SMALL), keys, values, 3)
    assert layer.get_seq_length() == tokens
    assert layer.keys.shape[-2] == tokens % RESIDUAL
    assert layer.values.shape[-2] == min(tokens, RESIDUAL)
    past_keys, past_values = seen(layer)
    assert past_keys.shape == keys.shape
    late = tokens // RESIDUAL * RESIDUAL
    assert torch.equal(past_keys[..., late:, :], keys[..., late:, :])
    assert torch.equal(past_values[..., -RESIDUAL:, :], values[..., -RESIDUAL:, :])
    assert (past_keys - keys).abs().max() < 0.6
    assert (past_values - values).abs().max() < 0.4


def test_d_eight_bits_leave_the_logits_within_a_hundredth(llama: Any) -> None:
    """(d)"""
    ids_BL = texts(48)
    with torch.no_grad():
        expected = llama(input_ids=ids_BL).logits
    assert (forward_with_cache(llama, ids_BL, KIVI(8, GROUP, RESIDUAL)) - expected).abs().max() < 1e-2
    moved = [
        (forward_with_cache(llama, ids_BL, KIVI(bits, GROUP, RESIDUAL)) - expected).square().mean()
        for bits in (2, 4, 8)
    ]
    assert moved[0] > 4 * moved[1] > 16 * moved[2] > 0


def test_e_channels_that_are_large_cost_less_where_keys_are_rounded_by_channel() -> None:
    """(e), and a rotation helps what is rounded by token."""
    keys, values = states(48, outliers=30.0)
    by_channel = filled(KIVILayer(SMALL), keys, values)
    turned = filled(KIVILayer(KIVI(4, GROUP, RESIDUAL, rotate=True)), keys, values)
    by_token = round_groups(keys, 4, GROUP).decode(torch.float32)
    small = [n for n in range(16) if n not in (3, 11)]

    def error(found: Tensor) -> float:
        return float((found - keys)[..., :32, small].square().mean())

    assert error(seen(by_channel)[0]) < 0.05 * error(by_token)
    assert float((seen(turned)[0] - keys).square().mean()) < float((by_token - keys).square().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 16, 50])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_f_the_formula_gives_the_bytes_that_are_allocated(policy: CachePolicy, tokens: int, dtype: torch.dtype) -> None:
    """(f)"""
    layer = KIVILayer(policy) if isinstance(policy, KIVI) else FP8Layer()
    keys, values = (x.to(dtype) for x in states(tokens))
    filled(layer, keys, values, 5)
    kept: list[Tensor] = [layer.keys, layer.values]  # type: ignore[list-item]
    for grid in (getattr(layer, "rounded_keys", None), getattr(layer, "rounded_values", None)):
        kept += [] if grid is None else [grid.codes, grid.scale_G, grid.low_G]
    allocated = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if t.numel()}.values())
    assert policy.nbytes(3, 16, 16, tokens, dtype.itemsize) * 2 == layer.nbytes == allocated


def test_runs_without_a_range_decode_to_themselves() -> None:
    x = torch.tensor([[3.25] * GROUP, [0.0] * GROUP, [-7e4] * GROUP, [1e-9] * GROUP])
    decoded = round_groups(x, 2, GROUP).decode(torch.float32)
    assert torch.equal(decoded[:2], x[:2])
    assert decoded.isfinite().all()


def test_padding_has_no_part_in_the_grids_of_what_follows_it() -> None:
    keys, values = states(RESIDUAL)
    padding_B = torch.tensor([5, 0])
    poisoned = keys.clone()
    poisoned[0, :, :5] = 1e4
    layers = [filled(KIVILayer(SMALL, padding_B), k, values) for k in (keys, poisoned)]
    clean, other = (seen(layer)[0] for layer in layers)
    assert torch.equal(clean[0, :, 5:], other[0, :, 5:])
    assert torch.equal(clean[1], other[1])
    assert (clean[0, :, 5:] - keys[0, :, 5:]).abs().max() < 0.4
    unmasked = seen(filled(KIVILayer(SMALL), poisoned, values))[0]
    assert (unmasked[0, :, 5:8] - keys[0, :, 5:8]).abs().max() > 3


@pytest.mark.parametrize(
    "make",
    [lambda: KIVILayer(SMALL, torch.tensor([2, 0])), lambda: KIVILayer(KIVI(4, GROUP, RESIDUAL, True)), FP8Layer],
)
def test_sequences_are_permuted_repeated_and_forgotten_as_a_whole(make: Callable[[], Any]) -> None:
    keys, values = states(40)
    order = torch.tensor([1, 1, 0])
    expected = [x[order] for x in seen(filled(make(), keys, values, 7))]
    layer = filled(make(), keys, values, 7)
    layer.reorder_cache(order)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen(layer), expected, strict=True))
    layer = filled(make(), keys, values, 7)
    layer.batch_repeat_interleave(2)
    assert all(len(x) == 4 and torch.equal(x[0], x[1]) for x in seen(layer))
    with pytest.raises(RuntimeError, match="cropped"):
        layer.crop(-1)
    layer.reset()
    assert layer.get_seq_length() == layer.nbytes == 0


def test_e4m3_saturates_and_keeps_its_relative_error() -> None:
    keys, values = states(20)
    keys[0, 0, 0, 0] = 1e6
    found, other = seen(filled(FP8Layer(), keys, values, 6))
    assert found.isfinite().all()
    assert found[0, 0, 0, 0] == 448
    assert ((other - values).abs() <= values.abs() / 16 + 2.0**-10).all()


# In transformers


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_takes_the_cache_with_padding_and_beams(llama: Any, policy: CachePolicy, beams: int) -> None:
    ids_BL = texts(9)
    ids_BL[0, :4] = 0
    mask = torch.ones_like(ids_BL)
    mask[0, :4] = 0
    cache = make_cache(llama.config, policy, (mask == 0).sum(1))
    found = llama.generate(
        ids_BL, attention_mask=mask, past_key_values=cache, max_new_tokens=24, num_beams=beams, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert found.shape == (2, 33)
    assert cache.get_seq_length() == 32


def test_greedy_text_is_what_a_forward_with_the_cache_one_token_at_a_time_calls_likely(llama: Any) -> None:
    ids_BL = texts(5, batch=1)
    found = llama.generate(
        ids_BL, past_key_values=KIVICache(llama.config, bits=2, group=GROUP, residual=RESIDUAL), max_new_tokens=30,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    logits = forward_with_cache(llama, found, KIVI(2, GROUP, RESIDUAL), piece=1)
    assert torch.equal(logits[0, 4:-1].argmax(-1), found[0, 5:])


def test_a_text_in_pieces_sees_the_keys_that_writing_it_would(llama: Any) -> None:
    ids_BL = texts(40)
    policy = KIVI(4, GROUP, RESIDUAL)
    with torch.no_grad():
        plain = llama(input_ids=ids_BL).logits
    whole = forward_with_cache(llama, ids_BL, policy)
    assert whole.shape == plain.shape
    assert torch.equal(whole[:, :RESIDUAL], stepped(llama, ids_BL[:, :RESIDUAL], None, RESIDUAL))
    later = (whole - plain)[:, RESIDUAL:].abs().max()
    exact = (forward_with_cache(llama, ids_BL, policy, piece=1) - plain)[:, RESIDUAL:].abs().max()
    assert 0 < later <= 2 * exact


def test_layers_with_a_window_keep_their_own_cache_and_a_model_of_such_is_refused(tmp_path: Path) -> None:
    mixed: Any = load_model(tiny("gemma2", tmp_path / "gemma2"))
    cache = KIVICache(mixed.config, group=GROUP, residual=RESIDUAL)
    assert sorted(type(layer).__name__ for layer in cache.layers) == ["DynamicSlidingWindowLayer", "KIVILayer"]
    assert stepped(mixed, texts(30), cache, 7).isfinite().all()
    only: Any = load_model(tiny("mistral", tmp_path / "mistral", sliding_window=8))
    with pytest.raises(UsageError, match="DynamicSlidingWindowLayer"):
        KIVICache(only.config)
    seq2seq: Any = load_model(tiny("t5", tmp_path / "t5"))
    with pytest.raises(UsageError, match="without an encoder"):
        FP8Cache(seq2seq.config)


def test_groups_that_do_not_fit_a_head_are_refused_with_one_that_does(llama: Any) -> None:
    with pytest.raises(UsageError, match=r"group=32 does not divide the 16 channels of a head; use 16"):
        stepped(llama, texts(4), KIVICache(llama.config), 4)


@pytest.mark.parametrize("policy", [*POLICIES, KIVI()], ids=repr)
def test_a_policy_comes_back_from_plain_values(policy: CachePolicy) -> None:
    assert policy_from_plain(json.loads(json.dumps(policy_to_plain(policy)))) == policy


@pytest.mark.parametrize(
    ("plain", "named"),
    [
        ({"method": "kv"}, "no cache method named 'kv'; expected kivi or fp8"),
        ({"method": "fp8", "bits": 4}, "no setting 'bits'; it has none"),
        ({"method": "kivi", "bits": "4"}, "type int"),
        ({"method": "kivi", "bits": 3}, "expected 2, 4 or 8"),
        ({"method": "kivi", "group": 3}, "a multiple of 2"),
        ({"method": "kivi", "group": 32, "residual": 40}, "multiple of group=32"),
    ],
)
def test_settings_that_do_not_exist_are_refused(plain: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        policy_from_plain(plain)


def test_a_checkpoint_that_asks_for_a_policy_is_written_with_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    policy = KIVI(2, 8, 8)
    (folder / "config.json").write_text(json.dumps({**config, CONFIG_KEY: policy_to_plain(policy)}))
    network: Any = load_model(folder)
    assert stored_policy(network.config) == policy
    text = generate(folder, "the cat sat on", max_new_tokens=40)
    tokenizer: Any = load_tokenizer(folder)
    ids_BL = tokenizer("the cat sat on", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        found = network.generate(
            ids_BL, past_key_values=make_cache(network.config, policy), max_new_tokens=40, do_sample=False
        )
    assert text == tokenizer.decode(found[0, ids_BL.shape[1] :], skip_special_tokens=True)
    setattr(network.config, CONFIG_KEY, {"method": "kivi", "bits": 5})
    with pytest.raises(CheckpointError, match=r"damaged.*expected 2, 4 or 8"):
        stored_policy(network.config)
