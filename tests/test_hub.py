"""hub.py and export.py: transformers' weights come in and ours go out with the same logits."""

import json
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import sys
from dataclasses import asdict, replace

import pytest
import torch
from conftest import random_gpt
from safetensors.torch import load_file, save_file
from tiktoken import load

from nanococonut import checkpoint, hub
from nanococonut.build import build_model
from nanococonut.config import TrainConfig
from nanococonut.curriculum import METHODS, Curriculum
from nanococonut.data import prosqa
from nanococonut.engine import Engine
from nanococonut.errors import UserError
from nanococonut.export import EXAMPLES, export, tokenizer_files
from nanococonut.hub import find_weights, load_gpt2
from nanococonut.model import GPT
from nanococonut.tokenizer import BOT, EOS, EOT, LATENT, Tokenizer

SHAPES = {  # vocab_size, n_positions, n_layer, n_head, n_embd
    "one layer": (61, 40, 1, 1, 16),
    "heads of 8": (97, 32, 2, 3, 24),
    "heads of 64": (131, 32, 3, 2, 128),
}


def their_gpt2(shape, **more):
    """A GPT-2 of transformers', every tensor random: zeros and ones would hide missing terms."""
    transformers = pytest.importorskip("transformers")
    names = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    config = transformers.GPT2Config(
        **dict(zip(names, shape, strict=True)), bos_token_id=0, eos_token_id=0, **more
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, std=0.2)
        if "ln" in name and name.endswith("weight"):
            p.data += 1
    return theirs


@pytest.fixture
def theirs(tmp_path):
    model = their_gpt2(SHAPES["heads of 64"])
    model.save_pretrained(tmp_path / "theirs")
    return model


@torch.no_grad()
def off(theirs, ours):
    """The largest difference of logits, relative to the largest logit, on their vocabulary."""
    n = theirs.config.vocab_size
    idx = torch.randint(n, (3, theirs.config.n_positions))
    a, b = theirs(idx).logits, ours.eval()(idx)[..., :n]
    assert a.shape == b.shape
    return ((a - b).abs().max() / a.abs().max()).item()


@torch.no_grad()
def greedy(logits_of, ids, n=20):
    for _ in range(n):
        ids = torch.cat([ids, logits_of(ids)[:, -1:].argmax(-1)], dim=1)
    return ids.tolist()


# -- weights in


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_and_greedy_text_equal_transformers(tmp_path, shape):
    theirs = their_gpt2(shape)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    assert ours.config.vocab_size == shape[0] and ours.wte.weight.dtype == torch.float32
    assert off(theirs, ours) < 1e-5
    start = torch.randint(shape[0], (2, 5))
    assert greedy(lambda ids: theirs(ids).logits, start) == greedy(ours.eval(), start)


