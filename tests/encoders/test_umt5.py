# SPDX-License-Identifier: Apache-2.0
"""The official text encoder file through transformers, and prompts through its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from official import T5_FILE, pieces, t5_state, write_tokenizer
from safetensors import safe_open
from torch import Tensor
from torch.overrides import _get_current_function_mode
from transformers import UMT5Config, UMT5EncoderModel

from talkingdit.checkpoints.weights import TensorEntry, Weights
from talkingdit.encoders.umt5 import UMT5Encoder, clean, load_tokenizer, load_umt5, umt5_config, umt5_name
from talkingdit.errors import UserError
from talkingdit.nn import bfloat16

GOLDEN = Path(__file__).parent.parent / "golden" / "wan_vae_t5.safetensors"


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(GOLDEN, "pt") as file:
        names = [key for key in file.keys() if key.startswith("t5/")]  # noqa: SIM118
        return json.loads(file.metadata()["spec"]), {key.removeprefix("t5/"): file.get_tensor(key) for key in names}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> UMT5Encoder:
    folder = tmp_path_factory.mktemp("t5")
    torch.save(t5_state(32, len(pieces())), folder / T5_FILE)
    write_tokenizer(folder / "tokenizer")
    return UMT5Encoder(load_umt5(folder / T5_FILE, torch.float32), load_tokenizer(folder / "tokenizer")).eval()


def test_the_official_numbers_come_out_of_the_official_file(
    golden: tuple[dict[str, Any], dict[str, Tensor]], tmp_path: Path
) -> None:
    spec, tensors = golden
    state = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
    torch.save(state, tmp_path / T5_FILE)
    model = load_umt5(tmp_path / T5_FILE, torch.float32)
    with torch.no_grad():
        hidden = model(input_ids=tensors["in/ids"], attention_mask=tensors["in/mask"]).last_hidden_state
    for row, wanted, valid in zip(hidden, tensors["out/hidden"], spec["valid"], strict=True):
        error = (row[:valid] - wanted[:valid]).double().square().mean().sqrt() / wanted[:valid].double().std()
        assert error < 1e-5


def test_every_released_weight_has_a_place_of_its_shape(golden: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    released = {name: tuple(shape) for name, shape in golden[0]["full_t5_keys"].items()}
    entries = {name: TensorEntry(Path(T5_FILE), name, shape, torch.bfloat16) for name, shape in released.items()}
    config = umt5_config(Weights(Path(T5_FILE), entries))
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**config))
    places = {n: tuple(v.shape) for n, v in model.state_dict().items() if n != "encoder.embed_tokens.weight"}
    assert {umt5_name(name): shape for name, shape in released.items()} == places
    assert (config["num_heads"], config["d_kv"], config["num_layers"]) == (64, 64, 24)


def test_a_folder_of_transformers_gives_the_same_features(encoder: UMT5Encoder, tmp_path: Path) -> None:
    encoder.model.save_pretrained(tmp_path)
    other = UMT5Encoder(load_umt5(tmp_path, torch.float32), encoder.tokenizer).eval()
    torch.testing.assert_close(other.encode(["the red camera"]), encoder.encode(["the red camera"]), rtol=0, atol=0)


def test_prompts_are_cleaned_like_the_official_program_does() -> None:
    assert clean("  a \n woman\t talks ") == "a woman talks"
    assert clean("red &amp;amp; blue") == "red & blue"
    assert (
        clean("l\u2019homme \u00c3\u00a9t\u00c3\u00a9") == "l'homme \u00e9t\u00e9"
    )  # quotes, and text decoded wrongly


def test_features_do_not_depend_on_the_prompts_beside_them(encoder: UMT5Encoder) -> None:
    together = encoder.encode(["a person talks to the camera", "", "the  woman smiles"])
    assert together.mask.sum(1).tolist() == [7, 1, 4]
    assert not together.features[~together.mask].any()
    for row, mask, prompt in zip(*together, ["a person talks to the camera", "", "the woman smiles"], strict=True):
        (alone,), (whole,) = encoder.encode([prompt])
        assert whole.all()
        torch.testing.assert_close(row[mask], alone, rtol=1e-5, atol=1e-5)


def test_the_rules_of_the_tokenizer_file_hold_to_the_letter(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    write_tokenizer(tmp_path / "tokenizer")
    spelled = [(f"<0x{byte:02X}>", -10.0) for byte in range(256)]
    wanted = Tokenizer(models.Unigram([*pieces(), *spelled], unk_id=2, byte_fallback=True))
    wanted.normalizer = normalizers.NFKC()
    wanted.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    wanted.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wanted.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    prompt = "a woman talks, 手指融合 \uff41"
    tokens = load_tokenizer(tmp_path / "tokenizer")(prompt).input_ids
    assert tokens == wanted.encode(prompt).ids
    assert 2 not in tokens


def test_long_prompts_are_cut_and_still_have_their_end(encoder: UMT5Encoder) -> None:
    short = UMT5Encoder(encoder.model, encoder.tokenizer, text_len=4).eval()
    features = short.encode(["a person talks to the camera"])
    torch.testing.assert_close(features, encoder.encode(["a person talks"]), rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="prompts must be a list of strings, got one string"):
        encoder.encode("a person")


@pytest.mark.parametrize(
    ("dtype", "last"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)], ids=["bfloat16", "float16"]
)
def test_the_last_product_is_float32_only_where_it_overflows(
    tmp_path: Path, dtype: torch.dtype, last: torch.dtype
) -> None:
    torch.save(t5_state(32, 10), tmp_path / T5_FILE)
    model = load_umt5(tmp_path / T5_FILE, dtype)
    dtypes = {name.split(".")[-2]: value.dtype for name, value in model.named_parameters()}
    assert dtypes.pop("wo") == last
    assert set(dtypes.values()) == {dtype}
    assert model(input_ids=torch.tensor([[3, 1]])).last_hidden_state.isfinite().all()


def test_prompts_on_a_processor_without_bfloat16_are_as_near_to_the_truth(
    encoder: UMT5Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept on the host for the card's sake, the encoder stays in bfloat16, and multiplies in what is fast there."""
    torch.save(t5_state(32, len(pieces())), tmp_path / T5_FILE)
    short = UMT5Encoder(load_umt5(tmp_path / T5_FILE, torch.bfloat16), encoder.tokenizer).eval()
    truth = encoder.encode(["a person talks"]).features
    errors, seen = {}, []
    short.model.encoder.block[0].layer[0].register_forward_hook(
        lambda *_: seen.append(isinstance(_get_current_function_mode(), bfloat16._Widened))
    )
    for instructions in ("avx2", "avx512_bf16"):
        monkeypatch.setattr(bfloat16, "_instructions", lambda found=instructions: found)
        features = short.encode(["a person talks"]).features
        assert features.dtype == torch.bfloat16
        errors[instructions] = float((features - truth).norm() / truth.norm())
    assert seen == [True, False]
    assert 0 < errors["avx2"] < 1.5 * errors["avx512_bf16"] < 0.1


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    state = t5_state(32, 10)
    del state["blocks.1.ffn.fc2.weight"]
    torch.save(state, tmp_path / T5_FILE)
    with pytest.raises(UserError, match=r"lacks 1 of 22 weights: encoder\.block\.1\.layer\.1\.DenseReluDense\.wo"):
        load_umt5(tmp_path / T5_FILE, torch.float32)
    del state["token_embedding.weight"]
    torch.save(state, tmp_path / T5_FILE)
    with pytest.raises(UserError, match=r"enc-bf16\.pth: not the weights of a UMT5 encoder"):
        load_umt5(tmp_path / T5_FILE, torch.float32)
    with pytest.raises(UserError, match="the tokenizer is missing"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: the tokenizer does not load"):
        load_tokenizer(tmp_path / "empty")


def test_words_that_are_cut_off_are_told(encoder: UMT5Encoder) -> None:
    """Against the tokens that are fed: what is told and what is kept make up the prompt."""
    short = UMT5Encoder(encoder.model, encoder.tokenizer, text_len=9)
    kept = encoder.tokenizer
    for prompt in ("a person talks", " ".join(["person"] * 8), ""):
        assert short.left_out_words(prompt) == []
    assert short.left_out_words(" ".join(["person"] * 8 + ["woman", "smiles"])) == ["woman", "smiles"]
    # A word of several tokens that is cut within is not whole, so it counts.
    prompt = " ".join(["person"] * 7 + ["xyzw", "red"])
    assert len(kept(prompt)["input_ids"]) > 9
    assert short.left_out_words(prompt) == ["xyzw", "red"]
    # A script without white space: every character is a word.
    assert short.left_out_words(" ".join(["person"] * 8) + " 画面 red") == ["画", "面", "red"]
