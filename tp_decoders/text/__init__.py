"""Text to token ids and back: the kinds of tokenizers, the settings beside them, decoding as tokens arrive.
Stop strings and streams are cluster/frontend/output's.
"""