@pytest.mark.network
def test_gpt2_itself_equals_transformers(monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    ours = GPT.from_pretrained("gpt2").eval()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(find_weights("gpt2")).eval()
    assert ours.config.vocab_size == 50257
    assert off(theirs, ours) < 1e-5
    start = torch.randint(50257, (2, 5))
    assert greedy(lambda ids: theirs(ids).logits, start) == greedy(ours, start)


def rewrite(file, change):
    """A safetensors file again, with its tensors changed."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_other_spellings_of_the_same_weights(tmp_path, theirs, capsys):
    """Without the prefix, with masks and a head of its own, in half precision, as a file, and as a
    file without its config."""
    file = tmp_path / "theirs" / "model.safetensors"

    def respell(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    rewrite(file, respell)
    for path in (file.parent, file):
        assert off(theirs, load_gpt2(path)) < 1e-5
    alone = tmp_path / "alone.safetensors"
    shutil.copy(file, alone)
    assert capsys.readouterr().out == ""
    assert off(theirs, load_gpt2(alone)) < 1e-5
    assert "n_head=n_embd/64=2" in capsys.readouterr().out

    rewrite(file, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    half = load_gpt2(file.parent)
    assert half.wte.weight.dtype == torch.float32
    theirs.load_state_dict({k: v.bfloat16().float() for k, v in theirs.state_dict().items()})
    assert off(theirs, half) < 1e-5


def test_the_special_tokens_start_as_the_one_of_two_angle_brackets(tmp_path):
    their_gpt2((50257, 16, 1, 1, 4)).save_pretrained(tmp_path)
    wte = load_gpt2(tmp_path, vocab_size=50260).wte.weight
    assert wte[50257:].equal(wte[16791].expand(3, -1)) and not wte[16790].equal(wte[16791])
    assert len(load_gpt2(tmp_path).wte.weight) == 50257


def released(theirs):
    """Their GPT-2 as the released code saves one: inside its Coconut, whose embedding is wte."""
    state = {f"base_causallm.{key}": value for key, value in theirs.state_dict().items()}
    return state | {"embedding.weight": theirs.transformer.wte.weight.data}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_of_the_released_code(tmp_path, theirs, prefix):
    file = tmp_path / "checkpoint_33"
    torch.save({prefix + key: value for key, value in released(theirs).items()}, file)
    assert off(theirs, load_gpt2(file, vocab_size=131)) < 1e-5


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize("save", [torch.save, lambda x, file: file.write_bytes(pickle.dumps(x))])
def test_a_pickle_bomb_is_refused(tmp_path, monkeypatch, theirs, save):
    monkeypatch.chdir(tmp_path)
    save(released(theirs) | {"more": Bomb()}, tmp_path / "checkpoint_1")
    with pytest.raises(UserError, match="nothing else is unpickled") as error:
        load_gpt2(tmp_path / "checkpoint_1")
    assert str(error.value).count("\n") == 1 and not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"nothing", [1, 2], {"wte.weight": 3}, {}])
def test_a_file_that_is_no_state_dict_is_refused(tmp_path, content):
    file = tmp_path / "checkpoint_1"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(UserError, match="holds no GPT-2") as error:
        load_gpt2(file)
    assert str(error.value).count("\n") == 1


def test_all_that_is_wrong_with_the_tensors_stands_in_one_error(tmp_path, theirs):
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
        "h.0.mlp.c_fc.weight is (128, 7), wanted (128, 512)",
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
        ("wpe.weight", torch.tensor(1.0), "wpe.weight is ()"),
        ("lm_head.weight", torch.zeros(7), "lm_head.weight differs"),
    ],
)
def test_tensors_of_the_wrong_kind(tmp_path, theirs, key, tensor, words):
    file = tmp_path / "theirs" / "model.safetensors"
    name = key if "lm_head" in key else f"transformer.{key}"
    rewrite(file, lambda t: t.pop(name) if tensor is None else t.update({name: tensor}))
    for vocab_size in (None, 50260) if key == "wte.weight" else (None, 134):
        with pytest.raises(UserError, match=re.escape(words)):
            load_gpt2(file.parent, vocab_size)
    alone = shutil.copy(file, tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match="holds no GPT-2"):
        load_gpt2(alone)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"model_type": "gpt_neo"}, "model_type='gpt_neo'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"n_layer": 4}, "h.3.ln_1.weight is missing"),
        ({"n_layer": 2}, "h.2.attn.c_attn.bias is unknown"),
        ({"n_positions": 64}, "wpe.weight is (32, 128), wanted (64, 128)"),
        ({"n_head": 3}, "3 heads"),
        ({"n_head": None}, "no proper n_head"),
        ({"n_embd": True}, "no proper n_embd"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, theirs, change, words):
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=re.escape(words)):
        load_gpt2(file.parent)


def test_heads_that_cannot_be_told_are_asked_for(tmp_path):
    their_gpt2(SHAPES["heads of 8"]).save_pretrained(tmp_path / "a")
    shutil.copy(tmp_path / "a/model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match="n_embd=24 gives no heads of 64"):
        load_gpt2(tmp_path / "alone.safetensors")


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, theirs, tokenizer):
    with pytest.raises(UserError, match="131 tokens, this run's has 50260"):
        load_gpt2(tmp_path / "theirs", vocab_size=50260)


# -- from the hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cached_weights_need_no_network(cache, monkeypatch):
    theirs = their_gpt2(SHAPES["one layer"])
    at = cache / "models--openai-community--gpt2-medium"
    theirs.save_pretrained(at / "snapshots" / "abc")
    (at / "refs").mkdir()
    (at / "refs" / "main").write_text("abc")
    for name in ("get_hf_file_metadata", "hf_hub_download"):
        monkeypatch.setattr(hub, name, None)
    assert off(theirs, GPT.from_pretrained("gpt2-medium")) < 1e-5
    (at / "snapshots" / "abc" / "config.json").unlink()
    with pytest.raises(hub.Unavailable):
        find_weights("gpt2-medium")


def test_without_internet_three_ways_on_are_named_at_once(cache, monkeypatch):
    def no_route(url, **_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "get_hf_file_metadata", no_route)
    monkeypatch.setattr(hub, "hf_hub_download", None)  # which would try again and again
    with pytest.raises(hub.Unavailable) as error:
        find_weights("gpt2-xl")
    text = str(error.value)
    assert text.count("\n") == 1
    for words in (
        "no weights of 'gpt2-xl'",
        str(cache),
        "ConnectionError",
        "--init_from",
        "hf download openai-community/gpt2-xl config.json model.safetensors",
        "prosqa_small",
    ):
        assert words in text


def test_only_the_two_files_are_downloaded(cache, monkeypatch, tmp_path):
    asked = []

    def download(repo, file, cache_dir):
        asked.append((repo, file))
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, **_: None)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert find_weights("gpt2") == tmp_path
    assert asked == [("openai-community/gpt2", f) for f in ("config.json", "model.safetensors")]


# -- train.py's choice


@pytest.fixture
def settings(monkeypatch, tmp_path, capsys):
    """settings(*argv) -> (config, name, fallback), of a big.py with a fallback small.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "big.py").write_text('init_from = "gpt2"\nfallback = "small.py"\n')
    (tmp_path / "small.py").write_text("n_layer = 1\n")
    train = runpy.run_path(str(checkpoint.BUNDLED.parents[2] / "train.py"))
    return lambda *argv: train["settings"](["big.py", *argv])


