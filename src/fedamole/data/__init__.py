"""Private instruction data: sources, templates, partitions, splits and tokens.

Read in this order: `examples` (what everything turns into), `settings` (the `[data]` table), `sources` (files
to rows), `layouts` and `templates` (rows to examples), `partition` and `splits` (examples to clients),
`drawing` (one source's clients), `manifest` (`load_federation`, the way in), `text_encoder` (text to token
ids), `tokens` (examples to token ids).
"""
