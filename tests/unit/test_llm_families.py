"""What differs between families of LLMs is set as their makers mean it, or refused by name as the LLM is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedTokenizerFast, WhisperFeatureExtractor

from listen_dist.data.mixture import SampleRef
from listen_dist.engine.assembly import Parts, assemble
from listen_dist.errors import ListenError
from listen_dist.model_sizes import decoder_layers, llm_size
from listen_dist.models import families as family
from listen_dist.models.llm import load_llm
from listen_dist.schema import ConfigError, ModelConfig
from tests import families, tiny

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]


def parts_of(world: tiny.Tiny, folder: Path, *words: str) -> Parts:
    return assemble(world.config(f"model.llm={folder}", "parallel.llm=replicated", *words), torch.device("cpu"))


@pytest.mark.parametrize("name, message", [
    ("bart", "depends on the padding in front of a clip"), ("roberta", "sees tokens that are still to come"),
    ("ctrl", "can't generate from embeddings"), ("cpmant", "takes no embeddings"), ("xlstm", "takes no a mask"),
    ("recurrent_gemma", "keeps its state from one batch to the next"),
])
def test_a_family_that_cannot_work_is_refused_by_name(tiny_world: tiny.Tiny, tmp_path: Path, name: str,
                                                      message: str) -> None:
    families.build(tmp_path, name)
    with pytest.raises(ListenError, match=message) as refused:
        parts_of(tiny_world, tmp_path)
    assert repr(AutoConfig.from_pretrained(tmp_path).model_type) in str(refused.value)


def test_attention_is_what_the_makers_mean(caplog: pytest.LogCaptureFixture) -> None:
    def taken(kind: str, asked: str, **words: object) -> str:
        config = AutoConfig.for_model(kind, **words)
        return family.attention_of(config, family.model_class(config, "x"), ModelConfig(attention=asked))  # type: ignore[arg-type]

    caplog.set_level("INFO")
    assert taken("llama", "sdpa") == "sdpa" and taken("llama", "eager") == "eager" and not caplog.messages
    assert taken("gemma2", "sdpa") == "eager" and "caps its attention scores" in caplog.text
    assert taken("gemma2", "sdpa", attn_logit_softcapping=None) == "sdpa"
    assert taken("falcon", "eager", alibi=True) == "sdpa" and taken("falcon", "eager", alibi=False) == "eager"
    assert taken("gptj", "sdpa") == "eager"
    with pytest.raises(ConfigError, match="model.attention = 'flash_attention_2': BloomForCausalLM has none"):
        taken("bloom", "flash_attention_2")


def test_layers_are_found_beside_more_experts(tmp_path: Path) -> None:
    families.build(tmp_path, "qwen3_moe")
    llm = load_llm(ModelConfig(llm=str(tmp_path)))
    assert len(decoder_layers(llm)) == 2 == llm_size(str(tmp_path)).layers
    assert [type(block).__name__ for block in family.expert_blocks(llm)] == ["Qwen3MoeSparseMoeBlock"] * 2


def test_an_llm_without_attention_heads_has_a_size(tmp_path: Path) -> None:
    """A run's summary and the planner ask for it before the first step."""
    AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=50).save_pretrained(tmp_path)
    size = llm_size(str(tmp_path))
    assert (size.layers, size.width, size.vocabulary) == (2, 32, 50) and size.attention_width > 0


def test_no_layer_drops_out_while_it_is_recomputed(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    families.build(tmp_path, "opt")
    losses = []
    for on in (True, False):
        parts = parts_of(tiny_world, tmp_path, f"model.checkpointing={on}")
        batch = parts.reader(parts.config.data.train, with_targets=True)[[SampleRef(0, 0, row) for row in range(3)]]
        losses.append(parts.model.train()(batch, 3).row_loss.tolist())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_checkpointing_that_would_do_nothing_is_refused(tmp_path: Path) -> None:
    families.build(tmp_path, "gpt_neox_japanese")
    with pytest.raises(ConfigError, match="model.checkpointing = True: GPTNeoXJapaneseForCausalLM"):
        load_llm(ModelConfig(llm=str(tmp_path), checkpointing=True))


def test_beams_of_an_llm_with_a_state_are_refused_at_load(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    families.build(tmp_path, "lfm2")
    with pytest.raises(ConfigError, match="eval.beams: Lfm2ForCausalLM"):
        parts_of(tiny_world, tmp_path, "eval.beams=2")


def test_a_pad_beyond_the_embedding_does_no_harm_and_an_eos_is_named(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    families.build(tmp_path, "llama")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    parts = parts_of(tiny_world, tmp_path)
    assert parts.model.frame.pad == parts.model.frame.eos == tokenizer.eos_token_id
    batch = parts.reader(parts.config.data.train, with_targets=False)[[SampleRef(0, 0, 0), SampleRef(0, 0, 1)]]
    assert len(parts.model.eval().generate(batch, 3, [1, 6])[0]) == 2
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ListenError, match=r"tokenizer gives the ids \[\d+\] \(EOS\), but the embedding has \d+ rows"):
        parts_of(tiny_world, tmp_path)


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    families.build(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ListenError, match="its files lack 9 weights of LlamaForCausalLM"):
        load_llm(ModelConfig(llm=str(tmp_path)))


def test_an_encoder_and_a_preprocessor_of_different_models_are_named(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    tiny.build_encoder(tmp_path)
    WhisperFeatureExtractor(feature_size=128).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"config.json says 80 mel bins .* preprocessor_config.json 128"):
        assemble(tiny_world.config(f"model.speech_encoder={tmp_path}"), torch.device("cpu"))
