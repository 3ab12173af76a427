"""Tokens must agree everywhere: the three real tokenizers are the proving ground, a byte tokenizer stands
in."""

import functools
from datetime import datetime

import pytest
import torch
from conftest import ROOT, byte_tokenizer, shared_path, tiny_model

from ads import chat

R1, QWEN, LLAMA = "deepseek-r1-distill-qwen-7b", "qwen2.5-base", "llama-3.2-instruct"
REAL = (R1, QWEN, "qwen2.5-instruct", LLAMA)
PROBLEM = "Janet\u2019s ducks lay 16 eggs per day, she sells 3 at $2.  How much is that?"
TRACE = "First, 3 * 2 = 6.\n</think>\n\nShe makes **$6**, i.e. \\boxed{6} \u2014 caf\u00e9 \U0001f986."


@functools.cache
def real(name):
    return chat.load_tokenizer(str(shared_path("tokenizers", name)))


@pytest.mark.parametrize("name", REAL)
def test_prompt_has_both_messages_and_ends_where_the_response_begins(name):
    tokenizer = real(name)
    text = chat.render_prompt(tokenizer, PROBLEM)
    assert chat.SYSTEM_PROMPT in text and PROBLEM in text
    assert text.endswith({R1: "<think>\n", LLAMA: "assistant<|end_header_id|>\n\n"}.get(name, "assistant\n"))
    ids = chat.prompt_ids(tokenizer, PROBLEM)
    assert tokenizer.decode(ids) == text, "one beginning-of-text token at most, nothing added or lost"


def test_llama_prompt_does_not_depend_on_the_day():
    assert f"Today Date: {chat.DATE_STRING}" in chat.render_prompt(real(LLAMA), PROBLEM)


@pytest.fixture
def set_day(monkeypatch):
    """Sets the clock that the library lends to chat templates."""

    def set_clock(*day):
        clock = type("Clock", (datetime,), {"now": classmethod(lambda cls, tz=None: cls(*day))})
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)

    return set_clock


TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
DAYS = {
    "{{ strftime_now('%d %B %Y') }}": "26 July 2024",
    "{{ strftime_now('%Y-%m-%dT%H:%M:%S') }}": "2024-07-26T00:00:00",
    "{{ strftime_now('%A the %-d, %j') }}": "Friday the 26, 208",
    "{% if strftime_now('%d')|int % 2 %}odd{% else %}even{% endif %}": "even",
    "{% if strftime_now is defined %}{% set d = strftime_now('%y') %}{{ d }}{% endif %}": "24",
    "{% macro day() %}{{ strftime_now('%b') }}{% endmacro %}{{ day() }}": "Jul",
}


@pytest.mark.parametrize("template", DAYS)
def test_a_template_that_asks_for_the_day_is_told_the_same_one(template, set_day):
    """Templates of many families call strftime_now: training and test had other prompts after midnight."""
    tokenizer = byte_tokenizer(chat_template=template + TURNS)
    for day in ((2031, 1, 1, 12, 5), (2032, 2, 2)):
        set_day(*day)
        text = chat.render_prompt(tokenizer, "x")
        assert text == f"{DAYS[template]}<system>{chat.SYSTEM_PROMPT}<user>x"


def test_the_template_that_words_its_prompt_by_the_day(set_day):
    """Its resumed stage mixed "Problem :" and "Solution :"."""
    template = shared_path("cases", "template_date", "chat_template.jinja").read_text()
    tokenizer, prompts = byte_tokenizer(chat_template=template), []
    for day in range(1, 5):
        set_day(2031, 1, day)
        prompts.append(chat.prompt_ids(tokenizer, PROBLEM))
    assert prompts == [prompts[0]] * 4


@pytest.mark.parametrize("name", REAL)
def test_the_fixed_day_changes_nothing_else(name):
    tokenizer = real(name)
    messages = [{"role": "system", "content": chat.SYSTEM_PROMPT}, {"role": "user", "content": PROBLEM}]
    keywords = {"tokenize": False, "add_generation_prompt": True, "date_string": chat.DATE_STRING}
    assert chat.render_prompt(tokenizer, PROBLEM) == tokenizer.apply_chat_template(messages, **keywords)


