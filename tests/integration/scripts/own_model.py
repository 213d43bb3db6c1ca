"""A library's Trainer, as TRL's are built: it makes the model itself from a name and hands it on by keyword."""

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Trainer, TrainingArguments


class LibraryTrainer(Trainer):
    def __init__(self, model, args=None, **kwargs):
        if isinstance(model, str):
            sizes = {"tiny": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 96}}
            model = GPT2LMHeadModel(GPT2Config(**sizes[model]))
        assert isinstance(model, PreTrainedModel)
        self._seen = []
        super().__init__(args=args, model=model, **kwargs)
        self.reference = {name: p.detach().clone() for name, p in self.model.named_parameters() if "wte" in name}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        logits, targets = outputs.logits[:, :-1], inputs["input_ids"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets)
        self._seen.append(loss.item())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        logs = {**logs, "seen": len(self._seen)}
        super().log(logs, start_time)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--quantile", type=float, default=0.5)
    parser.add_argument("out")
    own = parser.parse_args()
    rows = [{"input_ids": torch.arange(i, i + 12) % 96} for i in range(24)]
    args = TrainingArguments(
        own.out, max_steps=3, per_device_train_batch_size=4, logging_steps=1, report_to="none", use_cpu=True
    )
    trainer = LibraryTrainer(own.model, args, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()
    trainer.save_model()
    trainer.save_metrics("eval", {**trainer.evaluate(), "eval_quantile": own.quantile})


if __name__ == "__main__":
    main()
