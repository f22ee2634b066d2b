"""From texts to batches: sources -> tokenize -> store -> packed -> loader.

`sources` opens text, JSONL and Hugging Face dataset folders; `tokenize` turns them, once, into a folder of tokens;
`store` memory-maps that folder; `packed` cuts, splits and shuffles it; `loader` deals batches and says, as a value,
where it stands.
"""
