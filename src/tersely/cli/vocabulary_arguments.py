"""What `tersely vocab` takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from tersely.cli import vocabulary

_MODEL = "a checkpoint folder, or a name on the Hugging Face hub"
_OUT = "the folder to write; it appears only when it is whole"
_TEXTS = "texts: .txt (documents may be separated by <|endoftext|> lines), .jsonl, .json, each also .gz"


def add_actions(made: argparse.ArgumentParser) -> None:
    """The actions of the verb."""
    actions = made.add_subparsers(metavar="ACTION", title="actions", required=True)

    def action(
        name: str, run: Callable[[argparse.Namespace], None], text: str, **arguments: str
    ) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=text.split(". ")[0].rstrip("."), description=text)
        for argument, explained in arguments.items():
            made.add_argument(argument, help=explained)
        made.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON")
        made.set_defaults(verb=run)
        return made

    made = action(
        "trim",
        vocabulary.trim,
        "Keep the tokens that some texts or languages need. What the model computes for these stays what it was; the "
        "tokenizer, the configs and every file that holds an id follow. An ordinary checkpoint comes out.",
        model=_MODEL,
        out=_OUT,
    )
    made.add_argument("--corpus", nargs="+", default=[], metavar="FILE", help=_TEXTS)
    made.add_argument(
        "--languages",
        default="",
        metavar="en,de",
        help="ISO 639-1 codes: without a corpus, tokens in their letters stay; with one, it is checked to be in them",
    )
    made.add_argument("--rows", type=int, metavar="N", help="so many tokens stay, with all that they are made of")
    made.add_argument("--size", metavar="S", help="as many as make a model of this size: 500MB, 1.2GB")
    made.add_argument("--coverage", type=float, metavar="P", help="as few as hold this share of the corpus: 0.999")
    made.add_argument(
        "--minimum-count", type=int, metavar="N", help="those that the corpus has so often (default: once)"
    )
    made.add_argument("--multiple", type=int, default=8, metavar="N", help="of which rows are a multiple (default: 8)")
    made.add_argument(
        "--keep", nargs="+", default=[], metavar="TOKEN", help="tokens that stay, as the tokenizer writes"
    )
    made.add_argument(
        "--drop", nargs="+", default=[], metavar="TOKEN", help="added tokens that go, with * for any characters"
    )
    _processes(made)
    made.add_argument("--resume", action="store_true", help="continue a job that was stopped or killed")
    made.add_argument("--dry-run", action="store_true", help="count, choose and check everything, write nothing")

    made = action(
        "extend",
        vocabulary.extend,
        "Give a model more tokens, learnt from texts that its tokenizer cuts into too many. The ids that it has stay; "
        "train it afterwards, on these texts.",
        model=_MODEL,
        out=_OUT,
    )
    made.add_argument("--corpus", nargs="+", required=True, metavar="FILE", help=_TEXTS)
    made.add_argument("--tokens", type=int, required=True, metavar="N", help="at most so many more")
    made.add_argument("--least", type=int, default=2, metavar="N", help="times that each stands there (default: 2)")
    _initialiser(made)

    made = action(
        "transplant",
        vocabulary.transplant,
        "Give a model another tokenizer. Tokens that both have keep their rows; train it afterwards.",
        model=_MODEL,
        out=_OUT,
    )
    made.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR",
        help="the folder of the new one; a model's, where the method looks at a donor (omp)",
    )
    made.add_argument("--corpus", nargs="+", default=[], metavar="FILE", help=f"for methods that learn; {_TEXTS}")
    _initialiser(made)

    made = action(
        "inject",
        vocabulary.inject,
        "Put back what a chat model knows of conversations into a copy of it that was extended and trained on plain "
        "text (ElChat). Blocks come from the chat model, but for the first two and the last two, which are mixed.",
        chat="the chat model",
        adapted="the copy with new tokens",
        out=_OUT,
    )
    _set(made, "outer, inner (the chat model's share), slerp")

    made = action(
        "train",
        vocabulary.train,
        "Train a tokenizer on texts and write it as tokenizer.json.",
        out="the folder to write",
    )
    made.add_argument("--corpus", nargs="+", required=True, metavar="FILE", help=_TEXTS)
    made.add_argument("--size", type=int, required=True, metavar="N", help="tokens, special ones included")
    made.add_argument("--method", default="bpe", metavar="M", help="bpe (default), unigram, superbpe, lib or compound")
    made.add_argument(
        "--special",
        nargs="+",
        default=["<|endoftext|>"],
        metavar="TOKEN",
        help="special tokens, which come first (default: <|endoftext|>)",
    )
    made.add_argument(
        "--like",
        metavar="P",
        help="how texts fall into words: the name of a pattern, or a tokenizer.json",
    )
    _set(made, "the method's settings")

    made = action(
        "measure",
        vocabulary.measure,
        "Show how tokenizers cut texts: tokens per word, bytes per token, unknown and byte tokens, and which rows each "
        "group of texts uses.",
        model="a checkpoint folder, a hub name, or a tokenizer.json",
    )
    made.add_argument("others", nargs="*", metavar="OTHERS", help="more of them, on the same texts")
    made.add_argument(
        "--corpus", nargs="+", required=True, metavar="NAME=FILE,FILE", help=f"groups of {_TEXTS.partition(':')[0]}"
    )
    _processes(made)

    made = action(
        "suggest",
        vocabulary.suggest,
        "Say how large a vocabulary should be. Three scaling laws, and, with a corpus, how many rows hold which share "
        "of it.",
        model=_MODEL,
    )
    made.add_argument("--corpus", nargs="+", default=[], metavar="FILE", help=_TEXTS)
    made.add_argument("--flops", type=float, metavar="F", help="of the training (default: what is best for its size)")
    _processes(made)


def _processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, metavar="N", help="that count (default: one a core)")


def _initialiser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        default="mean",
        metavar="M",
        help="that gives rows to new tokens: mean (default), merge, align, focus, ofa, token_adapt, cw2v, omp, "
        "multivariate or random_normal",
    )
    parser.add_argument("--vectors", metavar="FILE", help="word vectors (.vec, .safetensors) of your own")
    parser.add_argument("--seed", type=int, metavar="N", help="of all choices made by chance")
    _set(parser, "the method's settings")


def _set(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"{what}; may be repeated")