@pytest.mark.parametrize(
    "start", ("\n", "  ", "\n  {% if true %}a{% endif %}\n", "{# c #}\n", "{{- 'b' -}} ")
)
def test_white_space_that_a_template_begins_with_stays_as_it_is(start):
    tokenizer = byte_tokenizer(chat_template=start + TURNS)
    messages = [{"role": "system", "content": chat.SYSTEM_PROMPT}, {"role": "user", "content": "x"}]
    assert chat.render_prompt(tokenizer, "x") == tokenizer.apply_chat_template(messages, tokenize=False)


WITHOUT_SYSTEM = {
    "refuses it": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "<{{ m.role }}>{{ m.content | trim }}{% endfor %}",
    "wants turns in order": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    "drops it": "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    "shows one turn": "<user>{{ messages[-1].content }}",
    "shows it last": "{% for m in messages|reverse %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    "fails on it": "{% for m in messages %}<{{ {'user': 'user'}[m.role] + '>' + m.content }}{% endfor %}",
}


@pytest.mark.parametrize("kind", WITHOUT_SYSTEM)
def test_without_a_system_role_the_instruction_goes_into_the_users_turn(kind):
    """A template that refused a system message was a traceback, one that dropped it a run without a word."""
    tokenizer = byte_tokenizer(chat_template=WITHOUT_SYSTEM[kind])
    assert chat.instruction_place(tokenizer) == "user"
    assert "the instruction goes into the user's turn" in chat.describe_place(tokenizer)
    for problem in (PROBLEM, "a", "", chat.SYSTEM_PROMPT):
        assert chat.render_prompt(tokenizer, problem).strip() == (
            f"<user>{chat.SYSTEM_PROMPT}\n\n{problem}".strip()
        )
    text = chat.render_prompt(tokenizer, "p3", [("p1", "s1"), ("p2", "s2")])
    places = [text.index(part) for part in (chat.SYSTEM_PROMPT, "p1", "s1", "p2", "s2", "p3")]
    assert places == sorted(places)


def test_the_template_that_refuses_a_system_role():
    template = shared_path("cases", "template_refuses_system", "chat_template.jinja").read_text()
    text = chat.render_prompt(byte_tokenizer(chat_template=template), PROBLEM)
    assert text == f"<|user|>{chat.SYSTEM_PROMPT}\n\n{PROBLEM}<|end|><|assistant|>"


def test_an_instruction_that_the_vocabulary_lacks_is_left_out_and_said():
    """The demo's models know a hundred words; their templates show the user's turn alone."""
    tokenizer = chat.load_tokenizer(str(ROOT / "demo" / "models" / "teacher"))
    assert chat.render_prompt(tokenizer, "1 + 1 ?") == "Problem : 1 + 1 ? Solution :"
    assert "lacks the instruction's words: prompts go without it" in chat.describe_place(tokenizer)
    assert chat.describe_place(byte_tokenizer()) == ""


@pytest.mark.parametrize(
    "template,words",
    (
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not show the instruction as it is"),
        (
            "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
            "does not show the instruction as it is",
        ),
        ("{{ messages[-1].content[:110] }}", "does not show the problem 'Is 3 < 4"),
        ("{% for m in messages %}{{ m.content | replace('<', '&lt;') }}{% endfor %}", "not show the problem"),
        (
            "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
            "not show",
        ),
        ("{% for m in messages %}", "fails: Unexpected end of template"),
        ("{{ raise_exception('only tools') }}", "fails: only tools"),
        ("{{ messages[7].content }}", "fails: "),
        ({"tool_use": TURNS}, "fails: "),
    ),
)
def test_a_template_that_does_not_show_the_task_is_refused_in_one_line(template, words, tmp_path):
    byte_tokenizer(chat_template=template).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="set tokenizer to one of the family") as error:
        chat.load_tokenizer(str(tmp_path))
    assert words in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_problem_that_the_template_changes_is_refused():
    tokenizer = byte_tokenizer(
        chat_template="{% for m in messages %}{{ m.content|replace('9', '8') }}{% endfor %}"
    )
    chat.prompt_ids(tokenizer, "6 + 1")
    with pytest.raises(ValueError, match=r"does not show the problem '6 \+ 9' as it is"):
        chat.prompt_ids(tokenizer, "6 + 9")


# Pieces of SentencePiece's kind: a space is a letter of the vocabulary, and one stands before each text

SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{i:02X}>" for i in range(256))
PIECES = (
    "\u2581",
    *"abcefilnorstwxAFTh*{}\\",
    "an",
    "er",
    "ans",
    "wer",
    "answer",
    "\u2581answer",
    "Fin",
    "al",
)
MERGES = ("a n", "e r", "an s", "w er", "ans wer", "\u2581 answer", "a l")


