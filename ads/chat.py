"""Every place where tokens must agree: tokenizer, prompt, response boundary, labels, answer forcing.

Token ids are carried end to end; text is for people, for grading and for the student's other tokenizer.
"""

import functools
import re
from dataclasses import dataclass

from ads import store

SYSTEM_PROMPT = "You are a helpful assistant. Reason step by step and put your final answer within \\boxed{}."
FORCE_TEXT = "\n\n**Final Answer**\n\\[\\boxed{"
THINK_END = "\n</think>"
NUM_FORCED_TOKENS = 32
# The Llama-3 template prints today's date unless it is given one: prompts may not depend on the day.
DATE_STRING = "26 Jul 2024"
IGNORED_LABEL = -100


def load_tokenizer(name, need_chat_template=True):
    """The tokenizer `name` (folder or hub name); ValueError when it has no chat template or no eos."""
    from transformers import AutoTokenizer

    where, commit = store.locate(name, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=commit)
    except Exception as error:  # whatever a folder that does not hold together makes the library raise
        raise ValueError(f"tokenizer {name!r} could not be loaded: {store.reason(error)}") from error
    if need_chat_template and not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer {name!r} has no chat template: set tokenizer to one of the family that has"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no eos token: set eos_token in its tokenizer_config.json")
    return tokenizer


def load_tokenizer_for(model_name, tokenizer_name=None):
    """The tokenizer of a model: its own, or `tokenizer_name`, which must then have the same vocabulary.

    A base model often has no chat template: then that of its instruct sibling is named.
    """
    tokenizer = load_tokenizer(tokenizer_name or model_name)
    if tokenizer_name and tokenizer_name != model_name:
        own = find_tokenizer(model_name)
        _, ordinary = compare_tokens(tokenizer, own) if own else ([], [])
        if ordinary:
            raise ValueError(
                f"tokenizer {tokenizer_name!r} does not belong to model {model_name!r}: "
                f"{describe_mismatch(ordinary)}"
            )
    return tokenizer


def find_tokenizer(model_name):
    """The tokenizer stored with a model, or None where there is none."""
    try:
        return load_tokenizer(model_name, need_chat_template=False)
    except (ValueError, FileNotFoundError):
        return None


def encode(tokenizer, text):
    """Token ids of `text`, nothing added."""
    return tokenizer.encode(text, add_special_tokens=False)


def render_prompt(tokenizer, problem, examples=()):
    """The prompt as text, up to where the model's response begins.

    `examples` are (problem, worked solution) pairs. They are shown inside the user's turn, since chat
    templates rewrite assistant turns (R1's drops everything up to </think>).
    """
    shown = "".join(f"Problem: {p}\n\nSolution: {s}\n\n\n" for p, s in examples)
    user = f"{shown}Problem: {problem}\n\nSolution:" if examples else problem
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": user}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, date_string=DATE_STRING
    )


def prompt_ids(tokenizer, problem, examples=()):
    """The prompt as token ids: the one function that training and evaluation both use.

    Text of the problem that reads like a control token, such as <think>, stays text.
    """
    given = [problem, *(text for example in examples for text in example)]
    mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if not any(c in text for text in given))
    inert = [break_control_text(tokenizer, text, mark) for text in given]
    text = render_prompt(tokenizer, inert[0], list(zip(inert[1::2], inert[2::2], strict=True)))
    return [i for piece in text.split(mark) for i in encode(tokenizer, piece)]


def break_control_text(tokenizer, text, mark):
    """`text` with a mark within whatever the tokenizer would take for a control token."""
    pattern = control_pattern(tokenizer)
    return pattern.sub(rf"\1{mark}", text) if pattern else text


@functools.lru_cache(maxsize=8)
def control_pattern(tokenizer):
    """What matches the first character of a control token's text; None where there is none to match.

    Some tokenizers have runs of spaces or line breaks among their added tokens: those are no control tokens.
    """
    added = tokenizer.added_tokens_decoder.values()
    found = [t.content for t in added if t.special or (t.content[0] == "<" and t.content[-1] == ">")]
    texts = "|".join(re.escape(text) for text in found if len(text) > 1)
    return re.compile(f"(?=(?:{texts}))(.)", re.DOTALL) if texts else None


