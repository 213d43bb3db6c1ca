"""Image classification, after run_image_classification.py: pictures through a transform, a collator of its own."""

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from PIL import Image
from transformers import HfArgumentParser, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification


def picture(label, generator):
    pixels = generator.integers(0, 80, (16, 16, 3))
    pixels[..., label] += 120
    return Image.fromarray(pixels.astype(np.uint8))


def collate_fn(examples):
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}


def main():
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    args.remove_unused_columns = False
    generator = np.random.default_rng(0)
    names = ["red", "green", "blue"]
    labels = [i % 3 for i in range(48)]
    table = Dataset.from_dict({"image": [picture(k, generator) for k in labels], "label": labels})
    table = table.cast_column("label", ClassLabel(names=names)).train_test_split(12, shuffle=False)

    def transforms(batch):
        arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 127.5 - 1 for image in batch["image"]]
        batch["pixel_values"] = [torch.from_numpy(a).permute(2, 0, 1) for a in arrays]
        return batch

    for split in table.values():
        split.set_transform(transforms)
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    trainer = Trainer(
        model=ViTForImageClassification(config),
        args=args,
        train_dataset=table["train"],
        eval_dataset=table["test"],
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(axis=1) == p.label_ids).mean())},
        data_collator=collate_fn,
    )
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
