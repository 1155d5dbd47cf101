"""Client data: reading rows, rendering examples, partitioning, splitting and tokenising.

`manifest.load_federation` is the entry point. Suggested reading order: `examples` (the result), `settings` (the
`[data]` table), `sources` (files to rows), `layouts` and `templates` (rows to examples), `partition` and `splits`
(rows to clients and splits), `drawing` (the clients of one source), `manifest` (all clients, and the stored
partition), `text_encoder` and `tokens` (examples to token ids).
"""
