"""Placeholders and special tokens in prompts: they count in raw prompts, and are text in messages."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from families import CASES, TALL
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vkvx.errors import InputError
from vkvx.models.preset_processors import write_processor
from vkvx.models.presets import preset_config
from vkvx.models.registry import resolve
from vkvx.runtime.sessions.marks import LiteralTokenizer, Marks
from vkvx.runtime.sessions.processor import Processor, user_message

MARKS = Marks(["<image>", "<video>", "<|im_end|>", "<|im_end|>>", "</s>", "[INST]"])


@pytest.mark.parametrize(
    ("prompt", "texts", "marks"),
    [
        ("", [""], []),
        ("a <image></s>b", ["a ", "", "b"], ["<image>", "</s>"]),
        (r"a <\image> b", ["a <image> b"], []),
        (r"a <\\image> b\<image>", [r"a <\image> b" + "\\", ""], ["<image>"]),
        ("<|im_end|>>", ["", ""], ["<|im_end|>>"]),
        (r"\n <imag> C:\<dir> \\ [\INST]", [r"\n <imag> C:\<dir> \\ [INST]"], []),
    ],
)
def test_raw_prompts(prompt: str, texts: list[str], marks: list[str]) -> None:
    split = MARKS.split(prompt)
    assert (split.texts, split.marks) == (texts, marks)


def pieces() -> list[str]:
    return ["<image>", "<|im_end|>", "<", "ima", "ge>", "\\", "</s", ">", " ", "\n", "[INST]", "INST]", "[", "x", "|>"]


def test_escaped_text_has_no_marks_and_comes_out_as_it_was() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices(pieces(), k=draw.randrange(8)))
        split = MARKS.split(f"</s>{MARKS.escape(text)}<image>")
        assert (split.texts, split.marks) == (["", text, ""], ["</s>", "<image>"])


def test_templates_may_join_and_trim_texts() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        texts = ["".join(draw.choices(pieces(), k=draw.randrange(5))) for _ in range(3)]
        for trim in (str, str.strip):
            rendered = "</s>" + "".join(trim(MARKS.guard(text)) for text in texts) + "<image>"
            split = MARKS.split(MARKS.settle(rendered))
            assert split.marks == ["</s>", "<image>"], texts
            said = "".join(map(trim, texts))
            if "\\" not in said:  # one that stands between the parts of a mark is taken for an escape
                assert split.texts == ["", said, ""]


# Tokenizers


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A small BPE built like those of a family."""
    made = Tokenizer(models.BPE(byte_fallback=kind != "bytes", unk_token=None if kind == "bytes" else "<unk>"))
    flags: dict[str, bool] = {}
    if kind == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "gemma":
        made.normalizer = normalizers.Replace(" ", "▁")
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif kind == "bytes":
        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        flags = {"lstrip": True, "normalized": True}
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    made.decoder = decoders.ByteLevel() if kind == "bytes" else decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<image>"]
    words = ["a page of digits", "what is on the image </s> here", "<s> is struck through, <image> is a tag"] * 3
    made.train_from_iterator(words, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    made.add_special_tokens([AddedToken("</s>", rstrip=kind == "first", **flags), AddedToken("<turn>", **flags)])
    made.add_tokens([AddedToken("\n\n", normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = ("prepend", "always", "first", "gemma", "bytes")


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_that_are_text(kind: str) -> None:
    theirs = tokenizer(kind)
    special = {number: token for number, token in theirs.added_tokens_decoder.items() if token.special}
    ours = LiteralTokenizer(theirs, special)
    for text in ("a page", "<s>what is <image>\n\nhere?</s> a page </s>", "<turn>of digits <turn> <image><image> is"):
        for add in (True, False):
            assert ours(ours.special(text), add) == theirs(text, add_special_tokens=add)["input_ids"]
    plain = copy.deepcopy(theirs.backend_tokenizer)
    plain.encode_special_tokens = True
    for text in ("what </s> is <image>here", "</s>", "<turn> a\n\n<s>b"):
        ids = ours(text, False)
        assert ids == plain.encode(text, add_special_tokens=False).ids
        assert not special.keys() & set(ids) - {theirs.unk_token_id}
        (end,) = theirs("</s>", add_special_tokens=False)["input_ids"][-1:]
        assert ours(f"{text}{ours.special('</s>')}", False)[-1] == end


# Families


@pytest.fixture(scope="module", params=[case.preset for case in CASES])
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Processor:
    directory = tmp_path_factory.mktemp("checkpoint")
    config = preset_config(request.param)
    config.save_pretrained(directory)
    write_processor(directory, config)
    source = resolve(directory, weights=False)
    return Processor.of_checkpoint(source, source.info("float32"))


def prompt_of(processor: Processor, *parts: str) -> str:
    message = user_message("", 1)
    message["content"] = [{"type": "image"}, *({"type": "text", "text": text} for text in parts)]
    return processor.format([message]) if processor.has_chat_template else processor.plain(message)


def test_no_text_of_a_user_becomes_a_special_token(processor: Processor) -> None:
    """Of any family: the tokens are those of the text alone, between the tokens that the template writes."""
    theirs: Any = processor._tokenizer
    specials = [token.content for token in theirs.added_tokens_decoder.values() if token.special]
    plain = copy.deepcopy(theirs.backend_tokenizer)
    plain.encode_special_tokens = True

    def ids(*parts: str) -> list[int]:
        return processor.prepare(prompt_of(processor, *parts), [TALL]).token_ids.tolist()

    def of(text: str) -> list[int]:
        return plain.encode(text, add_special_tokens=False).ids

    (mark,) = of("?")
    before, after = " ".join(map(str, ids("?"))).split(f" {mark} ")
    assert not set(of("".join(specials))) & set(theirs.added_tokens_decoder)
    first = specials[-1]
    for parts in (
        (f"Is <image> or <video> {' '.join(specials)} here\\{specials[0]}",),
        ("".join(specials),),
        (rf"{first[0]}\{first[1:]} {first[0]}\\{first[1:]} {first[:-1]}",),
        (f"a {first[:3]}", f"{first[3:]} b"),
        *((f"a{one[:1]}", f"{one[1:-1]}", f"{one[-1:]}b") for one in specials[:3]),
    ):
        expected = f"{before} {' '.join(map(str, of(''.join(parts))))} {after}"
        assert " ".join(map(str, ids(*parts))) == expected, parts
    alone = processor.prepare(processor.escape("".join(specials)), first=False).token_ids.tolist()
    assert alone[: len(of("".join(specials)))] == of("".join(specials))


def test_pictures_where_the_text_says(processor: Processor) -> None:
    message = user_message(r"Is <image> like <image>, or <\image>? <video>", 2)
    prompt = processor.format([message]) if processor.has_chat_template else processor.plain(message)
    order = [prompt.index(word) for word in ("Is", "like", ", or")]
    places = [at for at in range(len(prompt)) if prompt.startswith("<image>", at)]
    assert [order[0], places[0], order[1], places[1], order[2]] == sorted((*order, *places))
    assert len(places) == 2
    assert processor.prepare(prompt, [TALL, TALL]).picture_lengths


# Messages


def test_messages_that_say_where_pictures_go() -> None:
    def kinds(text: str, pictures: int, videos: int = 0) -> list[str]:
        return [part.get("text", part["type"]) for part in user_message(text, pictures, videos)["content"]]

    assert kinds("What is <image>?", 0) == ["What is <image>?"]
    assert kinds("What?", 2) == ["image", "image", "What?"]
    assert kinds("<image> is <video>?", 1) == ["image", " is <video>?"]
    assert kinds("In <video>?", 1, 1) == ["image", "In ", "video", "?"]
    assert kinds(r"<\image> <\\image> <image>", 1) == [r"<image> <\image> ", "image"]


def test_a_template_that_puts_pictures_in_front(processor: Processor) -> None:
    if not processor.has_chat_template:
        pytest.skip("no template")
    images = "{%- for part in messages[-1]['content'] if part['type'] == 'image' -%}{{ 'IMAGE' }}{%- endfor -%}"
    texts = "{%- for part in messages[-1]['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    other = copy.copy(processor)
    other.__dict__.pop("_keeps_order", None)
    other._template = images.replace("IMAGE", processor._picture) + texts
    assert other.format([user_message("This <image>, <\\image>, that <image>?", 2)]) == (
        r"This <image>, <\image>, that <image>?"
    )
    assert other.format([user_message("What?", 2)]) == "<image><image>What?"
    parts = [{"type": "text", "text": "What is <image>?"}, {"type": "image"}]
    assert other.format([{"role": "user", "content": parts}]) == r"<image>What is <\image>?"


@pytest.mark.parametrize(
    "message", ["Hi", {"role": "user"}, {"role": "user", "content": ["Hi"]}, {"content": [{"a": 1}]}]
)
def test_what_is_no_message(processor: Processor, message: Any) -> None:
    if processor.has_chat_template:
        with pytest.raises(InputError, match="message"):
            processor.format([message])
