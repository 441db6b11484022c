"""Continue a text with a causal language model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tersely.errors import UsageError
from tersely.runtime.loading import Loaded, load_model, load_tokenizer, max_positions, quiet, require_causal
from tersely.runtime.policy import stored_policy


def generate(
    path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    dtype: Literal["auto"] | torch.dtype = "auto",
    stream: Callable[[str], None] | None = None,
) -> str:
    """Continue a prompt; gives the new text only, without special tokens.

    temperature 0 takes the most likely token; above it, tokens are drawn from softmax(logits / temperature)
    over the whole vocabulary, by `seed`. Past keys and values are kept as the checkpoint's config says. stream is
    called with each new piece of text; joined, they are the result. Ends at the model's end token or after
    `max_new_tokens`. Raises UsageError: not a causal language model, a bad number, or more tokens than the model has
    positions; CheckpointError as in `load_model`.
    """
    require_causal(path, "generate")
    _require_writable(max_new_tokens, temperature)
    tokenizer = load_tokenizer(path)
    loaded = Loaded(str(path), load_model(path, device=device, dtype=dtype), tokenizer, device)
    return write(loaded, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stream=stream)[1]


def text_logits(network: Any, ids_BL: Tensor) -> Tensor:
    """Logits (B, L, V) of a text, whose tokens see those before them as the model's cache would keep them."""
    policy = stored_policy(network.config)
    if policy is None:
        logits: Tensor = network(input_ids=ids_BL, use_cache=False).logits
        return logits
    from tersely.runtime.cache import forward_with_cache

    return forward_with_cache(network, ids_BL, policy)


def write(
    model: Loaded,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stream: Callable[[str], None] | None = None,
) -> tuple[list[int], str]:
    """`generate` with a model that is loaded: the new tokens' ids, and their text."""
    import transformers

    _require_writable(max_new_tokens, temperature)
    new_config: Any = transformers.GenerationConfig  # untyped in transformers
    network, tokenizer = model.network, model.tokenizer
    ids_BL = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device=model.device, dtype=torch.int64)
    if ids_BL.shape[1] == 0:
        raise UsageError("the prompt has no tokens; give at least one word")
    positions = max_positions(network.config)
    if positions is not None and ids_BL.shape[1] + max_new_tokens > positions:
        raise UsageError(
            f"a prompt of {ids_BL.shape[1]} tokens and {max_new_tokens} new ones exceed the "
            f"model's {positions} positions; shorten the prompt or lower max_new_tokens"
        )
    own = network.generation_config
    ends = own.eos_token_id
    settings: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = new_config(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0] if isinstance(ends, list) else ends,
        **settings,
    )
    text = _Text(tokenizer, stream)
    inputs = {"attention_mask": torch.ones_like(ids_BL), "generation_config": config, "streamer": text}
    if (policy := stored_policy(network.config)) is not None:
        from tersely.runtime.cache import make_cache

        inputs["past_key_values"] = make_cache(network.config, policy)
    network.generation_config = new_config()
    try:
        with quiet(), torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(seed)
            network.generate(ids_BL, **inputs)
    finally:
        network.generation_config = own
    return text.ids, text.whole


def _require_writable(max_new_tokens: int, temperature: float) -> None:
    if max_new_tokens < 1 or temperature < 0:
        raise UsageError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}: expected 1 or more and 0 or more"
        )


class _Text:
    """What generate hands its tokens to: puts them together, passes on what no later token changes."""

    def __init__(self, tokenizer: Any, stream: Callable[[str], None] | None) -> None:
        self.whole = ""
        self._tokenizer, self._stream = tokenizer, stream
        self.ids: list[int] = []
        self._prompted = False

    def put(self, ids: Tensor) -> None:
        """Take the next tokens; the first call brings the prompt, which is not part of the text."""
        if not self._prompted:
            self._prompted = True
            return
        self.ids += ids.flatten().tolist()
        text = self._tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character whose last bytes have not come yet
            self._pass_on(text)

    def end(self) -> None:
        """Pass on what is left."""
        self._pass_on(self._tokenizer.decode(self.ids, skip_special_tokens=True))

    def _pass_on(self, text: str) -> None:
        piece, self.whole = text[len(self.whole) :], text
        if self._stream is not None and piece:
            self._stream(piece)
