"""Train or fine-tune a causal language model with transformers' Trainer.  An ordinary script.

From scratch on the English text of the standard library's ``pydoc_data.topics``::

    python examples/causal_lm.py --output_dir out --do_train --do_eval --max_steps 200

Fine-tune what that wrote, on a text file of your own::

    python examples/causal_lm.py --model_name_or_path out --data my.txt --output_dir tuned --do_train --do_eval
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


@dataclass
class ModelArguments:
    """Which model."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Start here; otherwise from scratch."})
    hidden_size: int = field(default=256, metadata={"help": "Width of a model made from scratch."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Depth of a model made from scratch."})
    vocab_size: int = field(default=1024, metadata={"help": "Tokens of a tokenizer trained on the data."})


@dataclass
class DataArguments:
    """Which text."""

    data: str | None = field(default=None, metadata={"help": "A text file; default: pydoc_data.topics."})
    block_size: int = field(default=128, metadata={"help": "Tokens per sequence."})
    validation_share: float = field(default=0.1, metadata={"help": "Share of the text, at its end, for evaluation."})


def read_text(path: str | None) -> str:
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=4096
    )


def blocks(ids: list[int], size: int) -> Dataset:
    rows = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)

    text = read_text(data_args.data)
    if model_args.model_name_or_path is not None:
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
    else:
        tokenizer = train_tokenizer(text, model_args.vocab_size)
        width = model_args.hidden_size
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=(width * 8 // 3 + 63) // 64 * 64,
            num_hidden_layers=model_args.num_hidden_layers,
            num_attention_heads=max(width // 64, 1),
            num_key_value_heads=max(width // 128, 1),
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = LlamaForCausalLM(config)

    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    cut = int(len(ids) * (1 - data_args.validation_share))
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=blocks(ids[:cut], data_args.block_size),
        eval_dataset=blocks(ids[cut:], data_args.block_size),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    if args.do_train:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
    if args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
