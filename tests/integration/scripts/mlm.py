"""Masked language modelling in the manner of run_mlm.py: a YAML file of arguments, the Trainer under another name."""

import os
import sys
from dataclasses import dataclass, field

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, HfArgumentParser
from transformers import PreTrainedTokenizerFast as Fast
from transformers import Trainer as T  # noqa: N817
from transformers import TrainingArguments as Settings

WORDS = [
    "[PAD]",
    "[UNK]",
    "[MASK]",
    "[CLS]",
    "[SEP]",
    "the",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "a",
    "mat",
    "and",
    "slept",
]


@dataclass
class DataArguments:
    mlm_probability: float = field(default=0.3)


parser = HfArgumentParser((DataArguments, Settings))
if sys.argv[-1].endswith((".yaml", ".yml")):
    data_args, args = parser.parse_yaml_file(os.path.abspath(sys.argv[-1]))
else:
    data_args, args = parser.parse_args_into_dataclasses()

vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]", "cls_token": "[CLS]"}
tokenizer = Fast(tokenizer_object=vocabulary, sep_token="[SEP]", **special)
lines = [f"the {who} {did} on a {where}" for who in ("cat", "dog") for did in ("sat", "ran") for where in WORDS]
rows = [tokenizer(line, return_special_tokens_mask=True) for line in lines]
collator = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=data_args.mlm_probability, seed=0)

config = BertConfig(
    vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
)
trainer = T(BertForMaskedLM(config), args, collator, rows[8:], rows[:8], tokenizer)
if args.do_train:
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
if args.do_eval:
    trainer.save_metrics("eval", trainer.evaluate())
