"""The sampler, against a slow reference, and its isolation from all other randomness."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from api_schemas.inference import CompletionRequest
from workers.inference.sampling import Sampler, SamplingChoice, SamplingDefaults, choose_sampling, kept_probabilities

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30)


def slow_top_p(logits, temperature, top_p):
    """Plain Python floats (float64): tokens in order of probability until their sum reaches top_p."""
    scaled = torch.tensor(logits, dtype=torch.float64) / temperature
    probabilities = torch.softmax(scaled, -1).tolist()
    ranked = sorted(range(len(logits)), key=lambda token: -probabilities[token])
    kept, total = [], 0.0
    for token in ranked:
        if kept and total >= top_p:
            break
        kept.append(token)
        total += probabilities[token]
    return kept, [probabilities[token] for token in kept]


@settings(max_examples=300, deadline=None)
@given(logits=LOGITS, temperature=st.floats(0.05, 2.0), top_p=st.floats(0.01, 1.0))
def test_top_p_keeps_what_the_slow_reference_keeps(logits, temperature, top_p):
    wanted_tokens, wanted = slow_top_p(logits, temperature, top_p)
    choice = SamplingChoice(temperature=temperature, top_p=top_p)
    tokens, probabilities = kept_probabilities(torch.tensor(logits), choice)
    border = abs(sum(wanted[:-1]) - top_p) < 1e-12 or abs(sum(wanted) - top_p) < 1e-12
    if not border:  # a sum that meets top_p in its last bit may round to either side
        assert tokens.tolist() == wanted_tokens
        assert probabilities.tolist() == pytest.approx(wanted)


def test_top_k_comes_before_top_p():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    alone, _ = kept_probabilities(logits, SamplingChoice(top_p=0.55))
    tokens, probabilities = kept_probabilities(logits, SamplingChoice(top_k=2, top_p=0.55))
    assert alone.tolist() == [0, 1]  # 0.4 is below 0.55
    assert tokens.tolist() == [0]  # 0.4 of 0.7 is not
    assert probabilities.tolist() == pytest.approx([4 / 7])


def test_temperature_zero_takes_the_likeliest():
    sampler = Sampler(SamplingChoice(temperature=0.0), [], 4)
    assert [sampler.pick(torch.tensor([0.0, 3.0, 2.0, 1.0])) for _ in range(5)] == [1] * 5


def test_draws_follow_the_probabilities():
    sampler = Sampler(SamplingChoice(seed=1), [], 3)
    counts = Counter(sampler.pick(torch.tensor([0.5, 0.3, 0.2]).log()) for _ in range(4000))
    assert [counts[token] / 4000 for token in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others():
    logits = torch.zeros(50)

    def draw(seed):
        sampler = Sampler(SamplingChoice(seed=seed), [], 50)
        return [sampler.pick(logits) for _ in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(-(2**63)) == draw(-(2**63))


def test_the_callers_random_state_is_untouched():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    sampler = Sampler(SamplingChoice(seed=9), [1], 5)
    sampler.pick(torch.zeros(5))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_repetition_penalty_is_that_of_transformers():
    logits = torch.tensor([2.0, -1.0, 1.9, 0.5, -0.2])
    prompt = [0, 1]
    wanted = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([prompt]), logits[None].clone())[0]
    sampler = Sampler(SamplingChoice(temperature=0.0, repetition_penalty=1.5), prompt, 5)
    assert torch.equal(sampler._penalized(logits), wanted)
    assert sampler.pick(logits) == 2


def test_a_request_wins_over_the_model_and_the_model_over_openai():
    configured = SamplingDefaults(temperature=0.3, top_p=0.8, top_k=20, repetition_penalty=1.1)
    given_values = CompletionRequest(model="m", prompt="x", temperature=0.0, top_p=0.5, seed=4)
    silent = CompletionRequest(model="m", prompt="x")
    assert choose_sampling(given_values, configured) == SamplingChoice(0.0, 0.5, 20, 1.1, 4)
    assert choose_sampling(silent, configured).temperature == 0.3
    assert choose_sampling(silent, SamplingDefaults()).temperature == 1.0
    assert choose_sampling(silent, SamplingDefaults()).seed != choose_sampling(silent, SamplingDefaults()).seed
