"""weights/pretrained.py: loaded weights give the logits that transformers gives."""

import json
import os
import pickle
import re
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from helpers import gpt2_tokenizer, logit_error, save_random_run, transformers_gpt2
from safetensors.torch import load_file, save_file

import nanococonut
from nanococonut.config import TrainConfig
from nanococonut.curriculum import METHODS
from nanococonut.runtime.errors import UserError
from nanococonut.tokenizer import Tokenizer
from nanococonut.training.setup import init_model, load_config
from nanococonut.weights import checkpoint, pretrained
from nanococonut.weights.export import export
from nanococonut.weights.pretrained import (
    CONFIG_KEYS,
    WeightsUnavailable,
    load_gpt2,
    resolve_weights,
)

SHAPES = {  # vocab_size, n_positions, n_layer, n_head, n_embd
    "one layer": (61, 40, 1, 1, 16),
    "heads of 8": (97, 32, 2, 3, 24),
    "heads of 64": (131, 32, 3, 2, 128),
}


@pytest.fixture
def theirs(tmp_path):
    model = transformers_gpt2(SHAPES["heads of 64"])
    model.save_pretrained(tmp_path / "theirs")
    return model


@torch.no_grad()
def greedy(logits_of, ids, n=20):
    for _ in range(n):
        ids = torch.cat([ids, logits_of(ids)[:, -1:].argmax(-1)], dim=1)
    return ids.tolist()


# ---- weights in


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_and_greedy_text_equal_transformers(tmp_path, shape):
    """A Conv1D that is not transposed, or the wrong GELU, changes the logits."""
    theirs = transformers_gpt2(shape)
    theirs.save_pretrained(tmp_path)
    ours = nanococonut.load_pretrained(str(tmp_path))
    assert ours.config.vocab_size == shape[0] and ours.wte.weight.dtype == torch.float32
    assert logit_error(theirs, ours) < 1e-5
    start = torch.randint(shape[0], (2, 5))
    assert greedy(lambda ids: theirs(ids).logits, start) == greedy(ours.eval(), start)


