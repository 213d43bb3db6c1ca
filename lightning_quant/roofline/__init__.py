"""What a model would take on a processor, under any scheme, before there is a weight."""

from lightning_quant.roofline.counting import Counted, Use, count
from lightning_quant.roofline.hardware import HARDWARE, Hardware, load_hardware
from lightning_quant.roofline.machine import measure
from lightning_quant.roofline.phases import Load, count_phases, load_for, open_model
from lightning_quant.roofline.predict import Cost, Layer, Roofline, roofline
from lightning_quant.roofline.stored import Stored, stored

__all__ = [
    "HARDWARE",
    "Cost",
    "Counted",
    "Hardware",
    "Layer",
    "Load",
    "Roofline",
    "Stored",
    "Use",
    "count",
    "count_phases",
    "load_for",
    "load_hardware",
    "measure",
    "open_model",
    "roofline",
    "stored",
]
