"""Encoders: pooling, layers and padding against one query at a time, and folders that are not an encoder."""

import contextlib
import copy
import json
import pickle
import platform
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2Model,
    MambaConfig,
    MambaModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
    XLMConfig,
    XLMModel,
)

from support.encoding.batching import plan_batches, tokenize
from support.encoding.encoder import QueryEncoder, pool
from support.encoding.huggingface import (
    PackedLinear,
    encoder_fingerprint,
    find_encoder,
    hidden_states,
    load_encoder,
    longest_input,
    pack_weights,
    pick_dtype,
)
from support.system.errors import UserError

CPU = torch.device("cpu")
QUERIES = [
    "a",
    "write a poem about hope",
    "prove it " * 40,
    "Bonjour, \u00e7a va?",
    "\u4f60\u597d",
    "x" * 300,
    "b",
    " ",
]


@pytest.fixture(scope="module")
def encoders(demo, tmp_path_factory):
    """Encoder folders: the demo's Qwen2, the same with a left-padding tokenizer, a tiny BERT and a tiny GPT-2."""
    base = tmp_path_factory.mktemp("encoders")
    left = base / "left"
    shutil.copytree(demo / "encoder", left)
    config = json.loads((left / "tokenizer_config.json").read_text())
    (left / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": "left"}))
    torch.manual_seed(0)
    small = {"vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    for name, network in (("bert", BertModel(BertConfig(**small))), ("gpt2", GPT2Model(GPT2Config(**small)))):
        shutil.copytree(demo / "encoder", base / name, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
        network.save_pretrained(base / name)
    return {"qwen2": demo / "encoder", "left": left, "bert": base / "bert", "gpt2": base / "gpt2"}


def encoder_at(folder, **options):
    """The encoder in a folder, in float32 and without a cache."""
    return QueryEncoder(str(folder), CPU, **{"dtype": "float32", "progress": False} | options)


def embed(folder, queries=QUERIES, **options):
    """Embeddings (Q, H) of queries by the encoder in a folder."""
    embeddings, num_encoded = encoder_at(folder, **options).embed(queries)
    assert num_encoded == len(queries)
    return embeddings


def alone(folder, query, pooling, max_length=512):
    """The embedding of one query by the plain library, without a batch and so without padding."""
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(query, return_tensors="pt")["input_ids"][:, :max_length]
    with torch.no_grad():
        states = network.eval()(ids).last_hidden_state[0]  # (T, H)
    return states[-1] if pooling == "last" else states.mean(0)


def test_embeddings_equal_each_query_alone(encoders):
    ways = [(name, pooling, 512) for name in encoders for pooling in ("mean", "last")]
    for name, pooling, max_length in (*ways, ("qwen2", "mean", 5)):  # the last cuts most queries
        got = embed(encoders[name], pooling=pooling, max_length=max_length)
        assert got.dtype == torch.float32
        expected = torch.stack([alone(encoders[name], query, pooling, max_length) for query in QUERIES])
        torch.testing.assert_close(
            got, expected, atol=1e-5, rtol=1e-4, msg=lambda message, name=name: f"{name}: {message}"
        )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="weights are packed on x86 processors")
def test_packed_weights_give_the_same_states_also_where_an_encoder_uses_them_itself():
    torch.manual_seed(0)
    network = MambaModel(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=8))
    network.eval().requires_grad_(False)
    ids = torch.randint(50, (3, 7))  # (B, T)
    before = hidden_states(network, ids, torch.ones_like(ids))[None]
    pack_weights(network)
    assert any(isinstance(part, PackedLinear) for part in copy.deepcopy(network).modules())
    for packed in (network, pickle.loads(pickle.dumps(network))):
        after = hidden_states(packed, ids, torch.ones_like(ids))[None]
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    linear, x = torch.nn.Linear(4, 3).requires_grad_(False), torch.randn(2, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):  # of a caller, which other layers follow
        got = PackedLinear(linear.weight, linear.bias)(x)
    torch.testing.assert_close(got, linear(x.float()))


def states_of(folder, query):
    """The hidden states (layers + 1, T, H) of one query by the plain library: token embeddings, then each layer's."""
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        states = network.eval()(**tokenizer(query, return_tensors="pt"), output_hidden_states=True).hidden_states
    return torch.cat(states)  # (layers + 1, T, H)


def test_layers_are_those_of_the_library_and_are_concatenated(encoders):
    for name in ("qwen2", "bert", "gpt2"):
        states = [states_of(encoders[name], query) for query in QUERIES]
        for layers, pooling in (([1], "mean"), ([1], "last"), ([1, 2], "mean+last"), ([2], "mean+last")):
            ways = [lambda s: s.mean(0), lambda s: s[-1]] if "+" in pooling else [lambda s: s.mean(0)]
            ways = [lambda s: s[-1]] if pooling == "last" else ways
            expected = [torch.cat([way(each[layer]) for layer in layers for way in ways]) for each in states]
            got = embed(encoders[name], layers=layers, pooling=pooling)
            torch.testing.assert_close(got, torch.stack(expected), atol=1e-5, rtol=1e-4, msg=f"{name} {layers}")
        assert torch.equal(embed(encoders[name], layers=[2]), embed(encoders[name])), name  # the last is the default


def test_layers_that_are_not_read_are_not_computed(encoders):
    for layers, left in (([1], 1), ([1, 2], 2), (None, 2)):
        encoder = encoder_at(encoders["qwen2"], layers=layers)
        assert len(encoder.loaded[1].layers) == left, layers
        assert len(encoder.trainable(None, None).loaded[1].layers) == left, layers


def test_layers_that_there_are_not_or_that_dense_layers_follow_are_refused(encoders, tmp_path):
    with pytest.raises(UserError, match=r"the encoder has the layers 1 to 2, not 3"):
        encoder_at(encoders["qwen2"], layers=[1, 3])
    shutil.copytree(encoders["gpt2"], tmp_path / "unstated")
    config = json.loads((tmp_path / "unstated/config.json").read_text())
    (tmp_path / "unstated/config.json").write_text(json.dumps({k: v for k, v in config.items() if "n_layer" not in k}))
    with pytest.raises(UserError, match="does not state how many layers"):
        encoder_at(tmp_path / "unstated", layers=[1])


def test_layers_that_are_not_the_hidden_states_of_the_library_are_refused(encoders, tmp_path):
    small = {"vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    shared = AlbertModel(AlbertConfig(**small, embedding_size=16, intermediate_size=64))
    separate = XLMModel(XLMConfig(n_words=4096, emb_dim=32, n_layers=3, n_heads=2, pad_index=0))
    between = DebertaV2Model(DebertaV2Config(**small, conv_kernel_size=3, conv_act="gelu", intermediate_size=64))
    for name, network in (("shared", shared), ("separate", separate), ("between", between)):
        ignored = shutil.ignore_patterns("config.json", "*.safetensors")
        shutil.copytree(encoders["bert"], tmp_path / name, ignore=ignored)
        network.save_pretrained(tmp_path / name)
        assert embed(tmp_path / name).isfinite().all(), name
        with pytest.raises(UserError, match=r"cannot be pooled one by one; leave out --layers"):
            encoder_at(tmp_path / name, layers=[1, 2], cache_layers=[3]).embed(["a"])


def test_left_and_right_padding_tokenizers_give_the_same_bits(encoders):
    got = [embed(encoders[name]) for name in ("qwen2", "left")]
    assert torch.equal(*got)
    assert AutoTokenizer.from_pretrained(encoders["left"]).padding_side == "left"  # the fixture does what it says


def test_embeddings_do_not_depend_on_the_order_of_the_queries(encoders):
    for tokens in (2048, 16):
        encoder = encoder_at(encoders["qwen2"], tokens_per_batch=tokens)
        (forward, _), (backward, _) = encoder.embed(QUERIES), encoder.embed(QUERIES[::-1])
        assert torch.equal(forward, backward.flip(0))


def test_embeddings_hardly_depend_on_the_batches(encoders):
    expected = embed(encoders["qwen2"])
    for tokens in (1, 16, 100):
        got = embed(encoders["qwen2"], tokens_per_batch=tokens)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_the_dtype_is_one_that_the_processor_multiplies_fast(monkeypatch):
    for capability, expected in (
        ("amx_bf16", "bfloat16"),
        ("avx512_bf16", "bfloat16"),
        ("avx2", "float32"),
        (None, "float32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=capability: {name: True} if name else {})
        assert pick_dtype("auto", CPU) == expected, capability
        assert pick_dtype("float16", CPU) == "float16"
    assert pick_dtype("auto", torch.device("mps")) == "float32"


def test_a_maximum_length_without_room_for_a_word_is_refused(encoders, tmp_path):
    folder = tmp_path / "special"
    shutil.copytree(encoders["gpt2"], folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    token, text = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [token, text, token],
        "pair": [token, text, {"Sequence": {"id": "B", "type_id": 0}}, token],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert [len(ids) for ids in tokenize(["word " * 9], tokenizer, 3)] == [3]
    with pytest.raises(UserError, match="--max_length 2 leaves no room beside 2 special tokens"):
        tokenize(["word " * 9], tokenizer, 2)


def test_learned_positions_limit_the_length(encoders, tmp_path):
    without_network = shutil.ignore_patterns("config.json", "*.safetensors")
    shutil.copytree(encoders["bert"], tmp_path / "roberta", ignore=without_network)
    sizes = {"vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaModel(RobertaConfig(**sizes, max_position_embeddings=66)).save_pretrained(tmp_path / "roberta")
    for folder, longest in ((encoders["bert"], 512), (tmp_path / "roberta", 64)):  # its positions start at 2
        encoder = encoder_at(folder, max_length=10**5)
        assert longest_input(*encoder.loaded) == encoder.tokens_read == longest
        embeddings, _ = encoder.embed(["word " * 2000])
        assert embeddings.isfinite().all()
        assert encoder.metadata["max_length"] == longest
        assert encoder_at(folder, max_length=7).tokens_read == 7
    tokenizer, network = load_encoder(encoders["qwen2"], CPU, torch.float32)
    for stated in ("512", -1, 0, 10**30):  # a tokenizer that states no sensible limit sets none
        tokenizer.model_max_length = stated
        assert longest_input(tokenizer, network) == 1024, stated


def test_a_pad_token_outside_the_vocabulary_is_harmless_and_a_foreign_tokenizer_is_refused(encoders):
    encoder = encoder_at(encoders["gpt2"])
    expected, _ = encoder.embed(QUERIES)
    tokenizer, network = encoder.loaded
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    network.resize_token_embeddings(tokenizer.pad_token_id)
    torch.testing.assert_close(encoder.embed(QUERIES)[0], expected)
    network.resize_token_embeddings(20)
    with pytest.raises(UserError, match="the encoder's vocabulary has 20: they do not belong together"):
        encoder.embed(QUERIES)


def test_the_width_is_that_of_the_output_and_not_of_the_configuration(encoders):
    encoder = encoder_at(encoders["gpt2"])
    encoder.loaded[1].config.hidden_size = 999
    assert encoder.embed(QUERIES)[0].shape == (len(QUERIES), 32)
    assert encoder.metadata["width"] == 32


def test_a_network_that_does_not_encode_text_is_refused_in_one_line(encoders, tmp_path):
    shutil.copytree(encoders["bert"], tmp_path / "vit", ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**sizes, image_size=32)).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="ViTModel cannot encode 6 texts of 300 tokens"):
        embed(tmp_path / "vit")


def test_an_encoder_is_loaded_frozen_and_a_tokenizer_without_pad_token_takes_eos(encoders):
    assert AutoTokenizer.from_pretrained(encoders["gpt2"]).pad_token is None
    tokenizer, network = load_encoder(encoders["gpt2"], CPU, torch.float32)
    assert tokenizer.pad_token == "<|endoftext|>"
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_half_precision_is_pooled_in_float32(encoders):
    full, half = (embed(encoders["qwen2"], dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert half.dtype == torch.float32
    assert not torch.equal(half, half.bfloat16().float())  # a mean taken in bfloat16 would be one
    torch.testing.assert_close(half, full, atol=0.1, rtol=0.1)


def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [99.0, 99.0]], [[5.0, 1.0], [1.0, 1.0], [0.0, 4.0]]])  # (2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(hidden, mask, "mean").tolist() == [[2.0, 4.0], [2.0, 2.0]]
    assert pool(hidden, mask, "last").tolist() == [[3.0, 6.0], [0.0, 4.0]]
    assert pool(hidden, mask, "cls").tolist() == [[1.0, 2.0], [5.0, 1.0]]
    assert pool(hidden, mask, "max").tolist() == [[3.0, 6.0], [5.0, 4.0]]
    # Without the first token, or without the first two, after which the first query has none left.
    assert pool(hidden, mask, "mean", 1).tolist() == [[3.0, 6.0], [0.5, 2.5]]
    assert pool(-hidden, mask, "max", 1).tolist() == [[-3.0, -6.0], [0.0, -1.0]]
    assert pool(hidden, mask, "cls", 2).tolist() == [[1.0, 2.0], [0.0, 4.0]]
    assert pool(hidden, mask, "mean", 2).tolist() == [[2.0, 4.0], [0.0, 4.0]]


@given(st.lists(st.integers(1, 600), max_size=80), st.integers(1, 1000))
def test_batches_hold_each_query_once_within_the_budget(lengths, budget):
    lengths = np.array(lengths, dtype=np.int64)
    batches = plan_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= budget


def test_the_fingerprint_depends_on_the_content_and_not_on_the_place(encoders, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(encoders["qwen2"], copy)
    before = encoder_fingerprint(copy)
    assert before == encoder_fingerprint(encoders["qwen2"])
    assert before != encoder_fingerprint(encoders["left"])
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert encoder_fingerprint(copy) != before


def test_missing_weights_are_refused(encoders, tmp_path):
    deeper = tmp_path / "deeper"
    shutil.copytree(encoders["qwen2"], deeper)
    config = json.loads((deeper / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (deeper / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"do not fill the encoder"):
        load_encoder(deeper, CPU, torch.float32)


def test_corrupt_encoder_files_are_refused_in_one_line(encoders, tmp_path):
    folder = tmp_path / "corrupt"
    shutil.copytree(encoders["qwen2"], folder)
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        good = (folder / file).read_bytes()
        for content in (b"", b"{", b"\x80\x04}q\x00."):
            (folder / file).write_bytes(content)
            with pytest.raises(UserError) as error:
                load_encoder(folder, CPU, torch.float32)
            assert "could not be loaded as a Hugging Face encoder" in str(error.value), (file, content)
            assert "\n" not in str(error.value)
        (folder / file).write_bytes(good)
    load_encoder(folder, CPU, torch.float32)


def test_a_missing_folder_is_not_taken_for_a_hub_id(tmp_path):
    with pytest.raises(UserError, match=r"hf download Qwen/Qwen2-0\.5B --local-dir"):
        find_encoder("../model/no-such-model")
    with pytest.raises(UserError, match=r"lacks config.json, weights \(\*.safetensors\), a tokenizer"):
        find_encoder(str(tmp_path))


def test_a_hub_id_is_downloaded_and_an_offline_hub_is_one_line(encoders, monkeypatch):
    requested = []

    def snapshot_download(hub_id, **options):
        requested.append(hub_id)
        if hub_id == "owner/gone":
            raise RuntimeError("the hub says\nno")
        return str(encoders["qwen2"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_encoder("owner/name-0.5B") == encoders["qwen2"]
    with pytest.raises(
        UserError, match=r"owner/gone is not a local folder and could not be downloaded .* the hub says"
    ):
        find_encoder("owner/gone")
    for path in ("./owner/name", "/owner/name", "name", "a/b/c", str(encoders["qwen2"])):
        with contextlib.suppress(UserError):
            find_encoder(path)
    assert requested == ["owner/name-0.5B", "owner/gone"]
