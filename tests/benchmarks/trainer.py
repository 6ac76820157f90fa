"""One training with the libraries as their users run them: transformers' Trainer, AdapterHub's AdapterTrainer.

    PYTHON tests/benchmarks/trainer.py REQUEST.json RESULT.json

Imports nothing of ours, so that the Python of a virtual environment with `adapters` runs it too. The request says what
to train on which token ids; the result has wall and CPU seconds of each epoch and what was predicted after it. Only
training is on the clock: not imports, loading, or predicting.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

BUCKET = 50  # batches; as components/training/batching.py, which cannot be imported here
SCORING_BATCH = 64


class Groups:
    """Batches of near-equal length in shuffled order, drawn anew each epoch: the tuned peer's, the same as ours."""

    def __init__(self, lengths: np.ndarray, size: int, seed: int) -> None:
        self.lengths, self.size, self.seed, self.epoch = lengths, size, seed, 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.size)

    def __iter__(self) -> Any:
        self.epoch += 1
        rng = np.random.default_rng([self.seed, self.epoch])
        order, batches = rng.permutation(len(self.lengths)), []
        for start in range(0, len(order), self.size * BUCKET):
            bucket = order[start : start + self.size * BUCKET]
            bucket = bucket[np.argsort(self.lengths[bucket], kind="stable")]
            batches += [bucket[at : at + self.size].tolist() for at in range(0, len(bucket), self.size)]
        return iter([batches[index] for index in rng.permutation(len(batches))])


class Clock(TrainerCallback):
    """Seconds of each epoch; predicts the test rows between epochs, off the clock."""

    def __init__(self, test: list[dict[str, Any]], collate: Any) -> None:
        self.test, self.collate = test, collate
        self.epochs: list[dict[str, Any]] = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin = time.perf_counter(), time.process_time()

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        seconds, cpu = time.perf_counter() - self.begin[0], time.process_time() - self.begin[1]
        predicted = np.zeros(len(self.test), dtype=int)
        order = sorted(range(len(self.test)), key=lambda row: -len(self.test[row]["input_ids"]))
        model.eval()
        with torch.inference_mode():
            for start in range(0, len(order), SCORING_BATCH):
                rows = order[start : start + SCORING_BATCH]
                batch = self.collate([self.test[row] for row in rows])
                batch.pop("labels")
                predicted[rows] = model(**batch).logits.argmax(-1).numpy()
        model.train()
        self.epochs.append({"seconds": seconds, "cpu_seconds": cpu, "predicted": predicted.tolist()})


def main(request_path: str, result_path: str) -> None:
    request = json.loads(Path(request_path).read_text())
    torch.set_num_threads(request["threads"])
    rows = np.load(request["tokens"])
    train, test = _rows(rows, "train"), _rows(rows, "test")
    torch.manual_seed(request["seed"])
    model = _model(request)
    collate = _collator(request["padding"])
    clock = Clock(test, collate)
    arguments = TrainingArguments(
        output_dir=str(Path(result_path).with_suffix(".trainer")),
        per_device_train_batch_size=request["batch"],
        num_train_epochs=request["epochs"],
        learning_rate=request["rate"],
        bf16=request["bf16"],
        seed=request["seed"],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = _trainer(request)(
        model=model, args=arguments, train_dataset=train, data_collator=collate, callbacks=[clock]
    )
    if request["tuned"]:
        lengths = np.array([len(row["input_ids"]) for row in train])
        groups = Groups(lengths, request["batch"], request["seed"])
        loader = DataLoader(train, batch_sampler=groups, collate_fn=collate)
        trainer.get_train_dataloader = lambda: loader
    trainer.train()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    Path(result_path).write_text(json.dumps({"epochs": clock.epochs, "trained_parameters": trained}))


def _model(request: dict[str, Any]) -> Any:
    config = AutoConfig.from_pretrained(request["base"], num_labels=request["labels"])
    if request["tuned"]:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = AutoModelForSequenceClassification.from_pretrained(request["base"], config=config)
    if request["adapter"]:
        import adapters
        from adapters import SeqBnConfig

        adapters.init(model)
        model.add_adapter("task", config=SeqBnConfig(leave_out=request["leave_out"]))
        model.train_adapter("task")
    return model


def _trainer(request: dict[str, Any]) -> Any:
    if not request["adapter"]:
        return Trainer
    from adapters import AdapterTrainer

    return AdapterTrainer


def _rows(rows: Any, part: str) -> list[dict[str, Any]]:
    ids = np.split(rows[f"{part}_ids"], rows[f"{part}_starts"][1:-1])
    return [{"input_ids": row, "labels": int(label)} for row, label in zip(ids, rows[f"{part}_labels"], strict=True)]


def _collator(padding: int) -> Any:
    """Pads to the longest of the batch, as DataCollatorWithPadding does."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), padding)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[index, :length] = torch.from_numpy(row["input_ids"].astype(np.int64))
            mask[index, :length] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}

    return collate


if __name__ == "__main__":
    main(*sys.argv[1:])
