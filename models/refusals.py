"""Architectures that people may try and that are refused, each with its reason and what helps.

Whoever writes a family for one of them drops its line here and its name in docs/models.md. Tests compare the two, and
ask for a line or a family for whatever transformers lists as a model from pictures and text to text.
"""

from __future__ import annotations

_DENSE = "choose experts for each token, which is not exported; give a dense model such as"
_ATTENDING = "give a model whose layers all attend, such as qwen3-vl-8b"
_OTHERS = "`vkvx models` lists what can be exported"

_EXPERTS = f"its layers {_DENSE} qwen3-vl-8b"
_RECURRENT = "some of its layers are recurrent, which is supported in Qwen3.5 alone; give qwen3.5-9b or qwen3-vl-8b"
_CONVOLUTIONS = f"some of its layers are convolutions and keep a state instead of keys and values; {_ATTENDING}"
_LATENTS = "its layers cache latents that keys and values are made of; give another model, such as qwen3-vl-8b"
_NO_ROTATION = (
    "some of its layers attend within a window and the others without a rotary embedding, which is not exported; "
    "give another model, such as qwen3-vl-8b"
)
_CROSS_ATTENTION = f"its text looks at pictures by cross attention, and no visual tokens lie in the KV cache; {_OTHERS}"
_ENCODER_DECODER = f"an encoder reads the picture, and no visual tokens lie in the decoder's KV cache; {_OTHERS}"
_QUERIES = f"a Q-Former makes 32 tokens of a picture, too few to be worth packing; {_OTHERS}"
_CODEBOOK = f"its pictures are tokens of a codebook, not embeddings of a vision tower; {_OTHERS}"
_NO_ROPE = f"its decoder learns or adds positions and has no rotary embedding, which every family has; {_OTHERS}"
_NOT_TEXT = f"it does not write text from pictures token by token; {_OTHERS}"
_SOUND = "it also hears, and sound is not exported; give a model of pictures and text, such as qwen2.5-vl-7b"
_UNDESCRIBED = f"no family describes it yet, and docs/adding-a-model.md shows how to write one; {_OTHERS}"
_REMOTE = f"it exists only as remote code, which cannot be exported; {_OTHERS}"

