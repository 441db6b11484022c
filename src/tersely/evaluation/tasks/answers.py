"""What a model answers to the harness's requests: its own tokenization rules, batched by tokens, remembered.

B = rows of a micro-batch, L = tokens of the longest, P = tokens of a prefix that rows share, K = places in a row whose
logits are wanted, V = vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from torch import Tensor

from tersely.errors import CheckpointError
from tersely.runtime import Loaded

_FORM = 1
"""Of the keys and values that are remembered."""
_NEW_TOKENS = 256
"""Where a task does not say how many: the harness's own number."""
_SHORTEST_PREFIX = 16
_WORTHWHILE = 256
"""Tokens that a shared prefix must save: about what one more forward pass costs."""


@dataclass(frozen=True)
class _Ask:
    """A request as tokens: the log-likelihood of `last` tokens at the end of `ids`; cut: tokens lost on the left."""

    key: str
    ids: tuple[int, ...]
    last: int
    cut: int
    each: bool = False
    """Whether every token's is wanted, not their sum."""


@dataclass(eq=False)
class _Row:
    """Input tokens (all but the last of `ids`) and what is asked of them."""

    ids: tuple[int, ...]
    asks: list[_Ask] = field(default_factory=list)

    @property
    def wanted(self) -> int:
        """First place whose logits are wanted."""
        return len(self.ids) - max(ask.last for ask in self.asks)


