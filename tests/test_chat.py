"""Tokens must agree everywhere: the three real tokenizers are the proving ground, a byte tokenizer stands
in."""

import pytest
import torch
from conftest import byte_tokenizer, shared_path, tiny_model

from ads import chat

R1, QWEN, LLAMA = "deepseek-r1-distill-qwen-7b", "qwen2.5-base", "llama-3.2-instruct"
REAL = (R1, QWEN, "qwen2.5-instruct", LLAMA)
PROBLEM = "Janet\u2019s ducks lay 16 eggs per day, she sells 3 at $2.  How much is that?"
TRACE = "First, 3 * 2 = 6.\n</think>\n\nShe makes **$6**, i.e. \\boxed{6} \u2014 caf\u00e9 \U0001f986."


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
    from ads.loss import collate

    eos = 9
    rows = [{"input_ids": [1, 2, eos], "labels": [-100, 2, eos]}, {"input_ids": [1], "labels": [1]}]
    batch = collate(rows, pad_id=eos)
    assert batch["input_ids"].tolist() == [[1, 2, eos], [1, eos, eos]]
    assert batch["labels"].tolist() == [[-100, 2, eos], [1, -100, -100]]
    assert batch["input_ids"].dtype == torch.int64
