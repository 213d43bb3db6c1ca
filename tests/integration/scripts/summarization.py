"""Sequence to sequence, after run_summarization.py: Seq2SeqTrainer, whose evaluation generates."""

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)


def main():
    (args,) = HfArgumentParser(Seq2SeqTrainingArguments).parse_args_into_dataclasses()
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(37))]
    base = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = T5Config(
        vocab_size=len(words),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        tie_word_embeddings=True,
    )
    model = T5ForConditionalGeneration(config)

    documents = [" ".join(f"w{(i * k) % 37}" for k in range(1, 8 + i % 4)) for i in range(40)]
    table = Dataset.from_dict({"document": documents, "summary": [" ".join(d.split()[:3]) for d in documents]})

    def preprocess(examples):
        inputs = tokenizer(["w0 " + text for text in examples["document"]])
        inputs["labels"] = tokenizer(text_target=[text + " </s>" for text in examples["summary"]])["input_ids"]
        return {key: inputs[key] for key in ("input_ids", "attention_mask", "labels")}

    table = table.map(preprocess, batched=True, remove_columns=table.column_names)
    train, evaluation = table.select(range(32)), table.select(range(32, 40))

    def compute_metrics(eval_preds):
        preds, _ = eval_preds
        preds = np.where(preds == -100, tokenizer.pad_token_id, preds)
        tokenizer.batch_decode(preds, skip_special_tokens=True)
        return {"gen_len": float(np.mean([np.count_nonzero(p != tokenizer.pad_token_id) for p in preds]))}

    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=-100),
        compute_metrics=compute_metrics if args.predict_with_generate else None,
    )
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
    if args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate(metric_key_prefix="eval", max_length=6, num_beams=2))
    if args.do_predict:
        found = trainer.predict(evaluation, metric_key_prefix="predict", max_length=6)
        trainer.save_metrics("predict", found.metrics)


if __name__ == "__main__":
    main()
