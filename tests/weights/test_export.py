"""weights/export.py: transformers loads an export, with the same logits, ids and answers."""

import json
import random
import re
import runpy
import sys

import pytest
import torch
from helpers import gpt2_tokenizer, logit_error, random_gpt, save_random_run

from nanococonut.config import TrainConfig
from nanococonut.curriculum import METHODS, Curriculum
from nanococonut.data import prosqa
from nanococonut.inference.engine import Engine
from nanococonut.runtime.errors import UserError
from nanococonut.tokenizer import BOT, EOS, EOT, LATENT
from nanococonut.training.setup import init_model
from nanococonut.weights import checkpoint
from nanococonut.weights import export as export_module
from nanococonut.weights.export import EXAMPLES, export


@pytest.fixture(scope="module")
def gpt2():
    return gpt2_tokenizer()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, gpt2):
    """Return (model, tokenizer, folder of the run, exported folder)."""
    folder = tmp_path_factory.mktemp("gpt2")
    model = save_random_run(folder / "run", gpt2)
    return model, gpt2, folder / "run", export(folder / "run", folder / "hf")


def auto(kind, folder):
    return getattr(pytest.importorskip("transformers"), kind).from_pretrained(folder)


def test_export_gives_transformers_same_logits(exported):
    """A matrix that is not transposed back, or a wrong setting, changes the logits."""
    model, tokenizer, _, folder = exported
    theirs = auto("AutoModelForCausalLM", folder)
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    assert theirs.config.vocab_size == tokenizer.vocab_size
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eos
    assert logit_error(theirs.eval(), model) < 1e-5
    assert not theirs.transformer.wte.weight.isnan().any()
    assert theirs.lm_head.weight is theirs.transformer.wte.weight


def test_export_loads_back_unchanged(exported):
    """A round trip must not lose a bit."""
    model, tokenizer, _, folder = exported
    config = TrainConfig(init_from=str(folder), block_size=96, dropout=0.0)
    back = init_model(config, tokenizer)
    for name, p in model.state_dict().items():
        assert torch.equal(p, back.state_dict()[name]), name


def test_export_of_cot_has_no_special_tokens(tmp_path, gpt2):
    """config.json always said 50,260 tokens, so transformers refused the weights."""
    model = save_random_run(tmp_path / "run", gpt2, "cot", 0)
    folder = export(tmp_path / "run", tmp_path / "hf")
    theirs = auto("AutoModelForCausalLM", folder)
    assert theirs.config.vocab_size == 50257 == len(auto("AutoTokenizer", folder))
    assert logit_error(theirs.eval(), model) < 1e-5


STRANGE = [
    "", " ", "\n\n", "  two  spaces ", "Zoë ate 3.5 ☃.", "tab\there", "x\u00a0y\u2003z\u3000",
    "xlempusx", "don't I'LL 'S",
    "a\x1c\x1d\x1e\x1f\x85\u180e\u200b\u2028b", "\x00\x7f", "isisis is an is or orr ###?#",
    "e\u0301 \u00e9 ﬁ ＡＢ", "👩‍👩‍👧 \U0001f1e6", "<|latent", "Ġ Ċ", "\r\n \r\n", "١٢٣ ½ x²",
]  # fmt: skip


def released_texts(folder):
    for name in ("prosqa_valid.json", "prontoqa_valid.json"):
        for example in json.loads((folder / name).read_text())[:40]:
            yield from [example["question"] + "\n", *example["steps"]]
            yield "### " + example["answer"]
    yield from (folder / "gsm8k_valid.txt").read_text().splitlines()[:60]


def assert_same_ids(theirs, tokenizer, texts):
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == tokenizer.decode(ids)


def test_auto_tokenizer_same_ids_on_released_examples(exported, released):
    """With ids other than those in training, the model answers nonsense."""
    _, tokenizer, _, folder = exported
    examples = list(released_texts(released))
    assert len(examples) > 400
    assert_same_ids(auto("AutoTokenizer", folder), tokenizer, examples)


