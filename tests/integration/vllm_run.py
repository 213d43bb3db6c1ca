"""What vLLM makes of an export; runs where vLLM is installed, on its own.

python vllm_run.py DIRECTORY OUT DTYPE ID [ID ...]       logits after each token id but the last, float32
"""

from __future__ import annotations

import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_HOST_IP": "127.0.0.1"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

import numpy as np
from vllm import LLM, SamplingParams, TokensPrompt


def main() -> None:
    path, out, dtype, *words = sys.argv[1:]
    ids = [int(word) for word in words]
    settings = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": len(ids) + 8}
    model = LLM(path, dtype=dtype, logprobs_mode="raw_logits", max_logprobs=-1, **settings)
    wanted = SamplingParams(prompt_logprobs=-1, max_tokens=1, detokenize=False)
    (answer,) = model.generate([TokensPrompt(prompt_token_ids=ids)], wanted)
    rows = answer.prompt_logprobs[1:]
    logits = [[row[i].logprob for i in range(len(row))] for row in rows]
    np.asarray(logits, dtype=np.float32).tofile(out)


if __name__ == "__main__":
    main()
