"""The forms of models that are trained, by the names of the checkpoints."""

from training.forms.base import Form, Layout
from training.forms.intern import TinyIntern
from training.forms.llava import TinyLlava
from training.forms.qwen import TinyQwen

FORMS: dict[str, Form] = {form.name: form for form in (TinyLlava(), TinyQwen(), TinyIntern())}

__all__ = ["FORMS", "Form", "Layout"]
