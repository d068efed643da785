"""The modules that an export traces and that torch runs: decoder, vision, and the metrics of `shaped`."""