def eos_ids(tokenizer, model):
    """Every token id that ends a response: the tokenizer's and those of the model's generation config."""
    found = [tokenizer.eos_token_id, model.config.eos_token_id]
    if model.generation_config is not None:
        found.append(model.generation_config.eos_token_id)
    lists = [ids if isinstance(ids, list) else [ids] for ids in found if ids is not None]
    return {i for ids in lists for i in ids}


def response_text(tokenizer, ids, eos):
    """The response as text, without the eos that ended it; special tokens sampled on the way stay visible."""
    if ids and ids[-1] in eos:
        ids = ids[:-1]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_texts(tokenizer, ids):
    """The text that each token adds; put together they are the decoded whole.

    A character of several tokens belongs to the last of them.
    """
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            text = before
        texts.append(text[len(before) :])
        before = text
    return texts


def force_ids(tokenizer, ids, response_ids, eos):
    """What follows prompt and response (less its eos) to make the model state its answer, as token ids.

    A think block that the prompt or the response opened and nobody closed is closed first.
    """
    if response_ids and response_ids[-1] in eos:
        response_ids = response_ids[:-1]
    prompt = tokenizer.decode(ids, skip_special_tokens=False).rstrip()
    response = tokenizer.decode(response_ids, skip_special_tokens=False)
    text = ("<think>" if prompt.endswith("<think>") else "") + response
    is_thinking = text.rfind("<think>") > text.rfind("</think>")
    return encode(tokenizer, (THINK_END if is_thinking else "") + FORCE_TEXT)


def student_example(tokenizer, problem, trace, finished):
    """(input_ids, labels) of one training sequence: evaluation prompt, trace, and eos if the trace finished.

    Labels mask the prompt by its length. Special-token text inside a trace stays text.
    """
    prompt = prompt_ids(tokenizer, problem)
    response = tokenizer.encode(trace, add_special_tokens=False, split_special_tokens=True)
    if finished:
        response = response + [tokenizer.eos_token_id]
    labels = [IGNORED_LABEL] * len(prompt) + response
    return prompt + response, labels


@dataclass(frozen=True)
class Vocabulary:
    """Which of the teacher's ids mean the same token to the proxy."""

    shared_ids: list[int]
    differing: list[tuple[int, str, str | None]]  # (id, teacher's token, proxy's token or None)


def match_vocabularies(teacher_tokenizer, proxy_tokenizer):
    """Compare id -> token of teacher and proxy over the teacher's ids.

    Added tokens may differ: they are listed and left out of shared_ids, so Delta is 0 for them. Raises
    ValueError when an ordinary token differs: the two have different tokenizers.
    """
    differing, ordinary = compare_tokens(teacher_tokenizer, proxy_tokenizer)
    if ordinary:
        raise ValueError(
            f"teacher and proxy use different vocabularies ({describe_mismatch(ordinary)}): "
            "choose a proxy_student of the teacher's tokenizer family"
        )
    ids = sorted(teacher_tokenizer.get_vocab().values())
    without_delta = {i for i, _, _ in differing}
    return Vocabulary([i for i in ids if i not in without_delta], differing)


def compare_tokens(ours, theirs):
    """[(id, our token, their token or None)] where two tokenizers differ over our ids: all; ordinary ones."""
    our_tokens = {i: token for token, i in ours.get_vocab().items()}
    their_tokens = {i: token for token, i in theirs.get_vocab().items()}
    added = set(ours.added_tokens_decoder) | set(theirs.added_tokens_decoder)
    differing = [
        (i, t, their_tokens.get(i)) for i, t in sorted(our_tokens.items()) if their_tokens.get(i) != t
    ]
    return differing, [row for row in differing if row[0] not in added]


def describe_mismatch(ordinary):
    i, ours, theirs = ordinary[0]
    return f"{len(ordinary)} ordinary tokens differ, the first is id {i}: {ours!r} against {theirs!r}"


def check_rows(tokenizer, num_rows, model_name):
    """ValueError when a model has no embedding row for some id of the tokenizer."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= num_rows:
        raise ValueError(
            f"the tokenizer has token id {largest}, but {model_name} only {num_rows} embedding rows: "
            "the tokenizer does not belong to this model"
        )
