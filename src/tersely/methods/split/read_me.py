"""Dense blocks split into experts by domain (Read-ME: Cai et al., NeurIPS 2024, arXiv 2410.19123).

An expert has the `keep` neurons of the block that are most active, in mean |activation|, on one domain; those that all
experts have (the residual) lie in each. Domains are found by k-means: of whole texts by the activity of all blocks'
neurons (which stands for the authors' seven corpora), or in each block of tokens, by the direction of its inputs. A
router is a linear layer for each block, trained with everything else frozen, towards

    p = (1 - soft) ((1 - smoothing) onehot(argmax q) + smoothing / E) + soft q,    q = softmax(sharpness score)
    score of an expert = mean over shares s of (hits among the token's s N largest activations) / (s N)

where hits are neurons that the expert has and not all have. (The authors train one small causal transformer that gates
all blocks at once, and the whole model in turns with it; a stock mixture has a router in each block instead.)

Shapes: T tokens, I inputs of the MLP, N neurons, O outputs, E experts, K neurons of an expert, R the others, S texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tersely.errors import UsageError
from tersely.methods.encode.aqlm import cluster, nearest_entries
from tersely.methods.split.protocol import Block, Experts
from tersely.methods.tune.protocol import check_counts, check_share

_LEVELS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the neurons that count as a token's largest."""
_STARTS = 4
"""Orders of the texts from which domains are looked for."""
_POINTS = 16384
"""Tokens, at most, of which domains are found."""
_CHUNK = 4096
"""Tokens whose activations are held at once."""


