"""The chat template of Qwen and InternVL; ``IMAGE`` and ``VIDEO`` are what a form writes for a picture and a video."""

TURNS = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{{- 'IMAGE' if part['type'] == 'image' else 'VIDEO' if part['type'] == 'video' else part['text'] -}}"
    "{%- endfor -%}{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
