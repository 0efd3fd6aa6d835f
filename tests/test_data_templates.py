"""Chat templates: bounded and alone in their process, packaged ones equal the official ones, masks and markers."""

import os
import subprocess

import data_toy
import numpy as np
import psutil
import pytest

from kjax.data import Tokenizer, chat, templates
from kjax.data.templates import Renderer, Template
from kjax.errors import DataError

DIALOGUE = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "the cat"}, {"role": "user", "content": "and?"},
            {"role": "assistant", "content": "sat"}]
# The dialogue of common small models: role line, text stripped, end token, line break. No marks of its own.
CHATML = ("{% for m in messages %}{{ '<|im_user|>' + m.role + '\\n' + m.content | trim + '<|im_end|>' + '\\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_user|>assistant\\n' }}{% endif %}")
PLAIN = ("{% for m in messages %}{{ '<|im_user|>' + m.role + '<|im_middle|>' + m.content + '<|im_end|>' }}"
         "{% endfor %}")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return data_toy.write(tmp_path_factory.mktemp("toy"))


def load(toy, tmp_path, source):
    path = tmp_path / "given.jinja"
    path.write_text(source)
    return Tokenizer.load(toy, str(path))


def children():
    return psutil.Process().children(recursive=True)


@pytest.mark.parametrize("source, message", [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "2 s of processor time"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}spam and eggs{% endfor %}{% endfor %}", "writes more than"),
    ("{% set ns = namespace(x='spam') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
     "needs more than 1024 MiB|does not finish"),  # touching pages takes time too
    ("{{ 9 ** (9 ** 9) }}", "2 s of processor time"),
    ("{{ 'x' * 10 ** 10 }}", "needs more than 1024 MiB"),
    ("{{ '%9999999999d' % 1 }}", "chat template"),
    ("{{ range(10 ** 9) | list }}", "OverflowError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{% for m in messages %}", "TemplateSyntaxError"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{{ raise_exception('only two turns') }}", "only two turns"),
    ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    ("{{ ''.__class__.__base__.__subclasses__() }}", "SecurityError"),
    ("{{ cycler.__init__.__globals__.os.system('id') }}", "SecurityError"),
    ("{% set x = messages.append(1) %}", "SecurityError"),
])
def test_templates_are_bounded(source, message):
    before, descriptors = children(), os.listdir("/proc/self/fd")
    with pytest.raises(DataError, match=message), Renderer(Template("bad.jinja", source), {}) as renderer:
        renderer.render([{"messages": DIALOGUE}], ["row 7"])
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