def sentencepiece_tokenizer(kind, template=TURNS + "<|assistant|>{{ '\n' }}"):
    """As Llama 2's first files have it ("prepend"), as its later ones and Mistral's ("first"), as T5's family
    ("always"), as Gemma's, which adds no space ("gemma"); "unigram" has another model."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {piece: i for i, piece in enumerate((*SPECIAL, *BYTES, *PIECES))}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "unigram":
        scores = [(piece, -len(vocab) / (1 + len(piece))) for piece in vocab]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    scheme = {"always": "always", "unigram": "always", "first": "first"}.get(kind)
    joined = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*joined, decoders.Strip(" ", 1, 0)])
    if scheme:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=kind == "unigram")
    if kind in ("always", "unigram"):
        metaspace = decoders.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace])
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    if kind == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence(joined)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    roles = ("<|assistant|>", "<system>", "<user>")
    fast.add_special_tokens({"additional_special_tokens": list(roles)})
    fast.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    fast.chat_template = template
    return fast


KINDS = ("prepend", "first", "always", "unigram", "gemma")
ADDING = tuple(kind for kind in KINDS if kind != "gemma")
RESPONSES = (
    "answer", " answer", "  answer", "\nanswer", "", " ", "b answer", "<think> answer</think>\nb",
    "caf\u00e9", "\U0001f986 answer", "a <|assistant|> b", TRACE, chat.THINK_END + chat.FORCE_TEXT,
)  # fmt: skip


@pytest.mark.parametrize("kind", ADDING)
def test_sentencepiece_tokenizers_add_a_space_to_a_text_alone(kind):
    """What makes the next tests worth having."""
    tokenizer = sentencepiece_tokenizer(kind)
    assert tokenizer.convert_ids_to_tokens(chat.encode(tokenizer, "answer")) == ["\u2581answer"]
    assert tokenizer.decode(chat.encode(tokenizer, "answer")) == "answer"


@pytest.mark.parametrize("text", RESPONSES)
@pytest.mark.parametrize("kind", KINDS)
def test_text_that_follows_a_prompt_is_that_text(kind, text):
    """The student's first label and the first token of a forced answer had a space of the tokenizer's."""
    tokenizer = sentencepiece_tokenizer(kind)
    prompt = chat.prompt_ids(tokenizer, "answer")
    ids, labels = chat.student_example(tokenizer, "answer", text, finished=True)
    assert ids[: len(prompt)] == prompt and labels[len(prompt) :] == ids[len(prompt) :]
    response = ids[len(prompt) : -1]
    assert chat.response_text(tokenizer, [*response, ids[-1]], {ids[-1]}) == text
    assert "".join(chat.token_texts(tokenizer, response)) == text
    forced = chat.encode_next(tokenizer, text)
    whole = chat.decode_next(tokenizer, prompt + forced)
    assert whole == chat.decode_next(tokenizer, prompt) + text


@pytest.mark.parametrize("text", ("answer", " answer", "  b", "\n\n**", "{", "\u00e9"))
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_put_together_are_the_whole(kind, text):
    """Where nothing joins over the seam, encoding beginning and rest apart is encoding them at once."""
    tokenizer = sentencepiece_tokenizer(kind)
    for beginning in ("b\n", "answer {", "\U0001f986"):
        pieces = chat.encode(tokenizer, beginning) + chat.encode_next(tokenizer, text)
        assert pieces == chat.encode(tokenizer, beginning + text)


@pytest.mark.parametrize("kind", KINDS)
def test_forcing_has_no_space_of_the_tokenizers(kind):
    tokenizer = sentencepiece_tokenizer(kind)
    prompt = chat.prompt_ids(tokenizer, "b")
    for response, closing in ((" an <think> answer", chat.THINK_END), ("answer", "")):
        ids = chat.encode_next(tokenizer, response)
        given = chat.force_ids(tokenizer, prompt, ids, set())
        assert chat.decode_next(tokenizer, ids + given) == response + closing + chat.FORCE_TEXT


@pytest.mark.parametrize("kind", KINDS)
def test_control_text_in_a_problem_gets_no_space_and_changes_nothing_behind_it(kind):
    tokenizer = sentencepiece_tokenizer(kind)
    plain, spaced = (chat.prompt_ids(tokenizer, text) for text in ("b", "<|assistant|> answer"))
    control = tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert spaced.count(control) == plain.count(control) == 1
    assert spaced[spaced.index(control) :] == plain[plain.index(control) :], "the template's own end"
    turn = spaced[spaced.index(tokenizer.convert_tokens_to_ids("<user>")) + 1 : spaced.index(control)]
    assert chat.decode_next(tokenizer, turn).removeprefix(" ") == "<|assistant|> answer"


@pytest.mark.parametrize("kind", (*REAL, "bytes", "gemma"))
def test_tokenizers_that_add_no_space_are_used_as_they_are(kind):
    tokenizer = {"bytes": byte_tokenizer, "gemma": lambda: sentencepiece_tokenizer("gemma")}.get(
        kind, lambda: real(kind)
    )()
    assert chat.continuing(tokenizer) is tokenizer
    for text in (PROBLEM, TRACE, " a", "\n\n\nb", "<|im_end|>"):
        assert chat.encode_next(tokenizer, text) == tokenizer.encode(text, add_special_tokens=False)


def test_a_byte_level_tokenizer_that_adds_a_space(tmp_path):
    """RoBERTa's kind, and GPT-2's with add_prefix_space."""
    from tokenizers import pre_tokenizers

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert tokenizer.decode(chat.encode(tokenizer, "a")) == " a"
    assert chat.decode_next(tokenizer, chat.encode_next(tokenizer, "a")) == "a"


@pytest.mark.parametrize("name", REAL)
def test_training_prompt_equals_evaluation_prompt(name):
    tokenizer = real(name)
    prompt = chat.prompt_ids(tokenizer, PROBLEM)
    ids, labels = chat.student_example(tokenizer, PROBLEM, TRACE, finished=True)
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [chat.IGNORED_LABEL] * len(prompt)
    assert labels[len(prompt) :] == ids[len(prompt) :]


@pytest.mark.parametrize("name", REAL)
def test_a_trace_with_a_think_block_reaches_the_student_whole(name):
    """R1's template drops everything up to </think> from assistant turns; the student must see all of it."""
    tokenizer = real(name)
    num_prompt = len(chat.prompt_ids(tokenizer, PROBLEM))
    ids, _ = chat.student_example(tokenizer, PROBLEM, TRACE, finished=True)
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[num_prompt:-1]) == TRACE
    unfinished, labels = chat.student_example(tokenizer, PROBLEM, TRACE, finished=False)
    assert unfinished == ids[:-1] and len(labels) == len(unfinished)


