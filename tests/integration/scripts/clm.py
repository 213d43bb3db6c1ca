"""Causal language modelling, laid out as transformers' run_clm.py: three dataclasses, metrics from argmaxed logits."""

import math
import os
import sys
from dataclasses import dataclass, field

from datasets import Dataset
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(default=None)
    model_type: str = field(default="llama")
    config_overrides: str = field(default="hidden_size=64,intermediate_size=128,num_hidden_layers=2")


@dataclass
class DataTrainingArguments:
    block_size: int = field(default=16)
    max_train_samples: int = field(default=32)
    max_eval_samples: int = field(default=8)


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    if model_args.model_name_or_path:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path)
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, config=config)
    else:
        config = CONFIG_MAPPING[model_args.model_type](vocab_size=96, num_attention_heads=4, num_key_value_heads=2)
        config.update_from_string(model_args.config_overrides)
        model = AutoModelForCausalLM.from_config(config)

    samples = data_args.max_train_samples + data_args.max_eval_samples
    rows = [[(start + 2 * i) % 90 for i in range(data_args.block_size)] for start in range(samples)]
    data = Dataset.from_dict({"input_ids": rows}).map(lambda row: {"labels": row["input_ids"].copy()})
    train_dataset = data.select(range(data_args.max_train_samples))
    eval_dataset = data.select(range(data_args.max_train_samples, samples))

    def preprocess_logits_for_metrics(logits, labels):
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)

    def compute_metrics(eval_preds):
        preds, labels = eval_preds
        return {"accuracy": float((preds[:, :-1] == labels[:, 1:]).mean())}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics if training_args.do_eval else None,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics if training_args.do_eval else None,
    )

    if training_args.do_train:
        checkpoint = None
        if training_args.resume_from_checkpoint == "last":
            checkpoint = get_last_checkpoint(training_args.output_dir)
        elif training_args.resume_from_checkpoint is not None:
            checkpoint = training_args.resume_from_checkpoint
        train_result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        metrics = train_result.metrics
        metrics["train_samples"] = len(train_dataset)
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()

    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
