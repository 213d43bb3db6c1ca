"""Sequence classification, after run_glue.py, with weighted classes: a Trainer with a constructor and a loss."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)


@dataclass
class TaskArguments:
    rare: float = field(default=2.0, metadata={"help": "Weight of the rare class."})


class WeightedTrainer(Trainer):
    def __init__(self, class_weights, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_function = torch.nn.CrossEntropyLoss(torch.tensor(class_weights, device=self.args.device))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = self.loss_function(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def main():
    task, args = HfArgumentParser((TaskArguments, TrainingArguments)).parse_args_into_dataclasses()
    generator = np.random.default_rng(0)
    ids = generator.integers(3, 60, (48, 12))
    table = Dataset.from_dict({"input_ids": ids.tolist(), "label": (ids[:, 0] > 45).astype(int).tolist()})
    splits = table.train_test_split(test_size=16, shuffle=False)
    data = DatasetDict(train=splits["train"], validation=splits["test"])
    config = DistilBertConfig(vocab_size=60, dim=64, hidden_dim=128, n_layers=2, n_heads=4, max_position_embeddings=16)

    def metrics(p: EvalPrediction):
        return {"accuracy": float((p.predictions.argmax(axis=1) == p.label_ids).mean())}

    trainer = WeightedTrainer(
        [1.0, task.rare],
        DistilBertForSequenceClassification(config),
        args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=metrics,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_metrics("eval", trainer.evaluate())
    predictions = trainer.predict(data["validation"].remove_columns("label"), metric_key_prefix="predict").predictions
    Path(args.output_dir, "predict_results.json").write_text(json.dumps(predictions.argmax(axis=1).tolist()))


if __name__ == "__main__":
    main()
