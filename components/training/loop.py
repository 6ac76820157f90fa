"""The training loop: one for adapters and for full fine-tuning, so that the comparison is fair."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from components.adapters.parameters import trainable_groups, training_mode
from components.adapters.regulariser import Regulariser
from components.adapters.step import reseed, steps_of
from components.config import TrainingConfig
from components.errors import TrainingError
from components.evaluation import metrics
from components.methods import Schedule
from components.training import crew, memory
from components.training.batching import AT_ONCE, Tokens, bounded_batches, parts, training_batches
from components.training.distributed import ALONE, Group
from components.training.kernels import shape_of
from components.training.passes import MODEST, Means, Pass, Passes, at_rest, passes
from components.training.precision import arithmetic
from components.training.progress import Meter, Progress
from components.training.unpadded import unpadded
from components.training.watch import Watch

# What a kill may cost at most, but for models whose checkpoints take long to write.
INTERVAL_S = 30.0
WRITING_SHARE = 0.05


@dataclass
class State:
    """Where a training is: enough, with its tensors, to go on from any step.

    Batches and whatever is drawn follow from the seed and these numbers: there is no random state to keep.
    epoch: those that ended.  batch: of the epoch under way, done.  loss: the sum of theirs.  step: of all epochs.
    """

    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    step: int = 0
    best_epoch: int = 0
    best_rank: list[float] = field(default_factory=list)  # less than any
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    cache_seconds: float = 0.0
    tokens: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Learner:
    """A model with all that changes while it learns, and the processes that learn together."""

    model: Any  # a transformers model, with or without adapters; torch types its attributes too widely
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    device: torch.device
    group: Group = ALONE

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def learner(
    model: nn.Module,
    schedule: Schedule,
    training: TrainingConfig,
    rows: int,
    device: torch.device,
    group: Group = ALONE,
) -> Learner:
    """AdamW with a learning rate for each group, warmed up and then falling linearly to zero."""
    rates = schedule.learning_rates
    groups: list[dict[str, Any]] = []
    for kind, members in trainable_groups(model).items():
        for decays in (True, False):
            # Biases and layer norms are not decayed, as in the code of BERT (Devlin et al. 2019).
            chosen = [p for _, p in members if (kind != "layer_norm" and p.ndim > 1) == decays]
            if chosen:
                decay = training.weight_decay if decays else 0.0
                groups.append({"params": chosen, "lr": getattr(rates, kind), "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, fused=True)
    total = schedule.epochs * math.ceil(rows / training.batch_size)
    warm = max(1, round(total * training.warmup))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (total - step) / max(1, total - warm)))
    )
    return Learner(model, optimizer, scheduler, device, group)


def fit(
    learner: Learner,
    train: Tokens,
    validation: Tokens,
    schedule: Schedule,
    training: TrainingConfig,
    seed: int,
    padding: int,
    state: State,
    report: Progress,
    keep: Callable[[State, bool], None],
    means: Means = MODEST,
) -> State:
    """Train until the epochs are used up or validation stops improving.

    state: where to begin; a new State() for a new training.  keep: called at the end of each epoch, and within one now
    and then, with the state and whether an epoch ended that is the best so far, to save what is needed.

    Raises TrainingError when the loss is no longer a number.
    """
    model, device, group = learner.model, learner.device, learner.group
    weights = _class_weights(train.labels, training.class_weights, model.config.num_labels, device)
    precision = arithmetic(device, training.precision, shape_of(model.config))
    per_epoch = math.ceil(len(train.ids) / training.batch_size)
    meter, pause = Meter(report, per_epoch * schedule.epochs, schedule.epochs, state.step), Pause()
    lengths, watch = train.lengths, Watch(state)
    memory.hold()  # only now, or what was measured above would be held, too
    training_mode(model)
    learn, steps = Learning(learner, weights, training.clip_norm), steps_of(model)

    with (
        watch,
        passes(model, train, validation, padding, device, precision, training.batch_size, means) as through,
    ):
        state.cache_seconds += watch.lap()  # they count as the first epoch's
        while state.epoch < schedule.epochs and state.epoch - state.best_epoch < schedule.patience:
            memory.let_go()
            batches = training_batches(lengths, training.batch_size, seed, state.epoch + 1)
            training_mode(model)
            with precision.frozen(model, but=through.replaced):
                for rows in batches[state.batch :]:
                    watch.go()
                    _seed(device, group.seed(seed, state.step))
                    reseed(steps, seed, state.step)  # layers are dropped by all processes alike
                    loss = learn(train, rows, through)
                    if not math.isfinite(loss):
                        raise _diverged(f"{loss}", state.step + 1)
                    tokens = int(lengths[rows].sum())
                    state.batch, state.step, state.tokens = state.batch + 1, state.step + 1, state.tokens + tokens
                    state.loss += loss
                    watch.lap()
                    meter.step(state.step, state.epoch + 1, loss, tokens)
                    if pause.is_over and state.batch < len(batches):
                        with pause:
                            keep(state, False)
            memory.let_go()
            through.ready_to_check()
            probabilities = predict(model, validation, padding, device, group, through)
            if not np.isfinite(probabilities).all():
                raise _diverged("probabilities that are no numbers", state.step)
            measured = group.from_main(
                partial(metrics.measure, validation.labels, probabilities)
            )  # one decides for all
            rank = metrics.rank(measured, training.metric)
            epoch_metrics = {
                "train_loss": state.loss / len(batches), **{f"validation_{k}": v for k, v in measured.items()}
            }  # fmt: skip
            state.epoch, state.batch, state.loss = state.epoch + 1, 0, 0.0
            best = rank > state.best_rank
            if best:
                state.best_rank, state.best_epoch = rank, state.epoch
            state.history.append({"epoch": state.epoch, "step": state.step, **epoch_metrics, **watch.of_epoch()})
            with pause:
                keep(state, best)
            meter.epoch(state.step, state.epoch, epoch_metrics)
    memory.let_go()
    return state


def _seed(device: torch.device, seed: int) -> None:
    if device.type == "cpu":
        # torch.manual_seed would keep the call, with a traceback, for a GPU that may yet be used: half a millisecond.
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _diverged(found: str, step: int) -> TrainingError:
    return TrainingError("a finite loss", f"{found} at step {step}", "lower the learning rates, or set precision: fp32")


class Learning:
    """Steps of one learner. Its modules are walked once: that takes as long as a layer."""

    def __init__(self, learner: Learner, weights: torch.Tensor | None, clip_norm: float) -> None:
        """weights: (classes,), of the loss."""
        self._learner, self._weights, self._clip_norm = learner, weights, clip_norm
        self._trained, self._beside = list(learner.trained.values()), Regulariser(learner.model)

    def __call__(self, train: Tokens, rows: npt.NDArray[np.int64], through: Passes) -> float:
        """One step on one batch, of which each process computes its share. Returns the loss of the whole batch."""
        learner, group, weights = self._learner, self._learner.group, self._weights
        mine, labels = group.share(rows, train.labels)
        whole = len(rows) if weights is None else weights[train.labels[rows]].sum()

        def loss_of(part: npt.NDArray[np.int64]) -> torch.Tensor:
            logits = through.learn.logits(mine[part])
            target = torch.from_numpy(labels[part]).to(learner.device)
            loss = nn.functional.cross_entropy(logits.float(), target, weight=weights, reduction="sum") / whole
            beside = self._beside()
            return loss if beside is None else loss + beside * len(part) / len(mine) / group.size

        lengths = np.array([len(train.ids[row]) for row in mine])
        losses = [partial(loss_of, part) for part in parts(lengths, through.at_once, through.crew.hands)]
        combined = float(group.combine(through.crew.learn(losses, self._trained), self._trained))
        nn.utils.clip_grad_norm_(self._trained, self._clip_norm)
        learner.optimizer.step()
        learner.scheduler.step()
        learner.optimizer.zero_grad(set_to_none=True)
        return combined


class Pause:
    """Between two checkpoints: as long as INTERVAL_S, or longer where writing one would else take more than its share.

    Used as a context around the writing of one.
    """

    def __init__(self) -> None:
        self._begin = self._end = time.monotonic()
        self._end += INTERVAL_S

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._end

    def __enter__(self) -> None:
        self._begin = time.monotonic()

    def __exit__(self, *_: object) -> None:
        now = time.monotonic()
        self._end = now + max(INTERVAL_S, (now - self._begin) * (1 / WRITING_SHARE - 1))


def predict(
    model: Any, tokens: Tokens, padding: int, device: torch.device, group: Group = ALONE, through: Passes | None = None
) -> npt.NDArray[np.float32]:
    """Class probabilities, (rows, classes), in the order of `tokens`; processes and threads share the batches.

    Always in float32 and without dropout, so that they do not depend on which rows share a batch. through: where the
    tokens are those that it checks.
    """
    model.eval()
    result = np.zeros((len(tokens.ids), model.config.num_labels), dtype=np.float32)
    check = through.check if through else None

    def score(way: Pass, rows: npt.NDArray[np.int64]) -> None:
        with torch.inference_mode():
            result[rows] = torch.softmax(way.logits(rows).float(), dim=-1).cpu().numpy()

    lengths = tokens.lengths
    batches = group.turns(unpadded(model, bounded_batches(lengths, AT_ONCE[device.type]), lengths))
    with nullcontext(check) if check else at_rest(model, tokens, padding, device, len(batches)) as way:
        (through.crew if through else crew.ALONE).each([partial(score, way, rows) for rows in batches])
    return group.total(result)


def _class_weights(labels: npt.NDArray[np.int64], kind: str, classes: int, device: torch.device) -> torch.Tensor | None:
    """`balanced`: rows / (classes · rows of the class), as scikit-learn has it."""
    if kind == "none":
        return None
    counts = np.bincount(labels, minlength=classes)
    return torch.tensor(len(labels) / (classes * np.maximum(counts, 1)), dtype=torch.float32, device=device)