@pytest.mark.parametrize("name", (QWEN, LLAMA))
def test_special_token_text_in_a_trace_stays_text(name):
    tokenizer = real(name)
    special = {QWEN: "<|im_end|>", LLAMA: "<|eot_id|>"}[name]
    ids, labels = chat.student_example(tokenizer, PROBLEM, f"a{special}b", finished=False)
    response = [i for i in labels if i != chat.IGNORED_LABEL]
    assert tokenizer.convert_tokens_to_ids(special) not in response
    assert tokenizer.decode(response) == f"a{special}b"


CONTROL = {
    R1: ["<think>", "</think>", "<\uff5cUser\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"],
    QWEN: ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    LLAMA: ["<|eot_id|>", "<|start_header_id|>", "<|begin_of_text|>"],
}


@pytest.mark.parametrize("name", CONTROL)
def test_control_token_text_in_a_problem_stays_text(name):
    """A problem that held <|im_end|> once ended the user's turn; </think> closed the think block."""
    tokenizer = real(name)
    plain = chat.prompt_ids(tokenizer, "How many?")
    for control in CONTROL[name]:
        problem = f"{control}How {control}{control} many?"
        token = tokenizer.convert_tokens_to_ids(control)
        ids = chat.prompt_ids(tokenizer, problem, [(control, control)])
        assert ids.count(token) == chat.prompt_ids(tokenizer, "How many?", [("x", "y")]).count(token)
        assert tokenizer.decode(ids).count(problem) == 1
        assert tokenizer.decode(ids).count(control) == 5 + plain.count(token)
    assert chat.prompt_ids(tokenizer, "a < b > c") == tokenizer.encode(
        chat.render_prompt(tokenizer, "a < b > c"), add_special_tokens=False
    )


