"""The ``--quant*`` flags, as a dataclass that ``HfArgumentParser`` reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from lightning_quant.errors import explain
from lightning_quant.estimators import ESTIMATORS
from lightning_quant.spec import QuantConfig


@dataclass
class QuantArguments:
    """Quantization-aware training."""

    quant: str = field(
        default="none",
        metadata={"help": f"Method: {', '.join(ESTIMATORS)}; 'none' trains as if we were not there."},
    )
    quant_scheme: str = field(
        default="w4a16",
        metadata={"help": "Grid: w{bits}[a{bits}][-g{n}|-channel|-tensor][-asym][-static|-dynamic], e.g. w4a16-g128."},
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
        default_factory=list, metadata={"help": "The method's own settings, key=value (values are YAML)."}
    )
    quant_export: str | None = field(
        default=None, metadata={"help": "Directory to export the low-bit model to when training ends."}
    )
    quant_format: str | None = field(
        default=None, metadata={"help": "Export format: compressed-tensors (default) or folded."}
    )
    quant_target: str | None = field(
        default=None, metadata={"help": "Runtime whose arithmetic training follows: vllm or transformers."}
    )

    def to_config(self) -> QuantConfig | None:
        """The config these flags ask for; None for ``--quant none``.

        Raises:
            ValueError: A bad flag: unknown method or option, a scheme outside the grammar.
        """
        if self.quant == "none" and self.quant_config is None:
            return None
        if self.quant_config is not None:
            if self.quant != "none" or self.quant_option or self.quant_theta:
                raise ValueError(
                    explain("--quant_config", "to stand alone", "method or option flags beside it", "Drop one of them.")
                )
            return QuantConfig.from_yaml(self.quant_config)
        options: dict[str, Any] = {}
        for text in self.quant_option:
            key, sign, value = text.partition("=")
            if not sign or not key:
                raise ValueError(explain("--quant_option", "key=value", repr(text), "For example delta=0.001."))
            options[key] = yaml.safe_load(value)
        for key, given in (
            ("theta", self.quant_theta),
            ("calibration", self.quant_calibration),
            ("target", self.quant_target),
        ):
            if given is not None:
                options[key] = given
        return QuantConfig.parse(self.quant, self.quant_scheme, **options)
