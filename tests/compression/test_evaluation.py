"""Perplexity and divergence against transformers and a slow float64 reference."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.core.streamed_model import StreamedModel
from compression.evaluation import compare
from preflight.families import resolve
from tests.compression.walks import random_tokens
from tests.tiny_models import make_tiny_model


def streamed(folder: Path) -> StreamedModel:
    return StreamedModel(folder, resolve(json.loads((folder / "config.json").read_text())))


def test_numbers_are_those_of_a_slow_reference(tmp_path: Path) -> None:
    folders = [make_tiny_model(tmp_path / str(seed), "llama", seed=seed) for seed in (0, 1)]
    windows = random_tokens(5, 61)
    steps: list[tuple[str, int]] = []
    quality = compare(streamed(folders[0]), streamed(folders[1]), windows, lambda side, i: steps.append((side, i)))
    with torch.inference_mode():
        logits = [AutoModelForCausalLM.from_pretrained(folder)(windows).logits.double() for folder in folders]
    p, q = (torch.log_softmax(one[:, :-1].reshape(-1, 384), -1) for one in logits)
    targets = windows[:, 1:].reshape(-1)
    rows = torch.arange(len(targets))
    assert quality.perplexity.before == pytest.approx(float((-p[rows, targets]).mean().exp()), rel=1e-5)
    assert quality.perplexity.after == pytest.approx(float((-q[rows, targets]).mean().exp()), rel=1e-5)
    kl = (p.exp() * (p - q)).sum(-1)
    assert quality.divergence.mean_kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert quality.divergence.kl_99th_percentile == pytest.approx(float(kl.quantile(0.99)), rel=1e-3)
    assert quality.divergence.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert steps == [("before", 0), ("before", 1), ("after", 0), ("after", 1)]


def test_a_model_does_not_diverge_from_itself(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "qwen2")
    quality = compare(streamed(folder), streamed(folder), random_tokens(2, 40), lambda *_: None)
    assert quality.perplexity.before == quality.perplexity.after
    assert quality.divergence.mean_kl == 0.0
    assert quality.divergence.top1_agreement == 1.0
