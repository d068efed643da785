"""An HTTP server with OpenAI's interface, over :class:`vkvx.Server`."""
