"""A residual network for rows of numbers, as a transformers model. It imports nothing of Heliostat: a bundle carries
this file, and transformers opens it anywhere with `trust_remote_code`.

Blocks: the ResNet of Gorishniy et al. 2021 (arXiv:2106.11959, section 3.2), with layer instead of batch normalisation,
so that a row's answer never depends on the others of its batch. Numbers enter as sines and cosines of learned
frequencies (Gorishniy et al. 2022, arXiv:2203.05556, section 3.3), outliers bent to within ±3 before (Holzmüller et al.
2024, arXiv:2407.04491, section 3).

Shapes: B rows, F features, M features that may be missing, K frequencies, E numbers that stand for a feature, H and I
the hidden and the intermediate size, C classes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

BOUND = 3.0
"""Of features in standard deviations."""


@strict
class TabularConfig(PreTrainedConfig):
    model_type = "tabular_resnet"
    _auto_class = "AutoConfig"

    num_features: int = 1
    num_missing: int = 0
    """Features of which the model is told whether they are missing."""
    hidden_size: int = 128
    intermediate_size: int = 0
    """0: twice the hidden size."""
    num_hidden_layers: int = 2
    num_frequencies: int = 16
    frequency_scale: float = 0.2
    """Standard deviation of the frequencies that training begins with."""
    embedding_size: int = 8
    dropout: float = 0.1
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        self.intermediate_size = self.intermediate_size or 2 * self.hidden_size
        super().__post_init__(**kwargs)


class NumberEmbeddings(nn.Module):
    """(B, F) → (B, F, E)."""

    def __init__(self, config: TabularConfig) -> None:
        super().__init__()
        self.scale = config.frequency_scale
        self.frequency_FK = nn.Parameter(torch.empty(config.num_features, config.num_frequencies))
        self.linear = nn.Linear(1 + 2 * config.num_frequencies, config.embedding_size)

    def forward(self, x_BF: Tensor) -> Tensor:
        x_BF = x_BF / (1 + (x_BF / BOUND) ** 2).sqrt()
        angle_BFK = 2 * math.pi * x_BF[..., None] * self.frequency_FK
        return self.linear(torch.cat([x_BF[..., None], angle_BFK.sin(), angle_BFK.cos()], -1)).relu()


class Block(nn.Module):
    def __init__(self, config: TabularConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_BH: Tensor) -> Tensor:
        inner_BI = self.dropout(self.up(self.norm(hidden_BH)).relu())
        return hidden_BH + self.dropout(self.down(inner_BI))


class Encoder(nn.Module):
    def __init__(self, config: TabularConfig) -> None:
        super().__init__()
        self.embeddings = NumberEmbeddings(config)
        width = config.num_features * config.embedding_size + config.num_missing
        self.project = nn.Linear(width, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, features_BF: Tensor, missing_BM: Tensor) -> Tensor:
        hidden_BH = self.project(torch.cat([self.embeddings(features_BF).flatten(1), missing_BM], -1))
        for layer in self.layers:
            hidden_BH = layer(hidden_BH)
        return self.norm(hidden_BH).relu()


class TabularForClassification(PreTrainedModel):
    config_class = TabularConfig
    base_model_prefix = "encoder"
    main_input_name = "features"
    _auto_class = "AutoModel"

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, NumberEmbeddings):
            init.normal_(module.frequency_FK, std=module.scale)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def forward(self, features: Tensor, missing: Tensor, **_: Any) -> SequenceClassifierOutput:
        """`features`: (B, F), standardised, 0 where missing. `missing`: (B, M), 1 where missing. Logits: (B, C)."""
        return SequenceClassifierOutput(logits=self.classifier(self.encoder(features, missing)))
