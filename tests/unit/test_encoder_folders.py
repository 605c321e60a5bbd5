"""Folders of other formats are refused with what to do, and what is never used of an encoder may be missing."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config, T5EncoderModel, T5Model

from support.encoding import huggingface
from support.encoding.encoder import QueryEncoder
from support.encoding.huggingface import find_encoder
from support.system.errors import UserError

QUERIES = ["write a poem about hope", "Who ruled Rome?"]


def embed(folder):
    encoder = QueryEncoder(str(folder), torch.device("cpu"), dtype="float32", progress=False)
    return encoder.embed(QUERIES)[0], encoder.description


@pytest.fixture
def folder(demo, tmp_path):
    """A copy of the demo's encoder."""
    return shutil.copytree(demo / "encoder", tmp_path / "encoder")


def refused(folder):
    with pytest.raises(UserError) as error:
        embed(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_encoder_saved_without_its_decoder_loads_but_not_without_its_own_weights(folder):
    config = T5Config(vocab_size=4096, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for kind in (T5EncoderModel, T5Model):
        torch.manual_seed(0)
        network = kind(config).eval()
        network.save_pretrained(folder)
        encoder = network if kind is T5EncoderModel else network.get_encoder()
        with torch.no_grad():
            states = [encoder(**tokenizer(query, return_tensors="pt")).last_hidden_state[0] for query in QUERIES]
        expected = torch.stack([x.mean(0) for x in states])
        torch.testing.assert_close(embed(folder)[0], expected, atol=1e-5, rtol=1e-5)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.k.weight"], weights["decoder.final_layer_norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "1 missing (encoder.block.1.layer.0.SelfAttention.k.weight)" in refused(folder)


def test_other_formats_are_named_with_what_to_do(folder, tmp_path):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/dev/zero", "peft_type": "LORA"}')
    assert "merge it into its base model with `PeftModel.from_pretrained(BASE, ADAPTER)" in refused(folder)
    (folder / "adapter_config.json").unlink()
    content = (folder / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "2_Dense/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        assert f"{folder / name} is a Git LFS pointer in the place of the file; run `git lfs pull`" in refused(folder)
        (folder / name).write_bytes(content)
    embed(folder)
    (folder / "model.safetensors").rename(tmp_path / "model.gguf")
    assert "gguf_file=NAME" in refused(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").rename(folder / "model.gguf")
    assert "gguf_file=NAME" not in refused(folder)  # there are the weights of a Dense layer still
    shutil.rmtree(folder / "2_Dense")
    assert "gguf_file=NAME" in refused(folder)


def test_code_of_a_folder_is_not_run_and_the_run_says_so(folder):
    (folder / "evil.py").write_text("raise SystemExit('the folder ran code')")
    config = json.loads((folder / "config.json").read_text())
    code = {"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config | code))
    expected, description = embed(folder)
    assert description.endswith("its own code, evil.Evil, is not run, but that of transformers")
    (folder / "config.json").write_text(json.dumps(config | code | {"model_type": "evil"}))
    assert "it needs code of its own (evil.Evil), and no remote code is run here" in refused(folder)
    (folder / "config.json").write_text(json.dumps(config))
    again, description = embed(folder)
    np.testing.assert_array_equal(again, expected)
    assert "code" not in description


def test_a_sentencepiece_tokenizer_names_the_packages_that_it_needs(folder, monkeypatch):
    (folder / "tokenizer.json").rename(folder / "spm.model")  # of which the library makes an empty tokenizer
    for installed, is_named in (
        (set(), True),
        ({"sentencepiece"}, True),
        ({"sentencepiece", "google.protobuf"}, False),
    ):
        monkeypatch.setattr(huggingface, "find_spec", lambda name, found=installed: name if name in found else None)
        message = refused(folder)
        assert ("`pip install sentencepiece protobuf`" in message) == is_named, installed
        assert ("its tokenizer has no vocabulary" in message) != is_named, installed


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "1_Pooling/config.json"])
def test_what_is_no_file_in_a_folder_is_refused_before_it_is_opened(folder, name):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    for put in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        put(path)
        with pytest.raises(UserError, match=f"{path} is not a file; replace it by one"):
            find_encoder(str(folder))
        path.unlink()
