"""The bigram model of the MixCE study, trained on counts by any objectives of this package.

Models that see the same data train side by side, stacked along a leading dim N: they share batches
and dropout, and their weights start alike, so that nothing but the objective differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_emo.evaluation.oracle.languages import Sequences
from megatron_emo.evaluation.oracle.measures import dev_jensen_shannon
from megatron_emo.objectives import Objective

DTYPE = torch.float32
"""Of training; `Fit.log_q` is taken from the logits in float64."""

STOP_BY = ("objective", "dev-js")


@dataclass(frozen=True)
class TrainingConfig:
    """The recipe; the defaults are MixCE's but for `dropout_masks`, which has no meaning there."""

    batch_size: int = 1000
    """Sequences."""
    max_epochs: int = 50
    patience: int = 5
    """Epochs without a better dev loss before training ends."""
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    dropout: float = 0.1
    dropout_masks: int = 8
    """Drawn for each row of a batch; its tokens have the mean loss over them. MixCE draws one for
    each token, some hundreds a row."""
    stop_by: str = "objective"
    """What "better" means on dev data. objective: its own value, as in MixCE; for emo2 that is not
    what training descends, since its weights are detached. dev-js: the Jensen-Shannon divergence
    from the dev data's frequencies, the same for all."""

    def __post_init__(self) -> None:
        if self.stop_by not in STOP_BY:
            raise ValueError(
                f"--stop-by: expected one of {', '.join(STOP_BY)}, got {self.stop_by!r}"
            )
        for name in ("batch_size", "max_epochs", "patience", "dropout_masks"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: expected at least 1, got {getattr(self, name)}")


class BigramModels(torch.nn.Module):
    """N models: embedding, linear, ReLU, dropout, linear; the next token's logits given a row.

    MixCE has one more row and output, for padding.
    """

    def __init__(self, num: int, vocab_size: int, hidden_size: int, generator: torch.Generator):
        super().__init__()
        n, v, h = num, vocab_size, hidden_size
        bound = 1 / math.sqrt(h)

        def alike(*shape: int) -> torch.nn.Parameter:
            """Drawn as torch's own linear layers draw."""
            one = torch.empty(shape, dtype=DTYPE)
            return torch.nn.Parameter(
                one.uniform_(-bound, bound, generator=generator).repeat(n, 1, 1)
            )

        embedding = torch.empty(1, v, h, dtype=DTYPE).normal_(generator=generator)
        self.embedding = torch.nn.Parameter(embedding.repeat(n, 1, 1))
        self.hidden_weight, self.hidden_bias = alike(1, h, h), alike(1, 1, h)
        self.output_weight, self.output_bias = alike(1, v, h), alike(1, 1, v)

    def forward(self, scale: Tensor | None = None) -> Tensor:
        """Return logits [N, K, V, V]; `scale` [K, V, H] multiplies the hidden units, K = 1
        without."""
        hidden = torch.relu(
            torch.baddbmm(self.hidden_bias, self.embedding, self.hidden_weight.mT)
        ).unsqueeze(1)
        if scale is not None:
            hidden = hidden * scale
        n, k, v, h = hidden.shape
        flat = hidden.reshape(n, k * v, h)
        return torch.baddbmm(self.output_bias, flat, self.output_weight.mT).view(n, k, v, -1)


@dataclass(frozen=True)
class Fit:
    """What training left of one model: its best epoch on dev data."""

    log_q: np.ndarray
    """[V, V] float64, without dropout."""
    output_weight: Tensor
    """The output layer [V, H]: a cost embedding for another objective."""
    num_epochs: int
    best_epoch: int
    dev_loss: float
    """What `stop_by` says, of the best epoch; an objective's value is per dev sequence."""


def cost_matrix(embedding: Tensor) -> Tensor:
    """Return 1 - cosine of all pairs of rows [V, V], 0 on the diagonal and never below."""
    unit = torch.nn.functional.normalize(embedding.double(), dim=1)
    return (1.0 - unit @ unit.T).clamp(min=0.0).fill_diagonal_(0.0)


def identity_cost(vocab_size: int) -> Tensor:
    """Return 1 - I [V, V]: every wrong token costs the same, and d = 1 - q_t."""
    return 1.0 - torch.eye(vocab_size, dtype=torch.float64)


def loss_and_gradient(
    logits: Tensor, counts: Tensor, objectives: Sequence[Objective], cost: Tensor
) -> tuple[Tensor, Tensor]:
    """Return each model's sum over counted pairs and masks [N] and its gradient [N, K, V, V].

    All tokens that follow the same row share its logits, so each of V V pairs is one token with a
    count: the objective is asked once for all, and its weights (a, b) give the gradient

        sum_t n_t { q_j [a_t + b_t (c_jt - d_t)] - a_t [j = t] }

    Args:
        logits: [N, K, V, V], a row's next token along the last dim; gradient is not recorded.
        counts: [V, V], how often a token follows a row.
        objectives: N of them.
        cost: [V, V], symmetric with a diagonal of 0.
    """
    log_q = torch.log_softmax(logits.detach(), dim=-1)
    q, m = log_q.exp(), -log_q
    uses_cost = [objective.uses_cost for objective in objectives]
    d = q @ cost if any(uses_cost) else torch.zeros_like(q)
    terms = [f(*mqd) for f, *mqd in zip(objectives, m, q, d, strict=True)]
    loss = torch.stack([(counts * one.loss).sum() for one in terms])
    a = counts * torch.stack([one.mle_weight for one in terms])
    if not any(uses_cost):
        return loss, q * a.sum(-1, keepdim=True) - a
    b = counts * torch.stack([one.emo_weight for one in terms])
    return loss, q * ((a - b * d).sum(-1, keepdim=True) + b @ cost) - a


def fit(
    train: Sequences,
    dev: Sequences,
    objectives: Sequence[Objective],
    cost: Tensor,
    hidden_size: int,
    seed: int,
    config: TrainingConfig,
    report: Callable[[int], None] = lambda epoch: None,
) -> list[Fit]:
    """Train one model for each objective by Adam until dev data say enough for every one.

    Weights, order of batches and dropout follow from the seed alone. A model that has stopped is
    trained on beside the others, and what it learns then is not looked at.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng([seed, 3])
    models = BigramModels(len(objectives), train.vocab_size, hidden_size, generator)
    optimizer = torch.optim.Adam(
        models.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True
    )
    cost = cost.to(DTYPE)
    best: list[Fit | None] = [None] * len(objectives)
    for epoch in range(1, config.max_epochs + 1):
        running = [
            i for i, one in enumerate(best) if not one or epoch - one.best_epoch <= config.patience
        ]
        if not running:
            break
        for counts in train.shuffled_batches(config.batch_size, rng):
            scale = _draw_dropout(models, config, generator)
            logits = models(scale)
            _, gradient = loss_and_gradient(logits, _tensor(counts), objectives, cost)
            optimizer.zero_grad(set_to_none=True)
            logits.backward(gradient / (config.batch_size * logits.shape[1]))
            optimizer.step()
        _keep_best(best, running, epoch, models, dev, objectives, cost, config)
        report(epoch)
    return best


def _tensor(counts: np.ndarray) -> Tensor:
    return torch.from_numpy(counts).to(DTYPE)


def _draw_dropout(
    models: BigramModels, config: TrainingConfig, generator: torch.Generator
) -> Tensor | None:
    if config.dropout == 0:
        return None
    shape = (config.dropout_masks, *models.embedding.shape[1:])
    kept = torch.rand(shape, generator=generator) >= config.dropout
    return kept.to(DTYPE) / (1.0 - config.dropout)


@torch.no_grad()
def _keep_best(
    best: list[Fit | None],
    running: Sequence[int],
    epoch: int,
    models: BigramModels,
    dev: Sequences,
    objectives: Sequence[Objective],
    cost: Tensor,
    config: TrainingConfig,
) -> None:
    """Replace the fits of running models that are better on dev data now."""
    logits, dev_counts = models(), dev.counts()
    log_q = torch.log_softmax(logits[:, 0].double(), dim=-1).numpy()
    values, _ = loss_and_gradient(logits, _tensor(dev_counts), objectives, cost)
    for i in running:
        loss = float(values[i]) / dev.num_sequences
        if config.stop_by == "dev-js":
            loss = dev_jensen_shannon(log_q[i], dev_counts)
        if not math.isfinite(loss):
            raise FloatingPointError(f"{objectives[i].name}: dev loss {loss} at epoch {epoch}")
        if best[i] is None or loss < best[i].dev_loss:
            weight = models.output_weight[i].clone()
            best[i] = Fit(log_q[i].copy(), weight, epoch, epoch, loss)
        else:
            one = best[i]
            best[i] = Fit(one.log_q, one.output_weight, epoch, one.best_epoch, one.dev_loss)
