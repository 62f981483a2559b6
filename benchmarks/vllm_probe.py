"""What vLLM computes with a model folder, run in vLLM's own environment: no import of this project.

    python vllm_probe.py FOLDER WORK GREEDY

Reads the prompts' ids from WORK/<folder>.<n>.npz; writes the last position's logits and a greedy continuation beside
them. Raw logits, float32, eager. A folder with exports/vllm is loaded under that configuration.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import numpy as np
from vllm import LLM, SamplingParams


def main(folder: Path, work: Path, greedy: int) -> None:
    """Load, generate, write."""
    configured = folder / "exports" / "vllm"
    more = {"hf_config_path": str(configured), "trust_remote_code": True} if configured.is_dir() else {}
    model = LLM(
        model=str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        enable_prefix_caching=False,
        **more,
    )
    settings = SamplingParams(temperature=0.0, max_tokens=greedy, ignore_eos=True, logprobs=-1, detokenize=False)
    for path in sorted(work.glob(f"{folder.name}.[0-9].npz")):
        ids = np.load(path)["ids"].tolist()
        answer = model.generate({"prompt_token_ids": ids}, settings, use_tqdm=False)[0].outputs[0]
        first = answer.logprobs[0]
        logits = np.array([first[index].logprob for index in range(len(first))], np.float32)[None]
        np.savez(path.with_suffix(".vllm.npz"), logits=logits, greedy=np.array(answer.token_ids, np.int32))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
