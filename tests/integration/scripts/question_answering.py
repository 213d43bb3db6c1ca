"""Extractive question answering, after run_qa.py: its Trainer comes from a module beside the script."""

import json
from pathlib import Path

import numpy as np
from datasets import Dataset
from trainer_of_qa import QuestionAnsweringTrainer
from transformers import ElectraConfig, ElectraForQuestionAnswering, HfArgumentParser, TrainingArguments


def features(count, seed):
    ids = np.random.default_rng(seed).integers(3, 50, (count, 14))
    start, end = ids[:, 3:].argmin(axis=1) + 3, ids[:, 3:].argmax(axis=1) + 3
    return Dataset.from_dict(
        {
            "input_ids": ids.tolist(),
            "start_positions": np.minimum(start, end).tolist(),
            "end_positions": np.maximum(start, end).tolist(),
            "example_id": [str(i) for i in range(count)],
        }
    )


def answers(examples, dataset, predictions, stage="eval"):
    start, end = (logits.argmax(axis=1) for logits in predictions[:2])
    return {example: (int(a), int(b)) for example, a, b in zip(examples["example_id"], start, end, strict=True)}


def main():
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    train, evaluation = features(32, 0), features(8, 1)
    config = ElectraConfig(
        vocab_size=50,
        embedding_size=32,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=16,
    )
    trainer = QuestionAnsweringTrainer(
        model=ElectraForQuestionAnswering(config),
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        eval_examples=evaluation,
        post_process_function=answers,
        compute_metrics=lambda found: {"answered": float(np.mean([a <= b for a, b in found.values()]))},
    )
    if args.do_train:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
    if args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())
    if args.do_predict:
        found = trainer.predict(evaluation, evaluation).predictions
        Path(args.output_dir, "answers.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
