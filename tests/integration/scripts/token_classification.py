"""Named entities, after run_ner.py: the Trainer by its module's name, and words the parser does not know."""

import sys

import torch
import transformers
from transformers import HfArgumentParser

parser = HfArgumentParser(transformers.TrainingArguments)
args, remaining = parser.parse_args_into_dataclasses(return_remaining_strings=True)
print("remaining", remaining, file=sys.stderr)


class Rows(torch.utils.data.Dataset):
    def __init__(self, count, seed):
        self.ids = torch.randint(3, 50, (count, 10), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(10, dtype=int), "labels": self.ids[i] % 3}


config = transformers.RobertaConfig(
    vocab_size=50,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=20,
    num_labels=3,
)
trainer = transformers.Trainer(
    model=transformers.RobertaForTokenClassification(config),
    args=args,
    train_dataset=Rows(32, 0),
    eval_dataset=Rows(8, 1),
    compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
)
if args.do_train:
    trainer.train()
    trainer.save_model()
if args.do_eval:
    trainer.save_metrics("eval", trainer.evaluate())
