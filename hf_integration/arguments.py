"""The ``--quant*`` flags, as a dataclass that ``HfArgumentParser`` reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_quant.errors import explain, unknown
from lightning_quant.estimators import ESTIMATORS, build_estimator
from lightning_quant.presets import PRESETS
from lightning_quant.spec import QuantConfig, YamlLoader
from lightning_quant.targets import TARGETS
from lightning_quant.transforms.setup import KINDS, check_setup

# Flags that say what to quantize and how, as a config file does.
WHAT = ("quant", "quant_scheme", "quant_calibration", "quant_theta", "quant_option", "quant_target")
WHAT += ("quant_distill", "quant_distill_temperature", "quant_setup", "quant_setup_batches", "quant_compile")


@dataclass
class QuantArguments:
    """Quantization-aware training."""

    quant: str = field(
        default="none",
        metadata={"help": f"Method: {', '.join(ESTIMATORS)}; 'none' trains as if we were not there."},
    )
    quant_scheme: str = field(
        default="w4a16",
        metadata={
            "help": "Grid: w{bits}[a{bits}][-g{n}|-channel|-tensor][-asym][-static|-dynamic], e.g. w4a16-g128, "
            "or fp8, mxfp4, mxfp8, nvfp4, nf4."
        },
    )
    quant_config: str | None = field(
        default=None, metadata={"help": "YAML file of a QuantConfig, in place of method, scheme and options."}
    )
    quant_calibration: int | None = field(
        default=None, metadata={"help": "Optimizer steps in which static activation ranges follow the data."}
    )
    quant_theta: str | None = field(
        default=None, metadata={"help": "What shares PEGE's Theta: element, group, channel or auto."}
    )
    quant_option: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": "The method's own settings, or range=, grid=, observer=; key=value (YAML); repeatable.",
        },
    )
    quant_setup: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": f"What is done before training, in order: {', '.join(n for _, known in KINDS for n in known)}; "
            f"with commas between them, or {{name: smoothquant, alpha: search}}; or {', '.join(PRESETS)}; repeatable.",
        },
    )
    quant_setup_batches: int | None = field(
        default=None, metadata={"help": "Batches of training data that --quant_setup looks at (8)."}
    )
    quant_compile: bool = field(
        default=False,
        metadata={"help": "Run the quantizers' arithmetic in compiled kernels: faster after some seconds."},
    )
    quant_distill: float | None = field(
        default=None, metadata={"help": "Weight of distillation: learn from the float model beside the labels."}
    )
    quant_distill_temperature: float | None = field(
        default=None, metadata={"help": "Temperature that softens both models' outputs (1)."}
    )
    quant_teacher: str | None = field(
        default=None,
        metadata={"help": "Directory of another model to distill from, as save_pretrained wrote it."},
    )
    quant_log_layers: int = field(
        default=0,
        metadata={"help": "Optimizer steps between logs of every layer's metrics, on logging steps (0: never)."},
    )
    quant_export: str | None = field(
        default=None, metadata={"help": "Directory to export the low-bit model to when training ends."}
    )
    quant_format: str | None = field(
        default=None,
        metadata={
            "help": "Export format: compressed-tensors, gguf, gptq, onnx, torchao or folded (default: the target's)."
        },
    )
    quant_target: str | None = field(
        default=None,
        metadata={"help": f"Runtime whose arithmetic training follows: {', '.join(TARGETS)}; vllm if not given."},
    )

    def to_config(self) -> QuantConfig | None:
        """The config these flags ask for; None for ``--quant none``.

        Raises:
            ValueError: A bad flag: unknown method, option or format, a scheme outside the grammar, a config
                file that is missing, damaged or not alone.
        """
        if self.quant_log_layers < 0:
            raise ValueError(
                explain("--quant_log_layers", "0 or more steps", self.quant_log_layers, "Use 0 for never.")
            )
        if self.quant == "none" and self.quant_config is None:
            return None
        if self.quant_format is not None:
            from lightning_quant.export import FORMATS

            if self.quant_format not in FORMATS:
                raise ValueError(unknown("format", self.quant_format, FORMATS, "--quant_format"))
        config = self._from_flags() if self.quant_config is None else self._from_file(self.quant_config)
        check_setup(config)
        if self.quant_teacher is not None:
            if config.distill is None:
                cure = "Add for example --quant_distill 0.5."
                raise ValueError(explain("--quant_teacher", "a weight for what it says", "no --quant_distill", cure))
            if not Path(self.quant_teacher).is_dir():
                cure = "Name one that save_pretrained wrote."
                raise ValueError(explain("--quant_teacher", "a directory", repr(self.quant_teacher), cure))
        try:
            build_estimator(config.method, dict(config.options))
        except TypeError as error:  # a string where a number belongs
            given = ", ".join(f"{k}={v!r}" for k, v in config.options.items())
            cure = f"See the settings of {config.method} in its class's docstring."
            raise ValueError(
                explain("--quant_option", "values of the right type", f"{given} ({error})", cure)
            ) from error
        return config

    def _from_file(self, path: str) -> QuantConfig:
        own = QuantArguments()
        beside = [f"--{name}" for name in WHAT if getattr(self, name) != getattr(own, name)]
        if beside:
            raise ValueError(
                explain("--quant_config", "to stand alone", f"{', '.join(beside)} beside it", "Drop one of them.")
            )
        if not Path(path).is_file():
            raise ValueError(explain("--quant_config", "a YAML file", repr(path), "QuantConfig.to_yaml writes one."))
        try:
            return QuantConfig.from_yaml(path)
        except yaml.YAMLError as error:
            raise ValueError(explain("--quant_config", "YAML", _line(error), f"Mend {path}.")) from error

    def _from_flags(self) -> QuantConfig:
        options = self._values()
        for key, given in (
            ("theta", self.quant_theta),
            ("calibration", self.quant_calibration),
            ("target", self.quant_target),
            ("setup", self._steps() or None),
            ("setup_batches", self.quant_setup_batches),
            ("compile", self.quant_compile or None),
        ):
            if given is not None:
                options[key] = given
        temperature = self.quant_distill_temperature
        if self.quant_distill is not None:
            softened = {} if temperature is None else {"temperature": temperature}
            options["distill"] = {"weight": self.quant_distill, **softened}
        elif temperature is not None:
            cure = "Add for example --quant_distill 0.5."
            raise ValueError(explain("--quant_distill_temperature", "a weight as well", "no --quant_distill", cure))
        return QuantConfig.parse(self.quant, self.quant_scheme, **options)

    def _steps(self) -> tuple[Any, ...]:
        """The steps of set-up: names, or mappings of a name and its options."""
        steps: list[Any] = []
        for text in self.quant_setup:
            try:
                found = yaml.load(text if text.lstrip().startswith("[") else f"[{text}]", YamlLoader)
            except yaml.YAMLError as error:
                cure = "For example smoothquant,equalize or {name: equalize, relu6: true}, in quotes."
                raise ValueError(explain("--quant_setup", "names of transforms", _line(error), cure)) from error
            steps += found
        return tuple(steps)

    def _values(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for text in self.quant_option:
            key, sign, value = text.partition("=")
            if not sign or not key:
                raise ValueError(explain("--quant_option", "key=value", repr(text), "For example delta=0.001."))
            try:
                options[key] = yaml.load(value, YamlLoader)
            except yaml.YAMLError as error:
                cure = "For example lam={curve: linear, start: 0, end: 0.001}, in quotes."
                raise ValueError(explain(f"--quant_option {key}", "YAML after =", _line(error), cure)) from error
        return options


def _line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())
