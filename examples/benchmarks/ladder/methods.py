"""What the accuracy ladder compares: methods by label, variants of PEGE's recipe, and which tasks are for what."""

from __future__ import annotations

from typing import Any, NamedTuple

# The recipe is chosen on the first part, and confirmed once on the second, with seeds that no search has seen.
SEARCH_TASKS = ("digits", "topics")
CONFIRM_TASKS = ("shakespeare", "wikitext", "cifar", "bert")
FIRST_SEED = {**dict.fromkeys(SEARCH_TASKS, 0), **dict.fromkeys((*CONFIRM_TASKS, "cifar-full"), 100)}
SWEEP_SEED = 1000  # of the runs that choose learning rates

WEIGHTS = ("w4", "w3", "w2", "w1.58", "w1")
BOTH = ("w4a4", "w2a2", "w1a1")
ALL = WEIGHTS + BOTH
LADDER: dict[str, dict[str, tuple[str, ...]]] = {  # task -> optimizer -> schemes, the most telling first
    "digits": {"adamw": ("w2", "w1", "w2a2", "w1a1", "w1.58", "w3", "w4", "w4a4"), "sgd": ("w1", "w2", "w2a2", "w1a1")},
    "topics": {"adamw": ("w2", "w3", "w1.58", "w1", "w4")},
    "bert": {"adamw": ("w2", "w1", "w2a2", "w1a1", "w1.58", "w4a4")},
    "cifar": {"adamw": ("w2", "w1", "w2a2", "w1a1", "w4a4"), "sgd": ("w1", "w2a2")},
    "shakespeare": {"adamw": ("w2", "w3", "w1.58", "w1", "w4")},
    "wikitext": {"adamw": ("w2", "w3", "w1.58")},
    "cifar-full": {"adamw": ("w2", "w1", "w2a2", "w1a1", "w4a4"), "sgd": ("w1", "w2a2")},
}
SEARCH_SCHEMES = ("w2", "w1", "w2a2")
CONVOLUTIONAL = ("digits", "cifar", "cifar-full")


class Entry(NamedTuple):
    """A line of the leaderboard.

    Attributes:
        method: Name in ``ESTIMATORS``.
        options: Of ``QuantConfig.parse``.
        widths: Schemes it makes sense for.
        convolutional: Only for networks with batch normalization behind every layer, which the method needs.
    """

    method: str
    options: dict[str, Any]
    widths: tuple[str, ...]
    convolutional: bool = False


_MULTI = ("w4", "w3", "w2", "w4a4", "w2a2")  # a grid with more than three levels
_FEW = ("w2", "w1.58", "w1", "w2a2", "w1a1")
METHODS: dict[str, Entry] = {
    "ste": Entry("ste", {}, ALL),
    "pege": Entry("pege", {}, ALL),
    "lsq": Entry("lsq", {}, ALL),
    "ewgs": Entry("ewgs", {}, ALL),
    "dsq": Entry("dsq", {}, ALL),
    "pege_replace": Entry("pege_replace", {}, ALL),
    "pege, fixed scale": Entry("pege", {"learn_scale": False}, ALL),
    "pege, Theta per element": Entry("pege", {"theta": "element"}, ALL),
    "ste, no clipping": Entry("ste", {"mask": "none"}, _FEW),
    "dampen": Entry("dampen", {}, ALL),
    "freeze": Entry("freeze", {}, ALL),
    "stochastic": Entry("stochastic", {}, ALL),
    "noise": Entry("noise", {}, ALL),
    "bireal": Entry("bireal", {}, _FEW),
    "ede": Entry("ede", {"balance": False}, _FEW),
    "ede, balanced": Entry("ede", {}, _FEW, convolutional=True),
    "react": Entry("react", {"mask": "none"}, ("w2a2", "w1a1")),
    "lsq_plus": Entry("lsq_plus", {}, ("w4a4", "w2a2"), convolutional=True),
    "tqt": Entry("tqt", {}, _MULTI),
    "seq": Entry("seq", {}, ("w3", "w2", "w1.58", "w1")),
    "pact": Entry("pact", {}, ("w4a4", "w2a2"), convolutional=True),
    "dorefa": Entry("dorefa", {}, ("w4", "w3", "w2", "w1", "w4a4", "w2a2", "w1a1"), convolutional=True),
    "hwgq": Entry("hwgq", {}, ("w2a2", "w1a1"), convolutional=True),
    "binary": Entry("binary", {}, ("w1", "w1a1")),
    "twn": Entry("twn", {}, ("w1.58",)),
    "syq": Entry("syq", {}, ("w1.58", "w1")),
    "clip_q": Entry("clip_q", {}, ("w3", "w2")),
    "inq": Entry("inq", {}, ("w4", "w3")),
    "elq": Entry("elq", {}, ("w2", "w1.58", "w1")),
}
CORE = ("ste", "pege", "lsq", "ewgs")  # what a ladder that ends within hours compares, on these schemes with AdamW
CORE_SCHEMES = {
    **dict.fromkeys(("digits", "bert", "cifar", "cifar-full"), ("w2", "w1", "w2a2")),
    **dict.fromkeys(("shakespeare", "wikitext"), ("w2", "w3")),
    "topics": ("w2",),
}
BUDGETED = ("ste", "pege", "lsq", "dampen", "pege_replace", "freeze")


