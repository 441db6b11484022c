"""Quantization-aware tuning: the straight-through estimator, taught by the full-precision parent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tersely.methods.tune.protocol import Motion, check_counts, check_rates


@dataclass(frozen=True)
class Distill:
    """Tunes codes and scales of all weights at once, so that the model predicts what its parent does.

        loss = mean over tokens of KL(parent || model)
        w_hat = scale clip(round(latent)), of which the gradient by the latent is taken to be the scale

    The text is the calibration text and what the parent writes itself (`own_texts`), which keeps the model from
    learning a small text by heart. Embeddings and norms stay the parent's unless `norm_rate` is above zero. The whole
    model and its gradients are in memory, in float32. Ternary weights: BitNet b1.58 (arXiv 2402.17764), BitCPM4
    (arXiv 2506.07900); parents as teachers of quantized models: LLM-QAT (arXiv 2305.17888); learned scales: LSQ
    (arXiv 1902.08153).
    """

    name: ClassVar[str] = "distill"

    tokens: int = 1_000_000
    """That pass through the model, over all steps."""
    batch: int = 2048
    """Tokens of a step."""
    own_texts: int = 1024
    """Sequences that the parent writes, at temperature 1."""
    rate: float = 0.002
    """Of latents, in steps of their grids; fewer bits bear more: 0.003 for 3 of them, 0.008 for 2."""
    value_rate: float = 0.002
    """Of scales and codebooks, relative to their sizes."""
    norm_rate: float = 0.0
    """Of the norms' weights and biases; 0: they stay as they are."""
    held_out: int = 16
    """Calibration sequences that only choose the best."""
    checks: int = 8
    """Times that the best is looked for."""
    autocast: bool = False
    """Products in bfloat16: faster on GPUs, and on CPUs that multiply it; what moves stays in float32."""

    def __post_init__(self) -> None:
        check_counts(0, own_texts=self.own_texts)
        check_counts(1, tokens=self.tokens, batch=self.batch, held_out=self.held_out, checks=self.checks)
        check_rates(rate=self.rate, value_rate=self.value_rate, norm_rate=self.norm_rate)

    @property
    def motion(self) -> Motion:
        return Motion(self.rate, self.value_rate)