@pytest.mark.network
def test_gpt2_itself_equals_transformers(monkeypatch):
    """The hub's own files load, not only those that our tests write."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    ours = nanococonut.load_pretrained("gpt2").eval()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(resolve_weights("gpt2")).eval()
    assert ours.config.vocab_size == 50257
    assert logit_error(theirs, ours) < 1e-5
    start = torch.randint(50257, (2, 5))
    assert greedy(lambda ids: theirs(ids).logits, start) == greedy(ours, start)


def rewrite(file, change):
    """Change the tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_other_spellings_of_the_same_weights(tmp_path, theirs):
    """Old files lack the prefix, store masks and a tied head, or are in half precision."""
    file = tmp_path / "theirs" / "model.safetensors"

    def respell(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    rewrite(file, respell)
    for path in (file.parent, file):
        assert logit_error(theirs, load_gpt2(path)) < 1e-5

    rewrite(file, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    half = load_gpt2(file.parent)
    assert half.wte.weight.dtype == torch.float32
    theirs.load_state_dict({k: v.bfloat16().float() for k, v in theirs.state_dict().items()})
    assert logit_error(theirs, half) < 1e-5


def test_special_tokens_start_as_released_code(tmp_path):
    """New embeddings copy the one of "<<"; random ones would not match the released code."""
    transformers_gpt2((50257, 16, 1, 1, 4)).save_pretrained(tmp_path)
    wte = load_gpt2(tmp_path, vocab_size=50260).wte.weight
    assert wte[50257:].equal(wte[16791].expand(3, -1)) and not wte[16790].equal(wte[16791])
    assert len(load_gpt2(tmp_path).wte.weight) == 50257


TINY = dict(n_layer=1, n_head=1, n_embd=4, block_size=8, c_thought=0)


@pytest.mark.parametrize("method", METHODS)
def test_special_rows_exist_only_if_used(method):
    """The softmax of CoT and others included unused tokens; the released code has 50,257."""
    config = TrainConfig(method=method, **TINY)
    without = ("cot", "no_cot", "icot", "coconut_no_thought")
    n = 50257 if method in without else 50260
    assert init_model(config, gpt2_tokenizer()).config.vocab_size == n


def test_coconut_after_cot_copies_the_special_rows(tmp_path):
    """Rows made at the start of CoT had drifted from "<<" by the start of Coconut."""
    gpt2 = gpt2_tokenizer()
    cot = save_random_run(tmp_path / "cot", gpt2, "cot", n_thoughts=0)
    config = TrainConfig(init_from=str(tmp_path / "cot"), block_size=96)
    wte = init_model(config, gpt2).wte.weight
    assert wte[:50257].equal(cot.wte.weight) and wte[50257:].equal(wte[16791].expand(3, -1))
    coconut = save_random_run(tmp_path / "coconut", gpt2)
    config = replace(config, init_from=str(tmp_path / "coconut"), method="no_cot")
    assert init_model(config, gpt2).wte.weight.equal(coconut.wte.weight[:50257])


def test_word_level_model_has_all_special_rows(tokenizer):
    """The results of small models were made with these rows and need them to be reproduced."""
    for method in METHODS:
        model = init_model(TrainConfig(method=method, tokenizer="words", **TINY), tokenizer)
        assert model.config.vocab_size == tokenizer.vocab_size


def released(theirs):
    """Return the state dict of the released code's Coconut around this GPT-2."""
    state = {f"base_causallm.{key}": value for key, value in theirs.state_dict().items()}
    return state | {"embedding.weight": theirs.transformer.wte.weight.data}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_checkpoint_loads(tmp_path, theirs, prefix):
    """The released code saves its wrapper's names, and DDP adds a prefix."""
    file = tmp_path / "checkpoint_33"
    torch.save({prefix + key: value for key, value in released(theirs).items()}, file)
    shutil.copy(tmp_path / "theirs/config.json", tmp_path)
    assert logit_error(theirs, load_gpt2(file, vocab_size=131)) < 1e-5


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def save_nanogpt(file, theirs, prefix="", bias=True, **more):
    """Write this GPT-2 as nanoGPT's train.py does: linears as nn.Linear, masks, a tied head."""
    state = {}
    for name, p in theirs.state_dict().items():
        is_conv1d = name.endswith(pretrained.CONV1D_WEIGHTS)
        if bias or not name.endswith(".bias"):
            state[prefix + name] = p.t() if is_conv1d else p
    state[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    c = theirs.config
    args = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "dropout": 0.1}
    args |= {"block_size": c.n_positions, "vocab_size": c.vocab_size, "bias": bias}
    saved = {"model": state, "model_args": args, "optimizer": {"state": {}}, "iter_num": 7}
    torch.save(saved | {"best_val_loss": torch.tensor(3.2), "config": {"lr": 0.1}} | more, file)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_checkpoint_equals_transformers(tmp_path, theirs, prefix, bias):
    """ckpt.pt was refused as "not a state dict", or a config.json was missing for it."""
    if not bias:
        for name, p in theirs.named_parameters():
            p.data.mul_(not name.endswith(".bias"))
    save_nanogpt(tmp_path / "ckpt.pt", theirs, prefix, bias)
    for path in (tmp_path, tmp_path / "ckpt.pt"):
        assert logit_error(theirs, nanococonut.load_pretrained(str(path))) < 1e-5


@torch.no_grad()
def test_padded_vocabulary_of_nanogpt_is_cut(tmp_path):
    """nanoGPT trains 50,304 tokens, which fit neither GPT-2's nor our vocabulary."""
    theirs = transformers_gpt2((50304, 16, 1, 1, 4))
    save_nanogpt(tmp_path / "ckpt.pt", theirs)
    wte = theirs.transformer.wte.weight
    for method, n in (("cot", 50257), ("coconut", 50260)):
        config = TrainConfig(method=method, init_from=str(tmp_path / "ckpt.pt"), block_size=16)
        ours = init_model(config, gpt2_tokenizer()).eval()
        idx = torch.randint(50257, (2, 16))
        torch.testing.assert_close(ours(idx)[..., :50257], theirs(idx).logits[..., :50257])
        assert ours.wte.weight[50257:].equal(wte[16791].expand(n - 50257, -1))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"config": Bomb()}, "nothing else is unpickled"),
        ({"model": None}, "not a state dict of names and tensors"),
        ({"model": {"wte.weight": torch.eye(3).to_sparse()}}, "not a state dict of names"),
        ({"model": {"wte.weight": torch.empty(3, 3, device="meta")}}, "not a state dict of names"),
        ({"model_args": dict.fromkeys((*CONFIG_KEYS, "use_relu"), 3)}, "model_args have use_relu"),
        ({"model_args": [3]}, "no valid block_size, n_layer"),
        ({"model_args": {"n_layer": 3, "n_head": 2, "n_embd": 128}}, "no valid block_size"),
    ],
)
def test_bad_nanogpt_checkpoint_is_refused(tmp_path, monkeypatch, theirs, change, words):
    """A file from the internet must neither run code nor end in a traceback."""
    monkeypatch.chdir(tmp_path)
    save_nanogpt(tmp_path / "ckpt.pt", theirs, **change)
    with pytest.raises(UserError, match=words) as error:
        load_gpt2(tmp_path / "ckpt.pt")
    assert str(error.value).count("\n") == 1 and not (tmp_path / "exploded").exists()


