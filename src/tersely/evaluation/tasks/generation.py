"""Text that a model writes after its contexts, as a request of the harness sets it.

B = rows, L = tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tersely.runtime import Loaded

_NEW_TOKENS = 256
"""Where a task does not say how many: the harness's own number."""


def new_tokens(settings: Mapping[str, Any], positions: int) -> tuple[int, int]:
    """Tokens that are written at most, of as many as a request wants; never more than half of the positions."""
    from lm_eval.models.utils import normalize_gen_kwargs

    wanted = int(normalize_gen_kwargs(dict(settings), _NEW_TOKENS)["max_gen_toks"])
    return max(1, min(wanted, positions // 2)), wanted


def read_settings(settings: Mapping[str, Any], end: str | None) -> tuple[list[str], dict[str, Any]]:
    """Stopping texts, and what is left for transformers. end: the tokenizer's own last token."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    rest = dict(normalize_gen_kwargs(dict(settings), _NEW_TOKENS))
    stops = [stop for stop in handle_stop_sequences(rest.pop("until", None), eos=end) if stop]
    del rest["max_gen_toks"]
    if not rest.get("do_sample"):
        rest.pop("temperature", None)
        rest["do_sample"] = False
    return stops, rest


def generate(
    model: Loaded, rows: Sequence[Sequence[int]], new: int, stops: Sequence[str], rest: Mapping[str, Any], seed: int
) -> list[str]:
    """The text that the model writes after each row of tokens, cut before the first of `stops`.

    new: tokens at most. rest: what `read_settings` leaves for transformers.
    """
    import transformers

    network, tokenizer, device = model.network, model.tokenizer, model.device
    length = max(map(len, rows))
    ends = network.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    own_end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else own_end if own_end is not None else 0
    ids_BL = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows], device=device)
    keep_BL = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    new_config: Any = transformers.GenerationConfig  # untyped in transformers
    config = new_config(max_new_tokens=new, eos_token_id=ends or None, pad_token_id=pad, **rest)
    stopping: Any = transformers.StoppingCriteriaList([_Stop(tokenizer, stops, length)])
    before = network.generation_config
    network.generation_config = new_config()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made_BL = network.generate(
                ids_BL, attention_mask=keep_BL, generation_config=config, stopping_criteria=stopping
            )
    finally:
        network.generation_config = before
    texts = []
    for ids in made_BL[:, length:].tolist():
        text = tokenizer.decode(ids, skip_special_tokens=True)
        for stop in stops:
            text = text.split(stop)[0]
        texts.append(text)
    return texts


class _Stop:
    """Tells `generate` which rows have written one of the texts that end them."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], length: int) -> None:
        self._tokenizer, self._stops, self._length = tokenizer, stops, length
        self._back = 4 * max((len(stop) for stop in stops), default=0) + 8  # a character has at most four tokens

    def __call__(self, ids_BL: Tensor, _scores: Any, **_more: Any) -> Tensor:
        tails = ids_BL[:, self._length :][:, -self._back :].tolist()
        texts = [self._tokenizer.decode(tail, skip_special_tokens=False) for tail in tails]
        ended = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(ended, device=ids_BL.device)
