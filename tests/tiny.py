"""Tiny random checkpoints of every family, written by transformers itself.

The layout on disk is therefore what the library writes (one 2-D weight per expert, tied heads left out).
Widths are chosen so that groups of 8, 16 and 32 divide them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

HIDDEN, MLP, HEADS, KV_HEADS, HEAD = 64, 96, 4, 2, 16
LENGTH = 9

_LLAMA: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": False}
_BLOCKS = "num_hidden_layers"

# model_type -> (Auto class, config key of the number of blocks, the rest of the config)
_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("CausalLM", _BLOCKS, _LLAMA),
    "mistral": ("CausalLM", _BLOCKS, {**_LLAMA, "head_dim": HEAD}),
    "qwen2": ("CausalLM", _BLOCKS, _LLAMA),
    # The head size is not hidden_size / num_attention_heads here, as in Qwen3-0.6B.
    "qwen3": ("CausalLM", _BLOCKS, {**_LLAMA, "head_dim": 32}),
    "gemma": ("CausalLM", _BLOCKS, {**_LLAMA, "head_dim": HEAD}),
    "gemma2": (
        "CausalLM",
        _BLOCKS,
        {**_LLAMA, "head_dim": HEAD, "query_pre_attn_scalar": HEAD, "sliding_window": 4},
    ),
    "gemma3_text": (
        "CausalLM",
        _BLOCKS,
        {**_LLAMA, "head_dim": HEAD, "query_pre_attn_scalar": HEAD, "sliding_window": 4},
    ),
    "phi3": ("CausalLM", _BLOCKS, {**_LLAMA, "original_max_position_embeddings": 64}),
    "gpt2": ("CausalLM", "n_layer", {"n_embd": HIDDEN, "n_inner": MLP, "n_head": HEADS, "n_positions": 64}),
    "opt": (
        "CausalLM",
        _BLOCKS,
        {
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": MLP,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 64,
        },
    ),
    "gpt_neox": (
        "CausalLM",
        _BLOCKS,
        {
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 64,
        },
    ),
    "mixtral": ("CausalLM", _BLOCKS, {**_LLAMA, **_MOE, "num_local_experts": 4}),
    "qwen3_moe": (
        "CausalLM",
        _BLOCKS,
        {
            **_LLAMA,
            **_MOE,
            "head_dim": 32,
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "bert": (
        "MaskedLM",
        _BLOCKS,
        {
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 64,
        },
    ),
    "t5": (
        "Seq2SeqLM",
        "num_layers",
        {"d_model": HIDDEN, "d_kv": HEAD, "d_ff": MLP, "num_heads": HEADS, "decoder_start_token_id": 0},
    ),
    "olmo2": ("CausalLM", _BLOCKS, _LLAMA),
    "granite": (
        "CausalLM",
        _BLOCKS,
        {**_LLAMA, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0},
    ),
    "starcoder2": ("CausalLM", _BLOCKS, {**_LLAMA, "use_bias": True}),
    "stablelm": ("CausalLM", _BLOCKS, {**_LLAMA, "use_qkv_bias": True, "qk_layernorm": True}),
    "smollm3": ("CausalLM", _BLOCKS, {**_LLAMA, "pad_token_id": 0}),
    "deepseek_v3": (
        "CausalLM",
        _BLOCKS,
        {
            **_LLAMA,
            **_MOE,
            "num_key_value_heads": HEADS,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
}
FAMILIES = tuple(_CONFIGS)


def tiny(
    model_type: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tied: bool | None = None,
    blocks: int = 2,
    vocab: int = 64,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint into `folder` and return it; `overrides` are config keys.

    `tied`: whether the head is the embedding; None leaves the family's default.
    """
    _, key, rest = _CONFIGS[model_type]
    settings: dict[str, Any] = {"vocab_size": vocab, key: blocks, **rest, **overrides}
    if tied is not None:
        settings["tie_word_embeddings"] = tied
    for token in ("bos_token_id", "eos_token_id"):
        settings.setdefault(token, 1)
    settings.setdefault("pad_token_id", 0)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _auto(model_type).from_config(config).eval()
        _randomize(model)
    model.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    return folder


def load(path: Path) -> nn.Module:
    """The model as plain transformers loads it, in the stored precision."""
    model_type = transformers.AutoConfig.from_pretrained(path).model_type
    model: nn.Module = _auto(model_type).from_pretrained(path, dtype="auto").eval()
    return model


def inputs(model_type: str) -> dict[str, Tensor]:
    """Two fixed sequences, as keyword arguments of the model."""
    ids_BL = torch.randint(3, 60, (2, LENGTH), generator=torch.Generator().manual_seed(7))
    both = {"input_ids": ids_BL}
    return {**both, "decoder_input_ids": ids_BL.flip(0)} if model_type == "t5" else both


@torch.no_grad()
def forward(path: Path) -> Tensor:
    """Logits of the fixed sequences, in float32, by plain transformers."""
    model = load(path)
    logits_BLV: Tensor = model(**inputs(model.config.model_type)).logits  # type: ignore[union-attr, arg-type]
    return logits_BLV.float()


def _auto(model_type: str) -> Any:
    return getattr(transformers, f"AutoModelFor{_CONFIGS[model_type][0]}")


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Norms, biases and buffers away from their neutral values, and matrices that move the logits."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or "inv_freq" in name or "embed_scale" in name:
            continue
        if "e_score_correction_bias" in name or tensor.ndim == 1:
            tensor.add_(0.2 * torch.randn_like(tensor))
        elif tensor.ndim >= 2 and tensor.shape[-1] > 1:
            fan_in = tensor.shape[-1]
            lookup = any(word in name for word in ("embed", "wte", "wpe", "shared.weight", "relative_attention"))
            tensor.copy_(torch.randn_like(tensor) * (0.5 if lookup else fan_in**-0.5))