def test_sharded_safetensors_are_read(tmp_path, theirs):
    """transformers splits large models into several files; they were not found."""
    folder = tmp_path / "shards"
    theirs.save_pretrained(folder, max_shard_size="200KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    for path in (folder, folder / "model.safetensors.index.json"):
        assert logit_error(theirs, nanococonut.load_pretrained(str(path))) < 1e-5
    shards[1].unlink()
    with pytest.raises(UserError, match=shards[1].name):
        load_gpt2(resolve_weights(str(folder)))


@pytest.mark.parametrize(
    "index, words",
    [
        (3, "names no files"),
        ({}, "names no files"),
        ({"weight_map": {}}, "names no files"),
        ({"weight_map": {"a": "../b"}}, "names no files"),
        ({"weight_map": {"a": []}}, "No such file"),
    ],
)
def test_bad_index_of_shards_is_refused(tmp_path, index, words):
    """An index must name files of its own folder only."""
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=words):
        load_gpt2(resolve_weights(str(tmp_path)))


@pytest.mark.parametrize("save", [torch.save, lambda x, file: file.write_bytes(pickle.dumps(x))])
def test_pickle_bomb_is_refused(tmp_path, monkeypatch, theirs, save):
    """A checkpoint from the internet must not run code."""
    monkeypatch.chdir(tmp_path)
    save(released(theirs) | {"more": Bomb()}, tmp_path / "checkpoint_1")
    with pytest.raises(UserError, match="nothing else is unpickled") as error:
        load_gpt2(tmp_path / "checkpoint_1")
    assert str(error.value).count("\n") == 1 and not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"nothing", [1, 2], {"wte.weight": 3}, {}])
def test_file_without_state_dict_is_refused(tmp_path, content):
    """A torn file or another pickle ends in two lines, not in a traceback."""
    file = tmp_path / "checkpoint_1"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(UserError, match="holds no GPT-2") as error:
        load_gpt2(file)
    assert str(error.value).count("\n") == 1