def test_a_runaway_row_is_named(toy, tmp_path):
    source = PLAIN + "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}" \
        "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    tokenizer = load(toy, tmp_path, source)
    dialogue = [{"role": "user", "content": "loop"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match="given.jinja does not finish: stopped after 2 s of processor time on row 2"):
        tokenizer.render_all([DIALOGUE, dialogue], ["row 1", "row 2"])
    assert not children()


def test_the_process_outlives_neither_its_use_nor_its_parent():
    with Renderer(Template("t", "{{ messages | length }}"), {}) as renderer:
        [child] = children()
        assert renderer.render([{"messages": [1, 2]}], ["x"]) == ["2"]
        child.send_signal(2)  # Ctrl-C reaches the whole process group; the parent alone decides
        assert renderer.render([{"messages": []}], ["x"]) == ["0"]
    assert not children()
    program = subprocess.Popen([os.sys.executable, "-P", templates.__file__.replace("templates.py", "sandbox.py")],
                               stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    program.stdin.write(b'{"template": "", "variables": {}, "seconds": 1, "memory": 1073741824}\n')
    program.stdin.close()  # as when the parent dies
    assert program.wait(60) == 0


def test_deep_replies_and_wide_texts_pass(toy):
    tokenizer = Tokenizer.load(toy, "deepseek3")
    text = "喵🐈" * 50_000  # larger than any pipe buffer in both directions
    ids, trained = tokenizer.render([{"role": "user", "content": text}, {"role": "assistant", "content": text}])
    assert tokenizer.decode(ids[trained]) == text + data_toy.EOS


def test_chunks_change_nothing(toy, monkeypatch):
    tokenizer = Tokenizer.load(toy, "deepseek3")
    dialogues = [DIALOGUE[1:3], DIALOGUE, [*DIALOGUE[1:], *DIALOGUE[1:]]] * 3
    where = [str(number) for number in range(9)]
    whole = tokenizer.render_all(dialogues, where)
    for rows, characters in ((1, 1), (2, 1000), (512, 1), (512, 60)):
        monkeypatch.setattr(chat, "_CHUNK_ROWS", rows)
        monkeypatch.setattr(chat, "_CHUNK_CHARACTERS", characters)
        for (ids, trained), (other_ids, other_trained) in zip(
                whole, tokenizer.render_all(dialogues, where), strict=True):
            np.testing.assert_array_equal(ids, other_ids)
            np.testing.assert_array_equal(trained, other_trained)
    assert tokenizer.render_all([], []) == []


def test_names(toy, tmp_path):
    assert templates.packaged() == sorted(templates._REQUIRED)
    for alias, name in (("deepseek", "deepseek2"), ("moonlight", "kimi_k2"), ("kimi", "kimi_k2")):
        assert Tokenizer.load(toy, alias).template.name == name
    assert set(templates._ALIASES.values()) <= set(templates.packaged())
    with pytest.raises(DataError, match="packaged are deepseek2, deepseek3, deepseek31, .*moonlight is kimi_k2"):
        Tokenizer.load(toy, "llama3")
    with pytest.raises(DataError, match="gone.jinja"):
        Tokenizer.load(toy, "gone.jinja")
    with pytest.raises(DataError, match="lacks its markers <|im_system|>.*another model"):
        Tokenizer.load(data_toy.write(tmp_path / "few", specials=data_toy.SPECIALS[:6]), "kimi_k2")
    assert Tokenizer.load(toy).template is None
    with pytest.raises(DataError, match="has no chat template; set data.template"):
        Tokenizer.load(toy).render(DIALOGUE)
    own = data_toy.write(tmp_path / "own", chat_template=[
        {"name": "tools", "template": "x"}, {"name": "default", "template": PLAIN}])
    assert Tokenizer.load(own).chat_template == PLAIN
    (own / "chat_template.jinja").write_text(CHATML)
    assert Tokenizer.load(own).chat_template == CHATML


@pytest.mark.parametrize("name, text, replies", [
    ("deepseek2", "{bos}be kind\n\nUser: hello\n\nAssistant: the cat{eos}User: and?\n\nAssistant: sat{eos}",
     [" the cat{eos}", " sat{eos}"]),
    ("deepseek3", "{bos}be kind<｜User｜>hello<｜Assistant｜>the cat{eos}<｜User｜>and?<｜Assistant｜>sat{eos}",
     ["the cat{eos}", "sat{eos}"]),
    ("deepseekr1", "{bos}be kind<｜User｜>hello<｜Assistant｜>the cat{eos}<｜User｜>and?<｜Assistant｜>sat{eos}",
     ["the cat{eos}", "sat{eos}"]),
    ("kimi_k2", "<|im_system|>system<|im_middle|>be kind<|im_end|><|im_user|>user<|im_middle|>hello<|im_end|>"
     "<|im_assistant|>assistant<|im_middle|>the cat<|im_end|><|im_user|>user<|im_middle|>and?<|im_end|>"
     "<|im_assistant|>assistant<|im_middle|>sat<|im_end|>", ["the cat<|im_end|>", "sat<|im_end|>"]),
])
def test_packaged_templates(toy, name, text, replies):
    bos = "" if name == "kimi_k2" else data_toy.BOS
    tokenizer = Tokenizer.load(data_toy.write(toy.parent / name, add_bos_token=bool(bos)), name)
    fill = {"bos": bos, "eos": data_toy.EOS}
    ids, trained = tokenizer.render(DIALOGUE)
    assert tokenizer.decode(ids) == text.format(**fill)
    assert tokenizer.decode(ids[trained]) == "".join(replies).format(**fill)
    last = tokenizer.render(DIALOGUE, train="last")[1]
    assert tokenizer.decode(ids[last]) == replies[-1].format(**fill)
    everything = tokenizer.render(DIALOGUE, train="all")[1]
    assert everything.all()
    prompt, none = tokenizer.render(DIALOGUE[:-1], add_generation_prompt=True)
    assert not none.any()
    assert ids[: len(prompt)].tolist() == prompt.tolist()  # a reply is trained where generation would write it
    assert trained[len(prompt):].all()


def test_the_models_own_template_gets_the_same_mask(toy, tmp_path):
    """Without marks of its own: around the replies, inside their stripped white space, plus the end token alone."""
    tokenizer = load(toy, tmp_path, CHATML)
    spaced = [dict(m, content=f" \n{m['content']}\n\n") for m in DIALOGUE]
    for dialogue in (DIALOGUE, spaced):
        ids, trained = tokenizer.render(dialogue)
        assert tokenizer.decode(ids[trained]) == "the cat<|im_end|>sat<|im_end|>"
    assert tokenizer.eos_ids == {tokenizer.specials[data_toy.EOS].id, tokenizer.specials["<|im_end|>"].id}
    source = CHATML.replace(" + '<|im_end|>'", " + ' ' + '<|im_end|>'").replace("+ m.content | trim", "+ m.content")
    ids, trained = load(toy, tmp_path, source).render(DIALOGUE)
    assert tokenizer.decode(ids[trained]) == "the cat <|im_end|>sat <|im_end|>"


def test_text_behind_a_reply_is_not_trained(toy, tmp_path):
    source = "{% for m in messages %}{{ m.content + ' said: <|im_user|>' }}{% endfor %}"
    tokenizer = load(toy, tmp_path, source)
    ids, trained = tokenizer.render(DIALOGUE[1:3])
    assert tokenizer.decode(ids[trained]) == "the cat"


def test_a_token_that_begins_before_its_reply_is_trained(toy, tmp_path):
    tokenizer = load(toy, tmp_path, "{% for m in messages %}{{ m.role + ': ' + m.content }}<|im_end|>{% endfor %}")
    ids, trained = tokenizer.render(DIALOGUE[1:3])
    assert tokenizer.encode(" the")[0] in ids  # one token with the template's space and the reply's first word
    assert tokenizer.decode(ids[trained]) == " the cat<|im_end|>"


def test_a_token_that_ends_behind_its_reply_is_trained(toy, tmp_path):
    tokenizer = load(toy, tmp_path, "{% for m in messages %}{{ m.content + 't sat' }}{% endfor %}")
    ids, trained = tokenizer.render([{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the ca"}])
    assert tokenizer.encode(" cat")[0] in ids  # one token with the reply's last letters and the template's
    assert tokenizer.decode(ids[trained]) == "the cat"


def test_marks_agree_with_the_generation_blocks(toy, tmp_path):
    """The packaged templates with their marks taken out give the same ids and the same mask."""
    for name in ("deepseek3", "deepseekr1", "kimi_k2"):
        marked = Tokenizer.load(toy, name)
        source = marked.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
        assert source != marked.chat_template
        plain = load(toy, tmp_path, source)
        for train in ("assistant", "last", "all"):
            for a, b in zip(marked.render(DIALOGUE, train=train), plain.render(DIALOGUE, train=train), strict=True):
                np.testing.assert_array_equal(a, b)


THINK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "<think>the mat</think>the cat"},
         {"role": "user", "content": "and?"}, {"role": "assistant", "content": "sat"}]
DROPS = "{% for m in messages %}{{ '<|im_user|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endfor %}"


def test_generation_blocks_work_inside_macros(toy, tmp_path):
    source = ("{% macro reply(m) %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endmacro %}"
              "{% for m in messages %}{% if m.role == 'assistant' %}{{ reply(m) }}{% else %}{{ m.content }}{% endif %}"
              "{% endfor %}")
    tokenizer = load(toy, tmp_path, source)
    ids, trained = tokenizer.render(DIALOGUE)
    assert tokenizer.decode(ids[trained]) == "the cat<|im_end|>sat<|im_end|>"
    assert tokenizer.decode(ids) == f"{data_toy.BOS}be kindhellothe cat<|im_end|>and?sat<|im_end|>"


def test_dropped_reply_text_is_an_error(toy, tmp_path):
    tokenizer = load(toy, tmp_path, DROPS)
    with pytest.raises(DataError, match="row 5.*drops or changes part of the reply '<think>the mat</think>the cat'.*"
                                        "data.template = "):
        tokenizer.render_all([DIALOGUE, THINK], ["row 4", "row 5"])
    assert tokenizer.decode(tokenizer.render(THINK, add_generation_prompt=True)[0]).count("the mat") == 0
    ids, trained = tokenizer.render(THINK, train="last")  # the reply that is trained is whole
    assert tokenizer.decode(ids[trained]) == "sat<|im_end|>"
    marked = DROPS.replace("{{", "{% generation %}{{").replace("}}", "}}{% endgeneration %}")
    with pytest.raises(DataError, match="marks 2 generated passages for 1 replies"):
        load(toy, tmp_path, marked)
    marked = ("{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
              "{{ m.content.split('</think>')[-1] }}{% endgeneration %}{% endif %}{% endfor %}")
    with pytest.raises(DataError, match="drops or changes part of the reply '<think>the mat</think>the cat'"):
        load(toy, tmp_path, marked).render(THINK)


def test_thinking_is_trained_with_the_packaged_template(toy):
    tokenizer = Tokenizer.load(toy, "deepseekr1")
    ids, trained = tokenizer.render(THINK)
    assert tokenizer.decode(ids[trained]) == f"<think>the mat</think>the cat{data_toy.EOS}sat{data_toy.EOS}"
    assert tokenizer.specials["<think>"].id in ids and tokenizer.specials["</think>"].id in ids
    prompt = tokenizer.decode(tokenizer.render(THINK[:3], add_generation_prompt=True)[0])
    assert prompt == f"{data_toy.BOS}<｜User｜>hello<｜Assistant｜>the cat{data_toy.EOS}<｜User｜>and?<｜Assistant｜>"


@pytest.mark.parametrize("directory, names", [("deepseek_r1", ["deepseekr1", "deepseek3"]), ("kimi_k2", ["kimi_k2"])])
def test_templates_equal_the_official_ones(shared_data, directory, names):
    own = Tokenizer.load(shared_data / "tokenizers" / directory)
    dialogues = [DIALOGUE, DIALOGUE[1:], DIALOGUE[1:3], [DIALOGUE[0], *DIALOGUE],
                 [{"role": "user", "content": " 你好\n"}, {"role": "assistant", "content": "\n喵 "}]]
    where = [str(number) for number in range(len(dialogues))]
    ids = {name: special.id for name, special in own.specials.items()}
    for name in names:
        packaged = Tokenizer(own.bpe, own.specials, name=own.name, variables=own.variables,
                             template=templates.find(name, shared_data, {}, ids), bos=data_toy.BOS, add_bos=own.add_bos)
        assert own.eos_ids >= packaged.eos_ids > set()
        for official, ours in zip(own.render_all(dialogues, where), packaged.render_all(dialogues, where), strict=True):
            np.testing.assert_array_equal(official[0], ours[0])
            np.testing.assert_array_equal(official[1], ours[1])
        for history in (DIALOGUE[:-1], THINK[:3] if name == "deepseekr1" else DIALOGUE[:2]):
            prompts = [t.render(history, add_generation_prompt=True)[0] for t in (own, packaged)]
            np.testing.assert_array_equal(*prompts)
    if "deepseekr1" in names:
        with pytest.raises(DataError, match="data.template = 'deepseekr1' or 'deepseek31', which keeps it"):
            own.render(THINK)


@pytest.mark.parametrize("name", ["deepseek2", "deepseek3", "kimi_k2"])
def test_ids_and_mask_equal_transformers(toy, name):
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.load(toy, name)
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(toy / "tokenizer.json"), bos_token=data_toy.BOS, eos_token=data_toy.EOS)
    theirs = oracle.apply_chat_template(DIALOGUE, chat_template=ours.chat_template, return_dict=True,
                                        return_assistant_tokens_mask=True)
    ids, trained = ours.render(DIALOGUE)
    skip = 1 if name == "kimi_k2" else 0  # this toy asks for a first token, which Kimi's template does not write
    assert ids.tolist()[skip:] == theirs["input_ids"]
    assert trained.tolist()[skip:] == [bool(m) for m in theirs["assistant_masks"]]