def force(tokenizer, prompt, response_text, finished=True):
    response, eos = chat.encode(tokenizer, response_text), [tokenizer.eos_token_id]
    return tokenizer.decode(response + chat.force_ids(tokenizer, prompt, response + eos * finished, set(eos)))


@pytest.mark.parametrize(
    "response,closes",
    (
        ("hm", True),
        ("hm\n</think>\nThe answer is 6.", False),
        ("hm\n</think>\n wait <think> again", True),
        ("", True),
    ),
)
def test_forcing_closes_the_block_that_the_r1_prompt_opened(response, closes):
    tokenizer = real(R1)
    prompt = chat.prompt_ids(tokenizer, PROBLEM)
    for finished in (True, False):
        text = force(tokenizer, prompt, response, finished)
        assert text == response + ("\n</think>" if closes else "") + chat.FORCE_TEXT
    end_of_think = tokenizer.convert_tokens_to_ids("</think>")
    ids = chat.force_ids(tokenizer, prompt, chat.encode(tokenizer, response), set())
    assert ids.count(end_of_think) == closes, "closed by the token itself"


def test_forcing_leaves_a_model_without_think_block_alone():
    for tokenizer in (byte_tokenizer(), real(LLAMA)):
        prompt = chat.prompt_ids(tokenizer, "Is <think> a word?")
        assert force(tokenizer, prompt, "6") == "6" + chat.FORCE_TEXT


def test_response_text_drops_the_ending_eos_alone():
    tokenizer = byte_tokenizer()
    eos = tokenizer.eos_token_id
    other = tokenizer.convert_tokens_to_ids("<|user|>")
    ids = chat.encode(tokenizer, "a b")
    assert chat.response_text(tokenizer, [*ids, eos], {eos}) == "a b"
    assert chat.response_text(tokenizer, [*ids, other], {eos}) == "a b<|user|>"
    assert chat.response_text(tokenizer, [eos], {eos}) == ""


def test_eos_ids_come_from_tokenizer_and_model():
    model = tiny_model()
    model.generation_config.eos_token_id = [3, 4]
    model.config.eos_token_id = 5
    tokenizer = byte_tokenizer()
    assert chat.eos_ids(tokenizer, model) == {3, 4, 5, tokenizer.eos_token_id}


def test_r1_and_qwen_share_all_but_seven_special_ids():
    """The paper's pair: the R1 distillation renamed seven of Qwen's special tokens."""
    found = chat.match_vocabularies(real(R1), real(QWEN))
    assert [i for i, _, _ in found.differing] == list(range(151643, 151650))
    assert len(found.shared_ids) == 151_665 - 7


def test_r1_and_llama_are_refused():
    with pytest.raises(
        ValueError, match="different vocabularies.*ordinary tokens differ.*choose a proxy_student"
    ):
        chat.match_vocabularies(real(R1), real(LLAMA))


def test_swapped_tokenizer_is_refused(tmp_path):
    model, other = tmp_path / "model", tmp_path / "other"
    byte_tokenizer().save_pretrained(model)
    swapped = byte_tokenizer()
    vocab = swapped.get_vocab()
    text = swapped.backend_tokenizer.to_str().replace(f'"a":{vocab["a"]}', f'"a":{vocab["b"]}', 1)
    text = text.replace(f'"b":{vocab["b"]}', f'"b":{vocab["a"]}', 1)
    byte_tokenizer().save_pretrained(other)
    (other / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="does not belong to model.*2 ordinary tokens differ"):
        chat.load_tokenizer_for(str(model), str(other))
    assert chat.load_tokenizer_for(str(model), str(model))


def test_tokenizer_without_chat_template_or_with_too_many_ids_is_refused(tmp_path):
    byte_tokenizer(chat_template=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        chat.load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="token id 259.*only 200 embedding rows"):
        chat.check_rows(byte_tokenizer(), 200, "tiny")


def test_padding_is_masked_by_length_when_pad_is_eos():
    """pad may equal eos: the eos that ends a trace keeps its label, padding has none."""
    from ads.delta.loss import collate

    eos = 9
    rows = [{"input_ids": [1, 2, eos], "labels": [-100, 2, eos]}, {"input_ids": [1], "labels": [1]}]
    batch = collate(rows, pad_id=eos)
    assert batch["input_ids"].tolist() == [[1, 2, eos], [1, eos, eos]]
    assert batch["labels"].tolist() == [[-100, 2, eos], [1, -100, -100]]
    assert batch["input_ids"].dtype == torch.int64
