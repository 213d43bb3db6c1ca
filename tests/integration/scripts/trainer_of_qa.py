"""What question_answering.py imports from beside itself: evaluation and prediction with answers made of logits."""

from transformers import Trainer
from transformers.trainer_utils import PredictionOutput


class QuestionAnsweringTrainer(Trainer):
    def __init__(self, *args, eval_examples=None, post_process_function=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples
        self.post_process_function = post_process_function

    def evaluate(self, eval_dataset=None, eval_examples=None, ignore_keys=None, metric_key_prefix="eval"):
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        examples = self.eval_examples if eval_examples is None else eval_examples
        output = self._loop(self.get_eval_dataloader(eval_dataset), "Evaluation", ignore_keys, metric_key_prefix)
        metrics = self.compute_metrics(self.post_process_function(examples, eval_dataset, output.predictions))
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        metrics.update(output.metrics)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, predict_dataset, predict_examples, ignore_keys=None, metric_key_prefix="test"):
        output = self._loop(self.get_test_dataloader(predict_dataset), "Prediction", ignore_keys, metric_key_prefix)
        answers = self.post_process_function(predict_examples, predict_dataset, output.predictions)
        return PredictionOutput(predictions=answers, label_ids=None, metrics=output.metrics)

    def _loop(self, loader, description, ignore_keys, metric_key_prefix):
        compute_metrics, self.compute_metrics = self.compute_metrics, None  # those of answers, not of logits
        try:
            return self.evaluation_loop(
                loader, description, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix
            )
        finally:
            self.compute_metrics = compute_metrics