def test_without_a_gpu_nothing_is_downloaded(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hub, "_from_hub", None)
    config, name, fell_back = settings()
    assert (config.init_from, config.n_layer, name) == ("scratch", 1, "small")
    assert fell_back == {"instead_of": "big.py", "because": "no GPU to train 'gpt2' on"}


def test_with_a_gpu_and_no_weights_it_falls_back_or_says_so(settings, cache, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _, name, fell_back = settings()
    assert name == "small" and "no weights of 'gpt2'" in fell_back["because"]
    assert len(capsys.readouterr().out.splitlines()) == 2
    with pytest.raises(UserError, match="no weights of 'gpt2'"):
        settings("--fallback=None")


def test_a_folder_that_is_wrong_is_an_error_and_no_fallback(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        with pytest.raises(UserError, match="no weights") as error:
            settings(f"--init_from={name}")
        assert str(error.value).count("\n") == 1


def test_a_folder_is_trained_on_a_cpu_too(settings, theirs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, name, fell_back = settings("--init_from=theirs")
    assert (config.init_from, name, fell_back) == ("theirs", "big", {})


def test_the_model_keeps_its_own_positions(theirs, tmp_path):
    class Vocabulary:
        vocab_size, spec = 131, {"kind": "words"}

    config = TrainConfig(init_from=str(tmp_path / "theirs"), block_size=20)
    model = build_model(config, Vocabulary)
    assert model.config.block_size == 32 and model.config.dropout == config.dropout
    with pytest.raises(UserError, match="--block_size=32"):
        build_model(replace(config, block_size=33), Vocabulary)


# -- checkpoints of ours, in and out


def run_of(path, tokenizer, method="coconut", n_thoughts=3, block_size=96, **more):
    """A run's folder with a random model in it."""
    words = tokenizer.spec["kind"] == "words"
    config = TrainConfig(
        tokenizer=tokenizer.spec["kind"],
        render="compact" if words else "sentences",
        method=method,
        out_dir="/home/somebody/out",
        data="/home/somebody/rows.json",
        max_new_tokens=9,
    )
    model = random_gpt(
        random.randrange(10**6), dtype=torch.float32, vocab_size=tokenizer.vocab_size,
        block_size=block_size, **more,
    )  # fmt: skip
    manifest = {
        "config": asdict(config),
        "model": checkpoint.describe_model(model),
        "tokenizer": tokenizer.spec,
        "method": method,
        "stage": 3,
        "n_thoughts": n_thoughts,
        "minutes": 0.5,
        "device": "cpu",
        "threads": 1,
    }
    checkpoint.save(path, 7, model, [], manifest)
    return model


@pytest.mark.parametrize("smear", [False, True])
def test_a_run_of_ours_is_gone_on_from(tmp_path, tokenizer, smear):
    saved = run_of(tmp_path / "run", tokenizer, smear=smear)
    idx = torch.randint(tokenizer.vocab_size, (2, 30))
    step = tmp_path / "run" / "step_00000007"
    for path in (tmp_path / "run", step, step / "model.safetensors"):
        config = TrainConfig(init_from=str(path), tokenizer="words", block_size=96, dropout=0.3)
        model = build_model(config, tokenizer)
        assert model.config.dropout == 0.3 and torch.equal(model.eval()(idx), saved(idx))
    assert torch.equal(GPT.from_pretrained(str(step))(idx), saved(idx))
    # a smear that the weights have not starts as nothing
    model = build_model(replace(config, smear=True), tokenizer)
    assert model.smear is not None and torch.allclose(model.eval()(idx), saved(idx))
    # and so do a projection and a stop classifier
    model = build_model(replace(config, method="projected", stop="classifier"), tokenizer)
    assert model.project is not None and model.stop is not None
    assert torch.equal(model.eval()(idx), saved(idx))


def test_a_run_with_more_than_this_one_has_is_gone_on_from_or_refused(tmp_path, tokenizer, capsys):
    """A stop classifier only watched, so it is left out, aloud; thoughts went through a map."""
    saved = run_of(tmp_path / "stop", tokenizer, stop=True)
    run_of(tmp_path / "map", tokenizer, "projected", thought="projected")
    idx = torch.randint(tokenizer.vocab_size, (2, 30))
    for method in ("cot", "pause", "soft_thought", "projected"):
        asked = TrainConfig(tokenizer="words", block_size=96, method=method)
        config = replace(asked, init_from=str(tmp_path / "stop"))
        assert torch.equal(build_model(config, tokenizer).eval()(idx), saved(idx))
        assert "stop classifier is left out" in capsys.readouterr().out
        config = replace(asked, init_from=str(tmp_path / "map"))
        if method == "projected":
            assert build_model(config, tokenizer).project.weight.abs().max() > 0
            continue
        with pytest.raises(
            UserError, match=r"trained by --method=projected.*\nGo on with"
        ) as error:
            build_model(config, tokenizer)
        assert str(error.value).count("\n") == 1
    config = TrainConfig(
        tokenizer="words", block_size=96, stop="classifier", init_from=str(tmp_path / "stop")
    )
    assert torch.equal(build_model(config, tokenizer).stop.weight, saved.stop.weight)
    assert "left out" not in capsys.readouterr().out


def test_a_run_with_another_vocabulary_is_refused(tmp_path, tokenizer):
    run_of(tmp_path / "run", tokenizer)
    other = Tokenizer.words([*tokenizer.spec["words"][1:], "gorpus"])
    assert other.vocab_size == tokenizer.vocab_size
    export(tmp_path / "run", tmp_path / "exported")
    for name in ("run", "exported"):
        config = TrainConfig(init_from=str(tmp_path / name), block_size=96)
        build_model(config, tokenizer)
        with pytest.raises(UserError, match="another vocabulary") as error:
            build_model(config, other)
        assert str(error.value).count("\n") == 1


@pytest.fixture
def handlers():
    """train.py takes these two signals for itself."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_train_py_goes_on_from_a_run_and_from_its_export(script, tmp_path):
    """From a run by CoT, as GSM8k's recipe does; at a rate of next to nothing, so that the weights
    are seen to be the ones that were given."""
    (tmp_path / "tiny.py").write_text(
        'tokenizer = "words"\nrender = "compact"\nn_nodes = 10\nmin_hops = 2\nmax_hops = 3\n'
        "n_layer = 1\nn_head = 2\nn_embd = 16\nblock_size = 128\nrows_per_epoch = 8\n"
        "valid_rows = 4\nbatch_size = 8\nmax_steps = 1\nmax_new_tokens = 4\nlearning_rate = 1e-12\n"
    )
    code, _, err = script("tiny.py", "--out_dir=cot", "--method=cot")
    assert (code, err) == (0, "")
    first = checkpoint.load("cot")[0].state_dict()
    export("cot", "hf")
    for name in ("cot", "hf"):
        argv = [f"--init_from={name}", "--first_stage_epochs=0", f"--out_dir=from_{name}"]
        argv += ["--seed=5"]
        code, _, err = script("tiny.py", "--n_embd=64", *argv)  # the size is the weights' own
        assert (code, err) == (0, "")
        for key, p in checkpoint.load(f"from_{name}")[0].state_dict().items():
            torch.testing.assert_close(p, first[key], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def gpt2():
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: no GPT-2 vocabulary on this machine")
    return Tokenizer.gpt2()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, gpt2):
    """(model, tokenizer, folder of the run, exported folder) with GPT-2's vocabulary."""
    at = tmp_path_factory.mktemp("gpt2")
    model = run_of(at / "run", gpt2, n_embd=6, n_layer=1)
    return model, gpt2, at / "run", export(at / "run", at / "hf")


@pytest.fixture
def exported_words(tmp_path):
    tokenizer = Tokenizer.words(prosqa.VOCABULARY)
    model = run_of(tmp_path / "run", tokenizer)
    return model, tokenizer, tmp_path / "run", export(tmp_path / "run", tmp_path / "hf")


@pytest.fixture(params=["exported", "exported_words"])
def case(request):
    return request.getfixturevalue(request.param)


def auto(kind, folder):
    return getattr(pytest.importorskip("transformers"), kind).from_pretrained(folder)


def test_transformers_loads_an_export_with_the_same_logits(case):
    model, tokenizer, _, folder = case
    theirs = auto("AutoModelForCausalLM", folder)
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    assert theirs.config.vocab_size == tokenizer.vocab_size
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eos
    assert off(theirs.eval(), model) < 1e-5
    assert not theirs.transformer.wte.weight.isnan().any()
    assert theirs.lm_head.weight is theirs.transformer.wte.weight


def test_an_export_comes_back_the_same(case):
    model, tokenizer, _, folder = case
    config = TrainConfig(init_from=str(folder), block_size=96, dropout=0.0)
    back = build_model(config, tokenizer)
    for name, p in model.state_dict().items():
        assert torch.equal(p, back.state_dict()[name]), name


STRANGE = [
    "", " ", "\n\n", "  two  spaces ", "Zoë ate 3.5 ☃.", "tab\there", "x\u00a0y\u2003z\u3000",
    "xlempusx", "don't I'LL 'S",
    "a\x1c\x1d\x1e\x1f\x85\u180e\u200b\u2028b", "\x00\x7f", "isisis is an is or orr ###?#",
    "e\u0301 \u00e9 ﬁ ＡＢ", "👩‍👩‍👧 \U0001f1e6", "<|latent", "Ġ Ċ", "\r\n \r\n", "١٢٣ ½ x²",
]  # fmt: skip


def texts(folder):
    for name in ("prosqa_valid.json", "prontoqa_valid.json"):
        for row in json.loads((folder / name).read_text())[:40]:
            yield from [row["question"] + "\n", *row["steps"], "### " + row["answer"]]
    yield from (folder / "gsm8k_valid.txt").read_text().splitlines()[:60]


def same_ids(theirs, tokenizer, all_of):
    for text in all_of:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == tokenizer.decode(ids)


def test_auto_tokenizer_gives_the_same_ids_on_released_rows(case, request):
    _, tokenizer, _, folder = case
    released_rows = request.getfixturevalue("released")
    rows = list(texts(released_rows))
    assert len(rows) > 400
    same_ids(auto("AutoTokenizer", folder), tokenizer, rows)


def test_auto_tokenizer_gives_the_same_ids_on_anything(case):
    _, tokenizer, _, folder = case
    pieces = [" ", "  ", "\n", "is", "iss", " or", "ora", "Tom", "Tomm", "#", "###", ".", "7", "é",
              "☃", "a", "lempus", "empus", "\u00a0", "'s", "A", "\t", "I"]  # fmt: skip
    fuzz = ["".join(random.choices(pieces, k=random.randint(1, 12))) for _ in range(400)]
    theirs = auto("AutoTokenizer", folder)
    same_ids(theirs, tokenizer, STRANGE + fuzz + [prosqa.generate(1, 3)[0]["question"]])
    names = [EOS, BOT, EOT, LATENT]
    special = [tokenizer.eos, tokenizer.bot, tokenizer.eot, tokenizer.latent]
    assert theirs.convert_tokens_to_ids(names) == special
    assert set(names) <= set(theirs.all_special_tokens)
    assert theirs("Tom is" + BOT + LATENT + EOT)["input_ids"] == [
        *tokenizer.encode("Tom is"), tokenizer.bot, tokenizer.latent, tokenizer.eot
    ]  # fmt: skip
    assert theirs.decode(special, skip_special_tokens=True) == ""
    assert set(theirs("Tom")) == {"input_ids", "attention_mask"}
    assert len(theirs) == tokenizer.vocab_size and theirs.eos_token_id == tokenizer.eos


def test_words_that_share_their_ends_are_spelt_as_tiktoken_does(tmp_path):
    """A vocabulary of every word over a, b: byte pairs inside an unknown word can be merged in many
    orders."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["".join(random.choices("ab", k=random.randint(1, 5))) for _ in range(12)]
    tokenizer = Tokenizer.words(words)
    (tmp_path / "t.json").write_text(tokenizer_files(tokenizer, 64)["tokenizer.json"])
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    for _ in range(500):
        text = "".join(random.choices("ab ", weights=(4, 4, 1), k=random.randint(1, 20)))
        assert theirs.encode(text).ids == tokenizer.encode(text), (words, text)


def test_the_files_of_gpt2s_vocabulary_are_openais_own(exported):
    """The tokenizer is made of tiktoken's ranks; the cache holds the files that they came from."""
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    merges, vocab = (
        load.read_file_cached(url + name).decode() for name in ("vocab.bpe", "encoder.json")
    )
    folder = exported[3]
    assert (folder / "merges.txt").read_text(encoding="utf-8").split() == merges.split()
    ours = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert ours == json.loads(vocab) and ours["<<"] == 16791


def blocks(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)


@pytest.mark.parametrize(
    "method, n",
    [
        ("coconut", 3),
        ("coconut", 0),
        ("pause", 3),
        ("pause_as_thought", 0),
        ("cot", 0),
        ("icot", 0),
    ],
)
def test_the_cards_two_programs_say_what_the_run_says(tmp_path, monkeypatch, capsys, method, n):
    pytest.importorskip("transformers")
    tokenizer = Tokenizer.words(prosqa.VOCABULARY)
    model = run_of(tmp_path / "run", tokenizer, method, n)
    folder = export(tmp_path / "run", tmp_path / "hf")
    monkeypatch.chdir(folder)
    said = []
    for block in blocks(folder):
        exec(block, {})
        said.append(capsys.readouterr().out[:-1])
    question = prosqa.compact_question(EXAMPLES["prosqa"])
    said += Engine(model, tokenizer, Curriculum(method)).generate([question], n, 9).text
    # a random model also says special tokens, which transformers is told to leave out
    said = [re.sub(r"<\|[a-z-]+\|>", "", text) for text in said]
    assert len(said) == 3 and said[0] == said[1] == said[2]
    card = (folder / "README.md").read_text()
    assert ("**does not run its thoughts**" in card) == (method == "coconut" and n > 0)
    assert f"| {'pauses' if 'pause' in method else 'thoughts'} before an answer | {n} |" in card


def test_the_card_says_how_it_was_trained(case):
    _, _, run, folder = case
    card = (folder / "README.md").read_text()
    manifest = checkpoint.read_manifest(checkpoint.find(run))
    for words in (
        manifest["commit"],
        "| method | coconut |",
        "| stage | 3 |",
        "| optimizer steps | 7 |",
        "| thoughts before an answer | 3 |",
        "**does not run its thoughts**",
        "learning_rate = 0.0001",
        "data = 'rows.json'",
    ):
        assert words in card
    assert "somebody" not in card  # a machine's paths are nobody's business


@pytest.mark.parametrize("method", ["soft_thought", "projected"])
def test_thoughts_that_are_no_hidden_states_are_not_exported(tmp_path, tokenizer, method):
    run_of(tmp_path / "run", tokenizer, method, thought=METHODS[method].slot)
    with pytest.raises(UserError, match="no plain GPT-2, it has thought="):
        export(tmp_path / "run", tmp_path / "hf")


def test_an_export_is_whole_or_not_there(tmp_path, tokenizer, monkeypatch):
    run_of(tmp_path / "run", tokenizer)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("nanococonut.export.save_file", full)
        with pytest.raises(UserError, match="could not be written"):
            export(tmp_path / "run", tmp_path / "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    export(tmp_path / "run", tmp_path / "deep" / "hf")
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["hf"]
    with pytest.raises(UserError, match="exists already"):
        export(tmp_path / "run", tmp_path / "deep" / "hf")


def test_what_gpt2_has_not_is_not_exported(tmp_path, tokenizer):
    run_of(tmp_path / "run", tokenizer, smear=True)
    with pytest.raises(UserError, match=r"smear=True, smear\.weight") as error:
        export(tmp_path / "run", tmp_path / "hf")
    assert str(error.value).count("\n") == 1 and not (tmp_path / "hf").exists()


def command(monkeypatch, capsys, *argv):
    """(exit code, stdout, stderr) of python -m nanococonut.hub."""
    monkeypatch.setattr(sys, "argv", ["hub", *map(str, argv)])
    code = 0
    try:
        runpy.run_path(hub.__file__, run_name="__main__")
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


def test_the_command(tmp_path, tokenizer, monkeypatch, capsys):
    run_of(tmp_path / "run", tokenizer)
    code, out, err = command(monkeypatch, capsys, "export", tmp_path / "run", tmp_path / "hf")
    assert (code, err) == (0, "") and out == f"wrote {tmp_path / 'hf'}\n"
    for argv in (
        ["export", tmp_path / "run", tmp_path / "hf"],
        ["export", tmp_path / "none", tmp_path / "new"],
        ["export", tmp_path / "run"],
        [],
    ):
        code, _, err = command(monkeypatch, capsys, *argv)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 2
