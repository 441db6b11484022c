"""Quantization-aware tuning: the straight-through estimator, taught by the full-precision parent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from tersely.methods.tune.protocol import Motion, TuneModel, check_rates


@final
@dataclass(frozen=True)
class Distill(TuneModel):
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

    rate: float = 0.002
    """Of latents, in steps of their grids."""
    value_rate: float = 0.002
    """Of scales and codebooks, relative to their sizes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates(rate=self.rate, value_rate=self.value_rate)

    @property
    def motion(self) -> Motion:
        return Motion(self.rate, self.value_rate)