def _lam(**fields: Any) -> dict[str, Any]:
    return {"lam": {"curve": "cosine", "start": 0.0, "end": 1e-3, "delay": 0.3, **fields}}


# One thing is changed at a time, so that its effect is seen; what helps is then combined and confirmed.
SEARCH: dict[str, tuple[str, dict[str, Any]]] = {
    "theta: channel": ("pege", {"theta": "channel"}),
    "theta: element, uint8": ("pege", {"theta": "element"}),
    "theta: element, float32": ("pege", {"theta": "element", "theta_dtype": "float32"}),
    "lam: 0": ("pege", {"lam": 0.0}),
    "lam: to 1e-4": ("pege", _lam(end=1e-4)),
    "lam: to 1e-2": ("pege", _lam(end=1e-2)),
    "lam: to 1e-1": ("pege", _lam(end=1e-1)),
    "lam: from the start": ("pege", _lam(delay=0.0)),
    "lam: logarithmic": ("pege", _lam(curve="logarithmic")),
    "lam: dampening at the end": ("pege", _lam(end=1e-1, delay=0.7)),
    "sharpness: 2": ("pege", {"sharpness": 2.0}),
    "sharpness: 8": ("pege", {"sharpness": 8.0}),
    "sharpness: 2 to 8": ("pege", {"sharpness": {"curve": "linear", "start": 2.0, "end": 8.0}}),
    "sharpness: learned": ("pege", {"sharpness": "learned"}),
    "rate of Theta: 1": ("pege", {"state_lr": 1.0}),
    "rate of Theta: 100": ("pege", {"state_lr": 100.0}),
    "initial b: 0.5": ("pege", {"initial": 0.5}),
    "initial b: 1": ("pege", {"initial": 1.0}),
    "scales: fixed": ("pege", {"learn_scale": False}),
    "scales: rate 0.01": ("pege", {"scale_lr": 0.01}),
    "scales: rate 1": ("pege", {"scale_lr": 1.0}),
    "replace": ("pege_replace", {}),
    "replace, scales learned": ("pege_replace", {"learn_scale": True}),
    "replace to half-time": (
        "pege_replace",
        {"learn_scale": True, "share": {"curve": "replacement", "start": 0.0, "end": 1.0, "until": 0.5}},
    ),
    "replace from half": (
        "pege_replace",
        {"learn_scale": True, "share": {"curve": "replacement", "start": 0.5, "end": 1.0, "until": 0.8}},
    ),
    "replace with lam": ("pege_replace", {"learn_scale": True, **_lam(end=1e-2)}),
}
REFERENCES = ("ste", "lsq", "pege")  # what the search compares its variants with

ROUNDED: dict[str, dict[str, Any]] = {  # post-training methods of the language tasks
    "rtn": {},
    "gptq": {},
    "adaround": {"iterations": 300},
    "brecq": {"iterations": 300},
}
ROUNDED_SCHEMES = ("w2", "w3")
CALIBRATION_ROWS = 64