def test_auto_tokenizer_same_ids_on_any_text(exported):
    """White space, other scripts and pieces of special tokens must split as in tiktoken."""
    _, tokenizer, _, folder = exported
    pieces = [" ", "  ", "\n", "is", "iss", " or", "ora", "Tom", "Tomm", "#", "###", ".", "7", "é",
              "☃", "a", "lempus", "empus", "\u00a0", "'s", "A", "\t", "I"]  # fmt: skip
    fuzz = ["".join(random.choices(pieces, k=random.randint(1, 12))) for _ in range(400)]
    theirs = auto("AutoTokenizer", folder)
    assert_same_ids(theirs, tokenizer, STRANGE + fuzz + [prosqa.generate(1, 3)[0]["question"]])
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
def test_card_program_answers_as_the_engine(tmp_path, monkeypatch, capsys, gpt2, method, n):
    """A card's program that forgets markers, pauses or thoughts gives another answer."""
    pytest.importorskip("transformers")
    model = save_random_run(tmp_path / "run", gpt2, method, n)
    folder = export(tmp_path / "run", tmp_path / "hf")
    monkeypatch.chdir(folder)
    card = (folder / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", card, re.S)
    exec(program, {})
    answers = [capsys.readouterr().out[:-1]]
    question = "a question, written as in the training data\n"  # the run's file is gone
    answers += Engine(model, gpt2, Curriculum(method)).generate([question], n, 9).text
    # a random model also generates special tokens, which the program leaves out
    answers = [re.sub(r"<\|[a-z-]+\|>", "", text) for text in answers]
    assert len(answers) == 2 and answers[0] == answers[1]
    assert ("**does not run its thoughts**" in card) == (method == "coconut" and n > 0)
    assert f"{'pauses' if 'pause' in method else 'thoughts'}: {n}\n" in card


def test_card_says_how_it_was_trained(exported):
    """The card must name the training run, and no path of the machine."""
    _, _, run, folder = exported
    card = (folder / "README.md").read_text()
    manifest = checkpoint.read_manifest(checkpoint.resolve(run))
    for text in (
        manifest["commit"],
        "--method=coconut",
        "stage 3",
        "7 optimizer steps",
        "thoughts: 3",
        "**does not run its thoughts**",
    ):
        assert text in card
    assert "somebody" not in card
    assert len(card.splitlines()) <= 42


def test_card_asks_a_question_of_its_own_task(tmp_path, gpt2):
    """The card of a model trained on a user's own file asked about wumpuses."""
    save_random_run(tmp_path / "run", gpt2)
    manifest = checkpoint.read_manifest(checkpoint.resolve(tmp_path / "run"))
    card = export_module._card(random_gpt(), manifest)
    assert "question = 'a question, written as in the training data\\n'\n" in card
    manifest["config"] |= {"data": None, "task": "gsm8k", "pad_latent_to_max": False}
    card = export_module._card(random_gpt(), manifest)
    assert EXAMPLES["gsm8k"] in card and "had fewer thoughts." in card


def test_exported_files_have_normal_permissions(exported):
    """safetensors writes its file with mode 0600, so nobody else could read the weights."""
    *_, run, folder = exported
    for files in folder, checkpoint.resolve(run):
        assert len({path.stat().st_mode for path in files.iterdir()}) == 1


def test_word_level_vocabulary_is_refused(tmp_path, tokenizer):
    """Written as GPT-2's, a word-level tokenizer would give other ids."""
    save_random_run(tmp_path / "run", tokenizer)
    with pytest.raises(UserError, match="has tokenizer 'words'") as error:
        export(tmp_path / "run", tmp_path / "hf")
    assert str(error.value).count("\n") == 1 and not (tmp_path / "hf").exists()


@pytest.mark.parametrize("method", ["soft_thought", "projected", "pause_multipass"])
def test_soft_and_projected_thoughts_are_refused(tmp_path, tokenizer, method):
    """The card's loop would feed back hidden states instead."""
    save_random_run(tmp_path / "run", tokenizer, method, thought=METHODS[method].thought_type)
    with pytest.raises(UserError, match="not a plain GPT-2, it has thought="):
        export(tmp_path / "run", tmp_path / "hf")


def test_export_is_whole_or_absent(tmp_path, gpt2, monkeypatch):
    """A full disk must not leave half a folder that looks like an export."""
    save_random_run(tmp_path / "run", gpt2)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("nanococonut.weights.export.save_file", full)
        with pytest.raises(UserError, match="could not be written"):
            export(tmp_path / "run", tmp_path / "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    export(tmp_path / "run", tmp_path / "deep" / "hf")
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["hf"]
    with pytest.raises(UserError, match="exists already"):
        export(tmp_path / "run", tmp_path / "deep" / "hf")


def test_smear_is_refused(tmp_path, tokenizer):
    """transformers would ignore the smear and give other logits."""
    save_random_run(tmp_path / "run", tokenizer, smear=True)
    with pytest.raises(UserError, match="it has smear=True") as error:
        export(tmp_path / "run", tmp_path / "hf")
    assert str(error.value).count("\n") == 1 and not (tmp_path / "hf").exists()


def command(monkeypatch, capsys, *argv):
    """Run python -m nanococonut.weights.export. Return (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["export", *map(str, argv)])
    code = 0
    try:
        runpy.run_path(export_module.__file__, run_name="__main__")
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


def test_command(tmp_path, gpt2, monkeypatch, capsys):
    """Mistakes end with exit code 2 and two lines, as in the scripts."""
    save_random_run(tmp_path / "run", gpt2)
    code, out, err = command(monkeypatch, capsys, tmp_path / "run", tmp_path / "hf")
    assert (code, err) == (0, "") and out == f"wrote {tmp_path / 'hf'}\n"
    for argv in (
        [tmp_path / "run", tmp_path / "hf"],
        [tmp_path / "none", tmp_path / "new"],
        [tmp_path / "run"],
        [],
    ):
        code, _, err = command(monkeypatch, capsys, *argv)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 2