def test_one_error_lists_all_bad_tensors(tmp_path, theirs):
    """The first bad tensor alone would make the user try again for each one."""
    folder = tmp_path / "theirs"

    def spoil(tensors):
        tensors["transformer.extra.weight"] = torch.zeros(3)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
        tensors["transformer.ln_f.bias"] = torch.zeros(128, dtype=torch.int8)
        tensors["transformer.h.0.mlp.c_fc.weight"] = torch.zeros(128, 7)
        del tensors["transformer.h.1.ln_1.weight"]

    rewrite(folder / "model.safetensors", spoil)
    with pytest.raises(UserError) as error:
        load_gpt2(folder)
    text = str(error.value)
    for words in (
        "lm_head.weight differs from wte.weight",
        "extra.weight is unknown",
        "ln_f.bias is (128,) torch.int8",
        "h.0.mlp.c_fc.weight is (7, 128), expected (512, 128)",
        "and 1 more",
    ):
        assert words in text
    assert text.count("\n") == 1
    rewrite(folder / "model.safetensors", lambda t: [t.pop(k) for k in list(t) if ".h." in k])
    with pytest.raises(UserError, match=r"h\.0\.ln_1\.weight is missing.* and \d+ more"):
        load_gpt2(folder)


@pytest.mark.parametrize(
    "key, tensor, words",
    [
        ("wte.weight", None, "wte.weight is missing"),
        ("wte.weight", torch.zeros(5), "wte.weight is (5,)"),
        ("wte.weight", torch.zeros(0, 128), "wte.weight is (0, 128)"),
        ("wpe.weight", torch.tensor(1.0), "wpe.weight is ()"),
        ("lm_head.weight", torch.zeros(7), "lm_head.weight differs"),
    ],
)
def test_tensors_of_wrong_shape_are_refused(tmp_path, theirs, key, tensor, words):
    """Appending the special tokens must not crash on a scalar or 1-D wte.weight."""
    file = tmp_path / "theirs" / "model.safetensors"
    name = key if "lm_head" in key else f"transformer.{key}"
    rewrite(file, lambda t: t.pop(name) if tensor is None else t.update({name: tensor}))
    for vocab_size in (None, 50260) if key == "wte.weight" else (None, 134):
        with pytest.raises(UserError, match=re.escape(words)):
            load_gpt2(file.parent, vocab_size)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"model_type": "gpt_neo"}, "model_type='gpt_neo'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"n_layer": 4}, "h.3.ln_1.weight is missing"),
        ({"n_layer": 2}, "h.2.attn.c_attn.bias is unknown"),
        ({"n_positions": 64}, "wpe.weight is (32, 128), expected (64, 128)"),
        ({"n_head": 3}, "3 heads"),
        ({"n_head": None}, "no valid n_head"),
        ({"n_layer": 10**30}, "no valid n_layer"),
        ({"n_embd": True}, "no valid n_embd"),
    ],
)
def test_config_of_another_model_is_refused(tmp_path, theirs, change, words):
    """A model that GPT does not implement would load and give wrong logits."""
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=re.escape(words)):
        load_gpt2(file.parent)


def test_sizes_beyond_the_memory_are_refused(tmp_path, theirs, monkeypatch):
    """A config.json of absurd sizes ended in a traceback of torch's allocator."""

    def full(config):
        raise RuntimeError("can't allocate memory\nframe #0: c10")

    monkeypatch.setattr(pretrained, "GPT", full)
    with pytest.raises(UserError, match="holds no GPT-2: can't allocate memory") as error:
        load_gpt2(tmp_path / "theirs")
    assert str(error.value).count("\n") == 1


def test_folder_with_an_old_file_is_read(tmp_path, theirs):
    """A folder with only pytorch_model.bin was refused."""
    folder = tmp_path / "theirs"
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    torch.save({}, folder / "training_args.bin")
    expected = load_gpt2(folder).state_dict()
    (folder / "model.safetensors").unlink()
    tensors = load_gpt2(resolve_weights(str(folder))).state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(UserError, match="has no model.safetensors.\nGive gpt2, .*one such file"):
        resolve_weights(str(folder))


