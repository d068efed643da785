"""The packed cache inside transformers' own `generate()`."""
