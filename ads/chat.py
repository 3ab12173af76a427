"""Every place where tokens must agree: tokenizer, prompt, response boundary, labels, answer forcing.

Token ids are carried end to end; text is for people, for grading and for the student's other tokenizer.
"""

import contextlib
import copy
import functools
import json
import re
from dataclasses import dataclass
from datetime import datetime

from ads.stage import errors, hub
from ads.stage.errors import UserError
from ads.stage.world import print0

SYSTEM_PROMPT = "You are a helpful assistant. Reason step by step and put your final answer within \\boxed{}."
FORCE_TEXT = "\n\n**Final Answer**\n\\[\\boxed{"
THINK_END = "\n</think>"
NUM_FORCED_TOKENS = 32
IGNORED_LABEL = -100
# Many templates print today's date, but prompts may not depend on the day. Llama 3's prints date_string where
# it is given; others call strftime_now, which the library lends them: a macro of that name takes its place.
FIXED_DATE = datetime(2024, 7, 26)
DATE_STRING = f"{FIXED_DATE:%d %b %Y}"
DIRECTIVES = [f"%{flag}{letter}" for flag in ("", "-") for letter in "aAbBcdDeFGhHIjmMpRSTuUVwWxXyY"]
STRFTIME_NOW = (
    "{% macro strftime_now(format) %}{% set made = namespace(text=format) %}"
    f"{{% for directive, text in {json.dumps([(d, FIXED_DATE.strftime(d)) for d in DIRECTIVES])} %}}"
    "{% set made.text = made.text.replace(directive, text) %}{% endfor %}{{ made.text }}{% endmacro %}\n"
)
# Parts of tokenizer.json that see to spaces, and what one that is a sequence calls the parts within it
INNER = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
EXAMPLE_PROBLEM = 'Is 3 < 4 & 5 > 4?\nSay "yes" or "no".'


def load_tokenizer(name, need_chat_template=True):
    """The tokenizer `name` (folder or hub name); ValueError when it has no usable chat template or no eos."""
    from transformers import AutoTokenizer

    where, commit = hub.locate(name, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=commit)
    except Exception as error:  # whatever a folder that does not hold together makes the library raise
        raise UserError(f"tokenizer {name!r} could not be loaded: {errors.reason(error)}") from error
    if need_chat_template and not tokenizer.chat_template:
        raise UserError(
            f"tokenizer {name!r} has no chat template: set tokenizer to one of the family that has"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name!r} has no eos token: set eos_token in its tokenizer_config.json")
    if need_chat_template:
        instruction_place(tokenizer)
    return tokenizer


def load_tokenizer_for(model_name, tokenizer_name=None):
    """The tokenizer of a model: its own, or `tokenizer_name`, which must then have the same vocabulary.

    A base model often has no chat template: then that of its instruct sibling is named. Where its template
    shows no system message, that is said.
    """
    tokenizer = load_tokenizer(tokenizer_name or model_name)
    if tokenizer_name and tokenizer_name != model_name:
        try:
            own = load_tokenizer(model_name, need_chat_template=False)
        except (ValueError, FileNotFoundError):  # the model comes without one
            own = tokenizer
        if ordinary := compare_tokens(tokenizer, own)[1]:
            raise UserError(
                f"tokenizer {tokenizer_name!r} does not belong to model {model_name!r}: "
                f"{describe_mismatch(ordinary)}"
            )
    if place := describe_place(tokenizer):
        print0(place)
    return tokenizer


def encode(tokenizer, text):
    """Token ids of a text that begins a sequence, nothing added."""
    return tokenizer.encode(text, add_special_tokens=False)


def encode_next(tokenizer, text, **keywords):
    """Token ids of a text that follows other text: they stand for it alone, with no space before it."""
    return continuing(tokenizer).encode(text, add_special_tokens=False, **keywords)


def decode_next(tokenizer, ids):
    """The text that ids add to those before them, a space that it begins with included."""
    return continuing(tokenizer).decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@functools.lru_cache(maxsize=8)
def continuing(tokenizer):
    """A tokenizer for text that follows other text: `tokenizer` itself, or a copy without its space in front.

    SentencePiece's tokenizers put a space in front of whatever they encode, as if each text began a sequence,
    and take it away when they decode.
    """
    if not tokenizer.is_fast:
        return tokenizer
    backend = tokenizer.backend_tokenizer
    before = {name: getattr(backend, name) for name in INNER}
    before = {name: json.loads(part.__getstate__()) if part else None for name, part in before.items()}
    after = {name: without_space(part, name) for name, part in before.items()}
    if after == before:
        return tokenizer
    from tokenizers import Tokenizer, models

    made = copy.deepcopy(tokenizer)
    holder = Tokenizer.from_str(json.dumps(json.loads(Tokenizer(models.BPE()).to_str()) | after))
    for name in INNER:
        setattr(made.backend_tokenizer, name, getattr(holder, name))
    return made


def without_space(part, name, is_first=True):
    """A part of tokenizer.json that leaves a text's beginning alone; None where nothing is left of it.

    A Metaspace behind what splits a text into words adds the spaces between them, and stays.
    """
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        inner = [without_space(each, name, k == 0) for k, each in enumerate(part[INNER[name]])]
        return {**part, INNER[name]: [each for each in inner if each is not None]}
    if part["type"] == "Metaspace" and (is_first or name == "decoder" or part["prepend_scheme"] == "first"):
        return {**part, "prepend_scheme": "never"}
    if part["type"] == "ByteLevel" and name == "pre_tokenizer":
        return {**part, "add_prefix_space": False}
    if part["type"] == "Strip" and name == "decoder":
        return {**part, "start": 0}
    return part


