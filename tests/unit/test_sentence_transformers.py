"""Folders of sentence-transformers: pooling, Dense layers and prompts against a computation without padding."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from support.encoding.encoder import QueryEncoder
from support.system.errors import UserError

CPU = torch.device("cpu")
QUERIES = ["a", "write a poem about hope", "prove it " * 40, "Bonjour, \u00e7a va?", "query: x"]
SWITCHES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
MODULES = "sentence_transformers.models."


@pytest.fixture(scope="module")
def network(demo, tmp_path_factory):
    """The folder of a tiny BERT with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("network")
    shutil.copytree(demo / "encoder", folder / "bert", ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    torch.manual_seed(0)
    config = BertConfig(vocab_size=4096, hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    BertModel(config).save_pretrained(folder / "bert")
    path = folder / "bert" / "tokenizer.json"
    special, text = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    content = json.loads(path.read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, text, special],
        "pair": [special, text, {"Sequence": {"id": "B", "type_id": 0}}, special],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    path.write_text(json.dumps(content))
    return folder / "bert"


@pytest.fixture
def folder_of(network, tmp_path):
    """A function that writes a sentence-transformers folder of that network."""

    def write(pooling, dense=(), prompts=None, kinds=None, **transformer):
        """`dense` has (in, out, has bias, activation), `prompts` those of config_sentence_transformers.json."""
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(network, folder)
        kinds = kinds or ["Transformer", "Pooling", *["Dense"] * len(dense), "Normalize"]
        paths = ["", *(f"{i}_{kind.rpartition('.')[2]}" for i, kind in enumerate(kinds[1:], start=1))]
        modules = [
            {"idx": i, "name": f"{i}", "path": path, "type": kind if "." in kind else MODULES + kind}
            for i, (path, kind) in enumerate(zip(paths, kinds, strict=True))
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        for number, layer in enumerate(dense, start=2):
            write_dense(folder / f"{number}_Dense", *layer)
        if prompts is not None:
            (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
        if transformer:
            (folder / "sentence_bert_config.json").write_text(json.dumps(transformer))
        return folder

    return write


def write_dense(folder, inputs, outputs, has_bias, activation, **config):
    folder.mkdir()
    config |= {"in_features": inputs, "out_features": outputs, "bias": has_bias, "activation_function": activation}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {"linear.weight": torch.randn(outputs, inputs)}
    if has_bias:
        weights["linear.bias"] = torch.randn(outputs)
    if has_bias:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")


def encoder_at(folder, **options):
    return QueryEncoder(str(folder), CPU, **{"dtype": "float32", "progress": False} | options)


def states_of(folder, text):
    """Hidden states (T, H) of one text by the plain library."""
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return network.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy()  # (T, H)


POOLED = {"cls": lambda x: x[0], "mean": lambda x: x.mean(0), "max": lambda x: x.max(0), "lasttoken": lambda x: x[-1]}


def test_pooling_is_what_the_folder_says_in_its_old_form_and_its_new_one(folder_of):
    for mode, pooled in POOLED.items():
        switch = mode if mode == "lasttoken" else f"{mode}_token{'s' * (mode != 'cls')}"
        old = {f"pooling_mode_{name}": name == switch for name in SWITCHES} | {"word_embedding_dimension": 24}
        for form in (old, {"pooling_mode": mode, "embedding_dimension": 24, "include_prompt": True}):
            encoder = encoder_at(folder := folder_of(form))
            embeddings, _ = encoder.embed(QUERIES)
            expected = np.stack([pooled(states_of(folder, query)) for query in QUERIES])
            np.testing.assert_allclose(embeddings, expected, atol=1e-5, err_msg=f"{form}")
            assert encoder.metadata["pooling"] == encoder.pooling == mode.removesuffix("token"), mode
            assert encoder.description.startswith(f"{encoder.pooling} pooling, as the folder says; "), mode
            assert "Normalize left out" in encoder.description, mode
    for other in ("mean", "cls", "last", "max"):
        encoder = encoder_at(folder, pooling=other)
        is_same = other == "last"
        assert encoder.pooling == other
        assert ("where the folder says lasttoken" in encoder.description) == (not is_same), other


def test_dense_layers_follow_pooling_in_their_order(folder_of):
    torch.manual_seed(1)
    linear = "torch.nn.modules.linear.Identity"
    folder = folder_of({"pooling_mode": "max"}, [(24, 40, False, linear), (40, 7, True, "torch.nn.Tanh")])
    first, second = (json.loads((folder / f"{i}_Dense" / "config.json").read_text()) for i in (2, 3))
    assert (first["bias"], second["bias"]) == (False, True)
    wide, narrow = encoder_at(folder).dense[0].weight, torch.load(folder / "3_Dense" / "pytorch_model.bin")
    encoder = encoder_at(folder)
    embeddings, _ = encoder.embed(QUERIES)
    pooled = np.stack([states_of(folder, query).max(0) for query in QUERIES])  # (Q, 24)
    expected = np.tanh(pooled @ wide.numpy().T @ narrow["linear.weight"].numpy().T + narrow["linear.bias"].numpy())
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    assert encoder.metadata["width"] == 7
    assert "then 2_Dense, 3_Dense" in encoder.description


def test_a_prompt_is_put_before_each_query_and_pooled_or_not(folder_of):
    prompts = {"prompts": {"query": "search: ", "document": "text: ", "none": None}, "default_prompt_name": "document"}
    for include in (True, False):
        folder = folder_of({"pooling_mode": "mean", "include_prompt": include}, prompts=prompts)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for options, prefix in (
            ({}, "text: "),
            ({"prompt": "query"}, "search: "),
            ({"prompt": "none"}, ""),
            ({"prefix": "mine "}, "mine "),
            ({"prefix": ""}, ""),
            ({"prefix": "text: ", "include_prompt": True}, "text: "),
        ):
            encoder = encoder_at(folder, **options)
            embeddings, _ = encoder.embed(QUERIES)
            is_left_out = bool(prefix) and not options.get("include_prompt", include)
            count = is_left_out * (1 + len(tokenizer(prefix, add_special_tokens=False)["input_ids"]))
            expected = [states_of(folder, prefix + query)[count:].mean(0) for query in QUERIES]
            np.testing.assert_allclose(embeddings, np.stack(expected), atol=1e-5, err_msg=f"{options} {include}")
            assert (encoder.metadata["prefix"], "not pooled" in encoder.description) == (prefix, is_left_out), options


def test_texts_are_lowercased_and_the_maximum_length_is_reported(folder_of):
    folder = folder_of({"pooling_mode": "mean"}, do_lower_case=True, max_seq_length=7)
    encoder = encoder_at(folder)
    upper, lower = encoder.embed(["WRITE A Poem"])[0], encoder_at(folder).embed(["write a poem"])[0]
    assert torch.equal(upper, lower)
    np.testing.assert_allclose(upper[0], states_of(folder, "write a poem").mean(0), atol=1e-5)
    assert encoder.description.endswith("max_seq_length 7 of the folder gives way to --max_length 512")


def test_what_is_not_applied_here_is_refused_by_name(folder_of):
    tanh, mean = "torch.nn.modules.activation.Tanh", {"pooling_mode": "mean"}
    dense = (24, 8, False, tanh)
    cases = [
        (({"pooling_mode": "weightedmean"},), {}, "pooling weightedmean, expected one of mean, cls, lasttoken, max"),
        (({f"pooling_mode_{name}": True for name in SWITCHES[:2]},), {}, "pooling cls and mean, expected"),
        (({"pooling_mode": ["mean", "max"]},), {}, "pooling mean and max, expected"),
        ((mean,), {"kinds": ["Transformer", "Pooling", "LSTM"]}, "modules Transformer, Pooling, LSTM"),
        ((mean,), {"kinds": ["custom_st.Transformer", "Pooling"]}, "modules custom_st.Transformer, Pooling"),
        ((mean,), {"kinds": ["Transformer", "Pooling", "Normalize", "Dense"]}, "Pooling, Normalize, Dense; expected"),
        ((mean, [(24, 8, False, "evil.Call")]), {}, "with the activation evil.Call; expected"),
        ((mean, [(24, 8, False, "torch.nn.Softmax")]), {}, "with the activation torch.nn.Softmax; expected"),
        ((mean, [(25, 8, False, tanh)]), {}, "takes vectors of width 25, mean pooling gives 24"),
        ((mean, [dense], {"default_prompt_name": "gone"}), {}, "default_prompt_name is 'gone', which is not among"),
        ((mean, [dense], {"prompts": ["x"]}), {}, "config_sentence_transformers.json cannot be used"),
        ((mean,), {"transformer_task": "fill-mask"}, "expected the last_hidden_state of feature-extraction"),
        (({"pooling_mode": 3},), {}, "1_Pooling/config.json cannot be used"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(UserError) as error:
            encoder_at(folder_of(*arguments, **options)).embed(QUERIES)
        assert message in str(error.value), (arguments, options)
        assert "\n" not in str(error.value)
    assert encoder_at(folder_of({"pooling_mode": "weightedmean"}), pooling="cls").pooling == "cls"
    folder = folder_of(mean, prompts={"prompts": {"query": "q: "}})
    with pytest.raises(UserError, match=r"--query_prompt 'passage' is not a prompt of .*; it has query"):
        encoder_at(folder, prompt="passage")
    with pytest.raises(UserError, match="--max_length 4 leaves no room after the prefix"):
        encoder_at(folder, prefix="write a poem about", max_length=4).embed(QUERIES)


def test_damaged_files_of_the_folder_are_refused_in_one_line(folder_of):
    dense = [(24, 8, False, "torch.nn.Tanh"), (8, 8, True, "torch.nn.Tanh")]
    folder = folder_of({"pooling_mode": "mean"}, dense, {"prompts": {}}, max_seq_length=9)
    files = ["modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]
    files += ["3_Dense/pytorch_model.bin", "config_sentence_transformers.json", "sentence_bert_config.json"]
    leads_out = json.dumps(
        [{"type": f"{MODULES}Transformer", "path": ""}, {"type": f"{MODULES}Pooling", "path": "../x"}]
    )
    odd = [b"", b"{", b"[" * 10**5, b"3", b"[1]", b"\x80\x04}q\x00.", b'{"prompts": 3, "bias": 3}', leads_out.encode()]
    for file in files:
        good = (folder / file).read_bytes()
        for content in [*odd, None]:
            (folder / file).unlink()
            if content is not None:
                (folder / file).write_bytes(content)
            try:
                encoder_at(folder).embed(QUERIES)
            except UserError as error:
                assert "\n" not in str(error), (file, content)
            else:  # these need not be there, or need not say anything
                may_be_missing = file in ("config_sentence_transformers.json", "sentence_bert_config.json")
                assert may_be_missing if content is None else b"prompts" in content, (file, content)
        (folder / file).write_bytes(good)
    encoder_at(folder).embed(QUERIES)


def test_embeddings_are_those_of_the_library_on_folders_that_it_writes(network, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    prompts = {"query": "search: ", "document": "text: "}
    for mode in POOLED:
        for include in (True, False):
            torch.manual_seed(1)
            layers = [Dense(24, 40, activation_function=torch.nn.Identity()), Dense(40, 7)] if include else []
            modules = [Transformer(str(network)), Pooling(24, mode, include_prompt=include), *layers]
            model = SentenceTransformer(modules=modules, device="cpu", prompts=prompts, default_prompt_name="document")
            model.tokenizer.pad_token = model.tokenizer.eos_token
            model.save_pretrained(str(tmp_path / f"{mode}_{include}"))
            for options, same in (
                ({}, {}),
                ({"prompt": "query"}, {"prompt_name": "query"}),
                ({"prefix": ""}, {"prompt": ""}),
            ):
                embeddings, _ = encoder_at(tmp_path / f"{mode}_{include}", **options).embed(QUERIES)
                expected = model.encode(QUERIES, **same)
                np.testing.assert_allclose(embeddings, expected, atol=1e-5, err_msg=f"{mode} {include} {options}")
