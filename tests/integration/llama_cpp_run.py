"""What llama.cpp makes of a file; runs where llama-cpp-python is installed, on its own.

python llama_cpp_run.py MODEL.gguf OUT ID [ID ...]       logits of token ids, float32
python llama_cpp_run.py MODEL.gguf OUT.json TEXT [...]   token ids of texts
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp.llama_cpp as library
import numpy as np
from llama_cpp import Llama

defaults = library.llama_model_default_params


def plain_buffers() -> object:
    """Weights stay as the file has them: llama.cpp's kernels for AMX crash on some machines, whoever wrote the file."""
    params = defaults()
    params.use_extra_bufts = False
    return params


def main() -> None:
    path, out, *words = sys.argv[1:]
    library.llama_model_default_params = plain_buffers
    if out.endswith(".json"):
        llama = Llama(path, vocab_only=True, verbose=False)
        Path(out).write_text(json.dumps([llama.tokenize(text.encode(), special=True) for text in words]))
        return
    ids = [int(word) for word in words]
    # every position's logits; keys and values in float32 (type 0), so that only the products round
    llama = Llama(path, n_ctx=len(ids), logits_all=True, n_threads=1, verbose=False, type_k=0, type_v=0)
    llama.eval(ids)
    np.asarray(llama.scores[: len(ids)], dtype=np.float32).tofile(out)


main()
