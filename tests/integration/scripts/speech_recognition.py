"""Speech recognition, after run_speech_recognition_ctc.py: Python rows, a padding collator, a frozen encoder front."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments, Wav2Vec2Config, Wav2Vec2ForCTC


@dataclass
class DataCollatorCTCWithPadding:
    padding: int = -100

    def __call__(self, features):
        longest = max(len(f["input_values"]) for f in features)
        values, mask = torch.zeros(len(features), longest), torch.zeros(len(features), longest, dtype=torch.long)
        labels = torch.full((len(features), max(len(f["labels"]) for f in features)), self.padding)
        for i, f in enumerate(features):
            values[i, : len(f["input_values"])] = torch.tensor(f["input_values"])
            mask[i, : len(f["input_values"])] = 1
            labels[i, : len(f["labels"])] = torch.tensor(f["labels"])
        return {"input_values": values, "attention_mask": mask, "labels": labels}


def rows(count, seed):
    generator = np.random.default_rng(seed)
    return [
        {
            "input_values": generator.standard_normal(400 + 16 * (i % 5)).astype(np.float32),
            "labels": generator.integers(3, 10, 3 + i % 2).tolist(),
        }
        for i in range(count)
    ]


def main():
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    config = Wav2Vec2Config(
        vocab_size=10,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        conv_dim=(32, 32),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        layerdrop=0.0,
        mask_time_length=2,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
        pad_token_id=0,
    )
    model = Wav2Vec2ForCTC(config)
    model.freeze_feature_encoder()
    trainer = Trainer(
        model=model,
        args=args,
        data_collator=DataCollatorCTCWithPadding(),
        train_dataset=rows(24, 0),
        eval_dataset=rows(6, 1),
    )
    if args.do_train:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
    if args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