class Answers:
    """A language model as the harness asks for it: `loglikelihood`, `loglikelihood_rolling`, `generate_until`.

    Contexts and continuations are tokenized, joined and cut as the harness's own class for transformers models does,
    so that the numbers are the same; requests that differ only in their last token run once, and a beginning that many
    share (examples before every question) runs once where the model's cache allows it. Log-softmax is float32.

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
        self.positions = int(resolve_max_length(model.network.config, model.tokenizer))
        self.seconds = 0.0
        self.asked = 0
        """Requests that the model has run for, in so many seconds."""
        self.tick: Callable[[float], None] | None = None
        self._answers = answers
        self._tokens = tokens_per_batch
        self._seed = seed
        self._errors = errors
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.network.forward).parameters
        self._shares: bool | None = None
        self._words = model.network.get_input_embeddings().weight.shape[0]

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
        asks: list[_Ask] = []
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
                asks.append(_Ask(name, (*context, *continuation), len(continuation), 0))
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
            asks.append(_Ask(key, taken, len(taken) - 1, 0, each=True))
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
        from lm_eval.models.utils import normalize_gen_kwargs

        wanted = int(normalize_gen_kwargs(dict(settings), _NEW_TOKENS)["max_gen_toks"])
        return max(1, min(wanted, self.positions // 2)), wanted

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
        if most >= self._words:
            raise CheckpointError(
                f"{self.model.name}: the tokenizer gives id {most}, but the model has {self._words} tokens; "
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

    def _pairs(self, missing: Mapping[str, tuple[str, str]]) -> list[_Ask]:
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
            asks.append(_Ask(key, tuple(ids[over:]), min(last, len(ids) - over - 1), over))
        return asks

    # Log-likelihoods.

    def _run(self, asks: Sequence[_Ask]) -> None:
        """Answer all, longest first. Each micro-batch holds at most `tokens_per_batch` tokens, prefixes included."""
        rows: dict[tuple[int, ...], _Row] = {}
        for ask in asks:
            if ask.last < 1:  # a text of one token: nothing predicts it
                self._answers[ask.key] = _value([[] if ask.each else 0.0, True, ask.cut])
                continue
            rows.setdefault(ask.ids[:-1], _Row(ask.ids[:-1])).asks.append(ask)
        if not rows:
            return
        groups, loose = self._grouped(list(rows.values()))
        total = sum(len(row.ids) for row in rows.values())
        done = 0
        with redirect_stderr(self._errors), torch.inference_mode():
            for prefix, members in [((), loose), *groups]:
                past = None
                for batch in _batches(members, len(prefix), self._tokens):
                    start = time.monotonic()
                    if prefix and past is None:
                        past = self._network(self._tensor([prefix]), use_cache=True, keep=1).past_key_values
                    self._score(batch, len(prefix), past)
                    self._spent(start, sum(len(row.asks) for row in batch))
                    done += sum(len(row.ids) for row in batch)
                    self._say(done / total)

    def _score(self, batch: Sequence[_Row], prefix: int, past: Any) -> None:
        ids = [row.ids[prefix:] for row in batch]
        first = min(row.wanted for row in batch) - prefix
        last = max(map(len, ids))
        if past is None:
            logits_BKV = self._network(self._tensor(ids), keep=last - first).logits
        else:
            own = copy.deepcopy(past)
            own.batch_repeat_interleave(len(batch))
            logits_BKV = self._network(self._tensor(ids), past_key_values=own, use_cache=True, keep=last - first).logits
        base = last - logits_BKV.shape[1] + prefix
        made: dict[str, bytes] = {}
        for row, logits_KV in zip(batch, logits_BKV, strict=True):
            scores_KV = logits_KV[row.wanted - base : len(row.ids) - base].float().log_softmax(-1)
            best_K = scores_KV.argmax(-1)
            for ask in row.asks:
                targets_K = torch.tensor(ask.ids[-ask.last :], device=scores_KV.device)
                values_K = scores_KV[-ask.last :].gather(1, targets_K[:, None])[:, 0]
                if bool(values_K.isnan().any()):
                    raise CheckpointError(
                        f"{self.model.name}: gives NaN; the weights are damaged, or {self.model.network.dtype} is "
                        "too narrow for them"
                    )
                greedy = bool((best_K[-ask.last :] == targets_K).all())
                made[ask.key] = _value([values_K.tolist() if ask.each else float(values_K.sum()), greedy, ask.cut])
        self._answers.update(made)

    def _network(self, ids_BL: Tensor, *, keep: int, use_cache: bool = False, **more: Any) -> Any:
        """keep: logits of so many last places are enough."""
        given = {"logits_to_keep": keep} if self._keeps_logits else {}
        return self.model.network(input_ids=ids_BL, use_cache=use_cache, **given, **more)

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Padded on the right: in a causal model later tokens do not touch earlier ones."""
        padded = [torch.tensor(row, dtype=torch.int64) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(padded, batch_first=True).to(self.model.device)

    def _grouped(self, rows: list[_Row]) -> tuple[list[tuple[tuple[int, ...], list[_Row]]], list[_Row]]:
        """Rows with a beginning in common that is worth computing once, and the others."""
        rows.sort(key=lambda row: row.ids)
        groups: list[tuple[int, list[_Row]]] = []
        for row in rows:
            if groups:
                length, members = groups[-1]
                common = min(_common(members[-1].ids, row.ids), row.wanted, length)
                if common >= _SHORTEST_PREFIX and len(members) * common >= (len(members) - 1) * length:
                    members.append(row)
                    groups[-1] = (common, members)
                    continue
            groups.append((row.wanted, [row]))
        shared, loose = [], []
        for length, members in groups:
            if (len(members) - 1) * length >= _WORTHWHILE and self._sharing():
                shared.append((members[0].ids[:length], members))
            else:
                loose += members
        return shared, loose

    def _sharing(self) -> bool:
        """Whether the model goes on from a cache that was copied as it goes on from the tokens: tried, not believed."""
        if self._shares is None:
            draw = torch.Generator().manual_seed(0)
            ids_BL = torch.randint(0, self._words, (2, 12), generator=draw)
            ids_BL[1, :8] = ids_BL[0, :8]
            ids_BL = ids_BL.to(self.model.device)
            try:
                with torch.inference_mode():
                    whole_BKV = self.model.network(input_ids=ids_BL, use_cache=False).logits[:, 8:].float()
                    past = self._network(ids_BL[:1, :8], use_cache=True, keep=1).past_key_values
                    own = copy.deepcopy(past)
                    own.batch_repeat_interleave(2)
                    parts_BKV = self._network(ids_BL[:, 8:], past_key_values=own, use_cache=True, keep=4).logits.float()
                near = 1e-4 if self.model.network.dtype == torch.float32 else 0.1
                scale = float(whole_BKV.abs().max().clamp(min=1e-6))
                self._shares = bool(((whole_BKV - parts_BKV[:, -4:]).abs().max() <= near * scale).item())
            except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError, IndexError):
                self._shares = False  # a model with a state of another kind
        return self._shares

    # Text.

    def _write(self, missing: Mapping[str, tuple[str, Mapping[str, Any]]]) -> None:
        groups: dict[str, list[str]] = {}
        for key, (_, settings) in missing.items():
            groups.setdefault(json.dumps(settings, sort_keys=True), []).append(key)
        done = 0
        for keys in groups.values():
            settings = missing[keys[0]][1]
            ids = dict(zip(keys, self._encode([missing[key][0] for key in keys]), strict=True))
            new, stops, rest = self._settings(settings)
            room = self.positions - new
            keys = sorted(keys, key=lambda key: -len(ids[key]))
            while keys:
                rows = max(1, self._tokens // (min(len(ids[keys[0]]), room) + new))
                batch, keys = keys[:rows], keys[rows:]
                start = time.monotonic()
                with redirect_stderr(self._errors), torch.inference_mode():
                    texts = self._generate([ids[key][-room:] for key in batch], new, stops, rest)
                self._answers.update(
                    {
                        key: _value([text, True, max(0, len(ids[key]) - room)])
                        for key, text in zip(batch, texts, strict=True)
                    }
                )
                self._spent(start, len(batch))
                done += len(batch)
                self._say(done / len(missing))

    def _settings(self, settings: Mapping[str, Any]) -> tuple[int, list[str], dict[str, Any]]:
        """New tokens, stopping texts, and what is left for transformers."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        rest = dict(normalize_gen_kwargs(dict(settings), _NEW_TOKENS))
        end = self.model.tokenizer.eos_token
        stops = [stop for stop in handle_stop_sequences(rest.pop("until", None), eos=end) if stop]
        del rest["max_gen_toks"]
        if not rest.get("do_sample"):
            rest.pop("temperature", None)
            rest["do_sample"] = False
        return self.length(settings)[0], stops, rest

    def _generate(
        self, rows: Sequence[Sequence[int]], new: int, stops: Sequence[str], rest: Mapping[str, Any]
    ) -> list[str]:
        import transformers

        network, tokenizer, device = self.model.network, self.model.tokenizer, self.model.device
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
                torch.manual_seed(self._seed)
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


def _batches(rows: list[_Row], prefix: int, tokens: int) -> Iterator[list[_Row]]:
    """Longest first, so that each has at most `tokens` tokens, prefix and padding included; one row at least."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > tokens:
            yield batch
            batch = []
        batch.append(row)
    assert all(len(row.ids) > prefix for row in batch)
    if batch:
        yield batch


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _key(kind: str, arguments: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps([_FORM, kind, *arguments], sort_keys=True).encode()).hexdigest()


def _value(plain: list[Any]) -> bytes:
    return json.dumps(plain).encode()
