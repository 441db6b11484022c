"""What a model answers to the harness's requests: its own tokenization rules, batched by tokens, remembered."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import redirect_stderr
from typing import Any, TextIO

import torch

from tersely.errors import CheckpointError
from tersely.evaluation.tasks.generation import generate, new_tokens, read_settings
from tersely.evaluation.tasks.likelihoods import Ask, Likelihoods, batches
from tersely.runtime import Loaded

_FORM = 1
"""Of the keys and values that are remembered."""


class Answers:
    """A language model as the harness asks for it: `loglikelihood`, `loglikelihood_rolling`, `generate_until`.

    Contexts and continuations are tokenized, joined and cut as the harness's own class for transformers models does,
    so that the numbers are the same; requests that differ only in their last token run once, and a beginning that many
    share (examples before every question) runs once where the model's cache allows it.

    answers: request -> response, as JSON; it is filled after every micro-batch. tick: called with the share of the
    requests of a call that is done. errors: where messages go while the model runs (the harness is kept quiet).
    """

    rank, world_size = 0, 1
    """Of processes, which the harness asks for."""

    def __init__(
        self,
        model: Loaded,
        *,
        tokens_per_batch: int,
        answers: MutableMapping[str, bytes],
        seed: int,
        errors: TextIO,
    ) -> None:
        from lm_eval.models.utils import resolve_max_length

        self.model = model
        self.likelihoods = Likelihoods(model)
        self.positions = int(resolve_max_length(model.network.config, model.tokenizer))
        self.seconds = 0.0
        self.asked = 0
        """Requests that the model has run for, in so many seconds."""
        self.tick: Callable[[float], None] | None = None
        self._answers = answers
        self._tokens = tokens_per_batch
        self._seed = seed
        self._errors = errors

    # What the harness calls.

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether greedy decoding would write it."""
        pairs = [(str(request.args[0]), str(request.args[1])) for request in requests]
        keys = [_key("loglikelihood", pair) for pair in pairs]
        missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if self._recall(key) is None}
        self._run(self._pairs(missing))
        return [(float(found[0]), bool(found[1])) for found in map(self._require, keys)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood of whole texts; those beyond the model's positions in windows, each token predicted once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        texts = [str(request.args[0]) for request in requests]
        whole = [_key("loglikelihood_rolling", (text,)) for text in texts]
        asks: list[Ask] = []
        parts: dict[str, list[str]] = {}
        for key, text in zip(whole, texts, strict=True):
            if self._recall(key) is not None or key in parts:
                continue
            ids = self._encode([text])[0]
            start = self._start()
            first, rest = (start, ids) if start is not None else (ids[0], ids[1:])
            windows = get_rolling_token_windows(rest, first, self.positions, 1)
            parts[key] = []
            for number, (context, continuation) in enumerate(map(make_disjoint_window, windows)):
                name = f"{key} {number}"
                asks.append(Ask(name, (*context, *continuation), len(continuation), 0))
                parts[key].append(name)
        self._run([ask for ask in asks if self._recall(ask.key) is None])
        self._answers.update(
            {
                key: _value([math.fsum(self._require(name)[0] for name in names), False, 0])
                for key, names in parts.items()
            }
        )
        return [float(self._require(key)[0]) for key in whole]

    def token_logprobs(self, requests: Sequence[Any]) -> list[list[float]]:
        """Log-probabilities of the tokens of each text, cut to a number of tokens, without the first."""
        asked = [(str(request.args[0]), int(request.args[1])) for request in requests]
        keys = [_key("token_logprobs", each) for each in asked]
        missing = {key: each for key, each in zip(keys, asked, strict=True) if self._recall(key) is None}
        asks = []
        for (key, (_, length)), ids in zip(
            missing.items(), self._encode([text for text, _ in missing.values()]), strict=True
        ):
            taken = tuple(ids[: min(length, self.positions)])
            asks.append(Ask(key, taken, len(taken) - 1, 0, each=True))
        self._run(asks)
        return [list(self._require(key)[0]) for key in keys]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the model writes after each context, up to a stopping text or a number of tokens."""
        keys, missing = [], {}
        drawn: dict[str, int] = {}
        for request in requests:
            context, settings = str(request.args[0]), request.args[1]
            key = _key("generate_until", (context, settings))
            if settings.get("do_sample"):  # repeats of a request are other draws
                drawn[key] = drawn.get(key, -1) + 1
                key = f"{key} {self._seed} {drawn[key]}"
            keys.append(key)
            if self._recall(key) is None:
                missing[key] = (context, settings)
        self._write(missing)
        return [str(self._require(key)[0]) for key in keys]

    def cut(self, kind: str, arguments: Sequence[Any]) -> int:
        """Tokens of a request that was answered which did not fit the model's positions, and were left out."""
        found = self._recall(_key(kind, arguments))
        return int(found[2]) if found is not None else 0

    def length(self, settings: Mapping[str, Any]) -> tuple[int, int]:
        """Tokens that are written at most, of as many as a request wants; never more than half of the positions."""
        return new_tokens(settings, self.positions)

    # Tokens.

    def _encode(self, texts: Sequence[str], special: bool | None = None) -> list[list[int]]:
        """Ids of texts; a text that begins with the start token's own name does not get another one."""
        tokenizer = self.model.tokenizer
        start = self._start()
        name = None if start is None else tokenizer.decode(start)
        named = [special is None and name is not None and text.startswith(name) for text in texts]
        made: list[list[int]] = [[]] * len(texts)
        for plain in (False, True):
            index = [i for i, n in enumerate(named) if n == plain]
            if index:
                given = {} if special is None and not plain else {"add_special_tokens": bool(special)}
                found = tokenizer([texts[i] for i in index], verbose=False, **given)["input_ids"]
                for i, ids in zip(index, found, strict=True):
                    made[i] = list(ids)
        most = max((max(ids, default=0) for ids in made), default=0)
        if most >= self.likelihoods.words:
            raise CheckpointError(
                f"{self.model.name}: the tokenizer gives id {most}, but the model has {self.likelihoods.words} tokens; "
                "copy in the tokenizer that belongs to the model"
            )
        return made

    def _start(self) -> int | None:
        tokenizer = self.model.tokenizer
        found: int | None = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return found

    def _first(self, ids: Sequence[int]) -> int | None:
        """What stands before a text that has no context; None where its own first token must do."""
        start = self._start()
        return None if start is None or (ids and ids[0] == start) else start

    def _pairs(self, missing: Mapping[str, tuple[str, str]]) -> list[Ask]:
        joined = []
        for context, continuation in missing.values():
            stripped = context.rstrip()
            joined.append((stripped, context[len(stripped) :] + continuation) if stripped else ("", continuation))
        contexts = dict.fromkeys(context for context, _ in joined if context)
        begun = dict(zip(contexts, map(len, self._encode(list(contexts))), strict=True)) if contexts else {}
        with_context = [c + rest for c, rest in joined if c]
        alone = [rest for c, rest in joined if not c]
        whole = iter(self._encode(with_context) if with_context else [])
        bare = iter(self._encode(alone, special=False) if alone else [])
        asks = []
        for key, (context, _) in zip(missing, joined, strict=True):
            if context:
                ids = next(whole)
                # Where the joint melts into one token, that token is what is asked for.
                last = max(1, len(ids) - begun[context])
            else:
                ids = next(bare)
                first = self._first(ids)
                ids, last = ([first, *ids], len(ids)) if first is not None else (ids, len(ids) - 1)
            over = max(0, len(ids) - (self.positions + 1))
            asks.append(Ask(key, tuple(ids[over:]), min(last, len(ids) - over - 1), over))
        return asks

    # Log-likelihoods.

    def _run(self, asks: Sequence[Ask]) -> None:
        """Answer all, longest first. Each micro-batch holds at most `tokens_per_batch` tokens, prefixes included."""
        answered: list[Ask] = []
        for ask in asks:
            if ask.last < 1:  # a text of one token: nothing predicts it
                self._answers[ask.key] = _value([[] if ask.each else 0.0, True, ask.cut])
            else:
                answered.append(ask)
        if not answered:
            return
        groups = self.likelihoods.grouped(answered)
        total = sum(len(row.ids) for _, rows in groups for row in rows)
        done = 0
        with redirect_stderr(self._errors), torch.inference_mode():
            for prefix, rows in groups:
                past = None
                for batch in batches(rows, len(prefix), self._tokens):
                    start = time.monotonic()
                    if prefix and past is None:
                        past = self.likelihoods.begin(prefix)
                    scored = self.likelihoods.score(batch, len(prefix), past)
                    self._answers.update({key: _value(plain) for key, plain in scored.items()})
                    self._spent(start, sum(len(row.asks) for row in batch))
                    done += sum(len(row.ids) for row in batch)
                    self._say(done / total)

    # Text.

    def _write(self, missing: Mapping[str, tuple[str, Mapping[str, Any]]]) -> None:
        groups: dict[str, list[str]] = {}
        for key, (_, settings) in missing.items():
            groups.setdefault(json.dumps(settings, sort_keys=True), []).append(key)
        done = 0
        for keys in groups.values():
            settings = missing[keys[0]][1]
            ids = dict(zip(keys, self._encode([missing[key][0] for key in keys]), strict=True))
            new, _ = self.length(settings)
            stops, rest = read_settings(settings, self.model.tokenizer.eos_token)
            room = self.positions - new
            keys = sorted(keys, key=lambda key: -len(ids[key]))
            while keys:
                rows = max(1, self._tokens // (min(len(ids[keys[0]]), room) + new))
                batch, keys = keys[:rows], keys[rows:]
                start = time.monotonic()
                with redirect_stderr(self._errors), torch.inference_mode():
                    texts = generate(self.model, [ids[key][-room:] for key in batch], new, stops, rest, self._seed)
                self._answers.update(
                    {
                        key: _value([text, True, max(0, len(ids[key]) - room)])
                        for key, text in zip(batch, texts, strict=True)
                    }
                )
                self._spent(start, len(batch))
                done += len(batch)
                self._say(done / len(missing))

    # What is remembered.

    def _recall(self, key: str) -> list[Any] | None:
        kept = self._answers.get(key)
        if kept is None:
            return None
        try:
            found = json.loads(kept)
        except ValueError:
            return None
        return found if isinstance(found, list) and len(found) == 3 else None

    def _require(self, key: str) -> list[Any]:
        found = self._recall(key)
        assert found is not None
        return found

    def _spent(self, start: float, requests: int) -> None:
        self.seconds += time.monotonic() - start
        self.asked += requests

    def _say(self, share: float) -> None:
        if self.tick is not None:
            self.tick(share)


def _key(kind: str, arguments: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps([_FORM, kind, *arguments], sort_keys=True).encode()).hexdigest()


def _value(plain: list[Any]) -> bytes:
    return json.dumps(plain).encode()
