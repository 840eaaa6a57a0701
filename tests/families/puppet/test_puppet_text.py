# SPDX-License-Identifier: Apache-2.0
"""The closed-vocabulary text encoder: what a prompt keeps, what it loses, and what is said about it."""

import numpy as np
import pytest
import torch

from talkingdit.families.puppet.text import END, PAD, UNKNOWN, PromptEncoder
from talkingdit.puppets.world import Scene


@pytest.fixture
def encoder():
    return PromptEncoder()


@pytest.mark.parametrize("people", [1, 2])
def test_every_caption_of_the_drawn_world_is_known_and_fits(encoder, people):
    rng = np.random.default_rng(0)
    for _ in range(300):
        for viewpoint in ("front", "left", "right", "back"):
            caption = Scene.random(rng, people=people, viewpoint=viewpoint).caption()
            assert encoder.unknown_words(caption) == []
            assert encoder.left_out_words(caption) == []


def test_captions_that_differ_in_one_word_that_shows_have_different_features(encoder):
    base = "a person with short brown hair wearing a red shirt with a white star logo, happy, front view, talking"
    others = [
        base.replace(a, b) for a, b in (("brown", "red"), ("star", "circle"), ("happy", "sad"), ("front", "back"))
    ]
    swapped = base.replace("brown hair", "red hair").replace("red shirt", "brown shirt")
    features = encoder.encode([base, *others, swapped]).features
    for other in features[1:]:
        assert (other - features[0]).abs().max() > 0.1


def test_glue_case_and_punctuation_do_not_count(encoder):
    a, b = encoder.encode(["A person, with the RED hair.", "person red hair"]).features
    assert torch.equal(a, b)


def test_synonyms(encoder):
    assert encoder.unknown_words("a smiling woman with blonde hair and a gray t-shirt") == []
    a, b = encoder.tokens(["smiling woman, blonde hair, gray t-shirt", "happy person blond hair grey shirt"])
    assert torch.equal(a, b)


def test_unknown_words_are_named_once_and_share_one_token(encoder):
    prompt = "a person riding a Zebra past a zebra, naïve"
    assert encoder.unknown_words(prompt) == ["riding", "zebra", "past", "naïve"]
    assert encoder.tokens([prompt])[0].tolist()[1:6] == [UNKNOWN] * 5
    assert encoder.tokens([prompt])[0, 6] == END


def test_the_empty_prompt_is_its_end_alone(encoder):
    features, mask = encoder.encode(["", "a person"])
    assert mask.sum(1).tolist() == [1, 2]
    assert encoder.tokens([""])[0].tolist() == [END] + [PAD] * 35
    assert features[0, 0].abs().max() > 0


def test_padding_is_zero_and_does_not_change_the_text(encoder):
    short = PromptEncoder(text_len=6)
    long = PromptEncoder(text_len=20)
    state = short.state_dict()
    state["position"] = torch.cat([state["position"], torch.randn(14, 64)])
    long.load_state_dict(state)
    a, b = short.encode(["red hair"]), long.encode(["red hair"])
    assert torch.allclose(a.features, b.features[:, :6], atol=1e-6)
    assert b.features[:, 3:].abs().max() == 0


def test_a_long_prompt_is_cut_and_keeps_its_end():
    encoder = PromptEncoder(text_len=4)
    prompt = "red orange yellow green blue"
    assert encoder.left_out_words(prompt) == ["green", "blue"]
    assert encoder.tokens([prompt])[0].tolist()[-1] == END


def test_save_and_load_keep_vocabulary_and_features(tmp_path):
    encoder = PromptEncoder(text_dim=8, text_len=5, words=("<pad>", "<end>", "<unk>", "moon"))
    encoder.save_pretrained(tmp_path)
    again = PromptEncoder.from_pretrained(tmp_path)
    assert again.unknown_words("moon person") == ["person"]
    with torch.no_grad():
        assert torch.equal(again.encode(["moon", ""]).features, encoder.encode(["moon", ""]).features)


def test_features_learn(encoder):
    encoder.encode(["a person with red hair"]).features.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())
    assert encoder.embedding.weight.grad[PAD].abs().max() == 0


def test_one_string_is_refused(encoder):
    with pytest.raises(TypeError, match="prompts must be a list of strings, got one string"):
        encoder.encode("a person")
