"""The architecture, the tokenizer and the processor of tiny LLaVA, all in Hugging Face's standard classes.

Every 336 x 336 picture becomes 24 x 24 patches of 14 pixels, that is 576 visual tokens, as in LLaVA-1.5; everything
else is small.
"""

from __future__ import annotations

import itertools

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vkvx.models.tiny_llava import data

PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
SPECIAL = (PAD, BOS, EOS, IMAGE)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalisation of pixels in 0..1, a value a channel."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' -%}
    {{- 'ASSISTANT: ' -}}
  {%- elif message['role'] == 'user' -%}
    {{- 'USER: ' -}}
  {%- elif message['role'] != 'system' -%}
    {{- raise_exception('unknown role ' + message['role']) -}}
  {%- endif -%}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}
        {{- '<image>\\n' -}}
      {%- elif part['type'] == 'text' -%}
        {{- part['text'] -}}
      {%- else -%}
        {{- raise_exception('unknown content type ' + part['type']) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '</s>' if message['role'] == 'assistant' else ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- 'ASSISTANT:' -}}
{%- endif -%}
"""


def turn(prompt: str, images: int) -> str:
    """A user's turn up to where the assistant answers: what the chat template gives, for training."""
    return f"USER: {f'{IMAGE}{chr(10)}' * images}{prompt} ASSISTANT:"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: it represents any text; each digit is one token, so is each word of the questions.

    The few merges are learnt from the questions themselves, always the same ones.
    """
    tokenizer = Tokenizer(models.BPE())
    # Digits and line ends never merge with anything: an answer of n digits is always n tokens.
    alone = pre_tokenizers.Split(Regex(r"[0-9]|\n"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([alone, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=1,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=4096,
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE},
    )


def _texts() -> list[str]:
    """Every wording that the data set uses."""
    rng = data.np.random.default_rng(0)
    pages = [data.page(seed, "train") for seed in range(2)]
    texts = [turn(text, images=0) + " " + answer for text, answer in (data.text_question(rng) for _ in range(200))]
    for name, kind, page, _ in itertools.product(("page", "first page", "second page"), data.KINDS, pages, range(40)):
        prompt, answer = data.question(page.digits, page.marks, kind, rng, name)
        texts.append(turn(prompt, images=0) + " " + answer)
    texts += [f" {colour} {shape} none {colour[1:]}" for colour, shape in itertools.product(data.COLOURS, data.SHAPES)]
    return texts


def build_processor() -> LlavaProcessor:
    """Tokenizer, CLIP image processor (the pillow one) and chat template."""
    from transformers import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        size={"shortest_edge": data.SIZE},
        crop_size={"height": data.SIZE, "width": data.SIZE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy "default" leaves out
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A freshly initialised model, float32. The seed is torch's global one."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,  # the last is computed but not used: features come from the layer before, as in LLaVA-1.5
        num_attention_heads=3,
        image_size=data.SIZE,
        patch_size=14,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(data.SIZE // 14) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    generation.pad_token_id, generation.do_sample = tokenizer.pad_token_id, False
    return model