@dataclass(frozen=True)
class ReadMe:
    """Experts that are the neurons of a dense block for one domain of texts each, and a router between them."""

    name: ClassVar[str] = "read_me"

    experts: int = 4
    keep: float = 0.5
    """Share of a block's neurons that each expert has."""
    domains: Literal["tokens", "texts"] = "tokens"
    """What an expert is for: alike tokens, in each block others; or alike texts."""
    top_k: int = 1
    """Experts that a token is given to."""
    multiple: int = 32
    """The neurons of an expert are rounded down to a multiple of it, for kernels and groups of a later quantization."""
    refit: bool = True
    """The last weight of each expert is fitted, by least squares on its tokens, to what the whole block gives."""
    ridge: float = 0.01
    """How strongly it is held where it was, in mean squares of the activations."""
    sharpness: float = 10.0
    """Of the shares in which a router should prefer experts."""
    smoothing: float = 0.5
    """Share of a router's first target that is spread over all experts."""
    soft: float = 0.25
    """Weight of a router's second target, the soft one."""
    iterations: int = 100
    """Of a router's training (L-BFGS), at most."""

    def __post_init__(self) -> None:
        check_counts(2, experts=self.experts)
        check_counts(1, top_k=self.top_k, multiple=self.multiple, iterations=self.iterations)
        for name in ("keep", "smoothing", "soft"):
            check_share(name, getattr(self, name))
        if self.domains not in ("tokens", "texts"):
            raise UsageError(f"domains={self.domains!r}: expected 'tokens' or 'texts'")
        if self.top_k > self.experts:
            raise UsageError(f"top_k={self.top_k}: there are {self.experts} experts; use at most as many")
        if self.ridge <= 0 or self.sharpness <= 0:
            raise UsageError(f"ridge={self.ridge}, sharpness={self.sharpness}: both are expected above 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"inputs"})

    @property
    def by_text(self) -> bool:
        return self.domains == "texts"

    def width(self, neurons: int) -> int:
        kept = round(self.keep * neurons) // self.multiple * self.multiple
        if kept < 1:
            raise UsageError(
                f"keep={self.keep}, multiple={self.multiple}: no neuron is left of a block's {neurons}; "
                f"keep at least {self.multiple / neurons:.2g}"
            )
        return kept

    def group(self, activity: Sequence[Tensor], seed: int) -> Tensor:
        texts = activity[0].shape[0]
        if texts < self.experts:
            raise UsageError(f"experts={self.experts} need as many texts at least, and the calibration has {texts}")
        profile_SP = torch.cat([own_SN / own_SN.norm(dim=1, keepdim=True) for own_SN in activity], 1)
        chance = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(texts, generator=chance).to(profile_SP.device) for _ in range(_STARTS)]
        found = [(order_S, *cluster(profile_SP[order_S], self.experts)) for order_S in orders]
        spread = [float((profile_SP[order_S] - means_EP[own_S]).square().sum()) for order_S, means_EP, own_S in found]
        order_S, _, own_S = found[spread.index(min(spread))]
        if int(torch.bincount(own_S).count_nonzero()) < self.experts:
            raise UsageError(
                f"experts={self.experts}: the calibration's texts are too much alike for so many domains; use fewer "
                "experts or more varied texts"
            )
        return torch.empty_like(own_S).scatter_(0, order_S, own_S)

    def __call__(self, block: Block) -> Experts:
        activity_EN = self._activity(block) if block.activity_EN is None else block.activity_EN
        kept_EK = self._kept(activity_EN)
        has_EN = torch.zeros_like(activity_EN).scatter_(1, kept_EK, 1)
        specific_EN = has_EN * (1 - has_EN.amin(0))
        chunks = torch.split(block.x_TI, _CHUNK)
        target_TE = torch.cat([self._target(block.neurons(x), specific_EN) for x in chunks])
        router_EI = train_router(block.x_TI, target_TE, self.iterations).to(block.dtype).float()
        chosen_Tk = torch.cat([(x.float() @ router_EI.t()).topk(self.top_k).indices for x in chunks])
        share_E = torch.bincount(chosen_Tk.flatten(), minlength=self.experts) / len(chosen_Tk)
        down = [
            self._down(block, kept_K, block.x_TI[(chosen_Tk == expert).any(1)]) for expert, kept_K in enumerate(kept_EK)
        ]
        return Experts(kept_EK, router_EI, torch.stack(down), share_E)

    def _activity(self, block: Block) -> Tensor:
        """Mean |activation| of each neuron, (E, N), over the tokens whose inputs point alike."""
        points_PI = block.x_TI[:: -(-len(block.x_TI) // _POINTS)].float()
        means_EI, _ = cluster(points_PI / _length(points_PI), self.experts)
        total_EN = torch.zeros((self.experts, block.down_ON.shape[1]), device=block.x_TI.device)
        count_E = torch.zeros(self.experts, device=block.x_TI.device)
        for x in torch.split(block.x_TI, _CHUNK):
            own_ET = one_hot(nearest_entries(x.float() / _length(x.float()), means_EI), self.experts).t().float()
            total_EN += own_ET @ block.neurons(x).abs()
            count_E += own_ET.sum(1)
        # A domain without tokens is all of them.
        total_EN = torch.where(count_E[:, None] > 0, total_EN, total_EN.sum(0))
        return total_EN / torch.where(count_E > 0, count_E, count_E.sum())[:, None]

    def _kept(self, activity_EN: Tensor) -> Tensor:
        """Exactly K neurons for each domain; of equals, the first."""
        order_EN = activity_EN.argsort(dim=1, descending=True, stable=True)
        return order_EN[:, : self.width(activity_EN.shape[1])].sort(dim=1).values

    def _target(self, a_TN: Tensor, specific_EN: Tensor) -> Tensor:
        """What a router should give each token: (T, E), rows that sum to 1."""
        neurons = a_TN.shape[1]
        counts = [max(1, round(share * neurons)) for share in _LEVELS]
        worth_N = torch.zeros(neurons, device=a_TN.device)
        for count in counts:
            worth_N[:count] += 1 / (count * len(counts))
        largest_TN = a_TN.abs().argsort(dim=1, descending=True, stable=True)
        worth_TN = torch.zeros_like(a_TN).scatter_(1, largest_TN, worth_N.expand_as(a_TN))
        soft_TE = (self.sharpness * (worth_TN @ specific_EN.t())).softmax(1)
        best_TE = torch.zeros_like(soft_TE).scatter_(1, soft_TE.argmax(1, keepdim=True), 1)
        hard_TE = (1 - self.smoothing) * best_TE + self.smoothing / self.experts
        return (1 - self.soft) * hard_TE + self.soft * soft_TE

    def _down(self, block: Block, kept_K: Tensor, x_TI: Tensor) -> Tensor:
        """The last weight of an expert whose tokens are x: W_K + W_R G_RK (G_KK + ridge)^-1, G = sum of a a^T."""
        others = torch.ones(block.down_ON.shape[1], dtype=torch.bool, device=kept_K.device)
        others[kept_K] = False
        down_OK = block.down_ON[:, kept_K]
        if not self.refit or not bool(others.any()) or not len(x_TI):
            return down_OK
        gram_KK = down_OK.new_zeros(len(kept_K), len(kept_K))
        cross_OK = torch.zeros_like(down_OK)
        for x in torch.split(x_TI, _CHUNK):
            a_TN = block.neurons(x)
            a_TK = a_TN[:, kept_K]
            gram_KK.addmm_(a_TK.t(), a_TK)
            cross_OK += (block.down_ON[:, others] @ a_TN[:, others].t()) @ a_TK
        mean = float(gram_KK.diagonal().mean())
        if mean == 0:
            return down_OK
        gram_KK.diagonal().add_(self.ridge * mean)
        return down_OK + torch.cholesky_solve(cross_OK.t(), torch.linalg.cholesky(gram_KK)).t()


def _length(x_TI: Tensor) -> Tensor:
    length_T1: Tensor = x_TI.norm(dim=1, keepdim=True)
    return length_T1.clamp_min(1e-12)


def train_router(x_TI: Tensor, target_TE: Tensor, iterations: int) -> Tensor:
    """The weight W, (E, I), of least cross-entropy of softmax(x W^T) against the target, float32."""
    tokens, experts = target_TE.shape
    squares_I = torch.stack([x.float().square().sum(0) for x in torch.split(x_TI, _CHUNK)]).sum(0)
    scale_I = (squares_I / tokens).sqrt().clamp_min(1e-12)
    weight_EI = torch.zeros((experts, x_TI.shape[1]), device=x_TI.device)
    descent = torch.optim.LBFGS([weight_EI], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        total = _DECAY * weight_EI.square().sum()
        weight_EI.grad = 2 * _DECAY * weight_EI
        for x, target in zip(torch.split(x_TI, _CHUNK), torch.split(target_TE, _CHUNK), strict=True):
            given_TE = (x.float() @ (weight_EI / scale_I).t()).log_softmax(1)
            total = total - (target * given_TE).sum() / tokens
            weight_EI.grad += (given_TE.exp() - target).t() @ x.float() / (scale_I * tokens)
        return total

    descent.step(loss)  # type: ignore[no-untyped-call]
    return weight_EI / scale_I


_DECAY = 1e-5
"""Of a router's weight, that inputs are not all needed for a finite one."""