def test_config_json_with_byte_order_mark_is_read(tmp_path, theirs):
    """Editors on Windows may add one; the folder was refused as "no GPT-2"."""
    file = tmp_path / "theirs" / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_gpt2(file.parent).config.n_layer == 3


def test_file_without_config_is_refused(tmp_path, theirs):
    """Tensors do not show the number of heads; a guess would give wrong logits."""
    alone = shutil.copy(tmp_path / "theirs/model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match="no config.json next to it") as error:
        load_gpt2(alone)
    assert str(error.value).count("\n") == 1 and "hf download" in str(error.value)


@pytest.mark.parametrize("n_layer, n_embd, n_head", [(12, 768, 12), (48, 1600, 25)])
def test_gpt2s_own_sizes_need_no_config(tmp_path, n_layer, n_embd, n_head):
    """The released code saves a lone file, which could not be read."""
    tiny = torch.zeros(1)  # expanded, so the file holds one number for all tensors of a name
    names = {f"h.{i}.ln_1.weight": tiny.expand(n_embd) for i in range(n_layer)}
    names["wte.weight"] = tiny.expand(50260, n_embd)
    state = {f"base_causallm.transformer.{name}": tensor for name, tensor in names.items()}
    torch.save(state, tmp_path / "checkpoint_33")
    config = pretrained._read(tmp_path / "checkpoint_33").config
    assert (config.n_layer, config.n_embd, config.n_head) == (n_layer, n_embd, n_head)
    assert (config.block_size, config.vocab_size) == (1024, 50260)
    names["wte.weight"] = tiny.expand(50260, n_embd + 1)
    torch.save(names, tmp_path / "other")
    with pytest.raises(UserError, match="no config.json"):
        pretrained._read(tmp_path / "other")


def test_vocabulary_of_another_size_is_refused(tmp_path, theirs, tokenizer):
    """Token ids beyond the embedding would fail in the middle of training."""
    with pytest.raises(UserError, match="131 tokens, this run has 50260"):
        load_gpt2(tmp_path / "theirs", vocab_size=50260)


# ---- from the hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Give the hub an empty cache and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cached_weights_need_no_network(cache, monkeypatch):
    """A cached model must load offline; half a cache must not count as one."""
    theirs = transformers_gpt2(SHAPES["one layer"])
    repo = cache / "models--openai-community--gpt2-medium"
    theirs.save_pretrained(repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    with monkeypatch.context() as without:
        without.setattr(pretrained, "snapshot_download", None)
        assert logit_error(theirs, nanococonut.load_pretrained("gpt2-medium")) < 1e-5
    (repo / "snapshots" / "abc" / "config.json").unlink()
    with pytest.raises(WeightsUnavailable):
        resolve_weights("gpt2-medium")


def test_offline_error_names_three_ways_on(cache, monkeypatch):
    """The hub's own error suggests no alternative."""

    def no_route(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(pretrained, "snapshot_download", no_route)
    with pytest.raises(WeightsUnavailable) as error:
        resolve_weights("gpt2-xl")
    text = str(error.value)
    assert text.count("\n") == 1
    for words in (
        "no weights of 'gpt2-xl'",
        str(cache),
        "ConnectionError",
        "Give a folder",
        "hf download openai-community/gpt2-xl config.json model.safetensors",
        "prosqa_small",
    ):
        assert words in text
    assert "--init_from" not in text  # load_pretrained() may have been called


def test_only_the_two_files_are_downloaded(cache, monkeypatch, tmp_path):
    """The repository also holds weights for other frameworks: gigabytes."""
    requested = []

    def download(repo, allow_patterns):
        requested.append((repo, allow_patterns))
        for name in allow_patterns:
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(pretrained, "snapshot_download", download)
    assert resolve_weights("gpt2") == tmp_path
    assert requested == [("openai-community/gpt2", ["config.json", "model.safetensors"])]


# ---- train.py's choice


@pytest.fixture
def settings(monkeypatch, tmp_path, capsys):
    """Return train.py's load_config(*argv) for a big.py whose fallback is small.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "big.py").write_text('init_from = "gpt2"\nfallback = "small.py"\n')
    (tmp_path / "small.py").write_text("n_layer = 1\n")
    return lambda *argv: load_config(["big.py", *argv], None)


def test_without_gpu_nothing_is_downloaded(settings, monkeypatch):
    """The fallback is trained anyway, so half a gigabyte would be downloaded for nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pretrained, "_from_hub", None)
    config, name, fell_back = settings()
    assert (config.init_from, config.n_layer, name) == ("scratch", 1, "small")
    assert fell_back == {"instead_of": "big.py", "because": "no GPU to train 'gpt2' on"}


def test_missing_weights_fall_back_or_are_an_error(settings, cache, monkeypatch, capsys):
    """A run must not silently train another config."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _, name, fell_back = settings()
    assert name == "small" and "no weights of 'gpt2'" in fell_back["because"]
    assert len(capsys.readouterr().out.splitlines()) == 2
    with pytest.raises(UserError, match="no weights of 'gpt2'"):
        settings("--fallback=None")


def test_wrong_folder_is_an_error_not_a_fallback(settings, tmp_path):
    """A mistyped path would train the fallback for an hour."""
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        with pytest.raises(UserError, match="no weights") as error:
            settings(f"--init_from={name}")
        assert str(error.value).count("\n") == 1


def test_weights_in_a_folder_train_on_cpu(settings, theirs, monkeypatch):
    """The fallback without a GPU is for downloads only."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, name, fell_back = settings("--init_from=theirs")
    assert (config.init_from, name, fell_back) == ("theirs", "big", {})


def test_block_size_stays_the_checkpoints(theirs, tmp_path):
    """A block_size beyond the positions would fail in the middle of training."""

    class Vocabulary:
        vocab_size, spec = 131, {"kind": "words"}

    config = TrainConfig(init_from=str(tmp_path / "theirs"), block_size=20)
    model = init_model(config, Vocabulary)
    assert model.config.block_size == 32 and model.config.dropout == config.dropout
    with pytest.raises(UserError, match="--block_size=32"):
        init_model(replace(config, block_size=33), Vocabulary)


# ---- checkpoints of ours, in and out


@pytest.mark.parametrize("smear", [False, True])
def test_training_continues_from_a_run(tmp_path, tokenizer, smear):
    """Every spelling of the path loads the same weights; new modules start at zero."""
    saved = save_random_run(tmp_path / "run", tokenizer, smear=smear)
    idx = torch.randint(tokenizer.vocab_size, (2, 30))
    step = tmp_path / "run" / "step_00000007"
    for path in (tmp_path / "run", step, step / "model.safetensors"):
        config = TrainConfig(init_from=str(path), tokenizer="words", block_size=96, dropout=0.3)
        model = init_model(config, tokenizer)
        assert model.config.dropout == 0.3 and torch.equal(model.eval()(idx), saved(idx))
    assert torch.equal(nanococonut.load_pretrained(str(step))(idx), saved(idx))
    # modules missing from the checkpoint start at zero
    model = init_model(replace(config, smear=True), tokenizer)
    assert model.smear is not None and torch.allclose(model.eval()(idx), saved(idx))
    model = init_model(replace(config, method="projected", stop="classifier"), tokenizer)
    assert model.project is not None and model.stop is not None
    assert torch.equal(model.eval()(idx), saved(idx))


@pytest.mark.parametrize("own", ["projected", "pause_multipass"])
def test_extra_modules_are_dropped_or_refused(tmp_path, tokenizer, capsys, own):
    """A stop classifier never changed the output, so it is dropped; a projection did."""
    saved = save_random_run(tmp_path / "stop", tokenizer, stop=True)
    save_random_run(tmp_path / "map", tokenizer, own, thought=METHODS[own].thought_type)
    idx = torch.randint(tokenizer.vocab_size, (2, 30))
    for method in ("cot", "pause", "soft_thought", own):
        base = TrainConfig(tokenizer="words", block_size=96, method=method)
        config = replace(base, init_from=str(tmp_path / "stop"))
        assert torch.equal(init_model(config, tokenizer).eval()(idx), saved(idx))
        assert "stop classifier is left out" in capsys.readouterr().out
        config = replace(base, init_from=str(tmp_path / "map"))
        if method == own:
            loaded = init_model(config, tokenizer)
            assert (loaded.project or loaded.pause).weight.abs().max() > 0
            continue
        with pytest.raises(UserError, match=rf"weight is used only by --method={own}") as error:
            init_model(config, tokenizer)
        assert str(error.value).count("\n") == 1
    config = TrainConfig(
        tokenizer="words", block_size=96, stop="classifier", init_from=str(tmp_path / "stop")
    )
    assert torch.equal(init_model(config, tokenizer).stop.weight, saved.stop.weight)
    assert "left out" not in capsys.readouterr().out


def assert_vocabulary_refused(path, tokenizer):
    config = TrainConfig(init_from=str(path), block_size=96)
    with pytest.raises(UserError, match="another vocabulary") as error:
        init_model(config, tokenizer)
    assert str(error.value).count("\n") == 1


def test_run_with_another_vocabulary_is_refused(tmp_path, tokenizer):
    """Vocabularies of one size but with other words would load without an error."""
    save_random_run(tmp_path / "run", tokenizer)
    other = Tokenizer.words([*tokenizer.spec["words"][1:], "gorpus"])
    assert other.vocab_size == tokenizer.vocab_size
    init_model(TrainConfig(init_from=str(tmp_path / "run"), block_size=96), tokenizer)
    assert_vocabulary_refused(tmp_path / "run", other)


def test_export_with_another_vocabulary_is_refused(tmp_path, tokenizer):
    """An export names its tokenizer in config.json; without it, only the size was compared."""
    gpt2 = gpt2_tokenizer()
    save_random_run(tmp_path / "run", gpt2)
    folder = export(tmp_path / "run", tmp_path / "exported")
    init_model(TrainConfig(init_from=str(folder), block_size=96), gpt2)
    assert_vocabulary_refused(folder, tokenizer)


@pytest.fixture
def handlers():
    """Restore the two signal handlers that train.py replaces."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_train_py_continues_from_run_and_export(script, tmp_path):
    """At a rate near zero the trained weights must be those of --init_from (a run by CoT, as in
    GSM8k's recipe)."""
    gpt2_tokenizer()  # skips if there is none
    (tmp_path / "tiny.py").write_text(
        'tokenizer = "gpt2"\nn_nodes = 10\nmin_hops = 2\nmax_hops = 3\n'
        "n_layer = 1\nn_head = 2\nn_embd = 16\nblock_size = 512\ntrain_examples = 8\n"
        "val_examples = 4\nbatch_size = 8\nmax_steps = 1\n"
        "max_new_tokens = 4\nlearning_rate = 1e-12\n"
    )
    code, _, err = script("tiny.py", "--out_dir=cot", "--method=cot")
    assert (code, err) == (0, "")
    first = checkpoint.load("cot")[0].state_dict()
    export("cot", "hf")
    for name in ("cot", "hf"):
        argv = [
            f"--init_from={name}",
            "--first_stage_epochs=0",
            "--seed=5",
            f"--out_dir=from_{name}",
        ]
        code, _, err = script("tiny.py", "--n_embd=64", *argv)  # the checkpoint's size counts
        assert (code, err) == (0, "")
        for key, p in checkpoint.load(f"from_{name}")[0].state_dict().items():
            if key == "wte.weight":
                assert (len(p), len(first[key])) == (50260, 50257)
                p = p[:50257]
            torch.testing.assert_close(p, first[key], rtol=0, atol=1e-6)