@functools.lru_cache(maxsize=8)
def instruction_place(tokenizer):
    """Where the chat template shows the instruction: "system", or "user" when it refuses or drops that role.

    Where it does, and the vocabulary lacks words of the instruction: "nowhere". ValueError when the template
    does not show instruction and problem as they are.
    """
    with contextlib.suppress(ValueError):
        render(tokenizer, "system", EXAMPLE_PROBLEM)
        return "system"
    place = "nowhere" if tokenizer.unk_token_id in encode(tokenizer, SYSTEM_PROMPT) else "user"
    try:
        render(tokenizer, place, EXAMPLE_PROBLEM)
    except ValueError as error:
        raise UserError(f"{error}; set tokenizer to one of the family whose template works") from error
    return place


def describe_place(tokenizer):
    """What to say of an instruction that is not in a system message; an empty text where it is."""
    name = f"tokenizer {tokenizer.name_or_path}: the chat template shows no system message"
    return {
        "system": "",
        "user": f"{name}: the instruction goes into the user's turn",
        "nowhere": f"{name}, and the vocabulary lacks the instruction's words: prompts go without it",
    }[instruction_place(tokenizer)]


def render(tokenizer, place, user):
    """The prompt as text, the instruction at its place; ValueError unless it and then `user` are shown."""
    messages = [{"role": "user", "content": f"{SYSTEM_PROMPT}\n\n{user}" if place == "user" else user}]
    if place == "system":
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, *messages]
    name = f"the chat template of tokenizer {tokenizer.name_or_path!r}"
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=STRFTIME_NOW + tokenizer.get_chat_template(),
            add_generation_prompt=True,
            tokenize=False,
            date_string=DATE_STRING,
        )
    except Exception as error:  # a template is a program of its own, which may raise anything
        raise UserError(f"{name} fails: {' '.join(str(error).split())[:200]}") from error
    rest = text if place == "nowhere" else text.partition(SYSTEM_PROMPT)[2]
    if user.strip() not in rest:  # templates may strip what they are given
        missing = f"problem {ascii(user[:50])}" if rest else "instruction"
        raise UserError(f"{name} does not show the {missing} as it is")
    return text


def render_prompt(tokenizer, problem, examples=()):
    """The prompt as text, up to where the model's response begins.

    `examples` are (problem, worked solution) pairs. They are shown inside the user's turn, since chat
    templates rewrite assistant turns (R1's drops everything up to </think>).
    """
    shown = "".join(f"Problem: {p}\n\nSolution: {s}\n\n\n" for p, s in examples)
    user = f"{shown}Problem: {problem}\n\nSolution:" if examples else problem
    return render(tokenizer, instruction_place(tokenizer), user)


def prompt_ids(tokenizer, problem, examples=()):
    """The prompt as token ids: the one function that training and evaluation both use.

    Text of the problem that reads like a control token, such as <think>, stays text.
    """
    given = [problem, *(text for example in examples for text in example)]
    mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if not any(c in text for text in given))
    inert = [break_control_text(tokenizer, text, mark) for text in given]
    text = render_prompt(tokenizer, inert[0], list(zip(inert[1::2], inert[2::2], strict=True)))
    first, *rest = text.split(mark)
    return encode(tokenizer, first) + [i for piece in rest for i in encode_rest(tokenizer, piece)]


def encode_rest(tokenizer, text):
    """Token ids of the rest of a prompt: its beginning follows other text, the template's tokens start anew.

    What comes after an added token is as it is in a prompt that is encoded in one piece.
    """
    added = tokenizer.added_tokens_decoder
    following, alone = encode_next(tokenizer, text), encode(tokenizer, text)
    first, rest = (next((k for k, i in enumerate(ids) if i in added), len(ids)) for ids in (following, alone))
    return following[:first] + alone[rest:]


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
    found = [
        owner.eos_token_id
        for owner in (tokenizer, model.config, model.generation_config)
        if owner is not None
    ]
    lists = [ids if isinstance(ids, list) else [ids] for ids in found if ids is not None]
    return {i for ids in lists for i in ids}


def response_text(tokenizer, ids, eos):
    """The response as text, without the eos that ended it; special tokens sampled on the way stay visible."""
    if ids and ids[-1] in eos:
        ids = ids[:-1]
    return decode_next(tokenizer, ids)


def token_texts(tokenizer, ids):
    """The text that each token adds; put together they are the decoded whole.

    A character of several tokens belongs to the last of them.
    """
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        text = decode_next(tokenizer, ids[:end])
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
    return encode_next(tokenizer, (THINK_END if is_thinking else "") + FORCE_TEXT)


def student_example(tokenizer, problem, trace, finished):
    """(input_ids, labels) of one training sequence: evaluation prompt, trace, and eos if the trace finished.

    Labels mask the prompt by its length. Special-token text inside a trace stays text.
    """
    prompt = prompt_ids(tokenizer, problem)
    response = encode_next(tokenizer, trace, split_special_tokens=True)
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
        raise UserError(
            f"teacher and proxy use different vocabularies ({describe_mismatch(ordinary)}): "
            "choose a proxy_student of the teacher's tokenizer family"
        )
    shared_ids = set(teacher_tokenizer.get_vocab().values()) - {i for i, _, _ in differing}
    return Vocabulary(sorted(shared_ids), differing)


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
        raise UserError(
            f"the tokenizer has token id {largest}, but {model_name} only {num_rows} embedding rows: "
            "the tokenizer does not belong to this model"
        )