REFUSALS = {
    # Layers that are not attention over keys and values.
    "Qwen4ExpForConditionalGeneration": _RECURRENT,
    "MiniCPMV4_6ForConditionalGeneration": _RECURRENT,
    "MiniCPMV4_7ForConditionalGeneration": _RECURRENT,
    "MiniCPMOcrForConditionalGeneration": _RECURRENT,
    "Glm5NextForConditionalGeneration": _RECURRENT,
    "NemotronH_Omni_Reasoning_V3": _RECURRENT,
    "Lfm2VlForConditionalGeneration": _CONVOLUTIONS,
    "Lfm3VlForConditionalGeneration": _CONVOLUTIONS,
    "Kimi_K25ForConditionalGeneration": _LATENTS,
    "Mistral4ForCausalLM": _LATENTS,
    "MistralLarge4ForConditionalGeneration": _LATENTS,
    "Dots3NoteForConditionalGeneration": _LATENTS,
    # Experts.
    "Qwen3VLMoeForConditionalGeneration": _EXPERTS,
    "Qwen3OmniMoeThinkerForConditionalGeneration": _EXPERTS,
    "Qwen3OmniMoeForConditionalGeneration": _EXPERTS,
    "Qwen3_5MoeForConditionalGeneration": f"its layers {_DENSE} qwen3.5-9b",
    "Glm4vMoeForConditionalGeneration": f"its layers {_DENSE} glm-4.1v-9b or glm-4.6v-flash",
    "Ernie4_5_VLMoeForConditionalGeneration": _EXPERTS,
    "Llama4ForConditionalGeneration": _EXPERTS,
    "AriaForConditionalGeneration": _EXPERTS,
    "DeepseekOcr2ForConditionalGeneration": f"its layers {_DENSE} glm-ocr or paddleocr-vl",
    "UnlimitedOcrForConditionalGeneration": f"its layers {_DENSE} glm-ocr or paddleocr-vl",
    "InklingForConditionalGeneration": _EXPERTS,
    "Inkling2ForConditionalGeneration": _EXPERTS,
    "MiniMaxM3SparseForConditionalGeneration": _EXPERTS,
    "MuseSparkForConditionalGeneration": _EXPERTS,
    "Step3p7ForConditionalGeneration": _EXPERTS,
    # Attention, positions and masks.
    "AyaVisionForConditionalGeneration": _NO_ROTATION,
    "Cohere2VisionForConditionalGeneration": _NO_ROTATION,
    "Exaone4_5_ForConditionalGeneration": _NO_ROTATION,
    "MuseGlimmerForConditionalGeneration": _NO_ROTATION,
    "Phi4MultimodalForCausalLM": "its rotary embedding changes with the length of the text (longrope), and what is "
    f"cached must not change; {_OTHERS}",
    "Molmo2ForConditionalGeneration": "tokens of all its pictures attend to each other, and a cache that is filled "
    f"picture by picture cannot follow; {_OTHERS}",
    "GitForCausalLM": _NO_ROPE,
    "Kosmos2ForConditionalGeneration": _NO_ROPE,
    "Kosmos2_5ForConditionalGeneration": _NO_ROPE,
    "Gemma3nForConditionalGeneration": "its layers keep several streams of hidden states, and some share keys and "
    "values; give gemma3-4b",
    # Pictures that are not visual tokens in the cache.
    "MllamaForConditionalGeneration": _CROSS_ATTENTION,
    "IdeficsForVisionText2Text": _CROSS_ATTENTION,
    "BlipForConditionalGeneration": _CROSS_ATTENTION,
    "Florence2ForConditionalGeneration": _ENCODER_DECODER,
    "Pix2StructForConditionalGeneration": _ENCODER_DECODER,
    "PPFormulaNetForConditionalGeneration": _ENCODER_DECODER,
    "T5Gemma2ForConditionalGeneration": _ENCODER_DECODER,
    "UdopForConditionalGeneration": _ENCODER_DECODER,
    "VisionEncoderDecoderModel": _ENCODER_DECODER,
    "Blip2ForConditionalGeneration": _QUERIES,
    "InstructBlipForConditionalGeneration": _QUERIES,
    "InstructBlipVideoForConditionalGeneration": _QUERIES,
    "ChameleonForConditionalGeneration": _CODEBOOK,
    "Emu3ForConditionalGeneration": _CODEBOOK,
    "DiffusionGemmaForBlockDiffusion": _NOT_TEXT,
    "EvollaForProteinText2Text": _NOT_TEXT,
    "PI0ForConditionalGeneration": _NOT_TEXT,
    # Sound beside pictures.
    "Qwen2_5OmniThinkerForConditionalGeneration": _SOUND,
    "Qwen2_5OmniForConditionalGeneration": _SOUND,
    "Gemma4UnifiedForConditionalGeneration": _SOUND,
    # Nothing known against them.
    "CohereCompassForConditionalGeneration": _UNDESCRIBED,
    "Cosmos3EdgeForConditionalGeneration": _UNDESCRIBED,
    "Cosmos3OmniForConditionalGeneration": _UNDESCRIBED,
    "DeepseekVLForConditionalGeneration": _UNDESCRIBED,
    "DeepseekVLHybridForConditionalGeneration": _UNDESCRIBED,
    "FastVlmForConditionalGeneration": _UNDESCRIBED,
    "FuyuForCausalLM": _UNDESCRIBED,
    "GotOcr2ForConditionalGeneration": _UNDESCRIBED,
    "Granite4VisionForConditionalGeneration": _UNDESCRIBED,
    "GraniteDoclingForConditionalGeneration": _UNDESCRIBED,
    "HunYuanVLForConditionalGeneration": _UNDESCRIBED,
    "HyperCLOVAXVisionV2ForConditionalGeneration": _UNDESCRIBED,
    "Idefics2ForConditionalGeneration": _UNDESCRIBED,
    "JanusForConditionalGeneration": _UNDESCRIBED,
    "LlavaNextVideoForConditionalGeneration": _UNDESCRIBED,
    "Ovis2ForConditionalGeneration": _UNDESCRIBED,
    "PerceptionLMForConditionalGeneration": _UNDESCRIBED,
    "QianfanOCRForConditionalGeneration": _UNDESCRIBED,
    "VideoLlama3ForConditionalGeneration": _UNDESCRIBED,
    "VideoLlavaForConditionalGeneration": _UNDESCRIBED,
    "VipLlavaForConditionalGeneration": _UNDESCRIBED,
    # Code outside transformers.
    "InternVLChatModel": "it is code outside transformers, which cannot be exported; give the same model in "
    "transformers' own format, whose repository ends in -hf or -HF, such as OpenGVLab/InternVL3-8B-hf",
    "LlavaLlamaForCausalLM": "it is code outside transformers, which cannot be exported; give LLaVA-1.5 in "
    "transformers' own format: llava-hf/llava-1.5-7b-hf or llava-hf/llava-1.5-13b-hf",
    "LlavaQwenForCausalLM": "it is code outside transformers, which cannot be exported; give LLaVA-OneVision in "
    "transformers' own format: llava-hf/llava-onevision-qwen2-0.5b-ov-hf or llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "KimiVLForConditionalGeneration": _REMOTE,
    "MiniCPMV": _REMOTE,
    "MolmoForCausalLM": _REMOTE,
    "Ovis": _REMOTE,
    "Phi3VForCausalLM": _REMOTE,
}
"""Why an architecture of config.json, which is also the class of a loaded model, is refused."""
